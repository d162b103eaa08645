"""Values of attention in e4m3, transposed: v8 = (v - center) / scale, a centre and a scale per channel.

The centre is the mean over tokens: the weights of a softmax sum to 1, so it is added to attention's result as it is, and what
is rounded is smaller. scale = max |v - center| / 448 (arXiv 2411.10958, 3.2). The product p v8 sums over tokens, which e4m3
tensor cores want innermost: hence the transposition, with zeros up to a multiple of 16 tokens.

B batch, S tokens, N heads, K head width. Three kernels: the range and sum of every channel in chunks, what follows from them,
the values. Bytes per value: 5, two read in bf16 twice and one written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register
from .quantize_rows import _SMALLEST, in_8_bits

GROUP = 16
# place -> token of a group: two registers of a sum of scores lie beside each other, and four of what a product in 8 bits takes
INTERLEAVED = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
_CHUNK = 1024


class Values(NamedTuple):
    """v [B, N, K, ceil(S / 16) 16] e4m3, and scale and center [B, N, K] fp32."""

    values: Tensor
    scale: Tensor
    center: Tensor


@triton.jit
def _quantize_values_ranges_kernel(
    v_ptr,  # [B, S, N, K]
    ranges_ptr,  # [B, N, chunks, 3, K] fp32: lowest, highest, sum
    S,
    v_batch,
    v_token,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    chunk, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, K)[None, :]
    lowest = tl.full([BLOCK_S, K], float("inf"), tl.float32)
    highest = tl.full([BLOCK_S, K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S, K], tl.float32)
    for s0 in tl.range(0, CHUNK, BLOCK_S):
        s = chunk * CHUNK + s0 + tl.arange(0, BLOCK_S)[:, None]
        # beyond the last it is the last once more
        at = v_ptr + b * v_batch + tl.minimum(s, S - 1).to(tl.int64) * v_token + n * K + channel
        v = tl.load(at).to(tl.float32)
        lowest = tl.minimum(lowest, v)
        highest = tl.maximum(highest, v)
        total += tl.where(s < S, v, 0.0)
    to = ranges_ptr + ((b * N + n) * tl.num_programs(0) + chunk) * 3 * K + tl.arange(0, K)
    tl.store(to, tl.min(lowest, axis=0))
    tl.store(to + K, tl.max(highest, axis=0))
    tl.store(to + 2 * K, tl.sum(total, axis=0))


@triton.jit
def _quantize_values_scales_kernel(
    ranges_ptr,  # [B N, chunks, 3, K] fp32
    scale_ptr,  # [B N, K] fp32
    center_ptr,  # [B N, K] fp32
    S,
    chunks,
    K: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, K)
    lowest = tl.full([K], float("inf"), tl.float32)
    highest = tl.full([K], float("-inf"), tl.float32)
    total = tl.zeros([K], tl.float32)
    for chunk in tl.range(0, chunks):
        at = ranges_ptr + (head * chunks + chunk) * 3 * K + channel
        lowest = tl.minimum(lowest, tl.load(at))
        highest = tl.maximum(highest, tl.load(at + K))
        total += tl.load(at + 2 * K)
    # of a channel with a NaN or an infinity the sum has one, and so have centre and scale
    center = total / S
    most = tl.maximum(highest - center, center - lowest)
    most = tl.where(most < _SMALLEST, _SMALLEST, most) / 448.0
    tl.store(scale_ptr + head * K + channel, tl.where(center - center == 0.0, most, float("nan")))
    tl.store(center_ptr + head * K + channel, center)


@triton.jit
def _quantize_values_kernel(
    v_ptr,  # [B, S, N, K]
    values_ptr,  # [B, N, K, S16] e4m3
    scale_ptr,  # [B, N, K] fp32
    center_ptr,  # [B, N, K] fp32
    S,
    S16,
    v_batch,
    v_token,
    N: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    s = place
    if INTERLEAVE:
        within = place % 16
        s = place - within + within // 2 % 2 * 8 + within // 4 * 2 + within % 2
    channel = tl.arange(0, K)
    at = v_ptr + b * v_batch + s.to(tl.int64)[:, None] * v_token + n * K + channel[None, :]
    v = tl.load(at, mask=(s < S)[:, None], other=0.0).to(tl.float32)
    row = (b * N + n) * K + channel
    v = (v - tl.load(center_ptr + row)[None, :]) * (1 / tl.load(scale_ptr + row))[None, :]
    q = in_8_bits(tl.where((s < S)[:, None], v, 0.0), 1.0, values_ptr.dtype.element_ty)
    tl.store(values_ptr + row[:, None] * S16 + place[None, :], q.T, mask=(place < S16)[None, :])


_CANDIDATES = tuple({"BLOCK_S": tokens, "num_warps": warps} for tokens in (32, 64, 128) for warps in (4, 8))


def _config() -> dict[str, int]:
    """Tokens at a time; not tuned on a device yet."""
    return {"BLOCK_S": 64, "num_warps": 4}


def padded(S: int) -> int:
    """Tokens with those that fill the last group."""
    return -(-S // GROUP) * GROUP


def _launch(v: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, scale, center = _fake(v, interleaved)
    B, S, N, K = v.shape
    if not v.numel():
        return values, scale, center
    chunks, config, strides = triton.cdiv(S, _CHUNK), _config(), v.stride()[:2]
    ranges = scale.new_empty(B, N, chunks, 3, K)
    with torch.cuda.device_of(v):
        _quantize_values_ranges_kernel[(chunks, N, B)](v, ranges, S, *strides, N=N, K=K, CHUNK=_CHUNK, BLOCK_S=16)
        _quantize_values_scales_kernel[(B * N,)](ranges, scale, center, S, chunks, K=K, num_warps=1)
        _quantize_values_kernel[(triton.cdiv(values.shape[3], config["BLOCK_S"]), N, B)](
            v, values, scale, center, S, values.shape[3], *strides, N=N, K=K, INTERLEAVE=interleaved, **config
        )
    return values, scale, center


def _reference(v: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    S = v.shape[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    w = v.to(wide)
    center = w.mean(1)
    w = w - center[:, None]
    scale = w.abs().amax(1).clamp_min(_SMALLEST.value) / 448
    w = F.pad((w * (1 / scale)[:, None]).permute(0, 2, 3, 1), (0, -S % GROUP))
    if interleaved:
        w = w.unflatten(3, (-1, GROUP))[..., INTERLEAVED.to(v.device)].flatten(3)
    if wide == torch.float64:
        return w.contiguous(), scale, center
    return w.clamp_(-448, 448).to(torch.float8_e4m3fn).contiguous(), scale, center


def _fake(v: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, S, N, K = v.shape
    scale, center = (v.new_empty(B, N, K, dtype=torch.float32) for _ in range(2))
    return v.new_empty(B, N, K, padded(S), dtype=torch.float8_e4m3fn), scale, center


_op = register("quantize_values", launch=_launch, reference=_reference, fake=_fake)


def quantize_values(v: Tensor, *, interleaved: bool = False) -> Values:
    """Values for `attention_8bit`.

    Args:
        v: [B, S, N, K] fp32, bf16 or fp16, dense along N and K, S of 1 or more, K a power of 2.
        interleaved: in the order of tokens that csrc/attention_sm90.cu takes.

    Returns:
        values [B, N, K, ceil(S / 16) 16] float8_e4m3fn, and scale and center [B, N, K] fp32.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    op = "quantize_values"
    fits = v.ndim == 4 and v.shape[1] >= 1 and v.shape[3] & (v.shape[3] - 1) == 0
    _check.shapes(op, "v [B, S, N, K] with S of 1 or more and K a power of 2", fits, v=v)
    _check.dtypes(op, _check.FLOATS, v=v)
    if v.stride()[2:] != (v.shape[3], 1):
        raise ValueError(f"{op} wants v dense along N and K, got strides {v.stride()} for shape {tuple(v.shape)}")
    return Values(*_op(v, interleaved))
