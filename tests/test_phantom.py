"""Phantom: references behind the clip, guidance of two scales; against diffusers' transformer over the longer clip."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips_of import noise
from models import official_grid, random_dit, relative_error, small_dims, write_native
from PIL import Image
from safetensors.torch import save_file

import wan_fast
from wan_fast.branches import Branches, kept
from wan_fast.calibrate import calibrate
from wan_fast.checkpoint import locate, open_dit, read_tensors
from wan_fast.cli import main
from wan_fast.conditioning import PREPARE
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.device import named
from wan_fast.dit import grid_of
from wan_fast.engine import Engine
from wan_fast.flags import phantom_tasks
from wan_fast.framing import FRAME, boxed_size
from wan_fast.inputs import Inputs
from wan_fast.recording import Recording
from wan_fast.resolving import resolve
from wan_fast.schedule import schedule
from wan_fast.setup import Models, set_up
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

SPEC = TASKS["phantom-1.3B"]
SIZE, FRAMES, STEPS = (64, 48), 9, 4
DIMS = small_dims("phantom-1.3B", layers=2, width=128)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate(((80, 32), (30, 70), (64, 48), (48, 64), (20, 20))):
        Image.fromarray(noise(1, height, width, seed=i)[0]).save(folder / f"{i}.png")
    return tuple(str(folder / f"{i}.png") for i in range(5))


# --- references -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_references_are_frames_of_a_longer_clip(count):
    model, draw = random_dit(DIMS), torch.Generator().manual_seed(1)
    x, references = (torch.randn(16, frames, 6, 8, generator=draw) for frames in (3, count))
    text, timestep = [torch.randn(7, 64, generator=draw)], torch.tensor([[600.0]])
    longer = torch.cat([x, references], dim=1)[None]
    expected = model(longer, timestep, model.prepare(text, grid_of(longer.shape)))[:, :, :3]
    context = model.prepare(text, grid_of(x.shape), Inputs(reference=references))
    assert relative_error(model(x[None], timestep, context), expected) < 2e-6
    others = model.prepare(text, grid_of(x.shape), Inputs(reference=torch.zeros_like(references)))
    assert relative_error(model(x[None], timestep, others), expected) > 0.01


@pytest.mark.parametrize(
    ("picture", "size", "whole"),
    [
        ((80, 32), (64, 48), (64, 25)),
        ((30, 70), (64, 48), (20, 48)),
        ((4, 3), (64, 48), (64, 48)),
        ((49, 7), (832, 480), (832, 118)),
    ],
)
def test_a_reference_fills_one_side(picture, size, whole):
    assert boxed_size(picture, size) == whole


def on_white(file, size=SIZE):
    """[3, H, W] in [-1, 1] of a picture that fits into the size, centred on white."""
    picture = Image.open(file)
    width, height = size
    wider = picture.width / picture.height > width / height
    ratio = picture.width / picture.height
    columns, rows = (width, int(width / ratio)) if wider else (int(height * ratio), height)
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[top : top + rows, left : left + columns] = picture.resize((columns, rows), Image.Resampling.LANCZOS)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 127.5 - 1


class Seen:
    """Encoders that note what they are given."""

    def __init__(self):
        self.texts, self.videos = [], []

    def encode_text(self, texts):
        self.texts.append(texts)
        return {name: torch.full((2, 64), float(len(text))) for name, text in texts.items()}

    def encode_video(self, chunks, num_frames):
        (chunk,) = chunks
        assert num_frames == chunk.shape[1] == 1
        self.videos.append(chunk[:, 0])
        return torch.full((16, 1, 6, 8), float(len(self.videos)))


def prepared(pictures, **given):
    request = resolve(SPEC, Request(prompt="x", size=SIZE, num_frames=FRAMES, seed=0, src_ref_images=pictures, **given))
    framing, seen = FRAME["subjects"](request, SPEC, request), Seen()
    return PREPARE["subjects"](request, framing, seen)(framing.clips[0], None), framing, seen


def test_what_is_prepared(pictures):
    made, framing, seen = prepared(pictures[:3])
    assert framing.trailing == 3 and framing.leading == 0 and framing.size == SIZE
    for video, file in zip(seen.videos, pictures, strict=False):
        assert torch.equal(video, on_white(file)) or relative_error(video, on_white(file)) < 1e-6
    reference = made.inputs.reference
    assert reference.shape == (16, 3, 6, 8) and [reference[0, i, 0, 0].item() for i in range(3)] == [1, 2, 3]
    assert set(made.text) == {"conditional", "unprompted", "unconditional"}
    assert torch.equal(made.text["unprompted"], made.text["unconditional"])
    assert not torch.equal(made.text["unprompted"], made.text["conditional"])
    by_branch = made.by_branch
    assert by_branch["unprompted"].reference is by_branch["conditional"].reference is reference
    assert by_branch["unconditional"].reference.shape == reference.shape and not by_branch["unconditional"].reference.any()


@pytest.mark.parametrize(
    ("text", "image", "branches", "unconditional_sees"),
    [
        (7.5, 1.0, {"conditional", "unconditional"}, True),  # neg + 1 (pos_i - neg) is pos_i
        (7.5, 7.5, {"conditional", "unconditional"}, False),  # pos_i cancels
        (1.0, 1.0, {"conditional"}, None),
        (1.0, 5.0, {"conditional", "unprompted", "unconditional"}, False),
        (7.5, 0.0, {"conditional", "unprompted", "unconditional"}, False),
    ],
)
def test_passes_that_cancel_are_not_run(pictures, text, image, branches, unconditional_sees):
    given = dict(guidance_scale=text, image_guidance_scale=image)
    made, _, _ = prepared(pictures[:1], **given)
    assert set(made.text) == branches
    if unconditional_sees is not None:
        assert made.by_branch["unconditional"].reference.any().item() is unconditional_sees
    request = Request(prompt="x", src_ref_images=pictures[:1], num_steps=2, **given)
    todo = wan_fast.plan(EngineConfig(task="phantom-1.3B"), request, on="h200")
    assert todo.forwards == todo.forwards_uncached == 2 * len(branches)


# --- guidance of two scales -----------------------------------------------------------------------------------------------


def branches_of(steps, model, references, text=None, scale=None):
    draw = torch.Generator().manual_seed(2)
    negative = torch.randn(5, 64, generator=draw)
    texts = {"conditional": torch.randn(7, 64, generator=draw), "unprompted": negative, "unconditional": negative}
    inputs = dict.fromkeys(texts, Inputs(reference=references)) | {
        "unconditional": Inputs(reference=torch.zeros_like(references))
    }
    return Branches(steps, lambda name: model, texts, 0, torch.device("cpu"), inputs=inputs), texts, inputs


def two_scales(count=4, text=7.5, image=5.0):
    return step_plan(SPEC, official("unipc", count, 5.0), (text, text), image)


@pytest.mark.parametrize(("text", "image"), [(7.5, 5.0), (1.0, 3.0), (2.0, 0.0)])
@torch.inference_mode()
def test_the_velocity_is_that_of_three(text, image):
    """v = neg + g_img (pos_i - neg) + g_txt (pos_it - pos_i)."""
    model, draw = random_dit(DIMS), torch.Generator().manual_seed(3)
    x, references = (torch.randn(16, frames, 6, 8, generator=draw) for frames in (3, 2))
    steps = two_scales(text=text, image=image)
    branches, texts, inputs = branches_of(steps, model, references)
    step = steps[1]

    def velocity(branch):
        context = model.prepare([texts[branch]], grid_of(x.shape), inputs[branch])
        return model(x[None], torch.tensor([[step.timestep]]), context)[0].double()

    pos_it, pos_i, neg = (velocity(branch) for branch in texts)
    expected = neg + image * (pos_i - neg) + text * (pos_it - pos_i)
    conditional, unconditional = branches(step, x)
    assert relative_error(unconditional + text * (conditional - unconditional), expected) < 2e-6
    assert step.forwards == step.passes == 3
    # what a graph replays reads the scale on the device, and the next clip has another
    other = two_scales(text=text, image=2.0)
    branches.start(other, texts, inputs)
    branches.load(other[1])
    replayed, base = branches.velocities(step, x)
    expected = neg + 2.0 * (pos_i - neg) + text * (pos_it - pos_i)
    assert relative_error(base + text * (replayed - base), expected) < 2e-6


@torch.inference_mode()
def test_a_reused_step_has_a_residual_per_branch():
    model, draw = random_dit(DIMS), torch.Generator().manual_seed(4)
    x, later, references = (torch.randn(16, frames, 6, 8, generator=draw) for frames in (3, 3, 2))
    first, second, *_ = two_scales()
    second = replace(second, conditional="reuse", unconditional="reuse")
    branches, texts, inputs = branches_of([first, second], model, references)
    assert kept([first, second])[0] == dict.fromkeys(texts, True)
    branches(first, x)
    conditional, unconditional = branches(second, later)
    timestep = torch.tensor([[second.timestep]])

    def resumed(branch):
        context = model.prepare([texts[branch]], grid_of(x.shape), inputs[branch])
        residual = torch.empty(1, 3 * 3 * 4, DIMS.dim)
        model(x[None], torch.tensor([[first.timestep]]), context, residual=residual)
        return model.resume(later[None], timestep, residual, context)[0]

    pos_it, pos_i, neg = (resumed(branch) for branch in texts)
    expected = neg + 5 * (pos_i - neg) + 7.5 * (pos_it - pos_i)
    assert relative_error(unconditional + 7.5 * (conditional - unconditional), expected) < 2e-6
    assert second.forwards == 0 and second.passes == 3


def test_plans_count_the_third_pass(pictures):
    def planned(**given):
        request = Request(prompt="x", src_ref_images=pictures[:2], num_steps=10, seed=0, **given)
        return wan_fast.plan(EngineConfig(task="phantom-14B", step_cache=cache), request, on="h200")

    cache = None
    three, two = planned(), planned(image_guidance_scale=1.0)
    assert (three.forwards, two.forwards) == (30, 20)
    latents, blocks, dim = 16 * 31 * 60 * 104, 40, 5120
    working = three.memory.working["denoise"] - two.memory.working["denoise"]
    assert working == 2 * blocks * 512 * dim * 2 + 4 * latents
    # two latent frames more are denoised with the clip's own, and decoded are these alone
    assert three.latent_shape[1] == 31 and three.tokens == 33 * 30 * 52
    assert three.flops["denoise"] == pytest.approx(1.5 * two.flops["denoise"], rel=1e-3)
    cache = "#.########"
    cached = planned(), planned(image_guidance_scale=1.0)
    assert [todo.forwards for todo in cached] == [27, 18]
    tokens = 31 * 30 * 52
    residuals = [a.memory.working["denoise"] - b.memory.working["denoise"] for a, b in zip(cached, (three, two), strict=True)]
    assert residuals == [count * tokens * dim * 2 for count in (3, 2)]


# --- a whole video --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A small diffusers pipeline, the folder of the base model, and a file and a folder with its transformer as Phantom's."""
    diffusers = pytest.importorskip("diffusers")
    base = diffusers.WanPipeline.from_pretrained(locate("tiny", TASKS["ti2v-5B"]), torch_dtype=torch.float32)
    torch.manual_seed(5)
    sizes = dict(num_attention_heads=1, text_dim=64, ffn_dim=160, num_layers=2, cross_attn_norm=True)
    transformers = [diffusers.WanTransformer3DModel(**sizes) for _ in range(2)]
    made = [
        diffusers.WanPipeline(
            tokenizer=base.tokenizer,
            text_encoder=base.text_encoder,
            vae=made_vae,
            scheduler=official_grid(STEPS, SPEC.shift),
            transformer=transformer,
        )
        for made_vae in [diffusers.AutoencoderKLWan(base_dim=8)]
        for transformer in transformers
    ]
    folder = tmp_path_factory.mktemp("phantom")
    made[0].save_pretrained(folder / "base")
    made[1].transformer.save_pretrained(folder / "own")
    native = {name: tensor.clone() for name, tensor in read_tensors(open_dit(folder / "own"))}
    torch.save(native, folder / "Phantom-Wan-1.3B.pth")
    # as the hub has it: shards of the large model, beside the file of the small one
    hub = folder / "hub"
    hub.mkdir()
    torch.save({}, hub / "Phantom-Wan-1.3B.pth")
    shards = {f"Phantom_Wan_14B-0000{i + 1}-of-00002.safetensors": dict(list(native.items())[i::2]) for i in range(2)}
    for name, tensors in shards.items():
        save_file(tensors, hub / name)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (hub / "Phantom_Wan_14B.safetensors.index.json").write_text(str(index).replace("'", '"'))
    return made[1], folder


@torch.no_grad()
def by_diffusers(pipe, request, pictures):
    """Noise for the longer clip, whose last frames are overwritten before each forward, and dropped at the end."""
    (width, height), vae = request.size, pipe.vae
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    references = [(vae.encode(on_white(file)[None, :, None]).latent_dist.mode() - mean) / std for file in pictures]
    references = torch.cat(references, dim=2)
    R, T = len(pictures), (request.num_frames + 3) // 4
    prompt, negative = pipe.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=512)
    x = torch.randn(16, T + R, height // 8, width // 8, generator=torch.Generator().manual_seed(request.seed))[None]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(request.num_steps)

    def velocity(text, behind):
        return pipe.transformer(torch.cat([x[:, :, :T], behind], dim=2), t[None], text, return_dict=False)[0]

    for t in scheduler.timesteps:
        neg, pos_i = velocity(negative, torch.zeros_like(references)), velocity(negative, references)
        pos_it = velocity(prompt, references)
        v = neg + 5.0 * (pos_i - neg) + 7.5 * (pos_it - pos_i)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    latents = x[:, :, :T]
    return latents[0], vae.decode(latents * std + mean, return_dict=False)[0][0].clamp(-1, 1)


def request_of(pictures, **given):
    return Request(
        prompt="a red ball", negative_prompt="blurry", src_ref_images=pictures, size=SIZE, num_frames=FRAMES, num_steps=STEPS,
        seed=3, **given,
    )  # fmt: skip


@pytest.mark.parametrize(("form", "count"), [("Phantom-Wan-1.3B.pth", 3), ("hub", 1)])
def test_a_video_equals_diffusers(pipe, pictures, form, count):
    pipeline, folder = pipe
    config = EngineConfig(task="phantom-1.3B", checkpoint=str(folder / "base"), dit=str(folder / form), device="cpu")
    engine, chunks = Engine(config), []
    request = request_of(pictures[:count])
    video = engine.generate(request, on_frames=lambda chunk: chunks.append(chunk.clone()))
    latents, frames = by_diffusers(pipeline, request, pictures[:count])
    assert relative_error(video.latents, latents) < 1e-4
    assert relative_error(torch.cat(chunks, dim=1), frames) < 1e-4
    assert (video.fps, video.frames.shape) == (16, (FRAMES, SIZE[1], SIZE[0], 3))


# --- what is asked for ----------------------------------------------------------------------------------------------------


def test_what_the_tasks_are():
    one, fourteen = (
        resolve(TASKS[f"phantom-{size}"], Request(prompt="x", src_ref_images=(__file__,))) for size in ("1.3B", "14B")
    )
    for todo in (one, fourteen):
        assert (todo.solver, todo.num_steps, todo.shift, todo.guidance_scale) == ("unipc", 50, 5.0, (7.5, 7.5))
        assert (todo.image_guidance_scale, todo.size, todo.two_scales) == (5.0, (832, 480), True)
        assert todo.negative_prompt == TASKS["t2v-14B"].negative_prompt
    assert (one.num_frames, one.fps, fourteen.num_frames, fourteen.fps) == (81, 16, 121, 24)


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["--task", "s2v-1.3B", "--phantom_ckpt", "x"], "phantom-1.3B"),
        (["--phantom_ckpt=x", "--task=s2v-14B"], "phantom-14B"),
        (["--task", "s2v-14B", "--prompt", "s2v-14B"], "s2v-14B"),
        (["--task", "s2v-14B", "--dit", "x"], "s2v-14B"),
        (["--task", "phantom-14B", "--phantom_ckpt", "x"], "phantom-14B"),
        (["--task", "t2v-14B", "--phantom_ckpt", "x", "--prompt", "s2v-14B"], "t2v-14B"),
    ],
)
def test_tasks_by_phantoms_own_names(words, task):
    spelled = phantom_tasks(words)
    place = next(i for i, word in enumerate(words) if word.startswith("--task"))
    place += words[place] == "--task"
    assert spelled[place].removeprefix("--task=") == task
    assert [*spelled[:place], *spelled[place + 1 :]] == [*words[:place], *words[place + 1 :]]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("native"), "phantom-1.3B", width=128)


REFUSED = {
    "more than four": ("--src_ref_images {0},{1},{2},{3},{4}", "names 5 pictures, phantom-1.3B was trained on 4 at most; name"),
    "none": ("", "task phantom-1.3B needs --src_ref_images, got none; add"),
    "too thin": ("--ref_image {thin}", "of which nothing is left in a clip of 832x480; cut it"),
    "cfg cache": (
        "--src_ref_images {0} --cfg-cache difference:2",
        "--cfg-cache difference:2 is for one guidance scale, got 7.5 by the",
    ),
    "cfg zero": ("--src_ref_images {0} --cfg-zero 2", "--cfg-zero 2 is for one guidance scale, got 7.5 by the text and 5 by"),
    "few steps": (
        "--src_ref_images {0} --sample_solver lcm --sample_steps 4 --sample_guide_scale_img 5",
        "--sample_guide_scale_img 5: guidance blurs what models distilled to a few steps make; leave it out",
    ),
    "not finite": ("--src_ref_images {0} --sample_guide_scale_img nan", "--sample_guide_scale_img must be finite, got nan; 5"),
    "another's input": ("--src_ref_images {0} --image {0}", "task phantom-1.3B takes no --image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, pictures, tmp_path, capsys):
    Image.new("RGB", (1, 3000)).save(tmp_path / "thin.png")
    words, says = REFUSED[case]
    files = {str(i): file for i, file in enumerate(pictures)}
    line = words.format(*files.values(), thin=tmp_path / "thin.png")
    assert main(["plan", "--task", "phantom-1.3B", "--prompt", "x", "--on", "h200", *shlex.split(line)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_its_own_file_is_needed(native, pictures, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    wanted = "task phantom-1.3B needs --phantom_ckpt, got none; add --phantom_ckpt FILE, which is in bytedance-research/Phantom"
    common = ["--task", "phantom-1.3B", "--prompt", "x", "--ref_image", pictures[0]]
    assert main(["plan", *common, "--device", "cpu", "--ckpt_dir", str(native)]) == 2
    assert wanted in capsys.readouterr().err
    # with nothing at hand the plan is for the released sizes, and says what a run needs
    assert main(["plan", *common, "--on", "h200"]) == 0
    assert f"warning     {wanted}" in capsys.readouterr().out
    with pytest.raises(WanFastError, match=wanted):
        Engine(EngineConfig(task="phantom-1.3B", device="cpu"))
    assert main(["plan", "--task", "s2v-1.3B", "--prompt", "x"]) == 2
    assert "it is Phantom's name for phantom-1.3B; take that one, or add --phantom_ckpt FILE" in capsys.readouterr().err
    assert main(["plan", "--task", "t2v-1.3B", "--prompt", "x", "--sample_guide_scale_img", "3"]) == 2
    assert "task t2v-1.3B takes no --sample_guide_scale_img (given 3.0); tasks that do: phantom-1.3B" in capsys.readouterr().err


def test_its_own_command_line(native, pictures, tmp_path, capsys):
    target = tmp_path / "made.mp4"
    words = [
        "run", "--task", "s2v-1.3B", "--ckpt_dir", str(native), "--phantom_ckpt", str(native), "--size", "32*16", "--frame_num",
        "5", "--sample_fps", "12", "--sample_steps", "2", "--ref_image", f"{pictures[0]},{pictures[1]}", "--prompt", "a cat",
        "--sample_guide_scale_text", "3", "--sample_guide_scale_img", "2", "--base_seed", "42", "--device", "cpu", "--quiet",
        "--save_file", str(target),
    ]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "32x16, 5 frames at 12 fps; 2 steps of unipc, shift 5, guidance 3 and 2 by the pictures, seed 42" in printed
    assert target.is_file()


def test_step_caches_and_calibration(native, pictures, tmp_path):
    config = EngineConfig(task="phantom-1.3B", checkpoint=str(native), dit=str(native), device="cpu", step_cache="#.#")
    request = replace(request_of(pictures[:1]), num_steps=3)
    video = Engine(config).generate(request)
    assert video.stats["plan"]["forwards"] == 6 and video.latents.isfinite().all()
    with pytest.raises(WanFastError, match=r"has two, and a DiT beside it; take --step-cache every:2, or a mask$"):
        calibrate(replace(config, step_cache=None), replace(request, num_steps=12), Recording(curve="off"))
    setup = set_up(EngineConfig(task="phantom-1.3B"), named("h200"))
    todo = resolve(SPEC, replace(request_of(pictures[:1]), num_steps=20))
    dims = next(iter(Models.of(SPEC, None).experts.values()))
    steps, _, _ = schedule(replace(setup.config, step_cache="every:2"), todo, None, dims)
    assert {(step.conditional, step.unconditional) for step in steps} == {("run", "run"), ("reuse", "reuse")}
    assert {step.image_guidance for step in steps} == {5.0}
