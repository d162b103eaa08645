"""How far apart a model's time embeddings are from step to step, before the loop and on the CPU: TeaCache's signal.

It is the same for every prompt, seed and branch. Only the tensors it needs are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_fast.dit import sinusoid
from wan_fast.steps import Step
from wan_fast.weights import Packed, Part, read_tensors

_LINEARS = {
    "embedding": ("time_embedding.0", "time_embedding.2"),
    "projection": ("time_embedding.0", "time_embedding.2", "time_projection.1"),
}


@torch.inference_mode()
def time_distances(signal: str, experts: Mapping[str, Part], steps: Sequence[Step]) -> list[float]:
    """By step, mean |s - s of the step before| / mean |s of the step before|, 0 at the first step of an expert.

    Args:
        signal: "embedding", the output of `time_embedding`, or "projection", that of `time_projection`.
        experts: the DiTs as described.
        steps: the plan.
    """
    distances = []
    for name in dict.fromkeys(step.expert for step in steps):
        timesteps = torch.tensor([step.timestep for step in steps if step.expert == name])
        s = _signal(experts[name], timesteps, _LINEARS[signal])
        ratios = (s[1:] - s[:-1]).abs().mean(-1) / s[:-1].abs().mean(-1)
        distances += [0.0, *ratios.tolist()]
    return distances


def _signal(part: Part, timesteps: Tensor, linears: Sequence[str]) -> Tensor:
    """[steps, D or 6 D] fp32, as the model computes it."""
    names = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    few = replace(part, tensors={name: info for name, info in part.tensors.items() if name in names})
    state = {name: (t.dequantized() if isinstance(t, Packed) else t).float() for name, t in read_tensors(few)}
    x = sinusoid(timesteps, state["time_embedding.0.weight"].shape[1])
    for i, linear in enumerate(linears):
        x = F.linear(F.silu(x) if i else x, state[f"{linear}.weight"], state[f"{linear}.bias"])
    return x
