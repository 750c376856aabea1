"""GPU memory of attempts: reserved before they are delivered, renewed while they are out, released when they end.

An attempt's reservations have ids that follow from it, so asking again, here or in a successor, is the same
reservation. Only an end that is stored releases them. What this marshaller misses, the ledger ends by itself: they are
bound to the work item and to the node's session, and run out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from msgspec.structs import replace

from computemesh import log, trace
from computemesh.bus import Bus, BusError, NoResponder
from computemesh.contracts import gpus
from computemesh.contracts.base import Refused
from computemesh.contracts.gpus import GpuList, GpuRelease, GpuRenew, GpuReservation
from computemesh.contracts.nodes import NodeRecord
from computemesh.contracts.work import WorkRecord
from computemesh.tasks import end_all
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.grants import reservation_id, terms, wants_gpus

ASKED_MAX: Final = 3
"""Times that the gpu-orchestrator is asked before it counts as away."""

AGAIN_S: Final = 1.0
"""Pause before it is asked again when it did not answer."""

LOOK_S: Final = 1.0
"""How often it is looked for reservations to renew."""

RENEWED_PART: Final = 1 / 3
"""Share of its time after which a reservation is renewed."""

TOGETHER_MAX: Final = 32
"""Requests under way at a time."""

AWAY: Final = "no gpu-orchestrator answers, so no GPU can be had"

Granted = Callable[[WorkRecord, Mapping[int, GpuReservation]], Awaitable[None]]
Declined = Callable[[WorkRecord, int, Refused], Awaitable[None]]

_log = log.get("reservations")


@dataclass(slots=True)
class Hold:
    """A reservation that is to stand."""

    record: WorkRecord
    replica: int
    due: float
    """Unix seconds at which it is renewed next."""
    indices: list[int]
    """Its GPUs; empty when a predecessor reserved them and it was not renewed yet."""


class Reservations:
    """The reservations of all attempts that are out.

    Args:
        node_of: a node's record; None when it is gone.
        certain: whether this marshaller surely acts.
        on_granted: called once all that an attempt needs is reserved, with the reservations by replica.
        on_refused: called otherwise, with the replica that could not have it.
        on_away: called with the reason when nobody reserves, and with nothing once somebody does.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        node_of: Callable[[str], NodeRecord | None],
        certain: Callable[[], bool],
        on_granted: Granted,
        on_refused: Declined,
        on_away: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._node_of = node_of
        self._certain = certain
        self._on_granted = on_granted
        self._on_refused = on_refused
        self._on_away = on_away
        self._holds: dict[str, Hold] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._together = asyncio.Semaphore(TOGETHER_MAX)
        self._away = False

    def start(self) -> None:
        self._run(self._renew_forever())

    async def stop(self) -> None:
        """Leaves what is reserved to whoever acts next."""
        await end_all(self._tasks)

    # --- what the journal stored ---------------------------------------------------------------------------------

    def adopt(self, record: WorkRecord) -> None:
        """A record that a predecessor left: renews what is out, and releases what an earlier attempt may still have."""
        if not wants_gpus(record.requirements) or record.attempt == 0:
            return
        for replica, _ in workitem.places(record):
            self._hold(record, replica, now=0.0)
        last = record.attempt - 1 if record.state in workitem.OUT else record.attempt
        for replica in range(record.replicas if last else 0):
            self._run(self._release(reservation_id(record.work_id, last, replica)))

    def stored(self, before: WorkRecord | None, record: WorkRecord) -> None:
        """*record* stands in place of *before*: what only that one had is released."""
        if before is None or not wants_gpus(record.requirements):
            return
        kept = set(_ids(record))
        for gone in _ids(before):
            if gone not in kept:
                self._holds.pop(gone, None)
                self._run(self._release(gone))

    # --- an attempt ------------------------------------------------------------------------------------------------

    def reserve(self, record: WorkRecord) -> None:
        """Has all reserved that the attempt needs, and says then that it may be delivered."""
        for replica, _ in workitem.places(record):
            self._hold(record, replica, now=time.time() + AGAIN_S * ASKED_MAX * 10)
        self._run(self._reserve(record))

    async def _reserve(self, record: WorkRecord) -> None:
        with trace.within(record.traceparent, record.work_id):
            places = workitem.places(record)
            answers = await asyncio.gather(*(self._reserved(record, *place) for place in places))
        granted: dict[int, GpuReservation] = {}
        refused: tuple[int, Refused] | None = None
        for (replica, _), answer in zip(places, answers, strict=True):
            if isinstance(answer, Refused):
                refused = refused or (replica, answer)
                continue
            granted[replica] = answer
            hold = self._holds.get(answer.reservation_id)
            if hold is None:  # Its end was stored meanwhile.
                self._run(self._release(answer.reservation_id))
            else:
                self._renewed(hold, answer)
        if refused:
            await self._on_refused(record, *refused)
        else:
            await self._on_granted(record, granted)

    async def _reserved(self, record: WorkRecord, replica: int, node_id: str) -> GpuReservation | Refused:
        node = self._node_of(node_id)
        if node is None:
            return Refused(code="not_found", reason=f"node {node_id} is gone", status=404)
        ask = terms(record, replica, node)
        for time_asked in range(1, ASKED_MAX + 1):
            try:
                async with self._together:
                    answer = await self._bus.ask(gpus.RESERVE, ask)
            except BusError as error:
                _log.warning("a reservation was not answered", reservation=ask.reservation_id, reason=str(error))
                if time_asked < ASKED_MAX:
                    # A timeout was pause enough.
                    await asyncio.sleep(AGAIN_S if isinstance(error, NoResponder) else 0.0)
                continue
            return answer
        self._look_out()
        return Refused(code="unavailable", reason=AWAY, status=503)

    def _look_out(self) -> None:
        """Nobody reserves: asks from time to time whether somebody does."""
        if not self._away:
            self._away = True
            self._on_away(AWAY)
            self._run(self._wait_for_ledger())

    async def _wait_for_ledger(self) -> None:
        _log.warning("items that need GPUs wait", reason=AWAY)
        while self._away:
            await asyncio.sleep(AGAIN_S)
            try:
                await self._bus.ask(gpus.LIST, GpuList(limit=1))
            except BusError:
                continue
            self._away = False
        _log.info("a gpu-orchestrator answers again")
        self._on_away("")

    # --- while it is out -------------------------------------------------------------------------------------------

    def _hold(self, record: WorkRecord, replica: int, *, now: float) -> None:
        key = reservation_id(record.work_id, record.attempt, replica)
        self._holds[key] = Hold(record, replica, now, [])

    def _renewed(self, hold: Hold, reservation: GpuReservation) -> None:
        hold.due = time.time() + reservation.timeout_seconds * RENEWED_PART
        hold.indices = [share.index for share in reservation.gpus]

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._certain():
                continue  # What is out may have been given to others by a successor.
            now = time.time()
            due = [key for key, hold in self._holds.items() if hold.due <= now]
            await asyncio.gather(*map(self._renew, due))

    async def _renew(self, key: str) -> None:
        hold = self._holds.get(key)
        if hold is None:
            return
        try:
            async with self._together:
                answer = await self._bus.ask(gpus.RENEW, GpuRenew(reservation_id=key))
                if isinstance(answer, Refused) and answer.code == "not_found" and key in self._holds:
                    answer = await self._again(hold)
        except BusError as error:
            _log.warning("a reservation could not be renewed", reservation=key, reason=str(error))
            return
        if isinstance(answer, GpuReservation):
            self._renewed(hold, answer)
            if key not in self._holds:
                self._run(self._release(key))
        elif key in self._holds:
            hold.due = time.time() + AGAIN_S * 10
            _log.warning("a reservation ended before its attempt", reservation=key, reason=answer.reason)

    async def _again(self, hold: Hold) -> GpuReservation | Refused:
        """It ran out while nobody could renew it, and the attempt goes on: the same GPUs, if nobody has them."""
        node_id = dict(workitem.places(hold.record)).get(hold.replica, "")
        node = self._node_of(node_id)
        if node is None or not hold.indices:
            return Refused(code="not_found", reason="it has run out", status=404)
        same = replace(terms(hold.record, hold.replica, node), gpu_indices=hold.indices)
        return await self._bus.ask(gpus.RESERVE, same)

    async def _release(self, key: str) -> None:
        for _ in range(ASKED_MAX):
            try:
                async with self._together:
                    answer = await self._bus.ask(gpus.RELEASE, GpuRelease(reservation_id=key))
            except BusError:
                await asyncio.sleep(AGAIN_S)
                continue
            if not isinstance(answer, Refused) or answer.code != "busy":
                return
        _log.info("a reservation is left to run out", reservation=key)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a reservation met a defect", exc_info=error)


def _ids(record: WorkRecord) -> list[str]:
    """The reservations that an attempt should have."""
    return [reservation_id(record.work_id, record.attempt, replica) for replica, _ in workitem.places(record)]
