"""The process that runs one task: ``python -m computemesh.executors.runner WORK_TYPE``.

It loads the executor, prepares it, says :class:`Ready`, reads one :class:`Start` and runs. Messages leave on
a private copy of the standard output it was born with. What the executor prints or logs goes to the
attempt's log in ``out_dir`` (until the task is known, to the standard error it was born with), so nothing
printed can be taken for a message. The standard input is private too: when it ends, the node agent is dead, and this
process kills its whole group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import msgspec

from computemesh import trace
from computemesh.contracts.base import DEPTH_MAX, too_deep
from computemesh.executors.base import ExecutionError, Executor, save_json
from computemesh.executors.protocol import (
    Broke,
    Done,
    FromExecutor,
    ProgressNote,
    Ready,
    Start,
    log_name,
    plain_text,
)
from computemesh.executors.registry import ExecutorUnavailable, load
from computemesh.process import adopt_orphans, descendants

RESULT_FILE: Final = "responses.json"
"""The result of a run that gave one, in its folder."""

PROGRESS_INTERVAL_S: Final = 0.2
"""Least time between two progress messages."""

_READ_BYTES: Final = 64 * 1024


class Link:
    """The line to the node agent, on descriptors that nothing the executor starts will inherit."""

    def __init__(self) -> None:
        self._in = os.dup(0)
        self._out = os.fdopen(os.dup(1), "wb")
        self._lock = threading.Lock()
        self._first_line: SimpleQueue[bytes] = SimpleQueue()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        threading.Thread(target=self._listen, daemon=True).start()

    def start_line(self) -> bytes:
        """Waits for the task."""
        return self._first_line.get()

    def send(self, message: FromExecutor) -> None:
        self.send_line(msgspec.json.encode(message))

    def send_line(self, line: bytes) -> None:
        with self._lock:
            self._out.write(line + b"\n")
            self._out.flush()

    def _listen(self) -> None:
        """Hands over the first line, then waits for the end of the agent."""
        pending = bytearray()
        while chunk := os.read(self._in, _READ_BYTES):
            line, end, _ = chunk.partition(b"\n")
            pending += line
            if end:
                self._first_line.put(bytes(pending))
                pending.clear()
        _kill_below()
        os.killpg(0, signal.SIGKILL)


class ThinnedProgress:
    """Sends progress at most every :data:`PROGRESS_INTERVAL_S`. The latest is delayed, never lost."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._held: ProgressNote | None = None
        self._timer: threading.Timer | None = None
        self._sent_at = float("-inf")

    def __call__(self, message: str = "", *, fraction: float | None = None) -> None:
        with self._lock:
            self._held = ProgressNote(message=plain_text(str(message)), fraction=_share(fraction))
            wait_s = self._sent_at + PROGRESS_INTERVAL_S - time.monotonic()
            if wait_s <= 0:
                self._send_held()
            elif self._timer is None:
                self._timer = threading.Timer(wait_s, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Sends what was held back."""
        with self._lock:
            self._send_held()

    def _send_held(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held is not None:
            self._link.send(self._held)
            self._held = None
            self._sent_at = time.monotonic()


def main() -> None:
    adopt_orphans()
    link = Link()
    _as_lines()
    status = _serve(link, sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    _kill_below()
    # A thread the executor forgot must not keep a finished process alive.
    os._exit(status)


def _serve(link: Link, work_type: str) -> int:
    executor: Executor | None = None
    try:
        executor = load(work_type)()
        executor.prepare()
        sys.stdout.flush()
        link.send(Ready(needs_engine=executor.needs_engine))
        _run(link, executor, link.start_line())
    except BaseException as error:
        link.send(_broke(error))
        return 1
    finally:
        if executor is not None:
            _tear_down(executor)
    return 0


def _run(link: Link, executor: Executor, line: bytes) -> None:
    start = msgspec.json.decode(line, type=Start)
    os.environ[trace.VARIABLE] = start.task.traceparent
    os.environ.update(start.task.environment)
    out_dir = Path(start.out_dir).absolute()
    _print_into(out_dir / log_name(start.task.attempt))
    with contextlib.suppress(OSError):
        (out_dir / RESULT_FILE).unlink()  # Of an earlier attempt.
    progress = ThinnedProgress(link)
    try:
        line = _result_line(executor.run(start.task, out_dir, progress), out_dir)
    except BaseException as error:
        line = msgspec.json.encode(_broke(error))
    progress.flush()
    link.send_line(line)


def _result_line(result: Any, out_dir: Path) -> bytes:
    """The line that gives the result, which is then in its file too.

    Raises:
        ExecutionError: JSON cannot hold it.
    """
    try:
        data = msgspec.json.encode(result)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _bad_result(f"the result is not a JSON value: {error}") from None
    line = msgspec.json.encode(Done(result=msgspec.Raw(data)))
    if too_deep(line):
        raise _bad_result(f"the result is nested deeper than {DEPTH_MAX} levels")
    try:
        save_json(out_dir / RESULT_FILE, data)
    except OSError:  # The result itself is safe once the agent has it.
        traceback.print_exc()
    return line


def _bad_result(reason: str) -> ExecutionError:
    return ExecutionError(plain_text(reason), code="bad_result")


def _broke(error: BaseException) -> Broke:
    if isinstance(error, ExecutionError):
        return Broke(reason=plain_text(error.reason), code=error.code[:63], fault=error.fault)
    if isinstance(error, ExecutorUnavailable):
        return Broke(reason=plain_text(str(error)), code="no_executor")
    traceback.print_exception(error)
    return Broke(reason=plain_text(f"{type(error).__name__}: {error}".removesuffix(": ")))


def _kill_below() -> None:
    """Kills what the executor started, also what left the process group, which the agent ends."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _tear_down(executor: Executor) -> None:
    """The outcome is sent already, so what goes wrong here is only for the log."""
    try:
        executor.teardown()
    except BaseException:
        traceback.print_exc()


def _print_into(path: Path) -> None:
    """Sends this process's output, and that of whatever it starts, to the end of *path*."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _as_lines() -> None:
    """A killed executor's last printed line should be in its log."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _share(fraction: float | None) -> float | None:
    """A fraction within 0 to 1; one that is no number is none."""
    if fraction is None or fraction != fraction:
        return None
    return min(1.0, max(0.0, float(fraction)))


if __name__ == "__main__":
    main()
