"""frames_to_uint8: the values, what it refuses, and both GPU implementations."""

from __future__ import annotations

import importlib
from math import isqrt

import pytest
import torch
from kernel_cases import CASES, Case
from torch import Tensor

from wan_fast.kernels import _op, frames_to_uint8
from wan_fast.vae import unpatchify

# the function hides its module as an attribute of the package
module = importlib.import_module("wan_fast.kernels.frames_to_uint8")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
each_case = pytest.mark.parametrize("case", [c for c in CASES if c.op == "frames_to_uint8"], ids=lambda case: case.id)


def in_one_expression(frames: Tensor, rounding: bool) -> Tensor:
    """[F, 3 p p, h, w] -> [F, p h, p w, 3], as the formula is written."""
    y = (frames.float().clamp(-1, 1) + 1) / 2 * 255
    levels = (y + 0.5 if rounding else y).nan_to_num(0).to(torch.uint8)
    return unpatchify(levels, isqrt(frames.shape[1] // 3)).permute(1, 2, 3, 0).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_reference_is_the_formula(case: Case, dtype: torch.dtype) -> None:
    frames, rounding = case.inputs(dtype)
    pixels = frames_to_uint8(frames, rounding=rounding)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, in_one_expression(frames, rounding))


def grey(values: Tensor) -> Tensor:
    """A frame of one row, [1, 3, 1, W]."""
    return values.expand(1, 3, 1, -1).contiguous(memory_format=torch.channels_last)


def test_values() -> None:
    frames = grey(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, float("nan")]))
    assert frames_to_uint8(frames)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255, 0]
    assert frames_to_uint8(frames, rounding=True)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255, 0]


def test_every_level_survives_a_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(frames_to_uint8(grey(levels.float() / 127.5 - 1), rounding=True)[0, 0, :, 2], levels)


def test_a_patch_is_colour_column_row() -> None:
    """Of 12 channels of one position the sixth is the green of the right column's lower row."""
    frames = torch.full((1, 12, 1, 1), -1.0)
    frames[0, 7] = 1.0
    pixels = frames_to_uint8(frames.contiguous(memory_format=torch.channels_last))
    assert pixels.shape == (1, 2, 2, 3)
    assert pixels.nonzero().tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 12, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    frames = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    expected = in_one_expression(frames, False).shape
    assert frames_to_uint8(frames).shape == expected
    assert module._launch(frames, False).shape == expected


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 2, 4, 4), (2, 4, 4, 4), (2, 6, 4, 4), (2, 0, 4, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wants frames \[F, 3 p p, h, w\]; got frames \(" + ", ".join(map(str, shape))):
        frames_to_uint8(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16 or float16, got " + str(dtype).removeprefix("torch.")):
        frames_to_uint8(torch.zeros(1, 3, 2, 2, dtype=dtype))


def test_refuses_planes() -> None:
    with pytest.raises(ValueError, match="channels innermost"):
        frames_to_uint8(torch.zeros(1, 3, 4, 5))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@each_case
def test_gpu_implementations_are_equal(case: Case, implementation: str, dtype: torch.dtype) -> None:
    frames, rounding = case.inputs(dtype)
    expected = module._reference(frames, rounding)
    frames = frames.cuda()
    pixels = torch.empty_like(expected, device="cuda")
    if implementation == "triton":
        module._launch_triton(frames, pixels, rounding)
    else:
        if frames.shape[1] > 12:
            pytest.skip("Triton alone")
        if (extension := _op.cuda_extension(frames.device)) is None:
            pytest.skip(_op.why_no_extension(frames.device))
        module._launch_cuda(extension, frames, pixels, rounding)
    assert torch.equal(pixels.cpu(), expected)


@needs_gpu
def test_offsets_beyond_int32() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    # only the last frame lies beyond 2**31 elements, in both tensors
    frames = torch.full((780, 960, 960, 3), -1.0, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    frames[-1, 2, -1, -1] = 1.0
    pixels = frames_to_uint8(frames)
    assert pixels[-1, -1, -1].tolist() == [0, 0, 255]
    assert pixels.count_nonzero().item() == 1
