"""Work of minutes, in processes beside the tests: it starts once they are collected, and the tests that need it run last.

A test names it by a mark, `@pytest.mark.background("sm_90")`, and reads `background.output("sm_90")`, a fixture of conftest.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import wan_fast

HERE = Path(__file__).parent
CAPABILITIES = [80, 86, 89, 90, 100, 120]


class Task(NamedTuple):
    """A command of Python, and what it sees beside this process's environment; None removes a variable."""

    arguments: list[str]
    environment: dict[str, str | None]


def _compile(capability: int) -> Task:
    # a kernel made by an interpreting process does not compile
    return Task([str(HERE / "compile_kernels.py"), str(capability)], {"TRITON_INTERPRET": None})


_INTERPRETER = Task(
    ["-m", "pytest", "-q", str(HERE / "test_kernels.py"), "-k", "as_accurate_as_the_reference"],
    {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
)
# in the order in which they start: the tests of architectures ask for the last one first
TASKS = {"interpreter": _INTERPRETER, **{f"sm_{capability}": _compile(capability) for capability in reversed(CAPABILITIES)}}


class Background:
    """Runs tasks on every core but one, which is for the tests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))
        self._futures: dict[str, Future[str]] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, names: Iterable[str]) -> None:
        wanted = set(names)
        if wanted:
            # threads that wait for a core which a task has make PyTorch ten times slower
            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
        self._futures = {name: self._pool.submit(self._run, task) for name, task in TASKS.items() if name in wanted}

    def output(self, name: str) -> str:
        """What the task has printed. One that still waits for a core runs now, on that of the tests."""
        future = self._futures[name]
        if future.cancel():
            self._futures[name] = future = Future()
            future.set_result(self._run(TASKS[name]))
        return future.result()

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _run(self, task: Task) -> str:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {
                "TRITON_CACHE_DIR": cache,
                # threads of BLAS make the interpreter several times slower
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                # the same package as in this process, whatever the working directory
                "PYTHONPATH": os.pathsep.join([str(HERE), str(Path(wan_fast.__file__).parents[1])]),
                **task.environment,
            }
            process = subprocess.Popen(
                [sys.executable, *task.arguments],
                cwd=HERE,
                env={name: value for name, value in environment.items() if value is not None},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._processes.append(process)
            try:
                output, errors = process.communicate(timeout=900)
            finally:
                process.kill()
        assert process.returncode == 0, output[-4000:] + errors[-4000:]
        return output
