"""Reigns in this process, on a real server: what only shows when two act at once, or a lease runs out just then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from computemesh.bus import Bucket, Bus, Mirror, lease
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeHeartbeat, RunningWork
from computemesh.contracts.work import WorkItem, WorkState
from computemesh.tasks import end_all
from computemesh.testing import DirectNode, RunningMesh, running_mesh, until
from computemesh_services.work_marshaller.reign import Reign
from computemesh_services.work_marshaller.scheduler import Limits
from tests.chaos.history import History, violations


@asynccontextmanager
async def a_reign(mesh: RunningMesh, lease_of: str) -> AsyncGenerator[tuple[lease.Held, asyncio.Task[str]]]:
    """A reign that has caught up, with a lease and a connection of its own."""
    bus = Bus(replace((await mesh.bus(Role.SERVICES)).where, name=lease_of))
    await bus.connect(timeout_s=5)
    held = await lease.acquire(bus, lease_of, "test", on_wait=lambda: None)
    mirror = Mirror(bus, storage.NODES)
    reign = Reign(bus, held, mirror, Limits(), keep_s=60)
    following, running = asyncio.create_task(mirror.follow()), asyncio.create_task(reign.run(asyncio.Event()))
    await reign.caught_up.wait()
    try:
        yield held, running
    finally:
        await end_all([following, running])
        await held.release()
        await bus.close()


async def test_two_reigns_at_once_record_every_outcome_once(tmp_path: Path) -> None:
    """Both read every report and decide the same; whoever loses a compare-and-set gives up, and the next goes on."""
    history = History(accepted={f"w{number}": number for number in range(30)})
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", slots=100)
        await node.join()
        watch = await mesh.bus()
        await watch.listen("compute.work.state.v1.*", history.on_state)
        await watch.flush()
        async with a_reign(mesh, "first") as (_, first):
            for work_id in history.accepted:
                await watch.store(work.SUBMIT, WorkItem(work_id=work_id, work_type="inference"))
            await until(lambda: _in_state(history, WorkState.RUNNING) == 30, what="all to run")
            async with a_reign(mesh, "second") as (_, second):
                for asked in list(node.running.values()):
                    await node.complete(asked, {"square": history.accepted[asked.work_id] ** 2})
                await until(lambda: first.done() or second.done(), what="at least one of them to give up")
                assert {task.result() for task in (first, second) if task.done()} == {"the journal broke"}
        async with a_reign(mesh, "third"):
            await until(lambda: _in_state(history, WorkState.COMPLETED) == 30, what="all to be recorded")
        stored = await Bucket(await mesh.bus(Role.SERVICES), storage.WORK).load()
        history.stored = {key: entry.value for key, entry in stored.items()}
        assert violations(history) == []
        assert {tuple(node.attempts(work_id)) for work_id in history.accepted} <= {(1,), (1, 1)}
        await node.leave()


def _in_state(history: History, state: WorkState) -> int:
    """Items of which that was the latest that was heard."""
    return sum(events[-1].record.state is state for events in history.events.values())


async def test_a_reign_stops_what_no_longer_counts_only_while_its_lease_is_certain(tmp_path: Path) -> None:
    """Once the lease may have passed on, an attempt it has not heard of may be its successor's."""
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2")
        await node.join()
        async with a_reign(mesh, "work-marshaller") as (held, _):
            await told_to_stop_only_in_time(mesh, node, held)
        await node.leave()


async def told_to_stop_only_in_time(mesh: RunningMesh, node: DirectNode, held: lease.Held) -> None:
    await (await mesh.bus()).store(work.SUBMIT, WorkItem(work_id="w1", work_type="inference"))
    await until(lambda: node.given, what="the first attempt")

    node.running["w1", 8] = node.given[0]
    await until(lambda: [stop.attempt for stop in node.stops] == [8], what="the stop of an unknown attempt")

    await held.stop_renewing()
    await until(lambda: not held.certain, what="the lease to run out")
    assert not held.lost.is_set(), "nobody said so yet"
    heard: list[NodeHeartbeat] = []

    async def on_heartbeat(beat: NodeHeartbeat) -> None:
        heard.append(beat)

    bus = await mesh.bus(Role.SERVICES)
    await bus.subscribe(nodes.HEARTBEAT, on_heartbeat)
    node.running["w1", 9] = node.given[0]
    listed = RunningWork(work_id="w1", attempt=9)
    await until(lambda: sum(listed in beat.running for beat in heard) >= 3, what="heartbeats that list another")
    await bus.flush()
    assert [stop.attempt for stop in node.stops] == [8]
