"""Which backend runs where, that none is asked for in vain, and that nothing is copied on the way."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.quality import (
    ATTENTIONS,
    PROMPTS,
    RUNS,
    attention_errors,
    emulated,
    psnr,
    sqnr,
    synthetic_attention_errors,
    videos,
)
from wan_fast import Engine, EngineConfig, attention, kernels, self_test
from wan_fast.attention import BACKENDS, Attention8bit, Backend, choose, first_that_runs, installed, of_projection, sdpa
from wan_fast.config import ATTENTION_8BIT, WanFastError

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
        ("int8", (8, 0), "bf16", {"triton"}, "int8 triton"),
        ("int8", (9, 0), "bf16", EVERYTHING, "int8 triton"),
        ("fp8", (8, 9), "bf16", EVERYTHING, "fp8 triton"),
        ("int8-sm90", (9, 0), "bf16", EVERYTHING, "int8 cuda"),
        ("fp8-sm90", (9, 0), "bf16", EVERYTHING, "fp8 cuda"),
        ("sage", (12, 0), "bf16", EVERYTHING, "sageattention"),
    ],
)
def test_choice(monkeypatch, asked, capability, dtype, packages, first):
    monkeypatch.setattr(attention, "installed", packages.__contains__)
    assert choose(asked, capability, dtype, 128)[0].name == first


@pytest.mark.parametrize(
    ("asked", "capability", "dtype", "said"),
    [
        ("flash", (9, 0), "bf16", "flash-attn 3: .*; flash-attn 4: pip install --pre flash-attn-4; flash-attn 2: pip install"),
        ("flash", (8, 0), "bf16", "none is installed: flash-attn 2: pip install"),
        ("xformers", (9, 0), "bf16", "pip install xformers"),
        ("flash", (13, 0), "bf16", r"to 12.x, this GPU has 13.0"),
        ("flash", (7, 5), "bf16", r"runs on compute capability 8.0 to 12.x, this GPU has 7.5; take --attention auto"),
        ("flash", (9, 0), "fp32", "computes in bf16, --dtype is fp32"),
        ("fp8", (8, 6), "bf16", "8.9 to 12.x, this GPU has 8.6; take --attention int8"),
        ("int8-sm90", (9, 0), "bf16", "CUDA extension: pip install wan-fast where nvcc"),
        ("int8", (0, 0), "fp32", "8.0 to 12.x, the device is the CPU; take --attention auto"),
    ],
)
def test_what_is_asked_for_and_not_there(monkeypatch, asked, capability, dtype, said):
    monkeypatch.setattr(attention, "installed", {"torch"}.__contains__)
    with pytest.raises(WanFastError, match=said):
        choose(asked, capability, dtype, 128)


def test_head_widths_are_the_backends():
    assert choose("int8", (9, 0), "bf16", 64) and choose("auto", (9, 0), "bf16", 96)
    with pytest.raises(WanFastError, match="int8 has head widths 64 and 128, this model's is 96; take --attention auto"):
        choose("int8", (9, 0), "bf16", 96)
    with pytest.raises(WanFastError, match="int8-sm90 has head widths 128, this model's is 64"):
        choose("int8-sm90", (9, 0), "bf16", 64)


def test_auto_takes_none_in_8_bits():
    assert not any(row.eight_bit for row in BACKENDS if row.best_on)
    assert {row.flag for row in BACKENDS if row.eight_bit} == {*ATTENTION_8BIT}


def test_installed_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "half_installed" / "cute").mkdir(parents=True)
    (tmp_path / "half_installed" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("half_installed") and installed("half_installed.cute")
    (tmp_path / "half_installed" / "_compiled.abi3.so").write_bytes(b"")
    assert installed("half_installed._compiled")
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


def test_sageattention_is_called_as_it_expects(monkeypatch):
    chosen = next(row for row in BACKENDS if row.name == "sageattention")
    seen = {}

    def sageattn(q, k, v, **settings):
        seen.update(settings)
        return sdpa(q, k, v)

    monkeypatch.setitem(sys.modules, "sageattention", ModuleType("sageattention"))
    sys.modules["sageattention"].sageattn = sageattn
    for found, said in ((None, "is 0, 2 or later"), ("1.0.6", "is 1.0.6, 2 or later")):
        monkeypatch.setattr(attention, "version", lambda name, found=found: found or raises(PackageNotFoundError(name)))
        with pytest.raises(ImportError, match=said):
            chosen.make(0.0)
    monkeypatch.setattr(attention, "version", lambda name: "2.2.0")
    qkv, weight, table, where = projection(L=30)
    assert torch.equal(chosen.make(0.0)(qkv.clone(), weight, table, **where), exact(qkv.clone(), weight, table, **where))
    assert seen == {"tensor_layout": "NHD", "is_causal": False, "smooth_k": True}


def raises(error):
    raise error


exact = of_projection(sdpa)


def projection(L=30, heads=2, K=128, dtype=torch.float32, offset=4.0):
    """A packed projection whose keys have much in common, and values something, and the rest that an attention of it takes."""
    generator = torch.Generator().manual_seed(L)
    qkv = torch.randn(1, L, 3, heads * K, generator=generator)
    qkv[:, :, 1:] += torch.tensor([[offset], [0.5]]) * torch.randn(2, heads * K, generator=generator)
    where = {"grid": (1, 1, L), "heads": heads, "eps": 1e-6}
    return qkv.to(dtype), torch.ones(2, heads * K, dtype=dtype), kernels.rope_table(L, K), where


def quality(chosen, *arguments, **where):
    qkv, *others = arguments
    near, wanted = chosen(qkv.clone(), *others, **where), exact(qkv.clone(), *others, **where)
    return float("inf") if torch.equal(near, wanted) else sqnr(near, wanted)


@pytest.mark.parametrize("L", [1, 63, 129, 300])
@pytest.mark.parametrize(("chosen", "least"), [("int8", 30), ("fp8", 30), ("wide", 40)])
@pytest.mark.parametrize("K", [64, 128])
def test_attention_in_8_bits_is_near_the_exact_one(L, chosen, least, K):
    chosen = Attention8bit("int8", wide_values=True) if chosen == "wide" else Attention8bit(chosen)
    qkv, weight, table, where = projection(L, K=K)
    assert quality(chosen, qkv, weight, table, **where) >= least
    assert quality(replace(chosen, skip=1e-4), qkv, weight, table, **(where | {"eps": 1.0})) >= least - 1


def test_keys_are_centred():
    """What all keys have in common would take the bits: without the centre the error is twice as large."""
    qkv, weight, table, where = projection(300, offset=20.0)
    table = kernels.rope_table(1, 128).expand(2, 300, 64).contiguous()  # no turn, which spreads it
    with_centre = quality(Attention8bit("int8", wide_values=True), qkv, weight, table, **where)
    before = attention.keys_center
    attention.keys_center = lambda x, *args, heads, **others: before(x, *args, heads=heads, **others) * 0
    try:
        without = quality(Attention8bit("int8", wide_values=True), qkv, weight, table, **where)
    finally:
        attention.keys_center = before
    assert with_centre > without + 6


@pytest.mark.parametrize("row", [row for row in BACKENDS if row.skips], ids=lambda row: row.name)
def test_settings_reach_the_operator(monkeypatch, tmp_path, row):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = first_that_runs([row], CPU, torch.bfloat16, 2, 128, 0.25)[1]
    by_extension = row.flag.endswith("-sm90")
    assert made == Attention8bit(row.flag.removesuffix("-sm90"), by_extension, 0.25)
    seen = []
    monkeypatch.setattr(attention, "attention_8bit", lambda *args, **settings: seen.append((args, settings)) or args)
    qkv, weight, table, where = projection(20, dtype=torch.bfloat16)
    made(qkv, weight, table, **where)
    assert seen[0][1] == {"interleaved": by_extension, "skip": 0.25, "dtype": torch.bfloat16}
    values = kernels.quantize_values(qkv[:, :, 2].unflatten(-1, (2, -1)), interleaved=by_extension).values
    assert torch.equal(seen[0][0][4].float(), values.float())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
def test_values_are_wide_where_there_is_no_fp8(monkeypatch, capability):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    seen = []
    monkeypatch.setattr(attention, "attention_8bit", lambda *args, **settings: seen.append(args[4].dtype) or args)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        qkv, weight, table, where = projection(20, dtype=dtype)
        Attention8bit("int8")(qkv, weight, table, **where)
    wide = [torch.bfloat16, torch.bfloat16, torch.float16]
    assert seen == (wide if capability < (8, 9) else [torch.float8_e4m3fn] * 3)


def test_interleaved_values_give_the_same():
    qkv, weight, table, where = projection(37)
    plain, interleaved = (Attention8bit("int8", by)(qkv.clone(), weight, table, **where) for by in (False, True))
    assert torch.equal(plain, interleaved)


def test_sums_are_those_of_the_exponentials():
    """By their definition; reference and kernel could agree on another."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-127, 128, (2, L, 3, 64), generator=generator).to(torch.int8) for L in (20, 300))
    q_scale, k_scale = (torch.rand(2, 3, L, generator=generator) / 40 for L in (20, 300))
    v = kernels.quantize_values(torch.randn(2, 300, 3, 64, generator=generator))
    sums = kernels.attention_8bit(q, q_scale, k, k_scale, *v, lse=True, dtype=torch.float32)[1]
    x = torch.einsum("blnk,bsnk->bnls", q.double(), k.double()) * q_scale[..., None] * k_scale[:, :, None] / 8
    torch.testing.assert_close(sums.double(), x.logsumexp(-1), rtol=2e-6, atol=2e-6)


def test_skipped_tiles_do_not_depend_on_the_scores_held_at_a_time(monkeypatch):
    """Keys from 128 on have e^-4 of the weight for the first 256 queries, and are as near as the others for the rest."""
    q, k = torch.zeros(2, 1, 400, 1, 64, dtype=torch.int8)
    q[:, :256, :, 0] = k[:, :128, :, 0] = 100
    scale, v = torch.full((1, 1, 400), (4 * 8) ** 0.5 / 100), torch.arange(400.0).bfloat16()[None, :, None, None]
    attend = partial(kernels.attention_8bit, q, scale, k, scale, v.expand(1, 400, 1, 64).contiguous(), dtype=torch.float32)
    whole = attend(skip=0.1)[0]
    assert (whole[:, :256] < 64).all() and (attend()[0][:, :256] > 68).all()
    monkeypatch.setattr(import_module("wan_fast.kernels.attention_8bit"), "_CPU_SCORES", 200 * 400)
    torch.testing.assert_close(attend(skip=0.1)[0], whole)


def test_any_centre_gives_the_same_attention():
    """That of a sample as well as the mean of all: 5,000 keys, of which a fifth is looked at."""
    L = 5000
    x = torch.randn(1, L, 2, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] += 3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    weight, table, where = torch.ones(2, 64), kernels.rope_table(100, 64), {"grid": (1, 50, 100), "heads": 1}
    sampled = kernels.keys_center(x, weight, table, **where)
    keys = x.clone()
    kernels.qk_norm_rope(keys, weight, table, **where)
    mean = keys[:, :, 1].mean(1)[:, None]
    assert (sampled - mean).abs().max() < 0.1 < mean.abs().max() and not torch.equal(sampled, mean)


def test_a_self_test_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = tmp_path / "wan-fast" / "self-tests.json"
    calls, starts = [], []

    def counted(*args, **where):
        starts.append(1)
        return Attention8bit("int8")(*args, **where)

    # two of each test
    ratio = self_test._ratio
    monkeypatch.setattr(self_test, "_ratio", lambda *args: calls.append(0.5) or ratio(*args))
    chosen = replace(next(row for row in BACKENDS if row.name == "int8 triton"), make=lambda skip: counted)
    for _ in range(2):
        assert first_that_runs([chosen], CPU, torch.bfloat16, 2, 128)[1:] == (counted, [])
    assert len(starts) == 2  # a kernel must start, whatever is remembered
    assert sum(calls) == 1 and len(json.loads(memory.read_text())) == 1
    first_that_runs([chosen], CPU, torch.bfloat16, 2, 64)  # another width is another kernel
    monkeypatch.setattr(self_test.triton, "__version__", "another")
    first_that_runs([chosen], CPU, torch.bfloat16, 2, 128)
    first_that_runs([chosen], CPU, torch.bfloat16, 2, 128, 0.0, "reference")  # a pass of the references is not the kernels'
    assert sum(calls) == 4 and len(json.loads(memory.read_text())) == 4
    for count, torn in enumerate(("{ torn", "[]"), 5):
        memory.write_text(torn)
        first_that_runs([chosen], CPU, torch.bfloat16, 2, 128)
        assert sum(calls) == count and len(json.loads(memory.read_text())) == 1
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: raises(PermissionError("read-only")))
    first_that_runs([chosen], CPU, torch.bfloat16, 2, 64)  # it need not be remembered


def test_a_self_test_holds_for_one_backend_card_dtype_width_and_release(monkeypatch, tmp_path):
    built = tmp_path / "built"
    built.touch()
    monkeypatch.setattr(self_test, "find_spec", lambda module: SimpleNamespace(origin=str(built)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")

    def identity(name="a", card=0, dtype=torch.bfloat16, width=128):
        return self_test._identity(name, "a", torch.device("cuda", card), dtype, width)

    others = [identity(), identity("b"), identity(card=1), identity(dtype=torch.float16), identity(width=64)]
    os.utime(built, (1, 1))
    others.append(identity())
    monkeypatch.setattr(torch, "__version__", "another")
    assert len({*others, identity(), identity()}) == 7


@pytest.mark.parametrize("fault", ["order", "scale", "nan", "tail", "head", "last key", "row"])
def test_a_backend_that_fails_its_self_test_is_refused_by_name(monkeypatch, tmp_path, fault):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(q, k, v):
        if fault == "order":
            return sdpa(q, k, v.roll(1, 1))
        if fault == "head":
            return sdpa(q, k, v.roll(1, 2))
        if fault in ("tail", "last key"):
            last = 256 if fault == "tail" else -1
            return sdpa(q, k[:, :last], v[:, :last])
        if fault == "row":
            return torch.cat([sdpa(q, k, v)[:, :-1], torch.zeros_like(q[:, :1])], 1)
        return sdpa(q * (0.7 if fault == "scale" else float("nan")), k, v)

    row = next(row for row in BACKENDS if row.name == "int8 triton")
    bad = replace(row, name="broken", make=lambda skip: of_projection(broken))
    with pytest.raises(WanFastError, match=r"broken does not run here: RuntimeError: its self-test gives .* dB, 30 or more"):
        first_that_runs([bad], CPU, torch.float32, 2, 128)
    assert not (tmp_path / "wan-fast" / "self-tests.json").exists()
    found, _, failures = first_that_runs([bad, row], CPU, torch.float32, 2, 128)
    assert found is row and failures[0].startswith("broken")


def test_int8_keeps_30_db_of_real_tokens():
    """On tiny's q, k and v; FP8 of queries and keys keeps 28, and is better than without care."""
    with torch.inference_mode():
        found = attention_errors(Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="fp32")), steps=2)
    lowest = {name: min(min(values) for (_, of), values in found.items() if of == name) for name in ATTENTIONS}
    assert lowest["int8"] >= 30 and lowest["int8, values bf16"] >= 40
    assert lowest["fp8"] >= 28 and lowest["fp8"] >= lowest["plain fp8"] + 2


def test_tokens_like_wans_keep_30_db():
    """White ones, which are not like them, keep 25."""
    with torch.inference_mode():
        found = synthetic_attention_errors()
    for (kind, name), (value,) in found.items():
        if name != "plain fp8":
            # of values without anything in common e4m3 keeps 28 dB
            assert value >= (25 if kind == "white" else 30), f"{kind}, {name}: {value:.1f} dB"


def test_a_video_keeps_30_db(monkeypatch, tmp_path):
    """One of the 20 prompts of bench.quality."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with emulated():
        (wanted,) = videos({}, PROMPTS[:1])
        for name, least, most in (("attention int8", 35, 60), ("attention fp8", 30, 45)):
            (frames,) = videos(RUNS[name], PROMPTS[:1])
            assert least <= psnr(frames, wanted) < most, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_backends_agree_on_a_gpu(backend, dtype):
    fits = dtype in backend.dtypes and torch.cuda.get_device_capability()[0] in backend.majors
    if not fits or not installed(backend.module):
        pytest.skip(f"{backend.name} does not run here in {dtype}")
    if backend.eight_bit:
        chosen = first_that_runs([backend], torch.device("cuda"), torch.bfloat16, 2, 128)[1]
        qkv, weight, table, where = projection(1000, dtype=torch.bfloat16)
        qkv, weight, table = qkv.cuda(), weight.cuda(), table.cuda()
        assert sqnr(chosen(qkv.clone(), weight, table, **where), exact(qkv.float(), weight.float(), table, **where)) >= 30
        return
    q, k, v = packed(L=1000, K=128, device="cuda", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    out = backend.make()(q, k, v)
    exactly = sdpa(q.double(), k.double(), v.double())
    assert out.is_contiguous()
    assert (out - exactly).abs().max() <= (2e-2 if dtype == "bf16" else 1e-5)
