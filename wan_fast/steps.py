"""The step plan: sigma grids, solver coefficients and one `Step` row per denoising step. Standard library only.

Flow matching: x = (1 - sigma) x0 + sigma noise, and the model predicts v = noise - x0, so x0 = x - sigma v (arXiv
2210.02747). Every solver here is linear in what it has seen, so a step is a row of numbers known before the loop:

    x0          = x - sigma v
    x           = corrector . (previous x, x0, x0 one step back, x0 two steps back)      UniPC only
    next x      = predictor . (x, x0, x0 one step back) + noise fresh                    noise for LCM only

UniPC: arXiv 2302.04867 (B2, order 2, data prediction). DPM-Solver++ 2M: arXiv 2211.01095. LCM: arXiv 2310.04378.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import expm1, inf, log

from wan_fast.few_steps import Sampler
from wan_fast.tasks import NUM_TRAIN_TIMESTEPS, TaskSpec

# of a pass, in a schedule as text
LETTERS = {"run": "#", "reuse": ".", "reconstruct": "~", "zero": "0", "none": "-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One denoising step.

    timestep: what the model sees. sigma, next_sigma: what the solver uses.
    conditional: "run", "reuse" (the block stack's last residual), or "zero" (nothing is predicted).
    unconditional: the same, "reconstruct" (the conditional velocity less the last difference of the two), or "none".
    image_guidance: guidance by pictures of its own, with a pass that has these and not the prompt, which is then as the
    unconditional one says; None where there is none.
    difference: what the low and the high frequencies of that difference are multiplied by.
    attention: "exact" or "8-bit", which self-attention then is where the model has it.
    noise: of the fresh noise that is added; None where the solver adds none.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    next_sigma: float
    expert: str
    guidance_scale: float
    image_guidance: float | None = None
    conditional: str = "run"
    unconditional: str = "run"
    difference: tuple[float, float] = (1.0, 1.0)
    attention: str = "exact"
    corrector: tuple[float, float, float, float] | None
    predictor: tuple[float, float, float]
    noise: float | None = None

    @property
    def forwards(self) -> int:
        """Passes through the block stack."""
        return (self.conditional == "run") + (self.unconditional == "run") * (self.passes - 1)

    @property
    def passes(self) -> int:
        """The same, were none left out."""
        return 1 if self.unconditional == "none" else 2 if self.image_guidance is None else 3

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """What is computed: steps of one kind run the same kernels."""
        return self.expert, self.conditional, self.unconditional, self.attention


def sigma_grid(solver: str, num_steps: int, shift: float) -> tuple[float, ...]:
    """The official noise levels: `num_steps` of them, then 0. UniPC starts at 0.999, the others at 1."""
    first = _fp32(1 - 1 / NUM_TRAIN_TIMESTEPS) if solver == "unipc" else 1.0
    linear = [first + i * (-first / num_steps) for i in range(num_steps)]
    return (*(shift * s / (1 + (shift - 1) * s) for s in linear), 0.0)


def solver_rows(
    solver: str, sigmas: Sequence[float]
) -> list[tuple[tuple[float, float, float, float] | None, tuple[float, float, float]]]:
    """(corrector, predictor) of each step over any grid of decreasing sigmas that ends in 0."""
    sigmas = [_fp32(s) for s in sigmas]
    steps = len(sigmas) - 1
    lam = [_half_log_snr(s) for s in sigmas]
    rows = []
    for i in range(steps):
        corrector = _unipc_corrector(sigmas, lam, i) if solver == "unipc" and i > 0 else None
        order = 1 if solver == "euler" else min(2, steps - i, i + 1)
        # to the clean clip, on which there is then noise
        predictor = (0.0, 1 - sigmas[i + 1], 0.0) if solver == "lcm" else _predictor(sigmas, lam, i, order)
        rows.append((corrector, predictor))
    return rows


def official(solver: str, num_steps: int, shift: float) -> Sampler:
    """A solver on its grid of any number of steps."""
    sigmas = sigma_grid(solver, num_steps, shift)
    # official UniPC and DPM++ tell the model whole timesteps: truncated, not rounded; the solver keeps the exact sigma
    whole = int if solver in ("unipc", "dpm++") else float
    return Sampler(sigmas=sigmas, timesteps=tuple(float(whole(s * NUM_TRAIN_TIMESTEPS)) for s in sigmas[:-1]), solver=solver)


def step_plan(
    spec: TaskSpec, sampler: Sampler, guidance: tuple[float, float], image_guidance: float | None = None
) -> tuple[Step, ...]:
    """The table that the loop executes; `guidance` is (low-noise, high-noise), `image_guidance` as in a step."""
    steps = []
    for i, (corrector, predictor) in enumerate(solver_rows(sampler.solver, sampler.sigmas)):
        timestep, next_sigma = sampler.timesteps[i], _fp32(sampler.sigmas[i + 1])
        above = timestep >= (spec.boundary or 0) * NUM_TRAIN_TIMESTEPS if sampler.split is None else i < sampler.split
        high = spec.boundary is not None and above
        steps.append(
            Step(
                index=i,
                total=len(sampler.timesteps),
                timestep=timestep,
                sigma=_fp32(sampler.sigmas[i]),
                next_sigma=next_sigma,
                expert="model" if spec.boundary is None else "high_noise" if high else "low_noise",
                guidance_scale=guidance[1] if high else guidance[0],
                image_guidance=image_guidance,
                corrector=corrector,
                predictor=predictor,
                noise=next_sigma if sampler.solver == "lcm" else None,
            )
        )
    return tuple(steps)


def in_8_bits(steps: Sequence[Step], keep: tuple[int, int]) -> tuple[Step, ...]:
    """The plan with attention in 8 bits, but for the first and last steps that `keep` counts."""
    first, last = keep
    return tuple(replace(step, attention="8-bit") if first <= step.index < len(steps) - last else step for step in steps)


def _predictor(sigmas: Sequence[float], lam: Sequence[float], i: int, order: int) -> tuple[float, float, float]:
    """From sigma i to sigma i + 1. Order 1 is Euler's step and DDIM's; order 2 adds the slope between two x0."""
    ratio = sigmas[i + 1] / sigmas[i]
    if order == 1 or lam[i - 1] == -inf:  # a start from pure noise has no slope yet
        return ratio, 1 - ratio, 0.0
    h, h_previous = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
    slope = -(1 - sigmas[i + 1]) * expm1(-h) * 0.5 * h / h_previous
    return ratio, 1 - ratio + slope, -slope


def _unipc_corrector(sigmas: Sequence[float], lam: Sequence[float], i: int) -> tuple[float, float, float, float]:
    """Redo the step that led to sigma i, now that the model has been seen there, at the order it was taken with."""
    order = min(2, i)  # of step i - 1: its distance from the end is never the smaller bound
    alpha, ratio = 1 - sigmas[i], sigmas[i] / sigmas[i - 1]
    hh = -(lam[i] - lam[i - 1])
    b = expm1(hh)
    base = -alpha * b
    if order == 1:
        return ratio, base * 0.5, base * 0.5, 0.0
    r = (lam[i - 2] - lam[i - 1]) / -hh
    phi1 = b / hh - 1
    phi2 = phi1 / hh - 0.5
    b1, b2 = phi1 / b, 2 * phi2 / b
    # [[1, 1], [r, 1]] . rho = (b1, b2)
    rho1 = (b2 - b1) / (r - 1)
    rho2 = b1 - rho1
    return ratio, base * rho2, base * (1 - rho1 / r - rho2), base * rho1 / r


def _half_log_snr(sigma: float) -> float:
    if sigma <= 0:
        return inf
    return -inf if sigma >= 1 else log(1 - sigma) - log(sigma)


def _fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
