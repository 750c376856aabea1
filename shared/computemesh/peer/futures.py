"""Futures of transfers and messages. Those of shared memory are done before they are handed out, and cost no lock."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Self

from computemesh.peer.errors import PeerError, check_timeout
from computemesh.peer.transport import CANCELLED, Copy, Drive, Link, LocalRegion, Outcome

logger: Final = logging.getLogger(__name__)

WITHDRAWN: Final = Outcome(CANCELLED, "it was withdrawn before anything came")

_lock: Final = threading.RLock()
"""For the rare moments in which somebody begins to wait for a future, or asks to be called. The collector may come by
within them, and end an agent that nobody holds any more, and with it other futures."""

# A child made by ``fork`` has none of the threads that may have it: it is forked while no other one has.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class PeerFuture:
    """What becomes of a read, a write, or a message. Any number of threads may wait for it."""

    what: ClassVar[str] = "something"
    # Defaults of the class, so that making one costs next to nothing.
    _outcome: Outcome | None = None
    _waiter: threading.Event | None = None
    _called: list[Callable[[Any], object]] | None = None
    drive: Drive | None = None
    """By which a thread that waits may see to it itself."""
    held: object = None
    """Keeps buffers alive while the transport has them."""
    under_way: UnderWay | None = None
    """Of its peer: this one is among them until it has ended."""

    def __repr__(self) -> str:
        outcome = self._outcome
        state = "under way" if outcome is None else f"failed: {outcome.code}" if outcome.code else "done"
        return f"<future of {self.what}, {state}>"

    def uses(self, region: LocalRegion) -> bool:
        """Whether its bytes go to this memory, or come from there."""
        return False

    def settle(self, outcome: Outcome) -> None:
        """Ends it; for transports. What is said after the first time is left out."""
        if self._outcome is not None:
            return
        # The outcome is there before anyone is looked for who waits, and who begins to wait looks at the outcome
        # after having said so: one of the two always sees the other.
        self._outcome = outcome
        if self.under_way is not None:
            self.under_way.discard(self)
            if outcome.code:
                self.under_way.failed[outcome.code] += 1
        if self.drive is not None:
            self.drive = None
        if self.held is not None:
            self.held = None
        if self._waiter is not None:
            self._waiter.set()
        if self._called is not None:
            self._call()

    def abandon(self, outcome: Outcome) -> None:
        """Ends it in a child made by ``fork``: what was to be called is the parent's."""
        self._called = None
        PeerFuture.settle(self, outcome)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._outcome is not None

    def wait(self, timeout: float | None = None) -> int:
        """Blocks until it has ended.

        Args:
            timeout: seconds; None waits for as long as it takes. A peer that dies ends it in any case.

        Returns:
            0.

        Raises:
            PeerError: it failed; a RuntimeError with a `code`.
            TypeError: `timeout` is no number.
            TimeoutError: it has not ended in time. It goes on, and may be waited for again.
        """
        outcome = self._outcome
        if outcome is None:
            outcome = self._await(timeout)
            if outcome is None:
                raise TimeoutError(f"not done after {timeout} s")
        if outcome.code:
            raise PeerError(outcome.code, outcome.reason)
        return 0

    def wait_for(self, seconds: float) -> int | None:
        """As `wait`, but None when it has not ended after so many seconds."""
        outcome = self._outcome
        if outcome is None:
            outcome = self._await(seconds)
        if outcome is None:
            return None
        if outcome.code:
            raise PeerError(outcome.code, outcome.reason)
        return 0

    def error(self) -> PeerError | None:
        """Why it failed; None while it is under way, and when it did not."""
        outcome = self._outcome
        return PeerError(outcome.code, outcome.reason) if outcome is not None and outcome.code else None

    def add_done_callback(self, call: Callable[[Self], object]) -> None:
        """Calls *call* with this future once it has ended: from the thread that ends it, or at once if it has."""
        if not callable(call):  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"call: something to call is wanted, not {type(call).__name__}")
        with _lock:
            if self._called is None:
                self._called = []
            self._called.append(call)
        if self._outcome is not None:
            self._call()

    def cancel(self) -> bool:
        """Withdraws what only waits: a `recv` for which no message has begun to come, or an `imm_recv`. It ends with
        `cancelled` then, and what comes is the next one's.

        Returns:
            Whether it is so. False: it has ended, or will, by itself; as all that sends, reads or writes.
        """
        return False

    def _await(self, timeout: float | None) -> Outcome | None:
        check_timeout(timeout)
        drive = self.drive
        if drive is not None:
            deadline = None if timeout is None else time.monotonic() + timeout
            drive(timeout)
            if self._outcome is not None:
                return self._outcome
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        with _lock:
            waiter = self._waiter
            if waiter is None:
                waiter = self._waiter = threading.Event()
        if self._outcome is None:
            waiter.wait(timeout)
        return self._outcome

    def _call(self) -> None:
        with _lock:
            calls, self._called = self._called, None
        for call in calls or ():
            try:
                call(self)
            except Exception:
                logger.exception("a callback of a transfer failed")


class UnderWay(set[PeerFuture]):
    """What a peer has begun and has not ended.

    Attributes:
        failed: how many have, by the code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: Counter[str] = Counter()


class TransferFuture(PeerFuture):
    """Of a read or a write."""

    what: ClassVar[str] = "a transfer"
    copies: Sequence[Copy] = ()
    transport: str = ""
    """By which it goes: `shm`, `tcp`, `rdma`, or more than one with a `+` between."""

    def uses(self, region: LocalRegion) -> bool:
        """Also while it is being begun, and nobody knows yet."""
        return not self.copies or any(copy.local is region for copy in self.copies)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of the peer's regions, one for each assignment."""
        return tuple(copy.remote.epoch for copy in self.copies)


class Receiving(PeerFuture):
    """Of what a peer sends when it likes."""

    link: Link | None = None
    """Over which it comes."""

    def cancel(self) -> bool:
        if self.link is None or not self.link.withdraw(self.settle):
            return False
        self.settle(WITHDRAWN)
        return True


class MessageFuture(Receiving):
    """Of a message that is sent or received."""

    what: ClassVar[str] = "a message"

    def give_back(self, into: memoryview) -> None:
        """The message that came into this buffer is the next one again; nothing if none came."""
        outcome = self._outcome
        if self.link is not None and outcome is not None and not outcome.code:
            self.link.give_back(bytes(into[: outcome.received]))

    @property
    def received(self) -> int:
        """Bytes that came, once it is done; 0 for a message that was sent."""
        return self._outcome.received if self._outcome is not None else 0


class ImmFuture(Receiving):
    """Of a number that comes with a peer's write.

    Attributes:
        started_at: when it was asked for, in seconds of the monotonic clock.
        received_at: when it came; None before.
    """

    what: ClassVar[str] = "a number"
    received_at: float | None = None

    def __init__(self) -> None:
        self.started_at = time.monotonic()

    def settle(self, outcome: Outcome) -> None:
        self.received_at = self.received_at or time.monotonic()
        super().settle(outcome)

    def imm_data(self) -> int:
        """The number, -2**31 to 2**31 - 1; waits for it.

        Raises:
            PeerError: none came, because the connection ended.
        """
        self.wait()
        assert self._outcome is not None
        imm = (self._outcome.imm or 0) & 0xFFFFFFFF
        return imm - (1 << 32) if imm >= 1 << 31 else imm

    def give_back(self) -> None:
        """The number is the next one again; nothing if none came."""
        if self.link is not None and self._outcome is not None and not self._outcome.code:
            self.link.give_back(self.imm_data())


class Reading(PeerFuture):
    """Of this process itself, which looks at the bytes of a region."""

    def __init__(self, region: LocalRegion) -> None:
        self._region = region

    def uses(self, region: LocalRegion) -> bool:
        return region is self._region


class Gathered:
    """Counts the parts of what goes by several links; the first failure is the outcome of all.

    Parts are settled by the threads of transports; `whole` is called once, by the one that settles the last of them.
    """

    def __init__(self, parts: int, whole: Callable[[Outcome], None]) -> None:
        self._left = parts
        self._whole = whole
        self._failed: Outcome | None = None
        self._lock = threading.Lock()

    def settle(self, outcome: Outcome) -> None:
        with self._lock:
            self._left -= 1
            if outcome.code and self._failed is None:
                self._failed = outcome
            last = self._left == 0
        if last:
            self._whole(self._failed or outcome)
