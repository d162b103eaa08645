"""Decoded frames to 8-bit pixels, y = uint8((clamp(x, -1, 1) + 1) / 2 * 255), patches of pixels to interleaved RGB.

F frames, h and w positions of the decoder, each a patch of p x p pixels: its 3 p p channels, side by side (channels-last),
are colour, column and row, the row fastest. The arithmetic is fp32 and every implementation gives the same bytes. NaN becomes
0. The conversion truncates; with `rounding`, 0.5 is added first.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _check
from ._op import backend, cuda_extension, register

__all__ = ["backend", "frames_to_uint8"]


@triton.jit
def _frames_to_uint8_kernel(
    frames_ptr,  # [F, h, w, 3 PATCH PATCH]
    pixels_ptr,  # [F, PATCH h, PATCH w, 3]
    h,
    w,
    PATCH: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program writes BLOCK consecutive bytes of a row of pixels; int64: a long clip exceeds 2**31 elements
    f, row = tl.program_id(2).to(tl.int64), tl.program_id(1)
    byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = byte < 3 * PATCH * w
    line = (f * h + row // PATCH) * w * (3 * PATCH * PATCH)
    if PATCH == 1:
        element = byte
    else:
        column = byte // 3
        within = (byte % 3 * PATCH + column % PATCH) * PATCH + row % PATCH
        element = column // PATCH * (3 * PATCH * PATCH) + within
    x = tl.load(frames_ptr + line + element, mask=mask, other=0.0).to(tl.float32)
    # comparisons, not min and max: a NaN takes the lower bound
    x = tl.where(x > -1.0, x, -1.0)
    x = tl.where(x < 1.0, x, 1.0)
    # halving last, which is exact: a fused multiply-add with the 0.5 below then rounds as PyTorch does
    y = (x + 1.0) * 255.0 * 0.5
    if ROUNDING:
        y += 0.5
    tl.store(pixels_ptr + (f * h * PATCH + row) * w * (3 * PATCH) + byte, y.to(tl.uint8), mask=mask)


_CANDIDATES = tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8))


def _config(row_bytes: int) -> dict[str, int]:
    """Tiles; not tuned on a device yet."""
    return {"BLOCK": 1024, "num_warps": 4}  # each thread stores 8 bytes at once


def _patch(frames: Tensor) -> int:
    return isqrt(frames.shape[1] // 3)


def _launch_triton(frames: Tensor, pixels: Tensor, rounding: bool) -> None:
    F, H, W, _ = pixels.shape
    patch = _patch(frames)
    config = _config(3 * W)
    _frames_to_uint8_kernel[(triton.cdiv(3 * W, config["BLOCK"]), H, F)](
        frames,
        pixels,
        H // patch,
        W // patch,
        PATCH=patch,
        ROUNDING=rounding,
        **config,
        # either would do (Triton 3.6 fuses on sm_100 all the same), but Triton 3.9 warns where nothing is said
        enable_fp_fusion=False,
    )


def _launch_cuda(extension: Any, frames: Tensor, pixels: Tensor, rounding: bool) -> None:
    F, _, h, w = frames.shape
    extension.frames_to_uint8(
        frames.data_ptr(),
        str(frames.dtype).removeprefix("torch."),
        pixels.data_ptr(),
        F,
        h,
        w,
        _patch(frames),
        rounding,
        frames.get_device(),
        torch.cuda.current_stream(frames.device).cuda_stream,
    )


def _launch(frames: Tensor, rounding: bool) -> Tensor:
    pixels = _fake(frames, rounding)
    if frames.numel() == 0:
        return pixels
    with torch.cuda.device_of(frames):
        # the compiled module knows the patches of the two VAEs
        if _patch(frames) <= 2 and (extension := cuda_extension(frames.device)) is not None:
            _launch_cuda(extension, frames, pixels, rounding)
        else:
            _launch_triton(frames, pixels, rounding)
    return pixels


def _reference(frames: Tensor, rounding: bool) -> Tensor:
    pixels, p = _fake(frames, rounding), _patch(frames)
    # one frame at a time: the scratch is one frame and stays in cache
    for frame, rgb in zip(frames, pixels, strict=True):
        x = frame.to(torch.promote_types(frames.dtype, torch.float32)).clamp(-1, 1).nan_to_num_(nan=-1.0)
        x.add_(1).div_(2).mul_(255)
        if rounding:
            x.add_(0.5)
        rgb.unflatten(0, (-1, p)).unflatten(2, (-1, p)).copy_(x.unflatten(0, (3, p, p)).permute(3, 2, 4, 1, 0))
    return pixels


def _fake(frames: Tensor, rounding: bool) -> Tensor:
    F, _, h, w = frames.shape
    return frames.new_empty((F, h * _patch(frames), w * _patch(frames), 3), dtype=torch.uint8)


_op = register("frames_to_uint8", launch=_launch, reference=_reference, fake=_fake, has_cuda=True)


def frames_to_uint8(frames: Tensor, *, rounding: bool = False) -> Tensor:
    """Turn what the decoder gives into 8-bit RGB pixels, as a video writer takes them.

    Args:
        frames: [F, 3 p p, h, w] fp32, bf16 or fp16, channels-last, with values in [-1, 1]; outside values are clamped, NaN is
            black. p is 1 for plain RGB frames.
        rounding: round to the nearest level instead of truncating.

    Returns:
        [F, p h, p w, 3] uint8, contiguous, on the device of `frames`; computed in fp32.

    Raises:
        ValueError: `frames` has another shape, dtype or layout.
    """
    fits = frames.ndim == 4 and frames.shape[1] > 0 and 3 * _patch(frames) ** 2 == frames.shape[1]
    _check.shapes("frames_to_uint8", "frames [F, 3 p p, h, w]", fits, frames=frames)
    _check.dtypes("frames_to_uint8", _check.FLOATS, frames=frames)
    _check.channels_last("frames_to_uint8", frames=frames)
    return _op(frames, rounding)
