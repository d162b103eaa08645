"""Logs of other engines -> the table of `peers.md`: seconds by stage and peak memory, as each of them reports it.

    python -m bench.peers lightx2v=run.log fastvideo=other.log

A log may hold several runs in one process, separated by lines "### RUN name"; the last one is reported, so that the
first can warm up. A figure that an engine does not print is "not measured".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from bench.report import NOT_MEASURED, seconds

COLUMNS = ("text", "denoise", "decode", "total", "peak")


def _last(values: list[float]) -> float:
    return values[-1]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number in a log: the pattern whose first group it is, its unit in seconds or GiB, and what to do with several."""

    pattern: str
    unit: float = 1.0
    several: Callable[[list[float]], float] = _last


# the wording of each engine's own log statements, as `peers.md` cites them
PEERS: Mapping[str, Mapping[str, Figure]] = {
    "lightx2v": {
        "text": Figure(r"Run Text Encoder cost ([\d.]+) seconds"),
        "denoise": Figure(r"Run Dit every step cost ([\d.]+) seconds", several=sum),
        "decode": Figure(r"Run VAE Decoder cost ([\d.]+) seconds"),
        "total": Figure(r"RUN pipeline cost ([\d.]+) seconds"),
        "peak": Figure(r"Peak Memory: ([\d.]+) GB", several=max),
    },
    "fastvideo": {
        "text": Figure(r"TextEncodingStage\] Execution completed in ([\d.eE+-]+) ms", 1e-3),
        "denoise": Figure(r"DenoisingStage\] Execution completed in ([\d.eE+-]+) ms", 1e-3),
        "decode": Figure(r"[|\[]DecodingStage\] Execution completed in ([\d.eE+-]+) ms", 1e-3),
        "total": Figure(r"Generated successfully in ([\d.]+) seconds"),
        "peak": Figure(r"peak_mb=([\d.]+)", 2**-10, several=max),
    },
    "sglang": {
        "text": Figure(r"\[TextEncodingStage\] finished in ([\d.]+) seconds"),
        "denoise": Figure(r"\[DenoisingStage\] finished in ([\d.]+) seconds"),
        "decode": Figure(r"\[DecodingStage\] finished in ([\d.]+) seconds"),
        "total": Figure(r"Warmed-up request processed in ([\d.]+) seconds"),
        "peak": Figure(r"Memory usage - Max peak: ([\d.]+) MB", 2**-10, several=max),
    },
    "turbodiffusion": {
        "text": Figure(r"text_s=([\d.]+)"),
        "denoise": Figure(r"dit_s=([\d.]+)"),
        "decode": Figure(r"vae_s=([\d.]+)"),
        "total": Figure(r"total_s=([\d.]+)"),
        "peak": Figure(r"peak_mb=([\d.]+)", 2**-10, several=max),
    },
    "wan-fast": {
        "text": Figure(r"done .*prepare ([\d.]+) s"),
        "denoise": Figure(r"done .*denoise ([\d.]+) s"),
        "decode": Figure(r"done .*decode ([\d.]+) s"),
        "peak": Figure(r"done .*peak ([\d.]+) GiB", several=max),
    },
}


def parse(peer: str, log: str) -> dict[str, float]:
    """The figures of the last run in a log, in seconds and GiB; what it does not have is left out.

    Raises:
        ValueError: no such peer is known, or the log has none of its figures.
    """
    if peer not in PEERS:
        raise _unknown(peer)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log).replace("\r", "\n")
    last = re.split(r"^### RUN\b.*$", plain, flags=re.MULTILINE)[-1]
    found = {}
    for column, figure in PEERS[peer].items():
        if values := [float(value) * figure.unit for value in re.findall(figure.pattern, last)]:
            found[column] = figure.several(values)
    if not found:
        raise ValueError(f"the log has no line of {peer} that carries a time; bench/peers.md says how to get them")
    return found


def _unknown(peer: str) -> ValueError:
    close = get_close_matches(peer.lower(), PEERS, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ValueError(f"no peer is called {peer!r}; {hint}known are {' '.join(PEERS)}")


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line per engine, in the format of the other tables."""
    lines = ["| engine | text | denoise | decode | total as it reports it | peak |", "| --- " * 6 + "|"]
    for name, figures in rows.items():
        cells = [
            NOT_MEASURED
            if column not in figures
            else f"{figures[column]:.2f} GiB"
            if column == "peak"
            else seconds(figures[column])
            for column in COLUMNS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("logs", nargs="+", metavar="PEER=LOG", help=f"PEER is one of {' '.join(PEERS)}")
    rows = {}
    try:
        for argument in parser.parse_args().logs:
            peer, equals, path = argument.partition("=")
            if not equals:
                raise ValueError(f"expected PEER=LOG, got {argument!r}; for example lightx2v=run.log")
            if peer in rows:
                raise ValueError(f"{peer} is given twice; put the runs into one log, or make two tables")
            if peer not in PEERS:
                raise _unknown(peer)
            rows[peer] = parse(peer, Path(path).read_text(encoding="utf-8", errors="replace"))
    except (ValueError, OSError) as error:
        print(f"bench.peers: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
