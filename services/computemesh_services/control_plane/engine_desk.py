"""Engines and other entities: what they and those who look for them ask on the bus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import Counter, Gauge

from computemesh import log
from computemesh.bus import Bus
from computemesh.contracts import engines, storage
from computemesh.contracts.base import MESSAGE_BYTES_MAX, AnyBound, Refused, serve
from computemesh.contracts.engines import (
    Changes,
    ChangesGet,
    Engine,
    EngineGet,
    EngineHeard,
    EngineHeartbeat,
    EngineRegister,
    EngineRegistered,
    Engines,
    EnginesList,
    EngineUnregister,
    EngineUnregistered,
)
from computemesh.lifecycle import Spawn
from computemesh_services.control_plane import entities
from computemesh_services.control_plane.changes import ChangeLedger
from computemesh_services.control_plane.roll import Roll
from computemesh_services.control_plane.shelf import Shelf

ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 16 * 1024

ENGINES: Final = Gauge("computemesh_engines", "Engines and other entities that are known.")
SCOPES: Final = Gauge("computemesh_engine_scopes", "Scopes that have any.")
HEARTBEATS: Final = Counter("computemesh_engine_heartbeats_total", "Heartbeats of entities.", ["outcome"])

_log = log.get("engines")


class EngineDesk:
    """Keeps the records, and answers from memory."""

    def __init__(self, bus: Bus, instance: str, ttl_s: int) -> None:
        self._ttl_s = ttl_s
        self.roll: Final = Roll()
        self._shelf = Shelf(bus, storage.ENGINES, on_change=self._on_record, ttl_s=ttl_s)
        self.ledger: Final = ChangeLedger(bus, self._shelf.mirror, instance)

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(engines.REGISTER, self.on_register),
            serve(engines.HEARTBEAT, self.on_heartbeat),
            serve(engines.GET, self.on_get),
            serve(engines.LIST, self.on_list),
            serve(engines.CHANGES, self.on_changes),
            serve(engines.UNREGISTER, self.on_unregister),
        ]

    async def start(self, spawn: Spawn) -> None:
        await self._shelf.start()
        await self.ledger.start()
        spawn(self._shelf.follow())
        spawn(self.ledger.follow())
        spawn(self.ledger.take())
        spawn(self.ledger.act())

    async def drain(self) -> None:
        await self.ledger.drain()
        await self._shelf.stop()

    def health(self) -> Mapping[str, Any]:
        return {"acting": self.ledger.acting, "engines": len(self.roll), "scopes": self.roll.scopes}

    def unready(self) -> str:
        if not self._shelf.mirror.synced.is_set():
            return "reading the engines"
        return "" if self.ledger.known.is_set() else "reading what changed"

    def _on_record(self, key: str, record: Engine | None) -> None:
        if record is None:
            self.roll.drop(key)
        else:
            self.roll.take(key, record)
        self.ledger.noticed(key)
        ENGINES.set(len(self.roll))
        SCOPES.set(self.roll.scopes)

    def stale(self) -> Refused | None:
        """Why nothing is answered from memory: it may be older than anything in it may become."""
        if (behind_s := self._shelf.mirror.behind_s) <= self._ttl_s:
            return None
        reason = f"what is stored is not known since {behind_s:.0f} s" if behind_s < 1e9 else "the engines are not read"
        return Refused(code="unavailable", reason=reason, status=503, retry="later")

    async def on_register(self, said: EngineRegister) -> EngineRegistered | Refused:
        record = entities.registered(said, time.time())
        if isinstance(record, Refused):
            return record
        before: list[Engine | None] = []

        def registered(known: Engine | None) -> Engine:
            before[:] = [known]
            return record

        stands = await self._shelf.move(entities.key(record), registered)
        assert isinstance(stands, Engine)
        # A line costs a quarter of a registration, and some programs register where others beat.
        say = _log.debug if entities.says_the_same(before[-1], record) else _log.info
        say("registered", engine=said.engine_id, type=said.entity_type, scope=said.scope, ttl_s=self._ttl_s)
        return EngineRegistered(engine=record, ttl_s=self._ttl_s)

    async def on_unregister(self, said: EngineUnregister) -> EngineUnregistered | Refused:
        removed = await self._shelf.remove(entities.key_of(said.scope, said.entity_type, said.engine_id))
        found = removed is not None
        _log.info("unregistered", engine=said.engine_id, type=said.entity_type, scope=said.scope, found=found)
        return EngineUnregistered(found=found)

    async def on_heartbeat(self, said: EngineHeartbeat) -> EngineHeard | Refused:
        now = time.time()

        def beaten(record: Engine | None) -> Engine | None:
            return entities.beaten(record, now, self._ttl_s) if record is not None else None

        record = await self._shelf.move(entities.key_of(said.scope, said.entity_type, said.engine_id), beaten)
        HEARTBEATS.labels("ok" if record is not None else "not_found").inc()
        return EngineHeard(found=record is not None)

    async def on_get(self, said: EngineGet) -> Engine | Refused:
        record = await self.find(said.scope, said.entity_type, said.engine_id)
        if record is None:
            reason = f"no {said.entity_type} {said.engine_id!r} in scope {said.scope!r}"
            return Refused(code="not_found", reason=reason, field="engine_id", status=404)
        return record

    async def find(self, scope: str, entity_type: str, engine_id: str) -> Engine | Refused | None:
        """An entity, from memory or else from the store.

        Raises:
            BusError: memory does not have it, and the store does not answer.
        """
        return self.stale() or await self._shelf.get(entities.key_of(scope, entity_type, engine_id))

    async def on_list(self, ask: EnginesList) -> Engines | Refused:
        return self.stale() or self.roll.page(ask, self.ledger.revision(ask.scope), bytes_max=ANSWER_BYTES_MAX)

    async def on_changes(self, ask: ChangesGet) -> Changes | Refused:
        return await self.ledger.since(ask)
