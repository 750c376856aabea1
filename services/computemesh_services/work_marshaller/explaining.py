"""Why an item is where it is, in one sentence. Pure."""

from __future__ import annotations

from computemesh.contracts.work import FINAL, NodeVerdict, WorkRecord, WorkState
from computemesh_services.work_marshaller.workitem import OUT, places


def summary(record: WorkRecord, verdicts: list[NodeVerdict], now: float) -> str:
    if record.state in OUT:
        where = ", ".join(dict.fromkeys(node_id for _, node_id in places(record)))
        return f"attempt {record.attempt} is {record.state} on {where}"
    if record.state is WorkState.RETRYING:
        reason = record.error.reason if record.error else ""
        return f"tried again in {max(0.0, record.not_before - now):.1f} s: {reason}"
    if record.state in FINAL:
        return f"{record.state}" + (f": {record.error.reason}" if record.error else "")
    if not verdicts:
        return "waits: no node is registered"
    fits = sum(verdict.fits for verdict in verdicts)
    hopeful = sum(verdict.may_change for verdict in verdicts)
    if fits:
        return f"waits its turn: {fits} of {len(verdicts)} nodes fit"
    return f"waits: no node fits now; {hopeful} of {len(verdicts)} could later, the others are not made for it"
