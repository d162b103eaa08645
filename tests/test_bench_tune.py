import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import REAL_CASES, RealCase

from bench import tune
from wan_fast.kernels import KERNELS
from wan_fast.kernels._op import Kernel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def doubling(monkeypatch):
    """An operator whose tiles decide how long it takes, and whether it is right."""
    module = ModuleType("doubling")
    code = """
import time
_CANDIDATES = ({"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 4}, {"BLOCK": 8})
def _config(size): return {"BLOCK": 2}
def launch(x):
    block = _config(x.numel())["BLOCK"]
    if block == 4: raise RuntimeError("out of resource: shared memory")
    time.sleep(0.004 / block)
    return x * (3 if block == 8 else 2)
"""
    exec(code, module.__dict__)
    module.launch.__module__ = "doubling"
    monkeypatch.setitem(sys.modules, "doubling", module)
    monkeypatch.setitem(KERNELS, "doubling", Kernel("doubling", None, module.launch, lambda x: x * 2, False))
    return module


def test_the_fastest_tiles_that_are_right_win(doubling):
    case = RealCase("doubling", "x", lambda dtype: (torch.empty(10, dtype=dtype, device="meta"),), 32)
    found = tune.sweep(case, torch.float32, torch.device("cpu"), budget=0.1)
    assert set(found["seconds"]) == {"BLOCK=1", "BLOCK=2"}
    assert found["current"]["tiles"] == found["best"]["tiles"] == "BLOCK=2"
    assert found["seconds"]["BLOCK=1"] > found["seconds"]["BLOCK=2"]
    assert "shared memory" in found["refused"]["BLOCK=4"] and "AssertionError: error" in found["refused"]["BLOCK=8"]
    # what was tried leaves nothing behind
    start = time.perf_counter()
    assert torch.equal(doubling.launch(torch.ones(2)), torch.full((2,), 2.0)) and time.perf_counter() - start < 0.1
    assert doubling._config(1) == {"BLOCK": 2}


def test_rounding_is_no_reason_to_refuse(doubling):
    """Half of the values of a bf16 product are rounded: the reference itself is not exact."""
    doubling.launch.__globals__["_CANDIDATES"] = ({"BLOCK": 2}, {"BLOCK": 1})
    case = RealCase("doubling", "x", lambda dtype: (torch.randn(1000).to(dtype),), 32)
    tune.KERNELS["doubling"] = tune.KERNELS["doubling"]._replace(reference=lambda x: (x.float() * 2.003).to(x.dtype))
    found = tune.sweep(case, torch.bfloat16, torch.device("cpu"), budget=0.1)
    assert found["refused"] == {}
    tune.KERNELS["doubling"] = tune.KERNELS["doubling"]._replace(reference=lambda x: x * 3)
    with pytest.raises(AssertionError, match="the tiles in use, BLOCK=2, are refused"):
        tune.sweep(case, torch.bfloat16, torch.device("cpu"), budget=0.1)


def test_every_kernel_with_tiles_takes_part():
    assert "frames_to_uint8" in tune.tunable()
    for name in tune.tunable():
        module = sys.modules[KERNELS[name].launch.__module__]
        assert len(module._CANDIDATES) > 1 and any(case.op == name for case in REAL_CASES)


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="no checkout")
def test_bad_input_from_the_command_line():
    command = [sys.executable, "-m", "bench.tune", "frames_to_int8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there are: adaln_modulate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2 and "need a GPU" in capsys.readouterr().err
