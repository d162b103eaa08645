"""The denoising loop: it interprets the step plan and asks the host for nothing.

No tensor is read back and no host tensor is made inside, so a GPU runs ahead of Python for as long as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from wan_fast.steps import Step

if TYPE_CHECKING:  # without torch at run time, the loop's own instructions can be counted
    from torch import Tensor

# (step, latents [C, T, H, W]) -> conditional and unconditional velocity [C, T, H, W], None without guidance: `Branches`
Velocities: TypeAlias = "Callable[[Step, Tensor], tuple[Tensor, Tensor | None]]"
# (step, conditional, unconditional velocity): changes the latents
Advance: TypeAlias = "Callable[[Step, Tensor, Tensor | None], None]"


def denoise(
    steps: Sequence[Step],
    latents: Tensor,
    velocities: Velocities,
    advance: Advance,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Carry noise to a clean clip, in place.

    Args:
        steps: the plan's table.
        latents: [C, T, H, W] fp32, noise at first, which `advance` changes.
        velocities: the model, for one step.
        advance: the solver, a `Solver` over these latents.
        on_step: called after each step has been issued.
    """
    for step in steps:
        conditional, unconditional = velocities(step, latents)
        advance(step, conditional, unconditional)
        if on_step:
            on_step(step)
