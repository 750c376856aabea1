"""The node agent as a process: what it offers and takes, what heartbeats tell of it, and how it ends.

Goal: a node never runs more than it has room for, never the same attempt twice, and leaves nothing behind.

Method: an executor that waits for a file, on a mesh of its own; some assignments are delivered by the test in the
marshaller's place.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from computemesh.bus import Bus
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import Discover, NodeAnnouncement, NodeHeartbeat
from computemesh.contracts.work import (
    HANDED_BACK,
    Assignment,
    Delivery,
    Requirements,
    Stopped,
    WorkCancel,
    WorkFailed,
    WorkItem,
    WorkState,
    WorkStop,
)
from computemesh.testing import RunningMesh, install_executor, running_mesh, until

SERVICES: Final = ("node-registry", "work-marshaller", "node-agent")

GATE: Final = """
import os, signal, time
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        if task.payload.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (out_dir / f"attempt-{task.attempt}-{os.getpid()}").touch()
        while task.payload.get("waits", True) and not (out_dir / "open").exists():
            time.sleep(0.01)
        return {"model": task.model_name}
"""


class Node:
    """A mesh with one node, and what it says."""

    def __init__(self, mesh: RunningMesh, bus: Bus, results: Path) -> None:
        self.mesh = mesh
        self.bus = bus
        self.results = results
        self.announced: list[NodeAnnouncement] = []
        self.beats: list[NodeHeartbeat] = []
        self.failed: list[WorkFailed] = []

    async def listen(self) -> None:
        async def on_announce(said: NodeAnnouncement) -> None:
            self.announced.append(said)

        async def on_beat(beat: NodeHeartbeat) -> None:
            self.beats.append(beat)

        async def on_failed(report: WorkFailed) -> None:
            self.failed.append(report)

        await self.bus.subscribe(nodes.ANNOUNCE, on_announce)
        await self.bus.subscribe(nodes.HEARTBEAT, on_beat)
        await self.bus.subscribe(work.FAILED, on_failed)
        await self.bus.flush()

    async def announcement(self) -> NodeAnnouncement:
        await self.bus.publish(nodes.DISCOVER, Discover(node_ids=["n1"]))
        await until(lambda: bool(self.announced), what="an announcement")
        return self.announced[-1]

    async def deliver(self, work_id: str, attempt: int = 1, **more: Any) -> Delivery:
        """Hands over an assignment, as a marshaller does."""
        asked = Assignment(work_id=work_id, attempt=attempt, node_id="n1", work_type="gate", **more)
        answer = await self.bus.ask(work.DELIVER, asked, target="n1")
        assert isinstance(answer, Delivery)
        return answer

    async def stop(self, work_id: str, attempt: int = 1) -> bool:
        answer = await self.bus.ask(work.STOP, WorkStop(work_id=work_id, attempt=attempt), target="n1")
        assert isinstance(answer, Stopped)
        return answer.was_running

    def pids(self, work_id: str, attempt: int = 1) -> list[int]:
        """The processes that began this attempt."""
        return [int(path.name.rpartition("-")[2]) for path in (self.results / work_id).glob(f"attempt-{attempt}-*")]

    async def begun(self, work_id: str, attempt: int = 1) -> int:
        await until(lambda: bool(self.pids(work_id, attempt)), what=f"attempt {attempt} at {work_id} to begin")
        return self.pids(work_id, attempt)[0]

    def open(self, work_id: str) -> None:
        """Lets it finish."""
        (self.results / work_id / "open").touch()

    def logged(self, text: str) -> bool:
        return any(line.startswith("node-agent") and text in line for line in self.mesh.lines)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs(work_id: str) -> Callable[[NodeHeartbeat], bool]:
    return lambda beat: any(one.work_id == work_id for one in beat.running)


@asynccontextmanager
async def node(folder: Path, **environment: str) -> AsyncGenerator[Node]:
    """A node whose only work is ``gate``, unless the environment says otherwise."""
    results = folder / "results"
    settings = {
        **install_executor(folder / "plugin", "gate", GATE),
        "COMPUTEMESH_MODELS": "/nowhere.gguf",
        "RESULTS_DIR": str(results),
        "COMPUTEMESH_SLOTS": "4",
        **environment,
    }
    async with running_mesh(folder, SERVICES, environment=settings) as mesh:
        one = Node(mesh, await mesh.bus(Role.SERVICES), results)
        await one.listen()
        yield one


@pytest.fixture
async def quiet(tmp_path: Path) -> AsyncGenerator[Node]:
    """A node that sends a heartbeat when there is something to tell, and not from time to time."""
    settings = {"COMPUTEMESH_HEARTBEAT_INTERVAL_S": "3600", "COMPUTEMESH_LOST_AFTER_S": "3600"}
    async with node(tmp_path, **settings, COMPUTEMESH_SUSPECT_AFTER_S="3000", COMPUTEMESH_WORK_CPUS="4") as one:
        yield one


async def test_an_attempt_that_is_handed_over_again_while_the_one_before_it_ends_starts_once(quiet: Node) -> None:
    """The old one ignores SIGTERM, so that it takes a while; both answers say that the new one is accepted."""
    assert (await quiet.deliver("w1", payload={"stubborn": True})).accepted
    first = await quiet.begun("w1")
    answers = await asyncio.gather(*(quiet.deliver("w1", 2) for _ in range(3)))
    assert [answer.accepted for answer in answers] == [True] * 3
    await quiet.begun("w1", 2)
    assert not lives(first)
    assert len(quiet.pids("w1", 2)) == 1
    assert await quiet.stop("w1", 2)
    assert len(quiet.pids("w1", 2)) == 1


async def test_what_does_not_fit_beside_what_runs_is_declined_with_the_numbers(quiet: Node) -> None:
    """As soon as there is room, it is taken. The announcement says how much work may use."""
    assert (await quiet.announcement()).work_cpus == 4
    assert (await quiet.deliver("w1", requirements=Requirements(cpus=3))).accepted
    two = Requirements(cpus=2)
    answer = await quiet.deliver("w2", requirements=two)
    assert (answer.accepted, answer.reason) == (False, "3 of 4 CPUs taken by work, needs 2")
    await quiet.begun("w1")
    assert await quiet.stop("w1")
    assert (await quiet.deliver("w2", requirements=two)).accepted


async def test_a_heartbeat_tells_soon_that_work_began_or_ended_and_short_work_costs_none(quiet: Node) -> None:
    """Many in a second are one; the usual heartbeat would be an hour away."""
    await quiet.announcement()
    assert (await quiet.deliver("w1")).accepted
    await until(lambda: any(map(runs("w1"), quiet.beats)), what="a heartbeat that tells of the work")
    quiet.open("w1")
    await until(lambda: not quiet.beats[-1].running, what="a heartbeat that tells of its end")
    before, began_at = len(quiet.beats), time.monotonic()
    for number in range(20):
        assert (await quiet.deliver(f"short-{number}", payload={"waits": False})).accepted
        await until((quiet.results / f"short-{number}" / "responses.json").exists, what="its end")
    assert len(quiet.beats) - before <= time.monotonic() - began_at + 2


async def test_a_node_with_nothing_to_run_is_here_and_gets_no_work(tmp_path: Path) -> None:
    """Its GPUs can be reserved all the same."""
    async with node(tmp_path, TASK_TOPICS="tasks.paint") as one:
        said = await one.announcement()
        assert (said.slots, said.work_types) == (0, [])
        answer = await one.deliver("w1")
        assert (answer.accepted, answer.reason) == (False, "runs no 'gate', but nothing")
        assert one.logged("Using topics: ['tasks.paint']")
        assert one.logged("subscribed to topics: []")


async def test_a_worker_of_mloc_finds_its_settings_and_its_log_lines(tmp_path: Path) -> None:
    """Topics, tags, default model, results; and a command where commands are allowed, without the mesh's secrets."""
    settings = {
        "TASK_TOPICS": "tasks.gate,tasks.command,tasks.ppo",
        "WORKER_TAGS": "fast",
        "LOG_LEVEL": "DEBUG",
        "COMPUTEMESH_ALLOW_COMMANDS": "true",
        "ORCHESTRATOR_TOKEN": "dev-token",
    }
    async with node(tmp_path, **settings) as one:
        fast = Requirements(labels={"fast": "true"})
        sent = await one.mesh.submit(WorkItem(work_type="command", payload={"argv": ["env"]}, requirements=fast))
        done = await one.mesh.record(sent.work_id)
        assert done.state is WorkState.COMPLETED
        assert json.loads((one.results / sent.work_id / "responses.json").read_text()) == done.result
        secrets = ("NATS_URL=", "COMPUTEMESH_TOKEN=", "ORCHESTRATOR_TOKEN=", one.mesh.credentials.token)
        log = (one.results / sent.work_id / "log.txt").read_text()
        assert f"COMPUTEMESH_WORK_ID={sent.work_id}" in log
        assert not any(secret in log for secret in secrets)
        assert (await one.announcement()).work_types == ["command", "gate"]
        for line in (
            "TASK_TOPICS environment variable: tasks.gate,tasks.command,tasks.ppo",
            "Using topics: ['tasks.command', 'tasks.gate', 'tasks.ppo']",
            "subscribed to topics: ['tasks.command', 'tasks.gate']",
            "Selected executor: CommandExecutor for task_type: command",
        ):
            assert one.logged(line), line


async def test_commands_are_not_offered_unless_an_operator_says_so(tmp_path: Path) -> None:
    """An item of that type waits for a node where they are."""
    async with node(tmp_path) as one:
        assert (await one.announcement()).work_types == ["gate"]
        assert one.logged("TASK_TOPICS environment variable: None")
        asked = Assignment(work_id="w1", attempt=1, node_id="n1", work_type="command", payload={"argv": ["true"]})
        answer = await one.bus.ask(work.DELIVER, asked, target="n1")
        assert isinstance(answer, Delivery)
        assert (answer.accepted, answer.reason) == (False, "runs no 'command', but gate")


async def test_cancelling_an_item_ends_its_whole_family_although_it_ignores_sigterm(tmp_path: Path) -> None:
    """A shell, its child and its grandchild; the answer to the cancellation is the record."""
    script = "trap '' TERM; (trap '' TERM; sleep 1000 & echo $! > c; wait) & echo $! > b; echo $$ > a; wait"
    async with node(tmp_path, COMPUTEMESH_ALLOW_COMMANDS="true") as one:
        item = WorkItem(work_type="command", payload={"argv": ["/bin/sh", "-c", script]})
        sent = await one.mesh.submit(item)
        files = [one.results / sent.work_id / name for name in "abc"]
        await until(lambda: all(file.exists() and file.read_text().strip() for file in files), what="the family")
        family = [int(file.read_text()) for file in files]
        assert all(map(lives, family))
        asked_at = time.monotonic()
        await one.bus.ask(work.CANCEL, WorkCancel(work_id=sent.work_id))
        await until(lambda: not any(map(lives, family)), what="the end of the family")
        assert time.monotonic() - asked_at < 3, "a second, and what a busy machine adds"
        assert (await one.mesh.record(sent.work_id)).state is WorkState.CANCELLED


@pytest.mark.parametrize("finish_s", [60, 0])
async def test_a_node_that_ends_finishes_what_it_can_and_hands_back_the_rest(tmp_path: Path, finish_s: int) -> None:
    """What it hands back is no failure of the item: the node's next life gets it."""
    async with node(tmp_path, COMPUTEMESH_FINISH_S=str(finish_s)) as one:
        sent = await one.mesh.submit(WorkItem(work_type="gate"))
        first = await one.begun(sent.work_id)
        one.mesh.kill("node-agent", signal.SIGTERM)
        if finish_s:
            await until(lambda: one.logged('"finishing"'), what="the drain")
            assert lives(first)
        else:
            await one.begun(sent.work_id, 2)
            assert not lives(first)
        one.open(sent.work_id)
        record = await one.mesh.record(sent.work_id)
        assert (record.state, record.attempt, record.failures) == (WorkState.COMPLETED, 1 if finish_s else 2, 0)
        assert [report.code for report in one.failed] == ([] if finish_s else [HANDED_BACK])


async def test_what_does_not_finish_is_handed_back_before_the_time_to_drain_is_over(tmp_path: Path) -> None:
    """However long it might go on by itself."""
    async with node(tmp_path, COMPUTEMESH_FINISH_S="600", COMPUTEMESH_DRAIN_TIMEOUT_S="6") as one:
        sent = await one.mesh.submit(WorkItem(work_type="gate"))
        first = await one.begun(sent.work_id)
        one.mesh.kill("node-agent", signal.SIGTERM)
        await one.begun(sent.work_id, 2)
        assert not lives(first)
        assert [report.code for report in one.failed] == [HANDED_BACK]


async def test_a_slot_is_free_for_the_next_item_as_soon_as_the_one_before_is_reported(tmp_path: Path) -> None:
    """With a queue before it, a node declines nothing because of what it has just reported."""
    async with node(tmp_path) as one:
        items = [f"w{number}" for number in range(30)]
        for work_id in items:
            await one.mesh.submit(WorkItem(work_id=work_id, work_type="gate", payload={"waits": False}))
        records = [await one.mesh.record(work_id) for work_id in items]
        assert {record.state for record in records} == {WorkState.COMPLETED}
        assert {record.attempt for record in records} == {1}, [record.story for record in records if record.attempt > 1]
