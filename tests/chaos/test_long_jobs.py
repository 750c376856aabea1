"""A job that lasts many times as long as every patience of the mesh runs once, unless its node is gone.

Goal: a long job is handed out once, whatever is killed beside its node; when the node vanishes, another has the work
after the node's lease, and what the first one says afterwards counts for nothing and is logged.
Method: real node agents, with the patience of tests (a node is lost after 4 s). Each attempt notes that it started, and
ends when the test opens its gate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from computemesh.addresses import login_of
from computemesh.bus import Bucket, BusError
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.work import WorkItem, WorkRecord, WorkState
from computemesh.process import dies_with_parent, end
from computemesh.testing import DirectNode, RunningMesh, install_executor, running_mesh, until
from computemesh.testing.cluster import is_whole, leader
from computemesh.testing.mesh import QUICK, STRICT
from tests.chaos.proxy import LOOPBACK, Proxy

PLAIN: Final = {"COMPUTEMESH_MODELS": "/nowhere", "COMPUTEMESH_LOG_FORMAT": "json"}

LOST_S: Final = 4.0
"""After so long in silence a node is lost, with the settings of tests; a lease is shorter."""

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")

EXECUTOR: Final = """
import os, time
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        gate = f"{task.payload['gate']}.{task.attempt}"
        with open(task.payload["gate"] + ".started", "a") as notes:
            notes.write(f"{task.attempt}\\n")
        while not os.path.exists(gate):
            time.sleep(0.05)
        return f"attempt {task.attempt}"
"""


class Job:
    """One long job on a mesh."""

    def __init__(self, mesh: RunningMesh, gate: Path) -> None:
        self.mesh = mesh
        self._gate = gate

    async def submit(self) -> None:
        item = WorkItem(work_id="long", work_type="gate", payload={"gate": str(self._gate)})
        await self.mesh.submit(item)

    def started(self) -> list[int]:
        """The attempts that began, in order."""
        notes = self._gate.with_name(self._gate.name + ".started")
        return [int(line) for line in notes.read_text().split()] if notes.exists() else []

    def end(self, attempt: int) -> None:
        self._gate.with_name(f"{self._gate.name}.{attempt}").touch()

    async def recorded(self, condition: Callable[[WorkRecord], bool], *, what: str) -> WorkRecord:
        """The record, once the condition holds of it.

        Raises:
            AssertionError: it does not get there.
        """
        bucket = Bucket(await self.mesh.bus(Role.SERVICES), storage.WORK)
        record: WorkRecord | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(40):
                while record is None or not condition(record):
                    await asyncio.sleep(0.05)
                    with contextlib.suppress(BusError):
                        entry = await bucket.get("long")
                        record = entry.value if entry else None
                return record
        raise AssertionError("\n".join([f"not {what}: {record}", *self.mesh.lines[-40:]]))

    async def running(self, attempt: int) -> WorkRecord:
        """The record, once this attempt runs."""
        await until(lambda: attempt in self.started(), what=f"attempt {attempt} to begin")
        return await self.recorded(
            lambda record: (record.state, record.attempt) == (WorkState.RUNNING, attempt), what=f"running {attempt}"
        )


@asynccontextmanager
async def mesh_of_two(folder: Path) -> AsyncGenerator[Job]:
    """Two marshallers, two agents, three servers."""
    environment = {**install_executor(folder / "plugin", "gate", EXECUTOR), "COMPUTEMESH_MODELS": "/nowhere"}
    async with running_mesh(
        folder, ALL, copies={"work-marshaller": 2}, environment=environment, clustered=True, agents=("n3",)
    ) as mesh:
        yield Job(mesh, folder / "gate")


async def test_a_long_job_is_handed_out_once_though_a_marshaller_and_a_server_are_killed(tmp_path: Path) -> None:
    """It lasts several times as long as anybody waits for anything but the job itself."""
    async with mesh_of_two(tmp_path) as job:
        mesh = job.mesh
        assert mesh.cluster is not None
        bus = await mesh.bus(Role.SERVICES)
        began_s = asyncio.get_running_loop().time()
        await job.submit()
        await job.running(1)
        acting = await mesh.holder("work-marshaller")
        mesh.kill(acting)
        leads = await leader(bus, storage.WORK.stream)
        async with mesh.cluster.without(leads):
            await asyncio.sleep(1.2 * LOST_S)
        deadline_s = began_s + 4 * LOST_S
        while asyncio.get_running_loop().time() < deadline_s or not await is_whole(bus):
            await asyncio.sleep(0.1)
        acting = ""
        while not acting:
            with contextlib.suppress(BusError):
                acting = await mesh.holder("work-marshaller")
        mesh.kill(acting)
        job.end(1)
        record = await job.recorded(lambda record: record.state in work.FINAL, what="ended")
        assert (record.state, record.attempt, record.losses, record.failures) == (WorkState.COMPLETED, 1, 0, 0)
        assert record.result == "attempt 1"
        assert job.started() == [1]


# --- a node vanishes -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def agent_through(proxy: Proxy, mesh: RunningMesh, folder: Path) -> AsyncGenerator[Process]:
    """A node agent, n4, that reaches the mesh through a proxy."""
    url = f"nats://{login_of(await mesh.invite('n4'))}@{LOOPBACK}:{proxy.port}"
    environment = {
        **os.environ, **STRICT, **QUICK, **PLAIN, **install_executor(folder / "plugin", "gate", EXECUTOR),
        "NATS_URL": url, "COMPUTEMESH_NODE_ID": "n4", "COMPUTEMESH_HOME": str(folder / "n4"),
        "COMPUTEMESH_HTTP_PORT": "0",
    }  # fmt: skip
    with (folder / "n4.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "computemesh_services.node_agent"),
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        await end(process, grace_s=10.0)


@pytest.mark.parametrize("how", ["halted", "cut off"])
async def test_the_work_of_a_node_that_vanished_is_done_elsewhere_and_its_late_result_is_refused(
    tmp_path: Path, how: str
) -> None:
    """Its attempt went on meanwhile, and ended. A node that was halted finds a word to forget it when it wakes up; a
    report that was on its way arrives."""
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(tmp_path, copies={"work-marshaller": 2}))
        assert mesh.supervisor.server is not None
        proxy = Proxy(mesh.supervisor.server.port)
        await proxy.start()
        stack.push_async_callback(proxy.stop)
        agent = await stack.enter_async_context(agent_through(proxy, mesh, tmp_path))
        job = Job(mesh, tmp_path / "gate")
        await job.submit()
        await job.running(1)
        other = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("gate",))
        await other.join()
        stack.push_async_callback(other.leave)

        if how == "halted":
            agent.send_signal(signal.SIGSTOP)
        else:
            proxy.cut()
        await until(lambda: other.attempts("long") == [2], what="the second attempt elsewhere")
        job.end(1)
        if how == "halted":
            agent.send_signal(signal.SIGCONT)
        else:
            await until(lambda: proxy.holds(work.COMPLETED.subject.encode()), what="the first attempt's report")
            proxy.mend()
            await until(lambda: told_late(mesh), what="a word about the late result")
            said = told_late(mesh)[0]
            assert (said["work_id"], said["attempt"], said["node"]) == ("long", 1, "n4")
            assert (said["current_attempt"], said["current_node"]) == (2, "n2")
        await other.complete(other.given[0], "the second one's")
        record = await job.recorded(lambda record: record.state in work.FINAL, what="ended")
        assert (record.result, record.attempt, record.losses) == ("the second one's", 2, 1)
        assert job.started() == [1]


def told_late(mesh: RunningMesh) -> list[dict[str, object]]:
    """What marshallers logged about late reports."""
    lines = [line.partition(" ")[2] for line in mesh.lines if "refused a late report" in line]
    return [json.loads(line) for line in lines]
