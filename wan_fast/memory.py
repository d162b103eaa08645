"""The memory plan: what is on the device in each stage, and how much of it, before anything is allocated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from wan_fast import manifest, schemes
from wan_fast.config import ATTENTION_8BIT, EngineConfig, WanFastError
from wan_fast.device import Device
from wan_fast.framing import Framing
from wan_fast.resolving import Resolved
from wan_fast.schemes import Form
from wan_fast.setup import Models, Setup
from wan_fast.sound import STRIDES
from wan_fast.steps import Step
from wan_fast.tasks import PATCH, TILE_HALO, TaskSpec

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
    decode_tiles: strips of a frame, one after the other; 1 for whole frames. graphs: CUDA graphs of steps are "off", "kept"
    from one clip to the next with the memory they work in, or "released" after each. decode_graphs: chunks have graphs too.
    """

    budget: int
    offload: bool
    weights: Mapping[str, int]
    working: Mapping[str, int]
    peak: Mapping[str, int]
    decode_chunk: int
    decode_piece: int
    decode_tiles: int
    graphs: str
    decode_graphs: bool


def memory_plan(
    config: EngineConfig,
    models: Models,
    setup: Setup,
    framing: Framing,
    latent_shape: tuple[int, int, int, int],
    tokens: int,
    request: Resolved,
    steps: tuple[Step, ...],
) -> MemoryPlan:
    """Weights and working memory by stage; models take turns on the device only where the budget asks for it.

    Args:
        config, models, setup, framing, request, steps: of the plan.
        latent_shape: [C, T, H, W] of what is denoised at a time.
        tokens: of it, and those that the model puts behind.
    """
    latent_frames = latent_shape[1] - framing.leading
    clip_shape = (latent_shape[0], max(latent_frames, (framing.decoded + 3) // 4), *latent_shape[2:])
    device, size = setup.device, 2 if setup.dtype == "bf16" else 4
    vae_size, image_size = 4 if setup.vae_dtype == "fp32" else 2, 2 if setup.image_dtype == "fp16" else 4
    weights = model_weights(config, models, setup)
    budget = config.vram if config.vram is not None else device.free
    dits = [label for label in weights if label.startswith("DiT")]
    fused = all(kernel.backend != "reference" for kernel in setup.kernels)
    at_work = {"text": ["text encoder"], "denoise": dits, "decode": ["VAE"]}
    working = {
        "text": _text_bytes(models.text, size),
        "denoise": _denoise_bytes(
            models.experts,
            latent_shape,
            tokens,
            size,
            fused,
            setup.forms,
            config.attention in ATTENTION_8BIT,
            branches=max(2, *(step.passes for step in steps)),
        )
        + _kept_bytes(models.experts, latent_shape, size, steps)
        + _inputs_bytes(config.spec, models.experts, latent_shape, tokens, size, {step.expert for step in steps}),
    }
    every = [extension for dims in models.experts.values() for extension in dims.extensions]
    working["denoise"] = max(working["denoise"], *(extension.prepare_bytes(size) for extension in every), 0)
    if models.image is not None:
        at_work["image"], working["image"] = ["image encoder"], _image_bytes(models.image, image_size)
    if models.audio is not None:
        at_work["audio"], working["audio"] = ["audio encoder"], _audio_bytes(models.audio, framing.samples)
    if encoded := framing.encoded:
        at_work["encode"] = ["VAE"]
        frames = 4 if any(latent_frames > 1 for latent_frames, _ in encoded) else 1
        working["encode"] = _encode_bytes(models.vae, latent_shape, vae_size, fused, frames)
    # what the next clip is given; when it is encoded or made again, what it was is there too
    history = 4 * 3 * prod(request.size) * framing.history
    for stage in {"denoise", "encode"} & {*working}:
        working[stage] += history * (1 + (stage == "encode"))
    asked = config.offload_model if device.type != "cpu" and not config.cuda_graphs else False
    whole = [(*decode, 1) for decode in DECODES[device.type]]
    tiled = [(*DECODES[device.type][-1], tiles) for tiles in TILES if tiles <= max(latent_shape[2:])]
    placings = (False, True) if asked is None else (asked,)
    for offload, (chunk, piece, tiles) in (*product(placings, whole), *product(placings, tiled)):
        working["decode"] = _decode_bytes(models.vae, clip_shape, chunk, piece, tiles, vae_size, fused) + 3 * history
        if tiles > 1 and device.type == "cpu":  # where the clip waits for its last strip
            working["decode"] += 3 * vae_size * prod(request.size) * request.num_frames
        # with offload one model at a time is on the device: of two experts the larger counts
        resident = {
            stage: max(weights[label] for label in labels) if offload else sum(weights.values())
            for stage, labels in at_work.items()
        }
        peak = {stage: resident[stage] + working[stage] for stage in at_work}
        if max(peak.values()) <= budget:
            # references copy numbers from the host
            without = device.type == "cpu" or config.cuda_graphs is False or config.kernels == "reference"
            graphs = "off" if without or offload else "released"
            # a graph has memory of its own, beside that of the run that warmed it up
            chunks = graphs != "off" and tiles == 1 and _short(config, models.vae, device, clip_shape, chunk)
            twice = {stage: count + working["denoise"] for stage, count in peak.items()}
            twice["decode"] += chunks * working["decode"]
            if graphs != "off" and max(twice.values()) <= budget:
                peak, graphs = twice, "kept"
            return MemoryPlan(
                budget=budget,
                offload=offload,
                weights=weights,
                working=working,
                peak=peak,
                decode_chunk=chunk,
                decode_piece=piece,
                decode_tiles=tiles,
                graphs=graphs,
                decode_graphs=chunks,
            )
    worst = max(peak, key=lambda stage: peak[stage])
    absent = "" if setup.checkpoint else f" (checkpoint {config.checkpoint or config.spec.hub_id} is not here: released sizes)"
    raise WanFastError(
        f"out of memory by plan{absent}: stage {worst} needs {gib(peak[worst])} on {device.name} "
        f"({gib(resident[worst])} weights, {gib(working[worst])} working), the budget is {gib(budget)}; "
        + _advice(config, device, setup.dtype, worst)
    )


def model_weights(config: EngineConfig, models: Models, setup: Setup) -> dict[str, int]:
    """Bytes of the models on the device, were they all there."""
    size = 2 if setup.dtype == "bf16" else 4
    text = 0 if config.t5_cpu and setup.device.type != "cpu" else size * manifest.num_parameters(models.text)
    weights = {"text encoder": text}
    for name, dims in models.experts.items():
        label = "DiT" if name == "model" else f"DiT {name}"
        weights[label] = _dit_bytes(dims, setup.forms.get(name, {}), size)
    weights["VAE"] = (4 if setup.vae_dtype == "fp32" else 2) * manifest.num_parameters(manifest.vae_shapes(models.vae))
    if models.image is not None:
        image_size = 2 if setup.image_dtype == "fp16" else 4
        weights["image encoder"] = image_size * manifest.num_parameters(manifest.clip_shapes(models.image))
    if models.audio is not None:
        weights["audio encoder"] = 4 * manifest.num_parameters(manifest.audio_shapes(models.audio))
    return weights


def _short(config: EngineConfig, vae: manifest.VaeDims, device: Device, latent_shape: tuple[int, ...], chunk: int) -> bool:
    """Whether a chunk takes a GPU less time than the host needs to launch it, some 200 kernels, about 2 ms; estimated: a graph
    copies every history, which a longer chunk would pay for with nothing to gain."""
    if config.cuda_graphs:
        return True
    flops = manifest.vae_flops(vae, "decoder", *latent_shape[1:]) * chunk / latent_shape[1]
    # what convolutions reach of the peak is about a half
    return device.peak_tflops is not None and flops / (device.peak_tflops * 1e12 / 2) < 2e-3


def _advice(config: EngineConfig, device: Device, dtype: str, stage: str) -> str:
    """Ways out of a plan that does not fit, those that help the stage at fault."""
    spec = config.spec
    # what says how large and how long a clip is
    size = "--size or " * ("src_root_path" not in spec.takes)
    length = "--infer_frames" if "infer_frames" in spec.takes else "--frame_num"
    ways = {"text": [], "audio": ["shorten --audio"]}.get(stage, [f"take a smaller {size}{length}"])
    held = ["--offload_model False"] * (config.offload_model is False) + ["--cuda-graphs"] * bool(config.cuda_graphs)
    if device.type != "cpu" and held:
        ways.append(f"leave out {' and '.join(held)}")
    if device.type != "cpu" and not config.t5_cpu and (stage == "text" or config.offload_model is False):
        ways.append("add --t5_cpu")
    if dtype == "fp32" and stage not in ("decode", "audio"):
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
    tokens: int,
    size: int,
    fused: bool,
    forms: Mapping[str, Mapping[str, Form]],
    attention_8bit: bool,
    branches: int,
) -> int:
    """Peak working bytes of a step: the residual stream, the larger of attention and feed-forward, text keys and values.

    `fused`: with kernels; the references hold fp32 copies of q or k, and the turn of every token, beside them.
    """
    L, largest = tokens, 0
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
        text = branches * len(experts) * (dims.num_layers + len(dims.vace_layers)) * 2 * S * D * size
        largest = max(largest, L * D * 4 + max(attention, feed_forward) + text)
    # latents, two velocities or three, the solver's three, and tokens of the head
    return largest + (8 + branches) * 4 * prod(latent_shape)


def _kept_bytes(
    experts: Mapping[str, manifest.DiTDims], latent_shape: tuple[int, ...], size: int, steps: tuple[Step, ...]
) -> int:
    """What caches keep from step to step: a residual of the block stack per branch that is reused, and the difference between
    the branches, in two bands where they are weighed by themselves, with what a Fourier transform holds besides."""
    tokens = prod(latent_shape[1:]) // prod(PATCH)
    others = max(step.passes - 1 for step in steps) * any(step.unconditional == "reuse" for step in steps)
    branches = any(step.conditional == "reuse" for step in steps) + others
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
    strip = max(strips(latent_shape, tiles))
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


def _inputs_bytes(
    spec: TaskSpec,
    experts: Mapping[str, manifest.DiTDims],
    latent_shape: tuple[int, ...],
    all_tokens: int,
    size: int,
    used: Collection[str],
) -> int:
    """Bytes of what the `used` models keep of pictures and videos, and what following them takes.

    The VACE branch has a stream of its own, and a hint. What extends a model keeps tokens to add to the clip's own, and those
    behind them, with their places.
    """
    tokens = prod(latent_shape[1:]) // prod(PATCH)
    total = 0
    for name in used:
        dims = experts[name]
        image = 2 * dims.num_layers * spec.image_tokens * dims.dim * size
        channels = tokens * prod(PATCH) * dims.condition_dim * size
        if channels:  # their latents, and tokens of all side by side
            channels += tokens * prod(PATCH) * dims.in_dim * size + 4 * prod(latent_shape[1:]) * dims.condition_dim
        vace = bool(dims.vace_layers) * (tokens * dims.dim * (4 + 2 * size) + 4 * prod(latent_shape[1:]) * dims.vace_dim)
        extension = bool(dims.extensions) * (tokens * dims.dim * 4 + all_tokens * dims.head_dim * 4)
        extension += sum(each.kept_bytes(dims.dim, latent_shape, size) for each in dims.extensions)
        # of either branch
        total += image + channels + vace + extension + 2 * (all_tokens - tokens) * dims.dim * 4
    return total


def _image_bytes(dims: manifest.ClipDims, size: int) -> int:
    """Peak working bytes of a picture's tokens: a layer's feed-forward, and its scores."""
    return size * dims.tokens * (2 * dims.ffn_dim + 6 * dims.dim) + 4 * dims.num_heads * dims.tokens**2


def _audio_bytes(dims: manifest.AudioDims, samples: int) -> int:
    """Peak working bytes of hearing: the widest of the convolutions over samples, or all states and a layer's feed-forward; no
    scores, as PyTorch's attention holds none."""
    frames = samples // prod(STRIDES)
    states = 4 * frames * dims.dim * 2 * (dims.num_layers + 1)
    return max(4 * 4 * samples // STRIDES[0] * dims.conv_dims[0], states + 4 * frames * (2 * dims.ffn_dim + 4 * dims.dim))


def _encode_bytes(dims: manifest.VaeDims, latent_shape: tuple[int, ...], size: int, fused: bool, frames: int) -> int:
    """Peak working bytes of encoding, 1 or 4 `frames` at a time: the histories, and what is alive at the first level."""
    h, w = latent_shape[2:]
    history = 0
    for name, shape in manifest.vae_shapes(dims).items():
        if name.startswith("encoder") and len(shape) == 5 and shape[2] == 3:
            history += size * 2 * shape[1] * h * w * 4 ** manifest.encoder_level(name, dims)
    frame = size * dims.encoder_dim * h * w * 64
    alive, of_references = (4 * frame, 1.5) if frames == 1 else (18.4 * frame, 1.9)
    return int(history + alive if fused else 1.2 * history + of_references * alive)


def strips(latent_shape: tuple[int, ...], tiles: int) -> list[float]:
    """Parts of the longer side that the strips take with their halos."""
    h, w = latent_shape[2:]
    size = 2 * max(h, w)
    cut = manifest.strips(h, w, tiles)
    return [(min(last + TILE_HALO, size) - max(first - TILE_HALO, 0)) / size for first, last in cut]


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


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
