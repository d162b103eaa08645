"""`wan-fast calibrate`: what it records, fits and searches, and the files it leaves."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from models import write_native

from wan_fast import calibrate as module
from wan_fast import calibration
from wan_fast.branches import Branches
from wan_fast.calibrate import Record, Recorder, Trials, calibrate, fitted, psnr, shortest_paths
from wan_fast.calibration import BRANCHES
from wan_fast.cli import main
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.engine import Engine
from wan_fast.planning import plan
from wan_fast.recording import Recording
from wan_fast.steps import official, step_plan
from wan_fast.tasks import TASKS

SMALL = Request(prompt="a red ball", size=(64, 64), num_frames=5, num_steps=10, seed=0)


def tiny(**options):
    return EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", **options)


@pytest.fixture(scope="module")
def recorded():
    """An engine, its plan, what a run was recorded as, and every residual of it."""
    engine, record, residuals = Engine(tiny()), Record(search=True), {}

    class Watching(Recorder):
        def velocities(self, step, latents):
            exact = super().velocities(step, latents)
            residuals.update({(branch, step.index): self.residuals[branch].clone() for branch in BRANCHES})
            return exact

    engine.workspace.branches = lambda *args, **settings: Watching(record, *args, **settings)
    full = engine.latents(engine.plan(SMALL))
    engine.workspace.branches = Branches
    return engine, engine.plan(SMALL), record, residuals, full


def test_recording_changes_nothing(recorded):
    engine, todo, _, _, full = recorded
    assert torch.equal(engine.latents(todo), full)


def test_what_is_recorded(recorded):
    *_, record, residuals, _ = recorded
    for branch in BRANCHES:
        for i in range(1, 10):
            now, before = residuals[branch, i].double(), residuals[branch, i - 1].double()
            assert record.ratios[branch][i] == pytest.approx((now.norm(dim=-1) / before.norm(dim=-1)).mean().item(), rel=1e-4)
            assert record.changes[branch][i] == pytest.approx(
                ((now - before).abs().mean() / before.abs().mean()).item(), rel=1e-4
            )


def test_errors_are_those_of_the_guided_velocity(recorded):
    """At the first pair: a run that reuses step 1's residual at step 2 has seen the same latents up to there."""
    engine, todo, record, _, _ = recorded
    seen = {}

    class Watching(Branches):
        def velocities(self, step, latents):
            c, u = super().velocities(step, latents)
            seen[self.name, step.index] = u + step.guidance_scale * (c - u)
            return c, u

    for name, mask in (("full", "#" * 10), ("reused", "##.#######")):
        engine.workspace.branches = type(name, (Watching,), {"name": name})
        engine.latents(module._masked(todo, mask))
    engine.workspace.branches = Branches
    wanted = (seen["reused", 2] - seen["full", 2]).square().mean().sqrt().item()
    assert record.errors[1, 2] == pytest.approx(wanted, rel=1e-4) and wanted > 0
    assert (0, 1) in record.errors and (2, 9) not in record.errors and (3, 9) in record.errors


def test_the_loras_of_a_recording_are_in_it(recorded, tmp_path):
    _, todo, record, _, _ = recorded
    (tmp_path / "style.safetensors").touch()
    loras = tuple(f"{tmp_path}/style.safetensors:{strength}" for strength in (0.8, 0))
    styled = replace(todo, config=replace(todo.config, lora=loras))
    signals = {signal: [0.01 * i for i in range(10)] for signal in ("embedding", "projection")}
    assert fitted(record, styled, signals, 1).loras == ["style.safetensors:0.8"] and not fitted(record, todo, signals, 1).loras


def test_fitted_rules_follow_what_was_measured(recorded):
    _, todo, record, _, _ = recorded
    signals = {"embedding": [0.0, *(0.01 * i for i in range(9))], "projection": [0.0, *(0.02 * i for i in range(9))]}
    found = fitted(record, todo, signals, 1)
    for branch in BRANCHES:
        assert found.magcache[branch] == pytest.approx([record.ratios[branch][i] for i in range(1, 10)], abs=1e-5)
    changes = [sum(record.changes[b][i] for b in BRANCHES) / 2 for i in range(1, 10)]
    for signal, distances in signals.items():
        values = []
        for x in distances[1:]:
            value = 0.0
            for c in found.teacache[signal]["model"]:
                value = value * x + c
            values.append(value)
        assert max(abs(v - c) for v, c in zip(values, changes, strict=True)) < 0.5 * max(changes)
        assert sum(values) == pytest.approx(sum(changes), rel=1e-3), "least squares keep the mean"
    assert found.num_steps == 10 and list(found.size) == [64, 64] and 0 < found.magcache["threshold"] <= 1


def test_the_shortest_path_is_the_best_mask():
    """Against all masks of 9 steps, on errors that are drawn."""
    from itertools import combinations
    from random import Random

    random = Random(0)
    steps = step_plan(TASKS["t2v-14B"], official("euler", 9, 5.0), (5.0, 5.0))
    record = Record(search=True)
    for i in range(9):
        for j in range(i + 1, min(9, i + 7)):
            record.errors[i, j] = random.random() * (j - i)
    gains = {i: random.random() + 0.1 for i in range(1, 8)}

    def cost(mask):
        total, last = 0.0, 0
        for j, letter in enumerate(mask):
            if letter == "#":
                last = j
            else:
                total += record.errors.get((last, j), float("inf")) * gains[j]
        return total

    for share in (0.8, 0.6, 0.5, 0.4):
        inner = [set(chosen) for chosen in combinations(range(1, 8), int(share * 9) - 2)]
        masks = ["#" + "".join(".#"[i in chosen] for i in range(1, 8)) + "#" for chosen in inner]
        assert shortest_paths(record, steps, gains, [share]) == [min(masks, key=cost)]


def test_the_search_never_reuses_across_experts():
    steps = step_plan(TASKS["t2v-A14B"], official("unipc", 20, 12.0), (3.0, 4.0))
    switch = [step.expert for step in steps].index("low_noise")
    record = Record(search=True)
    for i in range(20):
        for j in range(i + 1, min(20, i + 7)):
            record.errors[i, j] = 1.0
    for mask in shortest_paths(record, steps, {1: 1.0, 18: 1.0}, [0.8, 0.5, 0.4]):
        assert mask[0] == mask[switch] == mask[-1] == "#" and len(mask) == 20


def test_the_best_of_the_tried_masks_is_kept(recorded):
    engine, todo, _, _, full = recorded
    trials = Trials(engine, [SMALL], [full], None)
    masks = {"a": ["#.########", "#....#...#"], "b": ["########.#", "##########"]}
    best = trials.best(masks)
    assert [row["mask"].count("#") for row in best] == [10, 9, 3] and best[0]["psnr"] == 100.0
    assert best[1]["mask"] == max("#.########", "########.#", key=trials.run)
    assert best[1]["psnr"] == round(psnr(engine.latents(module._masked(todo, best[1]["mask"])), full), 2)
    points = trials.points(todo, masks)
    assert {(p.name, p.forwards) for p in points if p.name == "fewer steps"} == {("fewer steps", n) for n in (20, 18, 6)}


# --- the command --------------------------------------------------------------------------------------------------------


def command(*words):
    return main(["calibrate", *map(str, words), "--quiet", "--device", "cpu", "--size", "64*64", "--frame_num", "5"])


def test_run_finds_what_was_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SHARES", (0.8, 0.5))
    folder, prompts = write_native(tmp_path / "model", "t2v-A14B"), tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    assert command(folder, "--sample_steps", 10, "--search", "--prompts", prompts) == 0
    out = capsys.readouterr().out
    assert "2 prompts, 10 steps at shift 12" in out and "curve       fewer steps" in out and "mask        #" in out
    file = folder / calibration.FILE
    assert out.splitlines()[-1] == str(file) and file.with_suffix(".png").stat().st_size > 5000
    found = json.loads(file.read_text())
    assert found["model"] == "2 experts of 2 blocks, width 256, 16 to 16 channels" and found["entries"][0]["prompts"] == 2
    assert set(found["entries"][0]["teacache"]["embedding"]) == {"threshold", "high_noise", "low_noise"}
    config = EngineConfig(task="t2v-A14B", checkpoint=str(folder), device="cpu", dtype="fp32")
    request = replace(SMALL, num_steps=10)
    for flag in ("teacache:70%", "magcache:70%", "searched:70%", "auto:70%"):
        todo = plan(replace(config, step_cache=flag), request)
        assert todo.forwards <= 14 and not todo.warnings[1:], (flag, todo.warnings)
    video = Engine(replace(config, step_cache="teacache:70%")).generate(request)
    assert video.latents.isfinite().all()
    # another run of it is added, the same one takes the place of the first
    for num_steps in (9, 10):
        assert command(folder, "--sample_steps", num_steps, "--curve", "off") == 0
    assert [e["num_steps"] for e in json.loads(file.read_text())["entries"]] == [10, 9]


def test_a_checkpoint_that_is_not_the_users_goes_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command("tiny", "--sample_steps", 9, "--curve", "off") == 0
    (file,) = tmp_path.rglob("*.json")
    assert "calibrations" in file.parts
    assert plan(tiny(step_cache="magcache"), replace(SMALL, num_steps=9)).warnings[1:] == ()


def test_without_guidance_one_branch_is_recorded(tmp_path):
    out = tmp_path / "found.json"
    assert command("tiny", "--sample_steps", 9, "--sample_guide_scale", 1, "--out", out, "--curve", "off") == 0
    (found,) = json.loads(out.read_text())["entries"]
    assert found["magcache"]["conditional"] == found["magcache"]["unconditional"] and len(found["magcache"]["conditional"]) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "checkpoint folder 'nowhere' does not exist"),
        (["tiny", "--prompts", "nowhere.txt"], "is not a file of text; give one with a prompt per line"),
        (["tiny", "--prompts", sys.executable], "is not a file of text"),
        (["tiny", "--sample_steps", "8"], "of 8 steps or fewer none is reused"),
        (["tiny", "--out", "/proc/found.json"], "cannot be written there"),
        (["tiny", "--curve", "/proc/found.png"], "cannot be written there"),
        (["tiny", "--out", "found.txt"], "--out must end in .json"),
        (["tiny", "--out", "nowhere/found.json"], "nowhere' does not exist; create it first"),
        (["tiny", "--curve", "x.jpg"], "--curve must end in .png"),
        (["tiny", "--step-cache", "magcache"], "unknown flag --step-cache"),
        (["tiny", "--task", "t2v-14B"], "does not fit the checkpoint"),
        (["tiny", "--serch"], "did you mean --search?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, says, capsys):
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_without_matplotlib_the_curve_is_refused_beforehand(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(WanFastError, match="matplotlib, which is not installed; pip install matplotlib, or add --curve off"):
        calibrate(tiny(), SMALL, Recording())


@pytest.mark.parametrize("caches", [{"quality": "fast"}, {"cfg_zero": 1}, {"step_cache": "every:2"}, {"cfg_cache": "gate"}])
def test_runs_with_something_left_out_are_no_calibration(caches):
    with pytest.raises(WanFastError, match="of runs with nothing left out"):
        calibrate(tiny(**caches), replace(SMALL, num_steps=12), Recording(curve="off"))


def test_an_empty_file_of_prompts(tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(WanFastError, match="holds no prompt; write one per line"):
        Recording(prompts=str(tmp_path / "none.txt"))
