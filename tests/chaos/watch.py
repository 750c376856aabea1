"""A thousand simulated nodes on a mesh, and somebody who sees what is recorded and told of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import msgspec

from computemesh.bus import BusError, Mirror
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeLost, NodeRecord, NodeState
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh.testing.fleet import LOADS, Fleet

SIZE: Final = 1000
INTERVAL_S: Final = 1.0
"""Longer than it takes the registry to look at everyone's silence: it must not judge those it has yet to hear."""

SUSPECT_S: Final = 3.0
LOST_S: Final = 4.2
WHOLE_S: Final = 5.0
SLACK: Final = 2.0
"""A machine that has other things to do may take so many times as long as is promised."""

PATIENCE: Final = {
    "COMPUTEMESH_SUSPECT_AFTER_S": str(SUSPECT_S),
    "COMPUTEMESH_LOST_AFTER_S": str(LOST_S),
}


Ask = Callable[[bytes], Awaitable[bytes]]
"""Takes a query and gives the answer."""


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
        bus = await self.mesh.bus()

        async def ask_anyone(query: bytes) -> bytes:
            return (await bus.call(nodes.QUERY.subject, query, timeout_s=2.0)).data

        async with httpx.AsyncClient(timeout=2.0, headers={"content-type": "application/json"}) as http:

            async def ask_replica(name: str, query: bytes) -> bytes:
                return (await http.post(f"{self.mesh.http(name)}/api/v1/nodes/query", content=query)).content

            asks: list[Ask] = [ask_anyone, *(partial(ask_replica, name) for name in self.registries())]
            pages = [await ask_all(ask) for ask in asks]
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


async def ask_all(ask: Ask) -> list[Seen]:
    """All nodes, page by page."""
    page = msgspec.json.decode(await ask(b'{"limit":10000}'), type=Page)
    found = page.nodes
    while page.next:
        page = msgspec.json.decode(await ask(b'{"limit":10000,"after":%b}' % msgspec.json.encode(page.next)), type=Page)
        found += page.nodes
    return found


@asynccontextmanager
async def watched_fleet(
    folder: Path,
    services: Sequence[str] = ("node-registry",),
    *,
    registries: int = 1,
    loads: Sequence[float] = LOADS,
) -> AsyncGenerator[Watch]:
    """A control plane without work, and a fleet that has joined."""
    async with running_mesh(folder, services, copies={"node-registry": registries}, environment=PATIENCE) as mesh:
        watch = Watch(mesh, Fleet(await mesh.bus(Role.NODE), SIZE, interval_s=INTERVAL_S, loads=loads))
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


async def kill_and_wait(watch: Watch, name: str) -> None:
    """Kills a process and waits until its next life is ready."""
    before = watch.mesh.pid(name)
    watch.mesh.kill(name)

    def is_back() -> bool:
        status = next(status for status in watch.mesh.supervisor.status().services if status.name == name)
        return watch.mesh.pid(name) not in (0, before) and status.state == "ready"

    await until(is_back, what=f"the next life of {name}")
