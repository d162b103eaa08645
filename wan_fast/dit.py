"""The Wan diffusion transformer (arXiv 2503.20314), after Peebles & Xie (arXiv 2212.09748), for inference.

Every op is plain PyTorch: this is the definition that faster ones are held against. Parameter names are the native
ones. B batch, C channels, T H W latent frames/height/width, L video tokens, S text tokens, D width, N heads, K head
width, R modulation rows.

Precision follows the official autocast: the residual stream, norms, modulation, time embedding and head are fp32; the
other linears and attention run in the compute dtype, which is that of their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.attention import Attention, sdpa
from wan_fast.manifest import DiTDims
from wan_fast.tasks import PATCH

Grid = tuple[int, int, int]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Context:
    """What a forward needs that depends neither on the latents nor on the timestep.

    `keys_values`: per block, text keys and values [B, S, N, K]. `rotation`: [L, K/2] complex64, one unit vector per
    token and pair of channels.
    """

    keys_values: tuple[KeysValues, ...]
    rotation: Tensor


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 of a noisy latent clip."""

    def __init__(self, dims: DiTDims, attention: Attention = sdpa) -> None:
        super().__init__()
        D = dims.dim
        self.dims = dims
        self.patch_embedding = nn.Conv3d(dims.in_dim, D, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(dims.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(dims.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks: Iterable[Block] = nn.ModuleList(Block(dims, attention) for _ in range(dims.num_layers))  # type: ignore[assignment]
        self.head = Head(dims)

    def forward(self, latents: Tensor, timestep: Tensor, context: Context, *, split: int = 0) -> Tensor:
        """Velocity of a noisy clip.

        Args:
            latents: [B, C, T, H, W] fp32, H and W even.
            timestep: [B, R] fp32, in 0 .. 1000, with R of 1 or 2.
            context: what `prepare` returned for this text and grid.
            split: tokens before it take timestep row 0, the rest row 1, where R is 2.

        Returns:
            [B, C, T, H, W] fp32.
        """
        x = self.embed(latents)  # [B, L, D]
        time = self.time_embedding(sinusoid(timestep, self.dims.freq_dim))  # [B, R, D]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, R, 6, D]
        for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
            x = block(x, modulation, split, context.rotation, keys_values)
        return unpatchify(self.head(x, time, split), grid_of(latents.shape))

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
            rotation=rotation_table(grid, self.dims.head_dim, padded.device),
        )

    def embed(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, L, D] fp32: one token per 1x2x2 patch, w fastest."""
        B, C, T, H, W = latents.shape
        patches = latents.reshape(B, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, 4 * C)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        return F.linear(patches.to(weight.dtype), weight.flatten(1), bias).float()


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated and gated by the timestep."""

    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dims.dim))
        self.self_attn = SelfAttention(dims, attention)
        self.norm3 = nn.LayerNorm(dims.dim, dims.eps)
        self.cross_attn = CrossAttention(dims, attention)
        self.ffn = nn.Sequential(nn.Linear(dims.dim, dims.ffn_dim), nn.GELU("tanh"), nn.Linear(dims.ffn_dim, dims.dim))

    def forward(self, x: Tensor, modulation: Tensor, split: int, rotation: Tensor, keys_values: KeysValues) -> Tensor:
        """x: [B, L, D] fp32, changed in place; modulation: [B, R, 6, D] fp32; the rest as in `WanDiT.forward`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).unbind(2)
        dtype = self.self_attn.q.weight.dtype
        y = adaln_modulate(x, shift1, scale1, split, self.eps).to(dtype)
        x = gated_residual(x, self.self_attn(y, rotation), gate1, split)
        x += self.cross_attn(self.norm3(x).to(dtype), keys_values)
        y = adaln_modulate(x, shift2, scale2, split, self.eps).to(dtype)
        return gated_residual(x, self.ffn(y), gate2, split)


class RMSNorm(nn.Module):
    """Over the full width, all heads together; rounded to the input's dtype before the weight, as officially."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.attention = attention
        self.q, self.k, self.v, self.o = (nn.Linear(dims.dim, dims.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dims.dim, dims.eps), RMSNorm(dims.dim, dims.eps)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D], both in the compute dtype."""
        q = rotate(self.norm_q(self.q(x)).unflatten(-1, self.heads), rotation).to(x.dtype)
        k = rotate(self.norm_k(self.k(x)).unflatten(-1, self.heads), rotation).to(x.dtype)
        v = self.v(x).unflatten(-1, self.heads)
        return self.o(self.attention(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.attention = attention
        self.q, self.k, self.v, self.o = (nn.Linear(dims.dim, dims.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dims.dim, dims.eps), RMSNorm(dims.dim, dims.eps)

    def project(self, text: Tensor) -> KeysValues:
        """Keys and values of text tokens [B, S, D]: the same at every step."""
        k = self.norm_k(self.k(text)).to(text.dtype)
        return k.unflatten(-1, self.heads), self.v(text).unflatten(-1, self.heads)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """[B, L, D] -> [B, L, D], both in the compute dtype."""
        q = self.norm_q(self.q(x)).to(x.dtype).unflatten(-1, self.heads)
        return self.o(self.attention(q, *keys_values).flatten(2))


class Head(nn.Module):
    """Modulated norm and projection to pixels of a patch, in fp32 throughout."""

    def __init__(self, dims: DiTDims) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, dims.dim))
        self.head = nn.Linear(dims.dim, 4 * dims.out_dim)

    def forward(self, x: Tensor, time: Tensor, split: int) -> Tensor:
        """x: [B, L, D] fp32; time: [B, R, D] fp32, before the six-way projection. Returns [B, L, 4C] fp32."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(adaln_modulate(x, shift, scale, split, self.eps))


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, split: int, eps: float) -> Tensor:
    """layer_norm(x) (1 + scale) + shift. x: [B, L, D]; shift, scale: [B, R, D], rows chosen by `split`."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    for row, tokens in _rows(shift.shape[1], split):
        part = y[:, tokens]
        torch.addcmul(shift[:, row], part, 1 + scale[:, row], out=part)
    return y


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, split: int) -> Tensor:
    """x + gate y, in place. x, y: [B, L, D], x fp32; gate: [B, R, D], rows chosen by `split`."""
    for row, tokens in _rows(gate.shape[1], split):
        x[:, tokens].addcmul_(y[:, tokens], gate[:, row])
    return x


def _rows(rows: int, split: int) -> Sequence[tuple[slice, slice]]:
    if rows == 1:
        return ((slice(0, 1), slice(None)),)
    return (slice(0, 1), slice(0, split)), (slice(1, 2), slice(split, None))


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B, R] -> [B, R, dim] fp32: cosines first, then sines, of t 10000^(-2j/dim)."""
    half = dim // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rotation_table(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """3-D RoPE (arXiv 2104.09864): [L, K/2] complex64, unit vectors exp(i position frequency).

    Each axis has its own ladder of frequencies: with K = 128, 22 pairs for time, 21 for height, 21 for width.
    """
    axis = 2 * (head_dim // 6)
    angles = []
    for size, width in zip(grid, (head_dim - 2 * axis, axis, axis), strict=True):
        frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64, device=device), frequency))
    T, H, W = grid
    t, h, w = angles
    angle = torch.cat(
        [
            t[:, None, None].expand(T, H, W, -1),
            h[None, :, None].expand(T, H, W, -1),
            w[None, None, :].expand(T, H, W, -1),
        ],
        dim=-1,
    ).reshape(T * H * W, head_dim // 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn adjacent pairs of channels. x: [B, L, N, K]; rotation: [L, K/2] complex64. Returns fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)


def grid_of(shape: Sequence[int]) -> Grid:
    """(T, H/2, W/2) patches of latents [..., T, H, W]."""
    T, H, W = shape[-3:]
    return T // PATCH[0], H // PATCH[1], W // PATCH[2]


def unpatchify(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, L, 4C], the channel fastest within a patch, -> [B, C, T, H, W]."""
    T, h, w = grid
    patches = tokens.reshape(tokens.shape[0], T, h, w, *PATCH[1:], -1)
    return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(tokens.shape[0], -1, T, h * 2, w * 2)
