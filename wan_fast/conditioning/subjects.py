"""Phantom (arXiv 2502.11079): pictures of what is to be seen, as latent frames behind the clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan_fast.conditioning.prepared import Conditioning, Encoders, pixels_of, texts_of
from wan_fast.framing import Framing, Size, boxed_size
from wan_fast.inputs import Inputs
from wan_fast.media import read_image
from wan_fast.resolving import Resolved

if TYPE_CHECKING:
    from PIL import Image


def prepare_subjects(request: Resolved, framing: Framing, encoders: Encoders) -> Conditioning:
    text = {**encoders.encode_text(texts_of(request))}
    pictures = [pixels_of(on_white(read_image(Path(file)), framing.size))[:, None] for file in request.src_ref_images]
    references = torch.cat([encoders.encode_video([picture], 1) for picture in pictures], dim=1)
    inputs = Inputs(reference=references)
    if request.two_scales:
        text["unprompted"] = text["unconditional"]
    # guided by the prompt alone, both branches have the pictures
    without = replace(inputs, reference=torch.zeros_like(references)) if request.image_guidance_scale != 1 else inputs
    return Conditioning(text=text, inputs=inputs, others={"unconditional": without})


def on_white(image: Image.Image, size: Size) -> Image.Image:
    """A picture whole, scaled (Lanczos) to fit into `size` (width, height), at the centre of white."""
    from PIL import Image

    columns, rows = boxed_size(image.size, size)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image.resize((columns, rows), Image.Resampling.LANCZOS), ((size[0] - columns) // 2, (size[1] - rows) // 2))
    return canvas
