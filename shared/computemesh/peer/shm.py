"""Bytes between processes of one machine, by memory that both have mapped: a transfer is one copy, and no message.

The owner's peer-agent hands out the descriptor of a region (:mod:`computemesh.peer.signals`), one that can only be read
where peers may not write. Here it is mapped once, for as long as its :class:`RemoteRegion` is held. What cannot be
mapped safely, as a file that anybody may cut, is read and written by the kernel instead (``preadv``, ``pwritev``),
about half as fast.

A copy looks at the region's epoch before and after it: see :mod:`computemesh.peer.epochs`. Up to :data:`INLINE_MAX`
bytes it is over when ``order`` returns; more is copied by threads of the endpoint, and by the one that waits for it.
Messages are not the business of this transport.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

from computemesh.contracts.peers import Transport
from computemesh.peer import memory
from computemesh.peer.epochs import Epochs, PeerEpochs
from computemesh.peer.memory import Descriptor, Mapping
from computemesh.peer.transport import (
    DONE,
    NO_WAY,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    STALL_S,
    TIMED_OUT,
    WAS_CLOSED,
    Copy,
    Done,
    Drive,
    LocalRegion,
    OnLost,
    Outcome,
    Parties,
    RemoteRegion,
    TransportError,
)

if sys.platform == "linux":
    import fcntl

INLINE_MAX: Final = 4 * 1024**2
"""Bytes of an order that are copied at once, in the thread that orders: half a millisecond at the speed of memory."""

COPIES_MAX: Final = 1024
"""Copies of an order that are made at once: a millisecond at most, however small they are."""

SLICE_MAX: Final = 256 * 1024
"""Bytes of a copy that a slice of a memoryview takes: that costs 0.2 µs less than `memmove` through ctypes, but holds
the interpreter, here for 8 to 30 µs at most. A larger copy lets other threads run meanwhile."""

PIECE: Final = 4 * 1024**2
PIECE_MAX: Final = 256 * 1024**2
"""Bytes that a thread copies before it looks again whether it should, within these bounds: a quarter of its share, or
all if it is the only one. What is very large the C library writes past the caches: 256 MiB at once went 1.4 times as
fast as in pieces of 128 MiB or less, and take 30 ms."""

THREADS_MAX: Final = 4
"""For one order. A core copies about 10 GiB/s; a few of them fill what the memory can do."""

COMES_S: Final = 0.0005
"""So long one that orders has to begin to wait, where only one thread is to work: then it is that one."""

IO_ERROR: Final = "io_error"
"""The system failed to read or write a file."""

Kind = Literal["read", "write"]
Facts = abc.Mapping[str, Any]
Span = tuple[Copy, int, int]
"""A part of a copy: where it begins in it, and how long it is."""

_STALE: Final = Outcome(STALE_EPOCH, "the region was registered anew, or is no longer")
_READ_ONLY: Final = Outcome(READ_ONLY, "the peer's region can only be read")
_NO_MESSAGES: Final = Outcome(NO_WAY, "shared memory carries no messages")
_OUTSIDE: Final = Outcome(OUT_OF_RANGE, "the range leaves a region")


class ShmEndpoint:
    """The shared memory of this process. Its methods may be called from any thread."""

    name: Transport = "shm"

    def __init__(self) -> None:
        self._epochs: Epochs | None = None
        self._slots: dict[LocalRegion, int] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False
        _forked.add(self)

    @property
    def epochs_fd(self) -> int:
        """Of the page of epochs, for the peer-agent; -1 before the first region is exposed."""
        return -1 if self._epochs is None else self._epochs.fd

    def absent(self) -> str:
        return memory.absent()

    def facts(self) -> Facts:
        return {}

    def stats(self) -> abc.Mapping[str, int]:
        return {}

    def expose(self, region: LocalRegion) -> Facts | None:
        """Lets peers map a region, if it has a descriptor of something that has bytes at offsets."""
        if region.fd < 0 or self.absent() or self._closed or not memory.is_file(region.fd):
            return None
        memory.seal(region.fd)
        with self._lock:
            if region in self._slots:
                return {"offset": region.fd_offset, "slot": self._slots[region]}
            if self._epochs is None:
                self._epochs = Epochs()
            slot = self._epochs.put(region.epoch)
            if slot is None:
                return None
            self._slots[region] = slot
        return {"offset": region.fd_offset, "slot": slot}

    def conceal(self, region: LocalRegion) -> None:
        """Ends that: waits for writes that are under way.

        Raises:
            TransportError: `timed_out`, since a peer was stopped in the middle of one. Later ones are refused.
        """
        with self._lock:
            slot = self._slots.pop(region, None)
        if slot is None or self._epochs is None:
            return
        if not self._epochs.clear(slot, STALL_S):
            raise TransportError(
                TIMED_OUT, f"region {region.name!r}: a peer has stopped in the middle of a write to it"
            )

    def offer(self, parties: Parties) -> Facts:
        self._check(parties)
        return {}

    def accept(self, parties: Parties, offer: Facts) -> tuple[ShmLink, Facts]:
        self._check(parties)
        return ShmLink(self), {}

    def establish(self, parties: Parties, answer: Facts) -> ShmLink:
        self._check(parties)
        return ShmLink(self)

    def abandon(self, parties: Parties) -> None:
        """There is nothing to forget."""

    def close(self) -> None:
        """Ends all regions, and waits for nobody."""
        with self._lock:
            self._closed = True
            self._slots.clear()
            threads, self._threads = self._threads, None
        if self._epochs is not None:
            self._epochs.clear_all()
        if threads is not None:
            threads.shutdown(wait=False)

    def work(self, job: _Job) -> None:
        """Lets the endpoint's threads work at it."""
        with self._lock:
            if self._threads is None and not self._closed:
                self._threads = ThreadPoolExecutor(_threads(), thread_name_prefix="peer-copy")
            threads = self._threads
        if threads is not None:
            with contextlib.suppress(RuntimeError):  # It was closed just now, or the interpreter ends.
                for _ in range(_threads()):
                    threads.submit(job.run)
                return
        job.run()

    def after_fork(self) -> None:
        """The child has none of the threads."""
        self._lock = threading.Lock()
        self._threads = None

    def _check(self, parties: Parties) -> None:
        if reason := self.absent():
            raise TransportError(NO_WAY, reason)
        if not parties.same_host:
            raise TransportError(NO_WAY, f"{parties.peer} is not on this machine")
        if self._closed:
            raise TransportError(NO_WAY, "shared memory was closed")


class ShmLink:
    """Reads from a peer of this machine and writes to it."""

    transport: Transport = "shm"

    def __init__(self, endpoint: ShmEndpoint) -> None:
        self.detail: Facts = {}
        self.on_lost: OnLost = _nobody
        self.endpoint = endpoint
        self._lock = threading.Lock()
        self._page: PeerEpochs | None = None
        self._end: Outcome | None = None
        _forked.add(self)

    def ready(self, timeout_s: float) -> None:
        """It always is."""

    def order(self, kind: Kind, copies: Sequence[Copy], done: Done, *, imm: int | None = None) -> Drive | None:
        if imm is not None:
            done(_NO_MESSAGES)
            return None
        if len(copies) == 1 and (outcome := self._straight(kind, copies[0])):
            done(outcome)
            return None
        total = copies[0].length if len(copies) == 1 else sum([copy.length for copy in copies])
        if not total or (total <= INLINE_MAX and len(copies) <= COPIES_MAX):
            done(self._now(kind, copies))
            return None
        used: list[Reach] = []
        if failure := self.begin(kind, copies, used):
            done(_ended(kind, used, failure))
            return None
        threads = _threads()
        piece = min(max(PIECE, total // (4 * threads) if threads > 1 else total), PIECE_MAX)
        job = _Job(self, kind, pieces(copies, piece), used, done)
        self.endpoint.work(job)
        return job.drive

    def send(self, data: memoryview, done: Done) -> Drive | None:
        done(_NO_MESSAGES)
        return None

    def recv(self, into: memoryview, done: Done) -> None:
        done(_NO_MESSAGES)

    def recv_imm(self, done: Done) -> None:
        done(_NO_MESSAGES)

    def withdraw(self, done: Done) -> bool:
        return False

    def give_back(self, taken: bytes | int) -> None:
        raise AssertionError("none came over this link")

    def close(self, why: Outcome = WAS_CLOSED, /) -> None:
        """What is under way fails after its present piece. Regions stay mapped until they are dropped."""
        self._end = self._end or why
        self._page = None

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def _straight(self, kind: Kind, copy: Copy) -> Outcome | None:
        """Does what :meth:`_now` does for one copy, in half the time. None where there is anything to say of it,
        and then nothing was done."""
        local, remote, length = copy.local, copy.remote, copy.length
        reach, view = remote.state, local.view
        here, there = copy.local_offset, copy.remote_offset
        if (
            length > INLINE_MAX
            or type(reach) is not Mapped
            or view is None
            or self._end is not None
            or not 0 <= here <= local.length - length
            or not 0 <= there <= reach.length - length
            or length < 0
        ):
            return None
        slots, slot, epoch = reach.slots, reach.slot, reach.epoch
        if kind == "read":
            if view.readonly or slots[slot] != epoch:
                return None
            reach.read(view, local.address, here, there, length)
            if not memory.STRONGLY_ORDERED:
                memory.fence()
            return DONE if slots[slot] == epoch else _STALE
        if not reach.writable or slots[slot] != epoch:
            return None
        try:
            reach.epochs.enter(slot)
        except OSError:
            return None
        try:
            if slots[slot] != epoch:
                return _STALE
            reach.write(view, local.address, here, there, length)
        finally:
            reach.epochs.leave(slot)
        return DONE if slots[slot] == epoch else _STALE

    def _now(self, kind: Kind, copies: Sequence[Copy]) -> Outcome:
        used: list[Reach] = []
        failure: Outcome | None = WAS_CLOSED  # Unless something else comes of it, as when it is interrupted.
        try:
            failure = self.begin(kind, copies, used)
            if failure is None:
                failure = self.move(kind, [(copy, 0, copy.length) for copy in copies])
        finally:
            outcome = _ended(kind, used, failure)
        return outcome

    def begin(self, kind: Kind, copies: Sequence[Copy], used: list[Reach]) -> Outcome | None:
        """Makes the peer's regions ready. Those in `used` must be given to :func:`_ended`, whatever this returns."""
        if self._end is not None:
            return self._end
        for remote in (copies[0].remote,) if len(copies) == 1 else dict.fromkeys([copy.remote for copy in copies]):
            reach = remote.state or self._reach(remote)
            if isinstance(reach, Outcome):
                return reach
            if kind == "write":
                if not reach.writable:
                    return _READ_ONLY
                if not reach.fresh():
                    return _STALE
                try:
                    reach.epochs.enter(reach.slot)
                except OSError as error:
                    return Outcome(IO_ERROR, f"region {remote.name!r}: {error}")
            used.append(reach)
            if not reach.fresh():
                return _STALE
        return None

    def move(self, kind: Kind, spans: Sequence[Span]) -> Outcome | None:
        """Copies these; what went wrong, or None."""
        if self._end is not None:
            return self._end
        for copy, skip, length in spans:
            local, reach = copy.local, copy.remote.state
            here, there = copy.local_offset + skip, copy.remote_offset + skip
            if not (0 <= here <= local.length - length and 0 <= there <= reach.length - length and length >= 0):
                return _OUTSIDE
            if not reach.fresh():
                return _STALE
            view = local.view
            if view is None:
                return Outcome(NO_WAY, f"region {local.name!r} is no memory of the processor")
            try:
                if kind == "write":
                    reach.write(view, local.address, here, there, length)
                elif view.readonly:
                    return Outcome(READ_ONLY, f"region {local.name!r} of this process can only be read")
                else:
                    reach.read(view, local.address, here, there, length)
            except OSError as error:
                return Outcome(IO_ERROR, f"region {copy.remote.name!r}: {error}")
        return None

    def _reach(self, remote: RemoteRegion) -> Reach | Outcome:
        """Maps a region, the first time that it is used. What comes of it stays with the region."""
        with self._lock:
            if remote.state is None:
                try:
                    remote.state = self._mapped(remote)
                except (OSError, ValueError, TypeError, KeyError) as error:
                    remote.state = Outcome(NO_WAY, f"region {remote.name!r} cannot be mapped: {error}")
            state: Reach | Outcome = remote.state
            return state

    def _mapped(self, remote: RemoteRegion) -> Reach:
        fd: Descriptor = remote.token["fd"]
        page: Descriptor = remote.token["epochs_fd"]
        offset, slot = int(remote.token["offset"]), int(remote.token["slot"])
        facts = os.fstat(page.fd)
        epochs = self._page
        if epochs is None or epochs.identity != (facts.st_dev, facts.st_ino):
            epochs = self._page = PeerEpochs(page)
        if not 0 <= slot < len(epochs.slots):
            raise ValueError(f"slot: the peer's page has {len(epochs.slots)}, and no {slot}")
        flags = fcntl.fcntl(fd.fd, fcntl.F_GETFL)
        writable = remote.writable and flags & os.O_ACCMODE == os.O_RDWR
        if memory.is_sealed(fd.fd):
            reach: Reach = Mapped(epochs, slot, remote, Mapping(fd.fd, offset, remote.length, writable=writable))
            fd.close()
            return reach
        if not memory.is_file(fd.fd) or flags & os.O_APPEND:
            raise ValueError("fd: it is no file with bytes at offsets")
        return Filed(epochs, slot, remote, fd, offset, writable=writable)


class Reach(ABC):
    """A peer's region, as this process reaches it."""

    __slots__ = ("epoch", "epochs", "length", "slot", "slots", "writable")

    def __init__(self, epochs: PeerEpochs, slot: int, remote: RemoteRegion, *, writable: bool) -> None:
        self.epochs = epochs
        self.slots = epochs.slots
        self.slot = slot
        self.epoch = remote.epoch
        self.length = remote.length
        self.writable = writable

    def fresh(self) -> bool:
        """Whether it is still the region that was found."""
        return self.slots[self.slot] == self.epoch

    @abstractmethod
    def read(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        """Copies `length` bytes at `there` to `here` of the local region, which is `view`, at `address`.

        Raises:
            OSError: the system can't.
        """

    @abstractmethod
    def write(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        """The other way round."""


class Mapped(Reach):
    __slots__ = ("address", "view")

    def __init__(self, epochs: PeerEpochs, slot: int, remote: RemoteRegion, mapping: Mapping) -> None:
        super().__init__(epochs, slot, remote, writable=mapping.writable)
        self.address = mapping.address
        self.view = mapping.view()

    def read(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        if length <= SLICE_MAX:
            view[here : here + length] = self.view[there : there + length]
        else:
            ctypes.memmove(address + here, self.address + there, length)

    def write(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        if length <= SLICE_MAX:
            self.view[there : there + length] = view[here : here + length]
        else:
            ctypes.memmove(self.address + there, address + here, length)


class Filed(Reach):
    __slots__ = ("_fd", "_offset")

    def __init__(
        self, epochs: PeerEpochs, slot: int, remote: RemoteRegion, fd: Descriptor, offset: int, *, writable: bool
    ) -> None:
        super().__init__(epochs, slot, remote, writable=writable)
        self._fd = fd
        self._offset = offset
        self._check(offset, remote.length)

    def read(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        while length:
            count = os.preadv(self._fd.fd, [view[here : here + length]], self._offset + there)
            if not count:
                raise OSError(errno.ENODATA, "the file became shorter")
            here, there, length = here + count, there + count, length - count

    def write(self, view: memoryview, address: int, here: int, there: int, length: int) -> None:
        self._check(self._offset + there, length)  # Else it would grow again, with zeros.
        while length:
            count = os.pwritev(self._fd.fd, [view[here : here + length]], self._offset + there)
            here, there, length = here + count, there + count, length - count

    def _check(self, offset: int, length: int) -> None:
        if os.fstat(self._fd.fd).st_size < offset + length:
            raise OSError(errno.ENODATA, "the file is too short")


def _ended(kind: Kind, used: Sequence[Reach], failure: Outcome | None) -> Outcome:
    """Lets the regions go, and looks at them for the last time. How the order ended."""
    if kind == "write":
        for reach in used:
            reach.epochs.leave(reach.slot)
    if failure is not None:
        return failure
    if not memory.STRONGLY_ORDERED:
        memory.fence()
    for reach in used:
        if not reach.fresh():
            return _STALE
    return DONE


def pieces(copies: Sequence[Copy], piece: int) -> Iterator[list[Span]]:
    """The copies in parts of up to `piece` bytes; small ones together."""
    part: list[Span] = []
    room = piece
    for copy in copies:
        at = 0
        while at < copy.length:
            length = min(room, copy.length - at)
            part.append((copy, at, length))
            at += length
            room -= length
            if not room:
                yield part
                part, room = [], piece
    if part:
        yield part


class _Job:
    """A large order. Whoever has time works at it: threads of the endpoint, and who waits for it, which is faster than
    being woken by them. So these make room for that one, where more would only be in each other's way."""

    def __init__(self, link: ShmLink, kind: Kind, parts: Iterator[list[Span]], used: list[Reach], done: Done) -> None:
        self._link = link
        self._kind: Kind = kind
        self._used = used
        self._done = done
        self._lock = threading.Lock()
        self._parts = parts
        self._next = next(self._parts, None)
        self._busy = 0
        self._driving = 0
        self._driven = threading.Event()
        """Somebody waits, and works."""
        self._failure: Outcome | None = None

    def run(self) -> None:
        """Works as a thread of the endpoint."""
        if _threads() == 1 and self._driven.wait(COMES_S):
            return
        while (part := self._take(driving=False)) is not None:
            self._copy(part)

    def drive(self, timeout_s: float | None) -> None:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._driving += 1
            self._driven.set()
        try:
            while (until is None or time.monotonic() < until) and (part := self._take(driving=True)) is not None:
                self._copy(part)
        finally:
            with self._lock:
                self._driving -= 1
                left = self._next is not None
                if left and not self._driving:
                    self._driven.clear()
            if left:
                self._link.endpoint.work(self)

    def _take(self, *, driving: bool) -> list[Span] | None:
        with self._lock:
            part = self._next
            if part is None or (not driving and self._driving and self._busy >= _threads()):
                return None
            self._next = next(self._parts, None)
            self._busy += 1
            return part

    def _copy(self, part: list[Span]) -> None:
        try:
            failure = self._link.move(self._kind, part)
        except BaseException as error:  # Whatever it is, an interrupt as well, somebody waits.
            self._finish(Outcome(IO_ERROR, f"{type(error).__name__}: {error}"))
            raise
        self._finish(failure)

    def _finish(self, failure: Outcome | None) -> None:
        with self._lock:
            self._busy -= 1
            if failure is not None:
                self._failure = self._failure or failure
                self._next = None
            ended = not self._busy and self._next is None
        if ended:
            self._done(_ended(self._kind, self._used, self._failure))


def _threads() -> int:
    """How many work at one order. With two processors, a second one would take the other from who needs it."""
    return max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) // 2))


def _nobody(reason: str) -> None:
    """Nobody has asked yet."""


_forked: weakref.WeakSet[ShmEndpoint | ShmLink] = weakref.WeakSet()


def _in_child() -> None:
    for one in list(_forked):
        one.after_fork()


os.register_at_fork(after_in_child=_in_child)
