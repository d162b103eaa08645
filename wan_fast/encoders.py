"""The encoders, through transformers: of text, umT5 (arXiv 2304.09151), with its tokenizer and the official text cleaning; of
pictures, the image tower of CLIP (arXiv 2103.00020) with the official resizing; of sound, wav2vec2 (arXiv 2006.11477)."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast import manifest
from wan_fast.checkpoint import read_tokenizer
from wan_fast.config import WanFastError
from wan_fast.manifest import AudioDims
from wan_fast.names import AUDIO_NAMES, native_name
from wan_fast.tasks import TEXT_LEN

# umT5's token
END_OF_TEXT = 1
# native name -> name in transformers
_IMAGE_NAMES = (
    (r"^visual\.cls_embedding$", "embeddings.class_embedding"),
    (r"^visual\.pos_embedding$", "embeddings.position_embedding.weight"),
    (r"^visual\.patch_embedding\.", "embeddings.patch_embedding."),
    (r"^visual\.pre_norm\.", "pre_layrnorm."),
    (r"^visual\.transformer\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)
_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


class TextEncoder(nn.Module):
    """umT5's encoder over one text at a time, unpadded: padding changes nothing but the time it takes."""

    def __init__(self, shapes: manifest.Shapes) -> None:
        # imported here: it takes seconds, and kernels and models are measured where it is not installed
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        attention_dim, dim = shapes["blocks.0.attn.q.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        config = UMT5Config(
            vocab_size=shapes["token_embedding.weight"][0],
            d_model=dim,
            d_kv=attention_dim // heads,
            d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
            num_layers=sum(name.endswith("attn.q.weight") for name in shapes),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
            use_cache=False,
        )
        self.model = UMT5EncoderModel(config)
        self.model.encoder.set_input_embeddings(self.model.shared)  # one tensor, wherever it moves

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by their native names."""
        renamed = {}
        for name, tensor in state_dict.items():
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[f"model.{name}"] = tensor
        renamed["model.encoder.embed_tokens.weight"] = renamed["model.shared.weight"]
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def forward(self, ids: Tensor) -> Tensor:
        """[S] token ids -> [S, text_dim] in the dtype of the weights."""
        return self.model(input_ids=ids[None]).last_hidden_state[0]


class ImageEncoder(nn.Module):
    """CLIP's image tower up to the layer before its last, over pictures pressed into its square whatever their shape."""

    # of the pixels that CLIP was trained on, in [0, 1]
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, dims: manifest.ClipDims) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        self.size = dims.size
        config = CLIPVisionConfig(
            hidden_size=dims.dim,
            intermediate_size=dims.ffn_dim,
            num_hidden_layers=dims.num_layers,
            num_attention_heads=dims.num_heads,
            image_size=dims.size,
            patch_size=dims.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            attention_dropout=0.0,
        )
        model = CLIPVisionModel(config)
        # one module more in older versions of transformers
        self.model = getattr(model, "vision_model", model)
        self.model.post_layernorm = nn.Identity()  # of the class token alone, which is not asked for

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by their native names."""
        renamed = {}
        for name, tensor in state_dict.items():
            joint = ".to_qkv." in name
            for part, piece in zip("qkv", tensor.chunk(3), strict=True) if joint else [("", tensor)]:
                own = name.replace(".to_qkv.", f".{part}.")
                for pattern, replacement in _IMAGE_NAMES:
                    own = re.sub(pattern, replacement, own)
                renamed[f"model.{own}"] = piece
        positions = renamed["model.embeddings.position_embedding.weight"]
        ids = {name for name, _ in self.named_buffers() if name.endswith("position_ids")}
        for name in ids:  # not kept in files
            module, numbers = self.get_submodule(name.rpartition(".")[0]), torch.arange(len(positions), device=positions.device)
            module.register_buffer("position_ids", numbers[None], persistent=False)
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def forward(self, image: Tensor) -> Tensor:
        """[3, H, W] fp32 in [-1, 1] -> [S, dim] in the dtype of the weights."""
        weight = self.model.embeddings.patch_embedding.weight
        # bicubic without antialiasing, as officially
        square = F.interpolate(image[None].float(), size=(self.size, self.size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        pixels = (square * 0.5 + 0.5 - mean.to(square)) / std.to(square)
        return self.model(pixels.to(weight)).last_hidden_state[0]


class AudioEncoder(nn.Module):
    """wav2vec2 over the whole of a sound at once."""

    def __init__(self, dims: AudioDims) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        super().__init__()
        config = Wav2Vec2Config(
            hidden_size=dims.dim,
            intermediate_size=dims.ffn_dim,
            num_hidden_layers=dims.num_layers,
            num_attention_heads=dims.num_heads,
            conv_dim=dims.conv_dims,
            num_conv_pos_embeddings=dims.position_kernel,
            num_conv_pos_embedding_groups=dims.position_groups,
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            # all that is random, in training alone
            apply_spec_augment=False,
            mask_time_prob=0.0,
            layerdrop=0.0,
        )
        self.model = Wav2Vec2Model(config)
        self.last_is_normed = dims.last_is_normed

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by their native names, or by those of any version of transformers."""
        names = {name: native_name(name, AUDIO_NAMES) for name in state_dict}
        renamed = {f"model.{names[name]}": tensor for name, tensor in state_dict.items() if names[name] is not None}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def forward(self, samples: Tensor) -> Tensor:
        """The embedding and the states behind every layer.

        Args:
            samples: [n] fp32 at 16 kHz.

        Returns:
            [layers + 1, Ta, dim] in the dtype of the weights; see `sound.features` for Ta.
        """
        variance, mean = torch.var_mean(samples.float(), correction=0)
        normal = (samples.float() - mean) / torch.sqrt(variance + 1e-7)
        weight = self.model.feature_projection.projection.weight
        before_the_norm: list[Tensor] = []
        # what states are said to be differs between versions of transformers in the last alone
        listening = self.model.encoder.layer_norm.register_forward_pre_hook(lambda _, args: before_the_norm.append(args[0]))
        with listening:
            told = self.model(normal[None].to(weight), output_hidden_states=True)
        last = told.last_hidden_state if self.last_is_normed else before_the_norm[-1]
        return torch.cat([*told.hidden_states[:-1], last])


class Tokenizer:
    """Text -> umT5 token ids, end-of-text included, at most `limit`.

    Args:
        where: the folder of a tokenizer.json, or a text encoder's file that holds a SentencePiece model. The ids are the same,
            but that only tokenizer.json knows special tokens spelled out in a text, "</s>" say.
        limit: tokens at most.

    Raises:
        WanFastError: it cannot be read.
    """

    def __init__(self, where: Path, limit: int = TEXT_LEN) -> None:
        self._encode = _with_tokenizers(where, limit) if where.is_dir() else _with_sentencepiece(where, limit)

    def __call__(self, text: str) -> Tensor:
        return torch.tensor(self._encode(clean(text)), dtype=torch.long)


def _with_tokenizers(folder: Path, limit: int) -> Callable[[str], list[int]]:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers package raises a bare Exception
        raise WanFastError(f"{str(folder / 'tokenizer.json')!r} cannot be read ({error}); download it again") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return lambda text: tokenizer.encode(text).ids


def _with_sentencepiece(file: Path, limit: int) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_tokenizer(file))
    except RuntimeError as error:
        raise WanFastError(f"the tokenizer in {str(file)!r} cannot be read ({error}); download it again") from error
    if model.eos_id() != END_OF_TEXT:
        raise WanFastError(
            f"the tokenizer in {str(file)!r} is not umT5's: its texts end with token {model.eos_id()}, not {END_OF_TEXT}; "
            "take another file"
        )
    return lambda text: [*model.encode(text)[: limit - 1], END_OF_TEXT]


def clean(text: str) -> str:
    """Mend the encoding, resolve HTML entities (twice, as officially), collapse white space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
