"""The main job: work published to ``compute.work.submit.v1`` is done by a node that announced it can.

Goal: with real processes, a real server and, where marked, a real model, show each promise of the README.
Method: plain nats-py and plain HTTP as an outsider would use them, not our own client.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.testing import RunningMesh, running_mesh, until

# pyright: reportUnknownMemberType=false

ALL = ("node-registry", "work-marshaller", "resource-detector", "node-agent")


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """The control plane, without nodes."""
    async with running_mesh(tmp_path) as running:
        yield running


async def plain_node(mesh: RunningMesh, node_id: str, **announcement: Any) -> Client:
    """The two code samples of the integration guide: register over HTTP, take work, publish results."""
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"{mesh.http('node-registry')}/api/v1/nodes/register",
            json={"node_id": node_id, "hostname": "submodule-host", "tier": "GPU_PEER", **announcement},
        )
        assert answer.status_code == 200, answer.text
    nc = await nats.connect(await mesh.invite(node_id))

    async def on_work(msg: Msg) -> None:
        item = json.loads(msg.data)
        result = {"echo": item["payload"]}
        await nc.publish(
            "compute.work.completed.v1", json.dumps({"work_id": item["work_id"], "result": result}).encode()
        )

    await nc.subscribe("compute.work.assigned.v1", cb=on_work)
    await nc.flush()
    return nc


@pytest.mark.model
async def test_a_real_model_answers_what_a_plain_program_published(tmp_path: Path) -> None:
    """A program with nothing but NATS_URL submits and receives the model's words and the recorded state."""
    async with running_mesh(tmp_path, ALL) as mesh:
        nc = await nats.connect(mesh.url(Role.CLIENT))
        completed = await nc.subscribe("compute.work.completed.v1")
        states: list[Any] = []

        async def on_state(msg: Msg) -> None:
            states.append(json.loads(msg.data))

        await nc.subscribe("compute.work.state.v1.*", cb=on_state)
        item = {
            "work_type": "inference",
            "model_name": "smollm2-135m-instruct",
            "payload": {"prompt": "What is the capital of France?", "max_tokens": 24, "temperature": 0},
        }
        ack = await nc.jetstream().publish("compute.work.submit.v1", json.dumps(item).encode())
        assert ack.stream == "COMPUTE_WORK"
        report = json.loads((await completed.next_msg(timeout=60)).data)
        assert report["result"]["model"] == "smollm2-135m-instruct"
        assert report["result"]["items"][0]["output"].strip()
        assert 1 <= report["result"]["usage"]["completion_tokens"] <= 24
        assert report["node_id"] == "n1"
        await until(lambda: states and states[-1]["state"] == "completed", what="the recorded outcome")
        assert states[-1]["work_id"] == report["work_id"]
        assert states[-1]["result"] == report["result"]
        await nc.close()


@pytest.mark.model
async def test_replicas_share_the_prompts_of_an_item(tmp_path: Path) -> None:
    """Each answers its own, under the place that the prompt has in the whole."""
    prompts = ["What is the capital of France?", "Count to three.", "Say hello."]
    payload = {"prompts": prompts, "max_tokens": 4, "temperature": 0}
    async with running_mesh(tmp_path, ALL) as mesh:
        sent = await mesh.submit(work.WorkItem(work_type="inference", payload=payload, replicas=2))
        done = await mesh.record(sent.work_id)
        assert done.state is work.WorkState.COMPLETED, done.error
        items = [result["items"] for result in done.result]
        assert [[item["index"] for item in of_one] for of_one in items] == [[0], [1, 2]]
        assert all(item["output"] for of_one in items for item in of_one)


@pytest.mark.model
async def test_cancelling_ends_a_running_generation_and_frees_its_slot(tmp_path: Path) -> None:
    """A long answer is cancelled within a second or two, and the next item runs."""
    async with running_mesh(tmp_path, ALL, environment={"COMPUTEMESH_SLOTS": "1"}) as mesh:
        bus = await mesh.bus()
        payload = {"prompt": "Write a very long story.", "max_tokens": 4000}
        first = work.WorkItem(work_id="long", work_type="inference", payload=payload)
        assert not isinstance(await bus.ask(work.REQUEST, first), Refused)
        await until_state(mesh, "long", "running")
        cancelled = await bus.ask(work.CANCEL, work.WorkCancel(work_id="long", reason="changed my mind"))
        assert isinstance(cancelled, work.WorkRecord)
        assert cancelled.state is work.WorkState.CANCELLED
        second = work.WorkItem(work_id="short", work_type="inference", payload={"prompt": "Hi", "max_tokens": 4})
        await bus.ask(work.REQUEST, second)
        await until_state(mesh, "short", "completed")
        assert await state_of(mesh, "long") == "cancelled"


async def test_the_third_party_node_of_the_guide_works_as_written(tmp_path: Path) -> None:
    """Registered over HTTP, it gets items on the shared subject and its reports count without an attempt.

    It tells its memory and VRAM in fields that no contract declares, so this mesh reads as production does.
    """
    facts = {"cpu": {"cores": 8}, "memory": {"total_gb": 64}, "gpus": [{"name": "RTX 4090", "vram_gb": 24}]}
    async with running_mesh(tmp_path, environment={"COMPUTEMESH_STRICT": ""}) as mesh:
        node = await plain_node(mesh, "my-submodule-node", **facts)
        bus = await mesh.bus()
        for number in range(20):
            item = work.WorkItem(work_id=f"w{number}", work_type="inference", payload={"n": number})
            await bus.store(work.SUBMIT, item)
        for number in range(20):
            await until_state(mesh, f"w{number}", "completed")
        record = await bus.ask(work.GET, work.WorkGet(work_id="w7"))
        assert isinstance(record, work.WorkRecord)
        assert record.result == {"echo": {"n": 7}}
        assert record.node_id == "my-submodule-node"
        await node.close()


async def test_an_item_waits_until_a_node_that_can_do_it_appears(mesh: RunningMesh) -> None:
    """Stored work is not refused for want of a node; explain says why it waits."""
    bus = await mesh.bus()
    other = await plain_node(mesh, "other", work_types=["render"])
    await bus.ask(work.REQUEST, work.WorkItem(work_id="w1", work_type="inference", model_name="m"))
    await until_state(mesh, "w1", "pending")
    why = await bus.ask(work.EXPLAIN, work.WorkGet(work_id="w1"))
    assert isinstance(why, work.WorkExplanation)
    assert why.nodes[0].reasons == ["does no 'inference', but render"]
    right = await plain_node(mesh, "right", work_types=["inference"], models=["m"])
    await until_state(mesh, "w1", "completed")
    await other.close()
    await right.close()


async def test_submitting_an_id_again_gives_the_item_that_exists(mesh: RunningMesh) -> None:
    """The work id is the idempotency key, on the bus and over HTTP."""
    node = await plain_node(mesh, "n")
    bus = await mesh.bus()
    await bus.ask(work.REQUEST, work.WorkItem(work_id="once", work_type="inference", payload={"a": 1}))
    await until_state(mesh, "once", "completed")
    await bus.store(work.SUBMIT, work.WorkItem(work_id="once", work_type="inference", payload={"a": 2}))
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        again = await http.post("/api/v1/work/submit", json={"work_id": "once", "work_type": "inference"})
        assert again.json()["result"] == {"echo": {"a": 1}}
        listed = await http.get("/api/v1/work?status=completed")
        assert listed.json()["count"] == 1
    await node.close()


async def test_a_direct_node_is_asked_and_can_say_no(mesh: RunningMesh) -> None:
    """A declined item goes elsewhere and no failure is counted against it."""
    bus = await mesh.bus(Role.NODE)
    client = await mesh.bus()
    declined: Counter[str] = Counter()
    nc = await nats.connect(await mesh.invite("picky"))

    async def on_work(msg: Msg) -> None:
        item = json.loads(msg.data)
        declined[item["work_id"]] += 1
        await msg.respond(b'{"accepted": false, "reason": "not today"}')

    await nc.subscribe("compute.work.assigned.v1.picky", cb=on_work)
    picky = NodeAnnouncement(node_id="picky", session="s1", delivery="direct", work_types=["inference"])
    await bus.ask(nodes.REGISTER, picky)
    await client.ask(work.REQUEST, work.WorkItem(work_id="w1", work_type="inference"))
    await until(lambda: declined["w1"], what="the first offer")
    willing = await plain_node(mesh, "willing")
    await until_state(mesh, "w1", "completed")
    record = await client.ask(work.GET, work.WorkGet(work_id="w1"))
    assert isinstance(record, work.WorkRecord)
    assert record.failures == 0
    assert record.node_id == "willing"
    await nc.close()
    await willing.close()


async def test_a_failure_is_tried_again_and_the_works_own_fault_is_not(mesh: RunningMesh) -> None:
    """Node faults are retried with a pause until the attempts run out; work faults end at once."""
    nc = await nats.connect(await mesh.invite("clumsy"))
    bus = await mesh.bus(Role.NODE)
    client = await mesh.bus()
    tries: Counter[str] = Counter()

    async def on_work(msg: Msg) -> None:
        item = json.loads(msg.data)
        tries[item["work_id"]] += 1
        fault = item["payload"]["fault"]
        report = {"work_id": item["work_id"], "error": "broken", "fault": fault, "attempt": item["attempt"]}
        await nc.publish("compute.work.failed.v1", json.dumps(report).encode())

    await nc.subscribe("compute.work.assigned.v1", cb=on_work)
    await nc.flush()
    await bus.ask(nodes.REGISTER, NodeAnnouncement(node_id="clumsy"))
    for name, fault, retries in (("bad", "work", 3), ("unlucky", "node", 2)):
        item = work.WorkItem(work_id=name, work_type="inference", payload={"fault": fault}, retries_max=retries)
        await client.ask(work.REQUEST, item)
    await until_state(mesh, "bad", "failed")
    await until_state(mesh, "unlucky", "dead")
    assert tries == {"bad": 1, "unlucky": 3}
    await nc.close()


async def test_two_marshallers_and_a_killed_one_lose_nothing(tmp_path: Path) -> None:
    """The standby takes over within seconds; its HTTP edge answers before and after."""
    async with running_mesh(tmp_path, copies={"work-marshaller": 2}) as mesh:
        node = await plain_node(mesh, "n")
        bus = await mesh.bus()
        await bus.store(work.SUBMIT, work.WorkItem(work_id="before", work_type="inference"))
        await until_state(mesh, "before", "completed")
        acting = next(s for s in mesh.supervisor.services if await_health(mesh, s.name))
        standby = next(s for s in mesh.supervisor.services if "marshaller" in s.name and s is not acting)
        async with httpx.AsyncClient(base_url=standby.status.http) as http:
            assert (await http.get("/api/v1/work/before")).json()["state"] == "completed"
        mesh.kill(acting.name)
        await bus.store(work.SUBMIT, work.WorkItem(work_id="after", work_type="inference"))
        await until_state(mesh, "after", "completed")
        await node.close()


def await_health(mesh: RunningMesh, name: str) -> bool:
    """Whether this replica of the marshaller acts."""
    return bool("marshaller" in name and httpx.get(f"{mesh.http(name)}/healthz").json().get("acting"))


async def state_of(mesh: RunningMesh, work_id: str) -> str:
    """What the marshaller's HTTP edge says."""
    async with httpx.AsyncClient() as http:
        try:
            answer = await http.get(f"{mesh.http('work-marshaller')}/api/v1/work/{work_id}")
        except httpx.TransportError:
            return ""
        return str(answer.json().get("state", ""))


async def until_state(mesh: RunningMesh, work_id: str, wanted: str) -> None:
    """Waits until an item is in a state."""
    deadline_s = asyncio.get_running_loop().time() + 30
    while (found := await state_of(mesh, work_id)) != wanted:
        assert asyncio.get_running_loop().time() < deadline_s, f"{work_id} is {found!r}, not {wanted!r}"
        await asyncio.sleep(0.02)
