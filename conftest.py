"""The --benchmark option: `pytest` runs the tests and skips bench/, `pytest --benchmark` runs bench/ alone."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
BENCH = ROOT / "bench"


def import_package(name: str) -> None:
    """Make it importable without the repository root on sys.path, where wan_fast would hide the installed one."""
    spec = spec_from_file_location(name, ROOT / name / "__init__.py", submodule_search_locations=[str(ROOT / name)])
    assert spec and spec.loader
    sys.modules[name] = package = module_from_spec(spec)
    spec.loader.exec_module(package)


for name in ("bench", "tools"):
    if name not in sys.modules:
        import_package(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks of bench/, and nothing else unless paths are given"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    benches = [item for item in items if BENCH in item.path.parents]
    if not config.getoption("--benchmark"):
        for item in benches:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))
    elif config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.hook.pytest_deselected(items=[item for item in items if item not in benches])
        items[:] = benches
