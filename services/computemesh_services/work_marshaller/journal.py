"""Writing work records: one compare-and-set put per transition, many in flight, one per item.

A record's next put waits for the acknowledgement of its last one, and whatever must be sent because a
record changed is handed out only after its acknowledgement. Puts that wait for the same item are merged:
only the newest is written. First records are stored together, as :mod:`.firsts` describes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec

from computemesh import log, trace
from computemesh.bus import Bucket, Bus, Conflict, NotStored, Pipeline, Reply
from computemesh.bus.connection import read_ack
from computemesh.contracts.base import Message, encode
from computemesh.contracts.work import WorkRecord
from computemesh_services.work_marshaller import firsts
from computemesh_services.work_marshaller.firsts import ENTRY_BYTES_MAX, LATE_S, Place, Ring, Seen, entry_bytes
from computemesh_services.work_marshaller.floor import Floor
from computemesh_services.work_marshaller.workitem import is_final

CURSOR_KEY: Final = "meta.inbox"
"""Where the floor is kept. Two tokens, so that it is not republished as the state of an item."""

_log = log.get("journal")


class Cursor(Message, frozen=True, kw_only=True):
    """From where the inbox must be read again."""

    next_seq: int
    stream_created: str
    """Tells a stream that was made anew, whose sequences start over."""


@dataclass(slots=True)
class Slot:
    """One item's place in the bucket."""

    revision: int = 0
    place: Place | None = None
    """Where `stored` stands, when it is not the item's own record."""
    stored: WorkRecord | None = None
    flight: WorkRecord | None = None
    flight_seqs: list[int] = field(default_factory=list[int])
    wanted: WorkRecord | None = None
    seqs: list[int] = field(default_factory=list[int])
    """Inbox messages that are reflected once `wanted` is stored."""
    rested: asyncio.Event | None = None
    """Set once nothing of the item is on its way any more, if anyone waits for that."""


def trace_headers(record: WorkRecord) -> dict[str, str] | None:
    """The trace context of an item, as headers of what is sent because of it."""
    return {trace.HEADER: record.traceparent} if record.traceparent else None


OnStored = Callable[[WorkRecord | None, WorkRecord], Awaitable[None]]


class Journal:
    """The only writer of ``compute-work`` in this process.

    When it can no longer vouch for what is stored (a lost race, no acknowledgement, a full disk),
    ``broken`` is set and nothing more is written: the truth must be read again.
    """

    def __init__(self, bus: Bus, bucket: Bucket[WorkRecord], floor: Floor, *, keep_s: int, timeout_s: float) -> None:
        self.broken = asyncio.Event()
        self.reason = ""
        self.refused = False
        """Whether it broke because the server would not store something."""
        self.on_stored: OnStored | None = None
        self.on_duplicate: Callable[[str], None] | None = None
        """Called with the id of a new item that turned out to be finished long ago."""
        self._bucket = bucket
        self._bus = bus
        self._floor = floor
        self._keep_s = keep_s
        self._slots: dict[str, Slot] = {}
        self._puts = Pipeline(bus, timeout_s=timeout_s)
        self._cursor_revision = 0
        self._cursor_written = 0
        self._cursor_in_flight = False
        self._checks: set[asyncio.Future[Any]] = set()
        self._ring = Ring()
        self._stream_created = ""
        self._group: list[tuple[Slot, WorkRecord, bytes]] = []
        """First records that wait for the entry that is being written, or for room in the ring."""
        self._entry_in_flight = False
        self._late: deque[tuple[float, str, Place]] = deque()
        """Items without a record of their own, and when they need one; the oldest first."""
        self._ended = Seen()
        """Items whose record may be final, though nobody remembers them."""
        self._held: set[int] = set()
        """Submissions of items without a record of their own, as found at the start."""

    async def start(self, stream_created: str) -> list[tuple[WorkRecord, Place]]:
        """Deposes other journals, and gives the first records of items that may have none of their own.

        Raises:
            BusError: they could not be read.
        """
        self._stream_created = stream_created
        await self._puts.start()
        return await firsts.take_over(self._bus, self._ring, stream_created)

    async def stop(self) -> None:
        self.reason = self.reason or "the reign ended"
        self.broken.set()
        for task in self._checks:
            task.cancel()
        await self._puts.stop()

    def adopt(self, record: WorkRecord, revision: int) -> None:
        """Takes over a record that is stored."""
        self._slots[record.work_id] = Slot(revision=revision, stored=record)

    def adopt_first(self, record: WorkRecord, place: Place) -> None:
        """Takes over a record that stands in an entry only."""
        place.needed += 1
        self._slots[record.work_id] = Slot(place=place, stored=record, seqs=[record.inbox_seq])
        self._late.append((0.0, record.work_id, place))
        self._held.add(record.inbox_seq)

    def adopt_ended(self, work_id: str) -> None:
        """Takes note of a record that is final."""
        self._ended.add(work_id)

    def holds(self, seq: int) -> bool:
        """Whether the inbox message *seq* is that of an item that has no record of its own yet."""
        return seq in self._held

    def adopt_cursor(self, next_seq: int, revision: int) -> None:
        self._cursor_written, self._cursor_revision = next_seq, revision

    @property
    def stored_up_to(self) -> int:
        """The inbox sequence below which everything is reflected in the bucket, as noted there."""
        return self._cursor_written

    def is_stored(self, record: WorkRecord) -> bool:
        slot = self._slots.get(record.work_id)
        return slot is not None and slot.stored is record

    async def settled(self) -> None:
        """Returns when everything that was written is acknowledged, or the journal broke."""
        broken: asyncio.Future[Any] = asyncio.ensure_future(self.broken.wait())
        try:
            while not self.broken.is_set() and (self._checks or not self._puts.empty.is_set()):
                empty: asyncio.Future[Any] = asyncio.ensure_future(self._puts.empty.wait())
                await asyncio.wait(
                    {broken, *self._checks, *(() if self._puts.empty.is_set() else (empty,))},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                empty.cancel()
        finally:
            broken.cancel()

    async def stored(self, work_id: str) -> None:
        """Returns once everything that was written about an item is acknowledged.

        Raises:
            NotStored: the journal broke before.
        """
        slot = self._slots.get(work_id)
        if slot is None or (slot.flight is None and slot.wanted is None):
            return
        rested = slot.rested = slot.rested or asyncio.Event()
        waits = [asyncio.create_task(event.wait()) for event in (rested, self.broken)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not rested.is_set():
            raise NotStored(f"{work_id}: {self.reason}")

    def carry(self, work_id: str, seq: int) -> None:
        """The inbox message *seq* is reflected by the item's next put."""
        self._slot(work_id).seqs.append(seq)

    def pass_over(self, work_id: str, seq: int) -> None:
        """The inbox message *seq* changes nothing about an item as it is in memory. What of that is not stored yet
        holds the position back, as without it the message may count after all."""
        if self.holds(seq):
            return
        slot = self._slots.get(work_id)
        if slot is not None and slot.wanted is not None:
            slot.seqs.append(seq)
        elif slot is not None and slot.flight is not None:
            slot.flight_seqs.append(seq)
        else:
            self._floor.close(seq)

    async def write(self, record: WorkRecord) -> None:
        """Puts the record as soon as the item's last put is acknowledged."""
        slot = self._slot(record.work_id)
        if slot.stored is record:
            return
        latest = slot.wanted or slot.flight or slot.stored
        if latest is not None and is_final(latest):
            # Submitted anew while its end was being stored, and so many others ended that it was forgotten.
            if self.on_duplicate:
                self.on_duplicate(record.work_id)
            return
        slot.wanted = record
        if slot.flight is not None:
            return
        if slot.stored is not None:
            await self._send(slot, record)
        elif record.work_id in self._ended:
            self._check_duplicate(slot, record)
        else:
            await self._join(slot, record)

    async def _join(self, slot: Slot, record: WorkRecord) -> None:
        """Stores an item's first record together with those of others."""
        slot.flight, slot.wanted = record, None
        self._group.append((slot, record, encode(record)))
        await self._write_entry()

    async def _write_entry(self) -> None:
        """Writes what waits, unless an entry is being written or the next is still needed; both lead here again."""
        if self.broken.is_set() or self._entry_in_flight or not self._group:
            return
        place = self._ring.next
        if place.needed:
            await self.write_late(all_of_them=True)
            return
        size = count = 0
        for _, _, data in self._group:
            size += len(data)
            if count and size > ENTRY_BYTES_MAX:
                break
            count += 1
        group, self._group = self._group[:count], self._group[count:]
        self._entry_in_flight = True
        try:
            await self._puts.send(
                self._bucket.spec.subject(firsts.key(self._ring.turn)),
                entry_bytes(self._stream_created, [data for _, _, data in group]),
                partial(self._on_entry, group),
                headers={"Nats-Expected-Last-Subject-Sequence": str(place.revision)},
            )
        except NotStored as error:
            self._break(str(error), refused=True)

    async def _on_entry(self, group: list[tuple[Slot, WorkRecord, bytes]], reply: Reply) -> None:
        self._entry_in_flight = False
        if self.broken.is_set():
            return
        if reply.timed_out or reply.no_responder:
            self._break("no acknowledgement of first records")
            return
        try:
            revision = read_ack(firsts.KEY, reply.data).seq
        except (Conflict, NotStored) as error:
            self._break(str(error), refused=True)
            return
        place = self._ring.wrote(revision, len(group))
        due_s = asyncio.get_running_loop().time() + LATE_S
        for slot, record, _ in group:
            slot.stored, slot.place, slot.flight = record, place, None
            self._late.append((due_s, record.work_id, place))
        await self._write_entry()
        for slot, record, _ in group:
            if slot.wanted is not None or is_final(record):
                await self._send(slot, slot.wanted or record)
            else:
                _rest(slot)
            assert self.on_stored is not None
            await self.on_stored(None, record)

    async def write_late(self, *, all_of_them: bool = False) -> None:
        """Gives the items a record of their own that did not move on for long."""
        now_s = asyncio.get_running_loop().time()
        while self._late and (all_of_them or self._late[0][0] <= now_s):
            _, work_id, place = self._late.popleft()
            slot = self._slots.get(work_id)
            if slot is not None and slot.place is place and slot.flight is None and slot.stored is not None:
                await self._send(slot, slot.stored)

    def _slot(self, work_id: str) -> Slot:
        slot = self._slots.get(work_id)
        if slot is None:
            slot = self._slots[work_id] = Slot()
        return slot

    async def _send(self, slot: Slot, record: WorkRecord) -> None:
        if self.broken.is_set():
            return
        slot.flight, slot.wanted = record, None
        slot.flight_seqs += slot.seqs
        slot.seqs = []
        headers = {"Nats-Expected-Last-Subject-Sequence": str(slot.revision)}
        headers |= trace_headers(record) or {}  # Republished with the record.
        if is_final(record):
            headers["Nats-TTL"] = f"{self._keep_s}s"
        try:
            await self._puts.send(
                self._bucket.spec.subject(record.work_id),
                self._fitted(record),
                partial(self._on_reply, slot, record),
                headers=headers,
            )
        except NotStored as error:
            self._break(str(error), refused=True)

    def _fitted(self, record: WorkRecord) -> bytes:
        """The record's bytes; without its payload when both payload and result are near the limit."""
        data = encode(record)
        if len(data) > self._bus.max_payload:
            note = {"omitted": "too large to be kept beside the result"}
            data = encode(msgspec.structs.replace(record, payload=note))
        return data

    async def _on_reply(self, slot: Slot, record: WorkRecord, reply: Reply) -> None:
        if self.broken.is_set():
            return
        if reply.timed_out or reply.no_responder:
            self._break(f"{record.work_id}: no acknowledgement")
            return
        try:
            ack = read_ack(record.work_id, reply.data)
        except (Conflict, NotStored) as error:
            self._break(str(error), refused=True)
            return
        await self._stored(slot, record, ack.seq)

    async def _stored(self, slot: Slot, record: WorkRecord, revision: int) -> None:
        before = slot.stored
        slot.stored, slot.revision, slot.flight = record, revision, None
        if slot.place is not None:
            slot.place.needed -= 1
            slot.place = None
            await self._write_entry()
        self._close(slot)
        if slot.wanted is not None:
            await self._send(slot, slot.wanted)
        elif is_final(record):
            self._slots.pop(record.work_id, None)
            self._ended.add(record.work_id)
            for seq in slot.seqs:
                self._floor.close(seq)
        if slot.flight is None:
            _rest(slot)
        if before is not record:
            assert self.on_stored is not None
            await self.on_stored(before, record)

    def _close(self, slot: Slot) -> None:
        for seq in slot.flight_seqs:
            self._floor.close(seq)
            self._held.discard(seq)
        slot.flight_seqs = []

    def _check_duplicate(self, slot: Slot, record: WorkRecord) -> None:
        """A new item whose id may be taken by one that ended long ago and was forgotten here."""

        async def check() -> None:
            entry = await self._bucket.get(record.work_id)
            if entry is None:
                await self._join(slot, slot.wanted or record)
                return
            if not is_final(entry.value):
                self._break(f"{record.work_id}: another marshaller writes")
                return
            self._close(slot)
            for seq in slot.seqs:
                self._floor.close(seq)
            self._slots.pop(record.work_id, None)
            _rest(slot)
            if self.on_duplicate:
                self.on_duplicate(record.work_id)

        slot.flight, slot.wanted = record, None
        task = asyncio.ensure_future(check())
        self._checks.add(task)
        task.add_done_callback(self._checked)

    def _checked(self, task: asyncio.Future[Any]) -> None:
        self._checks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._break(f"cannot check for a duplicate: {error}")

    async def write_cursor(self, stream_created: str) -> None:
        """Notes how far the inbox is reflected, if that changed."""
        seq = self._floor.seq
        if seq == self._cursor_written or self._cursor_in_flight or self.broken.is_set():
            return
        self._cursor_in_flight = True
        await self._puts.send(
            self._bucket.spec.subject(CURSOR_KEY),
            encode(Cursor(next_seq=seq, stream_created=stream_created)),
            partial(self._on_cursor, seq),
            headers={"Nats-Expected-Last-Subject-Sequence": str(self._cursor_revision)},
        )

    async def _on_cursor(self, seq: int, reply: Reply) -> None:
        self._cursor_in_flight = False
        if reply.timed_out or reply.no_responder:
            self._break("no acknowledgement of the inbox position")
            return
        try:
            self._cursor_revision = read_ack(CURSOR_KEY, reply.data).seq
        except (Conflict, NotStored) as error:
            self._break(str(error), refused=True)
            return
        self._cursor_written = seq

    def _break(self, reason: str, *, refused: bool = False) -> None:
        if not self.broken.is_set():
            self.reason, self.refused = reason, refused
            _log.warning("the journal stops; reading the truth again", reason=reason)
            self.broken.set()


def _rest(slot: Slot) -> None:
    if slot.rested is not None:
        slot.rested.set()
        slot.rested = None
