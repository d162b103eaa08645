"""Tensors that UniAnimate (arXiv 2504.11289) has beside the transformer's: of an encoder of the clip's poses, and of one of the
picture's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from wan_fast.manifest.shapes import Shapes

# (kernel, stride) along (t, h, w) of the convolutions of the clip's poses, and along (h, w) of those of the picture's; behind
# each but the last is a SiLU, and all but one of two pixels are padded by one
POSES = (*[((3, 3, 3), (1, 1, 1))] * 3, ((3, 3, 3), (1, 2, 2)), *[((3, 3, 3), (2, 2, 2))] * 2, ((1, 2, 2), (1, 2, 2)))
PICTURE = (*[((3, 3), (1, 1))] * 3, *[((3, 3), (2, 2))] * 3)
# what their tensors are called
CLIP_POSES, PICTURE_POSE = "dwpose_embedding", "randomref_embedding_pose"
POSE_TENSORS = re.compile(rf"(?:{CLIP_POSES}|{PICTURE_POSE})\.")
# frames that are put before the first, which repeat it: four to a latent frame
PADDING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseDims:
    """Sizes of the encoders of poses: `width` inside, `channels` that the picture's pose is added to."""

    width: int = 16
    channels: int = 20

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> PoseDims | None:
        if f"{CLIP_POSES}.0.weight" not in shapes:
            return None
        last = shapes[f"{PICTURE_POSE}.{2 * len(PICTURE) - 2}.weight"]
        return cls(width=shapes[f"{CLIP_POSES}.0.weight"][0], channels=last[0])

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layers, out in ((CLIP_POSES, POSES, dim), (PICTURE_POSE, PICTURE, self.channels)):
            for i, ((into, to), (kernel, _)) in enumerate(zip(pairwise(self.widths(layers, out)), layers, strict=True)):
                shapes |= {f"{name}.{2 * i}.weight": (to, into, *kernel), f"{name}.{2 * i}.bias": (to,)}
        return shapes

    def widths(self, layers: Sequence[object], out: int) -> tuple[int, ...]:
        """Channels before, between and behind the convolutions of an encoder that makes `out`."""
        return (3, *[self.width] * (len(layers) - 1), out)

    def inputs(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        T, height, width = latent_shape[1], 8 * latent_shape[2], 8 * latent_shape[3]
        return {"pose": (3, 4 * T - PADDING, height, width), "pose_image": (3, height, width)}

    def extra_tokens(self, latent_shape: Sequence[int], first: bool) -> int:
        return 0

    def flops(self, dim: int, tokens: int) -> float:
        return 0.0

    def kept_bytes(self, dim: int, latent_shape: Sequence[int], size: int) -> int:
        return 0

    def prepare_bytes(self, size: int) -> int:
        return 0

    def inputs_flops(self, dim: int, latent_shape: Sequence[int]) -> float:
        shapes, flops = self.shapes(dim), 0.0
        T, height, width = latent_shape[1], 8 * latent_shape[2], 8 * latent_shape[3]
        for name, layers, pixels in ((CLIP_POSES, POSES, 4 * T * height * width), (PICTURE_POSE, PICTURE, height * width)):
            for i, (_, stride) in enumerate(layers):
                pixels //= prod(stride)
                flops += 2.0 * pixels * prod(shapes[f"{name}.{2 * i}.weight"])
        return flops
