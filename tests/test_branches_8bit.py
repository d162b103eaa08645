"""Models with an image or a VACE branch in 8 bits: which of their linears, computed, as stored, and written."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from clips_of import noise, write_clip
from lora_files_of import diffusers
from models import relative_error, small_dims, write_native
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from bench.quality_8bit import emulated
from wan_fast import Engine, EngineConfig, Request, WanFastError, plan
from wan_fast.checkpoint import open_checkpoint
from wan_fast.dit import WanDiT
from wan_fast.export import Recipe, write_quantized
from wan_fast.manifest import DiTDims, dit_shapes
from wan_fast.names import DIT_NAMES, native_name
from wan_fast.quantize import forms_of, quantize_weight, swap
from wan_fast.schemes import Form, as_stored, described, linear_of, num_blocks, quantized_at_load
from wan_fast.tasks import TASKS

TASKS_HERE = ("i2v-14B", "i2v-A14B", "flf2v-14B", "vace-1.3B")
DIT = "diffusion_pytorch_model.safetensors"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
# of the small models, of two blocks: 8 of each and two more for pictures; of one block of the VACE branch 8
COUNT = {"i2v-14B": 20, "i2v-A14B": 16, "flf2v-14B": 20, "vace-1.3B": 24}
of_each_task = pytest.mark.parametrize("task", TASKS_HERE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """task -> a small checkpoint of it, the request of a clip, and its latents in fp32."""
    folder = tmp_path_factory.mktemp("branches")
    for name in ("first", "last"):
        Image.fromarray(noise(1, 64, 64, seed=len(name))[0]).save(folder / f"{name}.png")
    first, last = (str(folder / f"{name}.png") for name in ("first", "last"))
    video = str(write_clip(folder / "video.mkv", noise(5, 64, 64)))
    given = {
        "image": {"image": first},
        "first_last": {"first_frame": first, "last_frame": last},
        "vace": {"src_video": video},
    }
    found = {}

    def of(task):
        if task not in found:
            (folder / task).mkdir()
            checkpoint = write_native(folder / task, task)
            short = {"prompt": "a", "size": (64, 64), "num_frames": 5, "num_steps": 2, "seed": 0}
            request = Request(**short, **given[TASKS[task].kind])
            found[task] = checkpoint, request, latents(Engine(config_of(task, checkpoint)), request)
        return found[task]

    return of


def config_of(task, checkpoint, **options):
    return EngineConfig(task=task, checkpoint=str(checkpoint), device="cpu", **options)


def latents(engine, request):
    return engine.generate(request, on_pixels=lambda pixels: None).latents


def dits(engine):
    return [engine.models[name] for name in engine.spec.experts]


# --- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "weights", "words"),
    [
        ("t2v-14B", 400, "272 linears of 34 blocks"),
        ("i2v-14B", 480, "340 linears of 34 blocks"),
        ("flf2v-14B", 480, "340 linears of 34 blocks"),
        ("vace-14B", 480, "272 linears of 34 blocks and 64 linears of 8 blocks of the VACE branch"),
        ("vace-1.3B", 450, "208 linears of 26 blocks and 120 linears of 15 blocks of the VACE branch"),
    ],
)
def test_as_many_as_in_published_files(task, weights, words):
    """400 of 40 blocks, 480 with an image branch; a branch's blocks are no ends of the model."""
    shapes = dit_shapes(DiTDims.of_task(TASKS[task]))
    assert sum(linear_of(name) is not None for name in shapes) == weights
    assert num_blocks(shapes) == TASKS[task].num_layers
    assert num_blocks({"blocks.1.ffn.0.weight": (1, 1), "vace_blocks.5.ffn.0.weight": (1, 1)}) == 2
    keep = 3 if "14B" in task else 2
    forms = quantized_at_load(shapes, "fp8", "row", keep)
    last = num_blocks(shapes) - 1
    ends = f"; blocks 0-{keep - 1}, {last - keep + 1}-{last} are not"
    assert described(forms, shapes) == f"{words}: FP8 e4m3, a scale per token and per output channel{ends}"


@of_each_task
def test_the_blocks_have_no_others(task):
    """But for what joins a branch to the model; and the model has them all."""
    dims = small_dims(task)
    model, shapes = WanDiT(dims), dit_shapes(dims)
    forms = quantized_at_load(shapes, "int8", "row", 0)
    swap(model, forms)
    assert forms_of(model) == forms and len(forms) == COUNT[task]
    left = Counter(
        name.split(".")[-1] for name, module in model.named_modules() if type(module) is nn.Linear and "locks." in name
    )
    assert left == ({"before_proj": 1, "after_proj": 1} if TASKS[task].vace_layers else {})
    assert not [name for name in shapes if linear_of(name) and name.startswith(("img_emb.", "vace_patch"))]


def test_what_is_missing_is_said_of_each_stack():
    """A text model in 8 bits with a branch of another precision beside it, say."""
    dims = replace(DiTDims.of_task(TASKS["vace-14B"]), num_layers=4, vace_layers=(0, 1, 2))
    shapes = dit_shapes(dims)
    stored = {name: "fp8" for name in shapes if linear_of(name) and not name.startswith("vace_")}
    forms = as_stored(shapes, stored, {})
    assert described(forms, shapes).startswith("32 linears of 4 blocks: FP8") and described(forms, shapes).endswith(
        "; blocks 0-2 of the VACE branch are not"
    )
    stored = {name: "fp8" for name in shapes if linear_of(name) and ".0.ffn" not in name and "blocks.1." not in name}
    assert described(as_stored(shapes, stored, {}), shapes).endswith(
        "; 4 more of these are not; blocks 1 and blocks 1 of the VACE branch are not"
    )


# --- computed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["row", "block"])
@of_each_task
def test_a_clip_is_nearly_the_same(task, scaling, made):
    """Measured: an error of 0.012 to 0.016 in either form."""
    checkpoint, request, exact = made(task)
    engine = Engine(config_of(task, checkpoint, precision="int8", scaling=scaling))
    assert 1e-3 < relative_error(latents(engine, request), exact) < 0.03
    todo = engine.plan(request)
    held = [sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) for model in dits(engine)]
    assert held == [count for label, count in todo.memory.weights.items() if label.startswith("DiT")]
    per_token = 0
    for model in dits(engine)[:1]:
        assert forms_of(model) == quantized_at_load(dit_shapes(model.dims), "int8", scaling, 0)
        once = (".cross_attn.k", ".cross_attn.v", "_img")
        inside = [m for name, m in model.named_modules() if name in forms_of(model) and not name.endswith(once)]
        per_token = sum(2 * linear.weight.numel() for linear in inside)
    # two steps, two branches
    assert todo.flops_8bit == {"int8": 4 * todo.tokens * per_token}


@of_each_task
def test_a_cpu_has_no_fp8(task, made):
    checkpoint, _, _ = made(task)
    with pytest.raises(WanFastError, match="a CPU has no FP8 products; take --precision int8"):
        Engine(config_of(task, checkpoint, precision="fp8"))


# --- as stored --------------------------------------------------------------------------------------------------------


def with_dit(checkpoint, target, state, **config):
    """The checkpoint with another DiT's file."""
    target.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in (DIT, "config.json"):
            (target / file.name).symlink_to(file)
    described = json.loads((checkpoint / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**described, **config}))
    save_file(state, target / DIT)
    return target


def in_rows(checkpoint, precision):
    """LightX2V: every linear of the blocks, with scales [N, 1]."""
    state = load_file(checkpoint / DIT)
    for name in [name for name in state if linear_of(name)]:
        state[name], scale = quantize_weight(state[name], Form(precision))
        state[f"{name}_scale"] = scale[:, None].contiguous()
    return state


def in_diffusers_names(state):
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "modulation":
            other = f"{'' if module == 'head' else module + '.'}scale_shift_table"
        elif leaf == "emb_pos":
            other = "condition_embedder.image_embedder.pos_embed"
        else:
            other = f"{diffusers(module)}.{leaf}"
        assert native_name(other, DIT_NAMES) == name
        renamed[other] = tensor
    return renamed


def same(one, other):
    """Whether two models hold the same, bit for bit."""
    states = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor.view(torch.uint8), states[1][name].view(torch.uint8)) for name, tensor in states[0].items()
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "vace-1.3B"])
def test_published_rows_are_computed_with_as_they_are(task, precision, made, tmp_path):
    """What the file holds is what quantising at load makes; ModelOpt has it under Diffusers' names."""
    checkpoint, request, _ = made(task)
    rows = in_rows(checkpoint, precision)
    folders = [with_dit(checkpoint, tmp_path / "rows", rows)]
    if precision == "fp8":
        declared = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        named = in_diffusers_names(rows)
        folders.append(with_dit(checkpoint, tmp_path / "modelopt", named, quantization_config=declared))
    with emulated():
        at_load = Engine(config_of(task, checkpoint, precision=precision))
        for folder in folders:
            stored = Engine(config_of(task, folder))
            assert {form.stored for form in forms_of(stored.models["model"]).values()} == {True}
            assert forms_of(stored.models["model"]).keys() == forms_of(at_load.models["model"]).keys()
            assert same(stored.models["model"], at_load.models["model"])
        assert torch.equal(latents(stored, request), latents(at_load, request))
    linears = plan(config_of(task, folders[0]), request).linears
    assert ("as the checkpoint has them" if precision == "int8" else "converted as it is loaded") in linears


@pytest.mark.parametrize("form", ["scaled_fp8", "comfy_quant"])
@pytest.mark.parametrize("task", ["i2v-14B", "vace-1.3B"])
def test_comfyui_files_have_every_matrix_in_fp8(task, form, made, tmp_path):
    """Also those that do not compute in 8 bits, which are converted."""
    checkpoint, request, exact = made(task)
    state, layers = load_file(checkpoint / DIT), {}
    for name in [name for name in state if name.endswith(".weight") and state[name].ndim == 2]:
        if not name.startswith(("blocks.", "vace_blocks.", "img_emb.")):
            continue
        scale, module = state[name].abs().max() / 448, name.removesuffix(".weight")
        state[name] = (state[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        state[f"{module}.{'scale_weight' if form == 'scaled_fp8' else 'weight_scale'}"] = scale
        layers[module] = {"format": "float8_e4m3fn"}
    if form == "scaled_fp8":
        state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    else:
        text = {module: json.dumps(layer).encode() for module, layer in layers.items()}
        state |= {f"{m}.comfy_quant": torch.frombuffer(bytearray(t), dtype=torch.uint8) for m, t in text.items()}
    folder = with_dit(checkpoint, tmp_path / form, state)
    with emulated():
        engine = Engine(config_of(task, folder))
        found = forms_of(engine.models["model"])
        assert len(found) == COUNT[task] and set(found.values()) == {Form("fp8", stored=True)}
        assert 1e-3 < relative_error(latents(engine, request), exact) < 0.3
    whole = "vace_blocks.0.after_proj" if task == "vace-1.3B" else "img_emb.proj.1"
    factor = state[f"{whole}.{'scale_weight' if form == 'scaled_fp8' else 'weight_scale'}"]
    assert torch.equal(engine.models["model"].get_submodule(whole).weight, state[f"{whole}.weight"].float() * factor)


# --- written ----------------------------------------------------------------------------------------------------------


def in_diffusers_layout(checkpoint, target):
    """The same checkpoint in a folder per part, the DiT under Diffusers' names."""
    parts = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "image_encoder": CLIP}
    index = {"transformer": ["diffusers", "WanTransformer3DModel"]}
    for part, file in parts.items():
        if (checkpoint / file).exists():
            (target / part).mkdir(parents=True)
            stem = "diffusion_pytorch_model" if part == "vae" else "model"
            state = torch.load(checkpoint / file, weights_only=True)
            save_file(
                {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()},
                target / part / f"{stem}.safetensors",
            )
            (target / part / "config.json").write_text("{}")
            index[part] = ["transformers", "Model"]
    shutil.copytree(checkpoint / "google" / "umt5-xxl", target / "tokenizer")
    (target / "image_processor").mkdir()
    (target / "image_processor" / "preprocessor_config.json").write_text('{"size": 224}')
    (target / "transformer").mkdir()
    shutil.copy(checkpoint / "config.json", target / "transformer" / "config.json")
    save_file(in_diffusers_names(load_file(checkpoint / DIT)), target / "transformer" / DIT)
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "vace-1.3B"])
def test_what_is_written_runs_as_if_quantised_at_load(task, layout, made, tmp_path):
    checkpoint, request, _ = made(task)
    source = checkpoint if layout == "native" else in_diffusers_layout(checkpoint, tmp_path / "source")
    written = write_quantized(str(source), tmp_path / "out", Recipe(scheme="int8", keep_blocks=0))
    assert written.task == task
    at_load = config_of(task, source, precision="int8", keep_blocks=0)
    assert plan(at_load, request).linears == f"{written.linears} (asked for, quantised as it is loaded)"
    stored = Engine(config_of(task, tmp_path / "out"))
    assert torch.equal(latents(stored, request), latents(Engine(at_load), request))
    for file in [path for path in source.rglob("*") if path.is_file() and path.name != DIT]:
        assert (tmp_path / "out" / file.relative_to(source)).read_bytes() == file.read_bytes(), file
    folder = "" if layout == "native" else "transformer"
    before, after = (load_file(path / folder / DIT) for path in (source, tmp_path / "out"))
    assert len(after) - len(before) == COUNT[task] + 2 * sum("qkv" in name for name in forms_of(stored.models["model"]))
    assert open_checkpoint(tmp_path / "out").experts["model"].dialect == "wan-fast"


def test_both_experts_are_written(made, tmp_path):
    checkpoint, request, _ = made("i2v-A14B")
    write_quantized(str(checkpoint), tmp_path / "out", Recipe(scheme="int8", scaling="block", keep_blocks=0))
    at_load = config_of("i2v-A14B", checkpoint, precision="int8", scaling="block", keep_blocks=0)
    stored = Engine(config_of("i2v-A14B", tmp_path / "out"))
    assert torch.equal(latents(stored, request), latents(Engine(at_load), request))


@of_each_task
def test_prompts_alone_do_not_calibrate_it(task, made, tmp_path):
    checkpoint, _, _ = made(task)
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    recipe = Recipe(scheme="fp8", scaling="tensor", calibrate=str(tmp_path / "prompts.txt"))
    with pytest.raises(WanFastError, match=f"clips of prompts alone, and {task} takes pictures or videos besides"):
        write_quantized(str(checkpoint), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["i2v-14B", "vace-1.3B"])
def test_a_lora_of_what_lies_in_8_bits(task, made, tmp_path):
    """Against the same addition to the weights that its values and scales stand for; gone without a trace."""
    checkpoint, _, _ = made(task)
    write_quantized(str(checkpoint), tmp_path / "out", Recipe(scheme="int8", keep_blocks=0))
    engine = Engine(config_of(task, tmp_path / "out"))
    model = engine.models["model"]
    base = {name: tensor.clone() for name, tensor in model.named_buffers()}
    targets = (
        ["blocks.1.cross_attn.k_img", "blocks.0.self_attn.k"]
        if task == "i2v-14B"
        else ["vace_blocks.0.self_attn.k", "blocks.1.ffn.0"]
    )
    lora, added = {}, {}
    for i, target in enumerate(targets):
        rows, columns = load_file(checkpoint / DIT)[f"{target}.weight"].shape
        up, down = (
            torch.randn(*shape, generator=torch.Generator().manual_seed(i)) * 0.1 for shape in ((rows, 4), (4, columns))
        )
        lora |= {f"{target}.lora_B.weight": up, f"{target}.lora_A.weight": down}
        added[target] = up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    engine.set_loras([str(tmp_path / "lora.safetensors")])
    for target, delta in added.items():
        joint = linear_of(f"{target}.weight")
        before, after, scale = (
            base[f"{joint}.weight"].float() * base[f"{joint}.weight_scale"][:, None],
            model.get_buffer(f"{joint}.weight").float() * model.get_buffer(f"{joint}.weight_scale")[:, None],
            model.get_buffer(f"{joint}.weight_scale")[:, None],
        )
        if joint.endswith("qkv"):  # k is the middle third
            before, after, scale = (t.chunk(3)[1] for t in (before, after, scale))
        assert ((after - before - delta).abs() <= scale * 0.501).all()
    engine.set_loras([])
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.named_buffers())
