"""Pictures that a clip begins with, or goes from one to the other of: grey between them, and a mask that says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.prepared import Conditioning, Encoders, pixels_of, texts_of
from wan_fast.framing import Framing
from wan_fast.inputs import Inputs
from wan_fast.media import read_image
from wan_fast.resolving import Resolved


def prepare_image(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    """I2V: the clip begins with a picture."""
    assert request.image is not None
    return _between({0: request.image}, request, framing, encoders)


def prepare_first_last(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    """FLF2V: the clip begins with a picture and ends with another."""
    assert request.first_frame is not None and request.last_frame is not None
    return _between({0: request.first_frame, framing.num_frames - 1: request.last_frame}, request, framing, encoders)


def _between(files: Mapping[int, str], request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    """A clip of which some frames are known, index -> picture."""
    pictures = {index: pixels_of(read_image(Path(file))) for index, file in files.items()}
    width, height = framing.size
    # bicubic without antialiasing, as officially
    frames = {i: F.interpolate(p[None], size=(height, width), mode="bicubic")[0] for i, p in pictures.items()}
    latents = encoders.encode_video(grey_but_for(frames, framing.num_frames), framing.num_frames)
    mask = mask_of(frames, framing.num_frames, latents)
    return Conditioning(
        text=encoders.encode_text(texts_of(request)),
        inputs=Inputs(channels=torch.cat([mask, latents]), image=encoders.encode_image([*pictures.values()])),
    )


def grey_but_for(frames: Mapping[int, Tensor], num_frames: int) -> Iterator[Tensor]:
    """A clip of zeros but for `frames`, index -> [3, H, W], 0 among them, in chunks [3, f, H, W] of 1 frame and then 4.

    Chunks of zeros alone are one tensor."""
    grey = torch.zeros_like(frames[0])[:, None].repeat(1, 4, 1, 1)
    yield frames[0][:, None]
    for start in range(1, num_frames, 4):
        inside = {index - start: frame for index, frame in frames.items() if start <= index < start + 4}
        chunk = grey.clone() if inside else grey
        for index, frame in inside.items():
            chunk[:, index] = frame
        yield chunk


def mask_of(frames: Mapping[int, Tensor], num_frames: int, latents: Tensor) -> Tensor:
    """[4, T, h, w], of latents [C, T, h, w]: 1 for every known frame of the four that a latent one stands for; the first stands
    for one alone, which counts as four."""
    known = torch.zeros(num_frames + 3, device=latents.device)
    for index in frames:
        known[index + 3 if index else slice(0, 4)] = 1
    return known.view(-1, 4).T[:, :, None, None].expand(-1, -1, *latents.shape[2:])
