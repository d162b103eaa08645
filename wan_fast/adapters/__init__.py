"""What extends the transformer: tokens beside its own, and what adds to the residual stream behind some blocks.

An adapter holds modules that are the model's own, under native names. Which one a model has is told from its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wan_fast.adapters.animate import FaceAdapter
from wan_fast.adapters.pose import PoseEncoders
from wan_fast.adapters.protocol import Adapter, AfterBlock
from wan_fast.adapters.speech import SpeechAdapter
from wan_fast.adapters.vace import VaceBranch
from wan_fast.attention import Attention, Projected
from wan_fast.manifest import DiTDims

__all__ = ["Adapter", "AfterBlock", "adapter_of"]

# by the field of a model's sizes that says that it has it
_ADAPTERS: dict[str, Callable[[DiTDims, Attention, Sequence[Projected | None]], Adapter]] = {
    "vace_layers": VaceBranch,
    "speech": SpeechAdapter,
    "face": FaceAdapter,
    "pose": PoseEncoders,
}


def adapter_of(dims: DiTDims, attention: Attention, in_8_bits: Sequence[Projected | None]) -> Adapter | None:
    """A model's adapter; None where it has none.

    Args:
        dims: sizes of the model.
        attention: exact.
        in_8_bits: per block of the model's own, as in `WanDiT`.
    """
    return next((make(dims, attention, in_8_bits) for field, make in _ADAPTERS.items() if getattr(dims, field)), None)
