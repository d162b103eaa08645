"""Causal 3-D VAE of Wan 2.1 and Wan 2.2: streaming encode and decode (arXiv 2503.20314, section 4.1).

Time is causal: a frame depends on itself and on earlier frames only, so a video of any length passes through in chunks
while every temporal convolution remembers its last two input frames. The first latent frame stands for one pixel frame,
every other one for four.

Inside the module a chunk is [F, C, H, W] in channels-last memory: frames are the batch of ordinary 2-D convolutions and
the norms reduce over contiguous channels. Letters: F frames of a chunk, C channels, H W height and width at that level;
latents are [C, T, h, w] and videos [3, F, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.config import WanFastError
from wan_fast.kernels import (
    Form,
    add_skip_,
    causal_conv3d,
    causal_conv3d_add,
    conv_weight,
    frames_to_uint8,
    history,
    rms_norm_silu,
    rms_norm_silu_,
)
from wan_fast.manifest import VaeDims, strips
from wan_fast.tasks import ENCODER_REACH, TILE_HALO, VAES, VaeSpec

CHANNELS_LAST = torch.channels_last
Run = Callable[[Any, Callable[[], Any]], Any]


class Stream:
    """What one pass over one video remembers from chunk to chunk.

    Attributes:
        first: whether the chunk under way is the first one, which is a single frame.
        history: layer -> its last input frames [1 or 2, C, H, W]; a layer that is not in it has seen only zeros.
        tf32: whether convolutions in fp32 may round their factors to TF32 on a GPU.
        fixed: whether a layer's history stays where it is, at the price of a copy.
        same: chunks in a row, this one among them, that were one tensor.
        settled: level of the encoder -> its result, which such chunks no longer change.
    """

    def __init__(self) -> None:
        self.first = True
        self.fixed = False
        self.same = 0
        self.settled: tuple[int, Tensor] | None = None
        self.history: dict[nn.Module, Tensor] = {}
        self.tf32 = torch.backends.cudnn.allow_tf32

    def convolve(
        self,
        layer: nn.Module,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        out: Tensor | None = None,
        skip: Tensor | None = None,
        **form: int,
    ) -> Tensor:
        """`causal_conv3d` behind what `layer` has been given so far, into a new tensor or added to out; `form` as there.

        x belongs to the history from then on: nothing may write over it.
        """
        past = self.history.get(layer)
        # a chunk as long as the history is the next history: nothing is copied
        whole = x.shape[0] == history(weight.shape[2], form.get("stride_t", 1))
        how = Form(**form, tf32=self.tf32, keep=not whole)
        if out is None:
            out, kept = causal_conv3d(x, past, weight, bias, how, skip=skip)
        else:
            kept = causal_conv3d_add(out, x, past, weight, bias, how)
        if whole or len(kept):
            now = x if whole else kept
            if self.fixed and past is not None:
                past.copy_(now)
            else:
                self.history[layer] = now
        return out


class CausalConv3d(nn.Module):
    """Convolution over [3, k, k] whose output frame sees its own frame and the two before it."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__()
        self.weight, self.bias = nn.Conv3d(in_channels, out_channels, (3, size, size)).parameters()

    def forward(
        self,
        x: Tensor,
        stream: Stream,
        *,
        out: Tensor | None = None,
        skip: Tensor | None = None,
        interleave: bool = False,
    ) -> Tensor:
        """x: [F, Cin, H, W]. `out`: [F, Cout, H, W] to add the result to, in place. `skip`: one to add to it.

        Returns: [F, Cout, H, W], or with `interleave` [2F, Cout / 2, H, W].
        """
        return stream.convolve(self, x, self.weight, self.bias, out=out, skip=skip, interleave=interleave)


class PointwiseConv3d(nn.Conv3d):
    """1 x 1 x 1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F, Cout, H, W]."""
        return pointwise(x, self.weight, self.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [F, Cin, H, W] channels-last, through a kernel of one position as a matrix product. Returns: [F, Cout, H, W]."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels. `dims`: 3 or 2, the unit dimensions behind gamma's."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor, *, silu: bool = False, inplace: bool = False) -> Tensor:
        """x: [F, C, H, W]. Returns: [F, C, H, W], reduced in fp32, through SiLU where asked; `inplace` may overwrite x."""
        x = x.contiguous(memory_format=CHANNELS_LAST)  # no copy, but where a convolution chose another layout
        if not inplace:
            return rms_norm_silu(x, self.gamma.flatten(), silu=silu)
        rms_norm_silu_(x, self.gamma.flatten(), silu=silu)
        return x


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

    def forward(self, x: Tensor, stream: Stream, *, keep: bool = False) -> Tensor:
        """x: [F, Cin, H, W], which may be overwritten unless `keep`. Returns: [F, Cout, H, W]."""
        layer = self.residual
        skip = x if self.shortcut is None else self.shortcut(x)
        h = layer["2"](layer["0"](x, silu=True, inplace=not keep and skip is not x), stream)
        h = layer["3"](h, silu=True, inplace=True)
        if keep and skip is x:
            return layer["6"](h, stream, skip=x)
        return layer["6"](h, stream, out=skip)


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
        qkv = pointwise(self.norm(x), *self.to_qkv.parameters()).permute(0, 2, 3, 1).view(f, 1, h * w, 3 * c)
        y = F.scaled_dot_product_attention(*qkv.split(c, dim=-1))
        return pointwise(y.view(f, h, w, c).permute(0, 3, 1, 2), *self.proj.parameters()).add_(x)


class Downsample(nn.Module):
    """Halves height and width and, where `temporal`, the frames: the first frame of a video passes as it is."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream, skip: Tensor | None = None) -> Tensor:
        """x: [F, C, H, W]. `skip`: what is added to the result. Returns: [F or F / 2, C, H / 2, W / 2]."""
        weight, bias = self.resample["1"].parameters()
        # the last convolution adds the skip
        own = skip if self.time_conv is None else None
        x = stream.convolve(self.resample["1"], x, weight[:, :, None], bias, stride=2, skip=own)
        if self.time_conv is None:
            return x
        if not stream.first:
            return stream.convolve(self.time_conv, x, *self.time_conv.parameters(), stride_t=2, skip=skip)
        stream.history[self.time_conv] = x[-1:].clone()  # what follows writes over x
        if skip is not None:  # the first frame has a frame of zeros before it, so it goes to the second of two channels
            add_skip_(x[:, 1::2], skip)
        return x


class Upsample(nn.Module):
    """Doubles height and width and, where `temporal`, the frames: the first frame of a video stays one frame."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, size=1) if temporal else None

    def forward(self, x: Tensor, stream: Stream, skip: Tensor | None = None) -> Tensor:
        """x: [F, Cin, H, W]. `skip`: what is added to the result. Returns: [F or 2F, Cout, 2H, 2W]."""
        # the first frame is no history to the second one: the temporal convolution starts behind it, on zeros
        if self.time_conv is not None and not stream.first:
            x = self.time_conv(x, stream, interleave=True)
        weight, bias = self.resample["1"].parameters()
        return stream.convolve(self.resample["1"], x, weight[:, :, None], bias, up=2, skip=skip)


class DownLevel(nn.Module):
    """A level of the Wan 2.2 encoder: blocks and a Downsample, plus the input averaged over the cells it merges."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F', Cout, H', W']."""
        first, second, *rest = self.downsamples
        y = second(first(x, stream, keep=True), stream)
        return rest[0](y, stream, skip=x) if rest else y.add_(x)


class UpLevel(nn.Module):
    """A level of the Wan 2.2 decoder: blocks and an Upsample, plus the input repeated over the cells it grows into."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W]. Returns: [F', Cout, H', W']."""
        first, second, third, *rest = self.upsamples
        y = third(second(first(x, stream, keep=bool(rest)), stream), stream)
        return rest[0](y, stream, skip=x) if rest else y


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
        self.per_level = len(levels) // 4 + (version == "2.1")
        self.downsamples = nn.ModuleList(levels)
        self.middle = middle(4 * dim)
        self.head = nn.ModuleDict({"0": RMSNorm(4 * dim), "2": CausalConv3d(4 * dim, out_channels)})

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x: [F, Cin, H, W], pixels. Returns: [F', 2C, H / 8, W / 8].

        Of chunks that have long been the same, what no longer changes is taken from the one before: bit for bit what it would
        be again.
        """
        start = 0
        if stream.settled is not None:
            start, x = stream.settled[0] + 1, stream.settled[1].clone()  # what follows writes over it
        for level in range(start, 4):
            x = self._level(level, x, stream)
            if stream.same > ENCODER_REACH[level]:
                stream.settled = level, x.clone()
        return x

    def _level(self, level: int, x: Tensor, stream: Stream) -> Tensor:
        """One level; the first begins with what is before it, the last ends with what is behind."""
        if level == 0:
            x = self.conv1(x, stream)
        layers = list(self.downsamples)[level * self.per_level : (level + 1) * self.per_level]
        for layer in (*layers, *(self.middle if level == 3 else ())):
            x = layer(x, stream)
        return self.head["2"](self.head["0"](x, silu=True, inplace=True), stream) if level == 3 else x


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

    def forward(self, x: Tensor, stream: Stream, piece: int, window: Window | None = None) -> Iterator[Tensor]:
        """A chunk, whose frames pass the two upper levels, which hold the memory, in pieces: time is doubled below them.

        Args:
            x: [F, C, h, w].
            stream: of this video, or of this part of it.
            piece: frames at a time.
            window: the part of the frame to compute; None for all of it.

        Yields:
            [at most piece, Cout, 8h, 8w], pixels; of a window its own rows or columns.
        """
        layers = list(self.upsamples)
        per_level = (len(layers) + 1) // 4  # 1 in Wan 2.2; 4 in 2.1, whose last level has 3
        x = self.conv1(x, stream)
        for layer in (*self.middle, *layers[:per_level]):
            x = layer(x, stream)
        if window is not None:
            x = window.take(x)
        for layer in layers[per_level : 2 * per_level]:
            x = layer(x, stream)
        for y in x.split(piece):
            for layer in layers[2 * per_level :]:
                y = layer(y, stream)
            y = self.head["2"](self.head["0"](y, silu=True, inplace=True), stream)
            yield y if window is None else window.keep(y)


class Window(NamedTuple):
    """A strip of a frame, and beside it what its pixels depend on: first and last row or column, where width and height are
    twice the latent's, and the frame's size there. `dim` is 2 for rows, 3 for columns."""

    dim: int
    first: int
    last: int
    size: int

    def take(self, x: Tensor) -> Tensor:
        """[F, C, 2h, 2w] -> the strip and its halo."""
        start, end = max(self.first - TILE_HALO, 0), min(self.last + TILE_HALO, self.size)
        return x.narrow(self.dim, start, end - start).contiguous(memory_format=CHANNELS_LAST)

    def keep(self, y: Tensor) -> Tensor:
        """Its pixels, four to a row or column -> those of the strip alone."""
        return y.narrow(self.dim, 4 * min(self.first, TILE_HALO), 4 * (self.last - self.first))


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
        _lay_out_weights(self)
        self.register_load_state_dict_post_hook(_lay_out_weights)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised mean latents of a video.

        Args:
            video: [3, F, H, W] in [-1, 1], F = 4n + 1; H and W are multiples of the spatial stride.

        Returns:
            [C, T, h, w] fp32, T = n + 1.

        Raises:
            ValueError: the video has another shape.
        """
        self._check_video(video)
        num_frames = video.shape[1]
        starts = [0, *range(1, num_frames, 4), num_frames]
        return self.encode_stream((video[:, a:b] for a, b in pairwise(starts)), num_frames)

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor], num_frames: int) -> Tensor:
        """`encode` of a video that comes in chunks.

        Args:
            chunks: tensors [3, F, H, W] in [-1, 1]: one frame first, then multiples of 4 frames. Where the same tensor comes
                again and again, what no longer changes is not computed again.
            num_frames: 4n + 1, frames of all chunks together.

        Returns:
            [C, T, h, w] fp32, T = n + 1.

        Raises:
            ValueError: the number of frames is another, or a chunk has another shape.
        """
        if num_frames % 4 != 1:
            raise ValueError(f"a video of {num_frames} frames cannot be encoded: the number must be 4n + 1")
        parameter = self.conv1.weight
        mean, std = self._statistics(parameter.device)
        stream, latents, end = Stream(), None, 0
        before = x = None
        for chunk in chunks:
            self._check_video(chunk)
            if chunk.shape[1] != 1 if stream.first else chunk.shape[1] % 4 or not chunk.shape[1]:
                raise ValueError(
                    "a video is encoded in chunks of 1 frame and then of multiples of 4; this one, after "
                    f"{max(4 * end - 3, 0)} frames, holds {chunk.shape[1]}"
                )
            if chunk is before:
                stream.same += 1
            else:
                x, before, stream.same, stream.settled = patchify(chunk.to(parameter), self.spec.patch), chunk, 1, None
            mu = self.conv1(self.encoder(x, stream))[:, : self.channels]
            stream.first = False
            if latents is None:
                latents = mu.new_empty(self.channels, (num_frames + 3) // 4, *mu.shape[2:], dtype=torch.float32)
            start, end = end, end + mu.shape[0]
            if end > latents.shape[1]:
                break
            latents[:, start:end] = ((mu.float() - mean) / std).transpose(0, 1)
        if latents is None or end != latents.shape[1]:
            raise ValueError(f"the chunks held {max(4 * end - 3, 0)} frames, not the {num_frames} announced")
        return latents

    def decode_chunks(self, latents: Tensor, *, chunk: int = 1, piece: int | None = None, tiles: int = 1) -> Iterator[Tensor]:
        """Decode piece by piece, in memory that does not grow with T.

        Args:
            latents: [C, T, h, w], normalised.
            chunk: latent frames at a time, after the first one, which goes alone. This and the others change speed and memory
                only.
            piece: frames at a time in the two upper levels; default: all of a chunk.
            tiles: strips across the longer side, one after the other. Each takes the halo of pixels it depends on along, so
                there are no seams; nothing is yielded before the last one, and the frames wait on the host.

        Yields:
            [3, F, H, W] fp32 in [-1, 1]: 1 frame first, 4 for each latent frame in all.

        Raises:
            ValueError: the latents have another shape, or hold values that are not finite.
        """
        for x in self._decoded(latents, chunk, piece, tiles):
            yield self._pixels(x)

    def decode_stream(
        self,
        latents: Tensor,
        *,
        chunk: int = 1,
        piece: int | None = None,
        tiles: int = 1,
        rounding: bool = False,
        on_frames: Callable[[Tensor], None] | None = None,
        run: Run | None = None,
    ) -> Iterator[Tensor]:
        """Decode to 8-bit pixels, as a video writer takes them, piece by piece.

        Args:
            latents, chunk, piece, tiles: as `decode_chunks` takes them.
            rounding: round to the nearest level instead of truncating.
            on_frames: called with what `decode_chunks` would yield, before it is rounded.
            run: decodes a chunk, (kind, work) -> what the work returns, or what it returned before, filled again; of whole
                frames only.

        Yields:
            [F, H, W, 3] uint8, on the VAE's device; of strips on the CPU.

        Raises:
            ValueError: the latents have another shape, or hold values that are not finite.
        """
        for x in self._decoded(latents, chunk, piece, tiles, run):
            if on_frames:
                on_frames(self._pixels(x))
            yield frames_to_uint8(x, rounding=rounding)

    def decode(self, latents: Tensor, *, chunk: int = 1, piece: int | None = None, tiles: int = 1) -> Tensor:
        """latents: [C, T, h, w], normalised. Returns: [3, F, H, W] fp32 in [-1, 1]. The others as in `decode_chunks`."""
        self._check_latents(latents)
        _, t, h, w = latents.shape
        _, rows, columns = self.spec.stride
        video = torch.empty(3, 4 * t - 3, h * rows, w * columns, device=self.conv2.weight.device)
        end = 0
        for frames in self.decode_chunks(latents, chunk=chunk, piece=piece, tiles=tiles):
            start, end = end, end + frames.shape[1]
            video[:, start:end] = frames
        return video

    @torch.no_grad()
    def _decoded(self, latents: Tensor, chunk: int, piece: int | None, tiles: int, run: Run | None = None) -> Iterator[Tensor]:
        """What the decoder gives, [f, 3 p p, 8h, 8w] in the VAE's dtype."""
        self._check_latents(latents)
        _, T, h, w = latents.shape
        piece = 4 * chunk if piece is None else piece
        if min(chunk, piece, tiles) < 1 or tiles > 2 * max(h, w):
            raise ValueError(
                f"chunk, piece and tiles must be positive, tiles at most {2 * max(h, w)}; got {chunk}, {piece}, {tiles}"
            )
        if tiles == 1:
            yield from self._decode(latents, chunk, piece, run=run)
            return
        whole = torch.empty(4 * T - 3, 8 * h, 8 * w, 3 * self.spec.patch**2, dtype=self.conv2.weight.dtype).permute(0, 3, 1, 2)
        for window in windows(h, w, tiles):
            strip, end = whole.narrow(window.dim, 4 * window.first, 4 * (window.last - window.first)), 0
            for x in self._decode(latents, chunk, piece, window):
                start, end = end, end + x.shape[0]
                strip[start:end] = x
        yield from whole.split(piece)

    def _decode(
        self, latents: Tensor, chunk: int, piece: int, window: Window | None = None, run: Run | None = None
    ) -> Iterator[Tensor]:
        parameter, stream = self.conv2.weight, Stream()
        stream.fixed = run is not None
        inputs: dict[int, Tensor] = {}
        mean, std = self._statistics(parameter.device)
        num_latents = latents.shape[1]
        for start, end in pairwise([0, *range(1, num_latents, chunk), num_latents]):
            z = latents[:, start:end].to(parameter.device, torch.float32).transpose(0, 1) / (1 / std) + mean
            z = z.to(parameter.dtype).contiguous(memory_format=CHANNELS_LAST)
            if run is None:
                yield from self.decoder(self.conv2(z), stream, piece, window)
            else:
                frames = z.shape[0]
                if frames not in inputs:
                    inputs[frames] = torch.empty_like(z)
                given = inputs[frames].copy_(z)
                # the first two chunks find fewer histories than the others
                kind = ("decode", frames, len(stream.history))
                pieces = run(kind, partial(self._pieces, given, stream, piece))
                yield from (each.clone() for each in pieces)
            stream.first = False

    def _pieces(self, z: Tensor, stream: Stream, piece: int) -> list[Tensor]:
        return list(self.decoder(self.conv2(z), stream, piece))

    def _pixels(self, x: Tensor) -> Tensor:
        return unpatchify(x, self.spec.patch).float().clamp_(-1, 1)

    def _check_video(self, video: Tensor) -> None:
        _, rows, columns = self.spec.stride
        if video.ndim != 4 or video.shape[0] != 3 or video.shape[2] % rows or video.shape[3] % columns:
            raise ValueError(
                f"the VAE of Wan {self.spec.version} encodes videos [3, F, H, W], H a multiple of {rows} and W of {columns}; "
                f"got {list(video.shape)}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[0] != self.channels or latents.shape[1] < 1:
            raise ValueError(
                f"the VAE of Wan {self.spec.version} decodes latents [{self.channels}, T, h, w], got {list(latents.shape)}"
            )
        if not latents.is_meta and (count := int((~latents.isfinite()).sum())):
            raise WanFastError(
                f"{count} of {latents.numel()} latents are NaN or infinite, so there is no picture to decode; "
                "what came before has overflowed: compute it in fp32, and check the weights and the noise"
            )

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [C, 1, 1] fp32 each."""
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.spec.mean, self.spec.std))
        return mean, std


def windows(h: int, w: int, tiles: int) -> list[Window]:
    """`tiles` strips across the longer side of latents [C, T, h, w], as equal as may be."""
    return [Window(3 if w >= h else 2, first, last, 2 * max(h, w)) for first, last in strips(h, w, tiles)]


def _lay_out_weights(vae: nn.Module, _: object = None) -> None:
    """Lay the convolutions' weights out as `causal_conv3d` wants them."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, CausalConv3d)):
            module.weight.data = lay_out(module.weight.data)


def lay_out(weight: Tensor) -> Tensor:
    """A weight as `causal_conv3d` wants it, if it is a convolution's; no copy where it lies so."""
    return conv_weight(weight) if weight.ndim > 3 else weight


def patchify(video: Tensor, patch: int) -> Tensor:
    """video: [3, F, H, W]. Returns: [F, 3 * patch^2, H / patch, W / patch], the column offset slower than the row's."""
    c, f, h, w = video.shape
    x = video.view(c, f, h // patch, patch, w // patch, patch).permute(1, 0, 5, 3, 2, 4)
    return x.reshape(f, -1, h // patch, w // patch).contiguous(memory_format=CHANNELS_LAST)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`. x: [F, 3 * patch^2, h, w]. Returns: [3, F, h * patch, w * patch]."""
    f, _, h, w = x.shape
    return x.view(f, 3, patch, patch, h, w).permute(1, 0, 4, 3, 5, 2).reshape(3, f, h * patch, w * patch)
