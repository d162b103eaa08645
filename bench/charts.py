"""The charts of the results. Each PNG carries a digest of the numbers it was drawn from, by which a test holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from bench.registry import OURS

TITLES = {
    "latency": "seconds by stage of a whole run, in its last round",
    "roofline": "operations per second against operations per byte, under the measured roofs",
    "ablation": "what each habit of the official step costs",
}
# a validated palette of hues that colour-blind readers can tell apart
_BLUE, _ORANGE, _GREEN, _GREY = "#2a78b5", "#e08214", "#3a9a5b", "#8a8a8a"
_PURPLE, _PINK = "#9467bd", "#c23b80"
# of quality, what its rows are: colour and style; those without a line are no sweep of one number
_CURVES = {
    "magcache": (_BLUE, "o-"),
    "teacache": (_ORANGE, "s-"),
    "teacache-ret": (_ORANGE, "<:"),
    "searched": (_PURPLE, "^-"),
    "every": (_GREEN, "D-"),
    "CFG cache": (_PINK, "P"),
    "step and CFG cache": (_PINK, "X"),
    "presets": ("black", "*"),
    "presets in 8 bits": ("black", "1"),
    "no cache, fewer steps": (_GREY, ".--"),
}

Found = list[tuple[str, Mapping[str, Any]]]


def data(name: str, found: Found) -> dict[str, Any]:
    """The numbers of a chart, by machine and case; empty where nothing was measured."""
    return {
        f"{results['machine']['device']}: {row['case']}" if name != "roofline" else results["machine"]["device"]: numbers
        for _, results in found
        for row, numbers in _numbers(name, results)
    }


def _numbers(name: str, results: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Any]]:
    rows = results["rows"].values()
    if name == "latency":
        stages = [(row, {n: arm["stages"] for n, arm in row["arms"].items() if "stages" in arm}) for row in rows]
        return [(row, numbers) for row, numbers in stages if numbers]
    if name == "ablation":
        recipes = [row for row in rows if row["case"].startswith("recipe/")]
        return [(row, {n: arm["seconds"] for n, arm in row["arms"].items()}) for row in recipes]
    points = {
        row["case"]: [row["flops"] / row["bytes"], row["flops"] / row["arms"][OURS]["seconds"]]
        for row in rows
        if row["flops"] and row["bytes"] and not row["case"].startswith("recipe/")
    }
    used = {"copy", *(row["rate"] for row in rows if row["case"] in points)}
    lines = {name: rate for name, rate in results["roofs"].items() if name in used}
    return [({}, {"roofs": lines, "points": points})] if points and "copy" in lines else []


def digest(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def differences(folder: Path, found: Found) -> list[str]:
    """The charts that were not drawn from these results, and those that should not be there."""
    from PIL import Image

    wrong = []
    for name in TITLES:
        numbers, path = data(name, found), folder / f"{name}.png"
        if numbers and path.exists():
            with Image.open(path) as image:
                if image.info.get("data") != digest(numbers):
                    wrong.append(name)
        elif bool(numbers) != path.exists():
            wrong.append(name)
    return wrong


def write(folder: Path, found: Found) -> None:
    """Draw the charts that disagree; delete those that nothing was measured for."""
    for name in differences(folder, found):
        path, numbers = folder / f"{name}.png", data(name, found)
        if not numbers:
            path.unlink()
            continue
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        folder.mkdir(parents=True, exist_ok=True)
        figure, axes = pyplot.subplots(len(numbers), 1, figsize=(9, 0.6 + _HEIGHT[name] * len(numbers)), squeeze=False)
        for axis, (title, values) in zip(axes[:, 0], numbers.items(), strict=True):
            axis.set_title(title, fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            _DRAW[name](axis, values)
        figure.tight_layout()
        figure.savefig(path, dpi=110, metadata={"data": digest(numbers), "Software": None})
        pyplot.close(figure)


def _latency(axis: Any, arms: Mapping[str, Mapping[str, float]]) -> None:
    names = list(arms)[::-1]
    left = [0.0] * len(names)
    for stage, colour in zip(("prepare", "denoise", "decode"), (_GREEN, _BLUE, _ORANGE), strict=True):
        values = [arms[name].get(stage, 0.0) for name in names]
        axis.barh(names, values, left=left, color=colour, label=stage, height=0.6, edgecolor="white", linewidth=1)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for name, total in zip(names, left, strict=True):
        axis.text(total, name, f" {total:.2f} s", va="center", fontsize=8)
    axis.set_xlabel("seconds", fontsize=8)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower right")


def _ablation(axis: Any, arms: Mapping[str, float]) -> None:
    names = list(arms)[::-1]
    base = next((arms[name] for name in names if "none of them" in name), arms[OURS])
    values = [arms[name] / base for name in names]
    axis.barh(names, values, color=[_BLUE if name == OURS else _GREY for name in names], height=0.6)
    for name, value in zip(names, values, strict=True):
        axis.text(value, name, f" {value:.2f}x, {1e3 * arms[name]:.3g} ms", va="center", fontsize=8)
    axis.set_xlim(0, 1.25 * max(values))
    axis.set_xlabel("time of a forward, unfused and without these habits = 1", fontsize=8)


def _roofline(axis: Any, numbers: Mapping[str, Any]) -> None:
    roofs, points = numbers["roofs"], numbers["points"]
    intensities = [x for x, _ in points.values()]
    ridges = {kind: rate / roofs["copy"] for kind, rate in roofs.items() if kind != "copy"}
    span = [min(*intensities, *ridges.values()) / 4, 3 * max(*intensities, *ridges.values())]
    for kind, ridge in ridges.items():
        xs = [span[0], ridge, span[1]]
        axis.plot(xs, [min(x * roofs["copy"], roofs[kind]) for x in xs], color=_GREY, linewidth=1)
        axis.text(span[1], roofs[kind], f" {kind}", fontsize=8, va="center", color=_GREY)
    groups = sorted({case.partition("/")[0] for case in points})
    for group, colour, mark in zip(groups, (_BLUE, _ORANGE, _GREEN, "black") * 3, "osD^vPX*<>dp", strict=False):
        own = [value for case, value in points.items() if case.partition("/")[0] == group]
        axis.scatter(*zip(*own, strict=True), s=26, color=colour, marker=mark, label=group)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move", fontsize=8)
    axis.set_ylabel("operations / s", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def quality(path: Path, found: Mapping[str, Any]) -> None:
    """Draw what bench.quality found, by number of steps: curves of [passes, PSNR], and errors by step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(len(found), 2, figsize=(12, 4.2 * len(found)), squeeze=False)
    for (left, right), (steps, numbers) in zip(axes, found.items(), strict=True):
        left.set_title(f"{steps} steps: PSNR of the frames against the full run, dB", fontsize=9, loc="left")
        left.set_xlabel("passes through the blocks", fontsize=8)
        for name, (colour, style) in _CURVES.items():
            if points := numbers["curves"].get(name):
                left.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5, linewidth=1)
        right.set_title(f"{steps} steps: error of the velocity at the full run's latents", fontsize=9, loc="left")
        right.set_xlabel("step; those computed as in the full run have no error", fontsize=8)
        right.set_xlim(-0.5, int(steps) - 0.5)
        _errors(right, numbers["errors"])
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"data": digest(found), "Software": None})
    pyplot.close(figure)


def _errors(axis: Any, runs: Mapping[str, list[float]]) -> None:
    some = [error for errors in runs.values() for error in errors if error]
    if not some:
        return
    for (name, errors), colour, mark in zip(runs.items(), (_BLUE, _ORANGE, _GREEN, _PURPLE, "black"), "osD^v", strict=False):
        points = [(step, error) for step, error in enumerate(errors) if error]
        axis.plot(*zip(*points, strict=True), f"{mark}:", color=colour, label=name, markersize=5, linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(10 ** floor(log10(min(some))), 10 ** ceil(log10(max(some))))
    axis.yaxis.set_major_formatter("{x:g}")


_DRAW: Mapping[str, Any] = {"latency": _latency, "ablation": _ablation, "roofline": _roofline}
_HEIGHT = {"latency": 1.6, "ablation": 1.9, "roofline": 3.6}
