"""Why an item is where it is, in one sentence. Pure."""

from __future__ import annotations

from computemesh.contracts.work import FINAL, NodeVerdict, WorkRecord, WorkState
from computemesh_services.work_marshaller.workitem import OUT, places


def summary(record: WorkRecord, verdicts: list[NodeVerdict], now: float) -> str:
    if record.state in FINAL:
        return f"{record.state}" + (f": {record.error.reason}" if record.error else "")
    if record.deadline_at is None:
        return _present(record, verdicts, now)
    return f"{_present(record, verdicts, now)}; fails in {record.deadline_at - now:.0f} s unless it has ended by then"


def _present(record: WorkRecord, verdicts: list[NodeVerdict], now: float) -> str:
    if record.state in OUT:
        where = ", ".join(dict.fromkeys(node_id for _, node_id in places(record)))
        return f"attempt {record.attempt} is {record.state} on {where}"
    if record.state is WorkState.RETRYING:
        reason = record.error.reason if record.error else ""
        return f"tried again in {max(0.0, record.not_before - now):.1f} s: {reason}"
    if not verdicts:
        return "waits: no node is registered"
    fits = sum(verdict.fits for verdict in verdicts)
    if fits and record.replicas > 1:
        return f"waits until all {record.replicas} replicas have a place: {fits} of {len(verdicts)} nodes have one now"
    if fits:
        return f"waits its turn: {fits} of {len(verdicts)} nodes fit"
    nearest = f"the nearest is {verdicts[0].node_id}: {'; '.join(verdicts[0].reasons)}"
    hopeful = sum(verdict.may_change for verdict in verdicts)
    if not hopeful:
        return f"waits: none of the {len(verdicts)} nodes can ever run it; {nearest}"
    return f"waits: no node fits now, {hopeful} of {len(verdicts)} could later; {nearest}"
