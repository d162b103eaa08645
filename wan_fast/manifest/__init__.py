"""The tensors each model consists of: names, shapes and what follows from them (bytes, FLOPs). Standard library only.

A checkpoint is held against these tables from its file headers alone, before a weight is read. Names are the native
ones. Counts are multiply-adds times two, as in arXiv 2503.20314.
"""

from __future__ import annotations

from wan_fast.manifest.audio import AUDIO, AudioDims, audio_flops, audio_shapes
from wan_fast.manifest.dit import DiTDims, dit_flops, dit_inputs_flops, dit_shapes, dit_text_flops, stays_fp32
from wan_fast.manifest.encoders import CLIP, ClipDims, clip_flops, clip_shapes, text_flops, text_shapes, text_shapes_like
from wan_fast.manifest.shapes import Shapes, num_parameters
from wan_fast.manifest.vae import VaeDims, decoder_level, encoder_level, strips, vae_flops, vae_shapes

__all__ = [
    "AUDIO",
    "CLIP",
    "AudioDims",
    "ClipDims",
    "DiTDims",
    "Shapes",
    "VaeDims",
    "audio_flops",
    "audio_shapes",
    "clip_flops",
    "clip_shapes",
    "decoder_level",
    "dit_flops",
    "dit_inputs_flops",
    "dit_shapes",
    "dit_text_flops",
    "encoder_level",
    "num_parameters",
    "stays_fp32",
    "strips",
    "text_flops",
    "text_shapes",
    "text_shapes_like",
    "vae_flops",
    "vae_shapes",
]
