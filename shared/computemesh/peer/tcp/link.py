"""One connection: orders dealt out over its lanes, messages, and its end."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol

from computemesh.contracts.peers import Transport
from computemesh.peer.tcp.answerer import Answerer
from computemesh.peer.tcp.asker import Asker, Gather, Question
from computemesh.peer.tcp.mail import Mail
from computemesh.peer.tcp.reactor import Reactor
from computemesh.peer.tcp.wire import (
    CODES,
    IMM,
    PIECE,
    PIECES_MAX,
    PING,
    READ,
    REASONS,
    WITH_IMM,
    WRITE,
    cut,
)
from computemesh.peer.transport import (
    DONE,
    LINK_LOST,
    NO_REGION,
    OUT_OF_RANGE,
    READ_ONLY,
    TIMED_OUT,
    WAS_CLOSED,
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


class Host(Protocol):
    """The endpoint, as its links see it."""

    stall_s: float

    def judge(
        self, handle: int, epoch: int, offset: int, length: int, write: bool
    ) -> tuple[LocalRegion | None, str]: ...

    def count(self, what: str) -> None: ...

    def forget(self, link: TcpLink) -> None: ...


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
        self.mail = Mail(self)

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
        self.mail.begin(self._askers[0])
        for index in range(self.lanes):
            sock, reactor = self._sockets[index, False], self._reactors[index]
            self._answerers.append(Answerer(sock, reactor, self, self.mail, self._host.judge))
        self._undisposed = 2 * self.lanes
        self._opened.set()

    def lose(self, reason: str, *, breach: bool = False) -> None:
        if self._finish(Outcome(LINK_LOST, reason), lost=True):
            self._host.count("lost")
            if breach:
                self._host.count("breaches")

    def count(self, what: str) -> None:
        self._host.count(what)

    def after_fork(self) -> None:
        """The child lets go of the sockets without a word over them, and takes no orders."""
        self._lock = threading.Lock()
        self._end = WAS_CLOSED
        self._closed = self._told = True
        self.mail.after_fork(WAS_CLOSED)
        for sock in self._sockets.values():
            sock.close()

    def close(self, why: Outcome = WAS_CLOSED, /) -> None:
        self._finish(why, lost=False)

    def _finish(self, outcome: Outcome, *, lost: bool) -> bool:
        """Begins the end; False when it has begun already."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = outcome
            self._lost = lost
        self.mail.stop(outcome)
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
        for done in self.mail.drop():
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
        if self.mail.is_held and not self._askers[0].busy:
            # The peer holds a message for as long as it likes, but is to be there meanwhile.
            self.tell_peer(PING)

    # --- orders

    def order(
        self, kind: Literal["read", "write"], copies: Sequence[Copy], done: Done, *, imm: int | None = None
    ) -> Drive | None:
        reading = kind == "read"
        for copy in copies:
            if code := _unfit(copy, reading):
                done(Outcome(code, f"the local range: {REASONS[code].removeprefix('the ')}"))
                return None
        if not self._askers or self._end is not None:
            done(self._end or Outcome(LINK_LOST, "not connected yet"))
            return None

        def ended(status: int) -> None:
            done(self.outcome(status) if status else DONE)

        try:
            if len(copies) == 1 and (size := (copy := copies[0]).length) <= SMALL_MAX:
                views = [_view(copy, 0, size)] if size else []
                return self._ask(reading, self._askers[0], views, 1, _piece(copy, 0, size), size, ended, imm)
            return self._deal(reading, copies, ended, imm)
        except TransportError as error:  # Before anything was asked.
            done(Outcome(error.code, str(error)))
            return None

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

    def tell_peer(self, kind: int, *, imm: int = 0, length: int = 0) -> None:
        """What has an answer that nobody waits for."""
        asker = self._askers[0]
        asker.ask(Question(asker, _nothing, [], 0), kind, imm=imm, length=length)

    def _deal(
        self, reading: bool, copies: Sequence[Copy], ended: Callable[[int], None], imm: int | None
    ) -> Drive | None:
        """An order that may be more than one question."""
        lanes = self.lanes_for(sum(copy.length for copy in copies))
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
        gather = Gather(len(questions), gathered)
        drives = [self._ask(reading, *question, gather.answered, None) for question in questions]

        def drive(timeout_s: float | None) -> None:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            for each in drives:
                each(None if deadline is None else max(0.0, deadline - time.monotonic()))

        return drive

    def lanes_for(self, total: int) -> list[Asker]:
        """Over which an order of so many bytes goes."""
        if total <= SMALL_MAX or self.lanes == 1:
            return self._askers[:1]
        large = self._askers[1:]
        if total >= 2 * STRIPE_MIN and len(large) > 1:
            return large[: min(len(large), total // STRIPE_MIN)]
        return [min(large, key=lambda asker: len(asker.pending))]

    def outcome(self, status: int) -> Outcome:
        if status < 0:
            return self._end or Outcome(LINK_LOST, "the connection has ended")
        if status >= len(CODES):
            return Outcome(LINK_LOST, f"the peer answered with status {status}")
        return Outcome(CODES[status], REASONS[CODES[status]]) if status else DONE

    # --- messages and numbers

    def send(self, data: memoryview, done: Done) -> Drive | None:
        return self.mail.send(data, done)

    def recv(self, into: memoryview, done: Done) -> None:
        self.mail.recv(into, done)

    def recv_imm(self, done: Done) -> None:
        self.mail.recv_imm(done)

    def withdraw(self, done: Done) -> bool:
        return self.mail.withdraw(done)

    def give_back(self, taken: bytes | int) -> None:
        self.mail.give_back(taken)


def _nobody(_: str) -> None:
    pass


def _nothing(_: int) -> None:
    pass


def _unfit(copy: Copy, reading: bool) -> str:
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
    try:
        return PIECE.pack(remote.token["handle"], remote.epoch, copy.remote_offset + offset, size)
    except (KeyError, struct.error):
        raise TransportError(NO_REGION, f"region {remote.name!r}: the peer told no handle of it") from None


def _address(name: Any) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
