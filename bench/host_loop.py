"""The host's own work per denoising step, in instructions: what it costs to plan a step and to drive the sampler.

    python -m bench.host_loop

Runs under callgrind, on tensors that do nothing, so the number is the same on every run: no noise trips it. The
difference between two lengths of the loop leaves out starting Python. In units of a fixed piece of Python that is counted
alongside, so that another interpreter moves both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import ROOT

LENGTHS = (40, 140)
KINDS = ("yardstick", "plan", "sampler")


class Nothing:
    """Stands in for the latents, and for what computes and changes them."""

    def __init__(self) -> None:
        self.latents = self

    def load(self, step: object) -> None:
        pass

    def velocities(self, step: object, latents: object) -> tuple[object, object]:
        return self, self

    def advance(self, conditional: object, unconditional: object) -> None:
        pass


def yardstick(count: int) -> None:
    """One unit per step: a thousand additions to a list's items."""
    for _ in range(count):
        items = [0] * 1000
        for i in range(1000):
            items[i] += i


def plan(count: int) -> None:
    from wan_fast.steps import official, step_plan
    from wan_fast.tasks import TASKS

    step_plan(TASKS["t2v-A14B"], official("unipc", count, 12.0), (3.0, 4.0))


def sampler(count: int) -> None:
    from wan_fast.sampler import denoise
    from wan_fast.steps import official, step_plan
    from wan_fast.tasks import TASKS

    # planned for one length, so that only the loop differs
    steps = step_plan(TASKS["ti2v-5B"], official("unipc", LENGTHS[-1], 5.0), (5.0, 5.0))[:count]
    nothing = Nothing()
    denoise(steps, nothing, nothing)  # type: ignore[arg-type]


def instructions() -> dict[str, tuple[int, int]]:
    """Instructions of both lengths of each kind, all counted in one process, as starting one takes most of the time.

    A call of getppid, which nothing else makes, ends a part: callgrind writes what it has collected since the last one.

    Raises:
        RuntimeError: callgrind is not installed, or the process failed.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise RuntimeError("valgrind is not installed; on Debian: apt install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={Path(folder, 'out')}", "--dump-before=getppid"]
        # hashes of strings decide how dictionaries are laid out; -S: nothing installed has a say
        environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
        command += [sys.executable, "-S", "-c", "from bench.host_loop import counted; counted()"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        except subprocess.TimeoutExpired:
            raise RuntimeError("callgrind did not end within 300 s; is the machine busy?") from None
        dumps = sorted(Path(folder).glob("out.*"), key=lambda file: int(file.suffix[1:]))
        found = [re.search(r"^totals: (\d+)", file.read_text(), re.M) for file in dumps]
    # what comes before the first call, then a part for each length
    counts = [int(total[1]) for total in found if total]
    if done.returncode or len(counts) != 1 + len(KINDS) * len(LENGTHS):
        raise RuntimeError(f"callgrind ended with {done.returncode}: {done.stderr[-1000:]}")
    return {kind: (counts[1 + 2 * i], counts[2 + 2 * i]) for i, kind in enumerate(KINDS)}


def counted() -> None:
    """What runs under callgrind: each kind at each length, after a run that imports and warms up."""
    kinds = [globals()[kind] for kind in KINDS]
    for work in kinds:
        work(LENGTHS[0])
    gc.collect()
    os.getppid()
    for work in kinds:
        for length in LENGTHS:
            work(length)
            os.getppid()


def per_step() -> dict[str, float]:
    """Instructions per step of each kind; "yardstick" as counted, the others in yardsticks."""
    counts = {kind: (long - short) / (LENGTHS[1] - LENGTHS[0]) for kind, (short, long) in instructions().items()}
    return {kind: count if kind == "yardstick" else count / counts["yardstick"] for kind, count in counts.items()}


def main() -> int:
    argparse.ArgumentParser(prog="python -m bench.host_loop", description=(__doc__ or "").splitlines()[0]).parse_args()
    try:
        print(json.dumps(per_step(), indent=1))
    except RuntimeError as error:
        print(f"bench.host_loop: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
