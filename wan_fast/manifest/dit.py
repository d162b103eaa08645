"""Tensors of the diffusion transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from wan_fast.manifest.animate import FaceDims
from wan_fast.manifest.pose import PoseDims
from wan_fast.manifest.shapes import Extension, Shapes, linear
from wan_fast.manifest.speech import SpeechDims
from wan_fast.tasks import FREQ_DIM, HEAD_DIM, IMAGE_DIM, PATCH, TEXT_DIM, TEXT_LEN, VACE_DIM, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTDims:
    """Sizes of one diffusion transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int = TEXT_DIM
    text_len: int = TEXT_LEN
    freq_dim: int = FREQ_DIM
    eps: float = 1e-6
    image_dim: int = 0
    """Width of a picture's tokens; 0 where the model takes none."""
    image_positions: int = 0
    """Learned positions of these tokens, of all pictures together; 0 for none."""
    vace_layers: tuple[int, ...] = ()
    """Blocks behind which the VACE branch adds a hint."""
    vace_dim: int = 0
    """Channels of the VACE branch's input."""
    speech: SpeechDims | None = None
    face: FaceDims | None = None
    pose: PoseDims | None = None

    @classmethod
    def of_task(cls, spec: TaskSpec) -> DiTDims:
        same = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "vace_layers")
        return cls(
            **{name: getattr(spec, name) for name in same},
            image_dim=IMAGE_DIM if spec.image_tokens else 0,
            image_positions=spec.image_tokens if spec.kind == "first_last" else 0,
            vace_dim=VACE_DIM if spec.vace_layers else 0,
            speech=SpeechDims() if spec.extension == "speech" else None,
            face=FaceDims() if spec.extension == "face" else None,
            pose=PoseDims() if spec.extension == "pose" else None,
        )

    @classmethod
    def of_shapes(cls, shapes: Shapes, config: Mapping[str, object]) -> DiTDims:
        """Read the sizes from tensor shapes; from `config` what leaves no trace there, and the number of layers, so that
        lost ones are missed."""
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
        heads = int(str(config.get("num_heads") or config.get("num_attention_heads") or dim // HEAD_DIM))
        if heads < 1 or dim % heads or dim // heads % 2:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        num_layers = int(str(config.get("num_layers") or max(blocks) + 1))
        return cls(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=heads,
            num_layers=num_layers,
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // prod(PATCH),
            text_dim=shapes["text_embedding.0.weight"][1],
            text_len=int(str(config.get("text_len") or TEXT_LEN)),
            freq_dim=shapes["time_embedding.0.weight"][1],
            eps=float(str(config.get("eps") or 1e-6)),
            image_dim=shapes.get("img_emb.proj.1.weight", (0,))[-1],
            image_positions=shapes.get("img_emb.emb_pos", (0, 0))[1],
            vace_layers=_vace_layers(shapes, config, num_layers),
            vace_dim=shapes.get("vace_patch_embedding.weight", (0, 0))[1],
            speech=SpeechDims.of_shapes(shapes, config),
            face=FaceDims.of_shapes(shapes, config),
            pose=PoseDims.of_shapes(shapes, config),
        )

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """What the model has beyond the image and VACE branches."""
        return tuple(extension for extension in (self.speech, self.face, self.pose) if extension is not None)

    @property
    def condition_dim(self) -> int:
        """Channels that are the same at every step: what the model takes beside the noisy latents."""
        return self.in_dim - self.out_dim

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def _vace_layers(shapes: Shapes, config: Mapping[str, object], num_layers: int) -> tuple[int, ...]:
    """As the config lists them; without one, as many as there are branch blocks, evenly spread from the first on."""
    if "vace_patch_embedding.weight" not in shapes:
        return ()
    given = config.get("vace_layers")
    if isinstance(given, (list, tuple)):
        layers = tuple(int(str(layer)) for layer in given)
        if layers != tuple(sorted({*layers})) or not layers or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"vace_layers {list(layers)} are not blocks of {num_layers}, in order")
        return layers
    count = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"vace_blocks\.(\d+)\.", name)))
    return tuple(range(0, num_layers, num_layers // count))[:count]


def dit_shapes(dims: DiTDims) -> dict[str, tuple[int, ...]]:
    """Tensors of the transformer, with its image branch and its VACE branch where it has them."""
    D, F = dims.dim, dims.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (D, dims.in_dim, *PATCH),
        "patch_embedding.bias": (D,),
        "head.modulation": (1, 2, D),
        **linear("text_embedding.0", dims.text_dim, D),
        **linear("text_embedding.2", D, D),
        **linear("time_embedding.0", dims.freq_dim, D),
        **linear("time_embedding.2", D, D),
        **linear("time_projection.1", D, 6 * D),
        **linear("head.head", D, prod(PATCH) * dims.out_dim),
    }
    if dims.image_dim:
        shapes |= linear("img_emb.proj.1", dims.image_dim, dims.image_dim) | linear("img_emb.proj.3", dims.image_dim, D)
        for norm, width in (("img_emb.proj.0", dims.image_dim), ("img_emb.proj.4", D)):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if dims.image_positions:
        shapes["img_emb.emb_pos"] = (1, dims.image_positions, dims.image_dim)
    if dims.vace_layers:
        shapes |= {"vace_patch_embedding.weight": (D, dims.vace_dim, *PATCH), "vace_patch_embedding.bias": (D,)}
        shapes |= linear("vace_blocks.0.before_proj", D, D)
    branch = [f"vace_blocks.{n}" for n in range(len(dims.vace_layers))]
    for block in (*(f"blocks.{i}" for i in range(dims.num_layers)), *branch):
        shapes |= {f"{block}.modulation": (1, 6, D), f"{block}.norm3.weight": (D,), f"{block}.norm3.bias": (D,)}
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for letter in "qkvo":
                shapes |= linear(f"{attention}.{letter}", D, D)
            shapes |= {f"{attention}.norm_q.weight": (D,), f"{attention}.norm_k.weight": (D,)}
        shapes |= linear(f"{block}.ffn.0", D, F) | linear(f"{block}.ffn.2", F, D)
        if dims.image_dim and block not in branch:
            shapes |= linear(f"{block}.cross_attn.k_img", D, D) | linear(f"{block}.cross_attn.v_img", D, D)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (D,)
        if block in branch:
            shapes |= linear(f"{block}.after_proj", D, D)
    for extension in dims.extensions:
        shapes |= extension.shapes(D)
    return shapes


# these stay fp32 under --dtype bf16; all other weights of the DiT are rounded to the compute dtype
_FP32_WEIGHTS = re.compile(r"modulation|norm|^time_|^head\.|^img_emb\.(?:proj\.[04]\.|emb_pos)|^casual_audio_encoder\.")


def stays_fp32(name: str) -> bool:
    """Whether a weight of the DiT is fp32 whatever the compute dtype: norms, modulation, time embedding, head, what encodes
    sound."""
    return bool(_FP32_WEIGHTS.search(name))


def dit_flops(dims: DiTDims, tokens: int, image_tokens: int = 0, own: int | None = None) -> float:
    """FLOPs of one forward over `tokens`, of which `own` are the clip's (None: all); what is computed once, as keys and values
    of text and pictures and the VACE branch's input are, is not counted."""
    D, F, L, hints = dims.dim, dims.ffn_dim, tokens, len(dims.vace_layers)
    per_block = 2 * L * (6 * D * D + 2 * D * F) + 4 * L * L * D + 4 * L * dims.text_len * D
    blocks = (dims.num_layers + hints) * per_block + dims.num_layers * 4 * L * image_tokens * D + hints * 2 * L * D * D
    own = L if own is None else own
    return blocks + 8.0 * own * D * (dims.in_dim + dims.out_dim) + sum(other.flops(D, own) for other in dims.extensions)


def dit_text_flops(dims: DiTDims) -> float:
    """FLOPs of projecting one text for one expert: the text MLP and every block's keys and values."""
    D, S = dims.dim, dims.text_len
    blocks = dims.num_layers + len(dims.vace_layers)
    return 2.0 * S * (dims.text_dim * D + D * D) + blocks * 4.0 * S * D * D


def dit_inputs_flops(dims: DiTDims, latent_shape: Sequence[int], image_tokens: int = 0) -> float:
    """FLOPs of projecting for one expert what a clip is conditioned on beside text."""
    D, C, S = dims.dim, dims.image_dim, image_tokens
    image = 2.0 * S * C * (C + D) + dims.num_layers * 4.0 * S * D * D
    vace = bool(dims.vace_layers) * 2.0 * prod(latent_shape[1:]) // prod(PATCH) * (4 * dims.vace_dim * D + D * D)
    return image + vace + sum(other.inputs_flops(D, latent_shape) for other in dims.extensions)
