"""What a device can do at best, measured: bytes copied per second, and operations of a large matrix product per second.

These are the roofs that every "% of roof" of this project refers to, in the profile of a run and in the benchmarks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# fp32 is true fp32; a GPU in this project runs convolutions, and nothing else, in tf32
PRODUCTS = ("fp32", "tf32", "bf16", "fp8", "int8")


def measured(device: torch.device, products: Iterable[str] = PRODUCTS) -> Iterator[tuple[str, float | str]]:
    """("copy", bytes per second), then (product, operations per second); a string says why there is no number.

    A device may have no such product, or no room for one.
    """
    for kind in ("copy", *products):
        found: float | str
        try:
            found = copy_rate(device) if kind == "copy" else product_rate(device, kind)
        except (RuntimeError, NotImplementedError) as error:
            found = " ".join(str(error).split())[:200]
        yield kind, found
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_rate(device: torch.device) -> float:
    """Bytes per second, those read and those written, of a copy that no cache holds."""
    count = min(2**31, _free(device) // 8) if device.type == "cuda" else 2**28
    source, target = (torch.empty(count, dtype=torch.uint8, device=device).fill_(i) for i in range(2))
    return 2 * count / _fastest(lambda: target.copy_(source), device)


def product_rate(device: torch.device, kind: str) -> float:
    """Operations per second (a multiply-add is two) of a product of square matrices; `kind` is one of PRODUCTS.

    Raises:
        RuntimeError: the device has no such product.
    """
    size = 2048 if device.type != "cuda" else 8192 if _free(device) > 2**31 else 4096
    multiply = _PRODUCTS[kind](size, device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        return 2 * size**3 / _fastest(multiply, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _product(dtype: torch.dtype) -> Callable[[int, torch.device], Callable[[], Tensor]]:
    def make(size: int, device: torch.device) -> Callable[[], Tensor]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # x @ weight.t(), as linears are stored: elsewhere CPUs without bf16 instructions are another 15 times slower
        return lambda: a @ b.t()

    return make


def _tf32(size: int, device: torch.device) -> Callable[[], Tensor]:
    if device.type != "cuda":
        raise RuntimeError("tf32 is a mode of NVIDIA GPUs")
    return _product(torch.float32)(size, device)


def _fp8(size: int, device: torch.device) -> Callable[[], Tensor]:
    if device.type != "cuda":  # PyTorch emulates them, on some for minutes
        raise RuntimeError("CPUs have no FP8 products")
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8(size: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randint(-127, 128, (size, size), device=device).to(torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


_PRODUCTS = {
    "fp32": _product(torch.float32),
    "tf32": _tf32,
    "bf16": _product(torch.bfloat16),
    "fp8": _fp8,
    "int8": _int8,
}


def _fastest(call: Callable[[], object], device: torch.device, *, seconds: float = 0.3, most: int = 20) -> float:
    """Seconds of the fastest call: what noise and other work only ever add to."""
    call()
    best, spent = float("inf"), 0.0
    while spent < seconds and most > 0:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            call()
            taken = time.perf_counter() - begin
        best, spent, most = min(best, taken), spent + taken, most - 1
    return best
