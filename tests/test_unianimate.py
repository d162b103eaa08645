"""UniAnimate: poses to follow, and the file that brings their encoders and a LoRA; against diffusers' transformer."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from clips_of import noise, write_clip
from models import random_dit, relative_error, small_dims, write_native
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import wan_fast
from wan_fast.branches import Branches
from wan_fast.checkpoint import describe_file, open_dit, open_part
from wan_fast.cli import main
from wan_fast.conditioning import PREPARE
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.dit import grid_of
from wan_fast.engine import Engine
from wan_fast.examples import FOLDER
from wan_fast.framing import FRAME
from wan_fast.inputs import Inputs
from wan_fast.manifest import DiTDims, dit_inputs_flops, dit_shapes, stays_fp32
from wan_fast.manifest.pose import PoseDims
from wan_fast.resolving import resolve
from wan_fast.single_files import open_configured
from wan_fast.steps import official, sigma_grid, step_plan
from wan_fast.tasks import TASKS

SPEC = TASKS["unianimate-14B"]
SIZE, FRAMES, STEPS = (64, 48), 9, 4
TARGETS = [f"{attention}.{letter}" for attention in ("self_attn", "cross_attn") for letter in "qkvo"] + ["ffn.0", "ffn.2"]
# index -> (out, in, kernel), stride, padding of the convolutions of a clip's poses, and of the picture's
POSES = {
    0: ((16, 3, 3, 3, 3), (1, 1, 1), 1), 2: ((16, 16, 3, 3, 3), (1, 1, 1), 1), 4: ((16, 16, 3, 3, 3), (1, 1, 1), 1),
    6: ((16, 16, 3, 3, 3), (1, 2, 2), 1), 8: ((16, 16, 3, 3, 3), (2, 2, 2), 1), 10: ((16, 16, 3, 3, 3), (2, 2, 2), 1),
    12: ((5120, 16, 1, 2, 2), (1, 2, 2), 0),
}  # fmt: skip
PICTURE = {
    0: ((16, 3, 3, 3), 1, 1), 2: ((16, 16, 3, 3), 1, 1), 4: ((16, 16, 3, 3), 1, 1), 6: ((16, 16, 3, 3), 2, 1),
    8: ((16, 16, 3, 3), 2, 1), 10: ((20, 16, 3, 3), 2, 1),
}  # fmt: skip
WITH_POSES = replace(small_dims("i2v-14B", layers=2, width=128), pose=PoseDims())


def pose_state(dim, seed=7, dtype=torch.float32):
    """Seeded encoders of poses, whose tokens are of the size of a clip's."""
    draw, state = torch.Generator().manual_seed(seed), {}
    for name, layers in (("dwpose_embedding", POSES), ("randomref_embedding_pose", PICTURE)):
        for i, (shape, *_) in layers.items():
            shape = (dim if shape[0] == 5120 else shape[0], *shape[1:])
            scale = 2 * (shape[0] / torch.Size(shape).numel()) ** 0.5
            state[f"{name}.{i}.weight"] = (torch.randn(shape, generator=draw) * scale).to(dtype)
            state[f"{name}.{i}.bias"] = (torch.randn(shape[0], generator=draw) * 0.1).to(dtype)
    return state


def lora_state(shapes, rank=4, prefix="pipe.dit.", dtype=torch.float32):
    draw, state = torch.Generator().manual_seed(rank), {}
    for name in (f"blocks.{i}.{target}" for i in range(2) for target in TARGETS):
        out, into = shapes[f"{name}.weight"]
        for factor, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
            state[f"{prefix}{name}.{factor}.default.weight"] = (torch.randn(shape, generator=draw) * 0.1).to(dtype)
    return state


def write_file(path, dims, rank=4, prefix="pipe.dit.", dtype=torch.float32, more=None, less=()):
    """As UniAnimate's is; `more` and `less` are tensors that it has beside, and has not."""
    state = lora_state(dit_shapes(dims), rank, prefix, dtype) | pose_state(dims.dim, dtype=dtype) | (more or {})
    state = {name: tensor for name, tensor in state.items() if name not in less}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def convolved(state, name, layers, pixels):
    """[1, channels, ...] of pixels [3, ...]: convolutions with a SiLU between."""
    x = pixels[None]
    for i, (shape, stride, padding) in layers.items():
        convolve = F.conv3d if len(shape) == 5 else F.conv2d
        # a padding of none goes with a kernel of one or two
        x = convolve(x, state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"], stride, padding)
        x = x if i == max(layers) else F.silu(x)
    return x


def tokens_of(state, poses):
    """[1, D, T, H, W] of frames [3, F, h, w] in [0, 1], the first of which is there three times more."""
    return convolved(state, "dwpose_embedding", POSES, torch.cat([poses[:, :1], poses[:, :1], poses[:, :1], poses], dim=1))


# --- the encoders ---------------------------------------------------------------------------------------------------------


def test_the_released_tensors_are_those_of_the_table():
    released = PoseDims().shapes(5120)
    expected = {}
    for name, layers in (("dwpose_embedding", POSES), ("randomref_embedding_pose", PICTURE)):
        for i, (shape, *_) in layers.items():
            expected |= {f"{name}.{i}.weight": shape, f"{name}.{i}.bias": shape[:1]}
    assert released == expected
    dims = DiTDims.of_task(SPEC)
    assert dims.pose == PoseDims() and set(dit_shapes(dims)) == {*dit_shapes(DiTDims.of_task(TASKS["i2v-14B"])), *expected}
    assert DiTDims.of_shapes(dit_shapes(WITH_POSES), {}).pose == WITH_POSES.pose
    assert not any(map(stays_fp32, expected))


def test_flops_are_those_of_the_convolutions(monkeypatch):
    counted = []

    def counting(convolve):
        def counted_(x, weight, *others):
            y = convolve(x, weight, *others)
            counted.append(2 * y.numel() * weight[0].numel())
            return y

        return counted_

    shape, dims = (16, 3, 6, 8), WITH_POSES
    monkeypatch.setattr(F, "conv3d", counting(F.conv3d))
    monkeypatch.setattr(F, "conv2d", counting(F.conv2d))
    state, blank = pose_state(128), Inputs.blank(dims, shape)
    tokens_of(state, blank.pose)
    convolved(state, "randomref_embedding_pose", PICTURE, blank.pose_image)
    assert dit_inputs_flops(dims, shape) - dit_inputs_flops(replace(dims, pose=None), shape) == sum(counted)


def model_and_inputs(frames=9):
    draw = torch.Generator().manual_seed(1)
    plain, model = (random_dit(replace(WITH_POSES, pose=pose)) for pose in (None, PoseDims()))
    poses = pose_state(128)
    model.load_state_dict({**plain.state_dict(), **poses})
    T = (frames + 3) // 4
    inputs = Inputs(
        channels=torch.randn(20, T, 6, 8, generator=draw),
        image=torch.randn(1, 257, WITH_POSES.image_dim, generator=draw),
        pose=torch.rand(3, frames, 48, 64, generator=draw),
        pose_image=torch.rand(3, 48, 64, generator=draw),
    )
    return plain, model, poses, inputs, torch.randn(1, 16, T, 6, 8, generator=draw), [torch.randn(7, 64, generator=draw)]


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("fields", [("pose", "pose_image"), ("pose",), ("pose_image",), ()])
@torch.inference_mode()
def test_a_forward(frames, fields, monkeypatch):
    """Tokens of poses are added behind the patch embedding, the picture's pose to the channels that follow the noisy ones."""
    plain, model, poses, inputs, x, text = model_and_inputs(frames)
    given = replace(inputs, **dict.fromkeys({"pose", "pose_image"} - {*fields}))
    timestep = torch.tensor([[700.0]])
    actual = model(x, timestep, model.prepare(text, grid_of(x.shape), given))
    channels, embed = inputs.channels, plain.embed
    if "pose_image" in fields:
        channels = channels + convolved(poses, "randomref_embedding_pose", PICTURE, inputs.pose_image)[0][:, None]
    if "pose" in fields:
        added = tokens_of(poses, inputs.pose).flatten(2).transpose(1, 2)
        monkeypatch.setattr(plain, "embed", lambda *given: embed(*given) + added)
    context = plain.prepare(text, grid_of(x.shape), replace(inputs, channels=channels, pose=None, pose_image=None))
    assert relative_error(actual, plain(x, timestep, context)) < 2e-6


@torch.inference_mode()
def test_what_both_branches_share_is_made_once(monkeypatch):
    _, model, _, inputs, x, text = model_and_inputs()
    calls = []

    def made(encoder, pixels):
        calls.append(pixels.shape)
        return encoder(pixels[None])

    monkeypatch.setattr("wan_fast.adapters.pose._made", made)
    one = model.prepare(text, grid_of(x.shape), inputs)
    two = model.prepare(text, grid_of(x.shape), replace(inputs, pose=None), like=one)
    three = model.prepare(text, grid_of(x.shape), inputs, like=one)
    assert len(calls) == 2 and two.given.added is None
    assert two.channels is one.channels is three.channels and three.given.added is one.given.added
    another = model.prepare(text, grid_of(x.shape), replace(inputs, pose_image=1 - inputs.pose_image), like=one)
    assert len(calls) == 3 and not torch.equal(another.channels, one.channels)
    # all that depends on the clip
    assert {id(one.given.added), id(one.given.channels)} <= {id(tensor) for tensor in one.tensors()}


@torch.inference_mode()
def test_the_next_clip_begins_in_the_same_memory():
    """What it is given is where a graph reads it, in the contexts that there are and in one that is made later."""
    _, model, _, inputs, x, text = model_and_inputs()
    step, *_ = step_plan(SPEC, official("euler", 4, 5.0), (1.5, 1.5))
    alone = replace(step, unconditional="none")
    texts = {"conditional": text[0], "unconditional": 2 * text[0]}

    def by_branch(inputs):
        return {"conditional": inputs, "unconditional": replace(inputs, pose=None)}

    other = by_branch(
        replace(inputs, channels=-inputs.channels, pose=1 - inputs.pose, pose_image=1 - inputs.pose_image, image=-inputs.image)
    )
    fresh = Branches([step], lambda name: model, texts, 0, torch.device("cpu"), inputs=other)
    expected = fresh(step, x[0])
    for before in (step, alone):
        branches = Branches([step], lambda name: model, texts, 0, torch.device("cpu"), inputs=by_branch(inputs))
        branches(before, x[0])
        branches.start([step], texts, other)
        for actual, wanted in zip(branches(step, x[0]), expected, strict=True):
            assert relative_error(actual, wanted) < 2e-6


# --- its file -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("native"), "i2v-14B", width=128)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name, frame in zip(("picture", "pose"), noise(2, SIZE[1], SIZE[0], seed=1), strict=True):
        Image.fromarray(frame).save(folder / f"{name}.png")
    write_clip(folder / "poses.mkv", noise(FRAMES + 2, SIZE[1], SIZE[0]), rate=20)
    write_clip(folder / "wide.mkv", noise(7, 32, 96), rate=20)
    return folder


def config_of(native, file, **given):
    return EngineConfig(task="unianimate-14B", checkpoint=str(native), unianimate=str(file), device="cpu", **given)


@pytest.mark.parametrize(
    ("suffix", "prefix", "rank", "dtype"),
    [
        (".ckpt", "pipe.dit.", 4, torch.float32),
        (".ckpt", "pipe.dit.", 8, torch.bfloat16),
        (".safetensors", "", 8, torch.float16),
        (".safetensors", "diffusion_model.", 4, torch.bfloat16),
    ],
)
def test_what_is_loaded(native, tmp_path, suffix, prefix, rank, dtype):
    file = write_file(tmp_path / f"UniAnimate{suffix}", WITH_POSES, rank, prefix, dtype)
    engine = Engine(config_of(native, file))
    loaded = {name: tensor.clone() for name, tensor in engine.models["model"].state_dict().items()}
    base = load_file(native / "diffusion_pytorch_model.safetensors")
    factors, poses = lora_state(dit_shapes(WITH_POSES), rank, "", dtype), pose_state(128, dtype=dtype)
    assert set(loaded) == {*base, *poses}
    for name, tensor in loaded.items():
        expected = base.get(name, poses.get(name)).float()
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in factors:
            up, down = (factors[f"{module}.lora_{letter}.default.weight"].float() for letter in "BA")
            expected = expected + up @ down
        assert tensor.dtype == torch.float32 and torch.allclose(tensor, expected, atol=1e-6)
    # as a LoRA it stays when others come and go
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.self_attn.q.diff_b": torch.ones(128)}, other)
    engine.set_loras([f"{other}:0.5"])
    bias = "blocks.0.self_attn.q.bias"
    now = engine.models["model"].state_dict()
    assert {name for name, tensor in now.items() if not torch.equal(tensor, loaded[name])} == {bias}
    assert torch.allclose(now[bias], loaded[bias] + 0.5)
    engine.set_loras([])
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in engine.models["model"].state_dict().items())


def test_what_is_told_of_it(native, media, tmp_path, capsys):
    file = write_file(tmp_path / "UniAnimate.ckpt", WITH_POSES)
    opened = open_configured(config_of(native, file))
    poses = {name for name, info in opened.experts["model"].tensors.items() if info.file == file}
    assert poses == set(pose_state(128))
    assert opened.num_bytes == open_configured(EngineConfig(task="i2v-14B", checkpoint=str(native))).num_bytes + sum(
        4 * tensor.numel() for tensor in pose_state(128).values()
    )
    request = Request(prompt="x", image=str(media / "picture.png"), pose_video=str(media / "poses.mkv"), num_frames=FRAMES)
    todo = wan_fast.plan(config_of(native, file), request)
    assert todo.loras == ("UniAnimate.ckpt at strength 1: changes 20 tensors",)
    plain = wan_fast.plan(
        EngineConfig(task="i2v-14B", checkpoint=str(native), device="cpu"),
        Request(prompt="x", image=str(media / "picture.png")),
    )
    assert todo.memory.weights["DiT"] - plain.memory.weights["DiT"] == sum(4 * t.numel() for t in pose_state(128).values())
    with pytest.raises(WanFastError, match="looks like a UniAnimate file; give it as --unianimate_ckpt"):
        describe_file(file)
    merged = tmp_path / "merged.safetensors"
    save_file({**load_file(native / "diffusion_pytorch_model.safetensors"), **pose_state(128)}, merged)
    assert describe_file(merged)["fits"] == ["unianimate-14B"]
    # encoders in the model's own file need no other
    again = replace(config_of(native, file), unianimate=None, dit=str(merged))
    assert wan_fast.plan(again, request).loras == ()
    with pytest.raises(WanFastError, match="the DiT has encoders of poses already; leave the file out"):
        wan_fast.plan(replace(again, unianimate=str(file)), request)


def more(name):
    return {"more": {name: torch.ones(2)}}


# what the file is, and what is said of it
BAD = {
    "no file": (None, "--unianimate_ckpt '{}' is not a file; check the path"),
    "no poses": (dict(less=tuple(pose_state(128))), "holds no encoders of poses; take UniAnimate-Wan2.1-14B-Lora-12000.ckpt"),
    "part of the poses": (dict(less=("dwpose_embedding.8.bias",)), "1 missing: dwpose_embedding.8.bias"),
    "a shape": (dict(more={"dwpose_embedding.8.bias": torch.ones(5)}), "dwpose_embedding.8.bias is [5], expected [16]"),
    "inpainting": (more("inpaint_embedding.0.weight"), "it is UniAnimate's for inpainting, which this version does not run"),
    "also inpainting": (more("learn_in_embedding.0.weight"), "--unianimate_ckpt '{}' has 1 key without a place in this model"),
    "another model": (dict(dims=replace(WITH_POSES, ffn_dim=64)), "--unianimate_ckpt '{}' is a LoRA of another model"),
    "half a pair": (
        dict(less=("pipe.dit.blocks.0.self_attn.q.lora_A.default.weight",)),
        "has only up for blocks.0.self_attn.q.weight",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file(case, native, media, tmp_path, capsys):
    how, says = BAD[case]
    file = tmp_path / "UniAnimate.ckpt"
    if how is not None:
        write_file(file, **({"dims": WITH_POSES} | how))
    words = ["--task", "unianimate-14B", "--ckpt_dir", str(native), "--unianimate_ckpt", str(file), "--device", "cpu"]
    given = ["--image", str(media / "picture.png"), "--pose_video", str(media / "poses.mkv"), "--frame_num", "9"]
    assert main(["plan", *words, *given]) == 2
    err = capsys.readouterr().err
    assert says.format(file) in err and err.count("\n") == 1


def test_given_elsewhere(native, media, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    file = write_file(tmp_path / "UniAnimate.safetensors", WITH_POSES)
    given = ["--image", str(media / "picture.png"), "--prompt", "x", "--frame_num", "9"]
    i2v, own = (
        ["plan", *given, "--device", "cpu", "--ckpt_dir", str(native), "--task", t] for t in ("i2v-14B", "unianimate-14B")
    )
    wanted = "task unianimate-14B needs --unianimate_ckpt, got none; add --unianimate_ckpt FILE, which is in ZheWang123/"
    poses = ["--pose_video", str(media / "poses.mkv")]
    for words, says in (
        ([*i2v, "--lora", str(file)], "probably it is UniAnimate's; give it as --unianimate_ckpt, with --task unianimate-14B"),
        ([*i2v, "--unianimate_ckpt", str(file)], "task i2v-14B takes no --unianimate_ckpt"),
        ([*i2v, "--dit", str(file)], "looks like a UniAnimate file; give it as --unianimate_ckpt"),
        ([*i2v, *poses], "task i2v-14B takes no --pose_video"),
        ([*own, *poses], wanted),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err
    assert main(["plan", "--task", "unianimate-14B", "--on", "h200", *given, *poses]) == 0
    assert f"warning     {wanted}" in capsys.readouterr().out
    with pytest.raises(WanFastError, match=re.escape(wanted)):
        Engine(EngineConfig(task="unianimate-14B", device="cpu"))


# --- what is asked for ----------------------------------------------------------------------------------------------------


def framed(media, num_frames=None, **given):
    files = {"image": "picture.png", "pose_video": "poses.mkv"} | given
    request = Request(prompt="x", size=SIZE, num_frames=num_frames, **{name: str(media / file) for name, file in files.items()})
    return FRAME["poses"](resolve(SPEC, request), SPEC, request)


def test_what_the_task_is(media):
    todo = resolve(SPEC, Request(image=str(media / "picture.png"), pose_video=str(media / "poses.mkv")))
    assert (todo.solver, todo.num_steps, todo.shift, todo.guidance_scale) == ("euler", 50, 5.0, (1.5, 1.5))
    assert (todo.prompt, todo.num_frames, todo.size) == ("a person is dancing", 81, (832, 480))
    assert todo.negative_prompt == TASKS["i2v-14B"].negative_prompt


def test_a_frame_for_each_pose(media):
    made = framed(media, 5, pose_image="pose.png")
    assert (made.size, made.num_frames, made.frames, made.fps, made.note) == (SIZE, 5, (0, 1, 2, 3, 4), 20, "")
    # as long as the poses last, where no length is asked for
    made = framed(media)
    assert made.num_frames == 9 and made.note == (
        "--pose_video has 11 frames, enough for 9; without --pose_image the model does not know the picture's own pose, from "
        "which the clip goes on"
    )
    with pytest.raises(WanFastError, match="--pose_video has 11 frames, --frame_num asks for 13; take 9, or a longer video"):
        framed(media, 13)
    stretched = framed(media, 5, pose_video="wide.mkv", pose_image="pose.png").note
    assert stretched == "--pose_video of 96x32 is stretched to the clip's shape, 64x48"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--image {0}/picture.png", "task unianimate-14B needs --pose_video, got none"),
        ("--pose_video {0}/poses.mkv", "task unianimate-14B needs --image, got none"),
        ("--image {0}/picture.png --pose_video {0}/picture.png", "is a picture"),
        ("--image {0}/picture.png --pose_video {0}/poses.mkv --pose_image {0}/poses.mkv", "is no picture"),
        ("--image {0}/picture.png --pose_video {0}/poses.mkv --pose_image {0}/none.png", "is not a file; check the path"),
        ("--image {0}/picture.png --pose_video {0}/poses.mkv --image_guidance_scale 2", "takes no --sample_guide_scale_img"),
    ],
)
def test_refused_in_one_line(words, says, media, capsys):
    assert main(["plan", "--task", "unianimate-14B", "--on", "h200", *shlex.split(words.format(media))]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


class Seen:
    def encode_text(self, texts):
        return {name: torch.zeros(2, 64) for name in texts}

    def encode_image(self, pictures):
        return torch.zeros(1, 257, 160)

    def encode_video(self, chunks, num_frames):
        assert sum(chunk.shape[1] for chunk in chunks) == num_frames
        return torch.zeros(16, (num_frames + 3) // 4, SIZE[1] // 8, SIZE[0] // 8)


@pytest.mark.parametrize("pose_image", [None, "wide.png"])
def test_poses_are_pixels_of_the_clips_size(media, pose_image):
    Image.fromarray(noise(1, 32, 96)[0]).save(media / "wide.png")
    given = {} if pose_image is None else {"pose_image": str(media / pose_image)}
    request = resolve(
        SPEC, Request(size=SIZE, num_frames=5, image=str(media / "picture.png"), pose_video=str(media / "wide.mkv"), **given)
    )
    framing = FRAME["poses"](request, SPEC, request)
    made = PREPARE["poses"](request, framing, Seen())(framing.clips[0], None)
    frames = torch.from_numpy(noise(7, 32, 96)[:5]).permute(0, 3, 1, 2)
    expected = F.interpolate(frames.float(), size=(48, 64), mode="bilinear", antialias=True).transpose(0, 1) / 255
    assert made.inputs.pose.shape == (3, 5, 48, 64) and (made.inputs.pose - expected).abs().max() < 1.01 / 255
    without = made.by_branch["unconditional"]
    assert without.pose is None and without.pose_image is made.inputs.pose_image and without.channels is made.inputs.channels
    assert (made.inputs.pose_image is None) == (pose_image is None)
    if pose_image:
        picture = torch.from_numpy(np.array(Image.open(media / "wide.png"))).permute(2, 0, 1)[None]
        scaled = F.interpolate(picture.float(), size=(48, 64), mode="bilinear", antialias=True)[0] / 255
        assert (made.inputs.pose_image - scaled).abs().max() < 1.01 / 255


# --- a whole video --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_diffusers(pipe, request, poses, clip_tokens):
    """Euler over the official grid, with the LoRA in the transformer already."""
    (width, height), vae, count = request.size, pipe.vae, request.num_frames
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    picture = torch.from_numpy(np.array(Image.open(request.image))).permute(2, 0, 1).float() / 127.5 - 1
    known = F.interpolate(picture[None], size=(height, width), mode="bicubic")[:, :, None]
    grey = torch.cat([known, torch.zeros(1, 3, count - 1, height, width)], dim=2)
    latents = (vae.encode(grey).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    y = torch.cat([mask, latents], dim=1)
    if request.pose_image:
        own = torch.from_numpy(np.array(Image.open(request.pose_image))).permute(2, 0, 1).float() / 255
        y = y + convolved(poses, "randomref_embedding_pose", PICTURE, own)[:, :, None]
    clip = torch.from_numpy(noise(FRAMES + 2, height, width)[:count]).permute(3, 0, 1, 2).float() / 255
    followed = tokens_of(poses, clip)
    prompt, negative = pipe.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=512)
    x = torch.randn(*latents.shape[1:], generator=torch.Generator().manual_seed(request.seed))[None]
    sigmas = [5 * s / (1 + 4 * s) for s in (1 - i / request.num_steps for i in range(request.num_steps))] + [0.0]
    assert sigmas == pytest.approx(sigma_grid("euler", request.num_steps, 5.0))

    def velocity(text, added):
        hook = pipe.transformer.patch_embedding.register_forward_hook(lambda module, args, out: out + added)
        at = torch.tensor([1000 * sigma])
        v = pipe.transformer(torch.cat([x, y], dim=1), at, text, clip_tokens, return_dict=False)[0]
        hook.remove()
        return v

    for sigma, following in pairwise(sigmas):
        conditional, unconditional = velocity(prompt, followed), velocity(negative, 0)
        x = x + (following - sigma) * (unconditional + 1.5 * (conditional - unconditional))
    return x[0], vae.decode(x * std + mean, return_dict=False)[0][0].clamp(-1, 1)


@pytest.mark.parametrize("pose_image", [True, False])
def test_a_video_equals_diffusers(diffusers_pipe, media, pose_image):
    from test_image_tasks import clip_tokens

    pipe, folder, file = diffusers_pipe
    request = Request(
        prompt="a red ball", negative_prompt="blurry", image=str(media / "picture.png"), pose_video=str(media / "poses.mkv"),
        pose_image=str(media / "pose.png") if pose_image else None, size=SIZE, num_frames=FRAMES, num_steps=STEPS, seed=3,
    )  # fmt: skip
    config, chunks = config_of(folder, file), []
    video = Engine(config).generate(request, on_frames=lambda chunk: chunks.append(chunk.clone()))
    with torch.no_grad():
        tokens = clip_tokens(pipe, [request.image])
    latents, frames = by_diffusers(pipe, request, pose_state(128), tokens)
    assert relative_error(video.latents, latents) < 1e-4
    assert relative_error(torch.cat(chunks, dim=1), frames) < 1e-4
    assert video.fps == 20


@pytest.fixture(scope="module")
def diffusers_pipe(tmp_path_factory):
    """A small I2V pipeline, the folder with it as it was before the LoRA came into it, and UniAnimate's file."""
    diffusers = pytest.importorskip("diffusers")
    from test_image_tasks import build

    from wan_fast.checkpoint import locate

    base = diffusers.WanPipeline.from_pretrained(locate("tiny", TASKS["ti2v-5B"]), torch_dtype=torch.float32)
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("unianimate")
    pipe = build("i2v-14B", base)
    pipe.save_pretrained(folder / "base")
    part = open_dit(folder / "base" / "transformer")
    dims = replace(DiTDims.of_shapes(part.shapes, part.config), pose=PoseDims())
    file = write_file(folder / "UniAnimate.ckpt", dims)
    factors, modules = lora_state(dit_shapes(dims), prefix=""), dict(pipe.transformer.named_modules())
    with torch.no_grad():
        for name in (f"blocks.{i}.{target}" for i in range(2) for target in TARGETS):
            called = name.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("ffn.0", "ffn.net.0.proj")
            called = re.sub(r"(?<=attn\d\.)[qkv]$", lambda letter: f"to_{letter[0]}", called.replace("ffn.2", "ffn.net.2"))
            up, down = (factors[f"{name}.lora_{letter}.default.weight"] for letter in "BA")
            modules[re.sub(r"(?<=attn\d\.)o$", "to_out.0", called)].weight += up @ down
    return pipe, folder / "base", file


def test_the_example_is_a_pose_for_every_frame(capsys, tmp_path, native):
    file = write_file(tmp_path / "UniAnimate.ckpt", WITH_POSES)
    words = ["--task", "unianimate-14B", "--ckpt_dir", str(native), "--unianimate_ckpt", str(file), "--device", "cpu"]
    assert main(["plan", *words, "--size", "64*48"]) == 0
    printed = capsys.readouterr().out
    assert "girl.jpg pose.mp4: a person is dancing" in printed and "81 frames at 25 fps; 50 steps of euler, shift 5" in printed
    assert (FOLDER / "pose.mp4").is_file() and "stretched" not in printed


def test_a_part_by_itself_is_a_model_with_poses(native, tmp_path):
    merged = tmp_path / "merged.safetensors"
    save_file({**load_file(native / "diffusion_pytorch_model.safetensors"), **pose_state(128)}, merged)
    part = open_part(merged, "DiT")
    assert DiTDims.of_shapes(part.shapes, part.config).pose == PoseDims()
