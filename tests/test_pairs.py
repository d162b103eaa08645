"""Every pair of options is refused by the plan, or makes what it should; the table of them is that of now."""

import re
from dataclasses import fields
from itertools import combinations

import pytest
import torch

from bench import RESULTS, pairs
from bench.pairs import OPTIONS, PAIRS, REFUSED, SHORT, STEPS, VALUES, WITH_CACHES
from wan_fast.config import EngineConfig, Request, WanFastError

# what a video is of, where it is made, and what two blocks are too few for
NOT_PAIRED = {
    *("prompt", "negative_prompt", "size", "fps", "shift", "seed", "noise", "start_from_ref", "refert_num"),
    *("checkpoint", "vae", "text_encoder", "image_encoder", "calibration", "device", "vram", "t5_cpu", "keep_blocks"),
    *("ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp"),  # of several processes
    "cuda_graphs",  # those that a CPU can stand in for are in test_graphs.py
}
BY_NAME = {str(value): value for value in VALUES}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch, pairs.laboratory(folder) as made:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield made


def test_every_option_is_paired():
    paired = {name for value in VALUES for name in value.settings}
    assert paired | NOT_PAIRED == {field.name for options in (EngineConfig, Request) for field in fields(options)}
    assert not paired & NOT_PAIRED and len({*PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_alone(lab, value):
    found = lab.outcome(value)
    assert found.mark != REFUSED and not found.faults


@pytest.mark.parametrize("option", OPTIONS)
def test_values_of_an_option_are_told_apart(lab, option):
    steps = STEPS if option in WITH_CACHES else SHORT
    made = [lab.latents(*lab.settle(value, num_steps=steps)) for value in VALUES if value.option == option]
    assert not any(torch.equal(one, other) for one, other in combinations(made, 2))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " x ".join(map(str, pair)))
def test_pair(lab, pair):
    assert not lab.outcome(*pair).faults


def test_what_is_refused_is_told_why_before_a_weight_is_read(lab, monkeypatch):
    refused = [pair for pair in PAIRS if lab.outcome(*pair).mark == REFUSED]
    for module in ("checkpoint", "distances"):
        monkeypatch.setattr(f"wan_fast.{module}.read_tensors", None)
    for pair in refused:
        with pytest.raises(WanFastError, match="; "):
            lab.settle(*pair, num_steps=STEPS)


def test_the_table_that_is_kept_is_that_of_now(lab):
    kept = (RESULTS / "pairs.md").read_text(encoding="utf-8")
    assert kept == pairs.page(lab.outcomes()), "run python -m bench.pairs"


@pytest.mark.parametrize(
    ("factor", "names", "fault"),
    [
        (1.0001, ["dtype fp32", "solver euler"], "relative error 0.0001 to the formulas, at most 1e-05"),
        (1.1, ["precision int8", "task t2v-A14B"], r"relative error 0\.1 to the formulas, at most 0\.045"),
        (float("nan"), ["dtype bf16", "CFG cache gate"], "relative error nan to the formulas"),
        (0, ["dtype bf16", "CFG cache gate"], "dtype bf16 changes nothing"),
    ],
    ids=str,
)
def test_a_wrong_run_is_noticed(lab, monkeypatch, factor, names, fault):
    monkeypatch.setattr(lab, "latents", lambda *args, run=lab.latents: factor * run(*args))
    assert re.search(fault, "; ".join(lab.judge(*map(BY_NAME.get, names)).faults))


def test_a_wrong_plan_is_noticed(lab, monkeypatch):
    """As it is where the last option given wins."""
    pair = BY_NAME["step cache every:2"], BY_NAME["CFG cache gate"]
    monkeypatch.setattr(lab, "settle", lambda *values, own=lab.settle, **steps: own(*values[-1:], **steps))
    assert "step cache every:2 changes nothing" in lab.judge(*pair).faults
