"""Linears in 8 bits: the module that takes an nn.Linear's place, and how weights are brought to it.

What is quantised and how is decided beforehand, in schemes.py. A producer of tokens asks `takes` for what a linear wants of
them, and quantises in its own pass; what comes as it is, the linear quantises itself. Products: kernels/gemm_8bit.py.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.config import WanFastError
from wan_fast.kernels import (
    Quantized,
    Quantizer,
    adaln_modulate,
    adaln_modulate_quantized,
    gated_residual_adaln,
    gated_residual_adaln_quantized,
    gelu_tanh,
    gelu_tanh_quantized,
    gemm_8bit,
    gemm_8bit_gelu,
    quantize_rows,
)
from wan_fast.kernels.quantize_rows import DTYPES
from wan_fast.schemes import GROUP, Form
from wan_fast.weights import Packed

Tokens = Tensor | Quantized


class QuantizedLinear(nn.Module):
    """x W^T + bias with tokens and weight in 8 bits; the result is in the dtype of the bias.

    weight: [N, K] e4m3 or int8. weight_scale: fp32, [N] or [ceil(N / 128), ceil(K / 128)]. input_scale: [] fp32 where `form`
    has one. smooth: [K] fp32 where it has one.
    """

    def __init__(self, in_features: int, out_features: int, form: Form) -> None:
        super().__init__()
        self.form = form
        N, K = out_features, in_features
        scales = (-(-N // GROUP), -(-K // GROUP)) if form.weight == "block" else (N,)
        self.register_buffer("weight", torch.empty(N, K, dtype=DTYPES[form.precision]))
        self.register_buffer("weight_scale", torch.empty(scales))
        self.register_buffer("bias", torch.empty(N))
        self.register_buffer("input_scale", torch.empty(()) if form.input == "tensor" else None)
        self.register_buffer("smooth", torch.empty(K) if form.smooth else None)
        self.weight: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor
        self.input_scale: Tensor | None
        self.smooth: Tensor | None

    @property
    def takes(self) -> Quantizer:
        """What it wants of its tokens."""
        return Quantizer(self.weight.dtype, self.form.input == "block", self.input_scale, self.smooth)

    def forward(self, x: Tokens) -> Tensor:
        """[..., K] -> [..., N]."""
        return gemm_8bit(*self.quantized(x), self.weight, self.weight_scale, self.bias, dtype=self.bias.dtype)

    def gelu(self, x: Tokens, to: Quantizer) -> Quantized:
        """[..., K] -> GELU of [..., N], quantised in the same pass, for a scale that is not of the whole row."""
        own = (self.weight, self.weight_scale, self.bias)
        return gemm_8bit_gelu(*self.quantized(x), *own, groups=to.groups, fixed=to.fixed, smooth=to.smooth)

    def quantized(self, x: Tokens) -> Quantized:
        return x if isinstance(x, Quantized) else quantize_rows(x.contiguous(), **self.takes._asdict())


def takes(linear: Any) -> torch.dtype | Quantizer:
    """What a linear wants of its tokens: a dtype, or how they are to be quantised."""
    return linear.takes if isinstance(linear, QuantizedLinear) else linear.weight.dtype


def modulated(x: Tensor, shift: Tensor, scale: Tensor, to: torch.dtype | Quantizer, **settings: Any) -> Tokens:
    """`adaln_modulate` to what the linear behind it takes."""
    if isinstance(to, Quantizer):
        return adaln_modulate_quantized(x, shift, scale, **settings, **to._asdict())
    return adaln_modulate(x, shift, scale, dtype=to, **settings)


def added_and_modulated(
    x: Tensor, y: Tokens, gate: Tensor | None, shift: Tensor, scale: Tensor, to: torch.dtype | Quantizer, **settings: Any
) -> Tokens:
    """`gated_residual_adaln` of a sublayer's result y to what the linear behind it takes."""
    assert isinstance(y, Tensor)
    if isinstance(to, Quantizer):
        return gated_residual_adaln_quantized(x, y, gate, shift, scale, **settings, **to._asdict())
    return gated_residual_adaln(x, y, gate, shift, scale, dtype=to, **settings)


def activated(up: Any, x: Tokens, to: torch.dtype | Quantizer) -> Tokens:
    """GELU of a linear's result, to what the linear behind it takes."""
    if not isinstance(to, Quantizer):
        hidden = up(x)
        gelu_tanh(hidden)
        return hidden
    same = isinstance(up, QuantizedLinear) and up.weight.dtype == to.dtype
    if same and (to.groups or to.fixed is not None):
        return up.gelu(x, to)
    return gelu_tanh_quantized(up(x), **to._asdict())


def swap(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Put a `QuantizedLinear` without values in the place of every linear named in `forms`, on its device."""
    for name, form in forms.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with linear.weight.device:
            setattr(model.get_submodule(parent), last, QuantizedLinear(linear.in_features, linear.out_features, form))


def forms_of(model: nn.Module) -> dict[str, Form]:
    """The forms of the linears that are quantised, by name."""
    return {name: module.form for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantize_weight(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as 8-bit values and their fp32 scale, [N] or [ceil(N / 128), ceil(K / 128)]."""
    dtype, (N, K) = DTYPES[form.precision], weight.shape
    if form.weight == "row":
        values, scale = quantize_rows(weight.contiguous(), dtype)
        return values, scale[:, 0]
    blocks = F.pad(weight, (0, -K % GROUP, 0, -N % GROUP)).unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
    # a block is a row of its own
    values, scale = quantize_rows(blocks.transpose(1, 2).flatten(2).contiguous(), dtype)  # [N / 128, K / 128, 128 x 128]
    laid = values.unflatten(2, (GROUP, GROUP)).transpose(1, 2).flatten(2).flatten(0, 1)
    return laid[:N, :K].contiguous(), scale[:, :, 0]


def requantized(packed: Packed, weight: Tensor, form: Form) -> Packed:
    """Another weight [N, K] fp32 in the place of a stored one: in the same form, with scales of its own."""
    values, scale = quantize_weight(weight if packed.smooth is None else weight / packed.smooth.to(weight.device), form)
    return replace(packed, values=values, scale=scale)


def shared(x: Tensor, *linears: Any) -> Tokens:
    """x, quantised once where all the linears behind it want the same; else as it is."""
    wanted = {linear.form if isinstance(linear, QuantizedLinear) else None for linear in linears}
    form = wanted.pop()
    if wanted or form is None or form.smooth or form.input == "tensor":
        return x
    return linears[0].quantized(x)


def keep_stored(
    state: MutableMapping[str, Any], linear: str, own: str, packed: Packed, form: Form, device: torch.device | str
) -> None:
    """Put a weight that lies in 8 bits into a model's state, of which `linear` may be a joint one.

    Args:
        state: name -> tensor.
        linear: name of the linear in the model: "blocks.0.self_attn.qkv".
        own: that in the checkpoint: "blocks.0.self_attn.q".
        packed: the weight.
        form: of the linear.
        device: where it goes.

    Raises:
        WanFastError: the parts of a joint linear want different tokens.
    """
    state[f"{own}.weight"], state[f"{own}.weight_scale"] = packed.values.to(device), packed.scale.to(device)
    if form.input == "tensor":  # one for all parts: the largest, so that none is cut off
        assert packed.input_scale is not None
        scale = packed.input_scale.to(device)
        state[f"{linear}.input_scale"] = torch.maximum(state.get(f"{linear}.input_scale", scale), scale)
    if form.smooth:
        assert packed.smooth is not None
        smooth = packed.smooth.to(device)
        if not torch.equal(state.setdefault(f"{linear}.smooth", smooth), smooth):
            raise WanFastError(f"q, k and v of {linear} are smoothed by different vectors; take --precision bf16")


def quantize_in(state: MutableMapping[str, Any], linear: str, form: Form) -> None:
    """Quantise the weight of a linear that lies in a model's state, and put its scale beside it."""
    values, scale = quantize_weight(state[f"{linear}.weight"], form)
    state[f"{linear}.weight"], state[f"{linear}.weight_scale"] = values, scale
