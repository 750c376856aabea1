"""One fault at a time, with the outcome that recovery owes.

Goal: each step of the recovery is needed, and does what it is for. The mutations in ``.ci/mutants.toml`` take
the steps away one by one, and each makes a test here fail.
Method: real processes and a real server; a node in the hands of the test, so that nothing happens by chance.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from computemesh.bus import Bucket
from computemesh.contracts import storage, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.work import WorkCancel, WorkItem, WorkItems, WorkList, WorkRecord, WorkState
from computemesh.testing import DirectNode, RunningMesh, running_mesh, until
from tests.chaos.history import History, told, violations


@asynccontextmanager
async def mesh_with_node(folder: Path, *, marshallers: int = 1) -> AsyncGenerator[tuple[RunningMesh, DirectNode]]:
    """A control plane, and a node that does what the test says."""
    async with running_mesh(folder, copies={"work-marshaller": marshallers}) as mesh:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2")
        await node.join()
        try:
            yield mesh, node
        finally:
            await node.leave()


async def submit(mesh: RunningMesh, work_id: str, **item: Any) -> None:
    """Returns once the item is stored in the inbox."""
    await (await mesh.bus()).store(work.SUBMIT, WorkItem(work_id=work_id, work_type="inference", **item))


async def stored(mesh: RunningMesh, work_id: str) -> WorkRecord | None:
    """What the bucket holds, whoever reigns."""
    entry = await Bucket(await mesh.bus(Role.SERVICES), storage.WORK).get(work_id)
    return entry.value if entry else None


async def until_stored(mesh: RunningMesh, work_id: str, *states: WorkState) -> WorkRecord:
    """Waits until the bucket holds the item in one of these states."""
    record: WorkRecord | None = None
    try:
        async with asyncio.timeout(30):
            while record is None or record.state not in states:
                record = await stored(mesh, work_id)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{work_id} is {told(record) if record else 'not stored'}, not {states}") from None
    return record


async def until_given(node: DirectNode, work_id: str, attempt: int) -> work.Assignment:
    """Waits until an attempt arrived at the node."""
    await until(lambda: attempt in node.attempts(work_id), what=f"attempt {attempt} at {work_id}; {node.given}")
    return next(asked for asked in node.given if (asked.work_id, asked.attempt) == (work_id, attempt))


async def until_acting(mesh: RunningMesh, *, other_than: str = "") -> str:
    """The marshaller that acts, once one does: its name."""
    async with asyncio.timeout(30), httpx.AsyncClient() as http:
        while True:
            for service in mesh.supervisor.services:
                if service.spec.name == "work-marshaller" and service.name != other_than and service.status.http:
                    try:
                        health = (await http.get(f"{service.status.http}/healthz", timeout=1)).json()
                    except httpx.TransportError:
                        continue
                    if health.get("acting"):
                        return service.name
            await asyncio.sleep(0.02)


def said(mesh: RunningMesh, name: str, what: str) -> int:
    """How many lines of a service's log hold a text."""
    return sum(line.startswith(f"{name} ") and what in line for line in mesh.lines)


async def limit_bucket(mesh: RunningMesh, **limits: int) -> None:
    """Makes the server refuse some writes of work records, as a full disk would."""
    bus = await mesh.bus(Role.SERVICES)
    reply = await bus.call(f"$JS.API.STREAM.INFO.{storage.WORK.stream}", b"")
    config = json.loads(reply.data)["config"] | limits
    reply = await bus.call(f"$JS.API.STREAM.UPDATE.{storage.WORK.stream}", json.dumps(config).encode())
    assert "error" not in json.loads(reply.data), reply.data


TOO_LARGE = {"text": "x" * 3000}
"""A payload whose record does not fit through :func:`limit_bucket` below; the inbox position does."""


# --- a marshaller dies ---------------------------------------------------------------------------------------------


async def test_a_report_that_was_stored_while_nobody_reigned_counts(tmp_path: Path) -> None:
    """The next life reads the inbox from the position that was noted; the attempt is not made again."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w1")
        asked = await until_given(node, "w1", 1)
        await until_stored(mesh, "w1", WorkState.RUNNING)
        mesh.kill("work-marshaller")
        await node.complete(asked, "done")
        record = await until_stored(mesh, "w1", WorkState.COMPLETED)
        assert (record.attempt, record.result) == (1, "done")


async def test_a_marshaller_that_stopped_keeps_no_question_from_the_one_that_acts(tmp_path: Path) -> None:
    """The server still counts it among those who listen, and does so for minutes."""
    async with mesh_with_node(tmp_path, marshallers=2) as (mesh, _node):
        client = await mesh.bus()
        stopped = await until_acting(mesh)
        mesh.kill(stopped, signal.SIGSTOP)
        await until_acting(mesh, other_than=stopped)
        for number in range(20):
            answer = await client.ask(work.REQUEST, WorkItem(work_id=f"w{number}", work_type="inference"), timeout_s=2)
            assert isinstance(answer, WorkRecord), answer
        mesh.kill(stopped, signal.SIGCONT)
        # What it heard meanwhile was the other's to answer.
        await until(lambda: said(mesh, stopped, "stepped down"), what="the one that was stopped to step down")
        listed = await client.ask(work.LIST, WorkList())
        assert isinstance(listed, WorkItems)
        assert listed.count == 20


async def test_an_item_that_waited_when_the_marshaller_died_still_gets_its_turn(tmp_path: Path) -> None:
    """It is read from the bucket: the inbox position is beyond it."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await node.leave()
        await submit(mesh, "w1", requirements=work.Requirements(node_id="n3"))
        await until_stored(mesh, "w1", WorkState.PENDING)
        await until_position(mesh, beyond=1)
        mesh.kill("work-marshaller")
        other = DirectNode(await mesh.bus(Role.NODE, "n3"), "n3")
        await other.join()
        await other.complete(await until_given(other, "w1", 1), "done")
        await until_stored(mesh, "w1", WorkState.COMPLETED)
        await other.leave()


async def test_an_assignment_without_an_answer_is_sent_again_by_the_next_reign_with_the_same_number(
    tmp_path: Path,
) -> None:
    """It may never have arrived; a node that has it says so again."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        node.answers.clear()
        await submit(mesh, "w1")
        asked = await until_given(node, "w1", 1)
        mesh.kill("work-marshaller")
        before = len(node.given)
        node.running.clear()  # Nor does it say that it runs.
        await until(lambda: mesh.pid("work-marshaller") and said(mesh, "work-marshaller", "recovered") == 2, what="it")
        await until(lambda: len(node.given) > before, what="the same assignment")
        node.answers.set()
        await node.complete(asked)
        await until_stored(mesh, "w1", WorkState.COMPLETED)
        assert set(node.attempts("w1")) == {1}


# --- a marshaller that was given up wakes up -------------------------------------------------------------------------


async def test_a_leader_that_wakes_late_records_nothing_again(tmp_path: Path) -> None:
    """It reads what its successor read already, and decides the same; the compare-and-set refuses it."""
    async with mesh_with_node(tmp_path, marshallers=2) as (mesh, node):
        history = History(accepted={f"w{number}": number for number in range(4)})
        watch = await mesh.bus()
        await watch.listen("compute.work.state.v1.*", history.on_state)
        await watch.flush()
        for work_id in history.accepted:
            await submit(mesh, work_id)
        for work_id in history.accepted:
            await until_stored(mesh, work_id, WorkState.RUNNING)
        leader = await until_acting(mesh)
        mesh.kill(leader, signal.SIGSTOP)
        for asked in list(node.running.values()):
            await node.complete(asked, {"square": history.accepted[asked.work_id] ** 2})
        successor = await until_acting(mesh, other_than=leader)
        for work_id in history.accepted:
            history.stored = {**history.stored, work_id: await until_stored(mesh, work_id, WorkState.COMPLETED)}
        mesh.kill(leader, signal.SIGCONT)
        await until(lambda: said(mesh, leader, "stepped down"), what="the old leader to notice")
        await watch.flush()
        assert not violations(history)
        assert await until_acting(mesh) == successor


# --- what cannot be stored -------------------------------------------------------------------------------------------


async def test_an_assignment_that_cannot_be_stored_is_not_sent(tmp_path: Path) -> None:
    """A node must run nothing that would be unknown after a crash."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await limit_bucket(mesh, max_msg_size=1000)
        await submit(mesh, "w1", payload=TOO_LARGE)
        await until(lambda: said(mesh, "work-marshaller", "the journal stops") >= 2, what="two reigns that gave up")
        assert node.given == []
        await limit_bucket(mesh, max_msg_size=-1)
        await node.complete(await until_given(node, "w1", node.given[-1].attempt if node.given else 1), "done")
        await until_stored(mesh, "w1", WorkState.COMPLETED)


async def test_the_inbox_position_never_passes_an_item_that_is_not_stored(tmp_path: Path) -> None:
    """Once there is room again, it is read again."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w0")
        await node.complete(await until_given(node, "w0", 1))
        await until_stored(mesh, "w0", WorkState.COMPLETED)
        await limit_bucket(mesh, max_msg_size=1000)
        await submit(mesh, "w1", payload=TOO_LARGE, requirements=work.Requirements(node_id="n9"))
        await until(lambda: said(mesh, "work-marshaller", "the journal stops") >= 3, what="three reigns that gave up")
        assert await stored(mesh, "w1") is None
        await limit_bucket(mesh, max_msg_size=-1)
        await until_stored(mesh, "w1", WorkState.PENDING)


async def until_position(mesh: RunningMesh, *, beyond: int) -> None:
    """Waits until the inbox is noted as reflected beyond a sequence."""
    bus = await mesh.bus(Role.SERVICES)
    async with asyncio.timeout(30):
        while True:
            reply = await bus.call(
                f"$JS.API.DIRECT.GET.{storage.WORK.stream}.{storage.WORK.subject('meta.inbox')}", b""
            )
            if reply.data and json.loads(reply.data)["next_seq"] > beyond:
                return
            await asyncio.sleep(0.02)


# --- nodes -----------------------------------------------------------------------------------------------------------


async def test_cancelling_tells_the_node_to_end_the_attempt(tmp_path: Path) -> None:
    """Once the cancellation is stored."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w1")
        await until_given(node, "w1", 1)
        await (await mesh.bus()).ask(work.CANCEL, WorkCancel(work_id="w1", reason="changed my mind"))
        await until(lambda: node.stops, what="the stop")
        assert (node.stops[0].work_id, node.stops[0].attempt) == ("w1", 1)
        assert node.running == {}


async def test_an_attempt_that_nobody_will_report_is_made_again_once_its_node_is_lost(tmp_path: Path) -> None:
    """A node that fell silent; when it comes back, its report of the old attempt changes nothing."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w1")
        old = await until_given(node, "w1", 1)
        await until_stored(mesh, "w1", WorkState.RUNNING)
        await node.leave()
        other = DirectNode(await mesh.bus(Role.NODE, "n3"), "n3")
        await other.join()
        new = await until_given(other, "w1", 2)
        await node.complete(old, "old")
        await until(lambda: said(mesh, "work-marshaller", "refused a late report"), what="a word about the late report")
        line = next(line for line in mesh.lines if "refused a late report" in line)
        told_of = json.loads(line.partition(" ")[2])
        assert (told_of["work_id"], told_of["attempt"], told_of["node"]) == ("w1", 1, "n2")
        assert (told_of["current_attempt"], told_of["current_node"]) == (2, "n3")
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"{mesh.http('work-marshaller')}/metrics")).text
        assert 'computemesh_work_reports_ignored_total{why="old_attempt"} 1.0' in metrics
        await other.complete(new, "new")
        record = await until_stored(mesh, "w1", WorkState.COMPLETED)
        assert (record.result, record.losses, record.failures) == ("new", 1, 0)
        await other.leave()


async def test_a_node_that_was_born_again_gets_its_work_again_at_once(tmp_path: Path) -> None:
    """Its new session says that nothing runs any more; nobody waits until it is missed."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w1")
        await until_given(node, "w1", 1)
        await until_stored(mesh, "w1", WorkState.RUNNING)
        await node.restart()
        await node.complete(await until_given(node, "w1", 2), "done")
        record = await until_stored(mesh, "w1", WorkState.COMPLETED)
        assert any("restarted" in move.reason for move in record.story)


# --- what was promised to somebody -----------------------------------------------------------------------------------


async def test_a_cancellation_is_confirmed_only_once_it_is_stored(tmp_path: Path) -> None:
    """Whoever is told that an item is cancelled finds it so, whatever dies next."""
    async with mesh_with_node(tmp_path) as (mesh, node):
        await submit(mesh, "w1", payload=TOO_LARGE)
        await until_given(node, "w1", 1)
        await until_stored(mesh, "w1", WorkState.RUNNING)
        await limit_bucket(mesh, max_msg_size=1000)
        answer = await (await mesh.bus()).ask(work.CANCEL, WorkCancel(work_id="w1"))
        assert isinstance(answer, Refused), answer
        assert (answer.code, answer.status, answer.retry) == ("unavailable", 503, "later")
        await limit_bucket(mesh, max_msg_size=-1)
        record = await stored(mesh, "w1")
        assert record is not None
        assert record.state is WorkState.RUNNING
