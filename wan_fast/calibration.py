"""What step caches must know of a model: published data, and what `wan-fast calibrate` found. Standard library only.

A file of them is JSON: {"sources" or "model": ..., "entries": [an object as `Calibration` has fields]}. Published ones are in
assets/published_caches.json, which names its sources; a checkpoint's own lie beside it or in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from pathlib import Path
from typing import Any

from wan_fast.errors import WanFastError
from wan_fast.user_cache import user_cache

FILE = "wan_fast_caches.json"
PUBLISHED = Path(__file__).parent / "assets" / "published_caches.json"
BRANCHES = ("conditional", "unconditional")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was recorded of one model at one shape.

    magcache: "conditional" and "unconditional", the ratio of magnitudes of each step's residual to that of the one before, from
    the second step on; "threshold", "max_skips", "retention"; "high_noise": "computed" where that expert is never skipped.
    teacache: signal ("embedding", "projection") -> expert -> coefficients, highest power first, and "threshold".
    masks: what was searched: {"mask", "psnr"} of the latents in dB, from the most computed steps to the fewest.
    size, num_frames, image, solver, guidance_scale: None where it is not of one. loras: names and strengths of those added.
    """

    model: str
    num_steps: int
    shift: float
    solver: str | None = None
    magcache: Mapping[str, Any] = field(default_factory=dict)
    teacache: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    masks: Sequence[Mapping[str, Any]] = ()
    tasks: Sequence[str] = ()
    size: Sequence[int] | None = None
    num_frames: int | None = None
    image: bool | None = None
    guidance_scale: Sequence[float] | None = None
    loras: Sequence[str] = ()
    prompts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The run that a calibration is looked for."""

    task: str
    num_steps: int
    shift: float
    solver: str
    guidance_scale: tuple[float, float]
    size: tuple[int, int]
    num_frames: int
    image: bool
    loras: Sequence[str] = ()


def published(task: str) -> list[Calibration]:
    """What is published of a task's released model."""
    return [entry for entry in _entries(PUBLISHED, json.loads(PUBLISHED.read_text(encoding="utf-8"))) if task in entry.tasks]


def own(checkpoint: Path | None, fingerprint: str, given: str | None) -> list[Calibration]:
    """The checkpoint's own calibrations: of the file given, else of the user's cache and of the file beside it.

    Raises:
        WanFastError: a file is not one, or of another model.
    """
    files = [Path(given)] if given else [in_user_cache(checkpoint), checkpoint / FILE] if checkpoint else []
    found = [entry for file in files if given or file.is_file() for entry in read(file, fingerprint)]
    if given and not found:
        raise WanFastError(f"calibration {given!r} holds no entries; run wan-fast calibrate")
    return found


def in_user_cache(checkpoint: Path) -> Path:
    """Where a calibration goes whose checkpoint cannot be written to."""
    return user_cache() / "calibrations" / f"{hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:16]}.json"


def read(file: Path, fingerprint: str) -> list[Calibration]:
    """The calibrations of a file.

    Raises:
        WanFastError: it cannot be read, is not one of them, or is of another model.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model, entries = found["model"], _entries(file, found)
    except OSError as error:
        raise WanFastError(f"calibration {str(file)!r} cannot be read: {error.strerror}; check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise WanFastError(f"{str(file)!r} is not a calibration; delete it, and run wan-fast calibrate") from None
    if model != fingerprint:
        raise WanFastError(
            f"calibration {str(file)!r} is of another model ({model}; this has {fingerprint}); run wan-fast calibrate for this"
        )
    return entries


def write(file: Path, fingerprint: str, entries: Sequence[Calibration]) -> None:
    """Write them in the place of what is there; whole or not at all."""
    plain = [
        {name: value for name in Calibration.__slots__ if (value := getattr(entry, name)) not in (None, (), {})}
        for entry in entries
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    text = json.dumps({"model": fingerprint, "entries": plain}, indent=1)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def best(entries: Sequence[Calibration], wanted: Wanted) -> tuple[Calibration | None, dict[str, str]]:
    """The entry that is nearest to a run, and what of it is another: field -> in words."""
    if not entries:
        return None, {}

    def distance(entry: Calibration) -> tuple[float, ...]:
        return (
            [*entry.loras] != [*wanted.loras],
            entry.image is not None and entry.image != wanted.image,
            round(2 * _far(entry.size, wanted.size)),  # 480P or 720P
            entry.num_steps != wanted.num_steps,
            entry.shift != wanted.shift,
            _far(entry.size, wanted.size),
            abs(log(entry.num_steps / wanted.num_steps)),
            abs((entry.num_frames or wanted.num_frames) - wanted.num_frames),
            entry.solver not in (None, wanted.solver),
        )

    entry = min(entries, key=distance)
    words = {
        "num_steps": f"{entry.num_steps} steps" if entry.num_steps != wanted.num_steps else "",
        "shift": f"shift {entry.shift:g}" if entry.shift != wanted.shift else "",
        "solver": f"solver {entry.solver}" if entry.solver not in (None, wanted.solver) else "",
    }
    if entry.guidance_scale is not None and tuple(entry.guidance_scale) != wanted.guidance_scale:
        words["guidance_scale"] = "guidance " + ",".join(f"{scale:g}" for scale in dict.fromkeys(entry.guidance_scale))
    if entry.num_frames and (_far(entry.size, wanted.size) > 0.05 or entry.num_frames != wanted.num_frames):
        words["size"] = "x".join(map(str, (*(entry.size or ()), entry.num_frames)))
    if entry.image is not None and entry.image != wanted.image:
        words["image"] = "a run " + ("with" if entry.image else "without") + " a picture"
    if [*entry.loras] != [*wanted.loras]:
        words["loras"] = f"a model with {' and '.join(entry.loras)}" if entry.loras else "a model without LoRA"
    return entry, {name: text for name, text in words.items() if text}


def _far(size: Sequence[int] | None, wanted: Sequence[int]) -> float:
    """How much the areas differ, whichever side is the longer; 0 where there is none."""
    return abs(log(size[0] * size[1] / (wanted[0] * wanted[1]))) if size else 0.0


def _entries(file: Path, found: Mapping[str, Any]) -> list[Calibration]:
    """Those of a file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: it is another kind of file.
    """
    known = set(Calibration.__slots__)
    entries = [Calibration(**{k: v for k, v in entry.items() if k in known}) for entry in found["entries"]]
    for entry in entries:
        if not _sound(entry):
            raise ValueError(f"{file}: a value that cannot be")
    return entries


def _sound(entry: Calibration) -> bool:
    """Whether every value is one that a rule can go by."""
    curve, count = entry.magcache, entry.num_steps
    checks = [
        isinstance(count, int) and count >= 1,
        _between(entry.shift, 0, 1000),
        entry.size is None or (len(entry.size) == 2 and all(isinstance(side, int) and side > 0 for side in entry.size)),
        entry.num_frames is None or (isinstance(entry.num_frames, int) and entry.num_frames > 0),
        entry.image in (None, True, False),
        entry.guidance_scale is None or all(isinstance(scale, (int, float)) for scale in entry.guidance_scale),
        isinstance(entry.loras, (list, tuple)) and all(isinstance(name, str) for name in entry.loras),
        all(len(row["mask"]) == count and not set(row["mask"]) - {"#", "."} for row in entry.masks),
    ]
    if curve:
        checks += [
            _between(curve["threshold"], 0, 1),
            isinstance(curve["max_skips"], int) and curve["max_skips"] >= 1,
            curve["retention"] == 0 or _between(curve["retention"], 0, 1),
            curve.get("high_noise") in (None, "computed"),
            *(len(curve[branch]) == count - 1 and all(_between(x, 0, inf) for x in curve[branch]) for branch in BRANCHES),
        ]
    for signal in entry.teacache.values():
        polynomials = [values for name, values in signal.items() if name != "threshold"]
        checks += [_between(signal["threshold"], 0, 1), len(polynomials) > 0]
        checks += [len(values) > 0 and all(isfinite(x) for x in values) for values in polynomials]
    return all(checks)


def _between(value: Any, low: float, high: float) -> bool:
    """Whether it is a finite number above `low` and up to `high`."""
    return isinstance(value, (int, float)) and isfinite(value) and low < value <= high
