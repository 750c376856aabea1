"""The life of a connection: decisions without I/O, and what programs hold of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from computemesh.peer.errors import LINK_LOST, NO_WAY, PeerError, check_timeout
from computemesh.peer.transport import Link, LocalRegion, RemoteRegion

State = Literal["connecting", "connected", "failed"]
Phase = Literal["asking", "awaiting", "answered"]
"""Of one that is connecting: the peer was asked and has not answered; it asks this side for the same, which is to be
taken; the terms are exchanged."""

NEXT: Final[Mapping[State, frozenset[State]]] = {
    "connecting": frozenset({"connected", "failed"}),
    "connected": frozenset({"failed"}),
    "failed": frozenset(),
}
"""What fails stays so: `connect_to` then makes a new connection."""


class ConnId(NamedTuple):
    """Names a connection as one side sees it."""

    me: str
    local_nic: str
    local_port: int
    peer: str
    remote_nic: str
    remote_port: int
    qp_num: int

    def __str__(self) -> str:
        return (
            f"{self.me}:{self.local_nic}:port{self.local_port}"
            f"->{self.peer}:{self.remote_nic}:port{self.remote_port}#qp{self.qp_num}"
        )

    def mirrored(self) -> ConnId:
        """As the other side sees it."""
        return ConnId(
            self.peer, self.remote_nic, self.remote_port, self.me, self.local_nic, self.local_port, self.qp_num
        )

    def place(self) -> tuple[str, str, int, str, int]:
        """What there is one connection of at a time: the peer, and a port on either side."""
        return (self.peer, self.local_nic, self.local_port, self.remote_nic, self.remote_port)

    @classmethod
    def parse(cls, text: str) -> ConnId:
        """The parts of a name.

        Raises:
            ValueError: it is none.
        """
        here, arrow, there = text.partition("->")
        there, mark, qp_num = there.rpartition("#qp")
        if not (arrow and mark and qp_num.isascii() and qp_num.isdecimal()):
            raise ValueError("conn_id: '{me}:{nic}:port{n}->{peer}:{nic}:port{n}#qp{q}' is wanted")
        return cls(*_end(here), *_end(there), int(qp_num))


def _end(text: str) -> tuple[str, str, int]:
    alias, nic, port = [*text.rsplit(":", 2), "", ""][:3]
    number = port.removeprefix("port")
    if not (alias and nic and port.startswith("port") and number.isascii() and number.isdecimal()):
        raise ValueError(f"conn_id: {text[:80]!r} does not end in ':NIC:portN'")
    return alias, nic, int(number)


def on_incoming(me: str, peer: str, state: State | None, phase: Phase) -> Literal["take", "crossed", "wait", "replace"]:
    """What to do when a peer wants a connection.

    Args:
        state: of the connection that there is in its place; None if there is none.
        phase: of that one.

    Returns:
        `take` it; refuse it as `crossed`, since the peer is to take the one this side asks for; `wait` until the peer
        has answered that, so that no answer can come late; or `replace` the one there is, of which the peer knows no
        longer.
    """
    if state == "connecting" and phase == "asking":
        return "crossed" if me < peer else "wait"
    if state == "connecting" and phase == "awaiting":
        return "take"
    return "replace" if state in ("connecting", "connected") else "take"


@dataclass(slots=True)
class Moved:
    """What a peer has ordered of one transport. Threads count without a lock: the interpreter changes them only where
    a function is called or a loop begins anew, and not in the midst of ``+=``."""

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def count(self, kind: Literal["read", "write"], length: int) -> None:
        if kind == "read":
            self.reads += 1
            self.bytes_read += length
        else:
            self.writes += 1
            self.bytes_written += length


class Route(NamedTuple):
    """How a local and a remote region come together on a connection."""

    local: LocalRegion
    remote: RemoteRegion
    link: Link
    local_room: int
    """Bytes of the region here; `remote_room` of the peer's."""
    remote_room: int
    kinds: tuple[str, ...]
    """What may be done: `read`, and `write` where the peer lets it."""
    moved: Moved
    """Where it is counted."""


class PeerConnection:
    """A connection with one peer; both sides see the same. Programs get it from `connect_to`.

    Attributes:
        conn_id: `{me}:{nic}:port{n}->{peer}:{nic}:port{n}#qp{q}`; stays the same.
        peer_alias: of the other side.
        state: `connecting`, `connected` or `failed`; a failed one stays so.
        transport: by which bytes go; while connecting, the one that was chosen.
        selection_reason: why that one.
        peer_endpoint_info: what the peer said of its side of each transport, once connected.
    """

    def __init__(self, ident: ConnId, link_id: str, transport: str, reason: str) -> None:
        self.ident = ident
        self.conn_id = str(ident)
        self.link_id = link_id
        self.peer_alias = ident.peer
        self.local_nic = ident.local_nic
        self.remote_nic = ident.remote_nic
        self.state: State = "connecting"
        self.transport = transport
        self.selection_reason = reason
        self.peer_endpoint_info: dict[str, Any] | None = None
        self.phase: Phase = "answered"
        self.answered = threading.Event()
        """Set unless the peer is being asked."""
        self.links: tuple[Link, ...] = ()
        """The best first; messages go by the last."""
        self.routes: dict[object, Route] = {}
        """By what an assignment begins with: a name, two names, or two handles."""
        self.remotes: dict[str, dict[str, RemoteRegion]] = {}
        """Regions of the peer, by name and transport."""
        self.error: PeerError | None = None
        self._changed = threading.Condition()
        self._resolve: Callable[[PeerConnection, list[str], float], None] | None = None
        self._close: Callable[[PeerConnection], None] | None = None

    def __repr__(self) -> str:
        return f"<PeerConnection {self.conn_id} {self.state} by {self.transport}>"

    @property
    def endpoint(self) -> Link | None:
        """The link that carries messages, once connected."""
        return self.links[-1] if self.links else None

    def is_connected(self) -> bool:
        return self.state == "connected"

    def wait(self, timeout: float | None = 60.0) -> PeerConnection:
        """Blocks until bytes can go both ways.

        Returns:
            This connection.

        Raises:
            TimeoutError: they can't in `timeout` seconds; it goes on trying.
            PeerError: it failed.
        """
        check_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self.state == "connecting":
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{self.conn_id}: not connected after {timeout} s")
                self._changed.wait(left)
        if self.state == "failed":
            raise self.failure()
        return self

    def sync_memory_regions(self, timeout: float = 60.0) -> PeerConnection:
        """Learns anew what memory the peer offers. Transfers do so by themselves where they must.

        Raises:
            PeerError: the connection failed, or the peer-agent cannot be asked.
            TimeoutError: it did not connect in time.
        """
        self.wait(timeout)
        assert self._resolve is not None
        self.routes.clear()
        self._resolve(self, sorted(self.remotes), timeout)
        return self

    def close(self) -> None:
        """Ends it, for both sides."""
        if self._close is not None:
            self._close(self)

    def failure(self) -> PeerError:
        """Why it failed, as an error to raise."""
        error = self.error or PeerError(LINK_LOST, "the connection ended")
        return PeerError(error.code, f"{self.conn_id}: {error.reason}")

    def bind(
        self, resolve: Callable[[PeerConnection, list[str], float], None], close: Callable[[PeerConnection], None]
    ) -> None:
        self._resolve = resolve
        self._close = close

    def after_fork(self, error: PeerError) -> None:
        """In the child it has failed, without a word to anybody: it goes on in the parent."""
        self._changed = threading.Condition()
        self.move("failed", error)
        self.links = ()
        self.remotes, self.routes = {}, {}

    def move(self, state: State, error: PeerError | None = None) -> bool:
        """To another state; False if it is too late for that."""
        with self._changed:
            if state not in NEXT[self.state]:
                return False
            self.state = state
            self.error = error
            self._changed.notify_all()
        return True


def no_way(reasons: list[str]) -> PeerError:
    """Why none of the transports would do."""
    return PeerError(NO_WAY, "; ".join(reasons) or "the peer has none of the transports that were offered")
