"""The gateway as a process: MLOC's clients get what MLOC documents, and what it only promised.

Goal: its YAML, its routes and its words over HTTP, on a real mesh. Method: plain HTTP as its README types it; nodes are
of the test, but for the last test, in which the embedded model answers the task of that README.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio

from computemesh.contracts import nodes
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import NodeAnnouncement, NodeDrain, NodeGet, NodeView
from computemesh.contracts.work import Assignment
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh.testing.node import DirectNode

pytestmark = pytest.mark.asyncio(loop_scope="module")

# pyright: reportUnknownMemberType=false

SERVICES: Final = ("node-registry", "work-marshaller", "gateway")
YAML: Final = {"content-type": "text/yaml"}

INFERENCE: Final = """\
apiVersion: mloc/v1
kind: InferenceTask
metadata:
  name: mistral-7b-infer
  owner: alice

spec:
  taskType: "inference"

  resources:
    replicas: 1
    hardware:
      cpu: "8"
      memory: "32Gi"
      gpu:
        type: "any"
        count: 1

  model:
    source:
      type: "huggingface"
      identifier: "mistralai/Mistral-7B-Instruct-v0.1"
    vllm:
      tensor_parallel_size: 1
      gpu_memory_utilization: 0.9

  inference:
    max_tokens: 128
    temperature: 0.7
    prompts:
      - "Explain quantum computing in simple terms."
      - "Write a Python function to sort a list."
"""

PPO: Final = """\
apiVersion: mloc/v1
kind: TrainingTask
metadata:
  name: mistral-7b-ppo-training
  owner: alice

spec:
  taskType: "ppo"

  resources:
    replicas: 1
    hardware:
      cpu: "16"
      memory: "64Gi"
      gpu:
        type: "any"
        count: 1

  model:
    source:
      type: "huggingface"
      identifier: "mistralai/Mistral-7B-Instruct-v0.1"
    config:
      fp16: true
      device_map_auto: true

  reward_model:
    identifier: "cardiffnlp/twitter-roberta-base-sentiment-latest"
    type: "sentiment"

  data:
    prompts:
      - "Write a helpful response: How can I improve my productivity?"
      - "Create a motivational message for someone learning to code:"
      - "Explain quantum computing in an encouraging way:"

  training:
    learning_rate: 1.41e-5
    batch_size: 4
    steps: 50
    ppo_epochs: 4
    target_kl: 0.1
    save_model: true

  generation:
    max_new_tokens: 256
    temperature: 0.7
"""


def small(task_type: str = "shout", *, more: str = "", resources: str = "", name: str = "small") -> str:
    """A task that any node can run, with one part of its own."""
    return (
        f"apiVersion: mloc/v1\nkind: Task\nmetadata: {{name: {name}}}\nspec:\n  taskType: {task_type}\n"
        f"  resources: {{replicas: 1, hardware: {{cpu: 1, memory: 1}}{resources}}}\n  text: hello\n{more}"
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """For all tests that break nothing; each has work types and nodes of its own."""
    async with running_mesh(tmp_path_factory.mktemp("gateway"), SERVICES) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(mesh: RunningMesh) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as client:
        yield client


async def joined(mesh: RunningMesh, node_id: str, *work_types: str, **more: Any) -> DirectNode:
    """A node of the test that the marshaller knows."""
    node = DirectNode(await mesh.bus(Role.NODE, node_id), node_id, work_types=work_types, **more)
    await node.join()
    return node


async def submit(http: httpx.AsyncClient, text: str, **headers: str) -> dict[str, Any]:
    """The answer to a task, once the mesh knows its type: the node may just have announced it."""
    async with asyncio.timeout(30):
        while True:
            answer = await http.post("/api/v1/tasks", content=text, headers={**YAML, **headers})
            if answer.status_code != 400 or answer.json()["code"] != "unknown_work_type":
                break
            await asyncio.sleep(0.02)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


async def ended(http: httpx.AsyncClient, task_id: str, *, within_s: float = 30) -> dict[str, Any]:
    async with asyncio.timeout(within_s):
        while True:
            task: dict[str, Any] = (await http.get(f"/api/v1/tasks/{task_id}")).json()
            if task["status"] not in ("PENDING", "DISPATCHED", "RUNNING"):
                return task
            await asyncio.sleep(0.02)


async def shout(given: Assignment) -> Any:
    return {"ok": True, "said": given.payload["text"].upper()}


async def test_a_task_is_dispatched_runs_and_gives_its_result(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """The answer names the worker and the topic as MLOC's does; the executor gets what stands in the spec."""
    node = await joined(mesh, "box", "shout", run=shout)
    text = small()
    said = await submit(http, text)
    assert (said["ok"], said["worker_id"], said["topic"]) == (True, "box", "tasks.shout")
    assert said["status"] in ("DISPATCHED", "RUNNING", "COMPLETED")
    task = await ended(http, said["task_id"])
    assert (task["status"], task["error"], task["result_available"]) == ("COMPLETED", None, True)
    assert (task["raw_yaml"], task["parsed"]["spec"]["text"]) == (text, "hello")
    assert node.given[0].payload == {"text": "hello"}
    assert (await http.get(f"/api/v1/tasks/{said['task_id']}/result")).json() == {"ok": True, "said": "HELLO"}
    await node.leave()


@pytest.mark.parametrize(("text", "topic"), [(INFERENCE, "tasks.inference"), (PPO, "tasks.ppo")], ids=["vllm", "ppo"])
async def test_the_tasks_of_its_readme_wait_where_nobody_can_run_them(
    mesh: RunningMesh, http: httpx.AsyncClient, text: str, topic: str
) -> None:
    """As they are printed. MLOC failed them for good; here they wait and say why, until a node comes that can."""
    said = await submit(http, text)
    assert (said["ok"], said["worker_id"], said["topic"], said["status"]) == (True, None, topic, "PENDING")
    assert "wait" in said["reason"]
    waiting = (await http.get("/api/v1/tasks?status=pending")).json()
    assert said["task_id"] in [task["task_id"] for task in waiting]
    assert {task["status"] for task in waiting} == {"PENDING"}
    task = (await http.get(f"/api/v1/tasks/{said['task_id']}")).json()
    assert (task["raw_yaml"], task["status"], task["error"]) == (text, "PENDING", None)
    assert task["reason"]
    refused = await http.get(f"/api/v1/tasks/{said['task_id']}/result")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_finished")


async def test_a_task_may_come_as_json_or_as_yaml_in_json(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """MLOC's second form, and the task itself."""
    text = small("inference", more="  inference: {prompts: [one]}\n").replace("  text: hello\n", "")
    wrapped = await http.post("/api/v1/tasks", json={"yaml": text})
    assert wrapped.status_code == 200, wrapped.text
    first = (await http.get(f"/api/v1/tasks/{wrapped.json()['task_id']}")).json()
    assert first["raw_yaml"] == text
    bare = await http.post("/api/v1/tasks", json=first["parsed"])
    assert bare.status_code == 200, bare.text
    second = (await http.get(f"/api/v1/tasks/{bare.json()['task_id']}")).json()
    assert second["parsed"] == first["parsed"]


async def test_a_key_makes_a_repeated_task_the_same_task(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """In the header or in the task. Another task under the same key is refused, and changes nothing."""
    text = small("inference", more="  inference: {prompts: [one]}\n").replace("  text: hello\n", "")
    before = len((await http.get("/api/v1/tasks?full=false&limit=1000")).json())
    first = await submit(http, text, **{"idempotency-key": "order 66"})
    again = await submit(http, text, **{"idempotency-key": "order 66"})
    assert again["task_id"] == first["task_id"]
    other = await http.post(
        "/api/v1/tasks", content=text.replace("one", "two"), headers={**YAML, "idempotency-key": "order 66"}
    )
    assert (other.status_code, other.json()["code"]) == (409, "other_task")
    named = text.replace("{name: small}", "{name: small, id: mine}")
    assert (await submit(http, named))["task_id"] == (await submit(http, named))["task_id"] == "mine"
    both = await http.post("/api/v1/tasks", content=named, headers={**YAML, "idempotency-key": "order 66"})
    assert (both.status_code, both.json()["field"]) == (400, "idempotency-key"), "not the task of the other key"
    assert len((await http.get("/api/v1/tasks?full=false&limit=1000")).json()) == before + 2


async def test_a_list_goes_on_where_its_link_leads(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """Page by page, each task once, the newest first; as short lines too."""
    made = [(await submit(http, INFERENCE))["task_id"] for _ in range(3)]
    for full in ("true", "false"):
        found: list[str] = []
        answer = await http.get(f"/api/v1/tasks?status=pending&limit=2&full={full}")
        while True:
            assert len(answer.json()) <= 2
            found += [task["task_id"] for task in answer.json()]
            if "next" not in answer.links:
                break
            answer = await http.get(answer.links["next"]["url"])
        assert found[:3] == made[::-1]
        assert len(set(found)) == len(found)
    refused = await http.get("/api/v1/tasks?after=nowhere")
    assert (refused.status_code, refused.json()["field"]) == (400, "after")


async def test_a_task_that_waits_is_answered_at_once_for_those_who_prefer_that(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """Then no reason is looked for either."""
    said = await submit(http, INFERENCE, prefer="respond-async")
    assert (said["status"], said["reason"]) == ("PENDING", "")


async def test_tags_and_replicas_mean_something(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """A task runs as often as it says, on nodes with its tags alone; what all replicas gave is put together."""

    async def half(given: Assignment) -> Any:
        return {"ok": True, "items": [{"index": given.replica, "output": f"part {given.replica}"}]}

    first = await joined(mesh, "one", "halves", run=half)
    second = await joined(mesh, "two", "halves", run=half)
    said = await submit(http, small("halves", resources="").replace("replicas: 1", "replicas: 2"))
    task = await ended(http, said["task_id"])
    assert (task["status"], len(task["workers"])) == ("COMPLETED", 2)
    result = (await http.get(f"/api/v1/tasks/{said['task_id']}/result")).json()
    assert [item["output"] for item in result["items"]] == ["part 0", "part 1"]
    waits = await submit(http, small("halves", resources=", tags: [fast]"))
    assert (waits["status"], waits["worker_id"]) == ("PENDING", None)
    box = NodeAnnouncement(node_id="tagged", work_types=["halves"], labels={"fast": "true"})
    answer = await (await mesh.bus(Role.NODE, "tagged")).ask(nodes.REGISTER, box)
    assert not isinstance(answer, Refused)
    async with asyncio.timeout(30):
        while (await http.get(f"/api/v1/tasks/{waits['task_id']}")).json()["assigned_worker"] != "tagged":
            await asyncio.sleep(0.02)
    worker = (await http.get("/workers/tagged")).json()
    assert worker["tags"] == ["fast"]
    for node in (first, second):
        await node.leave()


async def test_a_task_is_cancelled_by_either_route_and_only_once_it_has_not_ended(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    first, second = await submit(http, INFERENCE), await submit(http, PPO)
    cancelled = await http.post(f"/api/v1/tasks/{first['task_id']}/cancel", json={"reason": "no GPU"})
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "CANCELLED")
    assert cancelled.json()["error"] == "cancelled: no GPU"
    deleted = await http.delete(f"/api/v1/tasks/{second['task_id']}")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "CANCELLED")
    result = await http.get(f"/api/v1/tasks/{first['task_id']}/result")
    assert (result.status_code, result.json()["code"], result.json()["detail"]) == (
        409,
        "no_result",
        "cancelled: no GPU",
    )


async def test_what_is_not_there_is_not_found_in_the_words_of_mloc(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    for path in ("", "/result"):
        answer = await http.get(f"/api/v1/tasks/nothing{path}")
        assert (answer.status_code, answer.json()["detail"]) == (404, "task not found")
    answer = await http.get("/workers/nobody")
    assert (answer.status_code, answer.json()["detail"]) == (404, "worker not found")


async def test_tasks_outlive_the_gateway_and_the_marshaller(tmp_path: Path) -> None:
    """MLOC's orchestrator forgot all of them with its process. Here the text itself comes back, to the letter.

    A question that comes while no marshaller acts is answered by the next one, not refused.
    """
    async with running_mesh(tmp_path, SERVICES) as mesh:
        async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as http:
            said = await submit(http, INFERENCE)
            before = (await http.get(f"/api/v1/tasks/{said['task_id']}")).json()
            mesh.kill("work-marshaller")
            listed = await http.get("/api/v1/tasks?full=false")
            assert (listed.status_code, len(listed.json())) == (200, 1), listed.text
        pid = mesh.pid("gateway")
        mesh.kill("gateway")
        await until(lambda: mesh.pid("gateway") not in (0, pid), what="another gateway")
        await until(lambda: mesh.service("gateway").status.state == "ready", what="a gateway that serves")
        async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as http:
            after = (await http.get(f"/api/v1/tasks/{said['task_id']}")).json()
    assert (after["raw_yaml"], after["status"]) == (INFERENCE, "PENDING")
    assert after["submitted_at"] == before["submitted_at"]


async def test_a_task_above_the_size_of_a_message_goes_through_the_store(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """Its payload and its text together do not fit into one, and it is the same task all the same."""
    node = await joined(mesh, "store", "long")
    text = small("long", more=f"  long: {'x' * 700_000}\n")
    said = await submit(http, text)
    await until(lambda: node.given, what="the assignment")
    assert node.given[0].payload_object is not None
    assert (await http.get(f"/api/v1/tasks/{said['task_id']}")).json()["raw_yaml"] == text
    await node.leave()


async def test_workers_are_shown_and_those_that_are_gone_cleaned_up(tmp_path: Path) -> None:
    """A lost one is removed; one that is here stays, and so does one that an operator drained."""
    async with running_mesh(tmp_path, SERVICES, environment={"HEARTBEAT_TTL_SEC": "1"}) as quick:
        here, gone, drained = [await joined(quick, name, "x") for name in ("here", "gone", "drained")]
        services = await quick.bus(Role.SERVICES)
        assert not isinstance(await services.ask(nodes.DRAIN, NodeDrain(node_id="drained")), Refused)
        async with httpx.AsyncClient(base_url=quick.http("gateway"), timeout=30) as http:
            shown = {worker["worker_id"]: worker for worker in (await http.get("/workers")).json()}
            assert shown.keys() == {"here", "gone", "drained"}
            assert [shown[name]["status"] for name in ("here", "drained")] == ["IDLE", "DRAINING"]
            assert (await http.post("/admin/cleanup")).json()["removed"] == 0
            for node in (gone, drained):
                await node.leave()
            async with asyncio.timeout(30):
                for name in ("gone", "drained"):
                    while True:
                        view = await services.ask(nodes.GET, NodeGet(node_id=name))
                        if isinstance(view, NodeView) and view.state == "lost":
                            break
                        await asyncio.sleep(0.05)
            stale = {worker["worker_id"]: worker["stale"] for worker in (await http.get("/workers")).json()}
            assert stale == {"here": False, "gone": True, "drained": True}
            said = (await http.post("/admin/cleanup")).json()
            assert said == {"ok": True, "removed": 1, "worker_ids": ["gone"]}
            assert {worker["worker_id"] for worker in (await http.get("/workers")).json()} == {"here", "drained"}
        await here.leave()


async def test_its_token_is_demanded_in_its_words_by_each_of_several_gateways(tmp_path: Path) -> None:
    """On loopback too, once it is set; how the gateway is stays open to all. What one took the other shows."""
    settings = {"ORCHESTRATOR_TOKEN": "dev-token"}
    async with (
        running_mesh(tmp_path, SERVICES, copies={"gateway": 2}, environment=settings) as mesh,
        httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as http,
        httpx.AsyncClient(base_url=mesh.http("gateway-2"), timeout=30) as other,
    ):
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await http.get(path)).status_code == 200
        assert (await http.get("/healthz")).json()["ok"] is True
        for method, path in (("GET", "/workers"), ("POST", "/api/v1/tasks"), ("POST", "/admin/cleanup")):
            none = await http.request(method, path)
            assert (none.status_code, none.json()["detail"]) == (401, "Missing bearer token")
            assert none.headers["www-authenticate"] == "Bearer"
            wrong = await http.request(method, path, headers={"authorization": "Bearer other"})
            assert (wrong.status_code, wrong.json()["detail"]) == (403, "Invalid token")
        for token in ("dev-token", mesh.credentials.token):
            right = await http.get("/workers", headers={"authorization": f"Bearer {token}"})
            assert right.status_code == 200
        shown = {"authorization": "Bearer dev-token"}
        said = await http.post("/api/v1/tasks", content=INFERENCE, headers={**YAML, **shown})
        found = await other.get(f"/api/v1/tasks/{said.json()['task_id']}", headers=shown)
        assert found.json()["raw_yaml"] == INFERENCE


async def test_it_may_do_no_more_than_any_client(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """All of its routes work with the user of a client, and nothing that it tries is denied."""
    said = await submit(http, INFERENCE)
    for path in ("/api/v1/tasks", f"/api/v1/tasks/{said['task_id']}", "/workers"):
        assert (await http.get(path)).status_code == 200
    assert (await http.post("/admin/cleanup")).status_code == 200
    assert mesh.service("gateway").spec.role is Role.CLIENT
    assert not [line for line in mesh.lines if "not permitted" in line]


# --- what is no task -----------------------------------------------------------------------------------------------

JUNK: Final = bytes(range(256)) * (900 * 4)

HOSTILE: Final = {
    "nothing": b"",
    "half": b"{",
    "text": b"hello",
    "null": b"null",
    "a list": b"[1, 2]",
    "bad UTF-8": b"\xff\xfe",
    "junk": JUNK,
    "100 deep": b"[" * 100 + b"]" * 100,
    "900 KiB of brackets": b"[" * 900 * 1024,
    "900 KiB of anchors": b"&a " * 300 * 1024,
    "900 KiB of questions": b"? " * 450 * 1024,
    "a bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(9)),
    "python": b"!!python/object/apply:os.system [ls]",
    "twice": b"kind: a\nkind: b",
    "a subject": small(name='"a.>"').replace("{name", '{id: "a.>", name').encode(),
    "too many replicas": small().replace("replicas: 1", "replicas: 99999999999999999999").encode(),
    "a mebibyte and more": b"a" * (1024 * 1024 + 1),
}


@pytest.mark.parametrize("kind", ["text/yaml", "application/yaml", "application/x-yaml", "application/json"])
async def test_bytes_that_are_no_task_are_refused_and_harm_nothing(
    mesh: RunningMesh, http: httpx.AsyncClient, kind: str
) -> None:
    """With a reason, as a problem document; the process stays the same."""
    pid, lines = mesh.pid("gateway"), len(mesh.lines)
    before = (await http.get("/api/v1/tasks?full=false&limit=1000")).json()
    for what, data in HOSTILE.items():
        answer = await http.post("/api/v1/tasks", content=data, headers={"content-type": kind})
        assert answer.status_code in (400, 413), (what, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"], what
        answer = await http.post("/api/v1/tasks", json={"yaml": data.decode("utf-8", "replace")})
        assert answer.status_code in (400, 413), (what, answer.text)
    assert mesh.pid("gateway") == pid
    after = (await http.get("/api/v1/tasks?full=false&limit=1000")).json()
    assert [task["task_id"] for task in after] == [task["task_id"] for task in before]
    assert not [line for line in mesh.lines[lines:] if "Traceback" in line]


async def test_a_wrong_task_is_refused_with_its_field_and_line(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """Also where only the marshaller knows that it is wrong."""
    for text, field, line in (
        (INFERENCE.replace('cpu: "8"', "cpu: many"), "spec.resources.hardware.cpu", "line 13, column 7"),
        (INFERENCE.replace('"inference"', "nonesuch"), "spec.taskType", "line 8, column 3"),
        (INFERENCE.replace("  inference:\n", "  after: nothing\n  inference:\n"), "spec.after", "line 27, column 3"),
    ):
        answer = await http.post("/api/v1/tasks", content=text, headers=YAML)
        assert (answer.status_code, answer.json()["field"].partition("[")[0]) == (400, field), answer.text
        assert line in answer.json()["detail"]
    answer = await http.post("/api/v1/tasks", content="a: [1\nb: 2", headers=YAML)
    assert answer.json()["detail"].startswith("Invalid YAML: line 2, column ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_task_in_a_form_that_any_web_page_can_send_is_refused(
    mesh: RunningMesh, http: httpx.AsyncClient, kind: str
) -> None:
    """A browser asks before it sends YAML or JSON elsewhere, and is told no."""
    answer = await http.post("/api/v1/tasks", content=INFERENCE, headers={"content-type": kind} if kind else {})
    assert (answer.status_code, answer.json()["code"]) == (415, "bad_content_type")
    answer = await http.post("/api/v1/tasks", content=INFERENCE, headers={**YAML, "origin": "http://evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (403, "bad_origin")
    answer = await http.get("/workers", headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (421, "bad_host")


# --- with a model --------------------------------------------------------------------------------------------------


@pytest.mark.model
async def test_the_inference_task_of_its_readme_is_answered_by_a_model(tmp_path: Path) -> None:
    """Two prompts in, two texts out, in the shape of its responses.json; model and hardware are what is here."""
    text = INFERENCE.replace("mistralai/Mistral-7B-Instruct-v0.1", "smollm2-135m-instruct").replace('"8"', '"1"')
    text = text.replace('"32Gi"', '"1Gi"').replace('      gpu:\n        type: "any"\n        count: 1\n', "")
    text = text.replace("max_tokens: 128", "max_tokens: 8")
    services = (*SERVICES, "resource-detector", "node-agent")
    async with (
        running_mesh(tmp_path, services) as mesh,
        httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as http,
    ):
        said = await submit(http, text)
        task = await ended(http, said["task_id"], within_s=120)
        assert task["status"] == "COMPLETED", task
        result = (await http.get(f"/api/v1/tasks/{said['task_id']}/result")).json()
    assert (result["ok"], result["model"]) == (True, "smollm2-135m-instruct")
    assert [item["index"] for item in result["items"]] == [0, 1]
    assert all(item["output"].strip() and item["finish_reason"] for item in result["items"])
    assert result["usage"]["num_requests"] == 2
    assert result["usage"]["completion_tokens"] > 0
