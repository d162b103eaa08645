"""Cases of whole models and whole runs: DiT forward, official recipe, VAE, text encoder, denoising, end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from models import official_grid
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from bench.official import Habits, official_step
from bench.operations import latent_shape
from bench.registry import OURS, Case, NotHere, Work
from bench.timer import graph, now
from wan_fast import manifest
from wan_fast.attention import Attention, choose, first_that_runs, sdpa
from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.config import EngineConfig, Request
from wan_fast.dit import WanDiT, grid_of
from wan_fast.inputs import Inputs
from wan_fast.kernels import only_reference
from wan_fast.manifest import DiTDims, VaeDims, stays_fp32
from wan_fast.memory import DECODES
from wan_fast.names import DIT_NAMES, VAE21_NAMES, VAE22_NAMES, Rules, native_name
from wan_fast.profiling import busy
from wan_fast.tasks import TASKS, VACE_DIM, VAES
from wan_fast.vae import WanVAE

FP32, BF16 = torch.float32, torch.bfloat16


def random_model(
    build: Callable[[], nn.Module],
    shapes: manifest.Shapes,
    device: torch.device,
    dtype: Callable[[str], torch.dtype] = lambda name: FP32,
) -> Any:
    """A model with random weights of ordinary size, made where it works: nothing passes through the host."""
    with torch.device("meta"):
        model = build()
    state = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) == 1 else (shape[0] / prod(shape)) ** 0.5
        # norms have gains around 1, biases and modulation are small
        offset = 1.0 if name.endswith("gamma") or ("norm" in name and name.endswith("weight")) else 0.0
        if name.endswith("gamma") or "modulation" in name:
            scale = 0.1
        state[name] = torch.randn(shape, dtype=dtype(name), device=device).mul_(scale).add_(offset)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def give_weights(theirs: nn.Module, ours: nn.Module, names: Rules, convert: Callable[[str, Tensor], Tensor]) -> Any:
    """Fill a diffusers model, built on meta, with our weights under its own names, by which they may be converted."""
    state = ours.state_dict()
    renamed = {name: convert(name, state[str(native_name(name, names))]) for name in theirs.state_dict()}
    theirs.load_state_dict(renamed, assign=True)
    return theirs.requires_grad_(False).eval()


# --- DiT ----------------------------------------------------------------------------------------------------------------


def attention_for(dims: DiTDims, dtype: torch.dtype, device: torch.device) -> Attention:
    """What the engine would take with --attention auto."""
    if device.type != "cuda":
        return sdpa
    rows = choose("auto", torch.cuda.get_device_capability(device), "bf16" if dtype == BF16 else "fp32", dims.head_dim)
    return first_that_runs(rows, device, dtype, dims.num_heads, dims.head_dim)[1]


def make_dit(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Our model and the inputs of a forward."""
    attention = attention_for(dims, dtype, device)
    model = random_model(
        lambda: WanDiT(dims, attention), manifest.dit_shapes(dims), device, lambda name: FP32 if stays_fp32(name) else dtype
    )
    text = torch.randn(1, dims.text_len, dims.text_dim, device=device)
    x = torch.randn(1, dims.out_dim, *shape[1:], device=device)
    t = torch.full((1,), 700.0, device=device)
    given: dict[str, Any] = {name: torch.randn_like(z, device=device) for name, z in Inputs.blank(dims, shape).tensors()}
    inputs = Inputs(**given)
    context = model.prepare([text[0]], grid_of(x.shape), inputs)
    return {"model": model, "x": x, "t": t, "text": text, "inputs": inputs, "context": context}


def diffusers_dit(parts: Mapping[str, Any], dims: DiTDims, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The forward of diffusers' WanTransformer3DModel, in the dtypes in which it is loaded: some modules stay in fp32."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    kind = WanVACETransformer3DModel if dims.vace_layers else WanTransformer3DModel
    extra: dict[str, Any] = {"vace_layers": [*dims.vace_layers], "vace_in_channels": dims.vace_dim} if dims.vace_layers else {}
    if dims.image_dim:
        extra = {"image_dim": dims.image_dim, "added_kv_proj_dim": dims.dim, "pos_embed_seq_len": dims.image_positions or None}
    with torch.device("meta"):
        theirs = kind(
            num_attention_heads=dims.num_heads,
            attention_head_dim=dims.head_dim,
            in_channels=dims.in_dim,
            out_channels=dims.out_dim,
            text_dim=dims.text_dim,
            ffn_dim=dims.ffn_dim,
            num_layers=dims.num_layers,
            **extra,
        )
    in_fp32 = set(kind._keep_in_fp32_modules or ())
    give_weights(theirs, parts["model"], DIT_NAMES, lambda name, t: t.to(FP32 if in_fp32 & set(name.split(".")) else dtype))
    # its rotation table is no weight: computed on meta, it has no values
    theirs.rope = type(theirs.rope)(dims.head_dim, (1, 2, 2), 1024).to(parts["x"].device)
    x, t, text, inputs = parts["x"].to(dtype), parts["t"], parts["text"].to(dtype), parts["inputs"]
    given: dict[str, Any] = {"return_dict": False}
    if inputs.channels is not None:
        x = torch.cat([x, inputs.channels[None].to(dtype)], dim=1)
    if inputs.image is not None:
        given["encoder_hidden_states_image"] = inputs.image.to(dtype)
    if inputs.control is not None:
        given |= {
            "control_hidden_states": inputs.control[None].to(dtype),
            "control_hidden_states_scale": torch.ones(len(dims.vace_layers), device=x.device, dtype=dtype),
        }
    return lambda: theirs(x, t, text, **given)[0].float()


def dit(
    dims: DiTDims,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    version: str = "2.2",
    compiled: bool = False,
) -> Work:
    """One forward; the text is projected once for ours, as in a run, and at every call in diffusers and officially."""
    parts = make_dit(dims, shape, dtype, device)
    model, x, t, text, context = (parts[name] for name in ("model", "x", "t", "text", "context"))
    own = prod(grid_of(x.shape))
    images = 257 if dims.image_dim else 0
    # what is behind a clip's own tokens is at timestep 0 where sound moves a picture
    time, split = (F.pad(t[:, None], (0, 1)), own) if dims.speech else (t[:, None], 0)

    def ours() -> Tensor:
        return model(x, time, context, split=split)

    def graphed() -> Callable[[], Any]:
        if device.type != "cuda":
            raise NotHere("CUDA graphs need a GPU")
        return graph(ours)

    def cudnn() -> Callable[[], Tensor]:
        if device.type == "cpu":
            raise NotHere("cuDNN needs a GPU")
        forward = diffusers_dit(parts, dims, dtype)

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return forward()

        return call

    def theirs_compiled() -> Callable[[], Tensor]:
        if device.type != "cuda":
            raise NotHere("torch.compile is timed on a GPU only")
        return torch.compile(diffusers_dit(parts, dims, dtype), dynamic=False)

    def reference() -> Callable[[], Tensor]:
        if device.type == "cpu":
            raise NotHere("what runs without a GPU anyway")

        def call() -> Tensor:
            with only_reference():
                return ours()

        return call

    official = partial(official_step, model, x, t[:, None], [text[0]], context, Habits(modulation_per_token=version == "2.2"))
    rivals: dict[str, Callable[[], Callable[[], Any]]] = {
        f"{OURS}, graphed": graphed,
        f"{OURS}, --kernels reference": reference,
    }
    if not dims.extensions:
        rivals |= {} if dims.vace_layers else {"official recipe": lambda: official}
        rivals |= {"diffusers": lambda: diffusers_dit(parts, dims, dtype), "diffusers, SDPA cuDNN": cudnn}
    return Work(
        arms={OURS: lambda: ours, **({"diffusers, compiled": theirs_compiled} if compiled else rivals)},
        rate="bf16" if dtype == BF16 else "fp32",
        tolerance=1e-4 if dtype == FP32 else 5e-2,
        flops=manifest.dit_flops(dims, own + (0 if context.extra is None else context.extra.shape[1]), images, own),
        bytes=sum(w.nbytes for w in model.state_dict().values()) + 2 * x.nbytes,
    )


def shares(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Class of kernel -> its share of the time that the device is busy in one forward."""
    parts = make_dit(dims, shape, dtype, device)
    forward = partial(parts["model"], parts["x"], parts["t"][:, None], parts["context"])
    on_gpu = device.type == "cuda"
    with torch.inference_mode():
        forward()
        now(device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            forward()
            now(device)
    spent: dict[str, float] = {}
    for _, kind, microseconds in busy(profiler.events() or [], on_gpu):
        spent[kind] = spent.get(kind, 0.0) + microseconds
    whole = sum(spent.values())
    return {kind: part / whole for kind, part in sorted(spent.items(), key=lambda item: -item[1])}


def recipe(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """What each habit of the official step costs: the unfused step with none of them, with one, and with all."""
    parts = make_dit(dims, shape, dtype, device)
    model, x, t, context = (parts[name] for name in ("model", "x", "t", "context"))
    none = Habits(text_every_step=False, modulation_per_token=False, rotation_in_fp64=False)
    habits = {
        "unfused, with none of them": none,
        "text projected every step": replace(none, text_every_step=True),
        "modulation per token": replace(none, modulation_per_token=True),
        "rotation in fp64": replace(none, rotation_in_fp64=True),
        "all three, as officially": Habits(),
    }
    arms = {
        name: partial(official_step, model, x, t[:, None], [parts["text"][0]], context, habit) for name, habit in habits.items()
    }
    return Work(
        arms={
            OURS: lambda: lambda: model(x, t[:, None], context),
            **{n: partial(lambda call: call, c) for n, c in arms.items()},
        },
        rate="bf16" if dtype == BF16 else "fp32",
        tolerance=1e-4 if dtype == FP32 else 5e-2,
        flops=manifest.dit_flops(dims, prod(context.grid), 257 if dims.image_dim else 0),
        bytes=sum(w.nbytes for w in model.state_dict().values()) + 2 * x.nbytes,
    )


# --- VAE and text encoder -----------------------------------------------------------------------------------------------


def vae(
    dims: VaeDims, shape: tuple[int, int, int, int], encode: bool, device: torch.device, *, dtype: torch.dtype = FP32
) -> Work:
    """Decode latents, or encode a video of that latent size (fp32 with TF32 convolutions on a GPU)."""
    spec, (C, T, h, w) = VAES[dims.version], shape
    ours = random_model(lambda: WanVAE(dims), manifest.vae_shapes(dims), device, lambda name: dtype)
    decode = dict(zip(("chunk", "piece"), DECODES["cpu" if device.type == "cpu" else "cuda"][0], strict=True))
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (spec.mean, spec.std))
    z = torch.randn(C, T, h, w, device=device)
    frames, height, width = 4 * (T - 1) + 1, h * spec.stride[1], w * spec.stride[2]
    pixels = torch.rand(3, frames, height, width, device=device) * 2 - 1

    def diffusers(dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format) -> Callable[[], Tensor]:
        from diffusers import AutoencoderKLWan

        residual = dims.version == "2.2"
        with torch.device("meta"):
            theirs = AutoencoderKLWan(
                base_dim=dims.encoder_dim,
                decoder_base_dim=dims.decoder_dim,
                z_dim=dims.channels,
                latents_mean=list(spec.mean),
                latents_std=list(spec.std),
                is_residual=residual,
                in_channels=12 if residual else 3,
                out_channels=12 if residual else 3,
                patch_size=2 if residual else None,
                scale_factor_spatial=spec.stride[1],
            )
        # our weights lie channels-last: theirs are copies in the layout they expect
        give_weights(
            theirs,
            ours,
            VAE22_NAMES if residual else VAE21_NAMES,
            lambda _, t: t.to(dtype).clone(memory_format=torch.contiguous_format),
        )
        for module in theirs.modules():
            if isinstance(module, nn.Conv3d) and layout != torch.preserve_format:
                module.to(memory_format=layout)
        if encode:
            return lambda: ((theirs.encode(pixels[None].to(dtype)).latent_dist.mode().float() - mean) / std)[0]
        return lambda: theirs.decode((z[None] * std + mean).to(dtype), return_dict=False)[0][0].float()

    return Work(
        arms={
            OURS: lambda: partial(ours.encode, pixels) if encode else partial(ours.decode, z, **decode),
            "diffusers": partial(diffusers, dtype),
            **({"diffusers, channels-last": partial(diffusers, dtype, torch.channels_last_3d)} if device.type != "cpu" else {}),
        },
        rate="bf16" if dtype == BF16 else "tf32" if device.type == "cuda" else "fp32",
        tolerance=1e-4 if device.type == "cpu" and dtype == FP32 else 1e-1,
        flops=manifest.vae_flops(dims, "encoder" if encode else "decoder", T, h, w),
        bytes=sum(p.nbytes for p in (ours.encoder if encode else ours.decoder).parameters()) + z.nbytes + pixels.nbytes,
    )


def text(shapes: manifest.Shapes, count: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A prompt of `count` tokens: ours encodes those, the official code and diffusers a padded row of 512."""
    from wan_fast.encoders import TextEncoder

    ours = random_model(lambda: TextEncoder(shapes), shapes, device, lambda name: dtype)
    ids = torch.randint(2, shapes["token_embedding.weight"][0], (count,), device=device)
    padded = torch.cat([ids, ids.new_zeros(512 - count)])[None]
    mask = (torch.arange(512, device=device) < count).long()[None]

    def official() -> Tensor:
        return ours.model(input_ids=padded, attention_mask=mask).last_hidden_state[0, :count]

    return Work(
        arms={OURS: lambda: partial(ours, ids), "padded to 512, as in diffusers": lambda: official},
        rate="bf16" if dtype == BF16 else "fp32",
        tolerance=1e-4 if dtype == FP32 else 5e-2,
        flops=manifest.text_flops(shapes, count),
        bytes=sum(p.nbytes for n, p in ours.named_parameters() if "shared" not in n),
    )


# --- end to end ---------------------------------------------------------------------------------------------------------


def end_to_end(size: tuple[int, int], num_frames: int, num_steps: int, device: torch.device) -> Work:
    """Prompt to 8-bit frames on the bundled checkpoint, models loaded, one noise and one sigma grid for both."""
    from wan_fast.engine import Engine
    from wan_fast.running import tf32_convolutions

    spec = TASKS["ti2v-5B"]
    engine = Engine(EngineConfig(task=spec.name, checkpoint="tiny", device=str(device), dtype="fp32"))
    request = Request(prompt="a red ball bounces", size=size, num_frames=num_frames, num_steps=num_steps, seed=0)
    todo = engine.plan(request)
    stages: dict[str, dict[str, float]] = {}

    def ours() -> Tensor:
        video = engine.generate(request)
        stages[OURS] = {name: video.stats["seconds"][name] for name in ("prepare", "denoise", "decode")}
        return video.frames.float()

    def diffusers() -> Callable[[], Tensor]:
        from diffusers import WanPipeline

        pipe = WanPipeline.from_pretrained(str(locate("tiny", spec)), torch_dtype=FP32).to(device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = official_grid(num_steps, spec.shift)
        noise = torch.randn(
            spec.vae_spec.latent_shape(size, num_frames), generator=torch.Generator(device).manual_seed(0), device=device
        )

        def call() -> Tensor:
            start = now(device)
            with (
                tf32_convolutions(False),
                _timed(pipe, "encode_prompt", device) as prepare,
                _timed(pipe.vae, "decode", device) as decode,
            ):
                frames = pipe(
                    prompt=request.prompt,
                    negative_prompt=spec.negative_prompt,
                    width=size[0],
                    height=size[1],
                    num_frames=num_frames,
                    num_inference_steps=num_steps,
                    latents=noise[None].clone(),
                    output_type="np",
                ).frames[0]
            rest = now(device) - start - prepare[0] - decode[0]
            stages["diffusers"] = {"prepare": prepare[0], "denoise": rest, "decode": decode[0]}
            return torch.from_numpy(frames * 255)

        return call

    return Work(
        arms={OURS: lambda: ours, "diffusers": diffusers},
        rate="fp32",
        # ours are whole levels of 255
        tolerance=1e-2,
        flops=sum(todo.flops.values()),
        stages=stages,
    )


@contextmanager
def _timed(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """The seconds that a method takes while the block runs, in a list of one."""
    original, seconds = getattr(owner, name), [0.0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        try:
            return original(*args, **kwargs)
        finally:
            seconds[0] += now(device) - start

    setattr(owner, name, wrapped)
    try:
        yield seconds
    finally:
        delattr(owner, name)


# --- the rows -----------------------------------------------------------------------------------------------------------

_TINY = open_checkpoint(locate("tiny", TASKS["ti2v-5B"]))
_TOY = DiTDims.of_shapes(_TINY.experts["model"].shapes, _TINY.experts["model"].config)
_NARROW = DiTDims(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, in_dim=16, out_dim=16)
_NARROW_I2V = replace(_NARROW, in_dim=36, image_dim=1280)
_NARROW_VACE = replace(_NARROW, vace_layers=(0,), vace_dim=VACE_DIM)
_VAES = {version: VaeDims.of_spec(spec) for version, spec in VAES.items()}
_VAE22_TOY = VaeDims.of_shapes(_TINY.vae.shapes)
_UMT5_XXL = manifest.text_shapes(256384, 4096, 4096, 10240, 64, 24)
_UMT5_QUARTER = manifest.text_shapes(32768, 1024, 1024, 2560, 16, 6)


def _dit(task: str, *video: int) -> Callable[[torch.device], Work]:
    spec = TASKS[task]
    version = "2.2" if "Wan2.2" in spec.hub_id else "2.1"
    C, T, H, W = latent_shape(task, *video)
    leading = spec.kind == "animate"  # the picture's frame
    return partial(dit, DiTDims.of_task(spec), (C, T + leading, H, W), BF16, version=version)


def _vae(
    version: str, shape: tuple[int, int, int, int], encode: bool = False, dtype: torch.dtype = FP32
) -> Callable[[torch.device], Work]:
    return partial(vae, _VAES[version], shape, encode, dtype=dtype)


GPU_DIT_CASES = (
    Case("dit/ti2v-5B/1280x704x121/bf16", "cuda", _dit("ti2v-5B", 1280, 704, 121), 20.0, True),
    Case("dit/t2v-1.3B/832x480x81/bf16", "cuda", _dit("t2v-1.3B", 832, 480, 81), 12.0, True),
    Case("dit/vace-1.3B/832x480x81/bf16", "cuda", _dit("vace-1.3B", 832, 480, 81), 16.0),
)
GPU_14B_CASES = (
    Case("dit/t2v-14B/832x480x81/bf16", "cuda", _dit("t2v-14B", 832, 480, 81), 30.0, True),
    Case("dit/i2v-14B/832x480x81/bf16", "cuda", _dit("i2v-14B", 832, 480, 81), 35.0),
    Case("dit/s2v-14B/832x480x80/bf16", "cuda", _dit("s2v-14B", 832, 480, 80), 35.0),
    Case("dit/animate-14B/832x480x77/bf16", "cuda", _dit("animate-14B", 832, 480, 77), 35.0),
)
GPU_VAE_CASES = (
    Case("vae/2.2-decode/1280x704x121/bf16", "cuda", _vae("2.2", (48, 31, 44, 80), dtype=BF16), 40.0, True),
    Case("vae/2.1-decode/1280x720x81/bf16", "cuda", _vae("2.1", (16, 21, 90, 160), dtype=BF16), 30.0, True),
    Case("vae/2.2-encode/1280x704x1/bf16", "cuda", _vae("2.2", (48, 1, 44, 80), True, BF16), 4.0),
    Case("vae/2.2-decode/1280x704x17/fp32", "cuda", _vae("2.2", (48, 5, 44, 80)), 12.0),
    Case("vae/2.1-decode/832x480x17/fp32", "cuda", _vae("2.1", (16, 5, 60, 104)), 8.0),
    Case("vae/2.1-decode/1280x720x17/fp32", "cuda", _vae("2.1", (16, 5, 90, 160)), 8.0),
    Case("vae/2.2-encode/1280x704x1/fp32", "cuda", _vae("2.2", (48, 1, 44, 80), True), 4.0),
)
GPU_RUN_CASES = (
    Case("text/umt5-xxl/64-tokens/bf16", "cuda", partial(text, _UMT5_XXL, 64, BF16), 4.0),
    Case(
        "recipe/ti2v-5B/1280x704x121/bf16",
        "cuda",
        partial(recipe, DiTDims.of_task(TASKS["ti2v-5B"]), latent_shape("ti2v-5B", 1280, 704, 121), BF16),
        12.0,
    ),
    Case("run/tiny/128x128x33-12-steps/fp32", "cuda", partial(end_to_end, (128, 128), 33, 12), 8.0),
)
GPU_COMPILED_CASES = (
    Case("dit-compiled/ti2v-5B/1280x704x121/bf16", "cuda", partial(_dit("ti2v-5B", 1280, 704, 121), compiled=True), 10.0),
)
CPU_CASES = (
    Case("run/tiny/128x128x33-4-steps/fp32", "cpu", partial(end_to_end, (128, 128), 33, 4), 16.0, True),
    Case("dit/toy-width/48x9x8x8/fp32", "cpu", partial(dit, _TOY, (48, 9, 8, 8), FP32), 4.0, True),
    Case(
        "dit/1.3B-width-2-blocks/16x3x30x52/fp32",
        "cpu",
        partial(dit, _NARROW, (16, 3, 30, 52), FP32, version="2.1"),
        20.0,
        True,
    ),
    Case(
        "dit/1.3B-width-2-blocks-i2v/16x3x30x52/fp32",
        "cpu",
        partial(dit, _NARROW_I2V, (16, 3, 30, 52), FP32, version="2.1"),
        25.0,
    ),
    Case(
        "dit/1.3B-width-2-blocks-vace/16x3x30x52/fp32",
        "cpu",
        partial(dit, _NARROW_VACE, (16, 3, 30, 52), FP32, version="2.1"),
        25.0,
    ),
    # small: where a CPU has no bf16 instructions it emulates them
    Case("dit/1.3B-width-2-blocks/16x1x30x26/bf16", "cpu", partial(dit, _NARROW, (16, 1, 30, 26), BF16, version="2.1"), 25.0),
    Case("recipe/toy-width/48x9x8x8/fp32", "cpu", partial(recipe, _TOY, (48, 9, 8, 8), FP32), 6.0),
    Case("vae/2.1-decode/16x2x12x16/fp32", "cpu", _vae("2.1", (16, 2, 12, 16)), 25.0, True),
    Case("vae/2.1-encode/16x2x12x16/fp32", "cpu", _vae("2.1", (16, 2, 12, 16), True), 25.0),
    Case("vae/2.2-decode/48x2x4x6/fp32", "cpu", _vae("2.2", (48, 2, 4, 6)), 40.0, True),
    Case("vae/2.2-encode/48x2x4x6/fp32", "cpu", _vae("2.2", (48, 2, 4, 6), True), 25.0),
    Case("vae/2.2-toy-width-decode/48x9x8x8/fp32", "cpu", partial(vae, _VAE22_TOY, (48, 9, 8, 8), False), 12.0),
    Case("vae/2.2-toy-width-encode/48x9x8x8/fp32", "cpu", partial(vae, _VAE22_TOY, (48, 9, 8, 8), True), 6.0),
    Case("text/umt5-quarter-width-6-layers/64-tokens/fp32", "cpu", partial(text, _UMT5_QUARTER, 64, FP32), 6.0, True),
)
