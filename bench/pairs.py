"""Every pair of options on models of two layers: refused before a weight is read, or the video that it should be.

    python -m bench.pairs            # writes bench/results/pairs.md

What a video should be is said twice. `written_out` carries out the rows of a plan by the formulas, in plain PyTorch around a
model in fp32; every run is held against that, to the rounding of its number formats. And an option that does not make another
video by definition is held against the run without it: to the bit, or by its class. On a CPU; what it does not compute in is
emulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import combinations
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from clips_of import write_clip
from models import relative_error, write_native, write_poses
from PIL import Image
from safetensors.torch import save_file
from sounds_of import tone, write_sound
from torch import Tensor
from torch.nn import functional as F

from bench import RESULTS
from bench.quality import emulated
from wan_fast import calibration
from wan_fast.blocks import Context, Grid
from wan_fast.calibration import BRANCHES, Calibration
from wan_fast.checkpoint import RELIGHTING, open_checkpoint
from wan_fast.conditioning import PREPARE
from wan_fast.config import INPUTS, EngineConfig, Request, WanFastError
from wan_fast.dit import WanDiT, grid_of, sinusoid
from wan_fast.engine import Engine
from wan_fast.manifest import DiTDims
from wan_fast.planning import Plan, plan
from wan_fast.quality import PRESETS
from wan_fast.schedule import fingerprint
from wan_fast.setup import Setup, set_up
from wan_fast.steps import Step
from wan_fast.tasks import TASKS, TaskSpec

# Marks of what became of a pair, the exact ones first, which are also the kinds of values: the least exact that they may be. A
# PICTURE is another video by definition, the baseline of what is beside it.
SAME, ROUNDED, IN_8_BITS, APPROXIMATE, PICTURE, REFUSED = "=", "~", "8", "≈", "o", "×"
EXACTNESS = SAME + ROUNDED + IN_8_BITS + APPROXIMATE

# of 8 and fewer caches are refused; those of pairs without one are few
STEPS, SHORT = 10, 4
OPTIONS: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "dtype": {"fp32": (SAME, {"dtype": "fp32"}), "bf16": (ROUNDED, {"dtype": "bf16"})},
    "precision": {
        "bf16": (SAME, {"precision": "bf16"}),  # linears are in --dtype, which is fp32 on a CPU
        "fp8": (IN_8_BITS, {"precision": "fp8"}),
        "int8": (IN_8_BITS, {"precision": "int8"}),
        "int8 block": (IN_8_BITS, {"precision": "int8", "scaling": "block"}),
    },
    "attention": {
        "sdpa": (SAME, {"attention": "sdpa"}),
        "int8": (IN_8_BITS, {"attention": "int8"}),
        "fp8": (IN_8_BITS, {"attention": "fp8"}),
        "int8, 1,1 kept, skip 0.01": (IN_8_BITS, {"attention": "int8", "keep_steps": (1, 1), "skip_softmax": 0.01}),
    },
    "step cache": {
        "off": (SAME, {"step_cache": "off"}),
        "mask": (APPROXIMATE, {"step_cache": "##.#..##.#"}),  # the 8th step is the first of the second expert
        "every:2": (APPROXIMATE, {"step_cache": "every:2"}),
        "teacache": (APPROXIMATE, {"step_cache": "teacache"}),
        "magcache": (APPROXIMATE, {"step_cache": "magcache"}),
    },
    "CFG cache": {
        "off": (SAME, {"cfg_cache": "off"}),
        "difference:4": (APPROXIMATE, {"cfg_cache": "difference:4"}),
        "frequency:4": (APPROXIMATE, {"cfg_cache": "frequency:4"}),
        "gate": (APPROXIMATE, {"cfg_cache": "gate"}),
    },
    "quality": {
        "lossless": (SAME, {"quality": "lossless"}),
        "high": (APPROXIMATE, {"quality": "high"}),
        "fast": (APPROXIMATE, {"quality": "fast"}),
        "draft": (APPROXIMATE, {"quality": "draft"}),
    },
    "kernels": {"reference": (SAME, {"kernels": "reference"})},
    "offload": {"True": (SAME, {"offload_model": True})},
    "convert dtype": {"True": (ROUNDED, {"convert_model_dtype": True})},
    "VAE dtype": {"bf16": (SAME, {"vae_dtype": "bf16"})},
    "task": {
        "t2v-A14B": (PICTURE, {"task": "t2v-A14B"}),
        "ti2v-5B": (PICTURE, {"task": "ti2v-5B"}),
        "ti2v-5B, image": (PICTURE, {"task": "ti2v-5B", "image": "picture.png"}),
        "i2v-A14B": (PICTURE, {"task": "i2v-A14B", "image": "picture.png"}),
        "flf2v-14B": (PICTURE, {"task": "flf2v-14B", "first_frame": "picture.png", "last_frame": "last.png"}),
        "vace-1.3B": (
            PICTURE,
            {
                "task": "vace-1.3B",
                "src_video": "video.mkv",
                "src_mask": "mask.mkv",
                "src_ref_images": ("last.png",),
                "context_scale": 0.8,
            },
        ),
        "s2v-14B": (
            PICTURE,
            {
                "task": "s2v-14B",
                "image": "picture.png",
                "audio": "sound.wav",
                "num_clip": 1,
                "infer_frames": 8,
                "num_frames": None,  # it goes by the sound
            },
        ),
        "animate-14B": (
            PICTURE,
            {
                "task": "animate-14B",
                "src_root_path": "driving",
                "replace_flag": True,
                "use_relighting_lora": True,
                "guidance_scale": 3.0,  # else there is none
            },
        ),
        "phantom-1.3B": (PICTURE, {"task": "phantom-1.3B", "dit": "phantom-1.3B", "src_ref_images": ("last.png",)}),
        "phantom-1.3B, one scale": (
            PICTURE,
            {
                "task": "phantom-1.3B",
                "dit": "phantom-1.3B",
                "src_ref_images": ("last.png",),
                "guidance_scale": 5.0,
                "image_guidance_scale": 5.0,
            },
        ),
        "unianimate-14B": (
            PICTURE,
            {
                "task": "unianimate-14B",
                "unianimate": "unianimate.safetensors",
                "image": "picture.png",
                "pose_video": "video.mkv",
                "pose_image": "last.png",
            },
        ),
    },
    "solver": {
        "dpm++": (PICTURE, {"solver": "dpm++"}),
        "euler": (PICTURE, {"solver": "euler"}),
        "lcm": (PICTURE, {"solver": "lcm"}),
    },
    "preset": {"rcm-4step": (PICTURE, {"preset": "rcm-4step", "num_steps": 4})},
    "LoRA": {"at 0.5": (PICTURE, {"lora": ("lora.safetensors:0.5",)})},
    "prompt cache": {"off": (SAME, {"no_cache": True})},
    "guidance": {"1": (PICTURE, {"guidance_scale": 1.0})},
    "CFG-Zero*": {"1": (PICTURE, {"cfg_zero": 1})},
    "steps": {"8": (PICTURE, {"num_steps": 8})},
}
# what holds where it is not named; besides these fp32, exact attention, UniPC and guidance 5
DEFAULTS: Mapping[str, Any] = {
    "task": "t2v-1.3B", "prompt": "a red ball bounces", "negative_prompt": "blurred", "size": (64, 64), "num_frames": 5,
    "seed": 0,
}  # fmt: skip
# Pairs whose first value has another kind than its own. A preset takes no 8 bits on a CPU, and no step cache where one is given
# or for 8 steps; before there are latents only a picture goes through the VAE.
BESIDE = {
    **{
        (f"quality {preset}", beside): SAME
        for preset, chosen in PRESETS.items()
        for beside in ("steps 8", *(f"step cache {name}" for name in OPTIONS["step cache"]))
        if chosen["cfg_cache"] == "off"
    },
    **{("VAE dtype bf16", f"task {task}"): ROUNDED for task in OPTIONS["task"] if task not in ("t2v-A14B", "ti2v-5B")},
    # of models distilled to a few steps, which have no guidance
    **{
        (f"quality {preset}", beside): SAME
        for preset in ("high", "fast", "draft")
        for beside in ("solver lcm", "preset rcm-4step")
    },
    ("solver lcm", "preset rcm-4step"): SAME,
    ("guidance 1", "solver lcm"): SAME,
    ("guidance 1", "preset rcm-4step"): SAME,
    # what UniAnimate takes by itself
    ("solver euler", "task unianimate-14B"): SAME,
}
# options that presets give way to: what they chose themselves may be the same or not
GIVEN = ("step cache", "CFG cache")
WITH_CACHES = ("quality", *GIVEN)

# Largest relative L2 error of latents to the formulas in fp32, by what a run has; of more than one their sum. Seen at most:
# 6e-7, 0.0075, 0.0057, 0.029 and 0.05. Attention does so little as there are 8 to 32 tokens.
LIMITS = {"fp32": 1e-5, "bf16": 0.012, "attention in 8 bits": 0.009, "int8": 0.045, "fp8": 0.075}
# Largest distance of what is approximate to the run without, seen up to 0.51, and that of two approximations in parts of the
# sum of each alone, up to 1.3. With random weights neighbouring steps are less alike than with trained ones.
FARTHEST, TOGETHER = 0.75, 2.0


@dataclass(frozen=True, slots=True)
class Value:
    """One value of one option: `kind` is the mark that it may have, `settings` what it is to EngineConfig and Request."""

    option: str
    name: str
    kind: str
    settings: Mapping[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.option} {self.name}"

    def kind_beside(self, others: Sequence[Value]) -> str:
        """The mark that it may have there."""
        return next((BESIDE[str(self), str(other)] for other in others if (str(self), str(other)) in BESIDE), self.kind)


VALUES = tuple(Value(option, name, kind, settings) for option, row in OPTIONS.items() for name, (kind, settings) in row.items())
PAIRS = tuple(pair for pair in combinations(VALUES, 2) if pair[0].option != pair[1].option)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a pair, or of a value alone.

    mark: in what it differs from its baseline. reason: why it is refused. error: to the formulas, distance: to the baseline,
    both relative L2. faults: what is not as it should be.
    """

    mark: str
    reason: str = ""
    error: float = 0.0
    distance: float = 0.0
    faults: tuple[str, ...] = ()


@contextmanager
def laboratory(folder: Path) -> Iterator[Lab]:
    """A Lab where 8 bits are emulated, and the headers of a checkpoint are read once."""
    with emulated(), patch("wan_fast.checkpoint.open_checkpoint", cache(open_checkpoint)):
        yield Lab(folder)


class Lab:
    """Small checkpoints in a folder, the engines that were needed so far, and what they made.

    A run is made once: what engines are built of and what plans say is all that it depends on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settled: dict[tuple[tuple[Value, ...], int], tuple[Setup, Plan]] = {}
        self._engines: dict[Any, Engine] = {}
        self._latents: dict[Any, Tensor] = {}
        self._written_out: dict[Any, Tensor] = {}
        self._outcomes: dict[tuple[Value, ...], Outcome] = {}
        gradient = Image.linear_gradient("L").resize((64, 64))
        gradient.convert("RGB").save(folder / "picture.png")
        gradient.rotate(90).convert("RGB").save(folder / "last.png")
        frames = np.stack([np.roll(gradient.convert("RGB"), 8 * i, axis=0) for i in range(5)])
        mask = np.where(frames > 99, np.uint8(255), np.uint8(0))
        write_clip(folder / "video.mkv", frames)
        write_clip(folder / "mask.mkv", mask)
        write_sound(folder / "sound.wav", tone(220, 16000), 16000)
        (folder / "driving").mkdir()
        for name, clip in {"pose": frames, "face": frames, "bg": frames[::-1], "mask": mask}.items():
            write_clip(folder / "driving" / f"src_{name}.mp4", clip)
        gradient.convert("RGB").save(folder / "driving" / "src_ref.png")
        for task in sorted({settings["task"] for _, settings in OPTIONS["task"].values()} | {DEFAULTS["task"]}):
            (folder / task).mkdir()
            write_native(folder / task, task, width=128)
            _shorten_text(folder / task)
            _calibrate(folder / task, task)
        _write_loras(folder / "lora.safetensors", folder / "animate-14B" / RELIGHTING)
        write_poses(folder / "unianimate.safetensors")

    def settle(self, *values: Value, num_steps: int = SHORT) -> tuple[Setup, Plan]:
        """What a configuration and a request of these values come to; num_steps: where they say nothing of it.

        Raises:
            WanFastError: they are refused.
        """
        if (values, num_steps) not in self._settled:
            settings = {**DEFAULTS, "num_steps": num_steps}
            settings |= {name: given for value in values for name, given in value.settings.items()}
            for name in {*INPUTS, "lora", "dit", "unianimate"} & {*settings}:
                given = settings[name]
                path = str(self.folder / given) if isinstance(given, str) else tuple(str(self.folder / each) for each in given)
                settings[name] = path
            of_request = {option.name for option in fields(Request)}
            request = Request(**{name: given for name, given in settings.items() if name in of_request})
            others = {name: given for name, given in settings.items() if name not in of_request}
            config = EngineConfig(**others, checkpoint=str(self.folder / settings["task"]), device="cpu")
            setup = set_up(config)
            self._settled[values, num_steps] = setup, plan(config, request, setup)
        return self._settled[values, num_steps]

    def latents(self, setup: Setup, todo: Plan) -> Tensor:
        """[C, T, H, W] that the engine makes."""
        key = _built_of(setup, todo), todo.request, todo.steps, todo.config.cfg_zero is None
        if key not in self._latents:
            self._latents[key] = self._engine(setup, todo).latents(todo)
        return self._latents[key]

    def written_out(self, todo: Plan) -> Tensor:
        """[C, T, H, W] that the formulas make of the plan's rows, with the model in fp32."""
        steps = tuple(replace(step, attention="exact") for step in todo.steps)
        key = todo.config.task, todo.request, steps, todo.config.cfg_zero is None, todo.config.lora
        if key not in self._written_out:
            models = [value for value in VALUES if value.settings.get("task") == todo.config.task][:1]
            models += [value for value in VALUES if value.option == "LoRA" and todo.config.lora]
            setup, _ = self.settle(*models)
            self._written_out[key] = written_out(self._engine(setup, todo), todo)
        return self._written_out[key]

    def _engine(self, setup: Setup, todo: Plan) -> Engine:
        key = _built_of(setup, todo)
        if key not in self._engines:
            self._engines[key] = Engine(setup.config)
        return self._engines[key]

    def outcomes(self) -> dict[tuple[Value, ...], Outcome]:
        """Of every value alone, and of every pair."""
        return {values: self.outcome(*values) for values in (*((value,) for value in VALUES), *PAIRS)}

    def outcome(self, *values: Value) -> Outcome:
        if values not in self._outcomes:
            self._outcomes[values] = self.judge(*values)
        return self._outcomes[values]

    def judge(self, *values: Value) -> Outcome:
        """Plan, run and compare; `outcome` does so once."""
        num_steps = STEPS if any(value.option in WITH_CACHES for value in values) else SHORT
        try:
            setup, todo = self.settle(*values, num_steps=num_steps)
        except WanFastError as error:
            return Outcome(REFUSED, reason=str(error).partition(";")[0])
        pictures = [value for value in values if value.kind == PICTURE]
        base_setup, base = self.settle(*pictures, num_steps=num_steps)
        result, baseline = self.latents(setup, todo), self.latents(base_setup, base)
        formats = _formats(setup, todo)
        mark = APPROXIMATE if _passes(todo) != _passes(base) else _mark_of(formats)
        found = Outcome(
            PICTURE if len(pictures) == len(values) else mark,
            error=relative_error(result, self.written_out(todo)),
            distance=relative_error(result, baseline),
        )
        faults = [*self._faults_of_values(values, num_steps, result), *_faults_of_plan(mark, todo, base)]
        if len(values) > 1 and not pictures and not _gives_way(values):
            faults += _faults_beside(todo, [self.settle(value, num_steps=num_steps)[1] for value in values])
        kinds = [value.kind_beside(values) for value in values if value.kind != PICTURE]
        if mark != (wanted := max(kinds, key=EXACTNESS.index, default=SAME)):
            faults.append(f"it is {mark}, not {wanted}")
        if mark == SAME and not torch.equal(result, baseline):
            faults.append("it is not the baseline to the bit")
        most = sum(LIMITS[name] for name in formats)
        if not found.error <= most:  # NaN neither
            faults.append(f"relative error {found.error:.2g} to the formulas, at most {most:g}")
        if mark == APPROXIMATE:
            most = FARTHEST
            if len(values) > 1 and all(value.kind == APPROXIMATE for value in values):
                most = TOGETHER * sum(self.outcome(value).distance for value in values)
            if not found.distance <= most:
                faults.append(f"relative distance {found.distance:.2g} to the run without, at most {most:.2g}")
        return replace(found, faults=tuple(faults))

    def _faults_of_values(self, values: Sequence[Value], num_steps: int, result: Tensor) -> Iterator[str]:
        """Values that change nothing, or what they may not."""
        for value in values:
            if value.option in GIVEN and _gives_way(values):
                continue
            others = (other for other in values if other is not value)
            same = torch.equal(result, self.latents(*self.settle(*others, num_steps=num_steps)))
            if same != (value.kind_beside(values) == SAME):
                yield f"{value} changes " + ("nothing" if same else "bits")


def _gives_way(values: Sequence[Value]) -> bool:
    """Whether a preset leaves to another option what it would choose."""
    options = {value.option for value in values}
    return "quality" in options and bool(options & {*GIVEN})


def _built_of(setup: Setup, todo: Plan) -> Any:
    """What of an engine is at work before there are latents to decode, as its plan has it.

    On a CPU kernels are the reference whatever is asked for, and nothing is offloaded.
    """
    forms = tuple((expert, *sorted(by_linear.items())) for expert, by_linear in setup.forms.items())
    kernels = tuple((kernel.op, kernel.backend) for kernel in setup.kernels)
    encoder = setup.vae_dtype if "encode" in todo.flops else None
    config = setup.config
    own = config.skip_softmax, config.convert_model_dtype, config.lora
    return config.task, setup.dtype, forms, kernels, own, encoder, todo.memory.offload


def _formats(setup: Setup, todo: Plan) -> list[str]:
    """Of LIMITS what a run has."""
    formats = ["fp32", *{form.precision for forms in setup.forms.values() for form in forms.values()}]
    if any(step.attention == "8-bit" for step in todo.steps):
        formats.append("attention in 8 bits")
    rounded = setup.config.convert_model_dtype or "bf16" in (setup.dtype, "encode" in todo.flops and setup.vae_dtype)
    return formats + ["bf16"] * rounded


def _mark_of(formats: Sequence[str]) -> str:
    return SAME if formats == ["fp32"] else ROUNDED if formats == ["fp32", "bf16"] else IN_8_BITS


def _passes(todo: Plan) -> list[tuple[str, str]]:
    return [(step.conditional, step.unconditional) for step in todo.steps]


def _faults_of_plan(mark: str, todo: Plan, base: Plan) -> Iterator[str]:
    def unchanged(step: Step) -> Step:
        return replace(step, conditional="", unconditional="", difference=(1.0, 1.0), attention="")

    if [unchanged(step) for step in todo.steps] != [unchanged(step) for step in base.steps]:
        yield "the plan has other steps than the baseline's"
    if todo.forwards_uncached != base.forwards_uncached:
        yield f"{todo.forwards_uncached} passes were there to leave out, not {base.forwards_uncached}"
    if not (0 < todo.forwards < base.forwards if mark == APPROXIMATE else todo.forwards == base.forwards):
        yield f"{todo.forwards} passes beside {base.forwards} of the baseline"


def _faults_beside(todo: Plan, alone: Sequence[Plan]) -> Iterator[str]:
    """What two options do not keep of each alone."""
    attention, *of_each = [[step.attention for step in each.steps] for each in (todo, *alone)]
    if attention not in of_each:
        yield "attention is in 8 bits at other steps than alone"
    if todo.forwards > (fewest := min(each.forwards for each in alone)):
        yield f"{todo.forwards} passes, {fewest} of one of them alone"


@torch.inference_mode()
def written_out(engine: Engine, todo: Plan) -> Tensor:
    """Carry out a plan's rows by the formulas of guidance, caches and solvers.

    Args:
        engine: the models, in fp32 with exact attention.
        todo: the plan, whose rows say what is computed, reused and reconstructed.

    Returns:
        [C, T, H, W] fp32, the final latents.
    """
    given = PREPARE[engine.spec.kind](todo.request, todo.framing, engine)(todo.framing.clips[0], None)
    generator = torch.Generator().manual_seed(todo.request.seed)
    x = _drawn(engine.spec, todo, generator)
    if todo.request.preset:  # rCM starts on its first noise level
        x = todo.steps[0].sigma * x
    known = x[:, :0] if given.known is None else given.known
    x[:, : known.shape[1]] = known
    sample, older, oldest, difference = (torch.zeros_like(x) for _ in range(4))
    contexts: dict[tuple[str, str], Context] = {}
    residuals: dict[str, Tensor] = {}
    for step in todo.steps:
        model: Any = engine.models[step.expert]
        rows = [0.0, step.timestep] if given.zero_first else [step.timestep, 0.0]
        time = torch.tensor([rows if given.split else [step.timestep]])  # [1, R]
        velocity: dict[str, Tensor] = {}
        passes = {branch: getattr(step, branch) for branch in BRANCHES}
        if step.image_guidance is not None:
            passes["unprompted"] = step.unconditional
        for branch, how in passes.items():
            if how == "run":
                if (step.expert, branch) not in contexts:
                    contexts[step.expert, branch] = model.prepare(
                        [given.text[branch]], grid_of(x.shape), given.by_branch[branch]
                    )
                residuals[branch] = torch.empty(1, prod(grid_of(x.shape)), model.dims.dim)  # of the clip's own tokens
                context = contexts[step.expert, branch]
                velocity[branch] = model(x[None], time, context, split=given.split, residual=residuals[branch])[0]
            elif how == "reuse":
                tokens = model.embed(x[None], contexts[step.expert, branch]) + residuals[branch]
                velocity[branch] = _resumed(model, tokens, grid_of(x.shape), time, given.split)
            elif how == "reconstruct":
                low, (of_low, of_high) = _low(difference), step.difference
                velocity[branch] = velocity["conditional"] - of_low * low - of_high * (difference - low)
            elif how == "zero":
                velocity[branch] = torch.zeros_like(x)
        v, other = velocity["conditional"], velocity.get("unconditional")
        if step.image_guidance is not None:
            assert other is not None
            by_pictures, by_text = velocity["unprompted"] - other, v - velocity["unprompted"]
            v = other + step.image_guidance * by_pictures + step.guidance_scale * by_text
        elif other is not None:
            difference = v - other if step.conditional == step.unconditional == "run" else difference
            if todo.config.cfg_zero is not None:
                other = other * (v * other).sum() / (other.square().sum() + 1e-8)
            v = other + step.guidance_scale * (v - other)
        x0 = x - step.sigma * v
        if step.corrector is not None:
            x = _weighed(step.corrector, sample, x0, older, oldest)
        sample, x = x, _weighed(step.predictor, x, x0, older)
        older, oldest = x0, older
        if step.noise is not None:
            x = x + step.noise * _drawn(engine.spec, todo, generator)
        x[:, : known.shape[1]] = known
    return x


def _drawn(spec: TaskSpec, todo: Plan, generator: torch.Generator) -> Tensor:
    """Noise [C, T, H, W] fp32: in bf16 where sound moves a picture; beside references, which are denoised no more than these,
    their part of a longer clip's."""
    C, T, H, W = todo.latent_shape
    count, dtype = T + len(todo.request.src_ref_images) * (spec.kind == "subjects"), torch.float32
    if spec.kind == "speech":
        dtype = torch.bfloat16
    return torch.randn(C, count, H, W, generator=generator, dtype=dtype)[:, :T].float().contiguous()


def _resumed(model: WanDiT, tokens: Tensor, grid: Grid, time: Tensor, split: int) -> Tensor:
    """The velocity [C, T, H, W] at time [1, R] that the head makes of tokens [1, L, D]."""
    shift, scale = model.head.modulated_by(model.time_embedding(sinusoid(time, model.dims.freq_dim)))  # [1, R, D]
    row = (torch.arange(tokens.shape[1]) >= split).long() * (time.shape[1] - 1)
    y = F.layer_norm(tokens, tokens.shape[-1:], eps=model.dims.eps) * (1 + scale[:, row]) + shift[:, row]
    T, H, W = grid
    patches = model.head.head(y).view(T, H, W, 2, 2, -1)
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(-1, T, 2 * H, 2 * W)


def _low(x: Tensor) -> Tensor:
    """Of x [C, T, H, W] the frequencies of each frame up to a fifth of its shorter side, rounded down."""
    rows, columns = (torch.fft.fftfreq(side) * side for side in x.shape[-2:])
    within = rows[:, None].square() + columns.square() <= (min(x.shape[-2:]) // 5) ** 2
    return torch.fft.ifft2(torch.fft.fft2(x) * within).real


def _weighed(weights: Sequence[float], *tensors: Tensor) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _shorten_text(folder: Path) -> None:
    """Let a checkpoint's models read 16 tokens of text: most of a run's time would be that of 512."""
    for file in folder.rglob("config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"text_len": 16}))


def _write_loras(file: Path, relighting: Path) -> None:
    """One for all the models, whose blocks are alike: of a linear and a modulation; and the same as a checkpoint's own."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"ffn.0.lora_down.weight": (2, 128), "ffn.0.lora_up.weight": (320, 2), "diff_m": (1, 6, 128)}
    state = {f"blocks.1.{name}": 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    save_file(state, file)
    torch.save(state, relighting)


def _calibrate(folder: Path, task: str) -> None:
    """Write a calibration with which each step cache leaves out others; by magcache conditional passes more than others."""
    spec = TASKS[task]
    part = next(iter(open_checkpoint(folder).experts.values()))
    curves = {branch: [ratio] * (STEPS - 1) for branch, ratio in zip(BRANCHES, (0.99, 0.97), strict=True)}
    # time embeddings of random weights are far from one another: relative distances of 0.7 to 1.2
    halved = {**{expert: [0.5, 0.0] for expert in spec.experts}, "threshold": 0.95}
    found = Calibration(
        model="random",
        num_steps=STEPS,
        shift=spec.shift,
        magcache={**curves, "threshold": 0.1, "max_skips": 3, "retention": 0.1},
        teacache={"embedding": halved},
    )
    dims = DiTDims.of_shapes(part.shapes, part.config)
    calibration.write(folder / calibration.FILE, fingerprint(dims, spec.experts), [found])


def page(outcomes: Mapping[tuple[Value, ...], Outcome]) -> str:
    """Markdown of pairs, and of values alone on the diagonal."""
    reasons = list(dict.fromkeys(found.reason for found in outcomes.values() if found.mark == REFUSED))

    def cell(one: Value, other: Value) -> str:
        found = outcomes.get((one,) if one is other else (one, other)) or outcomes.get((other, one))
        if found is None:
            return ""
        return found.mark + (str(1 + reasons.index(found.reason)) if found.mark == REFUSED else "")

    lines = [
        "| | " + " | ".join(str(number) for number in range(1, len(VALUES) + 1)) + " |",
        "| --- |" + " --- |" * len(VALUES),
    ]
    for number, value in enumerate(VALUES, 1):
        lines.append(f"| {number} {value} | " + " | ".join(cell(value, other) for other in VALUES) + " |")
    return "\n".join([INTRODUCTION, *lines, "", *(f"- ×{i}: {reason}" for i, reason in enumerate(reasons, 1)), ""])


INTRODUCTION = """\
# Pairs of options

Written by `python -m bench.pairs`.

Each pair of values of two options, on models of two layers with random weights on a CPU; a value alone is on the diagonal.
Every run is held against the formulas of guidance, caches and solvers in plain PyTorch, and an option against the run without
it; one that makes another video by definition (task, solver, guidance, CFG-Zero*, steps) is part of both. What a CPU does not
compute in is emulated; it has one kind of kernels and nothing to offload, and its presets take no 8 bits.

- `=` the same latents to the bit; `~` other rounding; `8` rounding to 8 bits
- `≈` passes are left out, and computed, reused and reconstructed as the plan says
- `o` another video by definition
- `×` refused before a weight is read, for the reason of that number
"""


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.pairs", description="Every pair of options on small models.").parse_args(argv)
    with TemporaryDirectory() as folder, laboratory(Path(folder)) as lab:
        outcomes = lab.outcomes()
    wrong = [(values, fault) for values, found in outcomes.items() for fault in found.faults]
    for values, fault in wrong:
        print(" x ".join(map(str, values)) + ": " + fault)
    if wrong:
        return 1
    text = page(outcomes)
    print(text)
    (RESULTS / "pairs.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
