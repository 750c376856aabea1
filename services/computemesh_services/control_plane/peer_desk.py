"""Peers: who they are, what memory they offer, whom they are to be connected to, and what they say to each other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, cast

from msgspec.structs import replace
from prometheus_client import Counter, Gauge

from computemesh import log
from computemesh.bus import Bus, BusError, Conflict, NoResponder, TimedOut
from computemesh.bus.pull import read_last
from computemesh.contracts import peers as contracts
from computemesh.contracts import storage
from computemesh.contracts.base import MESSAGE_BYTES_MAX, AnyBound, Message, Refused, encode, serve
from computemesh.contracts.peer_records import AliasCounter, MemoryEntry, MemoryRecord, PeerRecord, TopologyRecord
from computemesh.contracts.peers import (
    MemoryDrop,
    MemoryDropped,
    MemoryGet,
    MemoryList,
    MemoryPut,
    MemoryStored,
    Peer,
    PeerAnswered,
    PeerCall,
    PeerCalled,
    PeerChanged,
    PeerGet,
    PeerHeard,
    PeerHeartbeat,
    PeerMemories,
    PeerMemory,
    PeerRegister,
    Peers,
    PeersList,
    PeerUnregister,
    PeerUnregistered,
    Topology,
    TopologyGet,
    TopologyPut,
)
from computemesh.ids import token_of
from computemesh.lifecycle import Spawn
from computemesh.peer.errors import outcome_of
from computemesh_services.control_plane import entities, peers
from computemesh_services.control_plane.changes import ChangeLedger
from computemesh_services.control_plane.newest import Newest
from computemesh_services.control_plane.shelf import Shelf

ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 16 * 1024
SWEEP_S: Final = 5.0
"""How often it is looked for what is left of peers that are gone."""
GONE_S: Final = 30.0
"""How long a replica that does not act remembers who went, in case that it is to act next."""
ANSWER_S: Final = 4.0
"""How long a peer may take to answer another one: less than that one waits for us."""
CALLS_AT_ONCE: Final = 2048
"""What peers say to each other and is not answered yet. Each only waits."""
CALLS_TO_NODE_MAX: Final = 256
"""Of these, those to one node: so one that hangs keeps nobody from the others."""
COUNTER_TRIES: Final = 32
NUMBERS_S: Final = 30 * 86_400
"""How long after the last alias was found for a scope its numbers are remembered."""
ALIASES_AT_ONCE: Final = 100

PEERS: Final = Gauge("computemesh_peers", "Peer agents that are known.")
CALLS: Final = Counter("computemesh_peer_calls_total", "What peers said to each other through here.", ["outcome"])
EXPIRED: Final = Counter("computemesh_peers_expired_total", "Peers of which nothing was heard, told by this replica.")

Change = Literal["added", "changed", "removed", "expired", "memory", "topology"]

_log = log.get("peers")


class PeerDesk:
    """Keeps the records, answers from memory, and passes on what peers say.

    Args:
        ledger: tells whether this replica is the one that acts.
    """

    def __init__(self, bus: Bus, ledger: ChangeLedger, ttl_s: int) -> None:
        self._bus = bus
        self._ledger = ledger
        self._ttl_s = ttl_s
        self._shelf = Shelf(bus, storage.PEERS, on_change=self._on_peer, ttl_s=ttl_s)
        self._memory = Shelf(bus, storage.MEMORY, on_change=self._on_memory)
        self._topology = Shelf(bus, storage.TOPOLOGY, on_change=self._on_topology)
        self._aliases: dict[str, list[str]] = {}
        """Of each scope, in order."""
        self._records: dict[str, PeerRecord] = {}
        """As they stood last, also those that are gone by now."""
        self._revisions = Newest()
        self._lists: dict[str, dict[Callable[[Peer], Message], bytes]] = {}
        """Of each scope, the lists that were made since something in it changed."""
        self.wishes: Final = peers.Wishes()
        self._specs: dict[str, TopologyRecord] = {}
        self._gone: dict[str, tuple[PeerRecord, float]] = {}
        """Peers whose records went, and when, by key; in that order."""
        self._went = asyncio.Event()
        self._calling: dict[str, int] = {}
        """Calls that wait for an answer, by node."""

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(contracts.REGISTER, self.on_register),
            serve(contracts.UNREGISTER, self.on_unregister),
            serve(contracts.HEARTBEAT, self.on_heartbeat),
            serve(contracts.GET, self.on_get),
            serve(contracts.LIST, self.on_list),
            serve(contracts.MEMORY_PUT, self.on_memory_put),
            serve(contracts.MEMORY_DROP, self.on_memory_drop),
            serve(contracts.MEMORY_GET, self.on_memory_get),
            serve(contracts.MEMORY_LIST, self.on_memory_list),
            serve(contracts.TOPOLOGY_PUT, self.on_topology_put),
            serve(contracts.TOPOLOGY_GET, self.on_topology_get),
            serve(contracts.CALL, self.on_call, at_once=CALLS_AT_ONCE),
        ]

    async def start(self, spawn: Spawn) -> None:
        for shelf in (self._shelf, self._memory, self._topology):
            await shelf.start()
            spawn(shelf.follow())
        spawn(self._bury_forever())
        spawn(self._sweep_forever())

    async def drain(self) -> None:
        for shelf in (self._shelf, self._memory, self._topology):
            await shelf.stop()

    def health(self) -> Mapping[str, Any]:
        return {"peers": len(self._shelf.mirror.entries)}

    def unready(self) -> str:
        known = all(shelf.mirror.synced.is_set() for shelf in (self._shelf, self._memory, self._topology))
        return "" if known else "reading the peers"

    # --- what is known -----------------------------------------------------------------------------------------------

    def _on_peer(self, key: str, record: PeerRecord | None) -> None:
        before = self._records.pop(key, None)
        stands = record or before
        if stands is not None and not (record and before and peers.same(record, before)):
            self._lists.pop(stands.scope, None)
        if record is not None:
            self._records[key] = record
            self._revisions.note(record.scope, record.revision)
            self._gone.pop(key, None)
            if before is None:
                insort(self._aliases.setdefault(record.scope, []), record.alias)
        elif before is not None:
            aliases = self._aliases[before.scope]
            del aliases[bisect_right(aliases, before.alias) - 1]
            if not aliases:
                del self._aliases[before.scope]
            self._gone[key] = (before, time.monotonic())
            self._went.set()
        PEERS.set(len(self._records))

    def _on_memory(self, key: str, record: MemoryRecord | None) -> None:
        if (peer := self._records.get(key)) is not None:
            self._lists.pop(peer.scope, None)
        if record is not None:
            self._revisions.note(record.scope, record.revision)

    def _on_topology(self, key: str, record: TopologyRecord | None) -> None:
        stands = record or self._specs.get(key)
        if stands is None:
            return
        if record is None:
            del self._specs[key]
        else:
            self._specs[key] = record
            self._revisions.note(record.scope, record.revision)
        self.wishes.set(stands.scope, stands.alias, record)

    def _revision(self, scope: str, now: float) -> int:
        revision = peers.revision_after(self._revisions.of(scope), now)
        self._revisions.note(scope, revision)
        return revision

    def stale(self) -> Refused | None:
        """Why nothing is answered from memory."""
        behind_s = max(shelf.mirror.behind_s for shelf in (self._shelf, self._memory, self._topology))
        if behind_s <= self._ttl_s:
            return None
        return Refused(code="unavailable", reason="what is stored is not known now", status=503, retry="later")

    def of(self, scope: str, after: str = "") -> Iterable[Peer]:
        """The peers of a scope behind an alias, in order, as memory has them."""
        aliases = self._aliases.get(scope, [])
        for alias in aliases[bisect_right(aliases, after) if after else 0 :]:
            key = peers.key_of(scope, alias)
            yield peers.view(self._records[key], self._memory.known(key))

    def listed(self, scope: str, word: Callable[[Peer], Message]) -> bytes:
        """The peers of a scope in the words of another interface, without what is around the list.

        Args:
            word: a function by which the list is known again, until something in it changes.
        """
        if scope not in self._aliases:
            return b""
        lists = self._lists.setdefault(scope, {})
        if word not in lists:
            lists[word] = encode([word(peer) for peer in self.of(scope)])[1:-1]
        return lists[word]

    # --- peers -------------------------------------------------------------------------------------------------------

    async def on_register(self, said: PeerRegister) -> Peer | Refused:
        return await self.register(said, said.instance)

    async def register(self, said: PeerRegister, instance: str | None) -> Peer | Refused:
        """Makes a peer known, under its alias or one that is found.

        Args:
            instance: who says it; None for one that has no way to show who it is.
        """
        if said.alias is not None:
            return await self._register(said, instance)
        if instance is not None and (named := self._named(said.scope, instance)) is not None:
            return await self._register(replace(said, alias=named), instance)  # It did not hear the answer.
        for _ in range(ALIASES_AT_ONCE):
            alias = peers.automatic(said.name_prefix, await self._number(said.scope))
            answer = await self._register(replace(said, alias=alias), instance)
            if not (isinstance(answer, Refused) and answer.code == "alias_taken"):
                return answer
        reason = f"the next {ALIASES_AT_ONCE} names after {said.name_prefix!r} are taken"
        return Refused(code="full", reason=reason, field="name_prefix", status=503)

    def _named(self, scope: str, instance: str) -> str | None:
        """The alias that an instance has already, as memory knows it."""
        records = (self._records[peers.key_of(scope, alias)] for alias in self._aliases.get(scope, ()))
        return next((record.alias for record in records if record.instance == instance), None)

    async def _number(self, scope: str) -> int:
        """The next number of a scope, which no other peer gets."""
        key = f"{token_of(scope)}.numbers"
        for _ in range(COUNTER_TRIES):
            entry = await self._shelf.bucket.read_other(key, AliasCounter)
            number = (entry.value.last if entry is not None else 0) + 1
            last = entry.revision if entry is not None else await self._shelf.bucket.newest(key)
            with contextlib.suppress(Conflict):
                await self._shelf.bucket.update_other(key, AliasCounter(last=number), last=last, ttl_s=NUMBERS_S)
                return number
        raise Conflict(f"{key}: {COUNTER_TRIES} races lost in a row")

    async def _register(self, said: PeerRegister, instance: str | None) -> Peer | Refused:
        assert said.alias is not None
        key, now = peers.key_of(said.scope, said.alias), time.time()
        revision = self._revision(said.scope, now)
        before: list[PeerRecord | None] = []

        def registered(record: PeerRecord | None) -> PeerRecord | Refused:
            if peers.made(record, now, revision):
                return cast("PeerRecord", record)
            before[:] = [record]
            return peers.registered(record, said, instance, now, revision)

        record = await self._shelf.move(key, registered)
        if not isinstance(record, PeerRecord):
            assert record is not None
            if record.code == "alias_taken" and before[-1] is not None and before[-1].instance is None:
                await self._shelf.move(key, lambda stands: peers.refused(stands, now) if stands is not None else None)
            return record
        if before[-1] is None:
            await self._memory.remove(key, lambda kept: kept.instance != instance or kept.at < now - self._ttl_s)
            _log.info("registered", peer=said.alias, scope=said.scope, node=said.node_id or "")
        if record.revision == revision:
            await self._tell(record, "added" if before[-1] is None else "changed", revision)
        return peers.view(record, await self._memory.get(key))

    async def on_unregister(self, said: PeerUnregister) -> PeerUnregistered | Refused:
        return await self.unregister(said.scope, said.alias, said.instance)

    async def unregister(self, scope: str, alias: str, instance: str | None) -> PeerUnregistered | Refused:
        """Forgets a peer with all that is kept of it, if *instance* speaks for it."""
        key = peers.key_of(scope, alias)
        removed = await self._shelf.remove(key, lambda record: peers.owns(record, instance))
        if removed is None:
            stands = await self._shelf.read(key)
            return peers.not_yours(alias) if stands is not None else PeerUnregistered(found=False)
        _log.info("unregistered", peer=alias, scope=scope)
        await self._clear(key, removed)
        await self._tell(removed, "removed", self._revision(scope, time.time()))
        return PeerUnregistered(found=True)

    async def cleanup(self, scope: str, alias: str) -> Literal["gone", "kept"] | Refused:
        """Forgets a peer on the word of one that does not show who it is, also what is kept of one that is not there.
        It is kept when that one was refused the alias before."""
        key, now = peers.key_of(scope, alias), time.time()
        record = await self._shelf.read(key)
        if record is not None and record.instance is None and peers.cleanup_is_anothers(record, now):
            await self._shelf.move(key, lambda stands: peers.refused(stands, 0.0) if stands is not None else None)
            _log.info("kept: who cleans up was refused the alias", peer=alias, scope=scope)
            return "kept"
        answer = await self.unregister(scope, alias, None)
        if isinstance(answer, Refused):
            return answer
        if not answer.found:
            await self._memory.remove(key, lambda kept: kept.instance is None)
            await self._topology.remove(key)
        return "gone"

    async def _clear(self, key: str, peer: PeerRecord) -> None:
        """Drops what is kept of a peer that is gone, unless it is there again."""

        async def gone() -> bool:
            return await self._shelf.read(key) is None

        await self._memory.remove(key, lambda kept: kept.instance == peer.instance, still=gone)
        spec = await self._topology.remove(key, still=gone)
        for alias in peers.affected(spec, None) - {peer.alias}:
            await self._tell_topology(peer.scope, alias)

    async def on_heartbeat(self, said: PeerHeartbeat) -> PeerHeard | Refused:
        heard = await asyncio.gather(*(self._beat(beat.scope, beat.alias, beat.instance) for beat in said.peers))
        return PeerHeard(missing=[beat for beat, ok in zip(said.peers, heard, strict=True) if not ok])

    async def beat(self, scope: str, alias: str) -> bool:
        """Keeps a peer known on the word of one that does not show who it is, and says whether it is."""
        return await self._beat(scope, alias, None, anybody=True)

    async def _beat(self, scope: str, alias: str, instance: str | None, *, anybody: bool = False) -> bool:
        now = time.time()

        def beaten(record: PeerRecord | None) -> PeerRecord | None:
            known = record is not None and (anybody or peers.owns(record, instance))
            return entities.beaten(record, now, self._ttl_s) if known and record is not None else None

        record = await self._shelf.move(peers.key_of(scope, alias), beaten)
        return isinstance(record, PeerRecord) and (anybody or peers.owns(record, instance))

    async def on_get(self, said: PeerGet) -> Peer | Refused:
        key = peers.key_of(said.scope, said.alias)
        if (stale := self.stale()) is not None:
            return stale
        record = await self._shelf.get(key)
        return peers.view(record, self._memory.known(key)) if record is not None else _no_peer(said.alias)

    async def on_list(self, ask: PeersList) -> Peers | Refused:
        if (stale := self.stale()) is not None:
            return stale
        taken: list[Peer] = []
        size, more = 0, False
        for peer in self.of(ask.scope, ask.after):
            size += len(encode(peer)) + 1
            if len(taken) >= ask.limit or (taken and size > ANSWER_BYTES_MAX):
                more = True
                break
            taken.append(peer)
        return Peers(peers=taken, revision=self._revisions.of(ask.scope), next=taken[-1].alias if more else "")

    # --- memory ------------------------------------------------------------------------------------------------------

    async def on_memory_put(self, said: MemoryPut) -> MemoryStored | Refused:
        entry = MemoryEntry(
            length=said.length, epoch=said.epoch, addr=said.addr, rkey=said.rkey, transports=said.transports
        )
        stored = await self.put_memory(said.scope, said.alias, said.instance, said.name, entry)
        return stored if isinstance(stored, Refused) else MemoryStored(revision=stored.revision)

    async def put_memory(
        self, scope: str, alias: str, instance: str | None, name: str, entry: MemoryEntry
    ) -> MemoryRecord | Refused:
        """Makes a piece of memory known. Of a peer that has no instance, that need not be registered."""
        key = peers.key_of(scope, alias)
        stands = await self._memory.get(key)
        over = stands if stands is not None and stands.instance != instance else None
        owner = await self._owner(scope, alias, instance, surely=over is not None)
        if isinstance(owner, Refused) and (instance is not None or owner.status != 404):
            return owner
        since = owner.registered_at if isinstance(owner, PeerRecord) else 0.0
        now = time.time()
        revision = self._revision(scope, now)
        empty = MemoryRecord(scope=scope, alias=alias, instance=instance, entries={}, revision=revision, at=now)
        record = await self._memory.move(
            key, lambda known: peers.with_memory(known, empty, name, entry, over=over, since=since)
        )
        assert record is not None
        if isinstance(record, MemoryRecord) and record.revision == revision:
            await self._tell_about(scope, alias, "memory", revision)
        return record

    async def on_memory_drop(self, said: MemoryDrop) -> MemoryDropped | Refused:
        owner = await self._owner(said.scope, said.alias, said.instance)
        if isinstance(owner, Refused):
            return MemoryDropped(found=False) if owner.status == 404 else owner
        now = time.time()
        revision = self._revision(said.scope, now)

        def without(record: MemoryRecord | None) -> MemoryRecord | None:
            mine = record is not None and record.instance == said.instance
            return peers.without_memory(record, said.name, said.epoch, now, revision) if mine and record else None

        record = await self._memory.move(peers.key_of(said.scope, said.alias), without)
        found = isinstance(record, MemoryRecord) and record.revision == revision
        if found:
            await self._tell_about(said.scope, said.alias, "memory", revision)
        return MemoryDropped(found=found)

    async def on_memory_get(self, said: MemoryGet) -> PeerMemory | Refused:
        found = await self.memory(said.scope, said.alias, said.name)
        if found is not None:
            return found
        reason = f"{said.alias!r} offers no memory {said.name!r} in scope {said.scope!r}"
        return Refused(code="not_found", reason=reason, field="name", status=404)

    async def memory(self, scope: str, alias: str, name: str) -> PeerMemory | Refused | None:
        """A piece of a peer's memory. Of one that has no instance, it need not be registered."""
        if (stale := self.stale()) is not None:
            return stale
        key = peers.key_of(scope, alias)
        peer = await self._shelf.get(key)
        instance = peer.instance if peer is not None else None
        record = self._memory.known(key)
        if name not in peers.offered(record, instance):
            record = await self._memory.read(key)  # Another replica may have written it this moment.
        return peers.memory_view(record, name) if record and name in peers.offered(record, instance) else None

    async def on_memory_list(self, said: MemoryList) -> PeerMemories | Refused:
        if (stale := self.stale()) is not None:
            return stale
        key = peers.key_of(said.scope, said.alias)
        peer = await self._shelf.get(key)
        if peer is None:
            return _no_peer(said.alias)
        record = await self._memory.get(key)
        names = sorted(peers.offered(record, peer.instance))
        return PeerMemories(memories=[peers.memory_view(record, name) for name in names] if record else [])

    async def _owner(
        self, scope: str, alias: str, instance: str | None, *, surely: bool = False
    ) -> PeerRecord | Refused:
        """The record of a peer, if *instance* speaks for it: by memory, which may be late by a moment, or surely."""
        key = peers.key_of(scope, alias)
        record = self._shelf.known(key)
        if surely or not peers.owns(record, instance):
            record = await self._shelf.read(key)
        if record is None:
            return _no_peer(alias)
        return record if peers.owns(record, instance) else peers.not_yours(alias)

    async def find(self, scope: str, alias: str) -> PeerRecord | None:
        """The record of a peer, from memory or else from the store."""
        return await self._shelf.get(peers.key_of(scope, alias))

    # --- topology ----------------------------------------------------------------------------------------------------

    async def on_topology_put(self, said: TopologyPut) -> Topology | Refused:
        now = time.time()
        revision = self._revision(said.scope, now)
        before: list[TopologyRecord | None] = []

        def wished(record: TopologyRecord | None) -> TopologyRecord:
            before[:] = [record]
            return peers.wished(record, said, now, revision)

        record = await self._topology.move(peers.key_of(said.scope, said.alias), wished)
        assert isinstance(record, TopologyRecord)
        for alias in sorted(peers.affected(before[-1], record)):
            await self._tell_topology(said.scope, alias)
        return self.wishes.of(said.scope, said.alias)

    async def on_topology_get(self, said: TopologyGet) -> Topology | Refused:
        if (stale := self.stale()) is not None:
            return stale
        await self._topology.get(peers.key_of(said.scope, said.alias))
        return self.wishes.of(said.scope, said.alias)

    # --- what peers say to each other --------------------------------------------------------------------------------

    async def on_call(self, said: PeerCall) -> PeerAnswered | Refused:
        answer = await self._call(said)
        CALLS.labels(outcome_of(answer.code) if isinstance(answer, Refused) else "ok").inc()
        return answer

    async def _call(self, said: PeerCall) -> PeerAnswered | Refused:
        caller = await self._owner(said.scope, said.alias, said.instance)
        if isinstance(caller, Refused):
            return caller
        peer = await self._shelf.get(peers.key_of(said.scope, said.peer))
        if peer is None:
            return replace(_no_peer(said.peer), field="peer")
        if peer.node_id is None or caller.node_id is None:
            alone = said.peer if peer.node_id is None else said.alias
            reason = f"{alone!r} is reached through no peer-agent"
            return Refused(code="no_way", reason=reason, field="peer", status=409)
        called = PeerCalled(scope=said.scope, alias=said.alias, node_id=caller.node_id, peer=said.peer, body=said.body)
        return await self._pass_on(called, peer.node_id)

    async def _pass_on(self, called: PeerCalled, node_id: str) -> PeerAnswered | Refused:
        waiting = self._calling.get(node_id, 0)
        if waiting >= CALLS_TO_NODE_MAX:
            reason = f"{waiting} calls wait for the peer-agent of node {node_id} already"
            return Refused(code="unavailable", reason=reason, field="peer", status=503, retry="later")
        self._calling[node_id] = waiting + 1
        try:
            return await self._bus.ask(contracts.ANSWER, called, target=node_id, timeout_s=ANSWER_S)
        except (NoResponder, TimedOut) as error:
            reason = f"the peer-agent of {called.peer!r}, on node {node_id}, does not answer: {error}"
            return Refused(code="unavailable", reason=reason, field="peer", status=503, retry="later")
        finally:
            self._calling[node_id] -= 1
            if not self._calling[node_id]:
                del self._calling[node_id]

    # --- what is told ------------------------------------------------------------------------------------------------

    async def _tell(self, peer: PeerRecord, change: Change, revision: int) -> None:
        await self._tell_of(peer.scope, peer.alias, peer.node_id, change, revision)

    async def _tell_about(self, scope: str, alias: str, change: Change, revision: int) -> None:
        record = self._shelf.known(peers.key_of(scope, alias))
        await self._tell_of(scope, alias, record.node_id if record is not None else None, change, revision)

    async def _tell_of(self, scope: str, alias: str, node_id: str | None, change: Change, revision: int) -> None:
        """Tells of a change. It is stored; who does not hear of it finds it when it asks."""
        told = PeerChanged(scope=scope, alias=alias, node_id=node_id, change=change, revision=revision, at=time.time())
        with contextlib.suppress(BusError):
            await self._bus.publish(contracts.CHANGED, told)

    async def _tell_topology(self, scope: str, alias: str) -> None:
        await self._tell_about(scope, alias, "topology", self._revisions.of(scope))

    # --- those that are gone -----------------------------------------------------------------------------------------

    async def _bury_forever(self) -> None:
        """Tells of those that expired, and drops what is kept of them. The replica that acts does; the others remember
        who went, for a while."""
        while True:
            await self._went.wait()
            if not self._ledger.acting:
                await asyncio.sleep(0.5)
                horizon_s = time.monotonic() - GONE_S
                while self._gone and next(iter(self._gone.values()))[1] < horizon_s:
                    del self._gone[next(iter(self._gone))]
                if not self._gone:
                    self._went.clear()
                continue
            self._went.clear()
            for key, (record, _) in list(self._gone.items()):
                try:
                    await self._bury(key, record)
                except BusError as error:
                    _log.warning("cannot drop what is left of a peer", peer=record.alias, reason=str(error))
                    self._went.set()
                    await asyncio.sleep(0.5)
                    break
                self._gone.pop(key, None)

    async def _bury(self, key: str, record: PeerRecord) -> None:
        stored = await read_last(self._bus, storage.PEERS.stream, storage.PEERS.subject(key))
        if stored is not None and stored.headers and "KV-Operation" in stored.headers:
            return  # Whoever removed it told of it.
        if stored is not None and not (stored.headers and "Nats-Marker-Reason" in stored.headers):
            return  # It is there again.
        _log.info("expired", peer=record.alias, scope=record.scope)
        EXPIRED.inc()
        await self._clear(key, record)
        await self._tell(record, "expired", self._revision(record.scope, time.time()))

    async def _sweep_forever(self) -> None:
        """Drops what is kept of peers that never came, or that went while nobody acted."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self._ttl_s))
            if not self._ledger.acting or self.unready():
                continue
            memory = [(key, entry.value) for key, entry in self._memory.mirror.entries.items()]
            topology = [(key, entry.value) for key, entry in self._topology.mirror.entries.items()]
            found = list(peers.left_over(self._records, memory, topology, time.time(), self._ttl_s))
            for what, key in found:
                try:
                    if what == "memory":
                        await self._memory.remove(key, lambda kept: time.time() - kept.at > self._ttl_s)
                    else:
                        await self._topology.remove(key)
                except BusError as error:
                    _log.warning("cannot drop what is left over", key=key, reason=str(error))
                    break


def _no_peer(alias: str) -> Refused:
    return Refused(code="not_found", reason=f"no peer {alias!r} in this scope", field="alias", status=404)
