"""CUDA graphs: what a piece of work issues, captured once per kind and replayed from then on.

A replay runs the same kernels on the same addresses, so its results are those of the work itself, bit for bit, if the work
reads nothing of the host and keeps all its state where it is: the caller's promise, which `sampler` and `vae` keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from wan_fast.config import WanFastError

# (work) -> (replays it, what the work returned: tensors that every replay fills again)
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class Graphs:
    """Runs work by kind: the first time as it is, which warms it up; the second time it is captured; from then on replayed.

    Args:
        capture: records work without running it.
        optional: what cannot be captured is done as it is from then on, and that is said.
        roomy: there is memory for graphs beside that of work of another kind; else they are captured anew after each first run.
    """

    def __init__(self, capture: Capture, *, optional: bool = False, roomy: bool = True) -> None:
        self.capture, self.optional, self.roomy = capture, optional, roomy
        self.refused = ""
        self.met: set[Hashable] = set()
        self.captured: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def __call__(self, kind: Hashable, work: Callable[[], Any]) -> Any:
        """What the work returns; of a replay the tensors that it returned when it was captured, filled again.

        Raises:
            WanFastError: it cannot be captured.
        """
        if self.refused:
            return work()
        if kind not in self.met:
            self.met.add(kind)
            if not self.roomy:
                self.captured.clear()
            return work()
        if kind not in self.captured:
            try:
                self.captured[kind] = self.capture(work)
            except WanFastError as error:
                if not self.optional:
                    raise
                self.refused = str(error)
                logging.getLogger(__name__).warning("%s; what follows is launched kernel by kernel", error)
                return work()
        replay, result = self.captured[kind]
        replay()
        return result


class CudaCapture:
    """Captures with the CUDA runtime; the graphs, no two of which run at once, share one pool of memory.

    Args:
        device: where the work runs.
        roomy: the memory that the work took is not given back to the device first, so that nothing waits for it.
    """

    def __init__(self, device: torch.device, roomy: bool) -> None:
        self.device, self.roomy = device, roomy
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = _stream(device)

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if not self.roomy:
            torch.cuda.empty_cache()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                # other threads, a video's writer say, may go on calling CUDA
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise WanFastError(f"CUDA graphs cannot be captured here ({reason[:200]}); add --no-cuda-graphs") from error
        current.wait_stream(self.stream)
        return graph.replay, result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To capture on; one for all, as libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)
