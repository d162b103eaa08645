"""What a step does to the latents: guidance and the solver's row of the plan, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan_fast.kernels import guidance_step
from wan_fast.steps import Step


class Solver:
    """Owns the latents, and the sample and the two predictions that later rows weigh; all stay where they are.

    Args:
        steps: the plan's table, whose weights are put on the device once.
        noise: [C, T, H, W] fp32; it is copied.
        known: [C, t, H, W] fp32 latents that overwrite the first t frames before every step and at the end.
    """

    def __init__(self, steps: Sequence[Step], noise: Tensor, known: Tensor | None = None) -> None:
        self.latents = noise.clone()
        self.known = known
        if known is not None:
            self.latents[:, : known.shape[1]] = known
        self.sample, self.older, self.oldest = (torch.zeros_like(noise) for _ in range(3))
        # [steps, 10], each row on a boundary of 16 bytes: else Triton compiles the kernel for two alignments
        self.weights = torch.tensor([(*weights(step), 0.0, 0.0) for step in steps]).to(noise.device)[:, :10]

    def __call__(self, step: Step, conditional: Tensor, unconditional: Tensor | None) -> None:
        """The step, from the model's velocities at the latents."""
        guidance_step(
            self.latents, self.sample, self.older, self.oldest, conditional, unconditional, self.weights[step.index],
            self.known,
        )  # fmt: skip


def weights(step: Step) -> tuple[float, ...]:
    """The numbers that `guidance_step` takes."""
    corrector = (1.0, 0.0, 0.0, 0.0, 0.0) if step.corrector is None else (0.0, *step.corrector)
    return step.guidance_scale, step.sigma, *corrector, *step.predictor
