"""Bias and GELU in its tanh form, in place: x -> g(x + bias), g(u) = u sigmoid(2 c (u + 0.044715 u^3)), c = sqrt(2 / pi).

That is u (1 + tanh(c (u + 0.044715 u^3))) / 2 (arXiv 1606.08415), in fp32. F feed-forward width.

Bytes per token: 4 F in bf16, 57.3 kB at F = 14336: 13.3 us per thousand tokens at 4.3 TB/s; 3 F to 8 bits and a scale, which
is not in place (see quantize_rows.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _check
from ._op import register
from .quantize_rows import Quantized, check, empty, form_of, quantized, rounded, store_quantized


@triton.jit
def gelu(u):
    # 2 sqrt(2 / pi)
    return u / (1 + tl.exp(-1.5957691216057308 * (u + 0.044715 * u * u * u)))


@triton.jit
def _gelu_tanh_kernel(
    x_ptr,  # [rows, F]
    bias_ptr,  # [F], not read without HAS_BIAS
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program per part of a row; int64: a clip's activation exceeds 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    u = tl.load(x_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * F + column, gelu(u).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_tanh_quantized_kernel(
    x_ptr,  # [rows, F]
    bias_ptr,  # [F], not read without HAS_BIAS
    values_ptr,  # [rows, F] e4m3 or int8
    scale_ptr,  # [rows, 1] or [rows, G] fp32; [] where FORM is "fixed"
    smooth_ptr,  # [F] fp32
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program per row, whose maximum it needs
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = f < F
    u = tl.load(x_ptr + row * F + f, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + f, mask=mask, other=0.0).to(tl.float32)
    store_quantized(gelu(u), values_ptr, scale_ptr, smooth_ptr, row, f, mask, FORM, SMOOTH, F, BLOCK_F)


_CANDIDATES = tuple({"BLOCK": block, "num_warps": warps} for block in (1024, 2048, 4096) for warps in (2, 4, 8))


def _config(F: int) -> dict[str, int]:
    """Tiles; not tuned on a device yet."""
    return {"BLOCK": min(2048, triton.next_power_of_2(F)), "num_warps": 4}


def _launch(x: Tensor, bias: Tensor | None) -> None:
    F = x.shape[-1]
    config = _config(F)
    if x.numel():
        with torch.cuda.device_of(x):
            _gelu_tanh_kernel[(x.numel() // F, triton.cdiv(F, config["BLOCK"]))](
                x, bias, F=F, HAS_BIAS=bias is not None, **config
            )


def _reference(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        x += bias
    torch.ops.aten.gelu_(x, approximate="tanh")


def _fake(x: Tensor, bias: Tensor | None) -> None:
    pass


_op = register("gelu_tanh", launch=_launch, reference=_reference, fake=_fake, mutates=("x",))


def _launch_quantized(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    values, scales = empty(x, dtype, groups, fixed)
    F = x.shape[-1]
    if x.numel():
        with torch.cuda.device_of(x):
            _gelu_tanh_quantized_kernel[(x.numel() // F,)](
                x,
                bias,
                values,
                scales if fixed is None else fixed,
                smooth,
                FORM=form_of(groups, fixed),
                SMOOTH=smooth is not None,
                F=F,
                HAS_BIAS=bias is not None,
                BLOCK_F=triton.next_power_of_2(F),
                # 32 values per thread at 16384
                num_warps=4 if F <= 4096 else 8 if F <= 8192 else 16,
            )
    return values, scales


def _reference_quantized(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    _reference(wide, bias)
    return rounded(wide, dtype, groups, fixed, smooth)


def _fake_quantized(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty(x, dtype, groups, fixed)


_op_quantized = register("gelu_tanh_quantized", launch=_launch_quantized, reference=_reference_quantized, fake=_fake_quantized)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> None:
    """Add a bias and apply GELU's tanh form, in place.

    Args:
        x: [..., F] fp32, bf16 or fp16, contiguous.
        bias: [F] fp32, bf16 or fp16, contiguous; None adds none.

    Returns:
        None: x [..., F] is changed.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("gelu_tanh", x, bias)
    _op(x, bias)


def gelu_tanh_quantized(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    groups: bool = False,
    fixed: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Quantized:
    """Add a bias, apply GELU's tanh form and quantise, as `quantize_rows` does, in one pass.

    Args:
        x: [..., F] fp32, bf16 or fp16, contiguous; left as it is.
        bias: [F] fp32, bf16 or fp16, contiguous; None adds none.
        dtype: float8_e4m3fn or int8.
        groups: a scale for every 128 values in place of one for the row.
        fixed: [] fp32: the scale of all values, for float8_e4m3fn.
        smooth: [F] fp32 that the result is multiplied by first.

    Returns:
        values [..., F] in `dtype` and scale, fp32: [..., 1], [..., G], or `fixed`.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("gelu_tanh_quantized", x, bias)
    check("gelu_tanh_quantized", x, dtype, groups, fixed, smooth)
    return quantized(_op_quantized(x, bias, dtype, groups, fixed, smooth), fixed)


def _checked(op: str, x: Tensor, bias: Tensor | None) -> None:
    fits = x.ndim >= 1 and (bias is None or bias.shape == x.shape[-1:])
    _check.shapes(op, "x [..., F] and bias [F]", fits, x=x, bias=bias)
    _check.dtypes(op, _check.FLOATS, x=x, bias=bias)
    _check.one_device(op, x=x, bias=bias)
    _check.dense(op, x=x, bias=bias)
