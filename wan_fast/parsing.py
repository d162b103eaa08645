"""What the texts of flags mean. Standard library only."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from dataclasses import field, fields
from functools import cache
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from wan_fast.errors import WanFastError
from wan_fast.lora import EXPERTS
from wan_fast.tasks import TaskSpec

# sizes that a name stands for, as in VACE's own script
NAMED_SIZES = {"480p": (832, 480), "720p": (1280, 720)}


def option(default: Any, help: str, *flags: str, parse: Callable[[str], Any] | None = None, unit: str = "") -> Any:
    metadata = {"help": help, "flags": flags, "parse": parse, "unit": unit}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag_of(cls: type, name: str, which: int = 0) -> str:
    """What a field is called on the command line; where it goes by several names, which of them."""
    return next(each.metadata["flags"][which] for each in fields(cls) if each.name == name)


def parse_size(text: str) -> tuple[int, int]:
    """'1280*704', '1280x704' or '720p' -> (width, height) in pixels."""
    if text.strip().lower() in NAMED_SIZES:
        return NAMED_SIZES[text.strip().lower()]
    match = re.fullmatch(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*", text)
    if not match:
        raise WanFastError(f"--size must be WIDTH*HEIGHT in pixels, got {text!r}; for example 1280*704")
    return int(match[1]), int(match[2])


def parse_guidance(text: str) -> float | tuple[float, float]:
    """'5' -> 5.0; '3,4' -> (3.0, 4.0), low-noise first."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise WanFastError(f"--sample_guide_scale must be one number or LOW,HIGH, got {text!r}; for example 5 or 3,4")
    return values[0] if len(values) == 1 else (values[0], values[1])


def parse_steps(text: str) -> tuple[int, int]:
    """'2' -> (2, 2); '4,1' -> (4, 1), first ones first."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", text)
    if not match:
        raise WanFastError(f"--keep_steps must be one number or FIRST,LAST, got {text!r}; for example 2 or 4,1")
    return int(match[1]), int(match[2] or match[1])


def parse_bytes(text: str) -> int | None:
    """'12GiB', '12GB', '800MiB' -> bytes; 'auto' -> None."""
    if text == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise WanFastError(f"--vram must be a size or auto, got {text!r}; for example 12GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** "KMGT".find(match[2].upper()) * base if match[2] else float(match[1]))


def parse_experts(text: str, spec: TaskSpec) -> dict[str, str]:
    """What --dit says of a task: 'FILE' -> {'model': 'FILE'}, 'high=FILE,low=FILE' -> paths by expert, of both or of one."""
    one_expert, text = spec.experts == ("model",), text.strip()
    if not re.match("(?:high|low)=", text) or (one_expert and exists(text)):
        if not one_expert:
            raise WanFastError(f"task {spec.name} has two experts, got --dit {text!r}; give --dit high=FILE,low=FILE")
        return {"model": text}
    if one_expert:
        raise WanFastError(f"task {spec.name} has one expert, got --dit {text!r}; give --dit FILE")
    # a comma may also be part of a path
    named = [part.split("=", 1) for part in re.split(r"\s*,\s*(?=(?:high|low)=)", text)]
    if len({name for name, _ in named}) < len(named):
        raise WanFastError(f"--dit {text!r} gives an expert twice; give --dit high=FILE,low=FILE")
    return {EXPERTS[name]: path for name, path in named}


def parse_file(text: str) -> str:
    """'~/a.png' -> '/home/me/a.png', which a shell does not do behind an equals sign."""
    return expanduser(text)


def parse_files(text: str) -> tuple[str, ...]:
    """'a.png,b.png' -> ('a.png', 'b.png')."""
    files = tuple(parse_file(part.strip()) for part in text.split(","))
    if not all(files):
        raise WanFastError(f"--src_ref_images must be FILE or FILE,FILE, got {text!r}; take out the empty one")
    return files


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise WanFastError(f"expected true or false, got {text!r}")
    return word in ("yes", "true", "t", "y", "1")


def pair(scale: float | tuple[float, float]) -> tuple[float, float]:
    return (float(scale), float(scale)) if isinstance(scale, (int, float)) else (float(scale[0]), float(scale[1]))


def check_types(options: Any) -> None:
    """Raise unless numbers, texts and truth values are that; a whole number serves as any number, a path as text."""
    for name, kinds in _kinds(type(options)).items():  # type: ignore[arg-type]
        value = getattr(options, name)
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if kinds and value is not None and not fits:
            what = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kinds[0]]
            raise WanFastError(f"{name} must be {what}, got {value!r}; see {flag_of(type(options), name)} in --help")


@cache
def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that a field's values may be of, that of its hint first; of fields that are checked otherwise none."""
    also: dict[type, tuple[type, ...]] = {bool: (), int: (), float: (int,), str: (Path,)}
    hints = typing.get_type_hints(cls)
    found = {}
    for name in (each.name for each in fields(cls)):
        members = [member for member in typing.get_args(hints[name]) or (hints[name],) if member is not type(None)]
        only = members[0] if len(members) == 1 else None
        found[name] = (only, *also[only]) if only in also else ()
    return found


def check_choice(options: Any, name: str, *allowed: str | None) -> None:
    value = getattr(options, name)
    if value not in allowed:
        raise WanFastError(f"--{name} must be one of {' '.join(filter(None, allowed))}, got {value!r}")
