"""The inputs on which every operator of wan_fast.kernels is tested; a new operator adds its rows here.

`CASES` holds small awkward shapes: they run on a GPU, and without one in Triton's interpreter, which takes about 5 ms
per program. `REAL_CASES` holds the shapes of real videos, as meta tensors: they are compiled, not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = Callable[[torch.dtype], tuple[Any, ...]]


class Case(NamedTuple):
    """One set of inputs: `inputs(dtype)` returns the positional arguments of the operator."""

    op: str
    id: str
    inputs: Inputs


class RealCase(NamedTuple):
    """One real shape, and the registers per thread that every kernel launched for it may use at most."""

    op: str
    id: str
    inputs: Inputs
    registers: int


def _frames(F: int, H: int, W: int, margin: int = 0) -> Callable[[torch.dtype], Tensor]:
    """[3, F, H, W] with values beyond both bounds, NaN and infinities; a view of a larger buffer if margin > 0."""

    def build(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(F * H * W)
        buffer = torch.randn(3, F + 2 * margin, H, W, generator=generator)
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, -0.0, 0.0])[: H * W]
        buffer[1, margin].view(-1)[: len(special)] = special
        return buffer.to(dtype)[:, margin : margin + F]

    return build


def _frame_first(frames: Tensor) -> Tensor:
    """[3, F, H, W], the same values, stored as [F, 3, H, W]."""
    return frames.transpose(0, 1).contiguous().transpose(0, 1)


def _both(frames: Callable[[torch.dtype], Tensor], rounding: bool) -> Inputs:
    return lambda dtype: (frames(dtype), rounding)


def _frames_to_uint8_cases() -> list[Case]:
    sizes = [(1, 1, 1, 0), (1, 5, 7, 0), (3, 16, 32, 0), (5, 11, 13, 0), (2, 24, 31, 2), (2, 16, 32, 1), (1, 90, 64, 1)]
    cases = []
    for (F, H, W, margin), rounding in itertools.product(sizes, (False, True)):
        name = f"F{F}-H{H}-W{W}-margin{margin}-{'round' if rounding else 'truncate'}"
        cases.append(Case("frames_to_uint8", name, _both(_frames(F, H, W, margin), rounding)))
    frames = _frames(2, 9, 12)
    cases.append(Case("frames_to_uint8", "columns-first", lambda dtype: (frames(dtype).mT, True)))
    cases.append(Case("frames_to_uint8", "frame-first", lambda dtype: (_frame_first(frames(dtype)), True)))
    return cases


def arguments(case: Case | RealCase, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, ...]:
    """The case's arguments on a device, with the strides that the case gave them; meta tensors get random values."""

    def move(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            return torch.randn(value.shape, dtype=value.dtype, device=device)
        buffer = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        return buffer.to(device).as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(move(value) for value in case.inputs(dtype))


def in_fp64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with floating-point tensors in fp64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _meta(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype, device="meta")


CASES = _frames_to_uint8_cases()

REAL_CASES = [
    RealCase("frames_to_uint8", "480p-81", _both(_meta(3, 81, 480, 832), False), registers=40),
    RealCase("frames_to_uint8", "720p-121", _both(_meta(3, 121, 704, 1280), True), registers=40),
]
