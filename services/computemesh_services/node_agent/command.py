"""Runs a program: work of type ``command``.

Offered only where ``COMPUTEMESH_ALLOW_COMMANDS`` is set, since a program may do whatever the user may that the agent
runs as. It runs in the executor's process group, so cancelling reaches it and whatever it starts.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Final

from msgspec import Meta

from computemesh.contracts.base import Message
from computemesh.executors import ExecutionError, Executor, Progress, Task
from computemesh.process import exit_text

TAIL_BYTES: Final = 4096
"""How much of the end of the output is in the result; all of it is in the log."""

LEFT_OVER_S: Final = 0.1
"""How often to look whether the program has ended while something else holds its output open."""

_READ_BYTES: Final = 64 * 1024
_PROGRESS: Final = re.compile(rb"::progress +(\d*\.?\d+) *(.*)")

_Text = Annotated[str, Meta(pattern=r"^[^\x00]*$")]
_Name = Annotated[str, Meta(pattern=r"^[^=\x00]+$")]


class CommandPayload(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an item of type ``command`` asks."""

    argv: Annotated[list[_Text], Meta(min_length=1, max_length=10_000)]
    """The program and its arguments, each as it is: no shell looks at them."""
    env: Annotated[dict[_Name, _Text], Meta(max_length=1000)] = {}
    """Variables beside those that the agent has."""
    cwd: _Text = ""
    """Folder to run it in, below the item's own folder, which is the default. Made when absent."""
    stdin: str = ""


class CommandExecutor(Executor):
    """Runs ``command`` items. An exit status other than 0 is a failure."""

    def run(self, task: Task, out_dir: Path, progress: Progress) -> dict[str, Any]:
        asked = task.payload_as(CommandPayload)
        folder = _folder(out_dir, asked.cwd)
        # The whole group gets SIGTERM: this process waits for what the program makes of it, until SIGKILL.
        signal.signal(signal.SIGTERM, _note_nothing)
        environment = {**os.environ, "COMPUTEMESH_WORK_ID": task.work_id, "COMPUTEMESH_ATTEMPT": str(task.attempt)}
        output = Output(progress)
        started_at = time.monotonic()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(asked.stdin.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            status = _run(asked, folder, {**environment, **asked.env}, stdin, output)
        took_s = round(time.monotonic() - started_at, 3)
        if status:
            raise _failure(asked.argv[0], status, output.last_line())
        return {"ok": True, "exit_code": status, "duration_s": took_s, "output": output.tail()}


class Output:
    """What a program prints. All of it goes to the log; its end is kept, and lines that tell progress are passed on.

    Such a line is ``::progress FRACTION MESSAGE``, as in ``::progress 0.25 reading``.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tail = b""
        self._line = b""

    def add(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[:TAIL_BYTES]
        for line in lines:
            if found := _PROGRESS.fullmatch(line.strip()):
                self._progress(found[2].decode("utf-8", "replace"), fraction=float(found[1]))

    def tail(self) -> str:
        return self._tail.decode("utf-8", "replace")

    def last_line(self) -> str:
        return next((line for line in reversed(self.tail().splitlines()) if line.strip()), "").strip()


def _run(asked: CommandPayload, folder: Path, environment: dict[str, str], stdin: IO[bytes], output: Output) -> int:
    """Runs it to its end and gives its status; negative: the signal that killed it."""
    try:
        process = subprocess.Popen(
            asked.argv, cwd=folder, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExecutionError(f"payload.argv: cannot start {asked.argv[0]!r}: {reason}", code="cannot_start") from None
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    while True:
        ended = process.poll() is not None
        # What it left running may hold the pipe; once it has ended, only what is there already counts.
        readable, _, _ = select.select([pipe], [], [], 0 if ended else LEFT_OVER_S)
        data = os.read(pipe, _READ_BYTES) if readable else b""
        if data:
            _log(data)
            output.add(data)
        elif readable or ended:
            return process.wait()


def _note_nothing(_signal: int, _frame: object) -> None:
    """Other than a signal that is ignored, this is not inherited by what is started."""


def _log(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _folder(out_dir: Path, cwd: str) -> Path:
    inside = PurePosixPath(cwd)
    if inside.is_absolute() or ".." in inside.parts:
        raise ExecutionError(f"payload.cwd: {cwd!r} is not below the item's folder", code="bad_payload")
    folder = out_dir / inside
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExecutionError(f"payload.cwd: {error.strerror}", code="bad_payload") from None
    return folder


def _failure(program: str, status: int, last_line: str) -> ExecutionError:
    """A status is the program's own word; a signal came from this machine, as when memory runs out."""
    hint = f"; its last line: {last_line[:300]}" if last_line else ""
    reason = f"{program} {exit_text(status)}{hint}"
    return (
        ExecutionError(reason, code="exit_status", fault="work")
        if status > 0
        else ExecutionError(reason, code="killed", fault="node")
    )
