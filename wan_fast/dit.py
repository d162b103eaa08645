"""The Wan diffusion transformer (arXiv 2503.20314), after Peebles & Xie (arXiv 2212.09748), for inference.

A block is its matrix products, attention, and the fused operators of `wan_fast.kernels` between them; what these compute
is their references', in plain PyTorch. Parameter names in a state dict are the native ones. B batch, C channels, T H W
latent frames/height/width, L video tokens, S text tokens, D width, N heads, K head width, R modulation rows.

Precision follows the official autocast: the residual stream, norms, modulation, time embedding and head are fp32; the
other linears and attention run in the compute dtype, which is that of their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.attention import Attention, Projected, of_projection, sdpa
from wan_fast.kernels import Quantizer, patchify, qk_norm_rope, rope_table, unpatchify
from wan_fast.manifest import DiTDims
from wan_fast.quantize import Tokens, activated, added_and_modulated, modulated, shared, takes
from wan_fast.tasks import PATCH

Grid = tuple[int, int, int]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Context:
    """What a forward needs that depends neither on the latents nor on the timestep.

    `keys_values`: per block, text keys and values [B, S, N, K]. `grid`: tokens of the clip along (T, H, W). `table`: of
    `rope_table`, for its positions.
    """

    keys_values: tuple[KeysValues, ...]
    grid: Grid
    table: Tensor


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 of a noisy latent clip.

    Args:
        dims: its sizes.
        attention: exact, of video to video and to text.
        in_8_bits: of the video's tokens, in forwards that ask for it; None where there is none.
        keep: blocks at either end whose attention is always exact.
    """

    def __init__(self, dims: DiTDims, attention: Attention = sdpa, in_8_bits: Projected | None = None, keep: int = 0) -> None:
        super().__init__()
        D = dims.dim
        self.dims = dims
        self.patch_embedding = nn.Conv3d(dims.in_dim, D, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(dims.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(dims.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks: Iterable[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(dims, attention, in_8_bits if keep <= i < dims.num_layers - keep else None) for i in range(dims.num_layers)
        )
        self.head = Head(dims)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        *,
        split: int = 0,
        in_8_bits: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Velocity of a noisy clip.

        Args:
            latents: [B, C, T, H, W] fp32, H and W even.
            timestep: [B, R] fp32, in 0 .. 1000, with R of 1 or 2.
            context: what `prepare` returned for this text and grid.
            split: tokens before it take timestep row 0, the rest row 1, where R is 2.
            in_8_bits: self-attention is in 8 bits in the blocks that have it.
            residual: [B, L, D] in any float dtype, becomes the block stack's output less its input, for `resume`.

        Returns:
            [B, C, T, H, W] fp32.
        """
        x = self.embed(latents)  # [B, L, D]
        time = self.time_embedding(sinusoid(timestep, self.dims.freq_dim))  # [B, R, D]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, R, 6, D]
        tables = torch.stack([block.modulation for block in self.blocks])[:, None] + modulation  # [blocks, B, R, 6, D]
        # each block ends with the norm that the next one, or the head, begins with
        heads_own = self.head.modulated_by(time)
        following = [*(tuple(table[:, :, :2].unbind(2)) for table in tables[1:]), heads_own]
        first, *others = (takes(block.self_attn.qkv) for block in self.blocks)
        shift, scale = tables[0, :, :, :2].unbind(2)
        y = modulated(x, shift, scale, first, split=split, eps=self.dims.eps)
        for block, table, keys_values, then, to in zip(
            self.blocks, tables, context.keys_values, following, [*others, torch.float32], strict=True
        ):
            y = block(x, y, table, split, context, keys_values, then, to, in_8_bits)
        if residual is not None:
            torch.sub(x, self.embed(latents), out=residual)  # embedding again is cheaper than keeping a copy through the blocks
        T, H, W = latents.shape[2:]
        return unpatchify(self.head.head(y), (T, H, W))

    def resume(self, latents: Tensor, timestep: Tensor, residual: Tensor, *, split: int = 0) -> Tensor:
        """Velocity of a noisy clip, with what the block stack added in an earlier forward in the place of the blocks.

        Args:
            latents, timestep, split: as in `forward`.
            residual: [B, L, D] that a forward left.

        Returns:
            [B, C, T, H, W] fp32.
        """
        x = self.embed(latents)
        shift, scale = self.head.modulated_by(self.time_embedding(sinusoid(timestep, self.dims.freq_dim)))
        y = added_and_modulated(x, residual, None, shift, scale, torch.float32, split=split, eps=self.dims.eps)
        T, H, W = latents.shape[2:]
        return unpatchify(self.head.head(y), (T, H, W))

    def prepare(self, text: Sequence[Tensor], grid: Grid) -> Context:
        """Project text for all steps of a generation.

        Args:
            text: B tensors [S_i, text_dim], unpadded; the model was trained on zeros up to `text_len`, and attends to them.
            grid: (T, H/2, W/2) patches of the clip.

        Raises:
            ValueError: a text is longer than the model takes.
        """
        if max(t.shape[0] for t in text) > self.dims.text_len:
            raise ValueError(f"the model takes {self.dims.text_len} text tokens, got {[t.shape[0] for t in text]}")
        dtype = self.patch_embedding.weight.dtype
        padded = torch.stack([F.pad(t, (0, 0, 0, self.dims.text_len - t.shape[0])) for t in text])
        text_tokens = self.text_embedding(padded.to(dtype))  # [B, S, D]
        return Context(
            keys_values=tuple(block.cross_attn.project(text_tokens) for block in self.blocks),
            grid=grid,
            table=rope_table(max(grid), self.dims.head_dim, padded.device),
        )

    def embed(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, L, D] fp32: one token per 1x2x2 patch, w fastest."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        return F.linear(patchify(latents, dtype=weight.dtype), weight.flatten(1), bias).float()


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated and gated by the timestep."""

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Projected | None) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dims.dim))
        self.self_attn = SelfAttention(dims, attention, in_8_bits)
        self.norm3 = nn.LayerNorm(dims.dim, dims.eps)
        self.cross_attn = CrossAttention(dims, attention)
        self.ffn = FeedForward(nn.Linear(dims.dim, dims.ffn_dim), nn.GELU("tanh"), nn.Linear(dims.ffn_dim, dims.dim))

    def forward(
        self,
        x: Tensor,
        y: Tokens,
        table: Tensor,
        split: int,
        context: Context,
        keys_values: KeysValues,
        following: tuple[Tensor, Tensor],
        to: torch.dtype | Quantizer,
        in_8_bits: bool,
    ) -> Tokens:
        """One block, and the norm after it.

        Args:
            x: [B, L, D] fp32, the residual stream, changed in place.
            y: [B, L, D] in the compute dtype or in 8 bits: x, normed and modulated for this block.
            table: [B, R, 6, D] fp32 modulation of this block.
            split, context: as in `WanDiT.forward`.
            keys_values: of this block.
            following: shift and scale [B, R, D] fp32 of the norm after the block.
            to: what the linear that follows takes.
            in_8_bits: as in `WanDiT.forward`.

        Returns:
            [B, L, D]: the new x, normed and modulated for what follows.
        """
        _, _, gate1, shift2, scale2, gate2 = table.unbind(2)
        weight, bias = (t.expand(x.shape[0], 1, -1) for t in (self.norm3.weight, self.norm3.bias))
        own: dict[str, Any] = {"split": split, "eps": self.eps}
        y = self.self_attn(y, context, in_8_bits)
        y = added_and_modulated(x, y, gate1, bias, weight, takes(self.cross_attn.q), affine=True, **own)
        y = self.cross_attn(y, keys_values)
        y = added_and_modulated(x, y, None, shift2, scale2, takes(self.ffn[0]), **own)
        y = self.ffn(y)
        return added_and_modulated(x, y, gate2, *following, to, **own)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear."""

    def forward(self, x: Tokens) -> Tensor:
        return self[2](activated(self[0], x, takes(self[2])))


class RMSNorm(nn.Module):
    """Over the full width, all heads together, in place."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        qk_norm_rope(x[:, :, None], self.weight[None], None, heads=1, eps=self.eps)
        return x


class SelfAttention(nn.Module):
    """Over the video's tokens. q, k and v are one projection, and q's and k's norms one parameter; a state dict has them
    apart, under their native names, and either form is loaded."""

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Projected | None = None) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.eps = dims.eps
        self.attention = of_projection(attention)
        self.in_8_bits = in_8_bits
        self.qkv = nn.Linear(dims.dim, 3 * dims.dim)
        self.norm_qk = nn.Parameter(torch.empty(2 * dims.dim))
        self.o = nn.Linear(dims.dim, dims.dim)
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: fuse(state, prefix))
        self.register_state_dict_post_hook(lambda module, state, prefix, _: unfuse(state, prefix))

    def forward(self, x: Tokens, context: Context, in_8_bits: bool = False) -> Tensor:
        """[B, L, D], as `qkv` takes it, -> [B, L, D] in the compute dtype."""
        qkv = self.qkv(x).unflatten(-1, (3, -1))  # [B, L, 3, D]
        attention = self.in_8_bits if in_8_bits and self.in_8_bits else self.attention
        weight, heads = self.norm_qk.view(2, -1), self.heads[0]
        return self.o(attention(qkv, weight, context.table, grid=context.grid, heads=heads, eps=self.eps).flatten(2))


_FUSED = {
    "qkv.weight": ("q.weight", "k.weight", "v.weight"),
    "qkv.bias": ("q.bias", "k.bias", "v.bias"),
    "qkv.weight_scale": ("q.weight_scale", "k.weight_scale", "v.weight_scale"),
    "norm_qk": ("norm_q.weight", "norm_k.weight"),
}


def fuse(state: MutableMapping[str, Any], prefix: str) -> None:
    """Join, where they are all there, the tensors of the self-attention under `prefix` that one parameter holds."""
    for fused, parts in _FUSED.items():
        names = [prefix + part for part in parts]
        if all(name in state for name in names):
            state[prefix + fused] = torch.cat([state.pop(name) for name in names])


def unfuse(state: MutableMapping[str, Any], prefix: str) -> None:
    """The reverse of `fuse`; the tensors are views of the joint one."""
    for fused, parts in _FUSED.items():
        joint = state.get(prefix + fused)
        if joint is None or joint.shape[0] % len(parts):  # there are no such scales, or blocks of 128 that reach across
            continue
        views = state.pop(prefix + fused).chunk(len(parts))
        state.update(zip([prefix + part for part in parts], views, strict=True))


class CrossAttention(nn.Module):
    """Over the text's tokens, whose keys and values are computed once per generation."""

    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.attention = attention
        self.q, self.k, self.v, self.o = (nn.Linear(dims.dim, dims.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dims.dim, dims.eps), RMSNorm(dims.dim, dims.eps)

    def project(self, text: Tensor) -> KeysValues:
        """Keys and values of text tokens [B, S, D]: the same at every step."""
        tokens = shared(text, self.k, self.v)
        return self.norm_k(self.k(tokens)).unflatten(-1, self.heads), self.v(tokens).unflatten(-1, self.heads)

    def forward(self, x: Tokens, keys_values: KeysValues) -> Tensor:
        """[B, L, D], as `q` takes it, -> [B, L, D] in the compute dtype."""
        q = self.norm_q(self.q(x)).unflatten(-1, self.heads)
        return self.o(self.attention(q, *keys_values).flatten(2))


class Head(nn.Module):
    """Projection to pixels of a patch, in fp32; the last block ends with its modulated norm."""

    def __init__(self, dims: DiTDims) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, dims.dim))
        self.head = nn.Linear(dims.dim, 4 * dims.out_dim)

    def modulated_by(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale [B, R, D] of its norm, from the time embedding [B, R, D]."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return shift, scale


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B, R] -> [B, R, dim] fp32: cosines first, then sines, of t 10000^(-2j/dim)."""
    half = dim // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def grid_of(shape: Sequence[int]) -> Grid:
    """(T, H/2, W/2) patches of latents [..., T, H, W]."""
    T, H, W = shape[-3:]
    return T // PATCH[0], H // PATCH[1], W // PATCH[2]
