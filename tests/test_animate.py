"""Animate: its encoders and its adapter against the document's formulas written out, what a folder of footage is made into, and
the whole against diffusers."""

import json
from dataclasses import replace
from functools import partial

import av
import numpy as np
import pytest
import torch
from clips_of import noise, write_clip, write_folder, write_sound
from models import CLIP, official_grid, random_dit, relative_error, small_dims, write_native
from PIL import Image
from sounds_of import tone
from sounds_of import write_sound as write_samples
from test_manifest import read as released
from torch.nn import functional as F

from wan_fast import manifest
from wan_fast.checkpoint import locate, open_dit
from wan_fast.conditioning import PREPARE
from wan_fast.conditioning.animate import boxed
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.counting import counted
from wan_fast.dit import WanDiT, grid_of
from wan_fast.engine import Engine
from wan_fast.framing import boxed_size, chain, reflected
from wan_fast.inputs import Inputs
from wan_fast.manifest import DiTDims
from wan_fast.manifest.animate import FaceDims
from wan_fast.names import DIT_NAMES, native_name, rules_for
from wan_fast.planning import plan
from wan_fast.tasks import TASKS

TASK, SPEC = "animate-14B", TASKS["animate-14B"]
SIZE = (64, 48)


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_the_model_has_exactly_the_released_tensors_but_for_the_blurs():
    dims, every = DiTDims.of_task(SPEC), released(TASK)
    assert len(every) == 1441 and manifest.num_parameters(every) == 17_274_817_108
    rules = rules_for(every)
    kept = {name: shape for name, shape in every.items() if native_name(name, rules) is not None}
    left = set(every) - set(kept)
    assert len(left) == 14 and {every[name] for name in left} == {(4, 4)}
    with torch.device("meta"):
        built = {name: tuple(tensor.shape) for name, tensor in WanDiT(dims).state_dict().items()}
    assert built == kept == manifest.dit_shapes(dims)
    assert DiTDims.of_shapes(every, {"motion_encoder_dim": 512}) == dims
    with pytest.raises(ValueError, match="motion_encoder_dim is 20, and the motion encoder is 512 wide"):
        DiTDims.of_shapes(every, {"motion_encoder_dim": 20})
    encoder = {name: shape for name, shape in every.items() if name.startswith("motion_encoder.")}
    assert manifest.num_parameters(encoder) == pytest.approx(22.7e6, abs=0.05e6)


def test_diffusers_names_map_to_native_ones_with_keys_and_values_apart():
    theirs = released(f"diffusers/{TASK}")
    mapped = {native_name(name, DIT_NAMES): shape for name, shape in theirs.items()}
    dims = DiTDims.of_shapes(mapped, {})
    assert dims == replace(DiTDims.of_task(SPEC), face=FaceDims(joint=False))
    # they keep the motion encoder's biases without the axes of length 1
    ours = manifest.dit_shapes(dims)
    assert mapped == {name: shape[1:2] if ".net_app." in name and "bias" in name else shape for name, shape in ours.items()}


def test_flops():
    face, shape = FaceDims(), (16, 21, 90, 160)
    assert face.size == 512 and face.inputs(shape) == {"pose": (16, 20, 90, 160), "face": (3, 77, 512, 512)}
    # the blur beside the convolutions is computed where it is looked at: 0.4 GFLOP less than officially
    assert face.frame_flops / 1e9 == pytest.approx(39.3 - 0.4, abs=0.05)
    once = face.inputs_flops(5120, shape)
    assert 77 * face.frame_flops / once == pytest.approx(0.956, abs=0.001)
    assert (face.flops(5120, 75600) + once - 77 * face.frame_flops) / 1e12 == pytest.approx(63.6, abs=0.05)


def test_flops_are_those_of_what_is_computed():
    dims = small_dims(TASK, layers=6)
    with torch.device("meta"), torch.no_grad():
        model, latents = WanDiT(dims), torch.empty(1, 16, 4, 4, 6)
        inputs = Inputs.blank(dims, latents.shape[1:])
        work = counted(lambda: model.adapter.prepare(inputs, torch.empty(1, 1, 256), grid_of(latents.shape), None))
        done = sum(each.flops for each in work.values())
        assert done == pytest.approx(dims.face.inputs_flops(dims.dim, latents.shape[1:]))
        context = model.prepare([torch.empty(1, dims.text_dim)], grid_of(latents.shape), inputs)
        x = torch.empty(1, 24, 256)
        after = model.adapter.begin(x, x, context, 0, False)
        work = counted(lambda: [after(layer, x) for layer in dims.face.layers])
        assert sum(each.flops for each in work.values()) == dims.face.flops(dims.dim, 24)


# --- the adapter ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A model of six layers, of which the first and the last look at a face of three groups of tokens."""
    return random_dit(small_dims(TASK, layers=6), seed=3)


def given(frames=9, grid=(4, 2, 3), faces=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    side = faces // 4  # of blocks, which do not average out
    return Inputs(
        channels=draw(20, grid[0], 2 * grid[1], 2 * grid[2]),
        image=draw(1, 257, CLIP.dim),
        pose=draw(16, grid[0] - 1, 2 * grid[1], 2 * grid[2]),
        face=(torch.rand(3, frames, 4, 4, generator=generator) * 2 - 1).repeat_interleave(side, -1).repeat_interleave(side, -2),
    )


def plain_motion(state, frames):
    """[F, 3, size, size] -> [F, motion_dim], by the document, in fp64."""
    state = {name.removeprefix("motion_encoder."): t.double() for name, t in state.items() if "motion_encoder" in name}

    def conv(x, name, stride=1, padding=0):
        weight = state[f"enc.net_app.convs.{name}.weight"]
        return F.conv2d(x, weight / (weight.shape[1] * weight.shape[2] * weight.shape[3]) ** 0.5, None, stride, padding)

    def act(x, name):
        x = x + state[f"enc.net_app.convs.{name}.bias"]
        return 2**0.5 * torch.where(x < 0, 0.2 * x, x)

    def blur(x, padding):
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
        kernel = (line[:, None] * line / 64).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (padding,) * 4), kernel, groups=x.shape[1])

    x = act(conv(frames.double(), "0.0"), "0.1")
    n = 1
    while f"enc.net_app.convs.{n}.skip.1.weight" in state:
        main = act(conv(x, f"{n}.conv1.0", padding=1), f"{n}.conv1.1")
        main = act(conv(blur(main, 2), f"{n}.conv2.1", stride=2), f"{n}.conv2.2")
        x, n = (main + conv(blur(x, 1), f"{n}.skip.1", stride=2)) / 2**0.5, n + 1
    x = conv(x, str(n)).flatten(1)
    for i in range(5):
        weight = state[f"enc.fc.{i}.weight"]
        x = x @ weight.T / weight.shape[1] ** 0.5 + state[f"enc.fc.{i}.bias"]
    directions = np.linalg.qr(state["dec.direction.weight"].float().numpy() + np.float32(1e-8))[0]
    return x @ torch.from_numpy(directions).double().T


def plain_tokens(state, motion, heads):
    """[F, motion_dim] -> [T, heads + 1, D]."""
    state = {name.removeprefix("face_encoder."): t.double() for name, t in state.items() if "face_encoder" in name}

    def conv(x, name, part=slice(None), stride=1):
        weight, bias = state[f"{name}.conv.weight"][part], state[f"{name}.conv.bias"][part]
        padded = torch.cat([x[:1], x[:1], x])
        steps = range(0, len(x), stride)
        return torch.stack([torch.einsum("kc,ock->o", padded[i : i + 3], weight) for i in steps]) + bias

    def act(x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * torch.sigmoid(x)

    width = state["out_proj.weight"].shape[1]
    tokens = []
    for head in range(heads):
        x = act(conv(motion, "conv1_local", slice(head * width, (head + 1) * width)))
        x = act(conv(act(conv(x, "conv2", stride=2)), "conv3", stride=2))
        tokens.append(x @ state["out_proj.weight"].T + state["out_proj.bias"])
    return torch.stack([*tokens, state["padding_tokens"].flatten().expand_as(tokens[0])], dim=1)


def plain_fuser(state, n, x, face):
    """What is added to x [T, S, D], a latent frame's tokens after the other, of face [T, heads + 1, D]."""
    state = {name.split(f"blocks.{n}.")[-1]: t.double() for name, t in state.items() if f"fuser_blocks.{n}." in name}

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def heads(x, name):
        x = x.unflatten(-1, (-1, 128))
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    D = x.shape[-1]
    both = linear(norm(face), "linear1_kv")
    q, k, v = (
        heads(linear(norm(x), "linear1_q"), "q_norm"),
        heads(both[..., :D], "k_norm"),
        both[..., D:].unflatten(-1, (-1, 128)),
    )
    seen = torch.einsum("tsnk,tfnk->tnsf", q, k).div(128**0.5).softmax(-1)
    return linear(torch.einsum("tnsf,tfnk->tsnk", seen, v).flatten(2), "linear2")


@torch.inference_mode()
def test_the_encoders_are_those_of_the_document(small):
    state, inputs = small.state_dict(), given(frames=9)
    frames = inputs.face.transpose(0, 1)
    motion = plain_motion(state, frames)
    assert motion.shape == (9, 12) and motion.std(0).min() > 0.02
    assert relative_error(small.adapter.motion_encoder(frames), motion) < 2e-6
    tokens = plain_tokens(state, motion, heads=2)
    assert tokens.shape == (3, 3, 256) and (tokens[1] - tokens[2])[:2].std() > 0.05
    assert relative_error(small.adapter.tokens(inputs.face), tokens) < 2e-6


def test_the_directions_have_the_signs_that_lapack_gives(small):
    """Others would turn the motion of a trained model round."""
    weight = small.adapter.motion_encoder.dec["direction"].weight
    coefficients, seen = torch.eye(5), []
    encoder = small.adapter.motion_encoder.enc
    handle = encoder["fc"].register_forward_hook(lambda *_: coefficients)
    seen = small.adapter.motion_encoder(torch.zeros(5, 3, 16, 16)).T
    handle.remove()
    # Householder's: the diagonal of R is of the other sign than what is left of the column
    assert torch.sign((seen * weight)[:, 0].sum()) == -torch.sign(weight[0, 0])
    assert torch.allclose(seen.T @ seen, torch.eye(5), atol=1e-5)


@torch.inference_mode()
def test_the_adapter_adds_poses_and_what_is_seen_of_the_face(small):
    state, inputs, grid = small.state_dict(), given(), (4, 2, 3)
    context = small.prepare([torch.randn(5, 64)], grid, inputs)
    weight, bias = state["pose_patch_embedding.weight"], state["pose_patch_embedding.bias"]
    pose = F.conv3d(inputs.pose[None], weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    added = torch.cat([torch.zeros(1, 6, 256), pose], dim=1)  # none to the reference's frame
    assert torch.allclose(context.given.added, added, atol=1e-5)
    tokens = plain_tokens(state, plain_motion(state, inputs.face.transpose(0, 1)), heads=2)
    tokens = torch.cat([torch.zeros_like(tokens[:1]), tokens])  # zeros of it
    x = torch.randn(1, 24, 256)
    after = small.adapter.begin(x, torch.empty(0), context, 0, False)
    for n, layer in enumerate((0, 5)):
        wanted = plain_fuser(state, n, x.double().view(4, 6, 256), tokens).view(1, 24, 256)
        assert relative_error(after(layer, x), wanted) < 2e-6
    assert small.adapter.layers == {0, 5}


@torch.inference_mode()
def test_the_stream_goes_through_the_adapter(small):
    """The model is one without an adapter, with what the adapter makes added to the embedded tokens and behind its blocks."""
    inputs, grid, text, t = given(), (4, 2, 3), [torch.randn(5, 64)], torch.tensor([[600.0]])
    latents = torch.randn(1, 16, 4, 4, 6)
    context = small.prepare(text, grid, inputs)
    out = small(latents, t, context)
    bare = WanDiT(replace(small.dims, face=None)).requires_grad_(False)
    bare.load_state_dict({name: tensor for name, tensor in small.state_dict().items() if name in bare.state_dict()})
    own = bare.prepare(text, grid, Inputs(channels=inputs.channels, image=inputs.image))
    embed, after = bare.embed, small.adapter.begin(latents, t, context, 0, False)
    bare.embed = lambda latents, context: embed(latents, context) + small.prepare(text, grid, inputs).given.added
    for layer in (0, 5):

        def hook(module, args, y, layer=layer):
            x, _, table = args[:3]
            x.addcmul_(y, table[:, :, 5])
            return after(layer, x) / table[:, :, 5]

        bare.blocks[layer].register_forward_hook(hook)
    assert relative_error(bare(latents, t, own), out) < 5e-6
    without = replace(inputs, face=torch.full_like(inputs.face, -1.0))
    assert relative_error(small(latents, t, small.prepare(text, grid, without)), out) > 1e-3


@torch.inference_mode()
def test_all_but_attention_is_computed_once_for_both_branches(small):
    inputs, grid, seen = given(frames=13, grid=(5, 2, 3)), (5, 2, 3), []
    hooks = [small.adapter.motion_encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))]
    hooks += [small.adapter.pose_embedding.register_forward_hook(lambda *_: seen.append("pose"))]
    hooks += [block.linear1_kv.register_forward_hook(lambda *_: seen.append("kv")) for block in small.adapter.blocks]
    text = [torch.randn(5, 64)]
    context = small.prepare(text, grid, inputs)
    assert seen == [8, 5, "kv", "kv"]
    small(torch.randn(1, 16, 5, 4, 6), torch.tensor([[600.0]]), context)
    again = small.prepare(text, grid, like=context)
    assert seen == [8, 5, "kv", "kv"] and again.given == context.given
    seen.clear()
    still = replace(inputs, face=torch.tensor(-1.0).expand(3, 13, 16, 16))
    other = small.prepare(text, grid, still, like=context)
    assert seen == [1, "kv", "kv"] and other.given.added is context.given.added
    seen.clear()
    each = small.prepare(text, grid, replace(inputs, face=torch.full((3, 13, 16, 16), -1.0)))
    assert seen == [8, 5, "kv", "kv"]
    for (one,), (all_of_them,) in zip(other.given.keys_values, each.given.keys_values, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, all_of_them, strict=True))
    moved = small.prepare(text, grid, replace(inputs, pose=inputs.pose + 1), like=context)
    assert moved.given.keys_values is context.given.keys_values
    assert not torch.equal(moved.given.added, context.given.added)
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def test_a_batch_is_one_by_one(small):
    inputs, x, t = given(), torch.randn(2, 16, 4, 4, 6), torch.tensor([[600.0], [20.0]])
    text = [torch.randn(5, 64), torch.randn(9, 64)]
    together = small(x, t, small.prepare(text, (4, 2, 3), inputs))
    for i in range(2):
        alone = small(x[i : i + 1], t[i : i + 1], small.prepare(text[i : i + 1], (4, 2, 3), inputs))
        assert relative_error(together[i : i + 1], alone) < 1e-5


@torch.inference_mode()
def test_faces_of_another_size_are_scaled(small):
    face = given(faces=32).face
    smaller = F.interpolate(face.transpose(0, 1), size=(16, 16), mode="bilinear", antialias=True).transpose(0, 1)
    assert torch.equal(small.adapter.tokens(face), small.adapter.tokens(smaller))


@torch.inference_mode()
def test_bf16_is_near_and_norms_stay_in_fp32(small):
    model = random_dit(small.dims, seed=3)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if manifest.stays_fp32(name) else torch.bfloat16)
    block, context = model.adapter.blocks[0], model.prepare([torch.randn(5, 64)], (4, 2, 3), given())
    assert block.q_norm.weight.dtype == block.k_norm.weight.dtype == torch.float32
    assert block.linear2.weight.dtype == model.adapter.motion_encoder.dec["direction"].weight.dtype == torch.bfloat16
    ((k, v),) = context.given.keys_values[0]
    assert k.dtype == v.dtype == context.given.added.dtype == torch.bfloat16
    exact = small.prepare([torch.randn(5, 64)], (4, 2, 3), given()).given.keys_values[0][0]
    assert 1e-4 < relative_error(v, exact[1]) < 5e-2
    out = model.adapter.begin(k, k, context, 0, False)(0, torch.randn(1, 24, 256))
    assert out.dtype == torch.bfloat16 and out.shape == (1, 24, 256)


# --- what a folder is made into -------------------------------------------------------------------------------------------


def planned(folder, **changes):
    config = {name: changes.pop(name) for name in ("use_relighting_lora", "checkpoint", "dit") if name in changes}
    request = Request(src_root_path=str(folder), seed=0, **changes)
    return plan(EngineConfig(task=TASK, device="cpu", vram=2**60, **config), request)


class Encoders:
    """Stand-ins: a latent frame is the mean colour of its cells in one of its frames, and of the whole video."""

    def encode_text(self, texts):
        self.texts = texts
        return {name: torch.zeros(3, 8) for name in texts}

    def encode_image(self, pictures):
        (self.picture,) = pictures
        return torch.zeros(1, 257, 160)

    def encode_video(self, chunks, num_frames):
        chunks = [chunk.clone() for chunk in chunks]
        assert [chunk.shape[1] for chunk in chunks] == [1] + [4] * ((num_frames - 1) // 4)
        return latents_of(torch.cat(chunks, dim=1))


def latents_of(video):
    pooled = F.avg_pool2d(video[:, ::4].transpose(0, 1), 8).transpose(0, 1) + video.mean()
    return pooled.repeat(6, 1, 1, 1)[:16]


def plain(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(3, 0, 1, 2).float() / 127.5 - 1


def back_and_forth(count, length):
    """As the document says: the frames are gone through to the end, back to the first, and so on."""
    order, index, step = [], 0, 1
    while len(order) < length:
        order.append(index)
        if not 0 <= index + step < count:
            step = -step
        index = index + step if count > 1 else 0
    return order


@pytest.mark.parametrize("replacing", [False, True], ids=["animate", "replace"])
@pytest.mark.parametrize(("count", "length", "history"), [(11, 9, 1), (20, 9, 5), (3, 9, 1), (9, 9, 5)])
def test_clips_are_conditioned_as_in_the_document(tmp_path, replacing, count, length, history):
    clips = write_folder(tmp_path, count)
    options = {"replace_flag": replacing, "refert_num": history, "num_frames": length, "guidance_scale": 2.0}
    todo, encoders = planned(tmp_path, **options), Encoders()
    prepared = PREPARE["animate"](todo.request, todo.framing, encoders)
    assert encoders.texts["conditional"] == "视频中的人在做动作" and "unconditional" in encoders.texts
    reference = plain(np.array(Image.open(tmp_path / "src_ref.png"))[None])
    assert torch.allclose(encoders.picture, reference[:, 0], atol=1e-6)
    order, before = back_and_forth(count, 100), None
    assert len(todo.framing.clips) == max(1, -(-(count - history) // (length - history)))
    for number, segment in enumerate(todo.framing.clips):
        frames = order[number * (length - history) :][:length]
        made = prepared(segment, before)
        known = torch.zeros(length, 6, 8)
        content = torch.zeros(3, length, 48, 64)
        if replacing:
            known = 1 - torch.from_numpy(clips["mask"][frames][:, ::8, ::8, 0]).float() / 255
            content = plain(clips["bg"][frames])
        if before is not None:
            known[:history], content[:, :history] = 1, before
        packed = torch.stack(
            [known[max(0, 4 * t - 3 + c)] if t else known[0] for t in range(length // 4 + 1) for c in range(4)]
        )
        packed = packed.view(-1, 4, 6, 8).transpose(0, 1)
        mask, latents = made.inputs.channels.split([4, 16])
        assert (mask[:, 0] == 1).all() and torch.equal(mask[:, 1:], packed)
        assert torch.allclose(latents, torch.cat([latents_of(reference), latents_of(content)], dim=1), atol=1e-5)
        assert torch.allclose(made.inputs.pose, latents_of(plain(clips["pose"][frames])), atol=1e-5)
        assert torch.allclose(made.inputs.face, plain(clips["face"][frames]), atol=1e-6)
        null = made.by_branch["unconditional"]
        assert null.face.shape == made.inputs.face.shape and (null.face == -1).all() and null.face.stride(1) == 0
        assert null.pose is made.inputs.pose and null.channels is made.inputs.channels and null.image is made.inputs.image
        before = torch.rand(3, history, 48, 64, generator=torch.Generator().manual_seed(number)) * 2 - 1


def test_without_guidance_there_is_one_branch_and_a_prompt_that_is_given_is_taken(tmp_path):
    write_folder(tmp_path, 5)
    todo, encoders = planned(tmp_path, num_frames=5, prompt="a cat"), Encoders()
    made = PREPARE["animate"](todo.request, todo.framing, encoders)(todo.framing.clips[0], None)
    assert encoders.texts == {"conditional": "a cat"} and not made.others
    assert all(step.unconditional == "none" for step in todo.steps) and len(todo.steps) == 20


def test_only_the_frames_of_a_clip_are_held(tmp_path, monkeypatch):
    from wan_fast.conditioning import animate

    write_folder(tmp_path, 30)
    asked = []
    real = animate.read_frames
    monkeypatch.setattr(animate, "read_frames", lambda video, wanted: asked.append(wanted) or real(video, wanted))
    todo = planned(tmp_path, num_frames=9)
    prepared = PREPARE["animate"](todo.request, todo.framing, Encoders())
    assert not asked
    for segment in todo.framing.clips:
        prepared(segment, None)
    assert len(todo.framing.clips) == 4 and max(map(len, asked)) == 9
    assert asked[-1] == list(range(24, 30))  # 24 .. 29, and back


@pytest.mark.parametrize("count", [1, 2, 3, 7, 77, 78, 200])
@pytest.mark.parametrize(("length", "history"), [(77, 1), (77, 5), (9, 5), (5, 1)])
def test_the_chain_is_the_official_one(count, length, history):
    clips = chain(count, length, history)
    rest = (count - history) % (length - history)
    target = count + (length - history - rest if rest else 0)
    starts = [start for start in range(0, 10**4, length - history) if start + history < target] or [0]
    assert [clip.start for clip in clips] == starts and [clip.index for clip in clips] == list(range(len(clips)))
    made = [clip.start + clip.skip + i for clip in clips for i in range(clip.count)]
    assert made == list(range(count))
    assert all(clip.offset == clip.start + clip.skip and clip.skip == (history if clip.index else 0) for clip in clips)
    assert reflected(0, 3 * count, count) == back_and_forth(count, 3 * count)


@pytest.mark.parametrize("picture", [SIZE, (100, 40), (30, 90), (64, 90), (128, 96), (1, 40)])
def test_the_picture_is_whole_on_black(picture):
    pixels = np.random.default_rng(0).integers(1, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    made = boxed(Image.fromarray(pixels), SIZE)
    scale = min(64 / picture[0], 48 / picture[1])
    columns, rows = boxed_size(picture, SIZE)
    assert abs(columns - picture[0] * scale) < 1 and abs(rows - picture[1] * scale) < 1
    assert columns == 64 or rows == 48
    # bilinear by its definition: half-pixel centres, the edge repeated, rounded to 8 bits
    at = [((torch.arange(n) + 0.5) * of / n - 0.5).clamp(0, of - 1) for n, of in ((rows, picture[1]), (columns, picture[0]))]
    (y, x), image = at, torch.from_numpy(pixels).double()
    low, right = (torch.clamp(a.floor().long() + 1, max=of - 1) for a, of in zip(at, (picture[1], picture[0]), strict=True))
    high, left = y.floor().long(), x.floor().long()
    wy, wx = (y - high).double()[:, None, None], (x - left).double()[None, :, None]
    top, bottom = (image[r][:, left] * (1 - wx) + image[r][:, right] * wx for r in (high, low))
    scaled = top * (1 - wy) + bottom * wy
    canvas = torch.zeros(48, 64, 3, dtype=torch.float64)
    down, across = (48 - rows) // 2, (64 - columns) // 2
    canvas[down : down + rows, across : across + columns] = scaled
    error = ((made.permute(1, 2, 0).double() + 1) * 127.5 - canvas).abs()
    assert error.max() < 0.51 and made[:, down : down + rows, across : across + columns].gt(-1).all()
    assert torch.allclose((made + 1) * 127.5, ((made + 1) * 127.5).round(), atol=1e-4)


# --- plans ----------------------------------------------------------------------------------------------------------------


def test_the_folder_says_size_length_rate_and_sound(tmp_path):
    write_folder(tmp_path, 11, rate=25, sound=("face", "bg"))
    todo = planned(tmp_path, num_frames=9)
    assert todo.request.size == SIZE and todo.request.num_frames == 11 and todo.request.fps == 25
    assert todo.framing.sound == tmp_path / "src_face.mp4"
    assert todo.latent_shape == (16, 1 + 3, 6, 8) and todo.framing.leading == 1 and todo.framing.history == 1
    assert todo.framing.noises == ("noise_0", "noise_1")
    assert not any("src_pose" in warning for warning in todo.warnings)
    write_sound(tmp_path / "song.flac", cover=False)
    todo = planned(tmp_path / "src_pose.mp4", audio=str(tmp_path / "song.flac"), fps=12, size=SIZE, refert_num=5)
    assert todo.framing.sound == tmp_path / "song.flac" and todo.request.fps == 12 and todo.framing.history == 5
    assert todo.latent_shape == (16, 1 + 20, 6, 8) and todo.framing.clips[0].count == 11
    assert any("src_pose.mp4 has 11 frames, a clip 77; --frame_num 13 is as many" in warning for warning in todo.warnings)
    for name in ("face", "bg"):
        write_clip(tmp_path / f"src_{name}.mp4", noise(11, 32, 32))
    assert planned(tmp_path).framing.sound is None


def cut_in_half(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


BAD = {
    "no folder": (lambda folder: {"src_root_path": str(folder / "none")}, "none' is not a folder; check the path"),
    "no poses": (lambda folder: (folder / "src_pose.mp4").unlink(), "has no src_pose.mp4; give the folder"),
    "no face": (lambda folder: (folder / "src_face.mp4").unlink(), "has no src_face.mp4"),
    "no picture": (lambda folder: (folder / "src_ref.png").unlink(), "has no src_ref.png"),
    "no mask": (
        lambda folder: (folder / "src_mask.mp4").unlink() or {"replace_flag": True},
        "has no src_mask.mp4; .*, or leave out --replace_flag",
    ),
    "no background": (lambda folder: (folder / "src_bg.mp4").unlink() or {"replace_flag": True}, "has no src_bg.mp4"),
    "broken": (lambda folder: (folder / "src_face.mp4").write_bytes(b"x" * 99) and {}, "src_face.mp4' is no whole video"),
    "broken picture": (lambda folder: (folder / "src_ref.png").write_bytes(b"x") and {}, "src_ref.png' is no picture"),
    "empty": (lambda folder: (folder / "src_pose.mp4").write_bytes(b"") or {}, "src_pose.mp4' is an empty file"),
    "lengths": (
        lambda folder: write_folder(folder, 5, face_frames=4) and {},
        "src_face.mp4 has 4 frames, src_pose.mp4 5 frames; run the preprocessing again",
    ),
    "length of the mask": (
        lambda folder: write_folder(folder, 5, mask_frames=4) and {"replace_flag": True},
        "src_mask.mp4 has 4 frames, src_pose.mp4 5 frames",
    ),
    "sizes": (
        lambda folder: write_folder(folder, 5, bg_size=(48, 48)) and {"replace_flag": True},
        "src_bg.mp4 has 48x48 pixels, src_pose.mp4 64x48 pixels",
    ),
    "size of the mask": (
        lambda folder: write_folder(folder, 5, mask_size=(128, 96)) and {"replace_flag": True},
        "src_mask.mp4 has 128x96 pixels, src_pose.mp4 64x48 pixels",
    ),
    "a face that is no square": (
        lambda folder: write_folder(folder, 5, face_size=(32, 48)) and {},
        "src_face.mp4 has 32x48 pixels, faces are square",
    ),
    "off the grid": (
        lambda folder: write_folder(folder, 5, size=(64, 40)) and {},
        "src_pose.mp4 has 64x40 pixels, not multiples of 16; run",
    ),
    "another size": (lambda folder: {"size": (96, 64)}, r"--size 96\*64 is not that of src_pose.mp4, 64\*48"),
    "a line": (
        lambda folder: write_folder(folder, 5, picture=(1, 2000)) and {},
        "src_ref.png is 1x2000 pixels, of which nothing",
    ),
    "short clips": (lambda folder: {"num_frames": 1}, "--frame_num 1, the frames of a clip, must be more than the 1"),
    "as long as what is taken over": (
        lambda folder: {"num_frames": 5, "refert_num": 5},
        r"--frame_num 5, .* must be more than the 5 that it takes over \(--refert_num\); take 77",
    ),
    "silent": (lambda folder: {"audio": str(folder / "src_pose.mp4")}, "--audio .*src_pose.mp4' holds no sound; give"),
    "no sound file": (lambda folder: {"audio": str(folder / "src_ref.txt")}, "src_ref.txt' is no whole sound file"),
    "not a number": (
        lambda folder: {"audio": str(write_samples(folder / "nan.wav", np.full(800, np.nan), 16000, codec="pcm_f32le"))},
        "--audio .*nan.wav' has a sample of nan after 0.00 seconds; write it again",
    ),
    "cut off": (
        lambda folder: {"audio": str(cut_in_half(write_samples(folder / "cut.wav", tone(220, 16000, 1.0), 16000)))},
        "--audio .*cut.wav' is cut off after 0.50 seconds; give all of it",
    ),
    "refert_num": (lambda folder: {"refert_num": 77}, "--refert_num must be 1 or 5, got 77"),
    "image": (lambda folder: {"image": str(folder / "src_ref.png")}, "takes no --image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, case):
    write_folder(tmp_path, 5)
    (tmp_path / "src_ref.txt").write_text("no sound")
    spoil, says = BAD[case]
    changes = spoil(tmp_path) or {}
    with pytest.raises(WanFastError, match=says) as error:
        planned(changes.pop("src_root_path", tmp_path), **changes)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_a_folder_is_needed():
    with pytest.raises(WanFastError, match="animate-14B needs --src_root_path"):
        plan(EngineConfig(task=TASK, device="cpu"), Request(seed=0))


# --- the checkpoint and its LoRA ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = write_native(tmp_path_factory.mktemp("native"), TASK, layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"motion_encoder_dim": 12}))
    return folder


def test_the_kernels_of_the_blurs_are_neither_missing_nor_surplus(native, tmp_path):
    from safetensors.torch import load_file, save_file

    from wan_fast.checkpoint import check_tensors

    state = load_file(native / "diffusion_pytorch_model.safetensors")
    assert not any("kernel" in name for name in state)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    blurs = {
        f"motion_encoder.enc.net_app.convs.{n}.{part}.0.kernel": line.outer(line) / 64
        for n in (1, 2)
        for part in ("conv2", "skip")
    }
    save_file({**state, **blurs}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((native / "config.json").read_text())
    for folder in (native, tmp_path):
        part = open_dit(folder)
        check_tensors(part, manifest.dit_shapes(DiTDims.of_shapes(part.shapes, part.config)), "DiT")


def relighting(native, folder):
    """As the official file: PEFT's names, rank 4, on every linear of the blocks; returns the weights it makes."""
    from safetensors.torch import load_file

    state, factors = load_file(native / "diffusion_pytorch_model.safetensors"), {}
    for name in [name for name in state if name.startswith("blocks.") and name.endswith(".weight") and state[name].ndim == 2]:
        up, down = torch.randn(len(state[name]), 4) * 0.1, torch.randn(4, state[name].shape[1]) * 0.1
        module = name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
        state[name] = state[name] + up @ down
    torch.save({"state_dict": factors, "epoch": 3}, folder / "relighting_lora.ckpt")
    return state


def test_the_relighting_lora_is_the_checkpoints_own(native, tmp_path):
    write_folder(tmp_path / "media", 5)
    options = {"checkpoint": str(native), "use_relighting_lora": True, "num_frames": 5}
    with pytest.raises(WanFastError, match=r"has no relighting_lora\.ckpt; download the whole repository, or leave it out"):
        planned(tmp_path / "media", **options)
    wanted = relighting(native, native)
    try:
        todo = planned(tmp_path / "media", replace_flag=True, **options)
        assert len(todo.loras) == 1 and "relighting_lora.ckpt at strength 1: changes 24 tensors" in todo.loras[0]
        assert not any("relighting" in warning for warning in todo.warnings)
        told = "--use_relighting_lora fits a person to the light of the video they are put into; add --replace_flag"
        assert told in planned(tmp_path / "media", **options).warnings
        engine = Engine(EngineConfig(task=TASK, checkpoint=str(native), device="cpu", use_relighting_lora=True))
        state = engine.models["model"].state_dict()
        assert all(torch.allclose(state[name], wanted[name], atol=1e-5) for name in state)
        engine.set_loras([])  # it stays
        assert torch.equal(engine.models["model"].state_dict()["blocks.1.ffn.0.weight"], state["blocks.1.ffn.0.weight"])
    finally:
        (native / "relighting_lora.ckpt").unlink()


def test_the_relighting_lora_is_that_of_the_folder_beside_another_dit(native, tmp_path):
    write_folder(tmp_path / "media", 5)
    dit = tmp_path / "dit.safetensors"
    dit.write_bytes((native / "diffusion_pytorch_model.safetensors").read_bytes())
    relighting(native, native)
    try:
        options = {"checkpoint": str(native), "dit": str(dit), "use_relighting_lora": True}
        assert len(planned(tmp_path / "media", num_frames=5, replace_flag=True, **options).loras) == 1
    finally:
        (native / "relighting_lora.ckpt").unlink()


def test_a_short_sound_ends_before_the_video(native, tmp_path):
    from wan_fast.cli import main

    write_folder(tmp_path / "media", 5)
    sound = write_samples(tmp_path / "short.wav", tone(220, 16000, 0.05), 16000)
    words = ["--task", TASK, "--ckpt_dir", native, "--src_root_path", tmp_path / "media", "--audio", sound, "--frame_num", "5"]
    words += ["--sample_steps", "1", "--device", "cpu", "--quiet", "--save_file", tmp_path / "x.mp4"]
    assert main(["run", *map(str, words)]) == 0
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5 and container.streams.audio


def test_the_relighting_lora_is_of_this_task_alone():
    with pytest.raises(WanFastError, match=r"--use_relighting_lora is of animate-14B, --task is t2v-1\.3B; leave it out"):
        EngineConfig(task="t2v-1.3B", use_relighting_lora=True)


# --- against diffusers ----------------------------------------------------------------------------------------------------

NARROW = {"4": 8, "8": 8, "16": 6, "32": 6, "64": 4, "128": 4, "256": 3, "512": 3}


def their_transformer(diffusers):
    theirs = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=1,
        text_dim=64,
        ffn_dim=160,
        num_layers=2,
        image_dim=CLIP.dim,
        added_kv_proj_dim=128,
        motion_encoder_channel_sizes=NARROW,
        motion_style_dim=12,
        motion_dim=5,
        motion_encoder_dim=12,
        face_encoder_hidden_dim=16,
        inject_face_latents_blocks=1,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        if name.startswith("motion_encoder.") or "padding_tokens" in name:
            torch.nn.init.normal_(parameter)
    return theirs.requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small pipeline of theirs, and the folder it is saved in."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    base = diffusers.WanPipeline.from_pretrained(locate("tiny", TASKS["ti2v-5B"]), torch_dtype=torch.float32)
    torch.manual_seed(5)
    clip = CLIPVisionConfig(
        hidden_size=CLIP.dim,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    pipe = diffusers.WanAnimatePipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=diffusers.AutoencoderKLWan(base_dim=8),
        scheduler=official_grid(2, SPEC.shift),
        image_processor=CLIPImageProcessor(),
        image_encoder=CLIPVisionModel(clip),
        transformer=their_transformer(diffusers),
    )
    folder = tmp_path_factory.mktemp("diffusers")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@torch.inference_mode()
def test_the_transformer_equals_that_of_diffusers(saved):
    from wan_fast.loading import load_model

    pipe, folder = saved
    part = open_dit(folder / "transformer")
    dims = DiTDims.of_shapes(part.shapes, part.config)
    assert dims.face == FaceDims(
        layers=(0, 1), channels=tuple(NARROW.values())[::-1], motion_dim=12, directions=5, width=16, joint=False
    )
    ours = load_model(lambda: WanDiT(dims), part, "cpu", lambda name: torch.float32)
    x, text, image = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 512, 64), torch.randn(1, 257, CLIP.dim)
    channels, pose, face = torch.randn(20, 3, 4, 6), torch.randn(16, 2, 4, 6), given(frames=5, faces=512).face
    t = torch.tensor([731.0])
    expected = pipe.transformer(
        torch.cat([x, channels[None]], dim=1), t, text, image, pose[None], face[None], return_dict=False
    )[0]
    inputs = Inputs(channels=channels, image=image, pose=pose, face=face)
    context = ours.prepare(list(text), grid_of(x.shape), inputs)
    assert relative_error(ours(x, t[:, None], context), expected) < 5e-6
    other = ours.prepare(list(text), grid_of(x.shape), replace(inputs, face=-face))
    assert relative_error(ours(x, t[:, None], other), expected) > 1e-3


@pytest.mark.parametrize(("count", "scale", "replacing"), [(7, 1.0, False), (6, 2.5, True)], ids=["animate", "replace"])
def test_videos_equal_those_of_diffusers(saved, tmp_path, monkeypatch, count, scale, replacing):
    pipe, folder = saved
    clips = write_folder(tmp_path / "media", count, face=512)
    reference = Image.open(tmp_path / "media" / "src_ref.png")
    pixels = torch.from_numpy(np.array(reference)).permute(2, 0, 1).float() / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (pipe.image_processor.image_mean, pipe.image_processor.image_std)
    )
    square = (F.interpolate(pixels[None], size=(224, 224), mode="bicubic")[0] - mean) / std
    tokens = pipe.image_encoder(pixel_values=square[None], output_hidden_states=True).hidden_states[-2]
    monkeypatch.setattr(pipe, "encode_image", lambda image, device: tokens)
    shown = {name: [Image.fromarray(frame) for frame in frames] for name, frames in clips.items()}
    pipe.scheduler = official_grid(2, 5.0)
    expected = pipe(
        image=reference,
        pose_video=shown["pose"],
        face_video=shown["face"],
        **({"background_video": shown["bg"], "mask_video": shown["mask"], "mode": "replace"} if replacing else {}),
        prompt="a dancer",
        negative_prompt="blurry",
        width=SIZE[0],
        height=SIZE[1],
        segment_frame_length=5,
        prev_segment_conditioning_frames=1,
        num_inference_steps=2,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).frames[0]
    engine, chunks = Engine(EngineConfig(task=TASK, checkpoint=str(folder), device="cpu")), []
    request = Request(
        src_root_path=str(tmp_path / "media"),
        prompt="a dancer",
        negative_prompt="blurry",
        num_frames=5,
        num_steps=2,
        guidance_scale=scale,
        replace_flag=replacing,
        seed=3,
    )
    made = engine.generate(request, on_frames=chunks.append)
    assert made.frames.shape == (count, SIZE[1], SIZE[0], 3) and made.fps == 30
    assert relative_error(torch.cat(chunks, dim=1), expected.transpose(0, 1) * 2 - 1) < 1e-4


def test_loras_find_keys_and_values_that_lie_apart(saved, tmp_path):
    from safetensors.torch import save_file

    _, folder = saved
    engine = Engine(EngineConfig(task=TASK, checkpoint=str(folder), device="cpu"))
    before = {name: tensor.clone() for name, tensor in engine.models["model"].state_dict().items()}
    up, down = torch.randn(128, 2), torch.randn(2, 128)
    lora = {"face_adapter.1.to_k.lora_A.weight": down, "face_adapter.1.to_k.lora_B.weight": up}
    save_file(lora, tmp_path / "face.safetensors")
    engine.set_loras([str(tmp_path / "face.safetensors")])
    after = engine.models["model"].state_dict()
    name = "face_adapter.fuser_blocks.1.linear1_kv.weight"
    wanted = torch.cat([before[name][:128] + up @ down, before[name][128:]])
    assert torch.allclose(after[name], wanted, atol=1e-4)
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
    engine.set_loras([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.models["model"].state_dict().items())
