"""What this transport needs of the verbs, by whichever library speaks them here.

Numbers (completion statuses, memory transmission units, port states) are those of libibverbs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

FLUSHED: Final = 5
"""Status of what was under way when its queue pair failed."""

REFUSED: Final = frozenset({9, 10, 11})
"""The peer's interface was asked for something that it must not do: a wrong key, or bytes outside the region."""

RETRIES_EXCEEDED: Final = frozenset({12, 13, 20})
"""The peer's interface, or its queue pair, does not answer any more."""

STATUSES: Final = {
    1: "local length error",
    2: "local queue pair error",
    4: "local protection error",
    FLUSHED: "flushed",
    8: "local access error",
    9: "invalid request",
    10: "remote access error",
    11: "remote operation error",
    12: "the peer does not answer",
    13: "the peer is not ready to receive",
    19: "fatal error",
    20: "the peer answers too late",
}

WorkKind = Literal["read", "write", "write_imm", "send"]


class Finished(NamedTuple):
    """Work that a queue pair has done, or has failed to do."""

    work: int
    status: int
    length: int
    """Bytes that came, if it was a receive."""
    imm: int | None


@dataclass(frozen=True, slots=True)
class PortFacts:
    active: bool
    mtu: int
    """1 (256 bytes) to 5 (4096 bytes)."""
    lid: int
    ethernet: bool


@dataclass(frozen=True, slots=True)
class Remote:
    """A queue pair of the peer."""

    number: int
    psn: int
    gid: bytes
    lid: int
    mtu: int


@dataclass(frozen=True, slots=True)
class Access:
    """What may be done to a piece of memory, or by a queue pair's peer."""

    local_write: bool = False
    remote_read: bool = False
    remote_write: bool = False


class Memory(Protocol):
    """Registered memory."""

    lkey: int
    rkey: int

    def close(self) -> None: ...


class Completions(Protocol):
    """Where what was done by queue pairs is found."""

    fd: int
    """Readable when there is something, once it was armed."""

    def arm(self) -> None: ...

    def hush(self) -> None:
        """Takes the event that made `fd` readable."""
        ...

    def poll(self, most: int) -> Sequence[Finished]: ...

    def close(self) -> None: ...


class Pair(Protocol):
    """A reliable connected queue pair."""

    number: int

    def connect(self, remote: Remote, *, port: int, gid_index: int, psn: int, reads: int) -> None:
        """Makes it ready to receive and to send; the peer may not read or write memory yet."""
        ...

    def allow(self) -> None:
        """Lets the peer read and write."""
        ...

    def post(
        self,
        kind: WorkKind,
        work: int,
        address: int,
        length: int,
        lkey: int,
        remote_address: int = 0,
        rkey: int = 0,
        imm: int = 0,
    ) -> None: ...

    def receive(self, work: int, address: int, length: int, lkey: int) -> None: ...

    def close(self) -> None: ...


class Device(Protocol):
    """An opened interface, with one protection domain."""

    name: str
    reads: int
    """How many reads a queue pair may have under way."""

    def port(self, number: int) -> PortFacts: ...

    def gid(self, port: int, index: int) -> bytes: ...

    def register(self, address: int, length: int, access: Access) -> Memory:
        """Raises OSError when it can't be."""
        ...

    def register_gpu(self, address: int, length: int, access: Access) -> Memory:
        """Memory of a GPU. Raises OSError when it can't be."""
        ...

    def completions(self, depth: int) -> Completions: ...

    def pair(self, completions: Completions, *, port: int, sends: int, receives: int) -> Pair: ...

    def close(self) -> None: ...


class Verbs(Protocol):
    """A library that speaks verbs."""

    name: str

    def devices(self) -> list[str]: ...

    def open(self, device: str) -> Device: ...


LIBRARIES: Final = {"pyverbs": "computemesh.peer.rdma.by_pyverbs", "ibverbs": "computemesh.peer.rdma.by_ibverbs"}


def load(names: Sequence[str] = tuple(LIBRARIES)) -> Verbs:
    """The first library of `names` that is there.

    Raises:
        ImportError: none is; the text says what to install.
    """
    missing: list[str] = []
    for name in names:
        try:
            verbs: Verbs = importlib.import_module(LIBRARIES[name]).verbs()
        except ImportError as error:
            missing.append(f"{name}: {error}")
        else:
            return verbs
    raise ImportError(f"no library speaks verbs here ({'; '.join(missing)}); pip install computemesh[rdma] brings one")


def status_text(status: int) -> str:
    return STATUSES.get(status, f"status {status}")
