"""Causal 3-D VAE of Wan 2.1 and Wan 2.2: streaming encode and decode (arXiv 2503.20314, section 4.1).

Time is causal: a frame depends on itself and on earlier frames only, so a video of any length passes through in chunks
while every temporal convolution remembers its last two input frames. The first latent frame stands for one pixel frame,
every other one for four.

Inside the module a chunk is [F, C, H, W] in channels-last memory: frames are the batch of ordinary 2-D convolutions and
the norms reduce over contiguous channels. Letters: F frames of a chunk, C channels, H W height and width at that level;
latents are [C, T, h, w] and videos [3, F, H, W].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_fast.tasks import VaeSpec

CHANNELS_LAST = torch.channels_last

# Winograd's F(2, 3) over time does two frames in four 2-D convolutions instead of six; on frames of fewer positions
# than this, transforming the weights costs more than that saves.
WINOGRAD_POSITIONS = 1024
STRIP_BYTES = 2 << 20

# The row (column) of a doubled frame sees the 3 x 3 kernel's rows fold onto two rows of the frame it was doubled from:
# [parity of the row, folded row, kernel row].
NEAREST_FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


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
            kept = torch.zeros_like(x[:1]).repeat(count, 1, 1, 1).contiguous(memory_format=CHANNELS_LAST)
            self.history[layer] = kept
        new = min(count, x.shape[0])
        for index in range(count - new):
            kept[index] = kept[index + new]
        kept[count - new :] = x[x.shape[0] - new :]


class CausalConv3d(nn.Conv3d):
    """Convolution over [3, k, k] whose output frame sees its own frame and the two before it."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__(in_channels, out_channels, (3, size, size), padding=(0, size // 2, size // 2))

    def forward(self, x: Tensor, stream: Stream, out: Tensor | None = None) -> Tensor:
        """x: [F, Cin, H, W]; out: [F, Cout, H, W] to add the result to, in place. Returns: [F, Cout, H, W]."""
        past = stream.history.get(self)
        y = causal_conv3d(x, past, self.weight, self.bias, out)
        stream.remember(self, x, 2)
        return y


def causal_conv3d(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """Causal convolution of a chunk.

    Args:
        x: [F, Cin, H, W].
        past: [2, Cin, H, W], the two frames before x; None for zeros.
        weight: [Cout, Cin, 3, k, k].
        bias: [Cout].
        out: [F, Cout, H, W] to add to, in place; None for a new tensor.

    Returns:
        [F, Cout, H, W], accumulated in fp32 on a CPU, as cuDNN does on a GPU.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _causal_conv3d_cpu(x, past, weight, bias, out)
    if past is None:
        past = torch.zeros_like(x[:1]).repeat(2, 1, 1, 1)
    frames = torch.cat([past, x]).transpose(0, 1)[None]
    size = weight.shape[-1] // 2
    y = F.conv3d(frames, weight, bias, padding=(0, size, size))[0].transpose(0, 1)
    return y.contiguous(memory_format=CHANNELS_LAST) if out is None else out.add_(y)


def _causal_conv3d_cpu(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
    """`causal_conv3d` out of 2-D convolutions, on strips of rows that stay in the cache from step to step."""
    count, _, height, width = x.shape
    write = Tensor.copy_ if out is None else Tensor.add_
    if out is None:
        out = x.new_empty(count, weight.shape[0], height, width).contiguous(memory_format=CHANNELS_LAST)
    if past is None and count > 1:
        past = torch.zeros_like(x[:1]).repeat(2, 1, 1, 1)
    earlier = [None, None] if past is None else list(past.split(1))
    frames = [*earlier, *x.split(1)]
    halo = weight.shape[-1] // 2
    w0, w1, w2 = (tap.contiguous(memory_format=CHANNELS_LAST) for tap in weight.unbind(2))
    pairs = count // 2 if height * width >= WINOGRAD_POSITIONS else 0
    if pairs:
        mean, half = (w0 + w2).mul_(0.5), w1 * 0.5
        plus, minus = mean + half, mean - half
    strip = max(1, STRIP_BYTES // (4 * width * max(weight.shape[:2])))
    for top in range(0, height, strip):
        bottom = min(top + strip, height)
        rows = slice(max(top - halo, 0), min(bottom + halo, height))
        edges = (0, 0, halo if top == 0 else 0, halo if bottom == height else 0)
        def conv(d, w, b=None):
            if halo and (edges[2] or edges[3]):
                d = F.pad(d, edges)
            return F.conv2d(d, w, b, padding=(0, halo))
        views = [None if frame is None else frame[:, :, rows] for frame in frames]
        for i in range(0, 2 * pairs, 2):
            d0, d1, d2, d3 = views[i : i + 4]
            m1, m2 = conv(d1 + d2, plus, bias), conv(d2 - d1, minus)
            write(out[i : i + 1, :, top:bottom], conv(d0 - d2, w0).add_(m1).add_(m2))
            write(out[i + 1 : i + 2, :, top:bottom], conv(d3 - d1, w2).add_(m1).sub_(m2))
        for i in range(2 * pairs, count):
            y = conv(views[i + 2], w2, bias)
            if past is not None:
                y += conv(views[i + 1], w1)
                y += conv(views[i], w0)
            write(out[i : i + 1, :, top:bottom], y)
    return out


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

    def forward(self, x: Tensor, out: Tensor | None = None, silu: bool = False) -> Tensor:
        """x: [F, C, H, W]. Returns: [F, C, H, W]; the norm is reduced in fp32."""
        channels = x.shape[1]
        out = torch.empty_like(x) if out is None else out
        gamma = (self.gamma * channels**0.5).flatten()
        block = max(1, STRIP_BYTES // (4 * channels)) if x.device.type == "cpu" else x.numel()
        positions = (t.permute(0, 2, 3, 1).reshape(-1, channels).split(block) for t in (x, out))
        for x, y in zip(*positions):
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
            torch.mul(x, norm.clamp_min_(1e-12).reciprocal_().to(x.dtype), out=y).mul_(gamma)
            if silu:
                F.silu(y, inplace=True)
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
        h = layer["3"](h, out=h, silu=True)
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
        if past is not None:
            past = past.clone()
        stream.remember(self, x, 1)
        if past is None:
            return x
        frames = torch.cat([past, x])
        weight = self.time_conv.weight
        y = F.conv2d(frames[:-1:2], weight[:, :, 0], self.time_conv.bias)
        y += F.conv2d(frames[1::2], weight[:, :, 1])
        y += F.conv2d(frames[2::2], weight[:, :, 2])
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
        f, _, h, w = x.shape
        conv = self.resample["1"]
        fold = torch.tensor(NEAREST_FOLD, dtype=x.dtype, device=x.device)
        weight = torch.einsum("apk,bql,oikl->aboipq", fold, fold, conv.weight)
        out = x.new_empty(f, weight.shape[2], 2 * h, 2 * w).contiguous(memory_format=CHANNELS_LAST)
        for row in range(2):
            for column in range(2):
                wt = weight[row, column].contiguous(memory_format=CHANNELS_LAST)
                for i in range(f):
                    y = F.conv2d(x[i:i+1], wt, conv.bias, padding=1)
                    out[i:i+1, :, row::2, column::2] = y[:, :, row : row + h, column : column + w]
        return out


class DownLevel(nn.Module):
    """A level of the Wan 2.2 encoder: blocks and a Downsample, plus the input averaged over the cells that are merged."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F', Cout, H', W']."""
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
        levels = []
        for level, (narrow, wide) in enumerate(zip(widths, widths[1:])):
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
        return self.head["2"](self.head["0"](x, out=x, silu=True), stream)


class Decoder(nn.Module):
    """[F, C, h, w] to [F', Cout, 8h, 8w]."""

    def __init__(self, version: str, in_channels: int, dim: int, out_channels: int) -> None:
        super().__init__()
        widths = [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim]
        self.conv1 = CausalConv3d(in_channels, 4 * dim)
        self.middle = middle(4 * dim)
        levels = []
        for level, (wide, narrow) in enumerate(zip(widths, widths[1:])):
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
        return self.head["2"](self.head["0"](x, out=x, silu=True), stream)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class WanVAE(nn.Module):
    """The VAE with the parameter names of the published checkpoints. Small models pass their own widths."""

    def __init__(
        self,
        spec: VaeSpec,
        *,
        encoder_dim: int | None = None,
        decoder_dim: int | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.channels = channels or spec.channels
        pixels = 3 * spec.patch**2
        self.encoder = Encoder(spec.version, pixels, encoder_dim or spec.encoder_dim, 2 * self.channels)
        self.conv1 = PointwiseConv3d(2 * self.channels, 2 * self.channels)
        self.conv2 = PointwiseConv3d(self.channels, self.channels)
        self.decoder = Decoder(spec.version, self.channels, decoder_dim or spec.decoder_dim, pixels)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised mean latents of a video.

        Args:
            video: [3, F, H, W] in [-1, 1], F = 4n + 1.

        Returns:
            [C, T, h, w] fp32, T = n + 1.
        """
        num_frames = video.shape[1]
        starts = [0, *range(1, num_frames, 4), num_frames]
        return self.encode_stream((video[:, a:b] for a, b in zip(starts, starts[1:])), num_frames)

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
        for start, end in zip(starts, starts[1:]):
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


def patchify(video: Tensor, patch: int) -> Tensor:
    """video: [3, F, H, W]. Returns: [F, 3 * patch^2, H / patch, W / patch], the column offset slower than the row's."""
    c, f, h, w = video.shape
    x = video.view(c, f, h // patch, patch, w // patch, patch).permute(1, 0, 5, 3, 2, 4)
    return x.reshape(f, -1, h // patch, w // patch).contiguous(memory_format=CHANNELS_LAST)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`. x: [F, 3 * patch^2, h, w]. Returns: [3, F, h * patch, w * patch]."""
    f, _, h, w = x.shape
    return x.view(f, 3, patch, patch, h, w).permute(1, 0, 4, 3, 5, 2).reshape(3, f, h * patch, w * patch)


def widths_of(shapes: Mapping[str, Sequence[int]]) -> tuple[str, int, int, int]:
    """Version, encoder width, decoder width and latent channels of a checkpoint, from the shapes of its tensors."""
    encoder, decoder = shapes["encoder.conv1.weight"], shapes["decoder.conv1.weight"]
    return "2.2" if encoder[1] == 12 else "2.1", encoder[0], decoder[0] // 4, shapes["conv2.weight"][0]
