"""The shell around the ledger: requests in, decisions written, events out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import Counter, Gauge

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, MicroService, Mirror, TimedOut
from computemesh.contracts import gpus, nodes, storage
from computemesh.contracts.base import AnyBound, Refused, encode, serve
from computemesh.contracts.gpus import (
    EndReason,
    GpuCanFit,
    GpuFit,
    GpuGet,
    GpuGrant,
    GpuLedger,
    GpuList,
    GpuNodeState,
    GpuRelease,
    GpuReleased,
    GpuRenew,
    GpuReservation,
    GpuReservations,
    GpuReserve,
    GpuReserved,
    GpuStates,
    GpuStatesQuery,
    WhyNot,
)
from computemesh.contracts.nodes import Discover, NodeHeartbeat, NodeRecord
from computemesh.contracts.work import FINAL
from computemesh.edge import Extra
from computemesh.ids import new_id
from computemesh.lifecycle import Spawn
from computemesh_services.gpu_orchestrator import ledger as ledgers
from computemesh_services.gpu_orchestrator.acting import Acting
from computemesh_services.gpu_orchestrator.config import OrchestratorConfig
from computemesh_services.gpu_orchestrator.desks import Desks, Elsewhere, Outcome
from computemesh_services.gpu_orchestrator.known import Known
from computemesh_services.gpu_orchestrator.ledger import End, NoRoom, Renew, Reserve
from computemesh_services.gpu_orchestrator.room import (
    Pick,
    Refusals,
    Room,
    best_of,
    count_of,
    state_of,
    version,
)

READY_S: Final = 3.0
"""How long a request waits for this replica to know what it needs."""

USE_S: Final = 2.0
"""How long a replica that starts waits for nodes to tell what is in use, before the announcements must do."""

USE_LOOK_S: Final = 0.05

DISCOVER_NODES: Final = 500
"""Nodes asked at once to announce themselves, and after that to send a heartbeat."""

CHOICES_MAX: Final = 16
"""Nodes tried, each of which was taken by others just before."""

PAGE_BYTES_MAX: Final = 900_000

GAUGES_S: Final = 2.0

_log = log.get("service")

RESERVATIONS = Gauge("computemesh_gpu_reservations", "Reservations that stand.")
MEMORY = Gauge("computemesh_gpu_mesh_memory_bytes", "GPU memory of all nodes.", ["state"])
REQUESTS = Counter("computemesh_gpu_requests_total", "Requests to reserve, by their answer.", ["answer"])


class GpuOrchestrator:
    """Says who may use how much memory of which GPU.

    Any replica answers: it decides by its mirror, and the compare-and-set on the node's record is the fence. The
    one that holds the lease also ends what has run out, and tells when memory runs short.
    """

    def __init__(self, bus: Bus, config: OrchestratorConfig, instance: str) -> None:
        self._bus = bus
        self._config = config
        self._quotas = config.quotas()
        self._nodes: Mirror[NodeRecord] = Mirror(bus, storage.NODES, self._on_node)
        self._ledgers: Mirror[GpuLedger] = Mirror(bus, storage.GPUS, self._on_ledger)
        self._known = Known(self._nodes, self._ledgers, headroom_mb=config.gpu_headroom_mb)
        self._work = Bucket(bus, storage.WORK)
        self._desks = Desks(
            Bucket(bus, storage.GPUS),
            self._ledgers,
            self._known.facts,
            self._tell,
            quotas=self._quotas,
            headroom_mb=config.gpu_headroom_mb,
        )
        self._acting = Acting(bus, self._known, self._desks, self._nodes, self._ledgers, instance)
        self._settled = asyncio.Event()
        """Set once the nodes told what is in use, or had the time to."""

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(gpus.RESERVE, self.on_reserve),
            serve(gpus.RENEW, self.on_renew),
            serve(gpus.CAN_FIT, self.on_can_fit),
            serve(gpus.STATES, self.on_states),
            serve(gpus.GET, self.on_get),
            serve(gpus.LIST, self.on_list),
            serve(gpus.RELEASE, self.on_release),
        ]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        spawn(self._nodes.follow())
        spawn(self._ledgers.follow())
        await self._bus.subscribe(nodes.HEARTBEAT, self._on_heartbeat)
        spawn(self._ask_for_use())
        spawn(self._count_forever())
        for loop in self._acting.loops():
            spawn(loop)

    async def drain(self) -> None:
        await self._desks.drain()
        await self._acting.drain()

    def health(self) -> Mapping[str, Any]:
        now = time.time()
        return {
            "acting": self._acting.holds,
            "nodes": sum(1 for _ in self._known.rooms(now)),
            "reservations": sum(1 for _ in self._known.grants(now)),
        }

    def unready(self) -> str:
        if not self._nodes.synced.is_set():
            return "reading the nodes"
        if not self._ledgers.synced.is_set():
            return "reading the reservations"
        return "" if self._settled.is_set() else "waiting for nodes to tell what is in use"

    # --- what it hears -----------------------------------------------------------------------------------------------

    def _on_node(self, node_id: str, node: NodeRecord | None) -> None:
        self._known.on_node(node_id, node)

    def _on_ledger(self, node_id: str, ledger: GpuLedger | None) -> None:
        self._known.on_ledger(node_id, ledger)

    async def _on_heartbeat(self, beat: NodeHeartbeat) -> None:
        self._known.on_heartbeat(beat)

    async def _tell(self, fact: GpuReservation | GpuReleased) -> None:
        try:
            if isinstance(fact, GpuReleased):
                _log.debug("ended", reservation=fact.reservation_id, node=fact.node_id, why=fact.reason)
                await self._bus.publish(gpus.RELEASED, fact)
            else:
                _log.debug("reserved", reservation=fact.reservation_id, node=fact.node_id, mb=fact.total_mb)
                fields = {name: getattr(fact, name) for name in GpuReservation.__struct_fields__}
                await self._bus.publish(gpus.RESERVED, GpuReserved(**fields))
        except BusError as error:
            _log.warning("cannot tell", reservation=fact.reservation_id, reason=str(error))

    # --- reserve -----------------------------------------------------------------------------------------------------

    async def on_reserve(self, ask: GpuReserve) -> GpuReservation | Refused:
        since = await self._desks.since() if ask.reservation_id else 0  # Before anything is waited for.
        await self._ready()
        answer = await self._reserve(ask, since)
        REQUESTS.labels(answer.code if isinstance(answer, Refused) else "granted").inc()
        return answer

    async def _reserve(self, ask: GpuReserve, since: int) -> GpuReservation | Refused:
        refusal = self._contradiction(ask) or self._too_long(ask.timeout_seconds) or await self._after_work(ask)
        if refusal:
            return refusal
        want = Reserve(
            ask=ask,
            reservation_id=ask.reservation_id or new_id("g"),
            timeout_s=ask.timeout_seconds or self._config.gpu_reservation_timeout,
        )
        chosen = ask.reservation_id is not None
        if ask.reservation_id and (present := self._known.grant(ask.reservation_id, time.time())):
            answer = await self._desks.put(present.node_id, want, claims=chosen, since=since)
            # The terms name no other node, or this is the refusal; unless it ended just now.
            if not isinstance(answer, NoRoom) or ask.node_id == present.node_id:
                return self._final(ask, answer)
        if ask.node_id is not None:
            if refusal := await self._no_node(ask):
                return refusal
            return self._final(ask, await self._follow(ask, want, ask.node_id, since))
        return await self._reserve_anywhere(ask, want, since)

    async def _reserve_anywhere(self, ask: GpuReserve, want: Reserve, since: int) -> GpuReservation | Refused:
        """On the best node by what is known; whoever was faster there makes it choose again."""
        caught_up = False
        for _ in range(CHOICES_MAX):
            best = self._best(ask)
            if best is None:
                if caught_up:
                    break
                await self._desks.catch_up()
                caught_up = True
                continue
            answer = await self._follow(ask, want, best.node_id, since)
            if not isinstance(answer, NoRoom):
                return self._final(ask, answer)
        return ledgers.refusal(ask, self._why_nowhere(ask))

    async def _follow(self, ask: GpuReserve, want: Reserve, node_id: str, since: int) -> Outcome:
        """Decides at a node, or where the id turns out to stand already."""
        claims = ask.reservation_id is not None
        answer = await self._desks.put(node_id, want, claims=claims, since=since)
        if isinstance(answer, Elsewhere):
            answer = await self._desks.put(answer.node_id, want, claims=claims, since=since)
        return answer

    def _final(self, ask: GpuReserve, answer: Outcome) -> GpuReservation | Refused:
        match answer:
            case GpuReservation() | Refused():
                return answer
            case NoRoom(room):
                against = Refusals(ask)
                against.add(room)
                return ledgers.refusal(ask, against)
            case _:
                return Refused(code="busy", reason="the id moved meanwhile; ask again", status=503, retry="later")

    def _best(self, ask: GpuCanFit) -> Pick | None:
        return best_of(self._known.rooms(time.time()), ask)

    def _why_nowhere(self, ask: GpuCanFit) -> Refusals:
        against = Refusals(ask)
        for room in self._known.rooms(time.time()):
            against.add(room)
        return against

    def _contradiction(self, ask: GpuCanFit) -> Refused | None:
        named = ask.gpu_indices
        if len(set(named)) != len(named):
            return _bad("gpu_indices", "a GPU is named twice")
        if named and ask.gpu_count not in (None, len(named)):
            return _bad("gpu_count", f"{ask.gpu_count}, but gpu_indices names {len(named)}")
        if ask.min_compute_capability and version(ask.min_compute_capability) < (0, 0):
            return _bad("min_compute_capability", f"{ask.min_compute_capability!r} is not like 8.9")
        if isinstance(ask, GpuReserve) and (ask.session or ask.pids) and ask.node_id is None:
            return _bad("node_id", "a session, and pids, are those of one node: name it")
        return None

    def _too_long(self, timeout_s: float | None) -> Refused | None:
        if timeout_s is None or timeout_s <= self._config.reservation_max_s:
            return None
        return Refused(
            code="bad_timeout",
            reason=f"{timeout_s:g} s is longer than the {self._config.reservation_max_s:g} s that may be asked for",
            field="timeout_seconds",
        )

    async def _after_work(self, ask: GpuReserve) -> Refused | None:
        if ask.work_id is None:
            return None
        entry = await self._work.get(ask.work_id)
        if entry is None or entry.value.state not in FINAL:
            return None
        return Refused(
            code="work_ended",
            reason=f"{ask.work_id} is {entry.value.state} already",
            field="work_id",
            status=409,
        )

    async def _no_node(self, ask: GpuCanFit) -> Refused | None:
        """The refusal, if the node or a GPU that is named is none that there is."""
        assert ask.node_id is not None
        facts = self._known.facts(ask.node_id)
        if facts is None:
            return _not_found("node_id", f"no node {ask.node_id!r}")
        there = {gpu.index for gpu in facts.node.gpus}
        absent = [index for index in ask.gpu_indices if index not in there]
        if absent:
            has = f"has GPUs {', '.join(map(str, sorted(there)))}" if there else "has no GPU"
            return _not_found("gpu_indices", f"{ask.node_id} {has}, not {', '.join(map(str, absent))}")
        return None

    # --- renew and release -------------------------------------------------------------------------------------------

    async def on_renew(self, ask: GpuRenew) -> GpuReservation | Refused:
        await self._ready()
        if refusal := self._too_long(ask.timeout_seconds):
            return refusal
        grant = await self._find(ask.reservation_id)
        if grant is None:
            return _no_reservation(ask.reservation_id)
        answer = await self._desks.put(grant.node_id, Renew(ask.reservation_id, ask.timeout_seconds, ask.pids))
        if isinstance(answer, GpuReservation | Refused):
            return answer
        return _no_reservation(ask.reservation_id)

    async def on_release(self, ask: GpuRelease) -> GpuReleased | Refused:
        await self._ready()
        grant = await self._find(ask.reservation_id)
        if grant is None:
            return _no_reservation(ask.reservation_id)
        ids = frozenset((ask.reservation_id,))
        answer = await self._desks.put(grant.node_id, End(ids, EndReason.RELEASED))
        if isinstance(answer, GpuReleased | Refused):
            return answer
        return _no_reservation(ask.reservation_id)

    async def _find(self, reservation_id: str) -> GpuGrant | None:
        """A reservation, also one that another replica granted a moment ago."""
        if found := self._known.grant(reservation_id, time.time()):
            return found
        await self._desks.catch_up()
        return self._known.grant(reservation_id, time.time())

    # --- questions ---------------------------------------------------------------------------------------------------

    async def on_can_fit(self, ask: GpuCanFit) -> GpuFit | Refused:
        await self._ready()
        if refusal := self._contradiction(ask):
            return refusal
        if ask.node_id is not None and (refusal := await self._no_node(ask)):
            return refusal
        # What was just released or granted by another replica counts.
        await self._desks.catch_up()
        if refusal := self._over_quota(ask):
            return GpuFit(
                can_fit=False,
                required_mb=ask.required_mb,
                total_mb=ask.required_mb * count_of(ask),
                reason=refusal.reason,
                counts={str(WhyNot.QUOTA): 1},
            )
        if best := self._best(ask):
            return ledgers.fits(ask, best)
        against = self._why_nowhere(ask)
        return ledgers.does_not_fit(ask, ledgers.refusal(ask, against), against)

    def _over_quota(self, ask: GpuCanFit) -> Refused | None:
        limit = self._quotas.limit_mb(ask.owner)
        if limit is None:
            return None
        has = sum(grant.total_mb for grant in self._known.grants(time.time()) if grant.owner == ask.owner)
        return ledgers.quota_refusal(ask, limit, has)

    async def on_get(self, ask: GpuGet) -> GpuReservation | Refused:
        await self._ready()
        grant = await self._find(ask.reservation_id)
        return ledgers.shown(grant) if grant else _no_reservation(ask.reservation_id)

    async def on_list(self, ask: GpuList) -> GpuReservations | Refused:
        await self._ready()
        await self._desks.catch_up()
        found = sorted(
            (
                grant
                for grant in self._known.grants(time.time())
                if ask.owner in (None, grant.owner) and ask.node_id in (None, grant.node_id)
            ),
            key=lambda grant: grant.reservation_id,
        )
        behind = [ledgers.shown(grant) for grant in found if grant.reservation_id > ask.after]
        page = _page(behind, ask.limit)
        last = page[-1].reservation_id if page and len(page) < len(behind) else ""
        return GpuReservations(reservations=page, count=len(found), next=last)

    async def on_states(self, ask: GpuStatesQuery) -> GpuStates | Refused:
        await self._ready()
        await self._desks.catch_up()
        now = time.time()
        if ask.node_id is not None:
            room = self._known.room(ask.node_id, now)
            if room is None:
                return _not_found("node_id", f"no node {ask.node_id!r}")
            rooms = [room]
        else:
            rooms = sorted(self._known.rooms(now), key=lambda room: room.node.node_id)
        behind = [self._state(room) for room in rooms if room.node.node_id > ask.after][: ask.limit + 1]
        page = _page(behind, ask.limit)
        return GpuStates(
            nodes=page,
            count=len(rooms),
            total_mb=sum(room.total_mb for room in rooms),
            reserved_mb=sum(room.reserved_mb for room in rooms),
            free_mb=sum(max(0, free) for room in rooms for free in room.free_mb),
            next=page[-1].node_id if page and len(page) < len(behind) else "",
        )

    def _state(self, room: Room) -> GpuNodeState:
        node = room.node
        return GpuNodeState(
            node_id=node.node_id,
            hostname=node.hostname,
            state=node.state,
            tier=node.tier,
            platform=node.platform,
            provider=node.provider,
            unavailable=room.against,
            gpus=[state_of(spot, room) for spot in room.spots],
            ram=self._known.ram(node.node_id),
            heard_at=room.heard_at,
        )

    # --- being ready -------------------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Waits until this replica knows nodes and reservations, as after a start or when the bus was away.

        Raises:
            TimedOut: it does not get to know them.
        """
        if self._settled.is_set() and self._nodes.synced.is_set() and self._ledgers.synced.is_set():
            return
        try:
            async with asyncio.timeout(READY_S):
                await self._nodes.synced.wait()
                await self._ledgers.synced.wait()
                await self._settled.wait()
        except TimeoutError:
            raise TimedOut(self.unready() or "the bus was away") from None

    async def _ask_for_use(self) -> None:
        """At the start: asks the nodes of whose GPUs no use was heard yet. Each announces itself and then says."""
        await self._nodes.synced.wait()
        silent = self._known.without_use()
        for at in range(0, len(silent), DISCOVER_NODES):
            with contextlib.suppress(BusError):
                await self._bus.publish(nodes.DISCOVER, Discover(node_ids=silent[at : at + DISCOVER_NODES]))
            await asyncio.sleep(0.02)
        for _ in range(round(USE_S / USE_LOOK_S)):
            if not self._known.without_use():
                break
            await asyncio.sleep(USE_LOOK_S)
        self._settled.set()

    async def _count_forever(self) -> None:
        while True:
            now = time.time()
            sums = dict.fromkeys(("total", "reserved", "external", "free"), 0)
            for room in self._known.rooms(now):
                sums["total"] += room.total_mb
                sums["reserved"] += room.reserved_mb
                sums["external"] += room.external_mb
                sums["free"] += sum(max(0, free) for free in room.free_mb)
            for state, mb in sums.items():
                MEMORY.labels(state).set(mb * 2**20)
            RESERVATIONS.set(sum(1 for _ in self._known.grants(now)))
            await asyncio.sleep(GAUGES_S)


def _page(items: list[Any], limit: int) -> list[Any]:
    """As many of *items* as may be asked for and fit a message."""
    page: list[Any] = []
    left = PAGE_BYTES_MAX
    for item in items[:limit]:
        left -= len(encode(item))
        if left < 0 and page:
            break
        page.append(item)
    return page


def _bad(field: str, reason: str) -> Refused:
    return Refused(code="bad_request", reason=reason, field=field)


def _not_found(field: str, reason: str) -> Refused:
    return Refused(code="not_found", reason=reason, field=field, status=404)


def _no_reservation(reservation_id: str) -> Refused:
    return _not_found("reservation_id", f"no reservation {reservation_id!r}: it has ended, or never was")
