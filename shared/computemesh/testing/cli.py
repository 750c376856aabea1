"""The command line as a person or a script uses it: commands as processes, with a home of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

LEFT_OUT: Final = ("NATS_URL", "COMPUTEMESH_NATS_URL", "COMPUTEMESH_HOME", "COMPUTEMESH_TOKEN", "COLUMNS", "LINES")

WAIT_S: Final = 30.0


def until(condition: Callable[[], Any], what: str) -> None:
    """Waits for a condition, as :func:`computemesh.testing.until` does where there is no event loop."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.02)


class Cli:
    """Runs commands with one home. No engine is needed: it names models that are nowhere."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def environment(self, **changes: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        return {**inherited, "COMPUTEMESH_HOME": str(self.home), "COMPUTEMESH_MODELS": "/nowhere", **changes}

    def run(self, *words: str, stdin: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "computemesh.cli", *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=90,
            env=self.environment(**changes),
            check=False,
        )

    def ok(self, *words: str, stdin: str = "", **changes: str) -> str:
        """What a command that must go well prints."""
        done = self.run(*words, stdin=stdin, **changes)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def json(self, *words: str, stdin: str = "", **changes: str) -> Any:
        """What it prints for programs: one JSON document."""
        return json.loads(self.ok(*words, "--json", stdin=stdin, **changes))

    def refuses(self, status: int, *words: str, stdin: str = "", **changes: str) -> dict[str, str]:
        """What a command that must fail tells programs: one JSON object on standard error."""
        done = self.run(*words, "--json", stdin=stdin, **changes)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stdout == ""
        told: dict[str, str] = json.loads(done.stderr)
        assert set(told) == {"error", "field", "code", "hint", "trace_id"}
        return told

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        """One command that goes on; the caller ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "computemesh.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**changes),
        )

    def fails(self, status: int, *words: str, stdin: str = "", **changes: str) -> str:
        """The one line that a command which must fail says."""
        done = self.run(*words, stdin=stdin, **changes)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        return done.stderr.strip()

    def up(self, **changes: str) -> str:
        return self.ok("up", "--detach", "--ports", "any", "--nats-port", "0", "--no-demo", **changes)

    def processes(self) -> list[psutil.Process]:
        """Every process that has this home in its environment or on its command line."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        home = str(self.home)
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            return any(home in word for word in [*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            return False

    def end(self) -> None:
        """Ends whatever a test left."""
        if self.home.exists():
            self.run("down")
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
