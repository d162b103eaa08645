"""What the stages share: a loop that goes on where it was cut off, averaged weights, the fast dtype."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAVE_SECONDS = 120
LOG_STEPS = 50
FOLDER = Path(".train_tiny")  # unless the command says another
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def autocast() -> torch.autocast:
    """bf16 where the machine multiplies it in hardware, else fp32."""
    has_bf16 = DEVICE == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(DEVICE, torch.bfloat16, enabled=has_bf16)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a model's weights, which is what ships."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def warm_and_decay(step: int, total: int, warmup: int) -> float:
    """Learning rate relative to its peak: a linear rise, then a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def in_phase(step: int, phases: Sequence[tuple[float, ...]]) -> tuple[int, tuple[float, ...]]:
    """The step within its phase, and that phase: its number of steps, then whatever the stage says of it."""
    for phase in phases[:-1]:
        if step < phase[0]:
            return step, phase
        step -= int(phase[0])
    return step, phases[-1]


def save_whole(what: Any, file: Path) -> None:
    """Save so that a file of that name is never half of one."""
    beside = file.with_suffix(".new")
    torch.save(what, beside)
    os.replace(beside, file)


class Run:
    """A loop of `total` steps over `parts` (anything with a state_dict), saved in `folder` every two minutes.

    Each step seeds torch's generator with its number, so an interrupted run takes the steps an uninterrupted one would.
    """

    def __init__(self, folder: Path, total: int, **parts: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state = folder / "state.pt"
        self.losses = folder / "losses.jsonl"
        self.total, self.parts = total, parts
        self.step = 0
        self.window: dict[str, list[float]] = {}
        if self.state.exists():
            saved = torch.load(self.state, map_location=DEVICE, weights_only=True)
            self.step = saved.pop("step")
            for name, state in saved.items():
                parts[name].load_state_dict(state)
        if self.losses.exists():  # what was logged after the last save will be again
            rows = self.losses.read_text().splitlines(keepends=True)
            self.losses.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.step))

    def __iter__(self) -> Iterator[int]:
        saved = time.monotonic()
        while self.step < self.total:
            torch.manual_seed(self.step)
            yield self.step
            self.step += 1
            if self.step == self.total or time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_whole({"step": self.step, **state}, self.state)

    def log(self, **losses: float) -> None:
        """Append the means over the last steps to losses.jsonl."""
        for name, value in losses.items():
            self.window.setdefault(name, []).append(value)
        if (self.step + 1) % LOG_STEPS:
            return
        row = {"step": self.step + 1, "time": time.strftime("%H:%M:%S")}
        row |= {name: round(sum(values) / len(values), 5) for name, values in self.window.items()}
        self.window.clear()
        with self.losses.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
