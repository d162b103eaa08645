"""The tensors of the audio encoder: wav2vec2 (arXiv 2006.11477) in its large, layer-normalised form. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from wan_fast.sound import KERNELS, STRIDES

# what a config.json must say of the form of the model
_FORM: Mapping[str, Any] = {
    "model_type": "wav2vec2",
    "conv_kernel": list(KERNELS),
    "conv_stride": list(STRIDES),
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "do_stable_layer_norm": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True, slots=True)
class AudioDims:
    """Sizes of a wav2vec2.

    conv_dims: widths behind its convolutions over samples. position_kernel, position_groups: of the convolution that tells
    positions. last_is_normed: the last state is behind the last norm, as transformers had it before 5, with which the released
    model is used; a folder that transformers 5 wrote has it before that norm.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    conv_dims: tuple[int, ...]
    position_kernel: int
    position_groups: int
    last_is_normed: bool = True

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> AudioDims:
        """From the config.json of transformers.

        Raises:
            ValueError: it says nothing of a size, or is of a model of another form.
        """
        other = {key: config.get(key) for key, value in _FORM.items() if config.get(key) != value}
        if other:
            key, seen = next(iter(other.items()))
            raise ValueError(f"its config.json has {key} {seen!r} where the audio encoder has {_FORM[key]!r}")
        dims = cls(
            dim=_size(config, "hidden_size"),
            ffn_dim=_size(config, "intermediate_size"),
            num_heads=_size(config, "num_attention_heads"),
            num_layers=_size(config, "num_hidden_layers"),
            conv_dims=tuple(config.get("conv_dim") or ()),
            position_kernel=_size(config, "num_conv_pos_embeddings"),
            position_groups=_size(config, "num_conv_pos_embedding_groups"),
            last_is_normed=not re.match(r"[5-9]|\d\d", str(config.get("transformers_version") or "")),
        )
        if len(dims.conv_dims) != len(KERNELS) or not all(isinstance(width, int) and width > 0 for width in dims.conv_dims):
            raise ValueError(f"its config.json has conv_dim {config.get('conv_dim')!r}, not {len(KERNELS)} widths")
        for key, parts in (("num_attention_heads", dims.num_heads), ("num_conv_pos_embedding_groups", dims.position_groups)):
            if dims.dim % parts:
                raise ValueError(f"its config.json has hidden_size {dims.dim}, which is no multiple of its {key} {parts}")
        return dims


# of the released models
AUDIO = AudioDims(
    dim=1024, ffn_dim=4096, num_heads=16, num_layers=24, conv_dims=(512,) * 7, position_kernel=128, position_groups=16
)


def audio_shapes(dims: AudioDims) -> dict[str, tuple[int, ...]]:
    """Every tensor of the audio encoder, by the names of transformers 5."""
    D = dims.dim
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (kernel, (before, after)) in enumerate(zip(KERNELS, pairwise((1, *dims.conv_dims)), strict=True)):
        name = f"feature_extractor.conv_layers.{i}"
        shapes |= {f"{name}.conv.weight": (after, before, kernel), f"{name}.conv.bias": (after,)}
        shapes |= _norm(f"{name}.layer_norm", after)
    shapes |= _norm("feature_projection.layer_norm", dims.conv_dims[-1])
    shapes |= _linear("feature_projection.projection", dims.conv_dims[-1], D)
    position = "encoder.pos_conv_embed.conv"
    shapes |= {
        f"{position}.parametrizations.weight.original0": (1, 1, dims.position_kernel),
        f"{position}.parametrizations.weight.original1": (D, D // dims.position_groups, dims.position_kernel),
        f"{position}.bias": (D,),
    }
    for i in range(dims.num_layers):
        layer = f"encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.attention.{part}", D, D)
        shapes |= _norm(f"{layer}.layer_norm", D)
        shapes |= _linear(f"{layer}.feed_forward.intermediate_dense", D, dims.ffn_dim)
        shapes |= _linear(f"{layer}.feed_forward.output_dense", dims.ffn_dim, D)
        shapes |= _norm(f"{layer}.final_layer_norm", D)
    return shapes | _norm("encoder.layer_norm", D)


def audio_flops(dims: AudioDims, num_samples: int) -> int:
    """FLOPs of encoding so many samples at 16 kHz."""
    D, length, total = dims.dim, num_samples, 0
    for kernel, stride, (before, after) in zip(KERNELS, STRIDES, pairwise((1, *dims.conv_dims)), strict=True):
        length = max(0, (length - kernel) // stride + 1)
        total += 2 * length * kernel * before * after
    per_frame = dims.conv_dims[-1] * D + dims.position_kernel * D * D // dims.position_groups
    per_frame += dims.num_layers * (4 * D * D + 2 * D * dims.ffn_dim)
    return total + 2 * length * per_frame + dims.num_layers * 4 * length**2 * D


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"its config.json has {key} {value!r}, not a positive number")
    return value


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
