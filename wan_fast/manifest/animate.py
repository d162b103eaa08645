"""Tensors that Animate has beside the transformer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

from wan_fast.manifest.shapes import Shapes, linear
from wan_fast.tasks import HEAD_DIM, PATCH, VAES

# blocks from one that looks at the face to the next
_EVERY = 5
_STEM = "motion_encoder.enc.net_app.convs.0.0.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceDims:
    """Sizes of the motion encoder (LIA, arXiv 2203.09043), the face encoder and the face adapter.

    layers: blocks behind which the model looks at the face. channels: of the motion encoder at the frame's own size and at
    each half of the one before. motion_dim: width of a frame's motion vector; directions: of which it is a sum. width: of the
    face encoder, and heads: its groups, each of which makes a token of a latent frame; one more is learned. pose_dim: channels
    of the poses' latents. joint: keys and values are one projection, as in the native layout.
    """

    # frames whose motion is encoded at a time, as officially; a layer of them takes 134 MB in bf16
    AT_ONCE: ClassVar[int] = 8

    layers: tuple[int, ...] = tuple(range(0, 40, _EVERY))
    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_dim: int = 512
    directions: int = 20
    width: int = 1024
    heads: int = 4
    head_dim: int = HEAD_DIM
    pose_dim: int = VAES["2.1"].channels
    joint: bool = True

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> FaceDims | None:
        if _STEM not in shapes:
            return None
        count, convs, blocks = 1, "motion_encoder.enc.net_app.convs", "face_adapter.fuser_blocks"
        while f"{blocks}.{count}.linear1_q.weight" in shapes:
            count += 1
        channels = [shapes[_STEM][0]]
        while conv := shapes.get(f"{convs}.{len(channels)}.conv2.1.weight"):
            channels.append(conv[0])
        motion_dim, directions = shapes["motion_encoder.dec.direction.weight"]
        if (said := config.get("motion_encoder_dim")) not in (None, motion_dim):
            raise ValueError(f"motion_encoder_dim is {said}, and the motion encoder is {motion_dim} wide")
        width = shapes["face_encoder.conv2.conv.weight"][0]
        every = int(str(config.get("inject_face_latents_blocks") or _EVERY))
        return cls(
            layers=tuple(range(0, every * count, every)),
            channels=tuple(channels),
            motion_dim=motion_dim,
            directions=directions,
            width=width,
            heads=shapes["face_encoder.conv1_local.conv.weight"][0] // width,
            head_dim=shapes[f"{blocks}.0.q_norm.weight"][0],
            pose_dim=shapes["pose_patch_embedding.weight"][1],
            joint=f"{blocks}.0.linear1_kv.weight" in shapes,
        )

    @property
    def size(self) -> int:
        """Width and height of the frames of a face, in pixels: what is left of them at the end is 4 by 4."""
        return 4 * 2 ** (len(self.channels) - 1)

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return self.heads + 1

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Without the kernels of the blurs, which are the same in every model; the native layout has them."""
        convs, width, motion = "motion_encoder.enc.net_app.convs", self.width, self.motion_dim
        shapes: dict[str, tuple[int, ...]] = {
            "pose_patch_embedding.weight": (dim, self.pose_dim, *PATCH),
            "pose_patch_embedding.bias": (dim,),
            _STEM: (self.channels[0], 3, 1, 1),
            f"{convs}.0.1.bias": (1, self.channels[0], 1, 1),
            f"{convs}.{len(self.channels)}.weight": (motion, self.channels[-1], 4, 4),
            "motion_encoder.dec.direction.weight": (motion, self.directions),
            "face_encoder.conv1_local.conv.weight": (self.heads * width, motion, 3),
            "face_encoder.conv1_local.conv.bias": (self.heads * width,),
            "face_encoder.padding_tokens": (1, 1, 1, dim),
            **linear("face_encoder.out_proj", width, dim),
            **linear("motion_encoder.enc.fc.4", motion, self.directions),
        }
        for i, (into, out) in enumerate(pairwise(self.channels), start=1):
            shapes |= {
                f"{convs}.{i}.conv1.0.weight": (into, into, 3, 3),
                f"{convs}.{i}.conv1.1.bias": (1, into, 1, 1),
                f"{convs}.{i}.conv2.1.weight": (out, into, 3, 3),
                f"{convs}.{i}.conv2.2.bias": (1, out, 1, 1),
                f"{convs}.{i}.skip.1.weight": (out, into, 1, 1),
            }
        for i in range(4):
            shapes |= linear(f"motion_encoder.enc.fc.{i}", motion, motion)
        for name in ("conv2", "conv3"):
            conv = f"face_encoder.{name}.conv"
            shapes |= {f"{conv}.weight": (width, width, 3), f"{conv}.bias": (width,)}
        for i in range(len(self.layers)):
            block = f"face_adapter.fuser_blocks.{i}"
            parts = {"linear1_kv": 2 * dim} if self.joint else {"linear1_k": dim, "linear1_v": dim}
            for name, out in {**parts, "linear1_q": dim, "linear2": dim}.items():
                shapes |= linear(f"{block}.{name}", dim, out)
            shapes |= {f"{block}.q_norm.weight": (self.head_dim,), f"{block}.k_norm.weight": (self.head_dim,)}
        return shapes

    def inputs(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Poses and faces of all latent frames but the first, which is the reference."""
        _, T, H, W = latent_shape
        return {"pose": (self.pose_dim, T - 1, H, W), "face": (3, 4 * (T - 2) + 1, self.size, self.size)}

    def extra_tokens(self, latent_shape: Sequence[int], first: bool) -> int:
        return 0

    def kept_bytes(self, dim: int, latent_shape: Sequence[int], size: int) -> int:
        """Keys and values, and latents of poses; the frames of faces are on the host."""
        poses = 4 * prod(self.inputs(latent_shape)["pose"])
        return 2 * len(self.layers) * latent_shape[1] * self.tokens * dim * 2 * size + poses

    def prepare_bytes(self, size: int) -> int:
        """Activations of the motion encoder at its first level, and the frames."""
        return self.AT_ONCE * self.size**2 * (7 * self.channels[0] * size + 3 * (4 + size))

    def flops(self, dim: int, tokens: int) -> float:
        """Queries, attention to the tokens of the face, and the projection of the result."""
        return len(self.layers) * (4.0 * tokens * dim * dim + 4.0 * tokens * self.tokens * dim)

    def inputs_flops(self, dim: int, latent_shape: Sequence[int]) -> float:
        _, T, H, W = latent_shape
        frames = 4 * (T - 2) + 1
        of_pose = 2.0 * (T - 1) * (H // 2) * (W // 2) * prod(PATCH) * self.pose_dim * dim
        keys_values = len(self.layers) * 4.0 * T * self.tokens * dim * dim
        half, quarter = (frames + 1) // 2, T - 1
        convs = 3 * self.heads * self.width * (frames * self.motion_dim + (half + quarter) * self.width)
        of_face = 2.0 * (convs + self.heads * quarter * self.width * dim)
        return of_pose + keys_values + of_face + frames * self.frame_flops

    @property
    def frame_flops(self) -> float:
        """Of a frame's motion vector."""
        size = self.size
        done = size**2 * 3.0 * self.channels[0]
        for into, out in pairwise(self.channels):
            blurred = 16 * into * ((size + 1) ** 2 + (size // 2) ** 2)
            done += size**2 * 9 * into**2 + (size // 2) ** 2 * (9 + 1) * into * out + blurred
            size //= 2
        fully = 4 * self.motion_dim**2 + 2 * self.motion_dim * self.directions
        return 2 * (done + 16 * self.channels[-1] * self.motion_dim + fully)
