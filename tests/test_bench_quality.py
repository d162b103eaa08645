"""The measures of bench.quality on cases that can be worked out, and what it holds of plans, controls and presets."""

from dataclasses import asdict
from math import exp, inf, log10

import pytest
import torch

from bench import quality
from bench.quality import CACHED, ON_CARD, RUNS, TINY, Engines, Walk, control_steps, denoising, frames_of, full_run, main, ssim
from bench.quality import psnr as decibels
from wan_fast import EngineConfig, Request, plan, sampler
from wan_fast import engine as engines
from wan_fast.quality import PRESETS

SMALL = Request(prompt="a red ball", size=(64, 64), num_frames=1, num_steps=9, seed=0)


@pytest.fixture(scope="module")
def tiny():
    return Engines(TINY)


@pytest.fixture(scope="module")
def full(tiny):
    return full_run(tiny.of({}), SMALL)


def walk(tiny, full, options):
    """A plan beside the full run: its steps, the comparison, and the frames."""
    engine, beside = tiny.of(options), Walk(full)
    with denoising(beside.denoise):
        frames = frames_of(engine, SMALL)
    return engine.plan(SMALL).steps, beside, frames


# --- measures ---------------------------------------------------------------------------------------------------------


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_psnr_of_a_shift():
    x = noise(3, 2, 8, 8)
    assert decibels(x, x) == inf
    assert decibels(x + 0.2, x) == pytest.approx(20, abs=1e-4)
    assert decibels(x + 0.2, x, span=1.0) == pytest.approx(20 * log10(5), abs=1e-4)


def test_ssim_of_equal_frames_is_one():
    assert ssim(noise(3, 2, 16, 20), noise(3, 2, 16, 20)) == 1


def test_ssim_of_plain_frames_is_that_of_their_brightness():
    a, b = 0.75, 0.5  # of range 1
    shape = (3, 2, 12, 15)
    found = ssim(torch.full(shape, 2 * a - 1), torch.full(shape, 2 * b - 1))
    assert found == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-9)


def test_ssim_of_a_single_window():
    """11 x 11 pixels hold one window: sums that need no convolution."""
    x, y = noise(1, 1, 11, 11), noise(1, 1, 11, 11).flip(-1) * 0.5
    line = [exp(-(i * i) / 4.5) for i in range(-5, 6)]
    weights = [u * v / sum(line) ** 2 for u in line for v in line]
    p, q = (((z.double() + 1) / 2).flatten().tolist() for z in (x, y))

    def mean(values):
        return sum(w * value for w, value in zip(weights, values, strict=True))

    mp, mq = mean(p), mean(q)
    vp, vq = mean((v - mp) ** 2 for v in p), mean((v - mq) ** 2 for v in q)
    both = mean((v - mp) * (w - mq) for v, w in zip(p, q, strict=True))
    wanted = (2 * mp * mq + 1e-4) * (2 * both + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
    assert ssim(x, y) == pytest.approx(wanted, abs=1e-9)


def test_noise_lowers_ssim():
    x = noise(3, 2, 32, 32) * 0.5
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values = [ssim(x + strength * other, x) for strength in (0, 0.01, 0.1, 0.5)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] < 0.8


# --- runs -------------------------------------------------------------------------------------------------------------


def test_the_full_plan_has_no_error(tiny, full):
    _, beside, frames = walk(tiny, full, {})
    assert torch.equal(frames, full.frames)
    assert beside.errors == [0] * 9 and beside.psnrs == [inf] * 9
    assert beside.cosines == pytest.approx([1] * 9)


@pytest.mark.parametrize(
    "options",
    [
        {"step_cache": "###.##..#"},
        {"cfg_cache": "difference:2"},
        {"cfg_cache": "frequency:2"},
        {"step_cache": "####.#.##", "cfg_cache": "gate:0.5"},
    ],
    ids=str,
)
def test_only_what_is_reused_has_an_error(tiny, full, options):
    """Of steps given the full run's latents; of its own latents all that follow."""
    steps, beside, frames = walk(tiny, full, options)
    computed = [step.conditional == "run" and step.unconditional == "run" for step in steps]
    assert not all(computed)
    assert [error == 0 for error in beside.errors] == computed
    first = computed.index(False)
    assert [value == inf for value in beside.psnrs] == [step.index < first for step in steps]
    assert beside.cosines[-1] < 1 - 1e-6
    assert not torch.equal(frames, full.frames)


def test_a_run_beside_the_full_one_is_the_run_itself(tiny, full):
    options = {"step_cache": "###.##..#"}
    _, beside, frames = walk(tiny, full, options)
    assert torch.equal(frames, frames_of(tiny.of(options), SMALL))
    beside = Walk(full, forced=False)
    with denoising(beside.denoise):
        frames_of(tiny.of(options), SMALL)
    assert beside.errors == [] and len(beside.psnrs) == 9


def test_the_full_run_keeps_latents_before_every_step_and_after_the_last(tiny, full):
    assert len(full.latents) == 10 and len(full.velocities) == 9
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(full.latents[0], torch.randn(full.latents[0].shape, generator=generator))
    assert torch.equal(full.latents[-1], tiny.of({}).generate(SMALL).latents)


def test_the_engines_own_loop_is_put_back():
    with pytest.raises(KeyError), denoising(lambda *args, **settings: None):
        assert engines.denoise is not sampler.denoise
        raise KeyError
    assert engines.denoise is sampler.denoise


def test_an_engine_stays_where_only_caches_change(tiny):
    plain = tiny.of({})
    assert tiny.of({"step_cache": "every:2"}) is plain and plain.config.step_cache == "every:2"
    assert tiny.of({"cfg_zero": 1}) is plain and plain.config.step_cache is None
    assert tiny.of({"dtype": "bf16"}) is not plain


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "guidance"),
    [
        ({"step_cache": "every:2"}, 5.0),
        ({"step_cache": "every:2"}, 1.0),
        ({"step_cache": "every:3"}, 5.0),
        ({"cfg_cache": "difference:2"}, 5.0),
        ({"cfg_cache": "gate:0.3"}, 5.0),
        ({"cfg_zero": 1}, 5.0),
    ],
    ids=str,
)
def test_the_control_takes_no_more_passes(options, guidance):
    def planned(steps, **options):
        return plan(EngineConfig(**TINY, **options), Request(prompt="a", num_steps=steps, guidance_scale=guidance))

    for steps in (12, 13):
        row = planned(steps, **options)
        count = control_steps(row)
        assert 1 <= count < steps
        assert planned(count).forwards <= row.forwards < planned(count + 1).forwards
    assert control_steps(planned(12)) is None


def test_presets_are_the_engines_own(tiny):
    assert {name for name, options in CACHED.items() if "quality" in options} == {*PRESETS}
    for name, values in PRESETS.items():
        assert RUNS[name] == {"quality": name}
        config = asdict(tiny.config(RUNS[name]))
        assert config["quality"] is None
        for field, value in values.items():
            assert config[field] == ("auto" if value == "8 bits" else value)  # a CPU takes none
    narrow = {name for name, values in PRESETS.items() if "8 bits" in values.values()}
    assert {*ON_CARD} == {f"{name} on H100" for name in narrow}
    for name in narrow:
        in_8_bits = {"precision": "fp8", "attention": "int8"}
        wanted = {field: in_8_bits[field] if value == "8 bits" else value for field, value in PRESETS[name].items()}
        assert RUNS[f"{name} on H100"] == wanted


def test_every_run_is_one_that_an_engine_takes(tiny):
    for options in RUNS.values():
        tiny.config(options)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["every:7"], "unknown run 'every:7'; did you mean 'every:4'?"),
        (["nothing*"], "unknown run 'nothing*'; see --list"),
        (["every:2", "--steps", "12", "4"], "run 'every:2': --step-cache every:2 is not for 4 steps"),
        (["every:2", "--prompts", "0"], "--prompts must be 1 or more"),
        (["every:2", "--prompts_file", "nowhere.txt"], "--prompts_file 'nowhere.txt' cannot be read"),
        (["every:2", "--size", "64"], "--size must be WIDTH*HEIGHT"),
        (["every:2", "--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words, said, capsys):
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and out == ""


def test_the_command_measures_and_writes(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(quality, "RESULTS", tmp_path / "kept")
    (tmp_path / "prompts").write_text("a red ball\n\n a blue star \n", encoding="utf-8")
    words = f"every:2 bf16 --steps 9 --size 64*64 --frame_num 1 --prompts_file {tmp_path / 'prompts'}"
    assert main([*words.split(), "--out", str(tmp_path / "new")]) == 0
    page = (tmp_path / "new" / "quality.md").read_text(encoding="utf-8")
    assert page.startswith("# Quality\n\nWritten by `python -m bench.quality`.\n")
    assert "## 9 steps, 18 passes, 2 prompts" in page and str(tmp_path) not in page
    printed = capsys.readouterr().out
    assert printed.strip() in page
    rows = {cells[1]: cells for text in page.splitlines() if len(cells := [cell.strip() for cell in text.split("|")]) == 14}
    assert rows["every:2"][2] == "12, 1.5x fewer" and rows["every:2"][6] == "6"
    gain = float(rows["every:2"][3]) - float(rows["every:2"][7])
    assert float(rows["every:2"][8]) == pytest.approx(gain, abs=0.11)
    assert rows["bf16"][2] == "18" and rows["bf16"][6:9] == ["", "", ""] and float(rows["bf16"][9]) > 0
    with Image.open(tmp_path / "new" / "quality.png") as image:
        assert image.info["data"]
    assert not (tmp_path / "kept").exists()
