"""Sound that moves a picture (Wan-S2V, arXiv 2508.18621): a chain of clips, each of which goes on from the frames before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.audio import bucketed, to_30_hz
from wan_fast.conditioning.prepared import Clips, Conditioning, Encoders, pixels_of, texts_of
from wan_fast.framing import Framing, Segment, Size, scaled_sides
from wan_fast.inputs import Inputs
from wan_fast.manifest.speech import MOTION_FRAMES
from wan_fast.media import examine, read_frames, read_image
from wan_fast.resolving import Resolved
from wan_fast.sound import read_sound
from wan_fast.tasks import PATCH

# frames before the first clip that show the picture, with --start_from_ref
STILL = 6


def prepare_speech(request: Resolved, framing: Framing, encoders: Encoders) -> Clips:
    assert request.image is not None and request.audio is not None and framing.latent_frames is not None
    text, T = encoders.encode_text(texts_of(request)), framing.latent_frames
    length = 4 * T
    hidden = encoders.encode_audio(torch.tensor(read_sound(Path(request.audio), "--audio").samples))
    # of all clips, on the host
    audio = bucketed(to_30_hz(hidden.cpu()), length)
    picture = middle_of_picture(Path(request.image), framing.size)
    reference = encoders.encode_video([picture], 1)
    # grey, where there are none yet
    first = torch.zeros(3, MOTION_FRAMES, *picture.shape[2:])
    if request.start_from_ref:
        first[:, -STILL:] = picture

    def clip(segment: Segment, before: Tensor | None) -> Conditioning:
        motion = None
        if before is not None or request.start_from_ref:
            history = first if before is None else torch.cat([first[:, before.shape[1] :].to(before), before], dim=1)
            motion = encoders.encode_video([history[:, :1], *history[:, 1:].split(4, dim=1)], MOTION_FRAMES)
        pose = None
        if request.pose_video is not None:
            pose = encoders.encode_video(_poses(request.pose_video, framing, segment, length), length + 1)[:, 1:].contiguous()
        heard = audio[..., segment.start : segment.start + length].to(reference.device)
        inputs = Inputs(reference=reference, motion=motion, pose=pose, audio=heard)
        *_, H, W = reference.shape
        return Conditioning(
            text=text,
            inputs=inputs,
            others={"unconditional": replace(inputs, audio=torch.zeros_like(heard))},
            split=T * (H // PATCH[1]) * (W // PATCH[2]),
            zero_first=False,
            before=reference if motion is None else motion,
        )

    return clip


def middle_of_picture(path: Path, size: Size) -> Tensor:
    """The picture, its shorter side scaled (bilinear) to that of `size` (width, height), cropped at its centre.

    Returns:
        [3, 1, H, W] in [-1, 1], black where the longer side is too short.
    """
    from PIL import Image

    image = read_image(path)
    scaled = image.resize(scaled_sides(image.size, size), Image.Resampling.BILINEAR)
    return _middle(pixels_of(scaled), size, fill=-1)[:, None]


def _poses(path: str, framing: Framing, segment: Segment, length: int) -> Iterator[Tensor]:
    """The frames of poses of a clip, in chunks [3, f, H, W]: the first once more before them, and black behind their end."""
    width, height = framing.size
    black = torch.full((3, height, width), -1.0)
    indices = framing.frames[segment.start : segment.start + length]
    frames = read_frames(examine(Path(path), "--pose_video"), indices)
    waiting: list[Tensor] = []
    for number in range(length):
        waiting.append(black if number >= len(indices) else _scaled(next(frames), framing.size))
        if number == 0:
            yield waiting[0][:, None]
        if number % 4 == 3:
            yield torch.stack(waiting, dim=1)
            waiting = []


def _scaled(frame: Tensor, size: Size) -> Tensor:
    """A frame [H, W, 3] uint8 as `middle_of_picture` scales and crops, grey where it is too short: [3, H, W] in [-1, 1]."""
    pixels = frame.permute(2, 0, 1)[None].float() / 127.5 - 1
    columns, rows = scaled_sides((frame.shape[1], frame.shape[0]), size)
    return _middle(F.interpolate(pixels, size=(rows, columns), mode="bilinear", antialias=True)[0], size, fill=0)


def _middle(pixels: Tensor, size: Size, fill: float) -> Tensor:
    """[3, h, w] -> [3, H, W] of a size (width, height), cut off or filled up evenly."""
    for dim, side in ((1, size[1]), (2, size[0])):
        lacks = side - pixels.shape[dim]
        if lacks > 0:
            ends = (lacks // 2, lacks - lacks // 2)
            pixels = F.pad(pixels, (0, 0, *ends) if dim == 1 else ends, value=fill)
        # halves go to the even number, as officially
        pixels = pixels.narrow(dim, round((pixels.shape[dim] - side) / 2), side)
    return pixels
