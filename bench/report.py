"""Rows that benches leave for the table at the end of the run."""

from __future__ import annotations

ROWS: list[dict] = []


def table() -> list[str]:
    """The rows as lines of text; ratio > 1 means that this engine is the faster one."""
    lines = [f"{'case':56s} {'ours ms':>10s} {'diffusers':>10s} {'ratio':>6s}  (low - high of the rounds)"]
    for row in ROWS:
        lines.append(
            f"{row['case']:56s} {row['ours_ms']:10.1f} {row['diffusers_ms']:10.1f} {row['ratio']:6.2f}"
            f"  ({row['ratio_low']:.2f} - {row['ratio_high']:.2f})"
        )
    return lines
