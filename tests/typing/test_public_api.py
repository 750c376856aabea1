"""The public interface as users write it, checked by mypy and pyright, both strict.

The programs beside this file are never run. A line that must be refused says by which rules:
``# expect: arg-type reportArgumentType``, mypy's first. An error that is expected and does not come fails, and
so does one that is not expected.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

PROGRAMS: Final = Path(__file__).parent / "programs"

WAIT_S: Final = 300.0

Errors = set[tuple[str, int, str]]
"""File, line and rule of each."""

EXPECT: Final = re.compile(r"# expect: (.+)$")


def expected(*, pyright: bool) -> Errors:
    """What the comments of the programs ask of one checker."""
    return {
        (program.name, number, rule)
        for program in PROGRAMS.glob("*.py")
        for number, line in enumerate(program.read_text().splitlines(), start=1)
        if (found := EXPECT.search(line))
        for rule in found.group(1).split()
        if rule.startswith("report") == pyright
    }


def checked(checker: str, *options: str, folder: Path) -> str:
    """What a checker prints about the programs in *folder*, in which it finds errors."""
    done = subprocess.run(
        [sys.executable, "-m", checker, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def by_mypy(folder: Path) -> Errors:
    lines = checked("mypy", "--strict", "--output", "json", "--cache-dir", ".cache", ".", folder=folder).splitlines()
    errors = [error for error in map(json.loads, lines) if error["severity"] == "error"]
    return {(Path(error["file"]).name, error["line"], error["code"]) for error in errors}


def by_pyright(folder: Path) -> Errors:
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    report = json.loads(checked("pyright", "--outputjson", "--pythonpath", sys.executable, folder=folder))
    return {
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1, error.get("rule", error["message"]))
        for error in report["generalDiagnostics"]
    }


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_checker_refuses_what_is_wrong_and_nothing_else(checker: str, tmp_path: Path) -> None:
    """Handlers of other contracts, payloads of other subjects, executors of another shape."""
    pyright = checker == "pyright"
    programs = Path(shutil.copytree(PROGRAMS, tmp_path / "programs", ignore=shutil.ignore_patterns("__pycache__")))
    found = by_pyright(programs) if pyright else by_mypy(programs)
    wanted = expected(pyright=pyright)
    assert wanted, "no program expects an error"
    wrong = [f"{file}:{line}: {rule}, not expected" for file, line, rule in sorted(found - wanted)]
    wrong += [f"{file}:{line}: {rule} expected, but accepted" for file, line, rule in sorted(wanted - found)]
    assert not wrong, "\n".join(wrong)
