"""Prints the table of ratios below pytest-benchmark's own."""

from __future__ import annotations

import pytest
import report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.ROWS:
        terminalreporter.section("this engine against diffusers, in one run")
        for line in report.table():
            terminalreporter.write_line(line)
