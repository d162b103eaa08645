"""What holds while a plan is carried out: number formats, words for an allocator's refusal, the peak, chunks to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wan_fast.config import WanFastError
from wan_fast.memory import GIB
from wan_fast.setup import Setup


def on_the_host(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The tensors on the CPU; from a GPU each is copied, and handed over, while the next one is computed."""
    behind: tuple[Tensor, torch.cuda.Event] | None = None
    for chunk in chunks:
        if chunk.device.type == "cpu":
            yield chunk
            continue
        host = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True).copy_(chunk, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if behind is not None:
            behind[1].synchronize()
            yield behind[0]
        behind = host, copied
    if behind is not None:
        behind[1].synchronize()
        yield behind[0]


def peak_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on a GPU; of the whole process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """TF32 in cuDNN's convolutions, as the official code leaves it, or true fp32; never in matrix products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = allowed, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def memory_guard(setup: Setup, expected: str) -> Iterator[None]:
    """Turn an allocator's refusal into one line with the plan's numbers."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED")):
            raise
        device = setup.device
        raise WanFastError(
            f"out of memory on {device.name}: the plan expected {expected}, with {device.free / GIB:.2f} GiB free at first; "
            "free memory, take a smaller --size or --frame_num, or set --vram to what is free"
        ) from error
