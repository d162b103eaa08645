"""What the flags of the caches say, the files of calibrations, and the presets."""

import json
from dataclasses import replace

import pytest

from wan_fast import calibration
from wan_fast.caches import CfgCache, StepCache
from wan_fast.calibration import Calibration, Wanted, best, own, read, write
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.device import Device, named
from wan_fast.planning import plan
from wan_fast.quality import MEASURED, PRESETS, UNSET, settle
from wan_fast.setup import set_up
from wan_fast.skipping import computed_mask, teacache
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

TINY = dict(task="ti2v-5B", checkpoint="tiny", device="cpu")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("off", None),
        ("teacache", StepCache(kind="teacache")),
        ("teacache:0.1", StepCache(kind="teacache", threshold=0.1)),
        ("teacache-ret:50%", StepCache(kind="teacache-ret", share=0.5)),
        ("magcache:1", StepCache(kind="magcache", threshold=1.0)),
        ("magcache:0.12,4", StepCache(kind="magcache", threshold=0.12, max_skips=4)),
        ("magcache:0.12,4,0", StepCache(kind="magcache", threshold=0.12, max_skips=4, retention=0.0)),
        ("magcache:40%,6,0.1", StepCache(kind="magcache", share=0.4, max_skips=6, retention=0.1)),
        ("every", StepCache(kind="every", every=2, retention=0.2)),
        ("every:5,0", StepCache(kind="every", every=5, retention=0.0)),
        ("searched:33.3%", StepCache(kind="searched", share=0.333)),
        ("auto", StepCache(kind="auto")),
        (" ##..#.# ", StepCache(kind="mask", mask="##..#.#")),
    ],
)
def test_step_cache(text, found):
    assert StepCache.parse(text) == (found and replace(found, share=found.share and pytest.approx(found.share)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("off", None),
        ("difference", CfgCache(kind="difference", every=2, start=0.3)),
        ("difference:5", CfgCache(kind="difference", every=5, start=0.3)),
        ("frequency:3,0", CfgCache(kind="frequency", every=3, start=0.0)),
        ("gate", CfgCache(kind="gate", every=0, start=0.5)),
        ("gate:0.7", CfgCache(kind="gate", every=0, start=0.7)),
    ],
)
def test_cfg_cache(text, found):
    assert CfgCache.parse(text) == found


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        ("step_cache", "teacahe:0.1", "did you mean teacache?"),
        ("step_cache", "zzz", "take off, auto:P%, teacache:T"),
        ("step_cache", "", None),
        ("step_cache", "off:1", "unknown"),
        ("step_cache", "teacache:0", "the threshold must be a number above 0 to 1, got '0'"),
        ("step_cache", "teacache:-0.1", "above 0 to 1"),
        ("step_cache", "teacache:1.01", "above 0 to 1"),
        ("step_cache", "teacache:nan", "above 0 to 1"),
        ("step_cache", "teacache:x", "got 'x'"),
        ("step_cache", "teacache:", None),
        ("step_cache", "teacache:0.1,2", "magcache takes T,K,R, every N,R, the others one"),
        ("step_cache", "teacache:0%", "the share of steps to compute must be a number above 0 and below 100"),
        ("step_cache", "teacache:100%", "above 0 and below 100"),
        ("step_cache", "magcache:0.1,0", "K, the steps reused in a row, must be a whole number from 1 to 100"),
        ("step_cache", "magcache:0.1,2.5", "whole number"),
        ("step_cache", "magcache:0.1,2,1", "R, the part of all steps computed first, must be a number from 0 and below 1"),
        ("step_cache", "magcache:0.1,2,0.2,3", "4 values are too many"),
        ("step_cache", "every:1", "one step in N is computed, must be a whole number from 2 to 100"),
        ("step_cache", "every:2,3", "R, the part of all steps computed first, must be"),
        ("step_cache", "every:2,0.1,3", "3 values are too many"),
        ("step_cache", "searched:0.5", "searched takes the share of steps that are computed, as in searched:50%"),
        ("step_cache", ".##", "begin and end with #"),
        ("step_cache", "##.", "begin and end with #"),
        ("step_cache", "##x#", "unknown"),
        ("cfg_cache", "differnce", "did you mean difference?"),
        ("cfg_cache", "difference:1", "whole number from 2 to 100"),
        ("cfg_cache", "difference:2,1", "the part of steps before it must be a number from 0 and below 1"),
        ("cfg_cache", "difference:2,0.1,3", "too many values"),
        ("cfg_cache", "gate:0.2,1", "too many values"),
        ("cfg_cache", "gate:0", "above 0 and below 1"),
        ("cfg_cache", "gate:2", "above 0 and below 1"),
        ("cfg_zero", -1, "number of steps from 0 to 1000"),
        ("quality", "best", "quality must be one of lossless high fast draft"),
        ("calibration", "nowhere.json", "is not a file; check the path, or run wan-fast calibrate"),
    ],
)
def test_nonsense_is_refused_when_the_config_is_built(flag, text, says):
    if says is None:
        EngineConfig(task="ti2v-5B", **{flag: text})
        return
    with pytest.raises(WanFastError, match=says.replace("?", r"\?").replace("(", r"\(")):
        EngineConfig(task="ti2v-5B", **{flag: text})


# --- calibrations -----------------------------------------------------------------------------------------------------------


def entry(**changes):
    curve = {"threshold": 0.1, "max_skips": 2, "retention": 0.2, "conditional": [0.9] * 11, "unconditional": [0.9] * 11}
    base = dict(model="ti2v-5B", num_steps=12, shift=5.0, magcache=curve, size=[128, 128], num_frames=33, image=False)
    return Calibration(**base | changes)


def curve(count):
    return {**entry().magcache, "conditional": [0.9] * (count - 1), "unconditional": [0.9] * (count - 1)}


WANTED = Wanted(
    task="ti2v-5B",
    num_steps=12,
    shift=5.0,
    solver="unipc",
    guidance_scale=(5.0, 5.0),
    size=(128, 128),
    num_frames=33,
    image=False,
)


def test_published_data_are_whole():
    models = {name: calibration.published(name) for name in TASKS}
    counted = {name: len(found) for name, found in models.items() if found}
    assert counted == {
        "t2v-1.3B": 2, "t2v-14B": 2, "t2i-14B": 2, "i2v-14B": 4, "vace-1.3B": 1, "t2v-A14B": 1, "i2v-A14B": 1, "ti2v-5B": 4,
    }  # fmt: skip
    for found in models.values():
        for one in found:
            assert one.shift == TASKS[one.tasks[0]].shift or one.model in ("Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P")
            assert bool(one.magcache) != bool(one.teacache)
            assert all(0.75 < x < 1.1 for branch in calibration.BRANCHES for x in one.magcache.get(branch, ()))
    text = calibration.PUBLISHED.read_text()
    assert all(name in text for name in ("Apache-2.0", "2506.09045", "2411.19108"))


# highest power first, as published
TEACACHE = {
    ("Wan2.1-T2V-1.3B", "projection"): (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    ("Wan2.1-T2V-1.3B", "embedding"): (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
    ("Wan2.1-T2V-14B", "projection"): (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    ("Wan2.1-T2V-14B", "embedding"): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ("Wan2.1-I2V-14B-480P", "projection"): (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
    ("Wan2.1-I2V-14B-480P", "embedding"): (-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1),
    ("Wan2.1-I2V-14B-720P", "projection"): (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
    ("Wan2.1-I2V-14B-720P", "embedding"): (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    ("Wan2.2-TI2V-5B", "embedding"): (157472.669, -115702.395, 31076.1669, -3831.16651, 221.608777, -4.81179567),
}


def test_published_polynomials():
    found = {
        (one.model, signal): tuple(values["model"])
        for task in TASKS
        for one in calibration.published(task)
        for signal, values in one.teacache.items()
    }
    assert found == TEACACHE


@pytest.mark.parametrize(
    ("model", "signal", "distance", "threshold", "computed"),
    [
        ("Wan2.1-T2V-1.3B", "embedding", 0.06, 0.05, 50), ("Wan2.1-T2V-1.3B", "projection", 0.06, 0.05, 50),
        ("Wan2.1-T2V-14B", "embedding", 0.1, 0.14, 2), ("Wan2.1-T2V-14B", "projection", 0.06, 0.1, 50),
        ("Wan2.1-I2V-14B-480P", "embedding", 0.1, 0.19, 14), ("Wan2.1-I2V-14B-480P", "projection", 0.03, 0.2, 50),
        ("Wan2.1-I2V-14B-720P", "embedding", 0.1, 0.2, 26), ("Wan2.1-I2V-14B-720P", "projection", 0.03, 0.2, 28),
        ("Wan2.2-TI2V-5B", "embedding", 0.1, 0.26, 18),
    ],
)  # fmt: skip
def test_forwards_of_published_polynomials(model, signal, distance, threshold, computed):
    """At steps that are all as far apart."""
    steps = step_plan(TASKS["t2v-14B"], official("unipc", 50, 5.0), (5.0, 5.0))
    rule = teacache(signal, [0.0, *[distance] * 49], {"model": TEACACHE[model, signal]}, steps, threshold)
    assert computed_mask([rule], steps).count("#") == computed


def test_the_nearest_calibration_is_taken():
    entries = [
        entry(num_steps=50, magcache=curve(50)), entry(shift=3.0), entry(image=True), entry(size=[256, 256]), entry(),
        entry(num_frames=17),
    ]  # fmt: skip
    assert best(entries, WANTED) == (entries[4], {})
    assert best(entries, replace(WANTED, image=True)) == (entries[2], {})
    assert best(entries, replace(WANTED, num_steps=40)) == (entries[0], {"num_steps": "50 steps"})
    assert best(entries, replace(WANTED, size=(272, 240))) == (entries[3], {})
    found, other = best(entries[:1], replace(WANTED, shift=3.0, num_frames=5, image=True))
    assert found is entries[0] and list(other.values()) == ["50 steps", "shift 5", "128x128x33", "a run without a picture"]
    other = best([entry(solver="euler", guidance_scale=[3.0, 4.0])], WANTED)[1]
    assert other == {"solver": "solver euler", "guidance_scale": "guidance 3,4"}
    assert best([], WANTED) == (None, {})


def test_a_calibration_is_of_its_loras():
    plain, styled = entry(), entry(loras=["style.safetensors:0.8"], num_steps=50, magcache=curve(50))
    with_lora = replace(WANTED, loras=["style.safetensors:0.8"])
    assert best([styled, plain], WANTED) == (plain, {}) and best([plain, styled], with_lora)[0] is styled
    assert best([plain], with_lora)[1] == {"loras": "a model without LoRA"}
    assert best([styled], WANTED)[1]["loras"] == "a model with style.safetensors:0.8"


def test_files_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "folder" / "found.json"
    entries = [entry(masks=({"mask": "#" * 12, "psnr": 40.0},)), entry(num_steps=50, magcache=curve(50))]
    write(file, "a model", entries)
    assert [json.loads(json.dumps(e.magcache)) for e in read(file, "a model")] == [e.magcache for e in entries]
    assert all(e.image is False for e in read(file, "a model"))
    assert [e.num_steps for e in read(file, "a model")] == [12, 50] and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"model": "a model", "entries": [{"model": 1}]}', '{"model": "a model", "entries": 3}',
        '{"model": "a model", "entries": [{"model": "x", "num_steps": 3, "shift": 1, "magcache": {"conditional": [1], '
        '"unconditional": [1, 1]}}]}',
        '{"model": "a model", "entries": [{"model": "x", "num_steps": 2, "shift": 1, "magcache": {"conditional": [NaN], '
        '"unconditional": [1]}}]}',
        '{"model": "a model", "entries": [{"model": "x", "num_steps": 2, "shift": 1, "masks": [{"mask": "#"}]}]}',
        *(
            json.dumps({"model": "a model", "entries": [{"model": "x", "num_steps": 2, "shift": 1, **wrong}]})
            for wrong in (
                {"num_steps": 0}, {"shift": "5"}, {"size": [128]}, {"size": [0, 0]}, {"teacache": {"embedding": [1.0]}},
                {"teacache": {"embedding": {"model": [1.0]}}}, {"teacache": {"embedding": {"threshold": 0.1}}},
                {"magcache": {"conditional": [1], "unconditional": [1]}}, {"guidance_scale": "x"},
                {"magcache": {"conditional": [1], "unconditional": [1], "threshold": 0.1, "max_skips": "two", "retention": 0}},
                {"magcache": {"conditional": [1], "unconditional": [1], "threshold": "0.1", "max_skips": 2, "retention": 0}},
                {"magcache": {"conditional": [1], "unconditional": [1], "threshold": 0.1, "max_skips": 2, "retention": 1.5}},
            )
        ),
    ],
)  # fmt: skip
def test_other_files_are_no_calibrations(text, tmp_path):
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(WanFastError, match="is not a calibration; delete it, and run wan-fast calibrate"):
        read(tmp_path / "found.json", "a model")


def test_a_calibration_of_another_model_is_refused(tmp_path):
    write(tmp_path / "found.json", "30 blocks", [entry()])
    config = EngineConfig(**TINY, step_cache="magcache", calibration=str(tmp_path / "found.json"))
    with pytest.raises(WanFastError, match=r"is of another model .30 blocks; this has 6 blocks, width 256, 48 to 48 channels"):
        plan(config, Request(prompt="a red ball"))


def test_the_users_own_calibration_goes_before_that_beside_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside = tmp_path / "checkpoint"
    write(beside / calibration.FILE, "m", [entry(prompts=1), entry(num_steps=50, magcache=curve(50), prompts=1)])
    assert [e.prompts for e in own(beside, "m", None)] == [1, 1]
    write(calibration.in_user_cache(beside), "m", [entry(prompts=2)])
    assert best(own(beside, "m", None), WANTED)[0].prompts == 2
    assert best(own(beside, "m", None), replace(WANTED, num_steps=50))[0].prompts == 1
    write(tmp_path / "given.json", "m", [entry(prompts=3)])
    assert [e.prompts for e in own(beside, "m", str(tmp_path / "given.json"))] == [3]
    assert own(tmp_path / "elsewhere", "m", None) == [] and own(None, "m", None) == []


# --- presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", PRESETS)
@pytest.mark.parametrize(
    ("card", "precision", "attention"),
    [("h200", "fp8", "int8"), ("5090", "int8", "int8"), ("a100", "int8", "int8"), (None, "auto", "auto")],
)
def test_a_preset_takes_what_the_device_computes_fastest(quality, card, precision, attention):
    device = named(card) if card else Device(name="cpu", model="a CPU", memory=1, free=1)
    config, said, filled = settle(EngineConfig(task="ti2v-5B", quality=quality), device)
    assert config.quality is None and filled == set(UNSET) and said.startswith(f"{quality}: --precision ")
    wanted = {**PRESETS[quality]}
    for name, value in (("precision", precision), ("attention", attention)):
        wanted[name] = value if wanted[name] == "8 bits" else wanted[name]
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_a_preset_looks_at_dtype_and_checkpoint():
    fast = EngineConfig(task="ti2v-5B", quality="fast")
    assert settle(replace(fast, dtype="fp32"), named("h200"))[0].attention == "auto"
    assert settle(fast, named("h200"), stored_8bit=True)[0].precision == "auto"
    assert settle(replace(fast, quality="lossless"), named("h200"), stored_8bit=True)[0].precision == "bf16"


def test_what_is_given_beside_a_preset_stays_and_is_said():
    config, said, filled = settle(
        EngineConfig(task="ti2v-5B", quality="fast", step_cache="off", precision="bf16"), named("h200")
    )
    assert (config.step_cache, config.precision, config.attention) == ("off", "bf16", "int8")
    assert "--step-cache off as given" in said and "--precision bf16 as given" in said and filled == {"attention", "cfg_cache"}


def test_a_preset_leaves_out_what_does_not_fit():
    todo = plan(EngineConfig(**TINY, quality="fast"), Request(prompt="a red ball", num_steps=4, guidance_scale=1))
    assert todo.forwards == 4 and any("--quality takes no step cache here: " in warning for warning in todo.warnings)
    with pytest.raises(WanFastError, match="not for 4 steps"):
        plan(EngineConfig(**TINY, quality="fast", step_cache="auto"), Request(prompt="a red ball", num_steps=4))


def test_options_of_attention_in_8_bits_wait_for_the_presets_choice():
    config = EngineConfig(task="ti2v-5B", quality="fast", keep_steps=(2, 1))
    assert sum(step.attention == "exact" for step in plan(config, Request(prompt="a cat"), on="h200").steps) == 3
    with pytest.raises(WanFastError, match="--keep_steps is for attention in 8 bits"):
        set_up(replace(config, checkpoint="tiny", device="cpu"))


def test_presets_state_what_was_measured():
    """What the plan says of a preset is what bench/results/quality.md holds."""
    from pathlib import Path

    sections = (Path(__file__).parents[1] / "bench" / "results" / "quality.md").read_text().split("\n## ")
    for name, found in MEASURED.items():
        for num_steps, (passes, psnr, ssim) in found.items():
            section = next(text for text in sections if text.startswith(f"{num_steps} steps"))
            (row,) = [line.split("|") for line in section.splitlines() if line.startswith(f"| {name} |")]
            assert [row[2].split(",")[0].strip(), row[3].strip(), row[5].strip()] == [str(passes), f"{psnr}", f"{ssim:.4f}"]


def test_lossless_leaves_nothing_out():
    todo = plan(EngineConfig(task="ti2v-5B", quality="lossless"), Request(prompt="a cat"), on="h200")
    assert todo.forwards == 100 and not todo.flops_8bit and {step.attention for step in todo.steps} == {"exact"}


# --- planning for a card that is not here -------------------------------------------------------------------------------------


def test_a_card_is_planned_for_by_name():
    seconds = {}
    for name in ("h200", "NVIDIA H200", "RTX 4090", "geforce rtx 5090", "h100"):
        todo = plan(EngineConfig(task="ti2v-5B"), Request(prompt="a cat"), on=name)
        seconds[name] = todo.seconds_at_least
        assert todo.dtype == "bf16" and sum(todo.seconds_by_stage.values()) == todo.seconds_at_least
    assert seconds["h200"] == seconds["NVIDIA H200"] < seconds["geforce rtx 5090"] < seconds["RTX 4090"]
    with pytest.raises(WanFastError, match="--on voodoo2: this card is not on record; those that are: b200 h200"):
        named("voodoo2")


def test_caches_are_in_the_memory_plan_and_the_prediction():
    def of(**options):
        return plan(EngineConfig(task="ti2v-5B", **options), Request(prompt="a cat"), on="h200")

    plain, cached, both = of(), of(step_cache="magcache"), of(step_cache="magcache", cfg_cache="gate:0.1")
    residual, latents = 27280 * 3072 * 2, 48 * 31 * 44 * 80 * 4
    assert cached.memory.working["denoise"] - plain.memory.working["denoise"] == 2 * residual
    assert both.memory.working["denoise"] - plain.memory.working["denoise"] == 1 * residual + latents
    assert cached.seconds_by_stage["denoise"] == pytest.approx(0.52 * plain.seconds_by_stage["denoise"])
    rows = json.loads(json.dumps(both.to_dict(), default=str))["steps"]
    assert [row["run_cond"] for row in rows] == [step.conditional == "run" for step in both.steps]
    assert [row["run_uncond"] for row in rows] == [True] * 5 + [False] * 45
    assert {"timestep", "sigma", "expert", "guidance_scale"} <= set(rows[0])
