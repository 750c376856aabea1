"""Everything is killed while work is in flight, and nothing is lost.

Goal: marshaller, node agent and NATS server are each ``kill -9``ed while 100 items are in flight, and every
item ends with exactly one recorded outcome.
Method: real processes under the real supervisor, and an executor installed the way any plug-in is. Kills
wait for progress, not for time. The same scenario is then run with the recovery broken on purpose, and must
fail: a test that survives that proves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Final

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from computemesh.bus import Bus, BusError
from computemesh.contracts import work
from computemesh.contracts.base import Role
from computemesh.contracts.work import FINAL, WorkItems, WorkList, WorkRecord, WorkState
from computemesh.testing import RunningMesh, running_mesh, until

# pyright: reportUnknownMemberType=false

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")

EXECUTOR: Final = """
import time
from computemesh.executors import Executor

class Square(Executor):
    def run(self, task, out_dir, progress):
        time.sleep(0.02)
        return {"square": task.payload["n"] ** 2}
"""

MUTANT: Final = """
import sys
if any("work_marshaller" in part for part in sys.orig_argv):
    from computemesh_services.work_marshaller import reign
    from computemesh_services.work_marshaller.journal import Journal
    {patch}
"""


INBOX_NOT_REPLAYED: Final = """
    async def at_the_end(self):
        await real(self)
        reply = await self._bus.call("$JS.API.STREAM.INFO.COMPUTE_WORK", b"")
        return __import__("json").loads(reply.data)["state"]["last_seq"] + 1
    real = reign.Reign._read_cursor
    reign.Reign._read_cursor = at_the_end
"""

BUCKET_NOT_LOADED: Final = """
    async def nothing(self, now):
        return 0
    reign.Reign._load = nothing
"""


def install_executor(folder: Path) -> dict[str, str]:
    """A plug-in package with the executor ``square``; gives the environment that finds it."""
    info = folder / "square-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "square_plugin.py").write_text(EXECUTOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: square\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[computemesh.executors]\nsquare = square_plugin:Square\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}


class Outcomes:
    """What the server published as recorded, by item: the sequences of final states."""

    def __init__(self) -> None:
        self.finals: dict[str, set[int]] = defaultdict(set)

    async def on_state(self, msg: Msg) -> None:
        record = json.loads(msg.data)
        if record["state"] in FINAL:
            assert msg.headers is not None
            self.finals[record["work_id"]].add(int(msg.headers["Nats-Sequence"]))

    @property
    def count(self) -> int:
        return len(self.finals)


async def watch_outcomes(mesh: RunningMesh) -> tuple[Client, Outcomes]:
    outcomes = Outcomes()

    async def ignore(_: Exception) -> None:
        """The server is killed on purpose."""

    nc = await nats.connect(
        mesh.url(Role.CLIENT), max_reconnect_attempts=-1, reconnect_time_wait=0.05, error_cb=ignore
    )  # fmt: skip
    await nc.subscribe("compute.work.state.v1.*", cb=outcomes.on_state)
    await nc.flush()
    return nc, outcomes


async def submit(nc: Client, number: int) -> None:
    """Publishes until the server says that it is stored, as a careful program would."""
    item = {"work_id": f"k{number}", "work_type": "square", "payload": {"n": number}}
    while True:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await nc.jetstream().publish("compute.work.submit.v1", json.dumps(item).encode(), timeout=1)
            return
        await asyncio.sleep(0.05)


async def count_of(bus: Bus, state: WorkState) -> int:
    """How many items are in a state."""
    answer = await bus.ask(work.LIST, WorkList(status=state, limit=1))
    return answer.count if isinstance(answer, WorkItems) else 0


async def settle(bus: Bus, count: int, *, quiet_s: float) -> dict[str, WorkRecord]:
    """Waits until *count* items are final, or none became final for *quiet_s*; gives what is recorded."""
    loop = asyncio.get_running_loop()
    best, moved_s = -1, loop.time()
    while best < count and loop.time() - moved_s < quiet_s:
        with contextlib.suppress(BusError):
            done = sum([await count_of(bus, state) for state in FINAL])
            if done > best:
                best, moved_s = done, loop.time()
        await asyncio.sleep(0.05)
    records: dict[str, WorkRecord] = {}
    for number in range(count):
        with contextlib.suppress(BusError):
            answer = await bus.ask(work.GET, work.WorkGet(work_id=f"k{number}"))
            if isinstance(answer, WorkRecord):
                records[answer.work_id] = answer
    return records


def violations(records: dict[str, WorkRecord], outcomes: Outcomes, count: int) -> list[str]:
    """Everything that is not as promised, in words."""
    found: list[str] = []
    for number in range(count):
        record = records.get(f"k{number}")
        if record is None:
            found.append(f"k{number} is unknown")
        elif record.state is not WorkState.COMPLETED:
            found.append(f"k{number} is {record.state}: {record.story[-3:]}")
        elif record.result != {"square": number**2}:
            found.append(f"k{number} has the result {record.result}")
        elif sum(move.state in FINAL for move in record.story) != 1:
            found.append(f"k{number} ended more than once: {record.story}")
    found += [f"{key}: outcomes {seqs}" for key, seqs in outcomes.finals.items() if len(seqs) > 1]
    return found


async def progress(outcomes: Outcomes, goal: int, within_s: float) -> None:
    """Waits for *goal* outcomes. When there is no progress any more, :func:`settle` tells."""
    with contextlib.suppress(AssertionError):
        await until(lambda: outcomes.count >= goal, what="progress", within_s=within_s)


async def run_scenario(mesh: RunningMesh, count: int, *, quiet_s: float, kills: tuple[str, ...]) -> list[str]:
    """Submits *count* items, kills each of *kills* as the work proceeds, and gives what went wrong."""
    nc, outcomes = await watch_outcomes(mesh)
    bus = await mesh.bus()
    try:
        await asyncio.gather(*(submit(nc, number) for number in range(count // 2)))
        for step, victim in enumerate(kills, 1):
            goal = count * step // (len(kills) + 3)
            await progress(outcomes, goal, quiet_s)
            mesh.kill(victim)
            if step == 1:  # While it is dead, the rest is submitted.
                await asyncio.gather(*(submit(nc, number) for number in range(count // 2, count)))
        records = await settle(bus, count, quiet_s=quiet_s)
        return violations(records, outcomes, count)
    finally:
        await nc.close()


@pytest.mark.parametrize(
    "kills",
    [("work-marshaller", "node-agent", "nats-server"), ("nats-server", "nats-server", "work-marshaller")],
    ids=",".join,
)
async def test_every_item_has_one_outcome_whatever_is_killed(tmp_path: Path, kills: tuple[str, ...]) -> None:
    """100 items in flight, each of the processes killed once or twice: 100 results, each recorded once."""
    environment = {**install_executor(tmp_path / "plugin"), "COMPUTEMESH_SLOTS": "4", "COMPUTEMESH_MODELS": "/nowhere"}
    async with running_mesh(tmp_path, ALL, environment=environment) as mesh:
        found = await run_scenario(mesh, 100, quiet_s=30.0, kills=kills)
        restarts = {status.name: status.restarts for status in mesh.supervisor.status().services}
        for victim in set(kills):
            assert restarts[victim] == kills.count(victim)
        assert not found, "\n".join(found[:10] + mesh.lines[-30:])


@pytest.mark.parametrize(
    "patch",
    [
        INBOX_NOT_REPLAYED,
        BUCKET_NOT_LOADED,
    ],
    ids=["inbox-not-replayed", "bucket-not-loaded"],
)
async def test_the_scenario_fails_when_recovery_is_broken(tmp_path: Path, patch: str) -> None:
    """The test above has teeth: with a marshaller that recovers wrongly it reports lost items."""
    environment = {**install_executor(tmp_path / "plugin"), "COMPUTEMESH_SLOTS": "2", "COMPUTEMESH_MODELS": "/nowhere"}
    (tmp_path / "plugin" / "sitecustomize.py").write_text(MUTANT.format(patch=patch))
    async with running_mesh(tmp_path, ALL, environment=environment) as mesh:
        found = await run_scenario(mesh, 30, quiet_s=4.0, kills=("work-marshaller",))
        assert found, "a broken recovery went unnoticed"
