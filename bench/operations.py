"""Cases of single operations, at the shapes that the real tasks give them: kernels, GEMM, attention, convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from kernel_cases import REAL_CASES, RealCase, arguments, run
from torch import Tensor
from torch.nn import functional as F

from bench.registry import OURS, Build, Case, NotHere, Work
from bench.tune import without_extension
from wan_fast.attention import BACKENDS, Backend, sdpa
from wan_fast.counting import not_touched, operations
from wan_fast.kernels import KERNELS, backend, causal_conv3d, conv_weight
from wan_fast.kernels.qk_norm_rope import rotation
from wan_fast.tasks import HEAD_DIM, PATCH, TASKS

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
    moved = sum(t.nbytes for t in (*args, *run(op, op.op, args)) if isinstance(t, Tensor)) - not_touched(op.op, args)

    def in_triton() -> Callable[[], Any]:
        if device.type != "cuda" or backend(device, case.op) == "triton":
            raise NotHere("there is no other kernel of it here")

        def call() -> Any:
            with without_extension(case.op):
                return op.op(*args)

        return call

    def compiled() -> Callable[[], Any]:
        needs_cuda(device, "the compiled reference is timed")
        chain = rope_in_reals(args) if case.op == "qk_norm_rope" else op.reference
        reference = torch.compile(chain, dynamic=False)
        return lambda: reference(*args)

    return Work(
        arms={
            OURS: lambda: lambda: op.op(*args),
            "Triton": in_triton,
            "reference": lambda: lambda: op.reference(*args),
            "reference, compiled": compiled,
        },
        rate=case.products or ("bf16" if dtype == torch.bfloat16 else "fp32"),
        # rounding may differ by one level of 255; what changes in place is not the same after another number of calls
        tolerance=None if op.mutates else 2e-2,
        flops=operations(op.op, args),
        bytes=moved,
    )


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


# --- attention ----------------------------------------------------------------------------------------------------------


def attention(L: int, heads: int, device: torch.device) -> Work:
    """Self-attention of one block: q, k, v [1, L, N, K] bf16."""
    q, k, v = (torch.randn(1, L, heads, HEAD_DIM, device=device).bfloat16() for _ in range(3))

    def by(backend: Backend) -> Build:
        def build() -> Callable[[], Tensor]:
            return partial(backend.make(), q, k, v)

        return build

    def flash3_fp8() -> Callable[[], Tensor]:
        from flash_attn_interface import flash_attn_func

        one = torch.ones(1, heads, device=device)
        return lambda: _first(flash_attn_func(*(t.to(E4M3) for t in (q, k, v)), q_descale=one, k_descale=one, v_descale=one))

    def sage() -> Callable[[], Tensor]:
        from sageattention import sageattn

        return lambda: sageattn(q, k, v, tensor_layout="NHD")

    return Work(
        arms={
            OURS: lambda: lambda: sdpa(q, k, v),
            **{backend.name: by(backend) for backend in BACKENDS if backend.name != "sdpa"},
            "flash-attn 3 fp8, casts included": flash3_fp8,
            "SageAttention, quantisation included": sage,
        },
        rate="bf16",
        rates=dict.fromkeys(("flash-attn 3 fp8, casts included", "SageAttention, quantisation included"), "fp8"),
        tolerance=1e-1,
        flops=4.0 * L * L * heads * HEAD_DIM,
        bytes=2.0 * 4 * L * heads * HEAD_DIM,
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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


def _attention_cases() -> list[Case]:
    cases = []
    for task, *video in VIDEOS:
        L, heads = tokens(task, *video), TASKS[task].num_heads
        cases.append(Case(f"attention/{task}/L{L}-N{heads}-K{HEAD_DIM}/bf16", "cuda", partial(attention, L, heads), 4.0))
    return cases


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
ATTENTION_CASES = tuple(_attention_cases())
CONV_CASES = tuple(
    Case(f"conv3d/vae{vae}/{C}x{T}x{H}x{W}/fp32", "cuda", partial(conv3d, C, T, H, W), 1.0) for vae, C, T, H, W in _CONVOLUTIONS
)
