"""The one timer: every arm in turn, A B ... B A, each call from a cold cache, in seconds.

A round takes the arms in order and then in reverse, and an arm's time in it is the mean of its two calls: a machine
that drifts then drifts for all arms alike, and a ratio is taken within a round. Device work is timed by CUDA events;
what takes less than a launch costs is captured once and replayed as a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from meter import Meter
from torch import Tensor

Call = Callable[[], object]
# below this a launch from Python may take longer than the work: the arms of such a case are replayed as graphs
SHORT = 1e-3
ROUNDS = (3, 50)


@dataclass(frozen=True, slots=True)
class Timing:
    """`seconds`: one value per round. `peak_bytes`: the most that a call adds to what was allocated before it; None for
    a graph, whose memory was taken when it was captured."""

    seconds: tuple[float, ...]
    peak_bytes: int | None
    graphed: bool = False

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(arms: Mapping[str, Call], device: torch.device, *, budget: float, least: int = ROUNDS[0]) -> dict[str, Timing]:
    """Time every arm.

    Args:
        arms: name -> what to call.
        device: where it runs.
        budget: seconds to spend on timed calls, about.
        least: rounds to take although they exceed the budget, if not by more than twice it; else one.
    """
    peaks, estimate = {}, {}
    for name, call in arms.items():
        # the first call, which may compile, is not timed
        first = once(call, device)
        peaks[name] = None if is_graph(call) else first.peak_bytes
        estimate[name] = _sample(call, device, None)()
    calls = dict(arms)
    if device.type == "cuda" and min(estimate.values()) < SHORT:
        # all or none: one arm's launches must not be held against another's replay
        calls = {name: call if is_graph(call) else _graph(call) for name, call in arms.items()}
        estimate = {name: _sample(call, device, None)() for name, call in calls.items()}
    flush = _cache_flush(device)
    a_round = 2 * sum(estimate.values())
    rounds = min(max(int(budget / a_round), least if least * a_round <= 2 * budget else 1), ROUNDS[1])
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        # on a GPU all calls of a round are queued before the first is waited for
        waiting = [(name, _sample(calls[name], device, flush)) for name in (*arms, *reversed(list(arms)))]
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for name, wait in waiting:
            taken[name].append(wait())
        for name, pair in taken.items():
            seconds[name].append(sum(pair) / 2)
    return {name: Timing(tuple(seconds[name]), peaks[name], is_graph(calls[name])) for name in arms}


def once(call: Call, device: torch.device) -> Timing:
    """One call, timed and with its peak; no warm-up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = _sample(call, device, None)()
        return Timing((seconds,), torch.cuda.max_memory_allocated(device) - before)
    with Meter() as meter:
        seconds = _sample(call, device, None)()
    return Timing((seconds,), meter.peak)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def graph(call: Call) -> Call:
    """The call captured as a CUDA graph: everything it launches is then one launch.

    Raises:
        RuntimeError: it waits for the device, or allocates in a way that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = call()

    return _Replay(captured, output)


class _Replay:
    """Replays a captured call, and gives the tensors it writes to."""

    def __init__(self, captured: torch.cuda.CUDAGraph, output: object) -> None:
        self.captured, self.output = captured, output

    def __call__(self) -> object:
        self.captured.replay()
        return self.output


def is_graph(call: Call) -> bool:
    return isinstance(call, _Replay)


def _graph(call: Call) -> Call:
    """`graph(call)`, or the call itself where it cannot be captured; `Timing.graphed` says which."""
    try:
        return graph(call)
    except RuntimeError:
        torch.cuda.synchronize()
        return call


def _sample(call: Call, device: torch.device, flush: Tensor | None) -> Callable[[], float]:
    """Make one timed call; the returned function waits for it and gives its seconds."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        return lambda: taken
    if flush is not None:
        flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return wait


def _cache_flush(device: torch.device) -> Tensor | None:
    """A buffer four times the L2 cache: writing it leaves nothing of an arm's data there."""
    if device.type != "cuda":
        return None
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)
