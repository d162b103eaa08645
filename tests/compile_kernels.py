"""Compile every Triton kernel for some compute capabilities without a GPU; print what the binaries use, as JSON.

    python compile_kernels.py 80 90

The launchers run on meta tensors with a driver that only names its target, so that what is compiled is what a launch
would compile: the same specialisation, constants and options.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_cases import REAL_CASES
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from wan_fast.kernels import KERNELS

LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/.*$", re.MULTILINE)
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


def instructions(cubin: bytes) -> bytes:
    """The sections of an ELF file that a processor executes."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    # name, type, flags, address, offset, bytes
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    return b"".join(cubin[offset : offset + length] for _, _, flags, _, offset, length in sections if flags & 4)


def listings(cubins: list[bytes], capability: int) -> list[str]:
    """The disassembly of each; all in one run of the tool, which takes longer to start than for any of them."""
    codes = [instructions(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        target = sm_arch_from_capability(capability).replace("sm_", "SM")
        lines = LINE.findall(tool("nvdisasm", "--no-dataflow", "--binary", target, file.name))
    # an instruction has 16 bytes
    ends = list(itertools.accumulate(len(code) // 16 for code in codes))
    assert ends[-1] == len(lines)
    return ["\n".join(lines[start:end]) for start, end in itertools.pairwise([0, *ends])]


def usage(kernel: Any, listing: str) -> dict[str, Any]:
    """Registers, stack and local bytes per thread, shared bytes and warps per block, how often each instruction occurs, and
    how often loads and stores of each width in bits: {"LDG": {128: 4}}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = tool("cuobjdump", "-res-usage", file.name)
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


def compiled(capability: int, record: list[Any]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """What is asked of every case in each of its dtypes, and the kernels that it launches."""
    driver.set_active(TargetOnly(capability))
    for case in REAL_CASES:
        for dtype in case.dtypes if capability >= case.since else ():
            record.clear()
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
            yield facts, list(record)


def main(capabilities: list[int]) -> None:
    record: list[Any] = []
    compile_only(record)
    rows = []
    for capability in capabilities:
        found = list(compiled(capability, record))
        # Triton returns the same object for a launch that it has compiled before
        kernels = list({kernel: None for _, launched in found for kernel in launched})
        texts = listings([kernel.asm["cubin"] for kernel in kernels], capability)
        used = {kernel: usage(kernel, text) for kernel, text in zip(kernels, texts, strict=True)}
        rows += [facts | used[kernel] for facts, launched in found for kernel in launched]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
