"""Shapes of tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

Shapes = Mapping[str, tuple[int, ...]]


def num_parameters(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


class Extension(Protocol):
    """Sizes of what a transformer has beyond its blocks; made without arguments they are the released model's."""

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> Extension | None:
        """None where a model has none of it."""
        ...

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Its tensors in a model of that width."""
        ...

    def inputs(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of what it is given with latents [C, T, H, W], by the fields of `wan_fast.inputs.Inputs`."""
        ...

    def extra_tokens(self, latent_shape: Sequence[int], first: bool) -> int:
        """Tokens that it puts behind the clip's own; `first`: there is nothing before the clip."""
        ...

    def kept_bytes(self, dim: int, latent_shape: Sequence[int], size: int) -> int:
        """Of what it makes of a clip's inputs once for both branches, beside tokens; `size`: bytes of the compute dtype."""
        ...

    def prepare_bytes(self, size: int) -> int:
        """Of what it works in as it does so."""
        ...

    def flops(self, dim: int, tokens: int) -> float:
        """Of one forward over the clip's own tokens, beyond that of the blocks."""
        ...

    def inputs_flops(self, dim: int, latent_shape: Sequence[int]) -> float:
        """Of what is computed once per clip."""
        ...
