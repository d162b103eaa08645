"""What preparing makes, and what it needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from wan_fast.framing import Framing, Segment
from wan_fast.inputs import Inputs
from wan_fast.resolving import Resolved

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Built once per clip: everything that depends neither on the latents nor on the timestep.

    text: per branch ("conditional", "unconditional"; "unprompted", that has all but the prompt) [S, text_dim], unpadded.
    known: [C, t, H, W] latents that stay as they are at the start of the clip, or None.
    split: tokens before it are at timestep 0, or, where `zero_first` is False, those from it on; 0: all are at the step's.
    inputs: what the model takes beside text; others: what it takes in the place of that, by branch.
    before: [C, t, H, W] latents that are decoded before the clip's own, or None.
    """

    text: Mapping[str, Tensor]
    known: Tensor | None = None
    split: int = 0
    zero_first: bool = True
    inputs: Inputs = field(default_factory=Inputs)
    others: Mapping[str, Inputs] = field(default_factory=dict)
    before: Tensor | None = None

    @property
    def by_branch(self) -> dict[str, Inputs]:
        """The inputs of each branch."""
        return {branch: self.others.get(branch, self.inputs) for branch in self.text}


# (segment, frames before it [3, n, H, W] in [-1, 1], None before the first) -> what it is conditioned on
Clips = Callable[[Segment, Tensor | None], Conditioning]


class Encoders(Protocol):
    """What preparing needs of an engine."""

    def encode_text(self, texts: Mapping[str, str]) -> Mapping[str, Tensor]: ...

    def encode_image(self, pictures: Sequence[Tensor]) -> Tensor | None: ...

    def encode_audio(self, samples: Tensor) -> Tensor: ...

    def encode_video(self, chunks: Iterable[Tensor], num_frames: int) -> Tensor: ...


def alone(
    prepare: Callable[[Resolved, Framing, Encoders], Conditioning],
) -> Callable[[Resolved, Framing, Encoders], Clips]:
    """The form that a chain of clips asks for, of a video that is one clip."""

    def prepared(request: Resolved, framing: Framing, encoders: Encoders) -> Clips:
        conditioning = prepare(request, framing, encoders)
        return lambda segment, before: conditioning

    return prepared


def texts_of(request: Resolved) -> dict[str, str]:
    """What there is to encode, by branch: without guidance the prompt alone."""
    both = {"conditional": request.prompt, "unconditional": request.negative_prompt}
    return {"conditional": request.prompt} if {*request.guidance_scale} == {1.0} and not request.two_scales else both


def pixels_of(image: Image.Image) -> Tensor:
    """[3, H, W] fp32 in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
