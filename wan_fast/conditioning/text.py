"""Text, and a picture that the clip begins with as it is."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from wan_fast.conditioning.prepared import Conditioning, Encoders, pixels_of, texts_of
from wan_fast.framing import Framing
from wan_fast.media import read_image
from wan_fast.resolving import Resolved
from wan_fast.tasks import PATCH


def prepare_text(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    return Conditioning(text=encoders.encode_text(texts_of(request)))


def prepare_text_image(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    """TI2V: a picture becomes the clip's first latent frame, kept as it is and shown to the model at timestep 0."""
    text = encoders.encode_text(texts_of(request))
    if request.image is None:
        return Conditioning(text=text)
    known = encoders.encode_video([cover(Path(request.image), framing.size)], 1)
    frames, height, width = known.shape[-3:]
    return Conditioning(text=text, known=known, split=frames * (height // PATCH[1]) * (width // PATCH[2]))


def cover(path: Path, size: tuple[int, int]) -> Tensor:
    """The picture scaled (Lanczos) to cover `size` (width, height) and cropped at its centre: [3, 1, H, W] in [-1, 1]."""
    from PIL import Image

    image = read_image(path)
    width, height = size
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return pixels_of(image.crop((left, top, left + width, top + height)))[:, None]
