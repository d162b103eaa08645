"""Attention backends: softmax(q k^T / sqrt(K)) v without a mask.

An `Attention` is a function of q [B, L, N, K], k and v [B, S, N, K] in the compute dtype, returning [B, L, N, K]. Neither end
is copied: q, k and v may lie in one packed projection, dense along K alone, and the result is dense. A `Projected` attention
begins with that projection [B, L, 3, D], as it comes from its linear, so that one in 8 bits quantises queries and keys in the
pass that norms and turns them. `BACKENDS` says where each runs and what it can do; the plan takes what `choose` puts first, and
the engine makes sure that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_fast.config import WanFastError
from wan_fast.kernels import attention_8bit, keys_center, qk_norm_rope, qk_norm_rope_quantized, quantize_values
from wan_fast.kernels.quantize_rows import DTYPES
from wan_fast.self_test import self_test

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Projected(Protocol):
    """Self-attention of a packed projection [B, L, 3, D] before its norm; `weight` [2, D] and the others are those of
    `qk_norm_rope`. The projection may be changed. Returns [B, L, N, K]."""

    def __call__(
        self, qkv: Tensor, weight: Tensor, table: Tensor, *, grid: tuple[int, int, int] | None, heads: int, eps: float
    ) -> Tensor: ...


def of_projection(attention: Attention) -> Projected:
    """The projection's queries and keys normed and turned in place, and an attention of them."""

    def projected(
        qkv: Tensor, weight: Tensor, table: Tensor, *, grid: tuple[int, int, int] | None, heads: int, eps: float
    ) -> Tensor:
        qk_norm_rope(qkv, weight, table, grid=grid, heads=heads, eps=eps)
        return attention(*qkv.unflatten(-1, (heads, -1)).unbind(2))

    return projected


@dataclass(frozen=True, slots=True)
class Attention8bit:
    """`attention_8bit` of a projection, all that is quantised on the way included.

    precision: "int8" or "fp8", of queries and keys. by_extension: csrc/attention_sm90.cu computes it. skip: of skip-softmax.
    wide_values: values stay in the compute dtype, or are rounded to bf16 from fp32; None: where there is no FP8.
    """

    precision: str
    by_extension: bool = False
    skip: float = 0.0
    wide_values: bool | None = None

    def __call__(
        self, qkv: Tensor, weight: Tensor, table: Tensor, *, grid: tuple[int, int, int] | None, heads: int, eps: float
    ) -> Tensor:
        where: dict[str, Any] = {"grid": grid, "heads": heads, "eps": eps}
        center = keys_center(qkv, weight, table, **where)
        qk, scale = qk_norm_rope_quantized(qkv, weight, table, center, **where, dtype=DTYPES[self.precision])
        v = qkv[:, :, 2].unflatten(-1, (heads, -1))
        wide = self.wide_values
        if wide is None:
            wide = v.is_cuda and torch.cuda.get_device_capability(v.device) < (8, 9)
        wide_v = v.bfloat16() if wide and v.dtype == torch.float32 else v
        values = (wide_v, None, None) if wide else quantize_values(v, interleaved=self.by_extension)
        settings: dict[str, Any] = {"interleaved": self.by_extension, "skip": self.skip, "dtype": qkv.dtype}
        return attention_8bit(qk[0], scale[0], qk[1], scale[1], *values, **settings)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, whichever kernel it picks for the device."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _sdpa_by(kernel: SDPBackend) -> Callable[[], Attention]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):  # raises where that kernel cannot
            return sdpa(q, k, v)

    return lambda: attention


def _flash_2() -> Attention:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_3() -> Attention:
    from flash_attn_interface import flash_attn_func

    # some releases return the softmax's sums beside the result
    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _flash_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _xformers() -> Attention:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def _sage() -> Projected:
    try:
        found = version("sageattention")
    except PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < 2:
        raise ImportError(f"sageattention is {found}, 2 or later is wanted")
    from sageattention import sageattn

    return of_projection(lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD", is_causal=False, smooth_k=True))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where a backend runs, and what it can do.

    name: as plans say it. flag: the value of --attention that it belongs to. majors: the X of the compute capabilities X.Y
    that have it, and since: the lowest of them, 89 for 8.9. best_on: those where "auto" prefers it to what stands below it.
    head_dims: the head widths it has; None for all of the models'. lse: it can also return the log-sum-exp of every row.
    package: how to install `module`. make: the attention; where it is `eight_bit` a Projected one, given the skip of
    skip-softmax, and else an Attention.
    """

    name: str
    flag: str
    majors: range
    since: int = 0
    best_on: range = range(0)
    dtypes: tuple[str, ...] = ("bf16",)
    head_dims: tuple[int, ...] | None = None
    lse: bool = False
    eight_bit: bool = False
    skips: bool = False
    module: str = "torch"
    package: str = "torch"
    make: Callable[..., Any]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        return capability[0] in self.majors and 10 * capability[0] + capability[1] >= self.since


# Published for 16k tokens of K = 128 in bf16 on an H100: flash-attn 3 648 TFLOP/s, cuDNN 595; on a B200 flash-attn 4 is 1.3 x
# cuDNN (arXiv 2407.08608 and the projects' own pages). flash-attn 2 is the kernel that PyTorch's flash is made of.
_EXACT = (
    Backend(
        name="flash-attn 3", flag="flash", majors=range(9, 10), best_on=range(9, 10), make=_flash_3, lse=True,
        module="flash_attn_interface",
        package="flash-attn 3: pip install 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
    Backend(
        name="flash-attn 4", flag="flash", majors=range(9, 13), best_on=range(10, 12), module="flash_attn.cute", lse=True,
        package="flash-attn 4: pip install --pre flash-attn-4", make=_flash_4,
    ),
    Backend(
        name="flash-attn 2", flag="flash", majors=range(8, 13), module="flash_attn_2_cuda", lse=True,
        package="flash-attn 2: pip install --no-build-isolation flash-attn", make=_flash_2,
    ),
    Backend(
        name="sdpa cudnn", flag="sdpa", majors=range(9, 100), best_on=range(9, 100), make=_sdpa_by(SDPBackend.CUDNN_ATTENTION)
    ),
    Backend(
        name="sdpa flash", flag="sdpa", majors=range(8, 100), best_on=range(8, 100), make=_sdpa_by(SDPBackend.FLASH_ATTENTION)
    ),
    Backend(
        name="xformers", flag="xformers", majors=range(8, 100), dtypes=("bf16", "fp32"), module="xformers", lse=True,
        package="xformers: pip install xformers", make=_xformers,
    ),
    Backend(
        name="sdpa efficient", flag="sdpa", majors=range(8, 100), best_on=range(8, 100), dtypes=("bf16", "fp32"),
        make=_sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
    ),
    Backend(
        name="sdpa", flag="sdpa", majors=range(100), best_on=range(100), dtypes=("bf16", "fp32"), make=lambda: sdpa
    ),
)  # fmt: skip

_EXTENSION = "the CUDA extension: pip install wan-fast where nvcc and CMake are"
# "auto" takes none of these: they are not exact. csrc/attention_sm90.cu has a flag of its own until it has been measured.
_IN_8_BITS = (
    Backend(
        name="int8 triton", flag="int8", majors=range(8, 13), head_dims=(64, 128), lse=True, skips=True,
        eight_bit=True, module="triton", make=lambda skip: Attention8bit("int8", skip=skip),
    ),
    Backend(
        name="fp8 triton", flag="fp8", majors=range(8, 13), since=89, head_dims=(64, 128), lse=True, skips=True,
        eight_bit=True, module="triton", make=lambda skip: Attention8bit("fp8", skip=skip),
    ),
    Backend(
        name="int8 cuda", flag="int8-sm90", majors=range(9, 10), head_dims=(128,), lse=True, skips=True, eight_bit=True,
        module="wan_fast._cuda", package=_EXTENSION, make=lambda skip: Attention8bit("int8", by_extension=True, skip=skip),
    ),
    Backend(
        name="fp8 cuda", flag="fp8-sm90", majors=range(9, 10), head_dims=(128,), lse=True, skips=True, eight_bit=True,
        module="wan_fast._cuda", package=_EXTENSION, make=lambda skip: Attention8bit("fp8", by_extension=True, skip=skip),
    ),
    Backend(
        name="sageattention", flag="sage", majors=range(8, 13), head_dims=(64, 128), lse=True, eight_bit=True,
        module="sageattention", make=lambda skip: _sage(),
        package="sageattention 2: pip install 'git+https://github.com/thu-ml/SageAttention'",
    ),
)  # fmt: skip
BACKENDS = _EXACT + _IN_8_BITS


def choose(asked: str, capability: tuple[int, int], dtype: str, head_dim: int, skip: float = 0.0) -> list[Backend]:
    """The backends for a GPU, best first: those of the flag asked for, or of all where that is "auto".

    Raises:
        WanFastError: there is none, with what is in the way and what to do.
    """
    major, on = capability[0], f"this GPU has {capability[0]}.{capability[1]}" if any(capability) else "the device is the CPU"
    rows = [row for row in BACKENDS if (major in row.best_on if asked == "auto" else row.flag == asked)]
    instead = "take --attention auto"
    fitting = [row for row in rows if row.runs_on(capability)]
    if not fitting:
        lowest = min(max(10 * row.majors[0], row.since) for row in rows)
        span = f"{lowest // 10}.{lowest % 10} to {max(row.majors[-1] for row in rows)}.x"
        if asked == "fp8" and major == 8:
            instead = "take --attention int8"
        raise WanFastError(f"--attention {asked} runs on compute capability {span}, {on}; {instead}")
    able = [row for row in fitting if dtype in row.dtypes]
    if not able:
        raise WanFastError(f"--attention {asked} computes in {fitting[0].dtypes[0]}, --dtype is {dtype}; {instead}")
    wide = [row for row in able if head_dim in (row.head_dims or (head_dim,))]
    if not wide:
        widths = " and ".join(map(str, able[0].head_dims or ()))
        raise WanFastError(f"--attention {asked} has head widths {widths}, this model's is {head_dim}; {instead}")
    if skip and not any(row.skips for row in wide):
        raise WanFastError(f"--skip_softmax is for --attention int8 and fp8, not for {asked}; leave it out")
    found = [row for row in wide if installed(row.module)]
    if not found:
        raise WanFastError(f"--attention {asked} needs one of these packages, none is installed: {_packages(wide)}")
    return found


def first_that_runs(
    rows: Sequence[Backend],
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    skip: float = 0.0,
    kernels: str = "auto",
) -> tuple[Backend, Any, list[str]]:
    """The first backend that takes a packed projection of `heads` x `head_dim`, its attention, and why those before it do not.

    One in 8 bits must pass its self-test besides; `kernels` says with which kernels.

    Raises:
        WanFastError: none does, with each one's reason.
    """
    failures = []
    for row in rows:
        try:
            if row.eight_bit:
                attention = row.make(skip)
                form = " skipping" * (skip > 0) + " by reference" * (kernels == "reference")
                self_test(row.name + form, row.module, attention, of_projection(sdpa), device, dtype, head_dim)
            else:
                attention = row.make()
                attention(*torch.zeros(1, 16, 3, heads, head_dim, device=device, dtype=dtype).unbind(2))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # another project's code: whatever it raises is the reason
            failures.append(f"{row.name} does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return row, attention, failures
    packages = _packages([row for row in rows if row.module not in ("torch", "triton")])
    advice = f"; mend it ({packages}), or take --attention auto" if packages else "; take --attention auto"
    raise WanFastError("; ".join(failures) + (advice if packages or rows[0].eight_bit else ""))


def facts(row: Backend, capability: tuple[int, int]) -> str:
    """What a backend can do, and what keeps it from running here."""
    widths = f"head widths {', '.join(map(str, row.head_dims))}" if row.head_dims else "any head width"
    can = [f"--attention {row.flag}", " ".join(row.dtypes), widths, *(["log-sum-exp"] if row.lse else [])]
    if not row.runs_on(capability):
        lowest = max(10 * row.majors[0], row.since)
        able = f"from compute capability {lowest // 10}.{lowest % 10}"
        why = f"not here: {able}" if row.majors[-1] >= 99 else f"not here: {able} to {row.majors[-1]}.x"
    else:
        why = "possible" if installed(row.module) else f"not installed: {row.package}"
    return f"{why} ({'; '.join(can)})"


def installed(module: str) -> bool:
    """Whether there is a module of that name; its package is not imported."""
    package, _, part = module.partition(".")
    spec = find_spec(package)
    if not part or spec is None:
        return spec is not None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / part).is_dir() or any(folder.glob(f"{part}.*")) for folder in folders)


def _packages(rows: Sequence[Backend]) -> str:
    return "; ".join(row.package for row in rows)
