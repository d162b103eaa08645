"""What a generation is conditioned on. One prepare function per kind of task, in `PREPARE`."""

from __future__ import annotations

from collections.abc import Callable

from wan_fast.conditioning.image import prepare_first_last, prepare_image
from wan_fast.conditioning.prepared import Conditioning, Encoders, texts_of
from wan_fast.conditioning.text import prepare_text, prepare_text_image
from wan_fast.conditioning.vace import prepare_vace
from wan_fast.config import Resolved
from wan_fast.framing import Framing

__all__ = ["PREPARE", "Conditioning", "Encoders", "texts_of"]

PREPARE: dict[str, Callable[[Resolved, Framing, Encoders], Conditioning]] = {
    "text": prepare_text,
    "text_image": prepare_text_image,
    "image": prepare_image,
    "first_last": prepare_first_last,
    "vace": prepare_vace,
}
