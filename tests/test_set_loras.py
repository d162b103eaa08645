"""LoRAs through the engine: merged as it loads, switched while it runs, and gone without a trace."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from models import write_native
from safetensors.torch import load_file, save_file

import wan_fast
from wan_fast import checkpoint as checkpoints
from wan_fast.cli import main
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.engine import Engine
from wan_fast.planning import plan

REQUEST = Request(prompt="a red ball", size=(64, 64), num_frames=5, num_steps=2, seed=0)
SETTINGS = [
    {},
    {"precision": "int8"},
    {"precision": "int8", "scaling": "block"},
    {"dtype": "bf16", "convert_model_dtype": True},
]


def tiny(**options):
    return EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", **options)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(config=None):
    opened = wan_fast.planning.set_up(config or tiny()).checkpoint
    return next(iter(opened.experts.values())).shapes


def write(path, *, config=None, rank=4, seed=0, scale=0.05, less=(), **metadata):
    """A LoRA of a model, by default tiny: every linear of the blocks, a bias, a norm and a modulation. Returns the path."""
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes(config).items())):
        module, _, kind = name.rpartition(".")
        if not name.startswith(("blocks.", "vace_blocks.", "img_emb.")) or any(word in name for word in less):
            continue
        if kind == "weight" and len(shape) == 2:
            state[f"diffusion_model.{module}.lora_up.weight"] = random(shape[0], rank, seed=seed + i) * scale
            state[f"diffusion_model.{module}.lora_down.weight"] = random(rank, shape[1], seed=seed + i + 1000) * scale
        elif name.endswith(("ffn.0.bias", "norm_q.weight", "norm_k_img.weight", "self_attn.v.bias", "norm3.weight")):
            state[f"diffusion_model.{module}.diff{'_b' * (kind == 'bias')}"] = random(*shape, seed=seed + i) * scale
        elif kind == "modulation":
            state[f"diffusion_model.{module}.diff_m"] = random(*shape, seed=seed + i) * scale
    save_file(state, path, metadata)
    return str(path)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return write(folder / "one.safetensors"), write(folder / "two.safetensors", seed=5000, less=("ffn", "modulation"))


def weights(engine, name="model"):
    model = engine.models[name]
    return {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_switching_gives_what_a_new_engine_would_have_and_leaves_no_trace(settings, loras):
    one, two = loras
    engine = Engine(tiny(**settings))
    base = weights(engine)
    for wanted in ([one], [f"{one}:0.5", two], [two], []):
        engine.set_loras(wanted)
        fresh = weights(Engine(tiny(lora=tuple(wanted), **settings))) if wanted else base
        assert same(weights(engine), fresh), wanted
        assert same(fresh, base) is not bool(wanted)
        assert engine.config.lora == tuple(wanted)


@pytest.fixture(scope="module", params=["i2v-14B", "flf2v-14B", "vace-1.3B"])
def with_branch(request, tmp_path_factory):
    """The configuration of a small model that has a branch, and a LoRA of it."""
    folder = write_native(tmp_path_factory.mktemp(request.param), request.param)
    config = EngineConfig(task=request.param, checkpoint=str(folder), device="cpu")
    return config, write(folder / "lora.safetensors", config=config)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_branch_is_switched_and_comes_back(settings, with_branch):
    config, lora = with_branch
    config = replace(config, **settings)
    engine = Engine(config)
    base = weights(engine)
    engine.set_loras([f"{lora}:0.5"])
    changed = weights(engine)
    assert same(changed, weights(Engine(replace(config, lora=(f"{lora}:0.5",)))))
    own = [name for name in base if name.startswith(("vace_blocks.", "img_emb.")) or "img" in name]
    kinds = {name.split(".", 2)[-1] for name in own if not torch.equal(base[name], changed[name])}
    if config.task == "vace-1.3B":
        assert {"self_attn.qkv.weight", "cross_attn.k.weight", "ffn.2.weight", "before_proj.weight", "modulation"} < kinds
    else:
        assert {"cross_attn.k_img.weight", "cross_attn.v_img.weight", "cross_attn.norm_k_img.weight", "1.weight"} < kinds
    engine.set_loras([])
    assert same(weights(engine), base)


def test_a_merged_engine_is_that_of_merged_weights(loras, tmp_path):
    """Against a checkpoint whose weights were merged before, in fp64."""
    config = tiny()
    source = checkpoints.locate("tiny", config.spec)
    folder = shutil.copytree(source, tmp_path / "merged")
    part = checkpoints.open_checkpoint(source).experts["model"]
    (file,) = {info.file for info in part.tensors.values()}
    state, lora = load_file(file), load_file(loras[0])
    for name, info in part.tensors.items():
        prefix = f"diffusion_model.{name.rpartition('.')[0]}"
        value = state[info.stored_name].double()
        if name.endswith(".weight") and f"{prefix}.lora_up.weight" in lora:
            value = value + 0.7 * lora[f"{prefix}.lora_up.weight"].double() @ lora[f"{prefix}.lora_down.weight"].double()
        kind = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[name.rpartition(".")[2]]
        if f"{prefix}.{kind}" in lora:
            value = value + 0.7 * lora[f"{prefix}.{kind}"].double()
        state[info.stored_name] = value.float()
    save_file(state, folder / file.relative_to(source))
    merged = Engine(EngineConfig(task="ti2v-5B", checkpoint=str(folder), device="cpu")).generate(REQUEST).latents
    ours = Engine(tiny(lora=(f"{loras[0]}:0.7",))).generate(REQUEST).latents
    base = Engine(tiny()).generate(REQUEST).latents
    torch.testing.assert_close(ours, merged, atol=1e-4, rtol=1e-4)
    assert (ours - base).abs().max() > 0.01


def test_the_clip_is_another_and_then_the_same_again(loras):
    engine = Engine(tiny())
    base = engine.generate(REQUEST)
    engine.set_loras([loras[0]])
    changed = engine.generate(REQUEST)
    engine.set_loras([])
    again = engine.generate(REQUEST)
    assert torch.equal(base.latents, again.latents) and not torch.allclose(base.latents, changed.latents, atol=0.01)
    assert changed.stats["plan"]["loras"] and not again.stats["plan"]["loras"]


def test_what_cannot_be_changes_nothing(loras, tmp_path):
    engine = Engine(tiny(lora=(loras[0],)))
    before, config = weights(engine), engine.config
    state = load_file(loras[0])
    key = next(key for key in state if "blocks.5" in key)
    save_file({**state, key: torch.full_like(state[key], float("nan"))}, tmp_path / "nan.safetensors")
    save_file({**state, "diffusion_model.blocks.0.nonsense.weight": torch.ones(2)}, tmp_path / "surplus.safetensors")
    for name, said in (("nan", "nan in"), ("surplus", "nonsense"), ("missing", "does not exist")):
        with pytest.raises(WanFastError, match=said):
            engine.set_loras([str(tmp_path / f"{name}.safetensors")])
        assert same(weights(engine), before) and engine.config == config


def test_what_is_broken_off_does_not_run_and_is_mended_by_the_next_call(loras, monkeypatch):
    import wan_fast.engine as module

    engine = Engine(tiny())
    base, plain = weights(engine), engine.generate(REQUEST).latents

    def broken_off(model, part, names, *args, reload=module.reload, **how):
        reload(model, part, sorted(names)[:5], *args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "reload", broken_off)
        engine.set_loras([loras[0]])
    assert not same(weights(engine), base)
    with pytest.raises(WanFastError, match="broken off, and weights are mixed; call set_loras again"):
        engine.generate(REQUEST)
    engine.set_loras([])
    assert same(weights(engine), base) and torch.equal(engine.generate(REQUEST).latents, plain)


@pytest.mark.parametrize("wrong", ["style.safetensors", None, [1], [("style.safetensors", 0.5)]], ids=str)
def test_what_is_no_list_of_texts_is_refused(wrong):
    with pytest.raises(WanFastError, match=r"lora must be a list of PATH\[:STRENGTH\], got"):
        tiny(lora=wrong)


def test_a_preset_needs_a_lora_in_every_expert(two_experts):
    folder, lora = two_experts
    named = shutil.copy(lora, folder / "wan2.2_lightx2v_4step.safetensors")
    config = {"task": "t2v-A14B", "checkpoint": str(folder), "device": "cpu"}
    request = Request(prompt="x")
    one = plan(EngineConfig(**config, lora=(f"high={named}",)), request)
    assert one.request.preset is None and "give the other expert's too" in " ".join(one.warnings)
    assert plan(EngineConfig(**config, lora=(str(named),)), request).request.preset == "lightning-4step"
    assert plan(EngineConfig(**config, lora=(f"{named}:0",)), request).request.preset is None


def test_a_bad_lora_is_told_before_weights_are_read(loras, tmp_path, monkeypatch, capsys):
    import wan_fast.engine as module

    monkeypatch.setattr(module, "load_model", lambda *args, **settings: pytest.fail("weights were read"))
    state = load_file(loras[0])
    key = next(iter(state))
    save_file({**state, key: torch.full_like(state[key], float("inf"))}, tmp_path / "inf.safetensors")
    with pytest.raises(WanFastError, match="inf in"):
        Engine(tiny(lora=(str(tmp_path / "inf.safetensors"),)))
    command = f"run --task ti2v-5B --ckpt_dir tiny --prompt x --quiet --save_file {tmp_path}/x.mp4".split()
    for lora in (f"{loras[0]}:nan", f"{loras[0]}:x", "nowhere.safetensors", f"high={loras[0]}", ""):
        assert main([*command, "--lora", lora]) == 2
        line = capsys.readouterr().err
        assert line.startswith("wan-fast: error: --lora") and line.count("\n") == 1, line
    assert not list(tmp_path.glob("*.mp4"))


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """A folder of an A14B model's kind, and a LoRA of it."""
    folder = write_native(tmp_path_factory.mktemp("A14B"), "t2v-A14B")
    shape = shapes(EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu"))["blocks.0.ffn.0.weight"]
    lora = folder / "any.safetensors"
    save_file(
        {
            "blocks.0.ffn.0.lora_A.weight": random(2, shape[1], seed=1),
            "blocks.0.ffn.0.lora_B.weight": random(shape[0], 2, seed=2),
        },
        lora,
    )
    return folder, str(lora)


@pytest.mark.parametrize(("form", "changed"), [("high={}", {"high_noise"}), ("low={}", {"low_noise"}), ("{}", set())])
def test_experts(form, changed, two_experts):
    folder, lora = two_experts
    config = EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu")
    engine, text = Engine(config), form.format(lora)
    base = {name: weights(engine, name) for name in ("high_noise", "low_noise")}
    engine.set_loras([text])
    found = {name for name, before in base.items() if not same(weights(engine, name), before)}
    assert found == (changed or {"high_noise", "low_noise"})
    told = plan(EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu", lora=(text,)), REQUEST)
    assert len(told.loras) == len(found) and all(name in " ".join(told.loras) for name in found)
    assert ("goes to both experts" in " ".join(told.warnings)) is not bool(changed)


def test_of_a_checkpoint_that_lies_in_8_bits(loras, tmp_path):
    """Against the same addition to the weights that its values and scales stand for."""
    from wan_fast.export import Recipe, write_quantized

    write_quantized("tiny", str(tmp_path / "int8"), Recipe(scheme="int8"))
    config = EngineConfig(task="ti2v-5B", checkpoint=str(tmp_path / "int8"), device="cpu")
    engine = Engine(config)
    base = weights(engine)
    engine.set_loras([loras[0]])
    name, lora = "blocks.2.ffn.0", load_file(loras[0])
    before = base[f"{name}.weight"].float() * base[f"{name}.weight_scale"][:, None]
    delta = lora[f"diffusion_model.{name}.lora_up.weight"] @ lora[f"diffusion_model.{name}.lora_down.weight"]
    after = weights(engine)
    found = after[f"{name}.weight"].float() * after[f"{name}.weight_scale"][:, None]
    assert ((found - before - delta).abs() <= after[f"{name}.weight_scale"][:, None] * 0.501).all()
    engine.set_loras([])
    assert same(weights(engine), base)


def test_the_plan_names_them(loras, capsys):
    assert main(["plan", "--task", "ti2v-5B", "--ckpt_dir", "tiny", "--prompt", "x", "--lora", f"{loras[0]}:0.25",
                 "--lora", loras[1], "--json"]) == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)["loras"]
    assert said[0].startswith("one.safetensors at strength 0.25: changes ") and said[1].startswith(
        "two.safetensors at strength 1"
    )
