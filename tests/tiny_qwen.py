"""Random Qwen models of a few thousand weights, of text and of pictures, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# letters, and as bytes of Qwen's tokenizer the space and the end of a line
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *"abcdefghijklmnopqrstuvwxyzĠĊ?"))}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY["<|im_end|>"],
    "pad_token_id": VOCABULARY["<|endoftext|>"],
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}


def write_text(folder: Path) -> Path:
    """A Qwen2."""
    config = transformers.Qwen2Config(**TEXT)
    return _write(folder, transformers.Qwen2ForCausalLM, config)


def write_vision(folder: Path) -> Path:
    """A Qwen2.5-VL, with what reads its pictures."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config=VISION,
        **{f"{name}_token_id": VOCABULARY[f"<|{token}|>"] for name, token in _TOKENS.items()},
    )
    transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    return _write(folder, transformers.Qwen2_5_VLForConditionalGeneration, config)


_TOKENS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


def _write(folder: Path, cls: Any, config: Any) -> Path:
    letters = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],  # as Qwen's
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=config.get_text_config().eos_token_id, pad_token_id=config.get_text_config().pad_token_id
    )
    model.save_pretrained(folder)
    return folder


class Processor:
    """What AutoProcessor gives of the folder, where torchvision is missing: it wants it for videos."""

    def __init__(self, tokenizer: Any, pictures: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        self.chat_template, self.decode = tokenizer.chat_template, tokenizer.decode

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> Processor:
        pictures = transformers.AutoImageProcessor.from_pretrained(folder)
        return cls(transformers.AutoTokenizer.from_pretrained(folder), pictures)

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        shown = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        read = self.pictures(images=shown, return_tensors="pt")
        first, *rest = text.split("<|image_pad|>")
        counts = [int(grid.prod()) // self.pictures.merge_size**2 for grid in read["image_grid_thw"]]
        text = first + "".join("<|image_pad|>" * count + part for count, part in zip(counts, rest, strict=True))
        inputs = {**self.tokenizer(text, return_tensors="pt", return_token_type_ids=False), **read}
        if int(transformers.__version__.split(".")[0]) >= 5:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == VOCABULARY["<|image_pad|>"]).long()
        return inputs
