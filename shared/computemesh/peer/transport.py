"""How bytes move between two processes: what every transport offers, and what is asked of it.

    initiator                                        peer
    endpoint.offer(parties) ─────── over NATS ─────▶ endpoint.accept(parties, offer) -> (link, answer)
    endpoint.establish(parties, answer) -> link ◀───

An :class:`Endpoint` is what one transport has in this process: a listener, a network interface and its protection
domain. A :class:`Link` is one connection, the same for both sides: either orders transfers and sends messages.

Methods may be called from any thread. Those of an endpoint may block, up to the deadline that they are given; those of
a link return at once. ``done`` is called exactly once for each order, from any thread, and possibly before the method
that took it returns; it must be quick. A link that is lost fails all that is under way, at once, and then calls
``on_lost``; one that hears nothing of an order for :data:`STALL_S` is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from computemesh.contracts.peers import Transport

STALL_S: Final = 30.0
"""After so long without any progress of what was ordered, a link is lost."""

LINK_LOST: Final = "link_lost"
OUT_OF_RANGE: Final = "out_of_range"
STALE_EPOCH: Final = "stale_epoch"
READ_ONLY: Final = "read_only"
NO_REGION: Final = "no_region"
NO_WAY: Final = "no_way"
TOO_LARGE: Final = "too_large"
TIMED_OUT: Final = "timed_out"
CANCELLED: Final = "cancelled"


class TransportError(Exception):
    """An endpoint cannot do what was asked.

    Attributes:
        code: machine-readable, as above.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(slots=True, eq=False)
class LocalRegion:
    """A registered piece of this process's memory. Its owner keeps the memory alive while it is registered."""

    name: str
    handle: int
    epoch: int
    address: int
    length: int
    writable: bool
    """By peers."""
    view: memoryview | None
    """The bytes, format ``B``; None where the processor cannot read them, as those of a GPU."""
    fd: int = -1
    """Of the memory object that it is a mapping of, if others may map it too."""
    fd_offset: int = 0
    held: object = None
    """What keeps the memory alive."""
    live: bool = True
    """False once it was unregistered. Transports look at it for every request."""
    tokens: dict[Transport, Mapping[str, Any]] = field(default_factory=dict[Transport, Mapping[str, Any]])
    """What each transport said of it when it was exposed."""


@dataclass(slots=True, eq=False)
class RemoteRegion:
    """A piece of a peer's memory, as one link reaches it. Its owner checks each request again."""

    name: str
    epoch: int
    length: int
    writable: bool
    token: Mapping[str, Any]
    """What the owner's transport said of it; for shared memory also ``fd`` and ``epochs_fd``, its descriptor and that
    of the peer's page of epochs, as :class:`computemesh.peer.memory.Descriptor`."""
    state: Any = None
    """The link's own: what it made of the token. It goes with the region."""


@dataclass(slots=True)
class Copy:
    """One range of bytes. The offsets are from the beginning of either region."""

    local: LocalRegion
    local_offset: int
    remote: RemoteRegion
    remote_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an order ended."""

    code: str = ""
    """Empty when it was done; else one of the codes above, or the transport's own."""
    reason: str = ""
    received: int = 0
    """Bytes of a message that was received."""
    imm: int | None = None
    """The number that came along."""


DONE: Final = Outcome()
WAS_CLOSED: Final = Outcome(CANCELLED, "the connection was closed")

Done = Callable[[Outcome], None]
OnLost = Callable[[str], None]

Drive = Callable[[float | None], None]
"""Lets the thread that waits for an order see to it itself, instead of being woken by another one. It returns when the
order has ended, after so many seconds (None: however long it takes), or earlier when there is nothing that this thread
could do: who waits then waits for `done`. It may be called from any thread, and again."""


@dataclass(frozen=True, slots=True)
class Parties:
    """Between whom a link is to be, and what only they know."""

    link: str
    """Its name, the same on both sides."""
    key: bytes
    """32 bytes, of this link alone. They came by the bus, and are never sent as they are over the link."""
    me: str
    peer: str
    deadline: float
    """By ``time.monotonic()``."""
    options: Mapping[str, Any]
    """What `connect_to` was asked for: `local_device`, `peer_device`, `ib_port`, `qp_num`, `min_bw`."""
    same_host: bool
    """Both processes are of the same peer-agent."""


class Link(Protocol):
    """One connection by one transport. Closing it is no loss: ``on_lost`` is not called then."""

    @property
    def transport(self) -> Transport: ...

    @property
    def detail(self) -> Mapping[str, Any]:
        """For people and logs: interfaces, addresses, sockets."""
        ...

    @property
    def on_lost(self) -> OnLost: ...

    @on_lost.setter
    def on_lost(self, call: OnLost, /) -> None: ...

    def ready(self, timeout_s: float) -> None:
        """Waits until bytes can go both ways.

        Raises:
            TransportError: they can't, or not in time.
        """
        ...

    def order(
        self, kind: Literal["read", "write"], copies: Sequence[Copy], done: Done, *, imm: int | None = None
    ) -> Drive | None:
        """Begins to read from the peer, or to write to it. Bounds were checked by the caller, too.

        A write is done when its bytes are in the peer's memory. With `imm`, the peer gets that number after them.
        Returns what makes waiting for it faster, where there is such a thing.
        """
        ...

    def send(self, data: memoryview, done: Done) -> Drive | None:
        """Sends a message; done when the peer has it in the buffer of a `recv`, or has stored it for one."""
        ...

    def recv(self, into: memoryview, done: Done) -> None:
        """Takes the next message. One that is too large for `into` is left out, and ends with ``too_large``."""
        ...

    def recv_imm(self, done: Done) -> None:
        """Takes the next number that came with a write, also one that came before this was called."""
        ...

    def withdraw(self, done: Done) -> bool:
        """Takes back the `recv` or `recv_imm` that has this `done`, which is not called then. False: it is too late."""
        ...

    def give_back(self, taken: bytes | int) -> None:
        """A message or a number that was taken is the next one again."""
        ...

    def close(self, why: Outcome = WAS_CLOSED, /) -> None:
        """Ends it. What is under way ends with `why`, unless it has ended by itself."""
        ...


class Endpoint(Protocol):
    """What one transport has in this process."""

    name: Transport

    def absent(self) -> str:
        """Why it cannot be used here at all; empty when it can."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What peers may see of it before there is a connection, as network interfaces."""
        ...

    def expose(self, region: LocalRegion) -> Mapping[str, Any] | None:
        """Lets peers reach a region. What it returns is told to connected peers; None if it can't."""
        ...

    def conceal(self, region: LocalRegion) -> None:
        """Ends that. When it returns, no peer reads or writes the region any more."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counts that only this transport has."""
        ...

    def offer(self, parties: Parties) -> Mapping[str, Any]:
        """What the peer must know to accept a link. Raises TransportError when there can be none."""
        ...

    def accept(self, parties: Parties, offer: Mapping[str, Any]) -> tuple[Link, Mapping[str, Any]]:
        """Takes a link that was offered; the answer goes back. Raises TransportError when it can't."""
        ...

    def establish(self, parties: Parties, answer: Mapping[str, Any]) -> Link:
        """Makes the link that was offered, after the peer's answer."""
        ...

    def abandon(self, parties: Parties) -> None:
        """Forgets an offer that the peer did not take. Does nothing if there is none."""
        ...

    def close(self) -> None: ...
