"""What is known of an engine before any request: device, dtypes, kernels, forms, and the models, from file headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from wan_fast import manifest, processes
from wan_fast.backends import KernelChoice, kernel_plan, settle_forms
from wan_fast.checkpoint import RELIGHTING, Checkpoint, locate
from wan_fast.config import ATTENTION_8BIT, EngineConfig, WanFastError
from wan_fast.device import Device, describe
from wan_fast.lora import Lora
from wan_fast.lora_files import LoraFile, open_loras
from wan_fast.quality import settle
from wan_fast.schemes import Form
from wan_fast.single_files import open_configured
from wan_fast.tasks import TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Sizes of the models at hand; those of the released ones where nothing is on disk yet."""

    experts: Mapping[str, manifest.DiTDims]
    text: manifest.Shapes
    vae: manifest.VaeDims
    image: manifest.ClipDims | None
    audio: manifest.AudioDims | None = None

    @classmethod
    def of(cls, spec: TaskSpec, opened: Checkpoint | None) -> Models:
        if opened is None:
            dims = manifest.DiTDims.of_task(spec)
            text = manifest.text_shapes(256384, 4096, 4096, 10240, 64, 24)
            vae, image = manifest.VaeDims.of_spec(spec.vae_spec), manifest.CLIP if spec.image_tokens else None
            audio = manifest.AUDIO if spec.audio_encoder else None
            return cls(experts=dict.fromkeys(spec.experts, dims), text=text, vae=vae, image=image, audio=audio)
        assert opened.text_encoder and opened.vae  # checked
        experts = {name: manifest.DiTDims.of_shapes(part.shapes, part.config) for name, part in opened.experts.items()}
        vae, clip = manifest.VaeDims.of_shapes(opened.vae.shapes), opened.image_encoder if spec.image_tokens else None
        image = manifest.ClipDims.of_shapes(clip.shapes) if clip else None
        heard = opened.audio_encoder if spec.audio_encoder else None
        audio = manifest.AudioDims.of_config(heard.config) if heard else None
        return cls(experts=experts, text=opened.text_encoder.shapes, vae=vae, image=image, audio=audio)


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
    image_dtype: str
    kernels: tuple[KernelChoice, ...]
    checkpoint: Checkpoint | None
    forms: Mapping[str, Mapping[str, Form]] = field(default_factory=dict)
    """Of each expert's linears that compute in 8 bits."""
    linears: str = ""
    """The same in words, and why."""
    loras: Mapping[str, tuple[LoraFile, ...]] = field(default_factory=dict)
    """Of each expert."""


def set_up(config: EngineConfig, device: Device | None = None) -> Setup:
    """Find the device, the compute dtype, the kernels and the checkpoint, which is checked if it is here.

    Args:
        config: the engine.
        device: another one than the configured, of `device.named`, say.

    Raises:
        WanFastError: something asked for is not there, or the checkpoint is not one of the task.
    """
    if processes.asked(config):  # a program of several processes may have an engine in each
        processes.check(config)
    opened = open_configured(config)
    device = device or describe(config.device)
    if config.cuda_graphs and device.type == "cpu":
        raise WanFastError("--cuda-graphs: the device is a CPU, which has none; leave it out")
    stored = opened is not None and any(part.stored_8bit for part in opened.experts.values())
    config, quality, preset = settle(config, device, stored)
    dtype = config.dtype if config.dtype != "auto" else "fp32" if device.type == "cpu" else "bf16"
    vae_dtype = config.vae_dtype if config.vae_dtype != "auto" else "fp32" if device.type == "cpu" else dtype
    # last: on a GPU it has to import torch
    forms, linears = settle_forms(config, device, dtype, opened)
    used = {form for by_linear in forms.values() for form in by_linear.values()}
    dims = next(iter(Models.of(config.spec, opened).experts.values()))
    kernels = kernel_plan(config, device, dtype, dims.head_dim, used, linears)
    if config.attention in ATTENTION_8BIT and config.keep_blocks and 2 * config.keep_blocks >= dims.num_layers:
        raise WanFastError(
            f"--keep_blocks {config.keep_blocks} at either end leaves none of {dims.num_layers} blocks; take a smaller number"
        )
    setup = Setup(
        config=config,
        quality=quality,
        preset=preset,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        # what the official encoder runs in
        image_dtype="fp16" if dtype == "bf16" and device.type != "cpu" else "fp32",
        kernels=kernels,
        checkpoint=opened,
        forms=forms,
        linears=linears,
    )
    return with_loras(setup, config)


def with_loras(setup: Setup, config: EngineConfig) -> Setup:
    """The setup with the LoRAs of another configuration.

    Raises:
        WanFastError: one cannot be read, or is not one for the model.
    """
    models = Models.of(config.spec, setup.checkpoint)
    shapes = {name: manifest.dit_shapes(dims) for name, dims in models.experts.items()}
    loras = (*config.loras, *_relighting(config, setup.checkpoint))
    return replace(setup, config=config, loras=open_loras(loras, shapes) if loras else {})


def _relighting(config: EngineConfig, opened: Checkpoint | None) -> tuple[Lora, ...]:
    """The LoRA that comes with Animate, where it is asked for."""
    if not config.use_relighting_lora or opened is None:
        return ()
    # which may be another than that of the DiT
    folder = locate(config.checkpoint, config.spec, download=False) or opened.path
    file = folder / RELIGHTING
    if not file.is_file():
        raise WanFastError(
            f"--use_relighting_lora: checkpoint {str(folder)!r} has no {RELIGHTING}; download the whole repository, or "
            "leave it out"
        )
    return (Lora(str(file), flag="--use_relighting_lora"),)
