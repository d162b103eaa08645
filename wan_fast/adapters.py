"""What adds to the residual stream behind some blocks. Adapters hold modules that are the model's own, under native names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.attention import Attention, Projected
from wan_fast.blocks import Block, Context, KeysValues, add_gated_
from wan_fast.kernels import patchify
from wan_fast.manifest import DiTDims
from wan_fast.quantize import added_and_modulated, modulated, takes
from wan_fast.tasks import PATCH

# (block, x behind it [B, L, D] fp32) -> what is to be added to it, [B, L, D]
AfterBlock = Callable[[int, Tensor], Tensor]


class Adapter(Protocol):
    """Adds to x behind the blocks in `layers`. `modules`: by their names in the model."""

    layers: frozenset[int]
    modules: dict[str, nn.Module]

    def prepare(self, given: Tensor) -> Tensor:
        """What it is conditioned on [B, C, T, H, W] -> what it needs of it in every forward."""
        ...

    def project(self, text: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of text tokens [B, S, D], per block of its own."""
        ...

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        """One forward.

        Args:
            x: [B, L, D] fp32, the embedded latents.
            modulation: [B, R, 6, D] fp32, of the timestep.
            context, split, in_8_bits: as in `WanDiT.forward`.
        """
        ...


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

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: list[Projected | None]) -> None:
        self.eps, self.layers = dims.eps, frozenset(dims.vace_layers)
        self.place = {layer: n for n, layer in enumerate(dims.vace_layers)}
        self.patch_embedding = nn.Conv3d(dims.vace_dim, dims.dim, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(
            VaceBlock(dims, attention, in_8_bits[layer], first=n == 0) for n, layer in enumerate(dims.vace_layers)
        )
        self.modules: dict[str, nn.Module] = {"vace_patch_embedding": self.patch_embedding, "vace_blocks": self.blocks}

    def prepare(self, given: Tensor) -> Tensor:
        """[B, 96, T, H, W], what is to be followed -> [B, L, D] in the compute dtype."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        tokens = F.linear(patchify(given, dtype=weight.dtype), weight.flatten(1), bias)
        return self.blocks[0].before_proj(tokens)  # type: ignore[operator]

    def project(self, text: Tensor) -> tuple[KeysValues, ...]:
        return tuple((block.cross_attn.project(text),) for block in self.blocks)  # type: ignore[operator, union-attr]

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        assert context.adapter is not None
        own: dict[str, Any] = {"split": split, "eps": self.eps}
        stream = x + context.adapter
        blocks: list[VaceBlock] = list(self.blocks)  # type: ignore[arg-type]
        tables = [block.modulation + modulation for block in blocks]
        shift, scale = tables[0][:, :, :2].unbind(2)
        y = modulated(stream, shift, scale, takes(blocks[0].self_attn.qkv), **own)

        def hint(layer: int, _: Tensor) -> Tensor:
            nonlocal y
            n = self.place[layer]
            block, table = blocks[n], tables[n]
            last, gate = block(stream, y, table, split, context, context.adapter_keys_values[n], in_8_bits), table[:, :, 5]
            if n + 1 == len(blocks):
                add_gated_(stream, last, gate, split)
            else:
                shift, scale = tables[n + 1][:, :, :2].unbind(2)
                y = added_and_modulated(stream, last, gate, shift, scale, takes(blocks[n + 1].self_attn.qkv), **own)
            made = block.after_proj(stream.to(block.after_proj.weight.dtype))
            return made if context.adapter_scale == 1 else made * context.adapter_scale

        return hint
