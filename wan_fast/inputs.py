"""What a clip is conditioned on beside text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wan_fast.manifest import DiTDims


@dataclass(frozen=True, slots=True)
class Inputs:
    """The same at every step; None for what there is not.

    channels: [C, T, H, W] fp32, that follow the noisy latents' own. image: [I, S, image_dim], tokens of I pictures.
    control: [C, T, H, W] fp32, what the VACE branch follows. control_scale: of its hints.
    reference: [C, R, H, W] fp32, latents that the clip's tokens see, and that are not denoised. motion: [C, M, H, W] fp32,
    those of the frames before the clip. pose: what the clip's poses are given as, latents [C, t, H, W] of its last t frames or
    pixels [3, F, h, w] in [0, 1]. pose_image: [3, h, w] fp32 in [0, 1], the pose in the picture. audio: [layers, width, F]
    fp32, features of the sound at each frame. face: [3, F, h, w] fp32 in [-1, 1].
    """

    channels: Tensor | None = None
    image: Tensor | None = None
    control: Tensor | None = None
    control_scale: float = 1.0
    reference: Tensor | None = None
    motion: Tensor | None = None
    pose: Tensor | None = None
    pose_image: Tensor | None = None
    audio: Tensor | None = None
    face: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What there is, by name."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                yield field.name, value

    @classmethod
    def blank(cls, dims: DiTDims, latent_shape: Sequence[int], pictures: int = 1) -> Inputs:
        """Zeros of the shapes that a model of these sizes takes with latents [C, T, H, W]."""
        image_tokens = dims.image_positions or pictures * 257
        others = [extension.inputs(latent_shape) for extension in dims.extensions]
        blank: dict[str, Any] = {name: torch.zeros(shape) for shapes in others for name, shape in shapes.items()}
        return cls(
            channels=torch.zeros(dims.condition_dim, *latent_shape[1:]) if dims.condition_dim else None,
            image=torch.zeros(1, image_tokens, dims.image_dim) if dims.image_dim else None,
            control=torch.zeros(dims.vace_dim, *latent_shape[1:]) if dims.vace_layers else None,
            **blank,
        )
