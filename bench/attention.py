"""Self-attention in 8 bits: against every exact backend, part by part, and in whole forwards.

    python -m bench.attention                    # on a GPU: the campaign's cases attention/* and step/*, then the parts
    python -m bench.attention --device cpu       # errors alone: a CPU emulates 8 bits, and how long that takes says nothing

Every arm of attention/* begins with the packed projection before its norm, so that what quantising costs is in its time. Tokens
there are random and all alike: skip-softmax finds nothing to leave out in them, and its arms show what looking for it costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import RESULTS, ROOT
from bench.gemm import in_8_bits
from bench.networks import make_dit
from bench.operations import E4M3, VIDEOS, latent_shape, needs_cuda
from bench.quality import sqnr
from bench.registry import OURS, Build, Case, NotHere, Work
from bench.results import Results, open_results
from bench.timer import measure
from wan_fast import kernels, manifest
from wan_fast.attention import (
    BACKENDS,
    Attention8bit,
    Backend,
    Projected,
    choose,
    first_that_runs,
    of_projection,
    sdpa,
)
from wan_fast.blocks import Grid
from wan_fast.config import WanFastError
from wan_fast.kernels.quantize_rows import DTYPES
from wan_fast.manifest import DiTDims
from wan_fast.schemes import Form, default_keep
from wan_fast.tasks import HEAD_DIM, PATCH, TASKS

BF16 = torch.bfloat16
# what errors are found on: 3,900 tokens, which no tile divides, and the heads of the start-up test: nothing else is compiled
SMALL, SMALL_HEADS = (5, 26, 30), 2
# seconds that a first try may take, imports included
LIMIT = 90.0
# wanted of attention, quantising included: times as fast as the best exact backend; of a forward: its part of the time in bf16
FASTER, OF_BF16 = 1.3, 0.72

EXACT = {row.name: row for row in BACKENDS if not row.eight_bit}
NARROW = {row.name: row for row in BACKENDS if row.eight_bit}
INT8 = ("int8 triton", "int8 cuda")
SKIPS = (0.001, 0.01)
WIDE, FLASH_3_FP8 = "int8 triton, values in bf16", "flash-attn 3 fp8, casts included"
IN_BF16 = f"{OURS}, bf16"


def projected(row: Backend, device: torch.device, heads: int, skip: float = 0.0) -> Projected:
    """A backend's attention of a packed projection in bf16; without a GPU PyTorch's own, and the references of ours.

    Raises:
        NotHere: it does not run on the device.
    """
    if device.type != "cuda":
        if row.name != "sdpa" and row.module != "triton":
            raise NotHere(f"{row.name} needs a GPU")
        return row.make(skip) if row.eight_bit else of_projection(row.make())
    X, Y = torch.cuda.get_device_capability(device)
    if not row.runs_on((X, Y)):
        raise NotHere(f"{row.name} is not for compute capability {X}.{Y}")
    if row.module == "wan_fast._cuda" and (reason := dies(row.name)):
        raise NotHere(reason)
    try:
        attention = first_that_runs([row], device, BF16, heads, HEAD_DIM, skip)[1]
    except WanFastError as error:
        raise NotHere(str(error)) from error
    return attention if row.eight_bit else of_projection(attention)


@cache
def dies(name: str) -> str:
    """Why a kernel in CUDA C++ does not end well, "" where it does; tried in a process of its own, since one that hangs or
    writes where it must not would take all other arms with it."""
    code = f"from bench.attention import try_out; try_out({name!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"{name} does not end within {LIMIT:.0f} s on a small clip"
    said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    return f"{name}: {said[-1][:300]}" if done.returncode else ""


def try_out(name: str) -> None:
    """Run a backend in 8 bits on the small clip, with skip-softmax and without."""
    device = torch.device("cuda")
    accuracy = Accuracy(device)
    with torch.inference_mode():
        for skip in (0.0, SKIPS[-1]):
            accuracy(first_that_runs([NARROW[name]], device, BF16, SMALL_HEADS, HEAD_DIM, skip)[1])


def by_default(device: torch.device, heads: int) -> Backend:
    """What the engine takes with --attention auto."""
    if device.type != "cuda":
        return EXACT["sdpa"]
    rows = choose("auto", torch.cuda.get_device_capability(device), "bf16", HEAD_DIM)
    return first_that_runs(rows, device, BF16, heads, HEAD_DIM)[0]


def in_int8(device: torch.device, heads: int) -> tuple[str, Projected]:
    """The form of attention in int8 that is written for the device: in CUDA C++ where that runs, and else in Triton."""
    reasons = []
    for name in reversed(INT8):
        try:
            return name, projected(NARROW[name], device, heads)
        except NotHere as reason:
            reasons.append(str(reason))
    raise NotHere("; ".join(reasons))


def attention(grid: Grid, heads: int, device: torch.device) -> Work:
    """Self-attention of one block, from the packed projection [1, L, 3, D] bf16 before its norm to the result."""
    L, D = prod(grid), heads * HEAD_DIM
    # a weight of ones: those that norm in place may then do so again and again
    source, weight = torch.randn(1, L, 3, D, device=device, dtype=BF16), torch.ones(2, D, device=device)
    changed, table = torch.empty_like(source), kernels.rope_table(max(grid), HEAD_DIM, device)
    where: dict[str, Any] = {"grid": grid, "heads": heads, "eps": 1e-6}
    accuracy, errors = Accuracy(device), dict[str, dict[str, float]]()
    default: list[str] = []

    def timed(name: str, attend: Projected) -> Callable[[], Tensor]:
        if device.type != "meta":
            errors[name] = accuracy(attend)
        if isinstance(attend, Attention8bit):
            return partial(attend, source, weight, table, **where)
        changed.copy_(source)
        return partial(attend, changed, weight, table, **where)

    def ours() -> Callable[[], Tensor]:
        row = by_default(device, heads)
        default.append(row.name)
        return timed(OURS, projected(row, device, heads))

    def by(name: str) -> Callable[[], Tensor]:
        if name in default:
            raise NotHere(f"it is {OURS} here, which took it by --attention auto")
        return timed(name, projected((EXACT | NARROW)[name], device, heads))

    def skipping(name: str, skip: float) -> Callable[[], Tensor]:
        return timed(f"{name}, skip {skip}", projected(NARROW[name], device, heads, skip))

    def wide() -> Callable[[], Tensor]:
        projected(NARROW["int8 triton"], device, heads)  # where that does not run neither does this
        return timed(WIDE, Attention8bit("int8", wide_values=True))

    def flash_3_fp8() -> Callable[[], Tensor]:
        needs_cuda(device, "flash-attn 3 runs")
        return timed(FLASH_3_FP8, of_projection(_flash_3_fp8()))

    arms: dict[str, Build] = {OURS: ours, **{name: partial(by, name) for name in (*EXACT, *NARROW)}, WIDE: wide}
    arms |= {f"{name}, skip {skip}": partial(skipping, name, skip) for name in INT8 for skip in SKIPS}
    arms |= {FLASH_3_FP8: flash_3_fp8}
    return Work(
        arms=arms,
        rate="bf16",
        rates={name: _rate(name) for name in arms if name != OURS and name not in EXACT},
        tolerance=1e-1,
        flops=4.0 * L * L * D,
        bytes=2.0 * 4 * L * D,
        errors=errors,
    )


def _rate(name: str) -> Mapping[str, float]:
    """Of an arm in 8 bits: the shares of the operations, queries by keys and probabilities by values, by what they run in."""
    values = "bf16" if name == WIDE else "fp8"
    return {"fp8": 1.0} if "fp8" in name else {"int8": 0.5, values: 0.5}


def _flash_3_fp8() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = torch.ones(1, q.shape[2], device=q.device)
        found = flash_attn_func(*(t.to(E4M3) for t in (q, k, v)), q_descale=one, k_descale=one, v_descale=one)
        return found[0] if isinstance(found, tuple) else found

    return attend


class Accuracy:
    """How far an attention of a packed projection in bf16 is from an exact one in fp32, on a small clip.

    As in Wan, keys and values have much in common, and some channels are larger than the others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.grid = device, SMALL
        self.exact: Tensor | None = None

    def __call__(self, attention: Projected) -> dict[str, float]:
        """Signal-to-noise ratio in dB, and the largest error."""
        if self.exact is None:
            self.exact = self._of(of_projection(sdpa), torch.float32)
        result = self._of(attention, BF16)
        return {"dB": sqnr(result, self.exact), "largest": (result - self.exact).abs().max().item()}

    def _of(self, attention: Projected, dtype: torch.dtype) -> Tensor:
        D, generator = SMALL_HEADS * HEAD_DIM, torch.Generator().manual_seed(0)
        qkv, common = torch.randn(1, prod(self.grid), 3, D, generator=generator), torch.randn(3, D, generator=generator)
        qkv += common * torch.tensor([0.0, 4.0, 1.0])[:, None]
        qkv[..., ::32] *= 10
        weight = (torch.rand(2, D, generator=generator) + 0.5).to(self.device)
        table = kernels.rope_table(max(self.grid), HEAD_DIM, self.device)
        given = qkv.bfloat16().to(self.device, dtype)
        return attention(given, weight, table, grid=self.grid, heads=SMALL_HEADS, eps=1e-6).float()


# --- whole forwards -----------------------------------------------------------------------------------------------------


def step(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """One forward with linears and self-attention in 8 bits, against those with neither and with one of them."""
    parts, keep = make_dit(dims, shape, dtype, device), default_keep(dims.num_layers)
    x, t, context = parts["x"], parts["t"], parts["context"]
    kind = "fp8" if device.type == "cuda" else "int8"
    quantized: list[Any] = []

    def forward(narrow: bool, attend: Projected | None = None) -> Callable[[], Tensor]:
        if narrow and not quantized:
            quantized.append(in_8_bits(parts["model"], Form(kind), keep))
        model = quantized[0] if narrow else parts["model"]

        def call() -> Tensor:
            for block in model.blocks:
                block.self_attn.in_8_bits = attend
            return model(x, t[:, None], context, in_8_bits=attend is not None)

        return call

    def with_attention(name: str, narrow: bool) -> Callable[[], Tensor]:
        if narrow and in_int8(device, dims.num_heads)[0] == name:
            raise NotHere(f"that is {OURS} here")
        return forward(narrow, projected(NARROW[name], device, dims.num_heads))

    arms: dict[str, Build] = {
        OURS: lambda: forward(True, in_int8(device, dims.num_heads)[1]),
        IN_BF16: lambda: forward(False),
        f"{OURS}, linears in 8 bits": lambda: forward(True),
        **{f"{OURS}, attention {name}": partial(with_attention, name, False) for name in (*INT8, "sageattention")},
        f"{OURS}, linears in 8 bits, attention int8 triton": partial(with_attention, "int8 triton", True),
    }
    wide, L = "bf16" if dtype == BF16 else "fp32", prod(context.grid)
    flops = manifest.dit_flops(dims, L)
    attending = 4.0 * L * dims.dim * dims.num_layers / flops
    linears = (1 - attending * (L + dims.text_len)) * (1 - 2 * keep / dims.num_layers)

    def rate(name: str) -> Mapping[str, float]:
        shares = {kind: linears} if name == OURS or "linears" in name else {}
        if name == OURS or "attention" in name:
            for kernel, half in _rate(name).items():
                shares[kernel] = shares.get(kernel, 0.0) + half * attending * L
        return shares | {wide: 1 - sum(shares.values())}

    return Work(
        arms=arms,
        rate=kind,
        rates={name: rate(name) for name in arms},
        # random weights damp no error
        tolerance=0.3,
        flops=flops,
        bytes=sum(w.nbytes for w in parts["model"].state_dict().values()) + 2 * x.nbytes,
    )


# --- what quantising costs ----------------------------------------------------------------------------------------------


def parts(name: str, grid: Grid, heads: int, device: torch.device) -> dict[str, float]:
    """Seconds of the operators of a backend of ours, one by one, of all of them, and of the norm that they stand for."""
    whole = projected(NARROW[name], device, heads)
    assert isinstance(whole, Attention8bit)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise NotHere("without FP8 values are not quantised")
    qkv = torch.randn(1, prod(grid), 3, heads * HEAD_DIM, device=device, dtype=BF16)
    weight, table = torch.ones(2, qkv.shape[3], device=device), kernels.rope_table(max(grid), HEAD_DIM, device)
    where: dict[str, Any] = {"grid": grid, "heads": heads, "eps": 1e-6}
    changed, v = qkv.clone(), qkv[:, :, 2].unflatten(-1, (heads, HEAD_DIM))
    with torch.inference_mode():
        center = kernels.keys_center(qkv, weight, table, **where)
        to = DTYPES[whole.precision]
        qk, scale = kernels.qk_norm_rope_quantized(qkv, weight, table, center, **where, dtype=to)
        values = kernels.quantize_values(v, interleaved=whole.by_extension)
        own: dict[str, Any] = {"interleaved": whole.by_extension, "dtype": BF16}
        calls: dict[str, Callable[[], Any]] = {
            "all": lambda: whole(qkv, weight, table, **where),
            "keys_center": lambda: kernels.keys_center(qkv, weight, table, **where),
            "qk_norm_rope_quantized": lambda: kernels.qk_norm_rope_quantized(qkv, weight, table, center, **where, dtype=to),
            "quantize_values": lambda: kernels.quantize_values(v, interleaved=whole.by_extension),
            "attention_8bit": lambda: kernels.attention_8bit(qk[0], scale[0], qk[1], scale[1], *values, **own),
            "qk_norm_rope": lambda: kernels.qk_norm_rope(changed, weight, table, **where),
        }
        return {part: timing.median for part, timing in measure(calls, device, budget=2.0).items()}


def described(name: str, found: Mapping[str, float], grid: Grid, heads: int) -> list[str]:
    """Lines on what `parts` found."""
    L = prod(grid)
    rate = 4.0 * L * L * heads * HEAD_DIM / found["attention_8bit"] / 1e12
    costs = found["keys_center"] + found["qk_norm_rope_quantized"] + found["quantize_values"]
    more = (costs - found["qk_norm_rope"]) / found["all"]
    return [
        f"{name}, {L} tokens, {heads} heads: {found['all'] * 1e3:.3f} ms, {more:.1%} of it what quantising costs beyond "
        f"qk_norm_rope; attention_8bit alone {rate:.1f} TFLOP/s",
        *(f"  {part:26s} {seconds * 1e3:9.3f} ms" for part, seconds in found.items()),
    ]


def find_parts(device: torch.device, results: Results) -> None:
    """Print and note what both forms of attention in int8 are made of; what does not run says why."""
    for (grid, heads), name in product(CLIPS, INT8):
        what = f"{name} at L{prod(grid)}-N{heads}-K{HEAD_DIM}"
        try:
            lines = described(name, parts(name, grid, heads, device), grid, heads)
        except NotHere as reason:
            lines = [f"{what}: not measured: {reason}"]
        print("", *lines, sep="\n", flush=True)
        results.put("notes", f"parts of {what}", "; ".join(" ".join(line.split()) for line in lines))


# --- the rows -----------------------------------------------------------------------------------------------------------


def grid_of(task: str, *video: int) -> Grid:
    T, H, W = latent_shape(task, *video)[1:]
    return T // PATCH[0], H // PATCH[1], W // PATCH[2]


CLIPS = tuple((grid_of(*video), TASKS[video[0]].num_heads) for video in VIDEOS)


def _attention_case(task: str, grid: Grid, heads: int) -> Case:
    name = f"attention/{task}/L{prod(grid)}-N{heads}-K{HEAD_DIM}/bf16"
    # the longest clip takes a second for every few arms
    return Case(name, "cuda", partial(attention, grid, heads), 12.0 if prod(grid) > 50_000 else 4.0)


def _step_case(task: str, width: int, height: int, frames: int, seconds: float) -> Case:
    make = partial(step, DiTDims.of_task(TASKS[task]), latent_shape(task, width, height, frames), BF16)
    return Case(f"step/{task}/{width}x{height}x{frames}/bf16", "cuda", make, seconds, True)


# no CPU has them: it emulates 8 bits, or has them in FP8 alone
ATTENTION_CASES = tuple(_attention_case(video[0], *clip) for video, clip in zip(VIDEOS, CLIPS, strict=True))
STEP_CASES = (_step_case("ti2v-5B", 1280, 704, 121, 20.0), _step_case("t2v-14B", 832, 480, 81, 30.0))


def table(row: Mapping[str, Any]) -> list[str]:
    """Lines of text of a case's arms, and whether what is wanted of it was reached."""
    taken = {name: arm["seconds"] for name, arm in row["arms"].items()}
    exact = [name for name in taken if name in EXACT or name == OURS] if IN_BF16 not in taken else [IN_BF16]
    best = min(exact, key=lambda name: taken[name])
    lines = [f"  {'arm':50s} {'ms':>9s} {'TFLOP/s':>9s} {'of roof':>8s} {'faster':>8s} {'dB':>6s} {'largest error':>14s}"]
    for name, arm in row["arms"].items():
        of_roof = f"{arm['of_roof']:8.1%}" if "of_roof" in arm else f"{'-':>8s}"
        error = f"{arm['errors']['dB']:6.1f} {arm['errors']['largest']:14.2e}" if "errors" in arm else ""
        rate = row["flops"] / taken[name] / 1e12
        lines.append(f"  {name:50s} {taken[name] * 1e3:9.3f} {rate:9.2f} {of_roof} {taken[best] / taken[name]:7.2f}x {error}")
    lines += [f"  {name:50s} {why}" for name, why in row["skipped"].items()]
    if best == IN_BF16:
        part = taken[OURS] / taken[best]
        return [*lines, f"  in 8 bits it takes {part:.3f} of the time that it takes in bf16; {OF_BF16} or less is wanted"]
    narrow = min((name for name in taken if name in NARROW), key=lambda name: taken[name], default=None)
    if narrow is None:
        return [*lines, "  nothing in 8 bits was measured"]
    faster = taken[best] / taken[narrow]
    return [*lines, f"  {narrow} is {faster:.2f}x as fast as the best exact one, {best}; {FASTER} or more is wanted"]


def errors_alone(device: torch.device) -> list[str]:
    """Lines on how far each attention is from an exact one, where nothing is to be timed."""
    accuracy = Accuracy(device)
    arms: dict[str, Projected] = {"sdpa": of_projection(sdpa)}
    for name, skip in product(("int8 triton", "fp8 triton"), (0.0, *SKIPS)):
        arms[f"{name}, skip {skip}" if skip else name] = projected(NARROW[name], device, SMALL_HEADS, skip)
    arms[WIDE] = Attention8bit("int8", wide_values=True)
    lines = [f"  {'attention in bf16, by the references':50s} {'dB':>6s} {'largest error':>14s}"]
    for name, attend in arms.items():
        found = accuracy(attend)
        lines.append(f"  {name:50s} {found['dB']:6.1f} {found['largest']:14.2e}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="of measuring the cases, at most (default 8)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="DIR/<machine>/<date>.json (default bench/results)"
    )
    parsed = parser.parse_args(argv)
    device = torch.device(parsed.device)
    if device.type == "cpu":
        with torch.inference_mode():
            print("\n".join(errors_alone(device)))
        return 0
    # a case that crashes or hangs costs the campaign that case alone
    from bench.campaign import main as campaign

    where = ["--device", parsed.device, "--minutes", str(parsed.minutes), "--out", str(parsed.out)]
    if (status := campaign([*where, "attention/*", "step/*"])) == 2:
        return status
    results = open_results(parsed.out, device)
    for case in (*ATTENTION_CASES, *STEP_CASES):
        row = results.data["rows"].get(case.name)
        print(f"\n{case.name}", *(table(row) if row else ["  not measured"]), sep="\n", flush=True)
    find_parts(device, results)
    return status


if __name__ == "__main__":
    sys.exit(main())
