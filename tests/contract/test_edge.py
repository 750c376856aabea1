"""The HTTP edge: every wrong call gets a problem document, every right one works, strangers stay outside.

Method: real services for what callers see; the application alone, without a server, for who may come in. Whatever a
test here asks, its answer must be one that the edge's OpenAPI document declares.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import nats
import pytest
import pytest_asyncio
from openapi_schema_validator import OAS31Validator
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from computemesh import __version__
from computemesh.bus import Bus, MicroService, Stored, Where
from computemesh.bus.provision import provision
from computemesh.config import ConfigError, Entrance, ServiceConfig
from computemesh.contracts import catalog, nodes, peers, services, work
from computemesh.contracts.base import AnyBound, Http, Refused, Request, Role, ServiceCard, serve
from computemesh.contracts.nodes import NodeAnnouncement, NodeGet, NodeRecord, NodeView
from computemesh.contracts.permissions import inbox_prefix
from computemesh.contracts.work import Assignment, WorkCompleted, WorkGet, WorkItem, WorkRecord
from computemesh.edge import Extra, application
from computemesh.edge.http import Doors, is_loopback
from computemesh.hardware import Gpu
from computemesh.nats_server import NatsServer
from computemesh.testing import RunningMesh, running_mesh, running_server, until
from computemesh_services.work_marshaller.config import MarshallerConfig
from computemesh_services.work_marshaller.reign import Reign
from computemesh_services.work_marshaller.service import WorkMarshaller

pytestmark = pytest.mark.asyncio(loop_scope="module")

# pyright: reportUnknownMemberType=false

ROOT: Final = Path(__file__).parents[2]
SERVICES: Final = tuple(card.name for card in services.SERVICES)
JSON: Final = {"content-type": "application/json"}

SERVED_BY: Final[dict[str, tuple[Request[Any, Any], ...]]] = {
    card.name: tuple(request for request in catalog.requests() if request.service is card) for card in services.SERVICES
}

ROUTES: Final = [
    (name, request, route) for name, requests in SERVED_BY.items() for request in requests for route in request.http
]
every_route = pytest.mark.parametrize(
    ("name", "request_", "route"), ROUTES, ids=[f"{route.method} {route.path}" for _, _, route in ROUTES]
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Every service, without a model, and a node with two GPUs, which says nothing but that it is there."""
    folder: Path = tmp_path_factory.mktemp("edge")
    told = {"COMPUTEMESH_MODELS": "/nowhere", "COMPUTEMESH_ENTITY_TTL_S": "3600"}
    async with running_mesh(folder, SERVICES, environment=told) as running:
        cards = [Gpu(index=at, uuid=f"GPU-{at}", vram_total_mb=24_576) for at in range(2)]
        box = NodeAnnouncement(node_id="gpu-box", work_types=["nothing"], gpus=cards)
        node = await running.bus(Role.NODE, "gpu-box")
        assert isinstance(await node.ask(nodes.REGISTER, box), NodeRecord)
        assert peers.REGISTER.example is not None
        assert isinstance(await node.ask(peers.REGISTER, peers.REGISTER.example), peers.Peer)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edges(mesh: RunningMesh) -> AsyncGenerator[Mapping[str, httpx.AsyncClient]]:
    """A client for each service's edge, which holds every answer against the edge's own document."""
    clients = {name: httpx.AsyncClient(base_url=mesh.http(name)) for name in SERVICES}
    for client in clients.values():
        document = (await client.get("/openapi.json")).json()
        client.event_hooks = {"response": [declared_by(document)]}
    yield clients
    for client in clients.values():
        await client.aclose()


def declared_by(document: dict[str, Any]) -> Callable[[httpx.Response], Awaitable[None]]:
    """Fails on an answer of a known route whose status, media type or body is none that *document* declares."""
    operations = {
        (method.upper(), re.compile(re.sub(r"{\w+}", "[^/]+", path))): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }

    async def check(answer: httpx.Response) -> None:
        asked = answer.request
        for (method, path), operation in operations.items():
            if asked.method == method and path.fullmatch(asked.url.path):
                said = f"{method} {asked.url}: {answer.status_code}"
                assert str(answer.status_code) in operation["responses"], said
                kind = answer.headers["content-type"].partition(";")[0]
                schema = operation["responses"][str(answer.status_code)]["content"][kind]["schema"]
                if kind.endswith("json"):
                    await answer.aread()
                    OAS31Validator({**schema, "components": document["components"]}).validate(answer.json())

    return check


def assert_problem(answer: httpx.Response, status: int, code: str, field: str = "") -> dict[str, Any]:
    """The problem document of a refusal, which must be complete and say these."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    said: dict[str, Any] = answer.json()
    assert (answer.status_code, said["status"], said["code"], said["field"]) == (status, status, code, field), said
    assert said["type"] == f"urn:computemesh:{code}"
    assert said["title"]
    assert said["detail"]
    assert said["retry"] in ("never", "later", "elsewhere")
    return said


# --- wrong calls --------------------------------------------------------------------------------------------------


def path_of(route: Http) -> str:
    """The route's path with some id in each of its places."""
    return re.sub(r"{\w+}", "a1", route.path)


@every_route
@pytest.mark.parametrize(
    "body",
    [b"{", b"hello", b"[]", b"null", b'{"a": "\xff"}', b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"],
    ids=["half", "text", "array", "null", "bad UTF-8", "100 deep"],
)
async def test_a_body_that_is_no_message_is_refused(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http, body: bytes
) -> None:
    """On every route, those that need no body included."""
    answer = await edges[name].request(route.method, path_of(route), content=body, headers=JSON)
    assert_problem(answer, 400, "bad_message")


@every_route
async def test_a_number_that_json_does_not_have_is_refused_and_its_field_named(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http
) -> None:
    answer = await edges[name].request(route.method, path_of(route), content=b'{"a": NaN}', headers=JSON)
    assert_problem(answer, 400, "bad_message", "a")


@every_route
async def test_a_body_that_is_not_declared_as_json_is_refused(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http
) -> None:
    """A browser lets any page send plain text and forms, but asks first before it sends JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"):
        headers = {"content-type": kind} if kind else {}
        answer = await edges[name].request(route.method, path_of(route), content=b"{}", headers=headers)
        assert_problem(answer, 415, "bad_content_type")


async def test_json_may_be_declared_with_a_character_set(edges: Mapping[str, httpx.AsyncClient]) -> None:
    """And in any case."""
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        answer = await edges["node-registry"].post("/api/v1/nodes/query", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 200


SUBMIT_LARGE: Final = "/api/v1/work/submit"
"""The route that takes large payloads, up to a bound of its own."""


@pytest.mark.parametrize(("name", "request_", "route"), [one for one in ROUTES if one[2].path != SUBMIT_LARGE])
async def test_a_body_above_a_mebibyte_is_refused(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http
) -> None:
    """Declared in advance or not; the connection serves the next call."""
    large = b'{"a": "' + b"x" * 1024 * 1024 + b'"}'

    async def chunks() -> AsyncGenerator[bytes]:
        for at in range(0, len(large), 65_536):
            yield large[at : at + 65_536]

    for content in (large, chunks()):
        answer = await edges[name].request(route.method, path_of(route), content=content, headers=JSON)
        assert_problem(answer, 413, "too_large")
    assert (await edges[name].get("/healthz")).status_code == 200


@every_route
async def test_an_unknown_query_parameter_is_refused_by_name(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http
) -> None:
    """A misspelt filter must not look like one that matched everything."""
    answer = await edges[name].request(route.method, f"{path_of(route)}?stauts=x")
    assert_problem(answer, 400, "bad_message", "stauts")


@pytest.mark.parametrize(
    ("name", "path", "field"),
    [
        ("work-marshaller", "/api/v1/work?limit=many", "limit"),
        ("work-marshaller", "/api/v1/work?limit=0", "limit"),
        ("work-marshaller", "/api/v1/work?status=done", "status"),
        ("work-marshaller", "/api/v1/work/a.b", "work_id"),
        ("work-marshaller", "/api/v1/work/*/explain", "work_id"),
        ("work-marshaller", "/api/v1/work/a%20b", "work_id"),
        ("work-marshaller", "/api/v1/work/%ff", "work_id"),
        ("node-registry", "/api/v1/nodes?min_tier=BEST", "min_tier"),
        ("node-registry", "/api/v1/nodes?requires_gpu=perhaps", "requires_gpu"),
        ("node-registry", "/api/v1/nodes?min_vram_mb=NaN", "min_vram_mb"),
        ("node-registry", "/api/v1/nodes?min_vram_mb=-1", "min_vram_mb"),
        ("node-registry", "/api/v1/nodes?sort=size", "sort"),
        ("node-registry", "/api/v1/nodes?states=online&states=gone", "states"),
        ("node-registry", "/api/v1/nodes?labels=a", "labels"),
        ("node-registry", "/api/v1/nodes?labels[a=1", "labels[a"),
        ("node-registry", "/api/v1/nodes?limit[a]=1", "limit[a]"),
        ("node-registry", "/api/v1/nodes?limit=1&limit=2", "limit"),
        ("node-registry", "/api/v1/nodes?after=nowhere", "after"),
        ("node-registry", "/api/v1/nodes/%3E", "node_id"),
    ],
)
async def test_a_wrong_value_in_path_or_query_is_refused_by_name(
    edges: Mapping[str, httpx.AsyncClient], name: str, path: str, field: str
) -> None:
    """As a wrong field in a body is."""
    assert_problem(await edges[name].get(path), 400, "bad_message", field)


async def test_query_parameters_are_read_as_what_their_fields_hold(edges: Mapping[str, httpx.AsyncClient]) -> None:
    """Numbers, truth and tiers in any case, all from text."""
    answer = await edges["node-registry"].get("/api/v1/nodes?requires_gpu=true&min_tier=ai_factory&limit=5")
    assert (answer.status_code, answer.json()) == (200, {"nodes": [], "count": 0, "next": ""})


@every_route
async def test_a_method_that_a_path_does_not_have_is_refused(
    edges: Mapping[str, httpx.AsyncClient], name: str, request_: Request[Any, Any], route: Http
) -> None:
    """Which ones it has is said in the header."""
    answer = await edges[name].request("PUT", path_of(route), json={})
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["/api/v1", "/api/v2/work", "/api/v1/nothing/here/at/all", "/healthz/x", "/%2e%2e"])
async def test_an_unknown_path_is_not_found(edges: Mapping[str, httpx.AsyncClient], path: str) -> None:
    """As a problem document like any other refusal."""
    for client in edges.values():
        assert_problem(await client.get(path), 404, "not_found")


async def test_what_an_item_is_refused_for_over_http(mesh: RunningMesh, edges: Mapping[str, httpx.AsyncClient]) -> None:
    """Work that no node knows, and the end of what has ended."""
    marshaller, submit = edges["work-marshaller"], "/api/v1/work/submit"
    assert_problem(await marshaller.post(submit, json={"work_type": "?"}), 400, "unknown_work_type", "work_type")
    node = await mesh.bus(Role.NODE)

    async def on_work(given: Assignment) -> None:
        await node.publish(work.COMPLETED, WorkCompleted(work_id=given.work_id, attempt=given.attempt))

    await node.subscribe(work.ASSIGNED, on_work)
    announcement = {"node_id": "p1", "work_types": ["edge"]}
    assert (await edges["node-registry"].post("/api/v1/nodes/register", json=announcement)).is_success
    async with asyncio.timeout(30):
        while not (await marshaller.post(submit, json={"work_id": "e2", "work_type": "edge"})).is_success:
            await asyncio.sleep(0.01)  # The marshaller has not heard of the node yet.
        while (await marshaller.get("/api/v1/work/e2")).json()["state"] != "completed":
            await asyncio.sleep(0.01)
    assert_problem(await marshaller.delete("/api/v1/work/e2"), 409, "already_final", "work_id")


async def test_what_is_not_there_is_not_found_by_its_field(edges: Mapping[str, httpx.AsyncClient]) -> None:
    """A right question about nothing."""
    assert_problem(await edges["node-registry"].get("/api/v1/nodes/nobody"), 404, "not_found", "node_id")
    for method, path in (("GET", "/api/v1/work/nothing"), ("DELETE", "/api/v1/work/nothing")):
        assert_problem(await edges["work-marshaller"].request(method, path), 404, "not_found", "work_id")


# --- strangers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8118", "localhost.evil.example", "192.168.1.7", ""])
@pytest.mark.parametrize("path", ["/healthz", "/api/v1/work", "/openapi.json", "/nothing"])
async def test_on_loopback_a_foreign_host_name_is_refused(
    edges: Mapping[str, httpx.AsyncClient], host: str, path: str
) -> None:
    """A DNS name that was re-pointed at this machine must not reach the edge."""
    assert_problem(await edges["work-marshaller"].get(path, headers={"host": host}), 421, "bad_host")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost", "http://127.0.0.1:1", ""])
async def test_a_call_from_another_page_is_refused(edges: Mapping[str, httpx.AsyncClient], origin: str) -> None:
    """A page in the browser of this machine's user is none of ours."""
    answer = await edges["work-marshaller"].post(
        "/api/v1/work/submit", json={"work_type": "inference"}, headers={"origin": origin}
    )
    assert_problem(answer, 403, "bad_origin")


async def test_our_own_names_and_pages_are_let_in(mesh: RunningMesh, edges: Mapping[str, httpx.AsyncClient]) -> None:
    """By any name of loopback, and from a page of the same edge."""
    client = edges["work-marshaller"]
    port = urlsplit(mesh.http("work-marshaller")).port
    for host in (f"localhost:{port}", "localhost", f"127.0.0.1:{port}", "127.0.0.2", "[::1]", f"[::1]:{port}"):
        assert (await client.get("/api/v1/work", headers={"host": host})).status_code == 200
    own = {"origin": f"http://127.0.0.1:{port}"}
    assert (await client.get("/api/v1/work", headers=own)).status_code == 200


@pytest.mark.parametrize(
    ("host", "only_this_machine"),
    [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.example", False), ("", False), ("127.0.0.1.example", False)],
)  # fmt: skip
async def test_loopback_is_what_can_only_mean_this_machine(host: str, only_this_machine: bool) -> None:
    """Binding all addresses is not loopback, nor is a name that begins like it."""
    assert is_loopback(host) is only_this_machine


# --- the doors that every edge has ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
async def test_health_readiness_and_metrics_are_told(edges: Mapping[str, httpx.AsyncClient], name: str) -> None:
    """In the form that probes and Prometheus expect."""
    health = await edges[name].get("/healthz")
    assert health.status_code == 200
    facts = health.json()
    assert (facts["status"], facts["service"], facts["nats"], facts["problem"]) == ("ok", name, "connected", "")
    ready = await edges[name].get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reason": ""})
    metrics = await edges[name].get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(metrics.text) for sample in family.samples]
    info = next(sample for sample in samples if sample.name == "computemesh_service_info")
    assert (info.labels["service"], info.labels["version"], info.value) == (name, __version__, 1.0)


@pytest.mark.parametrize("name", SERVICES)
async def test_the_openapi_document_has_every_route_and_every_type_it_mentions(
    edges: Mapping[str, httpx.AsyncClient], name: str
) -> None:
    """A client generator can work with it: nothing dangles, every parameter is declared."""
    document = (await edges[name].get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"] == __version__
    declared = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    doors = {("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs")}
    card = next(card for card in services.SERVICES if card.name == name)
    routed = [*(r for request in SERVED_BY[name] for r in request.http), *(each.http for each in catalog.routes(card))]
    assert declared.keys() == doors | {(route.method, route.path) for route in routed}
    others = {(each.http.method, each.http.path) for each in catalog.routes(card) if each.refused_as}
    ids = [operation["operationId"] for operation in declared.values()]
    assert len(set(ids)) == len(ids)
    for reference in references(document):
        assert reference.startswith("#/components/schemas/")
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    for (method, path), operation in declared.items():
        assert operation["summary"]
        if (method, path) in doors:
            continue
        in_path = {p["name"] for p in operation["parameters"] if p["in"] == "path" and p["required"] is True}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        assert ("requestBody" in operation) is (method == "POST")
        success = {status for status in operation["responses"] if status.startswith("2")}
        assert len(success) == 1
        refusals = {status: each for status, each in operation["responses"].items() if status not in success}
        assert {"400", "401", "403", "421", "500", "503"} <= refusals.keys()
        kind = "application/json" if (method, path) in others else "application/problem+json"
        assert all(each["content"].keys() == {kind} for each in refusals.values())


def references(value: Any) -> Iterator[str]:
    """Every ``$ref`` anywhere inside."""
    if isinstance(value, dict):
        for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
            if key == "$ref":
                yield str(inner)  # pyright: ignore[reportUnknownArgumentType]
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:  # pyright: ignore[reportUnknownVariableType]
            yield from references(inner)


@pytest.mark.parametrize("name", SERVICES)
async def test_the_document_that_a_service_serves_is_the_one_in_the_reference(
    edges: Mapping[str, httpx.AsyncClient], name: str
) -> None:
    """The file is written without the service; it must not tell of another."""
    served = (await edges[name].get("/openapi.json")).json()
    assert served == json.loads((ROOT / "docs/reference/openapi" / f"{name}.json").read_text())


OF_NO_RUN: Final = {
    "not_finished",
    "no_result",
    "no_log",
    "not_blacklisted",
    "model_not_found",
    "not_ready",
    "unavailable",
}
"""What an example may be refused for that asks what came of an item, or of its node, or asks a model: in this mesh
nothing runs."""


@pytest.mark.parametrize("name", SERVICES)
async def test_every_example_of_the_page_works_over_http(edges: Mapping[str, httpx.AsyncClient], name: str) -> None:
    """Whoever copies the commands, from the top down, gets what is promised."""
    page = (await edges[name].get("/docs")).text
    document = (await edges[name].get("/openapi.json")).json()
    commands = [command for command in commands_in(page) if command[0] == "curl"]
    assert len(commands) == sum(len(methods) for methods in document["paths"].values())
    for command in commands:
        method, url, headers, body = read_curl(command)
        answer = await edges[name].request(method, url, headers=headers, content=body)
        said: dict[str, Any] = answer.json() if not answer.is_success else {}
        code = said["error"]["code"] if "error" in said else said.get("code")
        assert answer.is_success or code in OF_NO_RUN, f"{command}: {answer.text}"


@pytest.mark.parametrize("name", SERVICES)
async def test_every_example_of_the_page_works_on_the_bus(
    mesh: RunningMesh, edges: Mapping[str, httpx.AsyncClient], name: str
) -> None:
    """By plain NATS, with the node's id where the page has a placeholder."""
    page = (await edges[name].get("/docs")).text
    commands = [command for command in commands_in(page) if command[0] == "nats"]
    assert len(commands) == sum(len(request.http) for request in SERVED_BY[name])
    connection = await nats.connect(mesh.url(Role.SERVICES), inbox_prefix=inbox_prefix(Role.SERVICES))
    for _, verb, subject, message in commands:
        assert verb == "request"
        answer = await connection.request(subject.replace("<node_id>", "n1"), message.encode(), timeout=10)
        assert not answer.headers or json.loads(answer.data)["code"] in OF_NO_RUN, answer.data
    await connection.close()


def commands_in(page: str) -> list[list[str]]:
    """Every command of a page as its words."""
    return [shlex.split(unescape(text)) for text in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]


def read_curl(words: list[str]) -> tuple[str, str, dict[str, str], str | None]:
    """Method, address, headers and body of a ``curl`` command."""
    method, url, headers, body = "GET", "", dict[str, str](), None
    rest = iter(words[1:])
    for word in rest:
        match word:
            case "-s":
                pass
            case "-X":
                method = next(rest)
            case "-H":
                header, _, value = next(rest).partition(": ")
                headers[header] = value
            case "-d":
                body = next(rest)
            case _:
                assert not url, words
                url = word
    return method, url, headers, body


@pytest.mark.parametrize("name", SERVICES)
async def test_the_page_comes_with_a_policy_that_allows_it_its_own_style_alone(
    edges: Mapping[str, httpx.AsyncClient], name: str
) -> None:
    """No script, no image, no address elsewhere, no frame around it: a browser would refuse them."""
    page = await edges[name].get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    style = re.search(r"<style>(.*?)</style>", page.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.pop("style-src") == f"'sha256-{digest}'"
    assert policy.keys() >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_the_root_leads_to_the_page(edges: Mapping[str, httpx.AsyncClient]) -> None:
    """Whoever opens the address of an edge in a browser finds out what it is."""
    for client in edges.values():
        answer = await client.get("/", headers={"accept": "text/html,*/*;q=0.8"})
        assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


async def test_the_status_that_is_declared_is_the_one_that_is_sent(edges: Mapping[str, httpx.AsyncClient]) -> None:
    """Submitting is 202: accepted, not done."""
    client = edges["work-marshaller"]
    document = (await client.get("/openapi.json")).json()
    answer = await client.post("/api/v1/work/submit", json={"work_id": "e1", "work_type": "inference"})
    assert str(answer.status_code) in document["paths"]["/api/v1/work/submit"]["post"]["responses"]
    assert answer.status_code == 202
    assert (await client.get("/api/v1/work/e1")).json()["work_id"] == "e1"
    assert (await client.request("DELETE", "/api/v1/work/e1?reason=enough")).json()["state"] == "cancelled"


async def test_a_submission_is_answered_once_the_item_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the marshaller reads its inbox late; an item that was answered must not be unknown meanwhile."""
    reading, gate = asyncio.Event(), asyncio.Event()
    read = Reign._on_inbox  # pyright: ignore[reportPrivateUsage]

    late: list[asyncio.Task[None]] = []

    async def later(reign: Reign, stored: Stored) -> None:
        await gate.wait()
        await read(reign, stored)

    async def read_late(reign: Reign, stored: Stored) -> None:
        reading.set()  # And goes on: nothing else is read while this is.
        late.append(asyncio.create_task(later(reign, stored)))

    monkeypatch.setattr(Reign, "_on_inbox", read_late)
    async with running_server(tmp_path) as server, connected(server) as bus, asyncio.timeout(30):
        marshaller = WorkMarshaller(bus, MarshallerConfig(), "here")
        tasks: list[asyncio.Task[None]] = []
        micro = MicroService(bus, name="here", description="", metadata={})
        await marshaller.start(lambda coroutine: tasks.append(asyncio.create_task(coroutine)), micro)
        await until(lambda: not marshaller.unready(), what="the marshaller to reign")
        submitting = asyncio.create_task(marshaller.on_request(WorkItem(work_id="w1", work_type="inference")))
        await reading.wait()
        await bus.flush()  # The acknowledgement has come by now.
        assert not submitting.done()
        gate.set()
        assert isinstance(await submitting, WorkRecord)
        assert isinstance(await marshaller.on_get(WorkGet(work_id="w1")), WorkRecord)
        await marshaller.drain()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def connected(server: NatsServer) -> AsyncGenerator[Bus]:
    """A connection as a service, with all streams and buckets."""
    bus = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="here"))
    await bus.connect(timeout_s=5)
    try:
        await provision(bus)
        yield bus
    finally:
        await bus.close()


# --- the gate, without a server -------------------------------------------------------------------------------------

TOKEN: Final = "a-token-of-sixteen"
CARD: Final = ServiceCard(name="test", about="A test.", role=Role.SERVICES, port=0)


async def _get(ask: NodeGet) -> NodeView | Refused:
    if ask.node_id == "defect":
        raise RuntimeError("a secret of the service")
    return NodeView(node_id=ask.node_id)


BOUNDS: Final[list[AnyBound]] = [serve(nodes.GET, _get)]


def outside(**config: Any) -> httpx.AsyncClient:
    """A client of an edge that is bound to all addresses."""
    doors = Doors(card=CARD, health=lambda: {"problem": ""}, unready=lambda: "")
    app = application(ServiceConfig(http_host="0.0.0.0", **config), doors, BOUNDS, [])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://mesh.example:8115")


async def test_routes_with_one_handler_are_measured_apart() -> None:
    """Each by its own template, whatever the path holds; a wrong method too, and what is no route as none."""

    async def hear(_: HttpRequest) -> Response:
        return Response()

    paths = ("/one-handler/a", "/one-handler/b", "/one-handler/names/{name:path}")
    extras = [Extra(method="POST", path=path, handler=hear) for path in paths]
    doors = Doors(card=CARD, health=lambda: {"problem": ""}, unready=lambda: "")
    app = application(ServiceConfig(), doors, BOUNDS, extras)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8115") as client:
        for path in ("/one-handler/a", "/one-handler/b", "/one-handler/b", "/one-handler/names/x/y"):
            assert (await client.post(path)).status_code == 200
        assert (await client.get("/one-handler/a")).status_code == 405
        assert (await client.get("/one-handler/none")).status_code == 404
        text = (await client.get("/metrics")).text
    counted = {
        (s.labels["http_request_method"], s.labels["http_route"], s.labels["http_response_status_code"]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "http_server_request_duration_seconds_count" and "one-handler" in s.labels["http_route"]
    }
    assert counted == {
        ("POST", "/one-handler/a", "200"): 1,
        ("POST", "/one-handler/b", "200"): 2,
        ("POST", "/one-handler/names/{name:path}", "200"): 1,
        ("GET", "/one-handler/a", "405"): 1,
    }


async def test_beyond_loopback_the_token_decides() -> None:
    """None is 401, a wrong one 403, the right one is let in."""
    async with outside(token=TOKEN) as client:
        assert_problem(await client.get("/api/v1/nodes/n1"), 401, "no_token")
        for shown in ("Basic abc", f"Token {TOKEN}", TOKEN):
            answer = await client.get("/api/v1/nodes/n1", headers={"authorization": shown})
            assert_problem(answer, 401, "no_token")
        for shown in ("Bearer wrong", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xe4"):
            answer = await client.get("/api/v1/nodes/n1", headers=[(b"authorization", shown.encode("latin-1"))])
            assert_problem(answer, 403, "bad_token")
        key = "x-rolemesh-node-key"
        assert_problem(await client.get("/api/v1/nodes/n1", headers={key: "wrong"}), 403, "bad_token")
        assert (await client.get("/api/v1/nodes/n1", headers={key: TOKEN})).status_code == 200
        both = {key: TOKEN, "authorization": "Bearer wrong"}
        assert_problem(await client.get("/api/v1/nodes/n1", headers=both), 403, "bad_token")
        for shown in (f"Bearer {TOKEN}", f"bearer  {TOKEN} "):
            answer = await client.get("/api/v1/nodes/n1", headers={"authorization": shown})
            assert (answer.status_code, answer.json()["node_id"]) == (200, "n1")


class Keyed(ServiceConfig, frozen=True, kw_only=True):
    """An edge with keys of its own."""

    clients: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def entrance(self) -> Entrance:
        given = {"/": self.clients, "/api/v1/nodes/": self.nodes}
        keys = {start: keys for start, keys in given.items() if keys}
        return Entrance(tokens=(self.token,) if self.token else (), keys=keys)


def keyed(host: str = "127.0.0.1", **config: Any) -> httpx.AsyncClient:
    """A client of an edge with keys."""
    doors = Doors(card=CARD, health=lambda: {"problem": ""}, unready=lambda: "")
    app = application(Keyed(http_host=host, **config), doors, BOUNDS, [])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}:8091")


async def test_keys_are_demanded_on_loopback_too_and_each_opens_what_it_is_for() -> None:
    """Either header will do. The keys of the longest beginning count, and the token opens everything."""
    async with keyed(clients=("c-1", "c-2"), nodes=("n-1",), token=TOKEN) as client:
        for path, right, wrong in (
            ("/openapi.json", ("c-1", "c-2", TOKEN), ("n-1", "c-", "c-12", "")),
            ("/api/v1/nodes/n1", ("n-1", TOKEN), ("c-1", "n-2")),
        ):
            assert_problem(await client.get(path), 401, "no_token")
            for key in right:
                for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"x-rolemesh-node-key": key}):
                    assert (await client.get(path, headers=header)).status_code == 200, (path, header)
            for key in wrong:
                for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                    assert_problem(await client.get(path, headers=header), 403, "bad_token")
        assert (await client.get("/healthz")).status_code == 200


async def test_only_what_has_keys_demands_one() -> None:
    async with keyed(nodes=("n-1",)) as client:
        assert (await client.get("/openapi.json")).status_code == 200
        assert_problem(await client.get("/api/v1/nodes/n1"), 401, "no_token")


async def test_keys_for_everything_are_enough_beyond_loopback_and_keys_for_something_are_not() -> None:
    async with keyed("192.0.2.1", clients=("c-1",)) as client:
        assert_problem(await client.get("/openapi.json"), 401, "no_token")
    with pytest.raises(ConfigError, match="COMPUTEMESH_TOKEN"):
        keyed("192.0.2.1", nodes=("n-1",))


async def test_beyond_loopback_nothing_is_told_without_the_token_but_how_the_process_is() -> None:
    """Probes have no token. Paths that do not exist are refused like those that do."""
    async with outside(token=TOKEN) as client:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for path in ("/openapi.json", "/docs", "/", "/nothing", "/healthz/", "/api/v1/nodes/n1"):
            assert (await client.get(path)).status_code == 401


async def test_beyond_loopback_a_page_of_another_origin_is_refused_even_with_the_token() -> None:
    """Any host name is right there, but the page must come from the same one."""
    async with outside(token=TOKEN) as client:
        right = {"authorization": f"Bearer {TOKEN}"}
        answer = await client.get("/api/v1/nodes/n1", headers={**right, "origin": "http://evil.example"})
        assert_problem(answer, 403, "bad_origin")
        same = {**right, "origin": "http://mesh.example:8115"}
        assert (await client.get("/api/v1/nodes/n1", headers=same)).status_code == 200


async def test_an_edge_beyond_loopback_without_a_token_does_not_start() -> None:
    """The message names the settings that help."""
    with pytest.raises(
        ConfigError, match=r"COMPUTEMESH_HTTP_HOST=0\.0\.0\.0.*COMPUTEMESH_TOKEN.*COMPUTEMESH_ALLOW_OPEN"
    ):
        outside()


async def test_an_edge_may_be_opened_on_purpose() -> None:
    """Inside a network that is closed itself. A token that is set all the same still counts."""
    async with outside(allow_open=True) as client:
        assert (await client.get("/api/v1/nodes/n1")).status_code == 200
    async with outside(allow_open=True, token=TOKEN) as client:
        assert_problem(await client.get("/api/v1/nodes/n1"), 401, "no_token")


async def test_a_defect_is_answered_without_its_details() -> None:
    """The log has them; the caller gets a problem document."""
    async with outside(allow_open=True) as client:
        answer = await client.get("/api/v1/nodes/defect")
        assert "secret" not in json.dumps(assert_problem(answer, 500, "internal"))
