"""--quality: measured choices of precision, attention and caches. Standard library only.

Each was measured on `tiny` by `python -m bench.quality`; bench/results/quality.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wan_fast.config import EngineConfig
from wan_fast.device import Device

# what each takes; precision and attention "8 bits" are what the device computes fastest
PRESETS: Mapping[str, Mapping[str, str]] = {
    "lossless": {"precision": "bf16", "attention": "auto", "step_cache": "off", "cfg_cache": "off"},
    "high": {"precision": "auto", "attention": "8 bits", "step_cache": "auto:65%", "cfg_cache": "off"},
    "fast": {"precision": "8 bits", "attention": "8 bits", "step_cache": "auto:42%", "cfg_cache": "off"},
    "draft": {"precision": "8 bits", "attention": "8 bits", "step_cache": "auto:30%", "cfg_cache": "off"},
}
# what their caches do on tiny at its 12 steps and at 50: passes, PSNR in dB and SSIM against all passes; 8 bits come on top
MEASURED: Mapping[str, Mapping[int, tuple[int, float, float]]] = {
    "high": {12: (12, 31.3, 0.9744), 50: (64, 54.5, 0.9999)},
    "fast": {12: (10, 26.6, 0.9491), 50: (38, 47.4, 0.9989)},
    "draft": {12: (6, 21.7, 0.9040), 50: (30, 40.1, 0.9963)},
}
UNSET = {"precision": "auto", "attention": "auto", "step_cache": None, "cfg_cache": None}
_FLAGS = {"precision": "--precision", "attention": "--attention", "step_cache": "--step-cache", "cfg_cache": "--cfg-cache"}


def settle(config: EngineConfig, device: Device, stored_8bit: bool = False) -> tuple[EngineConfig, str, frozenset[str]]:
    """The configuration with its preset's choices, in words what they are, and the names of the fields that they filled.

    What was given explicitly stays. `stored_8bit`: the checkpoint has linears in 8 bits, which are then computed as they are.
    """
    if config.quality is None:
        return config, "", frozenset()
    chosen: dict[str, Any] = {}
    said = []
    for name, value in PRESETS[config.quality].items():
        if value == "8 bits":
            value = "auto" if name == "precision" and stored_8bit else _in_8_bits(name, config, device)
        given = getattr(config, name)
        if given != UNSET[name]:
            said.append(f"{_FLAGS[name]} {given} as given")
        else:
            chosen[name] = value
            said.append(f"{_FLAGS[name]} {value}")
    found = MEASURED.get(config.quality, {}).get(50)
    on_tiny = f"; on tiny, 50 steps: {found[0]} of 100 passes, {found[1]} dB, SSIM {found[2]}" if found else ""
    return replace(config, quality=None, **chosen), f"{config.quality}: {', '.join(said)}{on_tiny}", frozenset(chosen)


def _in_8_bits(name: str, config: EngineConfig, device: Device) -> str:
    """The format for a device; a CPU, and a GPU before 8.0, computes as it does by itself, as attention does in fp32."""
    if device.capability is None or device.capability < (8, 0):
        return "auto"
    if name == "attention":
        return "int8" if config.dtype != "fp32" else "auto"
    # cards for games multiply int8 twice as fast as FP8
    return "fp8" if device.capability >= (8, 9) and "GeForce" not in device.model else "int8"
