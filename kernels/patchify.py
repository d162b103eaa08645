"""Latents to tokens and back: one token per patch of 1 x 2 x 2, w fastest.

B batch, C channels, T H W latent frames, height and width, L = T (H / 2) (W / 2) tokens. `patchify` puts a patch's channels
slowest, as the weight of the patch embedding has them; `unpatchify` takes them fastest, as the head gives them.

Bytes per token: 16 C + 8 C into bf16, 32 C back in fp32; at C = 48 and 27,280 tokens 31 MB and 42 MB: 7 and 10 us at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _check
from ._op import register


@triton.jit
def _patchify_kernel(
    latents_ptr,  # [B, C, T, H, W]
    tokens_ptr,  # [B, L, 4 C]
    H,
    W,
    channel,  # T H W
    C: tl.constexpr,
    TO_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program per BLOCK_W patches of a row of patches of a frame, numbered through the batch
    row = tl.program_id(0).to(tl.int64)
    b, within = row // (channel // W // 2), row % (channel // W // 2)
    t, h = within // (H // 2), within % (H // 2)
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (w < W // 2) & (column < 4 * C)
    if TO_TOKENS:
        c, corner = column // 4, column % 4
    else:
        c, corner = column % C, column // C
    y, x = 2 * h + corner // 2, 2 * w + corner % 2
    latents = latents_ptr + (b * C + c) * channel + (t * H + y) * W + x
    tokens = tokens_ptr + (row * (W // 2) + w) * (4 * C) + column
    if TO_TOKENS:
        tl.store(tokens, tl.load(latents, mask=mask).to(tokens_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(latents, tl.load(tokens, mask=mask).to(latents_ptr.dtype.element_ty), mask=mask)


_CANDIDATES = tuple({"BLOCK_W": block, "num_warps": warps} for block in (4, 8, 16, 32) for warps in (2, 4, 8))


def _config(C: int) -> dict[str, int]:
    """Tiles; not tuned on a device yet."""
    return {"BLOCK_W": 16, "num_warps": 4}


def _run(latents: Tensor, tokens: Tensor, to_tokens: bool) -> None:
    B, C, T, H, W = latents.shape
    config = _config(C)
    if latents.numel():
        with torch.cuda.device_of(latents):
            _patchify_kernel[(B * T * (H // 2), triton.cdiv(W // 2, config["BLOCK_W"]))](
                latents, tokens, H, W, T * H * W, C=C, TO_TOKENS=to_tokens, BLOCK_C=triton.next_power_of_2(4 * C), **config
            )


def _launch_patchify(latents: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = _fake_patchify(latents, dtype)
    _run(latents, tokens, True)
    return tokens


def _reference_patchify(latents: Tensor, dtype: torch.dtype) -> Tensor:
    B, C, T, H, W = latents.shape
    tokens = _fake_patchify(latents, dtype)
    patches = latents.reshape(B, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    tokens.view(patches.shape).copy_(patches)
    return tokens


def _fake_patchify(latents: Tensor, dtype: torch.dtype) -> Tensor:
    B, C, T, H, W = latents.shape
    return latents.new_empty((B, T * (H // 2) * (W // 2), 4 * C), dtype=dtype)


def _launch_unpatchify(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    latents = _fake_unpatchify(tokens, shape)
    _run(latents, tokens, False)
    return latents


def _reference_unpatchify(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    T, H, W = shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    latents = tokens.new_empty((tokens.shape[0], tokens.shape[2] // 4, T, H, W), dtype=wide)
    patches = latents.view(*latents.shape[:2], T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    patches.copy_(tokens.reshape(patches.shape))
    return latents


def _fake_unpatchify(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    return tokens.new_empty((tokens.shape[0], tokens.shape[2] // 4, *shape), dtype=torch.float32)


_patchify = register("patchify", launch=_launch_patchify, reference=_reference_patchify, fake=_fake_patchify)
_unpatchify = register("unpatchify", launch=_launch_unpatchify, reference=_reference_unpatchify, fake=_fake_unpatchify)


def patchify(latents: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gather the patches of latents.

    Args:
        latents: [B, C, T, H, W] fp32, bf16 or fp16, contiguous, H and W even.
        dtype: of the result.

    Returns:
        [B, L, 4 C] in `dtype`, contiguous, the channel slowest within a token.

    Raises:
        ValueError: shape, dtype or strides are others.
    """
    fits = latents.ndim == 5 and latents.shape[3] % 2 == latents.shape[4] % 2 == 0
    _check.shapes("patchify", "latents [B, C, T, H, W] with H and W even", fits, latents=latents)
    _check.dtypes("patchify", _check.FLOATS, latents=latents, result=dtype)
    _check.dense("patchify", latents=latents)
    return _patchify(latents, dtype)


def unpatchify(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Put the patches of latents back in their places.

    Args:
        tokens: [B, L, 4 C] fp32, bf16 or fp16, contiguous, the channel fastest within a token.
        shape: (T, H, W) of the latents, H and W even.

    Returns:
        [B, C, T, H, W] fp32, contiguous.

    Raises:
        ValueError: shapes, dtype or strides are others.
    """
    T, H, W = shape
    fits = tokens.ndim == 3 and H % 2 == W % 2 == tokens.shape[2] % 4 == 0 and tokens.shape[1] == T * (H // 2) * (W // 2)
    _check.shapes("unpatchify", f"tokens [B, {T * (H // 2) * (W // 2)}, 4 C] for latents of {shape}", fits, tokens=tokens)
    _check.dtypes("unpatchify", _check.FLOATS, tokens=tokens)
    _check.dense("unpatchify", tokens=tokens)
    return _unpatchify(tokens, shape)
