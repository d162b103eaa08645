"""Causal convolution over frames, height and width as one implicit matrix product, for every form that the Wan VAE has.

    y[f, n, i, j] = bias[n] + sum over t, a, b, c of weight[n, c, t, a, b] frames[s_t f + t, c, s i + a - p, s j + b - p]

`frames` is the history and behind it x; without a history, zeros and x. F frames of a chunk, C channels, H W height and width
at that level; a position's channels lie side by side (channels-last), in activations and in weights. Nothing is padded,
joined or copied: history and input are read where they lie, and the next history is written on the way. At stride 1 zeros
surround height and width (p = 1 for a kernel of 3), at stride 2 they follow the last row and column (p = 0). `up` doubles
height and width of the frames before the convolution, nearest. `interleave` takes the two halves of the channels for two
frames in a row. A `skip` is added to the result before it is rounded: as it is, or from another resolution as the levels of
the Wan 2.2 VAE do, nearest-doubled or averaged over the cells that merge. Wan VAE: arXiv 2503.20314, section 4.1.

It is bound by arithmetic: 54 Cin Cout operations per position of a 3 x 3 x 3 kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _check, _conv_cpu
from ._op import register


@triton.jit
def _causal_conv3d_kernel(
    x_ptr,  # [frames, H, W, CIN]
    past_ptr,  # [HISTORY, H, W, CIN], not read without HAS_PAST
    weight_ptr,  # [COUT, K, K, TAPS, CIN], of whose TAPS over time the last KT are taken
    bias_ptr,  # [COUT]
    skip_ptr,  # what is added to the result, as SKIP says
    out_ptr,  # [frames', H', W', COUT], or [2 frames', H', W', COUT / 2] where INTERLEAVE
    kept_ptr,  # [HISTORY, H, W, CIN], not written without KEEP
    H,
    W,
    H_OUT,
    W_OUT,
    SKIP: tl.constexpr,
    SKIP_F: tl.constexpr,
    SKIP_C: tl.constexpr,
    HAS_PAST: tl.constexpr,
    HISTORY: tl.constexpr,
    KEEP: tl.constexpr,
    LEAD: tl.constexpr,
    KT: tl.constexpr,
    K: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE: tl.constexpr,
    UP: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program per BLOCK_M positions of an output frame and BLOCK_N channels; int64: chunks exceed 2**31 elements
    f = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    i, j = m // W_OUT, m % W_OUT
    PAD: tl.constexpr = K // 2 if STRIDE == 1 else 0
    BLOCKS: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    size = tl.cast(H, tl.int64) * W * CIN  # H may be a constant: 1 is one when compiled
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(KT * K * K * BLOCKS):
        tap, c = step // BLOCKS, step % BLOCKS * BLOCK_K + k
        which = tap % (K * K) * TAPS + tap // (K * K) + TAPS - KT
        row, column = STRIDE * i + tap // K % K - PAD, STRIDE * j + tap % K - PAD
        frame = STRIDE_T * f + tap // (K * K) - LEAD
        base, lowest = x_ptr + frame * size, 0
        if HAS_PAST:
            base = tl.where(frame < 0, past_ptr + (frame + HISTORY) * size, base)
        else:
            lowest = tl.where(frame < 0, UP * H, 0)  # no row: zeros
        inside = (m < H_OUT * W_OUT) & (row >= lowest) & (row < UP * H) & (column >= 0) & (column < UP * W)
        place = (row // UP * W + column // UP) * CIN
        data = tl.load(base + place[:, None] + c[None, :], mask=inside[:, None] & (c < CIN)[None, :], other=0.0)
        taken = weight_ptr + n[None, :].to(tl.int64) * (K * K * TAPS * CIN) + which * CIN + c[:, None]
        weight = tl.load(taken, mask=(n < COUT)[None, :] & (c < CIN)[:, None], other=0.0)
        acc = tl.dot(data, weight, acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + n, mask=n < COUT, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVE:
        to_frame, channel, C_OUT = 2 * f + n // (COUT // 2), n % (COUT // 2), COUT // 2
    else:
        to_frame, channel, C_OUT = f + 0 * n, n, COUT
    target = (to_frame[None, :] * (H_OUT * W_OUT) + m[:, None]) * C_OUT + channel[None, :]
    mask = (m < H_OUT * W_OUT)[:, None] & (n < COUT)[None, :]
    if SKIP == "same":
        acc += tl.load(skip_ptr + target, mask=mask, other=0.0).to(tl.float32)
    elif SKIP == "repeat":  # [frames' / SKIP_F, H' / 2, W' / 2, SKIP_C COUT]
        cell = (f // SKIP_F * (H_OUT // 2) + i // 2) * (W_OUT // 2) + j // 2
        added = cell * (SKIP_C * COUT) + i % 2 * (SKIP_C - 1)
        acc += tl.load(skip_ptr + added[:, None] + n[None, :] * SKIP_C, mask=mask, other=0.0).to(tl.float32)
    elif SKIP == "mean":  # [SKIP_F frames', 2 H', 2 W', COUT / SKIP_F]
        for corner in tl.static_range(4):
            cell = (2 * i + corner // 2) * (2 * W_OUT) + 2 * j + corner % 2
            added = (SKIP_F * f + n % SKIP_F)[None, :] * (4 * H_OUT * W_OUT) + cell[:, None]
            quarter = tl.load(skip_ptr + added * (COUT // SKIP_F) + (n // SKIP_F)[None, :], mask=mask, other=0.0)
            acc += 0.25 * quarter.to(tl.float32)
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP:  # noqa: SIM102  one is known when it is compiled, the other is not
        # the programs of the last frame and first channels see every position of the input once
        if (tl.program_id(1) == 0) & (f == tl.num_programs(2) - 1):
            for part in range(HISTORY * BLOCKS):
                from_frame, depth = STRIDE_T * (f + 1) - HISTORY + part // BLOCKS, part % BLOCKS * BLOCK_K + k
                source, end = x_ptr + from_frame * size, H * W
                if HAS_PAST:
                    source = tl.where(from_frame < 0, past_ptr + (from_frame + HISTORY) * size, source)
                else:
                    end = tl.where(from_frame < 0, 0, H * W)
                own = (m * CIN)[:, None] + depth[None, :]
                valid = (depth < CIN)[None, :]
                last = tl.load(source + own, mask=(m < end)[:, None] & valid, other=0.0)
                tl.store(kept_ptr + part // BLOCKS * size + own, last, mask=(m < H * W)[:, None] & valid)


_CANDIDATES = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 64, 4))
    for k in (32, 64)
    for stages in (3, 4)
)


def _config(CIN: int, COUT: int, itemsize: int, kind: str) -> dict[str, int]:
    """Tiles; not tuned on a device yet. An averaged skip needs registers of its own."""
    N = max(16, triton.next_power_of_2(COUT))
    K = min(64, max(16, triton.next_power_of_2(CIN)))
    if itemsize == 4:
        return {"BLOCK_M": 64, "BLOCK_N": min(64, N), "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": min(64 if kind == "mean" else 128, N), "BLOCK_K": K, "num_warps": 8, "num_stages": 3}


class Form(NamedTuple):
    """What sets the forms apart, as the whole numbers that an operator takes."""

    stride_t: int = 1
    stride: int = 1
    up: int = 1
    interleave: int = 0
    tf32: int = 0
    keep: int = 1


def history(KT: int, stride_t: int) -> int:
    """Frames before a chunk that its first output sees."""
    return max(KT - stride_t, 0)


def output_shape(x: Tensor, weight: Tensor, form: Sequence[int]) -> tuple[int, ...]:
    stride_t, stride, up, interleave, *_ = form
    frames, _, H, W = x.shape
    COUT, _, _, K, _ = weight.shape
    # at stride 2 one row of zeros follows
    rows, columns = ((up * size if stride == 1 else (size + 1 - K) // 2 + 1) for size in (H, W))
    frames //= stride_t
    return (2 * frames, COUT // 2, rows, columns) if interleave else (frames, COUT, rows, columns)


def _frames(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _kept(x: Tensor, weight: Tensor, form: Sequence[int]) -> Tensor:
    return _frames(x, (history(weight.shape[2], form[0]) if form[-1] else 0, *x.shape[1:]))


def _skipping(skip: Tensor | None, shape: Sequence[int]) -> tuple[str, int, int]:
    """How a skip is added to a result of that shape, the frames of one per the other's, and its channels per one of those.

    "repeat": [F' or F' / 2, C' or 2C', H' / 2, W' / 2]. Every frame and position is taken for those it grows into; of twice as
    many channels even rows take the even ones and odd rows the odd.
    "mean": [F', C', 2H', 2W'] or [2F', C' / 2, 2H', 2W']. Four positions are averaged; channels 2c and 2c + 1 take the earlier
    and the later frame of a pair.
    "" and 0: it does not fit.
    """
    if skip is None or skip.shape == tuple(shape):
        return "none" if skip is None else "same", 1, 1
    (frames, channels, rows, columns), (F_, C, H, W) = skip.shape, shape
    if (2 * rows, 2 * columns) == (H, W) and frames in (F_, F_ / 2) and channels in (C, 2 * C):
        return "repeat", F_ // frames, channels // C
    if (rows, columns) == (2 * H, 2 * W) and (frames, channels) in ((F_, C), (2 * F_, C / 2)):
        return "mean", frames // F_, 1
    return "", 0, 0


def add_skip_(out: Tensor, skip: Tensor) -> None:
    """Add a skip [F, C, H, W] to out [F', C', H', W'], in place and in plain PyTorch, as a convolution adds it."""
    kind, count, width = _skipping(skip, out.shape)
    if kind == "same":
        out += skip
    elif kind == "repeat":
        for f, row, column in product(range(count), range(2), range(2)):
            out[f::count, :, row::2, column::2] += skip[:, row * (width - 1) :: width]
    else:
        mean = F.avg_pool2d(skip, 2)
        for f in range(count):
            out[:, f::count] += mean[f::count]


def _run(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor | None,
    form: Sequence[int],
    out: Tensor,
) -> Tensor:
    stride_t, stride, up, interleave, tf32, _ = form
    frames, CIN, H, W = x.shape
    COUT, _, KT, K, _ = weight.shape
    kind, skip_f, skip_c = _skipping(skip, out.shape)
    config, kept = _config(CIN, COUT, x.itemsize, kind), _kept(x, weight, form)
    # a lone frame behind zeros needs the last of the taps over time
    taken = 1 if past is None and frames == 1 else KT
    H_OUT, W_OUT = out.shape[2:]
    grid = (triton.cdiv(H_OUT * W_OUT, config["BLOCK_M"]), triton.cdiv(COUT, config["BLOCK_N"]), frames // stride_t)
    if out.numel():
        with torch.cuda.device_of(x):
            _causal_conv3d_kernel[grid](
                x,
                past,
                weight,
                bias,
                skip,
                out,
                kept,
                H,
                W,
                H_OUT,
                W_OUT,
                SKIP=kind,
                SKIP_F=skip_f,
                SKIP_C=skip_c,
                HAS_PAST=past is not None,
                HISTORY=history(KT, stride_t),
                KEEP=kept.shape[0] > 0,
                LEAD=taken - stride_t if taken > 1 else 0,
                KT=taken,
                K=K,
                STRIDE_T=stride_t,
                STRIDE=stride,
                UP=up,
                INTERLEAVE=bool(interleave),
                CIN=CIN,
                COUT=COUT,
                TAPS=KT,
                PRECISION="tf32" if tf32 else "ieee",
                **config,
            )
    return kept


def _launch(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, skip: Tensor | None, form: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out = _frames(x, output_shape(x, weight, form))
    return out, _run(x, past, weight, bias, skip, form, out)


def _launch_add(out: Tensor, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, form: Sequence[int]) -> Tensor:
    return _run(x, past, weight, bias, out, form, out)


def _convolved(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, form: Sequence[int], out: Tensor | None) -> Tensor:
    """A new result, or one added to out."""
    stride_t, stride, up, interleave, *_ = form
    KT, K = weight.shape[2:4]
    lead = history(KT, stride_t)
    if x.device.type == "cpu" and x.dtype == torch.float32:  # the same in the forms that are fast there
        if lead == 2 and not interleave:
            return _conv_cpu.causal(x, past, weight, bias, out)
        if (KT, K) == (3, 1) and out is None:
            return _conv_cpu.over_time(x, past, weight, bias, stride_t, 1 + interleave)
        if up == 2 and out is None and x.shape[2] * x.shape[3] >= _conv_cpu.LARGE_FRAME:
            return _conv_cpu.doubled(x, weight[:, :, 0], bias)
    frames = torch.cat([x.new_zeros(lead, *x.shape[1:]) if past is None else past, x]) if lead else x
    if up == 2:
        frames = F.interpolate(frames, scale_factor=2, mode="nearest-exact")
    if KT == 1 and stride == 1:
        y = F.conv2d(frames, weight[:, :, 0], bias, padding=K // 2)
    elif KT == 1:
        y = F.conv2d(F.pad(frames, (0, 1, 0, 1)), weight[:, :, 0], bias, stride=2)
    else:
        stacked, padding = frames.transpose(0, 1)[None], (0, K // 2, K // 2)
        y = F.conv3d(stacked, weight, bias, stride=(stride_t, 1, 1), padding=padding)[0].transpose(0, 1)
    if interleave:
        y = y.unflatten(1, (2, -1)).flatten(0, 1)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.add_(y)


def _last_frames(x: Tensor, past: Tensor | None, weight: Tensor, form: Sequence[int]) -> Tensor:
    kept = _kept(x, weight, form)
    new = min(len(kept), len(x))
    kept[len(kept) - new :] = x[len(x) - new :]
    if new < len(kept):
        kept[: len(kept) - new] = 0 if past is None else past[new:]
    return kept


def _reference(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, skip: Tensor | None, form: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out = _convolved(x, past, weight, bias, form, None)
    if skip is not None:
        add_skip_(out, skip)
    return out, _last_frames(x, past, weight, form)


def _reference_add(out: Tensor, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, form: Sequence[int]) -> Tensor:
    _convolved(x, past, weight, bias, form, out)
    return _last_frames(x, past, weight, form)


def _fake(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, skip: Tensor | None, form: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _frames(x, output_shape(x, weight, form)), _kept(x, weight, form)


def _fake_add(out: Tensor, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, form: Sequence[int]) -> Tensor:
    return _kept(x, weight, form)


_op = register("causal_conv3d", launch=_launch, reference=_reference, fake=_fake)
_op_add = register("causal_conv3d_add", launch=_launch_add, reference=_reference_add, fake=_fake_add, mutates=("out",))


def conv_weight(weight: Tensor) -> Tensor:
    """[Cout, Cin, KT, K, K] or [Cout, Cin, K, K] with the input channels innermost and behind them the taps over time, as a 2-D
    kernel over the channels of KT frames has them. A copy, but where it lies so already."""
    whole = weight if weight.ndim == 5 else weight[:, :, None]
    laid = whole.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    return laid if weight.ndim == 5 else laid[:, :, 0]


def causal_conv3d(
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    form: Sequence[int] = Form(),
    *,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve a chunk of frames, and give the history that the next chunk needs.

    Args:
        x: [F, Cin, H, W] fp32, bf16 or fp16, channels-last; F a multiple of stride_t.
        past: [history, Cin, H, W] in x's dtype, channels-last: 2 frames at stride_t 1, 1 at 2; None for zeros.
        weight: [Cout, Cin, KT, K, K] in x's dtype, laid out by `conv_weight`; KT and K are 1 or 3.
        bias: [Cout] in x's dtype.
        form: a `Form`: stride_t 2 halves the frames, stride 2 height and width, up 2 doubles these first; interleave takes the
            halves of the channels for two frames in a row; tf32 lets products of fp32 round to TF32; without keep
            no history is given.
        skip: [F', C', H', W'] in x's dtype, channels-last, added to the result; or [F' or F' / 2, C' or 2C', H' / 2, W' / 2],
            repeated over the cells that a position grows into (of two channels even rows take the first, odd rows the
            second); or [F', C', 2H', 2W'] or [2F', C' / 2, 2H', 2W'], averaged over the cells that merge (of two channels the
            first takes the earlier frame, the second the later).

    Returns:
        The result [F', Cout', H', W'], channels-last, accumulated in fp32 and rounded once, with F' = F / stride_t (twice as
        many of half the channels where interleaved); and the next history [history, Cin, H, W], of no frames where KT is 1 or
        nothing is to be kept.

    Raises:
        ValueError: shapes, dtypes, layouts or forms are others.
    """
    _checked("causal_conv3d", x, past, weight, bias, form, skip=skip)
    return _op(x, past, weight, bias, skip, form)


def causal_conv3d_add(
    out: Tensor, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, form: Sequence[int] = Form()
) -> Tensor:
    """`causal_conv3d` whose result is added to a tensor in place.

    Args:
        out: [F', Cout', H', W'] in x's dtype, channels-last; changed.
        x: [F, Cin, H, W] fp32, bf16 or fp16, channels-last.
        past: [history, Cin, H, W] in x's dtype, channels-last; None for zeros.
        weight: [Cout, Cin, KT, K, K] in x's dtype, laid out by `conv_weight`.
        bias: [Cout] in x's dtype.
        form: as there.

    Returns:
        The next history [history, Cin, H, W].

    Raises:
        ValueError: shapes, dtypes, layouts or forms are others.
    """
    _checked("causal_conv3d_add", x, past, weight, bias, form, out=out)
    return _op_add(out, x, past, weight, bias, form)


def _checked(
    op: str,
    x: Tensor,
    past: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    form: Sequence[int],
    *,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    stride_t, stride, up, interleave, *_ = form
    fits = x.ndim == 4 and weight.ndim == 5 and x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]
    _check.shapes(op, "x [F, Cin, H, W], weight [Cout, Cin, KT, K, K] and bias [Cout]", fits, x=x, weight=weight, bias=bias)
    KT, K = weight.shape[2:4]
    _check.shapes(op, "kernels of 1 or 3", weight.shape[4] == K and {KT, K} <= {1, 3}, weight=weight)
    allowed = {1: {1, 2}, 3: {1}}[KT], {1: {1}, 3: {1, 2}}[K] if KT == 1 else {1}, {1, 2} if KT == 3 and K == 1 else {1}
    if up not in allowed[0] or stride not in allowed[1] or stride_t not in allowed[2] or (up == stride == 2):
        raise ValueError(
            f"{op} wants stride 2 for kernels of 1 x 3 x 3 alone, stride_t 2 for 3 x 1 x 1, up 2 for one frame; got stride "
            f"{stride}, stride_t {stride_t}, up {up} for {KT} x {K} x {K}"
        )
    if x.shape[0] < 1 or x.shape[0] % stride_t or (stride_t == 2 and past is None) or (interleave and weight.shape[0] % 2):
        raise ValueError(
            f"{op} wants frames, pairs of them behind a history at stride_t 2, and pairs of channels to interleave; got "
            f"{x.shape[0]} frames, {weight.shape[0]} channels, " + ("no history" if past is None else "a history")
        )
    lead, shape = history(KT, stride_t), output_shape(x, weight, form)
    if past is not None:
        _check.shapes(op, f"past of {lead} frames shaped as x's", past.shape == (lead, *x.shape[1:]), x=x, past=past)
    if out is not None:
        _check.shapes(op, f"out {shape}", out.shape == shape, out=out)
    if skip is not None:
        fits = bool(_skipping(skip, shape)[0]) and not interleave
        _check.shapes(op, f"a skip that fits a result {shape}, and none where interleaved", fits, skip=skip)
    _check.dtypes(op, _check.FLOATS, x=x)
    _check.dtypes(op, (x.dtype,), past=past, weight=weight, bias=bias, skip=skip, out=out)
    _check.one_device(op, x=x, past=past, weight=weight, bias=bias, skip=skip, out=out)
    _check.channels_last(op, x=x, past=past, skip=skip, out=out)
    if not weight.permute(0, 3, 4, 2, 1).is_contiguous():
        raise ValueError(f"{op} wants weight as conv_weight lays it out, got strides {weight.stride()}")
