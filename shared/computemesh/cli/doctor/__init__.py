"""``doctor``: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click
from rich.text import Text

from computemesh.cli import common
from computemesh.cli.common import one_line, out, print_json
from computemesh.cli.doctor.checks import examine
from computemesh.cli.doctor.gather import gather
from computemesh.findings import Finding, Level
from computemesh.paths import home

EXIT_PROBLEM: Final = 1

COLOURS: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red", Level.SKIPPED: "dim"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Find out what is wrong and what to do about it.

    Looks at this machine, at what runs, at the bus and its store, at nodes and work, and into the logs. It
    changes nothing, and is of use whether a mesh runs or not; set NATS_URL to examine another one.

    Exit status: 0 when nothing is a problem, warnings or not; 1 otherwise.
    """
    findings = examine(common.run(gather(home())))
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    if as_json:
        problems, warnings = counts[Level.PROBLEM], counts[Level.WARNING]
        print_json({"ok": not problems, "problems": problems, "warnings": warnings, "findings": findings})
    else:
        _show(findings)
        out.print(_summary(counts))
    if counts[Level.PROBLEM]:
        common.bail(EXIT_PROBLEM)


def _show(findings: Sequence[Finding]) -> None:
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.level:8}", COLOURS[finding.level])
        line.append(f"  {one_line(finding.about):{width}}  {one_line(finding.text)}", "default")
        out.print(line)
        if finding.todo:
            out.print(Text(f"{'':8}  {'':{width}}  → {one_line(finding.todo)}", "bold"))


def _summary(counts: dict[Level, int]) -> Text:
    def some(count: int, word: str) -> str:
        return f"{count} {word}{'' if count == 1 else 's'}"

    if not counts[Level.PROBLEM] and not counts[Level.WARNING]:
        return Text("\nAll is well.", "bold green")
    colour = COLOURS[Level.PROBLEM] if counts[Level.PROBLEM] else COLOURS[Level.WARNING]
    return Text(f"\n{some(counts[Level.PROBLEM], 'problem')}, {some(counts[Level.WARNING], 'warning')}.", colour)
