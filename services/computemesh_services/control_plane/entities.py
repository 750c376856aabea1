"""What happens to the record of an engine, or of any other entity. Pure."""

from __future__ import annotations

from typing import Final, Literal, TypeVar

from msgspec.structs import asdict, replace

from computemesh.contracts.base import RECORD_DEPTH_MAX, Refused, encode, too_deep
from computemesh.contracts.engines import ENGINE, RECORD_BYTES_MAX, Engine, EngineChange, EngineRegister
from computemesh.contracts.peer_records import PeerRecord
from computemesh.ids import token_of

BEATS_PER_LIFE: Final = 6.0
"""Heartbeats that are stored in the time a record has, at most. Those between them are answered from memory; a record
whose owner falls silent after one of these goes by as much sooner."""

R = TypeVar("R", Engine, PeerRecord)


def key_of(scope: str, entity_type: str, engine_id: str) -> str:
    """The key of an entity's record: one token, of which no part can be taken for another."""
    return f"{token_of(scope)}/{token_of(entity_type)}/{token_of(engine_id)}"


def key(record: Engine) -> str:
    """The key of a record."""
    return key_of(record.scope, record.entity_type, record.engine_id)


def ledger_key(change: EngineChange) -> str:
    """The key of a change: first the scope, by which it is published, then the entity."""
    return f"{token_of(change.scope)}.{token_of(change.entity_type)}/{token_of(change.engine_id)}"


def registered(said: EngineRegister, now: float) -> Engine | Refused:
    """The record that a registration makes, whatever there was before."""
    if said.entity_type == ENGINE and said.role is None:
        return Refused(code="bad_engine", reason="an engine is 'prefill', 'decode' or 'hybrid'", field="role")
    if said.entity_type != ENGINE and not said.kind:
        return Refused(code="bad_engine", reason="an entity that is no engine has a kind", field="kind")
    facts = asdict(said)
    if said.role is not None:
        facts["kind"] = said.role
    record = Engine(**facts, zmq_address=zmq_address(said.host, said.port), registered_at=now, seen_at=now)
    data = encode(record)
    if too_deep(data, RECORD_DEPTH_MAX):
        free = {"endpoint": said.endpoint, "metadata": said.metadata, "resource": said.resource}
        field = next(name for name, value in free.items() if too_deep(encode({name: value}), RECORD_DEPTH_MAX))
        return Refused(code="bad_message", reason=f"nested deeper than {RECORD_DEPTH_MAX - 1} levels", field=field)
    if (size := len(data)) > RECORD_BYTES_MAX:
        reason = f"{size} bytes of JSON, {RECORD_BYTES_MAX} are kept of one entity"
        return Refused(code="too_large", reason=reason, field="metadata", status=413)
    return record


def zmq_address(host: str, port: int) -> str:
    """Where an engine's socket is; empty where it told no host, or no port."""
    if not host or not port:
        return ""
    return f"tcp://[{host.strip('[]')}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def beaten(record: R, now: float, ttl_s: float) -> R:
    """The record of an entity or a peer after a heartbeat: the same one when the last that was stored is as good.

    A record that was seen in the future was written by a faster clock; it is stored again, lest it expire.
    """
    return record if 0 <= now - record.seen_at < ttl_s / BEATS_PER_LIFE else replace(record, seen_at=now)


def same(one: Engine, other: Engine) -> bool:
    """Whether two records differ in nothing but when the entity was heard last. A registration is never the same."""
    return replace(one, seen_at=0.0) == replace(other, seen_at=0.0)


def says_the_same(known: Engine | None, record: Engine) -> bool:
    """Whether a registration says of an entity what was known of it already."""
    return known is not None and record == replace(known, registered_at=record.registered_at, seen_at=record.seen_at)


Gone = Literal["removed", "expired"]


def told_differs(told: EngineChange | None, record: Engine | None) -> bool:
    """Whether what was told of an entity last is not how it is."""
    known = told.engine if told is not None else None
    if known is None or record is None:
        return known is not record
    return not same(known, record)


def change(
    told: EngineChange | None,
    record: Engine | None,
    *,
    gone: Gone,
    source: int,
    revision: int,
    previous: int,
    at: float,
) -> EngineChange:
    """What is to be told of an entity.

    Args:
        told: what was told of it last.
        record: how it is; None: it is gone, as *gone* says.
        source: revision of the record in the store.
        revision: of the change.
        previous: of the change before it in its scope.
    """
    subject = record or (told.engine if told else None)
    assert subject is not None, "nothing was told, and nothing is there"
    if record is None:
        kind: Literal["added", "changed", "removed", "expired"] = gone
    else:
        kind = "changed" if told is not None and told.engine is not None else "added"
    return EngineChange(
        revision=revision,
        previous=previous,
        change=kind,
        scope=subject.scope,
        entity_type=subject.entity_type,
        engine_id=subject.engine_id,
        engine=record,
        source=source,
        at=at,
    )


def misses(changes: list[EngineChange], since: int, known_to: int) -> bool:
    """Whether changes of one scope, in order, are not all there were after *since*.

    Args:
        known_to: the newest revision that the scope is known to have.
    """
    if not changes:
        return known_to > since
    return any(
        later.previous > earlier
        for earlier, later in zip([since, *(one.revision for one in changes)], changes, strict=False)
    )
