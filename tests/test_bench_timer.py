"""The timer's CUDA path, against a device that only keeps a diary."""

from types import SimpleNamespace

import pytest
import torch

from bench import timer
from bench.timer import measure, once

CUDA = torch.device("cuda")


class Diary(list):
    """What the device was asked to do, in order; `clock` moves by what calls take."""

    clock = 0.0
    allocated = 1000
    peak = 1000

    def work(self, name, seconds, grows=0):
        def call():
            self.append(name)
            self.clock += seconds
            self.peak = max(self.peak, self.allocated + grows)

        return call


@pytest.fixture
def diary(monkeypatch):
    diary = Diary()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = diary.clock

        def synchronize(self):
            diary.append("wait")

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        def replay(self):
            diary.append("replay")
            diary.clock += self.seconds

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            diary.append("capture")
            self.begin = diary.clock

        def __exit__(self, *error):
            self.graph.seconds = diary.clock - self.begin
            diary.clock = self.begin

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda _: setattr(diary, "peak", diary.allocated),
        "memory_allocated": lambda _: diary.allocated,
        "max_memory_allocated": lambda _: diary.peak,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timer, "_cache_flush", lambda device: SimpleNamespace(zero_=lambda: diary.append("flush")))
    return diary


def test_long_work_is_timed_from_a_cold_cache_and_waited_for_by_round(diary):
    arms = {"a": diary.work("a", 0.010, grows=500), "b": diary.work("b", 0.030)}
    timings = measure(arms, CUDA, budget=0.16, least=2)
    a_round = ["flush", "a", "flush", "b", "flush", "b", "flush", "a"] + ["wait"] * 4
    assert diary[-24:] == a_round * 2
    assert timings["a"].seconds == pytest.approx((0.010, 0.010)) and timings["b"].median == pytest.approx(0.030)
    assert timings["a"].peak_bytes == 500 and timings["b"].peak_bytes == 0
    assert not timings["a"].graphed


def test_where_one_arm_is_short_all_are_replayed(diary):
    arms = {"short": diary.work("short", 1e-5, grows=30), "many launches": diary.work("many launches", 2e-3)}
    timings = measure(arms, CUDA, budget=1.0)
    assert timings["short"].graphed and timings["many launches"].graphed and diary.count("capture") == 2
    assert timings["short"].median == pytest.approx(1e-5) and "many launches" not in diary[-100:]
    # what it adds is what the call itself adds
    assert timings["short"].peak_bytes == 30


def test_a_graph_that_an_arm_brings_has_no_peak_of_its_own(diary):
    timings = measure({"a": diary.work("a", 0.1, grows=5), "a, graphed": timer.graph(diary.work("b", 0.1))}, CUDA, budget=1.0)
    assert timings["a, graphed"].graphed and timings["a, graphed"].peak_bytes is None
    assert not timings["a"].graphed and timings["a"].peak_bytes == 5


def test_what_cannot_be_captured_is_called(diary, monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timer, "graph", refuse)
    timings = measure({"short": diary.work("short", 1e-5)}, CUDA, budget=0.1)
    assert not timings["short"].graphed and timings["short"].median == pytest.approx(1e-5)


def test_the_budget_decides_the_rounds(diary):
    assert len(measure({"a": diary.work("a", 0.125)}, CUDA, budget=2.0)["a"].seconds) == 8
    assert len(measure({"a": diary.work("a", 0.125)}, CUDA, budget=0.6)["a"].seconds) == 3
    assert len(measure({"a": diary.work("a", 4.0)}, CUDA, budget=10.0)["a"].seconds) == 1
    assert len(measure({"a": diary.work("a", 0.1)}, CUDA, budget=1e9)["a"].seconds) == timer.ROUNDS[1]


def test_a_single_call(diary):
    timing = once(diary.work("run", 80.0, grows=7), CUDA)
    assert timing.seconds == (80.0,) and timing.peak_bytes == 7 and diary.count("run") == 1
