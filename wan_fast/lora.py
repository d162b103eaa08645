"""What --lora can say. Standard library only; `lora_files` opens what it names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from os.path import basename, exists, expanduser, isdir, splitext

from wan_fast.errors import WanFastError

EXPERTS = {"high": "high_noise", "low": "low_noise"}
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA to be added to the model's weights.

    path: a file of SUFFIXES, or a folder with one, or with one per expert. strength: what its updates are multiplied by; 0
    does nothing. expert: "high_noise" or "low_noise"; None: what the file's name or contents say, else every expert. flag: the
    option that gave it, named in errors.

    Raises:
        WanFastError: the path is no such file or folder, the strength no finite number, or the expert unknown.
    """

    path: str
    strength: float = 1.0
    expert: str | None = None
    flag: str = "--lora"

    def __post_init__(self) -> None:
        flag, suffix = f"{self.flag} {self.path!r}", splitext(self.path)[1]
        if not self.path.strip():
            raise WanFastError("--lora '' is empty; give the path of a LoRA, as in style.safetensors:0.8")
        if not exists(self.path):
            raise WanFastError(f"{flag} does not exist; give PATH[:STRENGTH], or high=PATH[:STRENGTH],low=PATH[:STRENGTH]")
        if not isdir(self.path) and suffix not in SUFFIXES:
            raise WanFastError(f"{flag} is no LoRA: its name ends in {suffix!r}; take a folder or {' '.join(SUFFIXES)}")
        if not isfinite(self.strength):
            raise WanFastError(f"{flag}: the strength must be a finite number, got {self.strength}; 1 is as trained")
        if self.expert not in (None, *EXPERTS.values()):
            raise WanFastError(f"{flag}: expert must be {' or '.join(EXPERTS.values())}, got {self.expert!r}")

    def __str__(self) -> str:
        """Its file's name, strength and expert."""
        to = f" in {self.expert}" if self.expert else ""
        return f"{basename(self.path.rstrip('/'))}:{self.strength:g}{to}"

    @classmethod
    def parse(cls, text: str) -> tuple[Lora, ...]:
        """PATH[:STRENGTH], or either or both of high=PATH[:STRENGTH],low=PATH[:STRENGTH]; a path that exists as it stands wins.

        Raises:
            WanFastError: it says neither of these, or `Lora` cannot be made of it.
        """
        text = text.strip()
        if not re.match("(?:high|low)=", text) or exists(text):
            return (_one(text, None),)
        # a comma may also be part of a path
        named = [part.split("=", 1) for part in re.split(r"\s*,\s*(?=(?:high|low)=)", text)]
        if len({name for name, _ in named}) < len(named):
            raise WanFastError(f"--lora {text!r} gives an expert twice; repeat --lora to add several LoRAs to one")
        for name, path in named:
            if not path or path.startswith(":"):
                raise WanFastError(f"--lora {text!r} has no path after {name}=; give high=PATH[:STRENGTH],low=PATH[:STRENGTH]")
        return tuple(_one(path, EXPERTS[name]) for name, path in named)


def _one(text: str, expert: str | None) -> Lora:
    text = expanduser(text)
    path, colon, strength = text.rpartition(":")
    if not colon or exists(text) or not exists(path):
        return Lora(text, expert=expert)
    try:
        number = float(strength)
    except ValueError as error:
        raise WanFastError(
            f"--lora {text!r}: after the colon comes the strength, a number such as 0.8, got {strength!r}"
        ) from error
    return Lora(path, number, expert)
