"""The host's part of a denoising step, on a CPU: milliseconds of bookkeeping, and operators that go through the dispatcher.

`python -m bench.graphs --device cpu` writes it; `bench.host_loop` counts the loop's instructions, which no noise trips.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.graphs import CACHES, Denoising, planned
from bench.networks import FP32, make_dit
from wan_fast.branches import Branches
from wan_fast.config import Request
from wan_fast.manifest import DiTDims
from wan_fast.planning import Plan, plan
from wan_fast.sampler import denoise, directly
from wan_fast.schedule import sampler_of, schedule
from wan_fast.setup import Models, set_up
from wan_fast.solver import Solver
from wan_fast.steps import step_plan

# seconds per step wanted of the host's bookkeeping, on a CPU
WANTED = 0.5e-3
# what has no kernel of its own
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Still:
    """Stands in for a DiT: its velocity is at hand."""

    def __init__(self, dims: DiTDims, velocity: Tensor) -> None:
        self.dims, self.velocity = dims, velocity[None]
        self.patch_embedding = SimpleNamespace(weight=velocity)

    def prepare(self, text: Any, grid: Any, inputs: Any = None, *, like: Any = None) -> Any:
        return SimpleNamespace(grid=grid, channels=None, tensors=tuple)

    def __call__(self, *args: Any, **settings: Any) -> Tensor:
        return self.velocity

    resume = __call__


def bookkeeping(todo: Plan, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Seconds per step in which there is no model, median, lowest and highest of `repeats` clips: of the whole loop, of the
    loop without the solver's step, of `load` alone, and of the solver's step alone."""
    still = Still(DiTDims.of_task(todo.config.spec), torch.randn(todo.latent_shape))
    solver = Solver(todo.steps, torch.randn(todo.latent_shape))
    text = dict.fromkeys(("conditional", "unconditional"), torch.empty(0))
    branches = Branches(todo.steps, lambda name: still, text, 0, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    velocity = still.velocity[0]

    def load() -> None:
        for step in todo.steps:
            branches.load(step)
            solver.load(step)

    def advance() -> None:
        for step in todo.steps:
            solver.advance(velocity, None if step.unconditional == "none" else velocity)

    other = Solver(todo.steps, solver.latents)
    other.advance = lambda *velocities: None  # type: ignore[method-assign]
    parts: dict[str, Callable[[], Any]] = {
        "loop": partial(denoise, todo.steps, branches, solver),
        "without solver": partial(denoise, todo.steps, branches, other),
        "load": load,
        "solver": advance,
    }
    with torch.inference_mode():
        return {name: _per(len(todo.steps), part, repeats) for name, part in parts.items()}


def planning(todo: Plan, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Seconds per step that planning takes: the table of steps alone, with caches, and the whole plan of a request."""
    config, request = todo.config, todo.request
    setup = set_up(config)
    dims = next(iter(Models.of(config.spec, todo.checkpoint).experts.values()))
    asked = Request(prompt="a cat", size=request.size, num_frames=request.num_frames, num_steps=request.num_steps, seed=0)
    parts: dict[str, Callable[[], Any]] = {
        "step_plan": lambda: step_plan(config.spec, sampler_of(request), request.guidance_scale),
        "schedule": lambda: schedule(config, request, todo.checkpoint, dims),
        "plan": lambda: plan(config, asked, setup),
    }
    return {name: _per(len(todo.steps), part, repeats) for name, part in parts.items()}


def _per(count: int, call: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) / count)
    return median(taken), min(taken), max(taken)


class Dispatched(TorchDispatchMode):
    """Counts what goes through the dispatcher, by the part of a step that asked for it; of our operators what is inside one is
    not seen, as on a GPU it is one kernel, or a few. `counts`: (part, whether it only makes a view or takes memory) -> number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "loop"
        self.counts: Counter[tuple[str, bool]] = Counter()

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose operators are counted as that part's."""

        def call(*args: Any, **settings: Any) -> Any:
            before, self.part = self.part, part
            try:
                return function(*args, **settings)
            finally:
                self.part = before

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns, arguments = func._schema.returns, func._schema.arguments
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in arguments)
        view = bool(returns) and not writes and all(value.alias_info is not None for value in returns)
        self.counts[self.part, view or func._schema.name.partition("::")[2] in ALLOCATES] += 1
        return func(*args, **(kwargs or {}))


PARTS = ("rows", "model", "caches", "solver")


def dispatches(todo: Plan) -> dict[tuple[str, ...], dict[str, tuple[float, float]]]:
    """Kind of step -> part -> operators per step, and beside them views and allocations; of a clip after the first."""
    dims = Models.of(todo.config.spec, todo.checkpoint).experts["model"]
    parts = make_dit(dims, todo.latent_shape, FP32, torch.device("cpu"))
    clip = Denoising(todo, parts, torch.randn(todo.latent_shape))
    clip.whole(directly)
    mode, branches, solver = Dispatched(), clip.branches, clip.solver
    for owner, name, part in (
        (branches, "load", "rows"),
        (solver, "load", "rows"),
        (branches, "predicted", "model"),
        (branches, "velocities", "caches"),
        (solver, "advance", "solver"),
    ):
        setattr(owner, name, mode.of(part, getattr(owner, name)))
    found: dict[tuple[str, ...], Counter[tuple[str, bool]]] = {}

    def take(step: Any) -> None:
        found.setdefault(step.kind, Counter()).update(mode.counts)
        mode.counts.clear()

    solver.start(todo.steps, clip.noise)
    with mode:
        denoise(todo.steps, branches, solver, on_step=take)
    often: Counter[tuple[str, ...]] = Counter(step.kind for step in todo.steps)
    return {
        kind: {part: (counts[part, False] / often[kind], counts[part, True] / often[kind]) for part in PARTS}
        for kind, counts in found.items()
    }


def on_a_cpu(
    add: Callable[..., None], *, repeats: int = 200, num_steps: int = 50, video: tuple[int, int, int] = (128, 128, 33)
) -> None:
    """Give `add` lines of markdown on a run of tiny."""
    cpu = torch.device("cpu")
    frequency = {**CACHES, "cfg_cache": "frequency:3,0.1"}
    kinds: dict[str, dict[str, Any]] = {"no caches": {}, "both caches": CACHES, "both, in two bands": frequency}
    plans = {name: planned("ti2v-5B", "tiny", video, num_steps, cpu, **options) for name, options in kinds.items()}
    said = [" ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()) for options in kinds.values()]
    add(
        f"## The host's bookkeeping: {num_steps} steps of {'x'.join(map(str, video))}, tiny, fp32",
        "",
        "A model that does nothing, through the loop, the rows of the plan, the caches and the solver; milliseconds per step,",
        f"median of {repeats} clips, in brackets the lowest and highest. The solver's step is arithmetic on the latents, which",
        "a GPU does by itself in one launch; so is what the caches do with the two velocities. Others may have used the",
        f"machine: its load average was {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors at the beginning.",
        "",
        "| caches | the whole loop | without the solver's step | `load` alone | the solver's step alone |",
        "| --- " * 5 + "|",
    )
    slowest = [0.0, 0.0]
    for name, options in zip(plans, said, strict=True):
        found = bookkeeping(plans[name], repeats)
        slowest = [max(slowest[0], found["loop"][0]), max(slowest[1], found["without solver"][0])]
        add(f"| {name}{f' (`{options}`)' if options else ''} | " + " | ".join(map(_ms, found.values())) + " |")
    verdicts = [f"{value * 1e3:.3f} ms, {'reached' if value <= WANTED else 'not reached'}" for value in slowest]
    add(
        "",
        f"{WANTED * 1e3:g} ms or less is wanted per step. The slowest of these: the whole loop {verdicts[0]};",
        f"without the solver's step {verdicts[1]}.",
        "",
    )
    add(
        "Planning, milliseconds per step planned:",
        "",
        "| caches | `steps.step_plan` | `schedule.schedule` | `planning.plan` |",
        "| --- | --- | --- | --- |",
    )
    for name, todo in plans.items():
        add(f"| {name} | " + " | ".join(map(_ms, planning(todo, max(repeats // 10, 3)).values())) + " |")
    add(
        "",
        "## What a graph would replace: operators dispatched per step, counted on a CPU",
        "",
        "These are not launches: an operator of ours is one here and a kernel or a few on a GPU, one of PyTorch's may be more.",
        "Views and allocations, which launch nothing but take the host's time, stand behind the +. A replay leaves `rows` and",
        "one launch.",
        "",
        f"| kind of step (conditional, unconditional) | {' | '.join(PARTS)} | all |",
        "| --- " * (len(PARTS) + 2) + "|",
    )
    seen: set[tuple[str, ...]] = set()
    with torch.inference_mode():
        for name, todo in plans.items():
            for kind, by_part in dispatches(todo).items():
                kept = by_part["caches"][0] > 0
                label = (*kind[1:3], ("in two bands" if "bands" in name else "with the difference") if kept else "")
                if label in seen:
                    continue
                seen.add(label)
                both = [*by_part.values(), tuple(map(sum, zip(*by_part.values(), strict=True)))]
                cells = " | ".join(f"{operators:.4g} + {views:.4g}" for operators, views in both)
                add(f"| {', '.join(filter(None, label))} | {cells} |")
    add("")


def _ms(found: tuple[float, float, float]) -> str:
    return f"{found[0] * 1e3:.3f} ({found[1] * 1e3:.3f} to {found[2] * 1e3:.3f})"
