"""Classifier-free guidance and one step of a linear multistep solver, in place.

    v = unconditional + g (conditional - unconditional)        (arXiv 2207.12598)
    x0 = x - sigma v
    x = c . (x, sample, x0, older, oldest)                     the corrector, (1, 0, 0, 0, 0) where a solver has none
    sample, older, oldest = x, x0, older
    latents = p . (x, x0, older) + n noise                     the predictor; few-step samplers add noise again

`weights` are (g, sigma, c, p, n), 11 numbers on the device, so that a captured step replays with the next row. Latents that
are known overwrite the first t frames, after the noise. C channels, T frames, H W; everything is fp32.

Bytes per latent: 40 with both velocities, 210 MB for latents of 48x31x44x80: 49 us at 4.3 TB/s. Noise is 4 more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _check
from ._op import register

WEIGHTS = 11


@triton.jit
def _guidance_step_kernel(
    latents_ptr,  # [C, T, H, W]; this and the next three are changed in place
    sample_ptr,
    older_ptr,
    oldest_ptr,
    conditional_ptr,
    unconditional_ptr,  # not read without GUIDED
    noise_ptr,  # not read without NOISED
    known_ptr,  # [C, t, H, W], not read where KNOWN is False
    weights_ptr,  # [11]; the last is not read without NOISED
    count,
    channel,  # T H W
    known_channel,  # t H W
    GUIDED: tl.constexpr,
    NOISED: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    v = tl.load(conditional_ptr + i, mask=mask)
    if GUIDED:
        unconditional = tl.load(unconditional_ptr + i, mask=mask)
        v = unconditional + tl.load(weights_ptr) * (v - unconditional)
    x = tl.load(latents_ptr + i, mask=mask)
    older = tl.load(older_ptr + i, mask=mask)
    x0 = x - tl.load(weights_ptr + 1) * v
    x = tl.load(weights_ptr + 2) * x + tl.load(weights_ptr + 3) * tl.load(sample_ptr + i, mask=mask)
    x += tl.load(weights_ptr + 4) * x0 + tl.load(weights_ptr + 5) * older
    x += tl.load(weights_ptr + 6) * tl.load(oldest_ptr + i, mask=mask)
    tl.store(sample_ptr + i, x, mask=mask)
    tl.store(older_ptr + i, x0, mask=mask)
    tl.store(oldest_ptr + i, older, mask=mask)
    x = tl.load(weights_ptr + 7) * x + tl.load(weights_ptr + 8) * x0 + tl.load(weights_ptr + 9) * older
    if NOISED:
        x += tl.load(weights_ptr + 10) * tl.load(noise_ptr + i, mask=mask)
    if KNOWN:
        within = i % channel
        given = within < known_channel
        x = tl.where(given, tl.load(known_ptr + i // channel * known_channel + within, mask=mask & given), x)
    tl.store(latents_ptr + i, x, mask=mask)


_CANDIDATES = tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048) for warps in (2, 4, 8))


def _config(count: int) -> dict[str, int]:
    """Tiles; not tuned on a device yet."""
    return {"BLOCK": 1024, "num_warps": 4}


def _launch(
    latents: Tensor,
    sample: Tensor,
    older: Tensor,
    oldest: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    weights: Tensor,
    known: Tensor | None,
    noise: Tensor | None,
) -> None:
    C, count = latents.shape[0], latents.numel()
    config = _config(count)
    with torch.cuda.device_of(latents):
        _guidance_step_kernel[(triton.cdiv(count, config["BLOCK"]),)](
            latents,
            sample,
            older,
            oldest,
            conditional,
            unconditional,
            noise,
            known,
            weights,
            count,
            count // C,
            0 if known is None else known.numel() // C,
            GUIDED=unconditional is not None,
            NOISED=noise is not None,
            KNOWN=known is not None,
            **config,
        )


def _reference(
    latents: Tensor,
    sample: Tensor,
    older: Tensor,
    oldest: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    weights: Tensor,
    known: Tensor | None,
    noise: Tensor | None,
) -> None:
    w = weights.unbind()
    v = conditional if unconditional is None else unconditional + w[0] * (conditional - unconditional)
    x0 = latents - w[1] * v
    torch.add(w[2] * latents + w[3] * sample + w[4] * x0 + w[5] * older, w[6] * oldest, out=sample)
    oldest.copy_(older)
    torch.add(w[7] * sample + w[8] * x0, w[9] * older, out=latents)
    older.copy_(x0)
    if noise is not None:
        latents += w[10] * noise
    if known is not None:
        latents[:, : known.shape[1]] = known


def _fake(
    latents: Tensor,
    sample: Tensor,
    older: Tensor,
    oldest: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    weights: Tensor,
    known: Tensor | None,
    noise: Tensor | None,
) -> None:
    pass


_op = register(
    "guidance_step", launch=_launch, reference=_reference, fake=_fake, mutates=("latents", "sample", "older", "oldest")
)


def guidance_step(
    latents: Tensor,
    sample: Tensor,
    older: Tensor,
    oldest: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    weights: Tensor,
    known: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """Combine the branches' velocities and take the solver's step, in place.

    Args:
        latents: [C, T, H, W] fp32, contiguous, as all that follow; becomes the next latents.
        sample: [C, T, H, W] the corrected latents of the step before; becomes those of this step. Zeros at first.
        older, oldest: [C, T, H, W] the clean clips predicted one and two steps back; moved on. Zeros at first.
        conditional: [C, T, H, W] velocity.
        unconditional: [C, T, H, W] velocity; None leaves guidance out.
        weights: [11] fp32: guidance scale, sigma, five of the corrector, three of the predictor, one of the noise.
        known: [C, t, H, W] latents that overwrite the first t frames of the next ones, after the noise.
        noise: [C, T, H, W] added to the next latents by its weight; None leaves both out.

    Returns:
        None: latents, sample, older and oldest [C, T, H, W] are changed.

    Raises:
        ValueError: shapes, dtypes or strides are others.
    """
    op = "guidance_step"
    alike = dict(sample=sample, older=older, oldest=oldest, conditional=conditional, unconditional=unconditional, noise=noise)
    fits = latents.ndim == 4 and all(t is None or t.shape == latents.shape for t in alike.values())
    _check.shapes(op, "latents [C, T, H, W] and all others so", fits, latents=latents, **alike)
    _check.shapes(op, f"weights [{WEIGHTS}]", weights.shape == (WEIGHTS,), weights=weights)
    if known is not None:
        (C, T, *plane), (c, t, *part) = latents.shape, known.shape
        _check.shapes(op, "known [C, t <= T, H, W]", (C, plane) == (c, part) and t <= T, latents=latents, known=known)
    _check.dtypes(op, (torch.float32,), latents=latents, weights=weights, known=known, **alike)
    _check.one_device(op, latents=latents, weights=weights, known=known, **alike)
    _check.dense(op, latents=latents, weights=weights, known=known, **alike)
    _op(latents, sample, older, oldest, conditional, unconditional, weights, known, noise)
