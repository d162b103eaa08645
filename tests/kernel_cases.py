"""The inputs on which every operator of wan_fast.kernels is tested; a new operator adds its rows here.

`CASES` holds small awkward shapes: they run on a GPU, and without one in Triton's interpreter, which takes about 5 ms
per program. `REAL_CASES` holds the shapes of real videos, as meta tensors: they are compiled, not run.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan_fast import kernels
from wan_fast.kernels import KERNELS
from wan_fast.kernels._op import Kernel
from wan_fast.kernels.causal_conv3d import Form, history, output_shape

Inputs = Callable[[torch.dtype], tuple[Any, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One set of inputs: `inputs(dtype)` returns the positional arguments of the operator. It is run in each of `dtypes`."""

    op: str
    id: str
    inputs: Inputs
    dtypes: tuple[torch.dtype, ...] = DTYPES


class RealCase(NamedTuple):
    """One real shape, and what every kernel launched for it may use at most: registers per thread, loads and stores narrower
    than 128 bits (None leaves them open), bytes of shared memory. `products`: it computes on tensor cores, where it is compiled
    for bf16 in "bf16", "fp8" or "int8". `since`: the lowest compute capability that has its dtypes.

    Sums over a row pass through a few shared bytes per warp, layouts through one row of the narrower dtype.
    """

    op: str
    id: str
    inputs: Inputs
    registers: int
    narrow_loads: int | None = None
    narrow_stores: int | None = None
    shared: int = 16 * 1024
    products: str = ""
    since: int = 80
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _frames(F: int, h: int, w: int, patch: int, margin: int, rounding: bool, meta: bool = False) -> Inputs:
    """[F, 3 p p, h, w] with values beyond both bounds, NaN and infinities; the inside of a longer clip if margin > 0."""

    def build(dtype: torch.dtype) -> tuple[Any, ...]:
        shape = (F + 2 * margin, h, w, 3 * patch**2)
        if meta:
            return torch.empty(shape, dtype=dtype, device="meta").permute(0, 3, 1, 2), rounding
        buffer = torch.randn(shape, generator=torch.Generator().manual_seed(F * h * w))
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -1.0, -0.0, 0.0])[: h * w]
        buffer[margin].view(-1)[: len(special)] = special
        return buffer.to(dtype)[margin : margin + F].permute(0, 3, 1, 2), rounding

    return build


def _frames_to_uint8_cases() -> list[Case]:
    sizes = [
        *((1, 1, 1, 1, 0), (1, 5, 7, 1, 0), (3, 16, 32, 1, 0), (2, 24, 31, 1, 2), (1, 3, 400, 1, 1)),
        *((1, 1, 1, 2, 0), (2, 5, 7, 2, 0), (3, 9, 16, 2, 1), (1, 2, 200, 2, 0), (1, 2, 3, 3, 0)),
    ]
    cases = []
    for (F, h, w, patch, margin), rounding in itertools.product(sizes, (False, True)):
        name = f"F{F}-{h}x{w}-patch{patch}-margin{margin}-{'round' if rounding else 'truncate'}"
        cases.append(Case("frames_to_uint8", name, _frames(F, h, w, patch, margin, rounding)))
    return cases


def _randn(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Normal values, a few of them fifty times as large."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.01] *= 50
    return values + mean


def _rows(B: int, R: int, D: int, count: int) -> tuple[Tensor, ...]:
    """`count` tensors [B, R, D] fp32, strided as those of a block's modulation are."""
    return _randn(B, R, count, D, seed=3).mul_(0.3).unbind(2)


def _adaln(B: int, L: int, D: int, R: int, split: int, x_dtype: torch.dtype | None = torch.float32) -> Inputs:
    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        return _randn(B, L, D, mean=2.0).to(x_dtype or dtype), *_rows(B, R, D, 2), split, 1e-6, dtype

    return inputs


def _gated(B: int, L: int, D: int, R_gate: int, R: int, split: int, x_dtype: torch.dtype | None = torch.float32) -> Inputs:
    """R of 0 is norm3: one row without the batch, its whole weight."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        x, y = _randn(B, L, D, mean=2.0).to(x_dtype or dtype), _randn(B, L, D, seed=1).to(dtype)
        gate = _rows(B, R_gate, D, 3)[2] if R_gate else None
        shift, scale = _rows(B, R, D, 2) if R else (_randn(1, 1, D, seed=s).expand(B, 1, D) for s in (4, 5))
        return x, y, gate, shift, scale, split, 1e-6, R == 0, dtype

    return inputs


def _rope(B: int, size: tuple[int, ...], heads: int, K: int, M: int, P: int, tokens: slice = slice(None)) -> Inputs:
    """The part `tokens` of a clip of size (T, H, W), or of (tokens,) off the grid; without a turn where M is 1."""
    first, last, _ = tokens.indices(prod(size))
    grid = size if len(size) == 3 else ()

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        x, weight = _randn(B, last - first, M, heads * K).to(dtype), _randn(P, heads * K, seed=1).to(dtype)
        if M == 1:
            table = None
        elif grid:
            table = kernels.rope_table(max(grid) + 1, K)
        else:
            table = kernels.rope_table_of(_places(*size), K)
        return x, weight, table, grid, first, heads, 1e-6

    return inputs


def _places(tokens: int) -> Tensor:
    """[tokens, 3]: any times from -19 to 30, any rows and columns."""
    return torch.randint(50, (tokens, 3), generator=torch.Generator().manual_seed(tokens)) - torch.tensor([19, 0, 0])


def _gelu(*shape: int, bias: bool = True) -> Inputs:
    return lambda dtype: (_randn(*shape, mean=-1.0).to(dtype), _randn(shape[-1], seed=1).to(dtype) if bias else None)


def _guidance(C: int, T: int, H: int, W: int, known: int, guided: bool, noised: bool) -> Inputs:
    """The weight of noise is NaN where there is none."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        clips = [_randn(C, T, H, W, seed=seed) for seed in range(6)]
        if not guided:
            clips[5] = None  # type: ignore[call-overload]
        weights = _randn(11, seed=7)
        if not noised:
            weights[10] = float("nan")
        noise = _randn(C, T, H, W, seed=8) if noised else None
        return *clips, weights, _randn(C, known, H, W) if known else None, noise

    return inputs


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size)) + "-by-token" * (len(size) == 1)


def _dtypes_of_rows(*shape: int) -> tuple[torch.dtype, ...]:
    """The dtypes of a case: fp16 is left to those of few rows."""
    return DTYPES if prod(shape) < 1000 else DTYPES[:2]


def _cases() -> list[Case]:
    """Lengths that no block divides, every place of the split, the widths of the models and an odd one, real row counts.

    Those are a picture's 1,560 tokens at 832x480, 3,520 of 13 frames at 1280x704, and the last tokens of whole clips.
    """
    adaln = [
        Case("adaln_modulate", f"B{B}-L{L}-D{D}-R{R}-split{split}", _adaln(B, L, D, R, split), _dtypes_of_rows(B, L))
        for B, L, D, R, split in [
            (1, 7, 96, 1, 0), (2, 7, 96, 2, 0), (2, 7, 96, 2, 1), (2, 7, 96, 2, 6), (2, 7, 96, 2, 7), (1, 1, 1, 1, 0),
            (1, 3, 1536, 2, 2), (1, 3, 3072, 2, 1), (1, 2, 5120, 1, 0), (1, 0, 96, 1, 0), (1, 1560, 8, 1, 0),
        ]
    ]  # fmt: skip
    adaln.append(Case("adaln_modulate", "stream-in-the-dtype", _adaln(1, 5, 96, 2, 3, None)))
    gated = [
        Case(
            "gated_residual_adaln",
            f"B{B}-L{L}-D{D}-gate{G}-R{R}-split{split}",
            _gated(B, L, D, G, R, split),
            _dtypes_of_rows(B, L),
        )
        for B, L, D, G, R, split in [
            (2, 7, 96, 1, 1, 0), (2, 7, 96, 2, 2, 0), (2, 7, 96, 2, 2, 1), (2, 7, 96, 2, 2, 6), (2, 7, 96, 2, 2, 7),
            (2, 7, 96, 2, 0, 3), (2, 7, 96, 0, 2, 3), (2, 7, 96, 0, 0, 0), (2, 7, 96, 2, 1, 3), (1, 3, 1536, 1, 0, 0),
            (1, 3, 3072, 2, 2, 1), (1, 2, 5120, 1, 1, 0), (1, 0, 96, 1, 1, 0), (1, 3520, 8, 2, 2, 880),
        ]
    ]  # fmt: skip
    gated.append(Case("gated_residual_adaln", "stream-in-the-dtype", _gated(1, 5, 96, 2, 2, 3, None)))
    rope = [
        Case("qk_norm_rope", f"B{B}-{_size(size)}-N{N}-K{K}-{P}of{M}-from{part.start}", _rope(B, size, N, K, M, P, part))
        for B, size, N, K, M, P, part in [
            (2, (2, 3, 2), 4, 24, 3, 2, slice(0, None)), (1, (3, 2, 5), 1, 128, 3, 2, slice(7, 19)),
            (2, (2, 3, 2), 3, 32, 3, 3, slice(5, None)), (2, (1, 2, 2), 3, 32, 1, 1, slice(0, None)),
            (1, (1, 1, 3), 12, 128, 3, 2, slice(0, None)), (1, (1, 3, 1), 24, 128, 3, 2, slice(1, None)),
            (1, (2, 1, 1), 40, 128, 3, 2, slice(0, None)), (1, (1, 1, 2), 24, 128, 1, 1, slice(0, None)),
            (1, (2, 1, 1), 1, 2, 2, 1, slice(0, 0)), (1, (21, 30, 52), 2, 128, 3, 2, slice(32755, None)),
            (1, (31, 22, 40), 2, 128, 3, 2, slice(27275, None)), (1, (21, 45, 80), 2, 128, 3, 2, slice(75595, None)),
            (2, (7,), 4, 24, 3, 2, slice(0, None)), (1, (23,), 1, 128, 3, 2, slice(7, 19)),
            (2, (11,), 3, 32, 3, 3, slice(5, 10)), (1, (3,), 40, 128, 3, 2, slice(1, None)),
            (1, (63360,), 2, 8, 3, 2, slice(63355, None)), (1, (2,), 1, 2, 2, 1, slice(0, 0)),
        ]
    ]  # fmt: skip
    gelu = [
        Case(
            "gelu_tanh",
            "x".join(map(str, shape)) + ("" if bias else "-no-bias"),
            _gelu(*shape, bias=bias),
            _dtypes_of_rows(*shape[:-1]),
        )
        for shape, bias in [
            ((3, 5, 96), True),
            ((2, 8960), True),
            ((1, 13824), False),
            ((1, 14336), True),
            ((7,), True),
            ((0, 4), True),
            ((1560, 8), True),
        ]
    ]
    guidance = [
        Case(
            "guidance_step",
            f"{C}x{T}x{H}x{W}-known{known}-{'guided' if guided else 'alone'}{'-noised' * noised}",
            _guidance(C, T, H, W, known, guided, noised),
            (torch.float32,),  # whatever the model computes in
        )
        for C, T, H, W, known, guided, noised in [
            (4, 3, 6, 10, 0, True, False),
            (5, 3, 7, 11, 1, True, False),
            (3, 1, 1, 5, 0, False, False),
            (48, 2, 4, 6, 2, False, False),
            (16, 21, 60, 104, 0, True, False),
            (4, 3, 6, 10, 0, True, True),
            (5, 3, 7, 11, 1, True, True),
            (3, 1, 1, 5, 0, False, True),
            (7, 3, 5, 13, 2, False, True),
        ]
    ]
    patches = [
        Case(op, f"B{B}-C{C}-{T}x{H}x{W}", inputs(B, C, T, H, W), _dtypes_of_rows(T, H, W))
        for op, inputs in (("patchify", _patchify), ("unpatchify", _unpatchify))
        for B, C, T, H, W in [
            (1, 48, 2, 4, 6),
            (2, 5, 3, 2, 38),
            (1, 16, 1, 6, 2),
            (1, 1, 1, 2, 2),
            (1, 36, 1, 2, 4),
            (2, 3, 0, 2, 2),
            (1, 16, 21, 60, 104),
        ]
    ]
    return [*adaln, *gated, *rope, *gelu, *guidance, *patches]


def _patchify(*shape: int) -> Inputs:
    return lambda dtype: (_randn(*shape), dtype)


def _unpatchify(B: int, C: int, T: int, H: int, W: int) -> Inputs:
    return lambda dtype: (_randn(B, T * H * W // 4, 4 * C).to(dtype), (T, H, W))


class Conv(NamedTuple):
    """A convolution: x [F, CIN, H, W] by a kernel [COUT, CIN, KT, K, K]."""

    F: int
    CIN: int
    COUT: int
    H: int
    W: int
    KT: int
    K: int
    past: bool = False
    add: bool = False
    stride_t: int = 1
    stride: int = 1
    up: int = 1
    interleave: bool = False
    skip: tuple[int, ...] = ()
    keep: bool = True
    tf32: bool = False

    def inputs(self, dtype: torch.dtype, meta: bool = False) -> tuple[Any, ...]:
        def make(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
            values = torch.empty(shape, device="meta") if meta else _randn(*shape, seed=seed) * scale
            if len(shape) == 5:
                return kernels.conv_weight(values.to(dtype))
            return values.to(dtype).contiguous(
                memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
            )

        lead, frame = history(self.KT, self.stride_t), (self.CIN, self.H, self.W)
        x = make(self.F, *frame)
        weight = make(self.COUT, self.CIN, self.KT, self.K, self.K, seed=1, scale=(self.CIN * self.KT * self.K**2) ** -0.5)
        form = Form(self.stride_t, self.stride, self.up, self.interleave, self.tf32, self.keep)
        past = make(lead, *frame, seed=3) if self.past else None
        others = x, past, weight, make(self.COUT, seed=5)
        if self.add:
            return make(*output_shape(x, weight, form), seed=2), *others, list(form)
        return *others, make(*self.skip, seed=6) if self.skip else None, list(form)

    @property
    def op(self) -> str:
        return "causal_conv3d_add" if self.add else "causal_conv3d"


# every form that the VAE has, at sizes that no block divides
_CONVS = {
    "3x3x3": Conv(4, 20, 24, 9, 11, 3, 3, past=True),
    "3x3x3-added": Conv(4, 20, 24, 9, 11, 3, 3, past=True, add=True),
    "3x3x3-one-position": Conv(2, 20, 24, 1, 1, 3, 3, past=True),
    "3x3x3-not-kept": Conv(2, 20, 24, 5, 7, 3, 3, past=True, keep=False),
    "3x1x1-not-kept": Conv(2, 20, 24, 5, 7, 3, 1, past=True, stride_t=2, keep=False),
    "3x3x3-one-frame": Conv(1, 20, 24, 5, 7, 3, 3, past=True),
    "3x3x3-first-frame": Conv(1, 20, 24, 5, 7, 3, 3),
    "3x3x3-behind-zeros": Conv(2, 8, 3, 5, 7, 3, 3),
    "3x3x3-wide": Conv(2, 70, 130, 3, 3, 3, 3, past=True),
    "3x1x1-interleaved": Conv(4, 16, 32, 5, 6, 3, 1, past=True, interleave=True),
    "3x1x1-interleaved-behind-zeros": Conv(3, 16, 40, 5, 6, 3, 1, interleave=True),
    "3x1x1-halving-frames": Conv(4, 17, 19, 5, 6, 3, 1, past=True, stride_t=2),
    "1x3x3-halving": Conv(3, 16, 20, 6, 8, 1, 3, stride=2),
    "1x3x3-halving-odd": Conv(2, 16, 20, 7, 9, 1, 3, stride=2),
    "1x3x3-doubling": Conv(2, 16, 20, 5, 4, 1, 3, up=2),
    "3x3x3-skip": Conv(3, 20, 24, 5, 7, 3, 3, past=True, skip=(3, 24, 5, 7)),
    "1x3x3-doubling-skip": Conv(2, 16, 20, 5, 4, 1, 3, up=2, skip=(2, 20, 5, 4)),
    "1x3x3-doubling-skip-frames": Conv(4, 16, 20, 5, 4, 1, 3, up=2, skip=(2, 20, 5, 4)),
    "1x3x3-doubling-skip-channels": Conv(2, 16, 20, 5, 4, 1, 3, up=2, skip=(2, 40, 5, 4)),
    "1x3x3-doubling-skip-both": Conv(4, 16, 20, 5, 4, 1, 3, up=2, skip=(2, 40, 5, 4)),
    "1x3x3-halving-skip": Conv(3, 16, 20, 6, 8, 1, 3, stride=2, skip=(3, 20, 6, 8)),
    "3x1x1-halving-frames-skip": Conv(4, 17, 18, 5, 6, 3, 1, past=True, stride_t=2, skip=(4, 9, 10, 12)),
    "1x1x1-added": Conv(2, 20, 24, 5, 7, 1, 1, add=True),
}
# layers of the released VAEs that hold most of the work, one of each form
_REAL_CONVS = {
    "vae2.2-3x3x3-256": Conv(8, 256, 256, 352, 640, 3, 3, past=True, add=True),
    "vae2.2-3x3x3-1024": Conv(4, 1024, 1024, 88, 160, 3, 3, past=True),
    "vae2.2-3x3x3-256-tf32": Conv(4, 256, 256, 352, 640, 3, 3, past=True, tf32=True),
    "vae2.2-in": Conv(2, 48, 1024, 44, 80, 3, 3, past=True),
    "vae2.2-3x1x1-1024": Conv(2, 1024, 2048, 44, 80, 3, 1, past=True, interleave=True),
    "vae2.2-1x3x3-doubling": Conv(8, 512, 512, 176, 320, 1, 3, up=2, skip=(8, 1024, 176, 320)),
    "vae2.2-1x3x3-doubling-frames": Conv(4, 1024, 1024, 44, 80, 1, 3, up=2, skip=(2, 1024, 44, 80)),
    "vae2.2-3x1x1-halving": Conv(4, 320, 320, 176, 320, 3, 1, past=True, stride_t=2, skip=(4, 160, 352, 640)),
    "vae2.2-1x3x3-halving": Conv(4, 160, 160, 352, 640, 1, 3, stride=2, skip=(4, 160, 352, 640)),
    "vae2.1-3x3x3-96": Conv(4, 96, 96, 480, 832, 3, 3, past=True),
    "vae2.2-encoder-in": Conv(4, 12, 160, 352, 640, 3, 3, past=True),
    "vae2.1-encoder-in": Conv(4, 3, 96, 480, 832, 3, 3, past=True),
    "vae2.1-encoder-in-first-frame": Conv(1, 3, 96, 480, 832, 3, 3),
    "vae2.1-of-one-position": Conv(1, 384, 384, 1, 1, 3, 3, past=True),
    "vae2.1-out": Conv(4, 96, 3, 480, 832, 3, 3, past=True),
}


def _channels_last(F: int, C: int, H: int, W: int, silu: bool, meta: bool = False) -> Inputs:
    """x with a position of zeros, and gamma."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.empty(F, C, H, W, device="meta") if meta else _randn(F, C, H, W)
        if not meta:
            x[0, :, 0, 0] = 0
        gamma = torch.empty(C, device="meta") if meta else _randn(C, seed=1)
        return x.to(dtype).contiguous(memory_format=torch.channels_last), gamma.to(dtype), silu

    return inputs


def _vae_cases() -> list[Case]:
    cases = [Case(conv.op, name, conv.inputs) for name, conv in _CONVS.items()]
    for op in ("rms_norm_silu", "rms_norm_silu_"):
        for C, silu in ((96, True), (20, False), (384, True), (1024, True), (1, True)):
            cases.append(Case(op, f"C{C}{'-silu' if silu else ''}", _channels_last(3, C, 5, 4, silu)))
    return cases


def _real_vae_cases() -> list[RealCase]:
    cases = [
        RealCase(conv.op, name, partial(conv.inputs, meta=True), 240, shared=99 * 1024, products="bf16")
        for name, conv in _REAL_CONVS.items()
    ]
    for name, *shape in (("vae2.2", 8, 256, 352, 640), ("vae2.1", 4, 96, 480, 832)):
        cases.append(RealCase("rms_norm_silu", name, _channels_last(*shape, True, meta=True), 128, 1, 0))
        cases.append(RealCase("rms_norm_silu_", name, _channels_last(*shape, True, meta=True), 128, 1, 0))
    return cases


FP8, INT8 = torch.float8_e4m3fn, torch.int8


def _form(D: int, dtype: torch.dtype, form: str) -> tuple[Any, ...]:
    """dtype, groups, fixed and smooth of a quantising operator: "row", "groups", "fixed", each also "-smooth"."""
    kind, _, smooth = form.partition("-")
    fixed = torch.tensor(0.02) if kind == "fixed" else None
    return dtype, kind == "groups", fixed, _randn(D, seed=8).abs_().add_(0.1) if smooth else None


def _with_zeros(x: Tensor) -> Tensor:
    """The first row zero, an outlier of 1e4 in the last."""
    rows = x.view(-1, x.shape[-1])
    rows[0], rows[-1, -1] = 0, 1e4
    return x


def _quantizing(inputs: Inputs, dtype: torch.dtype, form: str) -> Inputs:
    """The inputs of a plain operator for its quantising form: its dtype, the last, is another's."""

    def changed(outside: torch.dtype) -> tuple[Any, ...]:
        args = inputs(outside)
        args = args[:-1] if isinstance(args[-1], torch.dtype) else args
        return (*args, *_form(args[0].shape[-1], dtype, form))

    return changed


def _rows_of(*shape: int) -> Inputs:
    return lambda dtype: (_with_zeros(_randn(*shape)).to(dtype),)


def _with_nan(*shape: int) -> Inputs:
    """A row with a NaN, one with an infinity, one of zeros."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        x = _randn(*shape)
        x[0, 1], x[1, 2], x[2] = float("nan"), float("inf"), 0
        return (x.to(dtype),)

    return inputs


def _quantizing_cases() -> list[Case]:
    """Every form, at widths of the models, at those that no group divides, and of one."""
    cases = []
    for name, dtype in (("fp8", FP8), ("int8", INT8)):
        forms = ("row", "groups", "row-smooth", "groups-smooth", *(("fixed", "fixed-smooth") if dtype == FP8 else ()))

        def add(op: str, id: str, inputs: Inputs, *these: str) -> None:
            cases.extend(Case(op, f"{name}-{form}-{id}", _quantizing(inputs, dtype, form)) for form in these)  # noqa: B023

        add("quantize_rows", "2x3x300", _rows_of(2, 3, 300), *forms)
        add("quantize_rows", "3x13824", _rows_of(3, 13824), "row", "groups")
        add("quantize_rows", "nan", _with_nan(4, 300), "row", "groups")
        add("quantize_rows", "4x1", _rows_of(4, 1), "row", "groups")
        add("quantize_rows", "0x96", lambda dtype: (torch.empty(0, 96, dtype=dtype),), "row")
        add("adaln_modulate_quantized", "B2-L7-D300-R2-split3", _adaln(2, 7, 300, 2, 3), *forms)
        add("adaln_modulate_quantized", "B1-L3-D5120-R1", _adaln(1, 3, 5120, 1, 0), "row")
        add("gated_residual_adaln_quantized", "B2-L7-D300-R2-split3", _gated(2, 7, 300, 2, 2, 3), *forms)
        add("gated_residual_adaln_quantized", "B1-L3-D3072-norm3", _gated(1, 3, 3072, 1, 0, 0), "row", "groups")
        add("gelu_tanh_quantized", "2x3x300", _gelu(2, 3, 300), *forms)
        add("gelu_tanh_quantized", "2x14336", _gelu(2, 14336, bias=False), "row", "groups")
    return cases


class Gemm(NamedTuple):
    """a [B, L, K] by b [N, K]: scales of a "fixed", "row" or "groups", of b "rows" or "blocks"; `then` of gemm_8bit_gelu and
    gemm_8bit_add."""

    L: int
    K: int
    N: int
    a: str = "row"
    b: str = "rows"
    then: str = ""
    B: int = 1
    gate: int = 1
    split: int = 0
    nan: bool = False

    @property
    def op(self) -> str:
        return "gemm_8bit" + ("_gelu" if self.then.partition("-")[0] in ("groups", "fixed") else "_add" if self.then else "")

    def inputs(self, eight: torch.dtype, dtype: torch.dtype, meta: bool = False) -> tuple[Any, ...]:
        B, L, K, N = self.B, self.L, self.K, self.N

        def make(*shape: int, seed: int = 0) -> Tensor:
            return torch.empty(shape, device="meta") if meta else _randn(*shape, seed=seed)

        def values(x: Tensor) -> Tensor:
            return (x * 40).round().clamp(-127, 127).to(eight)

        G, groups = -(-K // 128), -(-N // 128)
        a_scale = {"fixed": (), "row": (B, L, 1), "groups": (B, L, G)}[self.a]
        b_scale = {"rows": (N,), "blocks": (groups, G)}[self.b]
        a, b = values(make(B, L, K)), values(make(N, K, seed=1))
        scales = (make(*shape, seed=seed).abs().add(0.1) / 500 for shape, seed in ((a_scale, 2), (b_scale, 3)))
        of_a, of_b = scales
        if self.nan:  # as of a token that has one
            of_a[0, 1] = float("nan")
        args = a, of_a, b, of_b, make(N, seed=4).to(dtype)
        if not self.then:
            return *args, dtype
        if self.op == "gemm_8bit_gelu":
            kind, _, smooth = self.then.partition("-")
            fixed = make(seed=9) * 0 + 0.02 if kind == "fixed" else None
            return *args, kind == "groups", fixed, make(N, seed=8).abs() + 0.1 if smooth else None
        gate = make(B, self.gate, 3, N, seed=6)[:, :, 1] if self.gate else None
        return make(B, L, N, seed=5), *args, gate, self.split


_GEMMS = {
    "one-row": Gemm(1, 96, 40),
    "odd": Gemm(37, 77, 45, B=2),
    "odd-fixed": Gemm(5, 300, 130, a="fixed"),
    "tiles": Gemm(150, 272, 272),
    "fixed-tiles": Gemm(150, 272, 272, a="fixed"),
    "no-rows": Gemm(0, 32, 32),
    "one-term": Gemm(3, 1, 1),
    "nan": Gemm(3, 96, 40, nan=True),
    "groups": Gemm(9, 300, 140, a="groups"),
    "groups-blocks": Gemm(9, 400, 300, a="groups", b="blocks"),
    "row-blocks": Gemm(9, 304, 140, b="blocks"),
    "gelu-groups": Gemm(9, 80, 300, then="groups"),
    "gelu-groups-smooth": Gemm(9, 80, 128, then="groups-smooth", a="groups"),
    "add": Gemm(9, 80, 140, then="add", B=2, gate=2, split=4),
    "add-one-row": Gemm(9, 77, 40, then="add", B=2),
    "add-no-gate": Gemm(5, 80, 40, then="add", gate=0, a="groups", b="blocks"),
}
_FP8_GEMMS = {
    "gelu-fixed": Gemm(9, 80, 140, then="fixed", a="fixed"),
    "gelu-fixed-smooth": Gemm(9, 77, 40, then="fixed-smooth"),
}


def _gemm_cases() -> list[Case]:
    return [
        Case(gemm.op, f"{name}-{id}", partial(gemm.inputs, eight))
        for name, eight, gemms in (("fp8", FP8, _GEMMS | _FP8_GEMMS), ("int8", INT8, _GEMMS))
        for id, gemm in gemms.items()
    ]


class Attend(NamedTuple):
    """q [B, L, N, K] by keys and values [B, S, N, K]; values in e4m3 where `narrow`. `keys` makes them awkward."""

    L: int
    S: int
    N: int = 2
    K: int = 64
    B: int = 1
    narrow: bool = True
    interleaved: bool = False
    skip: float = 0.0
    lse: bool = False
    keys: str = ""

    def inputs(self, eight: torch.dtype, dtype: torch.dtype, meta: bool = False) -> tuple[Any, ...]:
        B, L, S, N, K = self.B, self.L, self.S, self.N, self.K
        values_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        settings = self.interleaved, self.skip, self.lse, dtype
        if meta:
            v = torch.empty(B, S, 3, N, K, dtype=values_dtype, device="meta")[:, :, 2]
            of_v = KERNELS["quantize_values"].op(v, self.interleaved) if self.narrow else (v, None, None)
            q, k = (torch.empty(B, size, N, K, dtype=eight, device="meta") for size in (L, S))
            q_scale, k_scale = (torch.empty(B, N, size, device="meta") for size in (L, S))
            return q, q_scale, k, k_scale, *of_v, *settings
        q, k, v = _randn(B, L, N, K), _randn(B, S, N, K, seed=1), _randn(B, S, 3, N, K, seed=2)[:, :, 2]
        if self.keys == "offset":  # as Wan's have
            k += 8 * _randn(1, 1, N, K, seed=3)
        elif self.keys == "dominating":
            k[:, S // 2] = 3 * q[:, 0]
        elif self.keys == "equal":
            k[:] = k[:, :1].clone()
        elif self.keys in ("far", "near", "rising"):  # all but some tiles of any size: e^-7 of their weights, or e^-4
            q, k = torch.ones_like(q), torch.full_like(k, 1 - (4 if self.keys == "near" else 7) / K**0.5)
            near = k[:, 256:] if self.keys == "rising" else k[:, :128]
            near[:] = 1 + 0.02 * torch.randn(near.shape, generator=torch.Generator().manual_seed(4))
            v[:, 128:] += 30
        if self.keys != "equal":
            k -= k.mean(1, keepdim=True)
        (q, q_scale), (k, k_scale) = (KERNELS["quantize_rows"].reference(x, eight, False, None, None) for x in (q, k))
        q_scale, k_scale = (scale[..., 0].transpose(1, 2).contiguous() for scale in (q_scale, k_scale))
        if self.keys == "nan":
            k_scale[0, 0, -1] = float("nan")
        elif self.keys == "unaligned":  # descriptors cannot read it
            k = torch.empty(k.numel() + 1, dtype=eight)[1:].view(k.shape).copy_(k)
        v = torch.stack([v] * 3, 2).to(values_dtype)[:, :, 2]
        of_v = KERNELS["quantize_values"].reference(v, self.interleaved) if self.narrow else (v, None, None)
        return q, q_scale, k, k_scale, *of_v, *settings


_ATTENDS = {
    "one": Attend(1, 1),
    "one-key": Attend(7, 1, lse=True),
    "one-query": Attend(1, 300, K=128),
    "tail1": Attend(130, 129, B=2, lse=True),
    "tail63": Attend(40, 191, N=3, K=128, lse=True),
    "tiles": Attend(128, 256, N=1, K=128),
    "text512": Attend(70, 512, N=1, K=128),
    "image257": Attend(70, 257, N=1, K=128),
    "offset": Attend(70, 200, keys="offset", lse=True),
    "dominating": Attend(70, 200, keys="dominating"),
    "equal": Attend(70, 200, keys="equal"),
    "unaligned": Attend(130, 191, keys="unaligned"),
    "unaligned-groups": Attend(70, 192, B=2, keys="unaligned"),
    "no-queries": Attend(0, 5),
    "wide-values": Attend(130, 191, B=2, narrow=False, lse=True),
    "wide-values-equal": Attend(70, 200, narrow=False, keys="equal"),
    "skip": Attend(130, 450, N=1, skip=0.01, keys="far", lse=True),
    "skip-wide-values": Attend(130, 450, N=1, skip=0.01, narrow=False, keys="far"),
    "skips-none": Attend(70, 300, N=1, skip=1e-30),
    "skips-nothing-near": Attend(130, 450, N=1, skip=0.01, keys="near", lse=True),
    "skips-by-what-was-before": Attend(130, 450, N=1, skip=0.01, keys="rising", lse=True),
    "nan": Attend(9, 20, lse=True, keys="nan"),
    "skip-nan": Attend(9, 300, skip=0.5, keys="nan"),
}


def _attention_cases() -> list[Case]:
    eights = (("int8", INT8), ("fp8", FP8))
    cases = [
        Case("attention_8bit", f"{name}-{id}", partial(attend.inputs, eight))
        for name, eight in eights
        for id, attend in _ATTENDS.items()
    ]
    for name, (B, size, N, K, M, part, turned, centred) in {
        "clip": (2, (2, 3, 2), 4, 24, 3, slice(0, None), True, True),
        "part": (1, (3, 2, 5), 1, 128, 3, slice(7, 19), True, True),
        "not-turned": (2, (2, 3, 2), 3, 32, 2, slice(0, None), False, True),
        "not-centred": (1, (2, 1, 3), 24, 128, 3, slice(0, None), True, False),
        "none": (1, (2, 1, 1), 1, 2, 2, slice(0, 0), True, True),
        "by-token": (2, (7,), 4, 24, 3, slice(0, None), True, True),
        "by-token-part": (2, (23,), 3, 128, 3, slice(7, 18), True, True),
        "by-token-none": (1, (2,), 1, 2, 2, slice(0, 0), True, False),
    }.items():
        inputs = partial(_centred, _rope(B, size, N, K, M, 2, part), turned)
        cases.append(Case("keys_center", name, partial(inputs, "")))
        cases += [
            Case("qk_norm_rope_quantized", f"{id}-{name}", partial(inputs, "centred" if centred else "plain", eight=eight))
            for id, eight in eights
        ]
    # a sample of the clip's keys, with one beyond its end
    for name, size in (("sample", (3, 25, 41)), ("by-token-sample", (3075,))):
        cases.append(Case("keys_center", name, partial(_centred, _rope(1, size, 1, 8, 2, 2), True, "")))
    for S, N, K, B, interleaved in [
        (1, 1, 1, 1, False), (32, 1, 8, 1, False), (37, 3, 64, 2, False), (37, 3, 64, 2, True), (130, 2, 128, 1, True),
        (1100, 1, 8, 1, False),
    ]:  # fmt: skip
        name = f"B{B}-S{S}-N{N}-K{K}{'-interleaved' if interleaved else ''}"
        cases.append(Case("quantize_values", name, _values(B, S, N, K, interleaved)))
    cases.append(Case("quantize_values", "constant", lambda dtype: (torch.full((1, 20, 1, 4), 3.0, dtype=dtype), False)))
    cases.append(Case("quantize_values", "nan", _values(1, 20, 1, 8, False, special=True)))
    return cases


def _centred(inputs: Inputs, turned: bool, form: str, dtype: torch.dtype, *, eight: torch.dtype = INT8) -> tuple[Any, ...]:
    """The inputs of qk_norm_rope for keys_center, or for qk_norm_rope_quantized with a centre or without."""
    x, weight, table, *others = inputs(dtype)
    table = table if turned else None
    if not form:
        return x, weight, table, *others
    heads = others[2]
    center = _randn(x.shape[0], heads, x.shape[3] // heads, seed=9) if form == "centred" else None
    return x, weight, table, center, *others, eight


def _values(B: int, S: int, N: int, K: int, interleaved: bool, special: bool = False) -> Inputs:
    """v of a packed projection; with `special` a NaN and an infinity."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        v = _randn(B, S, 3, N, K, mean=0.5)[:, :, 2]
        if special:
            v[0, 1, 0, 1], v[0, 2, 0, 2] = float("nan"), float("inf")
        packed = torch.empty(B, S, 3, N, K, dtype=dtype)[:, :, 2]
        return packed.copy_(v), interleaved

    return inputs


def arguments(case: Case | RealCase, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, ...]:
    """The case's arguments on a device, with the strides that the case gave them; meta tensors get random values."""

    names = inspect.signature(KERNELS[case.op].reference).parameters

    def move(value: object, name: str) -> object:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta and value.dtype in (FP8, INT8):
            return torch.randn(value.shape, device=device).mul_(40).clamp_(-127, 127).round_().to(value.dtype)
        if value.is_meta:
            if not value.ndim:  # a scale of all values
                return torch.tensor(0.02, device=device)
            strides = torch.empty_like(value).stride() if 0 in value.stride() else value.stride()
            made = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=device).normal_()
            return made.uniform_(0.5, 1.5).div_(40) if name.endswith("_scale") else made
        buffer = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        return buffer.to(device).as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(move(value, name) for value, name in zip(case.inputs(dtype), names, strict=True))


def run(kernel: Kernel, body: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a body of an operator returns, and what it makes of the arguments it changes; those of `args` stay."""
    names = list(inspect.signature(kernel.reference).parameters)
    own = [arg.clone() if name in kernel.mutates and arg is not None else arg for name, arg in zip(names, args, strict=True)]
    returned = body(*own)
    outputs = (returned,) if isinstance(returned, Tensor) else [t for t in returned or () if t is not None]
    if kernel.name == "qk_norm_rope_quantized":
        values = dequantized(outputs[0], outputs[1].transpose(2, 3)[..., None])
        outputs = [*outputs, values.clone(memory_format=torch.contiguous_format)]
    elif kernel.name == "quantize_values":
        values, scale, center = outputs
        outputs = [*outputs, (values.to(scale.dtype) * scale[..., None] + center[..., None])[..., : args[0].shape[1]]]
    elif "quantize" in kernel.name or kernel.name == "gemm_8bit_gelu":
        fixed = next((arg for name, arg in zip(names, own, strict=True) if name == "fixed"), None)
        outputs = [*outputs, dequantized(outputs[0], outputs[1] if fixed is None else fixed)]
    return [*outputs, *(arg for name, arg in zip(names, own, strict=True) if name in kernel.mutates and arg is not None)]


def dequantized(values: Tensor, scale: Tensor) -> Tensor:
    """values [..., D] times their scale [], [..., 1] or [..., G], in fp32 or what is wider."""
    D = values.shape[-1]
    if scale.ndim and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(128, -1)[..., :D]
    return values.to(scale.dtype) * scale


def dtypes_of(args: tuple[Any, ...]) -> set[Any]:
    """Those of its tensors and those it names."""
    return {a.dtype if isinstance(a, Tensor) else a for a in args if isinstance(a, (Tensor, torch.dtype))}


def in_fp64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with floating-point tensors, and the dtype of results, in fp64; what is rounded to 8 bits is not."""

    def widened(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) and value.itemsize > 1 else value

    return tuple(widened(value) for value in args)


def _meta(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype, device="meta")


# tokens of speech-to-video's later clips at 1024 x 704: 20 latent frames, a reference and 1.5 frames' worth of history
_S2V_TOKENS = 63360
# task, (T, H, W) tokens, width, feed-forward width, channels of the latents, modulation rows, tokens of row 0
_TASKS = (
    ("t2v-1.3B-480p", (21, 30, 52), 1536, 8960, 16, 1, 0),
    ("ti2v-5B-720p", (31, 22, 40), 3072, 14336, 48, 2, 880),
    ("t2v-14B-720p", (21, 45, 80), 5120, 13824, 16, 1, 0),
)


def _real_dit_cases() -> list[RealCase]:
    """Every operator of the DiT at the rows and widths of three tasks."""
    cases = []
    for task, (T, H, W), D, F, C, R, split in _TASKS:
        L, latents = T * H * W, (C, T, 2 * H, 2 * W)
        rows = [_meta32(1, R, 6, D)(torch.float32)[:, :, i] for i in range(3)]
        norm = [_meta32(1, 1, D)(torch.float32)] * 2

        def add(op: str, name: str, inputs: Inputs, registers: int, loads: int | None, stores: int | None = 0) -> None:
            cases.append(RealCase(op, name, inputs, registers, loads, stores))

        def itself(dtype: torch.dtype) -> torch.dtype:
            return dtype

        stream, packed, text = _meta32(1, L, D), _meta(1, L, 3, D), _meta(1, L, 1, D)
        table, clips = _meta32(2, max(T, H, W), 64), [_meta32(*latents)] * 6
        gated = (stream, _meta(1, L, D), rows[0])
        add("adaln_modulate", task, _args(stream, *rows[:2], split, 1e-6, itself), 64, 0)
        add("gated_residual_adaln", task, _args(*gated, *rows[1:], split, 1e-6, False, itself), 64, 0)
        add("gated_residual_adaln", f"{task}-norm3", _args(*gated, *norm, split, 1e-6, True, itself), 64, 0)
        add("qk_norm_rope", task, _args(packed, _meta32(2, D), table, (T, H, W), 0, D // 128, 1e-6), 64, 8)
        add("qk_norm_rope", f"{task}-cross", _args(text, _meta32(1, D), None, (1, 1, 1), 0, 1, 1e-6), 64, 0)
        add("gelu_tanh", task, _args(_meta(1, L, F), None), 40, 0)
        known = _meta32(C, 1, 2 * H, 2 * W)
        add("guidance_step", task, _args(*clips, _meta32(11), known, None), 64, 10)
        add("guidance_step", f"{task}-noised", _args(*clips, _meta32(11), known, clips[0]), 64, 11)
        add("patchify", task, _args(_meta32(1, *latents), itself), 80, None)
        add("unpatchify", task, _args(_meta32(1, L, 4 * C), (T, 2 * H, 2 * W)), 80, 0, None)
    packed, weight, table = _meta(1, _S2V_TOKENS, 3, 5120), _meta32(2, 5120), _meta32(2, _S2V_TOKENS, 64)
    cases.append(RealCase("qk_norm_rope", "s2v-14B-720p", _args(packed, weight, table, (), 0, 40, 1e-6), 64, 2, 0))
    return cases


def _real_8bit_cases() -> list[RealCase]:
    """What is quantised at each task's width, and the products of a 14B block and of one whose tokens no tile divides."""
    cases = []
    for task, (T, H, W), D, F, _, R, split in _TASKS:
        L = T * H * W
        rows = [_meta32(1, R, 6, D)(torch.float32)[:, :, i] for i in range(3)]
        stream, y, hidden = _meta32(1, L, D), _meta(1, L, D), _meta(1, L, F)
        inputs: dict[str, Inputs] = {
            "quantize_rows": _args(y),
            "adaln_modulate_quantized": _args(stream, *rows[1:], split, 1e-6),
            "gated_residual_adaln_quantized": _args(stream, y, *rows, split, 1e-6, False),
            "gelu_tanh_quantized": _args(hidden, None),
        }
        more = {"t2v-1.3B-480p": [(FP8, "groups"), (FP8, "fixed-smooth")], "t2v-14B-720p": [(INT8, "row")]}
        forms = [(FP8, "row"), *more.get(task, [])]
        for (op, build), (dtype, form) in itertools.product(inputs.items(), forms):
            name = f"{task}-{'fp8' if dtype == FP8 else 'int8'}-{form}"
            since = 89 if dtype == FP8 else 80
            made = partial(_on_meta, _quantizing(build, dtype, form))
            cases.append(RealCase(op, name, made, 64, 1, 1, since=since, dtypes=(torch.bfloat16,)))
    gemms = {
        "t2v-14B-qkv": Gemm(32760, 5120, 15360),
        "ti2v-5B-down": Gemm(27280, 14336, 3072),
        "t2v-14B-up-fixed": Gemm(32760, 5120, 13824, a="fixed", then="fixed"),
        "t2v-14B-up-groups": Gemm(32760, 5120, 13824, a="groups", b="blocks", then="groups"),
        "t2v-14B-down-add": Gemm(32760, 13824, 5120, then="add"),
        "t2v-14B-down-blocks": Gemm(32760, 13824, 5120, a="groups", b="blocks"),
    }
    for (id, gemm), (name, eight) in itertools.product(gemms.items(), (("fp8", FP8), ("int8", INT8))):
        if eight == FP8 or gemm.then != "fixed":
            made = partial(gemm.inputs, eight, meta=True)
            settings = {"products": name, "since": 89 if eight == FP8 else 80, "dtypes": (torch.bfloat16,)}
            cases.append(RealCase(gemm.op, f"{name}-{id}", made, 255, shared=228 * 1024, **settings))  # type: ignore[arg-type]
    return cases


def _real_attention_cases() -> list[RealCase]:
    """Self-attention of the longest clip and of one whose tokens no tile divides; what comes before it at each width."""
    cases = []
    on_grids = [(task, grid, prod(grid), max(grid), D) for task, grid, D, *_ in _TASKS]
    for task, grid, L, rows, D in [*on_grids, ("s2v-14B-720p", (), _S2V_TOKENS, _S2V_TOKENS, 5120)]:
        packed, weight, table = _meta(1, L, 3, D), _meta32(2, D), _meta32(2, rows, 64)
        settings = grid, 0, D // 128, 1e-6
        # rows of a table by token are loaded whole
        narrow = 10 if grid else 2
        cases.append(RealCase("keys_center", task, _args(packed, weight, table, *settings), 128, narrow, 0))
        center = _meta32(1, D // 128, 128)
        for name, eight in (("int8", INT8), ("fp8", FP8)):
            if eight == INT8 or task == "ti2v-5B-720p":
                inputs = _args(packed, weight, table, center, *settings, eight)
                since = 89 if eight == FP8 else 80
                id = f"{name}-{task}"
                cases.append(
                    RealCase("qk_norm_rope_quantized", id, inputs, 96, 2 * narrow, None, since=since, dtypes=(torch.bfloat16,))
                )
    for task, _, L, _, D in on_grids:
        values = partial(
            _on_meta,
            lambda dtype, N=D // 128, L=L: (torch.empty(1, L, 3, N, 128, dtype=dtype, device="meta")[:, :, 2], False),
        )
        cases.append(RealCase("quantize_values", task, values, 128, 2, None, since=89, dtypes=(torch.bfloat16,)))
    attends = {
        "t2v-14B-720p": Attend(75600, 75600, 40, 128),
        "ti2v-5B-720p": Attend(27280, 27280, 24, 128, lse=True),
        "ti2v-5B-720p-skip": Attend(27280, 27280, 24, 128, skip=0.01),
        "t2v-14B-text": Attend(75600, 512, 40, 128),
        "t2v-14B-wide-values": Attend(75600, 75600, 40, 128, narrow=False),
        "of-64-channels": Attend(4097, 4097, 16, 64),
    }
    for (id, attend), (name, eight) in itertools.product(attends.items(), (("int8", INT8), ("fp8", FP8))):
        if eight == INT8 or id in ("t2v-14B-720p", "ti2v-5B-720p"):
            made = partial(attend.inputs, eight, meta=True)
            settings = {"products": name, "since": 89 if attend.narrow else 80, "dtypes": (torch.bfloat16,)}
            cases.append(RealCase("attention_8bit", f"{name}-{id}", made, 255, None, None, 228 * 1024, **settings))  # type: ignore[arg-type]
    return cases


def _on_meta(inputs: Inputs, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs(dtype))


def _meta32(*shape: int) -> Callable[[torch.dtype], Tensor]:
    """fp32 whatever the case's dtype."""
    return lambda dtype: torch.empty(shape, dtype=torch.float32, device="meta")


def _args(*values: Any) -> Inputs:
    """Callables are given the case's dtype."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(v(dtype) if callable(v) else v for v in values)

    return inputs


CASES = [*_frames_to_uint8_cases(), *_cases(), *_vae_cases(), *_quantizing_cases(), *_gemm_cases(), *_attention_cases()]

REAL_CASES = [
    RealCase("frames_to_uint8", "vae2.1-480p-4", _frames(4, 480, 832, 1, 0, False, meta=True), 40),
    RealCase("frames_to_uint8", "vae2.2-720p-4", _frames(4, 352, 640, 2, 0, False, meta=True), 40),
    *_real_dit_cases(),
    *_real_vae_cases(),
    *_real_8bit_cases(),
    *_real_attention_cases(),
]
