"""Mends Triton's interpreter, which truncates where a GPU rounds to the nearest even: conversions go through PyTorch.

It keeps bf16 as the 16 bits of an unsigned integer, which products must not take for numbers. Other arithmetic on bf16
itself is wrong there too; kernels that compute in fp32, as all do so far, never meet that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
_Builder = interpreter.InterpreterBuilder
_plain_cast = _Builder.cast_impl


def _converted(source: Any, target: Any) -> Any:
    bits = torch.from_numpy(np.ascontiguousarray(source.data).view(np.uint8).copy())
    values = bits.view(_TORCH[source.dtype.scalar]).to(_TORCH[target.scalar])
    stored = values.view(torch.uint8).numpy().view(interpreter._get_np_dtype(target.scalar))
    return interpreter.TensorHandle(stored.reshape(source.data.shape), target.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    if tl.bfloat16 in (source.dtype.scalar, target.scalar) and {source.dtype.scalar, target.scalar} <= _TORCH.keys():
        return _converted(source, target)
    return _plain_cast(self, source, target)


def _values(handle: Any) -> Any:
    """The values of a tensor, in fp32 where it is narrower."""
    wide = tl.float32 if handle.dtype.scalar in (tl.bfloat16, tl.float16) else handle.dtype.scalar
    return (_converted(handle, wide) if wide != handle.dtype.scalar else handle).data


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(_values(a), _values(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)


def mend() -> None:
    _Builder.create_dot = _dot
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = lambda self, source, target, rounding: _cast(self, source, target)
