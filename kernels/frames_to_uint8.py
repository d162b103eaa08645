"""Decoded frames to 8-bit pixels, y = uint8((clamp(x, -1, 1) + 1) / 2 * 255), planes to interleaved RGB.

F frames, H and W height and width in pixels. The arithmetic is fp32 and every implementation gives the same bytes. NaN
becomes 0. The conversion truncates; with `rounding`, 0.5 is added first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._op import backend, cuda_extension, register

__all__ = ["backend", "frames_to_uint8"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _frames_to_uint8_kernel(
    frames_ptr,  # [3, F, H, W], rows dense
    pixels_ptr,  # [F, H, W, 3]
    frame_bytes,  # 3 * H * W
    stride_c,
    stride_f,
    blocks_per_frame,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program writes BLOCK consecutive bytes of one frame; int64: a long clip exceeds 2**31 elements
    program = tl.program_id(0).to(tl.int64)
    f = program // blocks_per_frame
    first = program % blocks_per_frame * BLOCK
    byte = first + tl.arange(0, BLOCK)  # [BLOCK]
    mask = byte < frame_bytes
    # byte // 3 and byte % 3, with the division in int64 done once for the block
    near = (first % 3).to(tl.int32) + tl.arange(0, BLOCK)
    pixel = first // 3 + near // 3
    channel = (near % 3).to(tl.int64)
    x = tl.load(frames_ptr + channel * stride_c + f * stride_f + pixel, mask=mask, other=0.0).to(tl.float32)
    # comparisons, not min and max: a NaN takes the lower bound
    x = tl.where(x > -1.0, x, -1.0)
    x = tl.where(x < 1.0, x, 1.0)
    # halving last, which is exact: a fused multiply-add with the 0.5 below then rounds as PyTorch does
    y = (x + 1.0) * 255.0 * 0.5
    if ROUNDING:
        y += 0.5
    tl.store(pixels_ptr + f * frame_bytes + byte, y.to(tl.uint8), mask=mask)


_CANDIDATES = tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8))


def _config(frame_bytes: int) -> dict[str, int]:
    """Tiles; not tuned on a device yet."""
    return {"BLOCK": 1024, "num_warps": 4}  # each thread stores 8 bytes at once


def _launch_triton(frames: Tensor, pixels: Tensor, rounding: bool) -> None:
    _, F, H, W = frames.shape
    frame_bytes = 3 * H * W
    config = _config(frame_bytes)
    blocks_per_frame = triton.cdiv(frame_bytes, config["BLOCK"])
    _frames_to_uint8_kernel[(F * blocks_per_frame,)](
        frames,
        pixels,
        frame_bytes,
        frames.stride(0),
        frames.stride(1),
        blocks_per_frame,
        ROUNDING=rounding,
        **config,
        # either would do (Triton 3.6 fuses on sm_100 all the same), but Triton 3.9 warns where nothing is said
        enable_fp_fusion=False,
    )


def _launch_cuda(extension: Any, frames: Tensor, pixels: Tensor, rounding: bool) -> None:
    _, F, H, W = frames.shape
    extension.frames_to_uint8(
        frames.data_ptr(),
        str(frames.dtype).removeprefix("torch."),
        pixels.data_ptr(),
        F,
        H,
        W,
        frames.stride(0),
        frames.stride(1),
        rounding,
        frames.get_device(),
        torch.cuda.current_stream(frames.device).cuda_stream,
    )


def _launch(frames: Tensor, rounding: bool) -> Tensor:
    pixels = _fake(frames, rounding)
    if frames.numel() == 0:
        return pixels
    # a chunk of a larger buffer keeps dense rows and is read in place
    if not frames[0, 0].is_contiguous():
        frames = frames.contiguous()
    with torch.cuda.device_of(frames):
        if (extension := cuda_extension(frames.device)) is not None:
            _launch_cuda(extension, frames, pixels, rounding)
        else:
            _launch_triton(frames, pixels, rounding)
    return pixels


def _reference(frames: Tensor, rounding: bool) -> Tensor:
    pixels = _fake(frames, rounding)
    # one frame at a time: the scratch is one frame and stays in cache
    for f in range(frames.shape[1]):
        x = frames[:, f].to(torch.promote_types(frames.dtype, torch.float32)).clamp(-1, 1).nan_to_num_(nan=-1.0)
        x.add_(1).div_(2).mul_(255)
        if rounding:
            x.add_(0.5)
        pixels[f] = x.to(torch.uint8).permute(1, 2, 0)
    return pixels


def _fake(frames: Tensor, rounding: bool) -> Tensor:
    _, F, H, W = frames.shape
    return frames.new_empty((F, H, W, 3), dtype=torch.uint8)


_op = register("frames_to_uint8", launch=_launch, reference=_reference, fake=_fake, has_cuda=True)


def frames_to_uint8(frames: Tensor, *, rounding: bool = False) -> Tensor:
    """Turn decoded frames into 8-bit RGB pixels, as a video writer takes them.

    Args:
        frames: [3, F, H, W] fp32, bf16 or fp16, with values in [-1, 1]; outside values are clamped, NaN is black.
        rounding: round to the nearest level instead of truncating.

    Returns:
        [F, H, W, 3] uint8, contiguous, on the device of `frames`; computed in fp32.

    Raises:
        ValueError: `frames` has another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[0] != 3:
        raise ValueError(
            f"frames_to_uint8 wants frames [3, F, H, W], got {tuple(frames.shape)}; convert the videos of a batch one by one"
        )
    if frames.dtype not in _DTYPES:
        raise ValueError(
            f"frames_to_uint8 wants frames in float32, bfloat16 or float16, got {frames.dtype}; "
            "convert them, for example with frames.float()"
        )
    return _op(frames, rounding)
