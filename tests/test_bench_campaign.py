import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import campaign, results
from bench.results import Results, open_results, read

ROOT = Path(__file__).parents[1]
needs_checkout = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="no checkout")


def bench(*arguments, blocked=(), **options):
    """Run `python -m bench...` with some packages that cannot be imported."""
    code = textwrap.dedent(f"""
        import runpy, sys
        blocked = {set(blocked)!r}
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in blocked:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Block())
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    """)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


@needs_checkout
def test_a_case_from_the_command_line(tmp_path, capsys):
    arguments = ["--device", "cpu", "--minutes", "3", "--out", str(tmp_path), "recipe/toy-width/*"]
    code, said = campaign.main(arguments), capsys.readouterr().out
    assert code == 0, said
    path = Path(said.splitlines()[-1])
    data = read(path)
    assert path.parent.parent == tmp_path and set(data["rows"]) == {"recipe/toy-width/48x9x8x8/fp32"}
    assert data["roofs"]["copy"] > 1e8 and data["roofs"]["fp32"] > 1e9 and "tf32" not in data["roofs"]
    assert data["notes"]["roof tf32"] == "not measured: tf32 is a mode of NVIDIA GPUs"
    assert {"wan-fast", "python", "torch"} <= set(data["versions"]) and data["machine"]["threads"] >= 1
    arms = data["rows"]["recipe/toy-width/48x9x8x8/fp32"]["arms"]
    assert len(arms) == 6 and all(arm["seconds"] > 0 and arm["peak_bytes"] > 0 for arm in arms.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--list", "dit/toi-width/48x9x8x8/fp32"], "did you mean dit/toy-width/48x9x8x8/fp32"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "x"], "invalid float value"),
    ],
)
def test_bad_input(arguments, said, tmp_path, capsys):
    try:
        code = campaign.main(["--out", str(tmp_path), *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_checkout
def test_bad_input_from_the_command_line(tmp_path):
    done = bench("bench.campaign", "--out", str(tmp_path), "--device", "cpu", "--list", "dit/ti2v-5B/*")
    assert done.returncode == 2 and "do not run on cpu; take --device cuda" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_link_to_the_kernels_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    assert campaign.main(["--minutes", "1"]) == 2
    assert "ln -sfn ../kernels wan_fast/kernels" in capsys.readouterr().err


@needs_checkout
def test_engine_and_campaign_need_no_writers_and_no_rivals():
    absent = ("av", "transformers", "diffusers", "PIL", "tqdm", "ftfy", "huggingface_hub", "tokenizers", "pytest", "matplotlib")
    code = "import wan_fast, wan_fast.engine, wan_fast.profiling, bench.cases, bench.campaign, bench.tune, bench.results"
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    done = subprocess.run([sys.executable, "-c", f"{block}; {code}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_checkout
def test_a_case_without_its_rivals(tmp_path):
    done = bench(
        *("bench.campaign", "--child", str(tmp_path / "r.json"), "--device", "cpu", "dit/toy-width/48x9x8x8/fp32"),
        "text/umt5-quarter-width-6-layers/64-tokens/fp32",
        blocked=("diffusers", "transformers"),
    )
    assert done.returncode == 0, done.stderr
    data = read(tmp_path / "r.json")
    row = data["rows"]["dit/toy-width/48x9x8x8/fp32"]
    assert set(row["arms"]) == {"wan-fast", "official recipe"}
    assert row["skipped"]["diffusers"] == "No module named 'diffusers'"
    assert data["notes"] == {"text/umt5-quarter-width-6-layers/64-tokens/fp32": "skipped: No module named 'transformers'"}


@needs_checkout
def test_pytest_benchmark_runs_cpu_rows_and_says_why_it_skips_the_others():
    # of the tests those of one file, which has some of these names, so that they are seen to be left out
    paths = "testpaths=tests/test_bench_registry.py bench"
    command = [sys.executable, "-m", "pytest", "--benchmark", "-q", "-rs", "-o", paths, "-k", "dit/toy or vae2.1-480p-4/bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout or torch.cuda.is_available()
    assert "needs a GPU" in done.stdout or torch.cuda.is_available()
    assert "arms of each case, in one run" in done.stdout and "benchmark: 1 tests" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout and "commit " in done.stdout


# --- children that crash, hang, or do not start --------------------------------------------------------------------------

CHILD = """
import os, sys, time
for name in sys.argv[1:]:
    print("begin", name, flush=True)
    if name == "crash": print("illegal memory access", file=sys.stderr, flush=True); os.abort()
    if name == "hang": time.sleep(600)
    if name == "bytes": os.write(2, bytes([255, 254])); os.write(1, bytes([255, 10]))
    if name == "lost": print("end lost done", flush=True); os._exit(1)
    print("end", name, "FAILED: wrong" if name == "wrong" else "done", flush=True)
"""


@pytest.fixture
def path(tmp_path):
    file = Results(tmp_path / "r.json", {"machine": {}})
    file.put("roofs", "copy", 1.0)
    return file.path


def supervise(path, names, seconds=60.0, limit=30.0, child=CHILD):
    said = []
    command = [sys.executable, "-c", child]
    left = campaign.supervise(path, command, names, time.monotonic() + seconds, limit=limit, say=said.append)
    return left, said, read(path)["notes"]


def test_a_crash_costs_one_step(path):
    left, said, notes = supervise(path, ["a", "crash", "b", "lost", "wrong", "c", "bytes"])
    assert said.pop().startswith("bytes")
    assert left == [] and [line.partition(":")[0] for line in said] == ["a", "crash", "b", "lost", "wrong", "c"]
    assert list(notes) == ["crash"] and "the process ended with -6: illegal memory access" in notes["crash"]


def test_a_step_that_hangs_costs_its_limit(path):
    left, _, notes = supervise(path, ["a", "hang", "b"], limit=1.0)
    assert left == [] and "no end after 1 s" in notes["hang"]


def test_the_deadline_ends_it(path):
    start = time.monotonic()
    left, _, notes = supervise(path, ["a", "hang", "b"], seconds=2.0)
    assert left == ["hang", "b"] and notes == {} and time.monotonic() - start < 20


def test_a_child_that_does_not_start_is_said(path):
    with pytest.raises(RuntimeError, match=r"does not start.*boom"):
        supervise(path, ["a"], child="raise SystemExit('boom')")


# --- results files ------------------------------------------------------------------------------------------------------


def test_results_survive_at_every_moment(path):
    for i in range(20):
        Results(path, {}).put("rows", f"case {i}", {"x": i})
        assert len(json.loads(path.read_text())["rows"]) == i + 1
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_another_version_gets_another_file(tmp_path, monkeypatch):
    facts = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "versions": {"torch": "2.11"}, "sources": "a"}
    monkeypatch.setattr(results, "describe_run", lambda device: facts)
    first = open_results(tmp_path, None)
    first.put("rows", "x", {"of": "a"})
    assert first.path.parent.name == "nvidia-h100-80gb-hbm3"
    assert open_results(tmp_path, None).data["rows"] == {"x": {"of": "a"}}
    facts = facts | {"sources": "b"}
    second = open_results(tmp_path, None)
    assert second.path.name == first.path.stem + "-2.json" and second.data["rows"] == {}
    second.put("rows", "y", {"of": "b"})
    # as a number: -10 comes after -2
    os.link(second.path, second.path.with_name(first.path.stem + "-10.json"))
    (found, data) = next(results.newest(tmp_path))
    assert found.name.endswith("-10.json") and set(data["rows"]) == {"y"}
    other, _ = next(results.newest(tmp_path, but=first.path))
    assert other == found
    assert next(results.newest(tmp_path, but=found))[0] == first.path
    (first.path.parent / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"notes\.json is not named by its date"):
        next(results.newest(tmp_path))


def test_what_is_there_is_not_measured_again():
    names = ["roofs", "accuracy", "kernel/a", "dit/b"]
    assert campaign.still_to_do(names, {"roofs": {}, "rows": {}}) == names
    assert campaign.still_to_do(names, {"roofs": {"copy": 1.0}, "rows": {"dit/b": {}}}) == ["accuracy", "kernel/a"]


def test_results_name_no_place_on_the_machine():
    text = f"File {ROOT}/bench/x.py, {sys.prefix}/lib/python3.12/site-packages/torch/y.py, {Path.home()}/z and 3/4 of bf16/fp32"
    cleaned = results.without_paths(text)
    assert str(ROOT) not in cleaned and str(Path.home()) not in cleaned and sys.prefix not in cleaned
    assert "bench/x.py" in cleaned and cleaned.endswith("3/4 of bf16/fp32")


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 0}', "\x00"])
def test_a_file_that_is_no_result(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no results file"):
        read(tmp_path / "x.json")


# --- steps that need a GPU, without one ----------------------------------------------------------------------------------


def test_order_of_a_visit_to_a_gpu():
    names = list(campaign.steps(torch.device("cuda")))
    place = {name: i for i, name in enumerate(names)}
    assert names[:2] == ["roofs", "accuracy"] and names[-1] == "sanitizer"
    order = [
        "kernel/frames_to_uint8/vae2.1-480p-4/bf16",
        "kernel/gated_residual_adaln/ti2v-5B-720p/bf16",
        "shares/ti2v-5B/1280x704x121/bf16",
        "dit/ti2v-5B/1280x704x121/bf16",
        "dit/t2v-14B/832x480x81/bf16",
        "tiles/frames_to_uint8/vae2.1-480p-4",
        "vae/2.2-decode/1280x704x17/fp32",
        "attention/t2v-14B/L75600-N40-K128/bf16",
        "gemm/t2v-14B-qkvo/32760x5120x5120/bf16",
        "conv3d/vae2.1/96x4x480x832/fp32",
        "quality/ti2v-5B/1280x704x121-50-steps/bf16",
        "kernel/frames_to_uint8/vae2.1-480p-4/fp32",
    ]
    assert [place[name] for name in order] == sorted(place[name] for name in order)
    assert list(campaign.steps(torch.device("cuda"), ["vae/2.2-*"])) == [
        "roofs",
        *("vae/2.2-decode/1280x704x121/bf16", "vae/2.2-encode/1280x704x1/bf16"),
        *("vae/2.2-decode/1280x704x17/fp32", "vae/2.2-encode/1280x704x1/fp32"),
    ]


def doubles(x, factor):
    """x times factor; None leaves the last value unwritten."""
    y = torch.empty_like(x)
    y[:-1] = x[:-1] * (factor or 2.0)
    if factor:
        y[-1] = x[-1] * factor
    return y


@pytest.mark.parametrize("factor", [2.0, 2.1, float("nan"), None])
def test_a_kernel_that_breaks_the_accuracy_rule_is_a_failure(factor, path, monkeypatch):
    import kernel_cases

    from wan_fast.kernels import KERNELS
    from wan_fast.kernels._op import Kernel

    case = kernel_cases.Case("doubling", "x", lambda dtype: (torch.randn(50).to(dtype),))
    monkeypatch.setattr(kernel_cases, "CASES", [case])
    monkeypatch.setattr(kernel_cases, "REAL_CASES", [])
    monkeypatch.setitem(KERNELS, "doubling", Kernel("doubling", None, lambda x: doubles(x, factor), lambda x: x * 2, False))
    file = Results(path, {})
    if factor == 2.0:
        assert campaign.check_kernels(torch.device("cpu"), file) == 0
        names = ("doubling/x/float32 in reference", "doubling/x/bfloat16 in reference")
        assert file.data["accuracy"] == dict.fromkeys(names, "kept")
    else:
        with pytest.raises(AssertionError, match="2 kernel cases break the accuracy rule"):
            campaign.check_kernels(torch.device("cpu"), file)
        assert file.data["accuracy"]["doubling/x/float32 in reference"].startswith("BROKEN: AssertionError")


@pytest.mark.parametrize("code", [0, 99])
def test_compute_sanitizer(code, path, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    file = Results(path, {})
    if code:
        with pytest.raises(AssertionError, match=r"ended with 99: =* ERROR SUMMARY: 99 errors"):
            campaign.sanitize(file)
    else:
        campaign.sanitize(file)
        assert file.data["notes"]["sanitizer"] == "memcheck: ERROR SUMMARY: 0 errors"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Exception, match="compute-sanitizer is not installed"):
        campaign.sanitize(file)
