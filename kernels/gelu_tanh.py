"""Bias and GELU in its tanh form, in place: x -> g(x + bias), g(u) = u sigmoid(2 c (u + 0.044715 u^3)), c = sqrt(2 / pi).

That is u (1 + tanh(c (u + 0.044715 u^3))) / 2 (arXiv 1606.08415), in fp32. F feed-forward width.

Bytes per token: 4 F in bf16, 57.3 kB at F = 14336: 13.3 us per thousand tokens at 4.3 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _check
from ._op import register


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
    check_activation("gelu_tanh", x, bias)
    _op(x, bias)


def check_activation(op: str, x: Tensor, bias: Tensor | None) -> None:
    """Refuse what neither form takes."""
    fits = x.ndim >= 1 and (bias is None or bias.shape == x.shape[-1:])
    _check.shapes(op, "x [..., F] and bias [F]", fits, x=x, bias=bias)
    _check.dtypes(op, _check.FLOATS, x=x, bias=bias)
    _check.one_device(op, x=x, bias=bias)
    _check.dense(op, x=x, bias=bias)
