"""Where what is kept from run to run lies. Standard library only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """The project's folder in XDG_CACHE_HOME, else in ~/.cache; a user without a home, as in some containers, has it among the
    temporary files, under their number."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"wan-fast-{os.getuid()}"
    return home / "wan-fast"
