"""What a case is, and how one is run: its arms are built, held against each other, and timed together."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from statistics import median
from typing import Any

import torch

from bench.results import line
from bench.timer import Timing, measure, once

OURS = "wan-fast"
Build = Callable[[], Callable[[], Any]]
Rate = str | Mapping[str, float]


class NotHere(Exception):
    """A rival cannot take part; the message says why."""


@dataclass(slots=True)
class Work:
    """One piece of work, done by several arms on the same weights and inputs.

    arms: name -> a function that builds the arm and returns what is timed; the first is ours. It may raise ImportError or
        NotHere, and the arm is a skipped one then.
    flops, bytes: the least that any way of doing the work needs: operations, and bytes in and out.
    rate: the matrix product (one of roofs.PRODUCTS) in whose unit the operations run; `rates`: of arms where it is another, or
        the shares of the operations by product.
    tolerance: relative L2 difference from our output that an arm may show; None where outputs are not comparable.
    stages: arm -> stage -> seconds of its latest call, where an arm fills it.
    errors: arm -> measure of its error -> value, where an arm fills it.
    findings: arm -> what else was found of it -> value, where an arm fills it.
    """

    arms: Mapping[str, Build]
    rate: str
    tolerance: float | None
    flops: float = 0.0
    bytes: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: Mapping[str, Rate] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    findings: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the registry.

    name: group/what/shape/dtype. device: "cpu" or "cuda". make: builds the work on a device.
    seconds: how long to time it, about; 0 takes one call of each arm. headline: it stands in the README.
    """

    name: str
    device: str
    make: Callable[[torch.device], Work]
    seconds: float = 5.0
    headline: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def run(case: Case, device: torch.device, roofs: Mapping[str, float]) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Build, compare and time a case.

    Args:
        case: what to run.
        device: where.
        roofs: "copy" in bytes per second, and products by name in operations per second.

    Returns:
        The row as it is kept, plain numbers and strings; and our seconds of every round.

    Raises:
        NotHere, ImportError: ours cannot run for want of a package.
    """
    torch.manual_seed(0)
    with torch.inference_mode():
        work = case.make(device)
        arms, skipped = _build(work)
        if OURS in skipped:
            raise NotHere(skipped[OURS])
        if case.seconds:
            timings = measure(arms, device, budget=case.seconds)
        else:
            timings = {name: once(call, device) for name, call in arms.items()}
    row: dict[str, Any] = {"case": case.name, "flops": work.flops, "bytes": work.bytes, "rate": work.rate, "skipped": skipped}
    row["arms"] = {name: _arm(timing, work, work.rates.get(name, work.rate), roofs) for name, timing in timings.items()}
    for name, arm in row["arms"].items():
        if name != OURS:
            arm["ratio"] = ratio(timings[name].seconds, timings[OURS].seconds)
        if name in work.stages:
            arm["stages"] = work.stages[name]
        if name in work.errors:
            arm["errors"] = work.errors[name]
        if name in work.findings:
            arm["findings"] = work.findings[name]
    del work, arms
    torch._dynamo.reset()  # what one case compiled must not make the next one's shapes dynamic
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row, timings[OURS].seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster ours is, by round: median, lowest and highest."""
    values = [b / a for b, a in zip(theirs, ours, strict=True)]
    return {"median": median(values), "low": min(values), "high": max(values)}


def select(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases that a name or a pattern such as dit/* names; all without one.

    Raises:
        ValueError: a pattern names no case.
    """
    cases = list(cases)
    if not patterns:
        return cases
    names = [case.name for case in cases]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            close = get_close_matches(pattern, names, 3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"no case is called {pattern!r}; {hint}the cases are:\n  " + "\n  ".join(names))
    return [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]


def _build(work: Work) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The arms that can take part, each called once and compared with ours, of several results the first; and why the others
    cannot."""
    arms: dict[str, Callable[[], Any]] = {}
    skipped: dict[str, str] = {}
    expected = None
    for name, build in work.arms.items():
        try:
            call = build()
            output = call() if work.tolerance is not None else None
        except (ImportError, NotHere) as error:
            skipped[name] = line(error)
            continue
        except Exception as error:
            # a rival that this device or this version of it cannot run, each with errors of its own; ours must
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {line(error)}"
            continue
        if output is not None:
            output = (output[0] if isinstance(output, (tuple, list)) else output).float()
            if expected is None:
                expected = output
            difference = ((output - expected).norm() / expected.norm()).item()
            # written so that a NaN fails
            if not difference <= work.tolerance:
                if name == OURS:
                    raise AssertionError(f"{OURS} gives values that are not finite")
                skipped[name] = f"does other work than {OURS}: relative difference {difference:.1e}"
                continue
        arms[name] = call
    return arms, skipped


def _arm(timing: Timing, work: Work, rate: Rate, roofs: Mapping[str, float]) -> dict[str, Any]:
    taken = {
        "seconds": timing.median,
        "low": min(timing.seconds),
        "high": max(timing.seconds),
        "rounds": len(timing.seconds),
        "peak_bytes": timing.peak_bytes,
        "graphed": timing.graphed,
    }
    if (least := roof_seconds(work.flops, work.bytes, rate, roofs)) is not None:
        taken["of_roof"] = least / timing.median
    return taken


def roof_seconds(flops: float, count: float, rate: Rate, roofs: Mapping[str, float]) -> float | None:
    """No faster than this on this device; None where the work has no count, or its roof was not measured."""
    shares = {rate: 1.0} if isinstance(rate, str) else rate
    if not (flops or count) or "copy" not in roofs or (flops and not roofs.keys() >= shares.keys()):
        return None
    computing = sum(share * flops / roofs[product] for product, share in shares.items()) if flops else 0.0
    return max(computing, count / roofs["copy"])
