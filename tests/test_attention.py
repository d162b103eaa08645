"""Which backend runs where, that none is asked for in vain, and that nothing is copied on the way."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan_fast import attention
from wan_fast.attention import BACKENDS, Backend, choose, first_that_runs, installed, sdpa
from wan_fast.config import WanFastError

CPU = torch.device("cpu")
EVERYTHING = {row.module for row in BACKENDS}


def packed(B=1, L=37, heads=4, K=16, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, L, 3, heads, K, generator=generator).to(device, dtype).unbind(2)


@pytest.mark.parametrize(
    ("asked", "capability", "dtype", "packages", "first"),
    [
        ("auto", (8, 0), "bf16", {"torch"}, "sdpa flash"),
        ("auto", (8, 9), "bf16", EVERYTHING, "sdpa flash"),
        ("auto", (9, 0), "bf16", {"torch"}, "sdpa cudnn"),
        ("auto", (9, 0), "bf16", EVERYTHING - {"flash_attn_interface"}, "sdpa cudnn"),
        ("auto", (9, 0), "bf16", EVERYTHING, "flash-attn 3"),
        ("auto", (10, 0), "bf16", EVERYTHING, "flash-attn 4"),
        ("auto", (12, 0), "bf16", EVERYTHING, "sdpa cudnn"),
        ("auto", (13, 0), "bf16", EVERYTHING, "sdpa cudnn"),
        ("auto", (7, 5), "bf16", EVERYTHING, "sdpa"),
        ("auto", (3, 7), "fp32", EVERYTHING, "sdpa"),
        ("sdpa", (7, 5), "bf16", EVERYTHING, "sdpa"),
        ("auto", (9, 0), "fp32", EVERYTHING, "sdpa efficient"),
        ("sdpa", (9, 0), "bf16", EVERYTHING, "sdpa cudnn"),
        ("sdpa", (8, 6), "bf16", EVERYTHING, "sdpa flash"),
        ("sdpa", (8, 0), "fp32", EVERYTHING, "sdpa efficient"),
        ("flash", (8, 0), "bf16", EVERYTHING, "flash-attn 2"),
        ("flash", (9, 0), "bf16", EVERYTHING, "flash-attn 3"),
        ("flash", (9, 0), "bf16", {"torch", "flash_attn.cute"}, "flash-attn 4"),
        ("flash", (12, 0), "bf16", {"torch", "flash_attn_2_cuda"}, "flash-attn 2"),
        ("xformers", (8, 0), "fp32", EVERYTHING, "xformers"),
    ],
)
def test_choice(monkeypatch, asked, capability, dtype, packages, first):
    monkeypatch.setattr(attention, "installed", packages.__contains__)
    assert choose(asked, capability, dtype)[0].name == first


@pytest.mark.parametrize(
    ("asked", "capability", "dtype", "said"),
    [
        ("flash", (9, 0), "bf16", "flash-attn 3: .*; flash-attn 4: pip install --pre flash-attn-4; flash-attn 2: pip install"),
        ("flash", (8, 0), "bf16", "none is installed: flash-attn 2: pip install"),
        ("xformers", (9, 0), "bf16", "pip install xformers"),
        ("flash", (13, 0), "bf16", r"to 12.x, this GPU has 13.0"),
        ("flash", (7, 5), "bf16", r"runs on compute capability 8.0 to 12.x, this GPU has 7.5; take --attention auto"),
        ("flash", (9, 0), "fp32", "computes in bf16, --dtype is fp32"),
    ],
)
def test_what_is_asked_for_and_not_there(monkeypatch, asked, capability, dtype, said):
    monkeypatch.setattr(attention, "installed", {"torch"}.__contains__)
    with pytest.raises(WanFastError, match=said):
        choose(asked, capability, dtype)


def test_installed_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "half_installed" / "cute").mkdir(parents=True)
    (tmp_path / "half_installed" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("half_installed") and installed("half_installed.cute")
    assert not installed("half_installed.other") and not installed("no_such_package.cute")


def row(name, make):
    return Backend(name=name, flag="flash", majors=range(9), make=make, module="m", package=f"pip install {name}")


def broken():
    raise ImportError("built for another torch")


def test_a_backend_that_does_not_run_is_passed_over_and_named():
    def refuses(q, k, v):
        raise RuntimeError("head width 16")

    rows = [row("first", broken), row("second", lambda: refuses), row("third", lambda: sdpa)]
    chosen, function, failures = first_that_runs(rows, CPU, torch.float32, 4, 16)
    assert chosen.name == "third" and function is sdpa
    assert "first does not run here: ImportError: built for another torch" in failures[0] and "head width 16" in failures[1]
    with pytest.raises(
        WanFastError, match=r"first does not run.*head width 16; mend it .pip install first; pip install second.*auto"
    ):
        first_that_runs(rows[:2], CPU, torch.float32, 4, 16)
    with pytest.raises(WanFastError, match=r"another torch$"):
        first_that_runs([replace(rows[0], module="torch")], CPU, torch.float32, 4, 16)


class Operators(TorchDispatchMode):
    """The names of all that run within."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("L", [1, 37])
def test_a_packed_projection_is_not_copied(L):
    q, k, v = packed(L=L)
    assert not q.is_contiguous() or L == 1
    with torch.inference_mode(), Operators() as operators:
        out = sdpa(q, k, v).flatten(2)
    assert out.is_contiguous() and out.shape == (1, L, 64)
    work = [name for name in operators.seen if not name.startswith(("transpose", "view", "_unsafe_view", "flatten", "alias"))]
    assert len(work) == 1 and "attention" in work[0], work


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers"])
def test_packages_are_called_as_they_expect(monkeypatch, name):
    """They take [B, L, N, K] and scale by 1 / sqrt(K) of their own; some return more than the result."""
    chosen = next(row for row in BACKENDS if row.name == name)
    module, function = {
        "flash-attn 2": ("flash_attn", "flash_attn_func"),
        "flash-attn 3": ("flash_attn_interface", "flash_attn_func"),
        "flash-attn 4": ("flash_attn.cute", "flash_attn_func"),
        "xformers": ("xformers.ops", "memory_efficient_attention"),
    }[name]
    with_sums = name in ("flash-attn 3", "flash-attn 4")
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    setattr(sys.modules[module], function, lambda q, k, v: (sdpa(q, k, v), None) if with_sums else sdpa(q, k, v))
    q, k, v = packed()
    assert torch.equal(chosen.make()(q, k, v), sdpa(q, k, v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_backends_agree_on_a_gpu(backend, dtype):
    fits = dtype in backend.dtypes and torch.cuda.get_device_capability()[0] in backend.majors
    if not fits or not installed(backend.module):
        pytest.skip(f"{backend.name} does not run here in {dtype}")
    q, k, v = packed(L=1000, K=128, device="cuda", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    out = backend.make()(q, k, v)
    exact = sdpa(q.double(), k.double(), v.double())
    assert out.is_contiguous()
    assert (out - exact).abs().max() <= (2e-2 if dtype == "bf16" else 1e-5)
