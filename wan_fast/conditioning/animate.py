"""Animate (arXiv 2509.14055): a person of a picture moves as one in a video did, or takes their place there.

What drives it are files of a folder that the official preprocessing writes. A chain of clips, each of which begins with the
last frames of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.image import grey_but_for
from wan_fast.conditioning.prepared import Clips, Conditioning, Encoders, texts_of
from wan_fast.framing import BACKGROUND, FACE, MASK, PERSON, POSE, Framing, Segment, Size, boxed_size, folder_of, reflected
from wan_fast.inputs import Inputs
from wan_fast.media import examine, read_frames, read_image

if TYPE_CHECKING:
    from PIL import Image
from wan_fast.resolving import Resolved


def prepare_animate(request: Resolved, framing: Framing, encoders: Encoders) -> Clips:
    folder = folder_of(request)
    count, num_frames = framing.num_frames, 4 * (framing.latent_frames or 1) - 3
    text = encoders.encode_text(texts_of(request))
    reference = boxed(read_image(folder / PERSON), framing.size)
    image = encoders.encode_image([reference])
    first = encoders.encode_video([reference[:, None]], 1)  # [16, 1, h, w]

    def frames(name: str, segment: Segment) -> list[Tensor]:
        """Of the clip, [H, W, 3] uint8 each."""
        return _read(folder / name, reflected(segment.start, num_frames, count))

    def clip(segment: Segment, before: Tensor | None) -> Conditioning:
        last = None if before is None else before.cpu().float()
        if request.replace_flag:
            latents = encoders.encode_video(_chunks(frames(BACKGROUND, segment), last), num_frames)
            known = torch.stack([frame[..., 0] for frame in frames(MASK, segment)]) / -255 + 1
        else:
            given = {0: torch.zeros_like(reference)} if last is None else dict(enumerate(last.unbind(1)))
            latents = encoders.encode_video(grey_but_for(given, num_frames), num_frames)
            known = torch.zeros(num_frames, *latents.shape[2:])
        if last is not None:
            known[: last.shape[1]] = 1
        mask = packed(known, latents)
        face = _pixels(frames(FACE, segment))
        inputs = Inputs(
            channels=torch.cat([torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1), torch.cat([first, latents], dim=1)]),
            image=image,
            pose=encoders.encode_video(_chunks(frames(POSE, segment)), num_frames),
            face=face,
        )
        if "unconditional" not in text:
            return Conditioning(text=text, inputs=inputs)
        # black, in the place of a face
        without = replace(inputs, face=torch.tensor(-1.0).expand(face.shape))
        return Conditioning(text=text, inputs=inputs, others={"unconditional": without})

    return clip


def _read(file: Path, indices: Sequence[int]) -> list[Tensor]:
    """Frames of a video in any order, [H, W, 3] uint8."""
    wanted = sorted({*indices})
    read = dict(zip(wanted, read_frames(examine(file, "--src_root_path"), wanted), strict=True))
    return [read[index] for index in indices]


def _pixels(frames: Sequence[Tensor]) -> Tensor:
    """[H, W, 3] uint8 each -> [3, F, H, W] fp32 in [-1, 1]."""
    return torch.stack(list(frames)).permute(3, 0, 1, 2) / 127.5 - 1


def _chunks(frames: Sequence[Tensor], last: Tensor | None = None) -> Iterator[Tensor]:
    """[H, W, 3] uint8 each -> chunks [3, f, H, W] fp32 in [-1, 1] of 1 frame and then 4; the first frames are those of `last`
    [3, r, H, W]."""
    for start in (0, *range(1, len(frames), 4)):
        chunk = _pixels(frames[start : start + 4 if start else 1])
        if last is not None:
            known = last[:, start : start + chunk.shape[1]]
            chunk[:, : known.shape[1]] = known
        yield chunk


def packed(known: Tensor, latents: Tensor) -> Tensor:
    """Per pixel and frame [F, H, W] how far it is known -> [4, T, h, w], of latents [C, T, h, w]: of the first of the 8 x 8
    pixels of each, for the four frames that it stands for; the first stands for one alone, which counts as four."""
    rows, columns = (side // of for side, of in zip(known.shape[1:], latents.shape[2:], strict=True))
    nearest = known[:, ::rows, ::columns].to(latents.device)
    return torch.cat([nearest[:1].expand(3, -1, -1), nearest]).unflatten(0, (-1, 4)).transpose(0, 1)


def boxed(image: Image.Image, size: Size) -> Tensor:
    """A picture whole, scaled (bilinear, not antialiased, to 8 bits) to fit into `size` (width, height), on black.

    Returns:
        [3, H, W] fp32 in [-1, 1].
    """
    pixels, (width, height) = torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), size
    columns, rows = boxed_size(image.size, size)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = torch.zeros(3, height, width)
    scaled = F.interpolate(pixels[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
    canvas[:, top : top + rows, left : left + columns] = scaled.round()
    return canvas / 127.5 - 1
