"""The connection of one process: its frames, and its answers to ours."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from computemesh import log
from computemesh.contracts.base import Refused
from computemesh.peer.frames import FrameError, Outbox, Said, Splitter, discard, receive
from computemesh.peer.signals import Accept, Accepted, Answer, Desired, Frame, Lost, News, Order, Question, Told
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.hosted import Hosted

READS_MAX: Final = 16
"""From one connection before the others have their turn."""
GIVEN_UP_MAX: Final = 64

_log = log.get("line")


class OnFrames(Protocol):
    """Who is told of what comes in. Nothing here may block."""

    def heard(self, line: Line, number: int, ask: Question | News, fds: tuple[int, ...]) -> None:
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
        self.in_hand: Final = Counter[str]()
        """Questions of the process that are not answered yet, by sort."""
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
        self._hears = True
        self._number = 0
        self._asked: dict[int, asyncio.Future[Answer | Refused]] = {}
        self._given_up: dict[int, Accept] = {}
        self._loop.add_reader(sock, self._read)

    # --- out ---------------------------------------------------------------------------------------------------------

    def say(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Sends a frame, now or as soon as the process reads. One that does not read at all is cut off."""
        if not self.open or not self._hears:
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
        except ConnectionError:  # It has closed its end, which the reader sees when it has read what was said before.
            self._outbox.close()
            self._hears = False
            all_gone = True
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
            return gone()
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
            except ConnectionError:  # It ended with answers that it had not read.
                self.end("")
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
                future.set_result(gone())
        self._forget(self)
        self._on.ended(self)


def gone() -> Refused:
    return Refused(code="unavailable", reason="the process has ended", status=503, retry="later")
