"""Prints the table of arms below pytest-benchmark's own."""

from __future__ import annotations

import pytest

from bench import report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.SEEN:
        terminalreporter.section("arms of each case, in one run")
        for line in report.text_table(report.SEEN):
            terminalreporter.write_line(line)
