import json
import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import relative_error, write_native
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan_fast import Engine, EngineConfig, Request, WanFastError, export, plan
from wan_fast.checkpoint import describe, locate, open_checkpoint, read_tensors
from wan_fast.cli import main
from wan_fast.export import Measured, Recipe, write_quantized
from wan_fast.kernels import quantize_rows
from wan_fast.names import DIT_NAMES, native_name
from wan_fast.quantize import quantize_weight
from wan_fast.schemes import Form
from wan_fast.tasks import TASKS

TINY = Path(locate("tiny", TASKS["ti2v-5B"]))
DIT = "diffusion_pytorch_model.safetensors"
LINEAR = re.compile(r"blocks\.(\d+)\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.weight")
SHORT = Request(prompt="a red ball bounces", size=(64, 64), num_frames=5, num_steps=2, seed=1)
INT8, FP8 = (Recipe(scheme=scheme, keep_blocks=0) for scheme in ("int8", "fp8"))


def latents(checkpoint, **options):
    config = EngineConfig(task="ti2v-5B", checkpoint=str(checkpoint), device="cpu", **options)
    return Engine(config).generate(SHORT, on_pixels=lambda pixels: None).latents


def write_a14b(folder, **options):
    """Both experts and the settings of a video that is quick to make."""
    folder.mkdir()
    write_native(folder, "t2v-A14B", **options)
    (folder / "generation_config.json").write_text(json.dumps({"size": [64, 64], "num_frames": 5}))
    return folder


def layers_of(folder):
    """Native weight name -> (module as stored, tensors of the module by their last name) of the linears of a file."""
    state = load_file(folder / DIT)
    rules = DIT_NAMES if any(".attn1." in name for name in state) else {}
    modules = {}
    for name in state:
        if LINEAR.fullmatch(native := native_name(name, rules)):
            module = name.removesuffix(".weight")
            modules[native] = module, {n[len(module) + 1 :]: t for n, t in state.items() if n.startswith(module + ".")}
    return modules


def joint_of(native):
    """The linear, as the model has it, of a native weight name."""
    return re.sub(r"self_attn\.[qkv]$", "self_attn.qkv", native.removesuffix(".weight"))


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    return write_a14b(tmp_path_factory.mktemp("native") / "a14b", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return write_quantized("tiny", tmp_path_factory.mktemp("int8") / "out", INT8)


# --- what is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["row", "block"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("source", ["tiny", "a14b"])
def test_every_tensor(source, scheme, scaling, request, tmp_path):
    keep = 0 if source == "a14b" else 1
    folder = TINY if source == "tiny" else request.getfixturevalue("a14b")
    write_quantized(str(folder), tmp_path / "out", Recipe(scheme=scheme, scaling=scaling, keep_blocks=keep))
    for part in ("transformer",) if source == "tiny" else ("high_noise_model", "low_noise_model"):
        before, after = load_file(folder / part / DIT), load_file(tmp_path / "out" / part / DIT)
        quantised = {}
        for native, (module, _) in layers_of(folder / part).items():
            if source == "a14b" or 1 <= int(native.split(".")[1]) <= 4:
                quantised[module] = quantize_weight(before[f"{module}.weight"], Form(scheme, weight=scaling))
        assert len(quantised) == (40 if source == "tiny" else 20)
        assert set(after) == set(before) | {f"{module}.weight_scale" for module in quantised}
        for name, tensor in before.items():
            values, scale = quantised.get(name.removesuffix(".weight"), (tensor, None))
            assert after[name].dtype == values.dtype and torch.equal(after[name], values), name
            if scale is not None:
                written = after[f"{name}_scale"]
                assert written.dtype == torch.float32 and torch.equal(written, scale), name
        with safe_open(tmp_path / "out" / part / DIT, framework="pt") as file:
            said = json.loads(file.metadata()["wan_fast_quantization"])
        assert set(said.pop("linears")) == set(quantised)
        assert (said["version"], said["scheme"], said["scaling"], said["keep_blocks"]) == (1, scheme, scaling, keep)
        assert said["calibration"] is None


def test_it_runs_as_if_quantised_at_load(int8):
    assert torch.equal(latents(int8.path), latents("tiny", precision="int8", keep_blocks=0))


def test_blocks_run_as_if_quantised_at_load(tmp_path):
    write_quantized("tiny", tmp_path / "out", replace(INT8, scaling="block", keep_blocks=2))
    assert torch.equal(latents(tmp_path / "out"), latents("tiny", precision="int8", scaling="block", keep_blocks=2))


def test_what_stays_by_default_is_what_does_at_load(tmp_path):
    written = write_quantized("tiny", tmp_path / "out", Recipe(scheme="int8"))
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", precision="int8")
    assert plan(config, SHORT).linears == f"{written.linears} (asked for, quantised as it is loaded)"


def test_a_model_of_two_experts_runs(a14b, tmp_path):
    written = write_quantized(str(a14b), tmp_path / "out", INT8)
    config = EngineConfig(task=written.task, checkpoint=str(tmp_path / "out"), device="cpu")
    todo = Engine(config).plan(SHORT)
    assert todo.linears.startswith("16 linears of 2 blocks: INT8") and "as the checkpoint has them" in todo.linears
    assert open_checkpoint(tmp_path / "out").defaults == {"size": (64, 64), "num_frames": 5}


def test_fp8_is_within_its_rounding(tmp_path):
    write_quantized("tiny", tmp_path / "out", FP8)
    before, after = (dict(read_tensors(open_checkpoint(path).experts["model"])) for path in (TINY, tmp_path / "out"))
    assert before.keys() == after.keys()
    packed = [name for name in after if not isinstance(after[name], torch.Tensor)]
    assert len(packed) == 60
    for name in packed:
        weight, error = before[name].float().abs(), (before[name].float() - after[name].dequantized()).abs()
        # half a step: of three bits behind the leading one, or of 2^-9 below the smallest that has one
        assert (error <= torch.maximum(weight * 2**-4, after[name].scale[:, None] * 2**-10) * 1.001).all(), name
        assert error.max() > 0


def test_it_is_described(int8, capsys):
    about = describe(open_checkpoint(int8.path))["parts"]["DiT"]
    assert about["quantisation"].startswith("wan-fast: 60 i8 linears, a scale per row, static input scales no; 60 can be")
    assert about["missing"] == about["surplus"] == about["wrong shape"] == "none"
    assert main(["inspect", str(int8.path)]) == 0
    assert "wan-fast: 60 i8 linears" in capsys.readouterr().out


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a folder"
    assert main(["quantize", "tiny", str(out), "--scheme", "int8", "--keep-blocks", "1", "--quiet"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "32 linears of 4 blocks: INT8" in text and "blocks 0, 5 are not" in text
    before, after = (open_checkpoint(path).num_bytes / 2**20 for path in (TINY, out))
    assert f"{before:.1f} MiB before, {after:.1f} MiB now" in text and after < 0.8 * before
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("next")))
    assert words[1:3] == ["wan-fast", "run"]
    assert main(["plan", *words[3:], "--device", "cpu"]) == 0
    assert "32 linears of 4 blocks: INT8" in capsys.readouterr().out


def test_the_other_files(tmp_path):
    """Of a folder of links, as the hub's cache is: real files, the large ones shared; nothing that is hidden."""
    source, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(TINY, blobs)
    for file in [path for path in blobs.rglob("*") if path.is_file()]:
        link = source / file.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    (source / ".git").mkdir()
    (source / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"of another download")
    write_quantized(str(source), tmp_path / "out", INT8)
    for file in [path for path in source.rglob("*") if path.is_file() and not path.name.startswith("diffusion_")]:
        copy = tmp_path / "out" / file.relative_to(source)
        assert not copy.is_symlink() and copy.read_bytes() == file.read_bytes()
    assert {p.name for p in (tmp_path / "out" / "transformer").iterdir()} == {"config.json", DIT}
    assert not (tmp_path / "out" / ".git").exists()
    vae = Path("vae") / DIT
    assert os.path.samefile(tmp_path / "out" / vae, blobs / vae) and not (tmp_path / "out" / vae).is_symlink()
    assert not os.path.samefile(tmp_path / "out" / "model_index.json", blobs / "model_index.json")
    assert (tmp_path / "out" / "transformer" / DIT).stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_files_are_copied_where_they_cannot_be_shared(tmp_path, monkeypatch):
    def link(*_):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "out").mkdir()
    write_quantized("tiny", tmp_path / "out", INT8)
    vae = Path("vae") / DIT
    assert (tmp_path / "out" / vae).read_bytes() == (TINY / vae).read_bytes()
    assert not os.path.samefile(tmp_path / "out" / vae, TINY / vae)


def test_shards(int8, tmp_path, monkeypatch):
    largest, held = 2 * 10**6, []
    monkeypatch.setattr(export, "SHARD_BYTES", largest)
    monkeypatch.setattr("safetensors.torch.save_file", lambda shard, *rest: (held.append(shard), save_file(shard, *rest)))
    write_quantized("tiny", tmp_path / "out", INT8)
    folder = tmp_path / "out" / "transformer"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"diffusion_pytorch_model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((folder / f"{DIT}.index.json").read_text())
    whole = load_file(int8.path / "transformer" / DIT)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name in files:
        inside = load_file(folder / name)
        assert 0 < sum(tensor.nbytes for tensor in inside.values()) <= largest
        for tensor, value in inside.items():
            assert index["weight_map"][tensor] == name and torch.equal(value, whole[tensor])
    # one dict, emptied for every shard: never two of them in memory
    assert len({id(shard) for shard in held}) == 1
    assert torch.equal(latents(tmp_path / "out"), latents(int8.path))


def test_the_weights_come_one_after_the_other(monkeypatch):
    """None is read before the one before it has been taken."""
    part, read = open_checkpoint(TINY).experts["model"], []

    def watched(part):
        for name, tensor in read_tensors(part):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(export, "read_tensors", watched)
    for taken, _ in enumerate(export._tensors(part, {}, {}, lambda count: None), 1):
        assert len(read) == taken


def test_gguf(tmp_path):
    """Without a config.json, as these come; what is not quantised keeps its values exactly."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_native(folder, "ti2v-5B", dtype=torch.float16)
    state = load_file(folder / DIT)
    writer = gguf.GGUFWriter(folder / "model-Q8_0.gguf", "wan")
    for name, tensor in state.items():
        data = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if LINEAR.fullmatch(name) else gguf.GGMLQuantizationType.F16
        packed = gguf.quants.quantize(data.reshape(data.shape[0], -1) if data.ndim > 2 else data, kind)
        if data.ndim > 2:
            packed = packed.reshape(data.shape)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / DIT).unlink()
    (folder / "config.json").unlink()
    write_quantized(str(folder), tmp_path / "out", replace(INT8, keep_blocks=0))
    assert not list((tmp_path / "out").glob("*.gguf"))
    before = dict(read_tensors(open_checkpoint(folder).experts["model"]))
    after = load_file(tmp_path / "out" / DIT)
    for name, tensor in before.items():
        if LINEAR.fullmatch(name):
            assert torch.equal(after[name], quantize_weight(tensor, Form("int8"))[0])
        else:
            assert after[name].dtype == torch.float16 and torch.equal(after[name], state[name])
    opened = open_checkpoint(tmp_path / "out")
    assert opened.experts["model"].dialect == "wan-fast"
    assert opened.experts["model"].config["dim"] == 256 and opened.experts["model"].config["num_layers"] == 2


# --- what is refused ------------------------------------------------------------------------------------------------------


def prompts(folder, text="a red ball bounces\n\n  a blue star moves left \n"):
    (folder / "prompts.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / "prompts.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "fp4"}, "--scheme must be one of fp8 int8, got 'fp4'"),
        ({"scaling": "column"}, "--scaling must be one of row tensor block, got 'column'"),
        ({"keep_blocks": -1}, "--keep_blocks must be 0 or more, got -1"),
        ({"scheme": "int8", "scaling": "tensor", "calibrate": "p"}, "--scaling tensor is for fp8: .*; take --scaling row"),
        ({"scaling": "tensor"}, "--scaling tensor is measured on prompts; add --calibrate"),
        ({"smooth": True}, "--smooth is measured on prompts; add --calibrate"),
        ({"calibrate": "p"}, "--calibrate has nothing to measure: with --scaling row .* --smooth or --scaling tensor"),
        ({"scheme": "int8", "calibrate": "p"}, "--calibrate has nothing to measure: .* or add --smooth$"),
        ({"steps": 4}, "--steps is for --calibrate; leave it out"),
        ({"smooth": True, "calibrate": "p", "steps": 0}, "--steps must be from 1 to 1000, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_recipes_that_are_refused(options, words):
    with pytest.raises(WanFastError, match=words):
        Recipe(**{"scheme": "fp8", **options})


REFUSED = {
    "out not empty": ("tiny full --scheme int8", "'full', is not empty; give one that is empty or does not exist"),
    "out a file": ("tiny prompts.txt --scheme int8", "'prompts.txt', is a file; give one"),
    "out in no folder": ("tiny not/there --scheme int8", "not', which does not exist; create it first"),
    "out in the checkpoint": ("native native/out --scheme int8", "lies in the checkpoint's own"),
    "no checkpoint": ("nowhere out --scheme int8", "checkpoint folder 'nowhere' does not exist"),
    "not downloaded": ("some/where out --scheme int8", "some/where is neither a folder nor in the hub cache"),
    "8 bits already": ("eight out --scheme fp8", r"is in 8 bits already \(wan-fast: 20 i8 linears.* would lose twice; give"),
    "raw fp8": ("raw out --scheme fp8", r"is in 8 bits already \(raw fp8: "),
    "another task": ("tiny out --scheme int8 --task t2v-1.3B", "task t2v-1.3B does not fit the checkpoint"),
    "unknown task": ("tiny out --scheme int8 --task ti2v-5b", "unknown task 'ti2v-5b'; did you mean ti2v-5B?"),
    "not whole": ("half out --scheme int8", "has no Wan2.2_VAE.pth"),
    "every block kept": ("tiny out --scheme int8 --keep_blocks 3", "--keep_blocks 3 at either end leaves none of 6 blocks"),
    "blocks across q and k": ("narrow out --scheme fp8 --scaling block", "and the DiT is 192 wide: .* take --scaling row"),
    "no prompts file": ("tiny out --scheme fp8 --smooth --calibrate no.txt", "--calibrate 'no.txt' cannot be read .*No such"),
    "no prompt": ("tiny out --scheme fp8 --smooth --calibrate empty.txt", "--calibrate 'empty.txt' has no prompt"),
    "no text": (
        "tiny out --scheme fp8 --smooth --calibrate latin.txt",
        "'latin.txt' cannot be read .* give a text file in UTF-8",
    ),
    "not a number in a weight": ("nan out --scheme int8", "has NaN or infinity in blocks.1.ffn.0.weight; download it again"),
    "a typo": ("tiny out --shceme int8", "unknown flag --shceme; did you mean --scheme?"),
    "no scheme": ("tiny out", "required: --scheme"),
    "no out": ("tiny --scheme int8", "required: OUT"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A folder with everything that the cases above speak of."""
    folder = tmp_path_factory.mktemp("refused")
    for name in ("full", "native", "half", "narrow", "raw", "nan"):
        (folder / name).mkdir()
    (folder / "full" / "file").write_text("of someone")
    write_native(folder / "native", "ti2v-5B")
    prompts(folder)
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes("ein gr\xfcner Ball".encode("latin-1"))
    write_quantized(str(folder / "native"), folder / "eight", INT8)
    for name in ("half", "raw", "nan"):
        shutil.copytree(folder / "native", folder / name, dirs_exist_ok=True)
    (folder / "half" / "Wan2.2_VAE.pth").unlink()
    state = load_file(folder / "native" / DIT)
    save_file({n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}, folder / "raw" / DIT)
    state["blocks.1.ffn.0.weight"][3, 5] = torch.nan
    save_file(state, folder / "nan" / DIT)
    write_native(folder / "narrow", "ti2v-5B", width=192)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, refused, monkeypatch, capsys):
    monkeypatch.chdir(refused)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, words = REFUSED[case]
    there = sorted(refused.rglob("*"))
    assert main(["quantize", *shlex.split(arguments), "--quiet"]) == 2
    text, error = capsys.readouterr()
    assert text == "" and error.startswith("wan-fast: error: ") and error.count("\n") == 1
    assert re.search(words, error), error
    assert sorted(refused.rglob("*")) == there


def test_modelopt_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    recipe = Recipe(scheme="fp8", scaling="tensor", calibrate=prompts(tmp_path))
    with pytest.raises(WanFastError, match=r"pip install 'wan-fast\[modelopt\]'"):
        write_quantized("tiny", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(WanFastError, match=r"needs at least 0\.0 GiB, 0\.0 are free there"):
        write_quantized("tiny", tmp_path / "out", INT8)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("whatever")])
def test_half_way_leaves_nothing(error, existing, tmp_path):
    if existing:
        (tmp_path / "out").mkdir()
    seen = []

    def fail(stage, done, total):
        seen.append(list(tmp_path.iterdir()))
        if done > total / 2:
            raise error

    expected = WanFastError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="cannot be written .*No space left" if expected is WanFastError else None):
        write_quantized("tiny", tmp_path / "out", INT8, on_progress=fail)
    assert len(seen) > 10 and all(len(names) == 1 + existing for names in seen)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"] * existing


# --- calibration: what is made of the measurements ------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["row", "tensor", "block"])
def test_what_was_measured_is_written(scaling, a14b, tmp_path, monkeypatch):
    """Beside each weight, of q, k and v that of the joint linear; weights are divided by what the tokens are multiplied by."""
    made = {}

    def measure(config, requests, forms, recipe, report):
        assert (config.task, config.precision, len(requests)) == ("t2v-A14B", "bf16", 2)
        generator = torch.Generator().manual_seed(0)
        for expert, linears in forms.items():
            made[expert] = {}
            for linear, form in linears.items():
                width = 320 if linear.endswith("ffn.2") else 256
                smooth, scale = torch.rand(width, generator=generator) + 0.1, torch.rand((), generator=generator) + 1
                made[expert][linear] = Measured(scale if form.input == "tensor" else None, smooth)
        return made

    monkeypatch.setattr(export, "_measure", measure)
    monkeypatch.setattr(export, "find_spec", lambda name: True)
    recipe = Recipe(scheme="fp8", scaling=scaling, keep_blocks=0, smooth=True, calibrate=prompts(tmp_path))
    write_quantized(str(a14b), tmp_path / "out", recipe)
    for expert in ("high_noise", "low_noise"):
        before = load_file(a14b / f"{expert}_model" / DIT)
        for native, (module, tensors) in layers_of(tmp_path / "out" / f"{expert}_model").items():
            known = made[expert][joint_of(native)]
            weight = before[f"{module}.weight"].float() / known.smooth
            values, scale = quantize_weight(weight, Form("fp8", weight="block" if scaling == "block" else "row"))
            assert torch.equal(tensors["weight"], values) and torch.equal(tensors["weight_scale"], scale)
            assert torch.equal(tensors["pre_quant_scale"], known.smooth)
            assert ("input_scale" in tensors) is (scaling == "tensor")
            assert scaling != "tensor" or torch.equal(tensors["input_scale"], known.input_scale)


def test_what_is_made_of_a_measurement():
    form = Form("fp8", input="tensor", smooth=True)
    made = export._measured(torch.tensor([1.0, 100.0, 2.0, 0.0, 4.0]), torch.tensor([0.5, 0.01, 0.25, 1e4, 0.125]), form)
    assert made.smooth.tolist() == [0.25, pytest.approx(0.01), 0.25, 0.25, 0.125]  # none above the middle one
    assert made.input_scale.tolist() == pytest.approx(1 / 448)
    made = export._measured(torch.tensor([56.0]), None, Form("fp8", input="tensor"))
    assert made.smooth is None and made.input_scale.shape == () and made.input_scale == 0.125
    # tokens that were all zero still have a scale
    assert export._measured(torch.zeros(1), None, form).input_scale > 0
    assert export._measured(torch.ones(2), torch.ones(2), Form("int8", smooth=True)).input_scale is None


# --- calibration: with NVIDIA ModelOpt, which is not installed everywhere -------------------------------------------------


@pytest.fixture
def modelopt():
    return pytest.importorskip("modelopt")


def seen_by_hooks(checkpoint, task, prompts, steps):
    """Expert and linear -> |largest| of each input channel [K], over whole generations of the model as it is."""
    engine = Engine(EngineConfig(task=task, checkpoint=str(checkpoint), device="cpu"))
    largest = {}
    for expert in open_checkpoint(Path(checkpoint)).experts:
        for name, module in engine.models[expert].named_modules():
            if isinstance(module, torch.nn.Linear):

                def look(_, inputs, key=(expert, name)):
                    seen = inputs[0].abs().flatten(0, -2).amax(0)
                    largest[key] = torch.maximum(largest.get(key, seen), seen)

                module.register_forward_pre_hook(look)
    for seed, prompt in enumerate(prompts):
        request = Request(prompt=prompt, num_steps=steps, seed=seed)
        engine.generate(request, on_pixels=lambda pixels: None)
    return largest


def small(folder):
    """`tiny` with the settings of a video that is quick to make."""
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").write_text(json.dumps({"size": [64, 64], "num_frames": 5, "num_steps": 12}))
    return folder


def test_a_scale_for_all_tokens(modelopt, tmp_path, capsys):
    """It is that of the largest value in whole generations, for q, k and v the same; and nothing else changes."""
    source, words, steps = small(tmp_path / "tiny"), [], []
    recipe = Recipe(scheme="fp8", scaling="tensor", keep_blocks=1, calibrate=prompts(tmp_path), steps=2)

    def follow(stage, done, total):
        words.append(stage)
        if stage == "calibrate":
            steps.append((done, total))

    write_quantized(str(source), tmp_path / "out", recipe, on_progress=follow)
    assert capsys.readouterr() == ("", "")
    assert list(dict.fromkeys(words)) == ["load", "calibrate", "quantize"] and steps == [(i, 4) for i in range(1, 5)]
    largest = seen_by_hooks(source, "ti2v-5B", ["a red ball bounces", "a blue star moves left"], 2)
    before = load_file(source / "transformer" / DIT)
    layers = {name: found for name, found in layers_of(tmp_path / "out" / "transformer").items() if "0" < name[7] < "5"}
    assert len(layers) == 40
    for native, (module, tensors) in layers.items():
        joint = joint_of(native)
        scale = tensors["input_scale"]
        assert scale.shape == () and scale.dtype == torch.float32 and scale > 0
        torch.testing.assert_close(scale, largest["model", joint].max() / 448, rtol=1e-6, atol=0)
        values, scales = quantize_weight(before[f"{module}.weight"], Form("fp8"))
        assert torch.equal(tensors["weight"], values) and torch.equal(tensors["weight_scale"], scales)
    with safe_open(tmp_path / "out" / "transformer" / DIT, framework="pt") as file:
        said = json.loads(file.metadata()["wan_fast_quantization"])
    assert said["calibration"] == {"prompts": 2, "steps": 2, "smooth": False}
    forms = Engine(EngineConfig(task="ti2v-5B", checkpoint=str(tmp_path / "out"), device="cpu"))
    assert "converted as it is loaded" in forms.plan(SHORT).linears


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_smoothing(scheme, modelopt, tmp_path):
    source = small(tmp_path / "tiny")
    scaling = "tensor" if scheme == "fp8" else "row"
    recipe = Recipe(
        scheme=scheme, scaling=scaling, keep_blocks=0, smooth=True, calibrate=prompts(tmp_path, "a red ball\n"), steps=1
    )
    write_quantized(str(source), tmp_path / "out", recipe)
    largest = seen_by_hooks(source, "ti2v-5B", ["a red ball"], 1)
    before = layers_of(source / "transformer")
    packed = dict(read_tensors(open_checkpoint(tmp_path / "out").experts["model"]))
    joint_smooth = {}
    for native, (_, tensors) in layers_of(tmp_path / "out" / "transformer").items():
        joint = joint_of(native)
        weight, smooth, seen = before[native][1]["weight"].float(), tensors["pre_quant_scale"], largest["model", joint]
        assert smooth.shape == weight.shape[1:] and smooth.dtype == torch.float32 and (smooth > 0).all()
        assert torch.equal(joint_smooth.setdefault(joint, smooth), smooth)
        # the product is the same one: the smoothed weight undoes what the tokens are multiplied by, once
        step = tensors["weight_scale"][:, None] * (0.5 if scheme == "int8" else 2**-10)
        bound = step if scheme == "int8" else torch.maximum((weight / smooth).abs() * 2**-4, step)
        assert ((packed[native].dequantized() - weight).abs() <= bound * smooth * 1.001).all(), native
        # half of the way from tokens to weights, as in the paper, and no channel above the middle one
        parts = [joint.replace("qkv", part) + ".weight" for part in "qkv"] if "qkv" in joint else [native]
        heaviest = torch.stack([before[part][1]["weight"].float().abs().amax(0) for part in parts]).amax(0)
        full = (heaviest / seen).sqrt().clamp(max=1e4)
        expected = full.clamp(max=full.median())
        torch.testing.assert_close(smooth, expected, rtol=1e-5, atol=0)
        if scheme == "fp8":
            torch.testing.assert_close(tensors["input_scale"], (seen * smooth).max() / 448, rtol=1e-5, atol=0)
        else:
            assert "input_scale" not in tensors
    if scheme == "int8":  # with prompts and timesteps that were not measured on
        assert relative_error(latents(tmp_path / "out"), latents("tiny")) < 0.3


def test_smoothing_helps_where_there_are_outliers(modelopt, tmp_path):
    """A channel of the tokens that is 100 times the others: the error of a layer in int8 is much less with its vector."""
    source = small(tmp_path / "tiny")
    state = load_file(source / "transformer" / DIT)
    # what leaves attention's values in one channel is large, and the projection behind it takes it back
    value, out = (f"blocks.2.attn1.{name}" for name in ("to_v", "to_out.0"))
    state[f"{value}.weight"][7] *= 100
    state[f"{value}.bias"][7] *= 100
    state[f"{out}.weight"][:, 7] /= 100
    save_file(state, source / "transformer" / DIT, {"format": "pt"})
    recipe = Recipe(scheme="int8", smooth=True, calibrate=prompts(tmp_path, "a red ball\n"), steps=1)
    write_quantized(str(source), tmp_path / "out", recipe)
    tensors = layers_of(tmp_path / "out" / "transformer")["blocks.2.self_attn.o.weight"][1]
    inputs = []
    engine = Engine(EngineConfig(task="ti2v-5B", checkpoint=str(source), device="cpu"))
    engine.models["model"].blocks[2].self_attn.o.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    engine.generate(replace(SHORT, prompt="a green square", num_steps=1), on_pixels=lambda pixels: None)
    x, weight = inputs[0].flatten(0, -2), state[f"{out}.weight"].float()
    expected = x @ weight.T

    def product(x, values, scale):
        tokens, own = quantize_rows(x, torch.int8)
        return (tokens.float() * own) @ (values.float() * scale[:, None]).T

    plain = product(x, *quantize_weight(weight, Form("int8")))
    smoothed = product(x * tensors["pre_quant_scale"], tensors["weight"], tensors["weight_scale"])
    assert relative_error(smoothed, expected) < 0.5 * relative_error(plain, expected)


def test_both_experts_are_calibrated(modelopt, tmp_path):
    """Each on the steps it runs; and where one runs in none, that is said beforehand."""
    source = write_a14b(tmp_path / "a14b")
    recipe = Recipe(scheme="fp8", scaling="tensor", calibrate=prompts(tmp_path, "a cat\n"), steps=1)
    with pytest.raises(WanFastError, match="in 1 steps the low_noise expert does not run; take more --steps"):
        write_quantized(str(source), tmp_path / "out", recipe)
    write_quantized(str(source), tmp_path / "out", replace(recipe, steps=4))
    largest = seen_by_hooks(source, "t2v-A14B", ["a cat"], 4)
    for expert in ("high_noise", "low_noise"):
        layers = layers_of(tmp_path / "out" / f"{expert}_model")
        assert len(layers) == 20
        for native, (_, tensors) in layers.items():
            joint = joint_of(native)
            torch.testing.assert_close(tensors["input_scale"], largest[expert, joint].max() / 448, rtol=1e-6, atol=0)


def test_stopping_the_calibration_leaves_nothing(modelopt, tmp_path):
    source, file = small(tmp_path / "tiny"), prompts(tmp_path)
    there = sorted(tmp_path.rglob("*"))

    def stop(stage, done, total):
        if stage == "calibrate":
            raise KeyboardInterrupt

    recipe = Recipe(scheme="int8", smooth=True, calibrate=file, steps=2)
    with suppress(KeyboardInterrupt):
        write_quantized(str(source), tmp_path / "out", recipe, on_progress=stop)
    assert sorted(tmp_path.rglob("*")) == there
