"""Linears in 8 bits: what they compute, which are chosen, how they are loaded, and what a whole video makes of them."""

import json
from dataclasses import replace

import pytest
import torch
from models import random_dit, relative_error, write_dit, write_native
from safetensors.torch import load_file, save_file
from torch import nn

from bench.quality import FORMS, PROMPTS, emulated, linear_errors, psnr, quantized, sqnr, synthetic_errors, videos
from wan_fast import Engine, EngineConfig, Request, WanFastError, plan
from wan_fast.backends import FUSED_8BIT, OF_ATTENTION
from wan_fast.checkpoint import open_dit
from wan_fast.cli import main
from wan_fast.counting import count_work
from wan_fast.dit import WanDiT, grid_of
from wan_fast.kernels import KERNELS, Quantized, Quantizer
from wan_fast.loading import load_model
from wan_fast.manifest import DiTDims, dit_shapes
from wan_fast.quantize import QuantizedLinear, forms_of, quantize_weight, shared, swap, takes
from wan_fast.schemes import Form, as_stored, default_keep, described, kept, linear_of, quantized_at_load, settle

DIMS = DiTDims(dim=256, ffn_dim=320, num_heads=2, num_layers=2, in_dim=48, out_dim=48, text_dim=64, text_len=16)
TINY = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
CAT = Request(prompt="a red circle on white moves left", num_steps=2, seed=1)
ALL_FORMS = [Form(p, s, s) for p in ("fp8", "int8") for s in ("row", "block")]
each_form = pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: f"{form.precision}-{form.weight}")


@pytest.fixture
def anywhere():
    """FP8 on a CPU, by the references: for tests alone."""
    with emulated():
        yield


# --- a linear ---------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize(("K", "N"), [(300, 140), (128, 256), (7, 3)])
def test_a_weight_comes_back_within_its_rounding(form, K, N):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    weight[N // 2] *= 100
    weight[0] = 0
    values, scale = quantize_weight(weight, form)
    assert values.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[form.precision]
    assert scale.shape == ((N,) if form.weight == "row" else (-(-N // 128), -(-K // 128)))
    assert torch.isfinite(scale).all() and (scale > 0).all()
    spread = scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    error = (values.float() * spread - weight).abs()
    # half a step: of e4m3 with its 3 bits 1/16 of the value, below 2^-6 half of 2^-9 of the scale; of integers half the scale
    allowed = torch.maximum(weight.abs() / 16, spread * 2**-10) if form.precision == "fp8" else spread * 0.5
    assert (error <= allowed * (1 + 1e-5)).all()
    # the whole range is used
    assert values.float().abs().max() == {"fp8": 448, "int8": 127}[form.precision]


@each_form
def test_a_linear_in_8_bits_computes_nearly_the_same(form):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(300, 140).requires_grad_(False)
    x = torch.randn(2, 5, 300, generator=generator)
    assert sqnr(quantized(linear, form)(x), linear(x)) >= 25


def test_a_linear_takes_what_is_quantised_already():
    linear = quantized(nn.Linear(300, 140).requires_grad_(False), Form("int8"))
    x = torch.randn(2, 5, 300)
    assert torch.equal(linear(linear.quantized(x)), linear(x))
    assert takes(linear) == Quantizer(torch.int8)
    assert takes(nn.Linear(3, 4)) == torch.float32


def test_tokens_of_two_linears_are_quantised_once_where_both_want_the_same():
    first, second = (quantized(nn.Linear(64, 32).requires_grad_(False), Form("int8")) for _ in range(2))
    x = torch.randn(3, 64)
    assert isinstance(shared(x, first, second), Quantized)
    assert torch.equal(second(shared(x, first, second)), second(x))
    other = quantized(nn.Linear(64, 32).requires_grad_(False), Form("int8", "block", "block"))
    assert shared(x, first, other) is x
    assert shared(x, first, nn.Linear(64, 32)) is x


def test_smoothing_moves_outliers_into_the_weight():
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(256, 64).requires_grad_(False)
    x = torch.randn(50, 256, generator=generator)
    x[:, 3] *= 200
    smooth = (linear.weight.abs().amax(0) / x.abs().amax(0)).sqrt()
    plain = quantized(linear, Form("int8"))
    values, scale = quantize_weight(linear.weight / smooth, Form("int8"))
    smoothed = QuantizedLinear(256, 64, Form("int8", smooth=True))
    state = {"weight": values, "weight_scale": scale, "bias": linear.bias.detach(), "smooth": smooth}
    smoothed.load_state_dict(state, assign=True)
    assert sqnr(smoothed(x), linear(x)) > sqnr(plain(x), linear(x)) + 6


def test_a_calibrated_scale_is_that_of_all_tokens():
    linear = nn.Linear(256, 64).requires_grad_(False)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(3))
    values, scale = quantize_weight(linear.weight, Form("fp8"))
    fixed = QuantizedLinear(256, 64, Form("fp8", input="tensor"))
    state = {"weight": values, "weight_scale": scale, "bias": linear.bias.detach(), "input_scale": x.abs().max() / 448}
    fixed.load_state_dict(state, assign=True)
    assert sqnr(fixed(x), linear(x)) >= 25
    # what is larger than any seen is cut off, and does no harm to the others
    louder = torch.cat([x, 10 * x])
    assert torch.equal(fixed(louder)[:50], fixed(x))
    assert relative_error(fixed(louder)[50:], linear(10 * x)) > 0.3


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_rows_do_not_touch_one_another(precision):
    """An outlier of 1e4, a row of zeros and a row with a NaN: the others come out as they do alone."""
    linear = quantized(nn.Linear(77, 40).requires_grad_(False), Form(precision))
    x = torch.randn(5, 77)
    odd = x.clone()
    odd[1, 3], odd[2], odd[3, 5] = 1e4, 0, float("nan")
    y = linear(odd)
    assert torch.equal(y[[0, 4]], linear(x)[[0, 4]])
    assert torch.equal(y[2], linear.bias)
    assert y[3].isnan().all() and not y[[0, 1, 2, 4]].isnan().any()


# --- which, and how ---------------------------------------------------------------------------------------------------


def test_linears_of_the_blocks_and_no_others():
    shapes = dit_shapes(DIMS)
    forms = quantized_at_load(shapes, "fp8", "row", 0)
    own = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")
    assert set(forms) == {f"blocks.{i}.{linear}" for i in range(2) for linear in own}
    others = ("patch_embedding.weight", "head.head.weight", "time_projection.1.weight", "text_embedding.0.weight")
    for name in (*others, "blocks.0.modulation", "blocks.0.self_attn.norm_q.weight", "blocks.0.self_attn.q.bias"):
        assert linear_of(name) is None
    # the model has them all
    model = WanDiT(DIMS)
    swap(model, forms)
    assert forms_of(model) == forms
    assert not [name for name, m in model.named_modules() if type(m) is nn.Linear and name.startswith("blocks.")]


@pytest.mark.parametrize(("layers", "keep"), [(40, 3), (30, 2), (6, 1), (2, 0)])
def test_the_rule_keeps_as_many_blocks_as_published(layers, keep):
    assert default_keep(layers) == keep
    assert kept(layers, keep) == [*range(keep), *range(layers - keep, layers)]


@pytest.mark.parametrize(
    ("asked", "scaling", "keep", "capability", "stored", "expected"),
    [
        ("auto", "auto", None, None, "", set()),
        ("bf16", "auto", None, None, "", set()),
        ("int8", "auto", None, None, "", {("int8", "row", "row", False)}),
        ("int8", "block", 0, (8, 0), "", {("int8", "block", "block", False)}),
        ("fp8", "auto", None, (8, 9), "", {("fp8", "row", "row", False)}),
        ("auto", "auto", None, (9, 0), "fp8", {("fp8", "row", "row", True)}),
        ("fp8", "row", None, (9, 0), "fp8", {("fp8", "row", "row", True)}),
        ("auto", "auto", None, (9, 0), "int8", {("int8", "row", "row", True)}),
        ("auto", "auto", None, None, "int8", {("int8", "row", "row", True)}),
        # the checkpoint's own precision, where the device has none: converted
        ("auto", "auto", None, None, "fp8", set()),
        ("auto", "auto", None, (8, 0), "fp8", set()),
        ("bf16", "auto", None, (9, 0), "fp8", set()),
    ],
)
def test_forms_follow_what_is_asked_the_device_and_the_file(asked, scaling, keep, capability, stored, expected):
    shapes = dit_shapes(DIMS)
    precisions = {name: stored for name in shapes if stored and linear_of(name)}
    scales = {name: {"weight_scale": (shapes[name][0],)} for name in precisions}
    forms, why = settle(asked, scaling, keep, capability, shapes, precisions, scales)
    assert {(f.precision, f.weight, f.input, f.stored) for f in forms.values()} == expected
    assert why


@pytest.mark.parametrize(
    ("asked", "scaling", "keep", "capability", "stored", "words"),
    [
        ("fp8", "auto", None, None, "", "a CPU has no FP8 products; take --precision int8"),
        ("fp8", "auto", None, (8, 0), "", "compute capability 8.0 has no FP8 .* take --precision int8"),
        ("fp8", "auto", None, (8, 6), "fp8", "compute capability 8.6 has no FP8 .* take --precision auto"),
        ("fp8", "auto", None, None, "fp8", "a CPU has no FP8 products; take --precision auto"),
        ("fp8", "auto", None, (7, 5), "", "has no FP8 .* take --precision bf16"),
        ("auto", "block", None, None, "fp8", "--scaling is for linears in 8 bits"),
        ("auto", "auto", 1, (8, 0), "fp8", "--keep_blocks is for linears and attention in 8 bits"),
        ("int8", "auto", None, (7, 5), "", "compute capability 7.5 is below 8.0; take --precision bf16"),
        ("int8", "auto", None, (9, 0), "fp8", "linears are FP8 e4m3 already; take --precision fp8"),
        ("fp8", "auto", None, (9, 0), "int8", "linears are INT8 already; take --precision int8"),
        ("fp8", "tensor", None, (9, 0), "", "needs calibrated scales.*wan-fast quantize"),
        ("fp8", "block", None, (9, 0), "fp8", "the checkpoint has a scale per token and per output channel"),
        ("fp8", "auto", 1, (9, 0), "fp8", "--keep_blocks cannot undo"),
        ("int8", "auto", 1, None, "", "--keep_blocks 1 at either end leaves none of 2 blocks"),
        ("bf16", "row", None, None, "", "--scaling is for linears in 8 bits"),
        ("auto", "auto", 2, None, "", "--keep_blocks is for linears and attention in 8 bits"),
    ],
)
def test_what_cannot_be_is_refused_with_words(asked, scaling, keep, capability, stored, words):
    shapes = dit_shapes(DIMS)
    precisions = {name: stored for name in shapes if stored and linear_of(name)}
    scales = {name: {"weight_scale": (shapes[name][0],)} for name in precisions}
    with pytest.raises(WanFastError, match=words):
        settle(asked, scaling, keep, capability, shapes, precisions, scales)


def test_a_precision_asked_for_is_not_silently_none():
    """Only q of the joint linear is in 8 bits: it is converted where nothing is asked, and refused where FP8 is."""
    shapes = dit_shapes(DIMS)
    only_q = {name: "fp8" for name in shapes if name.endswith("self_attn.q.weight")}
    scales = {name: {"weight_scale": (256,)} for name in only_q}
    assert settle("auto", "auto", None, (9, 0), shapes, only_q, scales)[0] == {}
    with pytest.raises(WanFastError, match="no linear of the checkpoint is whole in FP8"):
        settle("fp8", "auto", None, (9, 0), shapes, only_q, scales)
    both = {"blocks.0.ffn.0.weight": "fp8", "blocks.0.ffn.2.weight": "int8"}
    assert settle("bf16", "auto", None, (9, 0), shapes, both, {})[0] == {}
    with pytest.raises(WanFastError, match="both FP8 and INT8"):
        settle("auto", "auto", None, (9, 0), shapes, both, {})
    said = described({"blocks.0.ffn.0": Form("fp8", stored=True)}, shapes)
    assert "1 linears of 1 blocks" in said and "7 more of these are not; blocks 1 are not" in said


def test_joint_linears_are_stored_only_where_all_parts_are_alike():
    shapes = dit_shapes(DIMS)
    name = "blocks.0.self_attn.{}.weight"
    rows = {name.format(part): {"weight_scale": (256,)} for part in "qkv"}
    assert as_stored(shapes, dict.fromkeys(rows, "fp8"), rows) == {"blocks.0.self_attn.qkv": Form("fp8", stored=True)}
    assert as_stored(shapes, {name.format("q"): "fp8", name.format("k"): "fp8"}, rows) == {}
    fixed = {key: {**kinds, "input_scale": ()} for key, kinds in rows.items()}
    assert as_stored(shapes, dict.fromkeys(rows, "fp8"), fixed)["blocks.0.self_attn.qkv"].input == "tensor"
    # of integers the scale of a token is used
    assert as_stored(shapes, dict.fromkeys(rows, "int8"), fixed)["blocks.0.self_attn.qkv"].input == "row"


def test_blocks_of_a_joint_linear_must_not_reach_from_q_into_k():
    for dim, forms in ((256, {"blocks.0.self_attn.qkv": Form("fp8", "block", "block", stored=True)}), (320, {})):
        shapes = {f"blocks.0.self_attn.{part}.weight": (dim, dim) for part in "qkv"}
        scales = {name: {"weight_scale": (-(-dim // 128), -(-dim // 128))} for name in shapes}
        assert as_stored(shapes, dict.fromkeys(shapes, "fp8"), scales) == forms


def test_options_are_checked_at_the_door():
    for wrong in (
        {"precision": "fp4"},
        {"scaling": "row-wise"},
        {"keep_blocks": -1},
        {"precision": "int8", "scaling": "tensor"},
    ):
        with pytest.raises(WanFastError):
            replace(TINY, **wrong)


# --- models -----------------------------------------------------------------------------------------------------------


@each_form
def test_a_block_quantises_each_tensor_once(form):
    """Five per block and step: the three norms and GELU in their own passes, and what attention returns."""
    model = random_dit(DIMS)
    swap_values(model, form)
    calls = []
    x = torch.randn(1, 48, 2, 4, 6)
    context = model.prepare([torch.randn(5, 64)], grid_of(x.shape))
    with Calls(calls):
        model(x, torch.tensor([[500.0]]), context)
    counts = {name: calls.count(name) for name in set(calls)}
    gelu = "gemm_8bit_gelu" if form.input == "block" else "gelu_tanh_quantized"
    assert counts["adaln_modulate_quantized"] == 1
    # the last one of the model norms for the head, which is not in 8 bits
    assert counts["gated_residual_adaln_quantized"] == 3 * DIMS.num_layers - 1 and counts["gated_residual_adaln"] == 1
    assert counts[gelu] == DIMS.num_layers
    assert counts["quantize_rows"] == 2 * DIMS.num_layers
    assert counts["gemm_8bit"] == (6 if form.input == "row" else 5) * DIMS.num_layers
    assert "gelu_tanh" not in counts and "adaln_modulate" not in counts


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down the operators of wan_fast that run."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "wan_fast":
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def swap_values(model, form):
    """Quantise the linears of the blocks in place."""
    for name in quantized_at_load(dit_shapes(model.dims), form.precision, form.weight, 0):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized(model.get_submodule(name), form))


@each_form
def test_a_loaded_model_is_the_quantised_one(tmp_path, form):
    model = random_dit(DIMS)
    write_dit(tmp_path, {n: t.clone() for n, t in model.state_dict().items()}, DIMS)
    forms = quantized_at_load(dit_shapes(DIMS), form.precision, form.weight, 0)
    loaded = load_model(lambda: WanDiT(DIMS), open_dit(tmp_path), "cpu", lambda name: torch.float32, forms=forms)
    swap_values(model, form)
    assert forms_of(loaded) == forms
    expected = dict(model.named_buffers())
    found = dict(loaded.named_buffers())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)


def test_weights_in_8_bits_are_planned_as_they_are_held(tmp_path):
    config = replace(TINY, precision="int8")
    engine, todo = Engine(config), plan(config, CAT)
    held = sum(t.nbytes for t in (*engine.models["model"].parameters(), *engine.models["model"].buffers()))
    assert todo.memory.weights["DiT"] == held
    assert todo.memory.weights["DiT"] < 0.6 * plan(TINY, CAT).memory.weights["DiT"]
    assert "INT8, a scale per token and per output channel" in todo.linears
    forms = forms_of(engine.models["model"])
    once = ("cross_attn.k.weight", "cross_attn.v.weight")
    shapes = {name: shape for name, shape in dit_shapes(engine.models["model"].dims).items() if linear_of(name) in forms}
    per_token = sum(2 * shape[0] * shape[1] for name, shape in shapes.items() if not name.endswith(once))
    # two steps, two branches
    assert todo.flops_8bit == {"int8": pytest.approx(4 * todo.tokens * per_token)}
    assert json.loads(json.dumps(todo.to_dict(), default=str))["linears"] == todo.linears


def test_kept_blocks_stay_as_they_are():
    engine = Engine(replace(TINY, precision="int8", keep_blocks=2))
    quantised = {name.split(".")[1] for name in forms_of(engine.models["model"])}
    assert quantised == {"2", "3"}
    assert "blocks 0-1, 4-5 are not" in plan(replace(TINY, precision="int8", keep_blocks=2), CAT).linears


def test_two_experts_in_8_bits(tmp_path):
    config = EngineConfig(task="t2v-A14B", checkpoint=str(write_native(tmp_path, "t2v-A14B")), device="cpu", precision="int8")
    request = Request(prompt="a", size=(64, 64), num_frames=5, num_steps=3, seed=0)
    engine = Engine(config)
    exact = Engine(replace(config, precision="auto")).generate(request).latents
    assert all(forms_of(engine.models[name]) for name in ("high_noise", "low_noise"))
    # with random weights errors are not damped: the scheme is judged on tiny below
    assert relative_error(engine.generate(request).latents, exact) < 0.2


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A native checkpoint and its DiT's tensors."""
    folder = write_native(tmp_path_factory.mktemp("native"), "t2v-1.3B")
    return folder, load_file(folder / "diffusion_pytorch_model.safetensors")


SMALL = Request(prompt="a", size=(64, 64), num_frames=5, num_steps=2, seed=0)


def with_dit(native, tmp_path, state, name="diffusion_pytorch_model.safetensors"):
    """The checkpoint with another DiT's file; returns its configuration."""
    for file in native[0].iterdir():
        if file.name != "diffusion_pytorch_model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    save_file(state, tmp_path / name)
    return EngineConfig(task="t2v-1.3B", checkpoint=str(tmp_path), device="cpu")


def in_rows(state, form):
    """The tensors of a DiT with its linears in 8 bits and scales [N, 1] beside them."""
    written = {}
    for name, tensor in state.items():
        if linear_of(name):
            written[name], scale = quantize_weight(tensor, form)
            written[f"{name}_scale"] = scale[:, None].contiguous()
        else:
            written[name] = tensor
    return written


def test_a_published_int8_file_is_computed_with_as_it_is(native, tmp_path):
    config = with_dit(native, tmp_path, in_rows(native[1], Form("int8")), "t2v_int8_anyname.safetensors")
    on_the_fly = replace(config, checkpoint=str(native[0]), precision="int8")
    assert "INT8, a scale per token and per output channel (as the checkpoint has them)" in plan(config, SMALL).linears
    stored = Engine(config)
    assert {form.stored for form in forms_of(stored.models["model"]).values()} == {True}
    assert torch.equal(stored.generate(SMALL).latents, Engine(on_the_fly).generate(SMALL).latents)
    # asked for otherwise
    exact = Engine(replace(config, precision="bf16"))
    assert not forms_of(exact.models["model"])
    assert relative_error(stored.generate(SMALL).latents, exact.generate(SMALL).latents) < 0.1
    with pytest.raises(WanFastError, match="a CPU has no FP8 products"):
        Engine(replace(config, precision="fp8"))
    with emulated(), pytest.raises(WanFastError, match="linears are INT8 already"):
        Engine(replace(config, precision="fp8"))


def test_a_calibrated_fp8_file_runs_with_its_scales(native, tmp_path, anywhere):
    """ComfyUI's first generation: a scale per weight and per input; q, k and v each with their own."""
    written = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in native[1].items():
        written[name] = tensor
        if linear_of(name):
            scale = tensor.abs().max() / 448
            written[name] = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            own = name.removesuffix(".weight")
            written[f"{own}.scale_weight"], written[f"{own}.scale_input"] = scale, torch.tensor(0.05 if ".q." in name else 0.04)
    config = with_dit(native, tmp_path, written)
    engine = Engine(config)
    qkv = engine.models["model"].get_submodule("blocks.0.self_attn.qkv")
    assert qkv.form == Form("fp8", input="tensor", stored=True) and qkv.input_scale == torch.tensor(0.05)
    assert qkv.weight_scale.unique().numel() == 3
    exact = Engine(replace(config, precision="bf16"))
    assert relative_error(engine.generate(SMALL).latents, exact.generate(SMALL).latents) < 0.3
    # without its input scales
    rows = Engine(replace(config, scaling="row")).models["model"].get_submodule("blocks.0.self_attn.qkv")
    assert rows.form.input == "row" and rows.input_scale is None


def test_an_input_scale_of_one_says_that_there_is_none(native, tmp_path, anywhere):
    written = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in native[1].items():
        written[name] = tensor
        if linear_of(name):
            scale = tensor.abs().max() / 448
            written[name] = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            own = name.removesuffix(".weight")
            written[f"{own}.scale_weight"], written[f"{own}.scale_input"] = scale, torch.tensor(1.0)
    engine = Engine(with_dit(native, tmp_path, written))
    assert {form.input for form in forms_of(engine.models["model"]).values()} == {"row"}
    assert engine.generate(SMALL).latents.isfinite().all()


def test_where_a_device_has_no_fp8_the_file_is_converted_and_the_plan_says_so(native, tmp_path):
    config = with_dit(native, tmp_path, in_rows(native[1], Form("fp8")))
    assert "converted as it is loaded, as a CPU has no FP8 products" in plan(config, SMALL).linears
    engine = Engine(config)
    assert not forms_of(engine.models["model"])
    plain = Engine(replace(config, checkpoint=str(native[0])))
    assert 0 < relative_error(engine.generate(SMALL).latents, plain.generate(SMALL).latents) < 0.3
    with pytest.raises(WanFastError, match="a CPU has no FP8 products"):
        Engine(replace(config, precision="fp8"))


def test_smoothed_parts_of_a_joint_linear_must_agree(native, tmp_path):
    written = in_rows(native[1], Form("int8"))
    for name in native[1]:
        if linear_of(name):
            value = 2.0 if ".k." in name else 1.0
            written[name.replace(".weight", ".pre_quant_scale")] = torch.full((native[1][name].shape[1],), value)
    config = with_dit(native, tmp_path, written)
    (tmp_path / "config.json").unlink()
    described = json.loads((native[0] / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(WanFastError, match=r"q, k and v of blocks\.0\.self_attn\.qkv are smoothed by different vectors"):
        Engine(config)


# --- the picture ------------------------------------------------------------------------------------------------------


def test_every_linear_keeps_25_db_on_real_tokens(anywhere):
    with torch.inference_mode():
        found = linear_errors(Engine(replace(TINY, dtype="fp32")), FORMS, steps=2)
    assert len(found) == 8 * len(FORMS)
    for (kind, form), values in found.items():
        assert min(values) >= 25, f"{kind} in {form}: {min(values):.1f} dB"


def test_every_scheme_keeps_25_db_on_heavy_tails():
    with torch.inference_mode():
        for (kind, form), (value,) in synthetic_errors(FORMS).items():
            assert value >= 25, f"{kind} in {form}: {value:.1f} dB"


def test_videos_keep_30_db(anywhere):
    """One of the 20 prompts of bench.quality."""
    (exact,) = videos({}, PROMPTS[:1])
    for precision in ("fp8", "int8"):
        (frames,) = videos({"precision": precision}, PROMPTS[:1])
        assert 30 <= psnr(frames, exact) < 60, precision


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_run_and_plan_say_what_is_in_8_bits(tmp_path, capsys):
    words = ["--task", "ti2v-5B", "--ckpt_dir", "tiny", "--prompt", "a red ball", "--precision", "int8", "--sample_steps", "1"]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "linears     32 linears of 4 blocks: INT8" in said and "gemm_8bit" in said
    target = tmp_path / "a.mp4"
    assert main(["run", *words, "--save_file", str(target), "--quiet"]) == 0
    assert target.is_file() and "linears     32 linears of 4 blocks: INT8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "fp8"], "a CPU has no FP8 products; take --precision int8"),
        (["--precision", "int4"], "precision must be one of auto bf16 fp8 int8, got 'int4'"),
        (["--precison", "int8"], "did you mean --precision?"),
        (["--precision", "int8", "--keep_blocks", "3"], "leaves none of 6 blocks"),
        (
            ["--precision", "int8", "--lora", "x.safetensors"],
            "--lora 'x.safetensors' does not exist",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, said, capsys):
    command = ["run", "--task", "ti2v-5B", "--ckpt_dir", "tiny", "--device", "cpu", "--prompt", "a", *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_profile_counts_products_in_8_bits():
    config = replace(TINY, precision="int8")
    engine, plain = Engine(config), Engine(TINY)
    work = count_work(engine, engine.plan(CAT))["denoise", "matrix product"]
    expected = count_work(plain, plain.plan(CAT))["denoise", "matrix product"]
    assert work.flops == expected.flops
    assert work.bytes < expected.bytes


def test_the_plan_lists_the_operators_of_8_bits():
    in_8_bits = {name for name in KERNELS if "8bit" in name or "quantize" in name}
    assert in_8_bits - {*OF_ATTENTION} == {*FUSED_8BIT}
