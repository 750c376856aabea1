"""Who is here and who is alive. Pure: records in, records out, time as a parameter in Unix seconds.

    (announce) --> online --silent--> suspect --silent longer--> lost
                     ^                   |                         |
                     +---- heartbeat ----+------- heartbeat -------+   a new epoch

A node that never sent a heartbeat is unmonitored: silence means nothing, it stays online until
``unmonitored_ttl_s`` after its last announcement.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from computemesh.contracts.base import Message
from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat, NodeRecord, NodesQuery, NodeState
from computemesh.hardware import tier_of


class Patience(Message, frozen=True, kw_only=True):
    """How long silence is borne."""

    suspect_after_s: float = 25.0
    lost_after_s: float = 45.0
    unmonitored_ttl_s: float = 86_400.0


def announced(record: NodeRecord | None, said: NodeAnnouncement, now: float) -> NodeRecord:
    """The record after an announcement. The same object when nothing changed but the time."""
    facts = {name: getattr(said, name) for name in NodeAnnouncement.__struct_fields__}
    facts["tier"] = said.tier or tier_of(said.gpus)
    if record is None:
        return NodeRecord(**facts, registered_at=now, changed_at=now, last_seen=now)
    back = record.state is NodeState.LOST or (said.session != "" and said.session != record.session)
    after = msgspec.structs.replace(
        record, **facts, state=NodeState.ONLINE, epoch=record.epoch + 1 if back else record.epoch
    )
    if after == record:
        return record
    return msgspec.structs.replace(after, changed_at=now, last_seen=now)


def registered(record: NodeRecord | None, said: NodeAnnouncement, now: float) -> NodeRecord:
    """As :func:`announced`, for a node that asks: it is written even when it says the same again, so that
    a node without heartbeats can show that it is still there."""
    return msgspec.structs.replace(announced(record, said, now), changed_at=now, last_seen=now)


def heard(record: NodeRecord, beat: NodeHeartbeat, now: float) -> NodeRecord:
    """The record after a heartbeat. The same object when it changes nothing."""
    new_session = beat.session != "" and beat.session != record.session
    if record.monitored and record.state is NodeState.ONLINE and not new_session:
        return record
    back = record.state is NodeState.LOST or new_session
    return msgspec.structs.replace(
        record,
        monitored=True,
        state=NodeState.ONLINE,
        session=beat.session or record.session,
        epoch=record.epoch + 1 if back else record.epoch,
        changed_at=now,
        last_seen=now,
    )


def silent(record: NodeRecord, silent_s: float, now: float, patience: Patience) -> NodeRecord:
    """The record of a node nobody heard from for *silent_s*. The same object when it changes nothing."""
    state = _state_after(record, silent_s, patience)
    if state is record.state or record.state is NodeState.LOST:
        return record
    return msgspec.structs.replace(record, state=state, changed_at=now)


def _state_after(record: NodeRecord, silent_s: float, patience: Patience) -> NodeState:
    if not record.monitored:
        return NodeState.LOST if silent_s >= patience.unmonitored_ttl_s else record.state
    if silent_s >= patience.lost_after_s:
        return NodeState.LOST
    return NodeState.SUSPECT if silent_s >= patience.suspect_after_s else record.state


def matching(records: Iterable[NodeRecord], query: NodesQuery) -> list[NodeRecord]:
    """The nodes a query asks for, by id."""
    return sorted((record for record in records if _matches(record, query)), key=lambda record: record.node_id)


def _matches(record: NodeRecord, query: NodesQuery) -> bool:
    return (
        (not query.requires_gpu or bool(record.gpus))
        and (query.min_tier is None or record.tier.at_least(query.min_tier))
        and (not query.online_only or record.state is NodeState.ONLINE)
        and (not query.work_type or not record.work_types or query.work_type in record.work_types)
        and (not query.model_name or not record.models or query.model_name in record.models)
    )
