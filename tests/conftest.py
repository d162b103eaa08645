"""Starts the background work that the collected tests need, and puts these tests last."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from background import Background

_KEY = pytest.StashKey[Background]()


def _tasks_of(item: pytest.Item) -> list[str]:
    return [mark.args[0] for mark in item.iter_markers("background")]


def pytest_configure(config: pytest.Config) -> None:
    # what the user has calibrated, say, is nothing to the tests
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("user-cache"))  # type: ignore[union-attr]
    config.stash[_KEY] = Background()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # sorted() is stable
    items[:] = sorted(items, key=lambda item: bool(_tasks_of(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        session.config.stash[_KEY].start(name for item in session.items for name in _tasks_of(item))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_KEY].stop()


@pytest.fixture(scope="session")
def background(pytestconfig: pytest.Config) -> Background:
    return pytestconfig.stash[_KEY]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretend to have a GPU of so many GiB; a plan must need no more of it than its description."""
    from wan_fast import setup
    from wan_fast.device import Device
    from wan_fast.memory import GIB

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("wan_fast.kernels.backend", lambda *args: "triton")
    monkeypatch.setattr("wan_fast.kernels.why_no_extension", lambda device: "not built")

    def pretend(gib: int, model: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0)) -> None:
        device = Device(name="cuda:0", model=model, memory=gib * GIB, free=gib * GIB, capability=capability)
        monkeypatch.setattr(setup, "describe", lambda name: device)

    return pretend
