"""Tensors that the speech model (S2V) has beside the transformer's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from wan_fast.manifest.shapes import Shapes, linear
from wan_fast.tasks import PATCH

# what a clip is shown of the frames before it: pixel frames, and the latent ones that these come to
MOTION_FRAMES, MOTION_LATENTS = 73, 19
# Motion is packed the coarser the longer it is ago (FramePack, arXiv 2504.12626), from the latest on. Per part the name of what
# packs it, the patch that becomes one token, (time, height, width) in latents, and the places of these tokens along time.
MOTION_PARTS = (
    ("proj", PATCH, (-1,)),
    ("proj_2x", (2, 4, 4), (-3,)),
    ("proj_4x", (4, 8, 8), (-19, -14, -9, -4)),
)
_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechDims:
    """Sizes of the audio encoder, the injection of its tokens, and the packing of motion.

    layers: blocks behind which sound is injected. audio_layers, audio_dim: of the features of sound. audio_tokens: per latent
    frame, beside a learned one. cond_dim: channels of the latents that poses and motion are given as.
    """

    layers: tuple[int, ...] = _LAYERS
    audio_layers: int = 25
    audio_dim: int = 1024
    audio_tokens: int = 4
    cond_dim: int = 16

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> SpeechDims | None:
        if "casual_audio_encoder.weights" not in shapes:
            return None
        audio = "casual_audio_encoder.encoder"
        return cls(
            layers=_layers(shapes, config),
            audio_layers=shapes["casual_audio_encoder.weights"][1],
            audio_dim=shapes[f"{audio}.conv1_global.conv.weight"][1],
            audio_tokens=shapes[f"{audio}.conv1_local.conv.weight"][0] // shapes[f"{audio}.conv1_global.conv.weight"][0],
            cond_dim=shapes["cond_encoder.weight"][1],
        )

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        D, C = dim, self.cond_dim
        patches = {"cond_encoder": PATCH} | {f"frame_packer.{name}": patch for name, patch, _ in MOTION_PARTS}
        convs = {
            "conv1_local": (self.audio_tokens * (D // 4), self.audio_dim),
            "conv1_global": (D // 4, self.audio_dim),
            "conv2": (D // 2, D // 4),
            "conv3": (D, D // 2),
        }
        shapes: dict[str, tuple[int, ...]] = {"trainable_cond_mask.weight": (3, D)}
        for name, patch in patches.items():
            shapes |= {f"{name}.weight": (D, C, *patch), f"{name}.bias": (D,)}
        encoder = "casual_audio_encoder.encoder"
        shapes |= {"casual_audio_encoder.weights": (1, self.audio_layers, 1, 1), f"{encoder}.padding_tokens": (1, 1, 1, D)}
        for name, (out, into) in convs.items():
            shapes |= {f"{encoder}.{name}.conv.weight": (out, into, 3), f"{encoder}.{name}.conv.bias": (out,)}
        shapes |= linear(f"{encoder}.final_linear", D, D)
        for n in range(len(self.layers)):
            injector = f"audio_injector.injector.{n}"
            for letter in "qkvo":
                shapes |= linear(f"{injector}.{letter}", D, D)
            shapes |= {f"{injector}.norm_q.weight": (D,), f"{injector}.norm_k.weight": (D,)}
            shapes |= linear(f"audio_injector.injector_adain_layers.{n}.linear", D, 2 * D)
        return shapes

    def inputs(self, latent_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        _, T, H, W = latent_shape
        return {
            "reference": (self.cond_dim, 1, H, W),
            "motion": (self.cond_dim, MOTION_LATENTS, H, W),
            "pose": (self.cond_dim, T, H, W),
            "audio": (self.audio_layers, self.audio_dim, 4 * T),
        }

    def extra_tokens(self, latent_shape: Sequence[int], first: bool) -> int:
        *_, H, W = latent_shape
        motion = sum(len(times) * (H // height) * (W // width) for _, (_, height, width), times in MOTION_PARTS)
        return (H // PATCH[1]) * (W // PATCH[2]) + (0 if first else motion)

    def kept_bytes(self, dim: int, latent_shape: Sequence[int], size: int) -> int:
        """Keys and values, shifts and scales, and the inputs."""
        inputs = sum(4 * prod(shape) for shape in self.inputs(latent_shape).values())
        return 2 * len(self.layers) * latent_shape[1] * dim * (2 * size * (self.audio_tokens + 1) + 2 * 4) + 2 * inputs

    def prepare_bytes(self, size: int) -> int:
        return 0

    def flops(self, dim: int, tokens: int) -> float:
        per_token = 2 * 2 * dim * dim + 4 * (self.audio_tokens + 1) * dim
        return float(len(self.layers)) * tokens * per_token

    def inputs_flops(self, dim: int, latent_shape: Sequence[int]) -> float:
        D, (_, T, H, W), N = dim, latent_shape, self.audio_tokens + 1
        frames = [MOTION_FRAMES + 4 * T]
        for _ in range(2):
            frames.append((frames[-1] + 1) // 2)
        # a stream per token, and one that modulates
        convs = (self.audio_dim * D // 4, D * D // 8, D * D // 2)
        audio = sum(N * 2.0 * 3 * count * weights for count, weights in zip(frames, convs, strict=True)) + 2.0 * T * D * D
        injectors = len(self.layers) * T * (N * 4.0 * D * D + 4.0 * D * D)
        # a token has as many products as its patch has latents; reference and pose
        packed = 2.0 * D * self.cond_dim * (MOTION_LATENTS + 1 + T) * H * W
        return audio + injectors + packed


def _layers(shapes: Shapes, config: Mapping[str, object]) -> tuple[int, ...]:
    """As the config lists them; without one the released ones, in proportion."""
    count = len({match[1] for name in shapes if (match := re.match(r"audio_injector\.injector\.(\d+)\.", name))})
    num_layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
    given = config.get("audio_inject_layers")
    if isinstance(given, (list, tuple)):
        layers = tuple(int(str(layer)) for layer in given)
        if layers != tuple(sorted({*layers})) or not layers or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"audio_inject_layers {list(layers)} are not blocks of {num_layers}, in order")
        return layers
    last = len(_LAYERS) - 1
    chosen = (_LAYERS[n * last // max(count - 1, 1)] for n in range(count))
    return tuple(sorted({round(layer * (num_layers - 1) / _LAYERS[-1]) for layer in chosen}))
