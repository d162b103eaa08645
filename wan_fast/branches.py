"""The velocities a step needs, conditional and unconditional: computed, or made of what earlier steps left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wan_fast.blocks import Context, Grid
from wan_fast.dit import WanDiT, grid_of
from wan_fast.inputs import Inputs
from wan_fast.steps import Step


class Branches:
    """Carries out the rows of the plan for both passes; what it keeps is one residual per branch, and one difference.

    All that a step reads and writes stays where it is, from step to step and from clip to clip of one shape.

    Args:
        steps: the plan's table.
        expert: gives the model of a name, on the device.
        text: per branch, [S, text_dim]: "conditional"; with guidance "unconditional", and where pictures have guidance of their
            own "unprompted".
        split: as in `WanDiT.forward`, between tokens at timestep 0 and the others; 0 for none.
        device: where the latents are.
        inputs: what the clip is conditioned on beside text, where it is not the same for all branches by branch.
        zero_first: those before the split are at timestep 0, and not those behind it.
        zero_star: the unconditional velocity is scaled to what is nearest to the conditional one (CFG-Zero*, arXiv 2503.18886).
    """

    def __init__(
        self,
        steps: Sequence[Step],
        expert: Callable[[str], WanDiT],
        text: Mapping[str, Tensor],
        split: int,
        device: torch.device,
        *,
        inputs: Inputs | Mapping[str, Inputs] | None = None,
        zero_first: bool = True,
        zero_star: bool = False,
    ) -> None:
        self.zero_first = zero_first
        self.expert, self.split, self.device, self.zero_star = expert, split, device, zero_star
        self.keeps, self.reconstructs, self.in_bands = kept(steps)
        self.contexts: dict[tuple[str, str], Context] = {}
        self.grid: Grid | None = None
        self.residuals: dict[str, Tensor] = {}
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.timestep = torch.empty(1, 2 if split else 1, device=device)
        self.difference = torch.empty(2, device=device)
        self.image_guidance = torch.empty((), device=device)
        self.start(steps, text, inputs)

    def start(
        self, steps: Sequence[Step], text: Mapping[str, Tensor], inputs: Inputs | Mapping[str, Inputs] | None = None
    ) -> None:
        """Begin another clip of the same shape, whose steps keep the same, in the same memory."""
        self.text, self.inputs = text, inputs if isinstance(inputs, Mapping) else dict.fromkeys(text, inputs or Inputs())
        rows = [[0.0, step.timestep] if self.split else [step.timestep] for step in steps]
        ordered = rows if self.zero_first else [row[::-1] for row in rows]
        self.timesteps = torch.tensor(ordered, device=self.device)[:, None]  # [steps, 1, R]
        self.differences = torch.tensor([step.difference for step in steps], device=self.device)  # [steps, 2]
        # the same at every step
        by_pictures = steps[0].image_guidance
        self.image_guidance.fill_(1.0 if by_pictures is None else by_pictures)
        again: dict[str, Context] = {}
        for (expert, branch), context in [*self.contexts.items()]:
            if branch not in text or self.grid is None:  # this clip has no such pass, a later one may
                continue
            model, given = self.expert(expert), self.inputs[branch]
            again[expert] = model.prepare([text[branch]], self.grid, given, like=again.get(expert))
            for tensor, other in zip(context.tensors(), again[expert].tensors(), strict=True):
                tensor.copy_(other)
            self.contexts[expert, branch] = replace(context, inputs=given)

    def load(self, step: Step) -> None:
        """Put a step's numbers to where `velocities` reads them."""
        self.timestep.copy_(self.timesteps[step.index])
        if self.reconstructs:
            self.difference.copy_(self.differences[step.index])

    def __call__(self, step: Step, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """`velocities` of a step that is not loaded yet."""
        self.load(step)
        return self.velocities(step, latents)

    def velocities(self, step: Step, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """The conditional and the unconditional velocity at latents [C, T, H, W], of their shape; None without guidance.

        Of the step it reads the kind alone: its numbers are those loaded.
        """
        conditional = self.predicted(step, latents, "conditional", step.conditional)
        if step.unconditional == "none":
            return conditional, None
        if step.image_guidance is not None:
            return self.of_three(step, latents, conditional)
        if step.unconditional == "reconstruct":
            unconditional = self.reconstructed(conditional)
        else:
            unconditional = self.predicted(step, latents, "unconditional", step.unconditional)
            if self.reconstructs and step.conditional == step.unconditional == "run":
                self.keep_difference(conditional, unconditional)
        if self.zero_star:
            unconditional = unconditional * nearest_scale(conditional, unconditional)
        return conditional, unconditional

    def of_three(self, step: Step, latents: Tensor, conditional: Tensor) -> tuple[Tensor, Tensor]:
        """Two velocities whose guidance is that by the prompt and by pictures: from the unconditional velocity u and the
        unprompted one m, u + image_guidance (m - u) + guidance (conditional - m)."""
        unprompted = self.predicted(step, latents, "unprompted", step.unconditional)
        unconditional = self.predicted(step, latents, "unconditional", step.unconditional)
        less = unconditional.sub_(unprompted).mul_(1 - self.image_guidance)
        return conditional.add_(less), unprompted.add_(less)

    def predicted(self, step: Step, latents: Tensor, branch: str, how: str) -> Tensor:
        """The velocity of one branch: "run", "reuse" or "zero"."""
        if how == "zero":
            return torch.zeros_like(latents)
        model = self.expert(step.expert)
        if how == "reuse":
            before, context = self.residuals[branch], self.context(model, step.expert, branch, latents)
            return model.resume(latents[None], self.timestep, before, context, split=self.split)[0]
        context, in_8_bits = self.context(model, step.expert, branch, latents), step.attention == "8-bit"
        residual = self._residual(model, latents, branch) if self.keeps[branch] else None
        return model(latents[None], self.timestep, context, split=self.split, in_8_bits=in_8_bits, residual=residual)[0]

    def context(self, model: WanDiT, expert: str, branch: str, latents: Tensor) -> Context:
        """What an expert makes of the conditioning: once of what is the same for several branches."""
        if (expert, branch) not in self.contexts:
            like = next((context for (other, _), context in self.contexts.items() if other == expert), None)
            self.grid = grid_of(latents.shape)
            prepared = model.prepare([self.text[branch]], self.grid, self.inputs[branch], like=like)
            self.contexts[expert, branch] = prepared
        return self.contexts[expert, branch]

    def _residual(self, model: WanDiT, latents: Tensor, branch: str) -> Tensor:
        """Where the residual of a branch is kept: one tensor for all steps."""
        if branch not in self.residuals:
            T, H, W = grid_of(latents.shape)
            dtype = model.patch_embedding.weight.dtype
            self.residuals[branch] = torch.empty(1, T * H * W, model.dims.dim, dtype=dtype, device=latents.device)
        return self.residuals[branch]

    def keep_difference(self, conditional: Tensor, unconditional: Tensor) -> None:
        """Keep what the two differ by, in two bands where they are weighed by themselves."""
        if self.low is None:
            self.low = torch.empty_like(conditional)
            self.high = torch.empty_like(conditional) if self.in_bands else None
        torch.sub(conditional, unconditional, out=self.low)
        if self.high is not None:
            low = low_pass(self.low)
            torch.sub(self.low, low, out=self.high)
            self.low.copy_(low)

    def reconstructed(self, conditional: Tensor) -> Tensor:
        """The conditional velocity less the difference kept, its bands weighed as the loaded step says."""
        assert self.low is not None
        less = conditional - self.difference[0] * self.low
        return less if self.high is None else less.sub_(self.difference[1] * self.high)


def kept(steps: Sequence[Step]) -> tuple[dict[str, bool], bool, bool]:
    """What a run must keep: per branch whether a residual; whether a difference; whether that in two bands."""
    residuals = {
        "conditional": any(step.conditional == "reuse" for step in steps),
        **dict.fromkeys(("unconditional", "unprompted"), any(step.unconditional == "reuse" for step in steps)),
    }
    reconstructed = [step.difference for step in steps if step.unconditional == "reconstruct"]
    return residuals, bool(reconstructed), any(low != high for low, high in reconstructed)


def low_pass(x: Tensor) -> Tensor:
    """Of x [C, T, H, W] the frequencies of each frame below a fifth of its shorter side."""
    H, W = x.shape[-2:]
    rows = torch.fft.fftfreq(H, 1 / H, device=x.device)[:, None]
    columns = torch.fft.rfftfreq(W, 1 / W, device=x.device)
    within = (rows.square() + columns.square()).sqrt() <= min(H, W) // 5
    return torch.fft.irfft2(torch.fft.rfft2(x) * within, s=(H, W))


def nearest_scale(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """[] the number s for which s unconditional is nearest to conditional."""
    return (conditional * unconditional).sum() / (unconditional.square().sum() + 1e-8)
