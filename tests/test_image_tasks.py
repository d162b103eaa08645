"""The image, first-last-frame and VACE tasks: whole videos against diffusers, in fp32 and in bf16, and what they share."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips_of import noise, write_clip
from models import official_grid, relative_error
from PIL import Image

from wan_fast.checkpoint import locate
from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine
from wan_fast.tasks import TASKS

SIZE, FRAMES, STEPS = (64, 48), 9, 3
WIDTH, CLIP_WIDTH = 128, 160
PICTURES = ("image", "first_frame", "last_frame")

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """task -> (a small diffusers pipeline of random weights, the folder it is saved in)."""
    base = diffusers.WanPipeline.from_pretrained(locate("tiny", TASKS["ti2v-5B"]), torch_dtype=torch.float32)
    made = {}

    def pipe(task):
        if task not in made:
            torch.manual_seed(5)
            folder = tmp_path_factory.mktemp(task)
            pipeline = build(task, base)
            pipeline.save_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            made[task] = pipeline, folder
        return made[task]

    return pipe


def build(task, base):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    spec = TASKS[task]
    dit = dict(num_attention_heads=1, text_dim=64, ffn_dim=160, num_layers=2, cross_attn_norm=True)
    shared = dict(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=diffusers.AutoencoderKLWan(base_dim=8),
        scheduler=official_grid(STEPS, spec.shift),
    )
    if spec.vace_layers:
        transformer = diffusers.WanVACETransformer3DModel(**dit | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=96)
        return diffusers.WanVACEPipeline(**shared, transformer=transformer)
    dit |= dict(in_channels=36, out_channels=16)
    if not spec.image_tokens:
        experts = dict(
            zip(("transformer", "transformer_2"), (diffusers.WanTransformer3DModel(**dit) for _ in "12"), strict=True)
        )
        return diffusers.WanImageToVideoPipeline(
            **shared, **experts, image_encoder=None, image_processor=None, boundary_ratio=spec.boundary
        )
    positions = spec.image_tokens if spec.kind == "first_last" else None
    transformer = diffusers.WanTransformer3DModel(
        **dit, image_dim=CLIP_WIDTH, added_kv_proj_dim=WIDTH, pos_embed_seq_len=positions
    )
    if positions:
        torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    clip = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    return diffusers.WanImageToVideoPipeline(
        **shared, transformer=transformer, image_encoder=CLIPVisionModel(clip), image_processor=CLIPImageProcessor()
    )


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    video, masks = noise(FRAMES, SIZE[1], SIZE[0]), noise(FRAMES, SIZE[1], SIZE[0], seed=2)
    for name, frame in zip(("one", "two"), noise(2, SIZE[1], SIZE[0], seed=1), strict=True):
        Image.fromarray(frame).save(folder / f"{name}.png")
    write_clip(folder / "video.mkv", video)
    write_clip(folder / "mask.mkv", np.where(masks[..., :1].repeat(3, -1) > 99, np.uint8(255), np.uint8(0)))
    return folder


GIVEN = {
    "i2v-14B": {"image": "one.png"},
    "i2v-A14B": {"image": "one.png"},
    "flf2v-14B": {"first_frame": "one.png", "last_frame": "two.png"},
    "vace-1.3B": {"src_video": "video.mkv", "src_mask": "mask.mkv", "src_ref_images": ("one.png", "two.png")},
}
VACE_ALONE = {"src_ref_images": ("two.png",)}


def request_of(task, media, given):
    files = {n: str(media / f) if isinstance(f, str) else tuple(str(media / each) for each in f) for n, f in given.items()}
    return Request(
        prompt="a red ball", negative_prompt="blurry", size=SIZE, num_frames=FRAMES, num_steps=STEPS, seed=3, **files
    )


def clip_tokens(pipe, files):
    """By transformers itself: squeezed to the square as the official code does, tokens before the last layer."""
    processor = pipe.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    squares = []
    for file in files:
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        squares.append(torch.nn.functional.interpolate(pixels[None], size=(224, 224), mode="bicubic")[0])
    pixels = (torch.stack(squares) - mean) / std
    dtype = pipe.image_encoder.dtype
    return pipe.image_encoder(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def by_diffusers(pipe, request, latents, monkeypatch):
    (width, height), options = request.size, {}
    given = {name: getattr(request, name) for name in PICTURES if getattr(request, name)}
    if given:
        opened = [Image.open(file) for file in given.values()]
        options |= {"image": opened[0], "last_image": opened[1] if len(opened) > 1 else None}
        if pipe.image_encoder is not None:  # its own processor would cut off what is not square
            tokens = clip_tokens(pipe, given.values())
            monkeypatch.setattr(pipe, "encode_image", lambda image, device: tokens)
    else:
        # it puts each reference before those it has, which turns their order round
        options["reference_images"] = [Image.open(file) for file in reversed(request.src_ref_images)]
        if request.src_video:
            frames, masks = noise(FRAMES, height, width), 255 * (noise(FRAMES, height, width, seed=2)[..., 0] > 99)
            options |= {
                "video": [Image.fromarray(f) for f in frames],
                "mask": [Image.fromarray(m.astype(np.uint8)).convert("RGB") for m in masks],
            }
        options["conditioning_scale"] = request.context_scale
    pipe.scheduler = official_grid(STEPS, request.shift)
    return (
        pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=width,
            height=height,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            latents=latents[None],
            output_type="pt",
            **options,
        )
        .frames[0]
        .float()
        .transpose(0, 1)
        * 2
        - 1
    )


def by_us(folder, task, request, **config):
    engine, chunks = Engine(EngineConfig(task=task, checkpoint=str(folder), device="cpu", **config)), []
    engine.generate(request, on_frames=chunks.append)
    return torch.cat(chunks, dim=1), engine.plan(request)


def noise_of(plan):
    return torch.randn(plan.latent_shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("task", "given"),
    [*GIVEN.items(), ("vace-1.3B", VACE_ALONE)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_videos_equal_those_of_diffusers(pipes, media, task, given, monkeypatch):
    pipe, folder = pipes(task)
    request = replace(request_of(task, media, given), guidance_scale=4.0, shift=TASKS[task].shift)
    if "vace" in task:
        request = replace(request, context_scale=0.7)
    frames, todo = by_us(folder, task, request)
    if TASKS[task].boundary:
        assert {step.expert for step in todo.steps} == {"high_noise", "low_noise"}
    expected = by_diffusers(pipe, request, noise_of(todo), monkeypatch)
    assert frames.shape == (3, FRAMES, SIZE[1], SIZE[0])
    assert relative_error(frames, expected) < 1e-4


@pytest.mark.parametrize("task", GIVEN)
def test_bf16_is_no_farther_than_that_of_diffusers(pipes, media, task, monkeypatch):
    pipe, folder = pipes(task)
    request = replace(request_of(task, media, GIVEN[task]), guidance_scale=4.0, shift=TASKS[task].shift)
    exact, todo = by_us(folder, task, request)
    frames, _ = by_us(folder, task, request, dtype="bf16")
    parts = {n: c.to(torch.bfloat16) for n, c in deepcopy(pipe.components).items() if isinstance(c, torch.nn.Module)}
    narrow = type(pipe)(**pipe.components | parts)
    narrow.set_progress_bar_config(disable=True)
    theirs = by_diffusers(narrow, request, noise_of(todo), monkeypatch)
    assert 1e-4 < relative_error(frames, exact) <= 2 * relative_error(theirs, exact)


@pytest.mark.parametrize("task", GIVEN)
def test_what_is_given_is_seen(pipes, media, task):
    """Each picture, video and mask changes the clip, and so does the order of two references."""
    _, folder = pipes(task)
    engine = Engine(EngineConfig(task=task, checkpoint=str(folder), device="cpu"))
    request = replace(request_of(task, media, GIVEN[task]), num_steps=1)

    def latents(request):
        return engine.latents(engine.plan(request))

    made = latents(request)
    assert torch.equal(made, latents(request))
    others = {"one.png": "two.png", "two.png": "one.png", "video.mkv": "mask.mkv", "mask.mkv": "video.mkv"}
    for name, file in GIVEN[task].items():
        changed = str(media / others[file]) if isinstance(file, str) else tuple(str(media / f) for f in reversed(file))
        assert relative_error(latents(replace(request, **{name: changed})), made) > 1e-4, name
    if "vace" in task:
        assert relative_error(latents(replace(request, context_scale=0.5)), made) > 1e-4
        assert torch.equal(latents(replace(request, context_scale=1.0)), made)
