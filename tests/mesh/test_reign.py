"""What a marshaller does between losing its lease and noticing it.

Method: one reign, in this process, on a real server with a real registry and a node in the hands of the test.
Its lease is no longer renewed, as if the process had been stopped for a while; what it would notice next,
the end of its lease, is not told to it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from computemesh.bus import Mirror, lease
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeHeartbeat
from computemesh.contracts.services import WORK_MARSHALLER
from computemesh.contracts.work import Assignment, Requirements, WorkItem
from computemesh.testing import running_mesh, until
from computemesh.testing.node import DirectNode
from computemesh_services.work_marshaller.reign import Reign
from computemesh_services.work_marshaller.scheduler import Limits


def an_attempt(number: int) -> Assignment:
    """One that the leader under test did not make."""
    return Assignment(work_id="w1", attempt=number, node_id="n2", work_type="inference")


async def test_a_leader_whose_lease_is_in_doubt_ends_no_attempt(tmp_path: Path) -> None:
    """An attempt it did not make may be its successor's; while its lease is certain there is no successor."""
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2")
        bus = await mesh.bus(Role.SERVICES)
        held = await lease.acquire(bus, WORK_MARSHALLER.name, "a-test", on_wait=lambda: None)
        mirror = Mirror(bus, storage.NODES, lambda name, node: reign.node_changed(name, node))  # noqa: PLW0108  # made next
        reign = Reign(bus, held, mirror, Limits(), keep_s=60)
        draining = asyncio.Event()
        tasks = [asyncio.create_task(mirror.follow()), asyncio.create_task(reign.run(draining))]
        await node.join()

        await until(lambda: "n2" in reign.scheduler.seats, what="the node to be known")

        nowhere = WorkItem(work_id="w1", work_type="inference", requirements=Requirements(node_id="n9"))
        await (await mesh.bus()).store(work.SUBMIT, nowhere)
        await until(lambda: "w1" in reign.scheduler.records, what="the item to be read")

        node.running["w1", 5] = an_attempt(5)
        await until(lambda: [stop.attempt for stop in node.stops[:1]] == [5], what="the end of an attempt")

        await held.stop_renewing()
        await until(lambda: not held.certain, what="the lease to run out")
        node.running.clear()
        node.stops.clear()
        node.running["w1", 6] = an_attempt(6)
        heard: list[NodeHeartbeat] = []

        async def on_beat(beat: NodeHeartbeat) -> None:
            heard.extend([beat] if beat.running else [])

        await bus.subscribe(nodes.HEARTBEAT, on_beat)
        await until(lambda: len(heard) >= 3, what="three heartbeats")
        await bus.flush()
        await (await mesh.bus(Role.NODE, "n2")).flush()
        assert node.stops == []

        await node.leave()
        draining.set()
        await asyncio.wait(tasks[1:], timeout=10)
        tasks[0].cancel()
