"""The table of what kernels' binaries use."""

import re
from pathlib import Path

import pytest
from kernel_cases import REAL_CASES

from bench import kernels

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "share"),
    [
        (90, 32, 0, 4, 1.0),  # 16 blocks of 4 warps
        (90, 64, 0, 8, 0.5),  # 65536 / (64 x 256) = 4 blocks of 8 of 64 warps
        (90, 65, 0, 8, 3 * 8 / 64),  # 65 are handed out as 72: 28 warps, 3 blocks
        (86, 32, 0, 4, 1.0),  # 12 blocks of 4 of 48 warps
        (80, 16, 0, 1, 0.5),  # at most 32 blocks
        (86, 32, 49 * 1024, 4, 2 * 4 / 48),  # two of 50 KiB fill 100
        (90, 255, 0, 16, 0.0),  # does not fit at all
    ],
)
def test_occupancy(capability, registers, shared, warps, share):
    assert kernels.occupancy(capability, registers, shared, warps) == pytest.approx(share)


def test_table_has_a_column_per_architecture():
    row = {"case": "adaln-x-float32 on sm_80", "capability": 80, "reg": 32, "shared": 16, "warps": 4}
    lines = kernels.table([row, row | {"capability": 90, "case": "adaln-x-float32 on sm_90", "reg": 64}]).splitlines()
    assert lines[0].endswith("| sm_80 | sm_90 |") and lines[2] == "| `adaln-x-float32` | 4 | 16 | 32, 100% | 64, 50% |"


def test_one_of_several_kernels_of_a_case_is_named():
    row = {"case": "values-x-float32 on sm_80", "capability": 80, "reg": 32, "shared": 16, "warps": 4}
    lines = kernels.table([row | {"kernel": "_b_kernel"}, row | {"kernel": "_a_kernel"}]).splitlines()
    assert [line.partition(" | ")[0] for line in lines[2:]] == [
        "| `values-x-float32`, a_kernel",
        "| `values-x-float32`, b_kernel",
    ]


def test_the_table_that_is_kept_has_every_case():
    kept = (ROOT / "bench" / "results" / "compiled_kernels.md").read_text()
    names = set(re.findall(r"^\| `(\S+)-(?:float32|bfloat16)`", kept, re.MULTILINE))
    assert kept == kernels.page(kept[kept.index("| kernel") :].rstrip("\n"), re.search(r"Triton (\S+)", kept)[1])
    assert names == {f"{case.op}-{case.id}" for case in REAL_CASES}
