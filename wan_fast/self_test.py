"""A start-up test of attention in 8 bits: kernels of another project, compiler or card have been wrong before.

Once per GPU, release and head width some hundred tokens with outlier channels go through a backend and through exact
attention. A pass is remembered in the user's cache, self-tests.json; a failure is not, so that what was mended is tested again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from wan_fast import kernels
from wan_fast.kernels import rope_table
from wan_fast.user_cache import user_cache

# dB that the whole result and each of its rows must reach. Emulated, int8 has 43 and 26 there, FP8 38 and 18; without the last
# key, with keys beyond it, or with tokens in another order 22 and 9 at most. A scale wrong by a tenth may pass.
WHOLE, ROW = 30.0, 10.0


def self_test(
    name: str,
    module: str,
    attention: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> None:
    """Hold a backend in 8 bits against exact attention, unless it has passed here before.

    Args:
        name: of the backend.
        module: that it comes from; another build is another backend.
        attention, exact: of a packed projection, as in attention.py.
        device, dtype, head_dim: what it will be used for.

    Raises:
        RuntimeError: it is further from it than 8 bits explain.
    """
    memory, key = _memory(), _identity(name, module, device, dtype, head_dim)
    passed = _remembered(memory)
    heads, grid = 2, (3, 7, 15)  # 315 tokens: no tile divides them
    qkv, weight, table = _outliers(heads, head_dim, grid, device, dtype)
    where: dict[str, Any] = {"grid": grid, "heads": heads, "eps": 1e-6}
    if key in passed:  # it must start all the same
        attention(qkv, weight, table, **where)
        return
    wanted = exact(qkv.to(torch.float32, copy=True), weight.float(), table, **where).double()
    error = (attention(qkv, weight, table, **where).double() - wanted).square()
    reached = _ratio(wanted.square().sum(), error.sum())
    lowest = _ratio(wanted.square().sum(-1), error.sum(-1)).min()
    if not (reached >= WHOLE and lowest >= ROW):  # NaN neither
        raise RuntimeError(
            f"its self-test gives {reached:.1f} dB, {WHOLE:.0f} or more are right, and {lowest:.1f} in the worst row, "
            f"{ROW:.0f} are: the kernel is broken here"
        )
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        part = memory.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**passed, key: round(reached.item(), 1)}, indent=1), encoding="utf-8")
        part.replace(memory)
    except OSError:
        pass  # a folder that cannot be written to: it is tested again next time


def _ratio(signal: Tensor, noise: Tensor) -> Tensor:
    """dB; at most 200."""
    return 10 * (signal / noise.clamp_min(1e-20 * signal)).log10()


def _outliers(
    heads: int, head_dim: int, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A projection [1, L, 3, D] whose keys have much in common, some channels 10 times the others, the last value 20
    times; weights, and a table."""
    L, D = grid[0] * grid[1] * grid[2], heads * head_dim
    generator = torch.Generator().manual_seed(0)
    qkv, common = torch.randn(1, L, 3, D, generator=generator), torch.randn(3, D, generator=generator)
    qkv += common * torch.tensor([0.0, 4.0, 1.0])[:, None]
    qkv[..., ::32] *= 10
    qkv[:, -1, 2] *= 20
    weight = torch.rand(2, D, generator=generator) + 0.5
    return qkv.to(device, dtype), weight.to(device, dtype), rope_table(max(grid), head_dim, device)


def _identity(name: str, module: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What a self-test holds for: the card, the versions, the build."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if module == "triton":  # of ours any kernel may have changed
        built = max(file.stat().st_mtime_ns for file in Path(kernels.__file__).parent.glob("*.py"))
    else:
        spec = find_spec(module)
        built = Path(spec.origin).stat().st_mtime_ns if spec and spec.origin else 0
    versions = [torch.__version__, triton.__version__, str(built)]
    return " | ".join([name, card, str(dtype).removeprefix("torch."), f"K{head_dim}", *versions])


def _memory() -> Path:
    return user_cache() / "self-tests.json"


def _remembered(memory: Path) -> dict[str, float]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
