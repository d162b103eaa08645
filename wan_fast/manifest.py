"""The tensors each model consists of: names, shapes and what follows from them (bytes, FLOPs). Standard library only.

A checkpoint is held against these tables from its file headers alone, before a weight is read. Names are the native
ones. Counts are multiply-adds times two, as in arXiv 2503.20314.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, prod

from wan_fast.tasks import (
    CLIP_HEAD_DIM,
    ENCODER_REACH,
    FREQ_DIM,
    HEAD_DIM,
    IMAGE_DIM,
    PATCH,
    TEXT_DIM,
    TEXT_LEN,
    VACE_DIM,
    TaskSpec,
    VaeSpec,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTDims:
    """Sizes of one diffusion transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int = TEXT_DIM
    text_len: int = TEXT_LEN
    freq_dim: int = FREQ_DIM
    eps: float = 1e-6
    image_dim: int = 0
    """Width of a picture's tokens; 0 where the model takes none."""
    image_positions: int = 0
    """Learned positions of these tokens, of all pictures together; 0 for none."""
    vace_layers: tuple[int, ...] = ()
    """Blocks behind which the VACE branch adds a hint."""
    vace_dim: int = 0
    """Channels of the VACE branch's input."""

    @classmethod
    def of_task(cls, spec: TaskSpec) -> DiTDims:
        same = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "vace_layers")
        return cls(
            **{name: getattr(spec, name) for name in same},
            image_dim=IMAGE_DIM if spec.image_tokens else 0,
            image_positions=spec.image_tokens if spec.kind == "first_last" else 0,
            vace_dim=VACE_DIM if spec.vace_layers else 0,
        )

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> DiTDims:
        """Read the sizes from tensor shapes; from `config` what leaves no trace there, and the number of layers, so that
        lost ones are missed."""
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
        heads = int(str(config.get("num_heads") or config.get("num_attention_heads") or dim // HEAD_DIM))
        if heads < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        num_layers = int(str(config.get("num_layers") or max(blocks) + 1))
        return cls(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=heads,
            num_layers=num_layers,
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // prod(PATCH),
            text_dim=shapes["text_embedding.0.weight"][1],
            text_len=int(str(config.get("text_len") or TEXT_LEN)),
            freq_dim=shapes["time_embedding.0.weight"][1],
            eps=float(str(config.get("eps") or 1e-6)),
            image_dim=shapes.get("img_emb.proj.1.weight", (0,))[-1],
            image_positions=shapes.get("img_emb.emb_pos", (0, 0))[1],
            vace_layers=_vace_layers(shapes, config, num_layers),
            vace_dim=shapes.get("vace_patch_embedding.weight", (0, 0))[1],
        )

    @property
    def condition_dim(self) -> int:
        """Channels that are the same at every step: what the model takes beside the noisy latents."""
        return self.in_dim - self.out_dim

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def _vace_layers(shapes: Shapes, config: Mapping[str, object], num_layers: int) -> tuple[int, ...]:
    """As the config lists them; without one, as many as there are branch blocks, evenly spread from the first on."""
    if "vace_patch_embedding.weight" not in shapes:
        return ()
    given = config.get("vace_layers")
    if isinstance(given, (list, tuple)):
        layers = tuple(int(str(layer)) for layer in given)
        if layers != tuple(sorted({*layers})) or not layers or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"vace_layers {list(layers)} are not blocks of {num_layers}, in order")
        return layers
    count = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"vace_blocks\.(\d+)\.", name)))
    return tuple(range(0, num_layers, num_layers // count))[:count]


def dit_shapes(dims: DiTDims) -> dict[str, tuple[int, ...]]:
    """Tensors of the transformer, with its image branch and its VACE branch where it has them."""
    D, F = dims.dim, dims.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (D, dims.in_dim, *PATCH),
        "patch_embedding.bias": (D,),
        "head.modulation": (1, 2, D),
        **_linear("text_embedding.0", dims.text_dim, D),
        **_linear("text_embedding.2", D, D),
        **_linear("time_embedding.0", dims.freq_dim, D),
        **_linear("time_embedding.2", D, D),
        **_linear("time_projection.1", D, 6 * D),
        **_linear("head.head", D, prod(PATCH) * dims.out_dim),
    }
    if dims.image_dim:
        shapes |= _linear("img_emb.proj.1", dims.image_dim, dims.image_dim) | _linear("img_emb.proj.3", dims.image_dim, D)
        for norm, width in (("img_emb.proj.0", dims.image_dim), ("img_emb.proj.4", D)):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if dims.image_positions:
        shapes["img_emb.emb_pos"] = (1, dims.image_positions, dims.image_dim)
    if dims.vace_layers:
        shapes |= {"vace_patch_embedding.weight": (D, dims.vace_dim, *PATCH), "vace_patch_embedding.bias": (D,)}
        shapes |= _linear("vace_blocks.0.before_proj", D, D)
    branch = [f"vace_blocks.{n}" for n in range(len(dims.vace_layers))]
    for block in (*(f"blocks.{i}" for i in range(dims.num_layers)), *branch):
        shapes |= {f"{block}.modulation": (1, 6, D), f"{block}.norm3.weight": (D,), f"{block}.norm3.bias": (D,)}
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for letter in "qkvo":
                shapes |= _linear(f"{attention}.{letter}", D, D)
            shapes |= {f"{attention}.norm_q.weight": (D,), f"{attention}.norm_k.weight": (D,)}
        shapes |= _linear(f"{block}.ffn.0", D, F) | _linear(f"{block}.ffn.2", F, D)
        if dims.image_dim and block not in branch:
            shapes |= _linear(f"{block}.cross_attn.k_img", D, D) | _linear(f"{block}.cross_attn.v_img", D, D)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (D,)
        if block in branch:
            shapes |= _linear(f"{block}.after_proj", D, D)
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDims:
    """Sizes of the image tower of CLIP, a vision transformer. `num_layers` are those that run: the released model's tokens are
    taken before its last."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    patch: int
    size: int

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> ClipDims:
        dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
        layers = {int(match[1]) for name in shapes if (match := re.match(r"visual\.transformer\.(\d+)\.", name))}
        positions = shapes["visual.pos_embedding"][-2]
        return cls(
            dim=dim,
            ffn_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
            num_heads=dim // CLIP_HEAD_DIM,
            num_layers=max(layers) + 1,
            patch=patch,
            size=patch * isqrt(positions - 1),
        )

    @property
    def tokens(self) -> int:
        """Of a picture: one per patch, and the class's."""
        return (self.size // self.patch) ** 2 + 1


# of the released models
CLIP = ClipDims(dim=IMAGE_DIM, ffn_dim=4 * IMAGE_DIM, num_heads=16, num_layers=31, patch=14, size=224)


def clip_shapes(dims: ClipDims, *, joint: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensors of the image tower's layers that run; q, k and v are one where `joint`."""
    D, F = dims.dim, dims.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (D,),
        "visual.pos_embedding": (dims.tokens, D),
        "visual.patch_embedding.weight": (D, 3, dims.patch, dims.patch),
        "visual.pre_norm.weight": (D,),
        "visual.pre_norm.bias": (D,),
    }
    for i in range(dims.num_layers):
        layer = f"visual.transformer.{i}"
        for norm in (f"{layer}.norm1", f"{layer}.norm2"):
            shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
        for name in ("to_qkv",) if joint else "qkv":
            shapes |= _linear(f"{layer}.attn.{name}", D, 3 * D if joint else D)
        shapes |= _linear(f"{layer}.attn.proj", D, D) | _linear(f"{layer}.mlp.0", D, F) | _linear(f"{layer}.mlp.2", F, D)
    return shapes


def clip_flops(dims: ClipDims) -> float:
    """FLOPs of one picture's tokens."""
    L, D = dims.tokens, dims.dim
    per_layer = 2.0 * L * (4 * D * D + 2 * D * dims.ffn_dim) + 4.0 * L * L * D
    return dims.num_layers * per_layer + 2.0 * L * 3 * dims.patch**2 * D


def text_shapes(vocab: int, dim: int, attention_dim: int, ffn_dim: int, heads: int, layers: int, buckets: int = 32):
    """Tensors of the umT5 encoder under their native names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (dim,), f"{block}.norm2.weight": (dim,)}
        shapes |= {f"{block}.attn.{letter}.weight": (attention_dim, dim) for letter in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (dim, attention_dim)
        shapes |= {f"{block}.ffn.{name}.weight": (ffn_dim, dim) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (dim, ffn_dim)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (buckets, heads)
    return shapes


def text_shapes_like(shapes: Shapes, config: Mapping[str, object] | None = None) -> dict[str, tuple[int, ...]]:
    """What an encoder of the width and depth seen in `shapes` consists of; the depth is `config`'s where it has one."""
    attention_dim, dim = shapes["blocks.0.attn.q.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
    layers = int(str((config or {}).get("num_layers") or layers))
    ffn_dim = shapes["blocks.0.ffn.fc1.weight"][0]
    return text_shapes(shapes["token_embedding.weight"][0], dim, attention_dim, ffn_dim, heads, layers, buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeDims:
    """Sizes of one VAE: `version` and the widths of its first encoder and last decoder level."""

    version: str
    encoder_dim: int
    decoder_dim: int
    channels: int

    @classmethod
    def of_spec(cls, spec: VaeSpec) -> VaeDims:
        return cls(version=spec.version, encoder_dim=spec.encoder_dim, decoder_dim=spec.decoder_dim, channels=spec.channels)

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> VaeDims:
        encoder_dim, pixels = shapes["encoder.conv1.weight"][:2]
        return cls(
            version="2.1" if pixels == 3 else "2.2",
            encoder_dim=encoder_dim,
            decoder_dim=shapes["decoder.conv1.weight"][0] // 4,
            channels=shapes["conv2.weight"][0],
        )


_MULTIPLIERS = (1, 2, 4, 4)


def vae_shapes(dims: VaeDims) -> dict[str, tuple[int, ...]]:
    """Tensors of the causal 3-D VAE; 2.1 numbers its layers through, 2.2 nests them by level."""
    nested, z, pixels = dims.version == "2.2", dims.channels, 3 if dims.version == "2.1" else 12
    encoder = [dims.encoder_dim * m for m in (1, *_MULTIPLIERS)]
    decoder = [dims.decoder_dim * m for m in (4, *reversed(_MULTIPLIERS))]
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        shapes.update({f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)})

    def residual(name: str, into: int, out: int) -> None:
        shapes.update({f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)})
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        shapes[f"{name}.1.norm.gamma"] = (width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{name}.1.proj", width, width, 1, 1)
        residual(f"{name}.2", width, width)

    def names(part: str, per_level: int):
        flat = 0
        for level in range(4):
            count = per_level + (level < 3)
            yield [f"{part}.{level}.{part.split('.')[1]}.{i}" if nested else f"{part}.{flat + i}" for i in range(count)]
            flat += count

    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    conv("encoder.conv1", encoder[0], pixels, 3, 3, 3)
    for level, layers in enumerate(names("encoder.downsamples", 2)):
        into, out = encoder[level], encoder[level + 1]
        for i, layer in enumerate(layers[:2]):
            residual(layer, into if i == 0 else out, out)
        if level < 3:
            conv(f"{layers[2]}.resample.1", out, out, 3, 3)
        if level in (1, 2):
            conv(f"{layers[2]}.time_conv", out, out, 3, 1, 1)
    middle("encoder.middle", encoder[-1])
    conv("decoder.conv1", decoder[0], z, 3, 3, 3)
    middle("decoder.middle", decoder[0])
    for level, layers in enumerate(names("decoder.upsamples", 3)):
        into, out = decoder[level], decoder[level + 1]
        # 2.1 halves the channels inside each resample, 2.2 in the first residual block of the next level
        into = into // 2 if level and not nested else into
        for i, layer in enumerate(layers[:3]):
            residual(layer, into if i == 0 else out, out)
        if level < 3:
            conv(f"{layers[3]}.resample.1", out if nested else out // 2, out, 3, 3)
        if level in (0, 1):
            conv(f"{layers[3]}.time_conv", 2 * out, out, 3, 1, 1)
    for part, width, out in (("encoder", encoder[-1], 2 * z), ("decoder", decoder[-1], pixels)):
        shapes[f"{part}.head.0.gamma"] = (width, 1, 1, 1)
        conv(f"{part}.head.2", out, width, 3, 3, 3)
    return shapes


# these stay fp32 under --dtype bf16; all other weights of the DiT are rounded to the compute dtype
_FP32_WEIGHTS = re.compile(r"modulation|norm|^time_|^head\.|^img_emb\.(?:proj\.[04]\.|emb_pos)")


def stays_fp32(name: str) -> bool:
    """Whether a weight of the DiT is fp32 whatever the compute dtype: norms, modulation, time embedding, head."""
    return bool(_FP32_WEIGHTS.search(name))


def num_parameters(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def dit_flops(dims: DiTDims, tokens: int, image_tokens: int = 0) -> float:
    """FLOPs of one forward over `tokens` video tokens; keys and values of text and pictures, and the VACE branch's input, are
    not counted (they are computed once)."""
    D, F, L, hints = dims.dim, dims.ffn_dim, tokens, len(dims.vace_layers)
    per_block = 2 * L * (6 * D * D + 2 * D * F) + 4 * L * L * D + 4 * L * dims.text_len * D
    blocks = (dims.num_layers + hints) * per_block + dims.num_layers * 4 * L * image_tokens * D + hints * 2 * L * D * D
    return blocks + 8.0 * L * D * (dims.in_dim + dims.out_dim)


def dit_text_flops(dims: DiTDims) -> float:
    """FLOPs of projecting one text for one expert: the text MLP and every block's keys and values."""
    D, S = dims.dim, dims.text_len
    blocks = dims.num_layers + len(dims.vace_layers)
    return 2.0 * S * (dims.text_dim * D + D * D) + blocks * 4.0 * S * D * D


def dit_inputs_flops(dims: DiTDims, tokens: int, image_tokens: int = 0) -> float:
    """FLOPs of projecting for one expert what a clip is conditioned on beside text."""
    D, C, S = dims.dim, dims.image_dim, image_tokens
    image = 2.0 * S * C * (C + D) + dims.num_layers * 4.0 * S * D * D
    return image + bool(dims.vace_layers) * 2.0 * tokens * (4 * dims.vace_dim * D + D * D)


def text_flops(shapes: Shapes, tokens: int) -> float:
    """FLOPs of encoding `tokens` text tokens: two per weight outside the embeddings, and the attention."""
    linear = sum(prod(shape) for name, shape in shapes.items() if "embedding" not in name and len(shape) == 2)
    layers, width = len([n for n in shapes if n.endswith("attn.q.weight")]), shapes["blocks.0.attn.q.weight"][0]
    return 2.0 * tokens * linear + 4.0 * layers * tokens * tokens * width


def vae_flops(
    dims: VaeDims,
    part: str,
    frames: int,
    height: int,
    width: int,
    *,
    with_zeros: bool = False,
    above: int = -1,
    changing: int | None = None,
) -> float:
    """FLOPs of decoding or encoding a clip of latent size `frames`, `height`, `width`; `part` is decoder or encoder.

    Of a convolution over three frames the clip's first frame needs one tap: before it there are zeros, which count only
    `with_zeros`, as in published figures. Of the decoder only layers that stand `above` that many doublings count. Of a clip
    whose frames behind the first are grey but for the last `changing`, what the encoder does not compute again does not count.
    """
    total = 0.0
    for name, shape in vae_shapes(dims).items():
        inside = name.startswith(part) or name == ("conv2.weight" if part == "decoder" else "conv1.weight")
        inside = inside and (part == "encoder" or decoder_level(name, dims) > above)
        if inside and len(shape) >= 4 and name.endswith("weight"):
            # the last convolution is no part of the encoder
            whole = changing is None or not name.startswith("encoder")
            computed = frames if whole else min(frames, ENCODER_REACH[_encoder_stage(name, dims)] + 2 + (changing or 0))
            positions = _positions(name, dims, part, computed, height, width)
            zeros = 0.0
            if len(shape) == 5 and shape[2] == 3 and "time_conv" not in name and not with_zeros:
                zeros = 2 / 3 * _positions(name, dims, part, 1, height, width)
            total += 2.0 * prod(shape) * (positions - zeros)
    if above >= 0:
        return total
    # the middle block's attention: every position of a frame to every other
    head_dim = 4 * (dims.decoder_dim if part == "decoder" else dims.encoder_dim)
    computed = frames if changing is None else min(frames, ENCODER_REACH[-1] + 2 + changing)
    return total + 4.0 * computed * (height * width) ** 2 * head_dim


def _positions(name: str, dims: VaeDims, part: str, T: int, h: int, w: int) -> int:
    """Output positions of a convolution, from where its name says it stands."""
    frames = (T, 2 * T - 1, 4 * T - 3, 4 * T - 3)
    match = re.search(r"(?:up|down)samples\.(\d+)", name)
    if match is None:
        at_pixels = name.startswith("encoder.conv1") or name.startswith("decoder.head")
        level = 3 if at_pixels else 0
        return frames[level] * h * w * 4**level
    per_level = 4 if part == "decoder" else 3
    level = int(match[1]) if dims.version == "2.2" else int(match[1]) // per_level
    if part == "decoder":
        if "time_conv" in name:
            return (frames[level] - 1) * h * w * 4**level
        if "resample" in name:
            return frames[level + 1] * h * w * 4 ** (level + 1)
        return frames[level] * h * w * 4**level
    # encoder levels run from pixels (3 doublings above the latent) down to the latent
    here, below = 3 - level, 2 - level
    if "time_conv" in name:
        return (frames[below] - 1) * h * w * 4**below
    if "resample" in name:
        return frames[here] * h * w * 4**below
    return frames[here] * h * w * 4**here


def _encoder_stage(name: str, dims: VaeDims) -> int:
    """The level of the encoder that a layer belongs to, from pixels on; the last has what is behind it."""
    match = re.search(r"downsamples\.(\d+)", name)
    if match is None:
        return 0 if name.startswith("encoder.conv1") else 3
    return int(match[1]) if dims.version == "2.2" else int(match[1]) // 3


def decoder_level(name: str, dims: VaeDims) -> int:
    """How often width and height have doubled, from the latent, at a decoder layer's input."""
    match = re.search(r"upsamples\.(\d+)", name)
    if match is None:
        return 3 if ".head." in name else 0
    return int(match[1]) if dims.version == "2.2" else int(match[1]) // 4


def strips(height: int, width: int, tiles: int) -> list[tuple[int, int]]:
    """First and last row or column of `tiles` strips across the longer side of latents, as equal as may be, in the decoder's
    rows or columns above its first doubling, where they are cut."""
    size = 2 * max(height, width)
    edges = [round(i * size / tiles) for i in range(tiles + 1)]
    return list(pairwise(edges))


def encoder_level(name: str, dims: VaeDims) -> int:
    """How often width and height are still to be halved, down to the latent, at an encoder layer's input."""
    match = re.search(r"downsamples\.(\d+)", name)
    if match is None:
        return 3 if name.startswith("encoder.conv1") else 0
    level = int(match[1]) if dims.version == "2.2" else int(match[1]) // 3
    return 3 - level - ("time_conv" in name)


def _linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
