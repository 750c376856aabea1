"""What must be sent because a record was stored. Pure.

Decided from two stored records alone, so it can never leave before the record is safe, and is the same after
a crash.
"""

from __future__ import annotations

from dataclasses import dataclass

from computemesh.contracts.work import WorkRecord, WorkState
from computemesh_services.work_marshaller.workitem import DEADLINE, OUT, places


@dataclass(frozen=True)
class Deliver:
    """Hand the record's attempt to its node, or its replicas to theirs."""

    record: WorkRecord


@dataclass(frozen=True)
class Stop:
    """End an attempt that no longer counts."""

    work_id: str
    attempt: int
    node_id: str
    reason: str
    replica: int = 0


Effect = Deliver | Stop


def consequences(before: WorkRecord | None, stored: WorkRecord) -> list[Effect]:
    """What must be sent because *stored* now stands in place of *before*."""
    effects: list[Effect] = []
    if before and before.state in OUT and not before.plain and _moved_on(before, stored):
        reason = stored.story[-1].reason or str(stored.state) if stored.story else str(stored.state)
        for replica, node_id in () if _reported(before, stored) else places(before):
            effects.append(Stop(before.work_id, before.attempt, node_id, reason, replica))
    if stored.state is WorkState.ASSIGNED and (before is None or before.attempt != stored.attempt):
        effects.append(Deliver(stored))
    return effects


def _moved_on(before: WorkRecord, after: WorkRecord) -> bool:
    return after.state not in OUT or after.attempt != before.attempt


def _reported(before: WorkRecord, stored: WorkRecord) -> bool:
    """The node reported the attempt's end, and need not be told to end it. Those of other replicas must."""
    if stored.state is WorkState.FAILED:
        return not before.members and (stored.error is None or stored.error.code != DEADLINE)
    return stored.state is WorkState.COMPLETED
