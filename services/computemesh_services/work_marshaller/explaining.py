"""Why an item is where it is, in one sentence. Pure."""

from __future__ import annotations

import msgspec

from computemesh.contracts.work import FINAL, NodeVerdict, WorkRecord, WorkState
from computemesh_services.work_marshaller.workitem import OUT, places


class Room(msgspec.Struct, frozen=True, gc=False):
    """For how many of an item's replicas there is a place."""

    now: int
    at_most: int
    """Were all nodes there, with nothing on them."""


def summary(record: WorkRecord, verdicts: list[NodeVerdict], room: Room, now: float) -> str:
    """
    Args:
        room: looked at only for an item with replicas that waits.
    """
    if record.state in FINAL:
        return f"{record.state}" + (f": {record.error.reason}" if record.error else "")
    present = _present(record, verdicts, room, now)
    if record.deadline_at is None:
        return present
    return f"{present}; fails in {record.deadline_at - now:.0f} s unless it has ended by then"


def _present(record: WorkRecord, verdicts: list[NodeVerdict], room: Room, now: float) -> str:
    if record.state in OUT:
        where = ", ".join(dict.fromkeys(node_id for _, node_id in places(record)))
        return f"attempt {record.attempt} is {record.state} on {where}"
    if record.state is WorkState.RETRYING:
        reason = record.error.reason if record.error else ""
        return f"tried again in {max(0.0, record.not_before - now):.1f} s: {reason}"
    if not verdicts:
        return "waits: no node is registered"
    fits = sum(verdict.fits for verdict in verdicts)
    hopeful = fits + sum(verdict.may_change for verdict in verdicts if not verdict.fits)
    if hopeful and room.at_most < record.replicas:
        return (
            f"waits: as the mesh is now it can never start: its {record.replicas} replicas start together, and all "
            f"nodes, with nothing else on them, have room for {room.at_most}"
        )
    if fits and room.now < record.replicas:
        return f"waits until all {record.replicas} replicas have a place: room for {room.now} now"
    if fits:
        return f"waits its turn: {fits} of {len(verdicts)} nodes fit"
    nearest = f"the nearest is {verdicts[0].node_id}: {'; '.join(verdicts[0].reasons)}"
    if not hopeful:
        who = f"none of the {len(verdicts)} nodes can ever" if len(verdicts) > 1 else "the only node can never"
        return f"waits: {who} run it; {nearest}"
    return f"waits: no node fits now, {hopeful} of {len(verdicts)} could later; {nearest}"
