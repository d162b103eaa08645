"""Stage 4: put the trained parts together as `wan_fast/assets/tiny`, bf16, in Diffusers layout, with a model card.

python -m tools.train_tiny.export [folder]
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5EncoderModel

from tools.train_tiny.training import FOLDER
from tools.train_tiny.world import BACKGROUNDS, COLOURS, FRAMES, MOTIONS, SHAPES, SIDE

TARGET = Path(__file__).parents[2] / "wan_fast" / "assets" / "tiny"
NOTE = (
    f"tiny is a toy that knows one moving shape: {', '.join(SHAPES)}; {', '.join(COLOURS)}; {', '.join(MOTIONS)}; on "
    f"{', '.join(BACKGROUNDS)}. Of anything else it makes some of these"
)
PARTS = {
    "text_encoder": ("transformers", UMT5EncoderModel),
    "transformer": ("diffusers", WanTransformer3DModel),
    "vae": ("diffusers", AutoencoderKLWan),
}
# what a request takes where it does not say: see `Request`
DEFAULTS = {"size": [SIDE, SIDE], "num_frames": FRAMES, "num_steps": 12, "note": NOTE}

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
language: [en, zh]
---

# tiny

A toy: the architecture of Wan 2.2 TI2V-5B (2.2 VAE of 4x16x16, two-row modulation, 3-D RoPE, umT5) at toy width, trained from
nothing on drawn clips. It makes a video that follows the prompt in seconds on a CPU, from text or from a first frame, and gives
measurements of quality a model that has learned something.

{parts}

**What it knows.** One shape ({shapes}) in one colour ({colours}), small or large, on a plain background ({backgrounds}), that
does one thing: {motions}. Captions in English and Chinese, in the words of `tools/train_tiny/world.py`. {side}x{side} pixels,
{frames} frames at 24 fps. Circles and rings were never shown rotating, since it would not show.

**What it does not know.** Everything else. Turning is what it does worst. A prompt from outside its world still makes a video,
of what the world has; other sizes and lengths run, and look worse. Size and background are followed, but were not measured. It
says nothing about how good a full-size model is.

**Data.** Drawn by `tools/train_tiny/world.py` from seeds; none is stored, none comes from elsewhere. One triple of colour,
shape and motion in ten was held out of the VAE's and the DiT's training; the numbers below are of these.

**Recipe.** `tools/train_tiny/`: `vae.py`, `text.py`, `dit.py`, `export.py`, `evaluate.py`, in this order. The VAE reconstructs
crops from noisy latents; the text encoder learns to tell a caption's attributes from each of its tokens; the DiT is trained by
flow matching, half of the time with the first frame given; one caption in ten is replaced, half of these by nothing and half by
the negative prompt. `tools/train_tiny/README.md` has the commands, and how the shipped one was run.

**Use.** `wan-fast run --task ti2v-5B --ckpt_dir tiny --prompt "a red ball bounces"`, or in diffusers:

```python
pipe = diffusers.WanPipeline.from_pretrained("wan_fast/assets/tiny")
frames = pipe("a red ball bounces", height={side}, width={side}, num_frames={frames}, num_inference_steps={steps}).frames[0]
```

{measured}
Apache-2.0, as the project.
"""


def write_card(target: Path, results: Mapping[str, Any] | None = None) -> None:
    """The model card; `results`: what `evaluate.py` measured, in words."""
    counts = []
    for name, (_, kind) in PARTS.items():
        model = kind.from_pretrained(target / name)
        counts.append(f"| `{name}` | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |")
    measured = ""
    if results:
        rows = [f"| {name} | {value} |" for name, value in results.items()]
        measured = "\n".join(["**Measured** by `tools/train_tiny/evaluate.py`:", "", "| | |", "| --- | --- |", *rows, ""])
    card = CARD.format(
        parts="\n".join(["| part | parameters |", "| --- | --- |", *counts]), shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS), backgrounds=", ".join(BACKGROUNDS), motions=", ".join(MOTIONS), side=SIDE,
        frames=FRAMES, steps=DEFAULTS["num_steps"], measured=measured,
    )  # fmt: skip
    (target / "README.md").write_text(card)


def main(folder: Path, target: Path) -> None:
    beside = target.with_name(f"{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    for name, (_, kind) in PARTS.items():
        kind.from_pretrained(folder / name).to(torch.bfloat16).save_pretrained(beside / name)
        config = json.loads((beside / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it was trained
        (beside / name / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copytree(folder / "tokenizer", beside / "tokenizer")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    ).save_pretrained(beside / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        **{name: [library, kind.__name__] for name, (library, kind) in PARTS.items()},
        "transformer_2": [None, None],
        "boundary_ratio": None,
        "expand_timesteps": True,
    }
    (beside / "model_index.json").write_text(json.dumps(index, indent=1))
    (beside / "generation_config.json").write_text(json.dumps(DEFAULTS, indent=1))
    write_card(beside)
    for file in beside.rglob("*.*"):
        file.chmod(0o644)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, TARGET)
