"""VACE (arXiv 2503.07598): a video to follow, a mask of what of it to make anew, pictures of what is to be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.image import grey_but_for
from wan_fast.conditioning.prepared import Conditioning, Encoders, pixels_of, texts_of
from wan_fast.config import Resolved
from wan_fast.dit import Inputs
from wan_fast.framing import Framing, Size
from wan_fast.media import examine, read_frames, read_image

if TYPE_CHECKING:
    from PIL import Image

STRIDE = 8


def prepare_vace(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    width, height = framing.size
    grey = torch.zeros(3, height, width)
    mask: Tensor | None = None
    if request.src_video is None:
        kept = changed = encoders.encode_video(grey_but_for({0: grey}, framing.num_frames), framing.num_frames)
    elif request.src_mask is None:  # all of it is made anew
        kept = encoders.encode_video(grey_but_for({0: grey}, framing.num_frames), framing.num_frames)
        changed = encoders.encode_video(_chunks(request, framing, None), framing.num_frames)
    else:
        mask = torch.stack([*_masks(request, framing)])
        kept = encoders.encode_video(_chunks(request, framing, ~mask), framing.num_frames)
        changed = encoders.encode_video(_chunks(request, framing, mask), framing.num_frames)
    latents = torch.cat([kept, changed])
    references = [encoders.encode_video([fitted(read_image(Path(p)), framing.size)], 1) for p in request.src_ref_images]
    # in the order given, each beside nothing to change
    before = [torch.cat([reference, torch.zeros_like(reference)]) for reference in references]
    control = torch.cat([*before, latents], dim=1)
    channels = torch.zeros(STRIDE**2, *control.shape[1:], device=control.device)
    channels[:, len(before) :] = 1 if mask is None else mask_channels(mask, latents.shape[1])
    return Conditioning(
        text=encoders.encode_text(texts_of(request)),
        inputs=Inputs(control=torch.cat([control, channels]), control_scale=request.context_scale),
    )


def _chunks(request: Resolved, framing: Framing, shown: Tensor | None) -> Iterator[Tensor]:
    """The video in chunks [3, f, H, W] of 1 frame and then 4, zero where `shown` [F, H, W] is not."""
    assert request.src_video is not None
    video = examine(Path(request.src_video), "--src_video")
    waiting: list[Tensor] = []
    for index, frame in enumerate(read_frames(video, framing.frames)):
        pixels = covering(frame, framing.size).float() / 127.5 - 1
        waiting.append(pixels if shown is None else pixels * shown[index])
        if index % 4 == 0:
            yield torch.stack(waiting, dim=1)
            waiting = []


def _masks(request: Resolved, framing: Framing) -> Iterator[Tensor]:
    """Per frame [H, W], whether to make it anew."""
    assert request.src_mask is not None
    for frame in read_frames(examine(Path(request.src_mask), "--src_mask"), framing.frames):
        yield covering(frame, framing.size)[0] > 127


def covering(frame: Tensor, size: Size) -> Tensor:
    """A frame [H, W, 3] uint8 scaled to cover `size` (width, height), bicubic, and cropped at its centre: [3, H, W] uint8."""
    pixels, (width, height) = frame.permute(2, 0, 1)[None], size
    if pixels.shape[2:] != (height, width):
        scale = max(width / pixels.shape[3], height / pixels.shape[2])
        sides = round(scale * pixels.shape[2]), round(scale * pixels.shape[3])
        pixels = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True)
        top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
        pixels = pixels[:, :, top : top + height, left : left + width]
    return pixels[0]


def fitted(image: Image.Image, size: Size) -> Tensor:
    """A picture whole, scaled (bilinear, not antialiased) to fit into `size` (width, height), on white.

    Returns:
        [3, 1, H, W] in [-1, 1].
    """
    pixels, (width, height) = pixels_of(image), size
    if pixels.shape[1:] == (height, width):
        return pixels[:, None]
    scale = min(height / pixels.shape[1], width / pixels.shape[2])
    sides = int(pixels.shape[1] * scale), int(pixels.shape[2] * scale)
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    canvas = torch.ones(3, 1, height, width)
    scaled = F.interpolate(pixels[None], size=sides, mode="bilinear", align_corners=False)[0]
    canvas[:, 0, top : top + sides[0], left : left + sides[1]] = scaled
    return canvas


def mask_channels(mask: Tensor, latent_frames: int) -> Tensor:
    """[F, H, W] -> [64, T, H / 8, W / 8] fp32: the pixels of each cell, row by row, of the frame nearest to a latent one."""
    F_, H, W = mask.shape
    nearest = [int((t + 0.5) * F_ / latent_frames) for t in range(latent_frames)]
    cells = mask[nearest].view(latent_frames, H // STRIDE, STRIDE, W // STRIDE, STRIDE)
    return cells.permute(2, 4, 0, 1, 3).flatten(0, 1).float()
