"""Tensors of the causal 3-D VAE."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from wan_fast.manifest.shapes import Shapes
from wan_fast.tasks import ENCODER_REACH, VaeSpec


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
