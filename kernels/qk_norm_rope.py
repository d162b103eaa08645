"""RMSNorm over the full width, all heads together, then 3-D RoPE on adjacent pairs, in place.

    y = x / sqrt(mean(x^2) + eps) weight        (arXiv 1910.07467)
    (y0, y1) -> (y0 cos a - y1 sin a, y0 sin a + y1 cos a)        (arXiv 2104.09864)

B batch, L tokens, N heads, K head width, D = N K. The input is the output of a packed projection, M tensors of width D
per token, the first P of which (q and k, or q alone) are normed and turned where they lie; what follows them (v) is left.
The angle of pair j at token l is position x frequency j, where the position is t, h or w of the token's place on the grid
(T, H, W), w fastest: the first pairs belong to t, then K // 6 each to h and w. `table` holds cosines and sines by position
and pair, a few kilobytes for all tokens; where tokens lie off the grid, as those of reference pictures and of earlier clips
do, it holds them by token and pair. `offset` is the number of the first token, where a rank holds a part of them.

Bytes per token: 4 P D in bf16, 24.6 kB for q and k at D = 3072: 5.7 us per thousand tokens at 4.3 TB/s. A table by token adds
4 K, for all heads together: 0.5 kB at K = 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register


@triton.jit
def normed_and_turned(
    x, weight_ptr, place, mask, table_ptr, rows, number, H, W, EPS: tl.constexpr, ROPE: tl.constexpr, BY_TOKEN: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_N, BLOCK_K] fp32 of token `number` of the clip, zero outside N and K."""
    mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / (N * K)
    weight = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(mean_square + EPS) * weight
    if ROPE:
        # not behind `j`, where these lines cost up to 8 registers more (sm_90, Triton 3.9)
        t, h, w = number // (H * W), number // W % H, number % W
        HALF: tl.constexpr = K // 2
        AXIS: tl.constexpr = K // 6
        j = tl.arange(0, BLOCK_K // 2)
        row = number if BY_TOKEN else tl.where(j < HALF - 2 * AXIS, t, tl.where(j < HALF - AXIS, h, w))
        cosine = tl.load(table_ptr + row * HALF + j, mask=j < HALF, other=0.0)[None, :]
        sine = tl.load(table_ptr + (rows + row) * HALF + j, mask=j < HALF, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_K // 2, 2)))
        x = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(x, (BLOCK_N, BLOCK_K))
    return x


@triton.jit
def _qk_norm_rope_kernel(
    x_ptr,  # [B, L, M, D]
    weight_ptr,  # [P, D]
    table_ptr,  # [2, rows, K / 2] fp32
    L,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program per token and tensor; int64: B * L * M * D exceeds 2**31 for long clips
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < K)
    place = n * K + k  # [BLOCK_N, BLOCK_K]
    pointer = x_ptr + token * token_stride + part * (N * K) + place
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    weight_ptr += part * (N * K)
    x = normed_and_turned(
        x, weight_ptr, place, mask, table_ptr, rows, offset + token % L, H, W, EPS, ROPE, BY_TOKEN, N, K, BLOCK_N, BLOCK_K
    )
    tl.store(pointer, x.to(x_ptr.dtype.element_ty), mask=mask)


_CANDIDATES = tuple({"num_warps": warps} for warps in (2, 4, 8, 16))


def _config(D: int) -> dict[str, int]:
    """Warps; not tuned on a device yet."""
    return {"num_warps": 4 if D <= 2048 else 8}


def _launch(x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float) -> None:
    B, L, _, D = x.shape
    K = D // heads
    _, H, W = grid or (1, 1, 1)
    if x.numel():
        with torch.cuda.device_of(x):
            _qk_norm_rope_kernel[(B * L, weight.shape[0])](
                x,
                weight,
                table,
                L,
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
                BLOCK_N=triton.next_power_of_2(heads),
                BLOCK_K=triton.next_power_of_2(K),
                **_config(D),
            )


def _reference(
    x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float
) -> None:
    _, L, _, D = x.shape
    K = D // heads
    wide = torch.promote_types(x.dtype, torch.float32)
    if table is not None:
        turn = rotation(table, L, grid, offset, K)
    for part in range(weight.shape[0]):
        # rounded to the input's dtype before the weight, as officially
        y = F.rms_norm(x[:, :, part].to(wide), (D,), eps=eps).to(x.dtype) * weight[part]
        if table is not None:
            pairs = torch.view_as_complex(y.to(wide).unflatten(-1, (heads, K // 2, 2)))
            pairs *= turn
            y = torch.view_as_real(pairs).flatten(2)
        x[:, :, part] = y


def rotation(table: Tensor, L: int, grid: Sequence[int], offset: int, K: int) -> Tensor:
    """Unit vectors exp(i angle), complex [L, 1, K/2], of the tokens from `offset` on."""
    turns = torch.complex(table[0], table[1])
    if not grid:
        return turns[offset : offset + L, None]
    T, H, W = grid
    t, h, w = turns.split(_pairs(K), dim=1)  # each [positions, pairs]
    along = (t[:T, None, None], h[None, :H, None], w[None, None, :W])
    turns = torch.cat([part.expand(T, H, W, -1) for part in along], dim=-1)  # [T, H, W, K/2]
    return turns.flatten(0, 2)[offset : offset + L, None]


def _fake(x: Tensor, weight: Tensor, table: Tensor | None, grid: Sequence[int], offset: int, heads: int, eps: float) -> None:
    pass


_op = register("qk_norm_rope", launch=_launch, reference=_reference, fake=_fake, mutates=("x",))


def rope_table(positions: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines by position for `qk_norm_rope`, [2, positions, K/2] fp32, computed in fp64.

    Each axis has its own ladder of frequencies, 10000^(-2i/width): with K = 128, 22 pairs for t, 21 for h, 21 for w.
    """
    return rope_table_of(torch.arange(positions, device=device)[:, None].expand(-1, 3), head_dim, device)


def rope_table_of(places: Tensor, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines by token for `qk_norm_rope`, [2, tokens, K/2] fp32, computed in fp64.

    `places` [tokens, 3] are integers (t, h, w), each turned by its axis's frequencies as in `rope_table`. A number below
    zero turns the other way.
    """
    angles = [
        torch.outer(place, 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs))
        for place, pairs in zip(places.to(device, torch.float64).unbind(1), _pairs(head_dim), strict=True)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def _pairs(K: int) -> tuple[int, int, int]:
    """How many pairs of a head's channels belong to t, h and w."""
    return K // 2 - 2 * (K // 6), K // 6, K // 6


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    *,
    grid: tuple[int, int, int] | None = (1, 1, 1),
    offset: int = 0,
    heads: int,
    eps: float = 1e-6,
) -> None:
    """Norm queries and keys and turn them by their places, in place.

    Args:
        x: [B, L, M, D] fp32, bf16 or fp16, contiguous: M projections of each token.
        weight: [P, D] fp32, bf16 or fp16, contiguous: the norms' weights for the first P <= M of them.
        table: [2, positions, K/2] fp32, contiguous, of `rope_table`, or by token, [2, tokens, K/2], of `rope_table_of`; None
            leaves the turn out.
        grid: (T, H, W) tokens of the whole clip; None where the table is by token.
        offset: number of the first token of `x` within the clip.
        heads: D is heads of K = D / heads channels, K even.
        eps: added to the mean square.

    Returns:
        None: x [B, L, M, D] is changed.

    Raises:
        ValueError: shapes, dtypes or strides are others, or tokens lie outside the grid or the table.
    """
    check("qk_norm_rope", x, weight, table, grid, offset, heads)
    _op(x, weight, table, grid or (), offset, heads, eps)


def check(
    op: str, x: Tensor, weight: Tensor, table: Tensor | None, grid: tuple[int, int, int] | None, offset: int, heads: int
) -> None:
    """Refuse what no form of the operator takes."""
    fits = x.ndim == 4 and weight.ndim == 2 and x.shape[3] == weight.shape[1] and weight.shape[0] <= x.shape[2]
    _check.shapes(op, "x [B, L, M, D] and weight [P <= M, D]", fits, x=x, weight=weight)
    _check.dtypes(op, _check.FLOATS, x=x, weight=weight)
    _check.one_device(op, x=x, weight=weight, table=table)
    _check.dense(op, x=x, weight=weight, table=table)
    D = x.shape[3]
    if heads < 1 or D % (2 * heads):
        raise ValueError(f"{op} wants heads of an even width, got {heads} heads of a width of {D}")
    if table is not None:
        half, rows = D // heads // 2, f"{max(grid)} or more" if grid else "tokens"
        fits = table.ndim == 3 and table.shape[::2] == (2, half) and (not grid or table.shape[1] >= max(grid))
        _check.shapes(op, f"a table [2, {rows}, {half}]", fits, table=table)
        _check.dtypes(op, (torch.float32,), table=table)
        tokens, within = (prod(grid), f"the grid {grid}") if grid else (table.shape[1], f"the table of {table.shape[1]}")
        if offset < 0 or offset + x.shape[1] > tokens:
            raise ValueError(f"{op} wants tokens within {within}, got {x.shape[1]} from number {offset} on")
