"""The life of one work item: which moves are legal, and what each of them changes. Pure.

    pending --> assigned --> running --> completed
       ^           |            |------> failed      the work's own fault
       |           v            |------> dead        tried as often as allowed
       +------- retrying <------+
    and cancelled, from every state that is not final; failed too, when a waiting item can no longer start,
    or the deadline has passed

An item with replicas has a member for each of them: an attempt begins with all of them, completes with the last
of them, and ends otherwise as soon as one of them does.

Time is a parameter, in Unix seconds. A move that is not in :data:`NEXT` is a defect of the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from computemesh.contracts.base import Message
from computemesh.contracts.gpus import GpuReservation
from computemesh.contracts.work import (
    FINAL,
    Assignment,
    Member,
    Move,
    WorkCompleted,
    WorkError,
    WorkFailed,
    WorkItem,
    WorkRecord,
    WorkState,
    WorkSummary,
)

P, A, RUN, RE = WorkState.PENDING, WorkState.ASSIGNED, WorkState.RUNNING, WorkState.RETRYING
DONE, BAD, OFF, DEAD = WorkState.COMPLETED, WorkState.FAILED, WorkState.CANCELLED, WorkState.DEAD

NEXT: Final[Mapping[WorkState, frozenset[WorkState]]] = {
    P: frozenset({A, OFF, BAD}),
    # A short attempt is over before anyone saw it run, so an assigned item may end at once.
    A: frozenset({RUN, DONE, BAD, RE, P, DEAD, OFF}),
    RUN: frozenset({DONE, BAD, RE, DEAD, OFF}),
    RE: frozenset({P, A, OFF, BAD}),
    DONE: frozenset(),
    BAD: frozenset(),
    OFF: frozenset(),
    DEAD: frozenset(),
}

OUT: Final = frozenset({A, RUN})
"""States of an item that is with a node."""

WAITING: Final = frozenset({P, RE})
"""States of an item that waits for a node, or for its next attempt."""

STORY_MAX: Final = 32
"""Moves a record remembers."""

DEADLINE: Final = "deadline"
"""Code of the error of an item that had not ended by its deadline."""

LOSSES_MAX: Final = 20
"""Attempts that may vanish with their nodes before the item itself is suspected of killing them."""

RESULTS_BYTES_MAX: Final = 904 * 1024
"""Bound on the results of all replicas together, as JSON: they stand in one record. Nodes share 900 KiB among them."""


class InvalidMove(AssertionError):
    """A move that the table does not know, with the item's story."""


class RetryPolicy(Message, frozen=True, kw_only=True):
    """When a failed attempt is followed by another."""

    retries_max: int = 3
    delay_s: float = 5.0
    """Before the first retry; doubled for each further one."""
    delay_s_max: float = 300.0

    def wait_s(self, failures: int, jitter: float) -> float:
        """Pause after the *failures*-th failure.

        Args:
            jitter: 0 to 1; the pause is between half and all of the exponential delay.
        """
        full_s = min(self.delay_s_max, self.delay_s * 2.0 ** min(max(0, failures - 1), 30))
        return full_s * (0.5 + jitter / 2)


def received(item: WorkItem, work_id: str, seq: int, now: float, traceparent: str = "") -> WorkRecord:
    """A fresh record for an item that stands at *seq* of the inbox."""
    return WorkRecord(
        work_id=work_id,
        state=P,
        work_type=item.work_type,
        model_name=item.model_name,
        priority=item.priority,
        payload=item.payload,
        requirements=item.requirements,
        timeout_s=item.timeout_s,
        retries_max=item.retries_max,
        owner=item.owner,
        labels=item.labels,
        annotations=item.annotations,
        deadline_at=item.deadline_at,
        replicas=item.replicas,
        after=item.after,
        awaits=list(dict.fromkeys(item.after)),
        payload_object=item.payload_object,
        submitted_at=now,
        changed_at=now,
        inbox_seq=seq,
        traceparent=traceparent,
        story=[Move(at=now, state=P)],
    )


def is_final(record: WorkRecord) -> bool:
    return record.state in FINAL


def assigned(record: WorkRecord, node_id: str, now: float, *, plain: bool) -> WorkRecord:
    """The next attempt, on *node_id*."""
    changes = {"node_id": node_id, "plain": plain, "attempt": record.attempt + 1, "not_before": 0.0}
    return _move(record, A, now, "", {**changes, "log_object": None})


def assigned_together(record: WorkRecord, node_ids: Sequence[str], now: float) -> WorkRecord:
    """The next attempt of an item with replicas, each on the node of its position."""
    members = [Member(replica=replica, node_id=node_id) for replica, node_id in enumerate(node_ids)]
    changes = {"node_id": node_ids[0], "members": members, "attempt": record.attempt + 1, "not_before": 0.0}
    return _move(record, A, now, "", {**changes, "log_object": None})


def node_of(record: WorkRecord, replica: int) -> str:
    """The node of a replica in the latest attempt."""
    return record.members[replica].node_id if record.members else record.node_id


def places(record: WorkRecord) -> list[tuple[int, str]]:
    """Where its present attempt still is: the replicas that have not completed, each with its node."""
    if record.state not in OUT:
        return []
    if not record.members:
        return [(0, record.node_id)]
    return [(member.replica, member.node_id) for member in record.members if not member.completed]


def started(record: WorkRecord, now: float) -> WorkRecord:
    return _move(record, RUN, now, "", {})


def due(record: WorkRecord, now: float) -> WorkRecord:
    """A retry whose pause is over."""
    return _move(record, P, now, "", {})


def undelivered(record: WorkRecord, now: float, reason: str) -> WorkRecord:
    """The node could not be reached, or took nothing: as if it had not been assigned."""
    return _move(record, P, now, reason, {})


def completed(record: WorkRecord, report: WorkCompleted, now: float) -> WorkRecord:
    """The attempt is done; of an item with replicas, one of them, and the whole with the last."""
    if record.members:
        return _member_completed(record, report, now)
    changes = {"result": report.result, "result_object": report.result_object, "finished_at": now}
    return _move(record, DONE, now, "", changes)


def logged(record: WorkRecord, report: WorkCompleted | WorkFailed) -> WorkRecord:
    """The record with where the log is that came with a report."""
    if report.log_object is None or report.replica >= max(1, len(record.members)):
        return record
    if not record.members:
        return msgspec.structs.replace(record, log_object=report.log_object)
    members = list(record.members)
    members[report.replica] = msgspec.structs.replace(members[report.replica], log_object=report.log_object)
    return msgspec.structs.replace(record, members=members)


def _member_completed(record: WorkRecord, report: WorkCompleted, now: float) -> WorkRecord:
    done = msgspec.structs.replace(
        record.members[report.replica],
        completed=True,
        result=report.result,
        result_object=report.result_object,
        log_object=report.log_object,
    )
    members = [done if member.replica == done.replica else member for member in record.members]
    results = [member.result for member in members]
    if (size := len(msgspec.json.encode(results))) > RESULTS_BYTES_MAX:
        reason = f"the results of the replicas are {size:,} bytes of JSON together, {RESULTS_BYTES_MAX:,} are allowed"
        error = WorkError(reason=reason, code="result_too_large", fault="work")
        return _move(record, BAD, now, reason, {"failures": record.failures + 1, "error": error, "finished_at": now})
    if not all(member.completed for member in members):
        return msgspec.structs.replace(record, members=members)
    # The results stand in the list; what was too large for it stays with its member.
    members = [msgspec.structs.replace(member, result=None) for member in members]
    return _move(record, DONE, now, "", {"members": members, "result": results, "finished_at": now})


def failed(record: WorkRecord, error: WorkError, policy: RetryPolicy, now: float, jitter: float) -> WorkRecord:
    """An attempt failed: final when it is the work's own fault or the last one, else another follows."""
    failures = record.failures + 1
    changes: dict[str, Any] = {"failures": failures, "error": error}
    if error.fault == "work":
        return _move(record, BAD, now, error.reason, changes | {"finished_at": now})
    retries_max = policy.retries_max if record.retries_max is None else record.retries_max
    if failures > retries_max:
        return _move(record, DEAD, now, error.reason, changes | {"finished_at": now})
    changes["not_before"] = now + policy.wait_s(failures, jitter)
    return _move(record, RE, now, error.reason, changes)


def lost(record: WorkRecord, reason: str, now: float) -> WorkRecord:
    """The attempt vanished with its node. Not the item's failure, unless it happens again and again."""
    losses = record.losses + 1
    error = WorkError(reason=reason, code="node_lost", fault="node")
    if losses > LOSSES_MAX:
        return _move(record, DEAD, now, reason, {"losses": losses, "error": error, "finished_at": now})
    return _move(record, RE, now, reason, {"losses": losses, "error": error, "not_before": now})


def cancelled(record: WorkRecord, reason: str, now: float) -> WorkRecord:
    return _move(record, OFF, now, reason, {"finished_at": now})


def hopeless(record: WorkRecord, error: WorkError, now: float) -> WorkRecord:
    """An item that waits, and can no longer start."""
    return _move(record, BAD, now, error.reason, {"error": error, "finished_at": now})


def awaited(record: WorkRecord, work_id: str) -> WorkRecord:
    """One of the items that *record* waits for has completed."""
    return msgspec.structs.replace(record, awaits=[other for other in record.awaits if other != work_id])


def overdue(record: WorkRecord, now: float) -> WorkRecord:
    """Its deadline has passed: whatever became of it would be of no use."""
    error = WorkError(reason="it had not ended by its deadline", code=DEADLINE, fault="work")
    return _move(record, BAD, now, error.reason, {"error": error, "finished_at": now})


def is_current(record: WorkRecord, attempt: int | None, replica: int = 0) -> bool:
    """Whether a report about *attempt* is about what runs now.

    Only a plain node may leave the number out: the first report then wins. A replica reports once.
    """
    if record.state not in OUT:
        return False
    if record.members:
        return attempt == record.attempt and replica < len(record.members) and not record.members[replica].completed
    if replica:
        return False
    return attempt == record.attempt if attempt is not None else record.plain


Ignored = Literal["unknown", "repeated", "old_attempt", "no_attempt", "ended"]
"""Why a report changes nothing."""


def why_ignored(record: WorkRecord | None, attempt: int | None, seq: int) -> Ignored:
    """Why a report that does not count about *record* does not.

    Args:
        seq: where it stands in the inbox.
    """
    if record is None:
        return "unknown"
    if 0 < seq <= record.report_seq:
        return "repeated"
    if attempt is None and not record.plain:
        return "no_attempt"
    return "ended" if attempt in (None, record.attempt) else "old_attempt"


def error_of(report: WorkFailed) -> WorkError:
    return WorkError(reason=report.error, code=report.code, fault=report.fault)


def assignment(record: WorkRecord, replica: int = 0, reservation: GpuReservation | None = None) -> Assignment:
    """What the node of a replica gets."""
    return Assignment(
        work_id=record.work_id,
        attempt=record.attempt,
        node_id=node_of(record, replica),
        work_type=record.work_type,
        model_name=record.model_name,
        priority=record.priority,
        payload=record.payload,
        payload_object=record.payload_object,
        timeout_s=record.timeout_s,
        owner=record.owner,
        requirements=record.requirements,
        replica=replica,
        replicas=record.replicas,
        peers=[member.node_id for member in record.members],
        reservation_id=reservation.reservation_id if reservation else "",
        gpus=reservation.gpus if reservation else [],
    )


def summary(record: WorkRecord) -> WorkSummary:
    return WorkSummary(
        work_id=record.work_id,
        state=record.state,
        work_type=record.work_type,
        model_name=record.model_name,
        priority=record.priority,
        owner=record.owner,
        attempt=record.attempt,
        node_id=record.node_id,
        submitted_at=record.submitted_at,
        changed_at=record.changed_at,
        finished_at=record.finished_at,
        error=record.error,
    )


def _move(record: WorkRecord, to: WorkState, now: float, reason: str, changes: dict[str, Any]) -> WorkRecord:
    if to not in NEXT[record.state]:
        raise InvalidMove(f"{record.work_id}: {record.state} to {to} ({reason}); {record.story}")
    attempt, node_id = changes.get("attempt", record.attempt), changes.get("node_id", record.node_id)
    line = Move(at=now, state=to, attempt=attempt, node_id=node_id, reason=reason[:200])
    story = [*record.story[-STORY_MAX + 1 :], line]
    return msgspec.structs.replace(record, state=to, changed_at=now, story=story, **changes)
