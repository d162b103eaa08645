"""RMSNorm over the channels of a frame, with or without SiLU behind it: y = x / max(|x|, 1e-12) sqrt(C) gamma, y sigmoid(y).

F frames, C channels, H W height and width; a position's channels lie side by side (channels-last). Everything is computed
in fp32 (arXiv 1910.07467, as the norm of the Wan VAE, arXiv 2503.20314).

Bytes per position: 4 C in bf16, 0.92 GB for four frames of 352x640 at C = 256, which is why SiLU has no pass of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._op import register


@triton.jit
def _rms_norm_silu_kernel(
    x_ptr,  # [positions, C]
    gamma_ptr,  # [C]
    y_ptr,  # [positions, C], may be x
    positions,
    ROOT: tl.constexpr,
    SILU: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64: a chunk at full resolution exceeds 2**31 elements
    p = (tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (p < positions) & (c < C)
    x = tl.load(x_ptr + p * C + c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]
    y = x * (ROOT / norm) * gamma
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(y_ptr + p * C + c, y.to(y_ptr.dtype.element_ty), mask=mask)


_CANDIDATES = tuple({"BLOCK_P": block, "num_warps": warps} for block in (1, 4, 8, 16) for warps in (1, 2, 4, 8))


def _config(C: int) -> dict[str, int]:
    """Positions and warps: 32 elements a thread; not tuned on a device yet."""
    return {"BLOCK_P": max(1, 4096 // triton.next_power_of_2(C)), "num_warps": 4}


def _run(x: Tensor, gamma: Tensor, silu: bool, y: Tensor) -> None:
    F_, C, H, W = x.shape
    positions, config = F_ * H * W, _config(C)
    if positions:
        with torch.cuda.device_of(x):
            _rms_norm_silu_kernel[(triton.cdiv(positions, config["BLOCK_P"]),)](
                x, gamma, y, positions, ROOT=C**0.5, SILU=silu, C=C, BLOCK_C=triton.next_power_of_2(C), **config
            )


def _launch(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    y = torch.empty_like(x)
    _run(x, gamma, silu, y)
    return y


def _launch_inplace(x: Tensor, gamma: Tensor, silu: bool) -> None:
    _run(x, gamma, silu, x)


# on a CPU work goes in blocks that stay in the cache from one step to the next; of 1 to 16 MiB this was the steadiest
BLOCK_BYTES = 8 << 20


def _reference_into(x: Tensor, gamma: Tensor, silu: bool, y: Tensor) -> None:
    C = x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    block = BLOCK_BYTES // (4 * C) if x.device.type == "cpu" else max(1, x.numel())
    rows, results = (t.permute(0, 2, 3, 1).view(-1, C).split(block) for t in (x, y))
    for row, result in zip(rows, results, strict=True):
        norm = torch.linalg.vector_norm(row, dim=1, keepdim=True, dtype=wide).clamp_min_(1e-12)
        if x.dtype == wide:
            torch.mul(row, C**0.5 / norm, out=result).mul_(gamma)
            if silu:
                F.silu(result, inplace=True)
        else:  # rounded once
            normed = row * (C**0.5 / norm) * gamma
            result.copy_(F.silu(normed) if silu else normed)


def _reference(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    y = torch.empty_like(x)
    _reference_into(x, gamma, silu, y)
    return y


def _reference_inplace(x: Tensor, gamma: Tensor, silu: bool) -> None:
    _reference_into(x, gamma, silu, x)


def _fake(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_inplace(x: Tensor, gamma: Tensor, silu: bool) -> None:
    pass


_op = register("rms_norm_silu", launch=_launch, reference=_reference, fake=_fake)
_op_inplace = register(
    "rms_norm_silu_", launch=_launch_inplace, reference=_reference_inplace, fake=_fake_inplace, mutates=("x",)
)


def _checked(op: str, x: Tensor, gamma: Tensor) -> None:
    _check.shapes(op, "x [F, C, H, W] and gamma [C]", x.ndim == 4 and gamma.shape == x.shape[1:2], x=x, gamma=gamma)
    _check.dtypes(op, _check.FLOATS, x=x, gamma=gamma)
    _check.one_device(op, x=x, gamma=gamma)
    _check.channels_last(op, x=x)


def rms_norm_silu(x: Tensor, gamma: Tensor, *, silu: bool = True) -> Tensor:
    """Norm every position over its channels, and apply SiLU.

    Args:
        x: [F, C, H, W] fp32, bf16 or fp16, channels-last.
        gamma: [C] fp32, bf16 or fp16.
        silu: whether SiLU follows.

    Returns:
        [F, C, H, W] in x's dtype, channels-last; computed in fp32, rounded once.

    Raises:
        ValueError: shapes, dtypes or layouts are others.
    """
    _checked("rms_norm_silu", x, gamma)
    return _op(x, gamma, silu)


def rms_norm_silu_(x: Tensor, gamma: Tensor, *, silu: bool = True) -> None:
    """`rms_norm_silu` in place.

    Args:
        x: [F, C, H, W] fp32, bf16 or fp16, channels-last; changed.
        gamma: [C] fp32, bf16 or fp16.
        silu: whether SiLU follows.

    Returns:
        None: x [F, C, H, W] is changed.

    Raises:
        ValueError: shapes, dtypes or layouts are others.
    """
    _checked("rms_norm_silu_", x, gamma)
    _op_inplace(x, gamma, silu)
