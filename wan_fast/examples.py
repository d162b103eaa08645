"""What a task shows where a command line names neither a prompt nor a picture, as the official one then has its own example.

Prompts of text to video and text to image are the official ones, the others ours. The pictures are in assets/examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wan_fast.tasks import TaskSpec

FOLDER = Path(__file__).parent / "assets" / "examples"
_CATS = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
_PORTRAIT = "一个朴素端庄的美人"
_SURFER = (
    "A cream-coloured cat in tortoiseshell sunglasses sits on a surfboard and films itself. The board rocks on the swell, "
    "drops of water glitter in the sun, the wind moves its whiskers, and it slowly turns its head. Green cliffs and a beach "
    "lie behind it."
)
_TALKS = (
    "Summer beach holiday. A cream-coloured cat in tortoiseshell sunglasses sits on a surfboard, looks at the camera and talks."
)
_BIRD = (
    "Computer animation. A round blue bird with thick eyebrows stands on the ground and looks about unsurely, then "
    "crouches, leaps up and spreads its wings. The camera rises with it into a blue sky, where it glides above sunlit "
    "clouds among drifting feathers."
)
_NEW_YEAR = (
    "3D cartoon. At a cheerful spring festival a little girl in a red embroidered jacket, her black hair in two buns, "
    "laughs and waves at a friendly green snake with amber eyes. It sways and nods back at her. Red lanterns glow behind "
    "them, confetti falls."
)
_OF_KIND: dict[str, dict[str, str | tuple[str, ...]]] = {
    "text": {"prompt": _CATS},
    "text_image": {"prompt": _CATS},
    "image": {"prompt": _SURFER, "image": "i2v_input.jpg"},
    "first_last": {
        "prompt": _BIRD,
        "first_frame": "flf2v_input_first_frame.jpg",
        "last_frame": "flf2v_input_last_frame.jpg",
    },
    "speech": {"prompt": _TALKS, "image": "i2v_input.jpg", "audio": "talk.ogg"},
    "animate": {},  # a folder that preprocessing makes
    "vace": {"prompt": _NEW_YEAR, "src_ref_images": ("girl.jpg", "snake.jpg")},
    "subjects": {"prompt": _NEW_YEAR, "src_ref_images": ("girl.jpg", "snake.jpg")},
    "poses": {"prompt": "a person is dancing", "image": "girl.jpg", "pose_video": "pose.mp4"},
}


def example(spec: TaskSpec) -> dict[str, Any]:
    """Fields of a request: the prompt, and the pictures that go with it."""
    if spec.image_only:
        return {"prompt": _PORTRAIT}
    fields = _OF_KIND[spec.kind]
    return {name: value if name == "prompt" else _placed(value) for name, value in fields.items()}


def _placed(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return str(FOLDER / names) if isinstance(names, str) else tuple(str(FOLDER / name) for name in names)
