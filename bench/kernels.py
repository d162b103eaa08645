"""The fused kernels: timed on a GPU, or, without one, what their binaries use.

    python -m bench.kernels                  # the campaign's kernel cases: microseconds, % of the roof, ratios
    python -m bench.kernels --compiled       # registers, shared memory and predicted occupancy on every architecture

The second needs no GPU; it prints a table and writes it to bench/results/compiled_kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench import RESULTS, ROOT


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What the blocks on one of a GPU's multiprocessors share (CUDA C++ Programming Guide, technical specifications)."""

    warps: int
    blocks: int
    shared: int  # KiB
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    120: Multiprocessor(48, 24, 100),
}


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Share of the warps of a multiprocessor that can be resident.

    Args:
        capability: 90 for 9.0.
        registers: per thread; they are handed out to a warp in steps of 256.
        shared: bytes per block; 1 KiB more of each block is the system's.
        warps: per block.
    """
    sm = MULTIPROCESSORS[capability]
    of_warp = -(-registers * 32 // 256) * 256
    blocks = min(sm.blocks, sm.warps // warps, sm.registers // of_warp // warps, sm.shared * 1024 // (shared + 1024))
    return blocks * warps / sm.warps


def compiled(capabilities: Iterable[int] = MULTIPROCESSORS) -> list[dict[str, Any]]:
    """Rows of tests/compile_kernels.py: one per kernel, real shape, dtype and architecture."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), *map(str, capabilities)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per kernel, shape and dtype; a column per architecture. One of several kernels of a case is named."""
    capabilities = sorted({row["capability"] for row in rows})
    lines = [
        "| kernel at | warps | shared, bytes | " + " | ".join(f"sm_{c}" for c in capabilities) + " |",
        "| --- | --- | --- |" + " --- |" * len(capabilities),
    ]

    def place(row: dict[str, Any]) -> tuple[str, str]:
        return row["case"].partition(" on ")[0], row.get("kernel", "")

    several = Counter(case for case, _ in {place(row) for row in rows})
    for (case, kernel), group in groupby(sorted(rows, key=place), place):
        name = f"`{case}`{', ' + kernel.strip('_') if several[case] > 1 else ''}"
        by_capability = {row["capability"]: row for row in group}
        cells = [
            f"{row['reg']}, {occupancy(c, row['reg'], row['shared'], row['warps']):.0%}"
            if (row := by_capability.get(c))
            else "-"
            for c in capabilities
        ]
        first = next(iter(by_capability.values()))
        shared = max(row["shared"] for row in by_capability.values())
        lines.append(f"| {name} | {first['warps']} | {shared} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description="Time the fused kernels, or describe their binaries."
    )
    parser.add_argument("--compiled", action="store_true", help="compile for every architecture; needs no GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="of measuring, at most (default 8)")
    parsed = parser.parse_args(argv)
    if not parsed.compiled:
        from bench.campaign import main as campaign

        return campaign(["--device", "cuda", "--minutes", str(parsed.minutes), "kernel/*"])
    import triton

    text = table(compiled())
    print(text)
    (RESULTS / "compiled_kernels.md").write_text(page(text, triton.__version__), encoding="utf-8")
    return 0


def page(text: str, version: str) -> str:
    return (
        "# What the fused kernels' binaries use\n\n"
        f"Compiled by Triton {version} at the shapes of real videos by `python -m bench.kernels --compiled`: registers per\n"
        "thread, and the share of a multiprocessor's warps that can be resident, predicted from registers, shared memory and\n"
        f"block size. None spills.\n\n{text}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
