"""`qk_norm_rope` to 8 bits: queries and keys, normed and turned, with a scale per token and head, for `attention_8bit`.

Keys are centred first: a softmax is the same whatever one vector is taken from all keys of a head, and what these have in
common would take the bits (arXiv 2411.10958, 3.1). The vector need not be their exact mean. So it costs no trip over the keys:
`keys_center` norms and turns some thousand of them, spread over the clip, and takes the mean of those; of 32,760 tokens one in
31 is read.

B batch, L tokens, M projections of each, N heads, K head width, D = N K. Bytes per token: 4 D read in bf16, 2 D written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register
from .qk_norm_rope import check, normed_and_turned, rotation
from .quantize_rows import EIGHT_BITS, Quantized, in_8_bits, rounded, scale_of

# keys that a centre is taken of, at least; or all
_SAMPLES = 1024
# of these, those of one program
_PER_PROGRAM = 16


@triton.jit
def _keys_center_kernel(
    x_ptr,  # [B, L, M, D]
    weight_ptr,  # [2, D]
    table_ptr,  # [2, rows, K / 2] fp32
    sums_ptr,  # [B, programs, D] fp32
    L,
    stride,
    token_stride,
    rows,
    H,
    W,
    offset,
    EPS: tl.constexpr,
    ROPE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < K)
    place = n * K + k  # [BLOCK_N, BLOCK_K]
    weight_ptr += N * K
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i in tl.range(0, PER_PROGRAM):
        sample = tl.program_id(0) * PER_PROGRAM + i
        # another place in every stretch of `stride`, lest they all lie in one column of the clip
        token = sample * stride + sample * 7919 % stride
        number = offset + tl.minimum(token, L - 1)  # the table ends with the clip
        at = x_ptr + (b * L + token) * token_stride + N * K + place
        x = tl.load(at, mask=mask & (n < tl.where(token < L, N, 0)), other=0.0).to(tl.float32)
        total += normed_and_turned(
            x, weight_ptr, place, mask, table_ptr, rows, number, H, W, EPS, ROPE, BY_TOKEN, N, K, BLOCK_N, BLOCK_K
        )
    tl.store(sums_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * (N * K) + place, total, mask=mask)


@triton.jit
def _qk_norm_rope_quantized_kernel(
    x_ptr,  # [B, L, M, D]
    weight_ptr,  # [2, D]
    table_ptr,  # [2, rows, K / 2] fp32
    center_ptr,  # [B, N, K] fp32
    values_ptr,  # [2, B, L, N, K] int8 or e4m3
    scale_ptr,  # [2, B, N, L] fp32
    B,
    L,
    token_stride,
    rows,
    H,
    W,
    offset,
    EPS: tl.constexpr,
    ROPE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    CENTER: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program per token and tensor
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, place_in_clip = token // L, token % L
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < K)
    place = n * K + k  # [BLOCK_N, BLOCK_K]
    x = tl.load(x_ptr + token * token_stride + part * (N * K) + place, mask=mask, other=0.0).to(tl.float32)
    weight_ptr += part * (N * K)
    number = offset + place_in_clip
    y = normed_and_turned(
        x, weight_ptr, place, mask, table_ptr, rows, number, H, W, EPS, ROPE, BY_TOKEN, N, K, BLOCK_N, BLOCK_K
    )
    if CENTER:
        y -= tl.load(center_ptr + b * (N * K) + place, mask=mask & (n < part * N), other=0.0)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    scale = scale_of(y, 1, dtype)  # [BLOCK_N]
    head = tl.arange(0, BLOCK_N)
    tl.store(scale_ptr + ((part * B + b) * N + head) * L + place_in_clip, scale, mask=head < N)
    q = in_8_bits(y, (1 / scale)[:, None], dtype)
    tl.store(values_ptr + ((part * B + b) * L + place_in_clip) * (N * K) + place, q, mask=mask)


_CANDIDATES = tuple({"num_warps": warps} for warps in (2, 4, 8, 16))


def _config(D: int) -> dict[str, int]:
    """Warps: the fewest that keep a token within 80 registers; not tuned on a device yet."""
    return {"num_warps": 8 if D <= 4096 else 16}


def _launch_center(
    x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float
) -> Tensor:
    center = _fake_center(x, weight, table, grid, offset, heads, eps)
    B, L, _, D = x.shape
    K = D // heads
    _, H, W = grid or (1, 1, 1)
    if not x.numel():
        return center.zero_()
    stride = max(L // _SAMPLES, 1)
    programs = triton.cdiv(triton.cdiv(L, stride), _PER_PROGRAM)
    sums = center.new_empty(B, programs, heads, K)
    with torch.cuda.device_of(x):
        _keys_center_kernel[(programs, B)](
            x,
            weight,
            table,
            sums,
            L,
            stride,
            x.stride(1),
            1 if table is None else table.shape[1],
            H,
            W,
            offset,
            EPS=eps,
            ROPE=table is not None,
            BY_TOKEN=not grid,
            N=heads,
            K=K,
            PER_PROGRAM=_PER_PROGRAM,
            BLOCK_N=triton.next_power_of_2(heads),
            BLOCK_K=triton.next_power_of_2(K),
            **_config(D),
        )
    return torch.sum(sums, 1, out=center).div_(len(sampled(L)))


@lru_cache
def sampled(L: int) -> range | list[int]:
    """The tokens that a centre is taken of."""
    stride = max(L // _SAMPLES, 1)
    places = [i * stride + i * 7919 % stride for i in range(-(-L // stride))]
    return [token for token in places if token < L]


def _reference_center(
    x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float
) -> Tensor:
    _, L, _, D = x.shape
    tokens = torch.tensor(sampled(L), dtype=torch.int64, device=x.device)
    keys = _normed_and_turned(x[:, tokens, 1], weight[1], table, grid, offset + tokens, heads, eps)
    return keys.mean(1) if L else keys.new_zeros(x.shape[0], heads, D // heads)


def _fake_center(
    x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float
) -> Tensor:
    return x.new_empty(x.shape[0], heads, x.shape[3] // heads, dtype=torch.float32)


def _normed_and_turned(
    x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], numbers: Tensor, heads: int, eps: float
) -> Tensor:
    """x [B, L, D] of those tokens of the clip -> [B, L, N, K] in fp32, or fp64."""
    wide, D = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    y = (F.rms_norm(x.to(wide), (D,), eps=eps) * weight).unflatten(-1, (heads, -1))
    if table is None:
        return y
    tokens = prod(grid) if grid else table.shape[1]
    turn = rotation(table, tokens, grid, 0, D // heads)[numbers]
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(pairs).flatten(-2).to(wide)


_op_center = register("keys_center", launch=_launch_center, reference=_reference_center, fake=_fake_center)


def _launch(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    center: Tensor | None,
    grid: Sequence[int],
    offset: int,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    values, scale = _fake(x, weight, table, center, grid, offset, heads, eps, dtype)
    B, L, _, D = x.shape
    K = D // heads
    _, H, W = grid or (1, 1, 1)
    if x.numel():
        with torch.cuda.device_of(x):
            _qk_norm_rope_quantized_kernel[(B * L, 2)](
                x,
                weight,
                table,
                center,
                values,
                scale,
                B,
                L,
                x.stride(1),
                1 if table is None else table.shape[1],
                H,
                W,
                offset,
                EPS=eps,
                ROPE=table is not None,
                BY_TOKEN=not grid,
                CENTER=center is not None,
                N=heads,
                K=K,
                BLOCK_N=triton.next_power_of_2(heads),
                BLOCK_K=triton.next_power_of_2(K),
                **_config(D),
            )
    return values, scale


def _reference(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    center: Tensor | None,
    grid: Sequence[int],
    offset: int,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    numbers = offset + torch.arange(x.shape[1], device=x.device)
    parts = [_normed_and_turned(x[:, :, i], weight[i], table, grid, numbers, heads, eps) for i in range(2)]
    if center is not None:
        parts[1] = parts[1] - center[:, None]
    values, scale = rounded(torch.stack(parts), dtype, False, None, None)  # [2, B, L, N, K], [2, B, L, N, 1]
    return values, scale[..., 0].transpose(2, 3).clone(memory_format=torch.contiguous_format)


def _fake(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    center: Tensor | None,
    grid: Sequence[int],
    offset: int,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, L, _, D = x.shape
    return x.new_empty(2, B, L, heads, D // heads, dtype=dtype), x.new_empty(2, B, heads, L, dtype=torch.float32)


_op = register("qk_norm_rope_quantized", launch=_launch, reference=_reference, fake=_fake)


def keys_center(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    *,
    grid: tuple[int, int, int] | None = (1, 1, 1),
    offset: int = 0,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """About the mean of a projection's keys, normed and turned: of a thousand of them or more, or of all.

    Args:
        x: [B, L, M, D] fp32, bf16 or fp16, contiguous: M of 2 or more projections of each token, queries and keys first.
        weight: [2, D] fp32, bf16 or fp16, contiguous: the norms' weights.
        table: [2, positions, K/2] fp32, contiguous, of `rope_table`, or by token, [2, tokens, K/2], of `rope_table_of`; None
            leaves the turn out.
        grid: (T, H, W) tokens of the whole clip; None where the table is by token.
        offset: number of the first token of `x` within the clip.
        heads: D is heads of K = D / heads channels, K even.
        eps: added to the mean square.

    Returns:
        [B, N, K] fp32.

    Raises:
        ValueError: shapes, dtypes or strides are others, or tokens lie outside the grid or the table.
    """
    _checked("keys_center", x, weight, table, grid, offset, heads)
    return _op_center(x, weight, table, grid or (), offset, heads, eps)


def qk_norm_rope_quantized(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    center: Tensor | None,
    *,
    grid: tuple[int, int, int] | None = (1, 1, 1),
    offset: int = 0,
    heads: int,
    eps: float = 1e-6,
    dtype: torch.dtype,
) -> Quantized:
    """Norm queries and keys, turn them by their places, and quantise them.

    Args:
        x: [B, L, M, D] fp32, bf16 or fp16, contiguous: M of 2 or more projections of each token, queries and keys first.
        weight: [2, D] fp32, bf16 or fp16, contiguous: the norms' weights.
        table: [2, positions, K/2] fp32, contiguous, of `rope_table`, or by token, [2, tokens, K/2], of `rope_table_of`; None
            leaves the turn out.
        center: [B, N, K] fp32, contiguous, of `keys_center`, taken from the keys; None takes nothing.
        grid: (T, H, W) tokens of the whole clip; None where the table is by token.
        offset: number of the first token of `x` within the clip.
        heads: D is heads of K = D / heads channels, K even.
        eps: added to the mean square.
        dtype: float8_e4m3fn or int8.

    Returns:
        values [2, B, L, N, K] in `dtype`, queries before keys, and scale [2, B, N, L] fp32.

    Raises:
        ValueError: shapes, dtypes or strides are others, or tokens lie outside the grid or the table.
    """
    op = "qk_norm_rope_quantized"
    _checked(op, x, weight, table, grid, offset, heads)
    _check.dtypes(op, EIGHT_BITS, result=dtype)
    if center is not None:
        wanted = (x.shape[0], heads, x.shape[3] // heads)
        _check.shapes(op, f"center {wanted}", center.shape == wanted, center=center)
        _check.dtypes(op, (torch.float32,), center=center)
        _check.one_device(op, x=x, center=center)
        _check.dense(op, center=center)
    return Quantized(*_op(x, weight, table, center, grid or (), offset, heads, eps, dtype))


def _checked(
    op: str, x: Tensor, weight: Tensor, table: Tensor | None, grid: tuple[int, int, int] | None, offset: int, heads: int
) -> None:
    check(op, x, weight, table, grid, offset, heads)
    _check.shapes(op, "weight [2, D], of queries and keys", weight.shape[0] == 2, weight=weight)
