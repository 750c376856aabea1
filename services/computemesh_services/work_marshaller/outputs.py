"""Where the result and the log of an attempt are, as its record says. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from computemesh.contracts.base import Refused
from computemesh.contracts.work import ObjectRef, WorkLogsGet, WorkRecord, WorkResult, WorkState
from computemesh_services.work_marshaller.workitem import is_final

_OUT = frozenset({WorkState.ASSIGNED, WorkState.RUNNING})


@dataclass(frozen=True, kw_only=True)
class LogPlace:
    """Where one attempt's log is."""

    attempt: int
    """0: none has begun."""
    node_id: str = ""
    ended: bool = True
    object: ObjectRef | None = None


def result_of(record: WorkRecord) -> WorkResult | Refused:
    """The result, or why there is none."""
    if not is_final(record):
        return Refused(
            code="not_finished",
            reason=f"{record.work_id} is {record.state}",
            field="work_id",
            status=409,
            retry="later",
        )
    if record.state is not WorkState.COMPLETED:
        why = record.error.reason if record.error else record.story[-1].reason if record.story else ""
        return Refused(
            code="no_result",
            reason=f"{record.work_id} is {record.state}" + (f": {why}" if why else ""),
            field="work_id",
            status=409,
        )
    kept = [member.result_object for member in record.members]
    return WorkResult(
        work_id=record.work_id,
        result=record.result,
        result_object=record.result_object,
        result_objects=kept if any(kept) else [],
    )


def log_place(record: WorkRecord, ask: WorkLogsGet) -> LogPlace | Refused:
    """Where the log is that is asked for."""
    if ask.replica >= max(1, len(record.members), record.replicas):
        return _no_log(f"{record.work_id} has {_several(record.replicas, 'replica')}, the first is 0", field="replica")
    attempt = record.attempt if ask.attempt is None else ask.attempt
    if attempt > record.attempt:
        return _no_log(f"{record.work_id} had {_several(record.attempt, 'attempt')}", field="attempt")
    if attempt < record.attempt or attempt == 0:
        return _earlier(record, attempt, ask.replica)
    if record.plain:
        return _no_log(f"node {record.node_id} has no direct delivery, and keeps no logs for us")
    if not record.members:
        out = record.state in _OUT
        return LogPlace(attempt=attempt, node_id=record.node_id, ended=not out, object=record.log_object)
    member = record.members[ask.replica]
    out = record.state in _OUT and not member.completed
    return LogPlace(attempt=attempt, node_id=member.node_id, ended=not out, object=member.log_object)


def _earlier(record: WorkRecord, attempt: int, replica: int) -> LogPlace | Refused:
    if attempt == 0:
        return LogPlace(attempt=0, ended=is_final(record))
    node_ids = [move.node_id for move in record.story if move.attempt == attempt and move.node_id]
    if not node_ids or replica:
        return _no_log(f"where attempt {attempt} of {record.work_id} ran is not known any more", field="attempt")
    return LogPlace(attempt=attempt, node_id=node_ids[-1])


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _no_log(reason: str, field: str = "") -> Refused:
    return Refused(code="no_log", reason=reason, field=field, status=404)
