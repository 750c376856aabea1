"""GPUs of attempts, items whose replicas start together, and items that wait for others: real processes, one server.

The node's GPUs are made up; detector, agent, ledger and marshaller are the real ones. What runs on the node waits for a
file, so that a test decides when it ends, and gives back what it found in its environment.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from computemesh.bus import Bucket, Bus
from computemesh.contracts import gpus, nodes, storage, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.gpus import GpuList, GpuRelease, GpuReservation, GpuReservations, GpuReserve
from computemesh.contracts.nodes import NodesQuery
from computemesh.contracts.work import (
    FINAL,
    Requirements,
    WorkCancel,
    WorkExplanation,
    WorkGet,
    WorkItem,
    WorkRecord,
    WorkState,
)
from computemesh.testing import DirectNode, RunningMesh, running_mesh, until

ALL: Final = ("node-registry", "work-marshaller", "gpu-orchestrator", "resource-detector", "node-agent")

WAIT_S: Final = 60.0

EXECUTOR: Final = """
import os, time
from pathlib import Path
from computemesh.executors import ExecutionError, Executor

class Hold(Executor):
    def run(self, task, out_dir, progress):
        Path(task.payload["folder"], f"began-{task.attempt}-{task.replica}").touch()
        while not Path(task.payload["folder"], "go").exists():
            if Path(task.payload["folder"], f"fail-{task.replica}").exists():
                raise ExecutionError("told to fail")
            time.sleep(0.02)
        names = ("CUDA_VISIBLE_DEVICES", "COMPUTEMESH_RESERVATION_ID", "COMPUTEMESH_REPLICA", "COMPUTEMESH_PEERS")
        return {name: os.environ.get(name) for name in names} | {"peers": task.peers, "replica": task.replica}
"""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """One node with two GPUs of 80 GiB, three slots and the executor above; reservations last twenty seconds."""
    info = tmp_path / "plugin" / "hold-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "plugin" / "hold_plugin.py").write_text(EXECUTOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hold\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[computemesh.executors]\nhold = hold_plugin:Hold\n")
    hardware = tmp_path / "hardware.json"
    cards = {"name": "NVIDIA H100", "vram_total_mb": 81_920, "compute_capability": "9.0", "count": 2}
    hardware.write_text(json.dumps({"platform": "CUDA", "gpus": [cards]}))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "plugin"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "COMPUTEMESH_MODELS": "/nowhere",
        "COMPUTEMESH_GPU_PROVIDER": "scripted",
        "COMPUTEMESH_SCRIPTED_HARDWARE": str(hardware),
        "COMPUTEMESH_SLOTS": "3",
        "GPU_RESERVATION_TIMEOUT": "20",
    }
    async with running_mesh(tmp_path, ALL, environment=environment) as running:
        bus = await running.bus()

        async def has_gpus() -> bool:
            found = await bus.ask(nodes.QUERY, NodesQuery())
            return not isinstance(found, Refused) and any(len(node.gpus) == 2 for node in found.nodes)

        await eventually(has_gpus, "the node's GPUs")
        yield running


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """As ``until``, for a condition that must ask."""
    deadline_s = asyncio.get_running_loop().time() + WAIT_S
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.05)


async def reservations(bus: Bus) -> list[GpuReservation]:
    found = await bus.ask(gpus.LIST, GpuList())
    assert isinstance(found, GpuReservations), found
    return found.reservations


async def stored(mesh: RunningMesh, work_id: str) -> WorkRecord:
    """The outcome of an item, also while no marshaller answers."""
    bucket = Bucket(await mesh.bus(Role.SERVICES), storage.WORK)
    found: list[WorkRecord] = []

    async def has_ended() -> bool:
        entry = await bucket.get(work_id)
        found[:] = [entry.value] if entry and entry.value.state in FINAL else []
        return bool(found)

    await eventually(has_ended, f"the outcome of {work_id}")
    return found[0]


async def explained(bus: Bus, work_id: str) -> WorkExplanation:
    found = await bus.ask(work.EXPLAIN, WorkGet(work_id=work_id))
    assert isinstance(found, WorkExplanation), found
    return found


def held(folder: Path, work_id: str, **changes: Any) -> WorkItem:
    """An item that runs until ``go`` is in its folder."""
    folder.mkdir(exist_ok=True)
    return WorkItem(work_id=work_id, work_type="hold", payload={"folder": str(folder)}, **changes)


async def test_an_attempt_has_its_gpus_while_it_runs_and_gives_them_back(mesh: RunningMesh, tmp_path: Path) -> None:
    """The ledger shows them under the item's id; the process sees those and no others."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    need = Requirements(gpus=1, vram_mb=60_000)
    await mesh.submit(held(folder, "w1", requirements=need, owner="ann"))
    await until((folder / "began-1-0").exists, what="the run")
    (standing,) = await reservations(bus)
    assert (standing.node_id, standing.work_id, standing.owner) == ("n1", "w1", "ann")
    assert (standing.total_mb, standing.session != "") == (60_000, True)
    (folder / "go").touch()
    done = await mesh.record("w1")
    assert done.result["CUDA_VISIBLE_DEVICES"] == standing.gpus[0].uuid
    assert done.result["COMPUTEMESH_RESERVATION_ID"] == standing.reservation_id
    await gone(bus)


async def gone(bus: Bus) -> None:
    async def none_stands() -> bool:
        return not await reservations(bus)

    await eventually(none_stands, "the end of all reservations")


async def test_an_item_waits_for_gpus_that_others_have_and_says_so(mesh: RunningMesh, tmp_path: Path) -> None:
    """It starts as soon as they are given back; one without GPU needs is not held up meanwhile."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    taken = await bus.ask(gpus.RESERVE, GpuReserve(required_mb=81_920, gpu_count=2, timeout_seconds=3600, owner="bob"))
    assert isinstance(taken, GpuReservation)
    await mesh.submit(held(folder, "w1", requirements=Requirements(gpus=1)))

    async def refused() -> bool:
        told = await explained(bus, "w1")
        return any("reserved by bob" in reason for node in told.nodes for reason in node.reasons)

    await eventually(refused, "the ledger's reason")
    (folder / "go").touch()
    await mesh.submit(held(folder, "w2"))
    assert (await mesh.record("w2")).state is WorkState.COMPLETED
    waiting = await bus.ask(work.GET, WorkGet(work_id="w1"))
    assert isinstance(waiting, WorkRecord)
    assert (waiting.state, waiting.failures) == (WorkState.PENDING, 0)
    assert not isinstance(await bus.ask(gpus.RELEASE, GpuRelease(reservation_id=taken.reservation_id)), Refused)
    assert (await mesh.record("w1")).state is WorkState.COMPLETED


async def test_reservations_outlive_the_marshaller_and_are_renewed_by_the_next(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """Killed in the middle of a run. The node does not notice."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    await mesh.submit(held(folder, "w1", requirements=Requirements(gpus=2)))
    await until((folder / "began-1-0").exists, what="the run")
    (before,) = await reservations(bus)
    assert before.total_mb == 2 * 73_728
    mesh.kill("work-marshaller")

    ends: set[float] = set()

    async def renewed() -> bool:
        """Twice: the first may have been on its way when the marshaller was killed."""
        standing = await reservations(bus)
        assert [one.reservation_id for one in standing] == [before.reservation_id]
        ends.add(standing[0].expires_at)
        return len(ends) > 2

    await eventually(renewed, "renewals by the next")
    (folder / "go").touch()
    done = await mesh.record("w1")
    assert (done.state, done.attempt) == (WorkState.COMPLETED, 1)
    await gone(bus)


async def test_the_next_attempt_after_the_nodes_death_has_reservations_of_its_own(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """Those of the dead session end with it; a cancelled item leaves none."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    await mesh.submit(held(folder, "w1", requirements=Requirements(gpus=2)))
    await until((folder / "began-1-0").exists, what="the run")
    (before,) = await reservations(bus)
    mesh.kill("node-agent")
    await until((folder / "began-2-0").exists, what="the second attempt")

    async def only_the_new() -> bool:
        return [one.reservation_id == before.reservation_id for one in await reservations(bus)] == [False]

    await eventually(only_the_new, "the new reservation, alone")
    await bus.ask(work.CANCEL, WorkCancel(work_id="w1"))
    await gone(bus)


async def test_replicas_start_together_know_each_other_and_give_one_list_of_results(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """Two on one node, each with a GPU of its own; completed when both are."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    await mesh.submit(held(folder, "w1", replicas=2, requirements=Requirements(gpus=1)))
    await until(lambda: all((folder / f"began-1-{n}").exists() for n in (0, 1)), what="both replicas")
    assert len({one.gpus[0].index for one in await reservations(bus)}) == 2
    (folder / "go").touch()
    done = await mesh.record("w1")
    assert [one["replica"] for one in done.result] == [0, 1]
    assert [one["peers"] for one in done.result] == [["n1", "n1"]] * 2
    assert [one["COMPUTEMESH_REPLICA"] for one in done.result] == ["0", "1"]
    assert len({one["CUDA_VISIBLE_DEVICES"] for one in done.result}) == 2
    await gone(bus)


async def test_when_one_replica_fails_the_others_are_ended(mesh: RunningMesh, tmp_path: Path) -> None:
    """On another node too, and the item has one outcome."""
    folder = tmp_path / "w1"
    other = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("hold",))
    await other.join()
    await mesh.submit(held(folder, "w1", replicas=2, requirements=Requirements(spread=True)))
    await until(lambda: other.given and list(folder.glob("began-1-*")), what="both replicas")
    (mine,) = folder.glob("began-1-*")
    (folder / f"fail-{mine.name[-1]}").touch()
    failed = await mesh.record("w1")
    assert (failed.state, failed.error and failed.error.reason) == (WorkState.FAILED, "told to fail")
    await until(lambda: [(stop.attempt, stop.replica) for stop in other.stops], what="the stop of the other")
    assert (other.stops[0].attempt, other.stops[0].replica) == (1, 1 - int(mine.name[-1]))
    await other.leave()


async def test_too_many_replicas_wait_as_a_whole(mesh: RunningMesh, tmp_path: Path) -> None:
    """None starts while not all can, and others run meanwhile."""
    folder = tmp_path / "w1"
    await mesh.submit(held(folder, "w1", replicas=2, requirements=Requirements(spread=True)))
    (folder / "go").touch()
    await mesh.submit(held(folder, "w2"))
    assert (await mesh.record("w2")).state is WorkState.COMPLETED
    assert not list(folder.glob("began-*-1"))
    other = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("hold",))
    await other.join()
    await until(lambda: other.given, what="the other replica")
    await other.complete(other.given[0], "from n2")
    done = await mesh.record("w1")
    assert (done.state, "from n2" in done.result) == (WorkState.COMPLETED, True)
    await other.leave()


async def test_an_item_starts_after_those_that_it_names_also_over_a_crash(mesh: RunningMesh, tmp_path: Path) -> None:
    """And says meanwhile what it waits for. One that names what does not exist is refused by name."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    await mesh.submit(held(folder, "w1"))
    await mesh.record("w1", {WorkState.RUNNING})
    await mesh.submit(held(tmp_path / "w2", "w2", after=["w1"]))
    assert (await explained(bus, "w2")).summary == "waits until completed: w1 (running)"
    refused = await bus.ask(work.REQUEST, held(folder, "w3", after=["w1", "w0"]))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == ("unknown_dependency", "after[1]")
    mesh.kill("work-marshaller")
    (tmp_path / "w2" / "go").touch()
    (folder / "go").touch()
    first, second = await stored(mesh, "w1"), await stored(mesh, "w2")
    assert (first.state, second.state) == (WorkState.COMPLETED, WorkState.COMPLETED)
    assert first.finished_at is not None
    assert second.story[-1].at >= first.finished_at
    assert min(move.at for move in second.story if move.attempt) >= first.finished_at


async def test_an_item_fails_with_the_one_it_waits_for_and_a_plain_submission_with_an_unknown_one(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """The outcome names the other item, along a whole chain."""
    bus, folder = await mesh.bus(), tmp_path / "w1"
    await mesh.submit(held(folder, "w1"))
    await mesh.submit(held(folder, "w2", after=["w1"]))
    await mesh.submit(held(folder, "w3", after=["w2"]))
    await bus.store(work.SUBMIT, held(folder, "w4", after=["nobody"]))
    (folder / "fail-0").touch()
    for work_id, named in (("w2", "w1"), ("w3", "w2"), ("w4", "nobody")):
        record = await mesh.record(work_id, FINAL)
        assert record.error is not None
        assert (record.state, record.error.code, record.attempt) == (WorkState.FAILED, "dependency", 0)
        assert named in record.error.reason
