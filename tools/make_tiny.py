"""Write `wan_fast/assets/tiny`: the TI2V-5B architecture at toy width with seeded random weights, in Diffusers layout.

    pip install '.[test]' && python tools/make_tiny.py

The tokenizer is trained here too, on captions spelled out below; bytes stand in for what it has never seen.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import UMT5Config, UMT5EncoderModel

from wan_fast.tasks import TASKS, VAES

TARGET = Path(__file__).parents[1] / "wan_fast" / "assets" / "tiny"
SEED = 0
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
PIECES = 1024
WORDS = {
    "colour": "red orange yellow green blue purple pink white black grey brown golden dark bright",
    "shape": "ball circle square cube triangle star box ring disc diamond cat dog bird car",
    "motion": "bounces moves rotates spins grows shrinks falls rises jumps flies rolls walks runs slides",
    "where": "left right up down in circles across the screen over a meadow on a table in the rain at night",
}
CHINESE = (
    "红色",
    "橙色",
    "黄色",
    "绿色",
    "蓝色",
    "紫色",
    "圆球",
    "方块",
    "三角形",
    "星星",
    "向左",
    "向右",
    "移动",
    "旋转",
    "弹跳",
    "变大",
)
NOTE = "tiny has seeded random weights: it shows that everything runs, not a picture of the prompt"


CARD = f"""# tiny

The TI2V-5B architecture at toy width (two-row modulation, 2.2 VAE, umT5, its own tokenizer), Diffusers layout.
Made by `tools/make_tiny.py` with seed {SEED}. Its weights are random: what it shows is noise.
Apache-2.0, as the project.
"""


def captions() -> list[str]:
    lines = []
    for colour, shape, motion in itertools.product(*(WORDS[k].split() for k in ("colour", "shape", "motion"))):
        lines.append(f"a {colour} {shape} {motion}")
        lines.append(f"The {shape} is {colour} and {motion} {' '.join(random.sample(WORDS['where'].split(), 3))}.")
    lines += ["一个" + "".join(random.sample(CHINESE, 4)) for _ in range(2000)]
    lines += [TASKS["ti2v-5B"].negative_prompt] * 20
    return lines


def make_tokenizer() -> Tokenizer:
    """Unigram in the layout of umT5's: pad 0, eos 1, bos 2, unk 3, then learned pieces, then 256 bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=PIECES, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions(), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    lowest = min(score for _, score in vocab)
    vocab += [(f"<0x{byte:02X}>", lowest - 10) for byte in range(256)]
    tokenizer.model = models.Unigram([tuple(piece) for piece in vocab], unk_id=3, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))


def main() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)
    shutil.rmtree(TARGET, ignore_errors=True)
    tokenizer = make_tokenizer()
    save_tokenizer(tokenizer, TARGET / "tokenizer")
    text = UMT5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=64, d_kv=32, d_ff=160, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    vae = VAES["2.2"]
    parts = {
        "text_encoder": UMT5EncoderModel(text),
        "transformer": WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=64, ffn_dim=512,
            num_layers=2, cross_attn_norm=True, rope_max_seq_len=1024,
        ),
        "vae": AutoencoderKLWan(
            base_dim=8, decoder_base_dim=12, z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2,
            latents_mean=list(vae.mean), latents_std=list(vae.std), scale_factor_spatial=16, scale_factor_temporal=4,
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
    }  # fmt: skip
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part = part.to(torch.bfloat16)
        part.save_pretrained(TARGET / name)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": None,
        "expand_timesteps": True,
    }
    (TARGET / "model_index.json").write_text(json.dumps(index, indent=1))
    defaults = {"size": [128, 128], "num_frames": 33, "num_steps": 12, "note": NOTE}
    (TARGET / "generation_config.json").write_text(json.dumps(defaults, indent=1))
    (TARGET / "README.md").write_text(CARD)
    for file in TARGET.rglob("*.*"):
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in TARGET.rglob("*") if f.is_file())
    print(f"{TARGET}: {size / 2**20:.1f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
