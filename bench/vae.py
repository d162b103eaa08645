"""Where the time of a decode goes, layer group by layer group: seconds, TFLOP/s, and % of the matrix product's roof.

    python -m bench.vae --version 2.2 --size 1280x704 --frames 121

Random weights of the released widths; the whole clip, as `wan-fast run` decodes it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.networks import random_model
from bench.timer import now
from wan_fast import manifest
from wan_fast.config import WanFastError
from wan_fast.counting import flops_so_far
from wan_fast.engine import DTYPES
from wan_fast.manifest import VaeDims
from wan_fast.memory import DECODES
from wan_fast.parsing import parse_size
from wan_fast.roofs import copy_rate, product_rate
from wan_fast.running import tf32_convolutions
from wan_fast.tasks import VAES
from wan_fast.vae import AttentionBlock, CausalConv3d, PointwiseConv3d, ResidualBlock, RMSNorm, Upsample, WanVAE

GIB = 2**30


class Group(NamedTuple):
    """Layers that stand at one resolution: their seconds and operations in one decode."""

    name: str
    seconds: float
    flops: float


class Decode(NamedTuple):
    """One decode: its groups, seconds until the first frame and in all, and bytes at most beside the weights."""

    groups: tuple[Group, ...]
    first: float
    seconds: float
    peak_bytes: int


def measure(dims: VaeDims, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Decode:
    """Decode latents of a shape [C, T, h, w] once to warm up, once for the whole, and once with a mark around every layer."""
    vae = random_model(lambda: WanVAE(dims), manifest.vae_shapes(dims), device, lambda name: dtype)
    latents = torch.randn(tuple(shape), device=device)
    chunk, piece = DECODES["cpu" if device.type == "cpu" else "cuda"][0]

    def decode() -> tuple[float, float]:
        start, first = now(device), 0.0
        for _ in vae.decode_stream(latents, chunk=chunk, piece=piece):
            first = first or now(device) - start
        return first, now(device) - start

    with torch.inference_mode(), tf32_convolutions(True):
        list(vae.decode_stream(latents[:, :3], chunk=chunk, piece=piece))
        held = _reset_peak(device)
        first, whole = decode()
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
        spent = _by_group(vae, decode, lambda: _Clock(device))
    with torch.no_grad(), torch.device("meta"):
        empty = WanVAE(dims).requires_grad_(False)
        clip = torch.empty(tuple(shape))
        with flops_so_far() as count:
            done = _by_group(empty, lambda: list(empty.decode_stream(clip, chunk=chunk, piece=piece)), lambda: _Counter(count))
    return Decode(tuple(Group(name, spent[name], done[name]) for name in spent), first, whole, peak)


def _by_group(vae: Any, decode: Callable[[], object], make: Callable[[], Any]) -> dict[str, float]:
    """What a stopwatch finds between the beginning and the end of every layer, by group, in the order of the decoder."""
    watches = {name: make() for name in dict.fromkeys(group for group, _ in layers(vae))}
    handles = []
    for group, layer in layers(vae):
        watch = watches[group]
        handles += [
            layer.register_forward_pre_hook(lambda *_, watch=watch: watch.start()),
            layer.register_forward_hook(lambda *_, watch=watch: watch.stop()),
        ]
    try:
        decode()
        return {name: watch.total() for name, watch in watches.items()}
    finally:
        for handle in handles:
            handle.remove()


def layers(vae: Any) -> Iterator[tuple[str, nn.Module]]:
    """(group, layer) of everything that the decoder is made of, none inside another."""
    dims, decoder = VaeDims.of_shapes({name: tuple(t.shape) for name, t in vae.state_dict().items()}), vae.decoder
    yield "conv2, conv1", vae.conv2
    yield "conv2, conv1", decoder.conv1
    kinds = {ResidualBlock: "blocks", Upsample: "upsample", AttentionBlock: "attention"}
    for name, layer in decoder.named_modules():
        if type(layer) in kinds:
            at = f"level {manifest.decoder_level(name, dims)}" if name.startswith("upsamples") else "middle"
            yield f"{at} {kinds[type(layer)]}", layer
    for layer in decoder.head.values():
        assert isinstance(layer, (RMSNorm, CausalConv3d, PointwiseConv3d))
        yield "head", layer


class _Clock:
    """Seconds of a device between starts and stops; a GPU is asked only at the end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def start(self) -> None:
        self.marks.append(self._mark())

    stop = start

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total(self) -> float:
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if not self.on_gpu:
            return sum(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


class _Counter:
    """Operations counted between starts and stops."""

    def __init__(self, count: Callable[[], float]) -> None:
        self.count, self.found = count, 0.0

    def start(self) -> None:
        self.found -= self.count()

    def stop(self) -> None:
        self.found += self.count()

    def total(self) -> float:
        return self.found


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def table(found: Decode, roof: float) -> Iterator[str]:
    """Lines of text; `roof` in operations per second."""
    yield f"{'group':20s} {'seconds':>9s} {'share':>6s} {'TFLOP':>9s} {'TFLOP/s':>9s} {'of roof':>8s}"
    inside = sum(group.seconds for group in found.groups)
    for name, seconds, flops in (*found.groups, Group("all of these", inside, sum(g.flops for g in found.groups))):
        rate = flops / seconds if seconds else 0.0
        yield f"{name:20s} {seconds:9.4f} {seconds / inside:6.1%} {flops / 1e12:9.3f} {rate / 1e12:9.3f} {rate / roof:8.1%}"
    if any(group.seconds * roof < group.flops for group in found.groups):
        yield "above 100 %: a form that multiplies less often than the convolution it computes (Winograd's, or folded kernels)"
    peak = f", {found.peak_bytes / GIB:.2f} GiB beside the weights" if found.peak_bytes else ""
    yield f"whole decode without marks {found.seconds:.4f} s, first frame after {found.first:.4f} s{peak}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.vae", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", choices=list(VAES), default="2.2", help="of the VAE")
    parser.add_argument("--size", type=parse_size, help="WIDTHxHEIGHT in pixels; default 1280x704, 64x64 on a CPU")
    parser.add_argument("--frames", type=int, help="4n + 1; default 121, 5 on a CPU")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16, fp32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args(argv)
    device, spec = torch.device(asked.device), VAES[asked.version]
    on_cpu = device.type == "cpu"
    size, frames = asked.size or ((64, 64) if on_cpu else (1280, 704)), asked.frames or (5 if on_cpu else 121)
    if frames % 4 != 1 or any(side % (2 * spec.stride[1]) for side in size):
        parser.error(f"--frames must be 4n + 1 and sides multiples of {2 * spec.stride[1]}; got {frames}, {size[0]}x{size[1]}")
    name = asked.dtype or ("fp32" if on_cpu else "bf16")
    kind = "tf32" if name == "fp32" and not on_cpu else "bf16" if name == "fp16" else name
    roof = product_rate(device, kind)
    print(f"Wan {asked.version} decoder, {size[0]}x{size[1]}, {frames} frames, {name}, on {device}")
    print(f"roof: matrix product in {kind} {roof / 1e12:.2f} TFLOP/s, copy {copy_rate(device) / 1e9:.0f} GB/s")
    found = measure(VaeDims.of_spec(spec), spec.latent_shape(size, frames), DTYPES[name], device)
    print("\n".join(table(found, roof)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WanFastError as error:
        sys.exit(f"bench.vae: {error}")
