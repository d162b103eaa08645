"""frames_to_uint8: the values, what it refuses, and both GPU implementations."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_cases import CASES, Case
from torch import Tensor

from wan_fast.kernels import _op, frames_to_uint8

# the function hides its module as an attribute of the package
module = importlib.import_module("wan_fast.kernels.frames_to_uint8")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
each_case = pytest.mark.parametrize("case", [c for c in CASES if c.op == "frames_to_uint8"], ids=lambda case: case.id)


def in_one_expression(frames: Tensor, rounding: bool) -> Tensor:
    """[3, F, H, W] -> [F, H, W, 3], as the formula is written."""
    y = (frames.float().clamp(-1, 1) + 1) / 2 * 255
    return (y + 0.5 if rounding else y).nan_to_num(0).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_reference_is_the_formula(case: Case, dtype: torch.dtype) -> None:
    frames, rounding = case.inputs(dtype)
    pixels = frames_to_uint8(frames, rounding=rounding)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, in_one_expression(frames, rounding))


def test_values() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, float("nan")])
    frames = x.expand(3, 1, 1, -1)
    assert frames_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255, 0]
    assert frames_to_uint8(frames, rounding=True)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255, 0]


def test_every_level_survives_a_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    frames = (levels.float() / 127.5 - 1).expand(3, 1, 1, -1)
    assert torch.equal(frames_to_uint8(frames, rounding=True)[0, 0, :, 2], levels)


def test_channels_stay_in_order() -> None:
    frames = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 2, 4, 5)
    assert torch.equal(frames_to_uint8(frames), torch.tensor([0, 127, 255], dtype=torch.uint8).expand(2, 4, 5, 3))


@pytest.mark.parametrize("shape", [(3, 0, 4, 4), (3, 2, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    frames = torch.zeros(shape)
    expected = (*shape[1:], 3)
    assert frames_to_uint8(frames).shape == expected
    assert module._launch(frames, False).shape == expected


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 2, 4, 4), (4, 2, 4, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wants frames \[3, F, H, W\], got \(" + ", ".join(map(str, shape))):
        frames_to_uint8(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"float32, bfloat16 or float16, got {dtype}"):
        frames_to_uint8(torch.zeros(3, 1, 2, 2, dtype=dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@each_case
def test_gpu_implementations_are_equal(case: Case, implementation: str, dtype: torch.dtype) -> None:
    frames, rounding = case.inputs(dtype)
    expected = module._reference(frames, rounding)
    frames = frames.cuda()
    frames = frames if frames[0, 0].is_contiguous() else frames.contiguous()
    pixels = torch.empty_like(expected, device="cuda")
    if implementation == "triton":
        module._launch_triton(frames, pixels, rounding)
    else:
        if (extension := _op.cuda_extension(frames.device)) is None:
            pytest.skip(_op.why_no_extension(frames.device))
        module._launch_cuda(extension, frames, pixels, rounding)
    assert torch.equal(pixels.cpu(), expected)


@needs_gpu
def test_offsets_beyond_int32() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    # only the last frame lies beyond 2**31 elements, in both tensors
    frames = torch.full((3, 780, 960, 960), -1.0, dtype=torch.bfloat16, device="cuda")
    frames[2, -1, -1, -1] = 1.0
    pixels = frames_to_uint8(frames)
    assert pixels[-1, -1, -1].tolist() == [0, 0, 255]
    assert pixels.count_nonzero().item() == 1
