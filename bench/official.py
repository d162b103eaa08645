"""The official code's way through a denoising step, on this engine's weights, each habit an option of its own.

It computes the same velocity. What it does more: the text is projected, and every block's keys and values of it are
computed, at every step; Wan 2.2 embeds a timestep per token and holds modulation [L, 6, D] in fp32 for all tokens; the
rotation is done in fp64. Facts from Wan-Video/Wan2.2 (Apache-2.0), wan/modules/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.attention import Attention
from wan_fast.blocks import Block, Context, CrossAttention, Grid, KeysValues, SelfAttention
from wan_fast.dit import WanDiT, grid_of, sinusoid
from wan_fast.kernels import unpatchify
from wan_fast.kernels.qk_norm_rope import rotation


@dataclass(frozen=True, slots=True)
class Habits:
    """What the official step repeats or widens."""

    text_every_step: bool = True
    modulation_per_token: bool = True
    rotation_in_fp64: bool = True


def official_step(
    model: WanDiT, latents: Tensor, timestep: Tensor, text: Sequence[Tensor], context: Context, habits: Habits
) -> Tensor:
    """Velocity of a noisy clip.

    Args:
        model: weights.
        latents: [B, C, T, H, W] fp32.
        timestep: [B, 1] fp32.
        text: B tensors [S, text_dim].
        context: `model.prepare(text, grid)`, for what is not repeated.
        habits: which of them to have.

    Returns:
        [B, C, T, H, W] fp32.
    """
    grid = grid_of(latents.shape)
    if habits.text_every_step:
        context = model.prepare(text, grid, like=context)
    x = model.embed(latents, context)
    K = model.dims.head_dim
    if habits.rotation_in_fp64:
        turn = rotation_table(grid, K, latents.device)
    else:
        turn = rotation(context.table, x.shape[1], grid, 0, K)[:, 0]
    if habits.modulation_per_token:
        timestep = timestep.expand(-1, x.shape[1])
    time = model.time_embedding(sinusoid(timestep, model.dims.freq_dim))  # [B, L or 1, D]
    modulation = model.time_projection(time).unflatten(-1, (6, -1))  # [B, L or 1, 6, D]
    for block, keys_values in zip(model.blocks, context.keys_values, strict=True):
        x = _block(block, x, modulation, turn, keys_values)
    shift, scale = (model.head.modulation + time[:, :, None]).unbind(2)
    return unpatchify(model.head.head(_modulate(x, shift, scale, model.dims.eps)), latents.shape[2:])


def _block(block: Block, x: Tensor, modulation: Tensor, turn: Tensor, keys_values: KeysValues) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + modulation).unbind(2)
    dtype = block.self_attn.qkv.weight.dtype
    y = _modulate(x, shift1, scale1, block.eps).to(dtype)
    x = x + _self_attention(block.self_attn, y, turn, block.cross_attn.attention) * gate1
    x = x + _cross_attention(block.cross_attn, block.norm3(x).to(dtype), keys_values)
    y = _modulate(x, shift2, scale2, block.eps).to(dtype)
    up, gelu, down = block.ffn
    return x + down(gelu(up(y))) * gate2


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _self_attention(layer: SelfAttention, x: Tensor, turn: Tensor, attention: Attention) -> Tensor:
    q, k, v = (F.linear(x, *part) for part in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    weight_q, weight_k = layer.norm_qk.chunk(2)
    q = _turn(_rms_norm(q, weight_q, layer.eps).unflatten(-1, layer.heads), turn).to(x.dtype)
    k = _turn(_rms_norm(k, weight_k, layer.eps).unflatten(-1, layer.heads), turn).to(x.dtype)
    return layer.o(attention(q, k, v.unflatten(-1, layer.heads)).flatten(2))


def _cross_attention(layer: CrossAttention, x: Tensor, keys_values: KeysValues) -> Tensor:
    q = _rms_norm(layer.q(x), layer.norm_q.weight, layer.norm_q.eps).to(x.dtype).unflatten(-1, layer.heads)
    attended = [layer.attention(q, *pair) for pair in keys_values]
    return layer.o(sum(attended[1:], attended[0]).flatten(2))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def rotation_table(grid: Grid, head_dim: int, device: torch.device) -> Tensor:
    """[L, K/2] complex128, one unit vector per token and pair of channels."""
    axis = 2 * (head_dim // 6)
    places = torch.meshgrid(*(torch.arange(size, dtype=torch.float64, device=device) for size in grid), indexing="ij")
    angles = [
        place.flatten()[:, None] * 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        for place, width in zip(places, (head_dim - 2 * axis, axis, axis), strict=True)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def _turn(x: Tensor, turn: Tensor) -> Tensor:
    """Rotation in the precision of `turn`: [L, K/2] complex64 or complex128."""
    real = torch.float64 if turn.dtype == torch.complex128 else torch.float32
    pairs = torch.view_as_complex(x.to(real).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).float()
