"""Attention in 8 bits: softmax(q k^T / sqrt(K)) v without a mask, of queries and keys in int8 or e4m3.

    x = (q8 k8^T) q_scale k_scale log2(e) / sqrt(K)            a scale per token and head; int8 sums are exact
    p = 2^(x - max x) 448, rounded to e4m3                     the whole range of e4m3
    out = (p v8) / (sum p) v_scale + v_center                  a scale and a centre per channel

after SageAttention2 (arXiv 2411.10958) and the Wan report (arXiv 2503.20314, 4.3.3). `qk_norm_rope_quantized` gives q and k,
`quantize_values` v. Without FP8 (sm_80, sm_86) v stays in bf16 or fp16, and p is rounded to that. Products of e4m3 are summed
over one tile of keys in the tensor cores, which keep some 14 bits of a sum, and over the tiles in fp32.

B batch, L queries, S keys, N heads, K head width, 64 or 128. Operations: 4 B N L S K. Skip-softmax (arXiv 2512.12087): a tile
in which no p reaches `skip` times the largest of its row so far is left out.
"""

from __future__ import annotations

from math import log, log2, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _check
from ._op import cuda_extension, register, why_no_extension
from .gemm_8bit import _capability
from .quantize_rows import EIGHT_BITS
from .quantize_values import GROUP, INTERLEAVED, padded

_OFFSET = tl.constexpr(log2(448.0))
_LN2 = tl.constexpr(log(2.0))


@triton.jit
def _attention_8bit_kernel(
    q_ptr,  # [B, L, N, K] int8 or e4m3
    q_scale_ptr,  # [B, N, L] fp32
    k_ptr,  # [B, S, N, K] as q, or a descriptor of [B S, N K]
    k_scale_ptr,  # [B, N, S] fp32
    v_ptr,  # [B, N, K, ceil(S / 16) 16] e4m3, or a descriptor of it as rows; or [B, S, N, K]
    v_scale_ptr,  # [B, N, K] fp32
    v_center_ptr,  # [B, N, K] fp32
    out_ptr,  # [B, L, N, K]
    lse_ptr,  # [B, N, L] fp32
    L,
    S,
    v_batch,
    v_token,
    factor,
    skip,
    N: tl.constexpr,
    K: tl.constexpr,
    NARROW: tl.constexpr,
    SKIP: tl.constexpr,
    LSE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # programs of one head are neighbours, and read its keys and values from cache
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * N + n
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.arange(0, K)
    at = ((b * L + token)[:, None] * N + n) * K + channel[None, :]
    q = tl.load(q_ptr + at, mask=(token < L)[:, None], other=0.0)
    q_scale = tl.load(q_scale_ptr + head * L + token, mask=token < L, other=0.0) * factor
    limit = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    out = tl.zeros([BLOCK_L, K], tl.float32)
    whole = S // BLOCK_S * BLOCK_S
    for s0 in tl.range(0, whole, BLOCK_S):
        limit, total, out = _attend(
            q, q_scale, k_ptr, k_scale_ptr, v_ptr, limit, total, out, s0, S, b, n, head, v_batch, v_token, skip,
            N, K, NARROW, SKIP, TMA, False, BLOCK_S,
        )  # fmt: skip
    if whole < S:
        limit, total, out = _attend(
            q, q_scale, k_ptr, k_scale_ptr, v_ptr, limit, total, out, whole, S, b, n, head, v_batch, v_token, skip,
            N, K, NARROW, SKIP, TMA, True, BLOCK_S,
        )  # fmt: skip
    out *= (1 / total)[:, None]
    if NARROW:
        scale = tl.load(v_scale_ptr + head * K + channel)
        out = out * scale[None, :] + tl.load(v_center_ptr + head * K + channel)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(token < L)[:, None])
    if LSE:
        offset: tl.constexpr = _OFFSET if NARROW else 0.0
        tl.store(lse_ptr + head * L + token, (limit - offset + tl.log2(total)) * _LN2, mask=token < L)


@triton.jit
def _attend(
    q, q_scale, k_ptr, k_scale_ptr, v_ptr, limit, total, out, s0, S, b, n, head, v_batch, v_token, skip,
    N: tl.constexpr, K: tl.constexpr, NARROW: tl.constexpr, SKIP: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values, from s0 on: the rows' maxima so far, their sums, and the sums of values."""
    s = s0 + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, K)
    if TMA:
        k = k_ptr.load([(b * S + s0).to(tl.int32), n * K])
    else:
        place = ((b * S + s)[:, None] * N + n) * K + channel[None, :]
        k = tl.load(k_ptr + place, mask=(s < S)[:, None], other=0.0) if TAIL else tl.load(k_ptr + place)
    k_scale = tl.load(k_scale_ptr + head * S + s, mask=s < S, other=0.0) if TAIL else tl.load(k_scale_ptr + head * S + s)
    x = tl.dot(q, k.T).to(tl.float32) * k_scale[None, :]
    if TAIL:
        x = tl.where((s < S)[None, :], x, float("-inf"))
    most = tl.max(x, axis=1) * q_scale
    if SKIP:
        # a NaN is needed; a row beyond the last query, whose scale is 0, is not
        if tl.max(tl.where((most - limit < skip) | (q_scale == 0.0), 0, 1), axis=0) > 0:
            limit, total, out = _added(
                x, most, q_scale, v_ptr, limit, total, out, s0, S, b, n, head, v_batch, v_token, N, K, NARROW, TMA, TAIL,
                BLOCK_S,
            )  # fmt: skip
    else:
        limit, total, out = _added(
            x, most, q_scale, v_ptr, limit, total, out, s0, S, b, n, head, v_batch, v_token, N, K, NARROW, TMA, TAIL, BLOCK_S
        )
    return limit, total, out


@triton.jit
def _added(
    x, most, q_scale, v_ptr, limit, total, out, s0, S, b, n, head, v_batch, v_token,
    N: tl.constexpr, K: tl.constexpr, NARROW: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The same with the exponentials of scores x, and their products with values, added."""
    s = s0 + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, K)
    new = tl.maximum(limit, most)
    offset: tl.constexpr = _OFFSET if NARROW else 0.0
    p = tl.exp2(x * q_scale[:, None] - (new - offset)[:, None])
    shrink = tl.exp2(limit - new)
    total = total * shrink + tl.sum(p, axis=1)
    if TMA:
        v = v_ptr.load([(head * K).to(tl.int32), s0]).T
    elif NARROW:
        S16 = (S + 15) // 16 * 16
        at = v_ptr + (head * K + channel)[:, None] * S16 + s[None, :]
        v = (tl.load(at, mask=(s < S16)[None, :], other=0.0) if TAIL else tl.load(at)).T
    else:
        at = v_ptr + b * v_batch + s.to(tl.int64)[:, None] * v_token + n * K + channel[None, :]
        v = tl.load(at, mask=(s < S)[:, None], other=0.0) if TAIL else tl.load(at)
    if NARROW:  # the sum over this tile alone, and a multiply-add that no compiler moves into the product
        out = tl.fma(out, tl.broadcast_to(shrink[:, None], out.shape), tl.dot(p.to(v.dtype), v))
    else:
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
    return new, total, out


def _candidate(L: int, S: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_L": L, "BLOCK_S": S, "num_warps": warps, "num_stages": stages}


_CANDIDATES = tuple(
    _candidate(L, S, warps, stages)
    for L, S, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4))
    for stages in (2, 3, 4)
)


_DATA_CENTRE = (90, 100, 103)


def _config(capability: int) -> dict[str, int]:
    """Tiles: the largest whose scores and sums fit 255 registers without spilling; not tuned on a device yet."""
    if capability in _DATA_CENTRE:
        return _candidate(128, 128, 8, 2)
    # a third stage would spill on 12.x
    return _candidate(128, 64, 8, 2 if capability >= 120 else 3)


def _launch(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    v_center: Tensor | None,
    interleaved: bool,
    skip: float,
    lse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out, sums = _fake(q, q_scale, k, k_scale, v, v_scale, v_center, interleaved, skip, lse, dtype)
    (B, L, N, K), S = q.shape, k.shape[1]
    if not out.numel():
        return out, sums
    if interleaved:
        _by_extension(q, q_scale, k, k_scale, v, v_scale, v_center, skip, out, sums)
        return out, sums
    capability = _capability(q)
    config = _config(capability)
    # on 12.x descriptors would spill
    tma = capability in _DATA_CENTRE and v_scale is not None and k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    tile = config["BLOCK_S"]
    with torch.cuda.device_of(q):
        _attention_8bit_kernel[(triton.cdiv(L, config["BLOCK_L"]), N, B)](
            q,
            q_scale,
            TensorDescriptor.from_tensor(k.view(B * S, N * K), [tile, K]) if tma else k,
            k_scale,
            TensorDescriptor.from_tensor(v.view(B * N * K, -1), [K, tile]) if tma else v,
            v_scale,
            v_center,
            out,
            sums,
            L,
            S,
            *(v.stride()[:2] if v_scale is None else (0, 0)),
            _factor(K),
            log2(skip) if skip else 0.0,
            N=N,
            K=K,
            NARROW=v_scale is not None,
            SKIP=skip > 0,
            LSE=lse,
            TMA=tma,
            **config,
        )
    return out, sums


def _factor(K: int) -> float:
    """Of scores, for a softmax in base 2."""
    return 1 / (sqrt(K) * log(2))


def _by_extension(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    v_center: Tensor | None,
    skip: float,
    out: Tensor,
    sums: Tensor,
) -> None:
    """csrc/attention_sm90.cu."""
    extension = cuda_extension(q.device)
    if extension is None or _capability(q) != 90:
        why = why_no_extension(q.device) if extension is None else f"this is {_capability(q) / 10}"
        raise RuntimeError(f"interleaved values are for wan_fast._cuda on compute capability 9.0: {why}")
    (B, L, N, K), S = q.shape, k.shape[1]
    assert v_scale is not None and v_center is not None
    pointers = {"q": q, "q_scale": q_scale, "k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale, "v_center": v_center}
    with torch.cuda.device_of(q):
        extension.attention_sm90(
            **{name: tensor.data_ptr() for name, tensor in pointers.items()},
            out=out.data_ptr(),
            lse=sums.data_ptr() if sums.numel() else 0,
            scores=str(q.dtype).removeprefix("torch."),
            out_dtype=str(out.dtype).removeprefix("torch."),
            **{"B": B, "L": L, "S": S, "N": N, "K": K},
            q_strides=q.stride()[:2],
            k_strides=k.stride()[:2],
            skip=log2(skip) if skip else float("-inf"),
            device=q.device.index,
            stream=torch.cuda.current_stream(q.device).cuda_stream,
        )


# scores at a time
_CPU_SCORES = 2**22


def _reference(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    v_center: Tensor | None,
    interleaved: bool,
    skip: float,
    lse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out, sums = _fake(q, q_scale, k, k_scale, v, v_scale, v_center, interleaved, skip, lse, dtype)
    wide = torch.promote_types(q_scale.dtype, torch.float32)
    (B, L, N, K), S = q.shape, k.shape[1]
    # whole blocks of skip-softmax
    rows = max(_CPU_SCORES // S // _BLOCK, 1) * _BLOCK
    for b in range(B):
        for n in range(N):
            keys = k[b, :, n].to(wide) * k_scale[b, n, :, None]
            values = v[b, :, n].to(wide) if v_scale is None else _in_order(v[b, n].to(wide), interleaved)[:, :S].t()
            for first in range(0, L, rows):
                part = slice(first, first + rows)
                queries = q[b, part, n].to(wide) * (q_scale[b, n, part, None] * _factor(K))
                x = queries @ keys.t()
                limit = x.amax(-1, keepdim=True)
                p = torch.exp2(x - limit)
                if skip:
                    p = p.masked_fill(left_out(x, log2(skip)), 0)
                total = p.sum(-1, keepdim=True)
                y = _rounded(p, v.dtype) @ values / total
                if v_scale is not None and v_center is not None:
                    y = y * v_scale[b, n] + v_center[b, n]
                out[b, part, n] = y.to(dtype)
                if lse:
                    sums[b, n, part] = (limit + total.log2())[:, 0] * log(2)
    return out, sums


_BLOCK = 128


def _in_order(values: Tensor, interleaved: bool) -> Tensor:
    """[K, S16] with the tokens of every group in order."""
    return values.view(-1, GROUP)[:, INTERLEAVED.argsort().to(values.device)].view_as(values) if interleaved else values


def _rounded(p: Tensor, dtype: torch.dtype) -> Tensor:
    """p of 0 .. 1 as the product with values of `dtype` takes it; of values in fp64 as it is."""
    if dtype == torch.float8_e4m3fn:
        return (p * 448).to(dtype).to(p.dtype) / 448
    return p.to(dtype).to(p.dtype)


def left_out(x: Tensor, skip: float) -> Tensor:
    """[L, S]: what skip-softmax leaves out."""
    L, S = x.shape
    filled = F.pad(x, (0, -S % _BLOCK), value=float("-inf"))
    most = filled.unflatten(1, (-1, _BLOCK)).amax(-1)  # [L, blocks]
    before = F.pad(most.cummax(1).values, (1, 0), value=float("-inf"))[:, :-1]
    needed = ~(most - before < skip)
    needed = F.pad(needed, (0, 0, 0, -L % _BLOCK)).unflatten(0, (-1, _BLOCK)).any(1)
    return ~needed.repeat_interleave(_BLOCK, 0)[:L].repeat_interleave(_BLOCK, 1)[:, :S]


def _fake(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    v_center: Tensor | None,
    interleaved: bool,
    skip: float,
    lse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, L, N, _ = q.shape
    return q.new_empty(q.shape, dtype=dtype), q_scale.new_empty((B, N, L) if lse else (0,))


_op = register("attention_8bit", launch=_launch, reference=_reference, fake=_fake)


def attention_8bit(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None = None,
    v_center: Tensor | None = None,
    *,
    interleaved: bool = False,
    skip: float = 0.0,
    lse: bool = False,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention of quantised queries and keys. There is no mask: every query sees every key.

    Args:
        q: [B, L, N, K] int8 or float8_e4m3fn, contiguous, K of 64 or 128.
        q_scale: [B, N, L] fp32, contiguous: q stands for its values times this.
        k: [B, S, N, K] in q's dtype, contiguous, S of 1 or more; the same vector may have been taken from all keys of a head.
        k_scale: [B, N, S] fp32, contiguous.
        v: [B, N, K, ceil(S / 16) 16] float8_e4m3fn, contiguous, of `quantize_values`; or [B, S, N, K] bf16 or fp16, dense
            along N and K.
        v_scale: [B, N, K] fp32, contiguous; None where v is not in 8 bits.
        v_center: [B, N, K] fp32, contiguous, added to the result; None where v is not in 8 bits.
        interleaved: v has the order of tokens that csrc/attention_sm90.cu takes, which then runs.
        skip: a tile whose terms are all below this part of the largest of their row so far is left out; 0 leaves out none. How
            large a tile is, and in which order they come, is the backend's: the reference has 128 x 128, the first keys first.
        lse: also return the logarithm of the sum of exponentials of each row, as parts of a ring of devices need it; these
            take the same vector from their keys.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [B, L, N, K] in `dtype`, and [B, N, L] fp32, or [0] where it was not asked for.

    Raises:
        ValueError: shapes, dtypes or strides are others.
        RuntimeError: values are interleaved and the device is not the one for them.
    """
    op = "attention_8bit"
    fits = q.ndim == k.ndim == 4 and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3] and k.shape[1] >= 1
    _check.shapes(op, "q [B, L, N, K] and k [B, S, N, K]", fits, q=q, k=k)
    (B, L, N, K), S = q.shape, k.shape[1]
    if K not in (64, 128):
        raise ValueError(f"{op} wants heads of a width of 64 or 128, got {K}; take attention in bf16")
    _check.dtypes(op, EIGHT_BITS, q=q)
    _check.dtypes(op, (q.dtype,), k=k)
    fits = q_scale.shape == (B, N, L) and k_scale.shape == (B, N, S)
    _check.shapes(op, f"q_scale {(B, N, L)} and k_scale {(B, N, S)}", fits, q_scale=q_scale, k_scale=k_scale)
    narrow = v_scale is not None
    _check.dtypes(op, (torch.float8_e4m3fn,) if narrow else (torch.bfloat16, torch.float16), v=v)
    wanted = (B, N, K, padded(S)) if narrow else (B, S, N, K)
    _check.shapes(op, f"v {wanted}", v.shape == wanted, v=v)
    if narrow != (v_center is not None) or (interleaved and not narrow):
        raise ValueError(f"{op} wants v_scale and v_center together, and interleaved values with them")
    if v_scale is not None and v_center is not None:
        fits = v_scale.shape == v_center.shape == (B, N, K)
        _check.shapes(op, f"v_scale and v_center {(B, N, K)}", fits, v_scale=v_scale, v_center=v_center)
    elif v.stride()[2:] != (K, 1):
        raise ValueError(f"{op} wants v [B, S, N, K] dense along N and K, got strides {v.stride()}")
    _check.dtypes(op, (torch.float32,), q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, v_center=v_center)
    _check.dtypes(op, _check.FLOATS, result=dtype)
    if not 0 <= skip < 1:
        raise ValueError(f"{op} wants skip from 0 to below 1, got {skip}")
    _check.one_device(op, q=q, q_scale=q_scale, k=k, k_scale=k_scale, v=v, v_scale=v_scale, v_center=v_center)
    _check.dense(op, q=q, q_scale=q_scale, k=k, k_scale=k_scale, v_scale=v_scale, v_center=v_center)
    if narrow:
        _check.dense(op, v=v)
    return _op(q, q_scale, k, k_scale, v, v_scale, v_center, interleaved, skip, lse, dtype)
