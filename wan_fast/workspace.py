"""What clips are denoised with: the solver's and the branches' memory, and graphs of what works in it.

Where the plan keeps graphs, the next clip that fits begins in the memory of the one before: a graph holds addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wan_fast.branches import Branches, kept
from wan_fast.conditioning import Conditioning
from wan_fast.dit import WanDiT
from wan_fast.graphs import Capture, CudaCapture, Graphs
from wan_fast.planning import Plan
from wan_fast.sampler import Run, directly
from wan_fast.solver import Solver


@dataclass(frozen=True, slots=True)
class Clip:
    """What one clip is denoised with. fits: what of a plan and its conditioning the memory is for."""

    fits: tuple[Any, ...]
    solver: Solver
    branches: Branches
    run: Run


class Workspace:
    """Begins clips, and remembers what serves the next one.

    Args:
        device: where they are made.
        expert: gives the model of a name, on the device.

    Attributes:
        branches: makes the velocities of a clip; another than `Branches` records, say.
        capture: (device, roomy) -> what captures.
        captured: per kind of work the graphs of the clip under way, or why there are none.
        kept: the last clip's, where it may serve another.
    """

    def __init__(self, device: torch.device, expert: Callable[[str], WanDiT]) -> None:
        self.device, self.expert = device, expert
        self.branches: Callable[..., Branches] = Branches
        self.capture: Callable[[torch.device, bool], Capture] = self._on_cuda
        self.captured: dict[str, int | str] = {}
        self.kept: Clip | None = None
        self._cuda: CudaCapture | None = None
        self._refused = False

    def make_room(self, todo: Plan) -> None:
        """Let go of what the plan of the next clip does not count."""
        if self.kept is not None and (todo.memory.graphs != "kept" or self.kept.fits[0] != todo.latent_shape):
            self.kept = None

    def begin(self, todo: Plan, given: Conditioning, noise: Tensor, draw: Callable[[], Tensor]) -> Clip:
        """What a clip is denoised with, of noise [C, T, H, W] fp32; `draw` gives more of it."""
        steps, known, zero_star = todo.steps, given.known, todo.config.cfg_zero is not None
        fresh, shape = any(step.noise is not None for step in steps), None if known is None else known.shape
        shapes = tuple((name, tensor.shape) for inputs in given.by_branch.values() for name, tensor in inputs.tensors())
        same = (shape, shapes, given.inputs.control_scale, given.split, str(kept(steps)), fresh, zero_star)
        fits = (todo.latent_shape, *same, self.branches)
        clip = self.kept
        if clip is not None and clip.fits == fits:
            clip.solver.start(steps, noise, known, draw)
            clip.branches.start(steps, given.text, given.by_branch)
            return clip
        self.kept = clip = None  # and with it its memory, before there is more
        solver = Solver(steps, noise, known, draw)
        others: dict[str, Any] = {"inputs": given.by_branch, "zero_first": given.zero_first, "zero_star": zero_star}
        branches = self.branches(steps, self.expert, given.text, given.split, self.device, **others)
        clip = Clip(fits, solver, branches, self.run(todo))
        self.kept = clip if todo.memory.graphs == "kept" and clip.run is not directly else None
        return clip

    def run(self, todo: Plan) -> Run:
        """What does a step, or decodes a chunk: itself, or as a graph."""
        if todo.memory.graphs == "off" or self._refused:
            return directly
        roomy = todo.memory.graphs == "kept"
        return Graphs(self.capture(self.device, roomy), optional=todo.config.cuda_graphs is None, roomy=roomy)

    def note(self, run: Run, what: str) -> None:
        """Put into the accounts what was captured; what cannot be is not tried again."""
        if isinstance(run, Graphs):
            self.captured[what] = run.refused or len(run.captured)
            self._refused = self._refused or bool(run.refused)

    def _on_cuda(self, device: torch.device, roomy: bool) -> Capture:
        """What captures on a GPU: one for all graphs."""
        self._cuda = self._cuda or CudaCapture(device)
        return partial(self._cuda, roomy=roomy)
