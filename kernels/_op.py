"""Registration of wan_fast operators with the PyTorch dispatcher.

The dispatcher alone decides between kernel and reference: CUDA tensors reach the launcher, CPU tensors the reference,
meta and fake tensors the shape function; within `only_reference` CUDA tensors reach the reference too. An operator that
also exists in CUDA C++ asks `cuda_extension`, here, whether the compiled module can run on the tensor's device; where it
cannot, the Triton kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any, NamedTuple

import torch

_LIBRARY = torch.library.Library("wan_fast", "DEF")


class Kernel(NamedTuple):
    """One operator: what the dispatcher calls (`op`), the bodies behind it, and whether CUDA C++ is one of them."""

    name: str
    op: Callable[..., Any]
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    has_cuda: bool
    mutates: tuple[str, ...] = ()


KERNELS: dict[str, Kernel] = {}
_only_reference = ContextVar("only_reference", default=False)


@contextmanager
def only_reference(asked: bool = True) -> Iterator[None]:
    """Operators called within run their reference on every device, if that is asked for."""
    token = _only_reference.set(asked)
    try:
        yield
    finally:
        _only_reference.reset(token)


def launch_or_reference(launch: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls for CUDA tensors."""

    @wraps(launch)
    def body(*args: Any) -> Any:
        return (reference if _only_reference.get() else launch)(*args)

    return body


def register(
    name: str,
    *,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    has_cuda: bool = False,
) -> Callable[..., Any]:
    """Define `wan_fast::<name>` and return the callable operator.

    Args:
        name: name of the operator.
        launch: runs the kernel on CUDA tensors.
        reference: plain PyTorch, the definition of the operator; runs on CPU tensors. The schema is inferred from its
            signature.
        fake: returns empty tensors of the right shape, dtype and strides.
        mutates: the arguments that are written to.
        has_cuda: `launch` uses the module of `cuda_extension` where there is one.

    Raises:
        TypeError: `launch` and `reference` have different signatures.
    """
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    if torch.library.infer_schema(launch, mutates_args=mutates) != schema:
        raise TypeError(f"{name}: launch and reference have different signatures")
    _LIBRARY.define(name + schema, tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, launch_or_reference(launch, reference), "CUDA")
    torch.library.register_fake(f"wan_fast::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.wan_fast, name).default
    KERNELS[name] = Kernel(name, op, launch, reference, has_cuda, mutates)
    return op


@lru_cache
def _load_extension(index: int) -> tuple[Any, str]:
    """The compiled module and "", or None and the reason why CUDA device `index` cannot use it."""
    try:
        module = import_module("wan_fast._cuda")
    except ImportError as error:
        return None, f"wan_fast._cuda: {error}"
    with torch.cuda.device(index):
        reason = module.unusable(index)
    if reason:
        return None, f"wan_fast._cuda, built for {', '.join(module.architectures())}: {reason}"
    return module, ""


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def cuda_extension(device: torch.device) -> Any:
    """The module wan_fast._cuda where it can run on this device, else None."""
    if device.type != "cuda":
        return None
    return _load_extension(_device_index(device))[0]


def backend(device: str | torch.device, op: str | None = None) -> str:
    """Say what runs an operator on a device.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        op: name of the operator; None stands for one that exists in every form.

    Returns:
        "reference" (plain PyTorch), "triton" or "cuda" (CUDA C++).

    Raises:
        ValueError: no operator has that name, or operators do not run on that kind of device.
    """
    device = torch.device(device)
    if op is not None and op not in KERNELS:
        raise ValueError(f"no operator is called {op!r}; there are: {', '.join(sorted(KERNELS))}")
    if device.type == "cpu":
        return "reference"
    if device.type != "cuda":
        raise ValueError(f"operators run on cpu and cuda, not on {device.type!r}")
    has_cuda = op is None or KERNELS[op].has_cuda
    return "cuda" if has_cuda and cuda_extension(device) is not None else "triton"


def why_no_extension(device: str | torch.device) -> str:
    """Why operators on this CUDA device do not use wan_fast._cuda; "" where they do."""
    return _load_extension(_device_index(torch.device(device)))[1]
