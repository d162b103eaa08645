"""The end of one sublayer and the norm that begins the next: x += gate y, then layer_norm(x) (1 + scale) + shift.

B batch, L tokens, D width, R modulation rows (see adaln.py). Without a gate the sublayer is added as it is; with `affine`
the norm takes its own weight and bias in place of 1 + scale and shift. Everything is computed in fp32 (arXiv 2212.09748).

Bytes per token: x is read and written once, y read, the normed written: 12 D for an fp32 stream and bf16, 36.9 kB at
D = 3072: 8.6 us per thousand tokens at 4.3 TB/s; 11 D where the normed is quantised in the same pass (see quantize_rows.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register
from .adaln import modulation_row, normed, rows
from .quantize_rows import Quantized, check, empty, form_of, quantized, rounded, store_quantized


@triton.jit
def _gated_residual_adaln_kernel(
    x_ptr,  # [B, L, D], changed in place
    y_ptr,  # [B, L, D]
    gate_ptr,  # [B, R_GATE, D] fp32, not read where R_GATE is 0
    shift_ptr,  # [B, R, D] fp32
    scale_ptr,  # [B, R, D] fp32
    normed_ptr,  # [B, L, D]
    normed_scale_ptr,  # [B, L, 1 or G] fp32, or []; not used where FORM is ""
    smooth_ptr,  # [D] fp32
    L,
    split,
    gate_b,
    gate_r,
    shift_b,
    shift_r,
    scale_b,
    scale_r,
    EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    R_GATE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program per token; int64: B * L * D exceeds 2**31 for long clips
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
    y = tl.load(y_ptr + token * D + d, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if R_GATE > 0:
        y *= tl.load(modulation_row(gate_ptr, token, L, split, gate_b, gate_r, R_GATE) + d, mask=mask, other=0.0)
    x = (x + y).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + token * D + d, x, mask=mask)
    shift = tl.load(modulation_row(shift_ptr, token, L, split, shift_b, shift_r, R) + d, mask=mask, other=0.0)
    scale = tl.load(modulation_row(scale_ptr, token, L, split, scale_b, scale_r, R) + d, mask=mask, other=0.0)
    if not AFFINE:
        scale += 1
    z = normed(x.to(tl.float32), mask, D, EPS) * scale + shift
    if FORM == "":
        tl.store(normed_ptr + token * D + d, z.to(normed_ptr.dtype.element_ty), mask=mask)
    else:
        store_quantized(z, normed_ptr, normed_scale_ptr, smooth_ptr, token, d, mask, FORM, SMOOTH, D, BLOCK_D)


_CANDIDATES = tuple({"num_warps": warps} for warps in (2, 4, 8, 16))


def _config(D: int) -> dict[str, int]:
    """Warps: the fewest that keep a token within 64 registers, without spilling; not tuned on a device yet."""
    return {"num_warps": 4 if D <= 2048 else 8 if D <= 4096 else 16}


def _run(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    z: Tensor,
    z_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    form: str = "",
) -> None:
    B, L, D = x.shape
    if x.numel():
        with torch.cuda.device_of(x):
            _gated_residual_adaln_kernel[(B * L,)](
                x,
                y,
                gate,
                shift,
                scale,
                z,
                z_scale,
                smooth,
                L,
                split,
                *(gate.stride()[:2] if gate is not None else (0, 0)),
                *shift.stride()[:2],
                *scale.stride()[:2],
                EPS=eps,
                AFFINE=affine,
                FORM=form,
                SMOOTH=smooth is not None,
                R_GATE=0 if gate is None else gate.shape[1],
                R=shift.shape[1],
                D=D,
                BLOCK_D=triton.next_power_of_2(D),
                **_config(D),
            )


def _launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    dtype: torch.dtype,
) -> Tensor:
    z = _fake(x, y, gate, shift, scale, split, eps, affine, dtype)
    _run(x, y, gate, shift, scale, split, eps, affine, z)
    return z


def _reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    dtype: torch.dtype,
) -> Tensor:
    if gate is None:
        x += y
    else:
        for row, tokens in rows(gate.shape[1], split):
            x[:, tokens].addcmul_(y[:, tokens].to(x.dtype), gate[:, row].to(x.dtype))
    z = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=eps)
    for row, tokens in rows(shift.shape[1], split):
        weight = scale[:, row] if affine else 1 + scale[:, row]
        torch.addcmul(shift[:, row], z[:, tokens], weight, out=z[:, tokens])
    return z.to(dtype)


def _fake(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_op = register("gated_residual_adaln", launch=_launch, reference=_reference, fake=_fake, mutates=("x",))


def _launch_quantized(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    dtype: torch.dtype,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    values, scales = empty(x, dtype, groups, fixed)
    form = form_of(groups, fixed)
    _run(x, y, gate, shift, scale, split, eps, affine, values, scales if fixed is None else fixed, smooth, form)
    return values, scales


def _reference_quantized(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    split: int,
    eps: float,
    affine: bool,
    dtype: torch.dtype,
    groups: bool,
    fixed: Tensor | None,
    smooth: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = _reference(x, y, gate, shift, scale, split, eps, affine, torch.promote_types(x.dtype, torch.float32))
    return rounded(z, dtype, groups, fixed, smooth)


def _fake_quantized(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, dtype, groups, fixed, _ = others
    return empty(x, dtype, groups, fixed)


_op_quantized = register(
    "gated_residual_adaln_quantized",
    launch=_launch_quantized,
    reference=_reference_quantized,
    fake=_fake_quantized,
    mutates=("x",),
)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    split: int = 0,
    eps: float = 1e-6,
    affine: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Add a sublayer's output to the residual stream in place, and norm and modulate it for the next sublayer.

    Args:
        x: [B, L, D] fp32, bf16 or fp16, contiguous; changed in place to x + gate y.
        y: [B, L, D] fp32, bf16 or fp16, contiguous: what the sublayer returned.
        gate: [B, R, D] fp32 with R of 1 or 2, rows dense; None adds y as it is.
        shift, scale: [B, R, D] fp32 with R of 1 or 2, rows dense; the gate may have another R.
        split: number of leading tokens that take row 0 where R is 2, 0 .. L.
        eps: added to the variance.
        affine: scale is the norm's whole weight, not its distance from 1.
        dtype: of the result.

    Returns:
        [B, L, D] in `dtype`, contiguous: the new x, normed and modulated.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("gated_residual_adaln", x, y, gate, shift, scale, split)
    _check.dtypes("gated_residual_adaln", _check.FLOATS, result=dtype)
    return _op(x, y, gate, shift, scale, split, eps, affine, dtype)


def gated_residual_adaln_quantized(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    split: int = 0,
    eps: float = 1e-6,
    affine: bool = False,
    groups: bool = False,
    fixed: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Quantized:
    """`gated_residual_adaln` whose result is quantised in the same pass, as by `quantize_rows`.

    Args:
        x: [B, L, D] fp32, bf16 or fp16, contiguous; changed in place to x + gate y.
        y: [B, L, D] fp32, bf16 or fp16, contiguous: what the sublayer returned.
        gate: [B, R, D] fp32 with R of 1 or 2, rows dense; None adds y as it is.
        shift, scale: [B, R, D] fp32 with R of 1 or 2, rows dense; the gate may have another R.
        dtype: float8_e4m3fn or int8.
        split: number of leading tokens that take row 0 where R is 2, 0 .. L.
        eps: added to the variance.
        affine: scale is the norm's whole weight, not its distance from 1.
        groups: a scale for every 128 values in place of one for the token.
        fixed: [] fp32: the scale of all values, for float8_e4m3fn.
        smooth: [D] fp32 that the normed is multiplied by first.

    Returns:
        values [B, L, D] in `dtype` and scale, fp32: [B, L, 1], [B, L, G], or `fixed`.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    _checked("gated_residual_adaln_quantized", x, y, gate, shift, scale, split)
    check("gated_residual_adaln_quantized", x, dtype, groups, fixed, smooth)
    return quantized(_op_quantized(x, y, gate, shift, scale, split, eps, affine, dtype, groups, fixed, smooth), fixed)


def _checked(op: str, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, split: int) -> None:
    _check.modulation(op, x, split, gate=gate, shift=shift, scale=scale)
    _check.shapes(op, "y shaped as x", x.shape == y.shape, x=x, y=y)
    _check.shapes(op, "as many rows of scale as of shift", shift.shape == scale.shape, shift=shift, scale=scale)
    _check.dtypes(op, _check.FLOATS, x=x, y=y)
    _check.one_device(op, x=x, y=y, gate=gate, shift=shift, scale=scale)
    _check.dense(op, x=x, y=y)
