"""Quantised files in every dialect: written here from random weights, opened in a checkpoint folder, read back and compared."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from models import write_native
from safetensors.torch import load_file, save_file

from wan_fast.checkpoint import Packed, check, describe, open_checkpoint, read_tensors
from wan_fast.config import WanFastError
from wan_fast.headers import read_header
from wan_fast.names import DIT_NAMES, native_name
from wan_fast.tasks import TASKS

TI2V = TASKS["ti2v-5B"]
DIT = "diffusion_pytorch_model.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAX = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}
Q, FFN = "blocks.0.self_attn.q", "blocks.1.ffn.2"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("native"), "ti2v-5B")


@pytest.fixture(scope="module")
def original(native):
    return load_file(native / DIT)


@pytest.fixture
def folder(native, tmp_path):
    """A checkpoint whose DiT and text encoder may be exchanged."""
    return shutil.copytree(native, tmp_path / "checkpoint")


def linears(state, but=()):
    """Modules of the blocks' linear layers, 256 or 320 wide: neither is a multiple of the other, 320 none of 128."""
    return [
        n[:-7] for n in state if n.startswith("blocks.") and state[n].ndim == 2 and n.endswith(".weight") and n[:-7] not in but
    ]


def tiles(weight, size):
    """[rows / size, columns / size, size, size], padded with zeros."""
    rows, columns = (-(-n // size) * size for n in weight.shape)
    padded = torch.zeros(rows, columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(rows // size, size, columns // size, size).transpose(1, 2)


def over_blocks(scale, weight):
    """The scale of each element's block of 128 x 128."""
    row, column = (torch.arange(size) // 128 for size in weight.shape)
    return scale[row[:, None], column]


def quantise(weight, span, dtype=E4M3):
    """Values and scale as the converters compute them; the scale in the shape that `span` tells, and spread over the weight."""
    top = MAX[dtype]
    if span == "tensor":
        scale = weight.abs().max() / top
        spread = scale
    elif span == "row":
        scale = weight.abs().amax(1) / top
        spread = scale[:, None]
    elif span == "block":
        scale = tiles(weight, 128).abs().amax((2, 3)) / top
        spread = over_blocks(scale, weight)
    else:  # groups of 64 within a row
        scale = weight.view(weight.shape[0], -1, 64).abs().amax(2, keepdim=True) / top
        spread = scale.repeat(1, 1, 64).view(weight.shape)
    values = weight / spread
    values = values.round().clamp(-128, 127).to(dtype) if dtype is torch.int8 else values.to(dtype)
    return values, scale, spread


def quantised(original, span, dtype=E4M3, *, weight="weight", scale="weight_scale", shape=None, but=()):
    """A state dict with the blocks' linears quantised, and what each weight is: values * scale in fp32."""
    state = {name: tensor.clone() for name, tensor in original.items()}
    exact = {}
    for module in linears(original, but):
        values, factor, spread = quantise(state.pop(f"{module}.weight"), span, dtype)
        state[f"{module}.{weight}"], state[f"{module}.{scale}"] = values, shape(factor).contiguous() if shape else factor
        exact[f"{module}.weight"] = values.float() * spread
    return state, exact


def put(folder, state, metadata=None):
    save_file(state, folder / DIT, metadata)
    return folder


def opened_dit(folder):
    opened = open_checkpoint(folder)
    check(opened, TI2V)
    return opened.experts["model"]


def rounding(weight, dtype):
    """How far a quantised weight may be off: half a step of int8, half a unit in the last place of fp8."""
    greatest = weight.abs().max()
    if dtype is torch.int8:
        return torch.full_like(weight, 0.51 / 127) * greatest
    # 3 bits of mantissa from 2^-6, 2 from 2^-14; below, steps of 2^-9 and 2^-16
    relative, step = {E4M3: (2**-4, 2**-9), E5M2: (2**-3, 2**-16)}[dtype]
    return (relative * weight.abs()).clamp_min(step / 2 * greatest / MAX[dtype]) * 1.01


def verify(part, original, exact, dtype, *, dialect, packed, times=1.0):
    """Every tensor by its native name: quantised ones exactly what the file holds and near the original, others untouched."""
    assert part.dialect == dialect
    assert part.stored_8bit == dict.fromkeys(exact if packed else (), packed)
    read = dict(read_tensors(part))
    assert set(read) == set(original)
    for name, tensor in read.items():
        assert isinstance(tensor, Packed) == (name in part.stored_8bit), name
        weight = tensor.dequantized() if isinstance(tensor, Packed) else tensor
        if name not in exact:
            assert torch.equal(weight, original[name]), name
            continue
        assert weight.dtype == torch.float32 and torch.equal(weight, exact[name]), name
        assert ((weight - original[name]).abs() <= times * rounding(original[name], dtype)).all(), name
    return read


def assert_refused(folder, *says):
    with pytest.raises(WanFastError) as error:
        check(open_checkpoint(folder), TI2V)
    for words in says:
        assert words in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


# --- dialects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_raw_fp8(folder, original, dtype):
    state, exact = dict(original), {}
    for module in [*linears(original), "text_embedding.0"]:
        state[f"{module}.weight"] = original[f"{module}.weight"].to(dtype)
        exact[f"{module}.weight"] = state[f"{module}.weight"].float()
    part = opened_dit(put(folder, state))
    read = dict(read_tensors(part))
    assert part.dialect == "raw fp8" and part.stored_8bit == (dict.fromkeys(exact, "fp8") if dtype is E4M3 else {})
    for name, weight in exact.items():
        tensor = read[name].dequantized() if dtype is E4M3 else read[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weight)
        # not scaled: steps of 2^-9 below 2^-6
        assert ((tensor - original[name]).abs() <= rounding(original[name], dtype).clamp_min(2**-10)).all()
    assert part.num_bytes == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("marker", [0, 2])
@pytest.mark.parametrize("input_scale", [None, 1.0, 0.25])
def test_scaled_fp8(folder, original, prefix, marker, input_scale):
    """ComfyUI's first generation; a marker of two elements asks for high precision."""
    state, exact = quantised(original, "tensor", scale="scale_weight")
    if input_scale:
        state |= {f"{module}.scale_input": torch.tensor(input_scale) for module in linears(original)}
    state["scaled_fp8"] = torch.zeros(marker, dtype=E4M3)
    part = opened_dit(put(folder, {prefix + name: tensor for name, tensor in state.items()}))
    read = verify(part, original, exact, E4M3, dialect="scaled_fp8", packed=None if marker else "fp8")
    if not marker:
        assert read[f"{Q}.weight"].scale.shape == (256,)
        # 1 stands for none
        assert (read[f"{Q}.weight"].input_scale is None) == (input_scale != 0.25)
        if input_scale == 0.25:
            assert read[f"{Q}.weight"].input_scale.shape == () and read[f"{Q}.weight"].input_scale == 0.25


@pytest.mark.parametrize(
    ("span", "shape", "packed"),
    [
        ("tensor", lambda s: s.reshape(1), "fp8"),
        ("row", lambda s: s[:, None], "fp8"),
        ("row", lambda s: s[:, None, None], "fp8"),
        ("group", None, None),
    ],
    ids=["1", "out-1", "out-1-1", "out-blocks-1"],
)
def test_musubi_tuner_shapes(folder, original, span, shape, packed):
    state, exact = quantised(original, span, scale="scale_weight", shape=shape)
    verify(opened_dit(put(folder, state)), original, exact, E4M3, dialect="scaled_fp8", packed=packed)


def test_scaled_e5m2_with_bf16_scales(folder, original):
    state, exact = quantised(original, "tensor", E5M2, scale="scale_weight")
    for module in linears(original):
        scale = state[f"{module}.scale_weight"] = state[f"{module}.scale_weight"].bfloat16()
        exact[f"{module}.weight"] = state[f"{module}.weight"].float() * scale.float()
    verify(opened_dit(put(folder, state)), original, exact, E5M2, times=1.1, dialect="scaled_fp8", packed=None)


COMFY = [
    ("float8_e4m3fn", "tensor", E4M3, "fp8"),
    ("float8_e5m2", "tensor", E5M2, None),
    ("int8_tensorwise", "tensor", torch.int8, "int8"),
    ("int8_tensorwise", "row", torch.int8, "int8"),
    ("int8_blockwise", "block", torch.int8, "int8"),
]


def comfy_layers(state, original, layer, in_header):
    """The formats of the layers, in the header or in a tensor each."""
    if in_header:
        layers = {module: layer for module in linears(original)}
        return state, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    text = torch.frombuffer(bytearray(json.dumps(layer).encode()), dtype=torch.uint8)
    return {**state, **{f"{module}.comfy_quant": text.clone() for module in linears(original)}}, None


@pytest.mark.parametrize(("form", "span", "dtype", "packed"), COMFY)
@pytest.mark.parametrize("in_header", [False, True], ids=["tensors", "header"])
def test_comfy_quant(folder, original, form, span, dtype, packed, in_header):
    state, exact = quantised(original, span, dtype)
    part = opened_dit(put(folder, *comfy_layers(state, original, {"format": form}, in_header)))
    verify(part, original, exact, dtype, dialect="comfy_quant", packed=packed)


def test_comfy_quant_in_high_precision_and_fp8_in_bytes(folder, original):
    state, exact = quantised(original, "tensor")
    state |= {f"{module}.weight": state[f"{module}.weight"].view(torch.uint8) for module in linears(original)}
    layer = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    put(folder, *comfy_layers(state, original, layer, False))
    verify(opened_dit(folder), original, exact, E4M3, dialect="comfy_quant", packed=None)
    put(folder, *comfy_layers(state, original, {**layer, "full_precision_matrix_mult": False}, False))
    verify(opened_dit(folder), original, exact, E4M3, dialect="comfy_quant", packed="fp8")


@pytest.mark.parametrize(("dtype", "packed"), [(E4M3, "fp8"), (torch.int8, "int8")])
def test_lightx2v(folder, original, dtype, packed):
    state, exact = quantised(original, "row", dtype, shape=lambda scale: scale[:, None])
    read = verify(opened_dit(put(folder, state)), original, exact, dtype, dialect="weight_scale", packed=packed)
    assert read[f"{FFN}.weight"].scale.shape == (256,) and read[f"{FFN}.weight"].values.shape == (256, 320)


DIFFUSERS_NAMES = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
    ".modulation": ".scale_shift_table",
    ".norm3.": ".norm2.",
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    ".o.": ".to_out.0.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
}


def in_diffusers_names(state):
    renamed = {}
    for name, tensor in state.items():
        other = name
        for ours, theirs in DIFFUSERS_NAMES.items():
            other = other.replace(ours, theirs)
        for letter in "qkv":
            other = other.replace(f"attn1.{letter}.", f"attn1.to_{letter}.").replace(f"attn2.{letter}.", f"attn2.to_{letter}.")
        assert native_name(other, DIT_NAMES) == name
        renamed[other] = tensor
    return renamed


def modelopt(folder, state, algo, **more):
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "modelopt", "quant_algo": algo, **more}}
    (folder / "config.json").write_text(json.dumps(config))
    return put(folder, in_diffusers_names(state))


@pytest.mark.parametrize(
    ("algo", "span", "dtype", "packed"),
    [
        ("FP8", "tensor", E4M3, "fp8"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "row", E4M3, "fp8"),
        ("W8A8_SQ_PER_CHANNEL", "row", torch.int8, "int8"),
        ("W8A16", "row", torch.int8, None),
    ],
)
def test_modelopt(folder, original, algo, span, dtype, packed):
    """SmoothQuant: the file holds W / s, and the activation is to be multiplied by s."""
    smooth = {module: 0.5 + torch.rand(original[f"{module}.weight"].shape[1]) for module in linears(original)}
    smooth = smooth if algo == "W8A8_SQ_PER_CHANNEL" else {}
    ready = {**original, **{f"{m}.weight": original[f"{m}.weight"] / s for m, s in smooth.items()}}
    state, exact = quantised(ready, span, dtype)
    for module, s in smooth.items():
        state |= {f"{module}.pre_quant_scale": s, f"{module}.input_scale": torch.tensor(0.1)}
        exact[f"{module}.weight"] = exact[f"{module}.weight"] * s
    part = opened_dit(modelopt(folder, state, algo))
    # 3: W / s is up to twice as large, and the result is multiplied by up to 1.5
    read = verify(part, original, exact, dtype, dialect="modelopt", packed=packed, times=3 if smooth else 1)
    if smooth:
        weight, x = read[f"{FFN}.weight"], torch.randn(4, 320)
        assert weight.input_scale == torch.tensor(0.1) and torch.equal(weight.smooth, smooth[FFN])
        expected = (x * weight.smooth) @ (weight.values.float() * weight.scale[:, None]).T
        torch.testing.assert_close(x @ weight.dequantized().T, expected)


def test_modelopt_mixed_precision_goes_by_tensor(folder, original):
    state, exact = quantised(original, "tensor", but=(FFN,))
    state[f"{FFN}.weight"], state[f"{FFN}.weight_scale"], spread = quantise(original[f"{FFN}.weight"], "row", torch.int8)
    part = opened_dit(
        modelopt(folder, state, "MIXED_PRECISION", quantized_layers={"blocks.1.ffn.net.2": {"quant_algo": "W8A16"}})
    )
    assert part.stored_8bit == dict.fromkeys(exact, "fp8")
    assert torch.equal(dict(read_tensors(part))[f"{FFN}.weight"], state[f"{FFN}.weight"].float() * spread)
    bad = {"blocks.1.ffn.net.2": {"quant_algo": "NVFP4"}}
    assert_refused(modelopt(folder, state, "MIXED_PRECISION", quantized_layers=bad), "ModelOpt's NVFP4 (blocks.1.ffn.net.2)")


def turbo_scale(weight):
    """Blocks of 128 x 128, the greatest value at 128, which saturates at 127."""
    scale = tiles(weight, 128).abs().amax((2, 3)) / 128
    spread = over_blocks(scale, weight)
    return (weight / spread).round().clamp(-128, 127).to(torch.int8), scale, spread


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_turbodiffusion(folder, original, wrapped):
    state, exact = {**original}, {}
    for module in linears(original):
        weight = state.pop(f"{module}.weight")
        state[f"{module}.int8_weight"], state[f"{module}.scale"], spread = turbo_scale(weight)
        exact[f"{module}.weight"] = state[f"{module}.int8_weight"].float() * spread
    state["patch_embedding.weight"] = original["patch_embedding.weight"].flatten(1)
    (folder / DIT).unlink()
    file = {"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}, "step": 7} if wrapped else state
    torch.save(file, folder / "TurboWan-quant.pth")
    # the greatest value saturates, one step off
    verify(opened_dit(folder), original, exact, torch.int8, times=2, dialect="turbodiffusion", packed="int8")
    state["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"] = torch.zeros(128, 128)
    torch.save(state, folder / "TurboWan-quant.pth")
    assert_refused(folder, "sparse-linear attention", "proj_l")


@pytest.mark.parametrize("names", ["native", "diffusers"])
@pytest.mark.parametrize(
    ("span", "dtype", "packed"), [("row", E4M3, "fp8"), ("block", E4M3, "fp8"), ("block", torch.int8, "int8")]
)
def test_our_own_dialect(folder, original, span, dtype, packed, names):
    state, exact = quantised(original, span, dtype)
    if names == "diffusers":
        state = in_diffusers_names(state)
    put(folder, state, {"wan_fast_quantization": "{}"})
    read = verify(opened_dit(folder), original, exact, dtype, dialect="wan-fast", packed=packed)
    assert read[f"{FFN}.weight"].scale.shape == ((256,) if span == "row" else (2, 3))


def test_describe_and_bytes(folder, original):
    state, _ = quantised(original, "tensor", scale="scale_weight")
    state |= {f"{module}.scale_input": torch.tensor(0.5) for module in linears(original)}
    opened = open_checkpoint(put(folder, state))
    told = describe(opened)["parts"]
    assert told["DiT"]["quantisation"] == (
        "scaled_fp8: 20 f8_e4m3 linears, a scale per tensor, static input scales yes; 20 can be computed with as stored"
    )
    assert told["DiT"]["surplus"] == told["DiT"]["missing"] == "none" and told["VAE"]["quantisation"] == "none"
    part = opened.experts["model"]
    assert part.num_bytes == sum(tensor.nbytes for tensor in state.values())
    assert set(part.scales[f"{Q}.weight"]) == {"weight_scale", "input_scale"}


def test_shards(folder, original):
    """A scale may lie in another shard than its weight."""
    state, exact = quantised(original, "row")
    names = sorted(state)
    files = {name: f"diffusion_pytorch_model-0000{i % 2}.safetensors" for i, name in enumerate(names)}
    assert len({files[f"{Q}.weight"], files[f"{Q}.weight_scale"]}) == 2
    (folder / DIT).unlink()
    (folder / f"{DIT}.index.json").write_text(json.dumps({"weight_map": files}))
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    verify(opened_dit(folder), original, exact, E4M3, dialect="weight_scale", packed="fp8")


# --- what is wrong with them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(f"{Q}.weight_scale"), f"no scale for {Q}.weight"),
        (lambda s: s.pop(f"{Q}.weight"), f"scale {Q}.weight_scale without {Q}.weight"),
        (lambda s: s.update({f"{Q}.weight": torch.zeros(256, 256)}), "for a weight that is F32"),
        (lambda s: s.update({f"{FFN}.weight_scale": torch.ones(320)}), f"{FFN}.weight_scale of shape [320]"),
        (lambda s: s.update({f"{FFN}.weight_scale": torch.ones(3, 2)}), f"{FFN}.weight_scale of shape [3, 2]"),
        (lambda s: s.update({f"{FFN}.weight_scale": torch.ones(256, 3, 1)}), "of shape [256, 3, 1]"),
        (lambda s: s.update({f"{FFN}.input_scale": torch.ones(2)}), "input_scale of shape [2]"),
        (lambda s: s.update({f"{FFN}.pre_quant_scale": torch.ones(256)}), "pre_quant_scale of shape [256]"),
        (lambda s: s.update({f"{Q}.weight_scale": torch.zeros(256, 8, dtype=torch.uint8)}), "mxfp8"),
        (lambda s: s.update({f"{Q}.weight_scale": torch.zeros(256, 16, dtype=E4M3)}), "nvfp4"),
        (lambda s: s.update({f"{Q}.weight_global_scale": torch.ones(())}), f"nvfp4 ({Q}.weight_global_scale)"),
        (lambda s: s.update({f"{Q}.weight_scale_2": torch.ones(())}), "nvfp4"),
        (lambda s: s.update({f"{Q}.weight": torch.zeros(256, 128, dtype=torch.uint8)}), "U8"),
    ],
)
def test_weights_and_scales_that_do_not_match(folder, original, change, says):
    state, _ = quantised(original, "row")
    change(state)
    assert_refused(put(folder, state), DIT, says)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("kind", ["weight_scale", "input_scale", "pre_quant_scale"])
def test_scales_that_are_no_scales(folder, original, kind, value):
    """Told before the first tensor is read."""
    state, _ = quantised(original, "row", torch.int8)
    scale = torch.ones({"weight_scale": 256, "input_scale": 1, "pre_quant_scale": 320}[kind])
    scale[-1] = value
    part = opened_dit(put(folder, {**state, f"{FFN}.{kind}": scale}))
    with pytest.raises(WanFastError, match=rf"{value:g} in {FFN}\.{kind}"):
        next(read_tensors(part))


def test_two_scales_of_one_weight(folder, original):
    state, _ = quantised(original, "row")
    assert_refused(put(folder, {**state, f"{Q}.scale_weight": torch.ones(())}), f"stands twice in {str(folder)!r}: as {Q}")


def test_int8_without_any_scale(folder, original):
    assert_refused(
        put(folder, {**original, f"{Q}.weight": torch.zeros(256, 256, dtype=torch.int8)}), f"no scale for {Q}.weight"
    )


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        *[({"format": form}, form) for form in ("nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16")],
        ({"format": "int8_tensorwise", "convrot": True}, "int8_tensorwise with convrot"),
        ({"format": "float8_e4m3fn"}, "is I8"),
        ({}, "None"),
    ],
)
def test_comfy_formats_that_are_refused(folder, original, layer, says):
    state, _ = quantised(original, "row", torch.int8)
    assert_refused(put(folder, *comfy_layers(state, original, layer, False)), says)


def test_odd_comfy_json(folder, original):
    state, _ = quantised(original, "row", torch.int8)
    put(folder, {**state, f"{Q}.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)})
    assert_refused(folder, "no JSON")
    put(folder, state, {"_quantization_metadata": '{"layers": {"blocks.7.x": {"format": "int8_tensorwise"}}}'})
    assert_refused(folder, "blocks.7.x.weight", "is missing")


@pytest.mark.parametrize("algo", ["NVFP4", "NVFP4_AWQ", "MXFP8", "W4A8_AWQ", None])
def test_modelopt_formats_that_are_refused(folder, original, algo):
    assert_refused(modelopt(folder, original, algo), f"ModelOpt's {algo}", "take the model in")


def test_other_quantisers_are_refused(folder, original):
    assert_refused(modelopt(folder, original, "x", quant_method="bitsandbytes"), "bitsandbytes")


def test_a_marked_file_is_no_raw_cast(folder, original):
    """The marker promises scales, so that without one a cast is not assumed."""
    state = {**original, f"{Q}.weight": original[f"{Q}.weight"].to(E4M3), "scaled_fp8": torch.zeros(0, dtype=E4M3)}
    assert_refused(put(folder, state), f"no scale for {Q}.weight")


def test_a_quantised_vae(folder):
    """Comes in fp32 where a cast or a scale will do."""
    file = folder / "Wan2.2_VAE.pth"
    state = torch.load(file)
    name = "decoder.conv1.weight"
    torch.save({**state, name: state[name].to(E4M3)}, file)
    vae = open_checkpoint(folder).vae
    assert not vae.stored_8bit and torch.equal(dict(read_tensors(vae))[name], state[name].to(E4M3).float())
    torch.save({**state, name: state[name].to(torch.int8)}, file)
    assert_refused(folder, f"no scale for {name}")


# --- text encoders ------------------------------------------------------------------------------------------------------


TRANSFORMERS_NAMES = {
    "token_embedding.": "shared.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm1.": "layer.0.layer_norm.",
    "norm2.": "layer.1.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}


def renamed(name, table, block, norm):
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return norm if name == "norm.weight" else name.replace("blocks.", block, 1)


@pytest.mark.parametrize("form", ["comfy", "lightx2v", "kijai"])
def test_text_encoders_come_dequantised(folder, form):
    original = torch.load(folder / T5)
    state, exact = quantised(
        {n: t.float() for n, t in original.items()},
        "row" if form == "lightx2v" else "tensor",
        torch.int8 if form == "lightx2v" else E4M3,
        scale="weight_scale" if form == "lightx2v" else "scale_weight",
        shape=(lambda scale: scale[:, None]) if form == "lightx2v" else None,
        but=[n[:-7] for n in original if "pos_embedding" in n],
    )
    (folder / T5).unlink()
    if form == "kijai":
        state = {
            n: t.to(E4M3) if f"{n[:-7]}.scale_weight" in state else t for n, t in original.items() if not n.endswith("scale")
        }
        state = {n: original[n].to(E4M3) if n in exact else original[n] for n in original}
        exact = {n: state[n].float() for n in exact}
        save_file(state, folder / "umt5-xxl-enc-fp8_e4m3fn.safetensors")
    elif form == "lightx2v":
        torch.save(state, folder / "models_t5_umt5-xxl-enc-int8.pth")
    else:
        state = {
            renamed(n, TRANSFORMERS_NAMES, "encoder.block.", "encoder.final_layer_norm.weight"): t for n, t in state.items()
        }
        state |= {"scaled_fp8": torch.zeros(0, dtype=E4M3), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
        (folder / "text_encoder").mkdir()
        save_file(state, folder / "text_encoder" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    opened = open_checkpoint(folder)
    check(opened, TI2V)
    part = opened.text_encoder
    read = dict(read_tensors(part))
    assert len(exact) == 14 and part.stored_8bit == {} and set(read) == set(original)
    for name, tensor in read.items():
        assert torch.equal(tensor, exact[name] if name in exact else original[name].to(tensor.dtype)), name
        assert tensor.dtype == torch.float32 or name not in exact


# --- GGUF ---------------------------------------------------------------------------------------------------------------


def q8_0(block):
    return half(block[:2]) * block[2:].view(torch.int8).float()


def q4_0(block):
    return half(block[:2]) * (torch.cat([block[2:] & 15, block[2:] >> 4]).float() - 8)


def q4_k(block):
    d, dmin, s, qs = half(block[:2]), half(block[2:4]), block[4:16].int(), block[16:]
    values = []
    for j in range(8):
        low = j < 4
        scale = s[j] & 63 if low else (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
        least = s[j + 4] & 63 if low else (s[j + 4] >> 4) | (s[j] >> 6) << 4
        part = qs[32 * (j // 2) : 32 * (j // 2) + 32]
        values.append(d * scale * (part >> 4 if j % 2 else part & 15) - dmin * least)
    return torch.cat(values)


def q6_k(block):
    ql, qh, scales, d = block[:128].int(), block[128:192].int(), block[192:208].view(torch.int8), half(block[208:])
    e = torch.arange(256)
    h, g, i = e // 128, e % 128 // 32, e % 32
    low = ql[64 * h + 32 * (g % 2) + i] >> 4 * (g // 2) & 15
    return d * scales[e // 16] * ((low | (qh[32 * h + i] >> 2 * g & 3) << 4) - 32)


def half(two_bytes):
    return two_bytes.contiguous().view(torch.float16).float()


DECODERS = {"Q8_0": (34, q8_0), "Q4_0": (18, q4_0), "Q4_K": (144, q4_k), "Q6_K": (210, q6_k)}


def random_blocks(kind, rows, columns, generator):
    """Bytes of random blocks with ordinary fp16 scales, and what they stand for."""
    size, decode = DECODERS[kind]
    count = rows * columns // (32 if size < 100 else 256)
    blocks = torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8)
    halves = {"Q6_K": (208,), "Q4_K": (0, 2)}.get(kind, (0,))
    for at in halves:
        scales = (0.01 + torch.rand(count, 1, generator=generator)) / 64
        blocks[:, at : at + 2] = scales.half().view(torch.uint8)
    return blocks.view(rows, -1), torch.cat([decode(block) for block in blocks]).view(rows, columns)


def write_gguf(file, tensors, arch, **fields):
    """tensors: name -> (ggml type, array)."""
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    for key, value in fields.items():
        writer.add_array(key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf(state):
    return {name: ("F32", tensor.float().numpy()) for name, tensor in state.items()}


@pytest.fixture
def gguf_folder(folder):
    (folder / DIT).unlink()
    (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize("kind", DECODERS)
def test_gguf_dit(gguf_folder, original, kind):
    """Blocks decode as ggml defines them; no config.json is needed."""
    pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    names = [f"{Q}.weight", "blocks.0.ffn.0.weight"]  # [256, 256] and [320, 256]
    expected, tensors = dict(original), as_gguf(original)
    for name in names:
        blocks, expected[name] = random_blocks(kind, *original[name].shape, generator)
        tensors[name] = (kind, blocks.numpy())
    bias = "blocks.0.ffn.0.bias"
    tensors[bias], expected[bias] = ("F16", original[bias].half().numpy()), original[bias].half().float()
    write_gguf(gguf_folder / "Wan.gguf", tensors, "wan")
    part = opened_dit(gguf_folder)
    assert part.dialect == "gguf" and part.stored_8bit == {}
    assert part.tensors[names[1]].dtype == kind and part.tensors[names[1]].shape == (320, 256)
    read = dict(read_tensors(part))
    assert set(read) == set(original)
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert f"gguf: 2 {kind.lower()} linears" in part.quantisation
    assert part.num_bytes == sum(data.nbytes for _, data in tensors.values())


def test_gguf_near_the_original(gguf_folder, original):
    """Quantised by the library, and with a shape that ggml cannot hold."""
    gguf = pytest.importorskip("gguf")
    tensors = as_gguf(original)
    for module in linears(original):
        q8 = gguf.quants.quantize(original[f"{module}.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0)
        tensors[f"{module}.weight"] = ("Q8_0", q8)
    shape = original["patch_embedding.weight"].shape
    tensors["patch_embedding.weight"] = ("F32", original["patch_embedding.weight"].flatten().numpy())
    write_gguf(
        gguf_folder / "Wan.gguf", tensors, "sd.cpp", **{"comfy.gguf.orig_shape.patch_embedding.weight": list(shape)},
        **{"tokenizer.ggml.tokens": ["a"] * 40},
    )  # fmt: skip
    read = dict(read_tensors(opened_dit(gguf_folder)))
    assert torch.equal(read["patch_embedding.weight"], original["patch_embedding.weight"])
    for module in linears(original):
        weight = original[f"{module}.weight"]
        # the scale of a block is kept in fp16: up to 127 * 2^-11 of a step
        assert ((read[f"{module}.weight"] - weight).abs() <= 1.2 * rounding(weight, torch.int8)).all()


def test_gguf_files_that_are_refused(gguf_folder, original, monkeypatch):
    pytest.importorskip("gguf")
    file = gguf_folder / "Wan.gguf"
    write_gguf(file, {n: t for n, t in as_gguf(original).items() if n != "patch_embedding.weight"}, "wan")
    assert_refused(gguf_folder, "no patch_embedding.weight", "another conversion")
    write_gguf(file, as_gguf(original), "wan")
    content = file.read_bytes()
    for keep in (0, 3, 30, 2000, len(content) - 64):
        file.write_bytes(content[:keep])
        assert_refused(gguf_folder, "Wan.gguf", "download it again")
    file.write_bytes(b"GGML" + content[4:])
    assert_refused(gguf_folder, "begins with b'GGML'")
    write_gguf(file, {**as_gguf(original), "x.weight": ("IQ1_S", torch.zeros(1, 50, dtype=torch.uint8).numpy())}, "wan")
    assert_refused(gguf_folder, "ggml type 19")
    write_gguf(file, as_gguf(original), "wan", **{f"comfy.gguf.orig_shape.{Q}.weight": [3, 3]})
    assert_refused(gguf_folder, "two shapes")
    file.write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(gguf_folder, "pip install 'wan-fast[gguf]'")


GGUF_NAMES = {
    "token_embedding.": "token_embd.",
    "attn.q.": "attn_q.",
    "attn.k.": "attn_k.",
    "attn.v.": "attn_v.",
    "attn.o.": "attn_o.",
    "pos_embedding.embedding.": "attn_rel_b.",
    "norm1.": "attn_norm.",
    "norm2.": "ffn_norm.",
    "ffn.gate.0.": "ffn_gate.",
    "ffn.fc1.": "ffn_up.",
    "ffn.fc2.": "ffn_down.",
}


def test_gguf_text_encoder(folder):
    gguf = pytest.importorskip("gguf")
    original = {n: t.float() for n, t in torch.load(folder / T5).items()}
    (folder / T5).unlink()
    tensors = {}
    for name, tensor in original.items():
        stored = renamed(name, GGUF_NAMES, "enc.blk.", "enc.output_norm.weight")
        q8 = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0) if tensor.shape[-1] % 32 == 0 else None
        keep = q8 is None or tensor.ndim < 2
        tensors[stored] = ("F32", tensor.numpy()) if keep else ("Q8_0", q8)
    write_gguf(folder / "umt5.gguf", tensors, "t5encoder")
    opened = open_checkpoint(folder)
    check(opened, TI2V)
    read = dict(read_tensors(opened.text_encoder))
    assert set(read) == set(original) and opened.text_encoder.dialect == "gguf"
    for name, tensor in read.items():
        assert ((tensor - original[name]).abs() <= 1.2 * rounding(original[name], torch.int8)).all(), name


# --- files by other names -----------------------------------------------------------------------------------------------


def test_the_one_dit_by_any_name(folder):
    (folder / DIT).rename(folder / "wan2.2_ti2v_5B_fp16.safetensors")
    assert opened_dit(folder).config["num_layers"] == 2
    (folder / "config.json").unlink()
    assert opened_dit(folder).config == {}
    shutil.copy(folder / "wan2.2_ti2v_5B_fp16.safetensors", folder / "another.safetensors")
    assert_refused(folder, "several files with a DiT: another.safetensors, wan2.2_ti2v_5B_fp16.safetensors; keep one")
    (folder / "another.safetensors").unlink()
    file = folder / "wan2.2_ti2v_5B_fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(folder, "truncated")
    file.unlink()
    assert_refused(folder, "holds no Wan checkpoint")


def test_experts_and_diffusers_folders(tmp_path):
    folder = write_native(tmp_path / "a", "t2v-A14B")
    for name in ("high", "low"):
        (folder / f"{name}_noise_model" / DIT).rename(folder / f"{name}_noise_model" / f"wan_{name}.safetensors")
        (folder / f"{name}_noise_model" / "config.json").unlink()
    check(open_checkpoint(folder), TASKS["t2v-A14B"])
    (folder / "high_noise_model" / "wan_high.safetensors").unlink()
    with pytest.raises(WanFastError, match=r"high_noise_model.*nor another file with a DiT"):
        open_checkpoint(folder)


def test_opening_needs_no_torch(folder, original):
    put(folder, quantised(original, "block")[0])
    code = "import sys; from pathlib import Path; from wan_fast.checkpoint import open_checkpoint; "
    code += f"open_checkpoint(Path({str(folder)!r})); print('torch' in sys.modules, 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_fp8_in_a_pth_header(tmp_path):
    state = {"a": torch.zeros(2, 3).to(E4M3), "b": torch.zeros(4).to(E5M2), "c": torch.zeros(2, dtype=torch.int8)}
    torch.save({"model_state": state, "step": 3}, tmp_path / "x.pth")
    assert read_header(tmp_path / "x.pth").tensors == {"a": ("F8_E4M3", (2, 3)), "b": ("F8_E5M2", (4,)), "c": ("I8", (2,))}
