"""Attention backends, by name: softmax(q k^T / sqrt(K)) v without a mask.

Every backend is a function of q [B, L, N, K], k and v [B, S, N, K] in the compute dtype, returning [B, L, N, K].
Which one runs is decided in the plan.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, whichever kernel it picks for the device."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _flash() -> Attention:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v)


def _xformers() -> Attention:
    from xformers.ops import memory_efficient_attention

    return lambda q, k, v: memory_efficient_attention(q, k, v)


def backend(name: str) -> Attention:
    """The function behind a backend's name; importing its package is left to here."""
    return {"sdpa": lambda: sdpa, "flash": _flash, "xformers": _xformers}[name]()
