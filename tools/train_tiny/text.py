"""Stage 2: the tokenizer and the text encoder, an umT5 small enough that every token learns the whole caption.

    python -m tools.train_tiny.text [folder]

From each token of its output, one linear layer per attribute must tell the attribute, or that it is not said.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tools.train_tiny.training import DEVICE, FOLDER, Run, warm_and_decay
from tools.train_tiny.world import (
    BACKGROUNDS,
    CHINESE,
    CHINESE_TEMPLATES,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    WORDS,
    Clip,
    caption,
    draw,
    draw_many,
)
from wan_fast.tasks import TASKS

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
STEPS = 1500
BATCH = 64
PEAK = 3e-3
UNSAID = "unsaid"
ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": (*BACKGROUNDS, UNSAID),
    "size": (*SIZES, UNSAID),
}


def make_tokenizer() -> Tokenizer:
    """Unigram in the layout of umT5's: pad 0, eos 1, bos 2, unk 3, then the world's words, characters and 256 bytes.

    Nothing is learned: a text becomes the fewest pieces, and what the world has no word for is spelled out.
    """
    english = " ".join([*TEMPLATES, *COLOURS, *(word for words in WORDS.values() for word in words)])
    pieces = {f"▁{word}" for found in re.findall(r"[a-z]+", english.lower()) for word in (found, found.title())}
    pieces |= {word for words in CHINESE.values() for word in words} | set(re.findall(r"[一-鿿]+", " ".join(CHINESE_TEMPLATES)))
    pieces |= set(TASKS["ti2v-5B"].negative_prompt.split("，"))
    vocab = [(token, 0.0) for token in SPECIAL]
    vocab += [(piece, -10.0) for piece in sorted(pieces)]
    vocab += [(character, -11.0) for character in ("▁", *string.ascii_letters, *string.digits, *string.punctuation)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))


def build(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary, d_model=64, d_kv=32, d_ff=160, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [N, S] each."""
    found = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
    return found.input_ids, found.attention_mask


def said(clip: Clip, text: str) -> dict[str, int]:
    """Index of each attribute's value among `ATTRIBUTES`."""
    values = {name: getattr(clip, name) for name in ATTRIBUTES}
    for name in ("background", "size"):
        heard = any(word in text for table in (WORDS, CHINESE) for word in table[values[name]])
        # what grows "gets bigger", whatever its size
        if not heard or (name == "size" and clip.motion == "grow"):
            values[name] = UNSAID
    return {name: ATTRIBUTES[name].index(value) for name, value in values.items()}


def batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, clips: list[Clip]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, S], mask [N, S] and labels [N, attributes] of one caption for each clip."""
    texts = [caption(clip, rng) for clip in clips]
    labels = [list(said(clip, text).values()) for clip, text in zip(clips, texts, strict=True)]
    return *tokens(tokenizer, texts), torch.tensor(labels, device=DEVICE)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        save_tokenizer(make_tokenizer(), folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = build(len(tokenizer)).to(DEVICE)
    heads = nn.ModuleDict({name: nn.Linear(64, len(values)) for name, values in ATTRIBUTES.items()}).to(DEVICE)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=PEAK)
    schedule = LambdaLR(optimizer, lambda step: warm_and_decay(step, STEPS, 100))
    run = Run(folder / "text_encoder", STEPS, model=encoder, heads=heads, optimizer=optimizer, schedule=schedule)

    def logits(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]  # [tokens, 64]
        return {name: head(hidden) for name, head in heads.items()}

    for step in run:
        rng = random.Random(f"text {step}")
        ids, mask, labels = batch(rng, tokenizer, [draw(rng) for _ in range(BATCH)])
        rows = mask.nonzero()[:, 0]
        found = logits(ids, mask)
        loss = sum(F.cross_entropy(found[name], labels[rows, i]) for i, name in enumerate(ATTRIBUTES))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        run.log(loss=loss.item())
    encoder.save_pretrained(folder / "text_encoder")

    rng = random.Random("held out")
    ids, mask, labels = batch(rng, tokenizer, draw_many(3, 500, held_out=True))
    with torch.no_grad():
        found = logits(ids, mask)
    rows = mask.nonzero()[:, 0]
    for i, name in enumerate(ATTRIBUTES):
        right = (found[name].argmax(1) == labels[rows, i]).float().mean()
        print(f"{name}: {right:.1%} of the tokens of new captions tell it", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
