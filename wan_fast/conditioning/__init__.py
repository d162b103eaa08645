"""What a generation is conditioned on. One prepare function per kind of task, in `PREPARE`."""

from __future__ import annotations

from collections.abc import Callable

from wan_fast.conditioning.animate import prepare_animate
from wan_fast.conditioning.image import prepare_first_last, prepare_image
from wan_fast.conditioning.pose import prepare_poses
from wan_fast.conditioning.prepared import Clips, Conditioning, Encoders, alone, texts_of
from wan_fast.conditioning.speech import prepare_speech
from wan_fast.conditioning.subjects import prepare_subjects
from wan_fast.conditioning.text import prepare_text, prepare_text_image
from wan_fast.conditioning.vace import prepare_vace
from wan_fast.framing import Framing
from wan_fast.resolving import Resolved

__all__ = ["PREPARE", "Clips", "Conditioning", "Encoders", "texts_of"]

PREPARE: dict[str, Callable[[Resolved, Framing, Encoders], Clips]] = {
    "text": alone(prepare_text),
    "text_image": alone(prepare_text_image),
    "image": alone(prepare_image),
    "first_last": alone(prepare_first_last),
    "vace": alone(prepare_vace),
    "animate": prepare_animate,
    "speech": prepare_speech,
    "subjects": alone(prepare_subjects),
    "poses": alone(prepare_poses),
}
