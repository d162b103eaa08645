import json
from pathlib import Path

import pytest

from bench import charts, report
from bench.registry import OURS, Case

ROOT = Path(__file__).parents[1]


def arm(seconds, ratio=None, **more):
    spread = {"low": seconds, "high": seconds, "rounds": 3, "peak_bytes": 2**20, "graphed": False, "of_roof": 0.5}
    ratios = {"ratio": {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}} if ratio else {}
    return {"seconds": seconds, **spread, **ratios, **more}


def results(commit="abc", rows=None, device="AMD EPYC, 2 threads", **machine):
    return {
        "format": 1,
        "machine": {"device": device, "threads": 2, **machine},
        "versions": {"torch": "2.13.0"},
        "commit": commit,
        "sources": "0123",
        "roofs": {"copy": 2e10, "fp32": 1e11},
        "rows": rows or {},
        "accuracy": {},
        "tiles": {},
        "notes": {},
    }


def row(name, **arms):
    return {"case": name, "flops": 1e9, "bytes": 1e6, "rate": "fp32", "skipped": {}, "arms": arms}


RUN = Case("run/tiny/x/fp32", "cpu", lambda device: None, headline=True)
GPU = Case("dit/big/x/bf16", "cuda", lambda device: None, headline=True)
MEASURED = row(RUN.name, **{OURS: arm(0.5, stages={"prepare": 0.1, "denoise": 0.3, "decode": 0.1}), "diffusers": arm(1.0, 2.0)})


@pytest.mark.skipif(not (ROOT / "bench" / "results").is_dir(), reason="no checkout")
def test_readme_and_charts_agree_with_the_results():
    assert report.differences() == [], "run python -m bench.report"


def test_a_cell_without_a_measurement_says_so():
    block = report.readme_block([("m/d.json", results(rows={RUN.name: MEASURED}))], [GPU, RUN])
    gpu, cpu = (line for line in block.splitlines() if line.startswith("| `"))
    assert gpu.count("not measured") == 5 and "a GPU" in gpu
    assert (
        cpu == "| `run/tiny/x/fp32` | AMD EPYC, 2 threads | 500 ms | 1 s (diffusers) | 2.00x (1.90 to 2.10) | 50 % | 1.0 MiB |"
    )
    # a machine on which this case failed
    block = report.readme_block([("m/d.json", results())], [RUN])
    assert block.count("not measured") == 5
    alone = results(rows={RUN.name: row(RUN.name, **{OURS: arm(0.5)})})
    assert report.readme_block([("m/d.json", alone)], [RUN]).count("not measured") == 2


def write_tree(root, *files):
    (root / "README.md").write_text(f"# x\n{report.BEGIN}\n{report.END}\nlast\n")
    for name, data in files:
        path = root / "bench" / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))


def test_written_once_then_in_agreement_until_a_number_changes(tmp_path):
    name = RUN.name
    write_tree(tmp_path, ("epyc/2026-01-01.json", results(rows={name: MEASURED})))
    written = report.write(tmp_path)
    assert {"README.md", "bench/results/README.md", "bench/results/charts/latency.png"} <= set(written)
    assert "bench/results/charts/ablation.png" not in written
    assert report.differences(tmp_path) == [] and (tmp_path / "README.md").read_text().endswith("last\n")
    MEASURED_LATER = MEASURED | {"arms": {OURS: arm(0.4, stages={"prepare": 0.1, "denoise": 0.2, "decode": 0.1})}}
    write_tree(tmp_path, ("epyc/2026-01-01.json", results(rows={name: MEASURED_LATER})))
    wrong = report.differences(tmp_path)
    assert "bench/results/README.md" in wrong and "bench/results/charts/latency.png" in wrong
    report.write(tmp_path)
    (tmp_path / "bench/results/epyc/2026-01-01.json").write_text(json.dumps(results()))
    assert "bench/results/charts/latency.png" in report.differences(tmp_path)
    report.write(tmp_path)
    assert not (tmp_path / "bench/results/charts/latency.png").exists()


def test_versions_are_not_mixed(tmp_path):
    old = results("old", {"recipe/a/b/fp32": row("recipe/a/b/fp32", **{OURS: arm(1.0)}), RUN.name: MEASURED})
    write_tree(tmp_path, ("epyc/2026-01-01.json", old), ("epyc/2026-01-02.json", results("new", {RUN.name: MEASURED})))
    page = report.full_page(report.machines(tmp_path / "bench" / "results"))
    assert "commit new" in page and "old" not in page and "recipe/a/b" not in page


def test_two_machines_have_rows_of_their_own(tmp_path):
    gpu = results(rows={GPU.name: row(GPU.name, **{OURS: arm(2e-5, graphed=True)})}, device="NVIDIA H100", driver="580")
    found = [("e/d.json", results(rows={RUN.name: MEASURED})), ("h/d.json", gpu)]
    block = report.readme_block(found, [GPU, RUN])
    assert "| `dit/big/x/bf16` | NVIDIA H100 | 20 µs | not measured" in block and "| `run/tiny/x/fp32` | AMD EPYC" in block
    page = report.full_page(found)
    assert "wan-fast (graph)" in page and "| `kernel/frames_to_uint8/vae2.1-480p-4/bf16` | wan-fast | not measured |" in page
    assert list(charts.data("roofline", found)) == ["AMD EPYC, 2 threads", "NVIDIA H100"]


def test_lost_marks_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md has lost the lines"):
        report.rendered("# nothing\n", [])


def test_one_round_is_called_one_round():
    alone = MEASURED | {"arms": {OURS: arm(0.5), "diffusers": arm(1.0, 2.0, rounds=1)}}
    assert list(report.text_table([alone]))[2].endswith("2.00x (one round)")


def test_the_facts_name_machine_versions_and_commit():
    line = report.facts_line(results(commit="0a1b", driver="580.1"))
    assert line == "device AMD EPYC, 2 threads, threads 2, driver 580.1, torch 2.13.0, commit 0a1b"


def test_the_text_table_names_skipped_arms():
    lines = list(report.text_table([MEASURED | {"skipped": {"flash-attn 3": "No module named 'flash_attn_interface'"}}]))
    assert lines[2].endswith("2.00x (1.90 to 2.10)") and lines[3].endswith("skipped: No module named 'flash_attn_interface'")
