"""What this machine has, for `wan-fast doctor`: devices, packages, compiled kernels, and the backend of each operation."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import wan_fast
from wan_fast import schemes
from wan_fast.backends import kernel_plan
from wan_fast.config import EngineConfig
from wan_fast.device import describe, gpu_list
from wan_fast.tasks import HEAD_DIM

_NEEDED = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("av", "pillow", "numpy", "tqdm", "ftfy"),
)
_OPTIONAL = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "nvidia-modelopt",
    "cupy-cuda13x",
    "diffusers",
    "gguf",
    "sentencepiece",
    "requests",
    "torchvision",
)


def report() -> dict[str, dict[str, str]]:
    """Section -> name -> what was found."""
    gpus, why_none = gpu_list()
    host = describe("cpu")
    machine = {"wan-fast": wan_fast.__version__, "python": platform.python_version(), "cpu": host.model}
    machine["memory"] = f"{host.free / 2**30:.1f} GiB free of {host.memory / 2**30:.1f} GiB"
    devices = {
        gpu.name: f"{gpu.model}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory / 2**30:.1f} GiB"
        for gpu in gpus
        if gpu.capability
    }
    return {
        "machine": machine,
        "gpu": devices or {"none": why_none},
        "package": {name: _version(name, "missing: pip install wan-fast again") for name in _NEEDED},
        "optional": {name: _version(name, "not installed") for name in _OPTIONAL},
        "extension": {"wan_fast._cuda": _extension()},
        "attention": _attention(),
        "kernel": _kernels(),
    }


def _version(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _extension() -> str:
    if find_spec("wan_fast._cuda") is None:
        return "absent: it is built when nvcc and CMake are there during the install; kernels come from Triton"
    return "built for " + " ".join(import_module("wan_fast._cuda").architectures())


def _attention() -> dict[str, str]:
    from wan_fast.attention import BACKENDS, facts

    capability = describe("auto").capability or (0, 0)
    return {row.name: facts(row, capability) for row in BACKENDS}


def _kernels() -> dict[str, str]:
    from wan_fast.attention import BACKENDS

    device = describe("auto")
    dtype = "fp32" if device.type == "cpu" else "bf16"
    reasons = {precision: schemes.computes(precision, device.capability) for precision in schemes.NAMES}
    said = ", ".join(f"--precision {precision}: {reason or 'possible'}" for precision, reason in reasons.items())
    able_8bit = any(row.runs_on(device.capability or (0, 0)) for row in BACKENDS if row.flag == "int8")
    able = [schemes.Form(precision) for precision, reason in reasons.items() if not reason]
    choices = kernel_plan(
        EngineConfig(task="ti2v-5B", attention="int8" if able_8bit else "auto"), device, dtype, HEAD_DIM, able, said
    )
    return {choice.op: f"{choice.backend} ({choice.why})" for choice in choices}
