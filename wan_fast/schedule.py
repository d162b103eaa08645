"""The steps of a run as configured: the table of `steps`, with attention in 8 bits and caches where they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache as cache_of
from functools import partial

from wan_fast import calibration, manifest, skipping
from wan_fast.caches import StepCache
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import ATTENTION_8BIT, EngineConfig, Resolved
from wan_fast.errors import WanFastError
from wan_fast.skipping import FEW_STEPS, SIGNALS, Known
from wan_fast.steps import Step, in_8_bits, step_plan

# what a preset's cache may lack, and leave out
_WITHOUT = "--quality takes no {} here: {}"


def schedule(
    config: EngineConfig, request: Resolved, opened: Checkpoint | None, dims: manifest.DiTDims, preset: Collection[str] = ()
) -> tuple[tuple[Step, ...], list[str]]:
    """The steps, and what there is to say about them.

    Args:
        config: the engine, without a preset.
        request: the video, of final size.
        opened: the checkpoint; None where it is not here yet.
        dims: of an expert.
        preset: fields that a preset filled: what cannot be done of these is left out.

    Raises:
        WanFastError: something asked for does not fit the run or the model.
    """
    steps = step_plan(config.spec, request.solver, request.num_steps, request.shift, request.guidance_scale)
    steps = skipping.without_guidance(steps)
    if config.attention in ATTENTION_8BIT:
        keep = config.keep_steps or (0, 0)
        if sum(keep) >= len(steps):
            raise WanFastError(
                f"--keep_steps {keep[0]},{keep[1]} leaves none of {len(steps)} steps in 8 bits; take smaller numbers, or "
                "--attention auto"
            )
        steps = in_8_bits(steps, keep)
    zero, (step_cache, cfg_cache) = config.cfg_zero or 0, config.caches
    if zero >= len(steps):
        raise WanFastError(
            f"--cfg-zero {zero} leaves none of {len(steps)} steps to compute; take a smaller number, 2 of 50 say"
        )
    said: list[str] = []
    guided = any(step.unconditional != "none" for step in steps)
    if not guided and cfg_cache and "cfg_cache" not in preset:
        raise WanFastError(
            f"--cfg-cache {config.cfg_cache}: the guidance scale is 1, there is no unconditional pass to save; leave it out"
        )
    if not guided and config.cfg_zero == 0:
        raise WanFastError("--cfg-zero 0: the guidance scale is 1, there is nothing to scale; leave it out")
    by_branch = None
    if step_cache:
        try:
            by_branch, said = _rules(config, request, step_cache, steps, opened, dims)
        except WanFastError as error:
            if "step_cache" not in preset:
                raise
            said = [_WITHOUT.format("step cache", str(error).removeprefix("--step-cache "))]
    return skipping.with_caches(steps, by_branch, cfg_cache if guided else None, zero), said


def _rules(
    config: EngineConfig,
    request: Resolved,
    cache: StepCache,
    steps: tuple[Step, ...],
    opened: Checkpoint | None,
    dims: manifest.DiTDims,
) -> tuple[dict[str, skipping.Rule] | None, list[str]]:
    if cache.kind in ("mask", "every"):
        known = Known(calibration=None, distances=lambda signal: [])
    else:
        found, others, file = _calibration(config, request, opened, dims)
        known = Known(calibration=found, distances=cache_of(partial(_distances, opened, steps)), others=others)
    if cache.kind != "mask" and len(steps) <= FEW_STEPS:
        raise WanFastError(
            f"--step-cache {config.step_cache} is not for {len(steps)} steps: of {FEW_STEPS} or fewer each differs too much "
            "from the last; leave it out, or write a mask"
        )
    if cache.kind in SIGNALS and opened is None:
        return None, [
            f"--step-cache {config.step_cache} depends on the checkpoint's time embedding: until that is here, all steps are "
            "shown as computed"
        ]
    said = []
    if cache.kind not in ("mask", "every") and others and cache.kind != "searched":
        where = f"{str(file)!r}" if file else "the published data"
        said = [f"{where} for --step-cache {cache.kind} is of {', '.join(others)}; wan-fast calibrate makes some for this run"]
    return skipping.rules(cache, steps, known), said


def _calibration(
    config: EngineConfig, request: Resolved, opened: Checkpoint | None, dims: manifest.DiTDims
) -> tuple[calibration.Calibration | None, list[str], object]:
    """The nearest one, what of it is of another run, and its file; None of a published one."""
    wanted = calibration.Wanted(
        task=config.task,
        num_steps=request.num_steps,
        shift=request.shift,
        size=request.size,
        num_frames=request.num_frames,
        image=request.image is not None,
    )
    entries: list[calibration.Calibration] = []
    file = None
    if opened or config.calibration:
        place = opened.path if opened else None
        entries, file = calibration.own(place, fingerprint(dims, config.spec.experts), config.calibration)
    found, others = calibration.best(entries or calibration.published(config.task), wanted)
    return found, others, file


def fingerprint(dims: manifest.DiTDims, experts: Collection[str]) -> str:
    """What tells one model from another, in words."""
    many = f"{len(experts)} experts of " if len(experts) > 1 else ""
    return f"{many}{dims.num_layers} blocks, width {dims.dim}, {dims.in_dim} to {dims.out_dim} channels"


def _distances(opened: Checkpoint | None, steps: tuple[Step, ...], signal: str) -> list[float]:
    from wan_fast.distances import time_distances  # torch; only TeaCache needs it

    assert opened is not None
    return time_distances(signal, opened.experts, steps)
