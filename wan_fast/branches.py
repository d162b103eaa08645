"""The velocities a step needs, conditional and unconditional: computed, or made of what earlier steps left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from wan_fast.dit import Context, WanDiT, grid_of
from wan_fast.steps import Step


class Branches:
    """Carries out the rows of the plan for both passes; what it keeps is one residual per branch, and one difference.

    Args:
        steps: the plan's table.
        expert: gives the model of a name, on the device.
        text: per branch, [S, text_dim].
        split: leading tokens at timestep 0, as in `WanDiT.forward`.
        device: where the latents are.
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
        zero_star: bool = False,
    ) -> None:
        self.expert, self.text, self.split, self.zero_star = expert, text, split, zero_star
        rows = [[0.0, step.timestep] if split else [step.timestep] for step in steps]
        self.timesteps = torch.tensor(rows, device=device)[:, None]  # [steps, 1, R]
        self.keeps = {
            "conditional": any(step.conditional == "reuse" for step in steps),
            "unconditional": any(step.unconditional == "reuse" for step in steps),
        }
        self.reconstructs = any(step.unconditional == "reconstruct" for step in steps)
        self.in_bands = any(step.difference[0] != step.difference[1] for step in steps)
        self.contexts: dict[tuple[str, str], Context] = {}
        self.residuals: dict[str, Tensor] = {}
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, step: Step, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """The conditional and the unconditional velocity at latents [C, T, H, W], of their shape; None without guidance."""
        conditional = self.predicted(step, latents, "conditional", step.conditional)
        if step.unconditional == "none":
            return conditional, None
        if step.unconditional == "reconstruct":
            unconditional = self.reconstructed(conditional, *step.difference)
        else:
            unconditional = self.predicted(step, latents, "unconditional", step.unconditional)
            if self.reconstructs and step.conditional == step.unconditional == "run":
                self.keep_difference(conditional, unconditional)
        if self.zero_star:
            unconditional = unconditional * nearest_scale(conditional, unconditional)
        return conditional, unconditional

    def predicted(self, step: Step, latents: Tensor, branch: str, how: str) -> Tensor:
        """The velocity of one branch: "run", "reuse" or "zero"."""
        if how == "zero":
            return torch.zeros_like(latents)
        model, timestep = self.expert(step.expert), self.timesteps[step.index]
        if how == "reuse":
            return model.resume(latents[None], timestep, self.residuals[branch], split=self.split)[0]
        if (step.expert, branch) not in self.contexts:
            self.contexts[step.expert, branch] = model.prepare([self.text[branch]], grid_of(latents.shape))
        residual = self._residual(model, latents, branch) if self.keeps[branch] else None
        context, in_8_bits = self.contexts[step.expert, branch], step.attention == "8-bit"
        return model(latents[None], timestep, context, split=self.split, in_8_bits=in_8_bits, residual=residual)[0]

    def _residual(self, model: WanDiT, latents: Tensor, branch: str) -> Tensor:
        """Where the residual of a branch is kept: one tensor for all steps."""
        if branch not in self.residuals:
            T, H, W = grid_of(latents.shape)
            dtype = model.patch_embedding.weight.dtype
            self.residuals[branch] = torch.empty(1, T * H * W, model.dims.dim, dtype=dtype, device=latents.device)
        return self.residuals[branch]

    def keep_difference(self, conditional: Tensor, unconditional: Tensor) -> None:
        """Keep what the two differ by, in two bands where they are weighed by themselves."""
        self.low = conditional - unconditional
        if self.in_bands:
            whole, self.low = self.low, low_pass(self.low)
            self.high = whole - self.low

    def reconstructed(self, conditional: Tensor, low: float, high: float) -> Tensor:
        """The conditional velocity less the difference kept, its bands weighed."""
        assert self.low is not None
        less = torch.sub(conditional, self.low, alpha=low)
        return less if self.high is None else torch.sub(less, self.high, alpha=high)


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
