"""Values in 8 bits with a scale of their own: q = round(y smooth / scale), scale = max |y smooth| / the largest of 8 bits.

The maximum is that of a row, or of every 128 values in it; or the scale is given, calibrated beforehand (arXiv 2209.05433).
Rounding is to the nearest even: to e4m3, up to 448, or to integers up to 127. `smooth` moves outliers into the weights that the
values are multiplied with (arXiv 2211.10438). A row with a NaN or an infinity has such a scale too. D width, G groups of a row.

Bytes per value: 3, two read in bf16 and one written. What produces the values quantises them in the same pass where it can:
see adaln.py, gated_residual.py and gelu_tanh_quantized.py; this operator is for what other libraries return.
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

GROUP = 128
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
EIGHT_BITS = tuple(LARGEST)
# by the name of a precision
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# of a row of zeros
_SMALLEST = tl.constexpr(1e-30)


class Quantized(NamedTuple):
    """Values [..., D] e4m3 or int8, and their fp32 scale: [..., 1], [..., G], or [] where one was given."""

    values: Tensor
    scale: Tensor


class Quantizer(NamedTuple):
    """How values are to be quantised.

    dtype: float8_e4m3fn or int8. groups: a scale for every 128 values in place of one for the row. fixed: the scale, [] fp32.
    smooth: [D] fp32 that the values are multiplied by first.
    """

    dtype: torch.dtype
    groups: bool = False
    fixed: Tensor | None = None
    smooth: Tensor | None = None


@triton.jit
def in_8_bits(y, inverse, dtype: tl.constexpr):
    """y inverse, rounded to the nearest even and held within the largest value."""
    q = y * inverse
    if dtype == tl.int8:
        # no integer is NaN: the scale is, or is infinite, and makes it so again
        q = tl.where(q == q, q, 0.0)
        # adding 1.5 x 2^23 leaves no room for a fraction
        q = tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0 - 12582912.0
    else:
        q = tl.where(q == q, tl.minimum(tl.maximum(q, -448.0), 448.0), q)
    return q.to(dtype)


@triton.jit
def scale_of(y, axis: tl.constexpr, dtype: tl.constexpr):
    """max |y| / largest over an axis. As integers the bits of floats are in order, NaN above infinity."""
    bits = tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=axis)
    largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    # maximum would drop a NaN
    amax = bits.to(tl.float32, bitcast=True)
    return tl.where(amax < _SMALLEST, _SMALLEST, amax) / largest


@triton.jit
def store_quantized(
    y,  # [BLOCK_D] fp32, zero outside the mask
    values_ptr,  # [rows, D] e4m3 or int8
    scale_ptr,  # [rows, 1] or [rows, G] fp32, written; [] read where FORM is "fixed"
    smooth_ptr,  # [D] fp32, not read where SMOOTH is False
    row,
    d,
    mask,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Quantise one row that lies in registers."""
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    if SMOOTH:
        y *= tl.load(smooth_ptr + d, mask=mask, other=0.0)
    if FORM == "groups":
        G: tl.constexpr = (D + 127) // 128
        parts: tl.constexpr = (BLOCK_D + 127) // 128
        apart = tl.reshape(y, [parts, BLOCK_D // parts])
        scale = scale_of(apart, 1, dtype)
        g = tl.arange(0, parts)
        tl.store(scale_ptr + row * G + g, scale, mask=g < G)
        q = tl.reshape(in_8_bits(apart, (1 / scale)[:, None], dtype), [BLOCK_D])
    else:
        if FORM == "fixed":
            scale = tl.load(scale_ptr)
        else:
            scale = scale_of(y, 0, dtype)
            tl.store(scale_ptr + row, scale)
        q = in_8_bits(y, 1 / scale, dtype)
    tl.store(values_ptr + row * D + d, q, mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [rows, D]
    values_ptr,  # [rows, D] e4m3 or int8
    scale_ptr,  # [rows, 1] or [rows, G] fp32; [] where FORM is "fixed"
    smooth_ptr,  # [D] fp32
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program per row; int64: a clip's activation exceeds 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    store_quantized(x, values_ptr, scale_ptr, smooth_ptr, row, d, mask, FORM, SMOOTH, D, BLOCK_D)


_CANDIDATES = tuple({"num_warps": warps} for warps in (2, 4, 8, 16))


def _config(D: int) -> dict[str, int]:
    """Warps: the fewest that keep a row within 64 registers, without spilling; not tuned on a device yet."""
    return {"num_warps": 4 if D <= 2048 else 8 if D <= 4096 else 16}


def form_of(groups: bool, fixed: Tensor | None) -> str:
    return "fixed" if fixed is not None else "groups" if groups else "row"


def empty(like: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values shaped as `like`, and their scales: none where one is given."""
    D = like.shape[-1]
    scales = (0,) if fixed is not None else (*like.shape[:-1], -(-D // GROUP) if groups else 1)
    return like.new_empty(like.shape, dtype=dtype), like.new_empty(scales, dtype=torch.float32)


def rounded(y: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """What every quantising form returns for y [..., D] in fp32; of y in fp64 the values are left as they are."""
    D = y.shape[-1]
    if y.device.type == "meta" or not y.numel():
        return empty(y, dtype, groups, fixed)
    parts = [
        _rounded(part.to(torch.promote_types(y.dtype, torch.float32)), dtype, groups, fixed, smooth)
        for part in y.reshape(-1, D).split(max(_CPU_VALUES // D, 1) if y.device.type == "cpu" else y.numel())
    ]
    values, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return values.view(y.shape), scale if fixed is not None else scale.view(*y.shape[:-1], -1)


# values at a time that stay in cache from one pass over them to the next
_CPU_VALUES = 2**18


def _rounded(y: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for y [rows, D], in fp32 or fp64."""
    D = y.shape[-1]
    if smooth is not None:
        y = y * smooth
    if fixed is not None:
        scale, spread = y.new_empty(0, dtype=fixed.dtype), fixed
    else:
        width = GROUP if groups else D
        parts = F.pad(y, (0, -D % width)).unflatten(-1, (-1, width))
        low, high = parts.aminmax(dim=-1)
        amax = torch.maximum(-low, high)
        scale = torch.where(amax < _SMALLEST.value, _SMALLEST.value, amax) / LARGEST[dtype]
        spread = scale.repeat_interleave(width, -1)[..., :D] if groups else scale
    q = y * (1 / spread)
    if y.dtype == torch.float64:
        return q, scale
    if dtype == torch.int8:
        return q.round_().clamp_(-127, 127).nan_to_num_(0).to(dtype), scale
    return q.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def _launch(x: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    values, scale = _fake(x, dtype, groups, fixed, smooth)
    D = x.shape[-1]
    if x.numel():
        with torch.cuda.device_of(x):
            _quantize_rows_kernel[(x.numel() // D,)](
                x,
                values,
                scale if fixed is None else fixed,
                smooth,
                FORM=form_of(groups, fixed),
                SMOOTH=smooth is not None,
                D=D,
                BLOCK_D=triton.next_power_of_2(D),
                **_config(D),
            )
    return values, scale


def _reference(
    x: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    return rounded(x, dtype, groups, fixed, smooth)


def _fake(x: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty(x, dtype, groups, fixed)


_op = register("quantize_rows", launch=_launch, reference=_reference, fake=_fake)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, *, groups: bool = False, fixed: Tensor | None = None, smooth: Tensor | None = None
) -> Quantized:
    """Quantise rows to 8 bits.

    Args:
        x: [..., D] fp32, bf16 or fp16, contiguous.
        dtype: float8_e4m3fn or int8.
        groups: a scale for every 128 values in place of one for the row.
        fixed: [] fp32: the scale of all values, for float8_e4m3fn; beyond 448 times it they are cut off.
        smooth: [D] fp32 that the values are multiplied by first.

    Returns:
        values [..., D] in `dtype` and scale, fp32: [..., 1], [..., G], or `fixed`.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _check.dtypes("quantize_rows", _check.FLOATS, x=x)
    _check.dense("quantize_rows", x=x)
    check("quantize_rows", x, dtype, groups, fixed, smooth)
    return quantized(_op(x, dtype, groups, fixed, smooth), fixed)


def quantized(result: tuple[Tensor, Tensor], fixed: Tensor | None) -> Quantized:
    return Quantized(result[0], result[1] if fixed is None else fixed)


def check(op: str, x: Tensor, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None) -> None:
    """Refuse what no quantising form of x [..., D] takes."""
    _check.dtypes(op, EIGHT_BITS, result=dtype)
    _check.shapes(op, "x [..., D] with D of 1 or more", x.ndim >= 1 and x.shape[-1] >= 1, x=x)
    if fixed is not None:
        # an integer cannot say that a value was NaN, as a scale of its row does
        _check.dtypes(op, (torch.float8_e4m3fn,), **{"result of a fixed scale": dtype})
        _check.shapes(op, "fixed [], and no groups beside it", fixed.ndim == 0 and not groups, fixed=fixed)
        _check.dtypes(op, (torch.float32,), fixed=fixed)
    if smooth is not None:
        _check.shapes(op, "smooth [D]", smooth.shape == x.shape[-1:], x=x, smooth=smooth)
        _check.dtypes(op, (torch.float32,), smooth=smooth)
        _check.dense(op, smooth=smooth)
    _check.one_device(op, x=x, fixed=fixed, smooth=smooth)
