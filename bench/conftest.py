"""Prints the table of arms below pytest-benchmark's own."""

from __future__ import annotations

import pytest
import torch

from bench import report
from bench.results import describe_run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.SEEN:
        terminalreporter.section("arms of each case, in one run")
        facts = describe_run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for line in (report.facts_line(facts), *report.text_table(report.SEEN)):
            terminalreporter.write_line(line)
