"""Plan, then execute: everything that can be known before the first kernel. No weights, no GPU, no torch on a CPU.

A `Plan` is computed from the configuration, the request, the checkpoint's file headers and a description of the
device. The engine only executes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wan_fast import manifest, schemes
from wan_fast.backends import KernelChoice
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.device import Device, named
from wan_fast.framing import FRAME, Framing
from wan_fast.headers import read_safetensors_header
from wan_fast.memory import MemoryPlan, gib, memory_plan, strips
from wan_fast.presets import named_preset
from wan_fast.resolving import Resolved, resolve
from wan_fast.schedule import schedule
from wan_fast.setup import Models, Setup, set_up
from wan_fast.single_files import to_be_given
from wan_fast.steps import Step
from wan_fast.tasks import PATCH, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do. `request` has every default filled in; its size and length are final.

    latent_shape: [C, T, H, W] of what is denoised; `framing.leading` frames of it come before the clip's own.
    """

    config: EngineConfig
    request: Resolved
    device: Device
    dtype: str
    vae_dtype: str
    image_dtype: str
    linears: str
    quality: str
    checkpoint: Checkpoint | None
    framing: Framing
    latent_shape: tuple[int, int, int, int]
    tokens: int
    steps: tuple[Step, ...]
    preset: str
    step_cache: str
    loras: tuple[str, ...]
    memory: MemoryPlan
    kernels: tuple[KernelChoice, ...]
    flops: Mapping[str, float]
    flops_8bit: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def forwards(self) -> int:
        """Passes through the block stack, of all clips."""
        return len(self.framing.clips) * sum(step.forwards for step in self.steps)

    @property
    def forwards_uncached(self) -> int:
        """The same, were none left out."""
        return len(self.framing.clips) * sum(step.passes for step in self.steps)

    @property
    def seconds_at_least(self) -> float | None:
        """The device's roofline: no run is faster. None where the device's peak is not known."""
        return sum(self.seconds_by_stage.values()) if self.seconds_by_stage else None

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """The same by stage: its products at the device's peak; denoising also reads the weights in every forward."""
        peak, bandwidth = self.device.peak_tflops, self.device.bandwidth
        if peak is None or bandwidth is None:
            return {}
        seconds = {stage: count / peak / 1e12 for stage, count in self.flops.items()}
        narrow = sum(count * (1 / (self.device.peak_tops(name) or peak) - 1 / peak) for name, count in self.flops_8bit.items())
        weights = [count for label, count in self.memory.weights.items() if label.startswith("DiT")]
        reading = self.forwards * sum(weights) / len(weights) / bandwidth
        return {**seconds, "denoise": max(seconds["denoise"] + narrow / 1e12, reading)}

    def to_dict(self) -> dict[str, Any]:
        request, config = dataclasses.asdict(self.request), dataclasses.asdict(self.config)
        return {
            "task": self.config.task,
            "checkpoint": str(self.checkpoint.path) if self.checkpoint else None,
            "config": config,
            "request": request,
            "device": dataclasses.asdict(self.device),
            "dtype": self.dtype,
            "vae_dtype": self.vae_dtype,
            "image_dtype": self.image_dtype,
            "linears": self.linears,
            "quality": self.quality,
            "framing": dataclasses.asdict(self.framing),
            "latent_shape": self.latent_shape,
            "tokens": self.tokens,
            "steps": [
                {
                    **dataclasses.asdict(step),
                    "run_cond": step.conditional == "run",
                    "run_uncond": step.unconditional == "run",
                }
                for step in self.steps
            ],
            "preset": self.preset,
            "step_cache": self.step_cache,
            "loras": list(self.loras),
            "forwards": self.forwards,
            "forwards_uncached": self.forwards_uncached,
            "memory": {f.name: _plain(getattr(self.memory, f.name)) for f in dataclasses.fields(self.memory)},
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
            "flops": dict(self.flops),
            "flops_8bit": dict(self.flops_8bit),
            "seconds_at_least": self.seconds_at_least,
            "seconds_by_stage": self.seconds_by_stage,
            "warnings": list(self.warnings),
        }


def plan(config: EngineConfig, request: Request, setup: Setup | None = None, *, on: str | None = None) -> Plan:
    """Everything known beforehand about making one video; allocates nothing and downloads nothing.

    Args:
        config: the engine.
        request: the video.
        setup: what `set_up(config)` returned, where it is at hand.
        on: a card to plan for in the place of the device, which need not be here: "h200", "RTX 4090".

    Raises:
        WanFastError: the request cannot be carried out, with what is wrong and what to do.
    """
    spec = config.spec
    resolve(spec, request)  # what is wrong with it whatever the checkpoint
    setup = setup or set_up(config, named(on) if on is not None else None)
    config = config if config.quality is None else setup.config
    opened = setup.checkpoint
    request, preset, warnings = named_preset(request, setup)
    warnings += filter(None, [to_be_given(config) if opened is None else ""])
    todo = resolve(spec, request, Request(**opened.defaults) if opened and opened.defaults else None)
    # one that goes to both experts says the same in each
    warnings += dict.fromkeys(warning for files in setup.loras.values() for file in files for warning in file.warnings)
    framing = FRAME[spec.kind](todo, spec, request)
    warnings += [*_untrained(spec, todo, opened), *filter(None, [framing.note])]
    if config.use_relighting_lora and not todo.replace_flag:
        warnings.append("--use_relighting_lora fits a person to the light of the video they are put into; add --replace_flag")
    fps = todo.fps if request.fps is not None or framing.fps is None else framing.fps
    todo = replace(todo, size=framing.size, num_frames=framing.num_frames, fps=fps)
    if config.offload_model and setup.device.type == "cpu":
        warnings.append("--offload_model True changes nothing: the device is the CPU, where the models are already")
    if setup.vae_dtype == "fp16" and setup.device.type == "cpu":
        warnings.append("--vae_dtype fp16 is very slow on a CPU; bf16 or fp32 is not")
    C, T, H, W = spec.vae_spec.latent_shape(todo.size, todo.num_frames)
    T = framing.latent_frames or T
    latent_shape = C, T + framing.leading, H, W
    if todo.noise is not None:
        _check_noise(Path(todo.noise), latent_shape, framing)
    models = Models.of(spec, opened)
    tokens = tokens_by_clip(next(iter(models.experts.values())), framing, latent_shape, todo)
    steps, step_cache, said = schedule(
        config, replace(todo, num_frames=framing.clip_frames), opened, next(iter(models.experts.values())), setup.preset
    )
    warnings += said
    targets = {target for files in setup.loras.values() for file in files if file.lora.strength for target in file.updates}
    if step_cache.startswith("teacache") and any(target.startswith("time_") for target in targets):
        warnings.append("--step-cache teacache goes by the checkpoint's time embedding, which a LoRA changes; take magcache")
    memory = memory_plan(config, models, setup, framing, latent_shape, max(tokens), todo, steps)
    flops = _flops(models, spec, steps, framing, latent_shape, tokens, todo)
    if memory.decode_tiles > 1:
        times = _tiled_flops(models.vae, (C, T, H, W), memory.decode_tiles) / flops["decode"]
        flops["decode"] *= times
        warnings.append(
            f"to keep the budget of {gib(memory.budget)} frames are decoded in {memory.decode_tiles} strips, the same pixels "
            f"for {times:.2f} times the work; the clip waits in host memory until the last strip is done"
        )
    return Plan(
        config=config,
        request=todo,
        device=setup.device,
        dtype=setup.dtype,
        vae_dtype=setup.vae_dtype,
        image_dtype=setup.image_dtype,
        linears=setup.linears,
        quality=setup.quality,
        checkpoint=opened,
        framing=framing,
        latent_shape=latent_shape,
        tokens=max(tokens),
        steps=steps,
        preset=preset,
        step_cache=step_cache,
        loras=tuple(
            file.described() + ("" if name == "model" else f"; in {name}")
            for name, files in setup.loras.items()
            for file in files
        ),
        memory=memory,
        kernels=setup.kernels,
        flops=flops,
        flops_8bit=_flops_8bit(models, setup, config, steps, sum(tokens), sum(count**2 for count in tokens)),
        warnings=tuple(warnings),
    )


def tokens_by_clip(dims: manifest.DiTDims, framing: Framing, latent_shape: tuple[int, ...], request: Resolved) -> list[int]:
    """Of each clip, those that the model puts behind its own among them."""
    _, T, H, W = latent_shape
    frame = H * W // prod(PATCH)
    alone = [segment.index == 0 and not request.start_from_ref for segment in framing.clips]
    return [
        (T + framing.trailing) * frame + sum(extension.extra_tokens(latent_shape, first) for extension in dims.extensions)
        for first in alone
    ]


def _tiled_flops(dims: manifest.VaeDims, latent_shape: tuple[int, ...], tiles: int) -> float:
    """FLOPs of decoding in strips: what is below the latent's doubled size for each of them, the others with their halos."""
    T, h, w = latent_shape[1:]
    every = manifest.vae_flops(dims, "decoder", T, h, w)
    above = manifest.vae_flops(dims, "decoder", T, h, w, above=0)
    return tiles * (every - above) + sum(strips(latent_shape, tiles)) * above


def _check_noise(file: Path, latent_shape: tuple[int, ...], framing: Framing) -> None:
    header = read_safetensors_header(file)
    for name in framing.noises:
        _check_one_noise(file, name, header, latent_shape)


def _check_one_noise(file: Path, name: str, header: Mapping[str, Any], latent_shape: tuple[int, ...]) -> None:
    if name not in header:
        raise WanFastError(f"--noise {str(file)!r} has no tensor {name!r}, it has: {', '.join(sorted(header)[:4]) or 'none'}")
    dtype, shape = header[name]
    if shape != latent_shape or dtype not in ("F32", "BF16", "F16"):
        raise WanFastError(
            f"--noise {str(file)!r} holds {dtype.lower()} {list(shape)}, this size and length need f32 {list(latent_shape)}; "
            "change --size or --frame_num, or the file"
        )


def _flops(
    models: Models,
    spec: TaskSpec,
    steps: tuple[Step, ...],
    framing: Framing,
    latent_shape: tuple[int, ...],
    tokens: Sequence[int],
    request: Resolved,
) -> dict[str, float]:
    forwards = sum(step.forwards for step in steps)
    dims = next(iter(models.experts.values()))
    used = len({step.expert for step in steps})
    texts = 1 if all(step.unconditional == "none" for step in steps) else 2
    T, h, w = latent_shape[1] - framing.leading, *latent_shape[2:]
    own = prod(latent_shape[1:]) // prod(PATCH)
    flops = {
        "text": texts * manifest.text_flops(models.text, 512)
        + max(step.passes for step in steps) * used * manifest.dit_text_flops(dims),
        "denoise": sum(
            forwards * manifest.dit_flops(dims, count, spec.image_tokens, own)
            + used * manifest.dit_inputs_flops(dims, latent_shape, spec.image_tokens)
            for count in tokens
        ),
        "decode": sum(
            manifest.vae_flops(models.vae, "decoder", max(T, (clip.skip + clip.count + 3) // 4), h, w) for clip in framing.clips
        ),
    }
    if models.image is not None:
        flops["image"] = spec.image_tokens // models.image.tokens * manifest.clip_flops(models.image)
    if models.audio is not None:
        flops["audio"] = float(manifest.audio_flops(models.audio, framing.samples))
    if framing.encoded:
        flops["encode"] = sum(
            manifest.vae_flops(models.vae, "encoder", frames, h, w, changing=changing) for frames, changing in framing.encoded
        )
    return flops


def _untrained(spec: TaskSpec, todo: Resolved, opened: Checkpoint | None) -> list[str]:
    """A word on a size, or an area, that the model was not trained for."""
    own = opened.defaults.get("size") if opened else None
    sizes = (*spec.sizes, tuple(own)) if own else spec.sizes
    known = {prod(size) for size in sizes} if todo.is_area else {*sizes}
    if (prod(todo.size) if todo.is_area else todo.size) in known:
        return []
    said = " ".join(f"{w}*{h}" for w, h in spec.sizes)
    what = "an area of " * todo.is_area
    return [f"{spec.name} was not trained for {what}{todo.size[0]}*{todo.size[1]}; it was for {said}"]


def _flops_8bit(
    models: Models, setup: Setup, config: EngineConfig, steps: tuple[Step, ...], tokens: int, pairs: int
) -> dict[str, float]:
    """Of the FLOPs of all steps those in 8 bits, by precision; `pairs` of tokens attend to each other."""
    flops: dict[str, float] = {}
    forms = setup.forms
    # queries by keys, and weights by values: in e4m3, where there is FP8
    scores = "fp8" if config.attention.startswith("fp8") else "int8"
    products = (scores, "fp8") if not setup.device.capability or setup.device.capability >= (8, 9) else (scores,)
    for step in steps:
        shapes = manifest.dit_shapes(models.experts[step.expert])
        per_forward: dict[str, float] = {}
        for name, shape in shapes.items():
            linear = schemes.linear_of(name) or ""
            form = forms.get(step.expert, {}).get(linear)
            if form and not linear.endswith((".k", ".v", ".k_img", ".v_img")):  # those are computed once
                per_forward[form.precision] = per_forward.get(form.precision, 0) + 2.0 * tokens * prod(shape)
        if step.attention == "8-bit":
            dims, keep = models.experts[step.expert], config.keep_blocks or 0
            blocks = [i for i in (*range(dims.num_layers), *dims.vace_layers) if keep <= i < dims.num_layers - keep]
            for product in products:
                count = 2.0 * pairs * dims.dim * len(blocks)
                per_forward[product] = per_forward.get(product, 0) + count
        for precision, count in per_forward.items():
            flops[precision] = flops.get(precision, 0) + step.forwards * count
    return flops


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
