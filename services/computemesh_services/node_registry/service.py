"""The shell around the roster: announcements and heartbeats in, records and events out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from prometheus_client import Counter, Gauge

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, MicroService, Mirror, lease
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import AnyBound, Refused, serve
from computemesh.contracts.nodes import (
    Discover,
    NodeAnnouncement,
    NodeGet,
    NodeHeartbeat,
    NodeList,
    NodeLost,
    NodeRecord,
    NodesQuery,
    NodeState,
)
from computemesh.contracts.services import NODE_REGISTRY
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.config import RegistryConfig

SWEEPS: Final = 5
"""Looks at everyone's silence per time of patience."""

Step = Callable[[NodeRecord | None], NodeRecord | None]

_log = log.get("service")

NODES = Gauge("computemesh_nodes", "Nodes by state.", ["state"])
HEARTBEATS = Counter("computemesh_node_heartbeats_total", "Heartbeats heard.")


class NodeRegistry:
    """Answers who is here.

    Every replica hears everyone and answers from its own mirror of the bucket; the one that holds the lease
    writes. Liveness is in memory: after a start every node gets its full patience again.
    """

    def __init__(self, bus: Bus, config: RegistryConfig, instance: str) -> None:
        self._bus = bus
        self._instance = instance
        self._patience = config.patience()
        self._bucket = Bucket(bus, storage.NODES)
        self._mirror: Mirror[NodeRecord] = Mirror(bus, storage.NODES)
        self._heard: dict[str, float] = {}
        """Monotonic seconds of the last sign of life."""
        self._started_s = time.monotonic()
        self._held: lease.Held | None = None
        self._draining = False

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(nodes.REGISTER, self.on_register),
            serve(nodes.QUERY, self.on_query),
            serve(nodes.GET, self.on_get),
        ]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        spawn(self._mirror.follow())
        await self._bus.subscribe(nodes.ANNOUNCE, self.on_announce)
        await self._bus.subscribe(nodes.HEARTBEAT, self.on_heartbeat)
        spawn(self._act_forever())
        spawn(self._sweep_forever())

    async def drain(self) -> None:
        self._draining = True
        if self._held is not None:
            await self._held.release()

    def health(self) -> Mapping[str, Any]:
        return {"acting": self._acting, "nodes": len(self._mirror.entries)}

    def unready(self) -> str:
        return "" if self._mirror.synced.is_set() else "reading the nodes"

    @property
    def _acting(self) -> bool:
        return self._held is not None and not self._held.lost.is_set()

    # --- what nodes say ------------------------------------------------------------------------------------------

    async def on_announce(self, said: NodeAnnouncement) -> None:
        self._heard[said.node_id] = time.monotonic()
        if self._acting:
            await self._write(said.node_id, lambda record: roster.announced(record, said, time.time()))

    async def on_heartbeat(self, beat: NodeHeartbeat) -> None:
        HEARTBEATS.inc()
        self._heard[beat.node_id] = time.monotonic()
        record = self._mirror.get(beat.node_id)
        if not self._acting:
            return
        if record is None or (beat.session and beat.session != record.session):
            await self._bus.publish(nodes.DISCOVER, Discover(node_ids=[beat.node_id]))
        if record is not None and roster.heard(record, beat, time.time()) is not record:
            await self._write(beat.node_id, lambda latest: roster.heard(latest, beat, time.time()) if latest else None)

    async def on_register(self, said: NodeAnnouncement) -> NodeRecord | Refused:
        """Any replica may write this one: the compare-and-set is the fence, and the caller waits for it."""
        self._heard[said.node_id] = time.monotonic()
        after = await self._bucket.change(said.node_id, lambda record: roster.registered(record, said, time.time()))
        assert after is not None
        _log.info("registered", node=said.node_id, tier=after.tier, delivery=after.delivery)
        return after

    async def _write(self, node_id: str, step: Step) -> None:
        before: NodeRecord | None = None

        def decide(latest: NodeRecord | None) -> NodeRecord | None:
            nonlocal before
            before = latest
            return step(latest)

        try:
            after = await self._bucket.change(node_id, decide)
        except BusError as error:
            _log.warning("cannot write a node", node=node_id, reason=str(error))
            return
        if after and (before is None or before.state is not after.state or before.epoch != after.epoch):
            _log.info("node", node=node_id, state=after.state, epoch=after.epoch)

    # --- what others ask -----------------------------------------------------------------------------------------

    async def on_query(self, query: NodesQuery) -> NodeList | Refused:
        found = [self._with_last_seen(r) for r in roster.matching(self._mirror.values(), query)]
        return NodeList(nodes=found[: query.limit], count=len(found))

    async def on_get(self, ask: NodeGet) -> NodeRecord | Refused:
        if record := self._mirror.get(ask.node_id):
            return self._with_last_seen(record)
        return Refused(code="not_found", reason=f"no node {ask.node_id!r}", field="node_id", status=404)

    def _with_last_seen(self, record: NodeRecord) -> NodeRecord:
        heard_s = self._heard.get(record.node_id)
        if heard_s is None:
            return record
        return msgspec.structs.replace(record, last_seen=time.time() - (time.monotonic() - heard_s))

    # --- loops ---------------------------------------------------------------------------------------------------

    async def _act_forever(self) -> None:
        """Holds the lease whenever possible. Whoever starts to act asks everyone who they are."""
        while not self._draining:
            await self._bus.connected.wait()
            self._held = await lease.acquire(self._bus, NODE_REGISTRY.name, self._instance, on_wait=lambda: None)
            try:
                await self._bus.publish(nodes.DISCOVER, Discover())
            except BusError as error:
                _log.warning("cannot ask nodes to announce themselves", reason=str(error))
            await self._held.lost.wait()

    async def _sweep_forever(self) -> None:
        """Notices silence. A pause of our own, or of the bus, is not held against the nodes."""
        pause_s = self._patience.suspect_after_s / SWEEPS
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            if now_s - last_s > 2 * pause_s or not self._bus.up:
                self._started_s = now_s
            last_s = now_s
            if self._acting and self._bus.up:
                await self._sweep(now_s)
            for state in NodeState:
                NODES.labels(state).set(sum(record.state is state for record in self._mirror.values()))

    async def _sweep(self, now_s: float) -> None:
        for record in self._mirror.values():
            silent_s = self._silent_s(record, now_s)
            if roster.silent(record, silent_s, time.time(), self._patience) is record:
                continue
            await self._write(record.node_id, self._silencing(silent_s))
            after = await self._bucket.get(record.node_id)
            if after and after.value.state is NodeState.LOST and record.state is not NodeState.LOST:
                lost = NodeLost(node_id=record.node_id, epoch=record.epoch, silent_s=round(silent_s, 1))
                await self._bus.publish(nodes.LOST, lost)

    def _silencing(self, silent_s: float) -> Step:
        return lambda latest: roster.silent(latest, silent_s, time.time(), self._patience) if latest else None

    def _silent_s(self, record: NodeRecord, now_s: float) -> float:
        if not record.monitored:
            return time.time() - record.changed_at
        return now_s - max(self._started_s, self._heard.get(record.node_id, 0.0))
