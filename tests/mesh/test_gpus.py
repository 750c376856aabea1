"""The gpu-orchestrator as processes on a real server: what it grants, what ends it, and that nothing is granted twice.

Nodes are the test's own: they announce made-up GPUs and say in heartbeats what is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import pytest

from computemesh.bus import Bucket, Bus, BusError
from computemesh.bus.connection import read_answer
from computemesh.contracts import gpus, nodes, storage
from computemesh.contracts.base import Message, Refused, Request, Role, decode, encode
from computemesh.contracts.gpus import (
    EndReason,
    GpuCanFit,
    GpuFit,
    GpuGet,
    GpuList,
    GpuPressure,
    GpuRelease,
    GpuReleased,
    GpuRenew,
    GpuReservation,
    GpuReservations,
    GpuReserve,
    GpuReserved,
    GpuState,
    GpuStates,
    GpuStatesQuery,
    MemoryKind,
    PressureLevel,
)
from computemesh.contracts.nodes import Discover, NodeAnnouncement, NodeHeartbeat
from computemesh.contracts.work import WorkItem
from computemesh.hardware import Gpu, GpuLink, GpuProcess, GpuUse, LinkKind, Memory
from computemesh.testing import DirectNode, RunningMesh, running_mesh, until

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

SERVICES: Final = ("node-registry", "gpu-orchestrator")
PATIENT: Final = {"COMPUTEMESH_SUSPECT_AFTER_S": "100", "COMPUTEMESH_LOST_AFTER_S": "200"}
"""Nodes of these tests speak only when they have something to say."""


class GpuNode:
    """A node that says of its GPUs what a test wants."""

    def __init__(self, bus: Bus, node_id: str, cards: list[Gpu], links: list[GpuLink] | None = None) -> None:
        self.node_id = node_id
        self.session = "s1"
        self.cards = cards
        self.links = links or []
        self.used: dict[int, list[tuple[str, int]]] = {}
        """Processes of each GPU: (reservation, MiB)."""
        self.available_mb: int | None = None
        self._bus = bus

    async def join(self) -> None:
        await self._bus.subscribe(nodes.DISCOVER, self._on_discover)
        said = await self._bus.ask(nodes.REGISTER, self._announcement())
        assert not isinstance(said, Refused), said
        await self.beat()

    async def beat(self) -> None:
        uses = [
            GpuUse(
                index=card.index,
                uuid=card.uuid,
                vram_used_mb=sum(mb for _, mb in self.used.get(card.index, [])),
                processes=[
                    GpuProcess(pid=pid, memory_mb=mb, reservation_id=rid)
                    for pid, (rid, mb) in enumerate(self.used.get(card.index, []), 100)
                ],
            )
            for card in self.cards
        ]
        said = NodeHeartbeat(
            node_id=self.node_id, session=self.session, gpus=uses, memory_available_mb=self.available_mb
        )
        await self._bus.publish(nodes.HEARTBEAT, said)
        await self._bus.flush()

    async def _on_discover(self, ask: Discover) -> None:
        if not ask.node_ids or self.node_id in ask.node_ids:
            await self._bus.publish(nodes.ANNOUNCE, self._announcement())
            await self.beat()

    def _announcement(self) -> NodeAnnouncement:
        return NodeAnnouncement(
            node_id=self.node_id,
            session=self.session,
            gpus=self.cards,
            gpu_links=self.links,
            memory=Memory(total_mb=64_000, available_mb=60_000),
        )


def cards(count: int, mb: int = 81_920, node_id: str = "n1") -> list[Gpu]:
    return [
        Gpu(index=n, uuid=f"GPU-{node_id}-{n}", name="H100", vram_total_mb=mb, compute_capability="9.0")
        for n in range(count)
    ]


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """Two replicas, and quotas for some."""
    settings = {**PATIENT, "COMPUTEMESH_GPU_QUOTAS": "carol=100000,dave=50000", "COMPUTEMESH_RESERVATION_MAX_S": "3600"}
    async with running_mesh(tmp_path, SERVICES, copies={"gpu-orchestrator": 2}, environment=settings) as running:
        yield running


@pytest.fixture
async def node(mesh: RunningMesh) -> GpuNode:
    """Four GPUs of 80 GiB, two and two joined by NVLink, known to both replicas."""
    links = [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=18), GpuLink(a=2, b=3, kind=LinkKind.NVLINK, lanes=18)]
    made = GpuNode(await mesh.bus(Role.NODE), "n1", cards(4), links)
    await made.join()
    await everywhere(mesh, lambda states: states.count == 1 and states.nodes[0].heard_at is not None)
    return made


def edges(mesh: RunningMesh) -> list[str]:
    """The HTTP edges of all replicas."""
    services = [service for service in mesh.supervisor.services if service.name.startswith("gpu-orchestrator")]
    return [service.status.http for service in services if service.status.state == "ready"]


async def everywhere(mesh: RunningMesh, holds: Callable[[GpuStates], Any]) -> None:
    """Waits until every replica shows what is awaited."""
    async with httpx.AsyncClient() as http:
        for edge in edges(mesh):
            async with asyncio.timeout(20):
                while not holds(states_in(await http.get(f"{edge}/api/v1/gpu/states"))):
                    await asyncio.sleep(0.05)


def states_in(answer: httpx.Response) -> GpuStates:
    found = decode(answer.content, GpuStates)
    assert not isinstance(found, Refused), found
    return found


async def state(bus: Bus, index: int = 0) -> GpuState:
    """A GPU of n1 as one of the replicas sees it."""
    found = await bus.ask(gpus.STATES, GpuStatesQuery(node_id="n1"))
    assert isinstance(found, GpuStates), found
    return next(gpu for gpu in found.nodes[0].gpus if gpu.index == index)


async def reserved(bus: Bus, **terms: Any) -> GpuReservation:
    answer = await bus.ask(gpus.RESERVE, GpuReserve(**terms))
    assert isinstance(answer, GpuReservation), answer
    return answer


async def refused(bus: Bus, **terms: Any) -> Refused:
    answer = await bus.ask(gpus.RESERVE, GpuReserve(**terms))
    assert isinstance(answer, Refused), answer
    return answer


async def persistent(
    bus: Bus,
    request: Request[Q, R],
    question: Q,
    *,
    retry: tuple[str, ...] = ("unavailable", "busy"),
    on_repeat: Callable[[], object] = lambda: None,
) -> R | Refused:
    """The answer, however often it takes to get one."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(BusError):
                answer = await bus.ask(request, question)
                if not isinstance(answer, Refused) or answer.code not in retry:
                    return answer
            on_repeat()
            await asyncio.sleep(0.05)


async def persistent_reserve(bus: Bus, ask: GpuReserve) -> GpuReservation | Refused:
    return await persistent(bus, gpus.RESERVE, ask)


async def test_the_documented_calls_work_as_printed(mesh: RunningMesh, node: GpuNode) -> None:
    """Reserve, states, can-fit and release over HTTP, with bodies as other systems send them."""
    async with httpx.AsyncClient(base_url=edges(mesh)[0]) as http:
        body = {"gpu_indices": [0, 1], "required_mb": 24576, "timeout_seconds": 300}
        reservation = (await http.post("/api/v1/gpu/reserve", json=body)).raise_for_status().json()
        assert (reservation["node_id"], reservation["total_mb"]) == ("n1", 49152)
        assert [share["index"] for share in reservation["gpus"]] == [0, 1]
        states = (await http.get("/api/v1/gpu/states")).raise_for_status().json()
        assert [gpu["free_mb"] for gpu in states["nodes"][0]["gpus"]] == [57344, 57344, 81920, 81920]
        body = {"required_mb": 24576, "gpu_count": 2, "prefer_nvlink": True}
        fit = (await http.post("/api/v1/gpu/can-fit", json=body)).raise_for_status().json()
        assert (fit["can_fit"], [share["index"] for share in fit["gpus"]]) == (True, [0, 1])
        path = f"/api/v1/gpu/reservations/{reservation['reservation_id']}"
        assert (await http.post(f"{path}/renew", json={"timeout_seconds": 600})).json()["timeout_seconds"] == 600
        assert (await http.get(path)).json()["timeout_seconds"] == 600
        assert (await http.delete(path)).raise_for_status().json()["reason"] == "released"
        again = await http.delete(path)
        assert (again.status_code, again.json()["code"]) == (404, "not_found")


async def test_what_is_asked_wrongly_is_refused_with_its_field(mesh: RunningMesh, node: GpuNode) -> None:
    """On the bus and over HTTP alike."""
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"required_mb": 0}, "bad_message", "required_mb"),
        ({"required_mb": -5}, "bad_message", "required_mb"),
        ({"required_mb": 1.5}, "bad_message", "required_mb"),
        ({}, "bad_message", "required_mb"),
        ({"required_mb": 1, "timeout_seconds": 0}, "bad_message", "timeout_seconds"),
        ({"required_mb": 1, "timeout_seconds": -1}, "bad_message", "timeout_seconds"),
        ({"required_mb": 1, "timeout_seconds": 31_536_000}, "bad_message", "timeout_seconds"),
        ({"required_mb": 1, "timeout_seconds": 7200}, "bad_timeout", "timeout_seconds"),
        ({"required_mb": 1, "min_tier": "BEST"}, "bad_message", "min_tier"),
        ({"required_mb": 1, "min_compute_capability": "new"}, "bad_request", "min_compute_capability"),
        ({"required_mb": 1, "gpu_indices": [1, 1]}, "bad_request", "gpu_indices"),
        ({"required_mb": 1, "gpu_indices": [0], "gpu_count": 2}, "bad_request", "gpu_count"),
        ({"required_mb": 1, "session": "s1"}, "bad_request", "node_id"),
        ({"required_mb": 1, "node_id": "n9"}, "not_found", "node_id"),
        ({"required_mb": 1, "node_id": "n.1"}, "bad_message", "node_id"),
        ({"required_mb": 1, "node_id": "n1", "gpu_indices": [0, 9]}, "not_found", "gpu_indices"),
        ({"required_mb": 1, "gpu_indices": [9]}, "impossible", "gpu_indices"),
        ({"required_mb": 81_921}, "impossible", "required_mb"),
        ({"required_mb": 1, "gpu_count": 5}, "impossible", "gpu_count"),
        ({"required_mb": 1, "gpu_count": 3, "require_nvlink": True}, "impossible", "require_nvlink"),
        ({"required_mb": 1, "node_id": "n1", "session": "s0"}, "wrong_session", "session"),
    ]
    bus = await mesh.bus()
    async with httpx.AsyncClient(base_url=edges(mesh)[0]) as http:
        for terms, code, field in wrong:
            over_http = (await http.post("/api/v1/gpu/reserve", json=terms)).json()
            assert (over_http["code"], over_http["field"]) == (code, field), (terms, over_http)
            reply = await bus.call(gpus.RESERVE.subject, encode(terms))
            answer = read_answer(gpus.RESERVE, reply.data, reply.headers)
            assert isinstance(answer, Refused)
            assert (answer.code, answer.field) == (code, field), (terms, answer)
        bad = await http.post(
            "/api/v1/gpu/reserve", content=b'{"required_mb": NaN}', headers={"content-type": "application/json"}
        )
        assert bad.status_code == 400
    assert (await state(bus)).reserved_mb == 0


async def test_memory_of_others_counts_and_that_of_the_holder_does_not_twice(mesh: RunningMesh, node: GpuNode) -> None:
    """As soon as a heartbeat tells of it."""
    bus = await mesh.bus()
    got = await reserved(bus, required_mb=40_000, node_id="n1", gpu_indices=[0])
    node.used[0] = [(got.reservation_id, 30_000), ("", 10_000)]
    await node.beat()
    await everywhere(mesh, lambda states: states.nodes[0].gpus[0].used_mb == 40_000)
    gpu = await state(bus)
    assert (gpu.reserved_mb, gpu.external_mb, gpu.free_mb) == (40_000, 10_000, 31_920)
    assert (gpu.reservations[0].reservation_id, gpu.reservations[0].used_mb) == (got.reservation_id, 30_000)
    answer = await refused(bus, required_mb=31_921, node_id="n1", gpu_indices=[0])
    assert (answer.code, answer.retry) == ("no_room", "later")
    assert "31920 of 81920 MiB free, needs 31921" in answer.reason
    await reserved(bus, required_mb=31_920, node_id="n1", gpu_indices=[0])


async def test_the_same_id_is_the_same_reservation_wherever_it_is_asked_for(mesh: RunningMesh, node: GpuNode) -> None:
    """At once, many times, of any replica; with other terms it is a conflict."""
    second = GpuNode(await mesh.bus(Role.NODE, "n2"), "n2", cards(4, node_id="n2"))
    await second.join()
    await everywhere(mesh, lambda states: states.count == 2)
    bus = await mesh.bus()
    for number in range(10):
        terms: dict[str, Any] = {"required_mb": 1_000, "reservation_id": f"mine-{number}"}
        ask = GpuReserve(**terms)
        answers = await asyncio.gather(*map(persistent_reserve, [bus] * 20, [ask] * 20))
        assert all(answer == answers[0] and isinstance(answer, GpuReservation) for answer in answers), answers
        other = await refused(bus, **{**terms, "required_mb": 2_000})
        assert (other.code, other.field) == ("conflict", "reservation_id")
    found = await bus.ask(gpus.LIST, GpuList())
    assert isinstance(found, GpuReservations)
    assert found.count == 10


async def test_reservations_are_listed_by_page_owner_and_node(mesh: RunningMesh, node: GpuNode) -> None:
    """Observers may look."""
    bus, observer = await mesh.bus(), await mesh.bus(Role.OBSERVER)
    mine = {(await reserved(bus, required_mb=100, owner="alice")).reservation_id for _ in range(5)}
    await reserved(bus, required_mb=100, owner="bob")
    seen: list[str] = []
    after = ""
    while True:
        page = await observer.ask(gpus.LIST, GpuList(owner="alice", limit=2, after=after))
        assert isinstance(page, GpuReservations)
        assert page.count == 5
        seen += [one.reservation_id for one in page.reservations]
        after = page.next
        if not after:
            break
    assert seen == sorted(mine)
    nowhere = await observer.ask(gpus.LIST, GpuList(node_id="n2"))
    assert isinstance(nowhere, GpuReservations)
    assert nowhere.count == 0


async def test_what_is_not_renewed_ends_and_everybody_hears_of_it(mesh: RunningMesh, node: GpuNode) -> None:
    """Within about a second, with the reason."""
    bus, observer = await mesh.bus(), await mesh.bus(Role.OBSERVER)
    began: list[GpuReserved] = []
    ended: list[GpuReleased] = []

    async def on_reserved(fact: GpuReserved) -> None:
        began.append(fact)

    async def on_released(fact: GpuReleased) -> None:
        ended.append(fact)

    await observer.subscribe(gpus.RESERVED, on_reserved)
    await observer.subscribe(gpus.RELEASED, on_released)
    await observer.flush()
    short = await reserved(bus, required_mb=100, timeout_seconds=0.5)
    long = await reserved(bus, required_mb=100, timeout_seconds=0.5)
    await bus.ask(gpus.RENEW, GpuRenew(reservation_id=long.reservation_id, timeout_seconds=60))
    await until(lambda: ended, what="the end of what was not renewed")
    assert (ended[0].reservation_id, ended[0].reason) == (short.reservation_id, EndReason.EXPIRED)
    assert ended[0].released_at - short.expires_at < 5
    await bus.ask(gpus.RELEASE, GpuRelease(reservation_id=long.reservation_id))
    await until(lambda: len(ended) == 2, what="the end of what was released")
    assert ended[1].reason is EndReason.RELEASED
    assert [fact.reservation_id for fact in began] == [short.reservation_id, long.reservation_id]
    gone = await bus.ask(gpus.RENEW, GpuRenew(reservation_id=short.reservation_id))
    assert isinstance(gone, Refused)
    assert gone.code == "not_found"


async def test_a_reservation_ends_with_the_life_of_the_node_it_is_bound_to(mesh: RunningMesh, node: GpuNode) -> None:
    """One that is not bound stays."""
    bus = await mesh.bus()
    bound = await reserved(bus, required_mb=100, node_id="n1", session="s1")
    free = await reserved(bus, required_mb=100, node_id="n1")
    node.session = "s2"
    await node.join()

    async def gone() -> bool:
        return isinstance(await bus.ask(gpus.GET, GpuGet(reservation_id=bound.reservation_id)), Refused)

    async with asyncio.timeout(20):
        while not await gone():
            await asyncio.sleep(0.05)
    assert await bus.ask(gpus.GET, GpuGet(reservation_id=free.reservation_id)) == free


async def test_quotas_hold_over_nodes_and_replicas_whatever_races(mesh: RunningMesh, node: GpuNode) -> None:
    """Each owner has its own; who has none has what there is."""
    second = GpuNode(await mesh.bus(Role.NODE, "n2"), "n2", cards(4, node_id="n2"))
    await second.join()
    await everywhere(mesh, lambda states: states.count == 2)
    bus = await mesh.bus()

    async def one(number: int) -> Any:
        owner = ("carol", "dave")[number % 2]
        ask = GpuReserve(required_mb=9_000, owner=owner, node_id=("n1", "n2")[number % 3 % 2])
        return owner, await persistent(bus, gpus.RESERVE, ask)

    answers = await asyncio.gather(*(one(number) for number in range(60)))
    granted = Counter(owner for owner, answer in answers if isinstance(answer, GpuReservation))
    assert granted == {"carol": 11, "dave": 5}
    assert {answer.code for _, answer in answers if isinstance(answer, Refused)} == {"quota_exceeded"}
    fit = await bus.ask(gpus.CAN_FIT, GpuCanFit(required_mb=9_000, owner="dave"))
    assert isinstance(fit, GpuFit)
    assert (fit.can_fit, fit.counts) == (False, {"quota": 1})
    await reserved(bus, required_mb=5_000, owner="dave")
    await reserved(bus, required_mb=60_000, owner="alice")


async def test_memory_that_was_promised_and_taken_by_others_is_told(mesh: RunningMesh, node: GpuNode) -> None:
    """And RAM that leaks, before it is gone; each once."""
    bus, observer = await mesh.bus(), await mesh.bus(Role.OBSERVER)
    told: list[GpuPressure] = []

    async def on_pressure(fact: GpuPressure) -> None:
        told.append(fact)

    await observer.subscribe(gpus.PRESSURE, on_pressure)
    await observer.flush()
    await reserved(bus, required_mb=70_000, node_id="n1", gpu_indices=[2])
    node.used[2] = [("", 20_000)]
    await node.beat()
    await until(lambda: told, what="the pressure on the GPU")
    assert (told[0].kind, told[0].level, told[0].index, told[0].over_mb) == (
        MemoryKind.VRAM,
        PressureLevel.OVER,
        2,
        8_080,
    )
    node.used.clear()
    for step in range(16):
        node.available_mb = 60_000 - 3_000 * step
        await node.beat()
        await asyncio.sleep(0.2)
    await until(lambda: [fact for fact in told if fact.kind is MemoryKind.RAM], what="the pressure on RAM")
    ram = next(fact for fact in told if fact.kind is MemoryKind.RAM)
    assert ram.oom_in_s is not None
    assert ram.available_mb > 0
    levels = [(fact.kind, fact.level) for fact in told]
    assert levels.count((MemoryKind.VRAM, PressureLevel.OVER)) == 1
    assert (MemoryKind.VRAM, PressureLevel.OK) in levels


async def test_nothing_is_lost_or_granted_twice_while_replicas_and_the_server_are_killed(
    mesh: RunningMesh, node: GpuNode
) -> None:
    """64 clients reserve, repeat what was not answered, and release; all is killed under them, the server too."""
    bus = await mesh.bus()
    stop = asyncio.Event()
    kept: dict[str, GpuReservation] = {}
    done = Counter[str]()
    overfull: list[str] = []
    repeated: set[str] = set()

    async def client(number: int) -> None:
        for turn in range(10_000):
            if stop.is_set():
                return
            keep = turn % 7 == 0 and len(kept) < 100
            rid = f"c{number}-{turn}"
            ask = GpuReserve(
                required_mb=200 if keep else (3_000, 9_000, 21_000)[number % 3],
                gpu_count=1 + turn % 2,
                reservation_id=rid,
                timeout_seconds=600,
            )
            got = await persistent(bus, gpus.RESERVE, ask, on_repeat=partial(repeated.add, rid))
            if isinstance(got, Refused):
                assert got.code == "no_room", got
                done["refused"] += 1
                continue
            done["granted"] += 1
            if keep:
                kept[got.reservation_id] = got
                continue
            release = GpuRelease(reservation_id=got.reservation_id)
            back = await persistent(bus, gpus.RELEASE, release)
            assert isinstance(back, GpuReleased) or back.code == "not_found"
            done["released"] += 1

    async def watch() -> None:
        """What is stored, again and again: never more than there is."""
        bucket = Bucket(await mesh.bus(Role.SERVICES), storage.GPUS)
        while not stop.is_set():
            with contextlib.suppress(BusError):
                entry = await bucket.get("n1")
                sums = Counter[int]()
                for grant in entry.value.grants if entry else []:
                    for share in grant.gpus:
                        sums[share.index] += share.mb
                overfull.extend(f"GPU {index}: {mb}" for index, mb in sums.items() if mb > 81_920)
                done["looks"] += 1
            await asyncio.sleep(0.01)

    async def more(before: int) -> None:
        await until(lambda: done["granted"] > before + 100, what="more grants")

    def next_life(name: str, pid: int) -> Callable[[], bool]:
        return lambda: mesh.pid(name) not in (0, pid)

    clients = [asyncio.create_task(client(number)) for number in range(64)]
    watcher = asyncio.create_task(watch())
    for victim in ("gpu-orchestrator", "gpu-orchestrator-2", "nats-server", "gpu-orchestrator", "gpu-orchestrator-2"):
        before = done["granted"]
        await more(before)
        pid = mesh.pid(victim)
        mesh.kill(victim)
        await until(next_life(victim, pid), what=f"the next {victim}")
    await more(done["granted"])
    stop.set()
    await asyncio.gather(*clients, watcher)
    assert not overfull
    assert done["looks"] > 50
    found: dict[str, GpuReservation] = {}
    after = ""
    while True:
        page = await persistent(bus, gpus.LIST, GpuList(limit=500, after=after))
        assert isinstance(page, GpuReservations), page
        found |= {one.reservation_id: one for one in page.reservations}
        after = page.next
        if not after:
            break
    missing = {rid for rid, one in kept.items() if found.get(rid) != one}
    assert not missing
    # A request that was given up may still arrive behind the release of its repetition, and then runs out by itself.
    assert set(found) - set(kept) <= repeated, "what was released still stands"
    # What is free can be had at once.
    states = await persistent(bus, gpus.STATES, GpuStatesQuery())
    assert isinstance(states, GpuStates), states
    for gpu in states.nodes[0].gpus:
        if gpu.free_mb:
            await reserved(bus, required_mb=gpu.free_mb, node_id="n1", gpu_indices=[gpu.index])


async def test_a_reservation_ends_with_the_work_item_it_is_bound_to(tmp_path: Path) -> None:
    """Also when the end came while no replica was there to hear of it."""
    services = (*SERVICES, "work-marshaller")
    async with running_mesh(tmp_path, services, environment=PATIENT) as mesh:
        made = GpuNode(await mesh.bus(Role.NODE, "g1"), "g1", cards(1, node_id="g1"))
        await made.join()
        worker = DirectNode(await mesh.bus(Role.NODE), "n1", work_types=("shout",))
        await worker.join()
        bus = await mesh.bus()

        async def assigned(number: int) -> None:
            await until(lambda: len(worker.given) == number + 1, what="the assignment")

        for number, away in enumerate((False, True)):
            item = await mesh.submit(WorkItem(work_id=f"w{number}", work_type="shout"))
            got = await persistent(
                bus,
                gpus.RESERVE,
                GpuReserve(required_mb=100, work_id=item.work_id),
                retry=("unavailable", "busy", "impossible"),
            )
            assert isinstance(got, GpuReservation), got
            await assigned(number)
            if away:
                mesh.kill("gpu-orchestrator")
            await worker.complete(worker.given[number])
            await mesh.record(item.work_id)

            async def gone(got: GpuReservation = got) -> bool:
                answer = await persistent(bus, gpus.GET, GpuGet(reservation_id=got.reservation_id))
                return isinstance(answer, Refused)

            async with asyncio.timeout(30):
                while not await gone():
                    await asyncio.sleep(0.05)
            late = await persistent(bus, gpus.RESERVE, GpuReserve(required_mb=100, work_id=item.work_id))
            assert isinstance(late, Refused)
            assert (late.code, late.field) == ("work_ended", "work_id")
        await worker.leave()
