"""Tile sweeps: every candidate of a kernel on its real shapes, checked for accuracy, then timed in one run.

    python -m bench.tune [OP ...]

A kernel takes part by its module's `_config(...)`, the tiles in use, and `_CANDIDATES`, those to try. The winner is a
row for `_config`, written there by hand with the measurement in a comment: nothing is tuned at run time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from kernel_cases import REAL_CASES, RealCase, arguments, in_fp64, run
from numerics import assert_as_accurate
from torch import Tensor

from bench.results import line
from bench.timer import measure
from wan_fast.kernels import KERNELS

Tiles = dict[str, int]
# in fp64 the reference of attention takes about a second for these
MANY_SCORES = 4e9


def scores(op: str, args: Sequence[Any]) -> float:
    """Of queries and keys, in attention; elsewhere 0."""
    return float(args[1].numel() * args[2].shape[1]) if op == "attention_8bit" else 0.0


def held_to(op: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Callable[[list[Tensor]], list[Tensor]]]:
    """What a reference is given, and what of a result it is held to: of attention with many scores the first and last head."""
    if scores(op, args) <= MANY_SCORES:
        return args, lambda results: results
    q, q_scale, k, k_scale, v, v_scale, v_center, *settings = args
    ends = [0, q.shape[2] - 1]

    def cut(t: Tensor | None, dim: int = 1) -> Tensor | None:
        return None if t is None or not t.numel() else t.index_select(dim, torch.tensor(ends, device=t.device))

    narrow = cut(v, 2 if v_scale is None else 1), cut(v_scale), cut(v_center)
    few = (cut(q, 2), cut(q_scale), cut(k, 2), cut(k_scale), *narrow, *settings)

    def of_ends(results: list[Tensor]) -> list[Tensor]:
        out, lse = results
        return [out[:, :, ends], lse[:, ends] if lse.numel() else lse]

    return few, of_ends


def tunable() -> list[str]:
    """The operators whose module has candidates."""
    return [name for name in sorted(KERNELS) if hasattr(_module(name), "_CANDIDATES")]


def sweep(case: RealCase, dtype: torch.dtype, device: torch.device, *, budget: float = 2.0) -> dict[str, Any]:
    """Time every candidate on one shape.

    Returns:
        "current", "best": tiles and seconds. "seconds": of every candidate. "refused": why a candidate cannot be used.

    Raises:
        AssertionError: the tiles in use are refused themselves.
    """
    kernel, module = KERNELS[case.op], _module(case.op)
    args = arguments(case, dtype, device)
    given, of = held_to(case.op, args)
    expected, exact = run(kernel, kernel.reference, given), run(kernel, kernel.reference, in_fp64(given))
    seen: list[Tiles] = []
    with _recorded(module, seen):
        kernel.launch(*args)
    current = seen[0]
    calls, refused = {}, {}
    for tiles in (current, *(tiles for tiles in module._CANDIDATES if tiles != current)):
        call = _with_tiles(module, kernel.launch, tiles)
        try:
            for result in zip(of(run(kernel, call, args)), exact, expected, strict=True):
                assert_as_accurate(*result)
            calls[_name(tiles)] = partial(call, *args)
        except Exception as error:  # too much shared memory, or a compiler's refusal: Triton has no common type for them
            refused[_name(tiles)] = f"{type(error).__name__}: {line(error)}"
    if _name(current) in refused:
        raise AssertionError(f"the tiles in use, {_name(current)}, are refused: {refused[_name(current)]}")
    seconds = {name: timing.median for name, timing in measure(calls, device, budget=budget).items()}
    best = min(seconds, key=lambda name: seconds[name])
    return {
        "current": {"tiles": _name(current), "seconds": seconds[_name(current)]},
        "best": {"tiles": best, "seconds": seconds[best]},
        "seconds": seconds,
        "refused": refused,
    }


def _with_tiles(module: Any, launch: Any, tiles: Tiles) -> Any:
    def call(*args: Any) -> Any:
        with replaced(module, _config=lambda *_: tiles, cuda_extension=lambda _: None):
            return launch(*args)

    return call


@contextmanager
def _recorded(module: Any, seen: list[Tiles]) -> Iterator[None]:
    """Note the tiles that `_config` gives."""
    config = module._config

    def note(*args: Any) -> Tiles:
        seen.append(config(*args))
        return seen[-1]

    with replaced(module, _config=note, cuda_extension=lambda _: None):
        yield


@contextmanager
def without_extension(op: str) -> Iterator[None]:
    """The operator's Triton kernel, also where its CUDA C++ one could run."""
    with replaced(_module(op), cuda_extension=lambda _: None):
        yield


@contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Other values for names of a module, as far as it has them."""
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, names[name])
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _module(op: str) -> Any:
    return sys.modules[KERNELS[op].launch.__module__]


def _name(tiles: Tiles) -> str:
    return " ".join(f"{key}={value}" for key, value in tiles.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Time every tile candidate of the kernels.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {' '.join(tunable())}")
    ops = parser.parse_args().ops or tunable()
    if unknown := sorted(set(ops) - set(tunable())):
        parser.error(f"no tunable operator is called {unknown[0]!r}; there are: {' '.join(tunable())}")
    if not torch.cuda.is_available():
        parser.error("tile sweeps need a GPU, and there is none that the installed torch can use")
    for case in REAL_CASES:
        for dtype in reversed(case.dtypes) if case.op in ops else ():
            found = sweep(case, dtype, torch.device("cuda"))
            print(f"{case.op} {case.id} {dtype}")
            for tiles, seconds in sorted(found["seconds"].items(), key=lambda item: item[1]):
                print(f"  {1e6 * seconds:10.1f} us  {tiles}{'  <- in use' if tiles == found['current']['tiles'] else ''}")
            for tiles, why in found["refused"].items():
                print(f"  {'refused':>13s}  {tiles}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
