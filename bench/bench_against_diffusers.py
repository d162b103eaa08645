"""Every CPU case of the registry, this engine and diffusers in turn in one process; the ratio is printed at the end."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from cases import CPU_CASES, Case
from report import ROWS

ROUNDS = 5


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def bench_against_diffusers(case: Case, benchmark) -> None:
    pytest.importorskip("diffusers")
    ours, theirs = case.make()
    rival: list[float] = []

    def time_rival() -> None:
        start = time.perf_counter()
        theirs()
        rival.append(time.perf_counter() - start)

    with torch.inference_mode():
        a, b = ours(), theirs()
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error <= case.tolerance, f"the two sides do not do the same work: relative error {error:.1e}"
        # the rival runs before every round of ours, so that a change of the machine's speed meets both
        benchmark.pedantic(ours, setup=time_rival, rounds=ROUNDS)
    mine = benchmark.stats.stats.data
    ratios = [b / a for a, b in zip(mine, rival, strict=True)]
    row = {
        "case": case.name,
        "ours_ms": 1e3 * statistics.median(mine),
        "diffusers_ms": 1e3 * statistics.median(rival),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "threads": torch.get_num_threads(),
    }
    benchmark.extra_info.update(row)
    ROWS.append(row)
