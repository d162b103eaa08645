"""What this machine computes with, found without importing torch: driver calls through ctypes, /proc for the host."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from wan_fast.config import WanFastError

# dense bf16 tensor-core peak, TFLOP/s, and bandwidth, TB/s, from the vendor's data sheets; the first name found in the device's
# wins
_PEAKS = {
    "B200": (2250, 8.0), "H200": (989, 4.8), "GH200": (989, 4.8), "H100 PCIe": (756, 2.0), "H100": (989, 3.35),
    "H800": (989, 3.35), "H20": (148, 4.0), "A100": (312, 2.0), "A800": (312, 2.0), "L40S": (362, 0.864), "L40": (181, 0.864),
    "L4": (121, 0.3), "A40": (150, 0.696), "A10": (125, 0.6), "RTX 5090": (209, 1.79), "RTX 4090": (165, 1.01),
    "RTX 3090": (71, 0.936),
}  # fmt: skip
# what `plan --on` knows: model, memory in GiB, compute capability
_NAMED = {
    "b200": ("NVIDIA B200", 178, (10, 0)), "h200": ("NVIDIA H200", 139, (9, 0)), "h100": ("NVIDIA H100 80GB HBM3", 79, (9, 0)),
    "h20": ("NVIDIA H20", 95, (9, 0)), "a100": ("NVIDIA A100-SXM4-80GB", 79, (8, 0)), "l40s": ("NVIDIA L40S", 44, (8, 9)),
    "l4": ("NVIDIA L4", 22, (8, 9)), "a10": ("NVIDIA A10", 22, (8, 6)), "5090": ("NVIDIA GeForce RTX 5090", 31, (12, 0)),
    "4090": ("NVIDIA GeForce RTX 4090", 23, (8, 9)), "3090": ("NVIDIA GeForce RTX 3090", 23, (8, 6)),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device: `name` as torch spells it, memory in bytes (`free` of the host: available now); `here` is False for one that
    is only planned for."""

    name: str
    model: str
    memory: int
    free: int
    capability: tuple[int, int] | None = None
    here: bool = True

    @property
    def type(self) -> str:
        return self.name.partition(":")[0]

    def peak_tops(self, precision: str) -> float | None:
        """Dense peak of "fp8" or "int8" in 10^12 operations per second, where it is known.

        Twice that of bf16; int8 on cards for games four times (the vendor's data sheets).
        """
        peak = self.peak_tflops
        return peak and peak * (4 if precision == "int8" and "GeForce" in self.model else 2)

    @property
    def peak_tflops(self) -> float | None:
        """Dense bf16 peak, where it is known."""
        return self._peaks and float(self._peaks[0])

    @property
    def bandwidth(self) -> float | None:
        """Of its memory, in bytes per second, where it is known."""
        return self._peaks and self._peaks[1] * 1e12

    @property
    def _peaks(self) -> tuple[float, float] | None:
        return next((peaks for name, peaks in _PEAKS.items() if re.search(rf"\b{name}\b", self.model)), None)


def named(name: str) -> Device:
    """A card to plan for that need not be here: "h200", "RTX 4090".

    Raises:
        WanFastError: it is not on record.
    """
    key = re.sub(r"^(nvidia|geforce|rtx|[\s_-])+", "", name.strip().lower())
    if key not in _NAMED:
        raise WanFastError(f"--on {name}: this card is not on record; those that are: {' '.join(_NAMED)}")
    model, memory, capability = _NAMED[key]
    return Device(
        name="cuda:0", model=model, memory=memory * 2**30, free=(memory - 1) * 2**30, capability=capability, here=False
    )


def describe(name: str) -> Device:
    """The device behind 'auto', 'cpu', 'cuda' or 'cuda:N'; auto takes the first GPU there is.

    Raises:
        WanFastError: a GPU is asked for that is not there, or that the installed torch cannot use.
    """
    if name == "cpu":
        return _host()
    gpus, why_not = gpu_list()
    if name == "auto":
        return gpus[0] if gpus else _host()
    index = int(name.partition(":")[2] or 0)
    if not gpus:
        raise WanFastError(f"--device {name}: {why_not}; take --device cpu")
    if index >= len(gpus):
        raise WanFastError(f"--device {name}: there are {len(gpus)} GPUs, cuda:0 to cuda:{len(gpus) - 1}")
    return gpus[index]


def gpu_list() -> tuple[list[Device], str]:
    """The usable GPUs, or an empty list and the reason."""
    wanted = _torch_cuda()
    if wanted is None:
        return [], "the installed torch is a CPU build"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "there is no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return [], "the NVIDIA driver does not answer"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 < int(wanted.split(".")[0]):
        able = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return [], f"the NVIDIA driver goes up to CUDA {able}, the installed torch needs {wanted}"
    return [_gpu(driver, i) for i in range(count.value)], "the NVIDIA driver shows no GPU"


def _gpu(driver: ctypes.CDLL, index: int) -> Device:
    handle, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(value.value)
    # a CUDA context, cuBLAS workspaces and fragmentation take about 1 GiB that tensors never see
    free = max(0, total.value - 2**30)
    return Device(
        name=f"cuda:{index}",
        model=name.value.decode(),
        memory=total.value,
        free=free,
        capability=(capability[0], capability[1]),
    )


def _host() -> Device:
    facts = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts[key] = int(value.split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may be allowed less than the machine has
    if limit.is_file() and limit.read_text().strip().isdigit():
        facts = {key: min(value, int(limit.read_text())) for key, value in facts.items()}
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = f"{match[1].strip() if match else 'CPU'}, {len(os.sched_getaffinity(0))} threads"
    return Device(name="cpu", model=model, memory=facts["MemTotal"], free=facts["MemAvailable"])


def _torch_cuda() -> str | None:
    """The CUDA version torch was built for, read from its version file."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(r"^cuda\b.*= *['\"]([\d.]+)['\"]", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None
