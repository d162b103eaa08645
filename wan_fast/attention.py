"""Attention backends: softmax(q k^T / sqrt(K)) v without a mask.

Each is a function of q [B, L, N, K], k and v [B, S, N, K] in the compute dtype, returning [B, L, N, K]. Neither end is
copied: q, k and v may lie in one packed projection, dense along K alone, and the result is dense. `BACKENDS` says where
each runs; the plan takes what `choose` puts first, and the engine makes sure that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_fast.config import WanFastError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where a backend runs.

    name: as plans say it. flag: the value of --attention that it belongs to. majors: the X of the compute capabilities X.Y
    that have it. best_on: those where "auto" prefers it to what stands below it. package: how to install `module`.
    """

    name: str
    flag: str
    majors: range
    best_on: range = range(0)
    dtypes: tuple[str, ...] = ("bf16",)
    module: str = "torch"
    package: str = "torch"
    make: Callable[[], Attention]


# Published for 16k tokens of K = 128 in bf16 on an H100: flash-attn 3 648 TFLOP/s, cuDNN 595; on a B200 flash-attn 4 is 1.3 x
# cuDNN (arXiv 2407.08608 and the projects' own pages). flash-attn 2 is the kernel that PyTorch's flash is made of.
BACKENDS = (
    Backend(
        name="flash-attn 3", flag="flash", majors=range(9, 10), best_on=range(9, 10), make=_flash_3,
        module="flash_attn_interface",
        package="flash-attn 3: pip install 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
    Backend(
        name="flash-attn 4", flag="flash", majors=range(9, 13), best_on=range(10, 12), module="flash_attn.cute",
        package="flash-attn 4: pip install --pre flash-attn-4", make=_flash_4,
    ),
    Backend(
        name="flash-attn 2", flag="flash", majors=range(8, 13), module="flash_attn_2_cuda",
        package="flash-attn 2: pip install --no-build-isolation flash-attn", make=_flash_2,
    ),
    Backend(
        name="sdpa cudnn", flag="sdpa", majors=range(9, 100), best_on=range(9, 100), make=_sdpa_by(SDPBackend.CUDNN_ATTENTION)
    ),
    Backend(
        name="sdpa flash", flag="sdpa", majors=range(8, 100), best_on=range(8, 100), make=_sdpa_by(SDPBackend.FLASH_ATTENTION)
    ),
    Backend(
        name="xformers", flag="xformers", majors=range(8, 100), dtypes=("bf16", "fp32"), module="xformers",
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


def choose(asked: str, capability: tuple[int, int], dtype: str) -> list[Backend]:
    """The backends for a GPU, best first: those of the flag asked for, or of all where that is "auto".

    Raises:
        WanFastError: there is none, with what is in the way and what to do.
    """
    major = capability[0]
    rows = [row for row in BACKENDS if (major in row.best_on if asked == "auto" else row.flag == asked)]
    able = [row for row in rows if dtype in row.dtypes]
    if not able:
        raise WanFastError(f"--attention {asked} computes in {rows[0].dtypes[0]}, --dtype is {dtype}; take --attention auto")
    fitting = [row for row in able if major in row.majors]
    if not fitting:
        lowest, highest = min(row.majors[0] for row in able), max(row.majors[-1] for row in able)
        raise WanFastError(
            f"--attention {asked} runs on compute capability {lowest}.0 to {highest}.x, this GPU has {major}.{capability[1]}; "
            "take --attention auto"
        )
    found = [row for row in fitting if installed(row.module)]
    if not found:
        raise WanFastError(f"--attention {asked} needs one of these packages, none is installed: {_packages(fitting)}")
    return found


def first_that_runs(
    rows: Sequence[Backend], device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[Backend, Attention, list[str]]:
    """The first backend that takes a packed projection of `heads` x `head_dim`, and why those before it do not.

    Raises:
        WanFastError: none does, with each one's reason.
    """
    failures = []
    x = torch.zeros(1, 16, 3, heads, head_dim, device=device, dtype=dtype)
    for row in rows:
        try:
            attention = row.make()
            attention(*x.unbind(2))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # another project's code: whatever it raises is the reason
            failures.append(f"{row.name} does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return row, attention, failures
    packages = _packages([row for row in rows if row.module != "torch"])
    advice = f"; mend it ({packages}), or take --attention auto" if packages else ""
    raise WanFastError("; ".join(failures) + advice)


def installed(module: str) -> bool:
    """Whether there is a module of that name; its package is not imported."""
    package, _, part = module.partition(".")
    spec = find_spec(package)
    if not part or spec is None:
        return spec is not None
    return any((Path(folder) / part).is_dir() for folder in spec.submodule_search_locations or ())


def _packages(rows: Sequence[Backend]) -> str:
    return "; ".join(row.package for row in rows)
