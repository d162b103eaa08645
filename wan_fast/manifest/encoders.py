"""Tensors of the encoders of text and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod

from wan_fast.manifest.shapes import Shapes, linear
from wan_fast.tasks import CLIP_HEAD_DIM, IMAGE_DIM


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDims:
    """Sizes of the image tower of CLIP, a vision transformer. `num_layers` are those that run: the released model's tokens are
    taken before its last."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    patch: int
    size: int

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> ClipDims:
        dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
        layers = {int(match[1]) for name in shapes if (match := re.match(r"visual\.transformer\.(\d+)\.", name))}
        positions = shapes["visual.pos_embedding"][-2]
        return cls(
            dim=dim,
            ffn_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
            num_heads=dim // CLIP_HEAD_DIM,
            num_layers=max(layers) + 1,
            patch=patch,
            size=patch * isqrt(positions - 1),
        )

    @property
    def tokens(self) -> int:
        """Of a picture: one per patch, and the class's."""
        return (self.size // self.patch) ** 2 + 1


# of the released models
CLIP = ClipDims(dim=IMAGE_DIM, ffn_dim=4 * IMAGE_DIM, num_heads=16, num_layers=31, patch=14, size=224)


def clip_shapes(dims: ClipDims, *, joint: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensors of the image tower's layers that run; q, k and v are one where `joint`."""
    D, F = dims.dim, dims.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (D,),
        "visual.pos_embedding": (dims.tokens, D),
        "visual.patch_embedding.weight": (D, 3, dims.patch, dims.patch),
        "visual.pre_norm.weight": (D,),
        "visual.pre_norm.bias": (D,),
    }
    for i in range(dims.num_layers):
        layer = f"visual.transformer.{i}"
        for norm in (f"{layer}.norm1", f"{layer}.norm2"):
            shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
        for name in ("to_qkv",) if joint else "qkv":
            shapes |= linear(f"{layer}.attn.{name}", D, 3 * D if joint else D)
        shapes |= linear(f"{layer}.attn.proj", D, D) | linear(f"{layer}.mlp.0", D, F) | linear(f"{layer}.mlp.2", F, D)
    return shapes


def clip_flops(dims: ClipDims) -> float:
    """FLOPs of one picture's tokens."""
    L, D = dims.tokens, dims.dim
    per_layer = 2.0 * L * (4 * D * D + 2 * D * dims.ffn_dim) + 4.0 * L * L * D
    return dims.num_layers * per_layer + 2.0 * L * 3 * dims.patch**2 * D


def text_shapes(vocab: int, dim: int, attention_dim: int, ffn_dim: int, heads: int, layers: int, buckets: int = 32):
    """Tensors of the umT5 encoder under their native names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (dim,), f"{block}.norm2.weight": (dim,)}
        shapes |= {f"{block}.attn.{letter}.weight": (attention_dim, dim) for letter in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (dim, attention_dim)
        shapes |= {f"{block}.ffn.{name}.weight": (ffn_dim, dim) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (dim, ffn_dim)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (buckets, heads)
    return shapes


def text_shapes_like(shapes: Shapes, config: Mapping[str, object] | None = None) -> dict[str, tuple[int, ...]]:
    """What an encoder of the width and depth seen in `shapes` consists of; the depth is `config`'s where it has one."""
    attention_dim, dim = shapes["blocks.0.attn.q.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
    layers = int(str((config or {}).get("num_layers") or layers))
    ffn_dim = shapes["blocks.0.ffn.fc1.weight"][0]
    return text_shapes(shapes["token_embedding.weight"][0], dim, attention_dim, ffn_dim, heads, layers, buckets)


def text_flops(shapes: Shapes, tokens: int) -> float:
    """FLOPs of encoding `tokens` text tokens: two per weight outside the embeddings, and the attention."""
    linear = sum(prod(shape) for name, shape in shapes.items() if "embedding" not in name and len(shape) == 2)
    layers, width = len([n for n in shapes if n.endswith("attn.q.weight")]), shapes["blocks.0.attn.q.weight"][0]
    return 2.0 * tokens * linear + 4.0 * layers * tokens * tokens * width
