"""The denoising loop: it interprets the step plan and asks the host for nothing.

No tensor is read back and no host tensor is made inside, so a GPU runs ahead of Python for as long as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from wan_fast.steps import Step

if TYPE_CHECKING:  # without torch at run time, the loop's own instructions can be counted
    from torch import Tensor

# (step, latents [C, T, H, W], branch) -> velocity [C, T, H, W]; branch is "conditional" or "unconditional"
Velocity: TypeAlias = "Callable[[Step, Tensor, str], Tensor]"


def denoise(
    steps: Iterable[Step],
    latents: Tensor,
    velocity: Velocity,
    *,
    known: Tensor | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Carry noise to a clean clip.

    Args:
        steps: the plan's table.
        latents: [C, T, H, W] fp32 noise.
        velocity: the model, for one step and branch.
        known: [C, t, H, W] fp32 latents that overwrite the first t frames before every step and at the end.
        on_step: called after each step has been issued.

    Returns:
        [C, T, H, W] fp32.
    """
    solver = Solver()
    latents = _overwrite(latents.clone(), known)
    for step in steps:
        conditional = velocity(step, latents, "conditional")
        unconditional = velocity(step, latents, "unconditional")
        guided = unconditional + step.guidance_scale * (conditional - unconditional)
        latents = _overwrite(solver.step(step, latents, guided), known)
        if on_step:
            on_step(step)
    return latents


class Solver:
    """Applies the solver's row of each step; remembers the sample and the two predictions that later rows weigh."""

    def __init__(self) -> None:
        self.sample: Tensor | None = None
        self.predictions: tuple[Tensor, ...] = ()

    def step(self, step: Step, x: Tensor, velocity: Tensor) -> Tensor:
        """The next sample, from x and the model's velocity at it, both fp32 of one shape."""
        x0 = x - step.sigma * velocity
        seen = (x0, *self.predictions)
        if step.corrector is not None:
            assert self.sample is not None
            x = _weighted(step.corrector, (self.sample, *seen))
        self.sample, self.predictions = x, seen[:2]
        return _weighted(step.predictor, (x, *seen))


def _weighted(weights: tuple[float, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:]):  # noqa: B905  early steps have seen less than rows can weigh
        total.add_(tensor, alpha=weight)
    return total


def _overwrite(latents: Tensor, known: Tensor | None) -> Tensor:
    if known is not None:
        latents[:, : known.shape[1]] = known
    return latents
