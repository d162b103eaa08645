"""Samplers of models distilled to a few steps: presets of noise levels, as their authors run them. Standard library only.

sigma is the noise level in 0 .. 1, shifted as shift_s(u) = s u / (1 + (s - 1) u). All are without guidance, which was trained
into the models, and blurs what they make. Sources: ModelTC/LightX2V and ModelTC/Wan2.2-Lightning; hao-ai-lab/FastVideo (DMD,
arXiv 2405.14867); Self Forcing (arXiv 2506.08009); NVlabs/rcm and thu-ml/TurboDiffusion (arXiv 2510.08431).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import atan, cos, sin

from wan_fast.errors import WanFastError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How noise is carried to a clip.

    sigmas: noise levels, decreasing, then 0. timesteps: what the model is told, one per step.
    solver: "unipc", "dpm++", "euler", or "lcm", whose steps go to the clean clip and put fresh noise on it.
    start: what the first noise is multiplied by. time_first: fresh noise is drawn as [T, C, H, W].
    split: steps of the high-noise expert; None: as the task's boundary says.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    solver: str
    start: float = 1.0
    time_first: bool = False
    split: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A distilled model's sampler.

    steps: numbers of steps it can have, the default one first. shift: the default one, of models with two experts
    `shift_of_two`; None where there is none to choose. named: how files of such weights are called. make: (number of steps,
    shift, largest sigma) -> the sampler. sigma_max: whether there is such a largest sigma.
    """

    solver: str
    steps: tuple[int, ...]
    shift: float | None
    shift_of_two: float | None = None
    named: str
    make: Callable[[int, float, float], Sampler]
    sigma_max: bool = False


def shifted(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


def _listed(
    values: Sequence[float], solver: str, *, split: int | None = None, time_first: bool = False
) -> Callable[[int, float, float], Sampler]:
    """Noise levels in thousandths, before the shift; the model is told the shifted ones, not rounded."""

    def make(num_steps: int, shift: float, sigma_max: float) -> Sampler:
        sigmas = [shifted(value / 1000, shift) for value in values]
        return Sampler(
            sigmas=(*sigmas, 0.0),
            timesteps=tuple(1000 * sigma for sigma in sigmas),
            solver=solver,
            split=split,
            time_first=time_first,
        )

    return make


def _nearest(timesteps: Sequence[int], table_shift: float) -> Callable[[int, float, float], Sampler]:
    """Timesteps that the model is told as they are; a step's noise level is the nearest one of a shifted table of 1000."""

    def make(num_steps: int, shift: float, sigma_max: float) -> Sampler:
        table = [shifted(1 - k / 1000, table_shift) for k in range(1000)]
        sigmas = [min(table, key=lambda sigma: abs(1000 * sigma - t)) for t in timesteps]
        told = tuple(float(t) for t in timesteps)
        return Sampler(sigmas=(*sigmas, 0.0), timesteps=told, solver="lcm", time_first=True)

    return make


def _angles(solver: str) -> Callable[[int, float, float], Sampler]:
    """TrigFlow's times a, of which sin a / (sin a + cos a) is the noise level; told in bf16."""

    def make(num_steps: int, shift: float, sigma_max: float) -> Sampler:
        angles = (atan(sigma_max), 1.5, 1.4, 1.0)[:num_steps]
        sigmas = [sin(a) / (sin(a) + cos(a)) for a in angles]
        told = tuple(_bf16(1000 * sigma) for sigma in sigmas)
        return Sampler(sigmas=(*sigmas, 0.0), timesteps=told, solver=solver, start=sigmas[0])

    return make


_FOUR = (1000, 750, 500, 250)
PRESETS: Mapping[str, Preset] = {
    "lightning-4step": Preset(
        solver="euler",
        steps=(4,),
        shift=5.0,
        named=r"^(?!.*(?<!\d)8.?steps?)(?:.*wan2.?2.lightning|.*(?:wan|lightx2v|seko).*(?<!\d)4.?steps?|.*(?:wan|lightx2v).*step.?distill)",
        make=_listed(_FOUR, "euler", split=2),
    ),
    "fastwan-3step": Preset(
        solver="lcm", steps=(3,), shift=None, named=r"fastwan", make=_nearest((1000, 757, 522), 8.0)
    ),
    "self-forcing-4step": Preset(
        solver="lcm", steps=(4,), shift=5.0, shift_of_two=12.0, named=r"self.?forcing",
        make=_listed(_FOUR, "lcm", time_first=True),
    ),
    "rcm-4step": Preset(
        solver="lcm", steps=(4, 3, 2, 1), shift=None, make=_angles("lcm"), sigma_max=True,
        named=r"(?<![a-z])rcm(?![a-z]).*wan|wan.*(?<![a-z])rcm(?![a-z])|turbowan|turbodiffusion",
    ),
    "rcm-ode-4step": Preset(
        solver="euler", steps=(4, 3, 2, 1), shift=None, named=r"(?!)", make=_angles("euler"), sigma_max=True
    ),
}  # fmt: skip
# of rCM's models: those of text alone, and those that are given a picture
SIGMA_MAX = {False: 80.0, True: 200.0}
OFF = "off"


def parse_preset(text: str) -> tuple[str, float | None]:
    """'rcm-4step:120' -> ("rcm-4step", 120.0).

    Raises:
        WanFastError: there is no such preset, or it takes no such number.
    """
    if not isinstance(text, str):
        raise WanFastError(f"preset must be one of {', '.join(PRESETS)} or off, got {text!r}")
    name, colon, number = text.strip().partition(":")
    known = PRESETS.get(name)
    if known is None and (name != OFF or colon):
        close = get_close_matches(name, PRESETS, 1)
        raise WanFastError(
            f"--preset must be one of {', '.join(PRESETS)} or off, got {text!r}; "
            + (f"did you mean {close[0]}?" if close else "rcm takes a largest sigma: rcm-4step:120")
        )
    if not colon:
        return name, None
    assert known is not None
    if not known.sigma_max:
        raise WanFastError(f"--preset {text}: {name} takes no number; leave out ':{number}'")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 15 <= value <= 1e6:  # below tan 1.5 the second step would have more noise than the first
        raise WanFastError(f"--preset {text}: the largest sigma must be a number from 15 to 1000000; for example {name}:120")
    return name, value


def sampler(preset: str, num_steps: int, shift: float) -> Sampler:
    """The sampler of a preset, whose largest sigma is in its name where it has one."""
    name, sigma_max = parse_preset(preset)
    return PRESETS[name].make(num_steps, shift, sigma_max or 0.0)


def named(text: str) -> str | None:
    """The preset that a file's or a folder's name tells; of two ways to sample the same weights the first."""
    return next((name for name, preset in PRESETS.items() if re.search(preset.named, text, re.IGNORECASE)), None)


def _bf16(value: float) -> float:
    """Rounded to bf16, to even."""
    bits = struct.unpack("I", struct.pack("f", value))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("f", struct.pack("I", bits & 0xFFFF0000))[0]
