"""What the two ends of a link tell each other by SEND, and how much of it they may send.

A message takes a buffer that its receiver has laid out, so either side counts what it may still send: with each note
comes how many buffers were laid out again (`credits`), and how many messages the program has taken (`taken`). Some
buffers are kept for notes, the last one for credits alone, so that the two can never wait for each other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

BUFFERS: Final = 64
"""Receive buffers of a link."""

BUFFER_BYTES: Final = 8192

KEPT: Final = 8
"""Credits that programs' messages may not use."""

WINDOW: Final = 256
"""Messages that a peer keeps for a program that does not receive them yet; further ones wait at their sender."""

HEAD: Final = struct.Struct("<BBHHHIIQQ")

SMALL: Final = BUFFER_BYTES - HEAD.size
"""The longest message that is sent as it is; a longer one is fetched by its receiver."""


class Kind(IntEnum):
    HELLO = 1
    """Who is there: a proof that both know the key of the link."""
    OPEN = 2
    """The hello was right; the peer may read and write."""
    MESSAGE = 3
    """A program's."""
    LARGE = 4
    """A program's: it lies at `address`, `length` bytes long, to be read with `key`."""
    TOOK = 5
    """A large one, `number`, was fetched (`flag` 0), left out (1), or could not be fetched (2)."""
    CREDITS = 6
    REVOKE = 7
    """Region `number` is about to be no more."""
    REVOKED = 8
    """Nothing of region `number` is under way any more, nor will be."""
    BYE = 9
    """The link was closed."""


class Note(NamedTuple):
    kind: Kind
    flag: int = 0
    credits: int = 0
    taken: int = 0
    number: int = 0
    key: int = 0
    length: int = 0
    address: int = 0

    def pack(self) -> bytes:
        return HEAD.pack(*self[:4], 0, *self[4:])

    @staticmethod
    def read(data: bytes | memoryview) -> Note:
        """Raises ValueError if it is none."""
        if len(data) < HEAD.size:
            raise ValueError(f"a note of {len(data)} bytes")
        kind, flag, owed, taken, _, number, key, length, address = HEAD.unpack_from(data)
        if kind == Kind.LARGE and not 0 < length < (1 << 64) - address:
            raise ValueError(f"a message of {length} bytes at {address}, which no memory holds")
        return Note(Kind(kind), flag, owed, taken, number, key, length, address)


@dataclass(slots=True)
class Flow:
    """What this end may send, and what it owes to the other."""

    credits: int = BUFFERS
    window: int = WINDOW
    owed: int = 0
    """Buffers that were laid out again and that the peer does not know of."""
    taken: int = 0
    """Messages that the program took and that the peer does not know of."""

    def may_send(self, kind: Kind | None) -> bool:
        """Whether a note may go now; None: a number that comes with a write."""
        if kind is Kind.CREDITS:
            return self.credits > 0
        if kind is None:
            return self.credits > KEPT
        if kind in (Kind.MESSAGE, Kind.LARGE):
            return self.credits > KEPT and self.window > 0
        return self.credits > 1

    def sends(self, kind: Kind | None) -> tuple[int, int]:
        """Counts one that goes now, and returns the `credits` and `taken` that it carries."""
        self.credits -= 1
        if kind is None:
            return 0, 0
        if kind in (Kind.MESSAGE, Kind.LARGE):
            self.window -= 1
        carried = self.owed, self.taken
        self.owed = self.taken = 0
        return carried

    def hears(self, note: Note) -> bool:
        """Counts what a note brought; False if the peer cannot be right."""
        self.credits += note.credits
        self.window += note.taken
        return self.credits <= BUFFERS and self.window <= WINDOW

    def must_tell(self) -> bool:
        """Whether the peer may be waiting for what it is owed."""
        return self.owed >= BUFFERS // 2 or self.taken >= WINDOW // 2
