"""What CUDA graphs give: steps and chunks of the VAE launched kernel by kernel, and replayed, in one run.

    python -m bench.graphs                  # on a GPU: the campaign's cases few-steps/* and graphs/*
    python -m bench.graphs --device cpu     # the host's bookkeeping of a step, and what a graph would replace

Writes DIR/<machine>/graphs.md. A graph whose latents or pixels are not those of the launches, bit for bit, fails its case, and
the exit status is 1. Weights are random: nothing of this depends on them.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import RESULTS, presets
from bench.networks import BF16, FP32, make_dit, random_model
from bench.registry import OURS, Case, NotHere, Work
from bench.results import describe_run, open_results, slug
from bench.timer import now
from wan_fast import manifest
from wan_fast.branches import Branches
from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.config import EngineConfig, Request
from wan_fast.graphs import Capture, CudaCapture, Graphs
from wan_fast.memory import DECODES
from wan_fast.planning import Plan, plan
from wan_fast.profiling import busy
from wan_fast.sampler import Run, denoise, directly
from wan_fast.setup import Models
from wan_fast.solver import Solver
from wan_fast.tasks import TASKS
from wan_fast.vae import WanVAE

EAGER = f"{OURS}, --no-cuda-graphs"
# calls of the runtime and of the driver by which the host gives a GPU work
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
CACHES = {"step_cache": "every:2,0.1", "cfg_cache": "difference:3,0.1"}


def planned(
    task: str, checkpoint: str | None, video: tuple[int, int, int], num_steps: int, device: torch.device, **options: Any
) -> Plan:
    """The plan of a run of `video` (width, height, frames), all of whose models fit."""
    name = str(device) if device.type == "cuda" else "cpu"
    config = EngineConfig(task=task, checkpoint=checkpoint, device=name, vram=2**50, **options)
    return plan(config, Request(prompt="a cat", size=video[:2], num_frames=video[2], num_steps=num_steps, seed=0))


# --- what is done, by the unit ------------------------------------------------------------------------------------------


class Clip(Protocol):
    """Work that comes in like units, as often as wanted.

    count: units. first: the first one that is replayed in a clip whose graphs were not there before it. keeps: whether graphs
    serve later clips: all that a unit reads and writes stays where it is. makes: what comes of it.
    """

    count: int
    first: int
    keeps: bool
    makes: str

    def whole(self, run: Run) -> Tensor: ...

    def units(self, run: Run) -> Iterator[None]: ...


class Denoising:
    """A clip of denoising steps, as the engine takes them."""

    keeps, first, makes = True, 0, "latents"

    def __init__(self, todo: Plan, parts: Mapping[str, Any], noise: Tensor) -> None:
        self.steps, self.noise, self.count = todo.steps, noise, len(todo.steps)
        text = dict.fromkeys(("conditional", "unconditional"), parts["text"][0])
        self.solver = Solver(todo.steps, noise)
        self.branches = Branches(todo.steps, lambda name: parts["model"], text, 0, noise.device)

    def whole(self, run: Run) -> Tensor:
        self.solver.start(self.steps, self.noise)
        denoise(self.steps, self.branches, self.solver, run=run)
        return self.solver.latents.clone()

    def units(self, run: Run) -> Iterator[None]:
        self.solver.start(self.steps, self.noise)
        for step in self.steps:
            denoise([step], self.branches, self.solver, run=run)
            yield


class Decoding:
    """A clip of chunks of the VAE's decode. The first chunk is one frame, the second finds fewer histories than the others, of
    which the first warms up and the next is captured."""

    keeps, first, makes = False, 4, "pixels"

    def __init__(self, vae: WanVAE, latents: Tensor, chunk: int, piece: int) -> None:
        self.vae, self.latents, self.chunk, self.piece = vae, latents, chunk, piece
        self.count = 1 + (latents.shape[1] - 1) // chunk
        self.pixels: list[Tensor] = []

    def whole(self, run: Run) -> Tensor:
        for _ in self.units(run):
            pass
        return torch.cat(self.pixels)

    def units(self, run: Run) -> Iterator[None]:
        self.pixels, done = [], 0
        how = None if run is directly else run
        for pixels in self.vae.decode_stream(self.latents, chunk=self.chunk, piece=self.piece, run=how):
            self.pixels.append(pixels)
            done += pixels.shape[0]
            if done % (4 * self.chunk) == 1:
                yield


@dataclass(slots=True)
class Arm:
    """A clip with what does its units: launches, or graphs, which are captured by `capture`."""

    clip: Clip
    capture: Timed | None = None
    graphs: Graphs | None = None

    def run(self) -> Run:
        if self.capture is None:
            return directly
        if self.graphs is None or not self.clip.keeps:
            self.graphs = None  # and with it its memory, before there is more
            self.graphs = Graphs(self.capture)
        return self.graphs


class Timed:
    """A capture whose seconds are kept, the device being idle before; one for all graphs, as the engine has it.

    Raises:
        NotHere: the device has no graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.capture = device, capture_on(device)
        self.seconds: list[float] = []

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        start = now(self.device)
        captured = self.capture(work)
        self.seconds.append(now(self.device) - start)
        return captured


def capture_on(device: torch.device) -> Capture:
    """Captures as the engine does where memory suffices.

    Raises:
        NotHere: the device has no graphs.
    """
    if device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    return partial(CudaCapture(device), roomy=True)


# --- what is found of an arm --------------------------------------------------------------------------------------------


def examine(arm: Arm, device: torch.device) -> dict[str, float]:
    """Per unit, of those from the first replayed one on: calls that launch, what the device then does, the host's seconds to
    issue one to an idle device, the device's for all of them in a row, and the part of these in which no kernel runs.

    Kernels' seconds are those of torch.profiler, the others are taken without it.
    """
    clip, issued = arm.clip, []
    units = clip.units(arm.run())
    for index in range(clip.count):
        start = now(device)
        next(units)
        issued += [time.perf_counter() - start] if index >= clip.first else []
    for _ in units:
        pass
    steady = clip.count - clip.first
    units = _begun(arm)
    start = now(device)
    for _ in units:
        pass
    whole = (now(device) - start) / steady
    launched, kernels, spent = profiled(_begun(arm), device)
    return {
        "launches": launched / steady,
        "kernels": kernels / steady,
        "host_seconds": median(issued),
        "device_seconds": whole,
        "idle": max(0.0, 1 - spent / steady / whole),
    }


def profiled(units: Iterator[None], device: torch.device) -> tuple[int, int, float]:
    """Of the units: calls that launch, kernels with copies, and seconds of these; on a CPU, operators for both."""
    on_gpu = device.type == "cuda"
    now(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in units:
            pass
        now(device)
    return accounts(list(profiler.events() or []), on_gpu)


def accounts(events: Sequence[Any], on_gpu: bool) -> tuple[int, int, float]:
    """`profiled`, of the profiler's events."""
    spent = [microseconds / 1e6 for _, _, microseconds in busy(events, on_gpu)]
    launched = sum(event.name.startswith(LAUNCHES) for event in events) if on_gpu else len(spent)
    return launched, len(spent), sum(spent)


def _begun(arm: Arm) -> Iterator[None]:
    """The units of a clip from the first replayed one on; those before are issued."""
    units = arm.clip.units(arm.run())
    for _ in range(arm.clip.first):
        next(units)
    return units


class Memory:
    """The most that is taken from now on, beside what was there: by tensors, and from the device. A CPU has no account."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, (0, 0)
        gc.collect()
        if device.type == "cuda":
            now(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def peak(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        names = ("allocated_bytes", "reserved_bytes")
        return {name: float(peak - held) for name, peak, held in zip(names, peaks, self.before, strict=True)}


def compared(make: Callable[[], Clip], device: torch.device, flops: float, rate: str) -> Work:
    """Both ways to do a clip, timed from an idle device, and what is found of each."""
    findings: dict[str, dict[str, float]] = {}

    def timed(arm: Arm) -> Callable[[], Tensor]:
        def call() -> Tensor:
            # else the launches of one arm hide behind the work of the other
            now(device)
            return arm.clip.whole(arm.run())

        return call

    def launched() -> Callable[[], Tensor]:
        memory, arm = Memory(device), Arm(make())
        if device.type != "meta":
            for _ in range(2):
                arm.clip.whole(arm.run())
            findings[EAGER] = {**memory.peak(), **examine(arm, device)}
        return timed(arm)

    def replayed() -> Callable[[], Tensor]:
        if device.type == "meta":
            return timed(Arm(make()))
        capture = Timed(device)
        expected = make().whole(directly)
        memory, arm = Memory(device), Arm(make(), capture)
        # the first clip warms up and captures; in the second every unit that can be is a replay
        for clip in ("first", "second"):
            check(arm.clip.whole(arm.run()), expected, f"{arm.clip.makes} of the {clip} clip")
        found = memory.peak()
        assert arm.graphs is not None
        found |= {"captured": float(len(arm.graphs.captured)), "capture_seconds": median(capture.seconds)}
        findings[OURS] = {**found, **examine(arm, device)}
        return timed(arm)

    # both are compared above, to the bit
    arms = {OURS: replayed, EAGER: launched}
    return Work(arms=arms, rate=rate, tolerance=None, flops=flops, findings=findings)


def check(found: Tensor, expected: Tensor, what: str) -> None:
    """
    Raises:
        AssertionError: a value differs.
    """
    if not torch.equal(found, expected):
        count = int((found != expected).sum())
        raise AssertionError(f"graphs give other {what} than launches: {count} of {expected.numel()} values differ")


# --- the cases ----------------------------------------------------------------------------------------------------------


def steps(
    task: str, checkpoint: str | None, video: tuple[int, int, int], num_steps: int, device: torch.device, **options: Any
) -> Work:
    """All steps of a clip, with guidance."""
    todo = planned(task, checkpoint, video, num_steps, device, **options)
    models = Models.of(todo.config.spec, todo.checkpoint)
    dtype = BF16 if todo.dtype == "bf16" else FP32
    parts = make_dit(models.experts["model"], todo.latent_shape, dtype, device)
    noise = torch.randn(todo.latent_shape, device=device)
    make = partial(Denoising, todo, parts, noise)
    return compared(make, device, todo.flops["denoise"], todo.dtype)


def chunks(task: str, checkpoint: str | None, size: tuple[int, int], device: torch.device, count: int = 8) -> Work:
    """`count` chunks of the decode of a clip of that size."""
    spec = TASKS[task]
    path = locate(checkpoint, spec) if checkpoint else None
    opened = open_checkpoint(path) if path else None
    dims = Models.of(spec, opened).vae
    dtype = BF16 if device.type == "cuda" else FP32
    chunk, piece = DECODES["cuda"][0]
    _, _, h, w = spec.vae_spec.latent_shape(size, 1)
    latents = torch.randn(dims.channels, 1 + (count - 1) * chunk, h, w, device=device)
    vae = random_model(lambda: WanVAE(dims), manifest.vae_shapes(dims), device, lambda name: dtype)
    flops = manifest.vae_flops(dims, "decoder", latents.shape[1], h, w)
    return compared(partial(Decoding, vae, latents, chunk, piece), device, flops, "bf16" if dtype == BF16 else "fp32")


def _steps(name: str, task: str, video: tuple[int, int, int], num_steps: int, budget: float, **options: Any) -> Case:
    make = partial(steps, task, "tiny" if name.startswith("tiny") else None, video, num_steps, **options)
    return Case(f"graphs/{name}/{'x'.join(map(str, video))}-{num_steps}-steps/bf16", "cuda", make, budget)


def _chunks(name: str, task: str, size: tuple[int, int], budget: float) -> Case:
    make = partial(chunks, task, "tiny" if name.startswith("tiny") else None, size)
    return Case(f"graphs/{name}-decode/{size[0]}x{size[1]}x57/bf16", "cuda", make, budget)


# first where launches matter; where they do not, three steps show that nothing is lost. 0 s: every arm once more
GPU_GRAPH_CASES = (
    _steps("tiny", "ti2v-5B", (128, 128, 33), 50, 3.0),
    _steps("t2v-1.3B", "t2v-1.3B", (256, 256, 17), 10, 3.0),
    _steps("ti2v-5B", "ti2v-5B", (256, 256, 17), 10, 3.0),
    _chunks("tiny-vae2.2", "ti2v-5B", (128, 128), 2.0),
    _chunks("vae2.2", "ti2v-5B", (256, 256), 3.0),
    _steps("tiny-with-caches", "ti2v-5B", (128, 128, 33), 50, 3.0, **CACHES),
    _steps("t2v-1.3B", "t2v-1.3B", (832, 480, 81), 3, 0.0),
    _steps("ti2v-5B", "ti2v-5B", (1280, 704, 121), 3, 0.0),
    _chunks("vae2.1", "t2v-1.3B", (832, 480), 4.0),
    _chunks("vae2.2", "ti2v-5B", (1280, 704), 0.0),
)


# --- what is written ----------------------------------------------------------------------------------------------------


class Page:
    """A text that is written again with every line, so that a run that is killed keeps what it found."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[str]()

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([*self.lines, ""]), encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown of cases graphs/*: one line per arm."""
    lines = [
        "Times are medians of a whole clip, begun on an idle device. By the unit, a step or a steady chunk of the decode: what",
        "the host needs to issue one to an idle device (where the device's queue is full it waits, and that counts), what the",
        "device takes for one of many in a row, the part of that in which no kernel runs, calls that launch, and kernels with",
        "copies. Latents and pixels of both arms are the same to the bit. Memory is the peak beside weights.",
        "",
        "| case | arm | clip | host | device | idle | launches | kernels | captured, each | allocated | reserved |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        for name, arm in row["arms"].items():
            found = arm.get("findings", {})
            cells = [f"`{row['case']}`", name, *(f"{value * 1e3:.3f} ms" for value in (arm["seconds"], found["host_seconds"]))]
            cells += [f"{found['device_seconds'] * 1e3:.3f} ms", f"{found['idle']:.0%}"]
            cells += [f"{found[kind]:.1f}" for kind in ("launches", "kernels")]
            cells += [f"{found['captured']:.0f}, {found['capture_seconds'] * 1e3:.1f} ms" if "captured" in found else "-"]
            cells += [
                f"{found[f'{kind}_bytes'] / 2**20:.0f} MiB" if found.get(f"{kind}_bytes") is not None else "not measured"
                for kind in ("allocated", "reserved")
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"| `{row['case']}` | {name} | not measured: {why} |" + " |" * 8 for name, why in row["skipped"].items()]
    return lines


def on_a_gpu(add: Callable[..., None], data: Mapping[str, Any]) -> None:
    """Give `add` lines of markdown on what a campaign found."""
    for case in presets.GPU_FEW_STEPS_CASES:
        if case.name in data["rows"]:
            add(*presets.few_steps_lines(data["rows"][case.name]))
    add(*table([data["rows"][case.name] for case in GPU_GRAPH_CASES if case.name in data["rows"]]), "")
    for case in (*presets.GPU_FEW_STEPS_CASES, *GPU_GRAPH_CASES):
        if case.name not in data["rows"]:
            add(f"- `{case.name}`: not measured: {data['notes'].get(case.name, 'there was no time left')}")


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: something failed, or graphs gave something else; 2: the request cannot be carried out."""
    parser = argparse.ArgumentParser(prog="python -m bench.graphs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="of measuring on a GPU, at most (default 8)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results")
    parsed = parser.parse_args(argv)
    device, status = torch.device(parsed.device), 0
    if device.type == "cuda":
        # a case that crashes or hangs costs the campaign that case alone, and every row is kept as it comes
        from bench.campaign import main as campaign

        where = ["--device", "cuda", "--minutes", str(parsed.minutes), "--out", str(parsed.out)]
        if (status := campaign([*where, "few-steps/*", "graphs/*"])) == 2:
            return status
    from bench.report import facts_line  # which knows all cases, these too

    facts = describe_run(device)
    page = Page(parsed.out / slug(facts["machine"]["device"]) / "graphs.md")
    page.add("# What CUDA graphs give", "", f"Written by `python -m bench.graphs`: {facts_line(facts)}.", "")
    if device.type == "cpu":
        from bench.bookkeeping import on_a_cpu  # of the clips that are defined here

        on_a_cpu(page.add)
        return 0
    on_a_gpu(page.add, open_results(parsed.out, device).data)
    return status


if __name__ == "__main__":
    sys.exit(main())
