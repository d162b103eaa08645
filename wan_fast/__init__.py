"""wan-fast: Wan 2.1 and 2.2 video generation. Names load on first use, so that `wan_fast.config` never imports torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_fast.config import EngineConfig, Request, WanFastError
    from wan_fast.engine import Engine, Video
    from wan_fast.planning import Plan, plan

__version__ = "0.1.0"
__all__ = ["Engine", "EngineConfig", "Plan", "Request", "Video", "WanFastError", "plan"]

_HOME = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Plan": "planning",
    "Request": "config",
    "Video": "engine",
    "WanFastError": "config",
    "plan": "planning",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wan_fast' has no attribute {name!r}")
    return getattr(import_module(f"wan_fast.{_HOME[name]}"), name)
