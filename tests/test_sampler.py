from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine
from wan_fast.sampler import denoise
from wan_fast.solver import Solver
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

TINY = dict(task="ti2v-5B", checkpoint="tiny")
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__len__")


@contextmanager
def no_reading_back(monkeypatch):
    """Reading a tensor's values raises: on a GPU each such call would wait for it."""

    def refuse(name):
        def raises(self, *args, **kwargs):
            raise AssertionError(f"the loop calls Tensor.{name}")

        return raises

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


def run(steps, noise, velocity, known=None, on_step=None):
    solver = Solver(steps, noise, known)

    def velocities(step, latents):
        return tuple(velocity(step, latents, branch) for branch in ("conditional", "unconditional"))

    denoise(steps, SimpleNamespace(load=lambda step: None, velocities=velocities), solver, on_step=on_step)
    return solver.latents


def plan(steps=3, solver="unipc"):
    return step_plan(TASKS["ti2v-5B"], official(solver, steps, 5.0), (5.0, 5.0))


def test_the_guard_notices(monkeypatch):
    """The other tests of this file would pass on a guard that guards nothing."""
    with no_reading_back(monkeypatch):
        for call in (lambda: torch.ones(1).item(), lambda: bool(torch.ones(1)), lambda: torch.ones(1).cpu()):
            with pytest.raises(AssertionError, match="the loop calls"):
                call()
    assert torch.ones(1).item() == 1


@pytest.mark.parametrize("image", [False, True])
def test_the_loop_never_waits_for_the_device(image, monkeypatch, tmp_path):
    import wan_fast.engine as module

    entered = []

    def guarded(*args, **kwargs):
        entered.append(1)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        try:
            with no_reading_back(monkeypatch):
                return denoise(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    request = Request(prompt="a red ball", size=(64, 64), num_frames=5, num_steps=3, seed=0)
    if image:
        from dataclasses import replace

        from PIL import Image

        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        request = replace(request, image=str(tmp_path / "red.png"))
    engine = Engine(EngineConfig(**TINY))
    monkeypatch.setattr(module, "denoise", guarded)
    engine.generate(request)
    assert entered


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_known_latents_stay(solver):
    known, noise = torch.full((4, 1, 2, 2), 7.0), torch.randn(4, 3, 2, 2)
    seen = []

    def velocity(step, latents, branch):
        seen.append(latents[:, :1].clone())
        return torch.randn_like(latents)

    before = noise.clone()
    out = run(plan(solver=solver), noise, velocity, known=known)
    assert torch.equal(out[:, :1], known) and all(torch.equal(s, known) for s in seen)
    assert torch.equal(noise, before), "the caller's noise was changed"


def test_guidance_weighs_the_two_branches():
    steps = step_plan(TASKS["ti2v-5B"], official("euler", 1, 5.0), (3.0, 3.0))
    noise = torch.zeros(1, 1, 2, 2)
    out = run(steps, noise, lambda step, x, branch: torch.full_like(x, 2.0 if branch == "conditional" else 0.5))
    # one Euler step from sigma 1 to 0 along 0.5 + 3 (2 - 0.5)
    assert torch.equal(out, torch.full_like(out, -5.0))


def test_a_step_is_reported_after_it_was_issued():
    seen = []
    run(plan(4), torch.zeros(1, 1, 2, 2), lambda step, x, branch: x, on_step=lambda step: seen.append(step.index))
    assert seen == [0, 1, 2, 3]
