"""What the transformer asks of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from wan_fast.blocks import Context, Given, Grid
from wan_fast.inputs import Inputs

# (block, x behind it [B, L + E, D] fp32) -> what is to be added to it, of its shape; None: it has been added already
AfterBlock = Callable[[int, Tensor], Tensor | None]


class Adapter(Protocol):
    """Adds to x behind the blocks in `layers`, and has a word on its tokens. `modules`: by their names in the model. `takes`:
    the fields of `Inputs` that it wants."""

    layers: frozenset[int]
    modules: dict[str, nn.Module]
    takes: frozenset[str]

    def prepare(self, inputs: Inputs, text: Tensor, grid: Grid, like: Context | None) -> Given:
        """What is the same in every forward of a clip, made once.

        Args:
            inputs: of the clip.
            text: [B, S, D] tokens of the text.
            grid: (T, H, W) tokens of the clip.
            like: a context of the same clip, from which is taken what depends on inputs that are the same objects there.
        """
        ...

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        """One forward.

        Args:
            x: [B, L + E, D] fp32, the embedded latents, and the tokens behind them.
            modulation: [B, R, 6, D] fp32, of the timestep.
            context, split, in_8_bits: as in `WanDiT.forward`.
        """
        ...
