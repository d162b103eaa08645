"""The regression gate: has anything become slower? By measures that noise does not trip.

    python -m bench.gate NEW.json [--against OLD.json]

Times of two runs are never compared, only ratios to a rival within each run, on one machine and with the same versions of
everything but this engine: a case of at least three rounds has regressed where its best round now is more than a twentieth
below its worst round then. The host's own work per step is compared in instructions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import RESULTS, host_loop
from bench.results import newest, read

MARGIN = 1.05
# yardsticks per step: a tenth above what the plan needs with Python 3.11 (0.107), four tenths above what the loop needs
# (0.0117), in which loading a step and the solver's step are calls and not counted
HOST_LIMITS = {"plan": 0.118, "sampler": 0.0165}


def regressions(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[str]:
    """A line for every case and rival whose ratio has fallen.

    Raises:
        ValueError: the two cannot be compared.
    """
    for what, get in (("machine", _machine), ("versions", _versions)):
        if get(new) != get(old):
            raise ValueError(f"the runs are not of one {what}: {get(new)} and {get(old)}; measure both on one")
    for case, row in new["rows"].items():
        for name, arm in row["arms"].items():
            before = old["rows"].get(case, {"arms": {}})["arms"].get(name, {})
            if "ratio" not in arm or "ratio" not in before or min(arm["rounds"], before["rounds"]) < 3:
                continue
            if arm["ratio"]["high"] * MARGIN < before["ratio"]["low"]:
                now, then = arm["ratio"], before["ratio"]
                yield f"{case} against {name}: {_span(now)} now, {_span(then)} then"
    for case, row in old["rows"].items():
        absent = [name for name in row["arms"] if name not in new["rows"].get(case, {"arms": {}})["arms"]]
        if absent:
            yield f"{case}: {', '.join(absent)} measured then and not now: {new['notes'].get(case, 'no note says why')}"


def host_regressions() -> Iterator[str]:
    """A line for every part of the host's loop that needs more instructions than it may."""
    for kind, count in host_loop.per_step().items():
        if kind in HOST_LIMITS and count > HOST_LIMITS[kind]:
            yield f"host loop, {kind}: {count:.3f} yardsticks per step, at most {HOST_LIMITS[kind]} are allowed"


def _span(ratio: Mapping[str, float]) -> str:
    return f"{ratio['low']:.2f} to {ratio['high']:.2f}"


def _machine(data: Mapping[str, Any]) -> Any:
    return data["machine"]["device"]


def _versions(data: Mapping[str, Any]) -> Any:
    return {name: number for name, number in data["versions"].items() if name != "wan-fast"}


def main() -> int:
    """0: nothing is slower; 1: something is; 2: the request cannot be carried out."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("new", type=Path, metavar="NEW.json", help="what python -m bench.campaign wrote")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="default: the newest in bench/results of that machine")
    parsed = parser.parse_args()
    try:
        new = read(parsed.new)
        old = read(parsed.against) if parsed.against else _recorded(new, parsed.new)
        found = list(regressions(new, old))
    except ValueError as error:
        print(f"bench.gate: error: {error}", file=sys.stderr)
        return 2
    try:
        found += host_regressions()
    except RuntimeError as error:
        print(f"the host's loop is not counted: {error}", file=sys.stderr)
    print("\n".join(found) or "nothing has become slower")
    return 1 if found else 0


def _recorded(new: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The newest results of the machine, other than those in `path`."""
    for _, data in newest(RESULTS, but=path):
        if _machine(data) == _machine(new):
            return data
    raise ValueError(f"bench/results has nothing of {_machine(new)} to compare with; give --against")


if __name__ == "__main__":
    sys.exit(main())
