"""Messages and numbers of a link, each taken in the order in which they were sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from computemesh.peer.immediates import Immediates
from computemesh.peer.tcp.asker import Asker, Gather, Question
from computemesh.peer.tcp.wire import (
    ANNOUNCED,
    EAGER_MAX,
    FINISH,
    HELD,
    MESSAGE,
    NO_ROOM,
    PIECE,
    PULL,
    STATUS,
    Malformed,
    cut,
)
from computemesh.peer.transport import LINK_LOST, TOO_LARGE, Done, Drive, Outcome

SENDS_MAX: Final = 256
"""Messages that wait for the peer's `recv` at a time; more of them wait here."""
STORED_MAX: Final = 4 * 1024 * 1024
"""Bytes of messages that are kept until there is a `recv`; what is beyond is held by the peer."""
STORED_EACH: Final = 256
"""What a message costs beside its bytes."""

Then = Callable[[], None]


class MailLink(Protocol):
    """The link, as its messages see it."""

    def outcome(self, status: int) -> Outcome: ...

    def lanes_for(self, total: int) -> list[Asker]:
        """Over which an order of so many bytes goes."""
        ...

    def tell_peer(self, kind: int, *, imm: int = 0, length: int = 0) -> None:
        """Asks what has an answer that nobody waits for."""
        ...

    def count(self, what: str) -> None: ...


class Mail:
    """What was sent and not taken yet, and what is waited for.

    A message up to EAGER_MAX goes to the peer at once, which stores it while there is room and no `recv`. All others
    are held: the peer knows that they are there, and pulls them into the buffer of their `recv`.
    """

    def __init__(self, link: MailLink) -> None:
        self._link = link
        self._asker: Asker | None = None
        self._end: Outcome | None = None
        self._lock = threading.Lock()
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
        self._immediates = Immediates()

    @property
    def is_held(self) -> bool:
        """Whether the peer holds messages of this side."""
        return bool(self._sends)

    def begin(self, asker: Asker) -> None:
        """The link is there; messages go over this lane."""
        self._asker = asker

    def stop(self, end: Outcome) -> None:
        """Takes nothing more."""
        with self._lock:
            self._end = end

    def after_fork(self, end: Outcome) -> None:
        self._lock = threading.Lock()
        self._end = end

    def drop(self) -> list[Done]:
        """Forgets all, once no byte moves any more; who is to be told of the end."""
        with self._lock:
            waiting = [done for _, done in (*self._sends.values(), *self._unsent, *self._recvs)]
            waiting += [*self._pulls.values(), *self._placing.values(), *self._immediates.drop()]
            self._sends.clear()
            self._unsent.clear()
            self._recvs.clear()
            self._pulls.clear()
            self._placing.clear()
            self._arrived.clear()
        return waiting

    def send(self, data: memoryview, done: Done) -> Drive | None:
        with self._lock:
            refused = self._refusal()
            if refused is None:
                self._unsent.append((data, done))
        if refused is not None:
            done(refused)
            return None
        return self._send_unsent()

    def _refusal(self) -> Outcome | None:
        """Why nothing can be sent or received, if so."""
        return self._end or (None if self._asker is not None else Outcome(LINK_LOST, "not connected yet"))

    def _send_unsent(self) -> Drive | None:
        """Sends what waits for its turn; drives the last of it."""
        asker = self._asker
        assert asker is not None
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

    def message_ended(self, number: int, status: int) -> Then | None:
        with self._lock:
            ended = self._sends.pop(number, None)
        if ended is None:
            return None
        done = ended[1]

        def then() -> None:
            done(self._link.outcome(status))
            if self._unsent:
                self._send_unsent()

        return then

    def message_view(self, number: int) -> memoryview | None:
        found = self._sends.get(number)
        return found[0] if found is not None else None

    def recv(self, into: memoryview, done: Done) -> None:
        with self._lock:
            if (refused := self._refusal()) is None:
                if not self._arrived:
                    self._recvs.append((into, done))
                    return
                number, length, data = self._arrived.popleft()
                if data is not None:
                    self._stored -= length + STORED_EACH
                elif length <= len(into):
                    self._pulls[number] = done
            else:
                number, length, data = 0, 0, None
        if refused is not None:
            done(refused)
        else:
            self._receive(number, length, data, into, done)

    def _receive(self, number: int, length: int, data: bytes | None, into: memoryview, done: Done) -> None:
        """Brings a message and a `recv` together."""
        if length > len(into):
            if data is None:
                self._link.tell_peer(FINISH, imm=STATUS[TOO_LARGE], length=number)
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
                self._link.tell_peer(FINISH, length=number)
            done(self._link.outcome(status) if status else Outcome(received=length))

        lanes = self._link.lanes_for(length)
        parts = cut([(0, length)], len(lanes))
        gather = Gather(len(parts), pulled)
        for asker, ((_, offset, size),) in zip(lanes, parts, strict=False):
            views = [into[offset : offset + size]] if size else []
            question = Question(asker, gather.answered, views, size)
            asker.ask(question, PULL, count=1, pieces=PIECE.pack(number, 0, offset, size))

    def place_message(self, length: int) -> tuple[memoryview | None, int, Then] | None:
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

    def keep_message(self, number: int, length: int, data: bytes | None) -> tuple[int, Then | None]:
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

    def withdraw(self, done: Done) -> bool:
        with self._lock:
            for place, (_, waiting) in enumerate(self._recvs):
                if waiting == done:
                    del self._recvs[place]
                    return True
            return self._immediates.withdraw(done)

    def give_back(self, taken: bytes | int) -> None:
        with self._lock:
            if isinstance(taken, int):
                waiting = self._immediates.give_back(taken)
                then = None if waiting is None else partial(waiting, Outcome(imm=taken))
            elif self._recvs:
                then = partial(self._receive, 0, len(taken), taken, *self._recvs.popleft())
            else:
                then = None
                self._arrived.appendleft((0, len(taken), taken))
                self._stored += len(taken) + STORED_EACH
        if then is not None:
            then()

    # --- numbers

    def recv_imm(self, done: Done) -> None:
        with self._lock:
            outcome = self._immediates.take() or self._end
            if outcome is None:
                self._immediates.wait(done)
                return
        done(outcome)

    def take_imm(self, imm: int) -> tuple[int, Then | None]:
        with self._lock:
            if self._immediates.is_full:
                self._link.count(f"refused_{NO_ROOM}")
                return STATUS[NO_ROOM], None
            done = self._immediates.come(imm)
        return 0, None if done is None else lambda: done(Outcome(imm=imm))


def _too_large(length: int, into: memoryview) -> Outcome:
    return Outcome(TOO_LARGE, f"the message has {length} bytes, the buffer {len(into)}")
