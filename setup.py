"""Builds wan_fast._cuda with CMake where nvcc and cmake are found; everything else is in pyproject.toml.

WAN_FAST_CUDA: "auto" (default) builds the extension if it can, "1" must build it, "0" does not try.
WAN_FAST_CUDA_ARCHITECTURES: default "80;86;89;90a;100a;120a", less what the installed nvcc does not know.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "80;86;89;90a;100a;120a"
REQUEST = os.environ.get("WAN_FAST_CUDA", "auto")
if REQUEST not in ("auto", "0", "1"):
    raise SystemExit(f"WAN_FAST_CUDA is {REQUEST!r}; allowed: auto, 0, 1")


def find_nvcc() -> str | None:
    """The nvcc of $CUDACXX, $CUDA_HOME, the path or /usr/local/cuda."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(1, f"{home}/bin/nvcc")
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def run(*command: str) -> str:
    """Run a command and return what it printed; raise CompileError with the output if it fails."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def architectures(nvcc: str) -> list[str]:
    """The wanted architectures that this nvcc can compile for."""
    wanted = os.environ.get("WAN_FAST_CUDA_ARCHITECTURES", ARCHITECTURES).replace("-real", "").split(";")
    # the plain number stands for its "a" form too: --list-gpu-code of some versions omits those
    known = set(re.findall(r"sm_(\d+)", run(nvcc, "--list-gpu-code")))
    chosen = [name for name in wanted if name.rstrip("af") in known]
    if not chosen:
        raise CompileError(f"{nvcc} can compile for none of {';'.join(wanted)}")
    return chosen


def cmake_build(output: Path, work: Path) -> None:
    """Configure and build CMakeLists.txt, leaving _cuda.*.so in `output`."""
    if (nvcc := find_nvcc()) is None:
        raise CompileError("nvcc was not found")
    if (cmake := shutil.which("cmake")) is None:
        raise CompileError("cmake was not found (`pip install cmake` provides it)")
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(f"{name}-real" for name in architectures(nvcc)),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # a build folder configured by an earlier, deleted build environment must not be reused
    shutil.rmtree(work, ignore_errors=True)
    run(cmake, "-S", str(ROOT), "-B", str(work), *generator, *(f"-D{key}={value}" for key, value in options.items()))
    run(cmake, "--build", str(work), "--parallel")


class BuildExtension(build_ext):
    """build_ext that hands wan_fast._cuda to CMake, and in "auto" carries on without it."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        try:
            if REQUEST == "0":
                raise CompileError("WAN_FAST_CUDA=0")
            cmake_build(output.parent, work)
        except CompileError as error:
            self.remove_old_builds(output)
            if REQUEST == "1":
                raise SystemExit(f"wan-fast: WAN_FAST_CUDA=1, but wan_fast._cuda cannot be built: {error}") from error
            summary, _, details = str(error).partition("\n")
            print(details, file=sys.stderr)
            print(f"wan-fast: installed without wan_fast._cuda, Triton kernels are used: {summary}", file=sys.stderr)

    def remove_old_builds(self, output: Path) -> None:
        """Delete what an earlier build left, lest it pass for this one."""
        output.unlink(missing_ok=True)
        if getattr(self, "editable_mode", False):
            (ROOT / "wan_fast" / output.name).unlink(missing_ok=True)


setup(
    ext_modules=[Extension("wan_fast._cuda", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
