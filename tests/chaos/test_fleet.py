"""A thousand nodes, and what watches over them is killed, stopped and restarted: nobody is called lost who is not.

Goal: whatever happens to the registry or to the server, no node is recorded as lost or suspect for it, epochs
stay as they are, and within 5 s of the return a query answers all nodes as online and lately seen. And then the
registry still does what it is for: of 200 nodes that truly fall silent each is told lost, once, and no other.
Method: real processes; simulated nodes with real messages. The loss of the 200 is awaited after each deed: when
it is told, the patience with everyone else was over, too. Patience is short, and the fleet says how late its own
heartbeats were, since a fleet that had no time to speak was truly silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import msgspec
import pytest

from computemesh.bus import BusError, Mirror
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeLost, NodeRecord, NodeState
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh.testing.fleet import Fleet

SIZE: Final = 1000
SILENT: Final = 200
"""Nodes that truly fall silent after each deed."""

INTERVAL_S: Final = 1.0
"""Longer than it takes the registry to look at everyone's silence: it must not judge those it has yet to hear."""

SUSPECT_S: Final = 3.0
LOST_S: Final = 4.2
LONGER_THAN_PATIENCE: Final = int(SIZE * (LOST_S + 1.0) / INTERVAL_S)
"""Heartbeats that a fleet sends in that time."""

WHOLE_S: Final = 5.0
SLACK: Final = 2.0
"""A machine that has other things to do may take so many times as long as is promised."""

PATIENCE: Final = {
    "COMPUTEMESH_SUSPECT_AFTER_S": str(SUSPECT_S),
    "COMPUTEMESH_LOST_AFTER_S": str(LOST_S),
}


class Seen(msgspec.Struct, frozen=True):
    """What the tests look at of a node in an answer."""

    node_id: str
    state: NodeState
    epoch: int
    last_seen: float


class Page(msgspec.Struct, frozen=True):
    """An answer to a query."""

    nodes: list[Seen]
    count: int
    next: str = ""


class Watch:
    """A mesh with its fleet; hears every loss that is told and sees every state that is recorded."""

    def __init__(self, mesh: RunningMesh, fleet: Fleet) -> None:
        self.mesh: Final = mesh
        self.fleet: Final = fleet
        self.told: Counter[str] = Counter()
        """Losses heard, by node."""
        self.doubted: set[str] = set()
        """Nodes that were ever recorded as suspect or lost."""
        self.epochs: dict[str, int] = {}
        """As recorded last."""

    async def told_lost(self, lost: NodeLost) -> None:
        """Hears a loss."""
        self.told[lost.node_id] += 1

    def recorded(self, node_id: str, record: NodeRecord | None) -> None:
        """Sees a record change."""
        assert record is not None, f"the record of {node_id} is gone"
        self.epochs[node_id] = record.epoch
        if record.state is not NodeState.ONLINE:
            self.doubted.add(node_id)

    def registries(self) -> list[str]:
        """Replicas of the registry, by name."""
        return [s.name for s in self.mesh.supervisor.services if s.spec.name == "node-registry"]

    async def all_seen_since(self, when: float) -> bool:
        """Whether all nodes are online and were heard since then, to a client and to each replica's callers."""
        pages = [await ask_all_by_bus(self.mesh)]
        async with httpx.AsyncClient() as http:
            pages += [await ask_all_by_http(http, self.mesh.http(name)) for name in self.registries()]
        return all(
            len(seen) == SIZE and all(one.state is NodeState.ONLINE and one.last_seen >= when for one in seen)
            for seen in pages
        )

    async def seconds_until_all_are_seen(self, since: float) -> float:
        """How long after *since*, in Unix seconds, every answer has all nodes online and lately seen."""
        while time.time() - since < 4 * WHOLE_S:
            with contextlib.suppress(BusError, httpx.TransportError):
                if await self.all_seen_since(since):
                    break
            await asyncio.sleep(0.05)
        return time.time() - since

    def story(self) -> str:
        """What helps to understand a failure."""
        registry = [line for line in self.mesh.lines if line.startswith("node-registry")]
        return "\n".join([f"the fleet's latest heartbeat was {self.fleet.late_s:.2f} s late", *registry[-40:]])


async def ask_all_by_bus(mesh: RunningMesh) -> list[Seen]:
    """All nodes, page by page."""
    bus = await mesh.bus()
    found: list[Seen] = []
    page = Page([], 0, next=" ")
    while page.next:
        query = {"limit": 10_000} if not found else {"limit": 10_000, "after": page.next}
        reply = await bus.call(nodes.QUERY.subject, msgspec.json.encode(query), timeout_s=2.0)
        page = msgspec.json.decode(reply.data, type=Page)
        found += page.nodes
    return found


async def ask_all_by_http(http: httpx.AsyncClient, url: str) -> list[Seen]:
    """All nodes as one replica knows them, page by page."""
    found: list[Seen] = []
    page = Page([], 0, next=" ")
    while page.next:
        query = {"limit": 10_000} if not found else {"limit": 10_000, "after": page.next}
        answer = await http.post(f"{url}/api/v1/nodes/query", json=query, timeout=2.0)
        page = msgspec.json.decode(answer.content, type=Page)
        found += page.nodes
    return found


@asynccontextmanager
async def watched_fleet(folder: Path, *, registries: int = 1) -> AsyncGenerator[Watch]:
    """A control plane without work, and a fleet that has joined."""
    copies = {"node-registry": registries}
    async with running_mesh(folder, ("node-registry",), copies=copies, environment=PATIENCE) as mesh:
        watch = Watch(mesh, Fleet(await mesh.bus(Role.NODE), SIZE, interval_s=INTERVAL_S))
        bus = await mesh.bus(Role.SERVICES)
        await bus.subscribe(nodes.LOST, watch.told_lost)
        following = asyncio.create_task(Mirror(bus, storage.NODES, watch.recorded).follow())
        began = time.time()
        await watch.fleet.join()
        assert await watch.seconds_until_all_are_seen(began) < 2 * WHOLE_S * SLACK, watch.story()
        await until(lambda: len(watch.epochs) == SIZE, what="every record")
        try:
            yield watch
        finally:
            await watch.fleet.leave()
            following.cancel()


# --- deeds: each gives the time of the return, in Unix seconds -------------------------------------------------------


async def kill_the_registry(watch: Watch) -> float:
    await kill_and_wait(watch, "node-registry")
    return time.time()


async def stop_the_registry_for_longer_than_its_patience(watch: Watch) -> float:
    return await stop_for_long(watch, "node-registry")


async def kill_the_acting_registry_of_two(watch: Watch) -> float:
    """The other one answers all the time; back is who acts, when the other one does."""
    acting = await until_one_acts(watch)
    await kill_and_wait(watch, acting)
    return time.time()


async def stop_the_acting_registry_of_two_for_longer_than_its_patience(watch: Watch) -> float:
    """The other one acts meanwhile, and the one that wakes up thinks for a moment that it still does."""
    return await stop_for_long(watch, await until_one_acts(watch))


async def kill_the_server(watch: Watch) -> float:
    await kill_and_wait(watch, "nats-server")
    return time.time()


async def stop_the_server_for_longer_than_the_patience(watch: Watch) -> float:
    """All connections stand, and nothing comes through them."""
    return await stop_for_long(watch, "nats-server")


async def kill_and_wait(watch: Watch, name: str) -> None:
    """Kills a process and waits until its next life is ready."""
    before = watch.mesh.pid(name)
    watch.mesh.kill(name)

    def is_back() -> bool:
        status = next(status for status in watch.mesh.supervisor.status().services if status.name == name)
        return watch.mesh.pid(name) not in (0, before) and status.state == "ready"

    await until(is_back, what=f"the next life of {name}")


async def stop_for_long(watch: Watch, name: str) -> float:
    """Stops a process while the fleet has, or would have, sent more than patience bears the lack of."""
    goal = watch.fleet.beats + LONGER_THAN_PATIENCE
    watch.mesh.kill(name, signal.SIGSTOP)
    await until(lambda: watch.fleet.beats >= goal, what=f"{LONGER_THAN_PATIENCE} heartbeats")
    watch.mesh.kill(name, signal.SIGCONT)
    return time.time()


async def until_one_acts(watch: Watch) -> str:
    """The replica that holds the lease."""
    async with asyncio.timeout(30):
        while not (name := await watch.mesh.holder("node-registry")):
            await asyncio.sleep(0.05)
    return name


Deed = Callable[[Watch], Awaitable[float]]


@pytest.mark.parametrize(
    ("registries", "deeds"),
    [
        (1, [kill_the_registry, stop_the_registry_for_longer_than_its_patience]),
        (2, [kill_the_acting_registry_of_two, stop_the_acting_registry_of_two_for_longer_than_its_patience]),
        (1, [kill_the_server, stop_the_server_for_longer_than_the_patience]),
    ],
    ids=["one registry", "two registries", "the server"],
)
async def test_no_node_of_a_thousand_is_lost_but_those_that_are(
    tmp_path: Path, registries: int, deeds: list[Deed], record_property: Callable[[str, object], None]
) -> None:
    """After each deed all are seen again in time, and a true loss of 200 is found, exactly; then these come back."""
    async with watched_fleet(tmp_path, registries=registries) as watch:
        fleet = watch.fleet
        for number, deed in enumerate(deeds):
            epochs, doubted = dict(watch.epochs), set(watch.doubted)
            back = await deed(watch)
            took_s = await watch.seconds_until_all_are_seen(back)
            record_property(f"s until all were seen after {deed.__name__}", round(took_s, 2))
            assert took_s < WHOLE_S * SLACK, f"{deed.__name__}\n{watch.story()}"
            assert watch.epochs == epochs, f"{deed.__name__}: epochs grew\n{watch.story()}"
            assert watch.doubted == doubted, f"{deed.__name__}: {len(watch.doubted)} doubted\n{watch.story()}"

            silent = set(fleet.node_ids[number * SILENT : (number + 1) * SILENT])
            fleet.silence(silent)
            began = time.time()
            await until(lambda: set(watch.told) >= silent, what=f"losses of {deed.__name__}\n{watch.story()}")  # noqa: B023
            record_property(f"s until {SILENT} losses were told", round(time.time() - began - LOST_S, 2))
            assert {n for n in watch.told if n in silent or n not in doubted} == silent, watch.story()
            await until(lambda: watch.doubted == silent | doubted, what=f"the records; {len(watch.doubted)}")  # noqa: B023
            await (fleet.wake(silent) if number else fleet.restart(silent))
            came_back = {n: epoch + 1 if n in silent else epoch for n, epoch in epochs.items()}
            await until(lambda: watch.epochs == came_back, what=f"their return\n{watch.story()}")  # noqa: B023
        assert set(watch.told.values()) == {1}, watch.told
        assert len(watch.told) == SILENT * len(deeds)
        record_property("latest heartbeat of the fleet itself, in s", round(fleet.late_s, 2))
