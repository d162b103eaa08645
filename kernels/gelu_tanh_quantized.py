"""Bias, GELU in its tanh form and quantisation to 8 bits in one pass (see gelu_tanh.py and quantize_rows.py). F width.

Not in place. Bytes per token: 3 F from bf16, 43 kB at F = 14336: 10 us per thousand tokens at 4.3 TB/s, fewer than the plain
form moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._op import register
from .gelu_tanh import check_activation, gelu
from .quantize_rows import Quantized, check, empty, form_of, quantized, rounded, store_quantized


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


_CANDIDATES = tuple({"num_warps": warps} for warps in (4, 8, 16, 32))


def _config(F: int) -> dict[str, int]:
    """Warps: 16 values per thread, which takes 57 registers at most; 32 take 75 on sm_100. Not tuned on a device yet."""
    return {"num_warps": 4 if F <= 2048 else 8 if F <= 4096 else 16 if F <= 8192 else 32}


def _launch(
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
                **_config(F),
            )
    return values, scales


def _reference(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    if bias is not None:
        wide += bias
    torch.ops.aten.gelu_(wide, approximate="tanh")
    return rounded(wide, dtype, groups, fixed, smooth)


def _fake(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, groups: bool, fixed: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty(x, dtype, groups, fixed)


_op = register("gelu_tanh_quantized", launch=_launch, reference=_reference, fake=_fake)


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
    check_activation("gelu_tanh_quantized", x, bias)
    check("gelu_tanh_quantized", x, dtype, groups, fixed, smooth)
    return quantized(_op(x, bias, dtype, groups, fixed, smooth), fixed)
