"""VACE (arXiv 2503.07598): a video to follow, a mask of what of it to make anew, pictures of what is to be seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.image import grey_but_for
from wan_fast.conditioning.prepared import Conditioning, Encoders, pixels_of, texts_of
from wan_fast.framing import Framing, Size, fitted_size
from wan_fast.inputs import Inputs
from wan_fast.media import examine, read_frames, read_image
from wan_fast.resolving import Resolved

if TYPE_CHECKING:
    from PIL import Image

STRIDE = 8


def prepare_vace(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    (width, height), count = framing.size, framing.num_frames
    grey = grey_but_for({0: torch.zeros(3, height, width)}, count)
    # what is kept of the video, and what is made anew: without a mask all of it
    kept = encoders.encode_video(_chunks(request, framing, anew=False) if request.src_mask else grey, count)
    changed = encoders.encode_video(_chunks(request, framing, anew=True), count) if request.src_video else kept
    latents = torch.cat([kept, changed])
    references = [encoders.encode_video([fitted(read_image(Path(p)), framing.size)], 1) for p in request.src_ref_images]
    # in the order given, each beside nothing to change
    before = [torch.cat([reference, torch.zeros_like(reference)]) for reference in references]
    control = torch.cat([*before, latents], dim=1)
    channels = torch.zeros(STRIDE**2, *control.shape[1:], device=control.device)
    channels[:, len(before) :] = mask_channels(_masks(request, framing), count) if request.src_mask else 1
    return Conditioning(
        text=encoders.encode_text(texts_of(request)),
        inputs=Inputs(control=torch.cat([control, channels]), control_scale=request.context_scale),
    )


def _chunks(request: Resolved, framing: Framing, *, anew: bool) -> Iterator[Tensor]:
    """The video in chunks [3, f, H, W] of 1 frame and then 4: what is made anew of it, or what is not, grey elsewhere."""
    assert request.src_video is not None
    video = examine(Path(request.src_video), "--src_video")
    masks = _masks(request, framing) if request.src_mask else None
    waiting: list[Tensor] = []
    for index, frame in enumerate(read_frames(video, framing.frames)):
        pixels = covering(frame, framing.size).float() / 127.5 - 1
        waiting.append(pixels if masks is None else pixels * (next(masks) == anew))
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
    columns, rows = fitted_size(image.size, size)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = torch.ones(3, 1, height, width)
    scaled = F.interpolate(pixels[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    canvas[:, 0, top : top + rows, left : left + columns] = scaled
    return canvas


def mask_channels(masks: Iterable[Tensor], num_frames: int) -> Tensor:
    """`num_frames` of [H, W] -> [64, T, H / 8, W / 8] fp32: the pixels of each cell, row by row, of the frame nearest to a
    latent one."""
    latent_frames = (num_frames + 3) // 4
    nearest = {int((t + 0.5) * num_frames / latent_frames) for t in range(latent_frames)}
    mask = torch.stack([each for index, each in enumerate(masks) if index in nearest])
    cells = mask.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE))  # [T, H / 8, 8, W / 8, 8]
    return cells.permute(2, 4, 0, 1, 3).flatten(0, 1).float()
