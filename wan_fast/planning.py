"""Plan, then execute: everything that can be known before the first kernel. No weights, no GPU, no torch on a CPU.

A `Plan` is computed from the configuration, the request, the checkpoint's file headers and a description of the
device. The engine only executes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import floor, prod, sqrt
from pathlib import Path
from typing import Any

from wan_fast import checkpoint as checkpoints
from wan_fast import manifest, schemes
from wan_fast.backends import KernelChoice, kernel_plan, settle_forms
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import ATTENTION_8BIT, EngineConfig, Request, Resolved, WanFastError, resolve
from wan_fast.device import Device, describe, named
from wan_fast.headers import read_safetensors_header
from wan_fast.quality import settle
from wan_fast.schedule import schedule
from wan_fast.schemes import Form
from wan_fast.steps import Step
from wan_fast.tasks import PATCH, TILE_HALO, TaskSpec
from wan_fast.video import image_size

GIB = 2**30
# How a clip is decoded, the first that fits: latent frames at a time, and of these, frames at a time in the two upper levels,
# where the memory is. All are exact. On a CPU two are 1.07 x the speed of one (2.2 VAE at a quarter of its width, latents
# 48x3x8x12, fp32, 2 threads of an AMD EPYC); on a GPU a single frame of those levels has more tiles than there are processors,
# and two are as long as the history of a convolution, which then needs no copy.
DECODES = {"cpu": ((2, 8), (1, 4), (1, 1)), "cuda": ((2, 2), (1, 2))}
# where that is too much, strips one after the other
TILES = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device. `weights` by model, `working` and `peak` by stage.

    decode_chunk: latent frames that are decoded at a time. decode_piece: frames of these at a time in the VAE's upper levels.
    decode_tiles: strips of a frame, one after the other; 1 for whole frames.
    """

    budget: int
    offload: bool
    weights: Mapping[str, int]
    working: Mapping[str, int]
    peak: Mapping[str, int]
    decode_chunk: int
    decode_piece: int
    decode_tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do. `request` has every default filled in; `size` is final, in pixels."""

    config: EngineConfig
    request: Resolved
    device: Device
    dtype: str
    vae_dtype: str
    linears: str
    quality: str
    checkpoint: Checkpoint | None
    latent_shape: tuple[int, int, int, int]
    tokens: int
    steps: tuple[Step, ...]
    step_cache: str
    memory: MemoryPlan
    kernels: tuple[KernelChoice, ...]
    flops: Mapping[str, float]
    flops_8bit: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def forwards(self) -> int:
        """Passes through the block stack."""
        return sum(step.forwards for step in self.steps)

    @property
    def forwards_uncached(self) -> int:
        """The same, were none left out."""
        return sum(1 + (step.unconditional != "none") for step in self.steps)

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
            "linears": self.linears,
            "quality": self.quality,
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
            "step_cache": self.step_cache,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is known of an engine before any request. `config` is without a preset: `quality` says what it took, and `preset`
    which fields."""

    config: EngineConfig
    quality: str
    preset: frozenset[str]
    device: Device
    dtype: str
    vae_dtype: str
    kernels: tuple[KernelChoice, ...]
    checkpoint: Checkpoint | None
    forms: Mapping[str, Mapping[str, Form]] = field(default_factory=dict)
    """Of each expert's linears that compute in 8 bits."""
    linears: str = ""
    """The same in words, and why."""


def set_up(config: EngineConfig, device: Device | None = None) -> Setup:
    """Find the device, the compute dtype, the kernels and the checkpoint, which is checked if it is here.

    Args:
        config: the engine.
        device: another one than the configured, of `device.named`, say.

    Raises:
        WanFastError: something asked for is not there, or the checkpoint is not one of the task.
    """
    path = checkpoints.locate(config.checkpoint, config.spec, download=False)
    opened = checkpoints.open_checkpoint(path) if path else None
    if opened:
        checkpoints.check(opened, config.spec)
    device = device or describe(config.device)
    stored = opened is not None and any(part.stored_8bit for part in opened.experts.values())
    config, quality, preset = settle(config, device, stored)
    dtype = config.dtype if config.dtype != "auto" else "fp32" if device.type == "cpu" else "bf16"
    vae_dtype = config.vae_dtype if config.vae_dtype != "auto" else "fp32" if device.type == "cpu" else dtype
    # last: on a GPU it has to import torch
    forms, linears = settle_forms(config, device, dtype, opened)
    used = {form for by_linear in forms.values() for form in by_linear.values()}
    dims = next(iter(_Models.of(config.spec, opened).experts.values()))
    kernels = kernel_plan(config, device, dtype, dims.head_dim, used, linears)
    if config.attention in ATTENTION_8BIT and config.keep_blocks and 2 * config.keep_blocks >= dims.num_layers:
        raise WanFastError(
            f"--keep_blocks {config.keep_blocks} at either end leaves none of {dims.num_layers} blocks; take a smaller number"
        )
    return Setup(
        config=config,
        quality=quality,
        preset=preset,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        kernels=kernels,
        checkpoint=opened,
        forms=forms,
        linears=linears,
    )


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
    todo = resolve(spec, request, Request(**opened.defaults) if opened and opened.defaults else None)
    warnings = []
    if todo.image is not None:
        todo = replace(todo, size=best_size(todo.size, image_size(Path(todo.image)), spec.vae_spec.grid))
    elif todo.size not in (*spec.sizes, opened.defaults.get("size") if opened else None):
        known = " ".join(f"{w}*{h}" for w, h in spec.sizes)
        warnings.append(f"{spec.name} was not trained for {todo.size[0]}*{todo.size[1]}; it was for {known}")
    if config.offload_model and setup.device.type == "cpu":
        warnings.append("--offload_model True changes nothing: the device is the CPU, where the models are already")
    if setup.vae_dtype == "fp16" and setup.device.type == "cpu":
        warnings.append("--vae_dtype fp16 is very slow on a CPU; bf16 or fp32 is not")
    latent_shape = spec.vae_spec.latent_shape(todo.size, todo.num_frames)
    if todo.noise is not None:
        _check_noise(Path(todo.noise), latent_shape)
    tokens = prod(latent_shape[1:]) // prod(PATCH)
    models = _Models.of(spec, opened)
    steps, step_cache, said = schedule(config, todo, opened, next(iter(models.experts.values())), setup.preset)
    warnings += said
    memory = _memory_plan(config, models, setup, latent_shape, todo, steps)
    flops = _flops(models, steps, latent_shape, tokens, todo)
    if memory.decode_tiles > 1:
        times = _tiled_flops(models.vae, latent_shape, memory.decode_tiles) / flops["decode"]
        flops["decode"] *= times
        warnings.append(
            f"to keep the budget of {_gib(memory.budget)} frames are decoded in {memory.decode_tiles} strips, the same pixels "
            f"for {times:.2f} times the work; the clip waits in host memory until the last strip is done"
        )
    return Plan(
        config=config,
        request=todo,
        device=setup.device,
        dtype=setup.dtype,
        vae_dtype=setup.vae_dtype,
        linears=setup.linears,
        quality=setup.quality,
        checkpoint=opened,
        latent_shape=latent_shape,
        tokens=tokens,
        steps=steps,
        step_cache=step_cache,
        memory=memory,
        kernels=setup.kernels,
        flops=flops,
        flops_8bit=_flops_8bit(models, setup, config, steps, tokens),
        warnings=tuple(warnings),
    )


def best_size(area_size: tuple[int, int], image: tuple[int, int], grid: int) -> tuple[int, int]:
    """(width, height) on the grid, within the area of `area_size`, closest to the shape of a picture.

    Of the two candidates (width floored first, or height) the one whose aspect ratio is closer wins; the second on a tie.
    """
    area, ratio = area_size[0] * area_size[1], image[0] / image[1]
    width = sqrt(area * ratio)
    height = area / width
    candidates = []
    for side, flip in ((width, False), (height, True)):
        first = floor(side / grid) * grid
        second = floor(area / first / grid) * grid if first else 0
        candidates.append((second, first) if flip else (first, second))
    fitting = [c for c in candidates if min(c) >= grid]
    if not fitting:
        raise WanFastError(
            f"an area of {area_size[0]}*{area_size[1]} is too small for a picture of {image[0]}*{image[1]} on the {grid}-pixel "
            "grid; give a larger --size"
        )
    error = [max(ratio / (w / h), (w / h) / ratio) for w, h in fitting]
    return fitting[0] if error[0] < error[-1] else fitting[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    """Sizes of the models at hand; those of the released ones where nothing is on disk yet."""

    experts: Mapping[str, manifest.DiTDims]
    text: manifest.Shapes
    vae: manifest.VaeDims

    @classmethod
    def of(cls, spec: TaskSpec, opened: Checkpoint | None) -> _Models:
        if opened is None:
            dims = manifest.DiTDims.of_task(spec)
            text = manifest.text_shapes(256384, 4096, 4096, 10240, 64, 24)
            return cls(experts=dict.fromkeys(spec.experts, dims), text=text, vae=manifest.VaeDims.of_spec(spec.vae_spec))
        assert opened.text_encoder and opened.vae  # checked
        experts = {name: manifest.DiTDims.of_shapes(part.shapes, part.config) for name, part in opened.experts.items()}
        return cls(experts=experts, text=opened.text_encoder.shapes, vae=manifest.VaeDims.of_shapes(opened.vae.shapes))


def _memory_plan(
    config: EngineConfig,
    models: _Models,
    setup: Setup,
    latent_shape: tuple[int, int, int, int],
    request: Resolved,
    steps: tuple[Step, ...],
) -> MemoryPlan:
    """Weights and working memory by stage; models take turns on the device only where the budget asks for it."""
    device, size = setup.device, 2 if setup.dtype == "bf16" else 4
    weights = {"text encoder": size * manifest.num_parameters(models.text)}
    for name, dims in models.experts.items():
        label = "DiT" if name == "model" else f"DiT {name}"
        weights[label] = _dit_bytes(dims, setup.forms.get(name, {}), size)
    vae_size = 4 if setup.vae_dtype == "fp32" else 2
    weights["VAE"] = vae_size * manifest.num_parameters(manifest.vae_shapes(models.vae))
    if config.t5_cpu and device.type != "cpu":
        weights["text encoder"] = 0
    budget = config.vram if config.vram is not None else device.free
    dits = [label for label in weights if label.startswith("DiT")]
    fused = all(kernel.backend != "reference" for kernel in setup.kernels)
    at_work = {"text": ["text encoder"], "denoise": dits, "decode": ["VAE"]}
    working = {
        "text": _text_bytes(models.text, size),
        "denoise": _denoise_bytes(models.experts, latent_shape, size, fused, setup.forms, config.attention in ATTENTION_8BIT)
        + _kept_bytes(models.experts, latent_shape, size, steps),
    }
    if request.image is not None:
        at_work["encode"] = ["VAE"]
        working["encode"] = _encode_bytes(models.vae, latent_shape, vae_size, fused)
    asked = config.offload_model if device.type != "cpu" else False
    whole = [(*decode, 1) for decode in DECODES[device.type]]
    tiled = [(*DECODES[device.type][-1], tiles) for tiles in TILES if tiles <= max(latent_shape[2:])]
    placings = (False, True) if asked is None else (asked,)
    for offload, (chunk, piece, tiles) in (*product(placings, whole), *product(placings, tiled)):
        working["decode"] = _decode_bytes(models.vae, latent_shape, chunk, piece, tiles, vae_size, fused)
        if tiles > 1 and device.type == "cpu":  # where the clip waits for its last strip
            working["decode"] += 3 * vae_size * prod(request.size) * request.num_frames
        # with offload one model at a time is on the device: of two experts the larger counts
        resident = {
            stage: max(weights[label] for label in labels) if offload else sum(weights.values())
            for stage, labels in at_work.items()
        }
        peak = {stage: resident[stage] + working[stage] for stage in at_work}
        if max(peak.values()) <= budget:
            return MemoryPlan(
                budget=budget,
                offload=offload,
                weights=weights,
                working=working,
                peak=peak,
                decode_chunk=chunk,
                decode_piece=piece,
                decode_tiles=tiles,
            )
    worst = max(peak, key=lambda stage: peak[stage])
    absent = "" if setup.checkpoint else f" (checkpoint {config.checkpoint or config.spec.hub_id} is not here: released sizes)"
    raise WanFastError(
        f"out of memory by plan{absent}: stage {worst} needs {_gib(peak[worst])} on {device.name} "
        f"({_gib(resident[worst])} weights, {_gib(working[worst])} working), the budget is {_gib(budget)}; "
        + _advice(config, device, setup.dtype, worst)
    )


def _advice(config: EngineConfig, device: Device, dtype: str, stage: str) -> str:
    """Ways out of a plan that does not fit, those that help the stage at fault."""
    ways = [] if stage == "text" else ["take a smaller --size or --frame_num"]
    if device.type != "cpu" and config.offload_model is False:
        ways.append("leave out --offload_model False")
    if device.type != "cpu" and not config.t5_cpu and (stage == "text" or config.offload_model is False):
        ways.append("add --t5_cpu")
    if dtype == "fp32" and stage != "decode":
        ways.append("add --dtype bf16")
    return ", ".join([*ways, "raise --vram" if config.vram else "free memory"])


def _text_bytes(text: manifest.Shapes, size: int) -> int:
    """Peak working bytes of encoding 512 tokens: scores of one layer in fp32, twice, and the feed-forward."""
    heads = text["blocks.0.pos_embedding.embedding.weight"][1]
    ffn_dim, dim = text["blocks.0.ffn.fc1.weight"]
    return 512 * (3 * 4 * heads * 512 + size * 4 * ffn_dim + 4 * 4 * dim)


def _denoise_bytes(
    experts: Mapping[str, manifest.DiTDims],
    latent_shape: tuple[int, ...],
    size: int,
    fused: bool,
    forms: Mapping[str, Mapping[str, Form]],
    attention_8bit: bool,
) -> int:
    """Peak working bytes of a step: the residual stream, the larger of attention and feed-forward, text keys and values.

    `fused`: with kernels; the references hold fp32 copies of q or k, and the turn of every token, beside them.
    """
    L = prod(latent_shape[1:]) // prod(PATCH)
    largest = 0
    for name, dims in experts.items():
        D, F, S = dims.dim, dims.ffn_dim, dims.text_len
        # the normed stream, q, k and v, what attention returns and its projection
        attention = L * D * 6 * size if fused else L * D * (5 * size + 12) + L * dims.head_dim * 4
        if attention_8bit:  # q, k and v once more with their scales, before the projection; the references hold fp32 copies
            in_8_bits = 5 * size * D + 3 * D + 12 * dims.num_heads
            attention = max(attention, L * (in_8_bits if fused else in_8_bits + 24 * D))
        # what the block was given is held by its caller
        feed_forward = L * (3 * D * size + F * size)
        down = forms.get(name, {}).get(f"blocks.{dims.num_layers // 2}.ffn.2")
        if down:
            # GELU makes another hidden layer, in 8 bits; it follows in the same pass where no scale is of the whole row. The
            # references hold two in fp32 between
            before = 0 if down.input != "row" and fused else size if fused else size + 8
            feed_forward = max(L * (2 * D + int(F * (before + 1.04))), feed_forward if _some_whole(forms[name], dims) else 0)
        text = 2 * len(experts) * dims.num_layers * 2 * S * D * size
        largest = max(largest, L * D * 4 + max(attention, feed_forward) + text)
    # latents, two velocities, the solver's three, and tokens of the head
    return largest + 10 * 4 * prod(latent_shape)


def _kept_bytes(
    experts: Mapping[str, manifest.DiTDims], latent_shape: tuple[int, ...], size: int, steps: tuple[Step, ...]
) -> int:
    """What caches keep from step to step: a residual of the block stack per branch that is reused, and the difference between
    the branches, in two bands where they are weighed by themselves, with what a Fourier transform holds besides."""
    tokens = prod(latent_shape[1:]) // prod(PATCH)
    branches = any(step.conditional == "reuse" for step in steps) + any(step.unconditional == "reuse" for step in steps)
    residuals = branches * tokens * max(dims.dim for dims in experts.values()) * size
    reconstructed = [step.difference for step in steps if step.unconditional == "reconstruct"]
    in_bands = any(low != high for low, high in reconstructed)
    return residuals + bool(reconstructed) * (6 if in_bands else 1) * 4 * prod(latent_shape)


def _some_whole(forms: Mapping[str, Form], dims: manifest.DiTDims) -> bool:
    """Whether the feed-forward of a block is not in 8 bits."""
    return any(f"blocks.{i}.ffn.2" not in forms for i in range(dims.num_layers))


def _decode_bytes(
    dims: manifest.VaeDims, latent_shape: tuple[int, ...], chunk: int, piece: int, tiles: int, size: int, fused: bool
) -> int:
    """Peak working bytes of `WanVAE.decode_stream`, `size` bytes to an element.

    Two frames of history per temporal convolution; what a chunk is below the upper two levels, and a piece at their widest,
    where `fused` is False with what the references hold beside their results.
    """
    _, T, h, w = latent_shape
    strip = max(_strips(latent_shape, tiles))
    history = 0.0
    for name, shape in manifest.vae_shapes(dims).items():
        if name.startswith("decoder") and len(shape) == 5 and shape[2] == 3:
            level = manifest.decoder_level(name, dims)
            history += size * 2 * shape[1] * h * w * 4**level * (strip if level else 1)
    frames = 4 * min(chunk, T - 1) if T > 1 else 1
    # Wan 2.1 halves the width as it doubles the height
    width = size * dims.decoder_dim * h * w * (2 if dims.version == "2.2" else 1)
    below, frame = 32 * frames * width * strip, 64 * width * strip
    # frames at their widest: those of a piece, and a history while the one before it is there; two frames become it as they are
    piece = min(piece, frames)
    copied = 0 if piece == 2 else 2
    of_piece, rest = (3.06, copied) if dims.version == "2.1" else (2.06, copied) if piece <= 2 else (2.55, 1.05)
    alive = below + (of_piece * piece + rest) * frame
    if fused:
        return int(1.01 * history + alive)
    # in fp32 narrow layers run with the channels of three frames side by side
    return int(1.2 * history + (2.2 if size == 4 and dims.decoder_dim < 64 else 1.85) * alive)


def _encode_bytes(dims: manifest.VaeDims, latent_shape: tuple[int, ...], size: int, fused: bool) -> int:
    """Peak working bytes of encoding one picture: the histories, and what is alive at the first level."""
    h, w = latent_shape[2:]
    history = 0
    for name, shape in manifest.vae_shapes(dims).items():
        if name.startswith("encoder") and len(shape) == 5 and shape[2] == 3:
            history += size * 2 * shape[1] * h * w * 4 ** manifest.encoder_level(name, dims)
    alive = size * 4 * dims.encoder_dim * h * w * 64
    return history + alive if fused else int(1.2 * history + 1.5 * alive)


def _strips(latent_shape: tuple[int, ...], tiles: int) -> list[float]:
    """Parts of the longer side that the strips take with their halos."""
    h, w = latent_shape[2:]
    size = 2 * max(h, w)
    cut = manifest.strips(h, w, tiles)
    return [(min(last + TILE_HALO, size) - max(first - TILE_HALO, 0)) / size for first, last in cut]


def _tiled_flops(dims: manifest.VaeDims, latent_shape: tuple[int, ...], tiles: int) -> float:
    """FLOPs of decoding in strips: what is below the latent's doubled size for each of them, the others with their halos."""
    T, h, w = latent_shape[1:]
    every = manifest.vae_flops(dims, "decoder", T, h, w)
    above = manifest.vae_flops(dims, "decoder", T, h, w, above=0)
    return tiles * (every - above) + sum(_strips(latent_shape, tiles)) * above


def _check_noise(file: Path, latent_shape: tuple[int, ...]) -> None:
    header = read_safetensors_header(file)
    if "noise" not in header:
        raise WanFastError(f"--noise {str(file)!r} has no tensor 'noise', it has: {', '.join(sorted(header)[:4]) or 'none'}")
    dtype, shape = header["noise"]
    if shape != latent_shape or dtype not in ("F32", "BF16", "F16"):
        raise WanFastError(
            f"--noise {str(file)!r} holds {dtype.lower()} {list(shape)}, this size and length need f32 {list(latent_shape)}; "
            "change --size or --frame_num, or the file"
        )


def _dit_bytes(dims: manifest.DiTDims, forms: Mapping[str, Form], size: int) -> int:
    """Bytes of a DiT's weights, `size` to an element of the compute dtype."""
    total = 0
    for name, shape in manifest.dit_shapes(dims).items():
        form = forms.get(schemes.linear_of(name) or "")
        if form:
            total += prod(shape) + schemes.scale_bytes(shape, form)
        else:
            total += prod(shape) * (4 if manifest.stays_fp32(name) else size)
    return total


def _flops(
    models: _Models, steps: tuple[Step, ...], latent_shape: tuple[int, ...], tokens: int, request: Request
) -> dict[str, float]:
    forwards = sum(step.forwards for step in steps)
    dims = next(iter(models.experts.values()))
    used = len({step.expert for step in steps})
    _, T, h, w = latent_shape
    flops = {
        "text": 2 * manifest.text_flops(models.text, 512) + 2 * used * manifest.dit_text_flops(dims),
        "denoise": forwards * manifest.dit_flops(dims, tokens),
        "decode": manifest.vae_flops(models.vae, "decoder", T, h, w),
    }
    if request.image is not None:
        flops["encode"] = manifest.vae_flops(models.vae, "encoder", 1, h, w)
    return flops


def _flops_8bit(models: _Models, setup: Setup, config: EngineConfig, steps: tuple[Step, ...], tokens: int) -> dict[str, float]:
    """Of the FLOPs of all steps those in 8 bits, by precision."""
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
            if form and not linear.endswith(("cross_attn.k", "cross_attn.v")):  # those are computed once
                per_forward[form.precision] = per_forward.get(form.precision, 0) + 2.0 * tokens * prod(shape)
        if step.attention == "8-bit":
            dims = models.experts[step.expert]
            for product in products:
                count = 2.0 * tokens * tokens * dims.dim * (dims.num_layers - 2 * (config.keep_blocks or 0))
                per_forward[product] = per_forward.get(product, 0) + count
        for precision, count in per_forward.items():
            flops[precision] = flops.get(precision, 0) + step.forwards * count
    return flops


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
