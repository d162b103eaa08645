"""Causal 3-D VAE of Wan 2.1 and Wan 2.2: streaming encode and decode (arXiv 2503.20314, section 4.1).

Time is causal: a frame depends on itself and on earlier frames only, so a video of any length passes through in chunks
while every temporal convolution remembers its last two input frames. The first latent frame stands for one pixel frame,
every other one for four.

Inside the module a chunk is [F, C, H, W] in channels-last memory: frames are the batch of ordinary 2-D convolutions and
the norms reduce over contiguous channels. Letters: F frames of a chunk, C channels, H W height and width at that level;
latents are [C, T, h, w] and videos [3, F, H, W].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.manifest import VaeDims
from wan_fast.tasks import VAES, VaeSpec

CHANNELS_LAST = torch.channels_last

# On a CPU in fp32, a convolution of at least this many input channels on frames of at least this many positions runs as
# `_winograd`, 1.4 x the speed of conv3d at 64 to 384 channels; on smaller frames transforming the weights costs what it
# saves. The others run as `_stacked`: oneDNN's conv3d is 2 to 10 x slower than its conv2d at 8 to 32 channels.
# (AMD EPYC, AVX2, PyTorch 2.13)
WIDE_CHANNELS = 64
LARGE_FRAME = 384

# Work on a CPU goes in blocks that stay in the cache from one step to the next; of 1 to 16 MiB this was the steadiest.
BLOCK_BYTES = 8 << 20

# A doubled row sees the kernel's three rows fold onto two rows of the frame it was doubled from:
# [parity of the row, folded row, kernel row]. The same for columns.
FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class Stream:
    """What one pass over one video remembers from chunk to chunk.

    Attributes:
        first: whether the chunk under way is the first one, which is a single frame.
        history: layer -> its last input frames [1 or 2, C, H, W]; a layer that is not in it has seen only zeros.
    """

    def __init__(self) -> None:
        self.first = True
        self.history: dict[nn.Module, Tensor] = {}

    def remember(self, layer: nn.Module, x: Tensor, count: int) -> None:
        """Keep the last `count` frames of what `layer` has been given so far. x: [F, C, H, W]."""
        kept = self.history.get(layer)
        if kept is None:
            kept = self.history[layer] = empty_frames(x, count, *x.shape[1:]).zero_()
        new = min(count, x.shape[0])
        for index in range(count - new):
            kept[index] = kept[index + new]
        kept[count - new :] = x[x.shape[0] - new :]


class CausalConv3d(nn.Module):
    """Convolution over [3, k, k] whose output frame sees its own frame and the two before it."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__()
        self.weight, self.bias = nn.Conv3d(in_channels, out_channels, (3, size, size)).parameters()

    def forward(self, x: Tensor, stream: Stream, out: Tensor | None = None) -> Tensor:
        """x: [F, Cin, H, W]. `out`: [F, Cout, H, W] to add the result to, in place. Returns: [F, Cout, H, W]."""
        y = causal_conv3d(x, stream.history.get(self), self.weight, self.bias, out)
        stream.remember(self, x, 2)
        return y


def causal_conv3d(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """Causal convolution of a chunk, zeros around height and width.

    Args:
        x: [F, Cin, H, W].
        past: [2, Cin, H, W], the two frames before x; None for zeros.
        weight: [Cout, Cin, 3, k, k].
        bias: [Cout].
        out: [F, Cout, H, W] to add to, in place; None for a new tensor.

    Returns:
        [F, Cout, H, W], accumulated in fp32.
    """
    if past is None and x.shape[0] > 1:
        past = torch.zeros_like(x[:2])
    if is_cpu_fp32(x):
        large = x.shape[1] >= WIDE_CHANNELS and x.shape[2] * x.shape[3] >= LARGE_FRAME
        return (_winograd if large else _stacked)(x, past, weight, bias, out)
    # a lone frame behind zeros needs one of the three taps
    frames, weight = (x, weight[:, :, 2:]) if past is None else (torch.cat([past, x]), weight)
    halo = weight.shape[-1] // 2
    y = F.conv3d(frames.transpose(0, 1)[None], weight, bias, padding=(0, halo, halo))[0].transpose(0, 1)
    return y.contiguous(memory_format=CHANNELS_LAST) if out is None else out.add_(y)


def _stacked(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """`causal_conv3d` as one 2-D convolution over the channels of three frames."""
    count, halo = x.shape[0], weight.shape[-1] // 2
    if past is None:
        taps, kernel = x, weight[:, :, 2]
    else:
        frames = torch.cat([past, x])
        taps = torch.cat([frames[tap : tap + count] for tap in range(3)], dim=1)
        kernel = torch.cat(weight.unbind(2), dim=1)
    y = F.conv2d(taps, kernel.contiguous(memory_format=CHANNELS_LAST), bias, padding=halo)
    return y if out is None else out.add_(y)


def _winograd(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """`causal_conv3d` in four 2-D convolutions for two frames instead of six: F(2, 3) over time, arXiv 1509.09308."""
    count, _, height, width = x.shape
    halo = weight.shape[-1] // 2
    write = Tensor.copy_ if out is None else Tensor.add_
    if out is None:
        out = empty_frames(x, count, weight.shape[0], height, width)
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


def is_cpu_fp32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def empty_frames(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


class PointwiseConv3d(nn.Conv3d):
    """1 x 1 x 1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F, Cout, H, W]."""
        return F.conv2d(x, self.weight[:, :, 0], self.bias)


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels. `dims`: 3 or 2, the unit dimensions behind gamma's."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor, *, silu: bool = False, inplace: bool = False) -> Tensor:
        """x: [F, C, H, W]. Returns: [F, C, H, W], reduced in fp32, through SiLU where asked; `inplace` may overwrite x."""
        channels = x.shape[1]
        x = x.contiguous(memory_format=CHANNELS_LAST)  # no copy, but where a convolution chose another layout
        out = x if inplace else torch.empty_like(x)
        gamma = self.gamma.flatten()
        dtype = torch.promote_types(x.dtype, torch.float32)
        block = BLOCK_BYTES // (4 * channels) if x.device.type == "cpu" else x.numel()
        x_rows, out_rows = (t.permute(0, 2, 3, 1).view(-1, channels).split(block) for t in (x, out))
        for row, target in zip(x_rows, out_rows, strict=True):
            norm = torch.linalg.vector_norm(row, dim=1, keepdim=True, dtype=dtype).clamp_min_(1e-12)
            torch.mul(row, channels**0.5 / norm, out=target).mul_(gamma)
            if silu:
                F.silu(target, inplace=True)
        return out


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the skip through a 1 x 1 x 1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # the keys are the positions in the published checkpoints; activations and dropout took the others
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = PointwiseConv3d(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W], overwritten where the width stays. Returns: [F, Cout, H, W]."""
        layer = self.residual
        h = layer["2"](layer["0"](x, silu=True), stream)
        h = layer["3"](h, silu=True, inplace=True)
        return layer["6"](h, stream, out=x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """x + attention over the positions of each frame, one head as wide as the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, C, H, W]. Returns: [F, C, H, W]."""
        f, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(f, 1, h * w, 3 * c)
        y = F.scaled_dot_product_attention(*qkv.split(c, dim=-1))
        return self.proj(y.reshape(f, h, w, c).permute(0, 3, 1, 2)).add_(x)


class Downsample(nn.Module):
    """Halves height and width and, where `temporal`, the frames: the first frame of a video passes as it is."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, C, H, W]. Returns: [F or F / 2, C, H / 2, W / 2]."""
        x = self.resample["1"](F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        past = stream.history.get(self)
        frames = None if past is None else torch.cat([past, x])
        stream.remember(self, x, 1)
        if frames is None:
            return x
        first, centre, last = self.time_conv.weight.unbind(2)
        y = F.conv2d(frames[:-1:2], first, self.time_conv.bias)
        y += F.conv2d(frames[1::2], centre)
        y += F.conv2d(frames[2::2], last)
        return y


class Upsample(nn.Module):
    """Doubles height and width and, where `temporal`, the frames: the first frame of a video stays one frame."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, size=1) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F or 2F, Cout, 2H, 2W]."""
        # the first frame is no history to the second one: the temporal convolution starts behind it, on zeros
        if self.time_conv is not None and not stream.first:
            f, c, h, w = x.shape
            x = self.time_conv(x, stream).view(f, 2, c, h, w).flatten(0, 1).contiguous(memory_format=CHANNELS_LAST)
        weight, bias = self.resample["1"].parameters()
        if is_cpu_fp32(x) and x.shape[2] * x.shape[3] >= LARGE_FRAME:
            return _doubled_conv2d(x, weight, bias)
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)


def _doubled_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 convolution of nearest-doubled frames from the frames themselves: a 2 x 2 kernel for each parity.

    Args:
        x: [F, Cin, H, W].
        weight: [Cout, Cin, 3, 3].
        bias: [Cout].

    Returns:
        [F, Cout, 2H, 2W].
    """
    f, _, h, w = x.shape
    out = empty_frames(x, f, weight.shape[0], 2 * h, 2 * w)
    for row, row_fold in enumerate(weight.new_tensor(FOLD)):
        for column, column_fold in enumerate(weight.new_tensor(FOLD)):
            kernel = (row_fold @ weight @ column_fold.T).contiguous(memory_format=CHANNELS_LAST)
            for frame, target in zip(x.split(1), out.split(1), strict=True):
                y = F.conv2d(frame, kernel, bias, padding=1)
                target[:, :, row::2, column::2] = y[:, :, row : row + h, column : column + w]
    return out


class DownLevel(nn.Module):
    """A level of the Wan 2.2 encoder: blocks and a Downsample, plus the input averaged over the cells it merges."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F', Cout, H', W']."""
        # blocks write over their input, which the sum below needs
        y = x.clone()
        for layer in self.downsamples:
            y = layer(y, stream)
        if not isinstance(self.downsamples[-1], Downsample):
            return y.add_(x)
        x = F.avg_pool2d(x, 2)
        if self.downsamples[-1].time_conv is None:
            return y.add_(x)
        # channels 2c and 2c + 1 take the earlier and the later frame of a pair; the first frame comes behind a zero one
        y[:, 1::2] += x[-1::2] if stream.first else x[1::2]
        if not stream.first:
            y[:, 0::2] += x[0::2]
        return y


class UpLevel(nn.Module):
    """A level of the Wan 2.2 decoder: blocks and an Upsample, plus the input repeated over the cells it grows into."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F', Cout, H', W']."""
        if not isinstance(self.upsamples[-1], Upsample):
            for layer in self.upsamples:
                x = layer(x, stream)
            return x
        # blocks write over their input, which the sum below needs
        y = x.clone()
        for layer in self.upsamples:
            y = layer(y, stream)
        times = 1 if stream.first or self.upsamples[-1].time_conv is None else 2
        step = x.shape[1] // y.shape[1]
        for time in range(times):
            for row in range(2):
                for column in range(2):
                    # with half as many output channels, even rows take the even input channels and odd rows the odd
                    y[time::times, :, row::2, column::2] += x[:, row * (step - 1) :: step]
        return y


class Encoder(nn.Module):
    """[F, Cin, H, W] to [F', 2C, H / 8, W / 8]: mean and log-variance before the last 1 x 1 x 1 convolution."""

    def __init__(self, version: str, in_channels: int, dim: int, out_channels: int) -> None:
        super().__init__()
        widths = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
        self.conv1 = CausalConv3d(in_channels, dim)
        levels: list[nn.Module] = []
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [ResidualBlock(narrow, wide), ResidualBlock(wide, wide)]
            if level < 3:
                layers.append(Downsample(wide, temporal=level > 0))
            levels += layers if version == "2.1" else [DownLevel(layers)]
        self.downsamples = nn.ModuleList(levels)
        self.middle = middle(4 * dim)
        self.head = nn.ModuleDict({"0": RMSNorm(4 * dim), "2": CausalConv3d(4 * dim, out_channels)})

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W], pixels. Returns: [F', 2C, H / 8, W / 8]."""
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return self.head["2"](self.head["0"](x, silu=True, inplace=True), stream)


class Decoder(nn.Module):
    """[F, C, h, w] to [F', Cout, 8h, 8w]."""

    def __init__(self, version: str, in_channels: int, dim: int, out_channels: int) -> None:
        super().__init__()
        widths = [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim]
        self.conv1 = CausalConv3d(in_channels, 4 * dim)
        self.middle = middle(4 * dim)
        levels: list[nn.Module] = []
        for level, (wide, narrow) in enumerate(pairwise(widths)):
            # the Upsample of Wan 2.1 halves the width
            if version == "2.1" and level > 0:
                wide //= 2
            layers: list[nn.Module] = [ResidualBlock(wide, narrow), *(ResidualBlock(narrow, narrow) for _ in range(2))]
            if level < 3:
                layers.append(Upsample(narrow, narrow // 2 if version == "2.1" else narrow, temporal=level < 2))
            levels += layers if version == "2.1" else [UpLevel(layers)]
        self.upsamples = nn.ModuleList(levels)
        self.head = nn.ModuleDict({"0": RMSNorm(dim), "2": CausalConv3d(dim, out_channels)})

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, C, h, w]. Returns: [F', Cout, 8h, 8w], pixels."""
        x = self.conv1(x, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return self.head["2"](self.head["0"](x, silu=True, inplace=True), stream)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)])


class WanVAE(nn.Module):
    """The VAE with the parameter names of the published checkpoints.

    Args:
        dims: version and widths; `VaeDims.of_spec(VAES["2.1"])` for the released ones.
        spec: strides and latent statistics; those of the version unless given.
    """

    def __init__(self, dims: VaeDims, spec: VaeSpec | None = None) -> None:
        super().__init__()
        self.spec = spec or VAES[dims.version]
        self.channels = dims.channels
        pixels = 3 * self.spec.patch**2
        self.encoder = Encoder(dims.version, pixels, dims.encoder_dim, 2 * dims.channels)
        self.conv1 = PointwiseConv3d(2 * dims.channels, 2 * dims.channels)
        self.conv2 = PointwiseConv3d(dims.channels, dims.channels)
        self.decoder = Decoder(dims.version, dims.channels, dims.decoder_dim, pixels)
        self.register_load_state_dict_post_hook(_weights_channels_last)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised mean latents of a video.

        Args:
            video: [3, F, H, W] in [-1, 1], F = 4n + 1.

        Returns:
            [C, T, h, w] fp32, T = n + 1.
        """
        num_frames = video.shape[1]
        starts = [0, *range(1, num_frames, 4), num_frames]
        return self.encode_stream((video[:, a:b] for a, b in pairwise(starts)), num_frames)

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor], num_frames: int) -> Tensor:
        """`encode` of a video that comes in chunks.

        Args:
            chunks: tensors [3, F, H, W] in [-1, 1]: one frame first, then multiples of 4 frames.
            num_frames: 4n + 1, frames of all chunks together.

        Returns:
            [C, T, h, w] fp32, T = n + 1.
        """
        if num_frames % 4 != 1:
            raise ValueError(f"a video of {num_frames} frames cannot be encoded: the number must be 4n + 1")
        parameter = self.conv1.weight
        mean, std = self._statistics(parameter.device)
        stream, latents, end = Stream(), None, 0
        for chunk in chunks:
            x = patchify(chunk.to(parameter), self.spec.patch)
            mu = self.conv1(self.encoder(x, stream))[:, : self.channels]
            stream.first = False
            if latents is None:
                latents = mu.new_empty(self.channels, (num_frames + 3) // 4, *mu.shape[2:], dtype=torch.float32)
            start, end = end, end + mu.shape[0]
            latents[:, start:end] = ((mu.float() - mean) / std).transpose(0, 1)
        if latents is None or end != latents.shape[1]:
            raise ValueError(f"the chunks held {max(4 * end - 3, 0)} frames, not the {num_frames} announced")
        return latents

    @torch.no_grad()
    def decode_chunks(self, latents: Tensor, *, chunk: int = 1) -> Iterator[Tensor]:
        """Decode piece by piece, in memory that does not grow with T.

        Args:
            latents: [C, T, h, w], normalised.
            chunk: latent frames at a time, after the first one, which goes alone. Changes speed and memory only.

        Yields:
            [3, F, H, W] fp32 in [-1, 1]: 1 frame, then 4 for each latent frame.
        """
        parameter = self.conv2.weight
        mean, std = self._statistics(parameter.device)
        num_latents = latents.shape[1]
        starts = [0, *range(1, num_latents, chunk), num_latents]
        stream = Stream()
        for start, end in pairwise(starts):
            z = latents[:, start:end].to(parameter.device, torch.float32).transpose(0, 1) / (1 / std) + mean
            z = z.to(parameter.dtype).contiguous(memory_format=CHANNELS_LAST)
            x = self.decoder(self.conv2(z), stream)
            stream.first = False
            yield unpatchify(x, self.spec.patch).float().clamp_(-1, 1)

    def decode(self, latents: Tensor, *, chunk: int = 1) -> Tensor:
        """latents: [C, T, h, w], normalised. Returns: [3, F, H, W] fp32 in [-1, 1]. `chunk` as in `decode_chunks`."""
        _, t, h, w = latents.shape
        _, rows, columns = self.spec.stride
        video = torch.empty(3, 4 * t - 3, h * rows, w * columns, device=self.conv2.weight.device)
        end = 0
        for frames in self.decode_chunks(latents, chunk=chunk):
            start, end = end, end + frames.shape[1]
            video[:, start:end] = frames
        return video

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [C, 1, 1] fp32 each."""
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.spec.mean, self.spec.std))
        return mean, std


def _weights_channels_last(vae: nn.Module, _: object) -> None:
    """Lay the convolutions' weights out with the input channels innermost, as activations are."""
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def patchify(video: Tensor, patch: int) -> Tensor:
    """video: [3, F, H, W]. Returns: [F, 3 * patch^2, H / patch, W / patch], the column offset slower than the row's."""
    c, f, h, w = video.shape
    x = video.view(c, f, h // patch, patch, w // patch, patch).permute(1, 0, 5, 3, 2, 4)
    return x.reshape(f, -1, h // patch, w // patch).contiguous(memory_format=CHANNELS_LAST)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`. x: [F, 3 * patch^2, h, w]. Returns: [3, F, h * patch, w * patch]."""
    f, _, h, w = x.shape
    return x.view(f, 3, patch, patch, h, w).permute(1, 0, 4, 3, 5, 2).reshape(3, f, h * patch, w * patch)
