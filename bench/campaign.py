"""Everything worth knowing from one short visit to a machine, most valuable first.

    python -m bench.campaign --minutes 8 --out DIR

Needs torch, triton, numpy and safetensors; rivals and writers take part where they can be imported. The work is done by
a child process that writes the results file after every finding; a step that crashes or hangs is noted, and another
child goes on behind it. The visit may be cut off at any second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import RESULTS, ROOT

if TYPE_CHECKING:
    import torch

    from bench.results import Results

STEP_LIMIT = 240.0
NO_LINK = "the link wan_fast/kernels is not here (some copies leave links behind); make it: ln -sfn ../kernels wan_fast/kernels"


def steps(device: torch.device, patterns: Sequence[str] = ()) -> dict[str, Callable[[Results], None]]:
    """Name -> what to do, in order. With patterns, only the cases they name, after the roofs.

    Raises:
        ValueError: a pattern names no case.
    """
    from kernel_cases import REAL_CASES

    from bench.cases import CASES
    from bench.registry import select
    from bench.tune import tunable

    cases_on = select(CASES, patterns)
    cases = [case for case in cases_on if case.device == device.type]
    if patterns and not cases:
        raise ValueError(f"the cases {' '.join(patterns)} do not run on {device.type}; take --device {cases_on[0].device}")
    todo: dict[str, Callable[[Results], None]] = {"roofs": partial(find_roofs, device)}
    everything = device.type == "cuda" and not patterns
    kernels = [case for case in cases if case.group == "kernel"]
    if everything:
        todo["accuracy"] = partial(check_kernels, device)
    # in bf16, as they run on a GPU; in fp32 they are measured where time is left
    todo |= {case.name: partial(run_case, case, device) for case in kernels if case.name.endswith("bf16")}
    if everything:
        todo["shares/ti2v-5B/1280x704x121/bf16"] = partial(find_shares, device)
    todo |= {case.name: partial(run_case, case, device) for case in cases if case.group == "dit"}
    if everything:
        todo["parts/attention-in-8-bits/all-clips/bf16"] = partial(find_parts, device)
        todo["groups/vae2.2-decode/1280x704x121/bf16"] = partial(find_groups, "2.2", (1280, 704), 121, device)
        todo["groups/vae2.1-decode/1280x720x81/bf16"] = partial(find_groups, "2.1", (1280, 720), 81, device)
        # of attention on the middle clip alone: every candidate compiles for ten seconds
        tiles = [case for case in REAL_CASES if case.op in tunable()]
        tiles = [case for case in tiles if case.op != "attention_8bit" or case.id.endswith("ti2v-5B-720p")]
        todo |= {f"tiles/{case.op}/{case.id}": partial(find_tiles, case, device) for case in tiles}
    todo |= {case.name: partial(run_case, case, device) for case in cases if case not in kernels}
    todo |= {case.name: partial(run_case, case, device) for case in kernels}
    if everything:
        todo["sanitizer"] = sanitize
    return todo


def still_to_do(names: Sequence[str], data: Mapping[str, Any]) -> list[str]:
    """The steps whose findings the file does not have; the kernels' accuracy is always checked again."""
    found = {"roofs"} if data["roofs"] else set()
    return [name for name in names if name not in found | set(data["rows"])]


# --- the steps ----------------------------------------------------------------------------------------------------------


def find_roofs(device: torch.device, results: Results) -> None:
    from bench.results import without_paths
    from wan_fast.roofs import measured

    for name, rate in measured(device):
        if isinstance(rate, float):
            results.put("roofs", name, rate)
        else:
            results.put("notes", f"roof {name}", f"not measured: {without_paths(rate)}")


def run_case(case: Any, device: torch.device, results: Results) -> None:
    from bench.registry import run

    results.put("rows", case.name, run(case, device, results.data["roofs"])[0])


def check_kernels(device: torch.device, results: Results | None, *, real: bool = True) -> int:
    """The accuracy rule for every kernel, on the device, small shapes and real ones; returns how many break it.

    An operator that runs in CUDA C++ here is checked in Triton too. What a kernel leaves unwritten is poison: in
    deterministic mode torch.empty gives NaN, or the largest integer.
    """
    import torch
    from kernel_cases import CASES, FP8, REAL_CASES, arguments, dtypes_of, in_fp64, run
    from numerics import assert_as_accurate

    from bench.results import line
    from bench.tune import held_to, without_extension
    from wan_fast.kernels import KERNELS, backend

    wrong = 0
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    for case, dtype in product((*CASES, *(REAL_CASES if real else ())), (torch.float32, torch.bfloat16)):
        if dtype not in getattr(case, "dtypes", (dtype,)):
            continue
        args, kernel = arguments(case, dtype, device), KERNELS[case.op]
        if FP8 in dtypes_of(args) and (major, minor) < (8, 9):
            continue
        given, of = held_to(case.op, args)
        exact, expected = run(kernel, kernel.reference, in_fp64(given)), run(kernel, kernel.reference, given)
        ways = {backend(device, case.op): nullcontext()}
        if "cuda" in ways:
            ways["triton"] = without_extension(case.op)
        for way, chosen in ways.items():
            finding = "kept"
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                with chosen:
                    for result in zip(of(run(kernel, kernel.launch, args)), exact, expected, strict=True):
                        assert_as_accurate(*result)
            except Exception as error:  # one that does not compile breaks it too, and the others are still to be checked
                finding, wrong = f"BROKEN: {type(error).__name__}: {line(error)}", wrong + 1
            finally:
                torch.use_deterministic_algorithms(False)
            if results:
                results.put("accuracy", f"{case.op}/{case.id}/{str(dtype).removeprefix('torch.')} in {way}", finding)
    if wrong and results:
        raise AssertionError(f"{wrong} kernel cases break the accuracy rule: see the section accuracy")
    return wrong


def find_groups(version: str, size: tuple[int, int], frames: int, device: torch.device, results: Results) -> None:
    """Where the time of a whole decode goes."""
    import torch

    from bench.vae import measure, table
    from wan_fast.manifest import VaeDims
    from wan_fast.tasks import VAES

    spec = VAES[version]
    found = measure(VaeDims.of_spec(spec), spec.latent_shape(size, frames), torch.bfloat16, device)
    said = "; ".join(" ".join(row.split()) for row in table(found, results.data["roofs"]["bf16"]))
    results.put("notes", f"vae {version} decode {size[0]}x{size[1]}x{frames}, bf16", said)


def find_shares(device: torch.device, results: Results) -> None:
    """What a forward of the largest video of TI2V-5B is made of."""
    import torch

    from bench.networks import shares
    from bench.operations import latent_shape
    from wan_fast.manifest import DiTDims
    from wan_fast.tasks import TASKS

    found = shares(DiTDims.of_task(TASKS["ti2v-5B"]), latent_shape("ti2v-5B", 1280, 704, 121), torch.bfloat16, device)
    outside = 1 - found.get("matrix product", 0.0) - found.get("attention", 0.0)
    said = ", ".join(f"{kind} {share:.1%}" for kind, share in found.items())
    results.put("notes", "shares ti2v-5B 1280x704x121", f"{outside:.1%} outside matrix products and attention: {said}")


def find_parts(device: torch.device, results: Results) -> None:
    from bench.attention import find_parts as find

    find(device, results)


def find_tiles(case: Any, device: torch.device, results: Results) -> None:
    from bench.tune import sweep

    for dtype in reversed(case.dtypes):
        found = sweep(case, dtype, device)
        results.put("tiles", f"{case.op}/{case.id}/{str(dtype).removeprefix('torch.')}", found)


def sanitize(results: Results) -> None:
    """The small kernel cases under compute-sanitizer, every allocation on its own, so that an overrun shows."""
    from bench.registry import NotHere

    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotHere("compute-sanitizer is not installed")
    # whether they are right was the step "accuracy"; here it is what they touch
    code = "import torch; from bench.campaign import check_kernels; check_kernels(torch.device('cuda'), None, real=False)"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c", code]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line] or done.stderr.splitlines()[-1:]
    if done.returncode:
        raise AssertionError(f"compute-sanitizer ended with {done.returncode}: {' '.join(lines)}")
    results.put("notes", "sanitizer", "memcheck: " + " ".join(" ".join(lines).split("=")).strip())


# --- the child ----------------------------------------------------------------------------------------------------------


def work(path: Path, device_name: str, names: Sequence[str]) -> int:
    """Do the named steps; one line "begin NAME" before each and "end NAME ..." behind it."""
    import torch

    from bench.registry import NotHere
    from bench.results import Results, describe_run, line

    # what rivals print must not end up between the lines that the parent reads
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(device_name)
    results = Results(path, describe_run(device))
    todo = {name: step for name, step in steps(device).items() if name in names}
    for name, step in todo.items():
        print(f"begin {name}", file=channel, flush=True)
        results.data["notes"].pop(name, None)
        try:
            step(results)
            said = "done"
        except (ImportError, NotHere) as error:
            said = f"skipped: {line(error)}"
        except Exception as error:  # a step must not take the others with it
            said = f"FAILED: {type(error).__name__}: {line(error)}"
        if said != "done":
            results.put("notes", name, said)
        print(f"end {name} {said}", file=channel, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises if the context is lost: the next child has a new one
            torch.cuda.empty_cache()
    return 0


# --- the parent ---------------------------------------------------------------------------------------------------------


def supervise(
    path: Path,
    command: Sequence[str],
    names: Sequence[str],
    deadline: float,
    *,
    limit: float = STEP_LIMIT,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Have steps done by children until all are or the deadline has come.

    Args:
        path: the results file.
        command: starts a child; the names of the steps to do are appended.
        names: the steps.
        deadline: on the monotonic clock.
        limit: seconds that a step may take.
        say: where a line per step goes.

    Returns:
        The steps that were not done.

    Raises:
        RuntimeError: a child does not get as far as its first step.
    """
    from bench.results import Results, without_paths

    left = list(names)
    while left and time.monotonic() < deadline:
        before = len(left)
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            child = subprocess.Popen(
                [*command, *left],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it started can be ended with it
            )
            try:
                current, why = _follow(child, left, deadline, limit, say)
            finally:
                _end(child)
            errors.seek(0)
            said = errors.read()
        if why == "time":
            break
        if current is not None:
            crashed = why.startswith("the process ended")
            note = f"FAILED: {why}" + (f": {without_paths(' '.join(said[-600:].split()))}" if crashed else "")
            Results(path, {}).put("notes", current, note)
            say(f"{current}: {note[:200]}")
            left.remove(current)
        elif left and len(left) == before:
            # it did not get as far as a step: another would not either
            raise RuntimeError(f"the measuring process does not start: {said[-2000:]}")
    return left


def _follow(child: Any, left: list[str], deadline: float, most: float, say: Callable[[str], None]) -> tuple[str | None, str]:
    """Read what a child says, taking finished steps off `left`, until it ends.

    Returns:
        The step it was in, or None; and why it ended: "time" where the deadline came.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in child.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    current, began = None, time.monotonic()
    while True:
        limit = min(deadline, began + most)
        try:
            line = lines.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            return current, "time" if time.monotonic() >= deadline else f"no end after {most:.0f} s"
        if line is None:
            return current, f"the process ended with {child.wait()}"
        kind, _, rest = line.partition(" ")
        if kind == "begin":
            current, began = rest, time.monotonic()
        elif kind == "end" and current is not None:
            say(f"{current}: {rest.removeprefix(current).strip()} ({time.monotonic() - began:.0f} s)")
            left.remove(current)
            current = None


def _end(child: Any) -> None:
    """Kill a child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def build_extension(capability: tuple[int, int], say: Callable[[str], None]) -> None:
    """Build wan_fast._cuda in place, for this GPU, where the module is not there yet; without it kernels come from Triton."""
    module = ROOT / "wan_fast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (ROOT / "csrc").is_dir() or module.exists():
        return
    number = 10 * capability[0] + capability[1]
    environment = os.environ | {"WAN_FAST_CUDA_ARCHITECTURES": f"{number}{'a' if number >= 90 and number % 10 == 0 else ''}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=90)
        said = " ".join((done.stdout + done.stderr).split())[-200:]
    except subprocess.TimeoutExpired:
        said = "it took longer than 90 s"
    say("extension built" if module.exists() else f"extension not built: {said}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.campaign", description="Measure this machine, most valuable first.")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long, wherever it is (default 8)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="DIR/<machine>/<date>.json (default bench/results)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--list", action="store_true", help="name the steps, and stop")
    parser.add_argument("--again", action="store_true", help="measure rows again that today's file has of this version already")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="CASE", help="cases, or patterns such as 'dit/*' (default: all)")
    parsed = parser.parse_args(argv)
    if not 0 < parsed.minutes < 24 * 60:
        parser.error(f"--minutes must be above 0 and below a day, got {parsed.minutes:g}")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or out of time; 1: something failed; 2: the request cannot be carried out."""
    deadline = time.monotonic()
    parsed = parse(argv)
    deadline += 60 * parsed.minutes
    if not (ROOT / "wan_fast" / "kernels" / "_op.py").is_file():
        print(f"bench.campaign: error: {NO_LINK}", file=sys.stderr)
        return 2
    if parsed.child:
        return work(parsed.child, parsed.device, parsed.names)
    import torch

    from bench.results import open_results, read

    if parsed.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.campaign: error: --device cuda: there is no GPU that the installed torch can use; take cpu", file=sys.stderr
        )
        return 2
    device = "cuda" if parsed.device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        if device == "cuda" and not parsed.list:
            build_extension(torch.cuda.get_device_capability(), print)
        names = list(steps(torch.device(device), parsed.names))
        if parsed.list:
            print("\n".join(names))
            return 0
        results = open_results(parsed.out, torch.device(device))
        names = names if parsed.again else still_to_do(names, results.data)
        results.put("notes", "begun", time.strftime("%Y-%m-%d %H:%M:%S"))
    except (ValueError, OSError) as error:
        print(f"bench.campaign: error: {error}", file=sys.stderr)
        return 2
    if not names:
        print(f"{results.path} has all of it already; --again measures it again")
        return 0
    print(f"{len(names)} steps on {results.data['machine']['device']}, at most {parsed.minutes:g} minutes, into {results.path}")
    child = [sys.executable, "-m", "bench.campaign", "--child", str(results.path.resolve()), "--device", device]
    try:
        left = supervise(results.path, child, names, deadline, limit=max(STEP_LIMIT, 30 * parsed.minutes))
    except RuntimeError as error:
        print(f"bench.campaign: error: {error}", file=sys.stderr)
        return 1
    notes = read(results.path)["notes"]
    failed = [name for name in names if notes.get(name, "").startswith("FAILED")]
    for name in failed:
        print(f"failed: {name}")
    print(f"{len(names) - len(left)} of {len(names)} steps" + (f"; not reached: {' '.join(left)}" if left else ""))
    print(results.path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
