"""Convolutions of `causal_conv3d` on a CPU in fp32, in the forms that are fast there. F frames, C channels, H W."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS_LAST = torch.channels_last

# On a CPU in fp32, a convolution of at least this many input channels on frames of at least this many positions runs as
# `_winograd`, 1.4 x the speed of conv3d at 64 to 384 channels; on smaller frames transforming the weights costs what it
# saves. The others run as `_stacked`: oneDNN's conv3d is 2 to 10 x slower than its conv2d at 8 to 32 channels.
# (AMD EPYC, AVX2, PyTorch 2.13)
WIDE_CHANNELS = 64
LARGE_FRAME = 384

# work goes in blocks that stay in the cache from one step to the next; of 1 to 16 MiB this was the steadiest
BLOCK_BYTES = 8 << 20

# A doubled row sees the kernel's three rows fold onto two rows of the frame it was doubled from:
# [parity of the row, folded row, kernel row]. The same for columns.
FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def causal(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """[F, Cin, H, W] behind past by a kernel [Cout, Cin, 3, k, k]: a new result, or one added to out."""
    if past is None and x.shape[0] > 1:
        past = torch.zeros_like(x[:2])
    large = x.shape[1] >= WIDE_CHANNELS and x.shape[2] * x.shape[3] >= LARGE_FRAME
    return (_winograd if large else _stacked)(x, past, weight, bias, out)


def over_time(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, stride: int, parts: int) -> Tensor:
    """By a kernel [Cout, Cin, 3, 1, 1], over every `stride`-th frame; parts of the channels become frames in a row."""
    count = x.shape[0] // stride
    frames = torch.cat([x.new_zeros(3 - stride, *x.shape[1:]) if past is None else past, x])
    first, *others = weight.unbind(2)
    y = F.conv2d(frames[: count * stride : stride], first, bias)
    for tap, kernel in enumerate(others, 1):
        y += F.conv2d(frames[tap : tap + count * stride : stride], kernel)
    return y.unflatten(1, (parts, -1)).flatten(0, 1).contiguous(memory_format=CHANNELS_LAST) if parts > 1 else y


def _stacked(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """As one 2-D convolution over the channels of three frames."""
    count, halo = x.shape[0], weight.shape[-1] // 2
    if past is None:
        taps, kernel = x, weight[:, :, 2]
    else:
        frames = torch.cat([past, x])
        taps = torch.cat([frames[tap : tap + count] for tap in range(3)], dim=1)
        # no copy: the weight lies as this kernel does
        kernel = weight.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)
    y = F.conv2d(taps, kernel, bias, padding=halo)
    return y if out is None else out.add_(y)


def _winograd(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """In four 2-D convolutions for two frames instead of six: F(2, 3) over time, arXiv 1509.09308."""
    count, _, height, width = x.shape
    halo = weight.shape[-1] // 2
    write = Tensor.copy_ if out is None else Tensor.add_
    if out is None:
        out = torch.empty((count, weight.shape[0], height, width), memory_format=CHANNELS_LAST)
    first, centre, last = (tap.contiguous(memory_format=CHANNELS_LAST) for tap in weight.unbind(2))
    both, half = (first + last).mul_(0.5), centre * 0.5
    plus, minus = both + half, both.sub_(half)
    strip = max(1, BLOCK_BYTES // (4 * width * max(weight.shape[:2])))
    for top in range(0, height, strip):
        bottom = min(top + strip, height)
        edges = (0, 0, halo if top == 0 else 0, halo if bottom == height else 0)
        rows = slice(max(top - halo, 0), bottom + halo)
        frames = [*(() if past is None else past[:, :, rows].split(1)), *x[:, :, rows].split(1)]
        target = out[:, :, top:bottom].split(1)
        for i in range(0, count - 1, 2):
            d0, d1, d2, d3 = frames[i : i + 4]
            m1, m2 = _conv_rows(d1 + d2, plus, bias, edges), _conv_rows(d2 - d1, minus, None, edges)
            write(target[i], _conv_rows(d0 - d2, first, None, edges).add_(m1).add_(m2))
            write(target[i + 1], _conv_rows(d3 - d1, last, None, edges).add_(m1).sub_(m2))
        if count % 2:
            y = _conv_rows(frames[-1], last, bias, edges)
            if past is not None:
                y += _conv_rows(frames[-2], centre, None, edges)
                y += _conv_rows(frames[-3], first, None, edges)
            write(target[-1], y)
    return out


def _conv_rows(x: Tensor, weight: Tensor, bias: Tensor | None, edges: tuple[int, int, int, int]) -> Tensor:
    """Convolve a strip [1, Cin, rows, W] that brings its neighbours' rows along, but for the zeros of `edges`."""
    return F.conv2d(F.pad(x, edges) if any(edges) else x, weight, bias, padding=(0, weight.shape[-1] // 2))


def doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 convolution of nearest-doubled frames from the frames themselves: a 2 x 2 kernel for each parity.

    Args:
        x: [F, Cin, H, W].
        weight: [Cout, Cin, 3, 3].
        bias: [Cout].

    Returns:
        [F, Cout, 2H, 2W].
    """
    f, _, h, w = x.shape
    out = torch.empty((f, weight.shape[0], 2 * h, 2 * w), memory_format=CHANNELS_LAST)
    for row, row_fold in enumerate(weight.new_tensor(FOLD)):
        for column, column_fold in enumerate(weight.new_tensor(FOLD)):
            kernel = (row_fold @ weight @ column_fold.T).contiguous(memory_format=CHANNELS_LAST)
            for frame, target in zip(x.split(1), out.split(1), strict=True):
                y = F.conv2d(frame, kernel, bias, padding=1)
                target[:, :, row::2, column::2] = y[:, :, row : row + h, column : column + w]
    return out
