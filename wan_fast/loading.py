"""From a checkpoint's tensors to a model: merged with LoRAs, rounded, quantised and joined as the model has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wan_fast.blocks import fuse
from wan_fast.merging import Merger
from wan_fast.quantize import keep_stored, quantize_in, requantized, swap
from wan_fast.schemes import Form, linear_of
from wan_fast.weights import Packed, Part, read_tensors

M = TypeVar("M", bound=nn.Module)


def load_model(
    build: Callable[[], M],
    part: Part,
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype],
    *,
    forms: Mapping[str, Form] | None = None,
    report: Callable[[int], None] | None = None,
    **how: Any,
) -> M:
    """Build a model on meta and give it its weights one after the other; the others as in `read_state`."""
    with torch.device("meta"):
        model = build()
        swap(model, forms or {})
    model.load_state_dict(read_state(part, device, dtype, forms=forms, report=report, **how), assign=True)
    return model.requires_grad_(False).eval()


def reload(model: nn.Module, part: Part, names: Collection[str], dtype: Callable[[str], torch.dtype], **how: Any) -> None:
    """Read some of a model's tensors again, by their native names, into where they are; the others as in `read_state`."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    device = next(iter(own.values())).device
    for block in sorted({_block_of(name) for name in names}):
        # some are one in the model: all of a block that has any
        tensors = {name: info for name, info in part.tensors.items() if _block_of(name) == block}
        scales = {name: kinds for name, kinds in part.scales.items() if name in tensors}
        for name, tensor in read_state(replace(part, tensors=tensors, scales=scales), device, dtype, **how).items():
            own[name].copy_(tensor)


def _block_of(name: str) -> str:
    """'blocks.3.ffn.0.weight' -> 'blocks.3'; a tensor outside of the blocks is its own."""
    match = re.match(r"(?:(?:vace_)?blocks|face_adapter\.fuser_blocks)\.\d+", name)
    return match[0] if match else name


def read_state(
    part: Part,
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype],
    *,
    forms: Mapping[str, Form] | None = None,
    merger: Merger | None = None,
    through: torch.dtype | None = None,
    work_on: torch.device | None = None,
    lay_out: Callable[[Tensor], Tensor] | None = None,
    report: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """A model's state dict, read tensor by tensor.

    Args:
        part: where the tensors lie.
        device: where they go.
        dtype: the dtype to hold a tensor in, by its native name.
        forms: how linears are held that compute in 8 bits, by their name in the model.
        merger: what is added to them, in fp32, before they are rounded or quantised.
        through: a dtype to round every tensor to on the way.
        work_on: where is added.
        lay_out: how a tensor is to lie in memory.
        report: called with the bytes of each tensor read.
    """
    forms = forms or {}
    state: dict[str, Tensor] = {}
    for name, stored in read_tensors(part):
        linear = linear_of(name)
        form = forms.get(linear or "")
        merged = merger is not None and name in merger.targets
        if linear and form and form.stored:
            assert isinstance(stored, Packed)
            if merger and merged:
                stored = requantized(stored, merger.merged(name, stored.dequantized(), work_on), form)
            keep_stored(state, linear, name.removesuffix(".weight"), stored, form, device)
        else:
            tensor = stored.dequantized() if isinstance(stored, Packed) else stored
            if merger and merged:
                tensor = merger.merged(name, tensor, work_on)
            # what is quantised now is not rounded before
            kept = tensor.dtype if form else dtype(name)
            state[name] = (tensor if through is None else tensor.to(through)).to(device, kept)
        if lay_out:
            state[name] = lay_out(state[name])
        # as soon as they are there: never all of them twice
        if match := re.match(r".*(?:self_attn|fuser_blocks\.\d+)\.", name):
            fuse(state, match[0])
        if linear and form and not form.stored and f"{linear}.weight" in state:
            quantize_in(state, linear, form)
        if report:
            scales = part.scales.get(name, {}).values()
            report(sum(info.num_bytes for info in (part.tensors[name], *scales)))
    return state
