"""Goal: a node on which work keeps failing is left alone for a while, all can see why, and an operator can end it.

Method: a real mesh and a node whose every attempt fails; two marshallers, of which the acting one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx

from computemesh.bus import Bucket, Bus, BusError
from computemesh.contracts import storage, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.work import (
    Blacklist,
    Blacklisted,
    BlacklistGet,
    WorkFailed,
    WorkGet,
    WorkItem,
    WorkState,
)
from computemesh.testing import DirectNode, RunningMesh, running_mesh, until
from computemesh_services.work_marshaller.reign import BLACKLIST_KEY, Tallies

SERVICES = ("node-registry", "work-marshaller")


async def test_a_node_that_keeps_failing_is_blacklisted_shown_kept_over_a_restart_and_pardoned(tmp_path: Path) -> None:
    """The list outlives the marshaller that made it; a pardon takes effect at once."""
    async with running_mesh(tmp_path, services=SERVICES, copies={"work-marshaller": 2}) as mesh:
        broken, asker = await mesh.bus(Role.NODE, "n1"), await mesh.bus(Role.SERVICES)
        node = DirectNode(broken, "n1", work_types=("shout",))
        await node.join()
        for number in range(3):
            await fails(mesh, broken, node, f"w{number}")
        await until(lambda: len(node.given) == 3, what="three attempts")
        (entry,) = await blacklist(asker)
        assert (entry.node_id, entry.work_type, entry.failures, entry.reason) == ("n1", "shout", 3, "no CUDA")

        await mesh.submit(WorkItem(work_id="next", work_type="shout", retries_max=0))
        async with asyncio.timeout(10):
            while not await is_stored(asker):  # At most a quarter of a second after it changed.
                await asyncio.sleep(0.02)
        mesh.kill(await mesh.holder("work-marshaller"))
        (again,) = await blacklist(asker)
        assert again == entry
        why = await asker.ask(work.EXPLAIN, WorkGet(work_id="next"))
        assert not isinstance(why, Refused)
        assert "blacklisted for 'shout'" in why.nodes[0].reasons[0]
        assert len(node.given) == 3

        async with httpx.AsyncClient(base_url=mesh.http("work-marshaller-2")) as http:
            assert (await http.get("/api/v1/blacklist")).json()["entries"][0]["node_id"] == "n1"
            refused = await http.delete("/api/v1/blacklist/n2")
            assert (refused.status_code, refused.json()["field"]) == (404, "node_id")
            pardoned = await http.delete("/api/v1/blacklist/n1", params={"work_type": "shout"})
            assert pardoned.json()["entries"][0]["node_id"] == "n1"
        await until(lambda: len(node.given) == 4, what="work for the pardoned node")
        assert await blacklist(asker) == []
        await node.complete(node.given[3], "SHOUT")
        assert (await mesh.record("next")).state is WorkState.COMPLETED


async def fails(mesh: RunningMesh, bus: Bus, node: DirectNode, work_id: str) -> None:
    """An item that fails on the node, by the node's fault."""
    await mesh.submit(WorkItem(work_id=work_id, work_type="shout", retries_max=0))
    await until(lambda: node.attempts(work_id), what="the delivery")
    report = WorkFailed(work_id=work_id, attempt=1, node_id="n1", error="no CUDA", code="oom")
    node.running.pop((work_id, 1))
    await bus.store(work.FAILED, report)
    assert (await mesh.record(work_id)).state is WorkState.DEAD


async def is_stored(bus: Bus) -> bool:
    kept = await Bucket(bus, storage.WORK).read_other(BLACKLIST_KEY, Tallies)
    return kept is not None and any(tally.opened for tally in kept.value.tallies)


async def blacklist(bus: Bus) -> list[Blacklisted]:
    """What stands on the list, as soon as some marshaller says."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(BusError):
                answer = await bus.ask(work.BLACKLIST, BlacklistGet(), timeout_s=1.0)
                if isinstance(answer, Blacklist):
                    return answer.entries
            await asyncio.sleep(0.05)
