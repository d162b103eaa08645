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
    "high": {"precision": "bf16", "attention": "8 bits", "step_cache": "magcache:65%", "cfg_cache": "off"},
    "fast": {"precision": "8 bits", "attention": "8 bits", "step_cache": "magcache:50%", "cfg_cache": "difference:2"},
    "draft": {"precision": "8 bits", "attention": "8 bits", "step_cache": "magcache:35%", "cfg_cache": "difference:3"},
}
UNSET = {"precision": "auto", "attention": "auto", "step_cache": None, "cfg_cache": None}
_FLAGS = {"precision": "--precision", "attention": "--attention", "step_cache": "--step-cache", "cfg_cache": "--cfg-cache"}


def settle(config: EngineConfig, device: Device) -> tuple[EngineConfig, str, frozenset[str]]:
    """The configuration with its preset's choices, in words what they are, and the names of the fields that they filled.

    What was given explicitly stays.
    """
    if config.quality is None:
        return config, "", frozenset()
    chosen: dict[str, Any] = {}
    said = []
    for name, value in PRESETS[config.quality].items():
        value = _on(device, name, value) if value == "8 bits" else value
        given = getattr(config, name)
        if given != UNSET[name]:
            said.append(f"{_FLAGS[name]} {given} as given")
        else:
            chosen[name] = value
            said.append(f"{_FLAGS[name]} {value}")
    return replace(config, quality=None, **chosen), f"{config.quality}: {', '.join(said)}", frozenset(chosen)


def _on(device: Device, name: str, value: str) -> str:
    """8 bits in the format for a device; a CPU, and a GPU before 8.0, computes as it does by itself."""
    if device.capability is None or device.capability < (8, 0):
        return "auto"
    if name == "attention":
        return "int8"
    # cards for games multiply int8 twice as fast as FP8
    return "fp8" if device.capability >= (8, 9) and "GeForce" not in device.model else "int8"
