"""A request with every default filled in, held against its task. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

from wan_fast.config import INPUTS, SPECIFIC, Request
from wan_fast.errors import WanFastError
from wan_fast.few_steps import OFF, PRESETS, SIGMA_MAX, parse_preset
from wan_fast.parsing import flag_of, pair
from wan_fast.tasks import TASKS, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Request):
    """A request that leaves nothing open; `size` and `num_frames` are what was asked for, until the plan settles them.

    preset: with its largest sigma, where it has one; None for a solver on its own grid.
    """

    settled = True

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    num_frames: int
    fps: float
    num_steps: int
    shift: float
    guidance_scale: tuple[float, float]
    solver: str  # type: ignore[assignment]
    seed: int

    @property
    def two_scales(self) -> bool:
        """Whether the guidance by pictures takes a pass of its own: not where it is none, or that by the text."""
        return self.image_guidance_scale not in (None, 1.0, self.guidance_scale[0])


def resolve(spec: TaskSpec, request: Request, defaults: Request | None = None) -> Resolved:
    """Fill what `request` leaves open from the checkpoint's own `defaults`, then from the task; hold it against the task.

    Raises:
        WanFastError: the request does not fit the task.
    """
    for name in INPUTS:
        if (given := ",".join(map(str, request.given(name)))) and name not in spec.takes:
            fit = " ".join(other.name for other in TASKS.values() if name in other.takes)
            raise WanFastError(f"task {spec.name} takes no --{name} (given {given!r}); tasks that do: {fit}")
    for name in SPECIFIC:
        if (value := getattr(request, name)) not in (None, False) and name not in spec.takes:
            fit = " ".join(other.name for other in TASKS.values() if name in other.takes)
            raise WanFastError(f"task {spec.name} takes no {flag_of(Request, name)} (given {value}); tasks that do: {fit}")
    for name in INPUTS:
        if not request.given(name) and name in spec.needs:
            what = "FOLDER" if name == "src_root_path" else "FILE"
            raise WanFastError(f"task {spec.name} needs --{name}, got none; add --{name} {what}")
    if request.context_scale != 1 and not spec.vace_layers:
        raise WanFastError(f"--context_scale is of the vace tasks, --task is {spec.name}; leave it out")
    prompt = request.prompt if request.prompt is not None else spec.prompt
    if not (prompt or "").strip():
        way = ", or leave it out" * (spec.prompt is not None)
        raise WanFastError(f'task {spec.name} needs a prompt, got none; add --prompt "..."{way}')

    def chosen(name: str, last: Any) -> Any:
        values = (getattr(request, name), defaults and getattr(defaults, name), last)
        return next(value for value in values if value is not None)

    size = chosen("size", spec.default_size)
    is_480p = spec.shift_480p is not None and tuple(sorted(size)) == (480, 832)
    sampling = of_preset(spec, request, request.preset or OFF) or {
        "preset": None,
        "num_steps": chosen("num_steps", spec.num_steps),
        "shift": chosen("shift", spec.shift_480p if is_480p else spec.shift),
        "solver": (solver := chosen("solver", spec.solver)),
        "guidance_scale": pair(
            (request.guidance_scale or 1.0) if solver == "lcm" else chosen("guidance_scale", spec.guidance_scale)
        ),
    }
    if spec.image_guidance_scale is not None:
        without = sampling["preset"] is not None or sampling["solver"] == "lcm"
        sampling["image_guidance_scale"] = chosen("image_guidance_scale", 1.0 if without else spec.image_guidance_scale)
        if without and sampling["image_guidance_scale"] != 1:
            raise WanFastError(
                f"--sample_guide_scale_img {sampling['image_guidance_scale']:g}: guidance blurs what models distilled to a few "
                "steps make; leave it out"
            )
    resolved = Resolved(
        **{
            **{f.name: getattr(request, f.name) for f in fields(request)},
            "size": size,
            "num_frames": chosen("num_frames", spec.num_frames),
            "fps": chosen("fps", spec.fps),
            **sampling,
            "prompt": prompt,
            "negative_prompt": chosen("negative_prompt", spec.negative_prompt),
            "seed": with_seed(request).seed,
        }
    )
    low, high = resolved.guidance_scale
    if resolved.solver == "lcm" and resolved.guidance_scale != (1.0, 1.0):
        raise WanFastError(
            f"--sample_solver lcm is for distilled models, which guidance blurs: got --sample_guide_scale {low:g}; leave it out"
        )
    if spec.boundary is None and low != high:
        raise WanFastError(f"task {spec.name} has one expert, got two guidance scales ({low:g},{high:g}); give one number")
    if spec.image_only and resolved.num_frames != 1:
        raise WanFastError(f"task {spec.name} makes one picture, got --frame_num {resolved.num_frames}; leave it out")
    grid = spec.vae_spec.grid
    if not request.is_area and (size[0] % grid or size[1] % grid):
        near = "*".join(str(max(grid, round(side / grid) * grid)) for side in size)
        raise WanFastError(
            f"--size {size[0]}*{size[1]} is not on the {grid}-pixel grid of {spec.name}; the nearest that is: {near}"
        )
    return resolved


def of_preset(spec: TaskSpec, request: Request, asked: str) -> dict[str, Any]:
    """What a preset says of the sampling; empty for none.

    Raises:
        WanFastError: there is no such preset, or the request says something else of the sampling.
    """
    name, sigma_max = parse_preset(asked)
    if name == OFF:
        return {}
    preset, said = PRESETS[name], f"--preset {asked}"
    if request.solver not in (None, preset.solver):
        raise WanFastError(
            f"{said} is a sampler of its own, of solver {preset.solver}: got --sample_solver {request.solver}; leave it out"
        )
    if request.num_steps not in (None, *preset.steps):
        able = " or ".join(map(str, sorted(preset.steps)))
        raise WanFastError(f"{said} has {able} steps: got --sample_steps {request.num_steps}; leave it out")
    if request.guidance_scale is not None and pair(request.guidance_scale) != (1.0, 1.0):
        raise WanFastError(
            f"{said} has no guidance, as its models were distilled with it, and blur with more: got --sample_guide_scale "
            f"{','.join(f'{scale:g}' for scale in dict.fromkeys(pair(request.guidance_scale)))}; leave it out"
        )
    if request.shift is not None and preset.shift is None:
        raise WanFastError(f"{said} has its own noise levels: got --sample_shift {request.shift:g}; leave it out")
    shift = preset.shift_of_two if preset.shift_of_two and spec.boundary is not None else preset.shift
    if preset.sigma_max:
        sigma_max = sigma_max or SIGMA_MAX["image" in spec.needs or request.image is not None]
    return {
        "preset": f"{name}:{sigma_max:.10g}" if preset.sigma_max else name,
        "num_steps": request.num_steps or preset.steps[0],
        "shift": request.shift or shift or 1.0,
        "solver": preset.solver,
        "guidance_scale": (1.0, 1.0),
    }


def with_seed(request: Request) -> Request:
    """The request with a seed drawn where it has none or a negative one."""
    if request.seed is not None and request.seed >= 0:
        return request
    return replace(request, seed=random.randrange(2**31))
