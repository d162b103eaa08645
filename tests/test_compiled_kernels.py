"""Every Triton kernel compiles for every supported GPU, within its registers, without spilling, with wide loads and stores."""

from __future__ import annotations

import json
from typing import Any

import background
import pytest
from kernel_cases import REAL_CASES

from wan_fast.counting import kind_of

CAPABILITIES = [pytest.param(number, marks=pytest.mark.background(f"sm_{number}")) for number in background.CAPABILITIES]


@pytest.fixture
def rows(capability: int, background: background.Background) -> list[dict[str, Any]]:
    """What compile_kernels.py reports, one row per kernel, real shape and dtype."""
    return json.loads(background.output(f"sm_{capability}"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_within_budget(capability: int, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["capability"] == capability]
    # every case launches at least one kernel, in each of its dtypes
    assert len({row["case"] for row in rows}) == sum(len(case.dtypes) for case in REAL_CASES if capability >= case.since)
    for row in rows:
        where = row["case"]
        assert kind_of(row["kernel"]) in ("wan_fast kernel", "convolution", "matrix product", "attention"), (
            f"a profile would not know {row['kernel']}"
        )
        assert row["reg"] <= row["budget"], f"{where}: {row['reg']} registers, budget {row['budget']}"
        spills = {name for name in ("LDL", "STL") if name in row["sass"]}
        assert row["stack"] == row["local"] == 0 and not spills, f"{where} spills: {row}"
        assert row["shared"] <= row["most"], f"{where}: {row['shared']} bytes of shared memory"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_run_on_tensor_cores(capability: int, rows: list[dict[str, Any]]) -> None:
    held = [row for row in rows if row["capability"] == capability and row["products"]]
    assert {row["products"] for row in held} == {"bf16", "int8", *(["fp8"] if capability >= 89 else [])}
    for row in held:
        letter = {"bf16": "H", "fp8": "Q", "int8": "I"}[row["products"]]
        meant = {90: f"{letter}GMMA", 100: f"UTC{letter}MMA"}.get(capability, f"{letter}MMA")
        if (capability, letter) == (100, "I") and not row["sass"].get(meant):
            meant = "IMMA"  # before Triton 3.9
        assert row["sass"].get(meant), f"{row['case']}: no {meant}, but {sorted(n for n in row['sass'] if 'MMA' in n)}"
        if capability == 90 and row["case"].startswith("gemm_8bit-fp8"):
            # one addition per sum and thread; behind the loop there is none
            assert row["sass"].get("FADD", 0) >= 64, f"{row['case']}: sums stay in the tensor cores, which keep 14 bits of them"
        if row["kernel"] == "_gemm_8bit_kernel":
            assert bool(row["sass"].get("UTMALDG")) is (capability >= 90), (
                f"{row['case']}: tiles through descriptors from 9.0 on"
            )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_in_8_bits(capability: int, rows: list[dict[str, Any]]) -> None:
    """Its second product is in the values' dtype; sums of e4m3 leave the tensor cores, which keep few bits, after each tile."""
    held = [row for row in rows if row["capability"] == capability and row["kernel"] == "_attention_8bit_kernel"]
    for row in held:
        narrow = "wide-values" not in row["case"]
        letter = "Q" if narrow else "H"
        meant = {90: f"{letter}GMMA", 100: f"UTC{letter}MMA"}.get(capability, f"{letter}MMA")
        assert row["sass"].get(meant), f"{row['case']}: no {meant}"
        by_descriptors = narrow and capability in (90, 100)
        assert bool(row["sass"].get("UTMALDG")) is by_descriptors, f"{row['case']}: descriptors on data-centre cards alone"
        if narrow and capability != 100 and "64-channels" not in row["case"]:
            # one per score and one per sum, in the loop and in the tail; where products add to the sums, only those of scores
            tile = 64 if capability != 90 else 128
            threads = 32 * row["warps"]
            assert row["sass"]["FFMA"] >= 2 * 128 * (tile + 128) // threads, f"{row['case']}: {row['sass']['FFMA']} FFMA"
    assert held


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_memory_is_moved_128_bits_at_a_time(capability: int, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["capability"] == capability]
    held = [row for row in rows if (row["loads"], row["stores"]) != (None, None)]
    left_open = {"_frames_to_uint8_kernel", "_causal_conv3d_kernel", "_gemm_8bit_kernel", "_attention_8bit_kernel"}
    assert {row["kernel"] for row in held} == {row["kernel"] for row in rows} - left_open
    for row in held:
        for access, allowed in (("LDG", row["loads"]), ("STG", row["stores"])):
            narrow = sum(count for width, count in row["widths"][access].items() if width != "128")
            if allowed is not None:
                assert row["widths"][access]["128"] > 0, f"{row['case']}: {row['widths']}"
                assert narrow <= allowed, f"{row['case']}: {narrow} of {access} are narrower, {allowed} may be"
