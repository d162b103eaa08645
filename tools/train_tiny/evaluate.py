"""Judge `tiny` by numbers, on prompts and seeds it was not trained on; exit 1 where a goal is missed.

    python -m tools.train_tiny.evaluate [checkpoint] [--count 100] [--pictures FOLDER]

`judge.py` measures what the clips show; that it is right is measured first, on real clips and through the VAE. With the
bundled checkpoint the numbers go into its model card. `--pictures` writes the sheet and the GIF of the README.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tools.train_tiny.export import TARGET, write_card
from tools.train_tiny.judge import Seen, see
from tools.train_tiny.world import Clip, caption, draw_many, render
from wan_fast import Engine, EngineConfig, Request

SEED = 100
GOALS = {"VAE PSNR": 28.0, "colour": 90.0, "shape": 80.0, "motion": 80.0, "first frame PSNR": 25.0}
NINE = (
    "a red ball bounces on a black background",
    "a large blue square moves left on a white background",
    "a yellow star rotates on a grey background",
    "an orange ring rises to the top, blue sky background",
    "a green triangle grows on a white background",
    "a small purple disc falls to the bottom",
    "一个红色的五角星在天空背景上向右移动",
    "一个蓝色的三角形旋转，白色背景",
    "黑色背景上，黄色圆环弹跳。",
)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in -1 .. 1, in dB."""
    return float(-10 * torch.log10((a - b).square().mean() / 4))


def pixels(frames: Tensor) -> Tensor:
    """[F, H, W, 3] uint8 -> [3, F, H, W] in -1 .. 1."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def shares(clips: Iterable[Clip], seen: Iterable[Seen]) -> dict[str, float]:
    """Percent of clips whose colour, shape, motion are as asked."""
    pairs = list(zip(clips, seen, strict=True))
    return {
        name: 100 * sum(getattr(clip, name) == getattr(found, name) for clip, found in pairs) / len(pairs)
        for name in ("colour", "shape", "motion")
    }


def said(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} %" for name, value in values.items())


def from_text(engine: Engine, clips: list[Clip]) -> list[Seen]:
    """One video for each clip's caption, at the checkpoint's defaults."""
    rng = random.Random(SEED)
    seen = []
    for index, clip in enumerate(tqdm(clips, "text")):
        prompt = caption(clip, rng)
        seen.append(see(pixels(engine.generate(Request(prompt=prompt, seed=SEED + index)).frames)))
        wrong = {n: getattr(seen[-1], n) for n in ("colour", "shape", "motion") if getattr(seen[-1], n) != getattr(clip, n)}
        if wrong:
            tqdm.write(f"{prompt}: {wrong}")
    return seen


def from_image(engine: Engine, clips: list[Clip]) -> tuple[list[Seen], float]:
    """The same from each clip's first frame; and how well that frame is kept, in dB on average."""
    rng = random.Random(SEED)
    seen, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, clip in enumerate(tqdm(clips, "image")):
            first = ((render([clip], [0])[0, :, 0] + 1) * 127.5).round().byte()
            path = Path(folder) / f"{index}.png"
            Image.fromarray(first.permute(1, 2, 0).numpy()).save(path)
            frames = pixels(engine.generate(Request(prompt=caption(clip, rng), image=str(path), seed=SEED + index)).frames)
            seen.append(see(frames))
            kept.append(psnr(frames[:, 0], first.float() / 127.5 - 1))
    return seen, sum(kept) / len(kept)


def pictures(engine: Engine, folder: Path) -> None:
    """`nine.png`: first, middle and last frame of nine prompts; `ball.gif`: the first of them."""
    rows = []
    for index, prompt in enumerate(NINE):
        video = engine.generate(Request(prompt=prompt, seed=index))
        if index == 0:
            video.save(folder / "ball.gif")
        rows.append(torch.cat([video.frames[0], video.frames[len(video.frames) // 2], video.frames[-1]], dim=1))
    sheet = torch.cat([torch.cat(rows[i : i + 3], dim=1) for i in range(0, 9, 3)], dim=0)
    Image.fromarray(sheet.numpy()).save(folder / "nine.png", optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(TARGET))
    parser.add_argument("--count", type=int, default=100, help="clips from text; a third as many from an image")
    parser.add_argument("--pictures", type=Path, help="folder for the sheet and the GIF")
    arguments = parser.parse_args()

    engine = Engine(EngineConfig(task="ti2v-5B", checkpoint=arguments.checkpoint, dtype="fp32"))
    vae = engine.models["vae"]
    clips = draw_many(SEED, arguments.count, held_out=True)
    real = render(clips[:32])
    rebuilt = [vae.decode(vae.encode(clip.to(engine.device))).cpu() for clip in real]
    vae_psnr = sum(psnr(a, b) for a, b in zip(rebuilt, real, strict=True)) / len(rebuilt)
    judged = shares(clips, (see(frames) for clip in clips for frames in render([clip])))
    judged_rebuilt = shares(clips[:32], map(see, rebuilt))
    text = shares(clips, from_text(engine, clips))
    few = clips[: max(1, arguments.count // 3)]
    seen, kept = from_image(engine, few)

    results = {
        "reconstruction of unseen clips (PSNR)": f"{vae_psnr:.1f} dB",
        f"the judge on {len(clips)} real clips": said(judged),
        f"the judge on {len(rebuilt)} reconstructed clips": said(judged_rebuilt),
        f"{len(clips)} clips from held-out prompts": said(text),
        f"{len(few)} clips from a first frame": said(shares(few, seen)),
        "the first frame given, kept (PSNR)": f"{kept:.1f} dB",
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if Path(arguments.checkpoint).resolve() == TARGET:
        write_card(TARGET, results)
    if arguments.pictures:
        pictures(engine, arguments.pictures)
    measured = {"VAE PSNR": vae_psnr, **text, "first frame PSNR": kept}
    missed = [f"{name} {measured[name]:.1f}, goal {goal:g}" for name, goal in GOALS.items() if not measured[name] >= goal]
    print("missed: " + "; ".join(missed) if missed else "every goal is met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
