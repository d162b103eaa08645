"""Benchmarks: one registry of cases, one timer, one report. `pytest --benchmark`, or `python -m bench.campaign`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# the accuracy rule and the operators' cases live with the tests
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
