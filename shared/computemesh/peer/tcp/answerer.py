"""The end of a lane that answers. See :mod:`computemesh.peer.tcp.wire`."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Generator
from select import EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import Final, Protocol

from computemesh.peer.tcp.asker import CLOSED, DIRECT, GONE, TURN, why
from computemesh.peer.tcp.reactor import Reactor
from computemesh.peer.tcp.views import NOW, VIEWS_MAX, advance, upto
from computemesh.peer.tcp.wire import (
    ANNOUNCED,
    FINISH,
    FRAME,
    FRAME_MAX,
    IMM,
    MESSAGE,
    PIECE,
    PULL,
    QUESTION,
    READ,
    READ_ONE,
    STATUS,
    WITH_IMM,
    WRITE,
    Malformed,
    Piece,
    check_question,
)
from computemesh.peer.transport import STALE_EPOCH, LocalRegion

logger: Final = logging.getLogger(__name__)

BUFFER: Final = 16 * 1024
"""More than the largest question without its bytes."""
_READ: Final = EPOLLIN | EPOLLRDHUP
_WRITE: Final = EPOLLOUT | EPOLLRDHUP
_ANSWERED: Final = -1

Then = Callable[[], None]
"""Called when the lane is at rest: it may do what it likes."""
Judge = Callable[[int, int, int, int, bool], tuple[LocalRegion | None, str]]
"""Given handle, epoch, offset, length and whether it is to be written: the region, or why a peer may not have that."""


class AnswererOwner(Protocol):
    """The link, as the lanes see it on which it answers."""

    def lose(self, reason: str, *, breach: bool = False) -> None: ...

    def disposed(self) -> None: ...


class Mailbox(Protocol):
    """Where messages and numbers go."""

    def place_message(self, length: int) -> tuple[memoryview | None, int, Then] | None:
        """Where a message goes that comes now (nowhere if it does not fit), the status, and what to call when it has
        come; None: it is to be kept."""
        ...

    def keep_message(self, number: int, length: int, data: bytes | None) -> tuple[int, Then | None]:
        """Takes a message for which there was no `recv` when it began; the status, and what to call."""
        ...

    def message_view(self, number: int) -> memoryview | None:
        """The bytes of a message that was announced."""
        ...

    def message_ended(self, number: int, status: int) -> Then | None: ...

    def take_imm(self, imm: int) -> tuple[int, Then | None]:
        """A number came: the status, and what to call."""
        ...


class Answerer:
    """Answers in its reactor's thread.

    `_serve` is the whole conversation, written as if it could wait; where it would, it yields what it waits for.
    """

    def __init__(
        self, sock: socket.socket, reactor: Reactor, owner: AnswererOwner, mail: Mailbox, judge: Judge
    ) -> None:
        self.sock = sock
        self.reactor = reactor
        self.busy = False
        """In the midst of a question, or of its answer."""
        self.progress = 0
        self._owner = owner
        self._mail = mail
        self._judge = judge
        self._fd = sock.fileno()
        self._lock = threading.Lock()
        """Held while the conversation goes on; never while it waits, and not while others are called."""
        self._calls: list[Then] = []
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._begin: int = 0
        self._end: int = 0
        self._number = 0
        """Of the last question."""
        self._regions: list[LocalRegion] = []
        """Those of the question that is being answered."""
        self._targets: list[memoryview] = []
        """What its bytes go into, or come from, the first last."""
        self._out: list[memoryview] = []
        """What is to be sent now, the first last."""
        self._concealed = False
        """One of the regions was unregistered meanwhile."""
        self._turn = 0
        """Bytes since others had theirs."""
        self._conversation = self._serve()
        self._events = next(self._conversation)
        reactor.register(self._fd, self._on_event, self._events)

    def conceal(self, region: LocalRegion) -> None:
        """No byte of the region is read or written by this lane any more. Waits for no peer."""
        with self._lock:
            if region in self._regions:
                self._concealed = True
                self._targets.clear()
                # The frame has been promised: at most FRAME_MAX bytes, as they are now.
                self._out[:] = [memoryview(bytes(view)) for view in self._out]
                self._regions.clear()

    def dispose(self) -> None:
        """Closes it; in the reactor's thread, after the socket was shut down."""
        with self._lock:
            self._conversation.close()
            self.reactor.unregister(self._fd)
            self.sock.close()
            self._regions.clear()
            self._targets.clear()
            self._out.clear()
        self._owner.disposed()

    def _on_event(self, events: int) -> None:
        try:
            with self._lock:
                if self._events & EPOLLOUT and events & GONE:
                    raise EOFError(CLOSED)
                if not self.busy and self._begin == self._end and self._answer_small():
                    return
                wanted = next(self._conversation)
                if wanted != self._events:
                    self._events = wanted
                    self.reactor.modify(self._fd, wanted)
        except StopIteration:
            return  # it has failed already, and is about to be closed
        except (OSError, EOFError, Malformed) as error:
            self._owner.lose(why(error), breach=isinstance(error, Malformed))
        except Exception:
            logger.exception("a tcp connection failed")
            self._owner.lose("a defect, see the log")
        if self._calls:
            calls, self._calls = self._calls, []
            for call in calls:
                call()

    def _serve(self) -> Generator[int, None, None]:
        messages = 0
        view = self._view
        while True:
            while self._end - self._begin < QUESTION.size:
                yield _READ
                if self._out:
                    self.busy = True
                    while not self._push():
                        yield _WRITE
                    self._release()
                    self.busy = False
                elif self._end - self._begin < QUESTION.size:
                    self._fill()
            number = self._number = self._number + 1
            self.busy = True
            kind, flags, count, imm, said, length = QUESTION.unpack_from(view, self._begin)
            check_question(kind, flags, count, said, length, number)
            self._begin += QUESTION.size
            pieces: list[Piece] = []
            if count:
                size = count * PIECE.size
                while self._end - self._begin < size:
                    yield _READ
                    self._fill()
                if count == 1:
                    pieces = [PIECE.unpack_from(view, self._begin)]
                else:
                    pieces = list(PIECE.iter_unpack(view[self._begin : self._begin + size]))
                self._begin += size
            status = 0
            if kind == READ:
                status, total = self._find(pieces, write=False)
                if not status and total <= FRAME_MAX:
                    self._out = self._targets
                    self._out.append(memoryview(FRAME.pack(0, 0, total, number)))
                    self._targets = []
                    while not self._push():
                        yield _WRITE
                    status = _ANSWERED
                elif not status:
                    status = yield from self._bring(total, number)
                self._release()
            elif kind == WRITE:
                status, total = self._find(pieces, write=True)
                if total != length:
                    raise Malformed(f"{length} bytes come for pieces of {total}")
                yield from self._take(length)
                if self._concealed:
                    status = STATUS[STALE_EPOCH]
                if flags & WITH_IMM and not status:
                    status = self._tell(self._mail.take_imm(imm))
                self._release()
            elif kind == MESSAGE:
                messages += 1
                status = yield from self._message(messages, length, announced=flags == ANNOUNCED)
            elif kind == PULL:
                handle, _, offset, size = pieces[0]
                message = self._mail.message_view(handle)
                if message is None or offset + size > len(message):
                    raise Malformed(f"a message {handle} is asked for that is not there")
                self._targets = [message[offset : offset + size]]
                del message
                status = yield from self._bring(size, number)
            elif kind == FINISH:
                self._tell((0, self._mail.message_ended(length, imm)))
            elif kind == IMM:
                status = self._tell(self._mail.take_imm(imm))
            if status != _ANSWERED:
                self._out = [memoryview(FRAME.pack(status, 0, 0, number))]
                while not self._push():
                    yield _WRITE
            self.busy = False

    def _answer_small(self) -> bool:
        """Reads; answers at once if that is one question, a read of one piece, and the socket takes all of it. Most
        are, and few steps count where a processor that has just woken up has none of them in its caches.

        False where the conversation must go on: with what was read, or what is in `_out`.
        """
        self._begin = self._end = 0
        self._fill()
        if self._end != READ_ONE.size:
            return False
        kind, flags, count, _, said, none, handle, epoch, offset, length = READ_ONE.unpack_from(self._view)
        if kind != READ or count != 1 or flags or none or said != self._number + 1 or length > FRAME_MAX:
            return False
        self._begin = self._end
        self._number = said
        region, code = self._judge(handle, epoch, offset, length, False)
        if region is None:
            self._out = [memoryview(FRAME.pack(STATUS[code], 0, 0, said))]
            return False
        assert region.view is not None
        head, view = FRAME.pack(0, 0, length, said), region.view[offset : offset + length]
        try:
            sent = self.sock.sendmsg((head, view), (), NOW)
        except BlockingIOError:
            sent = 0
        self.progress += 1
        if sent == FRAME.size + length:
            return True
        self._regions.append(region)
        self._out = [view, memoryview(head)]
        advance(self._out, sent)
        return False

    def _find(self, pieces: list[Piece], *, write: bool) -> tuple[int, int]:
        """Sets `_targets` to what was asked for; the status, and how many bytes these are together."""
        total = 0
        for handle, epoch, offset, length in pieces:
            region, code = self._judge(handle, epoch, offset, length, write)
            if region is None:
                self._release()
                return STATUS[code], sum(length for _, _, _, length in pieces)
            assert region.view is not None
            total += length
            self._regions.append(region)
            if length:
                self._targets.append(region.view[offset : offset + length])
        if len(pieces) > 1:
            self._targets.reverse()
        return 0, total

    def _release(self) -> None:
        self._regions.clear()
        self._targets.clear()
        self._concealed = False

    def _tell(self, verdict: tuple[int, Then | None]) -> int:
        status, then = verdict
        if then is not None:
            self._calls.append(then)
        return status

    def _message(self, number: int, length: int, *, announced: bool) -> Generator[int, None, int]:
        if announced:
            return self._tell(self._mail.keep_message(number, length, None))
        place = self._mail.place_message(length)
        if place is not None:
            into, status, then = place
            if into is not None and length:
                self._targets = [into[:length]]
            del into, place
            yield from self._take(length)
            return self._tell((status, then))
        kept = bytearray(length)
        if length:
            self._targets = [memoryview(kept)]
        yield from self._take(length)
        return self._tell(self._mail.keep_message(number, length, bytes(kept)))

    def _fill(self) -> None:
        """Reads into the buffer what there is."""
        if self._begin == self._end:
            self._begin = self._end = 0
            view = self._view
        else:
            rest = self._end - self._begin
            self._view[:rest] = self._view[self._begin : self._end]
            self._begin, self._end = 0, rest
            view = self._view[rest:]
        try:
            count = self.sock.recv_into(view, 0, NOW)
        except BlockingIOError:
            return
        if not count:
            raise EOFError(CLOSED)
        self.progress += 1
        self._end += count

    def _take(self, length: int) -> Generator[int, None, None]:
        """Puts what comes into the targets; what has none is left out."""
        while length:
            if have := self._end - self._begin:
                count = min(have, length)
                if self._targets:
                    count = min(count, len(self._targets[-1]))
                    self._targets[-1][:count] = self._view[self._begin : self._begin + count]
                    advance(self._targets, count)
                self._begin += count
                length -= count
            elif length < DIRECT or not self._targets:
                yield _READ
                self._fill()
            elif not (count := self._fill_targets(length)):
                yield _READ
            else:
                length -= count
                self._turn += count
                if self._turn >= TURN and length:
                    self._turn = 0
                    yield _READ

    def _fill_targets(self, length: int) -> int:
        target = self._targets[-1]
        try:
            if len(target) < DIRECT and len(self._targets) > 1:
                count = self.sock.recvmsg_into(upto(self._targets[: -VIEWS_MAX - 1 : -1], length), 0, NOW)[0]
            else:
                count = self.sock.recv_into(target, min(len(target), length), NOW)
        except BlockingIOError:
            return 0
        if not count:
            raise EOFError(CLOSED)
        self.progress += 1
        advance(self._targets, count)
        return count

    def _bring(self, total: int, number: int) -> Generator[int, None, int]:
        """Sends the targets in frames. Returns the status when they were concealed before the last one was begun."""
        while True:
            size = min(total, FRAME_MAX)
            total -= size
            self._out = upto(self._targets[::-1], size)
            self._out.reverse()
            advance(self._targets, size)
            self._out.append(memoryview(FRAME.pack(0, 1 if total else 0, size, number)))
            while not self._push():
                yield _WRITE
            if not total:
                return _ANSWERED
            self._turn += size
            if self._turn >= TURN:
                self._turn = 0
                yield _WRITE
            if self._concealed:
                return STATUS[STALE_EPOCH]

    def _push(self) -> bool:
        """Sends what the socket takes; whether that was all."""
        out = self._out
        while out:
            try:
                count = self.sock.sendmsg(out[: -VIEWS_MAX - 1 : -1], (), NOW)
            except BlockingIOError:
                return False
            self.progress += 1
            advance(out, count)
        return True
