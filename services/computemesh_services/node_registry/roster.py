"""Who is here and who is alive. Pure: records in, records out, time as a parameter in Unix seconds.

    (announce) --> online --silent--> suspect --silent longer--> lost --long after--> forgotten
                     ^                   |                         |
                     +---- heartbeat ----+------- heartbeat -------+   a new epoch

A node that ends in good order says so in its last heartbeat, and is lost at once.

A node that never sent a heartbeat is unmonitored: silence means nothing, it stays online until
``unmonitored_ttl_s`` after its last announcement.

**One node id, two agents.** A session is one life of an agent. Only an announcement brings a new one, and
an agent whose session was replaced is another one with the same id: neither its announcements nor its
heartbeats count, so that two of them cannot take turns. While a monitored node is not lost, an agent on
another machine cannot have its id either. A lost node's id goes to whoever announces it first.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec.structs import replace

from computemesh.contracts.base import Message
from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat, NodeRecord, NodeState
from computemesh.hardware import Cpu, Memory, canonical, lasting, tier_of

RETIRED_MAX: Final = 8
"""Sessions that are remembered after they were replaced."""


SUSPECT_BEATS: Final = 2.5
LOST_BEATS: Final = 4.5
"""Silence in a node's own heartbeat intervals that is borne in any case."""


class Patience(Message, frozen=True, kw_only=True):
    """How long silence is borne, of nodes that send heartbeats as often as is usual."""

    suspect_after_s: float = 25.0
    lost_after_s: float = 45.0
    unmonitored_ttl_s: float = 86_400.0


# --- what nodes say ----------------------------------------------------------------------------------------------


def why_refused(record: NodeRecord | None, said: NodeAnnouncement) -> str:
    """Why an announcement does not count: its node id belongs to another agent. Empty when it counts."""
    if record is None or not record.monitored or record.state is NodeState.LOST:
        return ""
    if said.session != "" and said.session == record.session:
        return ""
    if _another_machine(record, said):
        where = record.hostname or "another machine"
        return f"node id {record.node_id!r} belongs to another agent, on {where}, whose heartbeats are heard"
    if said.session in record.retired:
        return f"node id {record.node_id!r} was taken over by another agent on this machine, which is alive"
    return ""


def _another_machine(record: NodeRecord, said: NodeAnnouncement) -> bool:
    if record.machine_id and said.machine_id:
        return record.machine_id != said.machine_id
    return record.hostname != said.hostname if record.hostname and said.hostname else False


def announced(record: NodeRecord | None, said: NodeAnnouncement, now: float) -> NodeRecord:
    """The record after an announcement that counts. The same object when it changes nothing that lasts."""
    facts = {name: getattr(said, name) for name in NodeAnnouncement.__struct_fields__}
    facts["memory"], facts["gpus"] = canonical(said.memory, said.gpus)
    facts["tier"] = said.tier or tier_of(facts["gpus"])
    if record is None:
        return NodeRecord(**facts, registered_at=now, changed_at=now, last_seen=now)
    new_life = said.session != "" and said.session != record.session
    if new_life:
        facts["retired"] = _retired(record, said.session)
    back = new_life or record.state is NodeState.LOST
    after = replace(
        record, **facts, state=NodeState.ONLINE, left=False, epoch=record.epoch + 1 if back else record.epoch
    )
    # How much is used now is the business of heartbeats, where there are any.
    if after == record or (record.monitored and _lasting(after) == _lasting(record)):
        return record
    return replace(after, changed_at=now, last_seen=now)


def _retired(record: NodeRecord, session: str) -> list[str]:
    before = [old for old in record.retired if old != session]
    return [*before, record.session][-RETIRED_MAX:] if record.session else before


def _lasting(record: NodeRecord) -> NodeRecord:
    """Without what differs from one look at the machine to the next."""
    return replace(
        record,
        cpu=record.cpu and replace(record.cpu, frequency_mhz=Cpu().frequency_mhz),
        memory=record.memory and Memory(total_mb=record.memory.total_mb, swap_total_mb=record.memory.swap_total_mb),
        gpus=[lasting(gpu) for gpu in record.gpus],
    )


def registered(record: NodeRecord | None, said: NodeAnnouncement, now: float) -> NodeRecord:
    """As :func:`announced`, for a node that asks: it is written even when it says the same again, so that
    a node without heartbeats can show that it is still there."""
    return replace(announced(record, said, now), changed_at=now, last_seen=now)


def of_this_life(record: NodeRecord, beat: NodeHeartbeat) -> bool:
    """Whether a heartbeat is the recorded agent's. One that tells no session is."""
    return beat.session == record.session or beat.session == "" or record.session == ""


def heard(record: NodeRecord, beat: NodeHeartbeat, now: float) -> NodeRecord:
    """The record after a heartbeat. The same object when it changes nothing, as when it is another agent's."""
    ordinary = record.monitored and record.state is NodeState.ONLINE and beat.session == record.session
    if (ordinary and not beat.leaving) or not of_this_life(record, beat):
        return record
    if beat.leaving:
        gone = replace(record, state=NodeState.LOST, left=True)
        return record if record.state is NodeState.LOST else replace(gone, changed_at=now, last_seen=now)
    if record.left and beat.session == record.session != "":
        return record  # It was on its way when the last one came; another life has another session.
    after = replace(
        record,
        monitored=True,
        state=NodeState.ONLINE,
        left=False,
        session=record.session or beat.session,
        epoch=record.epoch + 1 if record.state is NodeState.LOST else record.epoch,
    )
    return record if after == record else replace(after, changed_at=now, last_seen=now)


# --- silence -----------------------------------------------------------------------------------------------------


def silent(record: NodeRecord, silent_s: float, now: float, patience: Patience, *, seen_at: float = 0.0) -> NodeRecord:
    """The record of a node nobody heard from for *silent_s*. The same object when it changes nothing.

    Args:
        seen_at: when its last sign of life came, if it is known.
    """
    state = state_after(record, silent_s, patience)
    if state is record.state:
        return record
    return replace(record, state=state, changed_at=now, last_seen=max(record.last_seen, seen_at))


def state_after(record: NodeRecord, silent_s: float, patience: Patience) -> NodeState:
    """The state of a node nobody heard from for *silent_s*. Silence never makes one better."""
    if record.state is NodeState.LOST:
        return NodeState.LOST
    if not record.monitored:
        return NodeState.LOST if silent_s >= patience.unmonitored_ttl_s else record.state
    interval_s = record.heartbeat_interval_s or 0.0
    if silent_s >= max(patience.lost_after_s, LOST_BEATS * interval_s):
        return NodeState.LOST
    return NodeState.SUSPECT if silent_s >= max(patience.suspect_after_s, SUSPECT_BEATS * interval_s) else record.state


def same_life(record: NodeRecord, judged: NodeRecord) -> bool:
    """Whether what was decided about *judged* still holds for what stands now."""
    return (record.session, record.epoch, record.state, record.last_seen) == (
        judged.session, judged.epoch, judged.state, judged.last_seen,
    )  # fmt: skip


# --- what operators say ------------------------------------------------------------------------------------------


def drained(record: NodeRecord, reason: str, now: float) -> NodeRecord:
    """The record of a node that gets no new work. The same object when it was so for the same reason."""
    if record.drained and record.drain_reason == reason:
        return record
    return replace(record, drained=True, drain_reason=reason, changed_at=now)


def undrained(record: NodeRecord, now: float) -> NodeRecord:
    """The record of a node that gets work again. The same object when it was not drained."""
    return replace(record, drained=False, drain_reason="", changed_at=now) if record.drained else record


def may_forget(record: NodeRecord) -> bool:
    """Whether nobody expects the node any more."""
    return record.state is NodeState.LOST or not record.monitored


def forgotten(record: NodeRecord, now: float, forget_after_s: float) -> bool:
    """Whether a lost node is to be forgotten by now."""
    return record.state is NodeState.LOST and now - record.changed_at >= forget_after_s


def may_clean(record: NodeRecord, now: float, silent_s: float) -> bool:
    """Whether a node is forgotten when somebody cleans up. What an operator said of one is not."""
    silent = record.left or now - record.last_seen >= silent_s
    return record.state is NodeState.LOST and not record.drained and silent


def too_large(said: NodeAnnouncement, bytes_max: int) -> str:
    """Why an announcement cannot be kept; empty when it can."""
    size = len(msgspec.json.encode(said))
    return f"{size} bytes, at most {bytes_max} are kept of a node" if size > bytes_max else ""
