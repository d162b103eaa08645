"""Mends Triton's interpreter, which truncates where a GPU rounds to the nearest even: conversions go through PyTorch.

It keeps bf16 and e4m3 as the bits of an unsigned integer, which products must not take for numbers. Other arithmetic on them
itself is wrong there too; kernels that compute in fp32, as all do so far, never meet that. Triton 3.6 cannot loop to a bound
that a kernel has computed, with numpy from 2.4 on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
_TORCH[tl.float8e4nv] = torch.float8_e4m3fn
_BITS = {tl.bfloat16, tl.float8e4nv}  # kept as integers
_Builder = interpreter.InterpreterBuilder
_plain_cast = _Builder.cast_impl


def _converted(source: Any, target: Any) -> Any:
    bits = torch.from_numpy(np.ascontiguousarray(source.data).view(np.uint8).copy())
    values = bits.view(_TORCH[source.dtype.scalar]).to(_TORCH[target.scalar])
    stored = values.view(torch.uint8).numpy().view(interpreter._get_np_dtype(target.scalar))
    return interpreter.TensorHandle(stored.reshape(source.data.shape), target.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    pair = {source.dtype.scalar, target.scalar}
    if pair & _BITS and pair <= _TORCH.keys():
        return _converted(source, target)
    return _plain_cast(self, source, target)


def _values(handle: Any) -> Any:
    """The values of a tensor, in fp32 where it is narrower."""
    kind = handle.dtype.scalar
    if kind == tl.int8:  # numpy multiplies integers slowly; their sums are exact in fp64
        return handle.data.astype(np.float64)
    return (_converted(handle, tl.float32) if kind in (*_BITS, tl.float16) else handle).data


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(_values(a), _values(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _index(self: Any) -> int:
    return int(self.handle.data.reshape(-1)[0])


def _mend_bounds() -> None:
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        plain(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", _index)
        else:
            tensor.__index__ = _index

    interpreter._patch_lang_tensor = patch


def _mend_calls() -> None:
    """A kernel's call of a function patches the whole language again, which takes longer than the function: once a launch."""
    plain, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch(fn: Any) -> Any:
        # what it patches is what the function's module has of it
        if (module := id(fn.__globals__)) in patched:
            return None
        patched.add(module)
        return plain(fn)

    def call(self: Any, *args: Any, **settings: Any) -> None:
        patched.clear()
        launch(self, *args, **settings)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call


def mend() -> None:
    _mend_bounds()
    _mend_calls()
    _Builder.create_dot = _dot
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = lambda self, source, target, rounding: _cast(self, source, target)
