from functools import partial
from math import prod

import pytest
import torch
from kernel_cases import REAL_CASES, Attend, arguments, run

from bench import attention, operations, registry, tune
from bench.registry import OURS, Case, NotHere, Work
from wan_fast.attention import BACKENDS
from wan_fast.config import WanFastError
from wan_fast.kernels import KERNELS
from wan_fast.manifest import DiTDims

META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda")
GRID = (2, 3, 5)
DIMS = DiTDims(dim=256, ffn_dim=320, num_heads=2, num_layers=3, in_dim=16, out_dim=16, text_dim=32, text_len=20)
REAL = {f"{case.op}/{case.id}": case for case in REAL_CASES}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attention, "SMALL", (3, 5, 7))
    monkeypatch.setattr(attention, "SMALL_HEADS", 2)


def test_attention_is_timed_and_held_to_an_exact_one():
    case = Case("attention/x/L30/bf16", "cpu", partial(attention.attention, GRID, 2), 0.01)
    roofs = {"copy": 1e9, "bf16": 1e9, "int8": 1e9, "fp8": 1e9}
    row, _ = registry.run(case, CPU, roofs)
    triton = {f"int8 triton{skip}" for skip in ("", ", skip 0.001", ", skip 0.01")} | {"fp8 triton", attention.WIDE}
    assert set(row["arms"]) == {OURS, *triton}
    errors = {name: arm["errors"]["dB"] for name, arm in row["arms"].items()}
    assert errors[OURS] > errors["int8 triton"] > errors["fp8 triton"] > 30
    assert all(arm["errors"]["largest"] > 0 and arm["of_roof"] > 0 for arm in row["arms"].values())
    assert row["skipped"]["sdpa"] == "it is wan-fast here, which took it by --attention auto"
    assert "GPU" in row["skipped"]["sdpa cudnn"] and "GPU" in row["skipped"]["int8 cuda"]
    lines = attention.table(row)
    assert lines[-1].endswith(f"x as fast as the best exact one, {OURS}; 1.3 or more is wanted")


def test_every_backend_is_an_arm_and_every_arm_has_a_roof():
    work = attention.attention(GRID, 2, META)
    assert {row.name for row in BACKENDS} <= set(work.arms)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in work.rates.values())
    assert work.rates["fp8 cuda"] == {"fp8": 1.0} and work.rates["sageattention"] == {"int8": 0.5, "fp8": 0.5}
    assert "sdpa" not in work.rates and work.errors == {}


def test_what_norms_in_place_begins_with_the_projection_and_may_be_called_again():
    work = attention.attention(GRID, 2, CPU)
    with torch.inference_mode():
        ours, narrow = (work.arms[name]() for name in (OURS, "int8 triton"))
        before = narrow().float()
        first = ours().float()
        for _ in range(30):
            again = ours()
        error = ((narrow().float() - before).norm() / before.norm()).item()
    assert error == 0 and ((first - before).norm() / first.norm()).item() < 0.05
    assert again.float().std() == pytest.approx(first.std().item(), rel=0.5)


@pytest.mark.parametrize("name", list(attention.EXACT | attention.NARROW))
def test_a_backend_that_is_not_here_says_why(name, monkeypatch):
    row = (attention.EXACT | attention.NARROW)[name]

    def none(rows, *others):
        raise WanFastError(f"{rows[0].name} does not run here: it is not installed")

    monkeypatch.setattr(attention, "first_that_runs", none)
    monkeypatch.setattr(attention, "dies", lambda name: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (row.majors[0], 9))
    with pytest.raises(NotHere, match=f"{name} does not run here: it is not installed"):
        attention.projected(row, CUDA, 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if name != "sdpa":
        with pytest.raises(NotHere, match=f"{name} is not for compute capability 7.5"):
            attention.projected(row, CUDA, 2)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exit 0", ""),
        ("exec sleep 60", "int8 cuda does not end within 1 s on a small clip"),
        ("echo first >&2; echo an illegal memory access >&2; exit 1", "int8 cuda: an illegal memory access"),
        ("kill -6 $$", "int8 cuda: it ended with -6"),
    ],
)
def test_a_kernel_that_hangs_or_crashes_takes_no_other_arm_with_it(program, said, monkeypatch, tmp_path):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(attention.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(attention, "LIMIT", 1.0)
    attention.dies.cache_clear()
    try:
        assert attention.dies("int8 cuda") == said
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        if said:
            with pytest.raises(NotHere, match=said):
                attention.projected(attention.NARROW["int8 cuda"], CUDA, 2)
    finally:
        attention.dies.cache_clear()


def test_forwards_in_8_bits():
    work = attention.step(DIMS, (16, 3, 4, 6), torch.float32, CPU)
    torch.manual_seed(0)
    with torch.inference_mode():
        arms, skipped = registry._build(work)
        found = {name: call() for name, call in arms.items()}
        # whichever ran before
        assert all(torch.equal(arms[name](), found[name]) for name in reversed(arms))
    assert list(found) == [OURS, attention.IN_BF16, f"{OURS}, linears in 8 bits", f"{OURS}, attention int8 triton"]
    errors = {name: (result - found[attention.IN_BF16]).norm().item() for name, result in found.items()}
    assert len(set(errors.values())) == 4 and errors[OURS] > errors[f"{OURS}, attention int8 triton"] > 0
    assert skipped[f"{OURS}, linears in 8 bits, attention int8 triton"] == "that is wan-fast here"
    assert all(sum(shares.values()) == pytest.approx(1) for shares in work.rates.values())
    assert work.rates[attention.IN_BF16] == {"fp32": 1}


def test_parts():
    found = attention.parts("int8 triton", GRID, 2, CPU)
    operators = {"keys_center", "qk_norm_rope_quantized", "quantize_values", "attention_8bit", "qk_norm_rope"}
    assert set(found) == {"all", *operators} and all(seconds > 0 for seconds in found.values())
    text = "\n".join(attention.described("int8 triton", found, GRID, 2))
    assert text.startswith("int8 triton, 30 tokens, 2 heads: ") and all(name in text for name in operators)


@pytest.mark.parametrize("name", ["int8 cuda", "sageattention"])
def test_what_was_not_measured_has_no_number(name):
    arms = {OURS: {"seconds": 2.0}, "flash-attn 3": {"seconds": 1.0}}
    row = {"flops": 1e12, "skipped": {name: "not installed"}, "arms": arms}
    lines = attention.table(row)
    assert lines[-2].split() == [*name.split(), "not", "installed"] and lines[-1] == "  nothing in 8 bits was measured"
    row["arms"] = arms | {"int8 triton": {"seconds": 0.5, "of_roof": 0.25, "errors": {"dB": 31.0, "largest": 0.5}}}
    line, *_, last = attention.table(row)[3:]
    assert line.split() == ["int8", "triton", "500.000", "2.00", "25.0%", "2.00x", "31.0", "5.00e-01"]
    assert last == "  int8 triton is 2.00x as fast as the best exact one, flash-attn 3; 1.3 or more is wanted"
    row["arms"] = {OURS: {"seconds": 0.7}, attention.IN_BF16: {"seconds": 1.0}}
    assert attention.table(row)[-1] == "  in 8 bits it takes 0.700 of the time that it takes in bf16; 0.72 or less is wanted"


# --- the kernels' own cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [name for name in REAL if name.startswith("attention_8bit/")])
def test_the_reference_of_attention_is_no_arm_where_it_takes_seconds(id):
    case = REAL[id]
    with torch.no_grad():
        work = operations.kernel(case, torch.bfloat16, META)
    long = id.endswith("720p") or "wide-values" in id or "skip" in id
    with torch.no_grad():
        if long:
            with pytest.raises(NotHere, match="takes seconds"):
                work.arms["reference"]()
        else:
            work.arms["reference"]()
    assert sum(work.rates[OURS].values()) == 1 and ("bf16" in work.rates[OURS]) == ("wide-values" in id)


def test_scales_of_random_attention_are_positive():
    case = REAL["attention_8bit/int8-of-64-channels"]
    args = arguments(case, torch.bfloat16, CPU)
    assert all(scale.min() > 0 and scale.max() < 0.04 for scale in (args[1], args[3]))


@pytest.mark.parametrize("attend", [Attend(70, 200, N=5, lse=True), Attend(70, 200, N=3, narrow=False), Attend(9, 20, N=1)])
def test_a_long_reference_is_held_to_two_heads(attend, monkeypatch):
    monkeypatch.setattr(tune, "MANY_SCORES", 0)
    kernel, args = KERNELS["attention_8bit"], attend.inputs(torch.int8, torch.bfloat16)
    given, of = tune.held_to("attention_8bit", args)
    whole, few = run(kernel, kernel.reference, args), run(kernel, kernel.reference, given)
    assert few[0].shape == (1, attend.L, 2, attend.K)
    for part, expected in zip(few, of(whole), strict=True):
        torch.testing.assert_close(part, expected)
    given, of = tune.held_to("gelu_tanh", args)
    assert given is args and of(whole) is whole


def test_bytes_of_what_is_quantised_are_those_that_move():
    (T, H, W), D = (31, 22, 40), 3072
    L, read_besides = T * H * W, 4 * (2 * D + 2 * 40 * 64 + D)
    work = operations.kernel(REAL["qk_norm_rope_quantized/int8-ti2v-5B-720p"], torch.bfloat16, META)
    assert work.bytes == L * 2 * (2 * D + D + 4 * D // 128) + read_besides
    work = operations.kernel(REAL["qk_norm_rope/ti2v-5B-720p"], torch.bfloat16, META)
    assert work.bytes == L * 2 * 2 * D * 2 + 4 * (2 * D + 2 * 40 * 64)


def test_of_several_results_the_first_is_compared():
    def pair(value):
        return lambda: lambda: (torch.tensor([1.0, value]), torch.zeros(0))

    work = Work(arms={OURS: pair(1.0), "same": pair(1.0), "other": pair(2.0)}, rate="fp32", tolerance=1e-3)
    arms, skipped = registry._build(work)
    assert set(arms) == {OURS, "same"} and "other work" in skipped["other"]


def test_operations_in_two_precisions_have_a_roof_of_both():
    roofs, flops = {"copy": 1e12, "int8": 1e9, "fp8": 4e9}, 8e9
    assert registry.roof_seconds(flops, 0, {"int8": 0.5, "fp8": 0.5}, roofs) == pytest.approx(5.0)
    assert registry.roof_seconds(flops, 0, {"int8": 0.5, "bf16": 0.5}, roofs) is None


def test_the_cases_are_at_the_lengths_of_real_clips():
    assert [(prod(grid), heads) for grid, heads in attention.CLIPS] == [(27280, 24), (32760, 12), (32760, 40), (75600, 40)]
