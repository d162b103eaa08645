"""Every case of the registry under pytest-benchmark; the timer is ours, and its samples are played back to the plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench import registry, report
from bench.cases import CASES
from bench.registry import Case
from wan_fast.roofs import PRODUCTS, measured


class Clock:
    """The plugin's timer: stands still, except when a sample that was taken before is played."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, samples: Iterator[float]) -> None:
        # the plugin makes one call more than it counts
        self.now += next(samples, 0.0)


CLOCK = Clock()


@pytest.fixture(scope="session")
def roofs() -> dict[str, dict[str, float]]:
    # no case uses a CPU's 8-bit products, and they take seconds
    products = {"cpu": ("fp32", "bf16"), **({"cuda": PRODUCTS} if torch.cuda.is_available() else {})}
    found = {device: measured(torch.device(device), kinds) for device, kinds in products.items()}
    return {device: {name: rate for name, rate in rates if isinstance(rate, float)} for device, rates in found.items()}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_case(case: Case, roofs: dict[str, dict[str, float]], benchmark) -> None:
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and there is none that the installed torch can use")
    try:
        row, samples = registry.run(case, torch.device(case.device), roofs[case.device])
    except (ImportError, registry.NotHere) as error:
        pytest.skip(str(error))
    benchmark.pedantic(CLOCK.play, (iter(samples),), rounds=len(samples))
    benchmark.extra_info.update(row)
    report.SEEN.append(row)
