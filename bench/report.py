"""Tables and charts from the results: README's, and those of bench/results.

    python -m bench.report            write them
    python -m bench.report --check    say whether they agree with the results

Of every machine the newest file alone is shown. A cell without a measurement says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench import charts as drawn
from bench.cases import CASES
from bench.registry import OURS, Case
from bench.results import newest

NOT_MEASURED = "not measured"
BEGIN, END = "<!-- numbers: written by python -m bench.report -->", "<!-- numbers: end -->"

# rows of this process, for the table that `pytest --benchmark` prints
SEEN: list[dict[str, Any]] = []

Machine = tuple[str, Mapping[str, Any]]


def machines(folder: Path = RESULTS) -> list[Machine]:
    """(name relative to the folder, results) of every machine."""
    return [(path.relative_to(folder).as_posix(), data) for path, data in newest(folder)]


# --- text ---------------------------------------------------------------------------------------------------------------


def text_table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as lines for a terminal; a ratio above 1 means that this engine is the faster one."""
    yield f"{'case':52s} {'arm':44s} {'time':>10s} {'% roof':>7s} {'peak':>12s}  wan-fast is faster by"
    for row in rows:
        for name, arm in row["arms"].items():
            numbers = f"{seconds(arm['seconds']):>10s} {share(arm):>7s} {amount(arm['peak_bytes']):>12s}  {_ratio(arm)}"
            yield f"{row['case'][:52]:52s} {name[:44]:44s} {numbers}".rstrip()
        for name, why in row["skipped"].items():
            yield f"{row['case'][:52]:52s} {name[:44]:44s} skipped: {why}"


def facts_line(facts: Mapping[str, Any]) -> str:
    """Machine, versions and commit in one line."""
    said = {**facts["machine"], **facts["versions"], "commit": facts["commit"]}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def amount(count: float | None) -> str:
    if count is None:
        return NOT_MEASURED
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def share(arm: Mapping[str, Any]) -> str:
    return f"{100 * arm['of_roof']:.0f} %" if "of_roof" in arm else "-"


def _ratio(arm: Mapping[str, Any]) -> str:
    if "ratio" not in arm:
        return ""
    ratio = arm["ratio"]
    if arm["rounds"] == 1:
        return f"{ratio['median']:.2f}x (one round)"
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


# --- README -------------------------------------------------------------------------------------------------------------


def readme_block(found: list[Machine], cases: Iterable[Case] = CASES) -> str:
    """The headline cases on every machine measured, and on a GPU where none was."""
    lines = [
        "| work | on | wan-fast | rival in the same run | wan-fast is faster by | % of roof | working memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("cuda", "cpu"):
        ours = [data for _, data in found if _kind(data) == kind]
        for case in cases:
            if case.headline and case.device == kind:
                lines += [_headline(case, data) for data in ours] or [_headline(case, None)]
    lines += ["", _legend(found), ""]
    lines += [f"![{title}](bench/results/charts/{name}.png)" for name, title in drawn.TITLES.items() if drawn.data(name, found)]
    return "\n".join([BEGIN, *lines, END])


def _headline(case: Case, data: Mapping[str, Any] | None) -> str:
    where = data["machine"]["device"] if data else {"cuda": "a GPU", "cpu": "a CPU"}[case.device]
    row = data["rows"].get(case.name) if data else None
    cells = [NOT_MEASURED] * 5
    if row:
        ours = row["arms"][OURS]
        cells = [seconds(ours["seconds"]), NOT_MEASURED, NOT_MEASURED, share(ours), amount(ours["peak_bytes"])]
        rivals = [name for name in row["arms"] if name != OURS]
        if rivals:
            name = "diffusers" if "diffusers" in rivals else rivals[0]
            cells[1:3] = f"{seconds(row['arms'][name]['seconds'])} ({name})", _ratio(row["arms"][name])
    return "| " + " | ".join([f"`{case.name}`", where, *cells]) + " |"


def _legend(found: list[Machine]) -> str:
    if not found:
        return "Nothing has been measured yet."
    said = [
        "Times are medians of rounds in which all arms run in turn, A B B A; in brackets the lowest and highest round.",
        "The roof is the machine's own, from the same run: its copy, or its matrix product in the precision of the work.",
        "It can be passed where an algorithm needs fewer operations than the plain one: a Winograd convolution does.",
        "All arms, and what the machines are: [bench/results](bench/results/README.md).",
    ]
    return "\n".join(said)


def _kind(data: Mapping[str, Any]) -> str:
    return "cuda" if "driver" in data["machine"] else "cpu"


# --- bench/results/README.md --------------------------------------------------------------------------------------------


def full_page(found: list[Machine]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m bench.report` from the newest file of each machine; `CONTRIBUTING.md` says how to measure.",
        "",
    ]
    for name, data in found:
        lines += [
            f"## {data['machine']['device']}",
            "",
            f"From `{name}`: commit {data['commit']}, sources {data['sources']}.",
            "",
        ]
        lines += [f"- {key}: {value}" for key, value in {**data["machine"], **data["versions"]}.items()]
        lines += ["", f"Roofs: {_roofs(data['roofs'])}.", ""]
        lines += [
            "| case | arm | time | low to high | rounds | % of roof | working memory | wan-fast is faster by |",
            "| --- " * 8 + "|",
        ]
        for row in data["rows"].values():
            lines += [_full_row(row["case"], arm, values) for arm, values in row["arms"].items()]
            lines += [f"| `{row['case']}` | {arm} | {NOT_MEASURED}: {why} | | | | | |" for arm, why in row["skipped"].items()]
        absent = [case.name for case in CASES if case.device == _kind(data) and case.name not in data["rows"]]
        lines += [f"| `{case}` | {OURS} | {NOT_MEASURED} | | | | | |" for case in absent]
        for section, title in (("accuracy", "The accuracy rule"), ("notes", "Notes")):
            if data[section]:
                lines += ["", f"{title}:", "", *[f"- {key}: {value}" for key, value in data[section].items()]]
        if data["tiles"]:
            lines += ["", "| tiles of | in use | time | best | time |", "| --- " * 5 + "|"]
            for key, tiles in data["tiles"].items():
                pair = [f"{t['tiles']} | {seconds(t['seconds'])}" for t in (tiles["current"], tiles["best"])]
                lines.append(f"| `{key}` | {' | '.join(pair)} |")
        lines.append("")
    return "\n".join(lines) if found else "\n".join([*lines, "Nothing has been measured yet.", ""])


def _full_row(case: str, name: str, arm: Mapping[str, Any]) -> str:
    spread = f"{seconds(arm['low'])} to {seconds(arm['high'])}"
    graphed = " (graph)" if arm["graphed"] else ""
    cells = [
        f"`{case}`",
        name + graphed,
        seconds(arm["seconds"]),
        spread,
        str(arm["rounds"]),
        share(arm),
        amount(arm["peak_bytes"]),
        _ratio(arm),
    ]
    return "| " + " | ".join(cells) + " |"


def _roofs(roofs: Mapping[str, float]) -> str:
    said = [f"{'copy' if k == 'copy' else f'{k} product'} {_rate(k, v)}" for k, v in roofs.items()]
    return ", ".join(said) or NOT_MEASURED


def _rate(name: str, value: float) -> str:
    return f"{value / 1e9:.4g} GB/s" if name == "copy" else f"{value / 1e12:.3g} TFLOP/s"


# --- writing and checking -----------------------------------------------------------------------------------------------


def rendered(readme: str, found: list[Machine]) -> str:
    """README's text with the block as the results have it.

    Raises:
        ValueError: the marks of the block are not there.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has lost the lines {BEGIN!r} and {END!r}, between which the numbers stand")
    return head + readme_block(found) + tail


def differences(root: Path = ROOT) -> list[str]:
    """The generated files that do not agree with the results."""
    folder = root / "bench" / "results"
    found, readme, page = machines(folder), root / "README.md", folder / "README.md"
    wrong = [] if rendered(text := readme.read_text(encoding="utf-8"), found) == text else ["README.md"]
    if not page.exists() or page.read_text(encoding="utf-8") != full_page(found):
        wrong.append("bench/results/README.md")
    return wrong + [f"bench/results/charts/{name}.png" for name in drawn.differences(folder / "charts", found)]


def write(root: Path = ROOT) -> list[str]:
    """Write what disagrees; returns its names."""
    folder = root / "bench" / "results"
    found, readme, wrong = machines(folder), root / "README.md", differences(root)
    readme.write_text(rendered(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(full_page(found), encoding="utf-8")
    drawn.write(folder / "charts", found)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and charts from bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something disagrees")
    try:
        wrong = differences() if (check := parser.parse_args().check) else write()
    except ValueError as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    for name in wrong:
        print(f"{name} {'does not agree with bench/results; run python -m bench.report' if check else 'written'}")
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
