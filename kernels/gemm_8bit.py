"""Matrix products of 8-bit values: (a_scale a) (b_scale b)^T + bias, of e4m3 or int8, and what may follow in the same pass.

a holds tokens, b a linear's weight. Scales: of a one for all, one per row, or one per 128 values of a row; of b one per row,
or one per block of 128 x 128 (arXiv 2209.05433, 2412.19437). int8 accumulates in int32, exactly. e4m3 accumulates in fp32;
Hopper's tensor cores keep about 14 bits of a sum (arXiv 2412.19437, 3.3.2), so a sum is moved to true fp32 every 128 terms
there. M rows of a, N rows of b, K terms, G groups of 128 among these.

A tile of the result is one step of a loop over tiles; on compute capability 9.0 and above there are as many programs as
multiprocessors, and tiles are read through descriptors (TMA), which want rows of a multiple of 16 bytes.

Operations: 2 M N K; bytes: (M + N) K read, 2 M N written in bf16: compute-bound from M of about 1,000.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _check
from ._op import register
from .adaln import modulation_row, rows
from .gelu_tanh import gelu
from .quantize_rows import EIGHT_BITS, GROUP, Quantized, check, empty, form_of, in_8_bits, quantized, rounded, scale_of


@triton.jit
def _tile(ptr, first, k0, SIZE, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK, BLOCK_K] of [SIZE, K] from row `first` and column k0 on, zero beyond."""
    if TMA:
        tile = ptr.load([first, k0])
    else:
        row = first + tl.arange(0, BLOCK)
        k = k0 + tl.arange(0, BLOCK_K)
        # rows beyond the last are not stored: any will do
        at = ptr + (row % SIZE).to(tl.int64)[:, None] * K + k[None, :]
        tile = tl.load(at) if K % BLOCK_K == 0 else tl.load(at, mask=(k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _gemm_8bit_kernel(
    a_ptr,  # [M, K] e4m3 or int8, or a descriptor of it
    a_scale_ptr,  # [] or [M, 1] or [M, G] fp32
    b_ptr,  # [N, K] as a, or a descriptor of it
    b_scale_ptr,  # [N] or [ceil(N / 128), G] fp32
    bias_ptr,  # [N]
    out_ptr,  # [M, N]: the result, or what it is added to
    out_scale_ptr,  # [M, ceil(N / 128)] fp32, written; [], read where THEN is "fixed"
    smooth_ptr,  # [N] fp32
    gate_ptr,  # [B, R, N] fp32
    M,
    L,
    split,
    gate_b,
    gate_r,
    N: tl.constexpr,
    K: tl.constexpr,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    INTEGERS: tl.constexpr,
    THEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    R_GATE: tl.constexpr,
    TMA: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    G: tl.constexpr = (K + 127) // 128
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    blocks: tl.constexpr = A_SCALE == "groups" or B_SCALE == "blocks"
    sums: tl.constexpr = tl.int32 if INTEGERS and not blocks else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # GROUP_M tiles that share columns run beside one another: a and b are read from cache
        group = tile // (GROUP_M * tiles_n)
        size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        m0 = (group * GROUP_M + within % size) * BLOCK_M
        n0 = within // size * BLOCK_N
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=sums)
        for k0 in tl.range(0, K, BLOCK_K):
            a = _tile(a_ptr, m0, k0, M, K, BLOCK_M, BLOCK_K, TMA)
            b = _tile(b_ptr, n0, k0, N, K, BLOCK_N, BLOCK_K, TMA).T
            if blocks:
                part = tl.dot(a, b).to(tl.float32)
                if A_SCALE == "groups":
                    part *= tl.load(a_scale_ptr + m.to(tl.int64) * G + k0 // 128, mask=m < M, other=0.0)[:, None]
                if B_SCALE == "blocks":
                    part *= tl.load(b_scale_ptr + n // 128 * G + k0 // 128, mask=n < N, other=0.0)[None, :]
                total += part
            elif sums == tl.int32:
                total = tl.dot(a, b, total, out_dtype=tl.int32)
            else:
                total = tl.dot(a, b, total, max_num_imprecise_acc=EXACT)
        y = total.to(tl.float32)
        if A_SCALE == "row":
            y *= tl.load(a_scale_ptr + m, mask=m < M, other=0.0)[:, None]
        if A_SCALE == "fixed":
            y *= tl.load(a_scale_ptr)
        if B_SCALE == "rows":
            y *= tl.load(b_scale_ptr + n, mask=n < N, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        if THEN == "":
            tl.store(at, y.to(dtype), mask=mask)
        elif THEN == "add":
            if R_GATE > 0:
                # of the rows of one tile not all need the same row of the gate
                y *= tl.load(
                    modulation_row(gate_ptr, m.to(tl.int64), L, split, gate_b, gate_r, R_GATE)[:, None] + n[None, :], mask=mask
                )
            tl.store(at, (tl.load(at, mask=mask).to(tl.float32) + y).to(dtype), mask=mask)
        else:
            y = gelu(y)
            if SMOOTH:
                y *= tl.load(smooth_ptr + n, mask=n < N, other=0.0)[None, :]
            if THEN == "fixed":
                tl.store(at, in_8_bits(y, 1 / tl.load(out_scale_ptr), dtype), mask=mask)
            else:  # the columns of a tile are the group; beyond the last they count as zero
                y = tl.where((n < N)[None, :], y, 0.0)
                tl.static_assert(BLOCK_N == 128)
                scale = scale_of(y, 1, dtype)
                groups: tl.constexpr = (N + 127) // 128
                tl.store(out_scale_ptr + m.to(tl.int64) * groups + n0 // 128, scale, mask=m < M)
                tl.store(at, in_8_bits(y, (1 / scale)[:, None], dtype), mask=mask)


def _candidate(M: int, N: int, K: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


_CANDIDATES = tuple(
    _candidate(M, N, 128, 8, stages) for M, N in ((128, 128), (128, 256), (256, 128), (64, 256)) for stages in (3, 4)
)


def _config(capability: int, dtype: torch.dtype, scaled_in_loop: bool, then: str, out: torch.dtype) -> dict[str, int]:
    """Tiles: the largest whose sums fit 255 registers without spilling; not tuned on a device yet.

    On 9.0 e4m3 has two sums, the tensor cores' and the true one, and int8 one: 128 x 128 and 128 x 256 in 8 warps. Where the
    loop scales or the result is scaled by groups, other cards than those of data centres hold half as much. To add to a result
    takes as many registers as the sums. Three stages of 128 x 128 x 128 fit the 99 KB of shared memory of all; of 128 x 256 the
    227 KB of 9.0, if the result, which passes through it too, is not in fp32 (272 KB: refused by an H200).
    """
    if then == "add":
        return _candidate(128, 64, 128, 8, 3)
    if capability in (90, 100, 103):
        wide = capability == 90 and dtype == torch.int8 and not scaled_in_loop and not then and out != torch.float32
        return _candidate(128, 256 if wide else 128, 128, 8, 3)
    return _candidate(64 if scaled_in_loop or then == "groups" else 128, 128, 128, 8, 3)


def _capability(x: Tensor) -> int:
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    # interpreted, or compiled for a named target
    return 90 if knobs.runtime.interpret else driver.active.get_current_target().arch


def _programs(x: Tensor, tiles: int, capability: int) -> int:
    if capability < 90:
        return tiles
    many = torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 132
    return min(tiles, many)


def _run(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    then: str = "",
    *,
    out_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    gate: Tensor | None = None,
    split: int = 0,
) -> None:
    (N, K), M = b.shape, a.numel() // a.shape[-1]
    if not M:
        return
    a_form, b_form = _a_form(a_scale), "blocks" if b_scale.ndim == 2 else "rows"
    capability = _capability(a)
    config = _config(capability, a.dtype, a_form == "groups" or b_form == "blocks", then, out.dtype)
    a, tma = a.view(M, K), capability >= 90 and K % 16 == a.data_ptr() % 16 == b.data_ptr() % 16 == 0
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])

    def source(x: Tensor, block: int) -> Any:
        return TensorDescriptor.from_tensor(x, [block, config["BLOCK_K"]]) if tma else x

    with torch.cuda.device_of(a):
        _gemm_8bit_kernel[(_programs(a, tiles, capability),)](
            source(a, config["BLOCK_M"]),
            a_scale,
            source(b, config["BLOCK_N"]),
            b_scale,
            bias,
            out,
            out_scale,
            smooth,
            gate,
            M,
            out.shape[1] if then == "add" else 1,
            split,
            *(gate.stride()[:2] if gate is not None else (0, 0)),
            N=N,
            K=K,
            A_SCALE=a_form,
            B_SCALE=b_form,
            INTEGERS=a.dtype == torch.int8,
            THEN=then,
            HAS_BIAS=bias is not None,
            SMOOTH=smooth is not None,
            R_GATE=0 if gate is None else gate.shape[1],
            TMA=tma,
            EXACT=config["BLOCK_K"] if capability == 90 else 0,
            **config,
        )


def _a_form(a_scale: Tensor) -> str:
    return "fixed" if a_scale.ndim == 0 else "row" if a_scale.shape[-1] == 1 else "groups"


def _cublas_takes(capability: int, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether cuBLASLt is the one to use: on Blackwell's data-centre cards, which keep sums of e4m3 in true fp32.

    Its product for Hopper with exact sums is slow for scales per row, and the fast one misses the accuracy rule by its 14 bits.
    """
    fits = a.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16 and b.shape[0] % 16 == b.shape[1] % 16 == 0
    return fits and _a_form(a_scale) != "groups" and b_scale.ndim == 1 and capability in (100, 103) and a.numel() > 0


def _by_cublas(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    scales = a_scale.expand(*a.shape[:-1], 1).reshape(-1, 1).contiguous()
    bias = None if bias is None else bias.to(dtype)
    y = torch._scaled_mm(a.flatten(0, -2), b.t(), scales, b_scale[None], bias=bias, out_dtype=dtype, use_fast_accum=False)
    return y.unflatten(0, a.shape[:-1])


def _launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if a.is_cuda and _cublas_takes(_capability(a), a, a_scale, b, b_scale, dtype):
        return _by_cublas(a, a_scale, b, b_scale, bias, dtype)
    out = _fake(a, a_scale, b, b_scale, bias, dtype)
    _run(a, a_scale, b, b_scale, bias, out)
    return out


# rows at a time whose sums stay in cache until they are scaled: the best of 32 to 4096 on two threads of a Xeon with AMX
_CPU_ROWS = 128


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a [M, K] by b: the sums in int32 or fp32, scaled and with the bias in fp32 (all in fp64 where the scales are)."""
    wide = torch.promote_types(b_scale.dtype, torch.float32)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    rows = _CPU_ROWS if a.device.type == "cpu" else max(a.shape[0], 1)
    for first in range(0, a.shape[0], rows):
        part = slice(first, first + rows)
        y = _scaled(a[part], a_scale if a_scale.ndim == 0 else a_scale[part], b, b_scale, wide)
        out[part] = y if bias is None else y.add_(bias)
    return out


def _scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, wide: torch.dtype) -> Tensor:
    if b_scale.ndim == 1 and (a_scale.ndim == 0 or a_scale.shape[-1] == 1):
        return (_sums(a, b, wide) * a_scale).mul_(b_scale)
    K, N = a.shape[1], b.shape[0]
    y = torch.zeros(a.shape[0], N, dtype=wide, device=a.device)
    for g, first in enumerate(range(0, K, GROUP)):
        terms = slice(first, first + GROUP)
        of_b = _spread(b_scale[:, g], N) if b_scale.ndim == 2 else b_scale
        of_a = a_scale[:, g : g + 1] if a_scale.ndim and a_scale.shape[-1] > 1 else a_scale
        y.addcmul_(_sums(a[:, terms], b[:, terms], wide) * of_a, of_b)
    return y


def _sums(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    if a.dtype == torch.int8 and a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return a.to(wide) @ b.to(wide).t()


def _spread(scale: Tensor, size: int) -> Tensor:
    """[.., G] -> [.., size]: each for 128 values."""
    return scale.repeat_interleave(GROUP, -1)[..., :size]


def _reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    flat = a_scale.reshape(-1, a_scale.shape[-1]) if a_scale.ndim else a_scale
    return _product(a.flatten(0, -2), flat, b, b_scale, bias, dtype).unflatten(0, a.shape[:-1])


def _fake(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0], dtype=dtype)


_op = register("gemm_8bit", launch=_launch, reference=_reference, fake=_fake)


def _launch_gelu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    values, scales = _fake_gelu(a, a_scale, b, b_scale, bias, groups, fixed, smooth)
    out_scale = scales if fixed is None else fixed
    _run(a, a_scale, b, b_scale, bias, values, form_of(groups, fixed), out_scale=out_scale, smooth=smooth)
    return values, scales


def _reference_gelu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = _reference(a, a_scale, b, b_scale, bias, torch.promote_types(b_scale.dtype, torch.float32))
    dtype = a.dtype if a.dtype in EIGHT_BITS else torch.float8_e4m3fn
    return rounded(torch.ops.aten.gelu_(y, approximate="tanh"), dtype, groups, fixed, smooth)


def _fake_gelu(a: Tensor, a_scale: Tensor, b: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, groups, fixed, _ = others
    return empty(a.new_empty(*a.shape[:-1], b.shape[0]), a.dtype, groups, fixed)


_op_gelu = register("gemm_8bit_gelu", launch=_launch_gelu, reference=_reference_gelu, fake=_fake_gelu)


def _launch_add(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    split: int,
) -> None:
    _run(a, a_scale, b, b_scale, bias, x, "add", gate=gate, split=split)


def _reference_add(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    split: int,
) -> None:
    y = _reference(a, a_scale, b, b_scale, bias, torch.promote_types(b_scale.dtype, torch.float32))
    if gate is None:
        x += y
        return
    for row, tokens in rows(gate.shape[1], split):
        x[:, tokens] += y[:, tokens] * gate[:, row]


def _fake_add(*_: Any) -> None:
    pass


_op_add = register("gemm_8bit_add", launch=_launch_add, reference=_reference_add, fake=_fake_add, mutates=("x",))


def gemm_8bit(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """A linear of 8-bit tokens and weights.

    Args:
        a: [..., K] float8_e4m3fn or int8, contiguous.
        a_scale: [] or [..., 1] or [..., G] fp32, contiguous, G being ceil(K / 128).
        b: [N, K] in a's dtype, contiguous.
        b_scale: [N] or [ceil(N / 128), G] fp32, contiguous.
        bias: [N] fp32, bf16 or fp16, contiguous; None adds none.
        dtype: of the result, fp32, bf16 or fp16.

    Returns:
        [..., N] in `dtype`; summed in int32 or fp32, scaled in fp32, rounded once.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("gemm_8bit", a, a_scale, b, b_scale, bias)
    _check.dtypes("gemm_8bit", _check.FLOATS, result=dtype)
    return _op(a, a_scale, b, b_scale, bias, dtype)


def gemm_8bit_gelu(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    groups: bool = False,
    fixed: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Quantized:
    """`gemm_8bit`, GELU's tanh form, and `quantize_rows` in one pass; a scale per row would need all of the row first.

    Args:
        a: [..., K] float8_e4m3fn or int8, contiguous.
        a_scale: [] or [..., 1] or [..., G] fp32, contiguous, G being ceil(K / 128).
        b: [N, K] in a's dtype, contiguous.
        b_scale: [N] or [ceil(N / 128), G] fp32, contiguous.
        bias: [N] fp32, bf16 or fp16, contiguous; None adds none.
        groups: a scale for every 128 values of the result; else `fixed` is needed.
        fixed: [] fp32: the scale of all values of the result, for float8_e4m3fn.
        smooth: [N] fp32 that the result is multiplied by before it is quantised.

    Returns:
        values [..., N] in a's dtype and scale, fp32: [..., ceil(N / 128)], or `fixed`.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    op = "gemm_8bit_gelu"
    _checked(op, a, a_scale, b, b_scale, bias)
    check(op, b_scale.new_empty(b.shape[:1]), a.dtype, groups, fixed, smooth)
    if groups == (fixed is not None):
        raise ValueError(f"{op} wants either groups or a fixed scale, got groups {groups}, fixed {fixed}")
    return quantized(_op_gelu(a, a_scale, b, b_scale, bias, groups, fixed, smooth), fixed)


def gemm_8bit_add(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    split: int = 0,
) -> None:
    """Add a gated `gemm_8bit` to the residual stream in place.

    Args:
        x: [B, L, N] fp32, bf16 or fp16, contiguous; changed to x + gate (a b^T + bias).
        a: [B, L, K] float8_e4m3fn or int8, contiguous.
        a_scale: [] or [B, L, 1] or [B, L, G] fp32, contiguous, G being ceil(K / 128).
        b: [N, K] in a's dtype, contiguous.
        b_scale: [N] or [ceil(N / 128), G] fp32, contiguous.
        bias: [N] fp32, bf16 or fp16, contiguous; None adds none.
        gate: [B, R, N] fp32 with R of 1 or 2, rows dense; None adds the product as it is.
        split: number of leading tokens that take row 0 where R is 2, 0 .. L.

    Returns:
        None: x [B, L, N] is changed.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    op = "gemm_8bit_add"
    _checked(op, a, a_scale, b, b_scale, bias)
    fits = x.ndim == 3 and x.shape == (*a.shape[:-1], b.shape[0])
    _check.shapes(op, "x [B, L, N] for a [B, L, K] and b [N, K]", fits, x=x, a=a, b=b)
    _check.modulation(op, x, split, gate=gate)
    _check.dtypes(op, _check.FLOATS, x=x)
    _check.one_device(op, x=x, a=a, gate=gate)
    _check.dense(op, x=x)
    _op_add(x, a, a_scale, b, b_scale, bias, gate, split)


def _checked(op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    fits = a.ndim >= 2 and b.ndim == 2 and a.shape[-1] == b.shape[1] >= 1 and b.shape[0] >= 1
    fits = fits and (bias is None or bias.shape == b.shape[:1])
    _check.shapes(op, "a [..., K], b [N, K] and bias [N]", fits, a=a, b=b, bias=bias)
    N, K = b.shape
    G = -(-K // GROUP)
    fits = a_scale.ndim == 0 or (a_scale.shape[:-1] == a.shape[:-1] and a_scale.shape[-1] in (1, G))
    _check.shapes(op, f"a_scale [] or [..., 1] or [..., {G}]", fits, a=a, a_scale=a_scale)
    fits = b_scale.shape in ((N,), (-(-N // GROUP), G))
    _check.shapes(op, f"b_scale [{N}] or [{-(-N // GROUP)}, {G}]", fits, b=b, b_scale=b_scale)
    _check.dtypes(op, EIGHT_BITS, a=a)
    _check.dtypes(op, (a.dtype,), b=b)
    _check.dtypes(op, (torch.float32,), a_scale=a_scale, b_scale=b_scale)
    _check.dtypes(op, _check.FLOATS, bias=bias)
    _check.one_device(op, a=a, a_scale=a_scale, b=b, b_scale=b_scale, bias=bias)
    _check.dense(op, a=a, a_scale=a_scale, b=b, b_scale=b_scale, bias=bias)
