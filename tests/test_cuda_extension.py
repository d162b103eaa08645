"""wan_fast._cuda: built where nvcc is, imports without a driver, fails with a message, and holds the code meant."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ARCHITECTURES = ["80", "86", "89", "90a", "100a", "120a"]


@pytest.fixture(scope="module")
def extension() -> Any:
    try:
        return importlib.import_module("wan_fast._cuda")
    except ImportError as error:
        if shutil.which("nvcc") is None:
            pytest.skip("wan_fast._cuda was not built: there is no nvcc")
        pytest.fail(f"nvcc is here, so wan_fast._cuda should be too (`pip install .` or `pip install -e .`): {error}")


def sass(extension: Any, architecture: str) -> str:
    """The disassembly of one architecture's kernels."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("there is no cuobjdump")
    command = [found, "-sass", "-arch", f"sm_{architecture}", extension.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_built_for_every_architecture(extension: Any) -> None:
    expected = ARCHITECTURES
    if nvcc := shutil.which("nvcc"):
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        expected = [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}\n" in known + "\n"]
    assert extension.architectures() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run(extension: Any) -> None:
    assert re.search("CUDA|device", extension.unusable(0))
    with pytest.raises(RuntimeError, match=r"frames_to_uint8: .*(CUDA|device)"):
        extension.frames_to_uint8(0, "float32", 0, 1, 2, 2, 1, False, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_raises_what_cuda_reports(extension: Any) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        extension.frames_to_uint8(0, "float32", 0, 1, 2, 2, 1, False, 10_000, 0)


def test_refuses_other_dtypes(extension: Any) -> None:
    with pytest.raises(ValueError, match='dtype is "float64"; allowed: float32, bfloat16, float16'):
        extension.frames_to_uint8(0, "float64", 0, 1, 2, 2, 1, False, 0, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_code_is_what_was_meant(extension: Any, architecture: str) -> None:
    if architecture not in extension.architectures():
        pytest.skip(f"not built for sm_{architecture}")
    functions = re.split(r"\bFunction : ", sass(extension, architecture))[1:]
    kernels = [body for body in functions if "frames_to_uint8_kernel" in body.splitlines()[0]]
    assert len(kernels) == 12, "three dtypes, two patches, vector and scalar"
    for body in kernels:
        assert not re.search(r"\b(LDL|STL)\b", body), "spills"
        assert not re.search(r"\bFFMA2?\b", body), "a fused multiply-add changes the bytes"
    for dtype, patch, bits, count in [
        *(("If", 1, 128, 3), ("I13__nv_bfloat16", 1, 64, 3), ("I6__half", 1, 64, 3)),
        *(("If", 2, 128, 6), ("I13__nv_bfloat16", 2, 128, 3), ("I6__half", 2, 128, 3)),
    ]:
        name = f"frames_to_uint8_kernel{dtype}Li{patch}ELb1E"
        body = next(body for body in kernels if name in body.splitlines()[0])
        assert len(re.findall(rf"\bLDG\.E\.{bits}\b", body)) == count, f"{name}: wide loads"
        assert len(re.findall(r"\bLDG\.", body)) == count, f"{name}: no narrow ones"
        assert not re.search(r"\bSTG\.E\.U8\b", body), f"{name}: stores bytes one by one"
