import pytest
import torch
from models import relative_error
from recipe import uniform

from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.encoders import TextEncoder, Tokenizer, clean
from wan_fast.loading import load_model
from wan_fast.manifest import text_shapes
from wan_fast.tasks import TASKS

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
