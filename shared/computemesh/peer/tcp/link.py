"""One connection: orders dealt out over its lanes, messages, and its end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol

from computemesh.contracts.peers import Transport
from computemesh.peer.tcp.answerer import Answerer
from computemesh.peer.tcp.asker import Asker, Question
from computemesh.peer.tcp.reactor import Reactor
from computemesh.peer.tcp.wire import (
    ANNOUNCED,
    CODES,
    EAGER_MAX,
    FINISH,
    HELD,
    IMM,
    MESSAGE,
    NO_ROOM,
    PIECE,
    PIECES_MAX,
    PING,
    PULL,
    READ,
    REASONS,
    STATUS,
    WITH_IMM,
    WRITE,
    Malformed,
    cut,
)
from computemesh.peer.transport import (
    CANCELLED,
    DONE,
    LINK_LOST,
    NO_REGION,
    OUT_OF_RANGE,
    READ_ONLY,
    TIMED_OUT,
    TOO_LARGE,
    Copy,
    Done,
    Drive,
    LocalRegion,
    OnLost,
    Outcome,
    Parties,
    TransportError,
)

SMALL_MAX: Final = 256 * 1024
"""An order up to here goes over lane 0, so that it waits for none that is larger."""
STRIPE_MIN: Final = 2 * 1024 * 1024
"""A lane gets at least so many bytes of an order, unless the order has less."""
SENDS_MAX: Final = 256
"""Messages that wait for the peer's `recv` at a time; more of them wait here."""
STORED_MAX: Final = 4 * 1024 * 1024
"""Bytes of messages that are kept until there is a `recv`; what is beyond is held by the peer."""
STORED_EACH: Final = 256
"""What a message costs beside its bytes."""
IMMS_MAX: Final = 65536


class Host(Protocol):
    """The endpoint, as its links see it."""

    stall_s: float

    def judge(
        self, handle: int, epoch: int, offset: int, length: int, write: bool
    ) -> tuple[LocalRegion | None, str]: ...

    def count(self, what: str) -> None: ...

    def forget(self, link: TcpLink) -> None: ...


class _Gather:
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


class TcpLink:
    """See :class:`computemesh.peer.transport.Link`."""

    transport: Transport = "tcp"

    def __init__(self, parties: Parties, lanes: int, host: Host) -> None:
        self.parties = parties
        self.lanes = lanes
        self.detail: dict[str, Any] = {"lanes": lanes}
        self._host = host
        self._lock = threading.Lock()
        self._opened = threading.Event()
        self._sockets: dict[tuple[int, bool], socket.socket] = {}
        self._reactors: Sequence[Reactor] = ()
        self._askers: list[Asker] = []
        self._answerers: list[Answerer] = []
        self._on_lost: OnLost | None = None
        self._end: Outcome | None = None
        self._lost = False
        self._closed = False
        """Its sockets are, and everybody who waited was told."""
        self._told = False
        self._undisposed = 0
        self._watched: dict[Asker | Answerer, tuple[int, float]] = {}

        self._ordering = threading.RLock()
        """Messages are numbered in the order in which they are sent."""
        self._sent = 0
        self._unsent: deque[tuple[memoryview, Done]] = deque()
        self._sends: dict[int, tuple[memoryview, Done]] = {}
        self._recvs: deque[tuple[memoryview, Done]] = deque()
        self._placing: dict[int, Done] = {}
        """Of those whose buffer a message comes into, or has come and they are about to be told."""
        self._placed = 0
        self._pulls: dict[int, Done] = {}
        self._arrived: deque[tuple[int, int, bytes | None]] = deque()
        """Number, length and bytes of messages without a `recv`; without bytes it is held by the peer."""
        self._stored = 0
        self._imm_recvs: deque[Done] = deque()
        self._imms: deque[int] = deque()

    # --- beginning and end

    def ready(self, timeout_s: float) -> None:
        opened = self._opened.wait(timeout_s)
        if self._end is not None:
            raise TransportError(self._end.code, self._end.reason)
        if not opened:
            raise TransportError(TIMED_OUT, f"the peer's sockets did not come within {timeout_s:g} s")

    @property
    def on_lost(self) -> OnLost:
        return self._on_lost or _nobody

    @on_lost.setter
    def on_lost(self, call: OnLost) -> None:
        with self._lock:
            self._on_lost = call
        self._tell_lost()

    def wants(self, lane: int, *, asks: bool) -> bool:
        """Whether it still lacks this socket."""
        return self._end is None and lane < self.lanes and (lane, asks) not in self._sockets

    def attach(self, sock: socket.socket, lane: int, *, asks: bool, reactors: Sequence[Reactor]) -> bool:
        """Takes a socket on which the peer has proven itself; `asks`: this side does so. False if it has it already."""
        with self._lock:
            if not self.wants(lane, asks=asks):
                return False
            self._sockets[lane, asks] = sock
            self._reactors = reactors
            self._open()
        return True

    def agree(self, lanes: int) -> None:
        """The peer has so many lanes, perhaps fewer than were offered."""
        with self._lock:
            if not self._askers:
                self.lanes = lanes
                self._open()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def conceal(self, region: LocalRegion) -> None:
        for lane in self._answerers:
            lane.conceal(region)

    def _ends(self) -> list[Asker | Answerer]:
        return [*self._askers, *self._answerers]

    def _open(self) -> None:
        """Begins, when all sockets are there; to be called with the lock."""
        if len(self._sockets) < 2 * self.lanes or self._end is not None:
            return
        first = self._sockets[0, True]
        with contextlib.suppress(OSError):  # the peer may have gone already, which its lanes will find
            self.detail |= {"local": _address(first.getsockname()), "remote": _address(first.getpeername())}
        for index in range(self.lanes):
            self._askers.append(Asker(self._sockets[index, True], self._reactors[index], self))
        for index in range(self.lanes):
            self._answerers.append(Answerer(self._sockets[index, False], self._reactors[index], self, self._host.judge))
        self._undisposed = 2 * self.lanes
        self._opened.set()

    def lose(self, reason: str, *, breach: bool = False) -> None:
        if self._finish(Outcome(LINK_LOST, reason), lost=True):
            self._host.count("lost")
            if breach:
                self._host.count("breaches")

    def close(self) -> None:
        self._finish(Outcome(CANCELLED, "the connection was closed"), lost=False)

    def _finish(self, outcome: Outcome, *, lost: bool) -> bool:
        """Begins the end; False when it has begun already."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = outcome
            self._lost = lost
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):  # the peer was faster
                sock.shutdown(socket.SHUT_RDWR)
        self._opened.set()
        for lane in self._ends():
            lane.reactor.call(lane.dispose)
        if not self._askers:
            for sock in self._sockets.values():
                sock.close()
            self._ended()
        return True

    def disposed(self) -> None:
        with self._lock:
            self._undisposed -= 1
            if self._undisposed:
                return
        self._ended()

    def _ended(self) -> None:
        """No byte moves any more: whoever waits is told."""
        assert self._end is not None
        with self._lock:
            waiting = [done for _, done in (*self._sends.values(), *self._unsent, *self._recvs)]
            waiting += [*self._pulls.values(), *self._placing.values(), *self._imm_recvs]
            self._sends.clear()
            self._unsent.clear()
            self._recvs.clear()
            self._pulls.clear()
            self._placing.clear()
            self._arrived.clear()
            self._imm_recvs.clear()
            self._imms.clear()
        for done in waiting:
            done(self._end)
        self._host.forget(self)
        with self._lock:
            self._closed = True
        self._tell_lost()

    def _tell_lost(self) -> None:
        with self._lock:
            if self._told or not (self._closed and self._lost) or self._on_lost is None:
                return
            self._told = True
            assert self._end is not None
            call, reason = self._on_lost, self._end.reason
        call(reason)

    def check(self, now: float) -> None:
        """Loses the connection when nothing comes of what was asked; called now and then."""
        if not self._opened.is_set() or self._end is not None:
            return
        for lane in self._ends():
            progress, since = self._watched.get(lane, (-1, now))
            if not lane.busy or lane.progress != progress:
                self._watched[lane] = (lane.progress, now)
            elif now - since >= self._host.stall_s:
                self.lose(f"nothing was heard of an order for {self._host.stall_s:g} s")
                return
        if self._sends and not self._askers[0].busy:
            # The peer holds a message for as long as it likes, but is to be there meanwhile.
            self._tell_peer(PING)

    # --- orders

    def order(
        self, kind: Literal["read", "write"], copies: Sequence[Copy], done: Done, *, imm: int | None = None
    ) -> Drive | None:
        reading = kind == "read"
        for copy in copies:
            if code := _unfit(copy, reading=reading):
                done(Outcome(code, f"the local range: {REASONS[code].removeprefix('the ')}"))
                return None
        if not self._askers or self._end is not None:
            done(self._end or Outcome(LINK_LOST, "not connected yet"))
            return None

        def ended(status: int) -> None:
            done(self._outcome(status) if status else DONE)

        if len(copies) == 1 and (size := (copy := copies[0]).length) <= SMALL_MAX:
            views = [_view(copy, 0, size)] if size else []
            return self._ask(reading, self._askers[0], views, 1, _piece(copy, 0, size), size, ended, imm)
        return self._deal(reading, copies, ended, imm)

    def _ask(
        self,
        reading: bool,
        asker: Asker,
        views: list[memoryview],
        count: int,
        pieces: bytes,
        length: int,
        answered: Callable[[int], None],
        imm: int | None,
    ) -> Drive:
        if reading:
            views.reverse()
            question = Question(asker, answered, views, length)
            asker.ask(question, READ, 0, 0, count, pieces)
        else:
            question = Question(asker, answered, [], 0)
            flags, number = (0, 0) if imm is None else (WITH_IMM, imm & 0xFFFFFFFF)
            asker.ask(question, WRITE, flags, number, count, pieces, length, views)
        return question.drive

    def _tell_peer(self, kind: int, *, imm: int = 0, length: int = 0) -> None:
        """What has an answer that nobody waits for."""
        asker = self._askers[0]
        asker.ask(Question(asker, _nothing, [], 0), kind, imm=imm, length=length)

    def _deal(
        self, reading: bool, copies: Sequence[Copy], ended: Callable[[int], None], imm: int | None
    ) -> Drive | None:
        """An order that may be more than one question."""
        lanes = self._lanes_for(sum(copy.length for copy in copies))
        questions: list[tuple[Asker, list[memoryview], int, bytes, int]] = []
        parts = cut([(index, copy.length) for index, copy in enumerate(copies)], len(lanes))
        for asker, part in zip(lanes, parts, strict=False):
            for first in range(0, len(part), PIECES_MAX):
                some = part[first : first + PIECES_MAX]
                views = [_view(copies[index], offset, size) for index, offset, size in some if size]
                pieces = b"".join(_piece(copies[index], offset, size) for index, offset, size in some)
                questions.append((asker, views, len(some), pieces, sum(size for _, _, size in some)))
        if len(questions) == 1:
            return self._ask(reading, *questions[0], ended, imm)

        def gathered(status: int) -> None:
            # The number comes when the bytes of all parts are in memory.
            if status or imm is None:
                ended(status)
            else:
                self._askers[0].ask(Question(self._askers[0], ended, [], 0), IMM, imm=imm & 0xFFFFFFFF)

        if not questions:
            gathered(0)
            return None
        gather = _Gather(len(questions), gathered)
        drives = [self._ask(reading, *question, gather.answered, None) for question in questions]

        def drive(timeout_s: float | None) -> None:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            for each in drives:
                each(None if deadline is None else max(0.0, deadline - time.monotonic()))

        return drive

    def _lanes_for(self, total: int) -> list[Asker]:
        """Over which an order of so many bytes goes."""
        if total <= SMALL_MAX or self.lanes == 1:
            return self._askers[:1]
        large = self._askers[1:]
        if total >= 2 * STRIPE_MIN and len(large) > 1:
            return large[: min(len(large), total // STRIPE_MIN)]
        return [min(large, key=lambda asker: len(asker.pending))]

    def _outcome(self, status: int) -> Outcome:
        if status < 0:
            return self._end or Outcome(LINK_LOST, "the connection has ended")
        if status >= len(CODES):
            return Outcome(LINK_LOST, f"the peer answered with status {status}")
        return Outcome(CODES[status], REASONS[CODES[status]]) if status else DONE

    # --- messages

    def send(self, data: memoryview, done: Done) -> Drive | None:
        with self._lock:
            if self._askers and self._end is None:
                self._unsent.append((data, done))
                done = _ignored
        if done is not _ignored:
            done(self._end or Outcome(LINK_LOST, "not connected yet"))
            return None
        return self._send_unsent()

    def _send_unsent(self) -> Drive | None:
        """Sends what waits for its turn; drives the last of it."""
        asker = self._askers[0]
        last: Question | None = None
        while True:
            with self._ordering:
                with self._lock:
                    if not self._unsent or len(self._sends) >= SENDS_MAX or self._end is not None:
                        break
                    data, done = self._unsent.popleft()
                    self._sent += 1
                    number = self._sent
                    self._sends[number] = data, done
                last = Question(asker, self._message_answered(number), [], 0)
                if len(data) <= EAGER_MAX:
                    asker.ask(last, MESSAGE, length=len(data), payload=[data] if len(data) else ())
                else:
                    asker.ask(last, MESSAGE, ANNOUNCED, length=len(data))
        return last.drive if last is not None else None

    def _message_answered(self, number: int) -> Callable[[int], None]:
        def answered(status: int) -> None:
            if status != HELD and (then := self.message_ended(number, status)) is not None:
                then()

        return answered

    def message_ended(self, number: int, status: int) -> Callable[[], None] | None:
        with self._lock:
            ended = self._sends.pop(number, None)
        if ended is None:
            return None
        done = ended[1]

        def then() -> None:
            done(self._outcome(status))
            if self._unsent:
                self._send_unsent()

        return then

    def message_view(self, number: int) -> memoryview | None:
        found = self._sends.get(number)
        return found[0] if found is not None else None

    def recv(self, into: memoryview, done: Done) -> None:
        with self._lock:
            if self._end is None and self._askers:
                if not self._arrived:
                    self._recvs.append((into, done))
                    return
                number, length, data = self._arrived.popleft()
                if data is not None:
                    self._stored -= length + STORED_EACH
                elif length <= len(into):
                    self._pulls[number] = done
            else:
                number = length = -1
                data = None
        if number < 0:
            done(self._end or Outcome(LINK_LOST, "not connected yet"))
        else:
            self._receive(number, length, data, into, done)

    def _receive(self, number: int, length: int, data: bytes | None, into: memoryview, done: Done) -> None:
        """Brings a message and a `recv` together."""
        if length > len(into):
            if data is None:
                self._tell_peer(FINISH, imm=STATUS[TOO_LARGE], length=number)
            done(_too_large(length, into))
        elif data is not None:
            into[:length] = data
            done(Outcome(received=length))
        else:
            self._pull(number, length, into)

    def _pull(self, number: int, length: int, into: memoryview) -> None:
        def pulled(status: int) -> None:
            with self._lock:
                done = self._pulls.pop(number, None)
            if done is None:
                return  # the link has ended
            if status == 0:
                self._tell_peer(FINISH, length=number)
            done(self._outcome(status) if status else Outcome(received=length))

        lanes = self._lanes_for(length)
        parts = cut([(0, length)], len(lanes))
        gather = _Gather(len(parts), pulled)
        for asker, ((_, offset, size),) in zip(lanes, parts, strict=False):
            views = [into[offset : offset + size]] if size else []
            question = Question(asker, gather.answered, views, size)
            asker.ask(question, PULL, count=1, pieces=PIECE.pack(number, 0, offset, size))

    def place_message(self, length: int) -> tuple[memoryview | None, int, Callable[[], None]] | None:
        with self._lock:
            if not self._recvs:
                return None
            into, waiting = self._recvs.popleft()
            self._placed = number = self._placed + 1
            self._placing[number] = waiting
        fits = length <= len(into)
        outcome = Outcome(received=length) if fits else _too_large(length, into)

        def placed() -> None:
            with self._lock:
                done = self._placing.pop(number, None)
            if done is not None:  # else the link has ended
                done(outcome)

        return into if fits else None, 0 if fits else STATUS[TOO_LARGE], placed

    def keep_message(self, number: int, length: int, data: bytes | None) -> tuple[int, Callable[[], None] | None]:
        with self._lock:
            if data is not None and self._stored + length + STORED_EACH > STORED_MAX:
                data = None
            if not self._recvs:
                if data is not None:
                    self._stored += length + STORED_EACH
                elif (held := sum(data is None for _, _, data in self._arrived)) >= SENDS_MAX:
                    raise Malformed(f"the peer has more than {held} messages wait")
                self._arrived.append((number, length, data))
                return (0 if data is not None else HELD), None
            into, done = self._recvs.popleft()
            if data is None and length <= len(into):
                self._pulls[number] = done
        status = HELD if data is None else 0 if length <= len(into) else STATUS[TOO_LARGE]
        return status, lambda: self._receive(number, length, data, into, done)

    # --- numbers

    def recv_imm(self, done: Done) -> None:
        with self._lock:
            if self._imms:
                outcome = Outcome(imm=self._imms.popleft())
            elif self._end is None:
                self._imm_recvs.append(done)
                return
            else:
                outcome = self._end
        done(outcome)

    def take_imm(self, imm: int) -> tuple[int, Callable[[], None] | None]:
        with self._lock:
            if self._imm_recvs:
                done = self._imm_recvs.popleft()
                return 0, lambda: done(Outcome(imm=imm))
            if len(self._imms) >= IMMS_MAX:
                self._host.count(f"refused_{NO_ROOM}")
                return STATUS[NO_ROOM], None
            self._imms.append(imm)
            return 0, None


def _nobody(_: str) -> None:
    pass


def _nothing(_: int) -> None:
    pass


def _ignored(_: Outcome) -> None:
    pass


def _too_large(length: int, into: memoryview) -> Outcome:
    return Outcome(TOO_LARGE, f"the message has {length} bytes, the buffer {len(into)}")


def _unfit(copy: Copy, *, reading: bool) -> str:
    """Why this side's end of a copy cannot be had; empty when it can."""
    view = copy.local.view
    if view is None:
        return NO_REGION
    if copy.length < 0 or copy.local_offset < 0 or copy.local_offset + copy.length > len(view):
        return OUT_OF_RANGE
    if copy.remote_offset < 0:
        return OUT_OF_RANGE
    return READ_ONLY if reading and view.readonly else ""


def _view(copy: Copy, offset: int, size: int) -> memoryview:
    """A part of a copy, in the memory of this side."""
    assert copy.local.view is not None
    begin = copy.local_offset + offset
    return copy.local.view[begin : begin + size]


def _piece(copy: Copy, offset: int, size: int) -> bytes:
    """The same part, as the peer knows it."""
    remote = copy.remote
    return PIECE.pack(remote.token["handle"], remote.epoch, copy.remote_offset + offset, size)


def _address(name: Any) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
