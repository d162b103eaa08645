"""The VACE branch (arXiv 2503.07598)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.adapters.protocol import AfterBlock
from wan_fast.attention import Attention, Projected
from wan_fast.blocks import Block, Context, Given, Grid, add_gated_
from wan_fast.inputs import Inputs
from wan_fast.kernels import patchify
from wan_fast.manifest import DiTDims
from wan_fast.quantize import added_and_modulated, modulated, takes
from wan_fast.tasks import PATCH


class VaceBlock(Block):
    """A block of the VACE branch; what it makes of the stream is a hint for the model's own. The first joins the two."""

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Projected | None, first: bool) -> None:
        super().__init__(dims, attention, in_8_bits)
        if first:
            self.before_proj = nn.Linear(dims.dim, dims.dim)
        self.after_proj = nn.Linear(dims.dim, dims.dim)


class VaceBranch:
    """Blocks beside the model's own, over a clip to follow, each of which gives a hint to one of them (VACE, arXiv 2503.07598).

    It runs along: hint n is made when the block that takes it has run, so that there is never more than one.

    Args:
        dims: sizes of the model.
        attention: exact.
        in_8_bits: per block of the model's own, as in `WanDiT`.
    """

    takes = frozenset({"control"})

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Sequence[Projected | None]) -> None:
        self.eps, self.layers = dims.eps, frozenset(dims.vace_layers)
        self.place = {layer: n for n, layer in enumerate(dims.vace_layers)}
        self.patch_embedding = nn.Conv3d(dims.vace_dim, dims.dim, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(
            VaceBlock(dims, attention, in_8_bits[layer], first=n == 0) for n, layer in enumerate(dims.vace_layers)
        )
        self.modules: dict[str, nn.Module] = {"vace_patch_embedding": self.patch_embedding, "vace_blocks": self.blocks}

    def prepare(self, inputs: Inputs, text: Tensor, grid: Grid, like: Context | None) -> Given:
        keys_values = tuple((block.cross_attn.project(text),) for block in self.blocks)  # type: ignore[operator, union-attr]
        if like is not None and inputs.control is like.inputs.control:
            return Given(tensors=like.given.tensors, keys_values=keys_values)
        assert inputs.control is not None
        return Given(tensors=(self.embed(inputs.control[None]).expand(len(text), -1, -1),), keys_values=keys_values)

    def embed(self, control: Tensor) -> Tensor:
        """[B, 96, T, H, W], what is to be followed -> [B, L, D] in the compute dtype."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        tokens = F.linear(patchify(control, dtype=weight.dtype), weight.flatten(1), bias)
        return self.blocks[0].before_proj(tokens)  # type: ignore[operator]

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        own: dict[str, Any] = {"split": split, "eps": self.eps}
        stream = x + context.given.tensors[0]
        blocks: list[VaceBlock] = list(self.blocks)  # type: ignore[arg-type]
        tables = [block.modulation + modulation for block in blocks]
        shift, scale = tables[0][:, :, :2].unbind(2)
        y = modulated(stream, shift, scale, takes(blocks[0].self_attn.qkv), **own)

        def hint(layer: int, _: Tensor) -> Tensor:
            nonlocal y
            n = self.place[layer]
            block, table = blocks[n], tables[n]
            last, gate = block(stream, y, table, split, context, context.given.keys_values[n], in_8_bits), table[:, :, 5]
            if n + 1 == len(blocks):
                add_gated_(stream, last, gate, split)
            else:
                shift, scale = tables[n + 1][:, :, :2].unbind(2)
                y = added_and_modulated(stream, last, gate, shift, scale, takes(blocks[n + 1].self_attn.qkv), **own)
            made = block.after_proj(stream.to(block.after_proj.weight.dtype))
            scale_of_hints = context.inputs.control_scale
            return made if scale_of_hints == 1 else made * scale_of_hints

        return hint
