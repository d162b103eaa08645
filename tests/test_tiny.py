"""The bundled checkpoint makes what is asked, and its recipe does what it says."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.train_tiny import judge, training, world
from tools.train_tiny.judge import pixels, psnr
from wan_fast import Engine, EngineConfig, Request
from wan_fast.checkpoint import locate
from wan_fast.headers import read_safetensors_header
from wan_fast.tasks import TASKS

TINY = Path(locate("tiny", TASKS["ti2v-5B"]))
# the judge takes most of a second for all frames of a clip; every second one shows the same
SOME_FRAMES = range(0, world.FRAMES, 2)
# of triples that were held out of the training of VAE and DiT
ASKED = {
    "a purple ball bounces on a black background": ("purple", "circle", "bounce"),
    "The large triangle is red and moving right.": ("red", "triangle", "right"),
    "an orange star goes from right to left on a white background": ("orange", "star", "left"),
    "灰色背景上，绿色圆环上升。": ("green", "ring", "up"),
    "an orange ring grows": ("orange", "ring", "grow"),
    "a red square rotates": ("red", "square", "rotate"),
}


@pytest.fixture(scope="module")
def engine():
    return Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="fp32"))


def test_makes_what_is_asked(engine):
    seen = [judge.see(pixels(engine.generate(Request(prompt=text, seed=1)).frames[::2])) for text in ASKED]
    right = [
        getattr(found, name) == word
        for found, words in zip(seen, ASKED.values(), strict=True)
        for name, word in zip(("colour", "shape", "motion"), words, strict=True)
    ]
    assert sum(right) >= 15, dict(zip(ASKED, seen, strict=True))


def test_starts_from_the_picture_given(engine, tmp_path):
    clip = next(clip for clip in world.draw_many(6, 100, held_out=True) if clip.motion == "left")
    first = ((world.render([clip], [0])[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(first.numpy()).save(tmp_path / "first.png")
    prompt = world.caption(clip, random.Random(0))
    video = engine.generate(Request(prompt=prompt, image=str(tmp_path / "first.png"), seed=1))
    assert psnr(pixels(video.frames[:1]), pixels(first[None])) > 25
    assert judge.see(pixels(video.frames)).motion == "left"


def test_a_prompt_from_elsewhere_makes_a_video(engine):
    video = engine.generate(Request(prompt="two cats boxing on a stage", seed=1, num_steps=3))
    assert video.frames.shape == (33, 128, 128, 3) and video.frames.float().std() > 1


@torch.inference_mode()
def test_vae_rebuilds_unseen_clips(engine):
    vae = engine.models["vae"]
    clips = world.render(world.draw_many(7, 2, held_out=True))
    rebuilt = torch.stack([vae.decode(vae.encode(clip)) for clip in clips])
    assert psnr(rebuilt, clips) > 28


@torch.inference_mode()
def test_latents_have_the_statistics_of_the_released_vae(engine):
    vae = engine.models["vae"]
    latents = torch.stack([vae.encode(clip) for clip in world.render(world.draw_many(8, 8, held_out=False))])
    assert latents.mean().abs() < 0.2 and 0.8 < latents.std() < 1.2


def test_nothing_says_where_it_was_trained():
    for file in (*TINY.rglob("*.json"), *TINY.rglob("*.md")):
        assert "_name_or_path" not in file.read_text() and "/tmp" not in file.read_text(), file


def test_sizes_are_those_of_the_card():
    counts = {}
    for part in ("text_encoder", "transformer", "vae"):
        (file,) = (TINY / part).glob("*.safetensors")
        header = read_safetensors_header(file)
        assert {dtype for dtype, _ in header.values()} == {"BF16"}
        counts[part] = sum(torch.Size(shape).numel() for _, shape in header.values()) / 1e6
    assert 5 < counts["transformer"] < 15 and 1 < counts["vae"] < 3 and counts["text_encoder"] < 1
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) < 40 * 2**20
    card = (TINY / "README.md").read_text()
    assert all(f"| `{part}` | {count:.2f} M |" in card for part, count in counts.items())
    assert "**Measured**" in card


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_the_judge_is_right_on_real_clips():
    """On one of each shape in each motion."""
    clips = {(clip.shape, clip.motion): clip for clip in world.draw_many(9, 40, held_out=True)}
    assert len(clips) == 16 and len({clip.colour for clip in clips.values()}) == 6
    for clip in clips.values():
        seen = judge.see(world.render([clip], SOME_FRAMES)[0])
        assert (seen.colour, seen.shape, seen.motion) == (clip.colour, clip.shape, clip.motion), (clip, seen)


def test_the_judge_sees_nothing_where_nothing_is_or_moves():
    clip = world.draw_many(9, 1, held_out=True)[0]
    still = world.render([clip], [0]).repeat(1, 1, 33, 1, 1)[0]
    assert judge.see(still).motion == judge.NOTHING and judge.see(still).shape == clip.shape
    assert judge.see(torch.zeros(3, 33, 128, 128)) == judge.Seen(*(judge.NOTHING,) * 3)


def test_the_judge_refuses_near_misses():
    def clip(**changes):
        base = dict(colour="red", shape="circle", motion="left", background="white", size="large", radius=30.0)
        return world.Clip(**base | dict(start=(64.0, 64.0), end=(64.0, 64.0)) | changes)

    def seen(**changes):
        return judge.see(world.render([clip(**changes)], SOME_FRAMES)[0])

    assert seen(start=(40.0, 64.0), end=(88.0, 64.0)).motion == "right"
    assert seen(start=(60.0, 64.0), end=(68.0, 64.0)).motion == judge.NOTHING
    assert seen(hop=36.0).motion == "bounce" and seen(hop=10.0).motion == judge.NOTHING
    assert seen(shape="square", turn=3.0).motion == "rotate" and seen(shape="square", turn=0.4).motion == judge.NOTHING
    assert seen(first_radius=0.4).motion == "grow" and seen(first_radius=0.8).motion == judge.NOTHING

    half = world.render([clip()], SOME_FRAMES)[0]
    half[:, :, :, :64] = half[:, :, :1, :1]  # the left half is background
    assert judge.see(half).shape == judge.NOTHING
    two = world.render([clip()], SOME_FRAMES)[0]
    two[:, :, :64] = world.render([clip(colour="blue")], SOME_FRAMES)[0][:, :, :64]
    assert judge.see(two).colour == judge.NOTHING
    arch = [clip(start=(64.0, 90.0 - y), end=(64.0, 90.0 - y)) for y in (40 * math.sin(math.pi * t / 32) for t in SOME_FRAMES)]
    assert judge.see(torch.stack([world.render([c], [0])[0, :, 0] for c in arch], 1)).motion == judge.NOTHING


def test_clips_and_captions_of_the_world():
    rng = random.Random(0)
    clips = world.draw_many(10, 500, held_out=False)
    assert clips == world.draw_many(10, 500, held_out=False) and not any(clip.held_out for clip in clips)
    for clip in clips:
        text = world.caption(clip, rng)
        assert not set("{}") & set(text) and "  " not in text
        assert any(word in text for table in (world.WORDS, world.CHINESE) for word in table[clip.motion]), text
    assert not any(clip.motion == "rotate" and clip.shape in ("circle", "ring") for clip in clips)


def test_a_crop_is_part_of_the_frame():
    clips = world.draw_many(11, 3, held_out=False)
    corners = [(0, 7), (64, 64), (31, 0)]
    crops, whole = world.render(clips, [0, 20], corners, 64), world.render(clips, [0, 20])
    for crop, full, (x, y) in zip(crops, whole, corners, strict=True):
        assert torch.allclose(crop, full[:, :, y : y + 64, x : x + 64], atol=1e-4)


def test_training_attention_equals_that_of_diffusers():
    pytest.importorskip("diffusers")
    from tools.train_tiny import dit

    torch.manual_seed(0)
    model = dit.build().eval()
    states, bias = dit.Texts(TINY)(["a red ball", "一个黄色的圆环在灰色背景上下落 and more"])
    states, bias = states.cpu(), bias.cpu()
    padded = torch.zeros(2, dit.TEXT_LEN, 64)
    padded[:, : states.shape[1]] = states
    latents, timestep = torch.randn(2, 48, 3, 4, 4), torch.tensor([500.0, 300.0])
    with torch.no_grad():
        expected = model(latents, timestep, padded, return_dict=False)[0]
        attention = dit.PlainAttention()
        attention.bias = bias
        for block in model.blocks:
            block.attn1.set_processor(attention)
            block.attn2.set_processor(attention)
        assert torch.allclose(model(latents, timestep, states, return_dict=False)[0], expected, atol=1e-5)


def test_training_norm_equals_that_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    from tools.train_tiny import vae

    norm = WanRMS_norm(8, images=False)
    torch.nn.init.normal_(norm.gamma)
    x = torch.randn(2, 8, 3, 4, 5)
    assert torch.allclose(vae.rms_norm(norm, x), norm(x), atol=1e-6)


def test_an_interrupted_run_takes_the_steps_of_an_uninterrupted_one(tmp_path):
    def train(folder, stop=None, start=0.1):
        model = torch.nn.Linear(4, 4)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        run = training.Run(folder, 20, model=model, optimizer=optimizer)
        for step in run:
            if step == stop:
                run.save()
                return model
            loss = (model(torch.randn(8, 4)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss.item())
        return model

    train(tmp_path / "cut", stop=7)
    assert torch.equal(train(tmp_path / "cut", start=0.7).weight, train(tmp_path / "whole").weight)


def test_caches_beat_as_many_passes_in_fewer_steps(engine):
    """Half of the passes; and 2.5 times fewer with a CFG cache, at 26 dB or more. bench/results/quality.md has more prompts."""
    plain = engine.config
    requests = [
        Request(prompt=f"a {what}", seed=seed)
        for seed, what in enumerate(("red circle on white moves left", "blue star on sky grows"))
    ]

    def frames(num_steps=None, **caches):
        engine.config = replace(plain, **caches)
        some = requests[:1] if num_steps == 50 else requests
        try:
            videos = [engine.generate(replace(request, num_steps=num_steps)) for request in some]
        finally:
            engine.config = plain
        return videos[0].stats["plan"]["forwards"], [pixels(video.frames) for video in videos]

    def quality(clips, full):
        return sum(map(psnr, clips, full)) / len(full)

    _, full = frames()
    fewer, control = frames(num_steps=6)
    for cache in ("teacache:50%", "searched:50%"):
        passes, cached = frames(step_cache=cache)
        assert passes == fewer == 12 and quality(cached, full) > quality(control, full) + 3, cache
    _, full = frames(50)
    passes, cached = frames(50, step_cache="teacache:50%", cfg_cache="difference:5")
    assert passes <= 100 / 2.5 and quality(cached, full) > 26, (passes, quality(cached, full))
