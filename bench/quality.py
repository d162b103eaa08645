"""What caches and 8 bits do to whole videos: error, PSNR and SSIM against the full run, beside those of fewer steps.

    python -m bench.quality                          # tiny, every run; writes bench/results/quality.md and its chart
    python -m bench.quality --prompts 2 'magcache*'  # fewer; prints alone; --list says which there are
    python -m bench.quality --task ti2v-5B --ckpt_dir FOLDER --prompts_file FILE --out FOLDER --prompts 4

On a CPU 8 bits are emulated: values are rounded and multiplied in fp32. The full run of every prompt is held in memory, with
the latents and velocities of all steps: 3.4 GB for 121 frames of 1280x704 in 50 steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import inf, log10
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import RESULTS, charts
from bench.quality_8bit import (  # noqa: F401, some are for those who import them from here
    ATTENTIONS,
    FORMS,
    attention_errors,
    emulated,
    linear_errors,
    plain_fp8,
    quantized,
    sqnr,
    synthetic_attention_errors,
    synthetic_errors,
)
from wan_fast import engine as engines
from wan_fast import planning, sampler, setup
from wan_fast.attention import Attention8bit, of_projection
from wan_fast.branches import Branches
from wan_fast.calibrate import guided
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.device import describe, named
from wan_fast.engine import Engine
from wan_fast.flags import Parser
from wan_fast.parsing import parse_size
from wan_fast.quality import PRESETS, settle
from wan_fast.solver import Solver
from wan_fast.steps import LETTERS, Step

COLOURS = ("red", "orange", "yellow", "green", "blue")
THINGS = ("circle on white moves left", "square on grey rotates", "triangle on black bounces", "star on sky grows")
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]
# of tiny: number of steps -> prompts
STEPS = {12: 8, 50: 2}
# prompts whose steps are also measured at the latents of the full run
FORCED = 2
TINY = {"task": "ti2v-5B", "checkpoint": "tiny", "device": "cpu"}


def on_card(preset: Any, card: str) -> dict[str, Any]:
    """What a preset is on a card, in options of its own, so that a CPU emulates its 8 bits."""
    settled, _, filled = settle(EngineConfig(task="ti2v-5B", quality=preset), named(card))
    return {name: getattr(settled, name) for name in PRESETS[preset] if name in filled}


STEP_CACHES = (
    *(f"magcache:{limit}" for limit in ("80%", "65%", "50%", "35%", 0.06, 0.12, 0.24)),
    *(f"teacache:{limit}" for limit in ("80%", "65%", "50%", "45%", "35%", 0.1, 0.2, 0.4)),
    "teacache-ret:60%",
    *(f"every:{number}" for number in (2, 3, 4)),
    *(f"searched:{share}" for share in ("80%", "65%", "50%", "45%", "35%")),
)
CFG_CACHES = ("difference:2", "difference:3", "difference:5", "frequency:2", "frequency:5", "gate:0.5", "gate:0.8")
BOTH = (
    ("teacache:50%", "difference:5"),
    ("searched:50%", "difference:5"),
    ("searched:45%", "frequency:5"),
    ("searched:45%", "gate:0.8"),
    ("searched:45%", "gate:0.9"),
)
# what is compared: name -> options of EngineConfig
CACHED: dict[str, dict[str, Any]] = {
    **{name: {"step_cache": name} for name in STEP_CACHES},
    **{name: {"cfg_cache": name} for name in CFG_CACHES},
    **{f"{step} + {cfg}": {"step_cache": step, "cfg_cache": cfg} for step, cfg in BOTH},
    **{f"cfg-zero {number}": {"cfg_zero": number} for number in (0, 1)},
    **{name: {"quality": name} for name in PRESETS},
}
# of those in 8 bits what an H100 takes
ON_CARD = {f"{name} on H100": on_card(name, "H100") for name in PRESETS if "8 bits" in PRESETS[name].values()}
# "variant" is another attention in the place of that in 8 bits
IN_8_BITS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp8 row": {"precision": "fp8"},
    "fp8 block": {"precision": "fp8", "scaling": "block"},
    "int8 row": {"precision": "int8"},
    "int8 block": {"precision": "int8", "scaling": "block"},
    **{f"fp8 row, {keep} kept": {"precision": "fp8", "keep_blocks": keep} for keep in (0, 2)},
    **{f"int8 row, {keep} kept": {"precision": "int8", "keep_blocks": keep} for keep in (0, 2)},
    "attention int8": {"attention": "int8"},
    "attention int8, values bf16": {"attention": "int8", "variant": Attention8bit("int8", wide_values=True)},
    "attention fp8": {"attention": "fp8"},
    "attention plain fp8": {"attention": "fp8", "variant": of_projection(plain_fp8)},
    "attention int8, 2,1 steps kept": {"attention": "int8", "keep_steps": (2, 1)},
    "attention int8, 1 block kept": {"attention": "int8", "keep_blocks": 1},
    "attention int8, skip 0.01": {"attention": "int8", "skip_softmax": 0.01},
    "attention int8, int8 row": {"attention": "int8", "precision": "int8"},
    "attention int8, fp8 row": {"attention": "int8", "precision": "fp8"},
}
RUNS = {**CACHED, **ON_CARD, **IN_8_BITS}
# those whose steps are shown one by one
SHOWN = ("magcache:50%", "teacache:50%", "searched:50%", "difference:2", "fast")


# --- measures ---------------------------------------------------------------------------------------------------------


def psnr(x: Tensor, reference: Tensor, span: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of values within `span` of one another, 2 for frames in [-1, 1]; inf where equal."""
    noise = (x - reference).double().square().mean().item()
    return 10 * log10(span**2 / noise) if noise else inf


def ssim(frames: Tensor, reference: Tensor) -> float:
    """Structural similarity of frames [C, F, H, W] in [-1, 1], taken as of range 1 (Wang et al. 2004, IEEE TIP 13(4)).

    Over windows of 11 x 11, Gaussian of sigma 1.5, that lie within the frame; K1 = 0.01, K2 = 0.03; each channel of a frame by
    itself. Returns: the mean over windows, channels and frames, computed in fp64.
    """
    window = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    total = 0.0
    for pair in zip(frames.unbind(1), reference.unbind(1), strict=True):
        x, y = ((frame.double() + 1) / 2 for frame in pair)
        moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # [5 C, 1, H, W]
        moments = F.conv2d(F.conv2d(moments, window[None, None, :, None]), window[None, None, None])
        mx, my, xx, yy, xy = moments[:, 0].unflatten(0, (5, -1)).unbind()
        luminance = (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
        structure = (2 * (xy - mx * my) + 0.03**2) / (xx - mx * mx + yy - my * my + 0.03**2)
        total += (luminance * structure).mean().item()
    return total / frames.shape[1]


def relative(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    return ((x - reference).double().norm() / reference.double().norm()).item()


def cosine(x: Tensor, reference: Tensor) -> float:
    """Of the angle between two tensors of one shape."""
    return F.cosine_similarity(x.double().flatten(), reference.double().flatten(), dim=0).item()


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Full:
    """A run with nothing left out.

    frames: [3, F, H, W] in [-1, 1]. latents: [C, T, H, W] before every step and after the last. velocities: guided, by step.
    """

    frames: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def denoise(self, steps: Sequence[Step], branches: Branches, solver: Solver, **settings: Any) -> None:
        """`sampler.denoise`, and keeps what it sees."""

        def seen(step: Step, latents: Tensor) -> tuple[Tensor, Tensor | None]:
            self.latents.append(_on_host(latents))
            pair = branches.velocities(step, latents)
            self.velocities.append(_on_host(guided(step, *pair)))
            return pair

        sampler.denoise(steps, SimpleNamespace(load=branches.load, velocities=seen), solver, **settings)  # type: ignore[arg-type]
        self.latents.append(_on_host(solver.latents))


@dataclass(slots=True)
class Walk:
    """A plan's steps beside those of the full run.

    errors: relative L2 error of the guided velocity where each step is given the full run's latents (teacher-forced), the
    plan's caches filled on these; empty unless `forced`. cosines, psnrs: of its own latents after each step.
    """

    full: Full
    forced: bool = True
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)

    def denoise(self, steps: Sequence[Step], branches: Branches, solver: Solver, **settings: Any) -> None:
        """`sampler.denoise`, compared step by step; then the velocities again, at the full run's latents."""
        report = settings.pop("on_step", None)

        def compared(step: Step) -> None:
            own, known = _on_host(solver.latents), self.full.latents[step.index + 1]
            self.cosines.append(cosine(own, known))
            self.psnrs.append(psnr(own, known, (known.max() - known.min()).item()))
            if report:
                report(step)

        sampler.denoise(steps, branches, solver, on_step=compared, **settings)
        for step in steps if self.forced else ():
            pair = branches(step, self.full.latents[step.index].to(solver.latents.device))
            self.errors.append(relative(_on_host(guided(step, *pair)), self.full.velocities[step.index]))


def _on_host(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True)


@contextmanager
def denoising(loop: Callable[..., None]) -> Iterator[None]:
    """Within, an engine denoises by this in the place of `sampler.denoise`."""
    before = engines.denoise
    engines.denoise = loop
    try:
        yield
    finally:
        engines.denoise = before


def frames_of(engine: Engine, request: Request) -> Tensor:
    """The clip, [3, F, H, W] in [-1, 1]."""
    chunks: list[Tensor] = []
    engine.generate(request, on_frames=lambda chunk: chunks.append(_on_host(chunk)), on_pixels=lambda pixels: None)
    return torch.cat(chunks, dim=1)


def full_run(engine: Engine, request: Request) -> Full:
    full = Full()
    with denoising(full.denoise):
        full.frames = frames_of(engine, request)
    return full


class Engines:
    """One engine at a time. It stays where only caches change, which are but rows of the plan.

    Args:
        base: options of every run.
    """

    def __init__(self, base: Mapping[str, Any]) -> None:
        self.base = base
        self.engine: Engine | None = None
        self.has: tuple[EngineConfig, Any] | None = None

    def config(self, options: Mapping[str, Any]) -> EngineConfig:
        """A preset's choices as if each had been asked for: what cannot be done of them is refused, not left out."""
        given = {name: value for name, value in options.items() if name != "variant"}
        # what is compared is read back at every step
        config = EngineConfig(**{**self.base, "cuda_graphs": False, **given})
        return setup.set_up(config).config if config.quality else config

    def of(self, options: Mapping[str, Any]) -> Engine:
        """The engine of a row of RUNS."""
        config = self.config(options)
        wanted = replace(config, step_cache=None, cfg_cache=None, cfg_zero=None), options.get("variant")
        if self.engine is None or wanted != self.has:
            self.engine = None  # its memory is needed
            self.engine, self.has = Engine(wanted[0]), wanted
            for name in self.engine.spec.experts if wanted[1] else ():
                for block in self.engine.models[name].blocks:  # type: ignore[union-attr]
                    block.self_attn.in_8_bits = wanted[1]
        caches = {"step_cache": config.step_cache, "cfg_cache": config.cfg_cache, "cfg_zero": config.cfg_zero}
        self.engine.config = replace(self.engine.config, **caches)  # type: ignore[arg-type]
        return self.engine


def videos(options: Mapping[str, Any], prompts: Sequence[str]) -> Iterator[Tensor]:
    """One clip of tiny [3, F, H, W] in [-1, 1] per prompt, from the prompt's own seed."""
    engine = Engines({**TINY, "dtype": "fp32"}).of(options)
    for seed, prompt in enumerate(prompts):
        yield frames_of(engine, Request(prompt=prompt, seed=seed))


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one run. By prompt: psnrs, ssims. By step, means over prompts: errors, cosines, latents (dB)."""

    steps: tuple[Step, ...]
    psnrs: Sequence[float]
    ssims: Sequence[float]
    errors: Sequence[float]
    cosines: Sequence[float]
    latents: Sequence[float]

    @property
    def forwards(self) -> int:
        return sum(step.forwards for step in self.steps)


def measure(engine: Engine, requests: Sequence[Request], full: Sequence[Full]) -> Row:
    """The engine's run of every request beside the full one."""
    walks: list[Walk] = []
    psnrs, ssims = [], []
    for request, known in zip(requests, full, strict=True):
        walks.append(Walk(known, forced=len(walks) < FORCED))
        with denoising(walks[-1].denoise):
            frames = frames_of(engine, request)
        psnrs.append(psnr(frames, known.frames))
        ssims.append(ssim(frames, known.frames))
    errors = [walk.errors for walk in walks if walk.errors]
    return Row(
        steps=engine.plan(requests[0]).steps,
        psnrs=psnrs,
        ssims=ssims,
        errors=_means(errors),
        cosines=_means([walk.cosines for walk in walks]),
        latents=_means([walk.psnrs for walk in walks]),
    )


def control_steps(plan: planning.Plan) -> int | None:
    """Of the full run, the most steps that take no more passes; None where the plan leaves out none."""
    if plan.forwards == plan.forwards_uncached:
        return None
    return plan.forwards * len(plan.steps) // plan.forwards_uncached


def _means(by_prompt: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in zip(*by_prompt, strict=True)]


HEAD = "| run | passes | PSNR, dB | lowest | SSIM | fewer steps | PSNR | gain | velocity error | largest | latents | PSNR |"


def line(name: str, row: Row, control: tuple[int, float] | None) -> str:
    """Markdown: a row of the table of `HEAD`; `control`: its steps and mean PSNR."""
    mean, uncached = fmean(row.psnrs), sum(1 + (step.unconditional != "none") for step in row.steps)
    passes = f"{row.forwards}, {uncached / row.forwards:.1f}x fewer" if row.forwards < uncached else f"{row.forwards}"
    beside = (f"{control[0]}", f"{control[1]:.1f}", f"{mean - control[1]:+.1f}") if control else ("", "", "")
    cells = (
        name, passes, _db(mean), _db(min(row.psnrs)), f"{fmean(row.ssims):.4f}", *beside, f"{fmean(row.errors):.4f}",
        f"{max(row.errors):.4f}", f"{row.cosines[-1]:.5f}", _db(row.latents[-1]),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def by_step(rows: Mapping[str, Row]) -> list[str]:
    """Markdown: a line per step, a column per run."""
    lines = ["| step | " + " | ".join(rows) + " |", "| --- |" + " --- |" * len(rows)]
    for i in range(len(next(iter(rows.values())).steps)):
        cells = [
            f"`{LETTERS[row.steps[i].conditional]}{LETTERS[row.steps[i].unconditional]}` {row.errors[i]:.4f}, "
            f"{row.cosines[i]:.5f}, {_db(row.latents[i])}"
            for row in rows.values()
        ]
        lines.append(f"| {i} | {' | '.join(cells)} |")
    return lines


def _db(value: float) -> str:
    return "exact" if value == inf else f"{value:.1f}"


def series(options: Mapping[str, Any]) -> str | None:
    """The curve of the chart that a row is a point of."""
    if "quality" in options:
        return "presets"
    if "precision" in options or "attention" in options or "cfg_zero" in options or "dtype" in options:
        return "presets in 8 bits" if "step_cache" in options else None
    if "cfg_cache" in options:
        return "step and CFG cache" if "step_cache" in options else "CFG cache"
    return options["step_cache"].partition(":")[0]


def numbers(rows: Mapping[str, Row], controls: Mapping[int, float], passes: float) -> dict[str, Any]:
    """What the chart shows of one number of steps; `passes`: of a full run, per step."""
    curves: dict[str, list[list[float]]] = {}
    for name, row in rows.items():
        if (of := series(RUNS[name])) and fmean(row.psnrs) < inf:
            curves.setdefault(of, []).append([row.forwards, round(fmean(row.psnrs), 2)])
    curves["no cache, fewer steps"] = [[round(count * passes), round(value, 2)] for count, value in sorted(controls.items())]
    return {
        "curves": {name: sorted(points) for name, points in curves.items() if points},
        "errors": {name: [round(error, 5) for error in row.errors] for name, row in _shown(rows).items()},
    }


def _shown(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows whose steps are shown: those of SHOWN, where none was measured the first five."""
    return {name: rows[name] for name in SHOWN if name in rows} or dict(list(rows.items())[:5])


# --- the command ------------------------------------------------------------------------------------------------------


def section(engines: Engines, names: Sequence[str], requests: Sequence[Request]) -> tuple[list[str], dict[str, Any]]:
    """Measure the runs at one number of steps, printing line by line; the Markdown, and the chart's numbers."""
    plans = {name: _planned(engines, name, requests[0]) for name in names}
    engine = engines.of({})
    usual = engine.plan(requests[0])
    lines = [f"## {len(usual.steps)} steps, {usual.forwards} passes, {len(requests)} prompts", "", HEAD]
    lines.append("| --- |" + " --- |" * (HEAD.count("|") - 2))
    print("\n".join(lines), flush=True)
    full = [full_run(engine, request) for request in requests]
    controls: dict[int, float] = {}
    for count in sorted({count for plan in plans.values() if (count := control_steps(plan))}):
        fewer = [frames_of(engine, replace(request, num_steps=count)) for request in requests]
        controls[count] = fmean(psnr(frames, known.frames) for frames, known in zip(fewer, full, strict=True))
    rows: dict[str, Row] = {}
    measured: dict[Any, Row] = {}
    for name, plan in plans.items():
        # thresholds often come to the same steps
        same = replace(engines.config(RUNS[name]), step_cache=None, cfg_cache=None), RUNS[name].get("variant"), plan.steps
        if same not in measured:
            measured[same] = measure(engines.of(RUNS[name]), requests, full)
        rows[name] = measured[same]
        count = control_steps(plan)
        lines.append(line(name, rows[name], (count, controls[count]) if count else None))
        print(lines[-1], flush=True)
    more = ["", "By step:", "", *by_step(_shown(rows)), ""]
    print("\n".join(more))
    return [*lines, *more], numbers(rows, controls, usual.forwards / len(usual.steps))


def _planned(engines: Engines, name: str, request: Request) -> planning.Plan:
    """The plan of a row.

    Raises:
        WanFastError: it is refused; says of which row.
    """
    try:
        return planning.plan(engines.config(RUNS[name]), request)
    except WanFastError as error:
        raise WanFastError(f"run {name!r}: {error}") from None


ABOUT = """Written by `python -m bench.quality`.

Videos of {what} against those of the full run, {dtype} with nothing left out, of the same prompt and seed.

- passes: through the blocks, conditional and unconditional ones.
- PSNR, lowest, SSIM: of the frames; PSNR is the mean over the prompts, and the lowest that of the worst. SSIM is the mean over
  channels and frames, in windows of 11x11.
- fewer steps: what the same passes do without a cache, in a run of so many steps. Their PSNR is against the same full run, and
  the gain is what the row has above it.
- velocity error: at every step the row is given the latents that the full run has there, and its velocity after guidance is
  compared with the full run's, as relative L2 error; the mean over the steps and the largest, of the first {forced}
  prompts. What it reuses comes from those latents too, so that a step computed as in the full run has no error.
- latents: after the last step, of the row's own run: cosine, and PSNR over the range of the full run's.
- by step: what is computed (`#`), reused (`.`), reconstructed (`~`) of the conditional and the unconditional pass; velocity
  error; cosine and PSNR of the latents after the step.

`every:N`, `magcache` and so on are values of `--step-cache`, `difference:N` and so on of `--cfg-cache`; `cfg-zero` is another
guidance, so its distance is no error.
"""
ABOUT_8_BITS = """\
"On" a card is what a preset takes there, its 8 bits emulated in fp32; quality_8bit.md has those by themselves.
"""


_PROMPTS_AT = ", ".join(f"{number} of {steps} steps" for steps, number in STEPS.items())


def _parser() -> Parser:
    parser = Parser("python -m bench.quality", "What caches and 8 bits do to whole videos.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or patterns like 'magcache*'; default: all that apply")
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and do nothing")
    parser.add_argument("--prompts", type=int, metavar="N", help=f"take the first N; default: {_PROMPTS_AT}")
    parser.add_argument("--prompts_file", metavar="FILE", help="prompts, one per line; default: of tiny's kind")
    parser.add_argument(
        "--sample_steps", "--steps", type=int, nargs="+", metavar="N", help="denoising steps, one or more; default: the model's"
    )
    parser.add_argument("--ckpt_dir", default="tiny", metavar="PATH", help="folder, hub id, or tiny (default)")
    parser.add_argument("--task", default="ti2v-5B", help="task of the checkpoint (default ti2v-5B)")
    parser.add_argument("--device", help="auto, cuda, cuda:1 or cpu; default: cpu for tiny, else auto")
    parser.add_argument("--size", metavar="W*H", help="pixels; default: the model's")
    parser.add_argument("--frame_num", type=int, metavar="F", help="frames, 4n+1; default: the model's")
    parser.add_argument("--calibration", metavar="JSON", help="what wan-fast calibrate wrote; default: where the engine looks")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write quality.md and quality.png there")
    return parser


def selected(patterns: Sequence[str], on_card: bool) -> list[str]:
    """Names of the runs that patterns name; of none, those of caches, and where it is wanted the presets on a card.

    Raises:
        WanFastError: a pattern names no run.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in RUNS):
            close = get_close_matches(pattern, RUNS, 1)
            raise WanFastError(f"unknown run {pattern!r}; " + (f"did you mean {close[0]!r}?" if close else "see --list"))
    if patterns:
        return [name for name in RUNS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [*CACHED, *(ON_CARD if on_card else ())]


def _prompts(file: str | None) -> list[str]:
    if file is None:
        return PROMPTS
    try:
        found = [text.strip() for text in Path(file).read_text(encoding="utf-8").splitlines() if text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WanFastError(f"--prompts_file {file!r} cannot be read: {error}") from None
    if not found:
        raise WanFastError(f"--prompts_file {file!r} has no prompts; write one per line")
    return found


def run(parsed: argparse.Namespace) -> None:
    """Measure, print, and write where all of tiny was measured, or a folder is given."""
    tiny = parsed.ckpt_dir == "tiny"
    base = {"task": parsed.task, "checkpoint": parsed.ckpt_dir, "calibration": parsed.calibration}
    base["device"] = parsed.device or ("cpu" if tiny else "auto")
    prompts = _prompts(parsed.prompts_file)
    if parsed.prompts is not None and parsed.prompts < 1:
        raise WanFastError(f"--prompts must be 1 or more, got {parsed.prompts}")
    given = {"size": parsed.size and parse_size(parsed.size), "num_frames": parsed.frame_num}
    plain = planning.plan(EngineConfig(**base), Request(prompt=prompts[0], **given))
    steps = parsed.sample_steps or (list(STEPS) if tiny else [plain.request.num_steps])
    if parsed.out:
        parsed.out.mkdir(parents=True, exist_ok=True)

    def requests(count: int, number: int) -> list[Request]:
        some = prompts[: parsed.prompts or number]
        return [Request(prompt=text, seed=seed, num_steps=count, **given) for seed, text in enumerate(some)]

    work = [
        (selected(parsed.runs, tiny and count == steps[0]), requests(count, STEPS.get(count, min(STEPS.values()))))
        for count in steps
    ]
    device, engines = describe(base["device"]), Engines(base)
    whole = not any(value for name, value in vars(parsed).items() if name not in ("ckpt_dir", "task", "list")) and tiny
    with emulated() if device.type == "cpu" else nullcontext(), torch.inference_mode():
        for names, wanted in work:  # refused before anything is measured
            for name in names:
                _planned(engines, name, wanted[0])
        found = [section(engines, *each) for each in work]
    width, height = plain.request.size
    what = f"{'`tiny`' if tiny else parsed.task}, {width}x{height}x{plain.request.num_frames},"
    about = ABOUT.format(what=what, dtype=plain.dtype, forced=min(FORCED, len(work[0][1]))) + ("\n" + ABOUT_8_BITS) * tiny
    folder, pictures = (RESULTS, RESULTS / "charts") if whole else (parsed.out, parsed.out)
    if folder:
        charts.quality(pictures / "quality.png", {str(n): numbers for n, (_, numbers) in zip(steps, found, strict=True)})
        link = f"![PSNR against passes, and error by step]({(pictures / 'quality.png').relative_to(folder)})"
        text = "\n".join(["# Quality", "", about, link, "", *(line for lines, _ in found for line in lines)])
        (folder / "quality.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        parsed = _parser().parse_args(argv)
        if parsed.list:
            print("\n".join(RUNS))
        else:
            run(parsed)
    except WanFastError as error:
        print(f"bench.quality: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
