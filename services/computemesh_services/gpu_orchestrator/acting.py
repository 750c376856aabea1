"""What only one replica does: it ends what has run out or lost its owner, and tells when memory runs short.

Two that do so at once do no harm: an end is a compare-and-set like any other decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, Mirror, lease
from computemesh.contracts import gpus, storage, work
from computemesh.contracts.gpus import EndReason, GpuLedger, GpuPressure, MemoryKind, PressureLevel, RamState
from computemesh.contracts.nodes import NodeRecord
from computemesh.contracts.services import GPU_ORCHESTRATOR
from computemesh.contracts.work import FINAL, WorkRecord
from computemesh_services.gpu_orchestrator import ledger as ledgers
from computemesh_services.gpu_orchestrator import pressure
from computemesh_services.gpu_orchestrator.desks import Desks
from computemesh_services.gpu_orchestrator.known import Known
from computemesh_services.gpu_orchestrator.ledger import End, Tidy, Want
from computemesh_services.gpu_orchestrator.room import Spot

SWEEP_S: Final = 0.25
"""How often it is looked for reservations that have run out or lost their owner."""

WORK_S: Final = 0.25
"""How often it is looked for work items that became bound to reservations, or no longer are."""

CHECK_S: Final = 30.0
"""How often bound work items are read, in case word of their end was missed."""

PRESSURE_S: Final = 1.0

FORGOTTEN_S: Final = 60.0
"""How long a record without reservations stays after its node was removed."""

FORGOTTEN_MARK_S: Final = 600
"""How long its absence is marked for other replicas to read."""

_log = log.get("acting")


class Acting:
    """The loops of the replica that holds the lease; on the others they idle."""

    def __init__(
        self,
        bus: Bus,
        known: Known,
        desks: Desks,
        nodes: Mirror[NodeRecord],
        ledgers_: Mirror[GpuLedger],
        instance: str,
    ) -> None:
        self._bus = bus
        self._known = known
        self._desks = desks
        self._nodes = nodes
        self._ledgers = ledgers_
        self._instance = instance
        self._records = Bucket(bus, storage.GPUS)
        self._work = Bucket(bus, storage.WORK)
        self._held: lease.Held | None = None
        self._draining = False
        self._watched: dict[str, Callable[[], Awaitable[None]]] = {}
        """How to stop hearing of a work item, by its id."""
        self._levels: dict[tuple[str, str], PressureLevel] = {}
        """How short memory was, by node and GPU; only what is not well."""

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._hold_forever(), self._sweep_forever(), self._watch_forever(), self._press_forever()]

    async def drain(self) -> None:
        self._draining = True
        if self._held is not None:
            await self._held.release()

    @property
    def holds(self) -> bool:
        return self._held is not None and not self._held.lost.is_set()

    @property
    def _able(self) -> bool:
        """Whether it acts, and knows what it acts upon."""
        return self.holds and self._bus.up and self._nodes.synced.is_set() and self._ledgers.synced.is_set()

    async def _hold_forever(self) -> None:
        while not self._draining:
            await self._bus.connected.wait()
            self._held = await lease.acquire(self._bus, GPU_ORCHESTRATOR.name, self._instance, on_wait=lambda: None)
            if self._draining:  # Told to end while it was acquired.
                await self._held.release()
                return
            self._levels.clear()
            self._known.changed.update(self._nodes.entries)
            await self._held.lost.wait()

    # --- ends --------------------------------------------------------------------------------------------------------

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._able:
                try:
                    await self._sweep()
                except BusError as error:
                    _log.warning("cannot end reservations now", reason=str(error))

    async def _sweep(self) -> None:
        now = time.time()
        wants: list[tuple[str, Want]] = [(node_id, Tidy()) for node_id in self._known.run_out(now)]
        orphans: dict[str, set[str]] = {}
        for grant in self._known.bound.values():
            entry = self._nodes.entries.get(grant.node_id)
            node, revision = (entry.value, entry.revision) if entry else (None, self._nodes.seen)
            if ledgers.owner_gone(grant, node, revision):
                orphans.setdefault(grant.node_id, set()).add(grant.reservation_id)
        wants += [(node_id, End(frozenset(ids), EndReason.OWNER_GONE)) for node_id, ids in orphans.items()]
        await asyncio.gather(*(self._desks.put(node_id, want) for node_id, want in wants))
        await self._forget(now)

    async def _forget(self, now: float) -> None:
        """Removes records of nodes that are no more."""
        gone = [
            (node_id, entry)
            for node_id, entry in self._ledgers.entries.items()
            if node_id not in self._nodes.entries
            and not entry.value.grants
            and entry.value.changed_at < now - FORGOTTEN_S
        ]
        for node_id, entry in gone:
            marker = await self._records.purge(node_id, last=entry.revision, marker_ttl_s=FORGOTTEN_MARK_S)
            self._ledgers.wrote(node_id, None, marker)

    # --- work items --------------------------------------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        """Hears of the work items that reservations are bound to; reads them when it starts to, and now and then."""
        checked_s = 0.0
        interrupted = self._bus.interrupted
        while True:
            await asyncio.sleep(WORK_S)
            bound = self._known.bound.values() if self._able else ()
            wanted = {grant.work_id for grant in bound if grant.work_id}
            try:
                for work_id in sorted(self._watched.keys() - wanted):
                    await self._watched.pop(work_id)()
                if not self._able:
                    checked_s = 0.0
                    continue
                fresh = sorted(wanted - self._watched.keys())
                for work_id in fresh:
                    hears = await self._bus.subscribe(work.STATE, self._on_state, target=work_id)
                    self._watched[work_id] = partial(self._bus.forget, hears)
                # What was said before the server had the subscription, or while it was away, is read.
                if fresh:
                    await self._bus.flush()
                due = interrupted is not self._bus.interrupted or time.monotonic() - checked_s > CHECK_S
                for work_id in sorted(wanted) if due else fresh:
                    if entry := await self._work.get(work_id):
                        await self._on_state(entry.value)
                if due:
                    checked_s, interrupted = time.monotonic(), self._bus.interrupted
            except BusError as error:
                _log.warning("cannot look for the end of work now", reason=str(error))
                checked_s = 0.0

    async def _on_state(self, record: WorkRecord) -> None:
        if record.state not in FINAL:
            return
        ids: dict[str, set[str]] = {}
        for grant in self._known.bound.values():
            if grant.work_id == record.work_id:
                ids.setdefault(grant.node_id, set()).add(grant.reservation_id)
        for node_id, ended in ids.items():
            with contextlib.suppress(BusError):  # It is read again.
                await self._desks.put(node_id, End(frozenset(ended), EndReason.WORK_ENDED))

    # --- pressure ----------------------------------------------------------------------------------------------------

    async def _press_forever(self) -> None:
        while True:
            await asyncio.sleep(PRESSURE_S)
            changed, self._known.changed = self._known.changed, set()
            if not self._able:
                continue
            for node_id in changed:
                try:
                    await self._press(node_id)
                except BusError as error:
                    _log.warning("cannot tell that memory runs short", node=node_id, reason=str(error))

    async def _press(self, node_id: str) -> None:
        now = time.time()
        room = self._known.room(node_id, now)
        if room is None:
            self._levels = {key: level for key, level in self._levels.items() if key[0] != node_id}
            return
        ram = self._known.ram(node_id) if self._worth_a_look(node_id) else None
        if ram is not None and ram.total_mb:
            was = self._levels.get((node_id, ""), PressureLevel.OK)
            await self._tell(node_id, "", was, pressure.ram_level(ram, was), _of_ram(node_id, ram))
        for spot in room.spots:
            was = self._levels.get((node_id, spot.key), PressureLevel.OK)
            await self._tell(node_id, spot.key, was, pressure.vram_level(spot, was), _of_gpu(node_id, spot))

    def _worth_a_look(self, node_id: str) -> bool:
        """Whether the RAM of a node may be short; most are plainly not, and trends are dear."""
        facts = self._known.facts(node_id)
        samples = self._known.samples(node_id)
        if facts is None or facts.node.memory is None or not samples:
            return False
        total = facts.node.memory.total_mb
        low = samples[-1][1] < pressure.WARNING_LEFT * total
        return low or (node_id, "") in self._levels or pressure.may_fall(samples, total)

    async def _tell(self, node_id: str, key: str, was: PressureLevel, level: PressureLevel, fact: GpuPressure) -> None:
        if level == was:
            return
        if level is PressureLevel.OK:
            self._levels.pop((node_id, key), None)
        else:
            self._levels[node_id, key] = level
        said = msgspec.structs.replace(fact, level=level, was=was, at=time.time())
        _log.info("memory", node=node_id, kind=said.kind, gpu=said.index, level=level, why=said.reason)
        await self._bus.publish(gpus.PRESSURE, said)


def _of_ram(node_id: str, ram: RamState) -> GpuPressure:
    reason = f"{ram.available_mb} of {ram.total_mb} MiB available"
    if ram.oom_in_s is not None and ram.slope_mb_per_s is not None:
        reason += f", {-ram.slope_mb_per_s:.1f} MiB less each second: nothing left in {ram.oom_in_s:.0f} s"
    return GpuPressure(
        node_id=node_id,
        kind=MemoryKind.RAM,
        level=PressureLevel.OK,
        was=PressureLevel.OK,
        total_mb=ram.total_mb,
        available_mb=ram.available_mb,
        slope_mb_per_s=ram.slope_mb_per_s,
        oom_in_s=ram.oom_in_s,
        reason=reason,
        at=0.0,
    )


def _of_gpu(node_id: str, spot: Spot) -> GpuPressure:
    reason = f"{spot.reserved_mb} reserved and {spot.external_mb} used by others of {spot.total_mb} MiB"
    return GpuPressure(
        node_id=node_id,
        kind=MemoryKind.VRAM,
        level=PressureLevel.OK,
        was=PressureLevel.OK,
        index=spot.gpu.index,
        uuid=spot.gpu.uuid,
        total_mb=spot.total_mb,
        available_mb=spot.free_mb,
        over_mb=spot.over_mb,
        reason=reason,
        at=0.0,
    )
