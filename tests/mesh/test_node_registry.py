"""The node-registry with real processes: who is here, told the same by every replica, through deaths and duplicates.

Method: two replicas, nodes in the hands of the test, plain NATS and plain HTTP where outsiders would use them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from computemesh.bus import Bucket, Bus, BusError
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import (
    Discover,
    NodeAlive,
    NodeAnnouncement,
    NodeBriefs,
    NodeDrain,
    NodeDrained,
    NodeForget,
    NodeForgotten,
    NodeGet,
    NodeHeartbeat,
    NodeList,
    NodeLost,
    NodeRecord,
    NodeRefused,
    NodesQuery,
    NodesStats,
    NodeState,
    NodeUndrain,
    NodeView,
    StatsAsk,
)
from computemesh.contracts.work import WorkExplanation, WorkGet, WorkItem, WorkState
from computemesh.hardware import GpuUse, Tier
from computemesh.testing import DirectNode, RunningMesh, install_executor, running_mesh, until
from computemesh.testing.builders import a_gpu
from computemesh_services.node_registry.losses import NOTES, TOLD_KEY

REPLICAS = ("node-registry", "node-registry-2")

EXECUTOR = """
from computemesh.executors import Executor


class Plugin(Executor):
    def run(self, task, out_dir, progress):
        return {"done": True}
"""


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """Two registries and a marshaller."""
    async with running_mesh(tmp_path, copies={"node-registry": 2}) as running:
        yield running


async def heard(bus: Bus, event: Any) -> list[Any]:
    """What is said of *event* from now on."""
    found: list[Any] = []

    async def on_event(payload: Any) -> None:
        found.append(payload)

    await bus.subscribe(event, on_event)
    await bus.flush()
    return found


async def get(mesh: RunningMesh, node_id: str) -> NodeView | None:
    with contextlib.suppress(BusError):
        answer = await (await mesh.bus()).ask(nodes.GET, NodeGet(node_id=node_id))
        return answer if isinstance(answer, NodeView) else None
    return None


async def becomes(mesh: RunningMesh, node_id: str, **facts: Any) -> NodeView:
    """The node, once all of *facts* are true of it."""
    async with asyncio.timeout(30):
        while True:
            found = await get(mesh, node_id)
            if found is not None and all(getattr(found, name) == value for name, value in facts.items()):
                return found
            await asyncio.sleep(0.02)


async def beating(bus: Bus, beat: NodeHeartbeat) -> asyncio.Task[None]:
    async def forever() -> None:
        while True:
            await bus.publish(nodes.HEARTBEAT, beat)
            await asyncio.sleep(0.2)

    return asyncio.create_task(forever())


def edges(mesh: RunningMesh) -> list[httpx.AsyncClient]:
    """Both registries over HTTP."""
    return [httpx.AsyncClient(base_url=mesh.http(name), timeout=10) for name in REPLICAS]


# --- what is written by one replica is known to the other -----------------------------------------------------------


async def test_what_one_replica_wrote_the_other_answers_at_once(mesh: RunningMesh) -> None:
    """Register, drain, undrain and forget, each asked of one and seen at the other. No pause between."""
    first, second = edges(mesh)
    for turn in range(20):
        node_id = f"n-{turn}"
        assert (await first.post("/api/v1/nodes/register", json={"node_id": node_id})).status_code == 200
        assert (await second.get(f"/api/v1/nodes/{node_id}")).status_code == 200
        drained = await second.post(f"/api/v1/nodes/{node_id}/drain", json={"reason": "fans"})
        assert (drained.json()["node"]["drained"], drained.json()["changed"]) == (True, True)
        again = await first.post(f"/api/v1/nodes/{node_id}/drain", json={"reason": "fans"})
        assert (again.json()["node"]["drain_reason"], again.json()["changed"]) == ("fans", False)
        await second.post(f"/api/v1/nodes/{node_id}/drain", json={"reason": "more fans"})
        free = await first.post(f"/api/v1/nodes/{node_id}/undrain", json={})
        assert (free.json()["node"]["drained"], free.json()["changed"]) == (False, True)
        assert (await second.post(f"/api/v1/nodes/{node_id}/undrain", json={})).json()["changed"] is False
        assert (await first.delete(f"/api/v1/nodes/{node_id}")).status_code == 200
        assert (await second.delete(f"/api/v1/nodes/{node_id}")).status_code == 404
    for client in (first, second):
        await client.aclose()


async def test_both_replicas_tell_what_heartbeats_say(mesh: RunningMesh) -> None:
    """Each hears everyone; the clock of a node that is wrong is shown and held against nobody."""
    node = await mesh.bus(Role.NODE, "gpu-1")
    await node.ask(nodes.REGISTER, NodeAnnouncement(node_id="gpu-1", gpus=[a_gpu(24_000)], slots=3))
    beat = NodeHeartbeat(
        node_id="gpu-1", cpu_percent=40.0, memory_available_mb=1000, loaded_models=["llama"], sent_at=1.0,
        gpus=[GpuUse(index=0, vram_used_mb=20_000)],
    )  # fmt: skip
    task = await beating(node, beat)
    for client in edges(mesh):
        async with asyncio.timeout(30), client:
            while True:
                told = (
                    await client.get("/api/v1/nodes?min_vram_free_mb=4000&loaded_model=llama&online_only=true")
                ).json()
                if told["count"]:
                    break
                await asyncio.sleep(0.02)
            (view,) = told["nodes"]
            assert (view["gpus"][0]["vram_used_mb"], view["cpu_percent"], view["running"]) == (20_000, 40.0, 0)
            assert view["clock_skew_s"] < -1e6
            assert (await client.get("/api/v1/nodes?min_vram_free_mb=4001")).json()["count"] == 0
            stats = (await client.get("/api/v1/stats")).json()
            assert (stats["gpus"], stats["vram_used_mb"], stats["slots"]) == (1, 20_000, 3)
    task.cancel()
    client_bus = await mesh.bus()
    briefs = await client_bus.ask(nodes.LIST, NodesQuery(min_tier=Tier.GPU_PEER))
    assert isinstance(briefs, NodeBriefs)
    assert [(brief.node_id, brief.vram_used_mb) for brief in briefs.nodes] == [("gpu-1", 20_000)]
    assert isinstance(await client_bus.ask(nodes.STATS, StatsAsk()), NodesStats)


async def test_a_query_with_lists_and_labels_says_the_same_over_http_and_the_bus(mesh: RunningMesh) -> None:
    """Lists are repeated, labels name their key; pages go on where the last one ended, on any replica."""
    bus = await mesh.bus(Role.SERVICES)
    for n in range(5):
        said = NodeAnnouncement(node_id=f"n{n}", labels={"zone": "a" if n else "b", "rack": "1"})
        assert isinstance(await bus.ask(nodes.REGISTER, said), NodeRecord)
    found: list[str] = []
    after = ""
    first, second = edges(mesh)
    async with first, second:
        while True:
            asked: dict[str, Any] = {
                "states": ["online", "lost"],
                "labels[zone]": "a",
                "labels[rack]": "1",
                "limit": 2,
                "after": after,
            }
            answer = await (second if len(found) % 4 else first).get("/api/v1/nodes", params=asked)
            assert answer.status_code == 200, answer.text
            assert answer.json()["count"] == 4
            found += [node["node_id"] for node in answer.json()["nodes"]]
            if not (after := answer.json()["next"]):
                break
        assert found == ["n1", "n2", "n3", "n4"]
        same = await bus.ask(nodes.QUERY, NodesQuery(states=[NodeState.ONLINE], labels={"zone": "a"}))
        assert isinstance(same, NodeList)
        assert [node.node_id for node in same.nodes] == found


async def test_what_makes_no_sense_is_refused_by_its_field_on_both_transports(mesh: RunningMesh) -> None:
    """Never taken for what matches all or nothing."""
    bus = await mesh.bus(Role.SERVICES)
    (client, other) = edges(mesh)
    await other.aclose()
    wrong: list[tuple[Any, str, str]] = [
        (nodes.QUERY, '{"min_tier": "BEST"}', "min_tier"),
        (nodes.QUERY, '{"sort": "size"}', "sort"),
        (nodes.QUERY, '{"min_vram_mb": -1}', "min_vram_mb"),
        (nodes.QUERY, '{"min_memory_mb": 1.5}', "min_memory_mb"),
        (nodes.QUERY, '{"states": ["gone"]}', "states[0]"),
        (nodes.QUERY, '{"after": "nowhere"}', "after"),
        (nodes.QUERY, '{"min_compute_capability": "new"}', "min_compute_capability"),
        (nodes.REGISTER, '{"node_id": "a b"}', "node_id"),
        (nodes.REGISTER, '{"node_id": "a", "tier": "HUGE"}', "tier"),
        (nodes.REGISTER, '{"node_id": "a", "slots": -1}', "slots"),
        (nodes.REGISTER, '{"node_id": "a", "gpus": [{"vram_total_mb": -1}]}', "gpus[0].vram_total_mb"),
        (nodes.ALIVE, '{"node_id": "a", "cpu_percent": -1}', "cpu_percent"),
        (nodes.ALIVE, '{"node_id": "a", "gpus": [{"index": 0, "vram_used_mb": -5}]}', "gpus[0].vram_used_mb"),
        (nodes.ALIVE, '{"node_id": "a", "sent_at": "now"}', "sent_at"),
        (nodes.DRAIN, '{"node_id": "*"}', "node_id"),
    ]
    async with client:
        for request, body, field in wrong:
            reply = await bus.call(request.subject, body.encode())
            assert (reply.headers or {})["Nats-Service-Error-Code"] == "400"
            assert json.loads(reply.data)["field"] == field
            path = request.http[0].path.replace("{node_id}", "a")
            if request is not nodes.DRAIN:  # There the path names the node.
                answer = await client.post(path, content=body, headers={"content-type": "application/json"})
                assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text
        for name in ("min_vram_mb", "cpu_percent"):
            reply = await bus.call(nodes.QUERY.subject, b'{"%s": NaN}' % name.encode())
            assert json.loads(reply.data)["code"] == "bad_message"
        large = {f"l{n}": "x" * 200 for n in range(64)}
        node = {"node_id": "a", "labels": large, "models": ["m" * 200] * 1000, "work_types": ["w" * 200] * 300}
        reply = await bus.call(nodes.REGISTER.subject, json.dumps(node).encode())
        assert json.loads(reply.data)["code"] == "too_large"


async def test_a_list_that_does_not_fit_into_a_message_comes_in_pages(mesh: RunningMesh) -> None:
    """Whatever limit is asked for, on both transports."""
    bus = await mesh.bus(Role.SERVICES)
    labels = {f"label-{n:02}": "x" * 200 for n in range(60)}

    async def register(n: int) -> None:
        await bus.ask(nodes.REGISTER, NodeAnnouncement(node_id=f"n{n:03}", labels=labels))

    await asyncio.gather(*map(register, range(150)))
    found: list[str] = []
    query = NodesQuery(limit=10_000)
    pages = 0
    while True:
        reply = await bus.call(nodes.QUERY.subject, json.dumps({"limit": 10_000, "after": query.after}).encode())
        assert len(reply.data) <= 1024 * 1024
        answer = json.loads(reply.data)
        assert answer["count"] == 150
        found += [node["node_id"] for node in answer["nodes"]]
        pages += 1
        if not answer["next"]:
            break
        query = NodesQuery(limit=10_000, after=answer["next"])
    assert pages > 1
    assert found == [f"n{n:03}" for n in range(150)]


# --- signs of life --------------------------------------------------------------------------------------------------


async def test_a_node_that_nobody_knows_is_asked_once_and_comes_back_by_itself(mesh: RunningMesh) -> None:
    """Its heartbeats tell that it is there: fifty of them are one question, by name."""
    node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2")
    await node.join()
    await becomes(mesh, "n2", monitored=True)
    services = await mesh.bus(Role.SERVICES)
    asked: list[Discover] = await heard(services, nodes.DISCOVER)
    ghost = await mesh.bus(Role.NODE, "ghost")
    for _ in range(50):
        await ghost.publish(nodes.HEARTBEAT, NodeHeartbeat(node_id="ghost"))
    assert isinstance(await services.ask(nodes.FORGET, NodeForget(node_id="n2", force=True)), NodeForgotten)
    await until(lambda: {n for ask in asked for n in ask.node_ids} == {"ghost", "n2"}, what="both to be asked for")
    again = await becomes(mesh, "n2", monitored=True)
    assert again.epoch == 1
    assert Counter(n for ask in asked for n in ask.node_ids) == {"ghost": 1, "n2": 1}
    await node.leave()


async def test_a_heartbeat_that_is_a_request_is_answered_and_heard_by_all(mesh: RunningMesh) -> None:
    """Over HTTP too; whoever is not known is told to announce itself."""
    beats: list[NodeHeartbeat] = await heard(await mesh.bus(Role.OBSERVER), nodes.HEARTBEAT)
    for client in edges(mesh):
        async with client:
            unknown = await client.post("/api/v1/nodes/heartbeat", json={"node_id": "far"})
            assert (unknown.status_code, unknown.json()["code"], unknown.json()["field"]) == (
                404, "unknown_node", "node_id",
            )  # fmt: skip
            assert "announce yourself" in unknown.json()["detail"]
    first, second = edges(mesh)
    async with first, second:
        await first.post("/api/v1/nodes/register", json={"node_id": "far", "session": "s1"})
        answer = await second.post("/api/v1/nodes/heartbeat", json={"node_id": "far", "session": "s1"})
        assert (answer.status_code, answer.json()["state"], answer.json()["epoch"]) == (200, "online", 1)
        other = await second.post("/api/v1/nodes/heartbeat", json={"node_id": "far", "session": "s2"})
        assert (other.status_code, other.json()["field"]) == (404, "session")
    await until(lambda: [beat.node_id for beat in beats] == ["far"], what="the heartbeat to be passed on")
    assert (await becomes(mesh, "far", monitored=True)).session == "s1"
    node = await mesh.bus(Role.NODE, "far")
    assert isinstance(await node.ask(nodes.ALIVE, NodeHeartbeat(node_id="far", session="s1")), NodeAlive)


# --- losses ---------------------------------------------------------------------------------------------------------


async def test_a_loss_is_told_once_although_the_registry_that_acts_is_killed_then(mesh: RunningMesh) -> None:
    """Thirty nodes fall silent, and the acting replica dies while it finds them; they come back with a higher epoch."""
    told: list[NodeLost] = await heard(await mesh.bus(Role.OBSERVER), nodes.LOST)
    bus = await mesh.bus(Role.NODE, "all")
    names = [f"n{n}" for n in range(30)]

    for name in names:
        await bus.publish(nodes.ANNOUNCE, NodeAnnouncement(node_id=name, session="s1"))
    beats = [await beating(bus, NodeHeartbeat(node_id=name, session="s1")) for name in names]
    for name in names:
        await becomes(mesh, name, monitored=True)
    for beat in beats:
        beat.cancel()
    await until(lambda: len(told) > 0, what="the first loss")
    mesh.kill(await mesh.holder("node-registry"))
    await until(lambda: len({lost.node_id for lost in told}) == 30, what="all losses to be told")
    beats = [await beating(bus, NodeHeartbeat(node_id=name, session="s1")) for name in names]
    for name in names:
        assert (await becomes(mesh, name, state=NodeState.ONLINE)).epoch == 2
    for beat in beats:
        beat.cancel()
    assert Counter(lost.node_id for lost in told) == dict.fromkeys(names, 1)
    assert {lost.epoch for lost in told} == {1}


async def test_a_registry_that_was_killed_tells_no_loss_again(tmp_path: Path) -> None:
    """What was told is noted, so the next life of the only registry knows it."""
    async with running_mesh(tmp_path, ["node-registry"]) as mesh:
        node = await mesh.bus(Role.NODE, "n2")
        await _lives_and_falls_silent(mesh, node, "n2")
        told: list[NodeLost] = await heard(await mesh.bus(Role.OBSERVER), nodes.LOST)
        await until(lambda: len(told) == 1, what="the loss")
        await _noted(mesh)
        before = mesh.pid("node-registry")
        mesh.kill("node-registry")
        await until(lambda: mesh.pid("node-registry") not in (0, before), what="the next life")
        # One that is lost after it shows that it acts, and that what came before it would have been told by now.
        await becomes(mesh, "n2", state=NodeState.LOST)
        await _lives_and_falls_silent(mesh, node, "n3")
        await until(lambda: [lost.node_id for lost in told] == ["n2", "n3"], what="the second loss alone")


async def _lives_and_falls_silent(mesh: RunningMesh, bus: Bus, node_id: str) -> None:
    await bus.ask(nodes.REGISTER, NodeAnnouncement(node_id=node_id))
    beats = await beating(bus, NodeHeartbeat(node_id=node_id))
    await becomes(mesh, node_id, monitored=True)
    beats.cancel()


async def _noted(mesh: RunningMesh) -> None:
    services = await mesh.bus(Role.SERVICES)
    async with asyncio.timeout(30):
        while await Bucket(services, NOTES).get(TOLD_KEY) is None:
            await asyncio.sleep(0.02)


async def test_an_announcement_that_cannot_be_used_is_answered_by_an_event_that_names_the_field(
    mesh: RunningMesh,
) -> None:
    """An announcement has no reply, and its sender would wait for work for ever. What tells nobody's name is logged."""
    bus = await mesh.bus(Role.NODE, "odd")
    refused: list[NodeRefused] = await heard(await mesh.bus(Role.OBSERVER), nodes.REFUSED)
    subject = nodes.ANNOUNCE.subject
    for garbage in (b"{", b"[]", b'{"node_id": "a b", "tier": "x"}', b'{"tier": "x"}'):
        await bus.send(subject, garbage)
    for _ in range(3):
        await bus.send(subject, b'{"node_id": "odd", "session": "s1", "tier": "GPU_HUGE"}')
    await bus.send(subject, b'{"node_id": "odder", "gpus": [{"vram_gb": -24}]}')
    await until(lambda: len(refused) == 2, what="the events, one a node")
    odd, odder = refused
    assert (odd.node_id, odd.session, odd.code, odd.field) == ("odd", "s1", "bad_message", "tier")
    assert odd.reason == "'GPU_HUGE' is none of AI_FACTORY, GPU_PEER, GPU_INFRA, CPU_ONLY"
    assert (odder.node_id, odder.field) == ("odder", "gpus[0].vram_gb")


# --- one node id, two agents ----------------------------------------------------------------------------------------


async def test_another_machine_cannot_have_the_id_of_a_node_that_is_alive(mesh: RunningMesh) -> None:
    """Refused as an announcement and as a request, however often it tries; the epoch stays. Once the first one is
    lost the other may have the id."""
    bus = await mesh.bus(Role.NODE, "twin")
    refused: list[NodeRefused] = await heard(await mesh.bus(Role.OBSERVER), nodes.REFUSED)
    here = NodeAnnouncement(node_id="twin", session="s1", machine_id="a", hostname="rack-1")
    there = NodeAnnouncement(node_id="twin", session="s2", machine_id="b", hostname="rack-2")
    await bus.publish(nodes.ANNOUNCE, here)
    first = await beating(bus, NodeHeartbeat(node_id="twin", session="s1"))
    await becomes(mesh, "twin", monitored=True, session="s1")
    second = await beating(bus, NodeHeartbeat(node_id="twin", session="s2", cpu_percent=99.0))
    for _ in range(10):
        await bus.publish(nodes.ANNOUNCE, there)
        answer = await bus.ask(nodes.REGISTER, there)
        assert isinstance(answer, Refused)
        assert (answer.code, answer.status, answer.field) == ("duplicate_node", 409, "node_id")
        assert "rack-1" in answer.reason
    await until(lambda: len(refused) > 0, what="the event")
    assert (refused[0].session, refused[0].hostname, refused[0].code) == ("s2", "rack-2", "duplicate_node")
    found = await becomes(mesh, "twin", session="s1", epoch=1, state=NodeState.ONLINE)
    assert found.cpu_percent is None, "what the other one says is not told as this one's"
    first.cancel()
    await becomes(mesh, "twin", state=NodeState.LOST)
    assert isinstance(await bus.ask(nodes.REGISTER, there), NodeRecord)
    await becomes(mesh, "twin", session="s2", epoch=2, state=NodeState.ONLINE, cpu_percent=99.0)
    assert len(refused) == 1, "an agent is told seldom"
    second.cancel()


async def test_of_two_agents_on_one_machine_the_later_one_has_the_id_and_the_other_waits_for_it(tmp_path: Path) -> None:
    """Real agents. The one that is refused says so in its health and takes no work; nothing flaps. When the other is
    halted, the first takes its place."""
    environment = {**install_executor(tmp_path / "plugin", "tell", EXECUTOR), "COMPUTEMESH_MODELS": "/nowhere"}
    services = ("node-registry", "work-marshaller", "node-agent")
    async with running_mesh(tmp_path, services, copies={"node-agent": 2}, environment=environment) as mesh:
        names = ("node-agent", "node-agent-2")

        async def problems() -> dict[str, str]:
            found: dict[str, str] = {}
            async with httpx.AsyncClient(timeout=5) as http:
                for name in names:
                    answer = await http.get(f"{mesh.http(name)}/healthz")
                    if problem := answer.json()["problem"]:
                        found[name] = problem
            return found

        async with asyncio.timeout(30):
            while len(refused := await problems()) != 1:
                await asyncio.sleep(0.05)
        (loser,) = refused
        (winner,) = {*names} - {loser}
        assert "another agent on this machine" in refused[loser]
        epoch = (await becomes(mesh, "n1", state=NodeState.ONLINE, monitored=True)).epoch
        for n in range(5):
            record = await mesh.submit(WorkItem(work_id=f"w{n}", work_type="tell"))
            assert (await mesh.record(record.work_id)).state is WorkState.COMPLETED
        assert await problems() == refused
        assert (await becomes(mesh, "n1")).epoch == epoch
        said = [line for line in mesh.lines if "the registry refuses this node" in line]
        assert len(said) == 1
        assert said[0].startswith(f"{loser} ")
        mesh.kill(winner, signal.SIGSTOP)
        await becomes(mesh, "n1", state=NodeState.ONLINE, epoch=epoch + 1)
        async with asyncio.timeout(30), httpx.AsyncClient(timeout=5) as http:
            while (await http.get(f"{mesh.http(loser)}/healthz")).json()["problem"]:
                await asyncio.sleep(0.05)
        assert (
            await mesh.record((await mesh.submit(WorkItem(work_id="last", work_type="tell"))).work_id)
        ).node_id == "n1"


# --- a node comes, and goes in good order ---------------------------------------------------------------------------


async def test_a_heartbeat_right_behind_the_announcement_counts(mesh: RunningMesh) -> None:
    """It arrives before the announcement is stored, and the next one is seconds away."""
    bus = await mesh.bus(Role.NODE, "q1")
    await bus.publish(nodes.ANNOUNCE, NodeAnnouncement(node_id="q1", session="s1"))
    await bus.publish(nodes.HEARTBEAT, NodeHeartbeat(node_id="q1", session="s1", cpu_percent=7.0))
    assert (await becomes(mesh, "q1", monitored=True)).session == "s1"


async def test_a_node_agent_that_is_told_to_end_is_gone_at_once(tmp_path: Path) -> None:
    """It need not be missed first. Its next life is online again, with a higher epoch."""
    patient = {"COMPUTEMESH_SUSPECT_AFTER_S": "60", "COMPUTEMESH_LOST_AFTER_S": "120"}
    services = ("node-registry", "resource-detector", "node-agent")
    async with running_mesh(
        tmp_path, services, environment={**patient, **install_executor(tmp_path, "plugin", EXECUTOR)}
    ) as mesh:
        told: list[NodeLost] = await heard(await mesh.bus(Role.OBSERVER), nodes.LOST)
        first = await becomes(mesh, "n1", monitored=True, state=NodeState.ONLINE)
        mesh.kill("node-agent", signal.SIGTERM)
        await until(lambda: told, what="its goodbye to be told")
        assert [(lost.node_id, lost.left, lost.epoch) for lost in told] == [("n1", True, first.epoch)]
        back = await becomes(mesh, "n1", monitored=True, state=NodeState.ONLINE, left=False)
        assert (back.epoch, back.session != first.session) == (first.epoch + 1, True)


# --- drained nodes and hosts of other kinds get no work -------------------------------------------------------------


async def test_a_drained_node_gets_no_new_work_and_finishes_what_it_has(mesh: RunningMesh) -> None:
    """Through a restart of the registries and a new life of the node; undrained it gets work again."""
    client, services = await mesh.bus(), await mesh.bus(Role.SERVICES)
    node = DirectNode(await mesh.bus(Role.NODE, "d1"), "d1", work_types=("render",))
    await node.join()
    await mesh.submit(WorkItem(work_id="before", work_type="render"))
    await until(lambda: len(node.running) == 1, what="work on the node")
    drained = await services.ask(nodes.DRAIN, NodeDrain(node_id="d1", reason="new fans"))
    assert isinstance(drained, NodeDrained)
    assert drained.changed
    for name in REPLICAS:
        before = mesh.pid(name)
        mesh.kill(name)
        await until(lambda name=name, before=before: mesh.pid(name) not in (0, before), what="its next life")  # type: ignore[misc]
    await client.store(work.SUBMIT, WorkItem(work_id="after", work_type="render"))
    await mesh.record("after", [WorkState.PENDING])
    explained = await client.ask(work.EXPLAIN, WorkGet(work_id="after"))
    assert isinstance(explained, WorkExplanation)
    assert explained.nodes[0].reasons == ["drained: new fans"]
    assert explained.nodes[0].may_change
    await node.complete(node.given[0], "done")
    assert (await mesh.record("before")).state is WorkState.COMPLETED
    await node.restart()
    await becomes(mesh, "d1", session=node.session, drained=True, drain_reason="new fans")
    assert node.attempts("after") == []
    free = await services.ask(nodes.UNDRAIN, NodeUndrain(node_id="d1"))
    assert isinstance(free, NodeDrained)
    await until(lambda: node.attempts("after") == [1], what="the item that waited")
    await node.complete(node.given[-1], "done")
    assert (await mesh.record("after")).node_id == "d1"
    await node.leave()


async def test_a_role_mesh_agent_registers_and_beats_as_it_does_at_home(mesh: RunningMesh) -> None:
    """Its bodies, its unknown fields, its 404 that makes it register again. It hosts engines and is given no work."""
    client = edges(mesh)[0]
    beat = {
        "node_id": "p40-box",
        "metrics": {
            "devices": [
                {"device_id": "gpu:0", "kind": "cuda", "name": "Tesla P40", "memory_total_mb": 24_576,
                 "memory_used_mb": 20_000, "utilization_percent": 7, "queue_depth": 1},
                {"device_id": "gpu:1", "name": "Tesla P40", "memory_total_bytes": 24 * 1024**3, "memory_free_bytes": 0},
            ]
        },
        "something": {"new": [1]},
    }  # fmt: skip
    async with client:
        unknown = await client.post("/v1/nodes/heartbeat", json=beat)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_node")
        body = {
            "node_id": "p40-box",
            "base_url": "http://127.0.0.1:8091",
            "roles": ["planner", "writer"],
            "meta": {"rack": 3, "zone": "a", "nested": {"x": 1}},
        }
        registered = await client.post("/v1/nodes/register", json=body | {"auth": None})
        assert (registered.status_code, registered.json()["ok"]) == (200, True), registered.text
        assert (await client.post("/v1/nodes/heartbeat", json=beat)).status_code == 200
        found = await becomes(mesh, "p40-box", monitored=True, tier=Tier.GPU_PEER)
        assert (found.base_url, found.roles, found.hostname) == (
            "http://127.0.0.1:8091",
            ["planner", "writer"],
            "127.0.0.1",
        )
        assert found.labels == {"rack": "3", "zone": "a"}
        assert [(gpu.index, gpu.name, gpu.vram_total_mb) for gpu in found.gpus] == [
            (0, "Tesla P40", 24_576), (1, "Tesla P40", 24_576),
        ]  # fmt: skip
        async with asyncio.timeout(30):
            while [gpu.vram_used_mb for gpu in (await becomes(mesh, "p40-box")).gpus] != [20_000, 24_576]:
                await asyncio.sleep(0.02)
        for wrong, field in (
            ({"node_id": "a.b"}, "node_id"),
            ({"node_id": "ok"}, "base_url"),
            ({"node_id": "ok", "base_url": "ftp://x"}, "base_url"),
            ({"node_id": "ok", "base_url": "http://[x"}, "base_url"),
            ({"node_id": "ok", "base_url": "http://x", "roles": "chat"}, "roles"),
        ):
            answer = await client.post("/v1/nodes/register", json=wrong)
            assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text
        plain = await client.post(
            "/v1/nodes/register", content=json.dumps(body), headers={"content-type": "text/plain"}
        )
        assert plain.status_code == 415
        evil = await client.post("/v1/nodes/register", json=body, headers={"origin": "http://evil.example"})
        assert evil.status_code == 403
    bus = await mesh.bus()
    refused = await bus.ask(work.REQUEST, WorkItem(work_type="planner"))
    assert isinstance(refused, Refused)
    assert refused.code == "unknown_work_type"
    await bus.store(work.SUBMIT, WorkItem(work_id="w1", work_type="inference"))
    await mesh.record("w1", [WorkState.PENDING])
    explained = await bus.ask(work.EXPLAIN, WorkGet(work_id="w1"))
    assert isinstance(explained, WorkExplanation)
    assert [(v.fits, v.may_change, v.reasons) for v in explained.nodes] == [(False, False, ["takes no work"])]
