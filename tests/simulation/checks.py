"""What must always hold, whatever fails: judged from what the server stores and passes on, which is all there is."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import msgspec

from computemesh.contracts import storage, work
from computemesh.contracts.work import (
    FINAL,
    Assignment,
    WorkCompleted,
    WorkFailed,
    WorkItem,
    WorkRecord,
    WorkState,
)
from computemesh_services.work_marshaller import firsts
from computemesh_services.work_marshaller.journal import CURSOR_KEY, Cursor
from computemesh_services.work_marshaller.workitem import LOSSES_MAX, NEXT, STORY_MAX
from tests.simulation.server import Connection, Kept, Stream

OUT: Final = (WorkState.ASSIGNED, WorkState.RUNNING)


class Violation(AssertionError):
    """A promise was broken."""


def demand(holds: bool, promise: str, *shown: object) -> None:
    if not holds:
        raise Violation(f"{promise}: " + "; ".join(map(str, shown)))


def places(record: WorkRecord) -> list[str]:
    """The node of each replica of the latest attempt."""
    return [member.node_id for member in record.members] or [record.node_id]


@dataclass
class Truth:
    """All that was ever stored, and what may follow it."""

    retries_max: int
    records: dict[str, WorkRecord] = field(default_factory=dict[str, WorkRecord])
    """The present record of each item, be it its own or its first, which stands with those of others."""
    own: set[str] = field(default_factory=set[str])
    """Items that have a record of their own."""
    handed: dict[tuple[str, int], list[str]] = field(default_factory=dict[tuple[str, int], list[str]])
    """The nodes, by replica, of each attempt that was stored as assigned."""
    submissions: dict[int, str] = field(default_factory=dict[int, str])
    """Work id by sequence; empty when the marshaller makes one up."""
    reports: dict[int, WorkCompleted | WorkFailed] = field(default_factory=dict[int, WorkCompleted | WorkFailed])
    rejected: set[int] = field(default_factory=set[int])
    """Sequences in the inbox that were answered with a rejection."""
    finals_shown: dict[str, WorkState] = field(default_factory=dict[str, WorkState])
    """The outcomes that somebody was told of."""
    passed: int = 1
    """The highest inbox position that was noted."""

    # --- what the server stores --------------------------------------------------------------------------------------

    def on_stored(self, stream: Stream, kept: Kept, before: Kept | None, _sender: Connection | None) -> None:
        if stream.name == storage.WORK_INBOX.name:
            self._captured(kept)
        elif stream.name == storage.WORK.stream:
            key = kept.subject.removeprefix(storage.WORK.subject(""))
            if key == CURSOR_KEY:
                self._noted(msgspec.json.decode(kept.data, type=Cursor).next_seq)
            elif key.startswith(firsts.KEY):
                self._began(kept, before)
            elif "." not in key:
                record = msgspec.json.decode(kept.data, type=WorkRecord)
                demand(record.work_id == key, "a record stands under its own id", key, record)
                self._recorded(self.records.get(key), record)
                self.own.add(key)

    def _began(self, kept: Kept, before: Kept | None) -> None:
        """An entry of first records was written, anew or as it stood."""
        present = msgspec.json.decode(kept.data, type=firsts.Entry).records
        for record in present:
            if record.work_id not in self.records:
                self._recorded(None, record)
        if before is not None:
            replaced = {record.work_id for record in msgspec.json.decode(before.data, type=firsts.Entry).records}
            lost = replaced - {record.work_id for record in present} - self.own
            demand(not lost, "a first record stands until the item has its own", *lost)

    def _captured(self, kept: Kept) -> None:
        if kept.subject == work.SUBMIT.subject:
            self.submissions[kept.seq] = msgspec.json.decode(kept.data, type=WorkItem).work_id or ""
        elif kept.subject == work.COMPLETED.subject:
            self.reports[kept.seq] = msgspec.json.decode(kept.data, type=WorkCompleted)
        elif kept.subject == work.FAILED.subject:
            self.reports[kept.seq] = msgspec.json.decode(kept.data, type=WorkFailed)

    def _recorded(self, before: WorkRecord | None, after: WorkRecord) -> None:
        if before == after:
            return  # A first record, which now stands under the item's own key.
        moves = [move.state for move in after.story]
        whole = len(moves) < STORY_MAX
        demand(not whole or moves[0] is WorkState.PENDING, "a story begins with the submission", after)
        demand(all(to in NEXT[at] for at, to in pairwise(moves)), "records move along the table", after.story)
        demand(moves[-1] is after.state, "the last move leads to the state", after)
        self._counted(after)
        if before is not None and before != after:
            demand(before.state not in FINAL, "a final outcome never changes", before, after)
            demand(after.attempt >= before.attempt, "attempts are numbered upwards", before, after)
            demand(after.failures >= before.failures, "failures are not forgotten", before, after)
            demand(after.losses >= before.losses, "losses are not forgotten", before, after)
            continued = after.story[: len(before.story)] == before.story
            demand(not whole or continued, "a story is continued", before.story, after.story)
        if after.state is WorkState.ASSIGNED:
            there = places(after)
            demand(len(there) == after.replicas, "all replicas start together", after)
            known = self.handed.setdefault((after.work_id, after.attempt), there)
            demand(known == there, "an attempt number belongs to one place", after, known)
        if after.state is WorkState.COMPLETED:
            self._completed(after)
        shown = self.finals_shown.get(after.work_id)
        if shown is not None and after.state in FINAL:
            demand(shown is after.state, "an outcome that was told is the one that is recorded", shown, after)
        self.records[after.work_id] = after

    def _counted(self, record: WorkRecord) -> None:
        allowed = self.retries_max if record.retries_max is None else record.retries_max
        demand(record.failures <= allowed + 1, "an item fails no more often than it may", record)
        gave_up = record.state in (WorkState.DEAD, WorkState.FAILED)
        demand(record.failures <= allowed or gave_up, "an item that failed too often is given up", record)
        demand(record.losses <= LOSSES_MAX + 1, "an item that loses its nodes is given up", record)
        if len(record.story) < STORY_MAX:
            returned = sum(a.state in OUT and b.state is WorkState.PENDING for a, b in pairwise(record.story))
            ended = record.failures + record.losses + returned
            demand(record.attempt <= ended + 1, "attempts ≤ 1 + failures + losses + undelivered", record)

    def _completed(self, record: WorkRecord) -> None:
        results = record.result if record.replicas > 1 else [record.result]
        for node_id, result in zip(places(record), results, strict=True):
            if result["plain"]:
                demand(node_id.startswith("plain"), "a plain node's report is no direct one's", record)
            else:
                told = (result["node"], result["attempt"])
                demand(told == (node_id, record.attempt), "a result is that of the recorded attempt", record, told)

    def _noted(self, next_seq: int) -> None:
        """The inbox position: all below it is reflected in the bucket."""
        for seq in range(self.passed, next_seq):
            if (work_id := self.submissions.get(seq)) is not None:
                demand(self._reflected(seq, work_id), "the floor passes only what is reflected", seq, work_id)
            report = self.reports.get(seq)
            if report is not None and report.attempt is not None and seq not in self.rejected:
                record = self.records.get(report.work_id)
                waits = record is not None and record.state in OUT and record.attempt == report.attempt
                if record is not None and record.members and isinstance(report, WorkCompleted):
                    waits &= not record.members[report.replica].completed
                demand(not waits, "the floor passes only reports that are reflected", seq, report, record)
        self.passed = max(self.passed, next_seq)

    def _reflected(self, seq: int, work_id: str) -> bool:
        if seq in self.rejected:
            return True
        if work_id:
            return work_id in self.own
        return any(record.inbox_seq == seq and work_id in self.own for work_id, record in self.records.items())

    # --- what is sent through it -------------------------------------------------------------------------------------

    def on_sent(self, subject: str, data: bytes, _sender: Connection) -> None:
        if subject.startswith(work.ASSIGNED.subject):
            asked = msgspec.json.decode(data, type=Assignment)
            there = self.handed.get((asked.work_id, asked.attempt), [])
            stored = asked.replica < len(there) and there[asked.replica] == asked.node_id
            demand(stored, "nothing is delivered that was not stored as assigned", asked, there)

    # --- what somebody was told --------------------------------------------------------------------------------------

    def cancelled(self, told: WorkRecord) -> None:
        stands = self.records.get(told.work_id)
        was = stands is not None and stands.state is WorkState.CANCELLED
        demand(was, "what was confirmed as cancelled is so", told, stands)

    def shown(self, told: WorkRecord) -> None:
        """Somebody asked for an item and was told this."""
        if told.state in FINAL:
            stands = self.records.get(told.work_id)
            if stands is not None and stands.state in FINAL:
                demand(stands.state is told.state, "an outcome that is told is the one that is recorded", told, stands)
            self.finals_shown[told.work_id] = told.state

    # --- the end -----------------------------------------------------------------------------------------------------

    def unfinished(self) -> list[str]:
        """What was accepted and has no outcome."""
        found: list[str] = []
        by_seq = {record.inbox_seq: record for record in self.records.values()}
        for seq, work_id in self.submissions.items():
            if seq in self.rejected:
                continue
            record = self.records.get(work_id) if work_id else by_seq.get(seq)
            if record is None:
                found.append(f"{work_id or 'no id'} at {seq}: not recorded")
            elif record.state not in FINAL:
                found.append(f"{record.work_id}: {record.state} since {record.changed_at}, {record.story[-3:]}")
        return found
