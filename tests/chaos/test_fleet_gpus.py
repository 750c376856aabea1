"""GPU memory of a thousand nodes is reserved and released while everything that keeps the books is killed.

Goal: what was granted stands until it is released, what was released is gone, and nothing is granted twice,
whoever is killed in between; what is bound to the life of a node ends with it, and nothing else does.
Method: real processes and simulated nodes; clients that reserve and release without pause, each asking again
under the same id until it is answered, as a careful program would. What they were told is compared with what
is listed, field by field.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from computemesh.bus import Bus, BusError
from computemesh.contracts import gpus
from computemesh.contracts.base import Message, Refused, Request, Role
from computemesh.contracts.gpus import (
    EndReason,
    GpuCanFit,
    GpuList,
    GpuRelease,
    GpuReleased,
    GpuReservation,
    GpuReservations,
    GpuReserve,
    GpuStates,
    GpuStatesQuery,
)
from computemesh.testing import until
from computemesh.testing.fleet import H100, MIX
from tests.chaos.watch import SLACK, WHOLE_S, Watch, kill_and_wait, watched_fleet

CLIENTS: Final = 8
CHURN: Final = 50
"""Reservations and releases that must be answered between two deeds."""

FULL: Final = 0.25
"""How full the GPUs are of what nobody reserved."""

PER_GPU_MB: Final = 20_000
"""Three of these fit beside what is used of an H100, and no fourth."""

DEEDS: Final = ("gpu-orchestrator", "node-registry", "nats-server", "gpu-orchestrator")
SILENT: Final = 100
"""Nodes that fall silent in the end; a tenth have H100s."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


class Clients:
    """Programs that reserve GPU memory of the H100 nodes and release it, and note what they were told."""

    def __init__(self, bus: Bus, node_ids: list[str]) -> None:
        self.held: dict[str, GpuReservation] = {}
        self.answered = 0
        self.refused = 0
        self._bus = bus
        self._node_ids = node_ids
        self._number = 0
        self._going = True

    async def go(self, seed: int) -> None:
        """One client, until told to stop."""
        chance = random.Random(seed)
        mine: list[str] = []
        while self._going:
            if mine and chance.random() < 0.45:
                released = mine.pop(chance.randrange(len(mine)))
                await ask_until_answered(self._bus, gpus.RELEASE, GpuRelease(reservation_id=released))
                del self.held[released]
            else:
                self._number += 1
                first = chance.randrange(H100.gpus)
                want = GpuReserve(
                    reservation_id=f"r{self._number}",
                    node_id=chance.choice(self._node_ids),
                    gpu_indices=sorted({first, chance.randrange(H100.gpus)}),
                    required_mb=PER_GPU_MB,
                    timeout_seconds=3600,
                    owner=f"client-{seed}",
                )
                answer = await ask_until_answered(self._bus, gpus.RESERVE, want)
                if isinstance(answer, GpuReservation):
                    mine.append(answer.reservation_id)
                    self.held[answer.reservation_id] = answer
                else:
                    assert answer.code == "no_room", answer
                    self.refused += 1
            self.answered += 1

    def stop(self) -> None:
        """Each client ends after what it is doing."""
        self._going = False


async def ask_until_answered(bus: Bus, request: Request[Q, R], question: Q) -> R | Refused:
    """Asks again while nobody answers, or who answers cannot decide now."""
    while True:
        with contextlib.suppress(BusError):
            answer = await bus.ask(request, question, timeout_s=1.0)
            if not isinstance(answer, Refused) or answer.status != 503:
                return answer
        await asyncio.sleep(0.05)


async def listed(bus: Bus) -> dict[str, GpuReservation]:
    """Every reservation that stands, by id.

    Raises:
        BusError: nobody answers.
    """
    found: dict[str, GpuReservation] = {}
    page = GpuReservations(reservations=[], count=0)
    while not found or page.next:
        answer = await bus.ask(gpus.LIST, GpuList(limit=1000, after=page.next), timeout_s=1.0)
        if isinstance(answer, Refused):
            raise BusError(answer.reason)
        page = answer
        found |= {one.reservation_id: one for one in page.reservations}
        if not page.count:
            break
    return found


async def seconds_until_listed(bus: Bus, wanted: dict[str, GpuReservation]) -> float:
    """How long it takes until exactly these are listed, to the last field."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < 4 * WHOLE_S:
        with contextlib.suppress(BusError):
            if await listed(bus) == wanted:
                break
        await asyncio.sleep(0.05)
    return time.monotonic() - began_s


async def overdrawn(bus: Bus) -> list[str]:
    """GPUs of which more is reserved and used than there is."""
    found: list[str] = []
    page = GpuStates(nodes=[], count=0)
    while True:
        answer = await bus.ask(gpus.STATES, GpuStatesQuery(limit=1000, after=page.next))
        assert isinstance(answer, GpuStates), answer
        page = answer
        found += [
            f"{node.node_id}/{gpu.index}: {gpu}"
            for node in page.nodes
            for gpu in node.gpus
            if gpu.over_mb or gpu.reserved_mb + gpu.external_mb > gpu.total_mb
        ]
        if not page.next:
            return found


async def test_no_reservation_is_lost_and_none_is_granted_twice_whoever_is_killed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Orchestrator, registry, server, orchestrator again; then a hundred nodes are truly lost."""
    services = ("node-registry", "gpu-orchestrator")
    async with watched_fleet(tmp_path, services, loads=(FULL,)) as watch:
        bus = await watch.mesh.bus()
        ended: Counter[tuple[str, EndReason]] = Counter()

        async def on_released(released: GpuReleased) -> None:
            ended[released.reservation_id, released.reason] += 1

        await (await watch.mesh.bus(Role.SERVICES)).subscribe(gpus.RELEASED, on_released)
        factories = [node_id for number, node_id in enumerate(watch.fleet.node_ids) if MIX[number % len(MIX)] is H100]
        bound = [await reserve_bound(watch, bus, node_id) for node_id in factories]
        clients = Clients(bus, factories[SILENT // 10 - 2 :][:4])  # Two of them are lost in the end.
        going = [asyncio.create_task(clients.go(seed)) for seed in range(CLIENTS)]
        for name in DEEDS:
            goal = clients.answered + CHURN
            await until(lambda: clients.answered >= goal, what=f"{CHURN} answers before {name} is killed")  # noqa: B023
            await kill_and_wait(watch, name)
            began_s = time.monotonic()
            goal = clients.answered + CHURN
            await until(lambda: clients.answered >= goal, what=f"answers after {name} was killed\n{watch.story()}")  # noqa: B023
            took_s = time.monotonic() - began_s
            record_property(f"s until {CHURN} answers after {name} was back", round(took_s, 2))
            assert took_s < WHOLE_S * SLACK, name
        clients.stop()
        await asyncio.wait_for(asyncio.gather(*going), 30)
        standing = {**{one.reservation_id: one for one in bound}, **clients.held}
        assert await seconds_until_listed(bus, standing) < WHOLE_S, difference(await listed(bus), standing)
        assert not await overdrawn(bus)
        assert {reason for _, reason in ended} == {EndReason.RELEASED}
        assert not watch.told, "no node was lost"
        record_property("answers", clients.answered)
        record_property("refused for want of room", clients.refused)

        silent = set(watch.fleet.node_ids[:SILENT])
        watch.fleet.silence(silent)
        gone = {one.reservation_id for one in bound if one.node_id in silent}
        await until(
            lambda: {i for i, why in ended if why is EndReason.OWNER_GONE} >= gone, what="the end of what was bound"
        )
        await until(lambda: set(watch.told) == silent, what="the losses")
        standing = {one_id: one for one_id, one in standing.items() if one_id not in gone}
        assert await seconds_until_listed(bus, standing) < WHOLE_S, difference(await listed(bus), standing)
        assert {i for i, why in ended if why is not EndReason.RELEASED} == gone
        assert set(ended.values()) == {1}, "an end was told twice"

        await watch.fleet.restart(silent)
        ask = GpuCanFit(required_mb=PER_GPU_MB, gpu_count=1, node_id=factories[0])
        while not (fit := await ask_until_answered(bus, gpus.CAN_FIT, ask)) or not getattr(fit, "can_fit", False):
            await asyncio.sleep(0.05)


async def reserve_bound(watch: Watch, bus: Bus, node_id: str) -> GpuReservation:
    """A reservation that ends with the present life of a node."""
    want = GpuReserve(
        node_id=node_id,
        gpu_indices=[0, 1],
        required_mb=PER_GPU_MB,
        timeout_seconds=3600,
        owner="bound",
        session=watch.fleet.session(node_id),
    )
    answer = await bus.ask(gpus.RESERVE, want)
    assert isinstance(answer, GpuReservation), answer
    return answer


def difference(found: dict[str, GpuReservation], wanted: dict[str, GpuReservation]) -> str:
    """What is wrong, in a few lines."""
    lines = [f"{one} is missing: {wanted[one]}" for one in wanted.keys() - found.keys()]
    lines += [f"{one} is too many: {found[one]}" for one in found.keys() - wanted.keys()]
    lines += [
        f"{one} was {wanted[one]}, is {found[one]}" for one in wanted.keys() & found.keys() if wanted[one] != found[one]
    ]
    return "\n".join(lines[:10])
