"""Says what was played and how long it took, also when all went well."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    if played:
        terminalreporter.write_sep("-", "chaos")
    for report in played:
        facts = "; ".join(f"{name}: {value}" for name, value in report.user_properties)
        name = report.nodeid.rpartition("::")[2]
        terminalreporter.write_line(f"{name.partition('[')[2].rstrip(']') or name} in {report.duration:.0f} s; {facts}")
