"""Runs work in executor processes: one process an attempt, none of them left behind.

A process that has loaded and prepared its executor can wait for its task at no cost, so the runner keeps one
such spare per work type it was told to: a task then starts without the interpreter's and the imports' delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import psutil

from computemesh import log as logs
from computemesh.contracts.base import Message, encode
from computemesh.executors import Task
from computemesh.executors.protocol import (
    LOG_LINK,
    REASON_CHARS_MAX,
    Broke,
    Done,
    FromExecutor,
    Outcome,
    ProgressNote,
    Ready,
    Start,
    log_name,
)
from computemesh.process import descendants, exit_text, signal_group
from computemesh_services.node_agent import folders

RESULT_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bound on a result, as JSON."""

LINE_BYTES_MAX: Final = RESULT_BYTES_MAX + 64 * 1024
"""Bound on one message of an executor's process, and so on the memory it can make the agent use."""

LARGE_BYTES: Final = 256 * 1024
"""A result with more bytes stays the JSON that it came as, :class:`msgspec.Raw`: nobody here looks into it."""

KILL_GRACE_S: Final = 0.7
"""How long a cancelled process group may take to end by itself: all of it is gone within a second."""

REAP_INTERVAL_S: Final = 1.0
"""Bound on how late the end of a process is noticed when something else holds its pipes."""

TEARDOWN_S_MAX: Final = 10.0
"""How long a process may go on after its outcome."""

PREPARE_S_MAX: Final = 120.0
"""How long :meth:`Runner.probe` waits for ``prepare``."""

OnProgress = Callable[[ProgressNote], None]

_TAIL_BYTES: Final = 64 * 1024
_HINT_CHARS_MAX: Final = 300
_messages: Final = msgspec.json.Decoder(FromExecutor)


class _LargeDone(Message, frozen=True, kw_only=True, tag="done", tag_field="kind"):
    result: msgspec.Raw = msgspec.Raw(b"null")


_large_messages: Final = msgspec.json.Decoder(Ready | ProgressNote | _LargeDone | Broke)
_log = logs.get("runs")


class Runner:
    """Runs tasks, each in a process group of its own.

    Args:
        spare_types: work types to keep a prepared process for.
        environment: of the executors' processes; left out, they get this process's own.
    """

    def __init__(
        self,
        *,
        spare_types: Collection[str] = (),
        result_bytes_max: int = RESULT_BYTES_MAX,
        line_bytes_max: int = LINE_BYTES_MAX,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._spare_types = frozenset(spare_types)
        self._result_bytes_max = result_bytes_max
        self._line_bytes_max = line_bytes_max
        self._environment = environment
        self._spares: dict[str, _Child] = {}
        self._warming: dict[str, asyncio.Task[None]] = {}
        self._children: set[_Child] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def probe(self, work_type: str) -> Ready | Broke:
        """Whether *work_type* can run here, and what it needs. Leaves a spare if one is to be kept."""
        child = await self._take(work_type)
        answer: Ready | Broke = Broke(code="timeout", reason=f"not prepared after {PREPARE_S_MAX:g} s")
        try:
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(child.ready(), PREPARE_S_MAX)
        except asyncio.CancelledError:
            await self._end(child)
            raise
        wanted = work_type in self._spare_types and work_type not in self._spares
        if wanted and isinstance(answer, Ready) and not self._closed:
            self._spares[work_type] = child
        else:
            await self._end(child)
        return answer

    async def run(
        self, task: Task, out_dir: Path, *, on_progress: OnProgress, timeout_s: float | None = None
    ) -> Outcome:
        """Runs *task* and gives its outcome, once its process group is gone.

        Every failure is a value. Cancelling this coroutine ends the process group: SIGTERM, then SIGKILL
        after :data:`KILL_GRACE_S`.

        Args:
            out_dir: made when absent; gets the attempt's log and the executor's files.
            on_progress: called in the event loop; must return at once.
            timeout_s: left out, the task's own.
        """
        limit_s = task.timeout_s if timeout_s is None else timeout_s
        if self._closed:
            return self._stopped()
        try:
            folders.claim(out_dir)
            child = await self._take(task.work_type)
        except OSError as error:
            return Broke(code="node_failed", reason=f"cannot start an executor: {error}")
        self._keep_spare(task.work_type)
        try:
            outcome = await self._within(limit_s, child, task, out_dir, on_progress)
            if not child.ended_badly:
                await child.exited(TEARDOWN_S_MAX)
        finally:
            await self._end(child)
        return outcome

    def warm(self) -> None:
        """Starts the spares, in the background."""
        for work_type in self._spare_types:
            self._keep_spare(work_type)

    async def close(self) -> None:
        """Ends every process. Runs in progress give a failure with code ``node_stopped``."""
        self._closed = True
        for task in self._warming.values():
            task.cancel()
        await asyncio.gather(*self._warming.values(), return_exceptions=True)
        await asyncio.gather(*(self._end(child) for child in list(self._children)))
        await asyncio.gather(*self._ending)

    async def _within(
        self, limit_s: float, child: _Child, task: Task, out_dir: Path, on_progress: OnProgress
    ) -> Outcome:
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                return await self._converse(child, task, out_dir, on_progress)
        except TimeoutError:
            if not limit.expired():
                raise
            child.ended_badly = True
            return Broke(code="timeout", reason=f"not done after {round(limit_s, 2):g} s, the longest it may take")

    async def _converse(self, child: _Child, task: Task, out_dir: Path, on_progress: OnProgress) -> Outcome:
        try:
            answer = await child.ready()
            child.log_into(out_dir / log_name(task.attempt))
            if isinstance(answer, Broke):
                return self._stopped() if self._closed else answer
            await child.start(task, out_dir)
            outcome, line_bytes = await child.outcome(on_progress)
        except _LineTooLong:
            child.ended_badly = True
            return self._too_large(f"more than {self._line_bytes_max:,}")
        if outcome is None:
            return self._stopped() if self._closed else await child.death()
        if isinstance(outcome, Done) and line_bytes > self._result_bytes_max:
            return self._too_large(f"{line_bytes:,}")
        return outcome

    def _stopped(self) -> Broke:
        return Broke(code="node_stopped", reason="the node agent stopped")

    def _too_large(self, size: str) -> Broke:
        allowed = f"{self._result_bytes_max:,} are allowed"
        reason = f"the result is {size} bytes of JSON, {allowed}; write a file instead"
        return Broke(code="result_too_large", fault="work", reason=reason)

    async def _take(self, work_type: str) -> _Child:
        """The spare, if it is still good, or a new process. It may not be ready yet."""
        spare = self._spares.pop(work_type, None)
        if spare is not None:
            if spare.usable():
                return spare
            await self._end(spare)
        return await self._spawn(work_type)

    async def _spawn(self, work_type: str) -> _Child:
        child = await _Child.spawn(work_type, self._environment, self._line_bytes_max)
        self._children.add(child)
        if self._closed:
            await self._end(child)
        return child

    def _keep_spare(self, work_type: str) -> None:
        wanted = work_type in self._spare_types and work_type not in self._spares
        if not wanted or work_type in self._warming or self._closed:
            return
        task = asyncio.create_task(self._add_spare(work_type))
        self._warming[work_type] = task
        task.add_done_callback(lambda _: self._warming.pop(work_type, None))

    async def _add_spare(self, work_type: str) -> None:
        try:
            child = await self._spawn(work_type)
        except OSError as error:
            _log.warning("cannot start a spare executor", work_type=work_type, error=str(error))
            return
        if work_type in self._spares or self._closed:
            await self._end(child)
        else:
            self._spares[work_type] = child

    async def _end(self, child: _Child) -> None:
        """Ends a process group for certain, also when the caller is cancelled meanwhile."""
        task = asyncio.create_task(child.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)
        self._children.discard(child)


class _LineTooLong(Exception):
    """A message beyond the bound on one."""


class _Child:
    """One executor process."""

    def __init__(self, process: Process, transport: asyncio.SubprocessTransport, early: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._transport = transport
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._early = early
        self._log: Path | None = None
        self._reaped = asyncio.create_task(self._reap())
        self._ready = asyncio.create_task(self._first_answer())
        self.ended_badly = False
        """There is nothing to wait for: end it at once."""

    @classmethod
    async def spawn(cls, work_type: str, environment: Mapping[str, str] | None, line_bytes_max: int) -> _Child:
        # What is printed before the task is known is kept here, and copied to its log then.
        early = tempfile.TemporaryFile(prefix="computemesh-executor-")  # noqa: SIM115 - lives as long as the child.
        loop = asyncio.get_running_loop()
        command = [sys.executable, "-P", "-m", "computemesh.executors.runner", work_type]
        try:
            # No death signal from the kernel: it would end this process before it can end its group, which
            # it does by itself when its standard input ends.
            transport, protocol = await loop.subprocess_exec(
                lambda: SubprocessStreamProtocol(limit=line_bytes_max, loop=loop),
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=early,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            early.close()
            raise
        return cls(Process(transport, protocol, loop), transport, early)

    def usable(self) -> bool:
        """Whether it runs and has not said that it cannot."""
        if self._process.returncode is not None or not psutil.pid_exists(self._process.pid):
            return False  # The second is known a moment earlier: the exit is told from another thread.
        return not self._ready.done() or isinstance(self._ready.result(), Ready)

    async def ready(self) -> Ready | Broke:
        """Waits until it has prepared, or could not."""
        return await asyncio.shield(self._ready)

    def log_into(self, path: Path) -> None:
        """Names the log of its task, and begins it with what was printed before."""
        self._log = path
        _lead_to(path.with_name(LOG_LINK), path.name)
        if early := self._printed_early():
            # Should this fail, so does the process itself, which says so.
            with contextlib.suppress(OSError), path.open("ab") as file:
                file.write(early)

    async def start(self, task: Task, out_dir: Path) -> None:
        """Hands over the task. A process that just died shows in :meth:`outcome`."""
        self._stdin.write(encode(Start(task=task, out_dir=str(out_dir))) + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._stdin.drain()

    async def outcome(self, on_progress: OnProgress) -> tuple[Outcome | None, int]:
        """Follows the run to its outcome and that message's bytes; None when the process ended without."""
        while True:
            message, size = await self._receive()
            if isinstance(message, ProgressNote):
                on_progress(message)
            elif not isinstance(message, Ready):
                return message, size

    async def death(self) -> Broke:
        """How it ended, when it gave no outcome."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reaped), KILL_GRACE_S)
        last = last_line(_tail(self._log) if self._log else self._printed_early())
        hint = f"; the last line of its log: {last}" if last else ""
        reason = f"the executor's process {_ended(self._process.returncode)} before it gave a result{hint}"
        return Broke(code="executor_died", reason=reason[:REASON_CHARS_MAX])

    async def exited(self, timeout_s: float) -> None:
        """Waits for it to end by itself, so long."""
        await asyncio.wait({self._reaped}, timeout=timeout_s)

    async def end(self) -> None:
        """Ends the process and its group, the hard way when need be, and what it started that left the group."""
        below: set[psutil.Process] = set()
        if not self._reaped.done():
            below = self._below()
            signal_group(self._process.pid, signal.SIGTERM)
            _send(signal.SIGTERM, below, outside=self._process.pid)
            await self.exited(KILL_GRACE_S)
            below |= self._below()
        signal_group(self._process.pid, signal.SIGKILL)
        _send(signal.SIGKILL, below, outside=self._process.pid)
        await self._reaped
        await asyncio.wait({self._ready})
        self._transport.close()
        self._early.close()

    def _below(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for pid in descendants(self._process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(psutil.Process(pid))  # Knows when its number belongs to another.
        return found

    async def _reap(self) -> None:
        # Whatever it left running may hold its pipes open: then neither the end of the output comes, nor, in
        # some Python versions, the end of wait(). The first is cured by killing the group, and for what
        # left the group, by saying that this is the end.
        waiting = asyncio.create_task(self._process.wait())
        while self._process.returncode is None:
            await asyncio.wait({waiting}, timeout=REAP_INTERVAL_S)
        waiting.cancel()
        signal_group(self._process.pid, signal.SIGKILL)
        asyncio.get_running_loop().call_later(KILL_GRACE_S, self._stdout.feed_eof)

    async def _first_answer(self) -> Ready | Broke:
        while True:
            message, _ = await self._receive()
            if isinstance(message, Ready | Broke):
                return message
            if message is None:
                return await self.death()

    async def _receive(self) -> tuple[FromExecutor | None, int]:
        """The next message and its bytes; None at the end. A line that is no message is passed over."""
        while True:
            try:
                line = await self._stdout.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return None, 0
            except asyncio.LimitOverrunError as error:
                raise _LineTooLong from error
            try:
                return _read(line), len(line)
            except (ValueError, RecursionError) as error:
                _log.warning("not a message from an executor", error=str(error), line_bytes=len(line))

    def _printed_early(self) -> bytes:
        # The child writes through the same file offset, so it must not be moved.
        descriptor = self._early.fileno()
        return os.pread(descriptor, _TAIL_BYTES, max(0, os.fstat(descriptor).st_size - _TAIL_BYTES))


def _send(sig: signal.Signals, processes: Iterable[psutil.Process], *, outside: int) -> None:
    """Signals those of *processes* that are not in the process group *outside*."""
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != outside:
                process.send_signal(sig)


def _lead_to(link: Path, name: str) -> None:
    """Makes *link* lead to the file *name* beside it, whatever stood there. Only people use it."""
    new = link.with_name(f"{name}.link")
    with contextlib.suppress(OSError):
        new.symlink_to(name)
        new.replace(link)


def _read(line: bytes) -> FromExecutor:
    if len(line) <= LARGE_BYTES:
        small: FromExecutor = _messages.decode(line)
        return small
    message: Any = _large_messages.decode(line)
    large: FromExecutor = Done(result=message.result) if isinstance(message, _LargeDone) else message
    return large


def _ended(returncode: int | None) -> str:
    if returncode is None:
        return "closed its messages"
    return exit_text(returncode) + (" (out of memory?)" if returncode == -signal.SIGKILL else "")


def last_line(data: bytes) -> str:
    """The last line with something in it, shortened."""
    lines = data.decode("utf-8", "replace").split("\n")
    return next((line.strip()[:_HINT_CHARS_MAX] for line in reversed(lines) if line.strip()), "")


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""
