"""The text encoder: umT5 (arXiv 2304.09151) through transformers, and its tokenizer, with the official text cleaning."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan_fast import manifest
from wan_fast.config import WanFastError
from wan_fast.tasks import TEXT_LEN

# native name -> name in transformers
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


class Tokenizer:
    """Text -> umT5 token ids, end-of-text included, at most `limit`."""

    def __init__(self, folder: Path, limit: int = TEXT_LEN) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the tokenizers package raises a bare Exception
            raise WanFastError(f"{str(folder / 'tokenizer.json')!r} cannot be read ({error}); download it again") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(limit)

    def __call__(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(clean(text)).ids, dtype=torch.long)


def clean(text: str) -> str:
    """Mend the encoding, resolve HTML entities (twice, as officially), collapse white space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
