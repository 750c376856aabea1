"""Says what was played and how long it took, also when all went well."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    if played:
        terminalreporter.write_sep("-", "chaos")
    for report in played:
        facts = "; ".join(f"{name}: {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"[{report.nodeid.partition('[')[2]} in {report.duration:.0f} s; {facts}")
