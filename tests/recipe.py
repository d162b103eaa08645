"""Deterministic weights and inputs, the same numbers on every machine: an integer hash, no generator state."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn


def uniform(key: int, count: int) -> Tensor:
    """[count] fp64 in [-1, 1): the first `count` numbers of the sequence that `key` names."""
    wrap = 0xFFFFFFFF
    # 32-bit words in int64: products overflow modulo 2^64, which leaves the low 32 bits right
    a = (torch.arange(count) * 2654435761 + (key * 40503 + 1)) & wrap
    a = ((a ^ (a >> 15)) * 2246822519) & wrap
    a = a ^ (a >> 13)
    return a.double() * (2 / 2**32) - 1


def recipe_tensor(shape: Sequence[int], key: int, scale: float = 3**0.5) -> Tensor:
    """fp32 of `shape`, row-major, uniform in [-scale, scale); the default scale has variance 1."""
    return (scale * uniform(key, prod(shape))).float().view(*shape)


@torch.no_grad()
def recipe_weights(module: nn.Module) -> nn.Module:
    """Fill a module in place; a tensor's key is its place among the sorted state-dict names. Returns the module."""
    for key, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        if name.endswith(".kernel"):
            continue
        values = uniform(key, tensor.numel())
        if tensor.dim() <= 1 or name.endswith(("gamma", "weights")):
            is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            values = (1.0 if is_gain else 0.0) + 0.1 * values
        else:
            values = values * (3 * tensor.shape[0] / tensor.numel()) ** 0.5
        tensor.copy_(values.view(tensor.shape))
    return module
