"""The first records of items, many in one write.

Most items are assigned as soon as they come, and end soon after. So the first records that are decided while one write
is under way are stored as one entry of a ring of keys beside the records, and an item gets a record of its own when it
moves on, or after :data:`LATE_S`. An entry is overwritten, by compare-and-set, once all in it have such records.

The ring is also a fence. Entries are written in turn, so whoever takes over reads them all and writes the one whose
turn it is as it stands: if that succeeds it has missed none, and a predecessor that wakes up cannot write another. As
every item begins in the ring, that one can do nothing about items of which its successor does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

import msgspec

from computemesh import log
from computemesh.bus import Bus, BusError, Conflict
from computemesh.bus.connection import read_ack
from computemesh.bus.pull import read_all
from computemesh.contracts import storage
from computemesh.contracts.base import Message
from computemesh.contracts.work import WorkRecord

KEY: Final = "meta.first"
"""Where the entries are kept, each under its number. Several tokens, so they are not republished as states."""

ENTRIES: Final = 256
ENTRY_BYTES_MAX: Final = 65_536
"""Of the records of one entry. A record that is larger has one to itself."""

LATE_S: Final = 0.25
"""An item that did not move on for that long gets a record of its own."""

RACES_MAX: Final = 8
"""Entries that a predecessor may still write while it is being deposed."""

SEEN_BITS: Final = 25

_log = log.get("firsts")


class Entry(Message, frozen=True, kw_only=True):
    """Items that were decided about for the first time."""

    stream_created: str
    """Of the inbox that they came by; another one numbers its messages anew."""
    records: list[WorkRecord]


@dataclass(slots=True)
class Place:
    """One entry of the ring."""

    revision: int = 0
    needed: int = 0
    """Items in it that have no record of their own yet."""


class Ring:
    """Which entry is written next. Pure."""

    def __init__(self) -> None:
        self.places = [Place() for _ in range(ENTRIES)]
        self.turn = 0
        """The entry that is written next."""

    def restore(self, revisions: Mapping[int, int]) -> None:
        """Takes over what is stored: the revision of each entry."""
        for number, revision in revisions.items():
            self.places[number].revision = revision
        if revisions:
            self.turn = (max(revisions, key=revisions.__getitem__) + 1) % ENTRIES

    @property
    def next(self) -> Place:
        """The entry whose turn it is; it may be overwritten once nothing in it is needed."""
        return self.places[self.turn]

    def wrote(self, revision: int, needed: int) -> Place:
        """The entry whose turn it was is stored."""
        place = self.places[self.turn]
        place.revision, place.needed = revision, needed
        self.turn = (self.turn + 1) % ENTRIES
        return place


class Seen:
    """Ids that may have a record which is not in memory. It never forgets one, and takes some others for one."""

    def __init__(self) -> None:
        self._bits = bytearray(1 << (SEEN_BITS - 3))

    def add(self, work_id: str) -> None:
        number = crc32(work_id.encode()) & ((1 << SEEN_BITS) - 1)
        self._bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, work_id: str) -> bool:
        number = crc32(work_id.encode()) & ((1 << SEEN_BITS) - 1)
        return bool(self._bits[number >> 3] & 1 << (number & 7))


def key(number: int) -> str:
    """Of an entry in the bucket."""
    return f"{KEY}.{number}"


def entry_bytes(stream_created: str, records: Sequence[bytes]) -> bytes:
    """An :class:`Entry` of records that are encoded already."""
    return b'{"stream_created":%b,"records":[%b]}' % (msgspec.json.encode(stream_created), b",".join(records))


async def take_over(bus: Bus, ring: Ring, stream_created: str) -> list[tuple[WorkRecord, Place]]:
    """Reads all entries and deposes whoever wrote them; gives the first records of items that came by this inbox.

    Raises:
        BusError: the ring could not be read, or others write it faster than it is read.
    """
    for _ in range(RACES_MAX):
        stored = {
            int(message.subject.rpartition(".")[2]): message
            for message in await read_all(bus, storage.WORK.stream, storage.WORK.subject(f"{KEY}.*"))
        }
        ring.restore({number: message.seq for number, message in stored.items()})
        present = stored.get(ring.turn)
        subject = storage.WORK.subject(key(ring.turn))
        reply = await bus.call(
            subject,
            present.data if present else entry_bytes(stream_created, []),
            headers={"Nats-Expected-Last-Subject-Sequence": str(present.seq if present else 0)},
        )
        try:
            revision = read_ack(subject, reply.data).seq
        except Conflict:
            continue
        ring.wrote(revision, 0)
        found: list[tuple[WorkRecord, Place]] = []
        for number, message in stored.items():
            found += [(record, ring.places[number]) for record in _records(message.data, number, stream_created)]
        return found
    raise BusError(f"the ring of first records was written {RACES_MAX} times while it was read")


def _records(data: bytes, number: int, stream_created: str) -> list[WorkRecord]:
    try:
        entry = msgspec.json.decode(data, type=Entry)
    except (ValueError, RecursionError) as error:
        _log.error("a stored value cannot be read", bucket=storage.WORK.name, key=key(number), reason=str(error))
        return []
    return entry.records if entry.stream_created == stream_created else []
