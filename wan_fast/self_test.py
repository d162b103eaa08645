"""A start-up test of attention in 8 bits: kernels of another project, compiler or card have been wrong before.

Once per GPU, release and head width some hundred tokens with outlier channels go through a backend and through exact
attention. A pass is remembered in the user's cache, self-tests.json; a failure is not, so that what was mended is tested again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_fast.kernels import rope_table

# dB that a backend must reach. Emulated, int8 has 44 there and FP8 40; a wrong scale, tail or order of tokens has 27 at most.
SELF_TEST = 30.0


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
    if key in passed:
        return
    heads, grid = 2, (3, 7, 15)  # 315 tokens: no tile divides them
    qkv, weight, table = _outliers(heads, head_dim, grid, device, dtype)
    where: dict[str, Any] = {"grid": grid, "heads": heads, "eps": 1e-6}
    wanted = exact(qkv.to(torch.float32, copy=True), weight.float(), table, **where).double()
    error = (attention(qkv, weight, table, **where).double() - wanted).square().sum().item()
    reached = 10 * log10(wanted.square().sum().item() / error) if error else float("inf")
    if not reached >= SELF_TEST:  # NaN neither
        raise RuntimeError(
            f"its self-test gives {reached:.1f} dB, {SELF_TEST:.0f} or more are right: the kernel is broken here"
        )
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        part = memory.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**passed, key: round(reached, 1)}, indent=1), encoding="utf-8")
        part.replace(memory)
    except OSError:
        pass  # a folder that cannot be written to: it is tested again next time


def _outliers(
    heads: int, head_dim: int, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A projection [1, L, 3, D] whose keys have much in common, some channels 10 times the others; weights, and a table."""
    L, D = grid[0] * grid[1] * grid[2], heads * head_dim
    generator = torch.Generator().manual_seed(0)
    qkv, common = torch.randn(1, L, 3, D, generator=generator), torch.randn(3, D, generator=generator)
    qkv += common * torch.tensor([0.0, 4.0, 1.0])[:, None]
    qkv[..., ::32] *= 10
    weight = torch.rand(2, D, generator=generator) + 0.5
    return qkv.to(device, dtype), weight.to(device, dtype), rope_table(max(grid), head_dim, device)


def _identity(name: str, module: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What a self-test holds for: the card, the versions, the build."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    spec = find_spec("wan_fast.kernels.attention_8bit" if module == "triton" else module)
    built = Path(spec.origin).stat().st_mtime_ns if spec and spec.origin else 0
    versions = [torch.__version__, version("triton"), str(built)]
    return " | ".join([name, card, str(dtype).removeprefix("torch."), f"K{head_dim}", *versions])


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-fast" / "self-tests.json"


def _remembered(memory: Path) -> dict[str, float]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
