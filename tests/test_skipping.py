"""What a step cache and a CFG cache make of a plan; no weights but where TeaCache reads them."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_native
from torch.nn import functional as F

from wan_fast import skipping
from wan_fast.caches import CfgCache, StepCache
from wan_fast.calibration import BRANCHES, Wanted, best, published
from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.distances import time_distances
from wan_fast.dit import sinusoid
from wan_fast.planning import plan
from wan_fast.skipping import Known, Mask, computed_mask, forced, rules, with_caches, without_guidance
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

# masks of the published rule and curves: model, steps, threshold, steps reused in a row, retention, conditional, unconditional
MAGCACHE = """
t2v-1.3B        50 0.12 2 0.2 ##########..#..#..#..#..#..#..#..#..#..#..#.#.#.##
t2v-1.3B        50 0.12 4 0.2 ##########....#....#....#....#....#...#..#..#.#.##
t2v-14B         50 0.12 2 0.2 ##########..#..#..#..#..#..#..#..#..#..#..#.#.#.##
t2v-14B         50 0.12 4 0.2 ##########....#....#....#....#....#...#..#..#.#.##
t2v-14B         50 0.24 6 0.2 ##########......#......#......#.....#....#..#..#.#
i2v-14B-480P    40 0.12 2 0.2 ########..#..#..#..#..#..#..#..#..#.#.#.
i2v-14B-480P    40 0.12 4 0.2 ########....#....#...#...#..#..#..#.#.#.
i2v-14B-480P    40 0.24 6 0.2 ########......#.....#....#....#...#..#.#
i2v-14B-720P    40 0.12 2 0.2 ########..#..#..#..#..#..#..#..#..#.#.##
i2v-14B-720P    40 0.12 4 0.2 ########....#....#....#...#...#..#.#.#.#
i2v-14B-720P    40 0.24 6 0.2 ########......#......#.....#....#..#..#.
vace-1.3B       50 0.02 3 0.2 ##########...#...#...#..#..#..#..#.#.#.#.#########
ti2v-5B         50 0.06 2 0.2 ##########..#..#..#..#..#..#..#..#..#.#.#.#.#.#.#.
ti2v-5B-image   50 0.06 2 0.2 ##########..#..#..#..#..#..#..#..#..#.#.#.#.#.###.
t2v-A14B        40 0.06 2 0.4 ##########..#..#..#..#..#.######.#.#.###
i2v-A14B        40 0.06 2 0.1 ##################..#..#..#.#.#.#.###### #################..#..#..#..#.#.#.######
t2v-14B         30 0.12 2 0.2 ######..#..#..#..#..#..#..#.##
t2v-14B         30 0.12 4 0.2 ######....#....#....#...#.#.##
t2v-1.3B        30 0.12 2 0.2 ######..#..#..#..#..#..#..#.##
i2v-14B-480P    30 0.12 2 0.2 ######..#..#..#..#..#..#.#.#.#
i2v-14B-720P    30 0.12 2 0.2 ######..#..#..#..#..#..#..#.##
"""


def steps_of(task, num_steps, shift=None, guidance=None):
    spec = TASKS[task]
    return without_guidance(step_plan(spec, official("unipc", num_steps, shift or spec.shift), guidance or spec.guidance_scale))


def known(model, num_steps):
    task, _, kind = re.match(r"(\w+-[\w.]+?)(-(480P|720P|image))?$", model).groups()
    size = (832, 480) if kind == "480P" else (1280, 720)
    shift = 3.0 if kind == "480P" else TASKS[task].shift
    wanted = Wanted(
        task=task, num_steps=num_steps, shift=shift, solver="unipc", guidance_scale=(5.0, 5.0), size=size, num_frames=81,
        image=kind == "image",
    )  # fmt: skip
    found, others = best([entry for entry in published(task) if entry.magcache], wanted)
    return task, shift, Known(calibration=found, distances=lambda signal: [], others=others)


def letters(steps, branch):
    signs = {"run": "#", "reuse": ".", "reconstruct": "~", "zero": "0", "none": "-"}
    return "".join(signs[getattr(step, branch)] for step in steps)


def masked(steps, mask, **settings):
    return with_caches(steps, {branch: Mask(mask) for branch in BRANCHES}, settings.get("cfg"), settings.get("zero", 0))


# --- MagCache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", MAGCACHE.strip().splitlines(), ids=lambda row: "-".join(row.split()[:5]))
def test_magcache_is_the_published_one(row):
    model, num_steps, threshold, max_skips, retention, conditional, *unconditional = row.split()
    task, shift, data = known(model, int(num_steps))
    steps = steps_of(task, int(num_steps), shift)
    found = rules(StepCache.parse(f"magcache:{threshold},{max_skips},{retention}"), steps, data)
    wanted = [conditional, *(unconditional or [conditional])]
    # theirs forces the first step alone
    assert [computed_mask([found[branch]], steps, [0]) for branch in BRANCHES] == wanted
    # ours the last one too, and reuses both passes or none; in these, experts begin with computed steps
    ours = with_caches(steps, rules(StepCache.parse(f"magcache:{threshold},{max_skips},{retention}"), steps, data), None)
    assert [letters(ours, branch) for branch in BRANCHES] == [wanted[0][:-1] + "#"] * 2


@pytest.mark.parametrize(
    ("task", "num_steps", "flag", "forwards"),
    [
        ("t2v-1.3B", 50, "magcache", 50), ("t2v-14B", 50, "magcache", 50), ("t2v-14B", 50, "magcache:0.24,6", 36),
        ("ti2v-5B", 50, "magcache", 52), ("t2v-A14B", 40, "magcache", 52), ("ti2v-5B", 30, "magcache", 32),
        ("ti2v-5B", 50, "magcache:40%", 40), ("ti2v-5B", 50, "magcache:80%", 80), ("t2v-A14B", 40, "magcache:50%", 40),
        ("ti2v-5B", 50, "every:2,0", 52), ("ti2v-5B", 51, "every:2,0", 52), ("t2v-A14B", 40, "every:4,0", 24),
        ("ti2v-5B", 50, "every:2", 60),
    ],
)  # fmt: skip
def test_forwards(task, num_steps, flag, forwards):
    """Of released models, at their own shift."""
    todo = plan(EngineConfig(task=task, step_cache=flag), Request(prompt="a cat", num_steps=num_steps), on="b200")
    assert todo.forwards == forwards and todo.forwards_uncached == 2 * num_steps


def test_a_share_is_reached_with_the_fewest_in_a_row():
    _, shift, data = known("t2v-14B", 50)
    steps = steps_of("t2v-14B", 50, shift)
    for share in (90, 70, 50, 45, 40, 35, 30):
        mask = computed_mask(rules(StepCache.parse(f"magcache:{share}%"), steps, data).values(), steps)
        assert mask.count("#") <= share / 2 and mask.count("#") >= share / 2 - 3, mask
        longest = max(map(len, mask.replace("#", " ").split()))
        assert longest <= next(k for k, lowest in ((2, 50), (3, 43), (4, 40), (6, 34), (9, 0)) if share >= lowest), (
            share,
            mask,
        )


def test_a_share_of_a14b_is_reached_with_less_computed_at_first():
    """Its curve comes with 0.4 of the steps at first, which leaves no 42 %."""
    todo = plan(EngineConfig(task="t2v-A14B", step_cache="magcache:42%"), Request(prompt="a cat"), on="b200")
    mask = letters(todo.steps, "conditional")
    assert mask.count("#") <= 16 and mask.startswith("#####.") and mask[26:29] == "###"
    wide = plan(EngineConfig(task="t2v-A14B", step_cache="magcache:65%"), Request(prompt="a cat"), on="b200")
    assert letters(wide.steps, "conditional").startswith("#" * 10 + ".")
    with pytest.raises(WanFastError, match="at the fewest"):
        plan(EngineConfig(task="t2v-A14B", step_cache="magcache:42%,9,0.4"), Request(prompt="a cat"), on="b200")


def test_a_share_out_of_reach_is_refused():
    _, shift, data = known("t2v-14B", 50)
    with pytest.raises(WanFastError, match=r"magcache:10% is 5 of 50 steps, and it computes \d+ at the fewest"):
        rules(StepCache.parse("magcache:10%"), steps_of("t2v-14B", 50, shift), data)


def test_resampling_takes_the_nearest_point():
    curve = [0.9, 0.8, 0.7, 0.6]
    assert skipping.resampled(curve, 5) == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert skipping.resampled(curve, 3) == [1.0, 0.8, 0.6]
    assert skipping.resampled(curve, 9) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6]
    assert skipping.resampled(curve, 1) == [1.0]


# --- TeaCache -----------------------------------------------------------------------------------------------------------


def online(model, steps, coefficients, threshold, signal):
    """The published loop, on the model's own modules: decides inside the loop, as the steps come."""
    total, before, mask = 0.0, None, ""
    first, last = (5, len(steps)) if signal == "projection" else (1, len(steps) - 1)
    for i, step in enumerate(steps):
        e = sinusoid(torch.tensor([step.timestep]), model["time_embedding.0.weight"].shape[1])
        for n, name in enumerate(
            ["time_embedding.0", "time_embedding.2", "time_projection.1"][: 3 if signal == "projection" else 2]
        ):
            e = F.linear(F.silu(e) if n else e, model[f"{name}.weight"].float(), model[f"{name}.bias"].float())
        if i < first or i >= last:
            total, computed = 0.0, True
        else:
            distance = ((e - before).abs().mean() / before.abs().mean()).item()
            total += sum(c * distance ** (len(coefficients) - 1 - n) for n, c in enumerate(coefficients))
            computed = total >= threshold
            total = 0.0 if computed else total
        before, mask = e, mask + ".#"[computed]
    return mask


@pytest.mark.parametrize("signal", ["embedding", "projection"])
@pytest.mark.parametrize(("num_steps", "shift"), [(50, 5.0), (12, 5.0), (30, 8.0)])
def test_teacache_decides_as_the_loop_would(signal, num_steps, shift):
    from wan_fast.checkpoint import read_tensors

    opened = open_checkpoint(locate("tiny", TASKS["ti2v-5B"]))
    model = dict(read_tensors(opened.experts["model"]))
    steps = steps_of("ti2v-5B", num_steps, shift)
    distances = time_distances(signal, opened.experts, steps)
    assert distances[0] == 0 and len(distances) == num_steps
    seen = set()
    for threshold in (0.01, 0.05, 0.2, 0.5):
        for coefficients in ([1.0, 0.0], [3.0, -2.0, 1.5, 0.01]):
            rule = skipping.teacache(signal, distances, {"model": coefficients}, steps, threshold)
            wanted = online(model, steps, coefficients, threshold, signal)
            # the published projection variant lets the last step be reused
            always = [0] if signal == "projection" else None
            assert computed_mask([rule], steps, always) == wanted
            seen.add(wanted)
    assert len(seen) > 3, "the thresholds make no difference"


@pytest.mark.parametrize(
    ("flag", "num_steps", "shift", "forwards"),
    [
        ("teacache:0.4", 12, 5.0, 14), ("teacache:50%", 12, 5.0, 12), ("teacache-ret:60%", 12, 5.0, 14),
        ("teacache:0.4", 12, 9.0, 14), ("teacache", 50, 5.0, 50), ("teacache:0.2", 50, 5.0, 24),
        ("teacache-ret:0.2", 50, 5.0, 30), ("teacache:0.2", 50, 1.0, 28),
    ],
)  # fmt: skip
def test_forwards_of_tiny(flag, num_steps, shift, forwards):
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", step_cache=flag)
    assert plan(config, Request(prompt="a red ball", num_steps=num_steps, shift=shift)).forwards == forwards


def test_teacache_has_its_own_signal_per_expert(tmp_path):
    """Coefficients and distances of either expert are its own, and none reaches across the switch."""
    opened = open_checkpoint(write_native(tmp_path, "t2v-A14B"))
    steps = steps_of("t2v-A14B", 20)
    switch = [step.expert for step in steps].index("low_noise")
    distances = time_distances("embedding", opened.experts, steps)
    assert distances[0] == distances[switch] == 0 and all(d > 0 for i, d in enumerate(distances) if i not in (0, switch))
    swapped = {"high_noise": opened.experts["low_noise"], "low_noise": opened.experts["high_noise"]}
    assert time_distances("embedding", swapped, steps)[1] != distances[1]
    rule = skipping.teacache("embedding", [0.1] * 20, {"high_noise": [1.0, 0.0], "low_noise": [5.0, 0.0]}, steps, 0.25)
    assert computed_mask([rule], steps) == ("#..#..#..#..#..#..#..#"[:switch] + "#" * (20 - switch))


# --- all rules ------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["t2v-14B", "t2v-A14B"]), st.integers(2, 30), st.integers(0, 3),
    st.sampled_from([None, ("difference", 2, 0.0), ("difference", 3, 0.4), ("frequency", 2, 0.2), ("gate", 0, 0.3)]),
    st.text("#.", min_size=30, max_size=30), st.sampled_from([(5.0, 5.0), (1.0, 5.0), (5.0, 1.0), (1.0, 1.0)]),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_what_holds_for_every_plan(task, num_steps, zero, cfg, mask, guidance):
    if task == "t2v-14B" and guidance[0] != guidance[1]:
        guidance = (5.0, 5.0)
    steps = steps_of(task, num_steps, guidance=guidance)
    zero = min(zero, num_steps - 1)
    made = with_caches(
        steps, {b: Mask(mask) for b in BRANCHES}, cfg and CfgCache(kind=cfg[0], every=cfg[1], start=cfg[2]), zero
    )
    residual, difference, expert = {}, None, None
    for before, step in zip(steps, made, strict=True):
        assert replace(step, conditional="run", unconditional=before.unconditional, difference=(1.0, 1.0)) == before
        if step.index < zero:
            assert step.conditional == "zero" and step.unconditional in ("zero", "none") and step.forwards == 0
            continue
        if step.expert != expert:  # nothing is carried from one expert to the other
            residual, difference, expert = {}, None, step.expert
        assert (step.unconditional == "none") == (step.guidance_scale == 1)
        for branch in BRANCHES:
            how = getattr(step, branch)
            if how == "run":
                residual[branch] = step.index
            if how == "reuse":
                assert branch in residual
        if step.unconditional == "run" and step.conditional == "run":
            difference = step.index
        if step.unconditional == "reconstruct":
            assert cfg and difference is not None and step.index >= cfg[2] * num_steps
        if step.conditional == step.unconditional == "reuse":
            assert residual["conditional"] == residual["unconditional"]
    assert made[-1].conditional == "run" and made[zero].conditional == "run"
    assert made[-1].unconditional in ("run", "none", "reconstruct" if cfg and cfg[0] == "gate" else "run")


def test_both_passes_are_reused_or_none():
    """Where rules of the branches disagree the step is computed, and both begin anew."""
    steps = steps_of("t2v-14B", 8)
    rule = {"conditional": Mask("##.#..##"), "unconditional": Mask("##..#.##")}
    made = with_caches(steps, rule, None)
    assert letters(made, "conditional") == letters(made, "unconditional") == "##.##.##"


def test_forced_steps():
    steps = steps_of("t2v-A14B", 40)
    assert forced(steps) == [0, 26, 39]
    made = masked(steps, "#" + "." * 39)
    assert letters(made, "conditional") == "#" + "." * 25 + "#" + "." * 12 + "#"


@pytest.mark.parametrize(
    ("flag", "unconditional"),
    [
        ("difference:2,0", "#~#~#~#~#~##"), ("difference:3,0.25", "###~~#~~#~~#"), ("difference", "####~#~#~#~#"),
        ("gate:0.5", "######~~~~~~"), ("frequency:2,0.5", "######~#~#~#"),
    ],
)  # fmt: skip
def test_the_unconditional_pass_is_reconstructed_between_computed_ones(flag, unconditional):
    made = with_caches(steps_of("t2v-14B", 12), None, CfgCache.parse(flag))
    assert letters(made, "unconditional") == unconditional and letters(made, "conditional") == "#" * 12


@pytest.mark.parametrize(
    ("mask", "flag", "unconditional"),
    [
        # a difference serves N steps; where both residuals are of one step, both are reused
        ("##..#..#..##", "difference:2,0", "#~~~#..#..##"),
        ("##..#..#..##", "difference:4,0", "#~~~#..~~~##"),
        ("##..#..#..##", "difference:4,0.5", "##..#..~~~##"),
        ("##..#..#..##", "gate:0.5", "##..#..~~~~~"),
        ("#.#.#.#.#.##", "difference:3,0", "#.~~#.~~#.~#"),
        ("#####.#.####", "difference:2,0", "#~#~#.#.#~##"),
    ],
)
def test_both_caches_together(mask, flag, unconditional):
    made = masked(steps_of("t2v-14B", 12), mask, cfg=CfgCache.parse(flag))
    assert letters(made, "conditional") == mask and letters(made, "unconditional") == unconditional


def test_counters_stand_still_while_a_branch_is_reconstructed():
    class Asked(Mask):
        def reuse(self, index):
            asked.append(index)
            return super().reuse(index)

    asked = []
    rule = {"conditional": Mask("##.#.#.#..##"), "unconditional": Asked("##.#.#.#..##")}
    made = with_caches(steps_of("t2v-14B", 12), rule, CfgCache.parse("difference:3,0.5"))
    assert asked == [1, 2, 3, 4, 5], "from the start of the CFG cache on it is not asked"
    assert "reconstruct" in [step.unconditional for step in made]


def test_zero_steps_cost_nothing_and_the_first_after_them_is_computed():
    made = masked(steps_of("t2v-14B", 12), "#..#..#..#.#", zero=2, cfg=CfgCache.parse("difference:2,0"))
    assert letters(made, "conditional") == "00##..#..#.#" and letters(made, "unconditional") == "00#~~~#..#.#"


def test_the_frequency_form_weighs_bands_by_timestep():
    made = with_caches(steps_of("t2v-14B", 50), None, CfgCache.parse("frequency:2,0"))
    for step in made:
        low, high = (1.1 if 99 < step.timestep < 901 else 1.0), (1.1 if step.timestep < 301 else 1.0)
        assert step.difference == ((low, high) if step.unconditional == "reconstruct" else (1.0, 1.0))
    assert len({step.difference for step in made}) > 2


def test_without_guidance_there_is_one_pass():
    steps = steps_of("t2v-A14B", 40, guidance=(1.0, 4.0))
    assert letters(steps, "unconditional") == "#" * 26 + "-" * 14
    assert sum(step.forwards for step in steps) == 66


# --- what is refused --------------------------------------------------------------------------------------------------------

TINY = dict(task="ti2v-5B", checkpoint="tiny", device="cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step_cache": "##..##"}, r"has 6 steps, the run has 12; give one # or \. per step"),
        ({"step_cache": "every:2", "num_steps": 8}, "not for 8 steps: of 8 or fewer each differs too much"),
        ({"step_cache": "magcache:90%", "num_steps": 4}, "not for 4 steps"),
        ({"step_cache": "searched:10%"}, "the cheapest mask computes 3 of 12 steps; ask for more"),
        (
            {"step_cache": "searched:50%", "num_steps": 20},
            "were searched for .* this run of 20 is another; run wan-fast calibrate --search",
        ),
        ({"cfg_cache": "difference:2", "guidance_scale": 1}, "the guidance scale is 1, there is no unconditional pass to save"),
        ({"cfg_zero": 0, "guidance_scale": 1}, "the guidance scale is 1, there is nothing to scale"),
        ({"cfg_zero": 12}, "leaves none of 12 steps to compute"),
        ({"cfg_cache": "gate:0.5", "num_steps": 8}, "--cfg-cache gate:0.5 is not for 8 steps: of 8 or fewer"),
        ({"calibration": __file__}, "is for measured step caches; add --step-cache auto, or leave it out"),
        ({"calibration": __file__, "step_cache": "every:2"}, "is for measured step caches"),
        ({"calibration": __file__, "quality": "fast"}, "is not a calibration; delete it"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(options, says):
    of_engine = {
        name: options.pop(name) for name in ("step_cache", "cfg_cache", "cfg_zero", "calibration", "quality") if name in options
    }
    with pytest.raises(WanFastError, match=says):
        plan(EngineConfig(**TINY, **of_engine), Request(prompt="a red ball", **options))


def test_an_expert_begins_with_a_computed_step():
    config = EngineConfig(task="t2v-A14B", step_cache="#" * 26 + "." + "#" * 13)
    with pytest.raises(WanFastError, match="reuses step 26, which must be computed as the first of expert low_noise"):
        plan(config, Request(prompt="a cat"), on="b200")


@pytest.mark.parametrize("flag", ["teacache", "searched", "teacache-ret"])
def test_a_model_without_calibration_says_what_to_do(flag, tmp_path):
    folder = write_native(tmp_path, "t2v-A14B")
    with pytest.raises(WanFastError, match="run wan-fast calibrate"):
        plan(
            EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu", step_cache=flag),
            Request(prompt="a cat", size=(64, 64)),
        )


def test_teacache_of_a_checkpoint_that_is_not_here_is_announced():
    todo = plan(EngineConfig(task="t2v-14B", step_cache="teacache"), Request(prompt="a cat"), on="b200")
    assert todo.forwards == 100 and any("depends on the checkpoint's time embedding" in warning for warning in todo.warnings)


@pytest.mark.parametrize(
    "options", [{"step_cache": "magcache:0.0001"}, {"cfg_cache": "gate:0.99"}, {"step_cache": "every:2,0.95"}]
)
def test_a_cache_that_leaves_out_nothing_says_so(options):
    (warning,) = plan(EngineConfig(**TINY, **options), Request(prompt="a red ball")).warnings
    assert "leaves out no" in warning


def test_a_searched_mask_of_another_shape_is_announced():
    for request in ({"size": (64, 64), "num_frames": 5}, {"solver": "euler"}, {"guidance_scale": 9}):
        said = plan(EngineConfig(**TINY, step_cache="auto"), Request(prompt="a red ball", **request)).warnings
        assert any("searched: your calibration is of" in warning for warning in said), request


def test_published_data_are_for_released_models_alone(tmp_path):
    folder = write_native(tmp_path, "ti2v-5B")
    with pytest.raises(WanFastError, match="no curve of this model is known"):
        plan(
            EngineConfig(task="ti2v-5B", checkpoint=str(folder), device="cpu", step_cache="magcache"),
            Request(prompt="a cat", size=(64, 64)),
        )


def test_presets_compute_less_and_less():
    for task in ("t2v-1.3B", "t2v-14B", "ti2v-5B", "t2v-A14B"):
        for num_steps in (9, 12, 20, 30, 50):
            counts = [
                plan(EngineConfig(task=task, quality=quality), Request(prompt="a cat", num_steps=num_steps), on="b200").forwards
                for quality in ("lossless", "high", "fast", "draft")
            ]
            assert counts == sorted(counts, reverse=True) and counts[2] < 0.7 * counts[0], (task, num_steps, counts)


def test_a_curve_of_another_run_is_announced():
    def said(**request):
        return plan(EngineConfig(task="t2v-14B", step_cache="magcache"), Request(prompt="a cat", **request), on="b200").warnings

    assert not any("step-cache" in warning for warning in said())
    assert any("what is published is of 50 steps, shift 5" in warning for warning in said(num_steps=30, shift=8.0))
