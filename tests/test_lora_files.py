"""LoRA files of every style, which expert they are for, and the weights that come of them."""

import json
import re
import subprocess
import sys
from math import inf, nan, sqrt

import pytest
import torch
from lora_files_of import (
    PAIRS,
    SHAPES,
    SIZES,
    STYLES,
    WITH_IMAGE,
    WITH_VACE,
    Known,
    diffusers,
    known,
    random,
    save,
    weights,
    written,
)

from wan_fast.errors import WanFastError
from wan_fast.lora import Lora
from wan_fast.lora_files import open_loras
from wan_fast.manifest import DiTDims, dit_shapes
from wan_fast.merging import Merger

Q, FFN = "blocks.0.self_attn.q", "blocks.1.ffn.2"
TWO = {"high_noise": SHAPES, "low_noise": SHAPES}
WEIGHTS = weights()
UP, DOWN = ".lora_B.weight", ".lora_A.weight"


def opened(path, strength=1.0, shapes=SHAPES):
    return open_loras([Lora(str(path), strength)], {"model": shapes})["model"][0]


def merge(*files, state=WEIGHTS):
    """All weights with these LoRAs; those that are no target stay the same objects."""
    merger = Merger(files)
    merger.check()
    merged = {name: merger.merged(name, weight) for name, weight in state.items()}
    assert {name for name in state if merged[name] is not state[name]} == merger.targets
    return merged


def assert_same(merged, expected):
    """Up to rounding in fp32; without assert_close, whose import takes seconds."""
    for name, weight in expected.items():
        error = (merged[name].double() - weight).abs().max().item()
        assert error < 3e-6 * (1 + weight.abs().max().item()), f"{name}: {error}"


def one_module(tmp_path, tensors, name="lora.safetensors", prefix="diffusion_model.", metadata=None):
    """A file that changes Q alone: suffix -> tensor."""
    return save(tmp_path / name, {f"{prefix}{Q}{suffix}": tensor for suffix, tensor in tensors.items()}, metadata)


def factors(rank=3, seed=7):
    return {UP: random(12, rank, seed=seed), DOWN: random(rank, 12, seed=seed + 1)}


def product(state):
    return state[UP].double() @ state[DOWN].double()


def test_opening_needs_no_torch():
    code = "import sys, wan_fast.lora_files; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("style", STYLES)
def test_every_style_gives_the_same_weights(tmp_path, style):
    state, said = written(known(), style)
    file = opened(save(tmp_path / "lora.safetensors", state))
    assert set(file.updates) == {f"{module}.weight" for module in said.factors} | set(said.diffs)
    assert_same(merge(file), said.added_to(WEIGHTS))


@pytest.mark.parametrize("shapes", [WITH_IMAGE, WITH_VACE], ids=["image", "vace"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_reaches_the_branches(tmp_path, style, shapes):
    state, said = written(known(shapes=shapes), style)
    file = opened(save(tmp_path / "lora.safetensors", state), shapes=shapes)
    assert set(file.updates) == {f"{module}.weight" for module in said.factors} | set(said.diffs)
    own = "blocks.1.cross_attn.v_img.weight" if shapes is WITH_IMAGE else "vace_blocks.1.after_proj.weight"
    assert own in file.updates and not file.absent and not [said for said in file.warnings if "alpha" not in said]
    before = weights(shapes=shapes)
    assert_same(merge(file, state=before), said.added_to(before))


@pytest.mark.parametrize("style", STYLES)
def test_one_for_pictures_goes_to_a_model_without_them(tmp_path, style):
    """To all that this has; what the image branch would get is counted."""
    state, said = written(known(shapes=WITH_IMAGE), style)
    file = opened(save(tmp_path / "lora.safetensors", state))
    plain = said.only(lambda name: "img" not in name)
    assert_same(merge(file), plain.added_to(WEIGHTS))
    assert file.absent == sum(bool(re.search("img|image_emb|add_[kv]_proj|norm_added_k", key)) for key in state) > 10
    told = f"lora.safetensors: {file.absent} keys of an image branch, which this model has not, are left out"
    assert told in file.warnings


def test_one_for_text_goes_to_the_blocks_that_a_model_with_a_branch_has_of_its_own(tmp_path):
    state, said = written(known())
    for shapes in (WITH_IMAGE, WITH_VACE):
        file, before = opened(save(tmp_path / "lora.safetensors", state), shapes=shapes), weights(shapes=shapes)
        merged = merge(file, state=before)
        assert_same(merged, said.added_to(before))
        assert all(merged[name] is before[name] for name in before.keys() - SHAPES.keys())
        assert not file.absent and not file.warnings


def test_one_of_the_vace_branch_needs_it(tmp_path):
    path = save(tmp_path / "lora.safetensors", written(known(shapes=WITH_VACE))[0])
    for shapes in (SHAPES, WITH_IMAGE):
        with pytest.raises(WanFastError, match=r"keys without a place in this model: .* of another variant of Wan"):
            opened(path, shapes=shapes)


@pytest.mark.parametrize("key", ["img_emb.emb_pos.diff", "transformer.condition_embedder.image_embedder.pos_embed.diff"])
def test_positions_of_pictures(tmp_path, key):
    own = {f"{Q}{suffix}": tensor for suffix, tensor in factors().items()}
    path, before = save(tmp_path / "lora.safetensors", {**own, key: random(1, 6, 8)}), weights(shapes=WITH_IMAGE)
    expected = Known({}, {"img_emb.emb_pos": random(1, 6, 8)}).added_to(before)["img_emb.emb_pos"]
    merged = merge(opened(path, shapes=WITH_IMAGE), state=before)
    assert_same(merged, {"img_emb.emb_pos": expected})
    assert opened(path).absent == 1


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("style", ["comfy", "diffusers", "kohya"])
def test_every_pair_of_suffixes(tmp_path, style, pair):
    state, said = written(known(kinds=("factors",)), style, pair)
    assert_same(merge(opened(save(tmp_path / "lora.safetensors", state))), said.added_to(WEIGHTS))


@pytest.mark.parametrize("name", ["lora.pth", "lora.pt", "lora.ckpt", "lora.bin"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickles(tmp_path, name, nested):
    state, said = written(known())
    state = {key: torch.nn.Parameter(value.bfloat16()) for key, value in state.items()}
    path = save(tmp_path / name, {"state_dict": state, "step": 3} if nested else state)
    rounded = Known(
        {m: (up.bfloat16(), down.bfloat16(), alpha) for m, (up, down, alpha) in said.factors.items()},
        {n: diff.bfloat16() for n, diff in said.diffs.items()},
    )
    merged = merge(opened(path))
    assert_same(merged, rounded.added_to(WEIGHTS))
    assert not any(weight.requires_grad for weight in merged.values())


def test_as_diffusers_converts(tmp_path):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    update = known()
    update.diffs = {name: diff for name, diff in update.diffs.items() if name.startswith("blocks.") and name.endswith("bias")}
    update.diffs = {name: diff for name, diff in update.diffs.items() if "norm" not in name}
    update.factors = {module: value for module, value in update.factors.items() if module.startswith("blocks.")}
    state, said = written(update)
    path = save(tmp_path / "native.safetensors", state)
    theirs = utils._convert_non_diffusers_wan_lora_to_diffusers({key: value.clone() for key, value in state.items()})
    assert len(theirs) == len(state) - len(update.factors)
    merged = merge(opened(save(tmp_path / "theirs.safetensors", theirs)))
    assert_same(merged, merge(opened(path)))
    assert_same(merged, said.added_to(WEIGHTS))


def test_modules_of_other_variants_in_other_spellings(tmp_path):
    extra = {f"{m}.weight": (12, 12) for m in ("blocks.1.cross_attn.v_img", "img_emb.proj.1", "vace_blocks.0.after_proj")}
    keys = {
        "lora_unet_blocks_1_attn2_add_v_proj": "blocks.1.cross_attn.v_img",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "transformer.vace_blocks.0.proj_out": "vace_blocks.0.after_proj",
        "lycoris_proj_out": "head.head",
        "lora_unet_condition_embedder_time_embedder_linear_2": "time_embedding.2",
        "transformer.blocks.0.attn1.processor.to_out": "blocks.0.self_attn.o",
    }
    state = {f"{key}{suffix}": tensor for key in keys for suffix, tensor in factors().items()}
    file = opened(save(tmp_path / "lora.safetensors", state), shapes=SHAPES | extra)
    assert set(file.updates) == {f"{name}.weight" for name in keys.values()} and not file.absent


def test_differences_in_other_words(tmp_path):
    state = {
        "blocks.1.modulation.diff": random(6, 12),
        "patch_embedding.diff": random(12, 16, seed=1),
        "transformer.condition_embedder.time_proj.lora_B.bias": random(72, seed=2),
        "head.diff_m": random(1, 2, 12, seed=3),
        "head.head.diff": random(12, 12, seed=4),
        "scale_shift_table.diff": random(2, 12),
    }
    with pytest.raises(WanFastError, match=r"changes head.modulation twice, by head.diff_m and by scale_shift_table.diff"):
        opened(save(tmp_path / "twice.safetensors", state))
    table = state.pop("scale_shift_table.diff")
    expected = {
        "blocks.1.modulation": random(6, 12)[None],
        "patch_embedding.weight": random(12, 16, seed=1).view(12, 4, 1, 2, 2),
        "time_projection.1.bias": random(72, seed=2),
        "head.modulation": random(1, 2, 12, seed=3),
        "head.head.weight": random(12, 12, seed=4),
    }
    assert_same(merge(opened(save(tmp_path / "a.safetensors", state))), Known({}, expected).added_to(WEIGHTS))
    state["scale_shift_table.diff"] = table
    del state["head.diff_m"]
    expected["head.modulation"] = table[None]
    assert_same(merge(opened(save(tmp_path / "b.safetensors", state))), Known({}, expected).added_to(WEIGHTS))


def test_loha(tmp_path):
    ends = {"w1_a": (12, 2), "w1_b": (2, 12), "w2_a": (12, 2), "w2_b": (2, 12)}
    t = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(ends.items())}
    state = {f".hada_{name}": tensor for name, tensor in t.items()} | {".alpha": torch.tensor(3.0)}
    merged = merge(opened(one_module(tmp_path, state), 0.5))
    d = {name: tensor.double() for name, tensor in t.items()}
    expected = torch.einsum("or,ri,os,si->oi", d["w1_a"], d["w1_b"], d["w2_a"], d["w2_b"]) * 0.5 * 3 / 2
    assert_same(merged, {f"{Q}.weight": WEIGHTS[f"{Q}.weight"] + expected})


@pytest.mark.parametrize("one", ["whole", "factored"])
@pytest.mark.parametrize("two", ["whole", "factored"])
def test_lokr(tmp_path, one, two):
    t = {"w1": random(3, 2), "w1_a": random(3, 5), "w1_b": random(5, 2), "w2": random(4, 6), "w2_a": random(4, 5)}
    t["w2_b"] = random(5, 6, seed=1)
    used = [*(["w1"] if one == "whole" else ["w1_a", "w1_b"]), *(["w2"] if two == "whole" else ["w2_a", "w2_b"])]
    state = {f".lokr_{name}": t[name] for name in used} | {".alpha": torch.tensor(2.0)}
    merged = merge(opened(one_module(tmp_path, state), 1.5))
    w1 = (t["w1"] if one == "whole" else t["w1_a"] @ t["w1_b"]).double()
    w2 = (t["w2"] if two == "whole" else t["w2_a"] @ t["w2_b"]).double()
    expected = torch.einsum("ab,cd->acbd", w1, w2).reshape(12, 12)
    scale = 1.5 * (1 if (one, two) == ("whole", "whole") else 2 / 5)
    assert_same(merged, {f"{Q}.weight": WEIGHTS[f"{Q}.weight"] + scale * expected})


def test_lokr_of_the_patch_embedding(tmp_path):
    w1, w2 = random(3, 2), random(4, 2, 1, 2, 2, seed=1)
    path = save(tmp_path / "l.safetensors", {"lycoris_patch_embedding.lokr_w1": w1, "lycoris_patch_embedding.lokr_w2": w2})
    expected = torch.einsum("ab,cdkhw->acbdkhw", w1.double(), w2.double()).reshape(12, 4, 1, 2, 2)
    assert_same(merge(opened(path)), {"patch_embedding.weight": WEIGHTS["patch_embedding.weight"] + expected})


@pytest.mark.parametrize("suffix", [".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_dora(tmp_path, suffix, shape):
    state, magnitude = factors(), random(*shape, seed=9).abs()
    merged = merge(opened(one_module(tmp_path, {**state, suffix: magnitude, ".alpha": torch.tensor(6.0)}), 0.5))
    changed = WEIGHTS[f"{Q}.weight"].double() + 0.5 * 2 * product(state)
    expected = [m * row / sqrt(sum(x * x for x in row)) for m, row in zip(magnitude.flatten().double(), changed, strict=True)]
    assert_same(merged, {f"{Q}.weight": torch.stack(expected)})


def test_set_weight_replaces(tmp_path):
    value = random(12, 12, seed=5)
    path = one_module(tmp_path, {".set_weight": value, **factors()})
    assert_same(merge(opened(path)), {f"{Q}.weight": value.double() + product(factors())})
    assert merge(opened(path, 0))[f"{Q}.weight"] is WEIGHTS[f"{Q}.weight"]
    with pytest.raises(WanFastError, match=r"replaces weights \(set_weight\), which has no strength 0.5; take 1"):
        opened(path, 0.5)


def test_several_add_up(tmp_path):
    first, second = known(seed=100), known(seed=900)
    paths = [save(tmp_path / f"{i}.safetensors", written(k, "comfy")[0]) for i, k in enumerate((first, second))]
    loras = [Lora(paths[0], 0.7), Lora(paths[1], -0.4), Lora(paths[0], 0)]
    files = open_loras(loras, {"model": SHAPES})["model"]
    assert_same(merge(*files), second.added_to(first.added_to(WEIGHTS, 0.7), -0.4))
    assert Merger(files[2:]).targets == frozenset()
    assert files[0].described() == f"0.safetensors at strength 0.7: changes {len(first.factors) + len(first.diffs)} tensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_dtype_become_fp32(tmp_path, dtype):
    weight = WEIGHTS[f"{Q}.weight"].to(dtype)
    before = weight.float().clone()
    merger = Merger([opened(one_module(tmp_path, factors()))])
    merged = merger.merged(f"{Q}.weight", weight.T.contiguous().T, "cpu")
    assert merged.dtype is torch.float32 and torch.equal(weight.float(), before)
    assert_same({"q": merged}, {"q": before.double() + product(factors())})


def test_fp32_weights_are_not_changed_in_place(tmp_path):
    weight = WEIGHTS[f"{Q}.weight"].clone()
    Merger([opened(one_module(tmp_path, {".diff": random(12, 12)}))]).merged(f"{Q}.weight", weight)
    assert torch.equal(weight, WEIGHTS[f"{Q}.weight"])


def scale_of(file):
    """What the product of the factors was multiplied by."""
    added = (merge(file)[f"{Q}.weight"] - WEIGHTS[f"{Q}.weight"]).double()
    return pytest.approx((added / product(factors())).median().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(torch.tensor(6.0), 2), (torch.tensor([1.5]), 0.5), (torch.tensor(0.0), 1), (torch.tensor(9), 3), (None, 1)],
    ids=["6", "1.5", "0", "int", "none"],
)
def test_alpha(tmp_path, alpha, scale):
    state = factors() if alpha is None else {**factors(), ".alpha": alpha}
    assert scale == scale_of(opened(one_module(tmp_path, state)))


CONFIGS = [
    ({"r": 3, "lora_alpha": 6}, 2),
    ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / sqrt(3)),
    ({"r": 8, "lora_alpha": 6, "rank_pattern": {"self_attn.q|attn1.to_q": 3}}, 2),
    ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"q": 1.5, "to_q": 1.5}, "rank_pattern": None}, 0.5),
    ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"elf_attn.q": 1.5, "ttn1.to_q": 1.5}}, 2),
    ({"r": 3, "lora_alpha": 0}, 1),
    ({"r": 3, "lora_alpha": None}, 1),
]


@pytest.mark.parametrize(("config", "scale"), CONFIGS)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_scale_in_the_metadata(tmp_path, config, scale, prefix):
    state = {f"transformer.{diffusers(Q)}{suffix}": tensor for suffix, tensor in factors().items()}
    metadata = {"lora_adapter_metadata": {prefix + key: value for key, value in config.items()}}
    file = opened(save(tmp_path / "lora.safetensors", state, metadata))
    assert scale == scale_of(file) and not file.warnings


@pytest.mark.parametrize(("config", "scale"), CONFIGS)
def test_scale_in_adapter_config(tmp_path, config, scale):
    path = one_module(tmp_path / "export", factors(), "adapter_model.safetensors", "base_model.model.")
    assert opened(path).warnings == (
        "adapter_model.safetensors has no adapter_config.json beside it; its alpha is taken to be its rank",
    )
    (tmp_path / "export" / "adapter_config.json").write_text(json.dumps(config))
    file = opened(tmp_path / "export")
    assert scale == scale_of(file) and not file.warnings


def test_the_bias_of_a_factor_is_scaled_with_it(tmp_path):
    state = {**factors(), ".lora_B.bias": random(12)}
    metadata = {"lora_adapter_metadata": {"r": 3, "lora_alpha": 6}}
    files = [
        one_module(tmp_path, state, "a.safetensors", metadata=metadata),
        one_module(tmp_path, {**state, ".alpha": torch.tensor(6.0)}, "b.safetensors"),
    ]
    for file in files:
        assert_same(merge(opened(file, 0.5)), {f"{Q}.bias": WEIGHTS[f"{Q}.bias"] + 0.5 * 2 * random(12)})


def test_which_of_several_scales_counts(tmp_path):
    config = {"r": 3, "lora_alpha": 12}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    metadata = {"lora_adapter_metadata": {"r": 3, "lora_alpha": 6}}
    own = one_module(tmp_path, {**factors(), ".alpha": torch.tensor(9.0)}, metadata=metadata)
    assert scale_of(opened(own)) == 3
    assert scale_of(opened(one_module(tmp_path, factors(), metadata=metadata))) == 2
    assert scale_of(opened(one_module(tmp_path, factors()))) == 4
    # of many files the config is that of PEFT's own
    one_module(tmp_path, factors(), "adapter_model.safetensors", "base_model.model.")
    assert scale_of(opened(own := one_module(tmp_path, factors()))) == 1 and own.endswith("lora.safetensors")
    assert scale_of(opened(tmp_path / "adapter_model.safetensors")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json is not as PEFT writes it"),
        ("[1]", "is not as PEFT writes it"),
        ('{"r": "many"}', "is not as PEFT writes it"),
        ('{"r": 3, "lora_alpha": -1}', "no positive number"),
        ('{"r": 3, "lora_alpha": NaN}', "no positive number"),
        ('{"r": 3, "alpha_pattern": {"(": 1}}', "is not as PEFT writes it"),
        ('{"r": 16, "lora_alpha": 16}', "has rank 3, but .*adapter_config.json says 16"),
    ],
)
def test_odd_adapter_configs(tmp_path, text, message):
    path = one_module(tmp_path, factors())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(WanFastError, match=message):
        opened(path)


def experts_of(*loras):
    return {expert: [file.path.name for file in files] for expert, files in open_loras(loras, TWO).items()}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_lora", "high_noise"),
        ("Wan22LowNoise-rank64", "low_noise"),
        ("style_HIGH_fp16", "high_noise"),
        ("style-low-14b", "low_noise"),
        ("style-low", "low_noise"),
        ("highlight_slow_flow", None),
        ("high_and_low", None),
        ("style", None),
    ],
)
def test_experts_by_name(tmp_path, name, expert):
    path = one_module(tmp_path, factors(), f"{name}.safetensors")
    found = open_loras([Lora(path)], TWO)
    assert [key for key, files in found.items() if files] == [expert] if expert else ["high_noise", "low_noise"]
    warnings = {warning for files in found.values() for file in files for warning in file.warnings}
    told = f"{name}.safetensors goes to both experts; choose with --lora high=PATH or --lora low=PATH"
    if expert:
        told = (
            f"{name}.safetensors goes to the {expert.replace('_', '-')} expert by its name alone; else say --lora high= or low="
        )
    assert warnings == (set() if "noise" in name.lower() else {told})
    alone = opened(path).warnings
    assert ("and this model has only one" in " ".join(alone)) == bool(expert)


def test_what_is_said_goes_before_a_word_that_may_mean_another_thing(tmp_path):
    path = one_module(tmp_path, factors(), "low-rank32.safetensors")
    assert [key for key, files in open_loras([Lora(path, 1, "high_noise")], TWO).items() if files] == ["high_noise"]


def test_a_pair_under_its_published_names(tmp_path):
    for expert in ("high", "low"):
        one_module(tmp_path, factors(), f"wan2.2_i2v_A14b_{expert}_noise_lora_rank64_lightx2v_4step_1022.safetensors")
    found = open_loras([Lora(str(tmp_path))], TWO)
    assert all(expert in file.path.name for expert, files in found.items() for file in files) and all(found.values())


def test_experts_as_told(tmp_path):
    a, b = (one_module(tmp_path, factors(), f"{name}.safetensors") for name in "ab")
    assert experts_of(Lora(a, 1, "high_noise"), Lora(b), Lora(b, 1, "low_noise")) == {
        "high_noise": ["a.safetensors", "b.safetensors"],
        "low_noise": ["b.safetensors", "b.safetensors"],
    }
    assert not open_loras([Lora(a, 1, "high_noise")], TWO)["high_noise"][0].warnings


def test_a_folder_with_a_file_per_expert(tmp_path):
    for name in ("high_noise_model", "low_noise_model", "other"):
        one_module(tmp_path, factors(), f"{name}.safetensors")
    both = {"high_noise": ["high_noise_model.safetensors"], "low_noise": ["low_noise_model.safetensors"]}
    assert experts_of(Lora(str(tmp_path))) == both
    assert experts_of(Lora(str(tmp_path), 1, "low_noise")) == {**both, "high_noise": []}
    with pytest.raises(WanFastError, match="holds a file per expert, but this model has only one"):
        opened(tmp_path)


def test_a_folder_with_one_file(tmp_path):
    one_module(tmp_path / "style_low_noise", factors(), "adapter_model.safetensors")
    (tmp_path / "style_low_noise" / "training_args.bin").touch()
    folder = str(tmp_path / "style_low_noise")
    assert experts_of(Lora(folder)) == {"high_noise": [], "low_noise": ["adapter_model.safetensors"]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanFastError, match=r"must hold one LoRA file, or one per expert, and has 0 \(none of .safetensors"):
        opened(tmp_path / "empty")
    for name in "ab":
        one_module(tmp_path / "two", factors(), f"{name}.safetensors")
    with pytest.raises(WanFastError, match=r"has 2 \(a.safetensors, b.safetensors\); give the file"):
        opened(tmp_path / "two")


def test_experts_by_the_prefixes_of_diffusers(tmp_path):
    high = {f"transformer.{diffusers(Q)}{suffix}": tensor for suffix, tensor in factors(seed=1).items()}
    low = {f"transformer_2.{diffusers(FFN)}{suffix}": t for suffix, t in factors(seed=3).items()}
    low[f"transformer_2.{diffusers(FFN)}.lora_A.weight"] = random(3, 20)
    metadata = {"lora_adapter_metadata": {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer_2.lora_alpha": 12}}
    both, only_low = save(tmp_path / "both.safetensors", high | low, metadata), save(tmp_path / "second.safetensors", low)
    found = open_loras([Lora(both)], TWO)
    assert {expert: set(files[0].updates) for expert, files in found.items()} == {
        "high_noise": {f"{Q}.weight"},
        "low_noise": {f"{FFN}.weight"},
    }
    assert [
        files[0].updates[name][0].scale for files, name in zip(found.values(), (f"{Q}.weight", f"{FFN}.weight"), strict=True)
    ] == [2, 4]
    assert not found["high_noise"][0].warnings
    assert experts_of(Lora(both, 1, "low_noise")) == {"high_noise": [], "low_noise": ["both.safetensors"]}
    assert experts_of(Lora(only_low)) == {"high_noise": [], "low_noise": ["second.safetensors"]}
    with pytest.raises(WanFastError, match=r"to the high-noise expert, but its keys \(transformer_2.\*\) say low-noise"):
        experts_of(Lora(only_low, 1, "high_noise"))
    for path in (both, only_low):
        with pytest.raises(WanFastError, match="for a model of two experts"):
            opened(path)


@pytest.mark.parametrize(("asked", "named"), [("high_noise", "low_noise"), ("low_noise", "high_noise")])
def test_experts_that_contradict_the_name(tmp_path, asked, named):
    path = one_module(tmp_path, factors(), f"{named}.safetensors")
    with pytest.raises(
        WanFastError, match=f"to the {asked.replace('_', '-')} expert, but its name says {named.replace('_', '-')}"
    ):
        experts_of(Lora(path, 1, asked))
    with pytest.raises(WanFastError, match=f"is for the {asked.replace('_', '-')} expert, but this model has only one"):
        open_loras([Lora(path, 1, asked)], {"model": SHAPES})


def test_keys_of_the_image_branch_are_skipped_and_counted(tmp_path):
    image = {
        "blocks.0.cross_attn.k_img": factors(),
        "blocks.1.cross_attn.v_img": {
            ".lora_up.weight": random(12, 2),
            ".lora_down.weight": random(2, 12),
            ".alpha": torch.tensor(2.0),
        },
        "blocks.1.cross_attn.norm_k_img": {".diff": random(12)},
        "img_emb.proj.1": {".diff": random(2, 2), ".diff_b": random(2)},
        "blocks.0.attn2.add_k_proj": {".lora_B.bias": random(12)},
        "condition_embedder.image_embedder.ff.net.2": factors(),
    }
    image = {f"{module}{suffix}": tensor for module, tensors in image.items() for suffix, tensor in tensors.items()}
    image |= {"lora_unet_blocks_0_cross_attn_v_img.alpha": torch.tensor(1.0), "img_emb.emb_pos.diff": random(1, 2, 3)}
    only = save(tmp_path / "image.safetensors", image)
    own = {f"{Q}{suffix}": tensor for suffix, tensor in factors().items()}
    file = opened(save(tmp_path / "lora.safetensors", image | own))
    assert (file.absent, set(file.updates)) == (len(image), {f"{Q}.weight"})
    assert file.described() == "lora.safetensors at strength 1: changes 1 tensor, 13 keys of an image branch skipped"
    with pytest.raises(WanFastError, match=r"changes nothing in this model: all its 13 keys are of an image branch"):
        opened(only)
    has = SHAPES | {"blocks.0.cross_attn.k_img.weight": (12, 12), "blocks.0.cross_attn.k_img.bias": (12,)}
    assert opened(save(tmp_path / "lora.safetensors", image | own), shapes=has).absent == len(image) - 3


@pytest.mark.parametrize("suffix", [".lora_mid.weight", ".hada_t1", ".lokr_t2", ".reshape_weight", ".oft_blocks"])
def test_unsupported_kinds(tmp_path, suffix):
    path = one_module(tmp_path, {suffix: random(2, 2), **factors()})
    with pytest.raises(WanFastError, match=rf"{suffix.split('.')[1]} is not supported"):
        opened(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UP: (16, 3), DOWN: (3, 16)}, r"of another model.*up \[16, 3\] and down \[3, 16\] against \[12, 12\]"),
        ({UP: (12, 3), DOWN: (3, 16)}, r"of another model: for blocks.0.self_attn.q.weight it has"),
        ({UP: (12, 4), DOWN: (3, 12)}, r"different ranks for .*: up \[12, 4\] and down \[3, 12\]"),
        ({UP: (12, 0), DOWN: (0, 12)}, "different ranks"),
        ({UP: (12, 3)}, r"has only up for .* \(diffusion_model.blocks.0.self_attn.q.lora_B.weight\)"),
        ({DOWN: (3, 12), ".alpha": ()}, "has only down for"),
        ({".hada_w1_a": (12, 2), ".hada_w1_b": (2, 12)}, "has only w1_a and w1_b for"),
        ({".lokr_w1": (3, 3), ".lokr_w2_a": (4, 1)}, "has only w1 and w2_a for"),
        ({".lokr_w1": (3, 3), ".lokr_w2": (4, 5)}, r"of another model.*w1 \[3, 3\] and w2 \[4, 5\]"),
        ({".lokr_w1": (), ".lokr_w2": (12, 12)}, "of another model"),
        ({".alpha": ()}, "without the factors that it scales"),
        ({".dora_scale": (12, 1), ".diff": (12, 12)}, "without the factors that it scales"),
        ({".diff": (16, 9)}, r"of another model.*diff \[16, 9\] against \[12, 12\]"),
        ({".diff_b": (16,)}, r"of another model.*diff \[16\] against \[12\]"),
        ({".diff": (12, 12), ".w_norm": (12, 12)}, "changes blocks.0.self_attn.q.weight twice, by"),
        ({UP: (12, 3), DOWN: (3, 12), ".lora_down.weight": (3, 12)}, "twice, by"),
        ({UP: (12, 3), DOWN: (3, 12), ".dora_scale": (1, 12)}, r"only a magnitude per output row, \[12, 1\]"),
        ({UP: (12, 3), DOWN: (3, 12), ".alpha": (2,)}, "which must be one number"),
    ],
)  # fmt: skip
def test_refused_updates(tmp_path, tensors, message):
    with pytest.raises(WanFastError, match=message) as error:
        opened(one_module(tmp_path, {suffix: torch.ones(shape) for suffix, shape in tensors.items()}))
    assert "\n" not in str(error.value) and "lora.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["blocks.7.ffn.0.diff_b"],
            r"1 key without .*blocks.7.ffn.0.diff_b; probably it is a LoRA of a model of 8 blocks .* has 2",
        ),
        (["lora_te_text_model_q.alpha"], "probably they belong to a text encoder"),
        (["double_blocks.9.img_attn.proj.alpha"], "probably it is a LoRA of another kind of model"),
        (["vace_blocks.0.ffn.0.diff_b"], "of another variant of Wan"),
        ([f"{FFN}.weight"], "probably they are whole weights"),
        (
            ["a.diff", "b.diff", "c.diff", "d.diff"],
            r"4 keys without a place in this model: a.diff, b.diff, c.diff, ...; .*damaged",
        ),
        (["blocks.0.self_attn.q.lora_C"], "1 key without a place"),
    ],
)
def test_keys_left_over(tmp_path, keys, message):
    own = {f"{Q}{suffix}": tensor for suffix, tensor in factors().items()}
    with pytest.raises(WanFastError, match=message):
        opened(save(tmp_path / "l.safetensors", own | {key: torch.ones(12) for key in keys}))


def test_no_lora_at_all(tmp_path):
    with pytest.raises(
        WanFastError, match=r"holds no LoRA but blocks.0.cross_attn.k.bias, .*a whole model is given as --ckpt_dir"
    ):
        opened(save(tmp_path / "model.safetensors", WEIGHTS))
    with pytest.raises(WanFastError, match="holds no LoRA but no tensor"):
        opened(save(tmp_path / "empty.pth", {}))


def test_wider_and_deeper_models(tmp_path):
    wide = dit_shapes(DiTDims(dim=24, num_layers=2, **SIZES))
    path = save(tmp_path / "l.safetensors", written(known())[0])
    with pytest.raises(WanFastError, match=r"of another model.* against \[24"):
        opened(path, shapes=wide)
    shallow = dit_shapes(DiTDims(dim=12, num_layers=1, **SIZES))
    with pytest.raises(WanFastError, match="of a model of 2 blocks or more, and this one has 1"):
        opened(path, shapes=shallow)


def test_damaged_files(tmp_path):
    path = tmp_path / "lora.safetensors"
    one_module(tmp_path, factors())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WanFastError, match="truncated"):
        opened(path)
    with pytest.raises(WanFastError, match="in I8; take a file in"):
        opened(one_module(tmp_path, {key: tensor.to(torch.int8) for key, tensor in factors().items()}))


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pth"])
def test_numbers_that_are_none(tmp_path, name, value):
    state = factors()
    state[".lora_A.weight"][1, 5] = value
    path = one_module(tmp_path, state, name)
    with pytest.raises(
        WanFastError, match=rf"{name}' has {value} in diffusion_model.{Q}.lora_A.weight, which must be a finite"
    ):
        Merger([opened(path)]).check()
    Merger([opened(path, 0)]).check()


@pytest.mark.parametrize("alpha", [-1.0, nan, inf])
def test_alpha_that_is_no_number(tmp_path, alpha):
    path = one_module(tmp_path, {**factors(), ".alpha": torch.tensor(alpha)})
    with pytest.raises(WanFastError, match=rf"has {alpha:g} in .*q.alpha, which must be a positive number"):
        Merger([opened(path)]).check()


def test_nothing_is_read_before_it_is_needed(tmp_path):
    state, _ = written(known())
    file = opened(save(tmp_path / "lora.safetensors", state))
    merger = Merger([file])
    file.path.unlink()
    bias = WEIGHTS["blocks.0.cross_attn.k.bias"]
    assert merger.merged("blocks.0.cross_attn.k.bias", bias) is bias
    assert len(merger.targets) == len(file.updates)
