"""Says which seeds were played, also when all went well."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played = [
        f"{report.nodeid.rpartition('[')[2].rstrip(']')} ({report.duration:.0f} s; {dict(report.user_properties)})"
        for report in terminalreporter.getreports("passed")
        if "whatever_is_killed_stopped_and_restarted[" in report.nodeid and report.when == "call"
    ]
    if played:
        terminalreporter.write_sep("-", "chaos")
        terminalreporter.write_line("seeds played: " + ", ".join(played))
