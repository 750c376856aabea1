"""The end of a lane that asks. See :mod:`computemesh.peer.tcp.wire`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, POLLIN, POLLOUT, poll
from typing import Final, Protocol

from computemesh.peer.tcp.reactor import SPIN_S, Reactor
from computemesh.peer.tcp.views import NOW, VIEWS_MAX, advance, upto
from computemesh.peer.tcp.wire import FRAME, QUESTION, Malformed

logger: Final = logging.getLogger(__name__)

BUFFER: Final = 64 * 1024
"""What is read at once of small answers."""
DIRECT: Final = 16 * 1024
"""From here on a copy costs more than a call, and bytes go straight to where they belong."""
TURN: Final = 8 * 1024 * 1024
"""Bytes after which a lane lets the others of its thread go on."""
SPIN_MAX: Final = 256 * 1024
"""Answers of more bytes than this are slept for: what is read at every moment is read in many small pieces."""
TRUSTED: Final = 16
"""After so many answers that were waited for, one after the other, the next ones will be, too."""
IDLE: Final = 50
"""Glances without a question after which there is nothing to look at."""
GONE: Final = EPOLLRDHUP | EPOLLHUP | EPOLLERR
CLOSED: Final = "the peer has closed the connection"
_READ: Final = EPOLLIN | EPOLLRDHUP


def why(error: Exception) -> str:
    """For what reason a connection ends."""
    return CLOSED if isinstance(error, ConnectionError) else str(error) or type(error).__name__


class AskerOwner(Protocol):
    """The link, as the lanes see it on which it asks."""

    def lose(self, reason: str, *, breach: bool = False) -> None:
        """The connection cannot go on. `breach`: the peer does not keep to the protocol."""
        ...

    def disposed(self) -> None:
        """A lane is closed, and touches nothing any more."""
        ...


class Question:
    """Something that is asked, and where its answer goes."""

    __slots__ = ("answered", "asker", "ended", "left", "number", "targets")

    def __init__(self, asker: Asker, answered: Callable[[int], None], targets: list[memoryview], length: int) -> None:
        self.asker = asker
        self.answered = answered
        """Called once with the status; -1 when the link has ended."""
        self.targets = targets
        """What the answer's bytes go into, the first one last; what is filled is cut off."""
        self.left = length
        self.number = 0
        self.ended = False

    def end(self, status: int) -> None:
        self.ended = True
        self.targets.clear()
        self.answered(status)

    def drive(self, timeout_s: float | None) -> None:
        """See :data:`computemesh.peer.transport.Drive`."""
        self.asker.drive(self, timeout_s)


class Gather:
    """The parts of one order. It ends when the last of them has; the first failure is the outcome."""

    __slots__ = ("_code", "_done", "_left", "_lock")

    def __init__(self, parts: int, done: Callable[[int], None]) -> None:
        self._left = parts
        self._done = done
        self._code = 0
        self._lock = threading.Lock()

    def answered(self, status: int) -> None:
        with self._lock:
            self._left -= 1
            self._code = self._code or status
            if self._left:
                return
        self._done(self._code)


class Asker:
    """Any thread may ask; one at a time reads the answers.

    That is the reactor's, unless a thread waits for its own answer in :meth:`drive`: it then reads the socket itself,
    and the reactor leaves it alone meanwhile. To tell epoll so each time, and to wake the reactor for what it is not to
    read, takes a fifth of a small transfer. So where one thread has come for its answers again and again, the reactor
    only glances now and then whether it still does.
    """

    def __init__(self, sock: socket.socket, reactor: Reactor, owner: AskerOwner) -> None:
        self.sock = sock
        self.reactor = reactor
        self.pending: deque[Question] = deque()
        self.progress = 0
        """Changes whenever bytes have moved."""
        self._owner = owner
        self._fd = sock.fileno()
        self._number = 0
        self._out: deque[memoryview] = deque()
        """What the socket did not take at once."""
        self._sending = threading.Lock()
        """Guards what is sent, and what epoll is told."""
        self._receiving = threading.Lock()
        self._driven = False
        self._waited = 0
        """Questions in a row that were waited for by who asked; from `TRUSTED` on the reactor only glances."""
        self._glanced: tuple[Question | None, int] = (None, 0)
        """The question that was open at the last glance, and the number of the last one."""
        self._idle = 0
        self._closed = False
        self._events = _READ
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._begin: int = 0
        self._end: int = 0
        self._frame_left: int = 0
        """Bytes of the frame that is being read."""
        self._more = False
        """Another frame of the same answer follows it."""
        reactor.register(self._fd, self._on_event, self._events)

    @property
    def busy(self) -> bool:
        return bool(self.pending)

    def ask(
        self,
        question: Question,
        kind: int,
        flags: int = 0,
        imm: int = 0,
        count: int = 0,
        pieces: bytes = b"",
        length: int = 0,
        payload: Sequence[memoryview] = (),
    ) -> None:
        """Asks; never waits. When the lane is closed the question ends at once."""
        with self._sending:
            if not self._closed:
                self._number = question.number = self._number + 1
                head = QUESTION.pack(kind, flags, count, imm, question.number, length) + pieces
                self.pending.append(question)
                if self._out:
                    self._out.append(memoryview(head))
                    self._out.extend(payload)
                else:
                    self._send_first(head, payload)
                events = EPOLLRDHUP if self._driven or self._waited >= TRUSTED else _READ
                self._watch(events | EPOLLOUT if self._out else events)
                return
        question.end(-1)

    def drive(self, question: Question, timeout_s: float | None) -> None:
        """Waits for the answer in the calling thread; returns early when another thread does so already."""
        if question.ended or not self._receiving.acquire(blocking=False):
            return
        try:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            with self._sending:
                if self._closed:
                    return
                self._driven = True
                self._watch(EPOLLRDHUP)
            spin_until = time.perf_counter() + SPIN_S if question.left <= SPIN_MAX else 0.0
            while not question.ended:
                if deadline is None and not self._out:
                    flags = 0
                    if time.perf_counter() < spin_until:
                        os.sched_yield()
                        flags = NOW
                    if not self._receive_small(question, flags):
                        self._receive(flags)
                elif self._await(deadline):
                    self._receive(NOW)
                else:
                    break
        except (OSError, EOFError, Malformed) as error:
            self._fail(error)
        except BaseException:
            # An interrupt may have come between the kernel's word and our note of it; nobody knows what was read.
            self._owner.lose("a thread was interrupted while it read the connection")
            raise
        finally:
            with self._sending:
                self._driven = False
                if self.pending or self._out:
                    self._distrust()
                elif self._waited < TRUSTED:
                    self._waited += 1
                    if self._waited == TRUSTED:
                        self._idle = 0
                        self.reactor.glance(self._glance)
            self._receiving.release()

    def dispose(self) -> None:
        """Closes it, and ends all that was asked; in the reactor's thread, after the socket was shut down.

        What had come by then is an answer all the same: one who answers and closes is seen to close another lane first.
        """
        with self._receiving:
            with contextlib.suppress(OSError, EOFError, Malformed):
                moved = 0
                while (count := self._receive(NOW)) and moved < TURN:
                    moved += count
            with self._sending:
                self._closed = True
                self.reactor.unregister(self._fd)
                self.sock.close()
                self._out.clear()
            pending = list(self.pending)
            self.pending.clear()
        for question in pending:
            question.end(-1)
        self._owner.disposed()

    def _send_first(self, head: bytes, payload: Sequence[memoryview]) -> None:
        try:
            if payload:
                sent = self.sock.sendmsg([head, *payload[: VIEWS_MAX - 1]], (), NOW)
            else:
                sent = self.sock.send(head, NOW)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(error)
            return
        self.progress += 1
        if not payload and sent == len(head):
            return
        for part in (memoryview(head), *payload):
            if sent < len(part):
                self._out.append(part[sent:])
            sent = max(0, sent - len(part))

    def _flush(self) -> None:
        """Sends what the socket takes."""
        with self._sending:
            out = self._out
            while out and not self._closed:
                views = [out[0]] if len(out) == 1 else [out[index] for index in range(min(len(out), VIEWS_MAX))]
                try:
                    sent = self.sock.sendmsg(views, (), NOW)
                except BlockingIOError:
                    break
                self.progress += 1
                while out and sent >= len(out[0]):
                    sent -= len(out.popleft())
                if sent:
                    out[0] = out[0][sent:]
            if not out and self._events & EPOLLOUT and not self._closed:
                self._watch(self._events & ~EPOLLOUT)

    def _await(self, deadline: float | None) -> bool:
        """Sends, and waits until there is something to read; False when the time is over."""
        waiter = poll()
        while True:
            waiter.register(self._fd, POLLIN | POLLOUT if self._out else POLLIN)
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = waiter.poll(left)
            if not ready:
                return False
            if ready[0][1] & POLLOUT:
                self._flush()
            if ready[0][1] & ~POLLOUT:
                return True

    def _glance(self) -> bool:
        """Whether who asks still comes for the answers; in the reactor's thread."""
        with self._sending:
            if self._waited < TRUSTED or self._closed:
                return False
            now = (self.pending[0] if self.pending else None, self._number)
            before, self._glanced = self._glanced, now
            self._idle = self._idle + 1 if before[1] == now[1] else 0
            if (now[0] is not None and now[0] is before[0] and not self._driven) or self._idle > IDLE:
                self._distrust()
                return False
            return True

    def _distrust(self) -> None:
        """The reactor reads again, if there is anything to come; to be called with `_sending`."""
        self._waited = 0
        if (self.pending or self._out) and not self._driven and not self._closed:
            self._watch(_READ | EPOLLOUT if self._out else _READ)

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self.reactor.modify(self._fd, events)

    def _on_event(self, events: int) -> None:
        try:
            if events & EPOLLOUT:
                self._flush()
            if events & ~EPOLLOUT:
                # Whoever drives the lane sees its end as well: it is given the time to say so.
                if not self._receiving.acquire(timeout=0.005 if events & GONE else 0):
                    return
                try:
                    moved = 0
                    while (count := self._receive(NOW)) and moved < TURN:
                        moved += count
                finally:
                    self._receiving.release()
        except (OSError, EOFError, Malformed) as error:
            self._fail(error)
        except Exception as error:
            logger.exception("a tcp connection failed")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._owner.lose(why(error), breach=isinstance(error, Malformed))

    def _receive(self, flags: int) -> int:
        """Reads once from the socket, and hands on what is whole; how many bytes came, 0 when there are none.

        Without `NOW` in `flags` it waits for the first byte.
        """
        try:
            if self._frame_left >= DIRECT and self._begin == self._end:
                return self._receive_direct(flags)
            if self._begin == self._end:
                self._begin = self._end = 0
                # Before a large answer only its header is read: the bytes behind it go straight to their place.
                large = not self._frame_left and self.pending and self.pending[0].left >= DIRECT
                count = self.sock.recv_into(self._view, FRAME.size if large else 0, flags)
            else:
                rest = self._end - self._begin
                self._view[:rest] = self._view[self._begin : self._end]
                self._begin, self._end = 0, rest
                count = self.sock.recv_into(self._view[rest:], 0, flags)
        except BlockingIOError:
            return 0
        if not count:
            raise EOFError(CLOSED)
        self.progress += 1
        self._end += count
        self._parse()
        return count

    def _receive_small(self, question: Question, flags: int) -> bool:
        """Takes an answer, if there is none before it and it is small: in a third of the steps where it comes as a
        whole. False if it is another one; then nothing was done. It waits as :meth:`_receive` does, or not."""
        length = question.left
        if self._begin != self._end or self._frame_left or length >= DIRECT or len(question.targets) != 1:
            return False
        if self.pending[0] is not question:
            return False
        view = self._view
        try:
            count = self.sock.recv_into(view, 0, flags)
        except BlockingIOError:
            return True
        if not count:
            raise EOFError(CLOSED)
        self.progress += 1
        self._begin, self._end = 0, count
        if count == FRAME.size + length and FRAME.unpack_from(view) == (0, 0, length, question.number):
            question.targets[0][:] = view[FRAME.size : count]
            self._begin = self._end = 0
            question.left = 0
            self._finish(question, 0)
        else:
            self._parse()
        return True

    def _receive_direct(self, flags: int) -> int:
        question = self.pending[0]
        target = question.targets[-1]
        if len(target) < DIRECT and len(question.targets) > 1:
            views = upto(question.targets[: -VIEWS_MAX - 1 : -1], self._frame_left)
            count = self.sock.recvmsg_into(views, 0, flags)[0]
        else:
            count = self.sock.recv_into(target, min(len(target), self._frame_left), flags)
        if not count:
            raise EOFError(CLOSED)
        self.progress += 1
        self._took(question, count)
        return count

    def _parse(self) -> None:
        while True:
            have = self._end - self._begin
            if self._frame_left:
                if not have:
                    return
                question = self.pending[0]
                target = question.targets[-1]
                count = min(have, self._frame_left, len(target))
                target[:count] = self._view[self._begin : self._begin + count]
                self._begin += count
                self._took(question, count)
                continue
            if have < FRAME.size:
                return
            status, more, length, number = FRAME.unpack_from(self._buffer, self._begin)
            self._begin += FRAME.size
            if not self.pending or (question := self.pending[0]).number != number:
                raise Malformed(f"an answer came to question {number}, which was not asked")
            if status:
                if length or more:
                    raise Malformed(f"a refusal has {length} bytes")
                self._finish(question, status)
            elif length > question.left or (more and not length):
                raise Malformed(f"{length} bytes came where there were {question.left} to come")
            elif length:
                self._frame_left = length
                self._more = more != 0
            else:
                self._finish(question, 0)

    def _took(self, question: Question, count: int) -> None:
        self._frame_left -= count
        question.left -= count
        advance(question.targets, count)
        if not self._frame_left and not self._more:
            self._finish(question, 0)

    def _finish(self, question: Question, status: int) -> None:
        if question.left and not status:
            raise Malformed(f"an answer is {question.left} bytes too short")
        self.pending.popleft()
        question.end(status)
