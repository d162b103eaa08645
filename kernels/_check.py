"""What public operators refuse: each function raises ValueError that names what was given and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shapes(op: str, wants: str, fits: bool, **given: Tensor | None) -> None:
    if not fits:
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items() if t is not None)
        raise ValueError(f"{op} wants {wants}; got {found}")


def dtypes(op: str, allowed: tuple[torch.dtype, ...], **given: Tensor | torch.dtype | None) -> None:
    for name, value in given.items():
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype not in allowed:
            words = " or ".join(str(able).removeprefix("torch.") for able in allowed)
            raise ValueError(f"{op} wants {name} in {words}, got {str(dtype).removeprefix('torch.')}")


def one_device(op: str, **given: Tensor | None) -> None:
    places = {name: tensor.device for name, tensor in given.items() if tensor is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{op} wants all tensors on one device, got {found}")


def dense(op: str, **given: Tensor | None) -> None:
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{op} wants {name} contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}; "
                "call .contiguous() on it"
            )


def channels_last(op: str, **given: Tensor | None) -> None:
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{op} wants {name} [F, C, H, W] with the channels innermost, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}; call .contiguous(memory_format=torch.channels_last) on it"
            )


def modulation(op: str, x: Tensor, split: int, **rows: Tensor | None) -> None:
    """`rows`: [B, R, D] fp32, each with R of 1 or 2, for x [B, L, D]; `split`: 0 .. L."""
    for name, tensor in rows.items():
        if tensor is None:
            continue
        fits = x.ndim == tensor.ndim == 3 and x.shape[::2] == tensor.shape[::2] and tensor.shape[1] in (1, 2)
        shapes(op, f"x [B, L, D] and {name} [B, 1 or 2, D]", fits, x=x, **{name: tensor})
        dtypes(op, (torch.float32,), **{name: tensor})
        if tensor.stride(2) != 1:
            raise ValueError(f"{op} wants the rows of {name} dense, got strides {tensor.stride()}; call .contiguous() on it")
    if not 0 <= split <= x.shape[1]:
        raise ValueError(f"{op} wants a split from 0 to {x.shape[1]}, the number of tokens; got {split}")
