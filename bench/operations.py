"""Cases of single operations, at the shapes that the real tasks give them: kernels and convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from kernel_cases import REAL_CASES, RealCase, arguments
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from bench.registry import OURS, Build, Case, NotHere, Work
from bench.tune import MANY_SCORES, scores, without_extension
from wan_fast.counting import not_touched, operations
from wan_fast.kernels import KERNELS, backend, causal_conv3d, conv_weight
from wan_fast.kernels._op import Kernel
from wan_fast.kernels.qk_norm_rope import rotation
from wan_fast.tasks import PATCH, TASKS

E4M3 = torch.float8_e4m3fn

# (task, width, height, frames): the videos whose shapes are measured
VIDEOS = (
    ("ti2v-5B", 1280, 704, 121),
    ("t2v-1.3B", 832, 480, 81),
    ("t2v-14B", 832, 480, 81),
    ("t2v-14B", 1280, 720, 81),
)


def latent_shape(task: str, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    return TASKS[task].vae_spec.latent_shape((width, height), frames)


def tokens(task: str, width: int, height: int, frames: int) -> int:
    return prod(latent_shape(task, width, height, frames)[1:]) // prod(PATCH)


# --- kernels ------------------------------------------------------------------------------------------------------------


def kernel(case: RealCase, dtype: torch.dtype, device: torch.device) -> Work:
    """An operator as the dispatcher runs it, its Triton kernel where that is another one, and its reference."""
    op = KERNELS[case.op]
    args = arguments(case, dtype, device)
    rates: dict[str, dict[str, float]] = {}
    if case.op == "attention_8bit":
        values = "fp8" if args[4].dtype == E4M3 else "bf16"
        rates[OURS] = {case.products: 1.0} if case.products == values else {case.products: 0.5, values: 0.5}

    def reference() -> Callable[[], Any]:
        if scores(case.op, args) > MANY_SCORES:
            raise NotHere("it takes seconds; the accuracy rule holds two heads to it")
        return lambda: op.reference(*args)

    def in_triton() -> Callable[[], Any]:
        if device.type != "cuda" or backend(device, case.op) == "triton":
            raise NotHere("there is no other kernel of it here")

        def call() -> Any:
            with without_extension(case.op):
                return op.op(*args)

        return call

    def compiled() -> Callable[[], Any]:
        needs_cuda(device, "the compiled reference is timed")
        if case.op == "attention_8bit":
            raise NotHere("it is a loop over heads, which a compiler unrolls")
        chain = rope_in_reals(args) if case.op == "qk_norm_rope" else op.reference
        compiled = torch.compile(chain, dynamic=False)
        return lambda: compiled(*args)

    return Work(
        arms={
            OURS: lambda: lambda: op.op(*args),
            "Triton": in_triton,
            "reference": reference,
            "reference, compiled": compiled,
        },
        rate=case.products or ("bf16" if dtype == torch.bfloat16 else "fp32"),
        # rounding may differ by one level of 255; what changes in place is not the same after another number of calls
        tolerance=None if op.mutates else 2e-2,
        flops=operations(op.op, args),
        bytes=moved(op, args),
        rates=rates,
    )


def moved(op: Kernel, args: Sequence[Any]) -> float:
    """Bytes that an operator reads and writes, run once to see them."""
    outputs = tree_leaves(op.op(*args))
    changed = [arg for name, arg in zip(signature(op.reference).parameters, args, strict=True) if name in op.mutates]
    return sum(t.nbytes for t in (*args, *outputs, *changed) if isinstance(t, Tensor)) - not_touched(op.op, args)


def rope_in_reals(args: Sequence[Any]) -> Callable[..., Any]:
    """The reference of `qk_norm_rope` without complex numbers, which torch.compile leaves alone, its angles found before."""
    x, weight, table, grid, offset, heads, eps = args
    P, D = weight.shape
    turn = None if table is None else torch.view_as_real(rotation(table, x.shape[1], grid, offset, D // heads))[:, None]

    def chain(x: Tensor, weight: Tensor, *_: Any) -> None:
        y = F.rms_norm(x[:, :, :P].float(), (D,), eps=eps) * weight  # [B, L, P, D]
        if turn is not None:
            cosine, sine = turn.unbind(-1)  # [L, 1, 1, K/2]
            a, b = y.unflatten(-1, (heads, -1, 2)).unbind(-1)
            y = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-3)
        x[:, :, :P] = y

    return chain


# --- convolution --------------------------------------------------------------------------------------------------------


def conv3d(channels: int, frames: int, height: int, width: int, device: torch.device) -> Work:
    """A causal 3x3x3 convolution of the VAE's decoder, with two frames of history."""
    # laid out as the engine's are
    x, past = (
        torch.randn(n, channels, height, width, device=device).contiguous(memory_format=torch.channels_last)
        for n in (frames, 2)
    )
    weight, bias = (
        torch.randn(channels, channels, 3, 3, 3, device=device) / (27 * channels) ** 0.5,
        torch.randn(channels, device=device),
    )
    laid = conv_weight(weight)
    video = torch.cat([past, x]).transpose(0, 1)[None]

    def plain(dtype: torch.dtype, layout: torch.memory_format) -> Build:
        def build() -> Callable[[], Tensor]:
            data, kernel = (t.to(dtype).contiguous(memory_format=layout) for t in (video, weight))
            offset = bias.to(dtype)
            return lambda: F.conv3d(data, kernel, offset, padding=(0, 1, 1))[0].transpose(0, 1)

        return build

    return Work(
        arms={
            OURS: lambda: lambda: causal_conv3d(x, past, laid, bias)[0],
            "conv3d alone, NCDHW, fp32": plain(torch.float32, torch.contiguous_format),
            "conv3d alone, NDHWC, fp32": plain(torch.float32, torch.channels_last_3d),
            "conv3d alone, NCDHW, bf16": plain(torch.bfloat16, torch.contiguous_format),
            "conv3d alone, NDHWC, bf16": plain(torch.bfloat16, torch.channels_last_3d),
        },
        rate="tf32" if device.type == "cuda" else "fp32",
        rates=dict.fromkeys(("conv3d alone, NCDHW, bf16", "conv3d alone, NDHWC, bf16"), "bf16"),
        tolerance=2e-2,
        flops=2.0 * 27 * channels**2 * frames * height * width,
        bytes=4.0 * channels * height * width * (2 * frames + 2),
    )


def needs_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise NotHere(f"{what} on a GPU only")


# (VAE, channels, frames at once, height, width): the widest layers of each level that hold most of the work
_CONVOLUTIONS = (
    ("2.1", 96, 4, 480, 832),
    ("2.1", 192, 4, 240, 416),
    ("2.1", 384, 2, 120, 208),
    ("2.2", 256, 4, 352, 640),
    ("2.2", 512, 4, 176, 320),
    ("2.2", 1024, 2, 88, 160),
)

KERNEL_CASES = tuple(
    Case(f"kernel/{case.op}/{case.id}/{name}", "cuda", partial(kernel, case, dtype), 1.0)
    for case in REAL_CASES
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    if dtype in case.dtypes
)
CONV_CASES = tuple(
    Case(f"conv3d/vae{vae}/{C}x{T}x{H}x{W}/fp32", "cuda", partial(conv3d, C, T, H, W), 1.0) for vae, C, T, H, W in _CONVOLUTIONS
)
