from dataclasses import replace
from functools import partial

import pytest
import torch
from models import CLIP, random_clip, relative_error, write_native
from recipe import recipe_tensor, uniform

from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.dit import WanDiT
from wan_fast.encoders import ImageEncoder, TextEncoder, Tokenizer, clean
from wan_fast.loading import load_model
from wan_fast.manifest import ClipDims, DiTDims, VaeDims, clip_shapes, text_shapes
from wan_fast.tasks import TASKS
from wan_fast.vae import WanVAE

TINY = open_checkpoint(locate("tiny", TASKS["ti2v-5B"]))


@torch.inference_mode()
def test_official_output():
    shapes = text_shapes(100, 64, 64, 128, heads=4, layers=2)
    weights = {}
    for key, (name, shape) in enumerate(sorted(shapes.items())):
        values = uniform(key, torch.Size(shape).numel())
        gain = 1 + 0.1 * values if "norm" in name else None
        scaled = values * (3 * shape[0] / values.numel()) ** 0.5
        weights[name] = (gain if gain is not None else scaled).float().view(shape)
    encoder = TextEncoder(shapes).requires_grad_(False).eval()
    encoder.load_state_dict(weights)
    out = encoder(torch.tensor([5, 17, 42, 99, 3, 8, 1])).flatten()
    first = [-1.889537, 0.010901, -0.201631, 0.090561, -0.865701, -0.751501, -1.374811, -0.735929]
    torch.testing.assert_close(out[:8], torch.tensor(first), atol=2e-5, rtol=0)
    last = [0.570732, -0.515286, 0.976602, 2.635662]
    torch.testing.assert_close(out[-4:], torch.tensor(last), atol=2e-5, rtol=0)
    assert out.abs().mean().item() == pytest.approx(0.7966854, abs=2e-6)


@pytest.mark.parametrize("prompt", ["a red ball bounces", "一个红色圆球向左移动", "fish & chips €5 🙂"])
@torch.inference_mode()
def test_equals_transformers_on_padded_text(prompt):
    from transformers import AutoTokenizer, UMT5EncoderModel

    part = TINY.text_encoder
    theirs = UMT5EncoderModel.from_pretrained(TINY.path / "text_encoder", dtype=torch.float32)
    theirs_tokenizer = AutoTokenizer.from_pretrained(TINY.tokenizer)
    tokens = theirs_tokenizer(prompt, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    ids = Tokenizer(TINY.tokenizer)(prompt)
    count = int(tokens.attention_mask.sum())
    assert ids.tolist() == tokens.input_ids[0, :count].tolist()
    expected = theirs(tokens.input_ids, tokens.attention_mask).last_hidden_state[0, :count]
    ours = load_model(lambda: TextEncoder(part.shapes), part, "cpu", lambda name: torch.float32)(ids)
    assert relative_error(ours, expected) < 5e-6


def test_tokens_end_with_eos_and_stop_at_512():
    tokenizer = Tokenizer(TINY.tokenizer)
    assert tokenizer("a red ball")[-1] == 1
    assert tokenizer("").tolist() == [1]
    long = tokenizer("ball " * 2000)
    assert len(long) == 512 and long[-1] == 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a   cat\n\tsits ", "a cat sits"),
        ("rock &amp;amp; roll", "rock & roll"),
        ("schÃ¶n", "schön"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
        ("it’s “fine”", 'it\'s "fine"'),
        ("全角　空格", "全角 空格"),
    ],
)
def test_cleaning(text, cleaned):
    assert clean(text) == cleaned


@torch.inference_mode()
def test_official_image_tokens():
    """Before the last of three layers, as the weights' numbers are those of all tensors in the order of their names."""
    dims = ClipDims(dim=64, ffn_dim=256, num_heads=4, num_layers=2, patch=14, size=28)
    others = {"visual.head": (64, 32), "visual.post_norm.weight": (64,), "visual.post_norm.bias": (64,)}
    shapes = {**clip_shapes(replace(dims, num_layers=3)), **others}
    shapes |= {"visual.cls_embedding": (1, 1, 64), "visual.pos_embedding": (1, 5, 64)}
    weights = {}
    for key, (name, shape) in enumerate(sorted(shapes.items())):
        values = uniform(key, torch.Size(shape).numel())
        if len(shape) > 1:
            weights[name] = (values * (3 * shape[0] / values.numel()) ** 0.5).float().view(shape)
        else:
            weights[name] = (0.1 * values + ("norm" in name and name.endswith("weight"))).float()
    used = {n: weights[n].view(shape) for n, shape in clip_shapes(dims).items()}
    encoder = ImageEncoder(dims).requires_grad_(False).eval()
    encoder.load_state_dict(used)
    # it resizes and scales what it is given: the inverse of that
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    out = encoder((recipe_tensor((3, 28, 28), 1012) * std + mean - 0.5) / 0.5).flatten()
    first = [-0.349059, 4.463136, -0.262810, -0.563630, 1.093315, -0.353532, -0.858320, 1.404030]
    torch.testing.assert_close(out[:8], torch.tensor(first), atol=2e-5, rtol=0)
    last = [-1.278096, 2.646205, 0.753604, -1.113950]
    torch.testing.assert_close(out[-4:], torch.tensor(last), atol=2e-5, rtol=0)
    assert out.abs().mean().item() == pytest.approx(1.4190527, abs=2e-6)


@torch.inference_mode()
def test_pictures_are_pressed_into_the_square_without_antialiasing():
    dims, picture = CLIP, torch.rand(3, 67, 301) * 2 - 1
    encoder = ImageEncoder(dims).requires_grad_(False).eval()
    encoder.load_state_dict({name: random_clip()[name].reshape(shape) for name, shape in clip_shapes(dims).items()})
    square = torch.nn.functional.interpolate(picture[None], size=(224, 224), mode="bicubic")[0]
    assert relative_error(encoder(square), encoder(picture)) < 1e-6
    smoothed = torch.nn.functional.interpolate(picture[None], size=(224, 224), mode="bicubic", antialias=True)[0]
    assert relative_error(encoder(smoothed), encoder(picture)) > 1e-3


@torch.inference_mode()
def test_fp16_as_on_a_gpu_is_near():
    exact = ImageEncoder(CLIP).requires_grad_(False).eval()
    exact.load_state_dict({name: random_clip()[name].reshape(shape) for name, shape in clip_shapes(CLIP).items()})
    picture = torch.rand(3, 60, 80) * 2 - 1
    expected = exact(picture)
    tokens = exact.half()(picture)
    assert tokens.dtype == torch.float16 and relative_error(tokens, expected) < 4e-3


def test_a_loaded_model_is_on_one_device(tmp_path):
    """Also what is in no file: it has to be made where the weights go."""
    opened = open_checkpoint(write_native(tmp_path, "flf2v-14B"))
    dit, vae = opened.experts["model"], opened.vae
    parts = {
        partial(WanDiT, DiTDims.of_shapes(dit.shapes, dit.config)): dit,
        partial(WanVAE, VaeDims.of_shapes(vae.shapes)): vae,
        partial(TextEncoder, opened.text_encoder.shapes): opened.text_encoder,
        partial(ImageEncoder, ClipDims.of_shapes(opened.image_encoder.shapes)): opened.image_encoder,
    }
    for build, part in parts.items():
        model = load_model(build, part, "meta", lambda name: torch.float32)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}, build.func
