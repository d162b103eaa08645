"""Linears in 8 bits: products at the shapes of the real tasks, whole forwards, and what quantising costs in these.

    python -m bench.gemm                     # the campaign's cases gemm/* and precision/*: TFLOP/s, % of the roof, ratios
    python -m bench.gemm --device cpu

The share of quantising: the quantising forms of the norms and of GELU against their plain forms, and the operator that only
quantises, at the times a forward has them, of the forward's time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.networks import make_dit
from bench.operations import VIDEOS, latent_shape, needs_cuda, tokens
from bench.registry import OURS, Build, Case, NotHere, Work, run
from bench.timer import measure
from wan_fast import kernels, manifest
from wan_fast.dit import WanDiT
from wan_fast.kernels.quantize_rows import DTYPES
from wan_fast.manifest import DiTDims
from wan_fast.quantize import QuantizedLinear, quantize_in, quantize_weight, swap
from wan_fast.roofs import measured
from wan_fast.schemes import Form, default_keep, quantized_at_load
from wan_fast.tasks import TASKS

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
FP32, BF16 = torch.float32, torch.bfloat16


def gemm(M: int, K: int, N: int, device: torch.device) -> Work:
    """[M, K] x [N, K]^T in bf16 as the engine does it, against products in 8 bits; "with scaling" quantises x in the call."""
    x = torch.randn(M, K, device=device).bfloat16()
    weight, bias = torch.randn(N, K, device=device).bfloat16() / K**0.5, torch.randn(N, device=device).bfloat16()

    def row_scale(t: Tensor) -> Tensor:
        return t.abs().amax(1, keepdim=True).float() / E4M3_MAX

    def to_fp8(t: Tensor, scale: Tensor) -> Tensor:
        return (t.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def tensorwise() -> Callable[[], Tensor]:
        sx, sw = (t.abs().amax().float() / E4M3_MAX for t in (x, weight))
        x8, w8 = to_fp8(x, sx), to_fp8(weight, sw)
        return lambda: torch._scaled_mm(x8, w8.t(), sx, sw, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)

    def rowwise(fast: bool, scaling: bool) -> Callable[[], Tensor]:
        sx, sw = row_scale(x), row_scale(weight)
        x8, w8 = to_fp8(x, sx), to_fp8(weight, sw)
        if scaling:
            needs_cuda(device, "the compiled quantisation is timed")
        scale = torch.compile(lambda t: (s := row_scale(t), to_fp8(t, s)), dynamic=False)

        def call() -> Tensor:
            s, q = scale(x) if scaling else (sx, x8)
            return torch._scaled_mm(q, w8.t(), s, sw.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast)

        return call

    def blockwise() -> Callable[[], Tensor]:
        from torch.nn.functional import ScalingType, scaled_mm

        if K % 128 or N % 128:
            raise NotHere("blocks of 128 do not divide this shape")
        sx = x.float().unflatten(1, (-1, 128)).abs().amax(2) / E4M3_MAX  # [M, K/128]
        sw = weight.float().view(N // 128, 128, K // 128, 128).abs().amax((1, 3)) / E4M3_MAX  # [N/128, K/128]
        x8 = to_fp8(x, sx.repeat_interleave(128, 1))
        w8 = to_fp8(weight, sw.repeat_interleave(128, 0).repeat_interleave(128, 1))
        # cuBLAS wants the scales of one block of K side by side, and rows of four for the weight
        sx, sw = sx.t().contiguous().t(), F.pad(sw, (0, -sw.shape[1] % 4))
        kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return lambda: scaled_mm(x8, w8.t(), sx, kinds[0], sw.t(), kinds[1], bias=bias, output_dtype=torch.bfloat16)

    def int8() -> Callable[[], Tensor]:
        sx, sw = x.abs().amax(1, keepdim=True).float() / 127, weight.abs().amax(1, keepdim=True).float() / 127
        x8, w8 = (x / sx).round().to(torch.int8), (weight / sw).round().to(torch.int8)
        scale = sw.t()
        return lambda: (torch._int_mm(x8, w8.t()) * sx * scale + bias).bfloat16()

    def torchao() -> Callable[[], Tensor]:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        layer = torch.nn.Linear(K, N, device=device, dtype=torch.bfloat16)
        layer.weight.data, layer.bias.data = weight.clone(), bias
        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        compiled = torch.compile(layer, dynamic=False)
        return lambda: compiled(x)

    def own(form: Form, scaling: bool = False) -> Callable[[], Tensor]:
        linear = quantized(weight, bias, form)
        given = x if scaling else linear.quantized(x)
        return lambda: linear(given)

    names = {f"{OURS} {p} {s}": Form(p, s, s) for p in DTYPES for s in ("row", "block")}
    mine: dict[str, Build] = {name: partial(own, form) for name, form in names.items()}
    mine |= {f"{name} with scaling": partial(own, form, True) for name, form in names.items() if form.weight == "row"}
    fp8: dict[str, Build] = {
        "fp8 tensorwise": tensorwise,
        "fp8 rowwise": partial(rowwise, True, False),
        "fp8 rowwise, slow accumulation": partial(rowwise, False, False),
        "fp8 rowwise with scaling": partial(rowwise, True, True),
        "fp8 1x128 and 128x128 blocks, slow accumulation": blockwise,
        "torchao fp8 rowwise with scaling": torchao,
    }

    def emulated() -> Callable[[], Tensor]:
        raise NotHere("CPUs have no FP8 products")

    if device.type == "cpu":
        mine |= {name: emulated for name in mine if "fp8" in name}
        fp8 = dict.fromkeys(fp8, emulated)
    return Work(
        arms={OURS: lambda: lambda: F.linear(x, weight, bias), **mine, **fp8, "int8 rowwise, unfused epilogue": int8},
        rate="bf16",
        rates=dict.fromkeys(fp8, "fp8")
        | {"int8 rowwise, unfused epilogue": "int8"}
        | {name: "int8" if "int8" in name else "fp8" for name in mine},
        tolerance=8e-2,
        flops=2.0 * M * K * N,
        bytes=2.0 * (M * K + K * N + M * N),
    )


def quantized(weight: Tensor, bias: Tensor, form: Form) -> QuantizedLinear:
    """A linear of that weight [N, K] in 8 bits."""
    values, scale = quantize_weight(weight, form)
    linear = QuantizedLinear(weight.shape[1], weight.shape[0], form).to(weight.device)
    linear.load_state_dict({"weight": values, "weight_scale": scale, "bias": bias}, assign=True)
    return linear


def in_8_bits(model: WanDiT, form: Form, keep: int) -> WanDiT:
    """The model with its linears quantised but for `keep` blocks at either end; what stays is shared."""
    forms = quantized_at_load(manifest.dit_shapes(model.dims), form.precision, form.weight, keep)
    with torch.device("meta"):
        other = WanDiT(model.dims, model.blocks[0].cross_attn.attention)  # type: ignore[index]
    swap(other, forms)
    state = dict(model.named_parameters())
    for linear, own in forms.items():
        quantize_in(state, linear, own)
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()


def precision(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """One forward with linears in 8 bits, FP8 on a GPU and INT8 on a CPU, against the other and without, attention alike."""
    parts = make_dit(dims, shape, dtype, device)
    x, t, context, keep = parts["x"], parts["t"], parts["context"], default_keep(dims.num_layers)
    on_gpu = device.type == "cuda"

    def forward(model: WanDiT) -> Callable[[], Tensor]:
        return lambda: model(x, t[:, None], context)

    def narrow(name: str, scaling: str = "row", keep: int = keep) -> Callable[[], Tensor]:
        return forward(in_8_bits(parts["model"], Form(name, scaling, scaling), keep))

    def in_bf16() -> Callable[[], Tensor]:
        if dtype == BF16:
            raise NotHere("the model is in bf16 already")
        other = make_dit(dims, shape, BF16, device)["model"]
        dtypes = {name: own.dtype for name, own in other.state_dict().items()}
        other.load_state_dict({name: own.to(dtypes[name]) for name, own in parts["model"].state_dict().items()})
        prepared = other.prepare([parts["text"][0]], context.grid)
        return lambda: other(x, t[:, None], prepared)

    def other_precision() -> Callable[[], Tensor]:
        if not on_gpu:
            raise NotHere("that is ours, on a CPU")
        return narrow("int8")

    def all_blocks() -> Callable[[], Tensor]:
        if not keep:
            raise NotHere("none is kept")
        return narrow(ours, "row", 0)

    ours = "fp8" if on_gpu else "int8"
    wide = {f"{OURS}, --precision bf16": "bf16" if dtype == BF16 else "fp32", f"{OURS}, --dtype bf16": "bf16"}
    return Work(
        arms={
            OURS: partial(narrow, ours),
            f"{OURS}, --precision bf16": lambda: forward(parts["model"]),
            f"{OURS}, --dtype bf16": in_bf16,
            f"{OURS}, int8": other_precision,
            f"{OURS}, all blocks": all_blocks,
            f"{OURS}, scales by block": partial(narrow, ours, "block"),
        },
        rate=ours,
        rates=wide | {f"{OURS}, int8": "int8"},
        # random weights damp no error
        tolerance=0.3,
        flops=manifest.dit_flops(dims, prod(context.grid)),
        bytes=sum(w.nbytes for w in parts["model"].state_dict().values()) + 2 * x.nbytes,
    )


def down_and_norm(L: int, dims: DiTDims, device: torch.device) -> Work:
    """The feed-forward's end and the norm behind it: as the engine does it, and with the residual added in the product."""
    D, hidden = dims.dim, dims.ffn_dim
    x, a = torch.randn(1, L, D, device=device), torch.randn(1, L, hidden, device=device).bfloat16()
    bias = torch.randn(D, device=device).bfloat16()
    linear = quantized(torch.randn(D, hidden, device=device).bfloat16() / hidden**0.5, bias, Form("fp8"))
    gate, shift, scale = (0.1 * torch.randn(1, 1, 3, D, device=device)).unbind(2)
    given = linear.quantized(a)

    def apart() -> Any:
        return kernels.gated_residual_adaln_quantized(x, linear(given), gate, shift, scale, dtype=E4M3)

    def joined() -> Any:
        kernels.gemm_8bit_add(x, *given, linear.weight, linear.weight_scale, linear.bias, gate)
        return kernels.adaln_modulate_quantized(x, shift, scale, dtype=E4M3)

    return Work(
        arms={OURS: lambda: apart, "the residual added in the product": lambda: joined},
        rate="fp8",
        tolerance=None,
        flops=2.0 * L * D * hidden,
        bytes=L * (hidden + 9.0 * D) + D * hidden,
    )


def quantising(L: int, dims: DiTDims, precision: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of a block that are spent on quantising, by where; scales by row."""
    D, hidden = dims.dim, dims.ffn_dim
    to: dict[str, Any] = {"dtype": DTYPES[precision]}
    stream, y = torch.randn(1, L, D, device=device), torch.randn(1, L, D, device=device).to(dtype)
    wide = torch.randn(1, L, hidden, device=device).to(dtype)
    rows = torch.randn(1, 1, 3, D, device=device).unbind(2)
    calls: dict[str, Callable[[], Any]] = {
        "norm": lambda: kernels.gated_residual_adaln(stream, y, *rows, dtype=dtype),
        "norm, quantised": lambda: kernels.gated_residual_adaln_quantized(stream, y, *rows, **to),
        "gelu": lambda: kernels.gelu_tanh(wide),
        "gelu, quantised": lambda: kernels.gelu_tanh_quantized(wide, **to),
        "attention's result": lambda: kernels.quantize_rows(y, DTYPES[precision]),
    }
    taken = {name: timing.median for name, timing in measure(calls, device, budget=2.0).items()}
    return {
        "three norms": 3 * max(taken["norm, quantised"] - taken["norm"], 0.0),
        # it may be faster than the plain form, which moves more
        "GELU": max(taken["gelu, quantised"] - taken["gelu"], 0.0),
        "attention's two results": 2 * taken["attention's result"],
    }


# --- the rows -----------------------------------------------------------------------------------------------------------

_NARROW = DiTDims(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, in_dim=16, out_dim=16)


def _gemm_cases() -> list[Case]:
    cases = []
    for task, *video in VIDEOS[:3]:
        spec, M = TASKS[task], tokens(task, *video)
        shapes = {"qkvo": (spec.dim, spec.dim), "ffn-up": (spec.dim, spec.ffn_dim), "ffn-down": (spec.ffn_dim, spec.dim)}
        for layer, (K, N) in shapes.items():
            cases.append(Case(f"gemm/{task}-{layer}/{M}x{K}x{N}/bf16", "cuda", partial(gemm, M, K, N), 2.0))
    L = tokens("t2v-14B", 832, 480, 81)
    both = partial(down_and_norm, L, DiTDims.of_task(TASKS["t2v-14B"]))
    cases.append(Case(f"gemm/t2v-14B-ffn-down-and-norm/{L}x13824x5120/bf16", "cuda", both, 2.0))
    cases.append(Case("gemm/1.3B-ffn-up/390x1536x8960/bf16", "cpu", partial(gemm, 390, 1536, 8960), 8.0))
    return cases


def _precision(task: str, *video: int) -> Callable[[torch.device], Work]:
    return partial(precision, DiTDims.of_task(TASKS[task]), latent_shape(task, *video), BF16)


GEMM_CASES = tuple(_gemm_cases())
GPU_PRECISION_CASES = (
    Case("precision/ti2v-5B/1280x704x121/bf16", "cuda", _precision("ti2v-5B", 1280, 704, 121), 20.0, True),
    Case("precision/t2v-14B/832x480x81/bf16", "cuda", _precision("t2v-14B", 832, 480, 81), 30.0, True),
)
_SMALL = partial(precision, _NARROW, (16, 3, 30, 52), FP32)
CPU_PRECISION_CASES = (Case("precision/1.3B-width-2-blocks/16x3x30x52/fp32", "cpu", _SMALL, 25.0, True),)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gemm", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parsed = parser.parse_args(argv)
    device = torch.device(parsed.device)
    roofs = {name: rate for name, rate in measured(device) if isinstance(rate, float)}
    units = {name: "TB/s" if name == "copy" else "TFLOP/s" for name in roofs}
    print("roofs: " + ", ".join(f"{name} {rate / 1e12:.3g} {units[name]}" for name, rate in roofs.items()), flush=True)
    for case in (*GEMM_CASES, *GPU_PRECISION_CASES, *CPU_PRECISION_CASES):
        if case.device == device.type:
            print(f"\n{case.name}")
            print("\n".join(table(run(case, device, roofs)[0])), flush=True)
    print("\n".join(share(device)))
    return 0


def share(device: torch.device) -> list[str]:
    """Lines on what quantising costs in a block of TI2V-5B at 1280x704x121; on a CPU, of 1.3B's width on 1,170 tokens."""
    task, *video = VIDEOS[0]
    on_gpu = device.type == "cuda"
    dims = replace(DiTDims.of_task(TASKS[task]) if on_gpu else _NARROW, num_layers=2)
    shape = latent_shape(task, *video) if on_gpu else (16, 3, 30, 52)
    kind, dtype = ("fp8", BF16) if on_gpu else ("int8", FP32)
    parts = make_dit(dims, shape, dtype, device)
    model, L = in_8_bits(parts["model"], Form(kind), 0), prod(parts["context"].grid)
    with torch.inference_mode():
        call = partial(model, parts["x"], parts["t"][:, None], parts["context"])
        block = measure({"forward": call}, device, budget=4.0)["forward"].median / 2
        spent = quantising(L, dims, kind, dtype, device)
    whole = f"{sum(spent.values()) / block:.1%} of a block's {block * 1e3:.2f} ms"
    return [
        f"\nquantising to {kind}, a scale per row, width {dims.dim}, {L} tokens: {whole}",
        *(f"  {name:26s} {seconds * 1e3:9.3f} ms" for name, seconds in spent.items()),
    ]


def table(row: Mapping[str, Any]) -> list[str]:
    """Lines of text of a case's arms."""
    lines = [f"  {'arm':50s} {'ms':>9s} {'TFLOP/s':>9s} {'of roof':>8s} {'slower by':>10s}"]
    for name, arm in row["arms"].items():
        of_roof = f"{arm['of_roof']:8.1%}" if "of_roof" in arm else f"{'-':>8s}"
        slower = f"{arm['ratio']['median']:9.2f}x" if "ratio" in arm else f"{'':>10s}"
        lines.append(f"  {name:50s} {arm['seconds'] * 1e3:9.3f} {row['flops'] / arm['seconds'] / 1e12:9.2f} {of_roof} {slower}")
    return lines + [f"  {name:50s} {why}" for name, why in row["skipped"].items()]


if __name__ == "__main__":
    sys.exit(main())
