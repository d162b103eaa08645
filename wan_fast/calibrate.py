"""`wan-fast calibrate`: records on a few prompts what step caches must know of a model, and searches masks.

Every prompt is run once with nothing left out. Of the block stack's residual r, its output less its input, are kept, per step
and branch, the mean over tokens of |r| / |r of the step before| (MagCache) and mean |r - r before| / mean |r before|, to which
a polynomial of the time embeddings' distance is fitted (TeaCache).

The search has besides the error of the guided velocity for every pair of a step and a residual of up to `GAP` steps earlier,
and, from runs that reuse a single step, what such an error does to the final latents. The mask with the least sum of errors so
weighed is a shortest path (compare arXiv 2511.00090); it, MagCache's and TeaCache's are then run, and the best is kept.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, inf, log, log10
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_fast import calibration, manifest, skipping
from wan_fast import checkpoint as checkpoints
from wan_fast.branches import Branches
from wan_fast.caches import StepCache
from wan_fast.calibration import BRANCHES, Calibration
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.distances import time_distances
from wan_fast.engine import Engine, Progress
from wan_fast.planning import Plan, plan
from wan_fast.recording import Recording
from wan_fast.schedule import fingerprint
from wan_fast.setup import set_up
from wan_fast.skipping import FEW_STEPS, SIGNALS, Known
from wan_fast.steps import Step
from wan_fast.video import whole

# steps that the search lets reuse one residual at most
GAP = 6
# steps of which the search reuses one alone
PROBES = 8
# shares of the steps that are tried: for the curve alone, and by the search
CURVE = (0.65, 0.5, 0.35)
SHARES = (0.8, 0.65, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
# MagCache's own limits, and a threshold at half of the steps: what a calibration takes where nothing is asked for
_LIMITS = {"max_skips": 2, "retention": 0.2}


@dataclass(frozen=True, slots=True)
class Point:
    """Of the curve: passes, and PSNR in dB of the final latents against the run with all of them."""

    name: str
    forwards: int
    psnr: float


class Recorder(Branches):
    """Computes all there is, and adds to `record` what it sees; reads back from the device, which no other run does."""

    def __init__(self, record: Record, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.keeps = dict.fromkeys(BRANCHES, True)
        self.record = record
        self.before: dict[str, list[tuple[Step, Tensor]]] = {branch: [] for branch in BRANCHES}

    def velocities(self, step: Step, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        exact = super().velocities(step, latents)
        if self.record.search:
            self._try_earlier(step, latents, exact)
        for branch in BRANCHES if exact[1] is not None else BRANCHES[:1]:
            now, past = self.residuals[branch], self.before[branch]
            if past and past[-1][0].expert == step.expert:
                last = past[-1][1].to(now.device)
                lengths = now.float().norm(dim=-1) / last.float().norm(dim=-1)
                change = (now - last).float().abs().mean() / last.float().abs().mean()
                self.record.add(branch, step.index, lengths.mean().item(), change.item())
            kept = GAP if self.record.search else 1
            # on the host: a window of residuals is several times the model's own working memory
            self.before[branch] = [*past, (step, now.cpu() if now.device.type != "cpu" else now.clone())][-kept:]
        return exact

    def _try_earlier(self, step: Step, latents: Tensor, exact: tuple[Tensor, Tensor | None]) -> None:
        """Record the error of the guided velocity with each earlier residual that is kept."""
        model, timestep, wanted = self.expert(step.expert), self.timestep, guided(step, *exact)
        for n, (source, _) in enumerate(self.before["conditional"]):
            if source.expert != step.expert:
                continue
            found = []
            for branch in BRANCHES if exact[1] is not None else BRANCHES[:1]:
                residual = self.before[branch][n][1].to(latents.device)
                context = self.context(model, step.expert, branch, latents)
                found.append(model.resume(latents[None], timestep, residual, context, split=self.split)[0])
            error = guided(step, found[0], found[1] if len(found) > 1 else None) - wanted
            self.record.errors[source.index, step.index] += error.square().mean().sqrt().item()


def guided(step: Step, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
    """[C, T, H, W] the velocity of both branches."""
    return conditional if unconditional is None else unconditional + step.guidance_scale * (conditional - unconditional)


class Record:
    """Sums over prompts. ratios, changes: branch -> step -> value. errors: (step of the residual, step) -> RMS."""

    def __init__(self, search: bool) -> None:
        self.search = search
        self.ratios: dict[str, defaultdict[int, float]] = {branch: defaultdict(float) for branch in BRANCHES}
        self.changes: dict[str, defaultdict[int, float]] = {branch: defaultdict(float) for branch in BRANCHES}
        self.errors: defaultdict[tuple[int, int], float] = defaultdict(float)

    def add(self, branch: str, index: int, ratio: float, change: float) -> None:
        self.ratios[branch][index] += ratio
        self.changes[branch][index] += change


def calibrate(
    config: EngineConfig, request: Request, recording: Recording, *, on_progress: Progress | None = None
) -> tuple[Path, Calibration, list[Point]]:
    """Record, fit, search and write; returns the file, what was found, and the curve, drawn where it is wanted.

    Args:
        config: the engine, with caches off.
        request: the run; its prompt is replaced by each of the prompts.
        recording: prompts, search and files.
        on_progress: as of an engine.

    Raises:
        WanFastError: a run cannot be carried out, or a file not written.
    """
    if config.spec.image_guidance_scale is not None:
        raise WanFastError(
            f"calibration is of one guidance scale and a checkpoint's own DiT, and {config.task} has two, and a DiT beside it; "
            "take --step-cache every:2, or a mask"
        )
    texts = recording.texts()
    path = checkpoints.locate(config.checkpoint, config.spec)
    assert path is not None  # or it raised
    target = Path(recording.out) if recording.out else _place(path)
    picture = None if recording.curve == "off" else Path(recording.curve or target.with_suffix(".png"))
    if picture:
        _need_matplotlib()
    requests = [replace(request, prompt=text, seed=seed) for seed, text in enumerate(texts)]
    if config.cuda_graphs:
        raise WanFastError("--cuda-graphs is not for calibration, which reads every step back; leave it out")
    config = replace(config, checkpoint=str(path))
    setup = set_up(config)
    todo = plan(config, requests[0], setup)
    if todo.forwards != todo.forwards_uncached:
        raise WanFastError("calibration is of runs with nothing left out; leave out the caches, CFG-Zero* and the preset")
    if len(todo.steps) <= FEW_STEPS:
        raise WanFastError(
            f"--sample_steps {len(todo.steps)}: of {FEW_STEPS} steps or fewer none is reused; give the number that you run"
        )
    # residuals of both branches are kept: with a mask they are in the memory plan
    keeping = replace(config, step_cache="#." + "#" * (len(todo.steps) - 2), cuda_graphs=False)
    plan(keeping, requests[0], setup)
    opened = todo.checkpoint
    assert opened is not None
    model = fingerprint(_dims(todo), config.spec.experts)
    others = calibration.read(target, model) if target.is_file() else []
    engine = Engine(keeping, request=requests[0], on_progress=on_progress)
    engine.config = replace(engine.config, step_cache=None)
    todo = engine.plan(requests[0])
    record = Record(recording.search)
    engine.workspace.branches = partial(Recorder, record)
    full = [engine.latents(engine.plan(each), on_progress=on_progress) for each in requests]
    engine.workspace.branches = Branches
    signals = {signal: time_distances(signal, opened.experts, todo.steps) for signal in SIGNALS.values()}
    found = fitted(record, todo, signals, len(texts))
    trials = Trials(engine, requests if recording.search else requests[:1], full, on_progress)
    shares = SHARES if recording.search else CURVE if picture else ()
    masks = by_rule(todo, Known(calibration=found, distances=signals.__getitem__), shares)
    if recording.search:
        masks["shortest path"] = shortest_paths(record, todo.steps, trials.gains(todo, record), shares)
        found = replace(found, masks=trials.best(masks))
    calibration.write(target, model, [found, *(entry for entry in others if not _same_run(entry, found))])
    points = trials.points(todo, masks) if picture else []
    if picture:
        draw(points, picture)
    return target, found, points


def fitted(record: Record, todo: Plan, signals: Mapping[str, Sequence[float]], prompts: int) -> Calibration:
    """What was recorded, as step caches read it; `signals`: distances of the time embeddings, by signal and step."""
    steps, request = todo.steps, todo.request
    seen = [branch for branch in BRANCHES if record.ratios[branch]]  # without guidance the conditional one alone
    magcache: dict[str, Any] = {**_LIMITS, "threshold": 0.0}
    for branch in BRANCHES:
        own = record.ratios[branch if branch in seen else seen[0]]
        # the first step of an expert has none before it, and is always computed
        magcache[branch] = [round(own.get(step.index, prompts) / prompts, 5) for step in steps[1:]]
    teacache: dict[str, dict[str, Any]] = {signal: {"threshold": 0.0} for signal in signals}
    for expert in dict.fromkeys(step.expert for step in steps):
        known = [i for i in record.changes[seen[0]] if steps[i].expert == expert]
        changes = [sum(record.changes[branch][i] for branch in seen) / len(seen) / prompts for i in known]
        for signal, distances in signals.items():
            teacache[signal][expert] = _polynomial([distances[i] for i in known], changes)
    found = Calibration(
        model=todo.config.task,
        tasks=[todo.config.task],
        num_steps=len(steps),
        shift=request.shift,
        solver=request.solver,
        magcache=magcache,
        teacache=teacache,
        size=list(request.size),
        num_frames=todo.framing.clip_frames,
        image=request.image is not None,
        guidance_scale=list(request.guidance_scale),
        loras=[str(lora) for lora in todo.config.loras if lora.strength],
        prompts=prompts,
    )
    known_ = Known(calibration=found, distances=signals.__getitem__)
    magcache["threshold"] = _threshold("magcache", steps, known_)
    for kind, signal in SIGNALS.items():
        teacache[signal]["threshold"] = _threshold(kind, steps, known_)
    return found


def _threshold(kind: str, steps: Sequence[Step], known: Known) -> float:
    """At which about half of the steps are computed, or as few as there can be."""
    for percent in range(50, 100, 5):
        try:
            rule = skipping.rules(StepCache.parse(f"{kind}:{percent}%"), steps, known)["conditional"]  # type: ignore[arg-type]
        except WanFastError:
            continue
        return float(f"{rule.threshold:.4g}")  # type: ignore[attr-defined]
    return 0.05


def _polynomial(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Least squares, of degree 4 or of what the points allow; highest power first."""
    import numpy as np

    if len(x) < 2:
        return [float(np.mean(y)) if len(y) else 1.0]
    degree = min(4, len(x) // 3, len({*x}) - 1)
    return [float(f"{c:.9g}") for c in np.polyfit(np.array(x), np.array(y), degree)]


def by_rule(todo: Plan, known: Known, shares: Sequence[float]) -> dict[str, list[str]]:
    """Rule -> its masks at shares of the steps, those it can reach."""
    masks: dict[str, list[str]] = {"magcache": [], "teacache": []}
    for kind, own in masks.items():
        for share in shares:
            try:
                rules = skipping.rules(StepCache(kind=kind, share=share), todo.steps, known)
            except WanFastError:
                continue
            own.append(skipping.computed_mask(rules.values(), todo.steps))
    return masks


class Trials:
    """Runs of masks on the prompts, each once: mask -> PSNR of the final latents against the full runs', mean over prompts."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], full: Sequence[Tensor], on_progress: Progress | None
    ) -> None:
        self.engine, self.requests, self.full, self.on_progress = engine, requests, full, on_progress
        self.psnr: dict[str, float] = {}

    def run(self, mask: str) -> float:
        if mask not in self.psnr:
            self.psnr[mask] = self._mean([_masked(self.engine.plan(request), mask) for request in self.requests])
        return self.psnr[mask]

    def fewer(self, num_steps: int) -> tuple[int, float]:
        """Passes and PSNR of runs of so many steps, all computed."""
        plans = [self.engine.plan(replace(request, num_steps=num_steps)) for request in self.requests]
        return plans[0].forwards, self._mean(plans)

    def gains(self, todo: Plan, record: Record) -> dict[int, float]:
        """Step -> RMS of the final latents' error per the record's error of its velocity, from runs that reuse it alone."""
        able = sorted({*range(len(todo.steps))} - {*skipping.forced(todo.steps)})
        gains = {}
        for i in able[:: max(1, len(able) // PROBES)]:
            mask = "#" * i + "." + "#" * (len(todo.steps) - i - 1)
            error = self.engine.latents(_masked(todo, mask), on_progress=self.on_progress) - self.full[0]
            gains[i] = error.square().mean().sqrt().item() / max(record.errors[i - 1, i], 1e-12)
        return gains

    def best(self, masks: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """The masks that none with as many computed steps or fewer is better than, from the most steps to the fewest."""
        best: list[str] = []
        for mask in sorted(
            {mask for own in masks.values() for mask in own}, key=lambda mask: (mask.count("#"), -self.run(mask))
        ):
            if not best or self.run(mask) > self.run(best[-1]):
                best.append(mask)
        return [{"mask": mask, "psnr": round(self.run(mask), 2)} for mask in reversed(best)]

    def points(self, todo: Plan, masks: Mapping[str, Sequence[str]]) -> list[Point]:
        """Every mask, and as many passes in fewer steps."""
        points = [
            Point(name, _masked(todo, mask).forwards, self.run(mask))
            for name, own in masks.items()
            for mask in dict.fromkeys(own)
        ]
        per_step = todo.forwards / len(todo.steps)
        counts = sorted({round(point.forwards / per_step) for point in points}, reverse=True)
        return points + [Point("fewer steps", *self.fewer(count)) for count in counts]

    def _mean(self, plans: Sequence[Plan]) -> float:
        found = [
            psnr(self.engine.latents(p, on_progress=self.on_progress), full) for p, full in zip(plans, self.full, strict=False)
        ]
        return sum(found) / len(found)


def _masked(todo: Plan, mask: str) -> Plan:
    return replace(todo, steps=skipping.with_caches(todo.steps, {branch: skipping.Mask(mask) for branch in BRANCHES}, None))


def shortest_paths(record: Record, steps: Sequence[Step], gains: Mapping[int, float], shares: Sequence[float]) -> list[str]:
    """For each share of the steps the mask of the least sum of errors of the final latents."""
    N, always = len(steps), set(skipping.forced(steps))

    def cost(source: int, step: int) -> float:
        """What a step that takes this residual adds to the error."""
        total = record.errors.get((source, step))
        return inf if total is None else total * _between(gains, step)

    # least[count][i]: of the masks of steps 0 .. i that end with a computed step
    least: list[dict[int, tuple[float, str]]] = [{}, {0: (0.0, "#")}]
    for _ in range(2, N + 1):
        row: dict[int, tuple[float, str]] = {}
        for last, (error, mask) in least[-1].items():
            total = error
            for i in range(last + 1, N):
                if total < row.get(i, (inf, ""))[0]:
                    row[i] = total, mask + "." * (i - last - 1) + "#"
                if i in always:
                    break
                total += cost(last, i)
        least.append(row)
    counts = sorted({int(share * N + 1e-9) for share in shares}, reverse=True)
    return [least[count][N - 1][1] for count in counts if N - 1 in least[count]]


def _between(known: Mapping[int, float], i: int) -> float:
    """A value at i from those that are known, on a logarithmic scale; beyond them the nearest."""
    below, above = max((k for k in known if k <= i), default=min(known)), min((k for k in known if k >= i), default=max(known))
    part = (i - below) / (above - below) if above != below else 0.0
    return exp(log(known[below] + 1e-30) * (1 - part) + log(known[above] + 1e-30) * part)


def psnr(latents: Tensor, full: Tensor) -> float:
    """dB, of the range that the full run's latents have; at most 100."""
    noise = (latents - full).double().square().mean().item()
    span = (full.max() - full.min()).item()
    return min(100.0, 10 * log10(span**2 / noise)) if noise else 100.0


def draw(points: Sequence[Point], file: Path) -> None:
    """The curve as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name in dict.fromkeys(point.name for point in points):
        own = sorted((point.forwards, point.psnr) for point in points if point.name == name)
        axis.plot(*zip(*own, strict=True), "o-" if name != "fewer steps" else "s--", label=name)
    axis.set(xlabel="passes through the blocks", ylabel="PSNR of the latents against all passes, dB")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    with whole(file) as scratch:
        figure.savefig(scratch, format="png")


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise WanFastError(
            "the curve is drawn with matplotlib, which is not installed; pip install matplotlib, or add --curve off"
        )


def _place(checkpoint: Path) -> Path:
    """Beside the checkpoint, unless it cannot be written to or is not the user's own: a cache's, or part of this package."""
    package = Path(__file__).resolve().parent
    foreign = "snapshots" in checkpoint.parts or checkpoint.resolve().is_relative_to(package)
    return (
        calibration.in_user_cache(checkpoint)
        if foreign or not os.access(checkpoint, os.W_OK)
        else checkpoint / calibration.FILE
    )


def _same_run(a: Calibration, b: Calibration) -> bool:
    """Whether one takes the place of the other."""
    what = ("num_steps", "shift", "solver", "num_frames", "image")
    one, other = ([*(getattr(each, name) for name in what), *(each.size or ()), *each.loras] for each in (a, b))
    return one == other


def _dims(todo: Plan) -> manifest.DiTDims:
    assert todo.checkpoint is not None
    part = next(iter(todo.checkpoint.experts.values()))
    return manifest.DiTDims.of_shapes(part.shapes, part.config)
