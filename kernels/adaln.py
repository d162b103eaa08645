"""adaLN modulation, y = layer_norm(x) (1 + scale) + shift (arXiv 2212.09748).

B batch, L tokens, D width, R modulation rows, one per distinct timestep: with R of 2 the first `split` tokens take row 0
and the rest row 1. Statistics and affine are fp32.

Bytes per token: 6 D from an fp32 residual stream to bf16, 18.4 kB at D = 3072: 4.3 us per thousand tokens at 4.3 TB/s; 5 D to
8 bits and a scale, in the same pass (see quantize_rows.py). The modulation's rows are read from cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register
from .quantize_rows import Quantized, check, empty, form_of, quantized, rounded, store_quantized


def rows(R: int, split: int) -> Sequence[tuple[slice, slice]]:
    """(modulation rows, tokens) that belong together."""
    if R == 1:
        return ((slice(0, 1), slice(None)),)
    return (slice(0, 1), slice(0, split)), (slice(1, 2), slice(split, None))


@triton.jit
def normed(x, mask, D: tl.constexpr, EPS: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of one token, [BLOCK_D] fp32 with zeros outside the mask."""
    centred = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + EPS)


@triton.jit
def modulation_row(pointer, token, L, split, stride_b, stride_r, R: tl.constexpr):
    """Where the row of [B, R, D] begins that a token of [B * L] takes."""
    row = pointer + token // L * stride_b
    if R == 2:
        row += (token % L >= split).to(tl.int64) * stride_r
    return row


@triton.jit
def _adaln_modulate_kernel(
    x_ptr,  # [B, L, D]
    shift_ptr,  # [B, R, D] fp32
    scale_ptr,  # [B, R, D] fp32
    y_ptr,  # [B, L, D]
    y_scale_ptr,  # [B, L, 1 or G] fp32, or []; not used where FORM is ""
    smooth_ptr,  # [D] fp32
    L,
    split,
    shift_b,
    shift_r,
    scale_b,
    scale_r,
    EPS: tl.constexpr,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program per token; int64: B * L * D exceeds 2**31 for long clips
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BLOCK_D]
    shift = tl.load(modulation_row(shift_ptr, token, L, split, shift_b, shift_r, R) + d, mask=mask, other=0.0)
    scale = tl.load(modulation_row(scale_ptr, token, L, split, scale_b, scale_r, R) + d, mask=mask, other=0.0)
    y = normed(x, mask, D, EPS) * (1 + scale) + shift
    if FORM == "":
        tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        store_quantized(y, y_ptr, y_scale_ptr, smooth_ptr, token, d, mask, FORM, SMOOTH, D, BLOCK_D)


_CANDIDATES = tuple({"num_warps": warps} for warps in (2, 4, 8, 16))


def _config(D: int) -> dict[str, int]:
    """Warps: the fewest that keep a token within 64 registers, without spilling; not tuned on a device yet."""
    return {"num_warps": 4 if D <= 2048 else 8 if D <= 4096 else 16}


def _run(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    y: Tensor,
    y_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    form: str = "",
) -> None:
    B, L, D = x.shape
    if x.numel():
        with torch.cuda.device_of(x):
            _adaln_modulate_kernel[(B * L,)](
                x,
                shift,
                scale,
                y,
                y_scale,
                smooth,
                L,
                split,
                shift.stride(0),
                shift.stride(1),
                scale.stride(0),
                scale.stride(1),
                EPS=eps,
                FORM=form,
                SMOOTH=smooth is not None,
                R=shift.shape[1],
                D=D,
                BLOCK_D=triton.next_power_of_2(D),
                **_config(D),
            )


def _launch(x: Tensor, shift: Tensor, scale: Tensor, split: int, eps: float, dtype: torch.dtype) -> Tensor:
    y = _fake(x, shift, scale, split, eps, dtype)
    _run(x, shift, scale, split, eps, y)
    return y


def _reference(x: Tensor, shift: Tensor, scale: Tensor, split: int, eps: float, dtype: torch.dtype) -> Tensor:
    y = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=eps)
    for row, tokens in rows(shift.shape[1], split):
        torch.addcmul(shift[:, row], y[:, tokens], 1 + scale[:, row], out=y[:, tokens])
    return y.to(dtype)


def _fake(x: Tensor, shift: Tensor, scale: Tensor, split: int, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_op = register("adaln_modulate", launch=_launch, reference=_reference, fake=_fake)


def _launch_quantized(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    dtype: torch.dtype,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    values, scales = empty(x, dtype, groups, fixed)
    form = form_of(groups, fixed)
    _run(x, shift, scale, split, eps, values, scales if fixed is None else fixed, smooth, form)
    return values, scales


def _reference_quantized(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    dtype: torch.dtype,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = _reference(x, shift, scale, split, eps, torch.promote_types(x.dtype, torch.float32))
    return rounded(y, dtype, groups, fixed, smooth)


def _fake_quantized(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, dtype, groups, fixed, _ = others
    return empty(x, dtype, groups, fixed)


_op_quantized = register(
    "adaln_modulate_quantized", launch=_launch_quantized, reference=_reference_quantized, fake=_fake_quantized
)


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, split: int = 0, eps: float = 1e-6, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Layer-normalise tokens, then scale and shift each by the modulation of its timestep.

    Args:
        x: [B, L, D] fp32, bf16 or fp16, contiguous.
        shift, scale: [B, R, D] fp32 with R of 1 or 2, rows dense.
        split: number of leading tokens that take row 0 where R is 2, 0 .. L.
        eps: added to the variance.
        dtype: of the result.

    Returns:
        [B, L, D] in `dtype`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("adaln_modulate", x, shift, scale, split)
    _check.dtypes("adaln_modulate", _check.FLOATS, result=dtype)
    return _op(x, shift, scale, split, eps, dtype)


def adaln_modulate_quantized(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    split: int = 0,
    eps: float = 1e-6,
    groups: bool = False,
    fixed: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Quantized:
    """`adaln_modulate` whose result is quantised in the same pass, as by `quantize_rows`.

    Args:
        x: [B, L, D] fp32, bf16 or fp16, contiguous.
        shift, scale: [B, R, D] fp32 with R of 1 or 2, rows dense.
        dtype: float8_e4m3fn or int8.
        split: number of leading tokens that take row 0 where R is 2, 0 .. L.
        eps: added to the variance.
        groups: a scale for every 128 values in place of one for the token.
        fixed: [] fp32: the scale of all values, for float8_e4m3fn.
        smooth: [D] fp32 that the result is multiplied by first.

    Returns:
        values [B, L, D] in `dtype` and scale, fp32: [B, L, 1], [B, L, G], or `fixed`.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("adaln_modulate_quantized", x, shift, scale, split)
    check("adaln_modulate_quantized", x, dtype, groups, fixed, smooth)
    return quantized(_op_quantized(x, shift, scale, split, eps, dtype, groups, fixed, smooth), fixed)


def _checked(op: str, x: Tensor, shift: Tensor, scale: Tensor, split: int) -> None:
    _check.modulation(op, x, split, shift=shift, scale=scale)
    _check.dtypes(op, _check.FLOATS, x=x)
    _check.one_device(op, x=x, shift=shift, scale=scale)
    _check.dense(op, x=x)
    _check.shapes(op, "as many rows of scale as of shift", shift.shape == scale.shape, shift=shift, scale=scale)
