"""CUDA graphs: what a piece of work issues, captured once per kind and replayed from then on.

A replay runs the same kernels on the same addresses, so its results are those of the work itself, bit for bit, if the work
reads nothing of the host and keeps all its state where it is: the caller's promise, which `sampler` and `vae` keep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

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
            if not self.roomy:
                self.captured.clear()
            result = work()
            self.met.add(kind)  # not before: what was broken off has warmed up nothing
            return result
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
    """Captures with the CUDA runtime; the graphs, no two of which run at once, share one pool of memory, and one stream to be
    captured on.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None
        self.alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, work: Callable[[], Any], *, roomy: bool) -> tuple[Callable[[], None], Any]:
        """`roomy`: the memory that the work took is not given back to the device first, so that nothing waits for it."""
        dead = self.pool is not None and not self.alive
        if dead or not roomy:
            torch.cuda.empty_cache()
        if self.pool is None or dead:  # a pool that has no graph left is not taken up again
            self.pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            # cuBLAS's workspace would lie in the pool, and outlive it
            with _without_workspaces(), torch.cuda.stream(self.stream):
                # other threads, a video's writer say, may go on calling CUDA
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # the end of a capture that has failed fails as well
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            reason = next(iter(str(first).strip().splitlines()), type(first).__name__)
            raise WanFastError(f"CUDA graphs cannot be captured here ({reason[:200]}); add --no-cuda-graphs") from error
        current.wait_stream(self.stream)
        self.alive.add(graph)
        return graph.replay, result


@contextmanager
def _without_workspaces() -> Iterator[None]:
    """cuBLAS has none when this begins, and none that was made meanwhile when it ends."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
