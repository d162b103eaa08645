"""What preparing makes, and what it needs of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from wan_fast.config import Resolved
from wan_fast.dit import Inputs

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Built once per generation: everything that depends neither on the latents nor on the timestep.

    text: per branch ("conditional", "unconditional") [S, text_dim], unpadded.
    known: [C, t, H, W] latents that stay as they are at the start of the clip, or None.
    split: number of leading tokens that are at timestep 0 because their latents are known.
    inputs: what the model takes beside text.
    """

    text: Mapping[str, Tensor]
    known: Tensor | None = None
    split: int = 0
    inputs: Inputs = field(default_factory=Inputs)


class Encoders(Protocol):
    """What preparing needs of an engine."""

    def encode_text(self, texts: Mapping[str, str]) -> Mapping[str, Tensor]: ...

    def encode_image(self, pictures: Sequence[Tensor]) -> Tensor | None: ...

    def encode_video(self, chunks: Iterable[Tensor], num_frames: int) -> Tensor: ...


def texts_of(request: Resolved) -> dict[str, str]:
    """What there is to encode, by branch: without guidance the prompt alone."""
    both = {"conditional": request.prompt, "unconditional": request.negative_prompt}
    return {"conditional": request.prompt} if {*request.guidance_scale} == {1.0} else both


def pixels_of(image: Image.Image) -> Tensor:
    """[3, H, W] fp32 in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
