"""Imports point downwards. The table is the architecture."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wan_fast"
STDLIB = set(sys.stdlib_module_names)

# A module may import the modules of lower levels, and what is in its own folder.
LEVELS: list[set[str]] = [
    {"errors", "kernels", "tasks", "user_cache"},
    {"caches", "few_steps", "lora", "sound"},
    {"parsing"},
    {"config"},
    {"resolving"},
    {"calibration", "device", "flags", "headers", "manifest", "names", "processes", "prompt_extension", "steps"},
    {"dialects", "lora_files", "quality", "skipping"},
    {"schemes", "self_test", "weights"},
    {"parts"},
    {"attention", "inputs", "parallel", "checkpoint", "media", "merging", "quantize", "roofs", "video"},
    {"blocks", "vae", "encoders", "backends", "graphs", "framing", "single_files"},
    {"adapters"},
    {"dit"},
    {"branches", "conditioning", "distances", "embeddings", "examples", "loading", "recording", "setup", "solver"},
    {"memory", "presets", "residents", "sampler", "schedule"},
    {"planning", "running"},
    {"workspace"},
    {"engine"},
    {"__init__"},
    {"calibrate", "counting", "doctor", "export", "server"},
    {"profiling"},
    {"cli"},
    {"__main__"},
]
# what these modules may import from outside the project; the others are free
OUTSIDE: dict[str, set[str]] = {
    "kernels": STDLIB | {"torch", "triton"},
    **dict.fromkeys(
        [
            "tasks",
            "config",
            "device",
            "flags",
            "headers",
            "manifest",
            "names",
            "steps",
            "dialects",
            "schemes",
            "errors",
            "caches",
            "few_steps",
            "user_cache",
            "lora",
            "lora_files",
            "calibration",
            "skipping",
            "quality",
            "processes",
            "examples",
        ],
        STDLIB,
    ),
}
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def files(package: Path = PACKAGE) -> Iterator[tuple[str, Path]]:
    """Every source file of the package with its dotted name: "wan_fast.kernels._op"."""
    # iterdir and not rglob, which does not follow the symlink wan_fast/kernels
    for path in sorted(package.iterdir()):
        if path.is_dir():
            yield from ((f"{package.name}.{name}", file) for name, file in files(path))
        elif path.suffix == ".py":
            yield f"{package.name}.{path.stem}", path


def imported(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in the module `name`, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # level 1 is the package that holds the module; for an __init__ too, whose name ends in .__init__ here
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                target = str(node.args[0].value)
                up = len(target) - len(target.lstrip("."))
                package = name.split(".")[:-up] if up else []
                yield node.lineno, ".".join([*package, target.lstrip(".")])


def complaint(owner: str, name: str) -> str | None:
    """Why the module `owner` ("kernels", "dit", ...) may not import `name`, or None."""
    top, _, rest = name.partition(".")
    if top in ("bench", "tests", "conftest", "kernels"):
        return "nothing imports bench and tests, and kernels is wan_fast.kernels"
    if top != "wan_fast":
        return None if top in OUTSIDE.get(owner, {top}) else f"{owner} is kept free of {top}"
    target = rest.split(".")[0]
    if target == "_cuda":
        return None if owner in ("kernels", "doctor") else "kernels use it, doctor describes it, nothing else"
    if target == owner:
        return None
    # `from wan_fast import Engine` reads the package itself
    level = LEVEL.get(target, LEVEL["__init__"])
    return None if level < LEVEL[owner] else f"level {LEVEL[owner]} may not import level {level}"


def owner_of(name: str) -> str:
    """The row of the table for a dotted name: wan_fast.encoders.text -> encoders."""
    return name.split(".")[1]


def test_every_module_is_in_the_table() -> None:
    missing = sorted({owner_of(name) for name, _ in files()} - set(LEVEL))
    assert not missing, f"give these modules a level in test_layering.py: {', '.join(missing)}"


def test_imports_point_downwards() -> None:
    wrong = []
    for name, path in files():
        for line, target in imported(ast.parse(path.read_text()), name):
            if owner_of(name) in LEVEL and (reason := complaint(owner_of(name), target)):
                wrong.append(f"{name}:{line} imports {target}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "code", "allowed"),
    [
        ("wan_fast.dit", "from wan_fast.attention import sdpa", True),
        ("wan_fast.dit", "from . import kernels", True),
        ("wan_fast.dit", "from .kernels import adaln", True),
        ("wan_fast.dit", "from .engine import Engine", False),
        ("wan_fast.dit", "from . import engine", False),
        ("wan_fast.dit", "from wan_fast import Engine", False),
        ("wan_fast.dit", "def f():\n    import wan_fast.engine", False),
        ("wan_fast.vae", "from .blocks import Block", False),
        ("wan_fast.dit", "import bench.timer", False),
        ("wan_fast.dit", "import kernels", False),
        ("wan_fast.dit", "import wan_fast._cuda", False),
        ("wan_fast.encoders.text", "from .clip import CLIP", True),
        ("wan_fast.encoders.text", "from ..kernels import adaln", True),
        ("wan_fast.encoders.__init__", "from .text import T5", True),
        ("wan_fast.encoders.text", "from ..engine import Engine", False),
        ("wan_fast.config", "import dataclasses", True),
        ("wan_fast.config", "import torch", False),
        ("wan_fast.config", "from .tasks import TASKS", True),
        ("wan_fast.tasks", "from .config import Request", False),
        ("wan_fast.steps", "from wan_fast.tasks import TASKS", True),
        ("wan_fast.steps", "import numpy", False),
        ("wan_fast.kernels._op", "import torch.library", True),
        ("wan_fast.kernels._op", "importlib.import_module('wan_fast._cuda')", True),
        ("wan_fast.kernels._op", "importlib.import_module('..config')", False),
        ("wan_fast.kernels.adaln", "from ._op import register", True),
        ("wan_fast.kernels.adaln", "import numpy", False),
        ("wan_fast.__main__", "from wan_fast.cli import main", True),
        ("wan_fast.server", "from wan_fast.cli import main", False),
    ],
)
def test_the_rule_itself(name: str, code: str, allowed: bool) -> None:
    targets = [target for _, target in imported(ast.parse(code), name)]
    assert targets
    assert all(complaint(owner_of(name), target) is None for target in targets) is allowed
