"""What a step does to the latents: guidance and the solver's row of the plan, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        draw: gives fresh noise [C, T, H, W], for steps that add some.
    """

    def __init__(
        self, steps: Sequence[Step], noise: Tensor, known: Tensor | None = None, draw: Callable[[], Tensor] | None = None
    ) -> None:
        self.latents = torch.empty_like(noise)
        self.sample, self.older, self.oldest = (torch.empty_like(noise) for _ in range(3))
        self.known = None if known is None else torch.empty_like(known)
        self.fresh = torch.empty_like(noise) if any(step.noise is not None for step in steps) else None
        # padded to a boundary of 16 bytes: else Triton compiles the kernel for two alignments
        self.row = torch.empty(12, device=noise.device)
        self.start(steps, noise, known, draw)

    def start(
        self, steps: Sequence[Step], noise: Tensor, known: Tensor | None = None, draw: Callable[[], Tensor] | None = None
    ) -> None:
        """Begin another clip of the same shape, in the same memory."""
        self.latents.copy_(noise)
        for state in (self.sample, self.older, self.oldest):
            state.zero_()
        if self.known is not None:
            assert known is not None
            self.known.copy_(known)
            self.latents[:, : known.shape[1]] = known
        self.rows = torch.tensor([(*weights(step), 0.0) for step in steps]).to(noise.device)  # [steps, 12]
        self.draw = draw

    def load(self, step: Step) -> None:
        """Put a step's numbers, and its noise, to where `advance` reads them."""
        self.row.copy_(self.rows[step.index])
        if self.fresh is not None:
            assert self.draw is not None
            self.fresh.copy_(self.draw())

    def advance(self, conditional: Tensor, unconditional: Tensor | None) -> None:
        """The loaded step, from the model's velocities at the latents."""
        guidance_step(
            self.latents, self.sample, self.older, self.oldest, conditional, unconditional, self.row[:11], self.known,
            self.fresh,
        )  # fmt: skip


def weights(step: Step) -> tuple[float, ...]:
    """The numbers that `guidance_step` takes."""
    corrector = (1.0, 0.0, 0.0, 0.0, 0.0) if step.corrector is None else (0.0, *step.corrector)
    return step.guidance_scale, step.sigma, *corrector, *step.predictor, step.noise or 0.0
