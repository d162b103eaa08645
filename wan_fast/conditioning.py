"""What a generation is conditioned on: everything that depends neither on the latents nor on the timestep.

One prepare function per kind of task, in `PREPARE`: the only place where the kind of a task is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wan_fast.config import Resolved
from wan_fast.tasks import PATCH
from wan_fast.video import read_image


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Built once per generation.

    text: per branch ("conditional", "unconditional") [S, text_dim], unpadded.
    known: [C, t, H, W] latents that stay as they are at the start of the clip, or None.
    split: number of leading tokens that are at timestep 0 because their latents are known.
    """

    text: Mapping[str, Tensor]
    known: Tensor | None = None
    split: int = 0


class Encoders(Protocol):
    """What preparing needs of an engine."""

    def encode_text(self, texts: Mapping[str, str]) -> Mapping[str, Tensor]: ...

    def encode_video(self, video: Tensor) -> Tensor: ...


def prepare_text(request: Resolved, encoders: Encoders) -> Conditioning:
    return Conditioning(text=encoders.encode_text(texts_of(request)))


def prepare_text_image(request: Resolved, encoders: Encoders) -> Conditioning:
    """TI2V: a picture becomes the clip's first latent frame, kept as it is and shown to the model at timestep 0."""
    text = encoders.encode_text(texts_of(request))
    if request.image is None:
        return Conditioning(text=text)
    known = encoders.encode_video(cover(Path(request.image), request.size))
    frames, height, width = known.shape[-3:]
    return Conditioning(text=text, known=known, split=frames * (height // PATCH[1]) * (width // PATCH[2]))


PREPARE: dict[str, Callable[[Resolved, Encoders], Conditioning]] = {
    "text": prepare_text,
    "text_image": prepare_text_image,
}


def texts_of(request: Resolved) -> dict[str, str]:
    """What there is to encode, by branch: without guidance the prompt alone."""
    both = {"conditional": request.prompt, "unconditional": request.negative_prompt}
    return {"conditional": request.prompt} if {*request.guidance_scale} == {1.0} else both


def cover(path: Path, size: tuple[int, int]) -> Tensor:
    """The picture scaled (Lanczos) to cover `size` (width, height) and cropped at its centre: [3, 1, H, W] in [-1, 1]."""
    from PIL import Image

    image = read_image(path)
    width, height = size
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
    return (pixels.permute(2, 0, 1)[:, None].float() / 255 - 0.5) / 0.5
