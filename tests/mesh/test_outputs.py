"""Results, logs and payloads of any size, with an executor that prints and returns what it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from computemesh import objects as client
from computemesh.bus import Bus, ObjectStore
from computemesh.contracts import objects, storage, work
from computemesh.contracts.base import MESSAGE_BYTES_MAX, Refused, Role
from computemesh.contracts.objects import ObjectPut
from computemesh.contracts.work import (
    LOG_WAIT_S_MAX,
    ObjectRef,
    WorkGet,
    WorkItem,
    WorkLogs,
    WorkLogsGet,
    WorkResult,
    WorkState,
)
from computemesh.testing import RunningMesh, install_executor, running_mesh, until
from computemesh_services.node_agent.logs import KEPT_BYTES_MAX

pytestmark = pytest.mark.asyncio(loop_scope="module")

TALK = """
import hashlib, json, pathlib, sys, time
from computemesh.executors import ExecutionError, Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        said = task.payload
        for line in said.get("lines", []):
            print(line, flush=True)
        sys.stdout.buffer.write(said.get("repeated", "").encode() * said.get("times", 0))
        sys.stdout.flush()
        if said.get("until"):
            while not pathlib.Path(said["until"]).exists():
                time.sleep(0.01)
            print("the end", flush=True)
        if said.get("fails"):
            raise ExecutionError(said["fails"], fault=said.get("fault", "work"))
        if "text" in said:
            return hashlib.sha256(said["text"].encode()).hexdigest()
        return "r" * said.get("result", 0)
"""

ALL = ("node-registry", "work-marshaller", "resource-detector", "node-agent")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """One node, two marshallers."""
    folder: Path = tmp_path_factory.mktemp("outputs")
    plugin = install_executor(folder / "plugin", "talk", TALK)
    environment = {**plugin, "COMPUTEMESH_SLOTS": "4", "COMPUTEMESH_PAYLOAD_BYTES_MAX": str(8 * 1024 * 1024)}
    async with running_mesh(folder, ALL, copies={"work-marshaller": 2}, environment=environment) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def bus(mesh: RunningMesh) -> Bus:
    return await mesh.bus(Role.CLIENT)


@pytest_asyncio.fixture(loop_scope="module")
async def http(mesh: RunningMesh) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller"), timeout=30) as one:
        yield one


async def run(mesh: RunningMesh, work_id: str, **payload: Any) -> work.WorkRecord:
    await mesh.submit(WorkItem(work_id=work_id, work_type="talk", payload=payload))
    return await mesh.record(work_id)


async def logs(bus: Bus, work_id: str, **asked: Any) -> WorkLogs:
    answer = await bus.ask(work.LOGS, WorkLogsGet(work_id=work_id, **asked), timeout_s=10.0)
    assert isinstance(answer, WorkLogs), answer
    return answer


async def refused(bus: Bus, request: Any, question: Any) -> Refused:
    answer = await bus.ask(request, question)
    assert isinstance(answer, Refused), answer
    return answer


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_result_is_got_whatever_its_size(
    mesh: RunningMesh, bus: Bus, http: httpx.AsyncClient, size: int
) -> None:
    """Over HTTP it stands in its place; on the bus a large one is a reference, and its bytes are what is said."""
    record = await run(mesh, f"result-{size}", result=size)
    assert record.state is WorkState.COMPLETED
    answer = await bus.ask(work.RESULT, WorkGet(work_id=record.work_id))
    assert isinstance(answer, WorkResult)
    if size < MESSAGE_BYTES_MAX:
        assert (answer.result, answer.result_object) == ("r" * size, None)
    else:
        assert record.result is None
        assert answer.result_object == record.result_object
        assert record.result_object is not None
        data = await client.download(client.get_on(bus), record.result_object)
        assert data == msgspec.json.encode("r" * size)
    got = await http.get(f"/api/v1/work/{record.work_id}/result")
    assert (got.status_code, got.headers["content-type"]) == (200, "application/json")
    assert got.json()["result"] == "r" * size
    assert got.json()["work_id"] == record.work_id


async def test_a_result_that_is_not_there_is_refused_with_the_reason(
    mesh: RunningMesh, bus: Bus, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Unknown, not finished, failed, and no longer kept."""
    assert (await refused(bus, work.RESULT, WorkGet(work_id="nobody"))).code == "not_found"
    await mesh.submit(WorkItem(work_id="unfinished", work_type="talk", payload={"until": str(tmp_path / "go")}))
    assert (await refused(bus, work.RESULT, WorkGet(work_id="unfinished"))).code == "not_finished"
    (tmp_path / "go").touch()
    await run(mesh, "broken", fails="no such file")
    answer = await refused(bus, work.RESULT, WorkGet(work_id="broken"))
    assert (answer.code, "no such file" in answer.reason) == ("no_result", True)
    record = await run(mesh, "aged", result=3_000_000)
    assert record.result_object is not None
    await ObjectStore(await mesh.bus(Role.SERVICES), storage.OBJECTS).remove(record.result_object.object_id)
    got = await http.get("/api/v1/work/aged/result")
    assert (got.status_code, got.json()["code"]) == (409, "no_result")


async def test_a_result_that_meets_a_full_inbox_waits_and_is_recorded_as_what_it_is(
    mesh: RunningMesh, bus: Bus, tmp_path: Path
) -> None:
    """The attempt did not fail, so nothing of that is recorded."""
    await mesh.submit(WorkItem(work_id="patient", work_type="talk", payload={"until": str(tmp_path / "go")}))
    await mesh.record("patient", {WorkState.ASSIGNED, WorkState.RUNNING})
    services = await mesh.bus(Role.SERVICES)
    try:
        await limited(services, 1)
        (tmp_path / "go").touch()
        await until(lambda: any("cannot report yet" in line for line in mesh.lines), what="a report that has to wait")
    finally:
        await limited(services, storage.WORK_INBOX.max_bytes)
    record = await mesh.record("patient")
    assert (record.state, record.attempt, record.error) == (WorkState.COMPLETED, 1, None)


async def limited(bus: Bus, max_bytes: int) -> None:
    """Sets how much the inbox may hold."""
    name = storage.WORK_INBOX.name
    config = json.loads((await bus.call(f"$JS.API.STREAM.INFO.{name}", b"")).data)["config"]
    body = json.dumps(config | {"max_bytes": max_bytes}).encode()
    reply = json.loads((await bus.call(f"$JS.API.STREAM.UPDATE.{name}", body)).data)
    assert "error" not in reply, reply


# --- payloads ------------------------------------------------------------------------------------------------------


async def test_a_payload_too_large_for_a_message_is_submitted_over_http_and_reaches_the_executor(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """The item refers to it; every other field is as it was said, and a payload that fits stays in the item."""
    text = 'words, "quoted" and ünusual ' * 150_000
    item = {"work_id": "heavy", "work_type": "talk", "priority": 9, "payload": {"text": text}}
    posted = await http.post("/api/v1/work/submit", json=item)
    assert posted.status_code == 202, posted.text
    assert posted.json()["payload"] == {}
    assert posted.json()["priority"] == 9
    assert posted.json()["payload_object"]["size"] > 4_000_000
    record = await mesh.record("heavy")
    assert record.result == hashlib.sha256(text.encode()).hexdigest()
    again = await http.post("/api/v1/work/submit", json=item)
    assert again.json()["payload_object"] == posted.json()["payload_object"]


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"work_type": "nothing-like-it"}, 400, "unknown_work_type", "work_type"),
        ({"priority": 11}, 400, "bad_message", "priority"),
        ({"payload": ["x" * 2_000_000]}, 400, "bad_message", "payload"),
        ({"payload": {"x": "x" * 9_000_000}}, 413, "too_large", ""),
        ({"labels": {str(n): "y" * 60 for n in range(30_000)}, "payload": {}}, 413, "too_large", ""),
    ],
)
async def test_a_large_submission_is_refused_like_a_small_one_and_leaves_nothing_behind(
    mesh: RunningMesh, http: httpx.AsyncClient, change: dict[str, Any], status: int, code: str, field: str
) -> None:
    store = ObjectStore(await mesh.bus(Role.SERVICES), storage.OBJECTS)
    before = await store.begun()
    item = {"work_type": "talk", "payload": {"x": "x" * 2_000_000}} | change
    posted = await http.post("/api/v1/work/submit", json=item)
    assert (posted.status_code, posted.json()["code"]) == (status, code)
    assert posted.json().get("field", "") == field
    assert await store.begun() == before


async def test_a_large_submission_that_is_nested_too_deep_or_no_json_is_refused(http: httpx.AsyncClient) -> None:
    """Whatever stands in a payload that nobody here looks into."""
    filling = b'{"x": "' + b"x" * 1_500_000 + b'", "y": %s}'
    for inside in (b"[" * 70 + b"]" * 70, b'"\xff"', b"[1,", b"NaN"):
        body = b'{"work_type": "talk", "payload": ' + filling % inside + b"}"
        posted = await http.post("/api/v1/work/submit", content=body, headers={"Content-Type": "application/json"})
        assert (posted.status_code, posted.json()["code"]) == (400, "bad_message"), inside


async def test_a_payload_by_reference_is_checked_when_it_is_submitted(bus: Bus) -> None:
    """There, whole, with that size and digest; and not beside a payload in the item."""
    ref = await client.upload(client.put_on(bus), b'{"text": "by reference"}')
    wrong = [
        msgspec.structs.replace(ref, object_id="never-put"),
        msgspec.structs.replace(ref, size=1),
        msgspec.structs.replace(ref, sha256="0" * 64),
    ]
    for one in wrong:
        answer = await refused(bus, work.REQUEST, WorkItem(work_type="talk", payload_object=one))
        assert (answer.code, answer.field) == ("no_object", "payload_object")
    both = WorkItem(work_type="talk", payload={"text": "too"}, payload_object=ref)
    assert (await refused(bus, work.REQUEST, both)).field == "payload_object"


async def test_a_payload_that_is_gone_is_the_meshs_fault_and_one_that_is_no_object_the_works(
    mesh: RunningMesh, bus: Bus
) -> None:
    """The first is tried again, and nothing is held against the node."""
    missing = ObjectRef(object_id="never-put", size=9)
    item = WorkItem(work_id="gone", work_type="talk", payload_object=missing, retries_max=1)
    await bus.store(work.SUBMIT, item)
    record = await mesh.record("gone")
    assert (record.state, record.attempt) == (WorkState.DEAD, 2)
    assert record.error is not None
    assert (record.error.code, record.error.fault) == ("no_payload", "mesh")
    assert "never-put" in record.error.reason
    for number, data in enumerate((b"[1, 2]", b'{"a": ', b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}")):
        ref = await client.upload(client.put_on(bus), data)
        await mesh.submit(WorkItem(work_id=f"odd-{number}", work_type="talk", payload_object=ref))
        odd = await mesh.record(f"odd-{number}")
        assert odd.state is WorkState.FAILED
        assert odd.error is not None
        assert (odd.error.code, odd.error.fault) == ("bad_payload", "work")


# --- logs ----------------------------------------------------------------------------------------------------------


async def test_a_log_is_followed_while_it_grows_and_read_when_it_has_ended(
    mesh: RunningMesh, bus: Bus, tmp_path: Path
) -> None:
    """Asked from where the answer before ended, nothing comes twice and nothing is missed."""
    await mesh.submit(
        WorkItem(work_id="talks", work_type="talk", payload={"lines": ["one", "zwei ü"], "until": str(tmp_path / "go")})
    )
    text = ""
    answer = await logs(bus, "talks", wait_s=LOG_WAIT_S_MAX)
    while "zwei ü\n" not in text:
        text += answer.text
        assert not answer.complete
        answer = await logs(bus, "talks", offset=answer.next, wait_s=LOG_WAIT_S_MAX)
    assert text == "one\nzwei ü\n"
    waiting = asyncio.create_task(logs(bus, "talks", offset=len(text.encode()), wait_s=LOG_WAIT_S_MAX))
    (tmp_path / "go").touch()
    assert (await waiting).text == "the end\n"
    record = await mesh.record("talks")
    assert record.log_object is not None
    end = await logs(bus, "talks", offset=len(text.encode()))
    assert (end.text, end.complete, end.attempt, end.node_id) == ("the end\n", True, 1, "n1")
    assert (await logs(bus, "talks")).text == text + "the end\n"
    assert (await logs(bus, "talks", offset=5, limit=2)).text == "we"
    behind = await logs(bus, "talks", offset=2**50)
    assert (behind.text, behind.complete) == ("", True)


async def test_what_printed_nothing_has_an_empty_log_and_no_object(mesh: RunningMesh, bus: Bus) -> None:
    record = await run(mesh, "silent")
    assert record.log_object is None
    answer = await logs(bus, "silent")
    while not answer.complete:  # The node hears a moment later than others that its report is stored.
        answer = await logs(bus, "silent", wait_s=LOG_WAIT_S_MAX)
    assert answer.text == ""


async def test_of_a_long_log_the_end_is_kept_and_offsets_stay_what_they_were(mesh: RunningMesh, bus: Bus) -> None:
    """Asked from the start, the answer says where it begins; each character arrives whole."""
    record = await run(mesh, "long", repeated="ü" * 50 + "\n", times=60_000)
    whole = ("ü" * 50 + "\n").encode() * 60_000
    assert record.log_object is not None
    assert (record.log_object.size, record.log_object.skipped) == (KEPT_BYTES_MAX, len(whole) - KEPT_BYTES_MAX)
    answer = await logs(bus, "long")
    assert answer.offset == record.log_object.skipped
    text = answer.text
    while not answer.complete:
        answer = await logs(bus, "long", offset=answer.next)
        text += answer.text
    assert answer.next == len(whole)
    assert text == whole[record.log_object.skipped :].decode("utf-8", "replace")


async def test_bytes_that_are_no_text_come_as_replaced_ones_and_fit_the_message(mesh: RunningMesh, bus: Bus) -> None:
    """Also control characters, each of which takes six bytes in JSON."""
    await run(mesh, "noise", repeated="\x01", times=400_000)
    answer = await logs(bus, "noise")
    text = answer.text
    while not answer.complete:
        answer = await logs(bus, "noise", offset=answer.next)
        text += answer.text
    assert text == "\x01" * 400_000


async def test_each_attempt_has_its_own_log(mesh: RunningMesh, bus: Bus) -> None:
    """That of the one before is read from its node; the latest is the one that is meant when none is named."""
    await mesh.submit(
        WorkItem(
            work_id="twice",
            work_type="talk",
            payload={"lines": ["tried"], "fails": "not today", "fault": "node"},
            retries_max=1,
        )
    )
    record = await mesh.record("twice")
    assert record.attempt == 2
    for attempt in (None, 1, 2):
        answer = await logs(bus, "twice", attempt=attempt)
        assert (answer.attempt, answer.text, answer.complete) == (attempt or 2, "tried\n", True)
    assert (await refused(bus, work.LOGS, WorkLogsGet(work_id="twice", attempt=3))).code == "no_log"
    assert (await refused(bus, work.LOGS, WorkLogsGet(work_id="twice", replica=1))).code == "no_log"
    assert (await refused(bus, work.LOGS, WorkLogsGet(work_id="nobody"))).code == "not_found"


async def test_before_the_first_attempt_there_is_an_empty_log_for_which_one_may_wait(
    mesh: RunningMesh, bus: Bus
) -> None:
    requirements = work.Requirements(node_id="not-here-yet")
    await mesh.submit(WorkItem(work_id="waits", work_type="talk", requirements=requirements))
    answer = await logs(bus, "waits", wait_s=0.3)
    assert (answer.attempt, answer.text, answer.complete) == (0, "", False)
    await bus.ask(work.CANCEL, work.WorkCancel(work_id="waits"))
    assert (await logs(bus, "waits", wait_s=4.0)).complete


async def test_over_http_a_log_is_json_or_text_to_its_end(
    mesh: RunningMesh, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    payload = {"lines": ["one", "two"], "until": str(tmp_path / "go")}
    await mesh.submit(WorkItem(work_id="streams", work_type="talk", payload=payload))
    text = ""
    async with http.stream("GET", "/api/v1/work/streams/logs", headers={"Accept": "text/plain"}) as answer:
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        async for piece in answer.aiter_text():
            text += piece
            if "two" in text:
                (tmp_path / "go").touch()
    assert text == "one\ntwo\nthe end\n"
    got = await http.get("/api/v1/work/streams/logs?offset=4&limit=3")
    assert (got.json()["text"], got.json()["next"]) == ("two", 7)
    missing = await http.get("/api/v1/work/nobody/logs", headers={"Accept": "text/plain"})
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")


async def test_a_node_gives_no_file_that_stands_in_the_place_of_a_log(mesh: RunningMesh, bus: Bus) -> None:
    """Neither what a link leads to, nor a pipe that would never end."""
    folder = mesh.home.work / "planted"
    folder.mkdir(parents=True)
    (folder / "log-1.txt").symlink_to(mesh.home.credentials)
    services = await mesh.bus(Role.SERVICES)
    ask = WorkLogsGet(work_id="planted", attempt=1)
    answer = await services.ask(work.NODE_LOG, ask, target="n1")
    assert isinstance(answer, Refused)
    assert answer.code == "no_log"


async def test_an_abandoned_upload_of_another_does_not_reach_a_record(mesh: RunningMesh, bus: Bus) -> None:
    """Only what is whole can be referred to."""
    await bus.ask(objects.PUT, ObjectPut(object_id="half", offset=0, data=b"x" * objects.PART_BYTES))
    item = WorkItem(work_type="talk", payload_object=ObjectRef(object_id="half", size=objects.PART_BYTES))
    assert (await refused(bus, work.REQUEST, item)).code == "no_object"


async def test_logs_and_results_stay_when_the_node_is_gone(mesh: RunningMesh, bus: Bus) -> None:
    """What was kept in the object store is; of what was not, the refusal names the node."""
    record = await run(mesh, "kept", lines=["still here"], result=2_000_000)
    await run(mesh, "unkept")
    mesh.kill("node-agent", signal.SIGSTOP)
    try:
        assert (await logs(bus, "kept")).text == "still here\n"
        assert record.result_object is not None
        assert len(await client.download(client.get_on(bus), record.result_object)) == 2_000_002
    finally:
        mesh.kill("node-agent", signal.SIGCONT)
