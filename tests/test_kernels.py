"""What every operator keeps, on the inputs of kernel_cases.py.

The kernels run on a GPU where there is one, and in Triton's interpreter otherwise; only in that case a kernel sees CPU
tensors. TRITON_INTERPRET must be set before Triton is imported, so the interpreter runs in a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from background import Background
from kernel_cases import CASES, DTYPES, FP8, REAL_CASES, Case, RealCase, arguments, dtypes_of, in_fp64, run
from numerics import assert_as_accurate
from torch import Tensor
from torch.nn import functional as F

from wan_fast import kernels
from wan_fast.kernels import KERNELS

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import mend

    mend()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS = [pytest.param(case, dtype, id=f"{case.op}-{case.id}-{dtype}") for case in CASES for dtype in case.dtypes]

each_op = pytest.mark.parametrize("name", sorted(KERNELS))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.id}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In deterministic mode torch.empty returns NaN, or the largest integer: a value that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def first_case(name: str) -> Case:
    return next(case for case in CASES if case.op == name)


@each_op
def test_every_operator_has_cases(name: str) -> None:
    assert any(case.op == name for case in CASES), f"add rows for {name} to CASES in kernel_cases.py"
    assert any(case.op == name for case in REAL_CASES), f"add rows for {name} to REAL_CASES in kernel_cases.py"


def capability() -> int:
    """Of the GPU: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: test_in_the_interpreter runs it")
@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_kernel_is_as_accurate_as_the_reference(case: Case | RealCase, dtype: torch.dtype) -> None:
    kernel = KERNELS[case.op]
    args = arguments(case, dtype, DEVICE)
    if DEVICE == "cuda" and FP8 in dtypes_of(args) and capability() < 89:
        pytest.skip("e4m3 is there from compute capability 8.9 on")
    exact, baseline = run(kernel, kernel.reference, in_fp64(args)), run(kernel, kernel.reference, args)
    for result in zip(run(kernel, kernel.launch, args), exact, baseline, strict=True):
        assert_as_accurate(*result)


_TILES_OF_64 = ("int8-tail1", "int8-tail63", "int8-offset", "fp8-skip", "fp8-text512", "int8-wide-values")


@pytest.mark.parametrize("name", ["keys_center", "qk_norm_rope", "qk_norm_rope_quantized"])
def test_a_table_by_token_of_a_grid_turns_as_the_grid_does(name: str) -> None:
    """Reference and, on a GPU or in the interpreter, kernel: bit for bit."""
    kernel, (T, H, W), K, offset = KERNELS[name], (3, 4, 5), 24, 7
    x, weight = torch.randn(2, T * H * W - offset, 3, 2 * K, device=DEVICE), torch.randn(2, 2 * K, device=DEVICE)
    center, dtype = ([torch.randn(2, 2, K, device=DEVICE)], [torch.int8]) if name == "qk_norm_rope_quantized" else ([], [])
    places = torch.cartesian_prod(torch.arange(T), torch.arange(H), torch.arange(W))
    by_grid, by_token = kernels.rope_table(5, K, DEVICE), kernels.rope_table_of(places, K, DEVICE)
    settings = offset, 2, 1e-6, *dtype
    for body in [kernel.reference, kernel.launch][: 2 if DEVICE == "cuda" or INTERPRETED else 1]:
        expected = run(kernel, body, (x, weight, by_grid, *center, (T, H, W), *settings))
        for result, wanted in zip(run(kernel, body, (x, weight, by_token, *center, (), *settings)), expected, strict=True):
            assert torch.equal(result, wanted)


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
@pytest.mark.parametrize("id", _TILES_OF_64)
def test_kernel_is_as_accurate_as_the_reference_on_ada(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in tiles of 64 keys and without descriptors, as before Hopper and on cards for games."""
    monkeypatch.setattr(importlib.import_module("wan_fast.kernels.attention_8bit"), "_capability", lambda q: 89)
    case = next(case for case in CASES if case.op == "attention_8bit" and case.id == id)
    test_kernel_is_as_accurate_as_the_reference(case, torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: real shapes are compiled, not run")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: f"{case.op}-{case.id}")
def test_kernel_is_accurate_at_real_shapes(case: RealCase, dtype: torch.dtype) -> None:
    if capability() < case.since:
        pytest.skip(f"compute capability {case.since / 10} has these dtypes")
    test_kernel_is_as_accurate_as_the_reference(case, dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: references have no addresses of their own")
@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln", "gelu_tanh", "qk_norm_rope"])
def test_addresses_beyond_32_bits(name: str) -> None:
    """The last tokens of more than 2^31 elements come out as they do alone."""
    L, D = 720_000, 3072

    def clip(seed: int) -> Tensor:
        return (
            torch.randn(4, D, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16).repeat(L // 4, 1)[None]
        )

    rows = [torch.randn(1, 2, D, device=DEVICE) for _ in range(3)]
    x, y = clip(0), clip(1)
    if name == "adaln_modulate":
        tail = kernels.adaln_modulate(x[:, -4:], *rows[:2], split=2)
        results = [(kernels.adaln_modulate(x, *rows[:2], split=L - 2)[:, -4:], tail)]
    elif name == "gated_residual_adaln":
        part = x[:, -4:].clone()
        tail = kernels.gated_residual_adaln(part, y[:, -4:], *rows, split=2)
        results = [(kernels.gated_residual_adaln(x, y, *rows, split=L - 2)[:, -4:], tail), (x[:, -4:], part)]
    elif name == "gelu_tanh":
        part = x[:, -4:].clone()
        kernels.gelu_tanh(part)
        kernels.gelu_tanh(x)
        results = [(x[:, -4:], part)]
    else:
        x, grid, table = x.view(1, L // 3, 3, D), (L // 12, 2, 2), kernels.rope_table(L // 12, 32, DEVICE)
        part, weight, settings = x[:, -4:].clone(), rows[0][0].contiguous(), {"grid": grid, "heads": D // 32}
        kernels.qk_norm_rope(part, weight, table, offset=L // 3 - 4, **settings)
        kernels.qk_norm_rope(x, weight, table, **settings)
        results = [(x[:, -4:], part)]
    for result, expected in results:
        assert torch.equal(result, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: references have no addresses of their own")
@pytest.mark.parametrize("name", ["causal_conv3d", "causal_conv3d_add", "frames_to_uint8", "rms_norm_silu", "rms_norm_silu_"])
def test_addresses_of_frames_beyond_32_bits(name: str, num_frames: int = 60, height: int = 480, width: int = 832) -> None:
    """The last frame of more than 2^31 elements comes out as it does alone."""

    def frames() -> Tensor:
        few = torch.randn(3, height, width, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
        return few.repeat(num_frames // 3, 1, 1, 1).permute(0, 3, 1, 2)

    x = frames()
    last, earlier = x[-1:].clone(memory_format=torch.channels_last), x[-3:-1].clone(memory_format=torch.channels_last)
    weight = kernels.conv_weight(torch.randn(96, 96, 3, 3, 3).mul_(0.02)).to(DEVICE, torch.bfloat16)
    bias, gamma = torch.randn(96).to(DEVICE, torch.bfloat16), torch.randn(96).to(DEVICE, torch.bfloat16)
    if name == "causal_conv3d":
        results = [
            (kernels.causal_conv3d(x, None, weight, bias)[0][-1:], kernels.causal_conv3d(last, earlier, weight, bias)[0])
        ]
    elif name == "causal_conv3d_add":
        out, part = frames(), last.clone(memory_format=torch.channels_last)
        kernels.causal_conv3d_add(out, x, None, weight, bias)
        kernels.causal_conv3d_add(part, last, earlier, weight, bias)
        results = [(out[-1:], part)]
    elif name == "rms_norm_silu":
        results = [(kernels.rms_norm_silu(x, gamma)[-1:], kernels.rms_norm_silu(last, gamma))]
    elif name == "rms_norm_silu_":
        kernels.rms_norm_silu_(x, gamma)
        kernels.rms_norm_silu_(last, gamma)
        results = [(x[-1:], last)]
    else:
        as_patches = [t.permute(0, 2, 3, 1).unflatten(3, (8, 12)).flatten(2, 3).permute(0, 3, 1, 2) for t in (x, last)]
        results = [(kernels.frames_to_uint8(as_patches[0])[-1:], kernels.frames_to_uint8(as_patches[1]))]
    for result, expected in results:
        assert torch.equal(result, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: references have no addresses of their own")
def test_addresses_of_attention_beyond_32_bits(L: int = 240_000, heads: int = 24, K: int = 128) -> None:
    """The last tokens of more than 2^31 elements count as they do alone."""
    D = heads * K
    few = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    x, weight = few.repeat(L // 4, 1, 1)[None], torch.ones(2, D, device=DEVICE)
    table, grid = kernels.rope_table(L // 4, K, DEVICE), (L // 4, 2, 2)
    settings: dict[str, Any] = {"grid": grid, "heads": heads}
    center = kernels.keys_center(x, weight, table, **settings)
    expected = KERNELS["keys_center"].reference(x, weight, table, grid, 0, heads, 1e-6)  # of a sample
    torch.testing.assert_close(center, expected, rtol=1e-3, atol=1e-3)
    for dtype in (torch.int8, FP8) if DEVICE == "cpu" or capability() >= 89 else (torch.int8,):
        whole = kernels.qk_norm_rope_quantized(x, weight, table, center, **settings, dtype=dtype)
        part = kernels.qk_norm_rope_quantized(x[:, -4:], weight, table, center, offset=L - 4, **settings, dtype=dtype)
        assert torch.equal(whole.values[:, :, -4:].float(), part.values.float())
        assert torch.equal(whole.scale[..., -4:], part.scale)
        # all keys but the last four are zero, which is 2^-200 and less of the largest weight
        q, k = part.values[0], torch.zeros_like(whole.values[1])
        k[:, -4:] = q
        ones, of_keys = torch.full((1, heads, 4), 10.0, device=DEVICE), torch.ones(1, heads, L, device=DEVICE)
        v = x[:, :, 2].unflatten(-1, (heads, K))
        values = [(v, None, None)] if dtype == torch.int8 else []
        if DEVICE == "cpu" or capability() >= 89:
            values.append(tuple(kernels.quantize_values(v)))
        for those in values:
            alone = those[0][..., -4:] if those[1] is not None else those[0][:, -4:]
            alone = F.pad(alone.view(torch.uint8), (0, 12)).view(FP8) if those[1] is not None else alone
            result, _ = kernels.attention_8bit(q, ones, k, of_keys, *those, dtype=torch.float32)
            last = k[:, -4:].contiguous(), of_keys[..., -4:].contiguous()
            expected, _ = kernels.attention_8bit(q, ones, *last, alone, *those[1:], dtype=torch.float32)
            torch.testing.assert_close(result, expected)


@pytest.mark.skipif(INTERPRETED, reason="of no kernel")
@pytest.mark.parametrize("id", ["fp8-tiles", "fp8-fixed-tiles"])
def test_cublas_computes_the_same(id: str) -> None:
    """torch._scaled_mm as the launcher calls it; on a CPU PyTorch has it too, from 2.13 on."""
    module = importlib.import_module("wan_fast.kernels.gemm_8bit")
    args = arguments(next(case for case in CASES if case.id == id), torch.bfloat16, DEVICE)
    operands, dtype = args[:4], args[-1]
    assert module._cublas_takes(100, *operands, dtype) and not module._cublas_takes(90, *operands, dtype)
    assert not module._cublas_takes(100, *operands, torch.float32)
    assert not module._cublas_takes(100, operands[0][..., :77], *operands[1:2], operands[2][:, :77], operands[3], dtype)
    if DEVICE == "cpu" and torch.__version__ < "2.13":
        pytest.skip("torch._scaled_mm has no scales per row on a CPU before 2.13")
    if DEVICE == "cuda" and capability() < 89:
        pytest.skip("e4m3 is there from compute capability 8.9 on")
    kernel = KERNELS["gemm_8bit"]
    assert_as_accurate(module._by_cublas(*args), kernel.reference(*in_fp64(args)), kernel.reference(*args))


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.background("interpreter")
def test_in_the_interpreter(background: Background) -> None:
    output = background.output("interpreter")
    assert re.search(rf"\b{len(RUNS) + len(_TILES_OF_64)} passed", output), output[-1000:]


def form(value: object) -> object:
    """What a trace with symbolic sizes depends on."""
    if isinstance(value, Tensor):
        return value.dtype, value.is_contiguous(), tuple(min(size, 1) for size in value.shape)
    return type(value) if type(value) in (int, float) else value


@pytest.fixture(scope="module")
def traced() -> set[str]:
    """Operators with the forms of arguments that were traced."""
    return set()


@each_case
def test_operator_keeps_the_dispatcher_rules(case: Case, traced: set[str]) -> None:
    args = arguments(case, torch.float32, DEVICE)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not case.id.endswith("nan"):  # it takes NaN for another value than NaN
        if (forms := f"{case.op} {[form(arg) for arg in args]}") not in traced:
            checks.append("test_aot_dispatch_dynamic")
        traced.add(forms)
    if FP8 in dtypes_of(args):
        # it compares tensors, which PyTorch cannot in e4m3; the same operator's case in int8 is checked
        checks.remove("test_schema")
        assert any(other.op == case.op and "int8" in other.id for other in CASES)
    torch.library.opcheck(KERNELS[case.op].op, args, test_utils=checks)


@each_case
def test_shape_function_agrees(case: Case) -> None:
    kernel = KERNELS[case.op]
    real, meta = (run(kernel, kernel.op, arguments(case, torch.bfloat16, device)) for device in (DEVICE, "meta"))
    assert [(t.shape, t.dtype, t.stride()) for t in meta] == [(t.shape, t.dtype, t.stride()) for t in real]


@each_op
def test_public_function_compiles_whole(name: str) -> None:
    kernel, args = KERNELS[name], arguments(first_case(name), torch.bfloat16, DEVICE)
    torch._dynamo.reset()  # else it counts the operators as recompilations of one function
    function = getattr(kernels, name)
    names, taken = inspect.signature(kernel.reference).parameters, inspect.signature(function).parameters

    def public(*args: Any) -> Any:
        # without the results that the function allocates itself
        return function(**{name: arg for name, arg in zip(names, args, strict=True) if name in taken})

    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    for result, expected in zip(run(kernel, compiled, args), run(kernel, public, args), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def documented(docstring: str, section: str) -> str:
    """The indented text of one section of a Google-style docstring."""
    found = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    assert found, f"the docstring has no {section}: section"
    return found[1]


@each_op
def test_docstring_gives_every_shape(name: str) -> None:
    public = getattr(kernels, name)
    hints = typing.get_type_hints(public)
    entries: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*): (.*)$", documented(public.__doc__, "Args"), re.MULTILINE):
        entries |= dict.fromkeys(names.split(", "), text)
    for argument in inspect.signature(public).parameters:
        assert argument in entries, f"{name}: {argument} is not documented"
        if Tensor in (hints[argument], *typing.get_args(hints[argument])):
            assert re.match(r"\[.*\] ", entries[argument]), f"{name}: {argument} has no shape: {entries[argument]!r}"
    assert re.search(r"\[.+\]", documented(public.__doc__, "Returns")), f"{name}: the result has no shape"
    documented(public.__doc__, "Raises")


def test_backend_names_what_runs() -> None:
    assert kernels.backend("cpu") == "reference"
    if torch.cuda.is_available():
        assert kernels.backend("cuda") == ("triton" if kernels.why_no_extension("cuda") else "cuda")
    with pytest.raises(ValueError, match="cpu and cuda"):
        kernels.backend("meta")
    with pytest.raises(ValueError, match="frames_to_uint8"):
        kernels.backend("cpu", "no_such_op")


def test_the_reference_runs_on_every_device_where_it_is_asked_for() -> None:
    body = kernels._op.launch_or_reference(lambda x: f"kernel {x}", lambda x: f"reference {x}")
    assert body(1) == "kernel 1"
    with kernels.only_reference():
        assert body(2) == "reference 2"
        with kernels.only_reference(False):
            assert body(3) == "kernel 3"
    assert body(4) == "kernel 4"
    if DEVICE == "cuda":
        args = arguments(first_case("adaln_modulate"), torch.bfloat16, DEVICE)
        with kernels.only_reference():
            assert torch.equal(KERNELS["adaln_modulate"].op(*args), KERNELS["adaln_modulate"].reference(*args))


def test_register_refuses_signatures_that_differ() -> None:
    def reference(x: Tensor, scale: float) -> Tensor:
        return x * scale

    def launch(x: Tensor) -> Tensor:
        return x

    with pytest.raises(TypeError, match="different signatures"):
        kernels._op.register("refused", launch=launch, reference=reference, fake=reference)
    assert "refused" not in KERNELS
