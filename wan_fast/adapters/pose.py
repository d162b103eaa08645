"""Poses to follow, UniAnimate's (arXiv 2504.11289): added to the clip's tokens; the picture's own is added to its channels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from wan_fast.adapters.protocol import AfterBlock
from wan_fast.attention import Attention, Projected
from wan_fast.blocks import Context, Given, Grid
from wan_fast.inputs import Inputs
from wan_fast.manifest import DiTDims
from wan_fast.manifest.pose import CLIP_POSES, PADDING, PICTURE, PICTURE_POSE, POSES


class PoseEncoders:
    """Convolutions over the pixels of poses, once per clip.

    Args:
        dims: sizes of the model.
        attention, in_8_bits: of the model's blocks, not needed.
    """

    layers: frozenset[int] = frozenset()
    takes = frozenset({"pose", "pose_image"})

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Sequence[Projected | None]) -> None:
        assert dims.pose is not None
        self.poses = _convolutions(nn.Conv3d, POSES, dims.pose.widths(POSES, dims.dim))
        self.picture = _convolutions(nn.Conv2d, PICTURE, dims.pose.widths(PICTURE, dims.pose.channels))
        self.modules: dict[str, nn.Module] = {CLIP_POSES: self.poses, PICTURE_POSE: self.picture}

    def prepare(self, inputs: Inputs, text: Tensor, grid: Grid, like: Context | None) -> Given:
        added = channels = None
        if inputs.pose is not None:
            if like is not None and like.inputs.pose is inputs.pose:
                added = like.given.added
            else:
                first = inputs.pose[:, :1].expand(-1, PADDING, -1, -1)
                added = _made(self.poses, torch.cat([first, inputs.pose], dim=1)).flatten(2).transpose(1, 2)
        if inputs.pose_image is not None:
            if like is not None and like.inputs.pose_image is inputs.pose_image:
                channels = like.given.channels
            else:
                channels = _made(self.picture, inputs.pose_image)[0][:, None]
        return Given(added=added, channels=channels)

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        return lambda layer, x: None  # there is nothing behind the blocks


def _convolutions(kind: type[nn.Module], layers: Sequence[tuple[tuple[int, ...], ...]], widths: Sequence[int]) -> nn.Sequential:
    made: list[nn.Module] = []
    for (kernel, stride), (into, out) in zip(layers, pairwise(widths), strict=True):
        padding = 1 if kernel[-1] == 3 else 0
        made += [kind(into, out, kernel, stride, padding), nn.SiLU(inplace=True)]
    return nn.Sequential(*made[:-1])


def _made(encoder: nn.Sequential, pixels: Tensor) -> Tensor:
    """Of pixels [3, ...] in [0, 1], [1, channels, ...] fp32, computed in the encoder's dtype."""
    weight = next(encoder.parameters())
    return encoder(pixels[None].to(weight.device, weight.dtype)).float()
