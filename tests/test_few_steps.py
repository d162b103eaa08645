"""Samplers of distilled models: their constants, what they do to a toy velocity, what options go with them, how they are named.

Sigmas are those of the authors' code, and so are the formulas: Euler x + (s' - s) v; with fresh noise (1 - s') x0 + s' noise
of x0 = x - s v (ModelTC/LightX2V, ModelTC/Wan2.2-Lightning, hao-ai-lab/FastVideo, NVlabs/rcm, thu-ml/TurboDiffusion).
"""

import json
from dataclasses import replace
from math import nan, tanh
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan_fast import EngineConfig, Request, WanFastError, few_steps, plan
from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.engine import Engine
from wan_fast.examples import example
from wan_fast.few_steps import PRESETS, parse_preset
from wan_fast.resolving import resolve
from wan_fast.sampler import denoise
from wan_fast.schedule import sampler_of
from wan_fast.solver import Solver
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

TINY = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
FIVE = TASKS["ti2v-5B"]
SMALL = Request(prompt="a red ball", preset="rcm-4step", size=(64, 64), num_frames=5, seed=0)

FOUR = {
    5: ([1, 0.9375, 0.833333, 0.625], [1000, 937.5, 833.333333, 625]),
    7: ([1, 0.954545, 0.875, 0.7], [1000, 954.545455, 875, 700]),
    12: ([1, 0.972973, 0.923077, 0.8], [1000, 972.972973, 923.076923, 800]),
    16: ([1, 0.979592, 0.941176, 0.842105], [1000, 979.591837, 941.176471, 842.105263]),
}
# the last three of each are the same; timesteps are told in bf16, whose numbers here are 4 apart
# whose authors draw fresh noise as [T, C, H, W]
TIME_FIRST = ("fastwan-3step", "self-forcing-4step")
RCM = {80: (0.987654, 988), 120: (0.991736, 992), 200: (0.995025, 996), 1600: (0.999375, 1000)}
# (task, preset, steps, shift) as given -> (sigmas, timesteps, what the first noise is multiplied by)
SAMPLERS = {
    ("ti2v-5B", "lightning-4step", None, None): (*FOUR[5], 1),
    ("t2v-A14B", "lightning-4step", None, None): (*FOUR[5], 1),
    ("i2v-A14B", "lightning-4step", None, 7): (*FOUR[7], 1),
    ("i2v-A14B", "lightning-4step", 4, 16): (*FOUR[16], 1),
    ("t2v-1.3B", "fastwan-3step", None, None): ([1, 0.756757, 0.521739], [1000, 757, 522], 1),
    ("ti2v-5B", "fastwan-3step", 3, None): ([1, 0.756757, 0.521739], [1000, 757, 522], 1),
    ("t2v-1.3B", "self-forcing-4step", None, None): (*FOUR[5], 1),
    ("t2v-A14B", "self-forcing-4step", None, None): (*FOUR[12], 1),
    ("t2v-A14B", "self-forcing-4step", None, 5): (*FOUR[5], 1),
    **{
        ("t2v-1.3B", f"{preset}:{S}", steps, None): (
            [first, 0.933781, 0.852895, 0.608979][: steps or 4],
            [told, 932, 852, 608][: steps or 4],
            first,
        )
        for preset in ("rcm-4step", "rcm-ode-4step")
        for S, (first, told) in RCM.items()
        for steps in ((None, 4, 3, 2, 1) if S == 80 else (None,))
    },
}
ODE = ("lightning-4step", "rcm-ode-4step")
# latents after each step from (1, -0.5) times the start, with v = 0.7 tanh(x) + 0.3 t / 1000 and the noises below
NOISES = [[0.4, -1.1], [-0.8, 0.3], [1.5, 0.6], [-0.2, -0.9]]
TRAJECTORIES = {
    ("ti2v-5B", "lightning-4step", None, None): [
        0.9479303, -0.4985324, 0.8647593, -0.4942174, 0.7107820, -0.4795736, 0.3262089, -0.4016790,
    ],
    ("i2v-A14B", "lightning-4step", None, 7): [
        0.9621311, -0.4989326, 0.8978566, -0.4960268, 0.7643007, -0.4857384, 0.3019351, -0.4118329,
    ],
    ("i2v-A14B", "lightning-4step", 4, 16): [
        0.9829976, -0.4995208, 0.9514229, -0.4983936, 0.8721014, -0.4944066, 0.2452890, -0.4373428,
    ],
    ("ti2v-5B", "fastwan-3step", 3, None): [0.3432961, -0.9483422, -0.4191106, -0.1919940, -0.3561228, -0.2044278],
    ("t2v-1.3B", "self-forcing-4step", None, None): [
        0.3854303, -1.0610324, -0.6865595, 0.1151911, 0.7322393, 0.3149845, 0.3418622, 0.0643749,
    ],
    ("t2v-A14B", "self-forcing-4step", None, None): [
        0.3936996, -1.0831491, -0.7496461, 0.2133749, 1.0810000, 0.4443871, 0.4446010, 0.0187135,
    ],
    ("t2v-1.3B", "rcm-4step:80", None, None): [
        0.3849019, -1.0583116, -0.6993868, 0.1372621, 0.6957498, 0.3019731, 0.3281919, 0.0659437,
    ],
    ("t2v-1.3B", "rcm-4step:200", None, None): [
        0.3846841, -1.0585680, -0.6994008, 0.1372339, 0.6957464, 0.3019685, 0.3281894, 0.0659410,
    ],
    ("t2v-1.3B", "rcm-4step:80", 2, None): [0.3849019, -1.0583116, -0.1160435, -0.8062731],
    ("t2v-1.3B", "rcm-4step:80", 1, None): [0.1719978, -0.4704453],
    ("t2v-1.3B", "rcm-ode-4step:80", None, None): [
        0.9431630, -0.4925518, 0.8788370, -0.4893351, 0.6959765, -0.4742167, 0.3283569, -0.3970469,
    ],
    ("t2v-1.3B", "rcm-ode-4step:80", 3, None): [0.9431630, -0.4925518, 0.8788370, -0.4893351, 0.2394338, -0.4364710],
}  # fmt: skip


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return str(path)


def resolved(task, **given):
    return resolve(TASKS[task], Request(**{**example(TASKS[task]), "prompt": "a cat", "seed": 0, **given}))


def sampler(case):
    task, preset, steps, shift = case
    return sampler_of(resolved(task, preset=preset, num_steps=steps, shift=shift))


# --- the constants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_constants(case):
    sigmas, timesteps, start = SAMPLERS[case]
    made, name = sampler(case), case[1].partition(":")[0]
    assert made.sigmas == pytest.approx([*sigmas, 0], abs=6e-7) and made.sigmas[-1] == 0
    assert made.timesteps == pytest.approx(timesteps, abs=6e-7)
    assert made.start == pytest.approx(start, abs=6e-7)
    assert made.solver == PRESETS[name].solver == ("euler" if name in ODE else "lcm")
    assert made.time_first == (name in TIME_FIRST)
    assert made.split == (2 if name == "lightning-4step" else None)


@pytest.mark.parametrize("S", RCM)
def test_timesteps_of_rcm_are_those_of_bf16(S):
    made = few_steps.sampler(f"rcm-4step:{S}", 4, 1.0)
    assert made.timesteps == tuple((1000 * torch.tensor(made.sigmas[:-1])).bfloat16().tolist())
    assert made.start == made.sigmas[0] == pytest.approx(S / (1 + S), rel=1e-12)


def test_the_largest_sigma_of_rcm_is_80_and_with_a_picture_200(picture):
    for name in ("rcm-4step", "rcm-ode-4step"):
        assert resolved("ti2v-5B", preset=name).preset == f"{name}:80"
        assert resolved("ti2v-5B", preset=name, image=picture).preset == f"{name}:200"
        assert resolved("i2v-A14B", preset=name, image=picture).preset == f"{name}:200"
        assert resolved("i2v-A14B", preset=f"{name}:120", image=picture).preset == f"{name}:120"


def test_defaults_of_a_preset():
    for name, steps, shift in (("lightning-4step", 4, 5), ("fastwan-3step", 3, 1), ("rcm-4step", 4, 1)):
        todo = resolved("t2v-A14B", preset=name)
        assert (todo.num_steps, todo.shift, todo.guidance_scale) == (steps, shift, (1, 1))
        assert todo.solver == PRESETS[name].solver


@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_general_grids_are_not_rounded(solver):
    """Lightning's own solver: at its 4 steps and shift 5 both are the same grid; at others it is a shifted line."""
    made, lightning = official(solver, 4, 5.0), few_steps.sampler("lightning-4step", 4, 5.0)
    assert made.sigmas == pytest.approx(lightning.sigmas, abs=1e-12)
    assert made.timesteps == pytest.approx(lightning.timesteps, abs=1e-9)
    assert official(solver, 5, 3.0).sigmas == pytest.approx([1, 12 / 13, 9 / 11, 2 / 3, 3 / 7, 0], abs=1e-12)
    assert official(solver, 5, 3.0).timesteps[1] == pytest.approx(12000 / 13, abs=1e-9)
    assert made.start == 1 and made.split is None and not made.time_first


# --- what they do to the latents --------------------------------------------------------------------------------------------


def golden(sigmas, timesteps, start, ode, x, noises):
    """Latents after every step, one after another, in fp64 and from the authors' formulas."""
    x, after = [start * value for value in x], []
    for s, t, following, fresh in zip(sigmas, timesteps, [*sigmas[1:], 0], noises, strict=False):
        v = [0.7 * tanh(value) + 0.3 * t / 1000 for value in x]
        if ode:
            x = [value + (following - s) * slope for value, slope in zip(x, v, strict=True)]
        else:
            clean = [value - s * slope for value, slope in zip(x, v, strict=True)]
            x = [(1 - following) * value + following * noise for value, noise in zip(clean, fresh, strict=True)]
        after += x
    return after


def toy(step, latents):
    return 0.7 * torch.tanh(latents) + 0.3 * step.timestep / 1000, None


def carried(steps, noise, known=None, seen=None, noises=NOISES):
    """Latents after each step, [steps, 2], and how often noise was drawn."""
    after, drawn = [], iter(torch.tensor(noises).view(-1, 1, 2, 1, 1))
    solver = Solver(steps, noise, known, lambda: next(drawn))

    def velocities(step, latents):
        if seen is not None:
            seen.append(latents.clone())
        return toy(step, latents)

    stub = SimpleNamespace(load=lambda step: None, velocities=velocities)
    denoise(steps, stub, solver, on_step=lambda step: after.append(solver.latents.flatten().clone()))
    return torch.stack(after), len(noises) - len(list(drawn))


@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_trajectory(case):
    (sigmas, timesteps, start), made = SAMPLERS[case], sampler(case)
    steps = step_plan(TASKS[case[0]], made, (1.0, 1.0))
    after, drawn = carried(steps, torch.tensor([1.0, -0.5]).view(1, 2, 1, 1) * made.start)
    ode = case[1].partition(":")[0] in ODE
    expected = golden(sigmas, timesteps, start, ode, (1.0, -0.5), NOISES)
    assert after.flatten().tolist() == pytest.approx(expected, abs=4e-6)
    assert after.flatten().tolist() == pytest.approx(TRAJECTORIES[case], abs=1e-6)
    assert drawn == (0 if ode else len(steps))
    assert [step.noise for step in steps] == [None if ode else step.next_sigma for step in steps]


@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_known_latents_stay_with_fresh_noise(case):
    steps, known, seen = step_plan(TASKS[case[0]], sampler(case), (1.0, 1.0)), torch.full((1, 1, 1, 1), 7.0), []
    after, _ = carried(steps, torch.tensor([1.0, -0.5]).view(1, 2, 1, 1), known, seen)
    assert len(seen) == len(steps) and all(latents[0, 0] == 7 for latents in seen)
    assert (after[:, 0] == 7).all() and not (after[:, 1] == 7).any()


@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_general_grids_step_as_the_presets_do(solver):
    made = official(solver, 5, 3.0)
    noises = [*NOISES, [0.1, 0.2]]
    steps = step_plan(FIVE, made, (1.0, 1.0))
    after, drawn = carried(steps, torch.tensor([1.0, -0.5]).view(1, 2, 1, 1), noises=noises)
    sigmas = [1, 12 / 13, 9 / 11, 2 / 3, 3 / 7]
    expected = golden(sigmas, [1000 * sigma for sigma in sigmas], 1, solver == "euler", (1.0, -0.5), noises)
    assert after.flatten().tolist() == pytest.approx(expected, abs=2e-6)
    assert drawn == (0 if solver == "euler" else 5)


# --- experts ----------------------------------------------------------------------------------------------------------------


def experts(task, preset, steps=None, shift=None):
    """One letter per step: the high-noise expert, the low-noise one, or the only one, m."""
    return "".join(step.expert[0] for step in step_plan(TASKS[task], sampler((task, preset, steps, shift)), (1.0, 1.0)))


def test_experts():
    for task in ("t2v-A14B", "i2v-A14B"):
        # by step, whatever the boundary: at shift 16 all but one are above it
        assert [experts(task, "lightning-4step", shift=shift) for shift in (None, 7, 16)] == ["hhll"] * 3
    # by the boundary: .875, and .9
    assert experts("t2v-A14B", "self-forcing-4step") == "hhhl"
    assert experts("t2v-A14B", "self-forcing-4step", shift=5) == "hhll"
    assert experts("t2v-A14B", "self-forcing-4step", shift=7) == "hhhl"
    assert experts("i2v-A14B", "self-forcing-4step", shift=7) == "hhll"
    for preset in ("rcm-4step:200", "rcm-ode-4step:200"):
        assert experts("i2v-A14B", preset) == "hhll"
        assert [experts("i2v-A14B", preset, steps) for steps in (1, 2, 3)] == ["h", "hh", "hhl"]
    assert {experts("ti2v-5B", name) for name in PRESETS if name != "fastwan-3step"} == {"mmmm"}


# --- the engine -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return Engine(TINY)


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def fresh(generator, name, C, T, H, W):
    return randn(generator, T, C, H, W).transpose(0, 1) if name in TIME_FIRST else randn(generator, C, T, H, W)


def test_a_seed_makes_the_same_clip_also_from_a_file(engine, tmp_path):
    todo = engine.plan(SMALL)
    clip = engine.generate(SMALL).latents
    assert torch.equal(engine.generate(SMALL).latents, clip)
    assert not torch.allclose(engine.generate(replace(SMALL, seed=1)).latents, clip, atol=0.1)
    own = randn(torch.Generator().manual_seed(0), *todo.latent_shape)
    save_file({"noise": own}, tmp_path / "own.safetensors")
    save_file({"noise": -own}, tmp_path / "other.safetensors")
    from_file = replace(SMALL, noise=str(tmp_path / "own.safetensors"))
    assert torch.equal(engine.generate(from_file).latents, clip)
    # the fresh noise is the seed's
    assert not torch.equal(engine.generate(replace(from_file, seed=1)).latents, clip)
    other = replace(SMALL, noise=str(tmp_path / "other.safetensors"))
    assert not torch.equal(engine.generate(other).latents, clip)


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_engine_draws(engine, name):
    todo = engine.plan(replace(SMALL, preset=name, seed=3))
    C, T, H, W = todo.latent_shape
    assert C != T > 1
    noise, draw = engine._noise(todo)(todo.framing.clips[0])
    generator = torch.Generator().manual_seed(3)
    start = 80 / 81 if name.startswith("rcm") else 1
    assert torch.allclose(noise, randn(generator, C, T, H, W) * start, rtol=1e-6)
    for _ in range(2):
        assert torch.equal(draw(), fresh(generator, name, C, T, H, W))


@pytest.mark.parametrize("name", PRESETS)
def test_an_engine_carries_a_toy_velocity_as_the_formulas_do(engine, name, monkeypatch):
    todo = engine.plan(replace(SMALL, preset=name, seed=4))
    made = SimpleNamespace(load=lambda step: None, velocities=toy)
    monkeypatch.setattr(engine.workspace, "branches", lambda *args, **kwargs: made)
    latents = engine.latents(todo)
    case = ("t2v-1.3B", f"{name}:80" if name.startswith("rcm") else name, None, None)
    sigmas, timesteps, start = SAMPLERS.get(case) or SAMPLERS["ti2v-5B", name, None, None]
    generator = torch.Generator().manual_seed(4)
    noises = [randn(generator, *todo.latent_shape), *(fresh(generator, name, *todo.latent_shape) for _ in sigmas)]
    few = [noise[:3, :, 1, 2].flatten().tolist() for noise in noises]
    expected = golden(sigmas, timesteps, start, name in ODE, few[0], few[1:])[-len(few[0]) :]
    assert latents[:3, :, 1, 2].flatten().tolist() == pytest.approx(expected, abs=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------------


def test_what_preset_can_say():
    for name in PRESETS:
        assert parse_preset(name) == (name, None)
    assert parse_preset(" rcm-4step:120 ") == ("rcm-4step", 120.0)
    assert parse_preset("rcm-ode-4step:1.6e3") == ("rcm-ode-4step", 1600.0)
    assert parse_preset("off") == ("off", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "lightning-4step, fastwan-3step, self-forcing-4step, rcm-4step, rcm-ode-4step or off, got 'nonsense'"),
        ("", "--preset must be one of"),
        ("lightning", "--preset must be one of"),
        ("off:3", "--preset must be one of"),
        ("lightning-4step:5", "lightning-4step takes no number; leave out ':5'"),
        ("fastwan-3step:", "takes no number"),
        ("rcm-4step:", "largest sigma must be a number"),
        ("rcm-4step:x", "largest sigma must be a number"),
        ("rcm-4step:0.5", "largest sigma must be a number"),
        ("rcm-4step:14", "largest sigma must be a number"),
        ("rcm-4step:-80", "largest sigma must be a number"),
        (f"rcm-4step:{nan}", "largest sigma must be a number"),
        ("rcm-ode-4step:inf", "for example rcm-ode-4step:120"),
    ],
)
def test_what_preset_cannot_say(text, says):
    with pytest.raises(WanFastError, match=says):
        Request(preset=text)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(preset="lightning-4step", num_steps=8), "lightning-4step has 4 steps: got --sample_steps 8; leave it out"),
        (dict(preset="fastwan-3step", num_steps=4), "fastwan-3step has 3 steps: got --sample_steps 4"),
        (dict(preset="rcm-4step", num_steps=5), "rcm-4step has 1 or 2 or 3 or 4 steps: got --sample_steps 5"),
        (dict(preset="lightning-4step", solver="unipc"), "of solver euler: got --sample_solver unipc"),
        (dict(preset="rcm-4step", solver="euler"), "of solver lcm: got --sample_solver euler"),
        (dict(preset="fastwan-3step", shift=8.0), "has its own noise levels: got --sample_shift 8; leave it out"),
        (dict(preset="rcm-ode-4step", shift=5.0), "has its own noise levels: got --sample_shift 5"),
        (dict(preset="lightning-4step", guidance_scale=5.0), "no guidance.*got --sample_guide_scale 5; leave it out"),
        (dict(preset="rcm-4step", guidance_scale=(1.0, 4.0)), "no guidance.*got --sample_guide_scale 1,4; leave it out"),
        (dict(solver="lcm", guidance_scale=5.0), "--sample_solver lcm is for distilled models.*got --sample_guide_scale 5"),
    ],
    ids=str,
)
def test_contradictions_are_refused_with_the_reason(given, says):
    with pytest.raises(WanFastError, match=says):
        resolved("t2v-A14B", **given)


def test_what_agrees_with_a_preset_passes():
    todo = resolved("t2v-A14B", preset="rcm-4step", num_steps=2, solver="lcm", guidance_scale=1)
    assert (todo.num_steps, todo.preset, todo.guidance_scale) == (2, "rcm-4step:80", (1, 1))
    todo = resolved("t2v-A14B", preset="lightning-4step", num_steps=4, solver="euler", shift=7.0, guidance_scale=(1.0, 1.0))
    assert (todo.num_steps, todo.shift) == (4, 7)
    assert resolved("t2v-A14B", preset="self-forcing-4step", shift=5.0).shift == 5
    todo = resolved("t2v-A14B", preset="off", num_steps=8, solver="euler", guidance_scale=2.0)
    assert (todo.preset, todo.num_steps, todo.solver, todo.guidance_scale) == (None, 8, "euler", (2, 2))
    todo = resolved("t2v-1.3B", solver="lcm", num_steps=6)
    assert (todo.preset, todo.num_steps, todo.guidance_scale) == (None, 6, (1, 1))


@pytest.mark.parametrize("given", [dict(preset="rcm-4step"), dict(solver="lcm", preset=None, num_steps=12)], ids=str)
@pytest.mark.parametrize(
    ("option", "says"),
    [
        (dict(step_cache="every:2"), "--step-cache does not go with"),
        (dict(step_cache="####"), "--step-cache does not go with"),
        (dict(cfg_cache="gate"), "--cfg-cache does not go with"),
        (dict(cfg_zero=1), "--cfg-zero does not go with"),
    ],
    ids=str,
)
def test_caches_do_not_go_with_few_steps(given, option, says):
    what = "--preset rcm-4step:80" if given["preset"] else "--sample_solver lcm"
    with pytest.raises(WanFastError, match=f"{says} {what}: .*; leave it out"):
        plan(replace(TINY, **option), replace(SMALL, **given))


def test_quality_takes_no_step_cache_with_a_preset():
    config = replace(TINY, quality="fast")
    todo = plan(config, SMALL)
    assert [step.conditional for step in todo.steps] == ["run"] * 4 and todo.step_cache == ""
    assert any(warning.startswith("--quality takes no step cache here") for warning in todo.warnings)
    many = replace(SMALL, preset="off", num_steps=50)
    assert "reuse" in {step.conditional for step in plan(config, many).steps}
    assert {step.conditional for step in plan(config, replace(many, solver="lcm")).steps} == {"run"}


def test_the_plan_has_one_pass_a_step():
    for name, preset in PRESETS.items():
        todo = plan(TINY, replace(SMALL, preset=name))
        assert {step.unconditional for step in todo.steps} == {"none"}
        assert todo.forwards == len(todo.steps) == preset.steps[0]


# --- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", "lightning-4step"),
        ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors", "lightning-4step"),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1", "lightning-4step"),
        ("Wan2.2-T2V-A14B-4steps-lora-250928", "lightning-4step"),
        ("Wan2.2-Lightning", "lightning-4step"),
        ("Wan2.1-T2V-14B-StepDistill-CfgDistill", "lightning-4step"),
        ("FastWan2.2-TI2V-5B-FullAttn-Diffusers", "fastwan-3step"),
        ("models--FastVideo--FastWan2.1-T2V-1.3B-Diffusers", "fastwan-3step"),
        ("self_forcing_dmd.pt", "self-forcing-4step"),
        ("Self-Forcing", "self-forcing-4step"),
        ("TurboWan2.2-I2V-A14B-720P", "rcm-4step"),
        ("TurboWan2.1-T2V-1.3B-480P", "rcm-4step"),
        ("rCM_Wan2.1_T2V_1.3B_480p.pt", "rcm-4step"),
        ("Wan2.1-T2V-14B-rCM", "rcm-4step"),
        ("Wan2.2-TI2V-5B", None),
        ("Wan2.2-T2V-A14B-Diffusers", None),
        ("wan2.1_t2v_1.3B_fp16.safetensors", None),
        ("circumstance", None),
        ("farcmode", None),
        ("my-style-lora", None),
        ("lora_24steps.safetensors", None),
        ("lightx2v_14steps.safetensors", None),
        ("greased_lightning_vfx.safetensors", None),
        ("dance_4_steps_lora.safetensors", None),
        ("rcm_style.safetensors", None),
        ("Wan2.2-Lightning-8steps-LOW.safetensors", None),
        ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "lightning-4step"),
    ],
)
def test_named(name, preset):
    assert few_steps.named(name) == preset


def tiny_named(tmp_path, name, **generation):
    """The tiny checkpoint under another name."""
    folder, tiny = tmp_path / name, Path(locate("tiny", FIVE))
    folder.mkdir(parents=True)
    for part in tiny.iterdir():
        (folder / part.name).symlink_to(part)
    if generation:
        config = json.loads((tiny / "generation_config.json").read_text())
        (folder / "generation_config.json").unlink()
        (folder / "generation_config.json").write_text(json.dumps({**config, **generation}))
    return replace(TINY, checkpoint=str(folder))


def about_presets(todo):
    return [warning for warning in todo.warnings if "preset" in warning]


def test_a_checkpoint_named_as_distilled_is_sampled_so(tmp_path):
    config, request = tiny_named(tmp_path, "FastWan-tiny"), replace(SMALL, preset=None)
    todo = plan(config, request)
    assert todo.request.preset == "fastwan-3step" and [step.timestep for step in todo.steps] == [1000, 757, 522]
    assert todo.preset == "fastwan-3step, as the checkpoint is named" and not about_presets(todo)
    todo = plan(config, replace(request, num_steps=3, guidance_scale=1.0))
    assert todo.request.preset == "fastwan-3step" and not about_presets(todo)
    todo = plan(config, replace(request, num_steps=20))
    assert todo.request.preset is None and todo.preset == "" and todo.request.solver == "unipc" and len(todo.steps) == 20
    assert "the preset fastwan-3step is not taken, though the checkpoint is named so: " in about_presets(todo)[0]
    assert "got --sample_steps 20" in about_presets(todo)[0]
    todo = plan(config, replace(request, preset="off"))
    assert todo.request.preset is None and todo.preset == "" and len(todo.steps) == 12 and not about_presets(todo)
    todo = plan(config, replace(request, preset="fastwan-3step"))
    assert todo.preset == "fastwan-3step, as asked for" and not about_presets(todo)
    todo = plan(config, replace(request, preset="lightning-4step"))
    assert todo.request.preset == "lightning-4step" and len(about_presets(todo)) == 1


def test_a_checkpoint_that_brings_a_preset_is_sampled_so(tmp_path):
    config, request = tiny_named(tmp_path, "toy", preset="rcm-4step"), replace(SMALL, preset=None)
    todo = plan(config, request)
    assert todo.request.preset == "rcm-4step:80" and todo.preset.startswith("rcm-4step") and len(todo.steps) == 4
    assert plan(config, replace(request, num_steps=2)).request.preset == "rcm-4step:80"
    todo = plan(config, replace(request, num_steps=20))
    assert todo.request.preset is None and "got --sample_steps 20" in about_presets(todo)[0]
    assert plan(config, replace(request, preset="off")).request.preset is None


@pytest.mark.parametrize("said", ["rcm-ode-4step:120", "off"])
def test_what_a_checkpoint_brings_goes_before_its_name(tmp_path, said):
    todo = plan(tiny_named(tmp_path, "FastWan", preset=said), replace(SMALL, preset=None))
    assert todo.request.preset == (None if said == "off" else said)


def test_the_folders_above_a_checkpoint_say_nothing_but_in_the_hubs_cache(tmp_path):
    """There the folder is named after a commit."""
    for above, taken in (("FastWan/models", None), ("models--x--FastWan-5B/snapshots", "fastwan-3step")):
        (folder := tmp_path / above).mkdir(parents=True)
        assert plan(tiny_named(folder, "toy"), replace(SMALL, preset=None)).request.preset == taken


def test_a_checkpoints_guidance_is_none_of_lcm(tmp_path):
    config = tiny_named(tmp_path, "toy", guidance_scale=5.0)
    assert plan(config, replace(SMALL, preset=None, solver="lcm")).request.guidance_scale == (1.0, 1.0)


def test_a_lora_named_as_distilled_is_sampled_so(tmp_path):
    shape = open_checkpoint(locate("tiny", FIVE)).experts["model"].shapes["blocks.0.self_attn.q.weight"]
    (folder := tmp_path / "a" / "loras").mkdir(parents=True)
    factors = {"lora_up.weight": torch.zeros(shape[0], 2), "lora_down.weight": torch.zeros(2, shape[1])}
    for name in ("wan2.2_rank64_lightx2v_4step.safetensors", "style.safetensors"):
        save_file({f"diffusion_model.blocks.0.self_attn.q.{key}": value for key, value in factors.items()}, folder / name)
    request = replace(SMALL, preset=None)
    todo = plan(replace(TINY, lora=(str(folder / "wan2.2_rank64_lightx2v_4step.safetensors"),)), request)
    assert todo.preset == "lightning-4step, as LoRA wan2.2_rank64_lightx2v_4step.safetensors is named"
    assert [step.timestep for step in todo.steps] == pytest.approx(FOUR[5][1], abs=6e-7) and not about_presets(todo)
    assert plan(replace(TINY, lora=(str(folder / "style.safetensors"),)), request).request.preset is None


def test_a_preset_on_a_checkpoint_of_another_name_warns():
    todo = plan(TINY, SMALL)
    assert todo.preset == "rcm-4step, as asked for"
    assert about_presets(todo) == [
        "--preset rcm-4step is for models distilled for it, and neither the checkpoint nor a LoRA is named as one"
    ]
    assert plan(TINY, replace(SMALL, preset=None)).preset == ""
