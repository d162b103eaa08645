"""Compile every Triton kernel for some compute capabilities without a GPU; print what the binaries use, as JSON.

    python compile_kernels.py 80 90

The launchers run on meta tensors with a driver that only names its target, so that what is compiled is what a launch
would compile: the same specialisation, constants and options.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_cases import REAL_CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from wan_fast.kernels import KERNELS

# "        /*00a0*/              @P1 IADD3.X R11, ..." -> IADD3
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
# loads and stores of global memory: " LDG.E.EF.128.CONSTANT R4, ..." -> LDG, 128; without a width it is 32, or less
ACCESS = re.compile(r"\b(LDG|STG)\.([\w.]+)")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class TargetOnly:
    """Stands in for Triton's CUDA driver where there is none."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(compiled: list[Any]) -> None:
    """Make every launch compile, append the result to `compiled` and stop there."""
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = record


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


@cache
def usage(kernel: Any) -> dict[str, Any]:
    """Registers, stack and local bytes per thread, shared bytes and warps per block, how often each instruction occurs, and
    how often loads and stores of each width in bits: {"LDG": {128: 4}}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = tool("cuobjdump", "-res-usage", file.name)
        listing = tool("nvdisasm", file.name)
    numbers = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for access, suffixes in ACCESS.findall(listing):
        width = re.search(r"\b(?:U|S)?(8|16|64|128|256)\b", suffixes.replace(".", " "))
        widths[access][int(width[1]) if width else 32] += 1
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        **numbers,
        "sass": Counter(INSTRUCTION.findall(listing)),
        "widths": widths,
    }


def main(capabilities: list[int]) -> None:
    compiled: list[Any] = []
    compile_only(compiled)
    rows = []
    for capability, case in itertools.product(capabilities, REAL_CASES):
        for dtype in case.dtypes if capability >= case.since else ():
            driver.set_active(TargetOnly(capability))
            compiled.clear()
            KERNELS[case.op].launch(*case.inputs(dtype))
            facts = {
                "case": f"{case.op}-{case.id}-{str(dtype).removeprefix('torch.')} on sm_{capability}",
                "capability": capability,
                "budget": case.registers,
                "loads": case.narrow_loads,
                "stores": case.narrow_stores,
                "most": case.shared,
                "products": case.products if dtype == torch.bfloat16 else "",
            }
            rows += [facts | usage(kernel) for kernel in compiled]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
