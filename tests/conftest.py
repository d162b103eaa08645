"""Starts the background work that the collected tests need, and puts these tests last."""

from __future__ import annotations

import os

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
