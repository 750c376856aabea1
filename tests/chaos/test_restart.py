"""The NATS server goes away and comes back, and within 5 s of that everything is whole again.

Goal: watchers, leases, the inbox, endpoints and what waited for an answer recover from a server that was
killed, that was ended, and that was away for longer than a lease and a request live.
Method: real processes; each part is asked until it answers rightly, and the time is taken from when the
server answered again. The promise is 5 s; a machine that has other things to do may take twice as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest

from computemesh.bus import BusError, Mirror
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import NodeAnnouncement, NodeGet, NodeRecord, NodeState
from computemesh.contracts.work import WorkGet, WorkItem, WorkItems, WorkList, WorkRecord, WorkState
from computemesh.testing import DirectNode, RunningMesh, install_executor, running_mesh, until

WHOLE_S: Final = 5.0
SLACK: Final = 2.0

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")

EXECUTOR: Final = """
import os, time
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        while not os.path.exists(task.payload["gate"]):
            time.sleep(0.01)
        return "through"
"""

Check = Callable[[], Awaitable[bool]]


@asynccontextmanager
async def server_away(mesh: RunningMesh, sig: signal.Signals) -> AsyncGenerator[None]:
    """Ends the server, and keeps it from starting again until the end of the block."""
    server = mesh.supervisor.server
    assert server is not None
    with (server.folder / "lock").open() as lock:
        # Whoever waits for the lock gets it before a server that has yet to start; or, rarely, before the next.
        locking = asyncio.create_task(asyncio.to_thread(fcntl.flock, lock.fileno(), fcntl.LOCK_EX))
        await asyncio.sleep(0.1)
        while not locking.done():
            mesh.kill("nats-server", sig)
            await asyncio.wait({locking}, timeout=2.0)
        yield
    await until(lambda: mesh.supervisor.status().services[0].state == "ready", what="the server")


async def time_until(check: Check) -> float:
    """Seconds until *check* holds, for at most four times what is promised."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while loop.time() - started_s < 4 * WHOLE_S:
        with contextlib.suppress(BusError, httpx.TransportError):
            if await check():
                break
        await asyncio.sleep(0.02)
    return loop.time() - started_s


def checks(mesh: RunningMesh, node: DirectNode, mirror: Mirror[NodeRecord], turn: int) -> dict[str, Check]:
    """What must be whole again, by name. Each is asked anew until it is."""

    async def registry_answers() -> bool:
        answer = await (await mesh.bus()).ask(nodes.GET, NodeGet(node_id="n2"), timeout_s=1)
        return isinstance(answer, NodeRecord) and answer.state is NodeState.ONLINE

    async def marshaller_answers() -> bool:
        answer = await (await mesh.bus()).ask(work.LIST, WorkList(), timeout_s=1)
        return isinstance(answer, WorkItems) and answer.count >= 1

    async def inbox_is_read() -> bool:
        item = WorkItem(work_id=f"after-{turn}", work_type="render")
        await (await mesh.bus()).store(work.SUBMIT, item, timeout_s=1)
        return bool(node.attempts(f"after-{turn}"))

    async def marshaller_takes_submissions() -> bool:
        item = WorkItem(work_id=f"asked-{turn}", work_type="render")
        answer = await (await mesh.bus()).ask(work.REQUEST, item, timeout_s=1)
        return isinstance(answer, WorkRecord)

    async def watchers_see_changes() -> bool:
        said = NodeAnnouncement(node_id=f"n-{turn}", work_types=["nothing"])
        await (await mesh.bus(Role.NODE)).ask(nodes.REGISTER, said, timeout_s=1)
        return mirror.get(f"n-{turn}") is not None

    async def lease_is_held() -> bool:
        return await mesh.holder("work-marshaller") != "" and await mesh.holder("node-registry") != ""

    async def all_are_ready() -> bool:
        async with httpx.AsyncClient() as http:
            answers = [await http.get(f"{s.status.http}/readyz", timeout=1) for s in mesh.supervisor.services]
        return all(answer.status_code == 200 for answer in answers)

    found = (
        registry_answers,
        marshaller_answers,
        inbox_is_read,
        marshaller_takes_submissions,
        watchers_see_changes,
        lease_is_held,
        all_are_ready,
    )
    return {check.__name__: check for check in found}


@pytest.mark.parametrize(
    ("sig", "away_s"),
    [(signal.SIGKILL, 0.0), (signal.SIGTERM, 0.0), (signal.SIGKILL, 7.0)],
    ids=["killed", "ended", "killed and away"],
)
async def test_everything_is_whole_again_within_5_s_of_a_restart(
    tmp_path: Path, sig: signal.Signals, away_s: float, record_property: Callable[[str, object], None]
) -> None:
    """Three times in a row. What ran meanwhile is reported by the agent and not made again; no node was lost."""
    gate = tmp_path / "gate"
    environment = {**install_executor(tmp_path / "plugin", "gate", EXECUTOR), "COMPUTEMESH_MODELS": "/nowhere"}
    async with running_mesh(tmp_path, ALL, copies={"work-marshaller": 2}, environment=environment) as mesh:
        client = await mesh.bus()
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("render",), slots=100)
        await node.join()
        mirror = Mirror(await mesh.bus(Role.SERVICES), storage.NODES)
        following = asyncio.create_task(mirror.follow())
        item = WorkItem(work_id="ran-meanwhile", work_type="gate", payload={"gate": str(gate)})
        await client.store(work.SUBMIT, item)
        await time_until(lambda: _is(mesh, "ran-meanwhile", WorkState.RUNNING))
        slowest_s: dict[str, float] = {}
        for turn in range(3):
            async with server_away(mesh, sig):
                pending = asyncio.create_task(client.call(work.LIST.subject, b"", timeout_s=30.0))
                gate.touch()  # The work ends while nobody can be told.
                await asyncio.sleep(away_s)
            names = checks(mesh, node, mirror, turn)
            times_s = await asyncio.gather(*map(time_until, names.values()))
            slowest_s |= {n: max(t, slowest_s.get(n, 0.0)) for n, t in zip(names, times_s, strict=True)}
            # Asked while the server was away, it is answered, or told that nobody answers; it does not hang.
            with contextlib.suppress(BusError):
                await asyncio.wait_for(pending, WHOLE_S * SLACK)
        record_property("slowest in s", {name: round(time_s, 2) for name, time_s in slowest_s.items()})
        late = {name: time_s for name, time_s in slowest_s.items() if time_s > WHOLE_S * SLACK}
        assert not late, "\n".join([str(late), *mesh.lines[-40:]])
        await time_until(lambda: _is(mesh, "ran-meanwhile", WorkState.COMPLETED))
        record = await client.ask(work.GET, WorkGet(work_id="ran-meanwhile"))
        assert isinstance(record, WorkRecord)
        assert (record.state, record.attempt, record.losses, record.result) == (WorkState.COMPLETED, 1, 0, "through")
        following.cancel()
        await node.leave()


async def test_a_report_that_was_lost_with_the_server_is_sent_again(tmp_path: Path) -> None:
    """It had been sent to a server that was killed before it read it. The work is not done again."""
    gate = tmp_path / "gate"
    environment = {**install_executor(tmp_path / "plugin", "gate", EXECUTOR), "COMPUTEMESH_MODELS": "/nowhere"}
    async with running_mesh(tmp_path, ALL, environment=environment) as mesh:
        item = WorkItem(work_id="w1", work_type="gate", payload={"gate": str(gate)})
        await (await mesh.bus()).store(work.SUBMIT, item)
        await time_until(lambda: _is(mesh, "w1", WorkState.RUNNING))
        mesh.kill("nats-server", signal.SIGSTOP)
        gate.touch()
        await until(lambda: any('"event": "ran"' in line for line in mesh.lines), what="the work to end")
        mesh.kill("nats-server")
        await time_until(lambda: _is(mesh, "w1", WorkState.COMPLETED))
        record = await (await mesh.bus()).ask(work.GET, WorkGet(work_id="w1"))
        assert isinstance(record, WorkRecord)
        assert (record.state, record.attempt, record.result) == (WorkState.COMPLETED, 1, "through")


async def _is(mesh: RunningMesh, work_id: str, state: WorkState) -> bool:
    record = await (await mesh.bus()).ask(work.GET, WorkGet(work_id=work_id), timeout_s=1)
    return isinstance(record, WorkRecord) and record.state is state
