"""csrc/attention_sm90.cu: its very code run by an emulated Hopper block, what it compiles to, and what it refuses.

The emulation (emulated_sm90.h) needs g++ alone. On a GPU of compute capability 9.0 the same cases run for real.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import Attend, in_fp64, run
from numerics import assert_as_accurate
from torch import Tensor

from wan_fast.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[1]
K = 128
PERMUTATION = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
SCORES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}
ADDRESSES = ["q", "q_scale", "k", "k_scale", "v", "v_scale", "v_center", "out", "lse"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of DType in ops.h
LOG2_448 = math.log2(448)


# --- inputs and references


@dataclass
class Case:
    """What a test varies; strided as q, k and v of one projection: "packed" [3, B, L, N, K] or "joined" [B, L, 3, N, K]."""

    L: int
    S: int
    B: int = 1
    N: int = 1
    scores: torch.dtype = torch.int8
    out: torch.dtype = torch.float32
    layout: str = "separate"
    skip: float = -math.inf
    spread: float = 2.0  # standard deviation of the scores
    seed: int = 0


@dataclass
class Inputs:
    q: Tensor  # [B, L, N, K]
    q_scale: Tensor  # [B, N, L]
    k: Tensor  # [B, S, N, K]
    k_scale: Tensor  # [B, N, S]
    v8: Tensor  # [B, S, N, K] e4m3, in the order of the tokens
    v_scale: Tensor  # [B, N, K]
    v_center: Tensor  # [B, N, K]


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, L, N, K] -> the same of `dtype`, and a scale of each token and head [B, N, L]."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    scale = x.abs().amax(-1) / largest
    y = x / scale.clamp(min=1e-30)[..., None]
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale.permute(0, 2, 1).contiguous()


def make(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, q_scale = quantize(normal(case.B, case.L, case.N, K) * case.spread, case.scores)
    k, k_scale = quantize(normal(case.B, case.S, case.N, K), case.scores)
    v = normal(case.B, case.S, case.N, K) * normal(1, 1, 1, K).exp()
    v_scale = v.abs().amax(1) / 448
    v8 = (v / v_scale[:, None]).to(torch.float8_e4m3fn)
    return Inputs(q, q_scale, k, k_scale, v8, v_scale.contiguous(), normal(case.B, case.N, K))


def log2_scores(inputs: Inputs) -> Tensor:
    """x of the kernel's formula, [B, N, L, S] fp64."""
    sums = torch.einsum("blnk,bsnk->bnls", inputs.q.double(), inputs.k.double())
    x = sums * inputs.q_scale.double()[..., :, None] * inputs.k_scale.double()[..., None, :]
    return x * (math.log2(math.e) / math.sqrt(K))


def weighted(inputs: Inputs, p: Tensor, total: Tensor) -> Tensor:
    """[B, L, N, K] fp64 from probabilities [B, N, L, S] and their sums [B, N, L]."""
    sums = torch.einsum("bnls,bsnk->blnk", p, inputs.v8.double())
    mean = sums / total.permute(0, 2, 1)[..., None]
    return mean * inputs.v_scale.double()[:, None] + inputs.v_center.double()[:, None]


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Attention of the quantised inputs and its logarithms of sums, fp64."""
    x = log2_scores(inputs)
    p = torch.exp2(x - x.amax(-1, keepdim=True))
    return weighted(inputs, p, p.sum(-1)), torch.logsumexp(x * math.log(2), -1)


def rounded(inputs: Inputs) -> Tensor:
    """The same with probabilities rounded to e4m3 as by a kernel that knew the maximum beforehand."""
    x = log2_scores(inputs)
    p = torch.exp2(x - x.amax(-1, keepdim=True) + LOG2_448)
    return weighted(inputs, p.float().to(torch.float8_e4m3fn).double(), p.sum(-1))


class Skipped(NamedTuple):
    out: Tensor  # [B, L, N, K] fp64
    products: int  # tiles of keys that a warpgroup of 64 rows multiplied with v, of all warpgroups


def skipping(inputs: Inputs, skip: float) -> Skipped:
    """Attention without the tiles that the kernel leaves out, the last tile first."""
    x = log2_scores(inputs)
    B, N, L, S = x.shape
    kept = torch.zeros(x.shape, dtype=torch.bool)
    products = 0
    for b in range(B):
        for n in range(N):
            for row in range(0, -(-L // 128) * 128, 64):
                rows = slice(row, min(row + 64, L))
                running = torch.full((max(rows.stop - rows.start, 0),), -math.inf, dtype=torch.float64)
                for tile in reversed(range(-(-S // 128))):
                    keys = slice(tile * 128, min(tile * 128 + 128, S))
                    largest = x[b, n, rows, keys].amax(-1) if running.numel() else running
                    if tile * 128 + 128 < S and bool((largest - running < skip).all()):
                        continue
                    products += 1
                    running = torch.maximum(running, largest)
                    kept[b, n, rows, keys] = True
    x = x.masked_fill(~kept, -math.inf)
    p = torch.exp2(x - x.amax(-1, keepdim=True))
    return Skipped(weighted(inputs, p, p.sum(-1)), products)


# --- calling the kernel


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "BLSNK"),
        *((name, ctypes.c_int64 * 2) for name in ("q_strides", "k_strides")),
    ]


class Arguments(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("scores", ctypes.c_int),
        ("out_dtype", ctypes.c_int),
        ("skip", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ADDRESSES),
    ]


class Boxes(ctypes.Structure):
    _fields_ = [("dims", ctypes.c_uint64 * 4), ("strides", ctypes.c_uint64 * 3), ("box", ctypes.c_uint32 * 4)]


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        *((name, Boxes) for name in "qkv"),
    ]


def surround(x: Tensor) -> Tensor:
    """A copy of x, contiguous and aligned to 64 bytes, with bytes of 0x7F, a NaN of every type, before and after it."""
    size = x.numel() * x.element_size()
    start = 1024
    buffer = torch.full((start + size + 1024,), 0x7F, dtype=torch.uint8, device=x.device)
    start += -buffer.data_ptr() % 64
    buffer[start : start + size] = x.contiguous().view(torch.uint8).flatten()
    return buffer[start : start + size].view(x.dtype).view(x.shape)


def strided(x: Tensor, layout: str, index: int) -> Tensor:
    """x [B, L, N, K] as one of three in memory, the others being garbage."""
    B, L, N, _ = x.shape
    if layout == "separate":
        return surround(x)
    shape = (3, B, L, N, K) if layout == "packed" else (B, L, 3, N, K)
    whole = torch.full(shape, 0x7F, dtype=torch.uint8, device=x.device).view(x.dtype)
    view = whole[index] if layout == "packed" else whole[:, :, index]
    view.view(torch.uint8).copy_(x.view(torch.uint8))
    return view


def store_values(v8: Tensor) -> Tensor:
    """[B, S, N, K] -> [B, N, K, S16], transposed, padded and permuted."""
    B, S, N, _ = v8.shape
    stored = torch.zeros(B, N, K, -(-S // 16) * 16, dtype=torch.uint8)
    stored[..., :S] = v8.view(torch.uint8).permute(0, 2, 3, 1)
    groups = stored.view(B, N, K, -1, 16)[..., PERMUTATION]
    return groups.reshape(stored.shape).view(torch.float8_e4m3fn)


@dataclass
class Call:
    """Arguments of a call, and the tensors behind the addresses."""

    arguments: Arguments
    out: Tensor
    lse: Tensor | None
    guarded: Tensor  # out and what lies around it
    keep: list[Tensor] = field(default_factory=list)

    def check_guard(self) -> None:
        outside = torch.cat([self.guarded[:64].flatten(), self.guarded[-64:].flatten()])
        assert (outside == 7).all(), "memory around the result was written"


def prepare(case: Case, inputs: Inputs, *, lse: bool = True, device: str = "cpu") -> Call:
    q, k = strided(inputs.q.to(device), case.layout, 0), strided(inputs.k.to(device), case.layout, 1)
    rest = [surround(x.to(device)) for x in (inputs.q_scale, inputs.k_scale, store_values(inputs.v8))]
    rest += [surround(x.to(device)) for x in (inputs.v_scale, inputs.v_center)]
    rows = case.B * case.L * case.N
    guarded = torch.full((rows + 128, K), 7.0, dtype=case.out, device=device)
    out = guarded[64 : 64 + rows].view(case.B, case.L, case.N, K)
    out.fill_(math.nan)
    sums = torch.full((case.B, case.N, case.L), 12345.0, device=device) if lse else None
    shape = Shape(case.B, case.L, case.S, case.N, K, q.stride()[:2], k.stride()[:2])
    arguments = Arguments(shape, list(SCORES).index(case.scores), DTYPES.index(case.out), case.skip)
    arguments.q, arguments.k = q.data_ptr(), k.data_ptr()
    for name, tensor in zip(["q_scale", "k_scale", "v", "v_scale", "v_center"], rest, strict=True):
        setattr(arguments, name, tensor.data_ptr())
    arguments.out, arguments.lse = out.data_ptr(), None if sums is None else sums.data_ptr()
    return Call(arguments, out, sums, guarded, [q, k, *rest])


class Emulation:
    """attention_sm90.cu compiled by g++, running on the host."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("attend", "plan"):
            getattr(self.library, name).restype = ctypes.c_char_p

    @staticmethod
    def raise_for(message: str) -> None:
        if message.startswith("ValueError: "):
            raise ValueError(message.removeprefix("ValueError: "))
        if message:
            raise RuntimeError(message)

    def attend(self, call: Call, *, device: int = 0, seed: int = 0) -> None:
        self.raise_for(self.library.attend(ctypes.byref(call.arguments), device, seed).decode())

    def plan(self, shape: Shape) -> Launch:
        launch = Launch()
        self.raise_for(self.library.plan(ctypes.byref(shape), ctypes.byref(launch)).decode())
        return launch

    def counts(self) -> list[int]:
        """Products of int8, of e4m3 from shared memory, from registers, and copies, since the last call of this."""
        counts = (ctypes.c_int64 * 4)()
        self.library.take_counts(counts)
        return list(counts)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    build = tmp_path_factory.mktemp("emulated_sm90")
    for source in ("csrc/attention_sm90.cu", "csrc/ops.h", "tests/emulated_sm90.h", "tests/emulated_sm90.cpp"):
        shutil.copy(ROOT / source, build)
    for header in ("cuda.h", "cuda_runtime_api.h", "sm90.cuh"):
        (build / header).write_text('#include "emulated_sm90.h"\n')
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
    library = build / "attention_sm90.so"
    command = [compiler, *flags, f"-I{build}", str(build / "emulated_sm90.cpp"), "-o", str(library)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return Emulation(library)


def check(case: Case, inputs: Inputs, call: Call) -> None:
    """Right within twice the error that rounding the probabilities costs, all of it written and nothing else."""
    expected, sums = exact(inputs)
    inherent = (rounded(inputs) - expected).abs().amax()
    error = (call.out.cpu().double() - expected).abs()
    ulp = torch.finfo(case.out).eps * expected.abs() + 1e-5 * (1 + expected.abs().amax())
    assert (error <= 2 * inherent + ulp).all(), f"error {error.amax():.3g}, inherent {inherent:.3g}"
    # the largest error may hide a small systematic one
    mean, inherent_mean = error.mean(), (rounded(inputs) - expected).abs().mean()
    assert mean <= 1.25 * inherent_mean + ulp.mean(), f"mean error {mean:.3g}, inherent {inherent_mean:.3g}"
    if call.lse is not None:
        torch.testing.assert_close(call.lse.cpu().double(), sums, rtol=2e-6, atol=2e-5)
    call.check_guard()


@pytest.mark.parametrize("eight", SCORES, ids=SCORES.get)
@pytest.mark.parametrize("keys", ["", "rising"])
def test_the_operator_calls_it_as_it_expects(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch, eight: torch.dtype, keys: str
) -> None:
    """attention_8bit with the emulated kernel for the extension: addresses, order of tokens, settings."""
    module = importlib.import_module("wan_fast.kernels.attention_8bit")
    bound = (ROOT / "csrc/module.cpp").read_text().split('m.def("attention_sm90",')[1].split("m.def(")[0]
    names = re.findall(r'py::arg\("(\w+)"\)', bound)

    def attention_sm90(**given: Any) -> None:
        assert sorted(given) == sorted(names)
        assert (given["device"], given["stream"]) == (None, 7)
        shape = Shape(*(given[name] for name in "BLSNK"), given["q_strides"], given["k_strides"])
        out_dtype = DTYPES.index(getattr(torch, given["out_dtype"]))
        arguments = Arguments(shape, [*SCORES.values()].index(given["scores"]), out_dtype, given["skip"])
        for name in ADDRESSES:
            setattr(arguments, name, given[name] or None)
        emulation.attend(Call(arguments, torch.empty(0), None, torch.empty(0)))

    monkeypatch.setattr(module, "cuda_extension", lambda device: SimpleNamespace(attention_sm90=attention_sm90))
    monkeypatch.setattr(module, "_capability", lambda x: 90)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    kernel = KERNELS["attention_8bit"]
    for lse, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        args = Attend(70, 300, B=2, K=128, interleaved=True, lse=lse, keys=keys).inputs(eight, dtype)
        wanted, baseline = run(kernel, kernel.reference, in_fp64(args)), run(kernel, kernel.reference, args)
        for result in zip(run(kernel, kernel.launch, args), wanted, baseline, strict=True):
            assert_as_accurate(*result, factor=8)  # it sums the last tile first
    for capability in (89, 100):
        monkeypatch.setattr(module, "_capability", lambda x, capability=capability: capability)
        with pytest.raises(RuntimeError, match=rf"compute capability 9\.0: this is {capability / 10}"):
            kernel.launch(*args)


def identify(case: Case) -> str:
    default = Case(case.L, case.S)
    rest = {name: value for name, value in vars(case).items() if name not in "LS" and value != getattr(default, name)}
    return "-".join([f"L{case.L}", f"S{case.S}", *(f"{name}{str(value).split('.')[-1]}" for name, value in rest.items())])


def matrix() -> list[Case]:
    """Every length with every number of keys, options taking turns; then batches and layouts."""
    cases = [Case(L, S) for L in (1, 64, 127, 128, 129, 200) for S in (1, 16, 63, 64, 128, 129, 257, 512)]
    cases = [
        replace(case, scores=list(SCORES)[(i + i // 8) % 2], out=DTYPES[i % 3], seed=i, spread=(0.5, 2.0, 4.0)[i // 8 % 3])
        for i, case in enumerate(cases)
    ]
    for scores in SCORES:
        cases += [Case(129, 129, 2, 3, scores, layout=layout, seed=50) for layout in ("separate", "packed", "joined")]
        # more tiles than stages, twice; an odd head in the middle of a batch
        cases += [Case(70, 1170, 1, 2, scores, torch.bfloat16, "joined", seed=51)]
    return cases


# --- the emulation itself


def test_emulated_rounding(emulation: Emulation) -> None:
    """The emulated conversions are PyTorch's, and saturate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-12, 10, (4000,), generator=generator))
    halves = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([x, (halves[1:] + halves[:-1]) / 2, halves, torch.tensor([464.0, 1e9, -1e9, math.inf, math.nan])])
    x = x[: len(x) // 4 * 4].contiguous()
    got = [emulation.library.pack(ctypes.c_void_p(x[i:].data_ptr())) & 0xFFFFFFFF for i in range(0, len(x), 4)]
    bytes_ = torch.tensor([word >> shift & 255 for word in got for shift in (0, 8, 16, 24)], dtype=torch.uint8)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(bytes_.view(torch.float8_e4m3fn).float().nan_to_num(9999), expected.float().nan_to_num(9999))
    for bfloat16, dtype in ((1, torch.bfloat16), (0, torch.float16)):
        pairs = x[:400].view(-1, 2)
        words = [emulation.library.pack_16(ctypes.c_void_p(pair.data_ptr()), bfloat16) & 0xFFFFFFFF for pair in pairs]
        expected = pairs.to(dtype).view(torch.int16).int() & 0xFFFF
        assert words == [low | high << 16 for low, high in expected.tolist()]


# --- results


@pytest.mark.parametrize("case", matrix(), ids=identify)
def test_is_attention(emulation: Emulation, case: Case) -> None:
    inputs = make(case)
    call = prepare(case, inputs, lse=case.seed % 2 == 0)
    emulation.attend(call, seed=case.seed)
    check(case, inputs, call)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_threads_gives_the_same(emulation: Emulation, seed: int) -> None:
    case = Case(100, 900, scores=list(SCORES)[seed % 2])
    inputs = make(case)
    calls = [prepare(case, inputs) for _ in range(2)]
    for call, order in zip(calls, (100 + seed, 200 + seed), strict=True):
        emulation.attend(call, seed=order)
    assert torch.equal(calls[0].out, calls[1].out)
    check(case, inputs, calls[0])


@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_equal_keys_average_the_values(emulation: Emulation, scores: torch.dtype) -> None:
    case = Case(66, 190, scores=scores)
    inputs = make(case)
    inputs.k[:] = inputs.k[:, :1]
    inputs.k_scale[:] = inputs.k_scale[..., :1]
    call = prepare(case, inputs)
    emulation.attend(call)
    mean = inputs.v8.double().mean(1) * inputs.v_scale + inputs.v_center
    torch.testing.assert_close(call.out.double(), mean[:, None].expand(call.out.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", [0, 15, 127, 128, 255, 299])
@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_dominating_key_is_the_result(emulation: Emulation, key: int, scores: torch.dtype) -> None:
    """Whichever tile it is in: what came before is scaled away."""
    case = Case(20, 300, scores=scores)
    inputs = make(case)
    inputs.q[:] = inputs.q[:, :1]
    inputs.k[:, key] = inputs.q[:, 0]
    inputs.k_scale[..., key] = 0.2  # a score of about 150: all others vanish, and fp32 still has the digits
    call = prepare(case, inputs)
    emulation.attend(call)
    value = inputs.v8[:, key].double() * inputs.v_scale + inputs.v_center
    torch.testing.assert_close(call.out.double(), value[:, None].expand(call.out.shape), rtol=1e-4, atol=1e-4)
    call.check_guard()


@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_small_weights_add_up(emulation: Emulation, scores: torch.dtype) -> None:
    """Of 2^-14 of the largest, which e4m3 only holds if the largest is 448."""
    case = Case(4, 700, scores=scores)
    inputs = make(case)
    inputs.q[:], inputs.k[:] = inputs.q[:, :1], inputs.q[:, :1]
    inputs.q_scale[:], inputs.k_scale[:] = 1.0, 1.0
    inputs.k_scale /= log2_scores(inputs)[0, 0, 0, 0].item()
    inputs.k_scale *= torch.where(torch.arange(700) == 300, 20.0, 6.0)
    call = prepare(case, inputs)
    emulation.attend(call)
    check(case, inputs, call)


def test_largest_sums_are_exact(emulation: Emulation) -> None:
    """Rows of 127 and of -127: sums of 127 127 128, of either sign."""
    case = Case(3, 40, spread=0.0)
    inputs = make(case)
    inputs.q[:] = torch.tensor([127, -127, 1], dtype=torch.int8).view(1, 3, 1, 1)
    inputs.k[:] = torch.where(torch.arange(40) % 2 == 0, 127, -127).to(torch.int8).view(1, 40, 1, 1)
    inputs.q_scale[:], inputs.k_scale[:] = 1e-3, torch.linspace(1e-3, 1.1e-3, 40)
    call = prepare(case, inputs)
    emulation.attend(call)
    check(case, inputs, call)


@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_row_of_zeros_with_scale_zero_averages_the_values(emulation: Emulation, scores: torch.dtype) -> None:
    case = Case(65, 131, scores=scores)
    inputs = make(case)
    for row in (3, 64):
        inputs.q[:, row] = 0
        inputs.q_scale[..., row] = 0
    call = prepare(case, inputs)
    emulation.attend(call)
    check(case, inputs, call)


# --- not a number


@pytest.mark.parametrize("skip", [-math.inf, -4.0], ids=["never-skips", "skips"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_bad_scale_of_a_key_spoils_its_head_only(emulation: Emulation, value: float, scores: torch.dtype, skip: float) -> None:
    for key in (5, 170):
        case = Case(67, 200, N=2, scores=scores, skip=skip)
        inputs = make(case)
        good = prepare(case, inputs)
        emulation.attend(good)
        inputs.k_scale[0, 1, key] = value
        call = prepare(case, inputs)
        emulation.attend(call)
        assert not call.out[:, :, 1].isfinite().any()
        assert call.lse is not None and not call.lse[:, 1].isfinite().any()
        assert torch.equal(call.out[:, :, 0], good.out[:, :, 0])


def test_bad_scales_of_queries_and_values_spoil_theirs_only(emulation: Emulation) -> None:
    case = Case(130, 140)
    inputs = make(case)
    inputs.q_scale[0, 0, 129] = math.nan
    inputs.q_scale[0, 0, 7] = math.inf
    inputs.v_scale[0, 0, 33] = math.nan
    inputs.v_center[0, 0, 100] = math.nan
    call = prepare(case, inputs)
    emulation.attend(call)
    bad = torch.zeros(130, K, dtype=torch.bool)
    bad[[7, 129]] = True
    bad[:, [33, 100]] = True
    assert torch.equal(~call.out[0, :, 0].isfinite(), bad)


# --- skipping tiles


def test_skips_the_tiles_it_should(emulation: Emulation) -> None:
    """Left out where every row of a warpgroup can do without, counted by the products with v that remain."""
    case = Case(100, 900, N=2, skip=-6.0)
    inputs = make(case)
    # tiles of small scores, except that one key of one tile matters to one row of the second warpgroup
    inputs.q_scale[:] *= 4
    inputs.k_scale[..., 128:384] *= 1e-3
    inputs.k_scale[..., 640:768] *= 1e-3
    inputs.k[:, 700, 0] = inputs.q[:, 90, 0]
    inputs.k_scale[0, 0, 700] = 1.0
    expected = skipping(inputs, case.skip)
    warpgroup_tiles = 2 * 2 * 8
    assert 0 < expected.products < warpgroup_tiles - 8
    call = prepare(case, inputs)
    emulation.counts()
    emulation.attend(call)
    int8, _, products, _ = emulation.counts()
    assert int8 == 4 * warpgroup_tiles
    assert products == 4 * expected.products
    inherent = (rounded(inputs) - exact(inputs)[0]).abs().amax()
    assert (call.out.double() - expected.out).abs().amax() <= 2 * inherent + 1e-5
    call.check_guard()


@pytest.mark.parametrize("scores", SCORES, ids=SCORES.values())
def test_a_low_threshold_changes_nothing(emulation: Emulation, scores: torch.dtype) -> None:
    case = Case(130, 400, scores=scores)
    inputs = make(case)
    calls = [prepare(replace(case, skip=skip), inputs) for skip in (-math.inf, -1000.0)]
    for call in calls:
        emulation.attend(call)
    assert torch.equal(calls[0].out, calls[1].out)
    assert calls[0].lse is not None and calls[1].lse is not None
    assert torch.equal(calls[0].lse, calls[1].lse)


# --- what is launched, and refused


def test_launch(emulation: Emulation) -> None:
    L, S, N = 32760, 32759, 40
    shape = Shape(2, L, S, N, K, (L * N * K * 3, N * K * 3), (N * K, 2 * N * K))
    launch = emulation.plan(shape)
    assert list(launch.grid) == [256, 40, 2]
    assert (launch.threads, launch.shared_bytes) == (384, 16384 * 9 + 4 * 1024 + 1024 + 1024)
    assert launch.shared_bytes <= 227 * 1024
    assert list(launch.q.dims) == [K, N, L, 2]
    assert list(launch.q.strides) == [K, N * K * 3, L * N * K * 3]
    assert list(launch.q.box) == [K, 1, 128, 1]
    assert list(launch.k.dims) == [K, N, S, 2]
    assert list(launch.k.strides) == [K, 2 * N * K, N * K]
    assert list(launch.v.dims) == [32768, K, N, 2]
    assert list(launch.v.strides) == [32768, 32768 * K, 32768 * K * N]


REFUSED = [
    ("head width", {"K": 64}, "the head width K is 64; allowed: 128"),
    ("no keys", {"S": 0}, "S is 0; allowed: 1 to"),
    ("too many keys", {"S": 2**31}, "S is 2147483648; allowed: 1 to"),
    ("too many queries", {"L": 2**31 - 100}, "L is 2147483548; allowed: 0 to"),
    ("too many heads", {"N": 65536}, "N is 65536; allowed: 0 to 65535"),
    ("negative batch", {"B": -1}, "B is -1; allowed: 0 to"),
    ("token stride of q", {"q_strides": (4096, 24)}, "the token stride of q is 24; allowed: positive multiples of 16"),
    ("batch stride of k", {"k_strides": (0, 256)}, "the batch stride of k is 0; allowed: positive multiples of 16"),
    ("huge stride", {"k_strides": (2**40, 256)}, "the batch stride of k is 1099511627776; .* below 2\\^40"),
]


@pytest.mark.parametrize("change, message", [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_refuses_shapes(emulation: Emulation, change: dict[str, Any], message: str) -> None:
    shape = Shape(2, 8, 8, 2, K, (8 * 256, 256), (8 * 256, 256))
    emulation.plan(shape)
    for name, value in change.items():
        setattr(shape, name, value)
    with pytest.raises(ValueError, match=message):
        emulation.plan(shape)


def test_strides_of_one_element_do_not_matter(emulation: Emulation) -> None:
    launch = emulation.plan(Shape(1, 1, 5, 3, K, (7, 7), (7, 3 * K)))
    assert list(launch.q.strides) == [K, 3 * K, 3 * K]
    assert list(launch.k.strides) == [K, 3 * K, 5 * 3 * K]


def test_refuses_addresses_thresholds_and_devices(emulation: Emulation) -> None:
    case = Case(8, 8)
    inputs = make(case)
    for name in ADDRESSES[:-1]:
        call = prepare(case, inputs)
        setattr(call.arguments, name, None)
        with pytest.raises(ValueError, match=f"attention_sm90: {name} is a null address"):
            emulation.attend(call)
    for name, alignment in {"q": 16, "k": 16, "v": 16, "v_scale": 16, "v_center": 16, "out": 16, "q_scale": 4}.items():
        call = prepare(case, inputs)
        setattr(call.arguments, name, getattr(call.arguments, name) + alignment // 2)
        with pytest.raises(ValueError, match=f"{name} is not aligned to {alignment} bytes"):
            emulation.attend(call)
    for skip in (0.5, math.nan):
        with pytest.raises(ValueError, match=r"skip is .*; allowed: 0 or less"):
            emulation.attend(prepare(replace(case, skip=skip), inputs))
    call = prepare(case, inputs)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulation.attend(call, device=3)
    emulation.library.set_capability(10, 0)
    try:
        with pytest.raises(ValueError, match=r"compute capability 10\.0; allowed: 9\.0"):
            emulation.attend(call)
    finally:
        emulation.library.set_capability(9, 0)
    assert call.out.isnan().all()


@pytest.mark.parametrize("size", ["B", "L", "N"])
def test_nothing_to_compute(emulation: Emulation, size: str) -> None:
    shape = Shape(2, 8, 8, 2, K, (2048, 256), (2048, 256))
    setattr(shape, size, 0)
    launch = emulation.plan(shape)
    assert (list(launch.grid), launch.threads) == ([0, 0, 0], 0)
    emulation.attend(Call(Arguments(shape), torch.empty(0), None, torch.empty(0)), device=3)


# --- what it compiles to


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """What ptxas says of the kernels for sm_90a, and their disassembly by the template arguments (int8, skip)."""
    nvcc = shutil.which("nvcc")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if nvcc is None or found is None:
        pytest.skip("there is no nvcc or no cuobjdump")
    cubin = tmp_path_factory.mktemp("sm90a") / "attention_sm90.cubin"
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command = [nvcc, *flags, str(ROOT / "csrc" / "attention_sm90.cu"), "-o", str(cubin)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    sass = subprocess.run([found, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    functions = re.split(r"\bFunction : ", sass)[1:]
    return done.stdout, {"".join(re.findall(r"Lb([01])E", body.splitlines()[0])): body for body in functions}


def test_compiles_without_spills_or_serialised_products(compiled: tuple[str, dict[str, str]]) -> None:
    report, _ = compiled
    assert report.count("0 bytes spill stores, 0 bytes spill loads") == 4
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}, "384 threads of a block have 168 each"
    assert "serialized" not in report, "the products wait for each other"


@pytest.mark.parametrize("int8, skip", ["00", "01", "10", "11"], ids=["e4m3", "e4m3-skip", "int8", "int8-skip"])
def test_code_is_what_was_meant(compiled: tuple[str, dict[str, str]], int8: str, skip: str) -> None:
    body = compiled[1][int8 + skip]
    counts = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", body, re.MULTILINE))
    # four steps of 32, for the first tile and in the loop; of the products in the loop and for the last tile
    assert (counts["IGMMA"], counts["QGMMA"]) == ((8, 8) if int8 == "1" else (0, 16))
    assert counts["UTMALDG"] == 3, "q, k and v"
    assert counts["LDL"] + counts["STL"] == 0, "spills"
    assert counts["LDGSTS"] + counts["STS"] > 0, "scales"
    assert counts["FFMA"] >= 2 * 64 + 2 * 64, "the exponents' arguments, and tiles of products added in fp32"
    assert counts["FADD"] >= 2 * 64, "sums of probabilities"
    assert counts["MUFU"] >= 2 * 64
    assert counts["I2F"] + counts["F2I"] == 0, "sums are read as floats"
    sizes = [int(size, 16) for size in re.findall(r"USETMAXREG\S*\s+(?:UP\d, )?(0x\w+)", body)]
    assert sorted(sizes) == [24, 240]
    assert 128 * 24 + 256 * 240 <= 384 * 168


# --- the extension


@pytest.fixture(scope="module")
def extension() -> Any:
    try:
        return importlib.import_module("wan_fast._cuda")
    except ImportError as error:
        pytest.skip(f"wan_fast._cuda is not here: {error}")


def keywords(call: Call, case: Case) -> dict[str, Any]:
    arguments, shape = call.arguments, call.arguments.shape
    addresses = {name: getattr(arguments, name) or 0 for name in ADDRESSES}
    sizes = {name: getattr(shape, name) for name in "BLSNK"}
    names = {"scores": SCORES[case.scores], "out_dtype": str(case.out).split(".")[-1]}
    strides = {"q_strides": tuple(shape.q_strides), "k_strides": tuple(shape.k_strides)}
    return addresses | sizes | names | strides | {"skip": case.skip, "device": 0, "stream": 0}


def test_extension_describes_the_launch(extension: Any, emulation: Emulation) -> None:
    shape = Shape(2, 300, 70, 5, K, (300 * 5 * K, 5 * K), (70 * 5 * K, 5 * K))
    plan = emulation.plan(shape)
    launch = extension.attention_sm90_launch(2, 300, 70, 5, K, tuple(shape.q_strides), tuple(shape.k_strides))
    assert launch["grid"] == list(plan.grid) == [3, 5, 2]
    assert (launch["threads"], launch["shared_bytes"]) == (plan.threads, plan.shared_bytes)
    for name in "qkv":
        boxes = getattr(plan, name)
        assert launch[name] == {part: list(getattr(boxes, part)) for part in ("dims", "strides", "box")}


def test_extension_refuses(extension: Any) -> None:
    case = Case(8, 8)
    given = keywords(prepare(case, make(case)), case)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"K": 64}, "the head width K is 64; allowed: 128"),
        ({"scores": "int4"}, 'scores is "int4"; allowed: int8, float8_e4m3fn'),
        ({"out_dtype": "float64"}, 'dtype is "float64"; allowed: float32, bfloat16, float16'),
        ({"v": 0}, "v is a null address"),
        ({"k": given["k"] + 8}, "k is not aligned to 16 bytes"),
        ({"skip": 1.0}, "skip is 1.0+; allowed: 0 or less"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            extension.attention_sm90(**(given | change))
    assert extension.attention_sm90(**(given | {"L": 0, "q": 0, "out": 0})) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_extension_says_why_it_cannot_run(extension: Any) -> None:
    case = Case(8, 8)
    assert re.search("CUDA|device", extension.attention_sm90_unusable(0))
    with pytest.raises(RuntimeError, match=r"attention_sm90: .*(CUDA|device)"):
        extension.attention_sm90(**keywords(prepare(case, make(case)), case))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of capability 9.0"
)
@pytest.mark.parametrize("case", [*matrix()[-8:], Case(1000, 5000, 2, 3, seed=9)], ids=identify)
def test_is_attention_on_a_gpu(extension: Any, case: Case) -> None:
    assert extension.attention_sm90_unusable(0) == ""
    inputs = make(case)
    call = prepare(case, inputs, device="cuda")
    extension.attention_sm90(**keywords(call, case))
    torch.cuda.synchronize()
    check(case, inputs, call)
