"""One reign: from taking the lease to losing it, with all memory built anew from what is stored.

    load the bucket --> replay the inbox from the cursor --> deliver again what was not answered --> follow

It ends when the lease, the connection, the inbox or the journal can no longer be relied upon. Everything
in memory is then dropped; the next reign, here or in another replica, reads the truth again. Replaying is
idempotent, so starting too early does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from computemesh import log, trace
from computemesh.bus import Bucket, Bus, BusError, Mirror, Pipeline, Posts, Pull, Reply, Stored
from computemesh.bus.lease import Held
from computemesh.bus.provision import stream_created_at
from computemesh.contracts import gpus, nodes, storage, work
from computemesh.contracts.base import Message, Refused, decode, encode
from computemesh.contracts.gpus import GpuReleased, GpuReservation
from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord
from computemesh.contracts.work import FINAL, Blacklisted, WorkItem, WorkRecord, WorkState
from computemesh.tasks import end_all
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.blacklist import Tally
from computemesh_services.work_marshaller.effects import Deliver, Stop, consequences
from computemesh_services.work_marshaller.firsts import Place
from computemesh_services.work_marshaller.floor import Floor
from computemesh_services.work_marshaller.grants import wants_gpus
from computemesh_services.work_marshaller.journal import CURSOR_KEY, Cursor, Journal, trace_headers
from computemesh_services.work_marshaller.reservations import Reservations
from computemesh_services.work_marshaller.retention import make_room_forever
from computemesh_services.work_marshaller.scheduler import REMEMBERED_MAX, Limits, Scheduler

STORE_TIMEOUT_S: Final = 5.0
"""An acknowledgement that takes longer counts as lost, and the truth is read again."""

DELIVERY_TIMEOUT_S: Final = 2.0
"""How long a direct node may take to answer an assignment."""

DELIVERIES_MAX: Final = 3
"""Times an assignment is sent before the node counts as unreachable."""

READ_S: Final = 2.0
"""How long an answered submission may wait until it was read back from the inbox."""

CURSOR_S: Final = 0.25
"""How often the inbox position is noted."""

LOOK_UP_AGAIN_S: Final = 0.5

ORIGINAL_CHARS_MAX: Final = 2000
"""How much of a message that could not be used is shown in its rejection."""

BLACKLIST_KEY: Final = "meta.blacklist"
"""Where the blacklist is kept, beside the inbox position."""

BLACKLIST_S: Final = 0.25
"""How often it is looked whether the blacklist changed."""

CHECKED_HEADER: Final = "Computemesh-Checked"
"""On items that a marshaller took already: they were answered, and must not be refused afterwards."""

NOBODY_LISTENS: Final = "nobody listens for it"

ENVELOPE_BYTES: Final = 65_536
"""Room a record needs beside its payload."""

_log = log.get("reign")

WAITING = Gauge("computemesh_work_waiting", "Items that wait for a node or for their next attempt.")
OUT = Gauge("computemesh_work_out", "Items assigned to or running on nodes.")
MOVES = Counter("computemesh_work_moves_total", "Recorded moves of items, by the state they reached.", ["state"])
_MOVED: Final = {state: MOVES.labels(state) for state in WorkState}
WAIT = Histogram(
    "computemesh_work_wait_seconds",
    "From the submission of an item to the assignment of its first attempt.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 3600),
)
DURATION = Histogram(
    "computemesh_work_duration_seconds",
    "From the submission of an item to its end, by the state it ended in.",
    ["state"],
    buckets=(0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 3600, 14400, 86400),
)
BEHIND = Gauge("computemesh_inbox_behind", "Messages of the inbox that the acting marshaller has not read yet.")
_ENDED: Final = {state: DURATION.labels(state) for state in FINAL}
IGNORED = Counter("computemesh_work_reports_ignored_total", "Reports of nodes that changed nothing, by why.", ["why"])
REJECTED = Counter("computemesh_work_rejected_total", "Captured messages that could not be used.", ["code"])


class Tallies(Message, frozen=True, kw_only=True):
    """The blacklist, as it is kept."""

    tallies: list[Tally] = []


@dataclass(frozen=True, slots=True)
class Parcel:
    """An attempt, or a replica of it, on its way to a node."""

    record: WorkRecord
    replica: int
    node_id: str
    reservation: GpuReservation | None = None
    times_sent: int = 1


class Reign:
    """Everything the acting marshaller knows, and its hands."""

    def __init__(self, bus: Bus, held: Held, nodes_seen: Mirror[NodeRecord], limits: Limits, *, keep_s: int) -> None:
        self.scheduler = Scheduler(limits, jitter=random.random)
        self.caught_up = asyncio.Event()
        """Set once the inbox was replayed; until then memory is behind the truth."""
        self._read_seq = 0
        """The inbox is read up to here."""
        self._behind = 0
        self._readers: dict[int, asyncio.Event] = {}
        """Set when the inbox is read up to the key."""
        self._bus = bus
        self._held = held
        self._nodes = nodes_seen
        self._keep_s = keep_s
        self._bucket = Bucket(bus, storage.WORK)
        self._calls = Pipeline(bus, timeout_s=DELIVERY_TIMEOUT_S)
        self._posts = Posts(bus)
        self._pull = Pull(bus, storage.WORK_INBOX.name)
        self._wake = asyncio.Event()
        self._stream_created = ""
        self._floor = Floor(1)
        self._blacklist_revision = 0
        self._blacklist_lock = asyncio.Lock()
        self._journal = Journal(bus, self._bucket, self._floor, keep_s=keep_s, timeout_s=STORE_TIMEOUT_S)
        self._reservations = Reservations(
            bus,
            node_of=lambda node_id: seat.node if (seat := self.scheduler.seats.get(node_id)) else None,
            certain=lambda: self._held.certain,
            on_granted=self._on_granted,
            on_refused=self._on_no_gpus,
            on_away=self._on_ledger_away,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, draining: asyncio.Event) -> str:
        """Reigns until something ends it, and says what. Ends at once, with all stored, when draining."""
        interrupted = self._bus.interrupted
        beats = await self._bus.subscribe(nodes.HEARTBEAT, self._on_heartbeat)
        released = await self._bus.subscribe(gpus.RELEASED, self._on_released)
        loops: list[asyncio.Task[None]] = []
        try:
            await self._calls.start()
            await self._posts.start(self._on_unheard)
            self._reservations.start()
            await self._recover()
            loops.append(asyncio.create_task(self._tick_forever()))
            loops.append(asyncio.create_task(self._keep_blacklist_forever()))
            loops.append(
                asyncio.create_task(
                    make_room_forever(self._bus, lambda: self._journal.stored_up_to, self._objects_needed)
                )
            )
            ends = {
                "draining": draining,
                "the connection broke": interrupted,
                "the lease was lost": self._held.lost,
                "the inbox reader was lost": self._pull.lost,
                "the journal broke": self._journal.broken,
            }
            reason = await _first(ends, loops)
            if reason == "draining":
                await self._settle()
            return reason
        finally:
            await self._bus.forget(beats)
            await self._bus.forget(released)
            await end_all(loops)
            await end_all(self._tasks)
            await self._reservations.stop()
            await self._pull.stop()
            await self._calls.stop()
            await self._posts.stop()
            await self._journal.stop()

    def _objects_needed(self) -> set[str]:
        """The payloads in the object store of items that have not ended."""
        records = self.scheduler.records.values()
        return {one.payload_object.object_id for one in records if one.payload_object and not workitem.is_final(one)}

    @property
    def refused(self) -> bool:
        """Whether the server refused to store something."""
        return self._journal.refused

    # --- recovery ----------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        started_s = time.monotonic()
        await self._nodes.synced.wait()
        now = time.time()
        for node in self._nodes.values():
            self.scheduler.node_changed(node, now)
        self._stream_created = await stream_created_at(self._bus, storage.WORK_INBOX.name)
        self._journal.on_stored = self._on_stored
        self._journal.on_duplicate = self.scheduler.forget
        # In this order: what one of them no longer has stands in the next.
        first = await self._journal.start(self._stream_created)
        start_seq = await self._read_cursor()
        count = await self._load(first, start_seq, now)
        waiting = await self._pull.start(
            self._on_inbox, subjects=list(storage.WORK_INBOX.subjects), start_seq=start_seq
        )
        if waiting == 0:
            await self._replayed()
        _log.info(
            "recovered",
            items=count,
            replaying=waiting,
            from_seq=start_seq,
            took_ms=round((time.monotonic() - started_s) * 1e3),
        )

    async def _read_cursor(self) -> int:
        """Where to start in the inbox. Also sets up the floor."""
        cursor = await self._bucket.read_other(CURSOR_KEY, Cursor)
        start_seq = 1
        if cursor is not None:
            if cursor.value.stream_created == self._stream_created:
                start_seq = cursor.value.next_seq
            self._journal.adopt_cursor(cursor.value.next_seq, cursor.revision)
        self._floor.start(start_seq)
        return start_seq

    async def _load(self, first: list[tuple[WorkRecord, Place]], start_seq: int, now: float) -> int:
        """Takes over what is stored, and gives the number of items.

        Args:
            first: the first records of items, most of which have records of their own by now. What stands below
                *start_seq* in the inbox has, or had one that expired.
        """
        entries = await self._bucket.load()
        finished: list[WorkRecord] = []
        for record, place in first:
            if record.work_id not in entries and record.inbox_seq >= start_seq:
                self.scheduler.restore(record, now)
                self._journal.adopt_first(record, place)
                self._reservations.adopt(record)
        for entry in entries.values():
            if workitem.is_final(entry.value):
                self._journal.adopt_ended(entry.value.work_id)
                finished.append(entry.value)
            else:
                self.scheduler.restore(entry.value, now)
                self._journal.adopt(entry.value, entry.revision)
                self._reservations.adopt(entry.value)
        finished.sort(key=lambda record: record.finished_at or 0.0)
        for record in finished[-REMEMBERED_MAX:]:
            self.scheduler.restore(record, now)
        if kept := await self._bucket.read_other(BLACKLIST_KEY, Tallies):
            self._blacklist_revision = kept.revision
            self.scheduler.restore_blacklist(kept.value.tallies, now)
        return len(entries)

    async def _replayed(self) -> None:
        """The inbox is read to its end: what is still assigned may never have arrived, so send it again."""
        self.caught_up.set()
        self.scheduler.recovered(time.time())
        for record in list(self.scheduler.records.values()):
            if record.state is WorkState.ASSIGNED and self._journal.is_stored(record):
                await self._hand_out(record)
        await self._advance(time.time())

    # --- the inbox ---------------------------------------------------------------------------------------------

    async def _on_inbox(self, stored: Stored) -> None:
        self._floor.open(stored.seq)
        now = time.time()
        changed = self._decide(stored, now)
        if isinstance(changed, Refused):
            with trace.within(_traceparent(stored)):
                await self._reject(stored, changed)
            self._floor.close(stored.seq)
        elif changed is None:
            self._journal.pass_over(_id_in(stored.data), stored.seq)
        else:
            self._journal.carry(changed.work_id, stored.seq)
        self._read_seq, self._behind = stored.seq, stored.pending
        if reader := self._readers.get(stored.seq):
            reader.set()
        if stored.pending == 0 and not self.caught_up.is_set():
            await self._replayed()
        await self._advance(now)

    async def read_up_to(self, seq: int) -> None:
        """Returns once the inbox was read up to *seq*, or after READ_S: whoever stored something can then see it."""
        if self._read_seq >= seq:
            return
        reader = self._readers[seq] = asyncio.Event()
        try:
            async with asyncio.timeout(READ_S):
                await reader.wait()
        except TimeoutError:
            _log.warning("the inbox is read late", seq=seq, read_up_to=self._read_seq)
        finally:
            del self._readers[seq]

    def _decide(self, stored: Stored, now: float) -> WorkRecord | Refused | None:
        """What follows from a message. One that meets a defect of ours is set aside, not met again and again."""
        try:
            if stored.subject == work.SUBMIT.subject:
                return self._submission(stored, now)
            return self._report(stored, now)
        except Exception:
            with trace.within(_traceparent(stored)):
                _log.exception("could not handle a message", subject=stored.subject, seq=stored.seq)
            return Refused(
                code="internal", reason="the marshaller failed on this message; its log says why", status=500
            )

    def _submission(self, stored: Stored, now: float) -> WorkRecord | Refused | None:
        item = decode(stored.data, WorkItem)
        if isinstance(item, Refused):
            return item
        if len(stored.data) > self._bus.max_payload - ENVELOPE_BYTES:
            return Refused(
                code="too_large",
                reason=f"{len(stored.data)} bytes; this server's max_payload of {self._bus.max_payload} bytes "
                f"leaves {self._bus.max_payload - ENVELOPE_BYTES} for an item",
                status=413,
            )
        work_id = item.work_id or self._derived_id(stored.seq)
        if work_id in self.scheduler.records:
            return None
        if CHECKED_HEADER not in (stored.headers or {}):
            refusal = self.scheduler.refusal(item, now, fresh=self.caught_up.is_set())
            if refusal is not None:
                return refusal
        return self.scheduler.submitted(item, work_id, stored.seq, now, traceparent=_traceparent(stored))

    def _derived_id(self, seq: int) -> str:
        """The id of an item that came without one: the same whenever the inbox is replayed."""
        created_s = int(datetime.fromisoformat(self._stream_created).timestamp())
        return f"w-{created_s:x}-{seq}"

    def _report(self, stored: Stored, now: float) -> WorkRecord | Refused | None:
        report: work.WorkCompleted | work.WorkFailed | Refused
        if stored.subject == work.COMPLETED.subject:
            report = decode(stored.data, work.WorkCompleted)
        else:
            report = decode(stored.data, work.WorkFailed)
        if isinstance(report, Refused):
            return report
        if isinstance(report, work.WorkCompleted):
            changed = self.scheduler.completed(report, now, seq=stored.seq)
        else:
            changed = self.scheduler.failed(report, now, seq=stored.seq)
        if changed is None:
            self._ignored(report, stored)
        return changed

    def _ignored(self, report: work.WorkCompleted | work.WorkFailed, stored: Stored) -> None:
        """Counts a report that changes nothing; says so when the work was another's by then."""
        record = self.scheduler.records.get(report.work_id)
        why = workitem.why_ignored(record, report.attempt, stored.seq)
        IGNORED.labels(why).inc()
        if record is not None and why == "old_attempt":
            _log.warning(
                "refused a late report", work_id=report.work_id, attempt=report.attempt, node=report.node_id,
                current_attempt=record.attempt, current_node=record.node_id, state=str(record.state), seq=stored.seq,
            )  # fmt: skip

    async def _reject(self, stored: Stored, refusal: Refused) -> None:
        REJECTED.labels(refusal.code).inc()
        _log.warning(
            "rejected", subject=stored.subject, seq=stored.seq, code=refusal.code, field=refusal.field,
            reason=refusal.reason,
        )  # fmt: skip
        await self._bus.publish(
            work.REJECTED,
            work.WorkRejected(
                subject=stored.subject,
                inbox_seq=stored.seq,
                work_id=_id_in(stored.data),
                code=refusal.code,
                reason=refusal.reason,
                field=refusal.field,
                original=stored.data[:ORIGINAL_CHARS_MAX].decode("utf-8", "replace"),
            ),
        )

    # --- moving on ---------------------------------------------------------------------------------------------

    async def _advance(self, now: float) -> None:
        """Lets the scheduler decide, and hands its records to the journal."""
        self.scheduler.tick(now)
        if self.caught_up.is_set():
            self.scheduler.place(now)
            if unknown := self.scheduler.take_unknown():
                self._spawn(self._look_up(unknown))
        while self.scheduler.outbox:
            # Of several moves of one item only the last need be stored.
            batch = {record.work_id: record for record in self.scheduler.outbox}
            self.scheduler.outbox.clear()
            for record in batch.values():
                await self._journal.write(record)

    async def _look_up(self, work_ids: list[str]) -> None:
        """Reads items that others wait for."""
        for work_id in work_ids:
            while True:
                try:
                    found = await self.stored(work_id)
                    break
                except BusError as error:
                    _log.warning("cannot read an item that others wait for", work_id=work_id, reason=str(error))
                    await asyncio.sleep(LOOK_UP_AGAIN_S)
            self.scheduler.looked_up(work_id, found, time.time())
        await self._advance(time.time())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _on_stored(self, before: WorkRecord | None, record: WorkRecord) -> None:
        _MOVED[record.state].inc()
        if record.state in FINAL:
            if record.state is not WorkState.COMPLETED:
                self._tell(record)
            _ENDED[record.state].observe(record.changed_at - record.submitted_at)
        elif record.state is WorkState.ASSIGNED and record.attempt == 1:
            WAIT.observe(record.changed_at - record.submitted_at)
        elif record.state is WorkState.RETRYING:
            self._tell(record)
        self._reservations.stored(before, record)
        for effect in consequences(before, record):
            match effect:
                case Deliver():
                    if self.scheduler.records.get(record.work_id) is record:
                        await self._hand_out(record)
                case Stop():
                    await self._stop(effect)

    def _tell(self, record: WorkRecord) -> None:
        """Logs what did not go well."""
        with trace.within(record.traceparent, record.work_id):
            _log.info(
                str(record.state),
                work_id=record.work_id,
                attempt=record.attempt,
                node=record.node_id,
                reason=record.story[-1].reason,
            )

    async def cancel(self, work_id: str, reason: str) -> WorkRecord | None:
        """The item as it then stands, once that is stored; None: not known here.

        Raises:
            NotStored: it could not be stored, so nobody may rely on it.
        """
        now = time.time()
        record = self.scheduler.cancel(work_id, reason, now)
        await self._advance(now)
        return await self.settled(record) if record else None

    async def stored(self, work_id: str) -> WorkRecord | None:
        """An item that is not in memory. One that has just ended may have left memory before that was stored.

        Raises:
            BusError: it cannot be read.
        """
        await self._journal.stored(work_id)
        entry = await self._bucket.get(work_id)
        return entry.value if entry else None

    async def settled(self, record: WorkRecord) -> WorkRecord | None:
        """The record, once nobody can have to take it back: an outcome only when it is stored. None when that showed it
        to be no item of its own: the same one had ended before, and was no longer in memory.

        Raises:
            NotStored: it could not be stored.
        """
        if not workitem.is_final(record):
            return record
        await self._journal.stored(record.work_id)
        return self.scheduler.records.get(record.work_id)

    async def _tick_forever(self) -> None:
        cursor_s = 0.0
        while True:
            now = time.time()
            until = min(self.scheduler.next_at() or now + CURSOR_S, now + CURSOR_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.005, until - now))
            self._wake.clear()
            await self._advance(time.time())
            if (now_s := time.monotonic()) >= cursor_s:
                cursor_s = now_s + CURSOR_S
                await self._journal.write_late()
                await self._journal.write_cursor(self._stream_created)
                WAITING.set(self.scheduler.waiting)
                OUT.set(self.scheduler.out)
                BEHIND.set(self._behind)

    async def pardon(self, node_id: str, work_type: str) -> list[Blacklisted]:
        """Trusts a node again at once; gives what it was blacklisted for, once that is stored."""
        now = time.time()
        pardoned = self.scheduler.pardon(node_id, work_type)
        await self._advance(now)
        await self._write_blacklist()
        return pardoned

    async def _keep_blacklist_forever(self) -> None:
        while True:
            await asyncio.sleep(BLACKLIST_S)
            await self._write_blacklist()

    async def _write_blacklist(self) -> None:
        """Stores the blacklist if it changed. A conflict is another marshaller's write, and ends the reign."""
        async with self._blacklist_lock:
            if not self.scheduler.blacklist.changed:
                return
            self.scheduler.blacklist.changed = False
            self._blacklist_revision = await self._bucket.update_other(
                BLACKLIST_KEY, Tallies(tallies=self.scheduler.blacklist.tallies()), last=self._blacklist_revision
            )

    async def _settle(self) -> None:
        """Stores all that is decided, so that the next reign has nothing to replay."""
        await self._pull.stop()
        for record in list(self.scheduler.records.values()):
            if not workitem.is_final(record):
                await self._journal.write(record)
        await self._journal.settled()
        await self._journal.write_late(all_of_them=True)
        await self._journal.settled()
        await self._journal.write_cursor(self._stream_created)
        await self._journal.settled()
        await self._write_blacklist()

    # --- nodes -------------------------------------------------------------------------------------------------

    def node_changed(self, node_id: str, node: NodeRecord | None) -> None:
        """The registry's bucket changed."""
        now = time.time()
        if node is None:
            self.scheduler.node_gone(node_id, now)
        else:
            self.scheduler.node_changed(node, now)
        self._wake.set()

    async def _on_heartbeat(self, beat: NodeHeartbeat) -> None:
        if not self.caught_up.is_set() or not self._held.certain:
            return  # What it lists may be a successor's, of which this memory knows nothing.
        now = time.time()
        for stop in self.scheduler.heartbeat(beat, now):
            await self._stop(stop)
        await self._advance(now)

    async def _hand_out(self, record: WorkRecord) -> None:
        """Delivers an attempt to all its nodes, once it has the GPUs that it needs."""
        if wants_gpus(record.requirements):
            self._reservations.reserve(record)
            return
        for replica, node_id in workitem.places(record):
            await self._deliver(Parcel(record, replica, node_id))

    async def _on_granted(self, record: WorkRecord, granted: Mapping[int, GpuReservation]) -> None:
        for replica, node_id in workitem.places(record):
            if self.scheduler.is_undelivered(record.work_id, record.attempt, replica):
                await self._deliver(Parcel(record, replica, node_id, granted[replica]))

    async def _on_no_gpus(self, record: WorkRecord, replica: int, refused: Refused) -> None:
        now = time.time()
        self.scheduler.refused_gpus(record.work_id, record.attempt, refused, now, replica=replica)
        await self._advance(now)

    async def _on_released(self, released: GpuReleased) -> None:
        self.scheduler.gpus_given_back(released.node_id, released.owner)
        self._wake.set()

    def _on_ledger_away(self, reason: str) -> None:
        self.scheduler.gpus_away(reason)
        self._wake.set()

    async def _deliver(self, parcel: Parcel) -> None:
        record = parcel.record
        data = encode(workitem.assignment(record, parcel.replica, parcel.reservation))
        headers = trace_headers(record)
        if record.plain:  # Such nodes do not answer, but the server does when nobody listens at all.
            await self._posts.send(work.ASSIGNED.at(), data, record.work_id, record.attempt, headers=headers)
            return

        async def on_reply(reply: Reply) -> None:
            await self._on_delivery(parcel, reply)

        await self._calls.send(work.DELIVER.at(parcel.node_id), data, on_reply, headers=headers)

    async def _on_unheard(self, work_id: str, attempt: int) -> None:
        now = time.time()
        self.scheduler.declined(work_id, attempt, NOBODY_LISTENS, now)
        await self._advance(now)

    async def _on_delivery(self, parcel: Parcel, reply: Reply) -> None:
        now = time.time()
        work_id, attempt, replica = parcel.record.work_id, parcel.record.attempt, parcel.replica
        if reply.timed_out:
            if not self.scheduler.is_undelivered(work_id, attempt, replica):
                return  # It was reported, or moved on, without an answer.
            if parcel.times_sent < DELIVERIES_MAX:
                await self._deliver(replace(parcel, times_sent=parcel.times_sent + 1))
                return
            self.scheduler.declined(work_id, attempt, "did not answer an assignment", now, replica=replica)
        elif reply.no_responder:
            self.scheduler.declined(work_id, attempt, NOBODY_LISTENS, now, replica=replica)
        else:
            answer = decode(reply.data, work.Delivery)
            if isinstance(answer, Refused):
                reason = f"answered nonsense: {answer.reason}"
                self.scheduler.declined(work_id, attempt, reason, now, replica=replica)
            elif answer.accepted:
                self.scheduler.accepted(work_id, attempt, answer.session, now, replica=replica)
            else:
                self.scheduler.declined(work_id, attempt, answer.reason or "declined", now, replica=replica)
        await self._advance(now)

    async def _stop(self, effect: Stop) -> None:
        message = work.WorkStop(
            work_id=effect.work_id, attempt=effect.attempt, replica=effect.replica, reason=effect.reason
        )
        record = self.scheduler.records.get(effect.work_id)
        headers = trace_headers(record) if record else None
        await self._calls.send(work.STOP.at(effect.node_id), encode(message), _ignore, headers=headers)


async def _ignore(_: Reply) -> None:
    """A stop needs no answer: a node that still runs the attempt says so in its next heartbeat."""


def _traceparent(stored: Stored) -> str:
    """The trace context a message came with, if it is one."""
    header = stored.headers.get(trace.HEADER, "") if stored.headers else ""
    return header if header and trace.parse(header) else ""


def _id_in(data: bytes) -> str:
    """The ``work_id`` of a message that could not be used, if it can be made out."""
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("work_id")
        return str(msgspec.json.decode(found))[:100] if found is not None else ""
    except (ValueError, RecursionError):
        return ""


async def _first(events: dict[str, asyncio.Event], loops: list[asyncio.Task[None]]) -> str:
    """The name of the event that is set first. A defect in one of *loops* is raised."""
    waits = {name: asyncio.create_task(event.wait()) for name, event in events.items()}
    try:
        await asyncio.wait({*waits.values(), *loops}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (loop for loop in loops if loop.done()):
            error = ended.exception()
            if error is not None and not isinstance(error, BusError):
                raise error
            return f"the bus failed: {error}"
        return next(name for name, task in waits.items() if task.done())
    finally:
        for task in waits.values():
            task.cancel()
