from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import random_vae, relative_error
from recipe import recipe_tensor, recipe_weights, uniform
from torch import Tensor
from torch.nn import functional as F

import wan_fast.vae as vae_module
from bench import ROOT
from bench.networks import random_model
from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.conditioning.image import grey_but_for
from wan_fast.kernels import causal_conv3d, causal_conv3d_add, conv_weight
from wan_fast.kernels._check import FLOATS
from wan_fast.loading import load_model
from wan_fast.manifest import VaeDims, vae_shapes
from wan_fast.names import VAE21_NAMES, VAE22_NAMES, native_name
from wan_fast.tasks import ENCODER_REACH, TASKS, VAES
from wan_fast.vae import Stream, WanVAE, patchify, unpatchify

VERSIONS = ("2.1", "2.2")
NAMES = {"2.1": VAE21_NAMES, "2.2": VAE22_NAMES}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_vae(version: str, *, encoder_dim: int = 8, decoder_dim: int = 12, channels: int = 4, seed: int = 0) -> WanVAE:
    """Random weights; statistics that are neither 0 nor 1."""
    spec = replace(VAES[version], mean=VAES[version].mean[:channels], std=VAES[version].std[:channels])
    torch.manual_seed(seed)
    vae = WanVAE(VaeDims(version=version, encoder_dim=encoder_dim, decoder_dim=decoder_dim, channels=channels), spec)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.requires_grad_(False)


def random_video(vae: WanVAE, frames: int, h: int, w: int) -> Tensor:
    _, rows, columns = vae.spec.stride
    return torch.rand(3, frames, h * rows, w * columns, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(vae: WanVAE, t: int, h: int, w: int) -> Tensor:
    return torch.randn(vae.channels, t, h, w, generator=torch.Generator().manual_seed(2))


# --- published numbers ----------------------------------------------------------------------------------------------

GOLDEN = {
    "decode-2.1": (
        (0.4243759, -0.0390877),
        (0.040061, -0.016282, 0.063268, 0.091691, 0.083489, 0.148671, 0.186727, 0.159357),
        (1.227200, 1.167409, 0.833781, 1.361941),
    ),
    "encode-2.1": (
        (0.2282856, -0.0885338),
        (0.017504, 0.091417, 0.074806, -0.091671, -0.509952, 0.036030, -0.228672, -0.651397),
        (-0.231055, -0.405309, 0.072332, 0.325847),
    ),
    "decode-2.2": (
        (0.3534772, 0.0788577),
        (0.411254, 0.005949, 0.374932, -0.143140, 0.331524, -0.140619, 0.289523, -0.201514),
        (-0.383051, -0.208709, -0.070172, 0.447074),
    ),
    "encode-2.2": (
        (0.2650680, 0.0537726),
        (-0.054344, -0.396704, -0.046463, 0.002957, 0.140299, 0.143200, 0.140169, 0.043041),
        (-0.015825, 0.020815, -0.204936, -0.190518),
    ),
}


def golden_vae(version: str) -> WanVAE:
    spec = replace(VAES[version], mean=(0.0,) * 4, std=(1.0,) * 4)
    return recipe_weights(
        WanVAE(VaeDims(version=version, encoder_dim=16, decoder_dim=16, channels=4), spec).requires_grad_(False)
    )


def test_recipe_numbers():
    torch.testing.assert_close(uniform(0, 4).float(), torch.tensor([0.04638352, 0.58814373, -0.38224485, -0.20702589]))
    torch.testing.assert_close(uniform(5, 3).float(), torch.tensor([0.94672061, 0.19985692, -0.14346017]))


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(case, monkeypatch):
    (mean_magnitude, mean), first, last = GOLDEN[case]
    vae = golden_vae(case[-3:])
    if case.startswith("decode"):
        # the published numbers were taken before the clamp
        monkeypatch.setattr(Tensor, "clamp_", lambda self, *limits: self)
        output = vae.decode(recipe_tensor((4, 3, 2, 3), 1010))
        monkeypatch.undo()
    else:
        _, rows, columns = vae.spec.stride
        output = vae.encode(recipe_tensor((3, 9, 2 * rows, 3 * columns), 1011, scale=1.0))
    flat = output.flatten()
    torch.testing.assert_close(flat[:8], torch.tensor(first), atol=2e-5, rtol=0)
    torch.testing.assert_close(flat[-4:], torch.tensor(last), atol=2e-5, rtol=0)
    torch.testing.assert_close(flat.abs().mean().item(), mean_magnitude, atol=2e-6, rtol=0)
    torch.testing.assert_close(flat.mean().item(), mean, atol=2e-6, rtol=0)


# --- against diffusers ----------------------------------------------------------------------------------------------


def diffusers_vae(vae: WanVAE, encoder_dim: int, decoder_dim: int):
    """The same weights in diffusers' class, whose latents are not normalised."""
    diffusers = pytest.importorskip("diffusers")
    config = dict(base_dim=encoder_dim, decoder_base_dim=decoder_dim, z_dim=vae.channels)
    if vae.spec.version == "2.2":
        config.update(in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16)
    other = diffusers.AutoencoderKLWan(**config, latents_mean=[0.0] * vae.channels, latents_std=[1.0] * vae.channels)
    weights = vae.state_dict()
    other.load_state_dict({name: weights[native_name(name, NAMES[vae.spec.version])] for name in other.state_dict()})
    return other.eval().requires_grad_(False)


def statistics(vae: WanVAE) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.spec.mean, vae.spec.std))
    return mean, std


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("t", "size"), [(1, (5, 7)), (2, (4, 2)), (4, (3, 5))], ids=["1x5x7", "2x4x2", "4x3x5"])
def test_decode_matches_diffusers(version, t, size):
    vae = small_vae(version)
    mean, std = statistics(vae)
    latents = random_latents(vae, t, *size)
    expected = diffusers_vae(vae, 8, 12).decode((latents * std + mean)[None]).sample[0]
    for chunk in (1, 2, 3, t):
        assert relative_error(vae.decode(latents, chunk=chunk), expected) < 5e-6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("frames", "size"), [(1, (5, 7)), (5, (4, 2)), (9, (3, 5)), (13, (2, 3))], ids=["1x5x7", "5x4x2", "9x3x5", "13x2x3"]
)
def test_encode_matches_diffusers(version, frames, size):
    vae = small_vae(version)
    mean, std = statistics(vae)
    video = random_video(vae, frames, *size)
    expected = (diffusers_vae(vae, 8, 12).encode(video[None]).latent_dist.mean[0] - mean) / std
    latents = vae.encode(video)
    assert latents.shape == (4, (frames + 3) // 4, *size)
    assert relative_error(latents, expected) < 5e-6


def test_wide_model_matches_diffusers():
    """Wide and large enough for every path of the convolutions, with chunks of an odd number of frames."""
    vae = small_vae("2.1", encoder_dim=64, decoder_dim=64)
    mean, std = statistics(vae)
    other = diffusers_vae(vae, 64, 64)
    latents = random_latents(vae, 2, 3, 5)
    assert relative_error(vae.decode(latents), other.decode((latents * std + mean)[None]).sample[0]) < 5e-6
    video = random_video(vae, 5, 3, 5)
    assert relative_error(vae.encode(video), (other.encode(video[None]).latent_dist.mean[0] - mean) / std) < 5e-6


# --- streaming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_how_a_clip_is_cut_changes_nothing(version, dtype, monkeypatch):
    """Chunks of 1, 2, 3 and all latent frames, pieces of their frames, strips: in fp64 only a few last digits differ."""
    monkeypatch.setattr("wan_fast.kernels._check.FLOATS", (*FLOATS, torch.float64))
    monkeypatch.setattr(WanVAE, "_pixels", lambda self, x: unpatchify(x, self.spec.patch))  # not rounded to fp32, nor clamped
    vae = small_vae(version, encoder_dim=4, decoder_dim=4).to(dtype)
    limit = 1e-10 if dtype == torch.float64 else 5e-6
    in_time = [*({"chunk": chunk} for chunk in (2, 3, 5)), *({"piece": piece} for piece in (1, 2, 3)), {"chunk": 2, "piece": 3}]
    in_strips = [{"tiles": 2}, {"chunk": 2, "piece": 1, "tiles": 5}]
    for (t, h, w), cuts in (((5, 3, 2), in_time), ((3, 1, 14), in_strips), ((3, 13, 1), in_strips)):
        latents = random_latents(vae, t, h, w)
        one = torch.cat([*vae.decode_chunks(latents)], dim=1)
        for cut in cuts:
            assert relative_error(torch.cat([*vae.decode_chunks(latents, **cut)], dim=1), one) < limit, cut
    video = random_video(vae, 21, 3, 5)
    one = vae.encode(video)
    for lengths in ([1, 8, 12], [1, 20], [1, 4, 16]):
        assert relative_error(vae.encode_stream(video.split(lengths, dim=1), 21), one) < 5e-6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tiles", [1, 2])
def test_decode_stream_gives_the_bytes_of_decode(version, tiles):
    vae = small_vae(version)
    latents = random_latents(vae, 3, 3, 14)
    floats = []
    parts = list(vae.decode_stream(latents, chunk=2, piece=3, tiles=tiles, on_frames=floats.append))
    assert [len(part) for part in parts] == ([1, 3, 3, 2] if tiles == 1 else [3, 3, 3])
    video = vae.decode(latents, chunk=2, piece=3, tiles=tiles)
    assert torch.equal(torch.cat(floats, 1), video)
    assert torch.equal(torch.cat(parts), ((video + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0))
    rounded = torch.cat(list(vae.decode_stream(latents, chunk=2, piece=3, tiles=tiles, rounding=True)))
    assert torch.equal(rounded, ((video + 1) / 2 * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0))


@pytest.mark.parametrize("version", VERSIONS)
def test_decode_chunks_are_the_parts_of_decode(version):
    vae = small_vae(version)
    latents = random_latents(vae, 5, 2, 3)
    parts = list(vae.decode_chunks(latents, chunk=2))
    assert [part.shape[1] for part in parts] == [1, 8, 8]
    torch.testing.assert_close(torch.cat(parts, 1), vae.decode(latents, chunk=2), atol=0, rtol=0)
    assert torch.cat(parts, 1).abs().max() <= 1


@pytest.mark.parametrize("version", VERSIONS)
def test_memory_does_not_grow_with_the_video(version, monkeypatch):
    vae = small_vae(version)
    streams = []

    class Recorded(Stream):
        def __init__(self):
            super().__init__()
            streams.append(self)

    def held() -> int:
        kept = (tensor.untyped_storage() for tensor in streams[-1].history.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())

    monkeypatch.setattr("wan_fast.vae.Stream", Recorded)
    held_after = {}
    for frames in (9, 17, 33):
        vae.encode(random_video(vae, frames, 2, 3))
        encoder = held()
        for _ in vae.decode_chunks(random_latents(vae, (frames + 3) // 4, 2, 3)):
            pass
        held_after[frames] = encoder, held()
    assert held_after[9][0] > 0 and held_after[9][1] > 0
    assert held_after[9] == held_after[17] == held_after[33]


LONGER = """
import sys, torch
from test_vae import random_latents, small_vae

def held():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # getrusage counts what the parent held when it started this process
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

vae = small_vae(sys.argv[1], decoder_dim=4).to("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)
for num_latents, h, w in ((2, 2, 2), (2, 20, 32), (6, 20, 32)):
    latents = random_latents(vae, num_latents, h, w)
    count = sum(len(pixels) for pixels in vae.decode_stream(latents, piece=1))
    print(count, held() - latents.nbytes)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_longer_video_takes_no_more_memory(version):
    """5 and then 21 frames, of 320 x 512 in 2.2, in a process of its own: what it holds at most does not grow.

    Beside what it holds at most of tiny ones, which is PyTorch and the model.
    """
    command = [sys.executable, "-c", LONGER, version]
    # freed blocks go back to the system, so that its count is that of live memory
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    (tiny, before), (few, short), (many, long) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (tiny, few, many) == (5, 5, 21)
    assert 0 < long - before <= 1.05 * (short - before)


def test_calls_are_independent():
    vae = small_vae("2.1")
    latents = random_latents(vae, 3, 2, 3)
    first = vae.decode(latents)
    half_done = vae.decode_chunks(latents)
    next(half_done)
    torch.testing.assert_close(vae.decode(latents), first, atol=0, rtol=0)
    torch.testing.assert_close(next(half_done), first[:, 1:5], atol=0, rtol=0)


def random_frames(count: int, channels: int, h: int, w: int) -> Tensor:
    return torch.randn(count, h, w, channels, generator=torch.Generator().manual_seed(count * h)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [1, 3], ids=["k1", "k3"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7], ids="F{}".format)
@pytest.mark.parametrize(("channels", "h", "w"), [(5, 4, 7), (64, 4, 7), (65, 40, 33)], ids=["5x4x7", "64x4x7", "65x40x33"])
def test_causal_conv_matches_conv3d(size, frames, channels, h, w, monkeypatch):
    # strips of 7 rows, a shorter last one
    monkeypatch.setattr("wan_fast.kernels._conv_cpu.BLOCK_BYTES", 4 * 33 * 65 * 7)
    weight = conv_weight(torch.randn(9, channels, 3, size, size) * 0.1)
    bias = torch.randn(9)
    x, earlier, out = (
        random_frames(frames, channels, h, w),
        random_frames(2, channels, h, w),
        random_frames(frames, 9, h, w),
    )
    for past in (None, earlier):
        whole = torch.cat([torch.zeros_like(earlier) if past is None else past, x]).double().transpose(0, 1)[None]
        expected = F.conv3d(whole, weight.double(), bias.double(), padding=(0, size // 2, size // 2))[0].transpose(0, 1)
        result, kept = causal_conv3d(x, past, weight, bias)
        assert relative_error(result, expected) < 2e-6
        assert torch.equal(kept.double(), whole[0].transpose(0, 1)[-2:])
        added, _ = out.clone(), None
        causal_conv3d_add(added, x, past, weight, bias)
        assert relative_error(added, expected + out) < 2e-6


# --- checkpoint, precision, input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_built_on_meta_then_loaded(version):
    vae = small_vae(version)
    with torch.device("meta"):
        loaded = WanVAE(VaeDims(version=version, encoder_dim=8, decoder_dim=12, channels=4), vae.spec)
    loaded.load_state_dict(vae.state_dict(), assign=True)
    latents = random_latents(vae, 2, 2, 3)
    torch.testing.assert_close(loaded.decode(latents), vae.decode(latents), atol=0, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close_to_fp32(version, dtype):
    vae = small_vae(version)
    latents, video = random_latents(vae, 2, 2, 3), random_video(vae, 5, 2, 3)
    decoded, encoded = vae.decode(latents), vae.encode(video)
    vae.to(dtype)
    assert vae.decode(latents).dtype == vae.encode(video).dtype == torch.float32
    limit = 4e-2 if dtype == torch.bfloat16 else 5e-3
    assert relative_error(vae.decode(latents), decoded) < limit
    assert relative_error(vae.encode(video), encoded) < limit


def psnr(actual: Tensor, expected: Tensor) -> float:
    """In dB, of pixels in [-1, 1]."""
    return 10 * (4 / (actual - expected).square().mean()).log10().item()


def test_bf16_shows_the_picture_of_fp32_on_trained_weights():
    opened = open_checkpoint(locate("tiny", TASKS["ti2v-5B"]))
    exact, rounded = (
        load_model(lambda: WanVAE(VaeDims.of_shapes(opened.vae.shapes)), opened.vae, "cpu", lambda name, dtype=dtype: dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 128), indexing="ij")
    discs = [((columns - 0.1 * f) ** 2 + rows**2 < 0.2) * 1.6 - 0.8 for f in range(9)]
    video = torch.stack([torch.stack([disc, 0.9 * columns, 0.8 * (3 * rows).sin()]) for disc in discs], dim=1)
    latents = exact.encode(video)
    assert psnr(rounded.decode(latents), exact.decode(latents)) >= 50


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_shows_the_picture_of_fp32_at_full_width(version):
    dims = replace(VaeDims.of_spec(VAES[version]), encoder_dim=4)
    torch.manual_seed(0)
    vae = random_model(lambda: WanVAE(dims), vae_shapes(dims), torch.device("cpu"))
    latents = torch.randn(dims.channels, 2, 2, 3)
    exact = vae.decode(latents)
    assert 0.2 < exact.std() < 0.8, "a picture, neither grey nor clamped everywhere"
    assert psnr(vae.bfloat16().decode(latents), exact) >= 50


def test_patchify_has_the_column_offset_slower():
    pixels = torch.arange(4.0).view(1, 1, 2, 2).expand(3, 1, 2, 2)
    assert patchify(pixels, 2).flatten().tolist() == [0, 2, 1, 3] * 3
    assert torch.equal(unpatchify(patchify(pixels, 2), 2), pixels)


def test_wrong_numbers_of_frames_raise():
    vae = small_vae("2.1")
    with pytest.raises(ValueError, match="4n"):
        vae.encode(random_video(vae, 6, 2, 2))
    with pytest.raises(ValueError, match="held 5 frames, not the 9"):
        vae.encode_stream(random_video(vae, 5, 2, 2).split([1, 4], dim=1), 9)
    with pytest.raises(ValueError, match="held 9 frames, not the 5"):
        vae.encode_stream(random_video(vae, 9, 2, 2).split([1, 8], dim=1), 5)


@pytest.mark.parametrize("shape", [(48, 2, 4, 4), (4, 2, 4), (1, 4, 2, 4, 4), (4, 0, 4, 4)], ids=str)
def test_latents_of_other_shapes_are_refused(shape):
    vae = small_vae("2.2")
    for decode in (vae.decode_chunks, vae.decode_stream):
        with pytest.raises(ValueError, match=r"decodes latents \[4, T, h, w\], got \[" + ", ".join(map(str, shape))):
            next(iter(decode(torch.zeros(shape))))
    with pytest.raises(ValueError):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_are_refused(value):
    vae = small_vae("2.1")
    latents = random_latents(vae, 2, 2, 3)
    latents[1, 1, 0, 2] = value
    with pytest.raises(ValueError, match="1 of 48 latents are NaN or infinite"):
        vae.decode(latents)


@pytest.mark.parametrize("cut", [{"chunk": 0}, {"piece": -1}, {"piece": 0}, {"tiles": 0}, {"tiles": 7}], ids=str)
def test_cuts_that_make_no_sense_are_refused(cut):
    vae = small_vae("2.1")
    with pytest.raises(ValueError, match="must be positive, tiles at most 6; got"):
        vae.decode(random_latents(vae, 2, 2, 3), **cut)


def test_videos_of_other_shapes_are_refused():
    vae = small_vae("2.2")
    for shape in ((3, 1, 32, 40), (3, 1, 24, 32), (4, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"encodes videos \[3, F, H, W\], H a multiple of 16 and W of 16; got"):
            vae.encode(torch.zeros(shape))
    for lengths in ([5], [1, 3, 1], [3, 2], [1, 0, 4]):
        with pytest.raises(ValueError, match="in chunks of 1 frame and then of multiples of 4; this one, after"):
            vae.encode_stream(torch.zeros(3, 5, 32, 32).split(lengths, dim=1), 5)


@pytest.mark.parametrize("version", VAES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grey_that_goes_on_is_not_encoded_again_and_the_latents_are_the_same(version, dtype, monkeypatch):
    vae = random_vae(version).to(dtype)
    first, last = (torch.rand(3, *(2 * side for side in vae.spec.stride[1:])) * 2 - 1 for _ in range(2))
    for frames, known in ((1, {}), (5, {}), (33, {}), (33, {17: last}), (149, {148: last})):
        chunks = list(grey_but_for({0: first, **known}, frames))
        video = torch.cat(chunks, dim=1)
        assert video.shape[1] == frames and video[:, 1:].count_nonzero() == sum(map(torch.count_nonzero, known.values()))
        ran = []
        level = vae.encoder._level
        monkeypatch.setattr(vae.encoder, "_level", lambda n, *args, level=level, ran=ran: (ran.append(n), level(n, *args))[1])
        latents = vae.encode_stream(chunks, frames)
        monkeypatch.undo()
        assert torch.equal(latents, vae.encode(video)) and latents.shape[1] == len(chunks)
        if not known:
            assert [ran.count(n) for n in range(4)] == [min(len(chunks), reach + 2) for reach in ENCODER_REACH]
    if dtype == torch.bfloat16:
        return
    # it is as much as can be left out
    chunks = list(grey_but_for({0: first}, 149))
    latents = vae.encode(torch.cat(chunks, dim=1))
    for n in range(4):
        less = [reach - (n == i) for i, reach in enumerate(ENCODER_REACH)]
        monkeypatch.setattr(vae_module, "ENCODER_REACH", less)
        assert not torch.equal(vae.encode_stream(chunks, 149), latents), n
