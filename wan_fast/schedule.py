"""The steps of a run as configured: the table of `steps`, with attention in 8 bits and caches where they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache as once
from functools import partial

from wan_fast import calibration, few_steps, manifest, skipping
from wan_fast.caches import StepCache
from wan_fast.calibration import Calibration, Wanted
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import ATTENTION_8BIT, EngineConfig
from wan_fast.errors import WanFastError
from wan_fast.few_steps import Sampler
from wan_fast.resolving import Resolved
from wan_fast.skipping import FEW_STEPS, SIGNALS, Known
from wan_fast.steps import Step, in_8_bits, official, step_plan

_TOO_FEW = f"is not for {{}} steps: of {FEW_STEPS} or fewer each differs too much from the last"
# for rules that are no measured ones
NOTHING = Known(calibration=None, distances=lambda signal: [])


def sampler_of(request: Resolved) -> Sampler:
    """How a request is sampled."""
    if request.preset is not None:
        return few_steps.sampler(request.preset, request.num_steps, request.shift)
    return official(request.solver, request.num_steps, request.shift)


def schedule(
    config: EngineConfig, request: Resolved, opened: Checkpoint | None, dims: manifest.DiTDims, preset: Collection[str] = ()
) -> tuple[tuple[Step, ...], str, list[str]]:
    """The steps, in words what the step cache is, and what there is to warn of.

    Args:
        config: the engine, without a preset.
        request: the video, of final size.
        opened: the checkpoint; None where it is not here yet.
        dims: of an expert.
        preset: fields that a preset filled: what cannot be done of these is left out.

    Raises:
        WanFastError: something asked for does not fit the run or the model.
    """
    by_pictures = request.image_guidance_scale if request.two_scales else None
    steps = skipping.without_guidance(step_plan(config.spec, sampler_of(request), request.guidance_scale, by_pictures))
    if config.attention in ATTENTION_8BIT:
        keep = config.keep_steps or (0, 0)
        if sum(keep) >= len(steps):
            raise WanFastError(
                f"--keep_steps {keep[0]},{keep[1]} leaves none of {len(steps)} steps in 8 bits; take smaller numbers, or "
                "--attention auto"
            )
        steps = in_8_bits(steps, keep)
    zero, (step_cache, cfg_cache), dropped = config.cfg_zero or 0, config.caches, False
    if request.preset or request.solver == "lcm":
        what = f"--preset {request.preset}" if request.preset else "--sample_solver lcm"
        given = (("--step-cache", step_cache and "step_cache" not in preset), ("--cfg-cache", cfg_cache), ("--cfg-zero", zero))
        for flag, asked in given:
            if asked:
                raise WanFastError(
                    f"{flag} does not go with {what}: each of its few steps is far from the last, and none has guidance; "
                    "leave it out"
                )
        dropped, step_cache = bool(step_cache), None
    for flag, value in (("--cfg-cache", config.cfg_cache if cfg_cache else None), ("--cfg-zero", config.cfg_zero)):
        if request.two_scales and value is not None:
            raise WanFastError(
                f"{flag} {value} is for one guidance scale, got {request.guidance_scale[0]:g} by the text and {by_pictures:g} "
                "by the pictures; leave it out, or give both the same"
            )
    if zero >= len(steps):
        raise WanFastError(
            f"--cfg-zero {zero} leaves none of {len(steps)} steps to compute; take a smaller number, 2 of 50 say"
        )
    if all(step.unconditional == "none" for step in steps):
        if cfg_cache:
            raise WanFastError(
                f"--cfg-cache {config.cfg_cache}: the guidance scale is 1, there is no unconditional pass to save; leave it out"
            )
        if config.cfg_zero == 0:
            raise WanFastError("--cfg-zero 0: the guidance scale is 1, there is nothing to scale; leave it out")
    if cfg_cache and len(steps) <= FEW_STEPS:
        raise WanFastError(f"--cfg-cache {config.cfg_cache} {_TOO_FEW.format(len(steps))}; leave it out")
    if config.calibration and (step_cache is None or step_cache.kind in ("mask", "every")):
        raise WanFastError(
            f"--calibration {str(config.calibration)!r} is for measured step caches; add --step-cache auto, or leave it out"
        )
    model = fingerprint(dims, config.spec.experts)
    entries = calibration.own(opened.path if opened else None, model, config.calibration) if step_cache else []
    by_branch, words = None, ""
    warnings = ["--quality takes no step cache here: each step of a distilled model is far from the last"] if dropped else []
    if step_cache:
        try:
            by_branch, words, warnings = _rules(config, request, step_cache, steps, opened, entries, model)
        except WanFastError as error:
            if "step_cache" not in preset:
                raise
            warnings = [f"--quality takes no step cache here: {str(error).removeprefix('--step-cache ')}"]
    made = skipping.with_caches(steps, by_branch, cfg_cache, zero)
    if by_branch and not any(step.conditional == "reuse" for step in made):
        warnings.append(f"--step-cache {config.step_cache} leaves out no step of this run")
    if cfg_cache and not any(step.unconditional == "reconstruct" for step in made):
        warnings.append(f"--cfg-cache {config.cfg_cache} leaves out no pass of this run")
    return made, words, warnings


def _rules(
    config: EngineConfig,
    request: Resolved,
    asked: StepCache,
    steps: tuple[Step, ...],
    opened: Checkpoint | None,
    entries: Sequence[Calibration],
    model: str,
) -> tuple[dict[str, skipping.Rule] | None, str, list[str]]:
    """The rules, in words what they are, and warnings. `entries`: the checkpoint's own calibrations."""
    if asked.kind == "mask":
        return skipping.rules(asked, steps, NOTHING), "mask", []
    if len(steps) <= FEW_STEPS:
        raise WanFastError(f"--step-cache {config.step_cache} {_TOO_FEW.format(len(steps))}; leave it out, or write a mask")
    if asked.kind == "every":
        return skipping.rules(asked, steps, NOTHING), f"every:{asked.every}", []
    wanted = Wanted(
        task=config.task,
        num_steps=request.num_steps,
        shift=request.shift,
        solver=request.solver,
        guidance_scale=request.guidance_scale,
        size=request.size,
        num_frames=request.num_frames,
        image=request.image is not None,
        loras=[str(lora) for lora in config.loras if lora.strength],
    )
    released = fingerprint(manifest.DiTDims.of_task(config.spec), config.spec.experts)
    all_entries = entries or (calibration.published(config.task) if model == released else [])
    auto = asked.kind == "auto"
    for kind in ("searched", "magcache", "teacache") if auto else (asked.kind,):
        found, others = calibration.best([entry for entry in all_entries if _has(entry, kind)], wanted)
        # a mask is of one number of steps
        if found and not (auto and kind == "searched" and {"num_steps", "shift"} & set(others)):
            break
    if auto and found is None:
        raise WanFastError("--step-cache auto: nothing is known of this model; run wan-fast calibrate, or take every:2")
    if kind in SIGNALS and opened is None:
        why = "depends on the checkpoint's time embedding: until that is here, all steps are shown as computed"
        return None, "", [f"--step-cache {config.step_cache} {why}"]
    cache = replace(asked, kind=kind, share=asked.share or 0.5) if auto else asked
    known = Known(calibration=found, distances=once(partial(_distances, opened, steps)), others=others)
    rules = skipping.rules(cache, steps, known, nearest=auto)
    where = "your calibration" if entries else "what is published"
    warnings = [f"--step-cache {kind}: {where} is of {', '.join(others.values())}; see wan-fast calibrate"] if others else []
    return rules, skipping.described(asked, cache, rules["conditional"]), warnings


def _has(entry: Calibration, kind: str) -> bool:
    """Whether a calibration has what a rule needs."""
    if kind in SIGNALS:
        return SIGNALS[kind] in entry.teacache
    return bool(entry.masks if kind == "searched" else entry.magcache)


def fingerprint(dims: manifest.DiTDims, experts: Collection[str]) -> str:
    """What tells one model from another, in words."""
    many = f"{len(experts)} experts of " if len(experts) > 1 else ""
    return f"{many}{dims.num_layers} blocks, width {dims.dim}, {dims.in_dim} to {dims.out_dim} channels"


def _distances(opened: Checkpoint | None, steps: tuple[Step, ...], signal: str) -> list[float]:
    from wan_fast.distances import time_distances  # torch; only TeaCache needs it

    assert opened is not None
    return time_distances(signal, opened.experts, steps)
