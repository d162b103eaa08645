import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import CASES as SMALL_CASES
from kernel_cases import arguments, run
from models import random_dit

from bench import networks, operations, presets, registry, vae
from bench.cases import CASES
from bench.official import Habits, official_step
from bench.registry import OURS, Case, NotHere, Work
from bench.timer import measure
from wan_fast import kernels, manifest
from wan_fast.counting import counted
from wan_fast.dit import grid_of
from wan_fast.kernels import KERNELS
from wan_fast.manifest import DiTDims, VaeDims
from wan_fast.tasks import VAES

META, CPU = torch.device("meta"), torch.device("cpu")
FIRST = {case.group: case.name for case in reversed(CASES)}
# of graphs many steps, which would take minutes
BUILT_ON_META = [case for case in CASES if case.group not in ("run", "quality", "graphs")]


@pytest.mark.parametrize("case", BUILT_ON_META, ids=lambda case: case.name)
def test_every_case_runs_on_meta_and_states_its_work(case):
    """Full-size GPU cases too, without a GPU: every arm of each group's first case, ours of the others."""
    with torch.no_grad():
        work = case.make(META)
        for name, build in work.arms.items():
            if name != OURS and case.name != FIRST[case.group]:
                continue
            try:
                call = build()
            except (ImportError, NotHere):
                assert name != OURS
                continue
            if "padded" in name:
                continue  # transformers reads its mask back, which meta cannot
            flops = sum(done.flops for done in counted(call).values())
            if name == OURS:
                assert flops == pytest.approx(work.flops, rel=0.02)
    assert case.group == "kernel" or work.flops > 0
    assert set(work.rates) <= set(work.arms)


def test_a_preset_runs_the_passes_of_its_plan(monkeypatch):
    # two thirds of the blocks: passes are what is counted
    cut = SimpleNamespace(of_task=DiTDims.of_task, of_shapes=lambda *found: replace(DiTDims.of_shapes(*found), num_layers=4))
    monkeypatch.setattr(presets, "DiTDims", cut)
    with torch.no_grad():
        work = presets.denoising("ti2v-5B", "tiny", (128, 128, 33), ("fast",), META)
        flops = sum(done.flops for done in counted(work.arms[OURS]()).values())
        every = sum(done.flops for done in counted(work.arms[f"{OURS}, --quality lossless"]()).values())
    assert flops == pytest.approx(work.flops, rel=0.06) and flops == pytest.approx(0.38 * every, rel=0.06)


@pytest.mark.parametrize("id", ["B2-2x3x2-N4-K24-2of3-from0", "B1-1x1x2-N24-K128-1of1-from0"])
def test_the_chain_that_is_compiled_computes_the_same(id):
    kernel, case = KERNELS["qk_norm_rope"], next(case for case in SMALL_CASES if case.id == id)
    args = arguments(case, torch.float32, CPU)
    chain = operations.rope_in_reals(args)
    torch.testing.assert_close(run(kernel, chain, args), run(kernel, kernel.reference, args))


def test_bytes_of_what_changes_in_place_are_those_that_move():
    """Read once and written once; v, which is not touched, not at all."""
    meta = {"device": "meta"}
    with torch.no_grad():
        x = torch.empty(2, 5, 3, 96, **meta)
        table, weight = torch.empty(2, 5, 12, **meta), torch.empty(2, 96, **meta)
        done = counted(lambda: kernels.qk_norm_rope(x, weight, table, grid=(5, 1, 1), heads=4))
        assert done["wan_fast kernel"].bytes == 4 * (2 * 2 * 5 * 2 * 96 + 2 * 96 + 2 * 5 * 12)
        done = counted(lambda: kernels.gelu_tanh(torch.empty(7, 96, **meta)))
        assert done["wan_fast kernel"].bytes == 2 * 4 * 7 * 96


def test_shares_of_a_forward():
    found = networks.shares(DiTDims(dim=64, ffn_dim=128, num_heads=2, num_layers=2, in_dim=4, out_dim=4), (4, 2, 8, 8),
                            torch.float32, torch.device("cpu"))  # fmt: skip
    assert sum(found.values()) == pytest.approx(1) and {"matrix product", "attention", "wan_fast kernel"} <= set(found)


def test_names_are_unique_and_say_group_and_dtype():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 3 and name.endswith(("/bf16", "/fp32")) for name in names)
    assert any(case.headline and case.device == "cpu" for case in CASES)


@pytest.mark.parametrize("habits", [Habits(), Habits(False, False, False), Habits(modulation_per_token=False)])
def test_the_official_recipe_computes_the_same(habits):
    dims = DiTDims(dim=256, ffn_dim=320, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=32, text_len=20)
    model, x, text = random_dit(dims), torch.randn(1, 16, 3, 4, 6), torch.randn(7, 32)
    t, context = torch.tensor([[500.0]]), model.prepare([text], grid_of(x.shape))
    expected = model(x, t, context)
    actual = official_step(model, x, t, [text], context, habits)
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


def test_arms_run_in_turn_and_back():
    calls = []
    arms = {name: partial(calls.append, name) for name in "abc"}
    timings = measure(arms, CPU, budget=1.0, least=4)
    assert "".join(calls[-24:]) == "abccba" * 4
    assert all(len(t.seconds) >= 4 and min(t.seconds) >= 0 for t in timings.values())


def test_peak_is_what_a_call_adds():
    held = torch.zeros(1000)

    def call():
        first = held + 1
        second = first + 1
        del first
        return second.sum()

    assert measure({"a": call}, CPU, budget=0.0)["a"].peak_bytes == 8000


def case_of(arms, tolerance=1e-3):
    return Case("toy/x/1/fp32", "cpu", lambda device: Work(arms=arms, rate="fp32", tolerance=tolerance, flops=1e6), 0.01)


def gives(value):
    return lambda: lambda: torch.tensor([1.0, value])


def missing():
    import no_such_package  # noqa: F401

    return lambda: None


def refuses():
    raise NotHere("needs another machine")


def breaks():
    def call():
        raise RuntimeError("out of\n  memory")

    return call


def asserts():
    raise AssertionError("headdim must be 64")


def test_a_rival_that_is_missing_is_a_skipped_arm():
    arms = {OURS: gives(1.0), "same": gives(1.0), "absent": missing, "elsewhere": refuses, "broken": breaks, "asserts": asserts}
    row, samples = registry.run(case_of(arms), CPU, {"copy": 1e9, "fp32": 1e9})
    assert set(row["arms"]) == {OURS, "same"}
    assert row["skipped"] == {
        "absent": "No module named 'no_such_package'",
        "elsewhere": "needs another machine",
        "broken": "RuntimeError: out of memory",
        "asserts": "AssertionError: headdim must be 64",
    }
    assert row["arms"]["same"]["ratio"]["low"] <= row["arms"]["same"]["ratio"]["median"] <= row["arms"]["same"]["ratio"]["high"]
    assert row["arms"][OURS]["of_roof"] == pytest.approx(1e-3 / row["arms"][OURS]["seconds"])
    assert len(samples) == row["arms"][OURS]["rounds"]


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_arms_that_do_other_work_are_not_timed(value):
    row, _ = registry.run(case_of({OURS: gives(1.0), "other": gives(value), "same": gives(1.0)}), CPU, {})
    assert row["skipped"]["other"].startswith("does other work than wan-fast: relative difference")
    assert set(row["arms"]) == {OURS, "same"}


@pytest.mark.parametrize(
    ("build", "error"), [(breaks, RuntimeError), (missing, NotHere), (gives(float("nan")), AssertionError)]
)
def test_ours_must_run(build, error):
    with pytest.raises(error):
        registry.run(case_of({OURS: build}), CPU, {})


def test_an_unknown_case_names_the_known_ones():
    assert registry.select(CASES, ["dit/toy-width/*"])[0].name == "dit/toy-width/48x9x8x8/fp32"
    assert len(registry.select(CASES, [])) == len(CASES)
    with pytest.raises(ValueError, match=r"no case is called 'dit/toy-widht.*did you mean dit/toy-width") as error:
        registry.select(CASES, ["vae/*", "dit/toy-widht/48x9x8x8/fp32"])
    assert all(case.name in str(error.value) for case in CASES)


def test_a_roof_that_was_not_measured_gives_no_share():
    assert registry.roof_seconds(1e9, 1e6, "bf16", {"copy": 1e9, "fp32": 1e9}) is None
    assert registry.roof_seconds(0, 0, "fp32", {"copy": 1e9, "fp32": 1e9}) is None
    assert registry.roof_seconds(0, 1e6, "fp32", {"copy": 1e9}) == pytest.approx(1e-3)
    assert registry.roof_seconds(1e9, 1e6, "fp32", {"copy": 1e9, "fp32": 1e9}) == pytest.approx(1.0)


@pytest.mark.parametrize("case", [case for case in CASES if case.group == "conv3d"], ids=lambda case: case.name)
def test_convolutions_are_laid_out_as_in_the_engine(case, monkeypatch):
    seen = []
    monkeypatch.setattr(operations, "causal_conv3d", lambda *tensors: seen.extend(tensors) or [None])
    case.make(META).arms[OURS]()()
    x, past, weight, _ = seen
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, past))
    assert weight.stride() == kernels.conv_weight(weight.clone(memory_format=torch.contiguous_format)).stride()


def test_a_budget_that_three_rounds_exceed_by_much_gives_one():
    def sleeps():
        time.sleep(0.02)

    assert len(measure({"a": sleeps}, CPU, budget=0.01)["a"].seconds) == 1
    assert len(measure({"a": sleeps}, CPU, budget=0.1)["a"].seconds) >= 2


def test_a_ratio_above_one_means_that_ours_is_faster():
    assert registry.ratio([2.0, 4.0, 3.0], [1.0, 1.0, 1.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize(
    ("make", "rivals"),
    [
        (partial(networks.dit, networks._TOY, (48, 3, 4, 6), torch.float32), {"official recipe", "diffusers"}),
        (partial(networks.dit, networks._TOY, (48, 3, 4, 6), torch.bfloat16), {"official recipe", "diffusers"}),
        (partial(networks.vae, networks._VAE22_TOY, (48, 3, 2, 3), False), {"diffusers"}),
        (partial(networks.vae, networks._VAE22_TOY, (48, 3, 2, 3), True), {"diffusers"}),
        (partial(networks.text, manifest.text_shapes(99, 32, 32, 48, 4, 2), 5, torch.float32), {"padded to 512"}),
        (partial(networks.end_to_end, (64, 64), 5, 2), {"diffusers"}),
    ],
)
def test_ours_and_the_rivals_do_the_same_work(make, rivals):
    torch.manual_seed(0)
    with torch.inference_mode():
        arms, skipped = registry._build(make(CPU))
    assert {name.partition(",")[0] for name in arms} == {OURS, *rivals}
    assert all("GPU" in why for why in skipped.values())


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_layer_groups_hold_the_whole_decode(version):
    dims = VaeDims(version=version, encoder_dim=8, decoder_dim=12, channels=VAES[version].channels)
    found = vae.measure(dims, (dims.channels, 2, 2, 3), torch.float32, CPU)
    names = [group.name for group in found.groups]
    assert names[0] == "conv2, conv1" and {"middle attention", "level 0 blocks", "level 2 upsample", "head"} <= set(names)
    assert sum(group.flops for group in found.groups) == pytest.approx(manifest.vae_flops(dims, "decoder", 2, 2, 3), rel=0.02)
    assert all(group.seconds > 0 for group in found.groups) and 0 < found.first < found.seconds
    text = "\n".join(vae.table(found, roof=1e15))
    assert all(name in text for name in names) and "first frame after" in text
