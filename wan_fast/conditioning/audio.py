"""What the audio encoder hears, in step with the frames of a clip."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast import sound

# frames per second that the encoder's are brought to, of which each frame of a clip takes the nearest
_HEARD_FPS = 30


def to_30_hz(hidden: Tensor) -> Tensor:
    """[layers, Ta, width] -> [layers, T30, width], the first and last frame staying what they are."""
    length = sound.frames_at_30(hidden.shape[1])
    return F.interpolate(hidden.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(1, 2)


def bucketed(features: Tensor, clip_frames: int, fps: int = 16) -> Tensor:
    """The features at each frame of as many clips as the sound needs; behind its end zeros.

    Args:
        features: [layers, T30, width], 30 per second.
        clip_frames: frames of a clip.
        fps: frames per second of a clip.

    Returns:
        [layers, width, n] in the dtype of `features`, n being a multiple of `clip_frames`.
    """
    layers, length, width = features.shape
    n = sound.num_clips(length, clip_frames, fps) * clip_frames
    times = np.linspace(0, n / fps, n, endpoint=False)
    # halves go to the even number, as officially
    nearest = torch.from_numpy(np.round(times * _HEARD_FPS).astype(np.int64)).to(features.device)
    padded = torch.cat([features, features.new_zeros(layers, 1, width)], 1)
    return padded[:, nearest.clamp(max=length)].transpose(1, 2).contiguous()
