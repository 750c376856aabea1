"""One connection: queue pairs between two processes.

Reads and writes are cut into pieces and go over all pairs; nobody at the peer takes part in them. All else goes over
the first pair: numbers that come with a write, and notes (:mod:`computemesh.peer.rdma.notes`), which carry messages,
or say where a long one can be fetched.

Nothing here waits or spins: work is posted until a queue is full, and the endpoint's thread calls
:meth:`RdmaLink.serve` when some of it is done. Whoever is told of an outcome is told outside of the lock.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from computemesh.contracts.peers import Transport
from computemesh.peer.immediates import KEPT_MAX, Immediates
from computemesh.peer.rdma.memory import Exposed, Exposures
from computemesh.peer.rdma.notes import BUFFER_BYTES, BUFFERS, SMALL, Flow, Kind, Note
from computemesh.peer.rdma.verbs import (
    FLUSHED,
    REFUSED,
    Access,
    Completions,
    Device,
    Finished,
    Memory,
    Pair,
    WorkKind,
    status_text,
)
from computemesh.peer.regions import address_of
from computemesh.peer.transport import (
    DONE,
    LINK_LOST,
    NO_REGION,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    STALL_S,
    TIMED_OUT,
    TOO_LARGE,
    WAS_CLOSED,
    Copy,
    Done,
    OnLost,
    Outcome,
    TransportError,
)

PIECE_BYTES: Final = 1 << 20
"""The longest piece of a copy: one piece is one piece of work for an interface."""

DEPTH: Final = 128
"""Pieces that a queue pair has at most."""

ALIVE_S: Final = 2.0
"""After so long without anything to do, a peer is asked for a sign of life by a write of no bytes, which its interface
answers by itself."""

GOODBYE_S: Final = 0.5
"""How long a link that was closed waits for its farewell to be sent."""

RECEIVE: Final = 1 << 62
"""Marks the number of a receive buffer among those of work."""

IMM_MASK: Final = 0xFFFFFFFF

TOOK: Final = (
    DONE,
    Outcome(TOO_LARGE, "the peer had no room for the message, and left it out"),
    Outcome(NO_REGION, "the peer could not fetch the message"),
)
"""How a long message ended, by what the peer says."""


@dataclass(slots=True, eq=False)
class Order:
    """A transfer; done when all of its pieces are."""

    done: Done
    pieces: int
    outcome: Outcome = DONE


@dataclass(slots=True, eq=False)
class Work:
    """What is given to a queue pair, or waits for it."""

    kind: WorkKind
    order: Order | None = None
    address: int = 0
    length: int = 0
    lkey: int = 0
    remote_address: int = 0
    rkey: int = 0
    imm: int | None = None
    local: Exposed | None = None
    """Held while it is under way, so that the memory is not taken from it."""
    remote: int = 0
    """Number of the peer's region."""
    note: Note | None = None
    content: bytes | memoryview = b""
    """What follows the note."""
    buffer: int = -1
    """Where they are sent from."""
    pair: int = 0
    since: float = 0.0


@dataclass(slots=True, eq=False)
class Outgoing:
    """A message that was given to `send`."""

    data: memoryview
    done: Done
    number: int = 0
    memory: Memory | None = None
    """Of a long one, which the peer fetches."""


@dataclass(slots=True, eq=False)
class Incoming:
    """A message of the peer: its bytes, or where they are."""

    data: bytes = b""
    large: Note | None = None
    counted: bool = False
    """Whether it was taken once, and the peer is told so."""


@dataclass(slots=True, eq=False)
class Wanted:
    """A `recv` that waits."""

    into: memoryview
    done: Done


Calls = list[Callable[[], None]]
"""What is left to be told, outside of the lock."""

State = Literal["new", "listening", "connecting", "open", "closing", "gone"]
"""`listening`: nothing is sent before the peer's hello has come, since its pairs may not be ready; `connecting`: ours
went out; `closing`: so did our farewell, or it is about to."""


@dataclass(slots=True)
class Lane:
    """A queue pair, and what waits for it."""

    pair: Pair
    waiting: deque[Work] = field(default_factory=deque[Work])
    room: int = DEPTH


class RdmaLink:
    """See :class:`computemesh.peer.transport.Link`."""

    transport: Transport = "rdma"

    def __init__(
        self,
        *,
        device: Device,
        completions: Completions,
        pairs: Sequence[Pair],
        exposures: Exposures,
        proof: bytes,
        expected: bytes,
        first: bool,
        on_gone: Callable[[RdmaLink], None],
    ) -> None:
        """Args:
        proof, expected: what this end shows, and what the other has to show.
        first: this end says hello first.
        on_gone: called once the pairs are no more.
        """
        self.detail: Mapping[str, Any] = {}
        self.completions = completions
        self.refused = 0
        self._device = device
        self._peer_nic = ""
        self._exposures = exposures
        self._proof, self._expected, self._first = proof, expected, first
        self._on_gone = on_gone
        self._on_lost: OnLost | None = None
        self._lock = threading.Lock()
        self._state: State = "new"
        self._lost: str | None = None
        self._why_closed = WAS_CLOSED
        self._opened = threading.Event()
        self._lanes = [Lane(pair) for pair in pairs]
        self._next_lane = itertools.cycle(range(len(pairs)))
        self._numbers = itertools.count(1)
        self._flying: dict[int, Work] = {}
        self._flow = Flow()
        self._notes: deque[Work] = deque()
        self._messages: deque[Outgoing] = deque()
        self._fetched: dict[int, Outgoing] = {}
        """Long messages that the peer was told of and has not fetched yet."""
        self._inbox: deque[Incoming] = deque()
        self._wanted: deque[Wanted] = deque()
        self._immediates = Immediates()
        self._revoked: set[int] = set()
        self._using: dict[int, int] = {}
        """How many pieces for each region of the peer are under way or wait."""
        self._revoking: set[int] = set()
        """Regions here whose end the peer has not confirmed."""
        self._confirmed = threading.Condition(self._lock)
        self._memories: list[Memory] = []
        self._alive_at = self._progress_at = time.monotonic()
        self._close_by = 0.0
        buffers = bytearray(2 * BUFFERS * BUFFER_BYTES)  # to receive in, then to send from
        self._buffers = memoryview(buffers)
        self._base = address_of(self._buffers)
        memory = device.register(self._base, len(buffers), Access(local_write=True))
        self._memories.append(memory)
        self._buffers_key = memory.lkey
        self._free = list(range(BUFFERS, 2 * BUFFERS))
        for number in range(BUFFERS):
            self._lay_out(number)

    # --- its beginning ------------------------------------------------------------------------------------------

    def connected(self, peer_nic: str, detail: Mapping[str, Any]) -> None:
        """The pairs have been told of those of the peer; the side that says hello first does so."""
        self._peer_nic = peer_nic
        self.detail = detail
        with self._within() as calls:
            if self._state == "new":
                self._state = "connecting" if self._first else "listening"
                if self._first:
                    self._say(Note(Kind.HELLO), self._proof)
                    self._pump(calls)

    def ready(self, timeout_s: float) -> None:
        if not self._opened.wait(timeout_s):
            raise TransportError(TIMED_OUT, f"the peer's queue pairs did not answer within {timeout_s:g} s")
        if self._lost is not None:
            raise TransportError(LINK_LOST, self._lost)

    @property
    def on_lost(self) -> OnLost:
        return self._on_lost or (lambda reason: None)

    @on_lost.setter
    def on_lost(self, on_lost: OnLost) -> None:
        with self._lock:
            self._on_lost = on_lost
            lost = self._lost if self._state == "gone" else None
        if lost is not None:  # it was lost before anybody wanted to hear of it
            on_lost(lost)

    # --- what programs ask for ----------------------------------------------------------------------------------

    def order(
        self, kind: Literal["read", "write"], copies: Sequence[Copy], done: Done, *, imm: int | None = None
    ) -> None:
        order = Order(done, 0)
        works: list[Work] = []
        with self._within() as calls:
            if (refusal := self._unusable()) is not None:
                calls.append(lambda: done(refusal))
                return
            for copy in copies:
                wrong = self._cut(kind, copy, order, works)
                if wrong is not None:
                    self._give_back(works)
                    calls.append(_told(done, wrong))
                    return
            if imm is not None:
                last = works[-1] if works else Work("write_imm", order)
                if not works:
                    works.append(last)
                last.kind, last.imm = "write_imm", imm & IMM_MASK
            if not works:
                calls.append(lambda: done(DONE))
                return
            order.pieces = len(works)
            for work in works:
                # A number comes after its bytes only if they go the same way.
                work.pair = 0 if imm is not None else next(self._next_lane)
                self._lanes[work.pair].waiting.append(work)
            self._pump(calls)

    def send(self, data: memoryview, done: Done) -> None:
        message = Outgoing(data, done)
        if len(data) > SMALL:
            try:
                message.memory = self._device.register(address_of(data), len(data), Access(remote_read=True))
            except OSError as error:
                done(Outcome(NO_REGION, f"the message cannot be registered: {error}"))
                return
        with self._within() as calls:
            if (refusal := self._unusable()) is not None:
                calls.append(lambda: self._sent(message, refusal))
                return
            self._messages.append(message)
            self._pump(calls)

    def recv(self, into: memoryview, done: Done) -> None:
        with self._within() as calls:
            if (refusal := self._unusable()) is not None and not self._inbox:
                calls.append(lambda: done(refusal))
                return
            self._wanted.append(Wanted(into, done))
            self._match(calls)
            self._pump(calls)

    def recv_imm(self, done: Done) -> None:
        with self._within() as calls:
            outcome = self._immediates.take() or self._unusable()
            if outcome is None:
                self._immediates.wait(done)
            else:
                calls.append(_told(done, outcome))

    def withdraw(self, done: Done) -> bool:
        with self._within():
            for wanted in self._wanted:
                if wanted.done == done:
                    self._wanted.remove(wanted)
                    return True
            return self._immediates.withdraw(done)

    def give_back(self, taken: bytes | int) -> None:
        with self._within() as calls:
            if isinstance(taken, int):
                if (done := self._immediates.give_back(taken)) is not None:
                    calls.append(_told(done, Outcome(imm=taken)))
            else:
                self._inbox.appendleft(Incoming(taken, counted=True))
                self._match(calls)
                self._pump(calls)

    def close(self, why: Outcome = WAS_CLOSED, /) -> None:
        with self._within() as calls:
            if self._state in ("closing", "gone"):
                return
            self._why_closed = why
            if self._state == "open":
                self._state = "closing"
                self._close_by = time.monotonic() + GOODBYE_S
                self._say(Note(Kind.BYE))
                self._pump(calls)
            else:
                self._end(calls, self._why_closed.code, self._why_closed.reason)

    def _unusable(self) -> Outcome | None:
        if self._state == "open":
            return None
        if self._lost is not None:
            return Outcome(LINK_LOST, self._lost)
        return (
            self._why_closed if self._state in ("closing", "gone") else Outcome(LINK_LOST, "the link is not ready yet")
        )

    # --- regions that end ---------------------------------------------------------------------------------------

    def revoke(self, number: int) -> None:
        """Tells the peer that a region is about to be no more."""
        with self._within() as calls:
            if self._state in ("listening", "connecting", "open"):
                self._revoking.add(number)
                self._say(Note(Kind.REVOKE, number=number))
                self._pump(calls)

    def revoked(self, number: int, until: float) -> bool:
        """Waits until the peer has said that it uses the region no longer; False if it did not in time."""
        with self._confirmed:
            while number in self._revoking:
                left = until - time.monotonic()
                if left <= 0 or not self._confirmed.wait(left):
                    return number not in self._revoking
            return True

    # --- what the endpoint's thread calls -----------------------------------------------------------------------

    def serve(self) -> None:
        """Something is done."""
        with self._within() as calls:
            if self._state == "gone":
                return
            self._progress_at = time.monotonic()
            self.completions.hush()
            self.completions.arm()
            flushed = False
            while finished := self.completions.poll(64):
                for one in finished:
                    if one.status == FLUSHED:  # of something else, which may be told later
                        flushed = True
                    else:
                        self._finished(one, calls)
                    if self._is_gone():
                        return
            if flushed:
                self._lose(calls, "the queue pair failed: the peer asked for what it must not, or its interface failed")
                return
            self._match(calls)
            self._pump(calls)
            if self._state == "closing" and not self._notes and not self._flying:
                self._end(calls, self._why_closed.code, self._why_closed.reason)

    def _is_gone(self) -> bool:
        return self._state == "gone"

    def look(self, now: float) -> None:
        """Called now and then: asks for a sign of life, and gives up what makes no progress."""
        with self._within() as calls:
            if self._state == "closing" and now >= self._close_by:
                self._end(calls, self._why_closed.code, self._why_closed.reason)
                return
            if self._state not in ("connecting", "open"):
                return
            oldest = min((work.since for work in self._flying.values()), default=now)
            if now - max(oldest, self._progress_at) > STALL_S:
                self._lose(calls, f"no progress for {STALL_S:g} s")
            elif not self._flying and now - self._alive_at >= ALIVE_S:
                self._alive_at = now
                if self._state == "open":
                    self._lanes[0].waiting.append(Work("write"))
                else:  # the peer's pair may not let itself be written to yet
                    self._say(Note(Kind.CREDITS))
                self._pump(calls)

    # --- work ---------------------------------------------------------------------------------------------------

    def _cut(self, kind: Literal["read", "write"], copy: Copy, order: Order, works: list[Work]) -> Outcome | None:
        """Makes pieces of a copy; what is returned says why it can't be."""
        remote, token = copy.remote, copy.remote.token
        for whose, offset, length in (
            ("here", copy.local_offset, copy.local.length),
            ("of the peer", copy.remote_offset, remote.length),
        ):
            if offset < 0 or copy.length < 0 or offset + copy.length > length:
                return Outcome(
                    OUT_OF_RANGE,
                    f"region {remote.name!r} {whose} has {length} bytes, {copy.length} from {offset} on were asked for",
                )
        if kind == "write" and not remote.writable:
            return Outcome(READ_ONLY, f"region {remote.name!r} of the peer may not be written to")
        local = self._exposures.held(copy.local)
        memory = local.memories.get(self._device.name) if local is not None else None
        if local is None or memory is None:
            return Outcome(NO_REGION, f"region {copy.local.name!r} here is not registered with {self._device.name}")
        keys: object = token.get("keys")
        rkey = cast(Mapping[str, object], keys).get(self._peer_nic) if isinstance(keys, Mapping) else None
        address, number = token.get("address"), token.get("number")
        if (
            not (isinstance(rkey, int) and isinstance(address, int) and isinstance(number, int))
            or not 0 <= rkey < 1 << 32
            or not 0 <= address < (1 << 64) - remote.length
        ):
            return Outcome(NO_REGION, f"region {remote.name!r} of the peer is not registered with {self._peer_nic}")
        if number in self._revoked:
            return Outcome(STALE_EPOCH, f"region {remote.name!r} of the peer is no longer what it was")
        for begin in range(0, copy.length, PIECE_BYTES):
            if not local.take():
                return Outcome(NO_REGION, f"region {copy.local.name!r} here is no longer registered")
            self._using[number] = self._using.get(number, 0) + 1
            works.append(
                Work(
                    kind,
                    order,
                    copy.local.address + copy.local_offset + begin,
                    min(PIECE_BYTES, copy.length - begin),
                    memory.lkey,
                    address + copy.remote_offset + begin,
                    rkey,
                    local=local,
                    remote=number,
                )
            )
        return None

    def _give_back(self, works: Sequence[Work]) -> None:
        for work in works:
            self._release(work)

    def _release(self, work: Work) -> None:
        """Nothing of a piece is under way any more, at either end."""
        if work.local is not None:
            work.local.give_back()
            work.local = None
        if work.remote:
            left = self._using[work.remote] - 1
            self._using[work.remote] = left
            if not left:
                del self._using[work.remote]
                if work.remote in self._revoked:
                    self._say(Note(Kind.REVOKED, number=work.remote))
            work.remote = 0

    def _say(self, note: Note, content: bytes = b"") -> None:
        self._notes.append(Work("send", note=note, content=content))

    def _pump(self, calls: Calls) -> None:
        """Gives the pairs as much as they can take."""
        if self._state not in ("connecting", "open", "closing"):
            return
        try:
            if self._flow.must_tell() and not any(
                work.note is not None and work.note.kind is Kind.CREDITS for work in self._notes
            ):
                self._notes.appendleft(Work("send", note=Note(Kind.CREDITS)))
            first = self._lanes[0]
            while self._notes and first.room and self._free:
                note = self._notes[0].note
                assert note is not None
                if not self._flow.may_send(note.kind):
                    break
                self._post_note(self._notes.popleft())
            if self._state != "open":
                return
            while self._messages and first.room and self._free:
                message = self._messages[0]
                kind = Kind.MESSAGE if message.memory is None else Kind.LARGE
                if not self._flow.may_send(kind):
                    break
                self._post_message(self._messages.popleft())
            for lane in self._lanes:
                while lane.waiting and lane.room:
                    work = lane.waiting[0]
                    if work.imm is not None and not self._flow.may_send(None):
                        break
                    lane.waiting.popleft()
                    if work.imm is not None:
                        self._flow.sends(None)
                    self._post(lane, work)
        except OSError as error:
            self._lose(calls, f"{self._device.name}: {error}")

    def _post_note(self, work: Work) -> None:
        assert work.note is not None
        owed, taken = self._flow.sends(work.note.kind)
        note = work.note._replace(credits=owed, taken=taken, length=work.note.length or len(work.content))
        head = note.pack()
        work.buffer = self._free.pop()
        begin, middle = work.buffer * BUFFER_BYTES, work.buffer * BUFFER_BYTES + len(head)
        self._buffers[begin:middle] = head
        self._buffers[middle : middle + len(work.content)] = work.content
        work.address, work.length, work.lkey = self._base + begin, len(head) + len(work.content), self._buffers_key
        self._post(self._lanes[0], work)

    def _post_message(self, message: Outgoing) -> None:
        if message.memory is None:
            work = Work("send", Order(message.done, 1), note=Note(Kind.MESSAGE), content=message.data)
        else:
            message.number = next(self._numbers) & IMM_MASK
            self._fetched[message.number] = message
            work = Work(
                "send",
                note=Note(
                    Kind.LARGE,
                    number=message.number,
                    key=message.memory.rkey,
                    length=len(message.data),
                    address=address_of(message.data),
                ),
            )
        self._post_note(work)

    def _post(self, lane: Lane, work: Work) -> None:
        number = next(self._numbers)
        work.since = time.monotonic()
        self._flying[number] = work
        lane.room -= 1
        lane.pair.post(
            work.kind, number, work.address, work.length, work.lkey, work.remote_address, work.rkey, work.imm or 0
        )

    def _lay_out(self, number: int) -> None:
        self._lanes[0].pair.receive(
            RECEIVE | number, self._base + number * BUFFER_BYTES, BUFFER_BYTES, self._buffers_key
        )

    # --- what comes back ----------------------------------------------------------------------------------------

    def _finished(self, one: Finished, calls: Calls) -> None:
        if one.work & RECEIVE:
            if one.status:
                self._lose(calls, f"receiving failed: {status_text(one.status)}")
            else:
                self._received(one, calls)
            return
        work = self._flying.pop(one.work)
        self._lanes[work.pair].room += 1
        if work.buffer >= 0:
            self._free.append(work.buffer)
        order = work.order
        if one.status:
            text = status_text(one.status)
            if order is not None:
                # What is out of range was refused before it was sent. An honest order meets this when the peer dies:
                # its regions may end before its queue pairs do.
                reason = f"the peer's interface refused it: {text}" if one.status in REFUSED else text
                order.outcome = Outcome(LINK_LOST, reason)
                self._lanes[work.pair].waiting.appendleft(work)  # where `_end` finds it
            else:
                self._release(work)
            self._lose(calls, text)
            return
        self._release(work)
        if order is not None:
            order.pieces -= 1
            if not order.pieces:
                calls.append(lambda: order.done(order.outcome))

    def _received(self, one: Finished, calls: Calls) -> None:
        buffer = one.work & ~RECEIVE
        content = b""
        note: Note | None = None
        if one.imm is None:
            begin = buffer * BUFFER_BYTES
            came = bytes(self._buffers[begin : begin + one.length])
            try:
                note = Note.read(came)
            except ValueError as error:
                self._refuse(calls, f"the peer sent {error}")
                return
            content = came[len(came) - note.length :] if note.kind in (Kind.MESSAGE, Kind.HELLO) else b""
        try:
            self._lay_out(buffer)
        except OSError as error:
            self._lose(calls, f"{self._device.name}: {error}")
            return
        self._flow.owed += 1
        if note is None:
            imm = _signed(cast(int, one.imm))
            if self._immediates.is_full:
                self._lose(calls, f"{KEPT_MAX} numbers came with writes of the peer, and nobody has taken them")
            elif (done := self._immediates.come(imm)) is not None:
                calls.append(_told(done, Outcome(imm=imm)))
        elif not self._flow.hears(note):
            self._refuse(calls, "the peer gave more credits than there are")
        else:
            self._heard(note, content, calls)

    def _heard(self, note: Note, content: bytes, calls: Calls) -> None:
        kind = note.kind
        if kind is Kind.HELLO:
            self._greeted(content, calls)
        elif kind is Kind.OPEN and self._state == "connecting" and not self._first:
            self._state = "open"
            self._opened.set()
        elif kind is Kind.BYE:
            self._lose(calls, "the peer has closed the link")
        elif self._state not in ("open", "closing") and kind not in (Kind.CREDITS, Kind.REVOKE):
            self._refuse(calls, f"the peer said {kind.name} before the link was open")
        elif kind is Kind.MESSAGE:
            self._inbox.append(Incoming(content))
        elif kind is Kind.LARGE:
            self._inbox.append(Incoming(large=note))
        elif kind is Kind.TOOK:
            message = self._fetched.pop(note.number, None)
            if message is not None:
                calls.append(_call(self._sent, message, TOOK[min(note.flag, 2)]))
        elif kind is Kind.REVOKE:
            self._revoked.add(note.number)
            if note.number not in self._using:
                self._say(Note(Kind.REVOKED, number=note.number))
        elif kind is Kind.REVOKED:
            self._revoking.discard(note.number)
            self._confirmed.notify_all()

    def _greeted(self, proof: bytes, calls: Calls) -> None:
        if self._state != ("connecting" if self._first else "listening"):
            self._refuse(calls, "the peer said hello when it was not its turn")
            return
        if not hmac.compare_digest(proof, self._expected):
            self._refuse(calls, "the peer could not prove that it is the one that was asked")
            return
        for lane in self._lanes:
            lane.pair.allow()
        if self._first:
            self._say(Note(Kind.OPEN))
            self._state = "open"
            self._opened.set()
        else:
            self._state = "connecting"
            self._notes.appendleft(Work("send", note=Note(Kind.HELLO), content=self._proof))

    # --- messages -----------------------------------------------------------------------------------------------

    def _match(self, calls: Calls) -> None:
        """Gives messages that came to those who wait for one."""
        while self._inbox and self._wanted:
            incoming, wanted = self._inbox.popleft(), self._wanted.popleft()
            if not incoming.counted:
                self._flow.taken += 1
            length = len(incoming.data) if incoming.large is None else incoming.large.length
            if length > len(wanted.into):
                if incoming.large is not None:
                    self._say(Note(Kind.TOOK, flag=1, number=incoming.large.number))  # an index of TOOK
                reason = f"a message of {length} bytes was left out: there was room for {len(wanted.into)}"
                calls.append(_told(wanted.done, Outcome(TOO_LARGE, reason)))
            elif incoming.large is None:
                wanted.into[:length] = incoming.data
                calls.append(_told(wanted.done, Outcome(received=length)))
            else:
                self._fetch(incoming.large, wanted, calls)

    def _fetch(self, note: Note, wanted: Wanted, calls: Calls) -> None:
        begin = address_of(wanted.into)
        try:
            memory = self._device.register(begin, note.length, Access(local_write=True))
        except OSError as error:
            self._say(Note(Kind.TOOK, flag=2, number=note.number))
            outcome = Outcome(NO_REGION, f"the buffer of the message cannot be registered: {error}")
            calls.append(_told(wanted.done, outcome))
            return

        def fetched(outcome: Outcome) -> None:
            memory.close()
            with self._within() as more:
                if self._state == "open":
                    self._say(Note(Kind.TOOK, flag=2 if outcome.code else 0, number=note.number))
                    self._pump(more)
            wanted.done(outcome if outcome.code else Outcome(received=note.length))

        order = Order(fetched, 0)
        for offset in range(0, note.length, PIECE_BYTES):
            order.pieces += 1
            length = min(PIECE_BYTES, note.length - offset)
            work = Work("read", order, begin + offset, length, memory.lkey, note.address + offset, note.key)
            work.pair = next(self._next_lane)
            self._lanes[work.pair].waiting.append(work)

    def _sent(self, message: Outgoing, outcome: Outcome) -> None:
        if message.memory is not None:
            message.memory.close()
            message.memory = None
        message.done(outcome)

    # --- its end ------------------------------------------------------------------------------------------------

    def _refuse(self, calls: Calls, reason: str) -> None:
        self.refused += 1
        self._lose(calls, reason)

    def _lose(self, calls: Calls, reason: str) -> None:
        if self._state == "closing":
            self._end(calls, self._why_closed.code, self._why_closed.reason)
            return
        if self._state == "gone":
            return
        self._lost = reason
        self._end(calls, LINK_LOST, reason)
        if self._on_lost is not None:
            calls.append(_lost(self._on_lost, reason))

    def _end(self, calls: Calls, code: str, reason: str) -> None:
        """No interface reads or writes for this link any more; then all that was asked for has failed."""
        if self._state == "gone":
            return
        self._state = "gone"
        self._lost = self._lost or reason
        for lane in self._lanes:
            lane.pair.close()
        orders: dict[Order, None] = {}
        waiting = itertools.chain(*(lane.waiting for lane in self._lanes))
        for work in itertools.chain(self._flying.values(), waiting, self._notes):
            if work.local is not None:
                work.local.give_back()
                work.local = None
            if work.order is not None:
                orders[work.order] = None
        failed = Outcome(code, reason)
        calls.extend(_told(order.done, order.outcome if order.outcome.code else failed) for order in orders)
        for message in itertools.chain(self._messages, self._fetched.values()):
            calls.append(_call(self._sent, message, failed))
        calls.extend(_told(wanted.done, failed) for wanted in self._wanted)
        calls.extend(_told(done, failed) for done in self._immediates.drop())
        for collection in (self._flying, self._notes, self._messages, self._fetched, self._wanted):
            collection.clear()
        for lane in self._lanes:
            lane.waiting.clear()
        self._inbox = deque(incoming for incoming in self._inbox if incoming.large is None)
        self._revoking.clear()
        self._confirmed.notify_all()
        self._opened.set()
        for memory in self._memories:
            memory.close()
        calls.append(lambda: self._on_gone(self))

    @contextlib.contextmanager
    def _within(self) -> Generator[Calls]:
        calls: Calls = []
        with self._lock:
            yield calls
        for call in calls:
            call()


def _told(done: Done, outcome: Outcome) -> Callable[[], None]:
    return lambda: done(outcome)


def _lost(on_lost: OnLost, reason: str) -> Callable[[], None]:
    return lambda: on_lost(reason)


def _call(sent: Callable[[Outgoing, Outcome], None], message: Outgoing, outcome: Outcome) -> Callable[[], None]:
    return lambda: sent(message, outcome)


def _signed(number: int) -> int:
    """The 32 bits that came, as the number that was given."""
    return number - (1 << 32) if number & 0x80000000 else number
