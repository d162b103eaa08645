"""What a plan's rows do to the velocities: reuse, reconstruction, CFG-Zero*."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from models import random_dit

from wan_fast.branches import Branches, low_pass, nearest_scale
from wan_fast.caches import CfgCache
from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine
from wan_fast.manifest import DiTDims
from wan_fast.skipping import Mask, with_caches
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

DIMS = DiTDims(dim=256, ffn_dim=320, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16)
SHAPE = (4, 3, 8, 6)


def plan(masks, cfg="off", *, zero=0, task="t2v-14B", count=6):
    steps = step_plan(TASKS[task], official("euler", count, 5.0), (3.0, 4.0) if task == "t2v-A14B" else (3.0, 3.0))
    rules = {branch: Mask(mask) for branch, mask in zip(("conditional", "unconditional"), masks, strict=True)}
    return with_caches(steps, rules, CfgCache.parse(cfg), zero)


def branches(steps, models=None, *, split=0, **settings):
    models = models or {"model": random_dit(DIMS)}
    generator = torch.Generator().manual_seed(1)
    text = {branch: torch.randn(5, 16, generator=generator) for branch in ("conditional", "unconditional")}
    return Branches(steps, models.__getitem__, text, split, torch.device("cpu"), **settings)


def computed(step):
    return replace(step, conditional="run", unconditional="run")


def clips(count):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def resume(model, latents, timestep, split, residual, context):
    return model.resume(latents[None], timestep, residual, context, split=split)[0]


@pytest.mark.parametrize("split", [0, 12])
@torch.inference_mode()
def test_a_reused_step_adds_the_last_residual_to_its_own_tokens(split):
    """Against the blocks themselves: what they added at the computed step, at the new tokens, through the head."""
    steps = plan(["##.#.#"] * 2)
    made, exact = branches(steps, split=split), branches(plan(["#" * 6] * 2), split=split)
    model = made.expert("model")
    residual = {}
    for step, latents in zip(steps, clips(6), strict=True):
        wanted, found = exact(computed(step), latents), made(step, latents)
        resumed = partial(resume, model, latents, made.timesteps[step.index], split)
        for name, v, w in zip(("conditional", "unconditional"), found, wanted, strict=True):
            if getattr(step, name) == "run":
                assert torch.equal(v, w)
                residual[name] = made.residuals[name].clone()
                # the residual of this very step gives this very velocity
                again = resumed(residual[name], made.contexts["model", name])
                torch.testing.assert_close(again, w, atol=1e-5, rtol=1e-5)
            else:
                assert not torch.allclose(v, w, atol=1e-3), "a stale residual makes no difference: the test sees nothing"
                kept = resumed(residual[name], made.contexts["model", name])
                assert torch.equal(v, kept)


@torch.inference_mode()
def test_the_residual_is_what_the_blocks_added():
    made = branches(plan(["#.####"] * 2))
    model, latents, seen = made.expert("model"), clips(1)[0], []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        # what it returns is still to be added
        model.blocks[-1].register_forward_hook(
            lambda module, args, out: seen.append(args[0] + args[2][:, :, 5].repeat_interleave(args[0].shape[1], 1) * out)
        ),
    ]
    made.predicted(plan(["#.####"] * 2)[0], latents, "conditional", "run")
    for hook in hooks:
        hook.remove()
    before, after = seen
    torch.testing.assert_close(made.residuals["conditional"], after - before, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_a_reused_step_runs_no_block_and_each_branch_has_one_residual():
    steps = plan(["#..#.#"] * 2)
    made, ran = branches(steps), []
    made.expert("model").blocks[0].register_forward_pre_hook(lambda module, args: ran.append(1))
    places = set()
    for step, latents in zip(steps, clips(6), strict=True):
        before = len(ran)
        made(step, latents)
        assert len(ran) - before == step.forwards
        places |= {residual.data_ptr() for residual in made.residuals.values()}
    assert len(places) == 2


@torch.inference_mode()
def test_without_reuse_no_residual_is_kept():
    made = branches(plan(["#" * 6] * 2, "gate:0.5"))
    made(made_step := plan(["#" * 6] * 2, "gate:0.5")[0], clips(1)[0])
    assert not made.residuals and made.low is not None and made_step.forwards == 2


@torch.inference_mode()
def test_residuals_of_two_experts_do_not_mix():
    steps = plan(["#.#.#." * 2] * 2, task="t2v-A14B", count=12)
    models = {"high_noise": random_dit(DIMS, 0), "low_noise": random_dit(DIMS, 1)}
    made, kept = branches(steps, models), {}
    for step, latents in zip(steps, clips(12), strict=True):
        found, _ = made(step, latents)
        if step.conditional == "run":
            kept = {step.expert: made.residuals["conditional"].clone()}
        else:
            context = made.contexts[step.expert, "conditional"]
            own = models[step.expert].resume(latents[None], made.timesteps[step.index], kept[step.expert], context)[0]
            assert torch.equal(found, own)


@torch.inference_mode()
def test_plain_differences():
    steps = plan(["#" * 6] * 2, "difference:3,0")
    made, exact = branches(steps), branches(plan(["#" * 6] * 2))
    for step, latents in zip(steps, clips(6), strict=True):
        (c, u), (c_exact, u_exact) = made(step, latents), exact(computed(step), latents)
        assert torch.equal(c, c_exact)
        if step.unconditional == "run":
            assert torch.equal(u, u_exact)
            difference = c - u
        else:
            torch.testing.assert_close(u, c - difference, atol=1e-6, rtol=1e-6)
    assert [step.unconditional for step in steps].count("reconstruct") == 3


@torch.inference_mode()
def test_differences_in_two_bands():
    steps = plan(["#" * 6] * 2, "frequency:3,0", count=6)
    made = branches(steps)
    H, W = SHAPE[2:]
    y, x = torch.meshgrid(torch.fft.fftfreq(H, 1 / H), torch.fft.fftfreq(W, 1 / W), indexing="ij")
    within = (y.square() + x.square()).sqrt() <= min(H, W) // 5
    assert 0 < within.sum() < within.numel()
    for step, latents in zip(steps, clips(6), strict=True):
        c, u = made(step, latents)
        if step.unconditional == "run":
            spectrum = torch.fft.fft2((c - u).double())
        else:
            a, b = step.difference
            wanted = c.double() - torch.fft.ifft2(torch.where(within, a, b) * spectrum).real
            torch.testing.assert_close(u.double(), wanted, atol=1e-5, rtol=1e-5)
    assert {step.difference for step in steps if step.unconditional == "reconstruct"} - {(1.0, 1.0)}


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (45, 80), (1, 1), (4, 30)])
def test_low_pass_keeps_the_mean_and_splits_exactly(size):
    x = torch.randn(2, 3, *size)
    low = low_pass(x)
    torch.testing.assert_close(low.mean((2, 3)), x.mean((2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low_pass(low), low, atol=1e-5, rtol=1e-5)
    assert low.square().sum() <= x.square().sum() * 1.0001


@torch.inference_mode()
def test_cfg_zero_star():
    steps = plan(["#" * 6] * 2, zero=2)
    made, exact = branches(steps, zero_star=True), branches(plan(["#" * 6] * 2))
    for step, latents in zip(steps, clips(6), strict=True):
        c, u = made(step, latents)
        if step.index < 2:
            assert not c.any() and not u.any() and c.isfinite().all() and u.isfinite().all()
            continue
        c_exact, u_exact = (v.double() for v in exact(computed(step), latents))
        scale = (c_exact * u_exact).sum() / u_exact.square().sum()
        torch.testing.assert_close(u.double(), scale * u_exact, atol=1e-5, rtol=1e-5)
        assert abs(((c_exact - u) * u).sum() / u.square().sum()) < 1e-5, "what is left is not at right angles"
    assert nearest_scale(torch.ones(2), torch.zeros(2)) == 0


@torch.inference_mode()
def test_without_guidance_the_second_branch_is_not_even_prepared():
    steps = [replace(step, guidance_scale=1.0, unconditional="none") for step in plan(["#" * 6] * 2)]
    made = branches(steps)
    assert made(steps[0], clips(1)[0])[1] is None and list(made.contexts) == [("model", "conditional")]


# --- through the engine -----------------------------------------------------------------------------------------------------

REQUEST = Request(prompt="a red ball", size=(64, 64), num_frames=9, num_steps=12, seed=0)


def latents(request=REQUEST, **options):
    return Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", **options)).generate(request).latents


def test_lossless_and_nothing_left_out_are_bitwise_the_same():
    plain = latents()
    assert torch.equal(latents(quality="lossless"), plain)
    assert torch.equal(latents(step_cache="#" * 12), plain)
    assert not torch.equal(latents(step_cache="#" * 6 + "." + "#" * 5), plain)


def test_guidance_of_1_is_the_conditional_pass():
    """To rounding what both passes at that scale are."""
    one = latents(replace(REQUEST, guidance_scale=1.0))
    torch.testing.assert_close(one, latents(replace(REQUEST, guidance_scale=1.0 + 1e-7)), atol=1e-3, rtol=1e-3)


def test_the_stats_say_what_was_computed():
    engine = Engine(
        EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", step_cache="auto:50%", cfg_cache="difference")
    )
    ran = []
    engine.models["model"].blocks[0].register_forward_pre_hook(lambda module, args: ran.append(1))
    done = engine.generate(replace(REQUEST, size=(128, 128), num_frames=33)).stats["plan"]
    assert done["forwards"] == len(ran) < done["forwards_uncached"] == 24


@pytest.mark.parametrize("cfg", ["off", "difference:2", "frequency:2,0"])
def test_the_loop_with_caches_reads_nothing_back(cfg, monkeypatch):
    from test_sampler import no_reading_back

    import wan_fast.engine as module
    from wan_fast.sampler import denoise

    entered = []

    def guarded(*args, **kwargs):
        entered.append(1)
        with no_reading_back(monkeypatch):
            return denoise(*args, **kwargs)

    monkeypatch.setattr(module, "denoise", guarded)
    latents(step_cache="every:2,0", cfg_cache=cfg, cfg_zero=1)
    assert entered


@pytest.mark.parametrize("caches", [{"step_cache": "#.#.#.#.#.#.##"[:11] + "#"}, {"cfg_cache": "gate:0.3", "cfg_zero": 2}])
def test_offload_changes_nothing_with_caches(caches, tmp_path):
    """The experts' moves are carried out, though to where they are."""
    from models import write_native

    folder = write_native(tmp_path, "t2v-A14B")
    engine = Engine(EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu", **caches))
    request = replace(REQUEST, num_steps=12, shift=3.0)
    plain = engine.generate(request).latents
    engine.residents.config, moves = replace(engine.config, offload_model=True), []
    for name in ("high_noise", "low_noise"):
        model = engine.models[name]
        model.to = lambda *args, name=name, model=model: moves.append((name, str(args[0]))) or model
    assert torch.equal(engine.generate(request).latents, plain)
    assert moves == [(name, "cpu") for name in ("high_noise", "high_noise", "low_noise", "low_noise")]
