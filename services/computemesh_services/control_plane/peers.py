"""What happens to the records of peers, of their memory and of their topology. Pure.

Everything has a revision, by which it is known what is newer in a scope: the time in microseconds, but always more than
any that is known there. So it needs no counter that could be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from msgspec.structs import replace

from computemesh.contracts.base import RECORD_DEPTH_MAX, Refused, encode, too_deep
from computemesh.contracts.peer_records import MemoryEntry, MemoryRecord, PeerRecord, TopologyRecord
from computemesh.contracts.peers import (
    MEMORY_KEYS_MAX,
    Peer,
    PeerMemory,
    PeerRegister,
    Topology,
    TopologyPut,
)
from computemesh.ids import token_of

RECORD_BYTES_MAX: Final = 512 * 1024
"""What is kept in one record, as JSON."""

ENTRY_BYTES_MAX: Final = 1024
"""What one piece of memory needs of that, at most. So few pieces need not be counted out."""

REFUSED_S: Final = 60.0
"""How long after an alias was refused to somebody a cleanup of it is taken to be theirs."""

TOPOLOGY_WAIT_S: Final = 3600.0
"""How long a topology waits for its peer to come."""


def key_of(scope: str, alias: str) -> str:
    """The key of what is kept of a peer: one token, of which no part can be taken for another."""
    return f"{token_of(scope)}/{token_of(alias)}"


def revision_after(known: int, now: float) -> int:
    """The revision of a change in a scope of which *known* is the highest."""
    return max(known + 1, int(now * 1e6))


# --- peers ------------------------------------------------------------------------------------------------------


def registered(
    record: PeerRecord | None, said: PeerRegister, instance: str | None, now: float, revision: int
) -> PeerRecord | Refused:
    """The record after a registration under an alias, or why that is not given.

    Args:
        instance: who says it; None for one that has no way to show who it is.
    """
    assert said.alias is not None
    if record is not None and (record.instance is None or record.instance != instance):
        reason = f"Peer agent alias '{said.alias}' already exists in this scope"
        return Refused(code="alias_taken", reason=reason, field="alias", status=409)
    after = PeerRecord(
        scope=said.scope,
        alias=said.alias,
        instance=instance,
        node_id=said.node_id,
        address=said.address,
        device=said.device,
        ib_port=said.ib_port,
        link_type=said.link_type,
        resource=said.resource,
        registered_at=record.registered_at if record is not None else now,
        seen_at=now,
        revision=record.revision if record is not None else revision,
    )
    data = encode(after)
    if too_deep(data, RECORD_DEPTH_MAX):
        reason = f"nested deeper than {RECORD_DEPTH_MAX - 1} levels"
        return Refused(code="bad_message", reason=reason, field="resource")
    if len(data) > RECORD_BYTES_MAX:
        reason = f"what is said of the machine has more than {RECORD_BYTES_MAX} bytes as JSON"
        return Refused(code="too_large", reason=reason, field="resource", status=413)
    return after if record is None or same(record, after) else replace(after, revision=revision)


def made(record: PeerRecord | None, now: float, revision: int) -> bool:
    """Whether a new record is what a registration of this time and revision made: its acknowledgement was lost."""
    return record is not None and (record.registered_at, record.revision) == (now, revision)


def same(one: PeerRecord, other: PeerRecord) -> bool:
    """Whether two records say the same of a peer, whenever it was heard."""
    plain: dict[str, Any] = {"seen_at": 0.0, "revision": 0, "refused_at": 0.0}
    return replace(one, **plain) == replace(other, **plain)


def owns(record: PeerRecord | None, instance: str | None) -> bool:
    """Whether *instance* speaks for the peer."""
    return record is not None and record.instance == instance


def refused(record: PeerRecord, now: float) -> PeerRecord:
    """The record after its alias was refused to somebody else."""
    return replace(record, refused_at=now)


def cleanup_is_anothers(record: PeerRecord, now: float) -> bool:
    """Whether a cleanup by one that does not show who it is comes from somebody who was refused the alias.

    DLSlime's agent cleans up under the alias it asked for also when it did not get it. To keep a peer that wanted to go
    costs a minute; to drop one that lives costs its connections.
    """
    return 0 <= now - record.refused_at < REFUSED_S


def automatic(prefix: str, number: int) -> str:
    """The alias that is found for a peer which names none."""
    return f"{prefix}-{number:x}"


def view(record: PeerRecord, memory: MemoryRecord | None) -> Peer:
    """A peer as it is told."""
    return Peer(
        scope=record.scope,
        alias=record.alias,
        node_id=record.node_id,
        address=record.address,
        device=record.device,
        ib_port=record.ib_port,
        link_type=record.link_type,
        resource=record.resource,
        memory_keys=sorted(offered(memory, record.instance)),
        registered_at=record.registered_at,
        seen_at=record.seen_at,
        revision=max(record.revision, memory.revision if memory is not None else 0),
    )


def not_yours(alias: str) -> Refused:
    """Why somebody may not speak for a peer."""
    reason = f"{alias!r} belongs to another instance"
    return Refused(code="not_yours", reason=reason, field="instance", status=409)


# --- memory -----------------------------------------------------------------------------------------------------


def offered(record: MemoryRecord | None, instance: str | None) -> dict[str, MemoryEntry]:
    """The memory that a life of a peer offers; what an earlier one did is nothing."""
    return record.entries if record is not None and record.instance == instance else {}


def with_memory(
    record: MemoryRecord | None,
    empty: MemoryRecord,
    name: str,
    entry: MemoryEntry,
    *,
    over: MemoryRecord | None = None,
    since: float = 0.0,
) -> MemoryRecord | Refused:
    """The record after a piece of memory was offered. One with a lower epoch is late, and changes nothing.

    Args:
        empty: the record of the life that offers it, without any memory, as of now.
        over: the record of another life, which is known to be over.
        since: when this life was registered. What is older may be about to be dropped, and is written again.
    """
    if record is not None and record.instance != empty.instance and (over is None or record.instance != over.instance):
        return not_yours(empty.alias)
    entries = offered(record, empty.instance)
    known = entries.get(name)
    if record is not None and known is not None and known.epoch > entry.epoch:
        return record
    if record is not None and known == entry and record.at >= since:
        return record
    if known is None and len(entries) >= MEMORY_KEYS_MAX:
        reason = f"{empty.alias} offers {MEMORY_KEYS_MAX} pieces of memory, and no more are kept"
        return Refused(code="full", reason=reason, field="name", status=503)
    after = replace(empty, entries={**entries, name: entry})
    if len(after.entries) * ENTRY_BYTES_MAX > RECORD_BYTES_MAX and len(encode(after)) > RECORD_BYTES_MAX:
        reason = f"the memory of {empty.alias} needs more than {RECORD_BYTES_MAX} bytes as JSON"
        return Refused(code="full", reason=reason, field="name", status=503)
    return after


def without_memory(record: MemoryRecord, name: str, epoch: int, now: float, revision: int) -> MemoryRecord:
    """The record after a piece of memory was dropped. What was registered under the name since then stays."""
    known = record.entries.get(name)
    if known is None or known.epoch > epoch:
        return record
    left = {other: entry for other, entry in record.entries.items() if other != name}
    return replace(record, entries=left, revision=revision, at=now)


def memory_view(record: MemoryRecord, name: str) -> PeerMemory:
    """A piece of memory as it is told."""
    entry = record.entries[name]
    return PeerMemory(
        scope=record.scope,
        alias=record.alias,
        name=name,
        length=entry.length,
        epoch=entry.epoch,
        addr=entry.addr,
        rkey=entry.rkey,
        lkey=entry.lkey,
        transports=entry.transports,
    )


# --- topology ---------------------------------------------------------------------------------------------------


def wished(record: TopologyRecord | None, said: TopologyPut, now: float, revision: int) -> TopologyRecord:
    """The record after somebody said whom a peer is to be connected to."""
    targets = list(dict.fromkeys(target for target in said.target_peers if target != said.alias))
    after = TopologyRecord(
        scope=said.scope,
        alias=said.alias,
        target_peers=targets,
        min_bw=said.min_bw,
        symmetric=said.symmetric,
        revision=record.revision if record is not None else revision,
        at=record.at if record is not None else now,
    )
    return after if after == record else replace(after, revision=revision, at=now)


def affected(before: TopologyRecord | None, after: TopologyRecord | None) -> set[str]:
    """The peers for which it makes a difference that a topology changed: itself, and those that it names both ways."""
    found: set[str] = set()
    if before != after:
        for record in (before, after):
            if record is not None:
                found |= {record.alias, *(record.target_peers if record.symmetric else ())}
    return found


class Wishes:
    """Who is to be connected to whom, by scope: what each peer's specification says, and what those of others say of
    it."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], TopologyRecord] = {}
        self._naming: dict[tuple[str, str], set[str]] = {}
        """Who wants a peer to be connected to it as well."""

    def get(self, scope: str, alias: str) -> TopologyRecord | None:
        return self._records.get((scope, alias))

    def set(self, scope: str, alias: str, record: TopologyRecord | None) -> None:
        """What a peer's own specification is now; None: it has none."""
        before = self._records.pop((scope, alias), None)
        for target in before.target_peers if before is not None and before.symmetric else ():
            naming = self._naming[scope, target]
            naming.discard(alias)
            if not naming:
                del self._naming[scope, target]
        if record is not None:
            self._records[scope, alias] = record
            for target in record.target_peers if record.symmetric else ():
                self._naming.setdefault((scope, target), set()).add(alias)

    def of(self, scope: str, alias: str) -> Topology:
        """Whom a peer is to be connected to."""
        own = self._records.get((scope, alias))
        targets: dict[str, None] = dict.fromkeys(own.target_peers) if own is not None else {}
        revision = own.revision if own is not None else 0
        for other in sorted(self._naming.get((scope, alias), ())):
            targets[other] = None
            revision = max(revision, self._records[scope, other].revision)
        return Topology(
            scope=scope,
            alias=alias,
            target_peers=list(targets),
            min_bw=own.min_bw if own is not None else None,
            revision=revision,
        )


# --- what is left over ------------------------------------------------------------------------------------------


def left_over(
    peers: Mapping[str, PeerRecord],
    memory: Iterable[tuple[str, MemoryRecord]],
    topology: Iterable[tuple[str, TopologyRecord]],
    now: float,
    ttl_s: float,
) -> Iterator[tuple[str, str]]:
    """What is kept of peers that are not there, or of an earlier life of theirs, and was kept for a while: ``memory``
    or ``topology``, and the key.

    Args:
        peers: by the same keys.
    """
    for key, kept in memory:
        if not owns(peers.get(key), kept.instance) and now - kept.at > ttl_s:
            yield "memory", key
    for key, spec in topology:
        if key not in peers and now - spec.at > max(TOPOLOGY_WAIT_S, ttl_s):
            yield "topology", key
