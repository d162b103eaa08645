"""Judge `tiny` by numbers, on prompts and seeds it was not trained on; exit 1 where a goal is missed.

    python -m tools.train_tiny.evaluate [checkpoint] [--count 100] [--card] [--pictures FOLDER]

The prompts ask for what the VAE and the DiT have not seen, all motions alike; as a red square is all that turns among that,
shapes that turn are asked for once more. `judge.py` measures what the clips show; that it is right is measured first, on
real clips and through the VAE. `--card` puts the numbers into the bundled checkpoint's card, `--pictures` writes the sheet and
the GIF of the README.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from tools.train_tiny.export import TARGET, write_card
from tools.train_tiny.judge import Seen, pixels, psnr, see
from tools.train_tiny.world import MOTIONS, Clip, caption, draw_many, render
from wan_fast import Engine, EngineConfig, Request

SEED = 100
GOALS = {"VAE PSNR": 28.0, "colour": 90.0, "shape": 80.0, "motion": 80.0, "first frame PSNR": 25.0}
COLD_START = 30  # seconds
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


def shares(clips: Iterable[Clip], seen: Iterable[Seen]) -> dict[str, float]:
    """Percent of clips whose colour, shape, motion are as asked."""
    pairs = list(zip(clips, seen, strict=True))
    return {
        name: 100 * sum(getattr(clip, name) == getattr(found, name) for clip, found in pairs) / len(pairs)
        for name in ("colour", "shape", "motion")
    }


def all_right(clips: Iterable[Clip], seen: Iterable[Seen]) -> list[bool]:
    return [(c.colour, c.shape, c.motion) == (s.colour, s.shape, s.motion) for c, s in zip(clips, seen, strict=True)]


def balanced(count: int) -> list[Clip]:
    """Held-out clips, the motions in turn."""
    pool = draw_many(SEED, 40 * count, held_out=True)
    by_motion = {motion: iter([clip for clip in pool if clip.motion == motion]) for motion in MOTIONS}
    return [next(by_motion[MOTIONS[i % len(MOTIONS)]]) for i in range(count)]


def cold_start() -> float:
    """Seconds of the README's first command in a fresh process, to the file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wan_fast", "run", "--task", "ti2v-5B", "--ckpt_dir", "tiny", "--quiet"]
        command += ["--prompt", "a red ball bounces", "--save_file", str(Path(folder) / "ball.mp4")]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start


def said(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} %" for name, value in values.items())


def from_text(engine: Engine, clips: list[Clip], **settings: float) -> list[Seen]:
    """One video for each clip's caption, at the checkpoint's defaults unless `settings` of a Request are given."""
    rng = random.Random(SEED)
    seen = []
    for index, clip in enumerate(tqdm(clips, "text")):
        prompt = caption(clip, rng)
        seen.append(see(pixels(engine.generate(Request(prompt=prompt, seed=SEED + index, **settings)).frames)))
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
    parser.add_argument("--card", action="store_true", help="write the numbers into the bundled checkpoint's card")
    arguments = parser.parse_args()
    if arguments.count < len(MOTIONS):
        parser.error(f"--count must be {len(MOTIONS)}, one clip of each motion, or more; got {arguments.count}")
    if arguments.card and arguments.checkpoint != str(TARGET):
        parser.error(f"--card is of the bundled checkpoint's numbers, got the checkpoint {arguments.checkpoint}")

    engine = Engine(EngineConfig(task="ti2v-5B", checkpoint=arguments.checkpoint, dtype="fp32"))
    vae = engine.models["vae"]
    clips = balanced(arguments.count)
    real = render(clips[:32])
    rebuilt = [vae.decode(vae.encode(clip.to(engine.device))).cpu() for clip in real]
    vae_psnr = sum(psnr(a, b) for a, b in zip(rebuilt, real, strict=True)) / len(rebuilt)
    judged = shares(clips, (see(frames) for clip in clips for frames in render([clip])))
    judged_rebuilt = shares(clips[:32], map(see, rebuilt))
    seen_text = from_text(engine, clips)
    text = shares(clips, seen_text)
    right = all_right(clips, seen_text)
    by_motion = {m: 100 * sum(right[i :: len(MOTIONS)]) / len(right[i :: len(MOTIONS)]) for i, m in enumerate(MOTIONS)}
    few = clips[: max(1, arguments.count // 3)]
    seen, kept = from_image(engine, few)
    unguided = shares(few, from_text(engine, few, guidance_scale=1.0))
    turning = [clip for clip in draw_many(SEED, 40 * len(few), held_out=False) if clip.motion == "rotate"][: len(few)]
    turned = shares(turning, from_text(engine, turning))
    seconds = cold_start()

    results = {
        "reconstruction of unseen clips (PSNR)": f"{vae_psnr:.1f} dB",
        f"the judge on {len(clips)} real clips": said(judged),
        f"the judge on {len(rebuilt)} reconstructed clips": said(judged_rebuilt),
        f"{len(clips)} clips from held-out prompts": said(text),
        "all three right, by motion": said(by_motion),
        f"{len(turning)} clips that turn, of triples that were trained on": said(turned),
        f"{len(few)} of the {len(clips)}, guidance 1 in place of 5": said(unguided),
        f"{len(few)} clips from a first frame": said(shares(few, seen)),
        "the first frame given, kept (PSNR)": f"{kept:.1f} dB",
        f"from the command to the file, {torch.get_num_threads()} cores": f"{seconds:.1f} s",
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if arguments.card:
        write_card(TARGET, results)
    if arguments.pictures:
        pictures(engine, arguments.pictures)
    measured = {"VAE PSNR": vae_psnr, **text, "first frame PSNR": kept}
    missed = [f"cold start {seconds:.1f} s, goal {COLD_START}"] if seconds > COLD_START else []
    missed += [f"{name} {measured[name]:.1f}, goal {goal:g}" for name, goal in GOALS.items() if not measured[name] >= goal]
    print("missed: " + "; ".join(missed) if missed else "every goal is met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
