"""Hostile bytes on every subject of a running mesh: refused with a reason, and the services go on.

Goal: nobody who may publish can stop a service, corrupt the store, or get no answer. Method: requests and
events are taken from the catalog, each is sent a corpus of wrong messages by the least privileged role that
may send it, over plain NATS. Every test ends by looking whether all services are still the same processes.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import nats
import pytest
import pytest_asyncio
from msgspec import inspect
from nats.aio.client import Client
from nats.aio.msg import Msg

from computemesh.contracts import catalog, keys, nodes, resources, services, storage, work
from computemesh.contracts.base import Event, Message, Refused, Request, Role, decode
from computemesh.contracts.permissions import inbox_prefix
from computemesh.ids import ID_PATTERN
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh.testing.golden import example
from computemesh.testing.mesh import CONTROL_PLANE

# pyright: reportUnknownMemberType=false

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALL: Final = tuple(card.name for card in services.SERVICES)
NODE_ID: Final = "n1"
"""The node of the mesh under test, whose agent and detector answer on subjects of their own."""

READERS: Final[dict[str, int]] = {
    nodes.ANNOUNCE.subject: 2,  # node-registry, gateway
    nodes.HEARTBEAT.subject: 4,  # node-registry, work-marshaller, gpu-orchestrator, gateway
    nodes.LOST.subject: 2,  # node-registry, gateway
    keys.CHANGED.subject: 1,  # gateway
    nodes.DISCOVER.subject: 1,  # node-agent
    resources.CHANGED.at(NODE_ID): 1,  # node-agent
    resources.LOAD.at(NODE_ID): 1,  # node-agent
}
"""Events that services hear, and how many of them do."""

JUNK: Final = bytes(range(256)) * (900 * 4)
"""900 KiB of every byte there is."""

NO_MESSAGE: Final = {
    "not JSON": b"hello",
    "an array": b"[1, 2]",
    "null": b"null",
    "bad UTF-8": b'{"\xff\xfe": "\xff"}',
    "100 deep": b'{"deep":' * 100 + b"1" + b"}" * 100,
    "100 deep arrays": b'{"deep":' + b"[" * 100 + b"]" * 100 + b"}",
    "20000 open": b'{"a":' * 20_000,
    "900 KiB of junk": JUNK,
    "900 KiB of brackets": b"[" * 900 * 1024,
}
"""Nothing in here is a message of any contract."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Every service, without a model, and as lenient with unknown fields as in production."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    settings = {"COMPUTEMESH_MODELS": "/nowhere", "COMPUTEMESH_STRICT": ""}
    async with running_mesh(folder, ALL, environment=settings) as running:
        yield running


class Outsider:
    """Plain connections, one for each role."""

    def __init__(self, connections: dict[Role, Client]) -> None:
        self._connections = connections

    def of(self, roles: frozenset[Role]) -> Client:
        """The one with the least rights among *roles*."""
        return next(
            self._connections[role] for role in (Role.OBSERVER, Role.CLIENT, Role.NODE, Role.SERVICES) if role in roles
        )

    async def ask(self, request: Request[Any, Any], data: bytes) -> Msg:
        subject = request.at(NODE_ID if request.target else "")
        return await self.of(request.asked_by).request(subject, data, timeout=10)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outsider(mesh: RunningMesh) -> AsyncGenerator[Outsider]:
    """Speaks NATS and nothing else."""
    inboxes = {role: inbox_prefix(role, NODE_ID if role is Role.NODE else "") for role in Role}
    connections = {role: await nats.connect(mesh.url(role), inbox_prefix=inboxes[role]) for role in Role}
    yield Outsider(connections)
    for connection in connections.values():
        await connection.close()


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def unharmed(mesh: RunningMesh, outsider: Outsider) -> AsyncGenerator[None]:
    """After each test every service is the same process as before, healthy, and answers."""
    before = pids(mesh)
    yield
    for request in (nodes.QUERY, work.LIST, resources.INVENTORY):
        answer = await outsider.ask(request, b"{}")
        assert not isinstance(decode(answer.data, request.gives), Refused), answer.data
        assert not answer.headers
    stopped = await outsider.ask(work.STOP, b'{"work_id": "nothing", "attempt": 1}')
    assert json.loads(stopped.data) == {"was_running": False}
    async with httpx.AsyncClient() as http:
        for name in ALL:
            health = await http.get(f"{mesh.http(name)}/healthz")
            assert (health.status_code, health.json()["status"]) == (200, "ok"), health.text
    assert pids(mesh) == before
    assert not [service.name for service in mesh.supervisor.services if service.status.restarts]
    assert not [line for line in mesh.lines if "Traceback" in line or "not permitted" in line]


def pids(mesh: RunningMesh) -> dict[str, int]:
    """The process of each service; all are ready."""
    assert {service.status.state for service in mesh.supervisor.services} == {"ready"}
    return {service.name: service.status.pid for service in mesh.supervisor.services}


# --- messages that are wrong for one contract ------------------------------------------------------------------


def required(kind: type[Message]) -> dict[str, Any]:
    """The fields without which a message of *kind* is none, filled with what fits."""
    fitting = msgspec.to_builtins(example(kind))
    return {field.encode_name: fitting[field.encode_name] for field in msgspec.structs.fields(kind) if field.required}


@dataclass(frozen=True)
class Wrong:
    """A message that must be refused."""

    what: str
    data: bytes
    field: str = ""
    """The field at fault, if a single one is."""


def corpus(kind: type[Message]) -> list[Wrong]:
    """Everything that must be refused as a message of *kind*: no message at all, or one wrong field."""
    found = [Wrong(what, data) for what, data in NO_MESSAGE.items()]
    found.append(Wrong("NaN", b'{"deep": NaN}', "deep"))
    if required(kind):
        found.append(Wrong("empty", b"", next(iter(required(kind)))))
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        if isinstance(field.type, inspect.AnyType):
            continue
        wrong: list[Any] = [[[True]], {"a": {"b": [1]}} if not isinstance(field.type, inspect.DictType) else 7]
        if is_id(field.type):
            wrong += ["a.b", "*", ">", "", "a b", "a" * 64, "x\n"]
        if field.name == "priority" and kind is work.WorkItem:
            wrong += [-1, 17, 10**30]
        for value in wrong:
            if accepts(field.type, value):
                continue
            data = msgspec.json.encode(required(kind) | {field.name: value})
            found.append(Wrong(f"{field.name}={value!r}", data, field.name))
        if field.required:
            left = {key: value for key, value in required(kind).items() if key != field.name}
            found.append(Wrong(f"{field.name} missing", msgspec.json.encode(left), field.name))
    return found


def is_id(info: inspect.Type) -> bool:
    """Whether a field holds an id."""
    inner = info.types if isinstance(info, inspect.UnionType) else (info,)
    bare = [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in inner]
    return any(isinstance(kind, inspect.StrType) and kind.pattern == ID_PATTERN for kind in bare)


def accepts(info: inspect.Type, value: Any) -> bool:
    """Whether an object happens to be right for a struct without required fields."""
    inner = info.types if isinstance(info, inspect.UnionType) else (info,)
    return isinstance(value, dict) and any(isinstance(kind, inspect.StructType) for kind in inner)


def outer(field: str) -> str:
    """The outermost name of a field's path."""
    return field.partition("[")[0].partition(".")[0]


SERVED: Final = catalog.requests()
CAPTURED: Final = [event for event in catalog.events() if event.captured]
HEARD: Final = [event for event in catalog.events() if event.at(NODE_ID if event.target else "") in READERS]


@pytest.mark.parametrize("request_", SERVED, ids=lambda request: request.subject)
async def test_every_request_refuses_what_is_no_message_and_names_the_field(
    outsider: Outsider, request_: Request[Any, Any]
) -> None:
    """In the body for programs, in the headers for those who speak the micro protocol."""
    for wrong in corpus(request_.takes):
        answer = await outsider.ask(request_, wrong.data)
        said = decode(answer.data, Refused)
        assert (said.code, said.status, outer(said.field)) == ("bad_message", 400, wrong.field), (wrong.what, said)
        assert said.reason, wrong.what
        assert answer.headers == {"Nats-Service-Error": said.reason[:500], "Nats-Service-Error-Code": "400"}


async def test_every_request_of_the_catalog_is_served_by_this_mesh(mesh: RunningMesh, outsider: Outsider) -> None:
    """Guards the test above: a request that nobody answers would not show whether bytes harm."""
    found: set[str] = set()
    client = outsider.of(frozenset({Role.OBSERVER}))
    inbox = client.new_inbox()
    replies = await client.subscribe(inbox)
    await client.publish("$SRV.INFO", b"", reply=inbox)
    wanted = {request.at(NODE_ID if request.target else "") for request in SERVED}
    while not wanted <= found:
        info = json.loads((await replies.next_msg(timeout=10)).data)
        found |= {endpoint["subject"] for endpoint in info["endpoints"]}
    await replies.unsubscribe()


@pytest.mark.parametrize("event", CAPTURED, ids=lambda event: event.subject)
async def test_what_was_stored_but_is_no_message_is_rejected_by_an_event(outsider: Outsider, event: Event[Any]) -> None:
    """With the place it stands at, the reason, the field, and no more of the original than is good."""
    rejections: dict[int, dict[str, Any]] = {}

    async def on_rejected(message: Msg) -> None:
        said = json.loads(message.data)
        rejections[said["inbox_seq"]] = said

    watcher = outsider.of(work.REJECTED.read_by)
    heard = await watcher.subscribe(work.REJECTED.subject, cb=on_rejected)
    await watcher.flush()
    sent: dict[int, Wrong] = {}
    for wrong in corpus(event.payload):
        ack = json.loads((await outsider.of(event.sent_by).request(event.subject, wrong.data, timeout=10)).data)
        sent[ack["seq"]] = wrong
    await until(lambda: sent.keys() <= rejections.keys(), what="a rejection of each")
    for seq, wrong in sent.items():
        said = rejections[seq]
        assert (said["subject"], said["code"]) == (event.subject, "bad_message"), wrong.what
        assert outer(said["field"]) == wrong.field, (wrong.what, said)
        assert said["reason"], wrong.what
        assert said["original"] == wrong.data[:2000].decode("utf-8", "replace"), wrong.what
    await heard.unsubscribe()


@pytest.mark.parametrize("event", HEARD, ids=lambda event: event.subject)
async def test_an_event_that_is_no_message_is_ignored_and_logged(
    mesh: RunningMesh, outsider: Outsider, event: Event[Any]
) -> None:
    """By every service that hears it, one line for each, with the subject."""
    subject = event.at(NODE_ID if event.target else "")

    def ignored() -> Counter[str]:
        lines = [line for line in mesh.lines if '"ignored a message"' in line and f'"{subject}"' in line]
        return Counter(line.partition(" ")[0] for line in lines)

    before = ignored()
    messages = corpus(event.payload)
    sender = outsider.of(event.sent_by)
    for wrong in messages:
        await sender.publish(subject, wrong.data)
    await until(lambda: (ignored() - before).total() >= len(messages) * READERS[subject], what="all to be ignored")
    assert set((ignored() - before).values()) == {len(messages)}
    assert len(ignored() - before) == READERS[subject]


async def test_every_event_that_services_hear_is_among_those_tried() -> None:
    """Each is in the catalog; the captured ones have a test of their own."""
    assert len(HEARD) == len(READERS)
    assert [event.subject for event in CAPTURED] == list(storage.WORK_INBOX.subjects)


# --- too large ----------------------------------------------------------------------------------------------------

TOO_LARGE: Final = msgspec.json.encode(
    {"work_id": "large", "work_type": "inference", "payload": {"prompt": "x" * (1024 * 1024)}}
)


async def test_an_item_above_a_mebibyte_is_refused_on_the_bus(mesh: RunningMesh, outsider: Outsider) -> None:
    """The server does not store it, and the request says why. Over HTTP it goes by the object store."""
    client = outsider.of(work.SUBMIT.sent_by)
    ack = json.loads((await client.request(work.SUBMIT.subject, TOO_LARGE, timeout=10)).data)
    assert ack["error"]["code"] == 400
    assert "size" in ack["error"]["description"]
    assert not ack.get("seq")
    answer = await outsider.ask(work.REQUEST, TOO_LARGE)
    refused = decode(answer.data, Refused)
    assert (refused.code, refused.status) == ("too_large", 413)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "413"
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        assert (await http.get("/api/v1/work/large")).status_code == 404


async def test_the_largest_item_that_is_allowed_is_stored_and_recorded(mesh: RunningMesh, outsider: Outsider) -> None:
    """The bound is a mebibyte, not less: such an item gets through all of the pipeline."""
    item = {
        "work_id": "largest",
        "work_type": "inference",
        "requirements": {"node_id": "nowhere"},
        "payload": {"p": ""},
    }
    item["payload"] = {"p": "x" * (1024 * 1024 - len(msgspec.json.encode(item)) - 100)}
    client = outsider.of(work.SUBMIT.sent_by)
    ack = json.loads((await client.request(work.SUBMIT.subject, msgspec.json.encode(item), timeout=10)).data)
    assert ack["stream"] == storage.WORK_INBOX.name
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http, asyncio.timeout(20):
        while (await http.get("/api/v1/work/largest")).status_code != 200:
            await asyncio.sleep(0.02)


# --- wrong values, on each way in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"work_type": "no-such-work"}, "unknown_work_type", "work_type"),
        ({"work_type": "inference", "priority": 17}, "bad_message", "priority"),
        ({"work_type": "inference", "priority": -1}, "bad_message", "priority"),
        ({"work_type": "inference", "work_id": "a.b"}, "bad_message", "work_id"),
        ({"work_type": "inference", "work_id": "compute-work.*"}, "bad_message", "work_id"),
        ({"work_type": "inference", "requirements": {"node_id": ">"}}, "bad_message", "requirements.node_id"),
        ({"work_type": "inference", "labels": {"": "x"}}, "bad_message", "labels"),
    ],
)
async def test_a_wrong_value_is_refused_on_all_three_ways(
    mesh: RunningMesh, outsider: Outsider, fields: dict[str, Any], code: str, field: str
) -> None:
    """The reason and the field are the same, whichever way it came."""
    data = msgspec.json.encode(fields)
    asked = decode((await outsider.ask(work.REQUEST, data)).data, Refused)
    assert (asked.code, asked.field) == (code, field)
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        posted = await http.post("/api/v1/work/submit", json=fields)
    assert posted.status_code == asked.status == 400
    assert (posted.json()["code"], posted.json()["field"], posted.json()["detail"]) == (code, field, asked.reason)
    client = outsider.of(work.SUBMIT.sent_by)
    heard = await client.subscribe(work.REJECTED.subject)
    ack = json.loads((await client.request(work.SUBMIT.subject, data, timeout=10)).data)
    rejected = json.loads((await heard.next_msg(timeout=10)).data)
    assert rejected["inbox_seq"] == ack["seq"]
    assert (rejected["code"], rejected["field"], rejected["reason"]) == (code, field, asked.reason)
    assert rejected["original"] == data.decode()
    await heard.unsubscribe()


async def test_one_work_id_is_one_item_whichever_way_it_comes(mesh: RunningMesh, outsider: Outsider) -> None:
    """The first one stands; what comes later under its id gives it back, unchanged."""

    def item(text: str) -> dict[str, Any]:
        where = {"node_id": "nowhere"}
        return {"work_id": "once", "work_type": "inference", "payload": {"prompt": text}, "requirements": where}

    client = outsider.of(work.SUBMIT.sent_by)
    first = json.loads((await outsider.ask(work.REQUEST, msgspec.json.encode(item("first")))).data)
    await client.request(work.SUBMIT.subject, msgspec.json.encode(item("second")), timeout=10)
    third = json.loads((await outsider.ask(work.REQUEST, msgspec.json.encode(item("third")))).data)
    async with httpx.AsyncClient(base_url=mesh.http("work-marshaller")) as http:
        fourth = (await http.post("/api/v1/work/submit", json=item("fourth"))).json()
        listed = (await http.get("/api/v1/work?limit=1000")).json()
    for again in (third, fourth):
        assert (again["payload"], again["submitted_at"]) == ({"prompt": "first"}, again["submitted_at"])
        assert again["inbox_seq"] == first["inbox_seq"]
    assert [one["work_id"] for one in listed["items"]].count("once") == 1


# --- answers that would do harm -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "$KV.compute-work.evil",
        "$KV.compute-nodes.evil",
        "compute.work.completed.v1",
        "$JS.API.STREAM.PURGE.COMPUTE_WORK",
        "_INBOX",
        "_INBOXES.evil",
    ],
)
async def test_an_answer_goes_to_an_inbox_and_nowhere_else(mesh: RunningMesh, outsider: Outsider, reply: str) -> None:
    """A caller must not have us write where it may not: not into a bucket, a stream or an API.

    Its account confines outsiders; services, who share the store's, check what they answer to.
    """
    admin = outsider.of(frozenset({Role.SERVICES}))
    before = {stream: await messages_in(admin, stream) for stream in STREAMS}
    lines, answered = len(mesh.lines), await errors_answered(admin)
    for request in (work.REQUEST, work.GET, nodes.QUERY, nodes.GET):
        for caller in (outsider.of(request.asked_by), admin):
            await caller.publish(request.subject, b"nonsense", reply=reply)
            await caller.flush()
    told = "not answered: the reply subject is no inbox"
    await until(lambda: sum(told in line for line in mesh.lines[lines:]) == 4, what="all four to be left unanswered")
    async with asyncio.timeout(10):
        while await errors_answered(admin) < answered + 8:
            await asyncio.sleep(0.01)
    assert {stream: await messages_in(admin, stream) for stream in STREAMS} == before


async def test_a_write_would_be_noticed(outsider: Outsider) -> None:
    """Guards the test above: what it looks at changes when somebody does write."""
    admin = outsider.of(frozenset({Role.SERVICES}))
    subjects = (storage.WORK.subject("evil"), storage.NODES.subject("evil"), work.COMPLETED.subject)
    for stream, subject in zip(STREAMS, subjects, strict=True):
        before = await messages_in(admin, stream)
        sender = outsider.of(work.COMPLETED.sent_by) if subject == work.COMPLETED.subject else admin
        ack = json.loads((await sender.request(subject, b"not a record", timeout=5)).data)
        assert ack["stream"] == stream
        assert await messages_in(admin, stream) != before


STREAMS: Final = (storage.WORK.stream, storage.NODES.stream, storage.WORK_INBOX.name)

BY_US: Final = (storage.WORK.subject("largest"), storage.WORK.subject("once"))
"""Items of other tests here, whose records may be written at any time."""


async def errors_answered(admin: Client) -> int:
    """How many requests the registry and the marshaller have refused so far, answer sent or not."""
    stats = [json.loads((await admin.request(f"$SRV.STATS.{name}", b"", timeout=5)).data) for name in CONTROL_PLANE]
    return sum(endpoint["num_errors"] for each in stats for endpoint in each["endpoints"])


async def messages_in(admin: Client, stream: str) -> dict[str, int]:
    """How many messages each subject of a stream has, bookkeeping and our own items apart."""
    asked = await admin.request(f"$JS.API.STREAM.INFO.{stream}", b'{"subjects_filter": ">"}', timeout=5)
    subjects: dict[str, int] = json.loads(asked.data)["state"].get("subjects") or {}
    keys_have = 2 if stream.startswith("KV_") else 3
    return {key: count for key, count in subjects.items() if key.count(".") == keys_have and key not in BY_US}
