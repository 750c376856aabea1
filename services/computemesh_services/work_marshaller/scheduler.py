"""What to do next with every item: the marshaller's decisions, without clock, bus or log.

The shell feeds it what happened (a submission, a report, an answer, a heartbeat, time passing) and takes
from ``outbox`` what must follow. Records are replaced, never edited. What must be *sent* because a record
was stored is decided in ``effects.py``.
"""

from __future__ import annotations

import difflib
import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec

from computemesh.contracts.base import Message, Refused
from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord, NodeState
from computemesh.contracts.work import (
    FINAL,
    HANDED_BACK,
    TIMEOUT,
    WORK_TYPES,
    Blacklisted,
    NodeVerdict,
    WorkCompleted,
    WorkError,
    WorkExplanation,
    WorkFailed,
    WorkItem,
    WorkRecord,
    WorkState,
)
from computemesh_services.work_marshaller import dependencies, explaining, gangs, placement, workitem
from computemesh_services.work_marshaller.blacklist import Blacklist, BlacklistPolicy, Kind, Tally
from computemesh_services.work_marshaller.dependencies import Dependencies
from computemesh_services.work_marshaller.effects import Stop
from computemesh_services.work_marshaller.gangs import Kept
from computemesh_services.work_marshaller.grants import QUOTA, Refusals, wants_gpus
from computemesh_services.work_marshaller.groups import Groups
from computemesh_services.work_marshaller.needs import Shape, ask_of, shape_of
from computemesh_services.work_marshaller.queue import Backlog, Queue
from computemesh_services.work_marshaller.rooms import Room
from computemesh_services.work_marshaller.seats import Place, Seat
from computemesh_services.work_marshaller.workitem import OUT, WAITING, RetryPolicy

WRITE_LATE_S: Final = 0.25
"""An item that waits, or an attempt that runs, for longer than this is written as such."""

MISSED_S: Final = 3.0
"""A running attempt that its node's heartbeats do not list for this long is lost."""

REMEMBERED_MAX: Final = 10_000
"""Finished items kept in memory for lists; all others are read from the bucket."""

CLOCK_SLACK: Final = 10_000
"""Entries of the clock that may have lost their meaning before it is swept."""

VERDICTS_MAX: Final = 100
"""Nodes in an explanation: those that fit or nearly do."""

REST: Final = -1
DEADLINE: Final = -2
PATIENCE: Final = -3
"""In place of an attempt, in the clock: a node's rest or its time on the blacklist ends; the deadline of an item; an
item with replicas has waited for long."""

ANY_NODE: Final = ""

ANSWER_GRACE_S: Final = 5.0
"""A direct node enforces the timeout itself and reports it; the marshaller steps in this much later."""


@dataclass(slots=True)
class Watch:
    """An attempt that is out, and since when its node has been silent about it."""

    accepted_at: float | None = None
    session: str = ""
    missed_at: float | None = None


class Limits(Message, frozen=True, kw_only=True):
    """Bounds of the queue and of attempts."""

    waiting_max: int = 100_000
    priority_step_s: float = 600.0
    """Waiting that counts as much as one step of priority."""
    retry: RetryPolicy = RetryPolicy()
    blacklist: BlacklistPolicy = BlacklistPolicy()


class Scheduler:
    """All items that are not finished, all nodes, and the decisions about them.

    Not safe for concurrent use, and in no need of it: every method is synchronous and short.
    """

    def __init__(self, limits: Limits, *, jitter: Callable[[], float]) -> None:
        self.records: dict[str, WorkRecord] = {}
        """Every item that is not finished, and the latest finished ones."""
        self.outbox: list[WorkRecord] = []
        """Records to store, in order. The shell empties it after every call."""
        self.seats: dict[str, Seat] = {}
        self.blacklist = Blacklist(limits.blacklist)
        self._limits = limits
        self._jitter = jitter
        self._queue = Queue(step_s=limits.priority_step_s)
        self._ready: dict[Backlog, list[Seat] | None] = {}
        """Backlogs of which an item may fit a node: one of these, or (None) any. All others fit nowhere."""
        self._groups = Groups(self._objection)
        self._roomier: dict[str, None] = {}
        """Nodes that may have more room than when items were placed last."""
        self._kept: Kept | None = None
        """Nodes that are kept for an item with replicas."""
        self._watches: dict[Place, Watch] = {}
        self._out_count = 0
        self._clock: list[tuple[float, str, int]] = []
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._dependencies = Dependencies()
        self._gpu_refusals = Refusals()
        self._ended: deque[WorkRecord] = deque()
        """Finished items for which others wait; :meth:`tick` tells those."""
        self._waiting = 0

    # --- items -----------------------------------------------------------------------------------------------

    def refusal(self, item: WorkItem, now: float, *, fresh: bool = True) -> Refused | None:
        """Why a new item cannot be taken, or None.

        Args:
            fresh: it was just submitted. While the inbox is replayed, more items wait than did at the time, and a
                deadline may have passed since.
        """
        if not self._knows(item.work_type):
            known = sorted({*WORK_TYPES, *(t for s in self.seats.values() if s.node.slots for t in s.node.work_types)})
            close = difflib.get_close_matches(item.work_type, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            return Refused(
                code="unknown_work_type",
                field="work_type",
                reason=f"there is no work of type {item.work_type!r}; {hint}known: {', '.join(known)}",
            )
        if item.payload and item.payload_object:
            reason = "an item has its payload either in itself or in the object store"
            return Refused(code="bad_message", field="payload_object", reason=reason)
        if fresh and item.deadline_at is not None and item.deadline_at <= now:
            return Refused(
                code="deadline_passed",
                field="deadline_at",
                reason=f"the deadline, {datetime.fromtimestamp(item.deadline_at, UTC):%F %T} UTC, has passed",
            )
        if fresh and self._waiting >= self._limits.waiting_max:
            return Refused(
                code="queue_full",
                reason=f"{self._waiting} items wait already, as many as are allowed",
                status=503,
                retry="later",
            )
        return None

    def _knows(self, work_type: str) -> bool:
        if work_type in WORK_TYPES:
            return True
        seats = (seat.node for seat in self.seats.values() if seat.node.slots)
        return any(not node.work_types or work_type in node.work_types for node in seats)

    def restore(self, record: WorkRecord, now: float) -> None:
        """Takes over a record that is stored already."""
        self._put(record, now)
        self._set_deadline(record)

    def recovered(self, now: float) -> None:
        """All that is stored was restored: what is out on nodes that are gone meanwhile is lost."""
        for record in [record for record in self.records.values() if record.state in OUT]:
            for _, node_id in workitem.places(record):
                seat = self.seats.get(node_id)
                if seat is None or seat.node.state is NodeState.LOST:
                    self._write(workitem.lost(record, f"node {node_id} is gone", now), now)
                    break

        waiting = [record for record in self.records.values() if record.awaits and record.state is WorkState.PENDING]
        for record in waiting:
            self._look_at(record, now)

    def submitted(
        self, item: WorkItem, work_id: str, seq: int, now: float, *, traceparent: str = ""
    ) -> WorkRecord | None:
        """A new item, or None for one that is known: submitting twice changes nothing."""
        if work_id in self.records:
            return None
        record = workitem.received(item, work_id, seq, now, traceparent)
        self._put(record, now)
        self._set_deadline(record)
        return self._look_at(record, now) if record.awaits else record

    # --- dependencies ----------------------------------------------------------------------------------------

    def _look_at(self, record: WorkRecord, now: float) -> WorkRecord:
        """What becomes of an item that waits for others, by what is known of them."""
        for work_id in record.awaits:
            if other := self.records.get(work_id):
                record = self._told(record, work_id, other, now)
            else:
                self._dependencies.ask(work_id)
            if record.state is not WorkState.PENDING:
                break
        return record

    def _told(self, record: WorkRecord, work_id: str, other: WorkRecord | None, now: float) -> WorkRecord:
        """What *other*, which is None when it does not exist, means for an item that awaits it."""
        match dependencies.verdict(record, work_id, other):
            case True:
                return self._write(workitem.awaited(record, work_id), now)
            case False:
                return record
            case error:
                return self._write(workitem.hopeless(record, error, now), now)

    def take_unknown(self) -> list[str]:
        """Items that are waited for and not in memory: the shell reads them, and says by :meth:`looked_up`."""
        return self._dependencies.take_unknown()

    def looked_up(self, work_id: str, found: WorkRecord | None, now: float) -> None:
        """What is stored of an item that others wait for."""
        found = self.records.get(work_id, found)
        for waiting in self._dependencies.waiting_for(work_id):
            self._told(self.records[waiting], work_id, found, now)

    def _tell_waiting(self, now: float) -> None:
        while self._ended:
            ended = self._ended.popleft()
            for waiting in self._dependencies.waiting_for(ended.work_id):
                self._told(self.records[waiting], ended.work_id, ended, now)

    def forget(self, work_id: str) -> None:
        """Drops an item that turned out to be recorded elsewhere."""
        record = self.records.pop(work_id, None)
        if record is not None:
            self._leave(record)
            self._tell_nothing(record)
            self._forget_watches(record)
        self._finished.pop(work_id, None)
        if self._dependencies.waiting_for(work_id):
            self._dependencies.ask(work_id)

    def completed(self, report: WorkCompleted, now: float, *, seq: int = 0) -> WorkRecord | None:
        """The changed record, or None for a report that is stale, doubled or about nothing known.

        Args:
            seq: where the report stands in the inbox; one that was applied already is not applied again.
        """
        record = self._about(report, seq, now)
        if record is None:
            return None
        self.blacklist.succeeded(_kind(record, workitem.node_of(record, report.replica)), record.work_id)
        return self._write(workitem.completed(record, report, now), now)

    def failed(self, report: WorkFailed, now: float, *, seq: int = 0) -> WorkRecord | None:
        """As :meth:`completed`, for an attempt that went wrong."""
        record = self._about(report, seq, now)
        if record is None:
            return None
        if report.code == HANDED_BACK:
            return self._write(workitem.lost(record, report.error, now), now)
        return self._fail(record, workitem.error_of(report), now, workitem.node_of(record, report.replica))

    def _about(self, report: WorkCompleted | WorkFailed, seq: int, now: float) -> WorkRecord | None:
        """The record a report is about, if it still counts."""
        record = self.records.get(report.work_id)
        if record is None or 0 < seq <= record.report_seq:
            return None
        if not workitem.is_current(record, report.attempt, report.replica):
            return None
        seat = self.seats.get(workitem.node_of(record, report.replica))
        if seat is not None and (seat.strikes or seat.rests):
            seat.strikes = seat.rests = 0
            self._review(seat, now)
        record = workitem.logged(record, report)
        return msgspec.structs.replace(record, report_seq=seq) if seq else record

    def cancel(self, work_id: str, reason: str, now: float) -> WorkRecord | None:
        """The item as it then stands; one that is final stays as it is. None: not known here."""
        record = self.records.get(work_id)
        if record is None or workitem.is_final(record):
            return record
        return self._write(workitem.cancelled(record, reason or "cancelled", now), now)

    def explain(self, record: WorkRecord, now: float) -> WorkExplanation:
        """Why the item is where it is."""
        verdicts = placement.explain(record, self.seats.values(), self._objection, now)
        summary = self._summary(record, verdicts, now)
        return WorkExplanation(
            work_id=record.work_id, state=record.state, summary=summary, nodes=verdicts[:VERDICTS_MAX]
        )

    def restore_blacklist(self, tallies: list[Tally], now: float) -> None:
        """Takes over the blacklist as it was stored; to be called when all records are restored."""
        self.blacklist.restore(tallies, ((r.work_id, r.node_id) for r in self.records.values() if r.state in OUT))
        for entry in self.blacklist.entries():
            self._clock_at(max(entry.until, now), entry.node_id, REST)

    def pardon(self, node_id: str, work_type: str) -> list[Blacklisted]:
        """Trusts a node again at once; gives what it was blacklisted for."""
        self._roomier[node_id] = None
        return self.blacklist.pardon(node_id, work_type)

    def _summary(self, record: WorkRecord, verdicts: list[NodeVerdict], now: float) -> str:
        if record.awaits and record.state is WorkState.PENDING:
            return dependencies.waits_for(record, self.records.get)
        return explaining.summary(record, verdicts, self._room(record, now), now)

    def _room(self, record: WorkRecord, now: float) -> explaining.Room:
        """Replicas that have a place. Counted for an item that waits with several; else the verdicts say as much."""
        if record.replicas == 1 or record.state is not WorkState.PENDING:
            return explaining.Room(record.replicas, record.replicas)
        shape, seats = shape_of(record), self.seats.values()
        return explaining.Room(gangs.room_now(shape, seats, self._objection, now), gangs.room_at_most(shape, seats))

    # --- answers of nodes --------------------------------------------------------------------------------------

    def accepted(self, work_id: str, attempt: int, session: str, now: float, *, replica: int = 0) -> None:
        """The node, in this session of it, took the attempt, or its replica of it."""
        if (record := self._out(work_id, attempt)) and (watch := self._watches.get((work_id, replica))):
            watch.accepted_at = now
            watch.session = session
            self._at(now + WRITE_LATE_S, record)

    def declined(self, work_id: str, attempt: int, reason: str, now: float, *, replica: int = 0) -> None:
        """The node did not take it, or could not be reached: it goes back to the queue at once, with all replicas."""
        if (record := self._undelivered(work_id, attempt, replica)) is None:
            return
        reason = reason or "declined"
        if seat := self.seats.get(dict(workitem.places(record))[replica]):
            seat.rest(reason, now)
            self._review(seat, now)
        self._write(workitem.undelivered(record, now, reason), now)

    def is_undelivered(self, work_id: str, attempt: int, replica: int) -> bool:
        """Whether it still is to be delivered: no node has taken it, and it has not moved on."""
        return self._undelivered(work_id, attempt, replica) is not None

    # --- GPUs ------------------------------------------------------------------------------------------------

    def refused_gpus(self, work_id: str, attempt: int, refused: Refused, now: float, *, replica: int = 0) -> None:
        """The GPUs of an attempt could not be reserved: it goes back to the queue, for another node or for later."""
        record = self._undelivered(work_id, attempt, replica)
        if record is None:
            return
        if not self._gpu_refusals.away:
            node_id = dict(workitem.places(record))[replica]
            until = self._gpu_refusals.add(record, node_id, refused, now)
            self._clock_at(until, ANY_NODE if refused.code == QUOTA else node_id, REST)
        self._write(workitem.undelivered(record, now, refused.reason), now)

    def gpus_given_back(self, node_id: str, owner: str) -> None:
        """A reservation on a node ended."""
        if self._gpu_refusals.given_back(node_id, owner):
            self._try_gpus()

    def gpus_away(self, reason: str) -> None:
        """Why no GPU can be reserved at all; empty once they can."""
        self._gpu_refusals.away = reason
        if not reason:
            self._try_gpus()

    def _try_gpus(self) -> None:
        """What was refused may be granted now, on any node."""
        for backlog in self._queue:
            if backlog.shape.ask.gpus:
                self._ready[backlog] = None

    def _undelivered(self, work_id: str, attempt: int, replica: int) -> WorkRecord | None:
        """The item, if its node has not taken the replica yet."""
        record = self._out(work_id, attempt)
        watch = self._watches.get((work_id, replica))
        if record is None or record.state is not WorkState.ASSIGNED or (watch and watch.accepted_at is not None):
            return None
        return record if any(at == replica for at, _ in workitem.places(record)) else None

    def _out(self, work_id: str, attempt: int) -> WorkRecord | None:
        record = self.records.get(work_id)
        return record if record and record.state in OUT and record.attempt == attempt else None

    # --- nodes -------------------------------------------------------------------------------------------------

    def node_changed(self, node: NodeRecord, now: float) -> None:
        """The registry wrote this record."""
        seat = self.seats.get(node.node_id)
        if seat is None:
            seat = self.seats[node.node_id] = Seat(node)
            self._seat_all(seat)
            self._review(seat, now)
            return
        before, seat.node = seat.node, node
        if node.changed_at != before.changed_at and node.state is NodeState.ONLINE:
            seat.strikes = 0
            seat.wake()
        if _size(node) != _size(before):
            seat.room = Room(node)
            self._seat_all(seat)
        self._review(seat, now)
        if node.state is NodeState.LOST:
            self._lose_all(seat, f"node {node.node_id} was lost", now)
        elif node.session and node.session != seat.session:
            self._new_session(seat, node.session, now)

    def _seat_all(self, seat: Seat) -> None:
        """Counts what is out on a node, by the records."""
        for record in self.records.values():
            if record.state in OUT:
                for replica, node_id in workitem.places(record):
                    if node_id == seat.node.node_id:
                        seat.take((record.work_id, replica), ask_of(record.requirements))

    def _review(self, seat: Seat, now: float) -> None:
        """Something about a node has changed: it may get work, or no more."""
        self._groups.settle(seat, now)
        self._roomier[seat.node.node_id] = None
        self._review_kept(seat.node.node_id)
        if seat.rests_until > now:
            self._clock_at(seat.rests_until, seat.node.node_id, REST)

    def node_gone(self, node_id: str, now: float) -> None:
        """The registry forgot the node."""
        if seat := self.seats.pop(node_id, None):
            self._groups.gone(node_id)
            self._review_kept(node_id)
            self._lose_all(seat, f"node {node_id} was removed", now)

    def heartbeat(self, beat: NodeHeartbeat, now: float) -> list[Stop]:
        """Renews the attempts the node lists, and gives those it lists that no longer count."""
        seat = self.seats.get(beat.node_id)
        if seat is None:
            return []
        if seat.node.session and beat.session not in ("", seat.node.session):
            return []  # Another agent with the same node id, or a new life that the registry tells of presently.
        if beat.session and beat.session != seat.session:
            self._new_session(seat, beat.session, now)
        self._hear(seat, beat, now)
        running = {(work.work_id, work.attempt, work.replica) for work in beat.running}
        for place in list(seat.taken):
            self._renew(place, running, seat.node.node_id, now)
        return [
            Stop(work_id, attempt, beat.node_id, "this attempt no longer counts", replica)
            for work_id, attempt, replica in running
            if self._is_stale(work_id, attempt, replica, beat.node_id)
        ]

    def _hear(self, seat: Seat, beat: NodeHeartbeat, now: float) -> None:
        """What a heartbeat says about the node itself."""
        roomier = seat.room.told(beat)
        loaded_models = frozenset(beat.loaded_models)
        if beat.accepting != seat.accepting or seat.rests_until or loaded_models != seat.loaded_models:
            seat.accepting = beat.accepting
            seat.loaded_models = loaded_models
            seat.wake()
            self._review(seat, now)
            return
        seat.rests = 0
        self._groups.moved(seat)
        if roomier:
            self._roomier[beat.node_id] = None

    def _is_stale(self, work_id: str, attempt: int, replica: int, node_id: str) -> bool:
        record = self.records.get(work_id)
        if record is None:
            return False
        if record.state not in OUT or record.attempt != attempt:
            return True
        if not record.members:
            return record.node_id != node_id or replica != 0
        return replica >= len(record.members) or record.members[replica].node_id != node_id

    def _renew(self, place: Place, running: set[tuple[str, int, int]], node_id: str, now: float) -> None:
        work_id, replica = place
        record, watch = self.records[work_id], self._watches.get(place)
        if record.plain or watch is None:
            return
        if (work_id, record.attempt, replica) in running:
            watch.missed_at = None
            if watch.accepted_at is None:  # The answer to its delivery was lost.
                watch.accepted_at = now
                self._at(now + WRITE_LATE_S, record)
            return
        if watch.accepted_at is None and record.state is WorkState.ASSIGNED:
            return  # Its delivery is still being tried.
        watch.missed_at = watch.missed_at or now
        if now - watch.missed_at >= MISSED_S:
            self._write(workitem.lost(record, f"node {node_id} no longer runs it", now), now)

    def _new_session(self, seat: Seat, session: str, now: float) -> None:
        """The agent was born again: what it had accepted before is gone. What it had not, is delivered again."""
        seat.session = session
        for place in list(seat.taken):
            record, watch = self.records[place[0]], self._watches.get(place)
            accepted = record.state is WorkState.RUNNING or (watch is not None and watch.accepted_at is not None)
            if accepted and not record.plain and (watch is None or watch.session != session):
                self._write(workitem.lost(record, f"node {seat.node.node_id} restarted", now), now)

    def _lose_all(self, seat: Seat, reason: str, now: float) -> None:
        for work_id, _ in list(seat.taken):
            if (record := self.records[work_id]).state in OUT:  # Another of its replicas was here too.
                self._write(workitem.lost(record, reason, now), now)

    # --- time --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Retries that are due, timeouts, deadlines, what is written because it takes long, and ends that others wait
        for."""
        if self._ended:
            self._tell_waiting(now)
        while self._clock and self._clock[0][0] <= now:
            _, key, attempt = heapq.heappop(self._clock)
            if attempt == REST:
                self._rested(key, now)
                continue
            record = self.records.get(key)
            if record is None or record.state in FINAL:
                continue
            if attempt == DEADLINE:
                self._write(workitem.overdue(record, now), now)
            elif attempt == PATIENCE:
                self._lose_patience(record, now)
            elif record.attempt == attempt:
                self._time_passed(record, now)

    def _lose_patience(self, record: WorkRecord, now: float) -> None:
        """An item with replicas has waited for long: it is looked at again, and from time to time after that."""
        if record.state is WorkState.PENDING and not record.awaits:
            backlog = self._queue.backlog(record.work_id)
            self._ready[backlog] = None
            self._keep_nodes(record, backlog.shape, now)  # Before others are placed.
            self._clock_at(max(now, record.changed_at) + gangs.PATIENCE_S, record.work_id, PATIENCE)

    def _rested(self, node_id: str, now: float) -> None:
        if node_id == ANY_NODE:
            self._try_gpus()
        elif seat := self.seats.get(node_id):
            self._review(seat, now)

    def _time_passed(self, record: WorkRecord, now: float) -> None:
        if record.state is WorkState.RETRYING and record.not_before <= now:
            self._write(workitem.due(record, now), now)
        elif record.state is WorkState.PENDING and now - record.changed_at >= WRITE_LATE_S:
            self.outbox.append(record)  # Seen to wait: not written until now, or written again at no harm.
        elif record.state in OUT:
            if now >= self._deadline(record):
                self._time_out(record, now)
            elif record.state is WorkState.ASSIGNED and self._is_accepted(record):
                self._write(workitem.started(record, now), now)

    def _is_accepted(self, record: WorkRecord) -> bool:
        """Whether all its nodes have taken it."""
        watches = [self._watches.get((record.work_id, replica)) for replica, _ in workitem.places(record)]
        return all(watch is not None and watch.accepted_at is not None for watch in watches)

    def _deadline(self, record: WorkRecord) -> float:
        assigned_at = record.changed_at
        if record.state is not WorkState.ASSIGNED:
            assigned_at = next((m.at for m in reversed(record.story) if m.state is WorkState.ASSIGNED), assigned_at)
        return assigned_at + record.timeout_s + (0.0 if record.plain else ANSWER_GRACE_S)

    def _time_out(self, record: WorkRecord, now: float) -> None:
        if not record.members and (seat := self.seats.get(record.node_id)):
            seat.strikes += 1
            self._review(seat, now)
        error = WorkError(reason=f"no outcome after {record.timeout_s:g} s", code=TIMEOUT, fault="node")
        self._fail(record, error, now, record.node_id)

    def next_at(self) -> float | None:
        """When :meth:`tick` has something to do next."""
        return self._clock[0][0] if self._clock else None

    # --- placement ---------------------------------------------------------------------------------------------

    def place(self, now: float) -> None:
        """Assigns whatever fits somewhere, in the order of the queue.

        Afterwards no item that waits fits any node. So next time only those items are looked at that came since, and
        those that fit a node which has more room since.
        """
        if self._roomier:
            self._wake(now)
        while self._ready:
            backlog, entry = self._queue.first(self._ready)
            record = self.records[entry.work_id]
            if backlog.shape.owner is None and self._is_over_quota(record, now):
                self._unqueue(record.work_id)
                self._enqueue(record, record.owner)
                continue
            seats = self._choose(backlog, record, now)
            if not seats:
                del self._ready[backlog]
                continue
            self._queue.charge(entry, record.replicas)
            if record.replicas > 1:
                self._write(workitem.assigned_together(record, [seat.node.node_id for seat in seats], now), now)
            else:
                node = seats[0].node
                self._write(workitem.assigned(record, node.node_id, now, plain=node.delivery != "direct"), now)
            for seat in seats:
                self.blacklist.probe(_kind(record, seat.node.node_id), record.work_id)
            self._narrow(now)

    def _wake(self, now: float) -> None:
        """Makes the items ready that fit a node with more room."""
        roomier, self._roomier = self._roomier, {}
        if not self._queue:
            return
        for node_id in roomier:
            seat = self.seats.get(node_id)
            if seat is None or seat.full:
                continue
            for backlog in self._queue.of_node(node_id):
                nodes = self._ready.get(backlog, _NOWHERE)
                if nodes is not None and self._groups.takes(backlog.shape, seat, now):
                    self._ready[backlog] = [*nodes, seat] if backlog.shape.replicas == 1 else None

    def _narrow(self, now: float) -> None:
        """Something was placed: fewer items may fit the nodes they were made ready for."""
        for backlog, nodes in list(self._ready.items()):
            if nodes is None:
                continue
            left = [seat for seat in nodes if self._groups.takes(backlog.shape, seat, now)]
            if left:
                self._ready[backlog] = left
            else:
                del self._ready[backlog]

    def _choose(self, backlog: Backlog, record: WorkRecord, now: float) -> list[Seat]:
        """The nodes of all its replicas; empty when they do not fit now."""
        shape, nodes, avoid = backlog.shape, self._ready[backlog], placement.avoided(record)
        if shape.replicas > 1:
            return gangs.choose(shape, self._groups, avoid, now) or self._keep_nodes(record, shape, now)
        groups = self._groups
        best = groups.best(shape, avoid, now) if nodes is None else groups.best_of(nodes, shape, avoid, now)
        return [best] if best else []

    def _keep_nodes(self, record: WorkRecord, shape: Shape, now: float) -> list[Seat]:
        """Keeps nodes for the replicas of an item, if it has waited long enough and there are none kept for another."""
        if self._kept is not None and (self._kept.work_id != record.work_id or self._is_worth_it(self._kept, now)):
            return []
        if now < record.changed_at + gangs.PATIENCE_S:
            return []
        if fits := gangs.choose(shape, self._groups, placement.avoided(record), now):
            node_ids = frozenset(seat.node.node_id for seat in fits)
        else:
            node_ids = gangs.nodes_to_keep(shape, self.seats.values(), self._objection, now)
        before = self._kept
        self._kept = Kept(record.work_id, shape, node_ids) if node_ids else None
        if before and before.node_ids - node_ids:
            self._roomier |= dict.fromkeys(before.node_ids - node_ids)
        return []

    def _review_kept(self, node_id: str) -> None:
        """A node has changed, perhaps one that is kept: the item for which it is may be better off with others."""
        if self._kept is not None and node_id in self._kept.node_ids:
            self._ready[self._queue.backlog(self._kept.work_id)] = None

    def _is_worth_it(self, kept: Kept, now: float) -> bool:
        """Whether the nodes are all still good, and others' work is what is waited for."""
        seats = [self.seats.get(node_id) for node_id in kept.node_ids]
        good = all(seat is not None and next(seat.closed(now), None) is None for seat in seats)
        return good and any(seat.taken for seat in seats if seat is not None)

    def _keep_no_more(self) -> None:
        """The item for which nodes were kept has started, or no longer waits."""
        assert self._kept is not None
        self._roomier |= dict.fromkeys(self._kept.node_ids)
        self._kept = None
        for backlog in self._queue:
            if backlog.shape.replicas > 1:
                self._ready[backlog] = None

    def _objection(self, shape: Shape, node_id: str, now: float) -> str:
        """Why a node gets nothing of this shape now, though it fits; empty when it may."""
        if self._kept is not None and (objection := self._kept.objection(shape, node_id)):
            return objection
        objection = self.blacklist.objection((node_id, shape.work_type, shape.model_name), now)
        if not objection and shape.ask.gpus:
            objection = self._gpu_refusals.why_not(shape.need, shape.owner, node_id, now)
        return objection

    # --- bookkeeping -------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Items that wait for a node or for their next attempt."""
        return self._waiting

    @property
    def out(self) -> int:
        """Items that are with nodes."""
        return self._out_count

    def _fail(self, record: WorkRecord, error: WorkError, now: float, node_id: str) -> WorkRecord:
        # Long items time out on good nodes too.
        if error.fault == "node" and error.code != TIMEOUT:
            until = self.blacklist.failed(_kind(record, node_id), record.work_id, error.reason, now)
            if until is not None:
                self._clock_at(until, node_id, REST)
        return self._write(workitem.failed(record, error, self._limits.retry, now, self._jitter()), now)

    def _write(self, record: WorkRecord, now: float) -> WorkRecord:
        before = self.records.get(record.work_id)
        if before is not None:
            self._leave(before)
            if before.state in OUT and record.state not in OUT:
                self._tell_nothing(before)
        self._put(record, now)
        self.outbox.append(record)
        return record

    def _tell_nothing(self, record: WorkRecord) -> None:
        """An attempt is off its nodes; should one have been tried with it, the next item may be tried."""
        for _, node_id in workitem.places(record):
            self.blacklist.tried(_kind(record, node_id), record.work_id)

    def _leave(self, record: WorkRecord) -> None:
        if record.state in WAITING:
            self._waiting -= 1
            if record.awaits:
                self._dependencies.leave(record)
            if record.state is WorkState.PENDING and not record.awaits:
                self._unqueue(record.work_id)
        elif record.state in OUT:
            self._out_count -= 1
            for replica, node_id in workitem.places(record):
                if seat := self.seats.get(node_id):
                    seat.free((record.work_id, replica))
                    self._groups.moved(seat)
                    self._roomier[node_id] = None

    def _unqueue(self, work_id: str) -> None:
        if self._kept is not None and self._kept.work_id == work_id:
            self._keep_no_more()
        backlog = self._queue.drop(work_id)
        if not backlog.lines:
            self._ready.pop(backlog, None)

    def _put(self, record: WorkRecord, now: float) -> None:
        self.records[record.work_id] = record
        if record.state not in OUT:
            self._forget_watches(record)
        if record.state in WAITING:
            self._waiting += 1
        if record.state is WorkState.PENDING:
            if record.awaits:
                self._dependencies.wait(record)
            else:
                self._enqueue(record)
            self._at(now + WRITE_LATE_S, record)
        elif record.state is WorkState.RETRYING:
            self._at(record.not_before, record)
        elif record.state in OUT:
            self._put_out(record)
        elif record.state in FINAL:
            if self._dependencies.waiting_for(record.work_id):
                self._ended.append(record)
            self._finished[record.work_id] = None
            while len(self._finished) > REMEMBERED_MAX:
                oldest, _ = self._finished.popitem(last=False)  # A plain dict would look for its first entry.
                del self.records[oldest]

    def _is_over_quota(self, record: WorkRecord, now: float) -> bool:
        """Whether its owner has had all GPUs it may have. Such items wait apart, so as not to hold up other owners."""
        need = record.requirements
        return wants_gpus(need) and self._gpu_refusals.is_over_quota(need, record.owner, now)

    def _enqueue(self, record: WorkRecord, owner: str | None = None) -> None:
        backlog, is_new = self._queue.push(record, owner)
        if is_new:
            self._ready[backlog] = None
        if record.replicas > 1:
            self._clock_at(record.changed_at + gangs.PATIENCE_S, record.work_id, PATIENCE)

    def _set_deadline(self, record: WorkRecord) -> None:
        if record.deadline_at is not None and record.state not in FINAL:
            self._clock_at(record.deadline_at, record.work_id, DEADLINE)

    def _put_out(self, record: WorkRecord) -> None:
        self._out_count += 1
        for replica, node_id in workitem.places(record):
            place = (record.work_id, replica)
            self._watches.setdefault(place, Watch())
            if seat := self.seats.get(node_id):
                seat.take(place, ask_of(record.requirements))
                self._groups.moved(seat)
        self._at(self._deadline(record), record)

    def _forget_watches(self, record: WorkRecord) -> None:
        for replica in range(record.replicas):
            self._watches.pop((record.work_id, replica), None)

    def _at(self, when: float, record: WorkRecord) -> None:
        self._clock_at(when, record.work_id, record.attempt)

    def _clock_at(self, when: float, key: str, attempt: int) -> None:
        """Something is to be done about an attempt, or (REST) a node, or (DEADLINE) an item."""
        heapq.heappush(self._clock, (when, key, attempt))
        # Deadlines of attempts that ended long before would pile up; now and then they are swept out.
        if len(self._clock) > CLOCK_SLACK + 8 * (self._waiting + self._out_count):
            self._clock = [entry for entry in self._clock if self._matters(*entry)]
            heapq.heapify(self._clock)

    def _matters(self, _when: float, key: str, attempt: int) -> bool:
        if attempt == REST:
            return key == ANY_NODE or key in self.seats
        record = self.records.get(key)
        return record is not None and record.state not in FINAL and attempt in (record.attempt, DEADLINE, PATIENCE)


def _kind(record: WorkRecord, node_id: str) -> Kind:
    return node_id, record.work_type, record.model_name


_NOWHERE: Final[list[Seat]] = []


def _size(node: NodeRecord) -> object:
    """What a node has of each resource."""
    return node.cpus_for_work, node.ram_mb_for_work, node.memory, node.gpus
