"""The Unix socket of the peer-agent: connections of processes, their frames, and the answers to ours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from computemesh import log
from computemesh.config import ConfigError
from computemesh.contracts.base import Refused
from computemesh.paths import private_folder
from computemesh.peer.frames import FrameError, Outbox, Said, Splitter, discard, receive
from computemesh.peer.signals import Accept, Accepted, Answer, Desired, Ended, Frame, Lost, Order, Question, Told
from computemesh.peer.socket import socket_address
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.hosted import Hosted

BACKLOG: Final = 128
READS_MAX: Final = 16
"""From one connection before the others have their turn."""
GIVEN_UP_MAX: Final = 64
PAUSE_S: Final = 0.2
"""Before the next connection is taken when there are no descriptors left."""

_CREDENTIALS: Final = struct.Struct("3i")
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = log.get("door")


class OnFrames(Protocol):
    """Who is told of what comes in. Nothing here may block."""

    def heard(self, line: Line, number: int, ask: Question | Ended, fds: tuple[int, ...]) -> None:
        """A process asks or tells something. The descriptors are the taker's."""
        ...

    def late(self, line: Line, accept: Accept) -> None:
        """A process took a connection when nobody waited for that any more."""
        ...

    def refused(self, code: str) -> None:
        """A frame of a process could not be read."""
        ...

    def ended(self, line: Line) -> None:
        """A connection has ended; called once."""
        ...


class Line:
    """A connection of one process."""

    def __init__(self, sock: socket.socket, pid: int, on: OnFrames, forget: Callable[[Line], None]) -> None:
        sock.setblocking(False)
        self.pid: Final = pid
        self.since: Final = time.monotonic()
        self.open = True
        self.busy = 0
        """Questions of the process in hand."""
        self.hello = False
        """The process has said who it wants to be."""
        self.name: Name | None = None
        """Who it is, once it was welcomed."""
        self.hosted: Hosted | None = None
        """The peer that is run for it, if it asked for that."""
        self.turn: Final = asyncio.Lock()
        """Of what must happen in the order in which it was asked."""
        self._sock = sock
        self._on = on
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._outbox = Outbox()
        self._writing = False
        self._number = 0
        self._asked: dict[int, asyncio.Future[Answer | Refused]] = {}
        self._given_up: dict[int, Accept] = {}
        self._loop.add_reader(sock, self._read)

    # --- out ---------------------------------------------------------------------------------------------------------

    def say(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Sends a frame, now or as soon as the process reads. One that does not read at all is cut off."""
        if not self.open:
            return
        try:
            self._outbox.put(frame, fds)
        except (FrameError, OSError) as error:
            self.end(f"cannot be told anything more: {error}")
            return
        if not self._writing:
            self._write()

    def _write(self) -> None:
        try:
            all_gone = self._outbox.flush(self._sock)
        except OSError as error:
            self.end(str(error))
            return
        if all_gone and self._writing:
            self._loop.remove_writer(self._sock)
        elif not all_gone and not self._writing:
            self._loop.add_writer(self._sock, self._write)
        self._writing = not all_gone

    def tell(self, said: Lost | Desired) -> None:
        self.say(Frame(ask=said))

    async def ask(self, question: Accept | Order, *, timeout_s: float) -> Answer | Refused | None:
        """The answer of the process; None when it does not come in time, a refusal when the process has ended."""
        if not self.open:
            return _gone()
        self._number += 1
        number = self._number
        self._asked[number] = future = self._loop.create_future()
        self.say(Frame(id=number, ask=question))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            if isinstance(question, Accept):
                self._given_up[number] = question
                if len(self._given_up) > GIVEN_UP_MAX:
                    del self._given_up[next(iter(self._given_up))]
            return None
        finally:
            self._asked.pop(number, None)

    # --- in ----------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for _ in range(READS_MAX):
            if not self.open:
                return
            try:
                data, fds = receive(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.end(str(error))
                return
            if not data:
                self.end("")
                return
            try:
                found = self._splitter.feed(data, fds)
            except FrameError as error:
                self._on.refused("bad_message")
                self.say(Frame(refused=Refused(code="bad_message", reason=str(error))))
                self.end(str(error))
                return
            for one in found:
                if not self.open:
                    if isinstance(one, Said):
                        discard(one)
                elif isinstance(one, Said):
                    self._take(one)
                elif one.answers:
                    self._answered(one.id, one.refused)
                else:
                    self._on.refused("bad_message")
                    self.say(Frame(id=one.id, refused=one.refused))

    def _take(self, said: Said) -> None:
        frame = said.frame
        if isinstance(frame.ask, Told):
            discard(said)
            reason = "a peer-agent is not asked this"
            self.say(Frame(id=frame.id, refused=Refused(code="bad_message", reason=reason, field="ask.kind")))
        elif frame.ask is not None:
            self._on.heard(self, frame.id, frame.ask, said.fds)
        elif answer := frame.answer or frame.refused:
            discard(said)  # No answer of a process comes with descriptors.
            self._answered(frame.id, answer)

    def _answered(self, number: int, answer: Answer | Refused) -> None:
        future = self._asked.pop(number, None)
        given_up = self._given_up.pop(number, None)
        if future is not None and not future.done():
            future.set_result(answer)
        elif given_up is not None and isinstance(answer, Accepted):
            self._on.late(self, given_up)

    # --- the end -----------------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """Closes the connection. Twice is fine."""
        if not self.open:
            return
        self.open = False
        if reason:
            _log.warning("cut off a process", pid=self.pid, reason=reason)
        self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        self._splitter.close()
        self._outbox.close()
        self._sock.close()
        for future in self._asked.values():
            if not future.done():
                future.set_result(_gone())
        self._forget(self)
        self._on.ended(self)


class Door:
    """Takes connections of processes of the same user, or of root."""

    def __init__(self, path: Path, lines_max: int, on: OnFrames) -> None:
        self.path: Final = path
        self.lines: Final[set[Line]] = set()
        """Those that are open."""
        self._lines_max = lines_max
        self._on = on
        self._listener: socket.socket | None = None
        self._inode = 0

    def open(self) -> None:
        """Listens from now on.

        Raises:
            ConfigError: another peer-agent listens there, or something else stands in the way.
        """
        folder = private_folder(self.path.parent)
        self._make_room()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(folder / self.path.name) as address:
                listener.bind(address)
            self.path.chmod(0o600)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen at {self.path}: {error.strerror or error}") from None
        listener.setblocking(False)
        self._inode = self.path.stat().st_ino
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Takes no further connection; those there are go on."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _make_room(self) -> None:
        """Removes what a peer-agent that was killed has left."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise ConfigError(f"{self.path} is there already, and is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                with socket_address(self.path) as address:
                    probe.connect(address)
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                raise ConfigError(f"cannot tell who listens at {self.path}: {error.strerror or error}") from None
        raise ConfigError(f"another peer-agent listens at {self.path}; each needs a COMPUTEMESH_HOME of its own")

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                _log.error("cannot take a connection", reason=error.strerror)
                self._pause()
                return
            uid, pid = _credentials(sock)
            if uid not in (0, os.getuid()):
                _log.warning("refused a process of another user", pid=pid, uid=uid)
                self._on.refused("refused")
                sock.close()
            elif len(self.lines) >= self._lines_max:
                self._on.refused("too_many_requests")
                reason = f"{self._lines_max} processes are connected, and no more are taken"
                _refuse(sock, Refused(code="too_many_requests", reason=reason, status=429, retry="later"))
            else:
                self.lines.add(Line(sock, pid, self._on, self.lines.discard))

    def _pause(self) -> None:
        assert self._listener is not None, "it has just accepted"
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """The user and the process at the other end. Elsewhere than on Linux the folder alone keeps others out."""
    if sys.platform != "linux":
        return os.getuid(), 0
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return uid, pid


def _refuse(sock: socket.socket, refused: Refused) -> None:
    outbox = Outbox()
    outbox.put(Frame(id=1, refused=refused))
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        outbox.flush(sock)
    outbox.close()
    sock.close()


def _gone() -> Refused:
    return Refused(code="unavailable", reason="the process has ended", status=503, retry="later")
