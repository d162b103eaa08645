from dataclasses import replace

import pytest
import torch
from models import random_dit, relative_error
from recipe import recipe_tensor, recipe_weights

from wan_fast.dit import WanDiT, grid_of, sinusoid
from wan_fast.kernels import qk_norm_rope, rope_table, rope_table_of
from wan_fast.manifest import DiTDims, stays_fp32
from wan_fast.names import DIT_NAMES, native_name

TINY = DiTDims(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=64)

# first 8 and last 4 elements and mean |.| of the official model's output, on `recipe` weights
GOLDEN = {
    "t2v": (
        [0.854694, 0.523980, -0.196531, 1.252430, -1.185405, -0.869520, -1.064656, 0.390665],
        [-1.436708, -1.441191, 0.362531, 0.972274],
        0.8876556,
    ),
    "ti2v-image": (
        [-1.039259, -0.051562, 0.080166, 0.413924, -0.779083, 1.239694, 0.614781, -0.012140],
        [1.208357, 2.726738, 1.844377, 0.006847],
        0.9036795,
    ),
    "ti2v-text": (
        [-1.738031, -0.015312, -0.942622, -0.750517, -1.543438, 0.351353, -1.476976, -1.248906],
        [1.248177, 2.763615, 1.891960, 0.004002],
        0.9026517,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
@torch.inference_mode()
def test_official_output(case):
    dims = TINY if case == "t2v" else replace(TINY, in_dim=48, out_dim=48)
    model = recipe_weights(WanDiT(dims).requires_grad_(False))
    x = recipe_tensor((16, 3, 6, 8), 1000) if case == "t2v" else recipe_tensor((48, 3, 4, 6), 1005)
    timestep = {"t2v": [[875.0]], "ti2v-image": [[0.0, 750.0]], "ti2v-text": [[750.0]]}[case]
    context = model.prepare([recipe_tensor((7, 64), 1001)], grid_of(x.shape))
    out = model(x[None], torch.tensor(timestep), context, split=6 if case == "ti2v-image" else 0).flatten()
    first, last, size = GOLDEN[case]
    torch.testing.assert_close(out[:8], torch.tensor(first), atol=2e-5, rtol=0)
    torch.testing.assert_close(out[-4:], torch.tensor(last), atol=2e-5, rtol=0)
    assert out.abs().mean().item() == pytest.approx(size, abs=2e-6)


def test_sinusoid():
    at = sinusoid(torch.tensor([[999.0, 1.0]]), 256)[0]
    expected = torch.tensor([0.99964985, 0.96378248, -0.39899176, 0.70482050])
    torch.testing.assert_close(at[0, :4], expected, atol=1e-7, rtol=0)
    expected = torch.tensor([-0.02646075, -0.26668958, -0.91695451, 0.70938570])
    torch.testing.assert_close(at[0, 128:132], expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(at[1, [127, 255]], torch.tensor([0.9999999942, 0.0001074608]), atol=1e-7, rtol=0)


def test_rope_table():
    cosine, sine = rope_table(8, 128)
    for position, pair, value in (
        (5, 1, (-0.9891, -0.1475)),
        (5, 21, (1.0000, 0.0008)),
        (5, 23, (-0.9965, -0.0830)),
        (7, 44, (-0.1965, -0.9805)),
    ):
        found = torch.stack([cosine[position, pair], sine[position, pair]])
        torch.testing.assert_close(found, torch.tensor(value), atol=6e-5, rtol=0)


def test_a_table_by_token_turns_each_axis_by_its_own_frequencies():
    places = torch.tensor([[30, 5, 7], [-3, 5, 7], [3, 5, 7], [0, -1, 0]])
    cosine, sine = rope_table_of(places, 128)
    by_position = rope_table(31, 128)
    for token, (t, h, w) in ((0, (30, 5, 7)), (2, (3, 5, 7))):
        for pairs, position in ((slice(0, 22), t), (slice(22, 43), h), (slice(43, 64), w)):
            assert torch.equal(cosine[token, pairs], by_position[0, position, pairs])
            assert torch.equal(sine[token, pairs], by_position[1, position, pairs])
    # a time below zero is the conjugate: the same cosines, sines of the other sign
    assert torch.equal(cosine[1], cosine[2])
    assert torch.equal(sine[1, :22], -sine[2, :22]) and torch.equal(sine[1, 22:], sine[2, 22:])
    assert torch.equal(sine[3, 22:43], -by_position[1, 1, 22:43]) and not sine[3, :22].any() and not sine[3, 43:].any()


def test_rope_turns_adjacent_pairs_by_their_axis_and_keeps_their_length():
    x = torch.randn(1, 12, 2, 48, generator=torch.Generator().manual_seed(0))
    table, weight = rope_table(3, 16), torch.ones(1, 48)
    y, normed = x.clone(), x.clone()
    qk_norm_rope(y, weight, table, grid=(3, 2, 2), heads=3)
    qk_norm_rope(normed, weight, None, heads=3)
    assert torch.equal(y[:, :, 1], x[:, :, 1])  # only the first of the two
    x, y = normed[:, :, 0].unflatten(-1, (3, 16)), y[:, :, 0].unflatten(-1, (3, 16))
    torch.testing.assert_close(y[:, 0], x[:, 0])  # position 0 does not turn
    torch.testing.assert_close(y.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1))
    # token 11 is at (2, 1, 1); of 8 pairs 4 belong to t, 2 to h, 2 to w
    for pair, position in ((2, 2), (5, 1), (7, 1)):
        a, b, cosine, sine = *x[0, 11, 1, 2 * pair : 2 * pair + 2], *table[:, position, pair]
        assert y[0, 11, 1, 2 * pair].item() == pytest.approx((a * cosine - b * sine).item(), abs=1e-6)
        assert y[0, 11, 1, 2 * pair + 1].item() == pytest.approx((a * sine + b * cosine).item(), abs=1e-6)


@torch.inference_mode()
def test_two_rows_equal_one_where_their_timesteps_are_equal():
    model = random_dit(replace(TINY, in_dim=48, out_dim=48))
    x = torch.randn(2, 48, 3, 4, 6)
    context = model.prepare([torch.randn(7, 64), torch.randn(512, 64)], grid_of(x.shape))
    one = model(x, torch.tensor([[600.0], [20.0]]), context)
    for split in (0, 6, 11, 18):
        two = model(x, torch.tensor([[600.0, 600.0], [20.0, 20.0]]), context, split=split)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_batch_equals_one_by_one():
    model = random_dit(TINY)
    x, text, t = torch.randn(2, 16, 1, 4, 14), [torch.randn(3, 64), torch.randn(90, 64)], torch.tensor([[999.0], [3.0]])
    together = model(x, t, model.prepare(text, grid_of(x.shape)))
    for i in range(2):
        alone = model(x[i : i + 1], t[i : i + 1], model.prepare(text[i : i + 1], grid_of(x.shape)))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_bf16_keeps_the_residual_stream_and_the_modulation_in_fp32():
    exact, model = random_dit(TINY), random_dit(TINY)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if stays_fp32(name) else torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((*(t.dtype for t in args[:3]), out.dtype)))
        block.self_attn.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    model.head.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    x, text, t = torch.randn(1, 16, 3, 6, 8), [torch.randn(7, 64)], torch.tensor([[731.0]])
    out = model(x, t, model.prepare(text, grid_of(x.shape)))
    fp32, bf16 = torch.float32, torch.bfloat16
    # stream, normed, modulation
    block = [(bf16, bf16), (fp32, bf16, fp32, bf16)]
    assert seen == [*block, *block, (fp32, fp32)]
    assert out.dtype == fp32
    assert 1e-4 < relative_error(out, exact(x, t, exact.prepare(text, grid_of(x.shape)))) < 1e-2


@torch.inference_mode()
def test_text_is_projected_once():
    model = random_dit(TINY)
    calls = []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 16, 1, 4, 4)
    context = model.prepare([torch.randn(7, 64)], grid_of(x.shape))
    for t in (900.0, 500.0, 100.0):
        model(x, torch.tensor([[t]]), context)
    assert len(calls) == len(model.blocks)


def test_unpadded_text_longer_than_the_model_takes_is_refused():
    model = random_dit(replace(TINY, text_len=8))
    with pytest.raises(ValueError, match="8 text tokens"):
        model.prepare([torch.randn(9, 64)], (1, 2, 2))


@pytest.mark.parametrize(
    ("layers", "channels", "text_dim", "shape"),
    [(2, 16, 64, (3, 6, 10)), (3, 48, 96, (1, 4, 14)), (1, 16, 32, (5, 2, 2))],
)
@torch.inference_mode()
def test_equals_diffusers(layers, channels, text_dim, shape):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(layers)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
        ffn_dim=320,
        num_layers=layers,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    dims = replace(TINY, ffn_dim=320, num_layers=layers, in_dim=channels, out_dim=channels, text_dim=text_dim)
    ours = WanDiT(dims)
    ours.load_state_dict({native_name(n, DIT_NAMES): t for n, t in theirs.state_dict().items()})
    x, text = torch.randn(2, channels, *shape), torch.randn(2, 512, text_dim)
    t = torch.tensor([731.0, 12.0])
    expected = theirs(x, t, text, return_dict=False)[0]
    ours.requires_grad_(False)
    assert relative_error(ours(x, t[:, None], ours.prepare(list(text), grid_of(x.shape))), expected) < 5e-6
    tokens = shape[0] * shape[1] * shape[2] // 4
    split = shape[1] * shape[2] // 4
    per_token = torch.where(torch.arange(tokens) < split, 0.0, t[:, None])
    expected = theirs(x, per_token, text, return_dict=False)[0]
    rows = torch.stack([torch.zeros(2), t], dim=1)
    assert relative_error(ours(x, rows, ours.prepare(list(text), grid_of(x.shape)), split=split), expected) < 5e-6


def test_state_dict_has_the_official_names_whose_tensors_are_views():
    model = random_dit(TINY)
    state = model.state_dict()
    q, k, v = (state[f"blocks.1.self_attn.{letter}.weight"] for letter in "qkv")
    assert torch.equal(torch.cat([q, k, v]), model.blocks[1].self_attn.qkv.weight)
    assert not any("qkv" in name or "norm_qk" in name for name in state)
    state["blocks.1.self_attn.norm_k.weight"].fill_(7.0)
    assert model.blocks[1].self_attn.norm_qk.view(2, -1)[1].eq(7).all()
    other = random_dit(TINY, seed=1)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
