"""UniAnimate (arXiv 2504.11289): a picture to start from, as in I2V, and the poses that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.conditioning.image import prepare_image
from wan_fast.conditioning.prepared import Conditioning, Encoders
from wan_fast.framing import Framing, Size
from wan_fast.media import examine, read_frames, read_image
from wan_fast.resolving import Resolved


def prepare_poses(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    assert request.pose_video is not None
    given = prepare_image(request, framing, encoders)
    video = examine(Path(request.pose_video), "--pose_video")
    poses = torch.stack([_scaled(frame, framing.size) for frame in read_frames(video, framing.frames)], dim=1)
    picture = None
    if request.pose_image is not None:
        picture = _scaled(torch.from_numpy(np.array(read_image(Path(request.pose_image)))), framing.size)
    inputs = replace(given.inputs, pose=poses, pose_image=picture)
    # the picture's own pose is in both branches, those of the clip in one
    return replace(given, inputs=inputs, others={"unconditional": replace(inputs, pose=None)})


def _scaled(frame: Tensor, size: Size) -> Tensor:
    """Pixels [H, W, 3] uint8 scaled (bilinear, antialiased) to `size` (width, height): [3, H, W] fp32 in [0, 1]."""
    pixels, (width, height) = frame.permute(2, 0, 1)[None], size
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    return pixels[0].float() / 255
