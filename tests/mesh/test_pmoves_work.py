"""Work marshaling as PMOVES documents it: its commands, bodies and variables, as they are printed.

Method: the calls of its page, against a marshaller of ours on a port of its own; nodes are of the test.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import httpx
import nats
from nats.aio.msg import Msg

from computemesh.contracts import work
from computemesh.contracts.base import Role
from computemesh.contracts.work import Assignment, WorkFailed
from computemesh.testing import running_mesh

# pyright: reportUnknownMemberType=false

JSON: Final = {"content-type": "application/json"}

SUBMIT: Final = """{
    "work_type": "inference",
    "model_name": "llama-3-70b",
    "priority": 1,
    "payload": {
      "prompt": "Explain quantum computing",
      "max_tokens": 500
    }
  }"""


async def in_state(http: httpx.AsyncClient, work_id: str, state: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            record: dict[str, Any] = (await http.get(f"/api/v1/work/{work_id}")).json()
            if record["state"] == state:
                return record
            await asyncio.sleep(0.02)


async def test_work_is_submitted_got_listed_and_cancelled_as_printed(tmp_path: Path) -> None:
    """Its own curl lines, in its order, to a node that does what its page says a node does."""
    async with running_mesh(tmp_path) as mesh, httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert "python_info" in (await http.get("/metrics")).text
        answer = await http.post("/api/v1/work/submit", content=SUBMIT, headers=JSON)
        assert answer.is_success, answer.text
        work_id = answer.json()["work_id"]
        sent = json.loads(SUBMIT)
        got = (await http.get(f"/api/v1/work/{work_id}")).json()
        assert {name: got[name] for name in sent} == sent
        assert got["state"] == "pending"
        pending = (await http.get("/api/v1/work?status=pending")).json()
        assert [item["work_id"] for item in pending["items"]] == [work_id]
        assert (await http.get("/api/v1/work?status=assigned")).json()["items"] == []

        node = await nats.connect(await mesh.invite("my-submodule-node"))
        given: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def on_work(message: Msg) -> None:
            given.put_nowait(json.loads(message.data))

        await node.subscribe("compute.work.assigned.v1", cb=on_work)
        await node.flush()
        card = {"node_id": "my-submodule-node", "hostname": "submodule-host", "tier": "GPU_PEER"}
        async with httpx.AsyncClient() as registry:
            url = f"{mesh.http('node-registry')}/api/v1/nodes/register"
            assert (await registry.post(url, json=card)).status_code == 200
        work_given = await asyncio.wait_for(given.get(), 30)
        assert work_given["payload"] == sent["payload"]
        assigned = (await http.get("/api/v1/work?status=assigned")).json()
        assert [item["work_id"] for item in assigned["items"]] == [work_id]
        done = {"work_id": work_given["work_id"], "result": {"text": "It computes with qubits."}}
        await node.publish("compute.work.completed.v1", json.dumps(done).encode())
        assert (await in_state(http, work_id, "completed"))["result"] == done["result"]

        second = {**sent, "requirements": {"node_id": "nowhere"}}
        work_id = (await http.post("/api/v1/work/submit", json=second)).json()["work_id"]
        cancelled = await http.delete(f"/api/v1/work/{work_id}")
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert (await http.get(f"/api/v1/work/{work_id}")).json()["state"] == "cancelled"
        await node.close()


async def test_retries_are_as_many_and_as_far_apart_as_its_variables_say(tmp_path: Path) -> None:
    """``WORK_RETRY_MAX`` attempts after the first, ``WORK_RETRY_DELAY`` seconds before each, doubled."""
    settings = {"WORK_RETRY_MAX": "2", "WORK_RETRY_DELAY": "0.5"}
    async with running_mesh(tmp_path, environment=settings) as mesh:
        node = await mesh.bus(Role.NODE, "failing")

        async def on_work(given: Assignment) -> None:
            report = WorkFailed(work_id=given.work_id, attempt=given.attempt, node_id="failing", error="no luck")
            await node.store(work.FAILED, report)

        await node.subscribe(work.ASSIGNED, on_work)
        await node.flush()
        async with httpx.AsyncClient() as http:
            url = f"{mesh.http('node-registry')}/api/v1/nodes/register"
            assert (await http.post(url, json={"node_id": "failing"})).status_code == 200
        async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
            work_id = (await http.post("/api/v1/work/submit", content=SUBMIT, headers=JSON)).json()["work_id"]
            record = await in_state(http, work_id, "dead")
    assert (record["attempt"], record["failures"], record["error"]["reason"]) == (3, 3, "no luck")
    failed = [move["at"] for move in record["story"] if move["state"] in ("retrying", "dead")]
    tried = [move["at"] for move in record["story"] if move["state"] == "assigned"]
    # Half of each delay is jitter.
    assert tried[1] - failed[0] >= 0.25
    assert tried[2] - failed[1] >= 0.5
