"""The denoising loop: it interprets the step plan and asks the host for nothing.

No tensor is read back and no host tensor is made inside, so a GPU runs ahead of Python for as long as it likes. What a step
computes reads nothing of the host either: a step of one kind differs from another by numbers that `load` puts on the device, so
that what was captured of one serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from wan_fast.steps import Step

if TYPE_CHECKING:  # without torch at run time, the loop's own instructions can be counted
    from wan_fast.branches import Branches
    from wan_fast.solver import Solver

# (kind, work): does the work, now or by replaying what work of that kind issued before
Run: TypeAlias = "Callable[[Hashable, Callable[[], Any]], Any]"


def directly(kind: Hashable, work: Callable[[], Any]) -> Any:
    """Do the work as it is written."""
    return work()


def denoise(
    steps: Sequence[Step],
    branches: Branches,
    solver: Solver,
    *,
    run: Run = directly,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Carry the solver's latents from noise to a clean clip, in place.

    Args:
        steps: the plan's table.
        branches: the model, for one step.
        solver: has the latents, and changes them.
        run: what does a step.
        on_step: called after each step has been issued.
    """
    for step in steps:
        branches.load(step)
        solver.load(step)
        run(step.kind, partial(_take, step, branches, solver))
        if on_step:
            on_step(step)


def _take(step: Step, branches: Branches, solver: Solver) -> None:
    solver.advance(*branches.velocities(step, solver.latents))
