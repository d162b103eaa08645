"""The speech model: the official output, the document's rules written out in plain PyTorch, and what clips are given."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from clips_of import noise, write_clip
from models import random_dit, relative_error, small_dims, write_native
from PIL import Image
from recipe import recipe_tensor, recipe_weights
from sounds_of import tone, write_sound
from torch.nn import functional as F

from wan_fast.adapters.speech import places_beside
from wan_fast.branches import Branches
from wan_fast.conditioning import PREPARE
from wan_fast.conditioning.audio import bucketed, to_30_hz
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.counting import count_work, counted
from wan_fast.dit import WanDiT, grid_of, sinusoid
from wan_fast.engine import Engine
from wan_fast.framing import FRAME, scaled_sides, size_below
from wan_fast.inputs import Inputs
from wan_fast.kernels import rope_table_of
from wan_fast.manifest import DiTDims, dit_flops, dit_inputs_flops, dit_shapes, dit_text_flops, stays_fp32
from wan_fast.manifest.speech import SpeechDims
from wan_fast.resolving import resolve
from wan_fast.sound import features
from wan_fast.steps import Step
from wan_fast.tasks import TASKS

TASK = TASKS["s2v-14B"]
LATENTS = (16, 3, 16, 24)
OWN = 3 * 8 * 12


# --- the model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dropped", "first", "last", "size"),
    [
        (
            False,
            [-0.593487, 0.106911, 0.017087, -0.803305, -0.368804, -2.408221, 0.738360, 0.531225],
            [-1.130940, -2.057713, -0.347693, -0.559804],
            0.9651006,
        ),
        (
            True,
            [-0.590343, 0.066914, 0.033753, -0.829407, -0.347618, -2.428902, 0.758610, 0.489935],
            [-1.116463, -2.060809, -0.333708, -0.544728],
            0.9667285,
        ),
    ],
)
@torch.inference_mode()
def test_official_output(dropped, first, last, size):
    """First 8 and last 4 elements and mean |.| of the official model's output, on `recipe` weights."""
    speech = SpeechDims(layers=(0, 1), audio_dim=32)
    dims = DiTDims(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=64, speech=speech)
    model = recipe_weights(WanDiT(dims).requires_grad_(False))
    x = recipe_tensor((16, 2, 16, 16), 1020)
    inputs = Inputs(
        reference=recipe_tensor((16, 1, 16, 16), 1021),
        motion=None if dropped else recipe_tensor((16, 19, 16, 16), 1022),
        pose=recipe_tensor((16, 2, 16, 16), 1023),
        audio=recipe_tensor((25, 32, 8), 1024),
    )
    context = model.prepare([recipe_tensor((7, 64), 1001)], grid_of(x.shape), inputs)
    out = model(x[None], torch.tensor([[600.0, 0.0]]), context, split=128).flatten()
    torch.testing.assert_close(out[:8], torch.tensor(first), atol=2e-5, rtol=0)
    torch.testing.assert_close(out[-4:], torch.tensor(last), atol=2e-5, rtol=0)
    assert out.abs().mean().item() == pytest.approx(size, abs=2e-6)


@pytest.fixture(scope="module")
def model():
    return random_dit(small_dims("s2v-14B", layers=3, width=256))


def given(model, seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)
    shapes = model.dims.speech.inputs(LATENTS)
    return replace(Inputs(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}), **changed)


def spread(side, count):
    return torch.tensor([int(place) for place in np.linspace(0, side - 1, count)])


def heard(state, audio, speech):
    """Tokens [T, 5, D] and what modulates [T, D], a stream at a time."""

    def conv(name, x, stride=1):
        name = f"casual_audio_encoder.encoder.{name}.conv"
        return F.conv1d(torch.cat([x[..., :1], x[..., :1], x], -1), state[f"{name}.weight"], state[f"{name}.bias"], stride)

    def activated(x):
        return F.silu(F.layer_norm(x.mT, x.shape[1:2], eps=1e-6)).mT

    def chain(x):
        return activated(conv("conv3", activated(conv("conv2", activated(x), 2)), 2))[0].T

    layers = F.silu(state["casual_audio_encoder.weights"].flatten())
    mixed = torch.einsum("l,lcf->cf", layers, torch.cat([audio[..., :1]] * 73 + [audio], -1)) / layers.sum()
    streams = [chain(part) for part in conv("conv1_local", mixed[None]).chunk(speech.audio_tokens, 1)]
    streams.append(state["casual_audio_encoder.encoder.padding_tokens"].flatten().expand_as(streams[0]))
    whole = linear(state, "casual_audio_encoder.encoder.final_linear", chain(conv("conv1_global", mixed[None])))
    return torch.stack(streams, 1)[19:], whole[19:]


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def attended(state, name, x, y, turn=lambda q: q):
    """Attention of x [..., L, D] to y, with RMS norms of q and k over the whole width."""
    q, k = (rms(linear(state, f"{name}.{n}", z), state[f"{name}.norm_{n}.weight"]) for n, z in (("q", x), ("k", y)))
    q, k, v = (t.unflatten(-1, (-1, 128)).transpose(-2, -3) for t in (q, k, linear(state, f"{name}.v", y)))
    out = F.scaled_dot_product_attention(turn(q), turn(k), v)
    return linear(state, f"{name}.o", out.transpose(-2, -3).flatten(-2))


def turned(places):
    """A function that turns heads [N, L, 128] by places [L, 3]."""
    angles = [
        places[:, axis, None].double() / 10000 ** (torch.arange(pairs).double() / pairs)
        for axis, pairs in enumerate((22, 21, 21))
    ]
    turn = torch.polar(torch.ones(len(places), 64, dtype=torch.float64), torch.cat(angles, 1))
    return lambda q: torch.view_as_real(torch.view_as_complex(q.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).float()


def by_the_document(model, x, t, text, inputs):
    """The velocity of a clip [C, T, H, W] by plain PyTorch."""
    state, dims = {name: tensor.float() for name, tensor in model.state_dict().items()}, model.dims
    (T, H, W), D = grid_of(x.shape), dims.dim

    def patches(name, latents):
        weight = state[f"{name}.weight"]
        return F.conv3d(latents[None], weight, state[f"{name}.bias"], weight.shape[2:])[0].flatten(1).T

    marks = state["trainable_cond_mask.weight"]
    pose = torch.zeros_like(x) if inputs.pose is None else inputs.pose
    tokens = [patches("patch_embedding", x) + patches("cond_encoder", pose) + marks[0]]
    tokens.append(patches("patch_embedding", inputs.reference) + marks[1])
    places = [torch.cartesian_prod(*map(torch.arange, (T, H, W)))]
    places.append(torch.cartesian_prod(torch.tensor([30]), torch.arange(H), torch.arange(W)))
    if inputs.motion is not None:
        parts = (("proj", [18], [-1], 1), ("proj_2x", [16, 17], [-3], 2), ("proj_4x", range(16), [-19, -14, -9, -4], 4))
        for name, frames, times, n in parts:
            tokens.append(patches(f"frame_packer.{name}", inputs.motion[:, [*frames]]) + marks[2])
            places.append(torch.cartesian_prod(torch.tensor(times), spread(H, H // n), spread(W, W // n)))
    own, y, turn = len(tokens[0]), torch.cat(tokens), turned(torch.cat(places))
    text = F.pad(text, (0, 0, 0, dims.text_len - len(text)))
    text = linear(state, "text_embedding.2", F.gelu(linear(state, "text_embedding.0", text), approximate="tanh"))
    time = linear(state, "time_embedding.0", sinusoid(torch.tensor([[t, 0.0]]), 256)[0])
    time = linear(state, "time_embedding.2", F.silu(time))
    rows = linear(state, "time_projection.1", F.silu(time)).view(2, 6, D)
    which = (torch.arange(len(y)) >= own).long()
    sound, whole = heard(state, inputs.audio, dims.speech)

    def norm(x, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], eps=eps)

    for i in range(dims.num_layers):
        b = f"blocks.{i}"
        m = (state[f"{b}.modulation"] + rows)[which]  # [L, 6, D]
        z = norm(y) * (1 + m[:, 1]) + m[:, 0]
        y = y + attended(state, f"{b}.self_attn", z, z, turn) * m[:, 2]
        z = norm(y) * state[f"{b}.norm3.weight"] + state[f"{b}.norm3.bias"]
        y = y + attended(state, f"{b}.cross_attn", z, text)
        z = norm(y) * (1 + m[:, 4]) + m[:, 3]
        y = y + linear(state, f"{b}.ffn.2", F.gelu(linear(state, f"{b}.ffn.0", z), approximate="tanh")) * m[:, 5]
        if i in dims.speech.layers:
            n = dims.speech.layers.index(i)
            both = linear(state, f"audio_injector.injector_adain_layers.{n}.linear", F.silu(whole))[:, None]
            shift, scale = both.chunk(2, -1)
            z = norm(y[:own].view(T, H * W, D), 1e-5) * (1 + scale) + shift
            z = attended(state, f"audio_injector.injector.{n}", z, sound)
            y = torch.cat([y[:own] + z.flatten(0, 1), y[own:]])
    shift, scale = state["head.modulation"][0] + time[0]
    out = linear(state, "head.head", norm(y[:own]) * (1 + scale) + shift)
    return out.view(T, H, W, 1, 2, 2, -1).permute(6, 0, 3, 1, 4, 2, 5).reshape(-1, T, 2 * H, 2 * W)


@pytest.mark.parametrize("without", [(), ("motion",), ("pose",), ("motion", "pose")], ids="-".join)
@torch.inference_mode()
def test_the_model_is_the_documents(model, without):
    inputs, x, text = given(model, **dict.fromkeys(without)), torch.randn(LATENTS), torch.randn(5, 64)
    context = model.prepare([text], grid_of(x.shape), inputs)
    made = model(x[None], torch.tensor([[600.0, 0.0]]), context, split=OWN)[0]
    assert relative_error(made, by_the_document(model, x, 600.0, text, inputs)) < 5e-6


@torch.inference_mode()
def test_sound_goes_into_the_clips_own_tokens_alone(model):
    """And the variance of a faint stream shows the norm's own eps."""
    inputs, (T, H, W) = given(model), (3, 8, 12)
    context = model.prepare([torch.randn(5, 64)], (T, H, W), inputs)
    x = 3e-3 * torch.randn(1, OWN + context.extra.shape[1], 256)
    changed = x.clone()
    assert model.adapter.begin(changed, None, context, OWN, False)(0, changed) is None
    assert torch.equal(changed[:, OWN:], x[:, OWN:])
    state = dict(model.state_dict())
    sound, whole = heard(state, inputs.audio, model.dims.speech)
    shift, scale = linear(state, "audio_injector.injector_adain_layers.0.linear", F.silu(whole))[:, None].chunk(2, -1)
    z = F.layer_norm(x[0, :OWN].view(T, H * W, -1), (256,), eps=1e-5) * (1 + scale) + shift
    added = attended(state, "audio_injector.injector.0", z, sound).flatten(0, 1)
    assert relative_error(changed[0, :OWN] - x[0, :OWN], added) < 1e-5


@torch.inference_mode()
def test_two_texts_at_once(model):
    inputs, x, texts = given(model), torch.randn(2, *LATENTS), [torch.randn(5, 64), torch.randn(7, 64)]
    times = torch.tensor([[600.0, 0.0]] * 2)
    together = model(x, times, model.prepare(texts, grid_of(x.shape), inputs), split=OWN)
    for i in range(2):
        alone = model(x[i : i + 1], times[:1], model.prepare(texts[i : i + 1], grid_of(x.shape), inputs), split=OWN)[0]
        assert relative_error(together[i], alone) < 5e-6


@torch.inference_mode()
def test_what_both_branches_see_is_made_once(model):
    inputs, texts = given(model), {"conditional": torch.randn(5, 64), "unconditional": torch.randn(4, 64)}
    silent = replace(inputs, audio=torch.zeros_like(inputs.audio))
    first = model.prepare([texts["conditional"]], (3, 8, 12), inputs)
    other = model.prepare([texts["unconditional"]], (3, 8, 12), silent, like=first)
    assert other.given.added is first.given.added and other.given.extra is first.given.extra
    assert other.given.tensors[0] is not first.given.tensors[0]
    alone = model.prepare([texts["unconditional"]], (3, 8, 12), silent)
    assert all(torch.equal(a, b) for a, b in zip(other.tensors(), alone.tensors(), strict=True))
    same = model.prepare([texts["unconditional"]], (3, 8, 12), inputs, like=first)
    assert same.given.tensors[0] is first.given.tensors[0]
    # what is the same of the sound is not the same of the pictures
    moved = replace(inputs, motion=inputs.motion + 1)
    later = model.prepare([texts["conditional"]], (3, 8, 12), moved, like=first)
    assert later.given.tensors[0] is first.given.tensors[0] and not torch.equal(later.extra, first.extra)


@torch.inference_mode()
def test_a_chain_works_in_the_memory_of_its_first_clip(model):
    """With rows [t, 0] of modulation, and the results of clips that begin anew."""
    of_model = dict(expert="model", guidance_scale=4.0, corrector=(), predictor=())
    step = Step(index=0, total=1, timestep=600.0, sigma=0.6, next_sigma=0.0, **of_model)
    texts, x = {"conditional": torch.randn(5, 64), "unconditional": torch.randn(4, 64)}, torch.randn(LATENTS)

    def of(inputs):
        return {"conditional": inputs, "unconditional": replace(inputs, audio=torch.zeros_like(inputs.audio))}

    def branches(inputs):
        return Branches([step], lambda name: model, texts, OWN, x.device, inputs=of(inputs), zero_first=False)

    clips = [given(model, seed) for seed in (1, 2)]
    chain = branches(clips[0])
    for inputs in clips:
        if inputs is not clips[0]:
            chain.start([step], texts, of(inputs))
        made = torch.stack(chain(step, x))
        assert torch.equal(made, torch.stack(branches(inputs)(step, x)))
    expected = [by_the_document(model, x, 600.0, texts[name], of(clips[1])[name]) for name in texts]
    assert relative_error(made, torch.stack(expected)) < 5e-6
    # a pass that comes with a later clip has the frames before that one too
    one = replace(step, unconditional="none")
    joined = Branches([one], lambda name: model, texts, OWN, x.device, inputs=of(clips[0]), zero_first=False)
    joined(one, x)
    joined.start([step], texts, of(clips[1]))
    assert torch.equal(torch.stack(joined(step, x)), made)


def test_places():
    for side, count, expected in [(8, 4, "0 2 4 7"), (8, 2, "0 7"), (12, 6, "0 2 4 6 8 11"), (12, 3, "0 5 11")]:
        for grid, axis in (((3, side, 16), 1), ((3, 16, side), 2)):
            places = places_beside(grid, True)
            coarse = places[places[:, 0] == (-3 if side == 2 * count else -9)][:, axis]
            assert coarse.unique().tolist() == [int(place) for place in expected.split()]
    places = places_beside((2, 8, 12), True)
    assert [len(places), len(places_beside((2, 8, 12), False))] == [96 + 96 + 24 + 4 * 6, 96]
    times = places[:, 0].tolist()
    assert [t for t, after in pairwise([*times, None]) if t != after] == [30, -1, -3, -19, -14, -9, -4]
    assert places[:96, 1:].tolist() == places[96:192, 1:].tolist() == [[i, j] for i in range(8) for j in range(12)]
    assert rope_table_of(places, 128).shape == (2, 240, 64)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"audio": None}, r"takes audio \(4, 32, 12\) with this clip, got None"),
        ({"audio": torch.zeros(4, 32, 8)}, r"takes audio .* got \(4, 32, 8\)"),
        ({"reference": None}, "takes reference .* got None"),
        ({"motion": torch.zeros(16, 18, 16, 24)}, r"takes motion \(16, 19, 16, 24\) .* got \(16, 18, 16, 24\)"),
        ({"pose": torch.zeros(16, 2, 16, 24)}, r"takes pose \(16, 3, 16, 24\) .* got \(16, 2, 16, 24\)"),
        ({"face": torch.zeros(3, 4, 64, 64)}, "does not take face"),
    ],
)
def test_other_inputs_are_refused(model, changed, says):
    with pytest.raises(ValueError, match=says):
        model.prepare([torch.zeros(5, 64)], (3, 8, 12), given(model, **changed))


# --- its sizes ------------------------------------------------------------------------------------------------------------


def test_tokens_of_the_released_model():
    dims, latents = DiTDims.of_task(TASK), (16, 20, 88, 128)
    own = 20 * 44 * 64
    tokens = [own + dims.speech.extra_tokens(latents, first) for first in (True, False)]
    assert tokens == [59_136, 63_360]
    once = dit_text_flops(dims) + dit_inputs_flops(dims, latents)
    tflop = [(dit_flops(dims, count, own=own) + once) / 1e12 for count in tokens]
    assert tflop == pytest.approx([4376.8, 4903.4], abs=0.1)


def test_work_of_a_clip(model):
    dims, inputs = model.dims, given(model)
    with torch.device("meta"):
        adapter, text = WanDiT(dims).adapter, torch.empty(1, 512, 256)
        blank = Inputs(**{name: torch.empty(tensor.shape) for name, tensor in inputs.tensors()})
    # the picture goes through the model's own embedding
    embedding = 2 * 4 * 16 * 256 * 96
    done = sum(work.flops for work in counted(lambda: adapter.prepare(blank, text, (3, 8, 12), None)).values())
    assert done + embedding == pytest.approx(dims.speech.inputs_flops(256, LATENTS))


def test_layers_are_the_configs_or_spread_like_the_released_ones():
    released = dit_shapes(DiTDims.of_task(TASK))
    assert SpeechDims.of_shapes(released, {}).layers == (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    small = dit_shapes(small_dims("s2v-14B", layers=3))
    assert SpeechDims.of_shapes(small, {}) == replace(small_dims("s2v-14B", layers=3).speech, layers=(0, 2))
    assert SpeechDims.of_shapes(small, {"audio_inject_layers": [0, 1]}).layers == (0, 1)
    for wrong in ([1, 0], [0, 3], [0, 0], []):
        with pytest.raises(ValueError, match=r"audio_inject_layers .* are not blocks of 3, in order"):
            SpeechDims.of_shapes(small, {"audio_inject_layers": wrong})
    assert SpeechDims.of_shapes(dit_shapes(small_dims("t2v-14B")), {}) is None


def test_the_sound_is_encoded_in_fp32():
    names = dit_shapes(small_dims("s2v-14B"))
    kept = {name for name in names if stays_fp32(name) and not name.startswith(("blocks", "time", "head"))}
    assert {name for name in names if name.startswith("casual_audio_encoder")} < kept
    assert {name.rpartition(".injector.0.")[2] for name in kept if "injector.0" in name} == {"norm_q.weight", "norm_k.weight"}
    narrow = ("cond_encoder", "frame_packer", "trainable", "audio_injector.injector_adain")
    assert not any(name.startswith(narrow) for name in kept)


# --- size and length ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("area", "picture", "size"),
    [
        # (width, height)
        ((1024, 704), (1024, 704), (1024, 704)),
        ((1024, 704), (1280, 720), (1088, 640)),
        ((1024, 704), (1024, 1024), (832, 832)),
        ((1024, 704), (832, 480), (832, 512)),
        ((1280, 720), (1280, 720), (1280, 704)),
        ((832, 480), (832, 480), (832, 448)),
        ((832, 480), (480, 832), (448, 832)),
        # where the official lower end of the scales matters
        ((1024, 704), (1758, 422), (1600, 384)),
        ((1024, 704), (200, 100), (256, 128)),
        ((1024, 704), (200, 3), (256, 64)),
        ((64, 64), (64, 64), (64, 64)),
    ],
)
def test_the_size_is_the_official_one(area, picture, size):
    assert size_below(area, picture) == size == size_below(area[::-1], picture)


SIZE = (128, 64)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"a": SIZE, "wide": (300, 80), "square": (90, 90), "large": (400, 225), "small": (20, 10)}.items():
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for seconds in (0.3, 1.05, 1.1, 1.6, 5.0, 5.1, 12.0):
        write_sound(tmp_path / f"{seconds}.wav", tone(220, 16000, seconds), 16000)
    write_clip(tmp_path / "poses.mkv", noise(30, 64, 128))
    write_clip(tmp_path / "fast.mkv", noise(60, 64, 128), rate=32)
    write_clip(tmp_path / "tall.mkv", noise(30, 128, 64))
    write_clip(tmp_path / "short.mkv", noise(16, 64, 128))
    (tmp_path / "text.wav").write_text("no sound")
    return tmp_path


def request_of(files, audio="1.1.wav", image="a.png", size=SIZE, infer_frames=8, **more):
    named = {"audio": audio, "image": image, **{key: more.pop(key) for key in ("pose_video",) if key in more}}
    paths = {key: str(files / name) for key, name in named.items() if name is not None}
    return Request(prompt="x", size=size, infer_frames=infer_frames, seed=0, **paths, **more)


def framed(files, **given):
    asked = request_of(files, **given)
    request = resolve(TASK, asked)
    return request, FRAME["speech"](request, TASK, asked)


@pytest.mark.parametrize(
    ("seconds", "infer_frames", "more", "counts"),
    [
        ("5.0", None, {}, [77]),
        ("5.1", None, {}, [77, 80]),
        ("12.0", None, {}, [77, 80, 80]),
        ("12.0", None, {"num_clip": 2}, [77, 80]),
        ("12.0", None, {"num_clip": 9}, [77, 80, 80]),
        ("12.0", None, {"start_from_ref": True}, [80, 80, 80]),
        ("1.1", 8, {"num_clip": 2}, [5, 8]),
        ("1.1", 8, {}, [5, 8, 8]),
        ("0.3", 4, {}, [1, 4]),
    ],
)
def test_clips_go_on_from_each_other(files, seconds, infer_frames, more, counts):
    request, framing = framed(files, audio=f"{seconds}.wav", infer_frames=infer_frames, **more)
    length = infer_frames or 80
    clips = framing.segments
    assert [clip.count for clip in clips] == counts and framing.num_frames == sum(counts)
    assert [clip.index for clip in clips] == [*range(len(counts))]
    assert [clip.offset for clip in clips] == [sum(counts[:n]) for n in range(len(counts))]
    assert [clip.start for clip in clips] == [n * length for n in range(len(counts))]
    # of the picture and the first three frames, or of the frames before
    assert [clip.skip for clip in clips] == [4 if counts[0] < length else 73, *[73] * (len(counts) - 1)]
    assert (framing.history, framing.latent_frames, framing.fps, framing.size) == (73, length // 4, 16, SIZE)
    assert framing.sound == files / f"{seconds}.wav" and framing.frames == ()
    assert replace(request, num_frames=framing.num_frames).num_frames == sum(counts)


def test_poses_are_those_of_16_frames_per_second(files):
    assert framed(files, pose_video="poses.mkv")[1].frames == tuple(range(24))
    assert framed(files, pose_video="fast.mkv")[1].frames == tuple(range(0, 48, 2))
    # one that ends with the sound, or less than a frame before: what is behind it there are no poses for
    assert framed(files, pose_video="short.mkv", audio="1.05.wav")[1].frames == tuple(range(16))
    assert framed(files, pose_video="short.mkv", audio="1.1.wav", num_clip=2)[1].frames == tuple(range(16))
    assert framed(files, pose_video="poses.mkv", audio="1.6.wav", infer_frames=80)[1].frames == tuple(range(30))
    times = [0, 0.01, 0.02, 0.5, 0.9]
    write_clip(files / "uneven.mkv", noise(5, 64, 128), times=times)
    frames = framed(files, pose_video="uneven.mkv", num_clip=1)[1].frames
    assert frames == tuple(max(n for n, start in enumerate(times) if start <= i / 16 + 0.001) for i in range(8))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_clip": 2}, r"--num_clip 2 is 0\.81 of the 1\.10 seconds of --audio"),
        ({"image": "large.png", "size": (448, 192)}, r"--image fills 341x192 of 384x192 pixels, and black the rest, .* cut it"),
        ({"image": "small.png"}, r"--image has 20x10 pixels, and is not enlarged to an area of 128\*64; give a larger one"),
        ({"pose_video": "tall.mkv"}, r"--pose_video is 64x128 pixels, of another shape than 128x64: its middle is taken"),
        ({"pose_video": "poses.mkv"}, r"^$"),
        ({"infer_frames": 80}, r"--audio lasts 1\.10 seconds, .* clip of 80 frames is made for it; --infer_frames 24 is"),
        ({"infer_frames": 24}, r"^$"),
        (
            {"audio": "5.0.wav", "infer_frames": 80},
            r"lasts 5\.00 seconds, and the file ends after 4\.81, as officially: .* 3 frames less; --infer_frames 84 has",
        ),
        ({"audio": "5.0.wav", "infer_frames": 84}, r"^$"),
        ({}, r"^$"),
    ],
)
def test_what_a_user_should_know_is_said(files, given, says):
    assert re.search(says, framed(files, **given)[1].note)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"audio": None}, "task s2v-14B needs --audio, got none; add"),
        ({"image": None}, "task s2v-14B needs --image, got none; add"),
        ({"num_frames": 81}, r"as long as its sound, got --frame_num 81; leave it out, or take --num_clip"),
        ({"fps": 24}, r"at 16 frames per second, got --fps 24; leave it out"),
        ({"audio": "text.wav"}, "--audio .*text.wav"),
        ({"audio": "a.png"}, "--audio .*a.png"),
        ({"image": "1.1.wav"}, "picture .*1.1.wav"),
        ({"pose_video": "a.png"}, "--pose_video .*a.png"),
        ({"pose_video": "short.mkv"}, r"--pose_video lasts 1\.00 seconds, 1\.10 of --audio are .*; give .* --num_clip"),
        ({"size": (32, 32)}, r"area of 32\*32 is too small for a picture of 128\*64 on the 64-pixel grid"),
        ({"infer_frames": 10}, "--infer_frames must be a multiple of 4, got 10; take 8 or 12"),
        ({"num_clip": 0}, "--num_clip must be 1 or more, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(files, given, says):
    with pytest.raises(WanFastError, match=says):
        framed(files, **given)


# --- what clips are given -------------------------------------------------------------------------------------------------


class Seen:
    """Encoders that keep what they are given; latents say which frame they are of."""

    def __init__(self):
        self.videos = []

    def encode_text(self, texts):
        return {name: torch.zeros(3, 8) for name in texts}

    def encode_audio(self, samples):
        self.samples = samples
        return torch.randn(4, features(len(samples)), 32, generator=torch.Generator().manual_seed(0))

    def encode_video(self, chunks, num_frames):
        chunks = [*chunks]
        assert [chunk.shape[1] for chunk in chunks] == [1] + [4] * ((num_frames - 1) // 4)
        video = torch.cat(chunks, dim=1)
        self.videos.append(video)
        T, h, w = (num_frames + 3) // 4, video.shape[2] // 8, video.shape[3] // 8
        return torch.arange(T)[None, :, None, None].expand(16, T, h, w) + 100.0 * len(self.videos)


def clips_of(files, **given):
    request, framing = framed(files, **given)
    seen = Seen()
    return PREPARE["speech"](request, framing, seen), framing, seen


def pixels(files, name):
    return torch.from_numpy(np.array(Image.open(files / name))).permute(2, 0, 1).float() / 127.5 - 1


def test_the_first_clip_sees_the_picture(files):
    clip, framing, seen = clips_of(files)
    made = clip(framing.segments[0], None)
    (video,) = seen.videos
    assert torch.allclose(video[:, 0], pixels(files, "a.png"), atol=1e-6)
    inputs = made.inputs
    assert inputs.motion is None and inputs.pose is None and made.before is inputs.reference
    assert inputs.reference.shape == (16, 1, 8, 16) and (inputs.reference == 100).all()
    assert (made.split, made.zero_first, made.known) == (2 * 4 * 8, False, None)
    assert sorted(made.by_branch) == ["conditional", "unconditional"]
    other = made.by_branch["unconditional"]
    assert not other.audio.any() and other.audio.shape == inputs.audio.shape == (4, 32, 8)
    assert made.by_branch["conditional"] is inputs and other.reference is inputs.reference


def test_every_clip_hears_its_part_of_the_sound(files):
    clip, framing, seen = clips_of(files)
    assert len(seen.samples) == 17600
    whole = bucketed(to_30_hz(seen.encode_audio(seen.samples)), 8)
    parts = [clip(segment, None).inputs.audio for segment in framing.segments]
    assert torch.equal(torch.cat(parts, -1), whole) and len(parts) == 3


@pytest.mark.parametrize("known", [5, 73])
@pytest.mark.parametrize("start_from_ref", [False, True])
def test_a_later_clip_goes_on_from_the_frames_before(files, known, start_from_ref):
    clip, framing, seen = clips_of(files, start_from_ref=start_from_ref)
    before = torch.rand(3, known, 64, 128)
    made = clip(framing.segments[1], before)
    picture, history = seen.videos
    zeros = torch.zeros(3, 73, 64, 128)
    if start_from_ref:
        zeros[:, -6:] = picture
    assert torch.equal(history, torch.cat([zeros, before], 1)[:, -73:])
    assert made.inputs.motion.shape == (16, 19, 8, 16) and made.before is made.inputs.motion


def test_the_first_clip_may_go_on_from_the_picture(files):
    clip, framing, seen = clips_of(files, start_from_ref=True)
    made = clip(framing.segments[0], None)
    picture, history = seen.videos
    assert not history[:, :67].any() and torch.equal(history[:, 67:], picture.expand(-1, 6, -1, -1))
    assert made.before is made.inputs.motion and made.inputs.motion.shape[1] == 19


def test_poses_of_a_clip(files):
    clip, framing, seen = clips_of(files, pose_video="short.mkv", audio="1.1.wav", num_clip=2)
    poses = torch.from_numpy(noise(16, 64, 128)).permute(3, 0, 1, 2) / 127.5 - 1
    for number, segment in enumerate(framing.segments):
        made = clip(segment, torch.zeros(3, 73, 64, 128) if number else None)
        own = poses[:, 8 * number : 8 * number + 8]
        assert torch.allclose(seen.videos[-1], torch.cat([own[:, :1], own], 1), atol=1e-6)
        # without the latent frame of what was repeated
        assert made.inputs.pose[0, :, 0, 0].tolist() == [100 * len(seen.videos) + t for t in (1, 2)]
        assert made.by_branch["unconditional"].pose is made.inputs.pose


def test_behind_the_last_pose_it_is_black(files):
    clip, framing, seen = clips_of(files, pose_video="poses.mkv", audio="1.6.wav", infer_frames=40)
    clip(framing.segments[0], None)
    poses = torch.from_numpy(noise(30, 64, 128)).permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.allclose(seen.videos[-1][:, 1:31], poses, atol=1e-6) and (seen.videos[-1][:, 31:] == -1).all()


def middle(image, size):
    """By PIL: the shorter side to the shorter of `size`, the longer in proportion, on black."""
    short, target = min(image.size), min(size)
    sides = tuple(int(target * side / short) for side in image.size)
    image, black = image.resize(sides, Image.Resampling.BILINEAR), Image.new("RGB", size)
    black.paste(image, tuple(-round((s - t) / 2) if s > t else (t - s) // 2 for s, t in zip(sides, size, strict=True)))
    return torch.from_numpy(np.array(black)).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize(("name", "size"), [("wide.png", (192, 64)), ("square.png", (64, 64)), ("large.png", (448, 192))])
def test_the_picture_is_scaled_and_cropped_as_officially(files, name, size):
    _, framing, seen = clips_of(files, image=name, size=size)
    expected = middle(Image.open(files / name), framing.size)
    assert torch.allclose(seen.videos[0][:, 0], expected, atol=1e-6)
    if name == "large.png":
        assert (expected[:, :, :21] == -1).all() and scaled_sides((400, 225), framing.size) == (341, 192)


def test_poses_of_another_shape_have_grey_beside_them(files):
    clip, framing, seen = clips_of(files, pose_video="tall.mkv")
    clip(framing.segments[0], None)
    frame = Image.fromarray(noise(30, 128, 64)[0])
    video = seen.videos[-1][:, 0]
    # 64 x 128 in 128 x 64: at its own size, 32 to either side
    assert torch.allclose(video[:, :, 32:96], middle(frame, (64, 64)), atol=1e-6)
    assert not video[:, :, :32].any() and not video[:, :, 96:].any()


def test_without_guidance_there_is_one_branch(files):
    clip, framing, _ = clips_of(files, guidance_scale=1.0)
    assert [*clip(framing.segments[0], None).by_branch] == ["conditional"]


# --- whole videos ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("s2v"), "s2v-14B", layers=2, width=128)


def video_of(engine, request):
    chunks = []
    made = engine.generate(request, on_frames=chunks.append)
    return torch.cat(chunks, dim=1), made


def test_a_video_is_a_chain_of_clips(folder, files):
    engine = Engine(EngineConfig(task="s2v-14B", checkpoint=str(folder), device="cpu", dtype="fp32"))
    request = request_of(files, size=(64, 64), image="square.png", num_clip=2, num_steps=2, guidance_scale=3.0)
    frames, made = video_of(engine, request)
    assert frames.shape == (3, 13, 64, 64) and made.frames.shape == (13, 64, 64, 3) and made.fps == 16
    assert made.latents.shape == (16, 4, 8, 8)
    alone, _ = video_of(engine, replace(request, num_clip=1))
    assert torch.equal(alone, frames[:, :5])
    # all that is given is seen
    others = {"audio": "1.6.wav", "image": "wide.png", "pose_video": "poses.mkv"}
    for changed in (*({name: str(files / file)} for name, file in others.items()), {"start_from_ref": True}):
        other, _ = video_of(engine, replace(request, num_clip=1, **changed))
        assert relative_error(other[:, -5:], alone) > 1e-3, changed
    assert other.shape == (3, 8, 64, 64)
    # what is shown ends with the sound, of 17.6 frames
    whole, made = video_of(engine, replace(request, num_clip=None, num_steps=1))
    assert whole.shape[1] == 21 and made.frames.shape[0] == framed(files)[1].shown == 18
    todo = engine.plan(request)
    assert todo.forwards == 2 * 2 * 2 and {"prepare", "denoise"} & {stage for stage, _ in count_work(engine, todo)}
    narrow = Engine(EngineConfig(task="s2v-14B", checkpoint=str(folder), device="cpu", dtype="bf16"))
    assert 1e-4 < relative_error(video_of(narrow, request)[0], frames) < 0.1
