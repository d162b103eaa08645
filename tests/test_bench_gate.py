import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench_report import arm, results, row

from bench import gate, host_loop, peers
from bench.peers import PEERS, parse, table

ROOT = Path(__file__).parents[1]
NAME = "vae/x/y/fp32"


def run(low, high, **facts):
    rival = arm(1.0) | {"ratio": {"median": (low + high) / 2, "low": low, "high": high}}
    return results(rows={NAME: row(NAME, **{"wan-fast": arm(0.5), "diffusers": rival})}) | facts


@pytest.mark.parametrize(
    ("then", "now", "caught"),
    [
        ((1.8, 2.0), (1.7, 1.9), False),
        ((1.8, 2.0), (1.0, 1.79), False),  # overlaps within the margin
        ((1.8, 2.0), (1.5, 1.70), True),
        ((1.8, 2.0), (3.0, 4.0), False),
    ],
)
def test_only_a_clear_fall_of_the_ratio_is_a_regression(then, now, caught):
    found = list(gate.regressions(run(*now), run(*then)))
    assert bool(found) is caught and all("vae/x/y/fp32 against diffusers" in line for line in found)


def test_one_round_proves_nothing():
    now = run(1.0, 1.1)
    now["rows"][NAME]["arms"]["diffusers"]["rounds"] = 1
    assert not list(gate.regressions(now, run(1.8, 2.0)))


def test_what_is_no_longer_measured_is_said():
    new = run(1, 2, rows={}, notes={NAME: "FAILED: RuntimeError: out of memory"})
    assert list(gate.regressions(new, run(1, 2))) == [
        f"{NAME}: wan-fast, diffusers measured then and not now: FAILED: RuntimeError: out of memory"
    ]


def test_the_run_is_held_against_another_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setattr(host_loop, "per_step", lambda: {"plan": 0.1, "sampler": 0.005})
    (tmp_path / "epyc").mkdir()
    old, new = (tmp_path / "epyc" / f"2026-01-0{day}.json" for day in (1, 2))
    new.write_text(json.dumps(run(1.5, 1.7)))
    monkeypatch.setattr(sys, "argv", ["gate", str(new)])
    assert gate.main() == 2 and "has nothing of AMD EPYC, 2 threads to compare with" in capsys.readouterr().err
    old.write_text(json.dumps(run(1.8, 2.0)))
    assert gate.main() == 1 and "1.50 to 1.70 now, 1.80 to 2.00 then" in capsys.readouterr().out
    old.write_text(json.dumps(run(1.5, 1.7)))
    assert gate.main() == 0
    monkeypatch.setattr(host_loop, "per_step", lambda: {"plan": 0.2, "sampler": 0.05})
    assert gate.main() == 1 and "host loop, plan: 0.200 yardsticks" in capsys.readouterr().out


def test_runs_that_cannot_be_compared():
    with pytest.raises(ValueError, match="not of one machine"):
        list(gate.regressions(run(1, 2), run(1, 2, machine={"device": "another"})))
    with pytest.raises(ValueError, match="not of one versions"):
        list(gate.regressions(run(1, 2), run(1, 2, versions={"torch": "2.11"})))
    # our own version is what is compared
    assert not list(gate.regressions(run(1, 2, versions={"wan-fast": "2"}), run(1, 2, versions={"wan-fast": "1"})))


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_host_loop_keeps_its_instructions():
    counts = host_loop.per_step()
    print(json.dumps(counts))
    assert counts["yardstick"] > 1e5
    for kind, limit in gate.HOST_LIMITS.items():
        # far below would mean that nothing was counted
        assert limit / 3 < counts[kind] <= limit, f"{kind}: {counts[kind]:.4f} yardsticks per step, the limit is {limit}"


def test_the_host_loop_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt install valgrind"):
        host_loop.instructions()


# --- logs of other engines ----------------------------------------------------------------------------------------------

LOGS = {
    "lightx2v": """
2026-02-10 08:33:11.622 | INFO     | x:__exit__:1 - [Profile] Single GPU - Level1_Log Run Text Encoder cost 9.0 seconds
### RUN measured
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level1_Log Run Text Encoder cost 0.250000 seconds
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level1_Log Run Dit every step cost 1.500000 seconds
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level1_Log Run Dit every step cost 1.250000 seconds
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level2_Log Run DiT cost 3.9 seconds
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level1_Log Run VAE Decoder cost 0.651234 seconds
2026-02-10 08:33:11.622 | INFO | x - [Profile] Single GPU - Level1_Log RUN pipeline cost 4.125000 seconds
""",
    "fastvideo": """
(FVWorkerProc-0 pid=1) INFO 07-25 01:23:24.512 [base.py:156] [prompt|TextEncodingStage] Execution completed in 250.0 ms
(FVWorkerProc-0 pid=1) INFO 07-25 01:23:24.512 [base.py:156] [DenoisingStage] Execution completed in 2750.0 ms
(FVWorkerProc-0 pid=1) INFO 07-25 01:23:24.512 [base.py:156] [decoding_stage|DecodingStage] Execution completed in 6.51234e2 ms
INFO 07-25 01:25:10.001 [video_generator.py:1] Generated successfully in 4.12 seconds
peak_mb=20480.0
""",
    "sglang": """
[02-27 07:23:07] [TextEncodingStage] finished in 9.1235 seconds
[02-27 07:23:07] [TextEncodingStage] finished in 0.2500 seconds
[02-27 07:23:07] [DenoisingStage] finished in 2.7500 seconds
[02-27 07:23:07] [DecodingStage] finished in 0.6512 seconds
[02-27 07:23:07] Warmed-up request processed in \x1b[92m4.12\x1b[0;0m seconds (with warmup excluded)
[02-27 07:23:07] Memory usage - Max peak: 20480.00 MB, Avg peak: 20480.00 MB
""",
    "turbodiffusion": "100%|##| 4/4\r### RUN x\ntext_s=0.250 dit_s=2.750 vae_s=0.651 total_s=4.120 peak_mb=20480.0\n",
    "wan-fast": "done        load 8.8 s, prepare 0.2 s, denoise 2.8 s, decode 0.7 s; peak 20.00 GiB\n",
}


@pytest.mark.parametrize("peer", PEERS)
def test_logs_become_one_table(peer):
    found = parse(peer, LOGS[peer])
    assert found["denoise"] == pytest.approx(2.75, abs=0.06) and found["decode"] == pytest.approx(0.65, abs=0.06)
    assert found["text"] == pytest.approx(0.25, abs=0.06)
    if peer != "lightx2v":
        assert found["peak"] == pytest.approx(20.0)
    if peer != "wan-fast":
        assert found["total"] == pytest.approx(4.12, abs=0.01)


def test_a_figure_that_an_engine_does_not_print():
    lines = table({"lightx2v": parse("lightx2v", LOGS["lightx2v"])})
    assert lines[2] == "| lightx2v | 250 ms | 2.75 s | 651 ms | 4.12 s | not measured |"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("lightx3v={log}", "did you mean lightx2v"),
        ("{log}", "expected PEER=LOG"),
        ("sglang={log}", "no line of sglang that carries a time"),
        ("sglang=nowhere.log", "nowhere.log"),
    ],
)
def test_bad_input(argument, said, tmp_path, monkeypatch, capsys):
    (log := tmp_path / "x.log").write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["peers", argument.format(log=log)])
    assert peers.main() == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="no checkout")
def test_bad_input_from_the_command_line():
    command = [sys.executable, "-m", "bench.peers", "lightx3v=x.log"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean lightx2v" in done.stderr and "Traceback" not in done.stderr
