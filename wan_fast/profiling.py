"""Where the time of a run goes: by stage and by class of kernel, against the measured roofs, with a trace to look into.

Times come from torch.profiler: kernels on a GPU, operators on a CPU; the work comes from `counting`. A class's "% of
roof" is the time its operations and bytes would take at the device's best rates, over the time it took; a stage's counts
its idle time as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wan_fast import roofs
from wan_fast.counting import Work, count_work, kind_of
from wan_fast.engine import Engine
from wan_fast.planning import Plan
from wan_fast.video import whole

R = TypeVar("R")
STAGES = ("prepare", "denoise", "decode")
# calls in which the host waits for a GPU; on a CPU, where nothing is waited for, those that would be such
_SYNCS = {
    True: ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    False: ("aten::_local_scalar_dense",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds, calls and, where the work is known, the share of the roof of one class in one stage."""

    kind: str
    seconds: float
    calls: int
    of_roof: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: wall seconds, seconds in which the device did nothing, waits of the host for it, and its classes."""

    name: str
    seconds: float
    idle: float
    syncs: int
    of_roof: float | None
    rows: tuple[Row, ...]


class Profile(Generic[R]):
    """A profiled call: `result`, `stages`, and the trace."""

    def __init__(self, engine: Engine, todo: Plan, call: Callable[[], R]) -> None:
        self._on_gpu = engine.device.type == "cuda"
        in_bf16 = self._on_gpu and engine.dtype == torch.bfloat16
        # a CPU's bf16 is for memory's sake: few have faster products in it
        # convolutions are the VAE's: in tf32 where it is fp32 beside a bf16 DiT; fp16 products are as fast as bf16's
        vae = "bf16" if self._on_gpu and todo.vae_dtype != "fp32" else "tf32" if in_bf16 else "fp32"
        self._used = {"": "bf16" if in_bf16 else "fp32", "convolution": vae}
        self.roofs = dict(roofs.measured(engine.device, dict.fromkeys(self._used.values())))
        # before the call: what fails behind it must not cost its result
        self._work = count_work(engine, todo)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        with profile(activities=activities) as self._profiler:
            self.result = call()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        # without a rate nothing is held against it
        known = {name: rate for name, rate in self.roofs.items() if isinstance(rate, float)}
        rates = {kind: known.get(roof, inf) for kind, roof in {**self._used, "copy": "copy"}.items()}
        return tuple(_stages(self._profiler.events() or [], self._work, rates, on_gpu=self._on_gpu))

    def table(self) -> Iterator[str]:
        """The findings as lines of text."""
        yield f"profile     roofs of this machine, measured: {', '.join(_roof(*item) for item in self.roofs.items())}"
        yield f"            {'stage':8s} {'class':16s} {'seconds':>9s} {'share':>6s} {'roof':>6s} {'calls':>8s}"
        for stage in self.stages:
            whole_stage = f"{stage.name:8s} {'all':16s} {stage.seconds:9.3f} {'100 %':>6s} {_percent(stage.of_roof):>6s}"
            idle = f"idle {_percent(stage.idle / stage.seconds)}, host waited for the device {stage.syncs}x"
            yield f"            {whole_stage}   {idle}"
            for row in stage.rows:
                share, roof = _percent(row.seconds / stage.seconds), _percent(row.of_roof)
                yield f"            {'':8s} {row.kind:16s} {row.seconds:9.3f} {share:>6s} {roof:>6s} {row.calls:8d}"

    def write_trace(self, path: Path) -> None:
        """Write the trace as JSON that chrome://tracing and ui.perfetto.dev open."""
        with whole(path) as scratch:
            self._profiler.export_chrome_trace(str(scratch))


def _roof(name: str, rate: float | str) -> str:
    if isinstance(rate, str):
        return f"{name} not measured ({rate})"
    return f"{name} {rate / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.0f} %"


def _stages(
    events: Iterable[Any], work: Mapping[tuple[str, str], Work], rates: Mapping[str, float], *, on_gpu: bool
) -> Iterator[Stage]:
    events = list(events)
    for name in STAGES:
        marks = [e for e in events if e.name == name and e.device_type == DeviceType.CPU]
        if not marks:
            continue
        begin, end = marks[0].time_range.start, marks[0].time_range.end
        inside = [e for e in events if begin <= e.time_range.start < end and e.name not in STAGES]
        seconds: defaultdict[str, float] = defaultdict(float)
        calls = Counter[str]()
        for _, kind, taken in busy(inside, on_gpu):
            seconds[kind] += taken / 1e6
            calls[kind] += 1
        occupied = _covered(event.time_range for event, _, _ in busy(inside, on_gpu)) / 1e6
        wall = (end - begin) / 1e6
        rows = [
            Row(kind, spent, calls[kind], _of_roof(work.get((name, kind)), kind, rates, spent))
            for kind, spent in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        least = [_least(done, kind, rates) for (stage, kind), done in work.items() if stage == name]
        # a stage on a GPU ends with a wait of its own
        syncs = max(0, sum(e.name in _SYNCS[on_gpu] for e in inside) - on_gpu)
        yield Stage(name, wall, max(0.0, wall - occupied), syncs, sum(least) / wall if any(least) else None, tuple(rows))


def busy(events: Iterable[Any], on_gpu: bool) -> Iterator[tuple[Any, str, float]]:
    """The events that occupy the device, with their class and own microseconds: kernels on a GPU, operators on a CPU.

    What the reference of an operator of ours is made of counts as that operator.
    """
    for event in events:
        if on_gpu and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event, kind_of(event.name), event.time_range.elapsed_us()
        elif not on_gpu and event.device_type == DeviceType.CPU:
            owner = event
            while owner.cpu_parent is not None and not owner.name.startswith("wan_fast::"):
                owner = owner.cpu_parent
            yield event, kind_of((owner if owner.name.startswith("wan_fast::") else event).name), event.self_cpu_time_total


def _covered(ranges: Iterable[Any]) -> float:
    """Microseconds that at least one of the ranges covers."""
    total, reached = 0.0, float("-inf")
    for item in sorted(ranges, key=lambda r: r.start):
        total += max(0.0, item.end - max(item.start, reached))
        reached = max(reached, item.end)
    return total


def _least(work: Work, kind: str, rates: Mapping[str, float]) -> float:
    return max(work.flops / rates.get(kind, rates[""]), work.bytes / rates["copy"])


def _of_roof(work: Work | None, kind: str, rates: Mapping[str, float], spent: float) -> float | None:
    return (_least(work, kind, rates) / spent or None) if work and spent else None
