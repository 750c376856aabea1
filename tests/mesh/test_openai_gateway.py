"""OpenAI's interface on the gateway: what clients get while nodes come, fail, are full, and go.

Goal: a client of OpenAI sees one server, whatever becomes of the engines behind it. Method: the gateway as a process,
its clients the official one and plain HTTP; nodes are of the test, so that each fails exactly where it is told to. Each
test has a model of its own, so none meets the engines of another.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from computemesh import openai as shapes
from computemesh.contracts import nodes
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import NodeDrain, NodeUndrain
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh_services.gateway import routing
from computemesh_services.gateway.engines import Candidate, Spot
from computemesh_services.gateway.following import LIST_EVERY_S
from tests.mesh.engine_node import DEVICE, EngineNode

pytestmark = pytest.mark.asyncio(loop_scope="module")

# pyright: reportUnknownMemberType=false

CHAT: Final = "/v1/chat/completions"
QUEUE_TIMEOUT_S: Final = 4.0
QUEUE_MAX: Final = 6
WRONG_KIND: Final = ("unsupported_model", "model")
UNAVAILABLE: Final = Refused(code="unavailable", reason="the engine does not start", status=503, retry="later")
LOST: Final = Refused(code="engine_lost", reason="the engine ended", status=503, retry="elsewhere")
FULL: Final = Refused(code="too_many_requests", reason="full", status=429, retry="later")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """Two gateways, without a model."""
    environment = {
        "COMPUTEMESH_QUEUE_TIMEOUT_S": str(QUEUE_TIMEOUT_S),
        "COMPUTEMESH_QUEUE_MAX": str(QUEUE_MAX),
        "COMPUTEMESH_LOG_LEVEL": "debug",
    }
    async with running_mesh(
        tmp_path_factory.mktemp("openai"),
        ("node-registry", "gateway"),
        copies={"gateway": 2},
        environment=environment,
    ) as running:
        for name in GATEWAYS:
            async with httpx.AsyncClient(base_url=running.http(name)) as client, asyncio.timeout(30):
                while (await client.post(CHAT, json=chat("unknown"))).status_code != 404:  # It says when it is sure.
                    await asyncio.sleep(0.02)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(mesh: RunningMesh) -> AsyncGenerator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=mesh.http(GATEWAYS[0]), timeout=30, limits=limits) as client:
        yield client


GATEWAYS: Final = ("gateway", "gateway-2")


@asynccontextmanager
async def engines(mesh: RunningMesh, model: str, *names: str, **options: Any) -> AsyncGenerator[list[EngineNode]]:
    """Nodes that serve a model, known to both gateways."""
    found = [EngineNode(await mesh.bus(Role.NODE, name), name, [model], **options) for name in names]
    for node in found:
        await node.join()
    for name in GATEWAYS:
        async with httpx.AsyncClient(base_url=mesh.http(name)) as client:
            async with asyncio.timeout(30):
                while not set(names) <= set(await serving(client, model)):
                    await asyncio.sleep(0.02)
    try:
        yield found
    finally:
        for node in found:
            await node.leave()


async def serving(client: httpx.AsyncClient, model: str) -> list[str]:
    """The nodes that a gateway would ask for a model."""
    listed: list[Any] = (await client.get("/v1/models")).json()["data"]
    found: list[list[str]] = [each["nodes"] for each in listed if each["id"] == model]
    return found[0] if found else []


def chat(model: str, text: str = "Hello?", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def official(mesh: RunningMesh) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{mesh.http(GATEWAYS[0])}/v1", api_key="none", max_retries=0)


def events(text: str) -> list[Any]:
    """What the events of an answer say, comments left out; the end mark as it is."""
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part and not part.startswith(":")]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


def error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error of a refusal in OpenAI's shape, which must say these."""
    assert answer.headers["content-type"] == "application/json", answer.text
    said: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, said["code"], said["param"]) == (status, code, param), said
    assert said["message"]
    assert said["type"]
    return said


# --- answers -----------------------------------------------------------------------------------------------------


async def test_the_official_client_chats_streams_completes_and_embeds(mesh: RunningMesh) -> None:
    """Each by its own method, against a base URL and nothing else."""
    async with engines(mesh, "m-official", "o1"), official(mesh) as client:
        asked: list[Any] = [{"role": "user", "content": "Hello?"}]
        whole = await client.chat.completions.create(model="m-official", messages=asked, max_tokens=3)
        assert whole.choices[0].message.content == "o1:0 o1:1 o1:2 "
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        stream = await client.chat.completions.create(model="m-official", messages=asked, max_tokens=3, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "o1:0 o1:1 o1:2 "
        assert chunks[-1].choices[0].finish_reason == "stop"
        text = await client.completions.create(model="m-official", prompt="A mesh", max_tokens=2)
        assert text.choices[0].text == "o1:0 o1:1 "
        vectors = await client.embeddings.create(model="m-official", input="x", encoding_format="float")
        assert vectors.data[0].embedding == [0.5, 0.25]
        assert "m-official" in [model.id async for model in await client.models.list()]
        assert (await client.models.retrieve("m-official")).owned_by == "computemesh"


async def test_the_usage_of_a_stream_is_told_to_those_who_ask(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """In an event of its own before the end; others do not see it."""
    async with engines(mesh, "m-usage", "u1"):
        for told in (False, True):
            options: dict[str, Any] = {"stream_options": {"include_usage": True}} if told else {}
            answer = await http.post(CHAT, json=chat("m-usage", stream=True, max_tokens=2, **options))
            assert answer.headers["content-type"].startswith("text/event-stream")
            said = events(answer.text)
            assert said[-1] == "[DONE]"
            usage = [event["usage"] for event in said[:-1] if "usage" in event]
            assert usage == ([{"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}] if told else [])
            assert len(said) == 4 + told


async def test_an_answer_names_its_request_its_trace_and_its_engine(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """And the log of the gateway has one line with all of them; the node works in the same trace."""
    async with engines(mesh, "m-trace", "t1") as (node,):
        parent = f"00-{'a' * 31}7-{'b' * 16}-01"
        answer = await http.post(CHAT, json=chat("m-trace", max_tokens=2), headers={"traceparent": parent})
        assert answer.headers["x-computemesh-node"] == "t1"
        assert answer.headers["x-computemesh-device"] == "gpu:0"
        assert "a" * 31 + "7" in answer.headers["traceresponse"]
        assert node.traces == ["a" * 31 + "7"]
        request_id = answer.headers["x-request-id"]
        assert node.asked[0].stream.startswith(request_id)
        lines: list[str] = []

        def logged() -> list[str]:
            lines[:] = [line for line in mesh.lines if request_id in line and '"answered"' in line]
            return lines

        await until(logged, what="the line in the log")
        assert len(lines) == 1
        said = json.loads(lines[0].partition(" ")[2])
        expected = {"model": "m-trace", "node": "t1", "status": 200, "tokens_in": 7, "tokens_out": 2, "tries": 1}
        assert {name: said[name] for name in expected} == expected
        assert said["trace_id"] == "a" * 31 + "7"


async def test_what_is_measured(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """By model and operation, under OpenTelemetry's names."""
    async with engines(mesh, "m-measured", "me1"):
        await http.post(CHAT, json=chat("m-measured", stream=True, max_tokens=5))
        await http.post("/v1/completions", json={"model": "m-measured", "prompt": "x", "max_tokens": 2})
        text = (await http.get("/metrics")).text
    samples = {
        (sample.name, sample.labels.get("gen_ai_operation_name"), sample.labels.get("gen_ai_token_type")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("gen_ai_request_model") == "m-measured" and not sample.name.endswith("_bucket")
    }
    assert samples["gen_ai_server_request_duration_seconds_count", "chat", None] == 1
    assert samples["gen_ai_server_time_to_first_token_seconds_count", "chat", None] == 1
    assert samples["gen_ai_server_time_per_output_token_seconds_count", "chat", None] == 1
    assert samples["gen_ai_client_token_usage_sum", "chat", "output"] == 5
    assert samples["gen_ai_client_token_usage_sum", "text_completion", "input"] == 7
    assert ("gen_ai_server_time_to_first_token_seconds_count", "text_completion", None) not in samples


# --- refusals ----------------------------------------------------------------------------------------------------


async def test_a_model_that_nobody_has_is_not_found(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """For the official client it is the error of that name; the message says which there are."""
    async with engines(mesh, "m-there", "th1"), official(mesh) as client:
        said = error(await http.post(CHAT, json=chat("nothing")), 404, "model_not_found", "model")
        assert "m-there" in said["message"]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="nothing", prompt="x")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        error(await http.get("/v1/models/nothing/at/all"), 404, "model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="m-there", messages=[])
        assert refused.value.param == "messages"


async def test_a_model_that_does_not_give_what_is_asked_names_those_that_do(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """Embeddings of a chat model, and texts of one that embeds; no engine is asked."""
    embed, text = {"input": "x"}, {"prompt": "x"}
    async with engines(mesh, "m-chats", "k1", embeddings=False) as (chats,):
        told = error(await http.post("/v1/embeddings", json={"model": "m-chats", **embed}), 400, *WRONG_KIND)
        assert told["message"].endswith("models that give embeddings: none")
        async with engines(mesh, "m-embeds", "k2", embeddings=True) as (embeds,):
            told = error(await http.post("/v1/embeddings", json={"model": "m-chats", **embed}), 400, *WRONG_KIND)
            assert told["message"].endswith("models that give embeddings: m-embeds")
            for path, body in ((CHAT, chat("m-embeds")), ("/v1/completions", {"model": "m-embeds", **text})):
                told = error(await http.post(path, json=body), 400, *WRONG_KIND)
                assert told["message"].endswith("models that give texts: m-chats")
            assert not chats.asked + embeds.asked
            assert (await http.post("/v1/embeddings", json={"model": "m-embeds", **embed})).status_code == 200
            assert (await http.post(CHAT, json=chat("m-chats"))).status_code == 200


async def test_every_refusal_of_the_edge_is_in_openais_shape(http: httpx.AsyncClient) -> None:
    """On these paths; all others keep theirs."""
    error(await http.post(CHAT, content=b"{", headers={"content-type": "application/json"}), 400, "bad_message")
    error(await http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415, "bad_content_type")
    error(await http.post(CHAT, json={"messages": chat("m")["messages"]}), 400, "bad_message", "model")
    error(await http.get(CHAT), 405, "method_not_allowed")
    error(await http.get("/v1/nothing"), 404, "not_found")
    error(await http.post(CHAT, json={}, headers={"origin": "http://evil.example"}), 403, "bad_origin")
    error(await http.get("/v1/models", headers={"host": "evil.example"}), 421, "bad_host")
    error(await http.post(CHAT, json=chat("m", "x" * 8 * 1024 * 1024)), 413, "too_large")
    assert (await http.get("/nothing")).headers["content-type"] == "application/problem+json"


async def test_what_an_engine_complains_of_is_passed_on(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """With its status, once: another engine would say the same."""
    async with engines(mesh, "m-complains", "c1", "c2") as (one, two):
        for node in (one, two):
            node.status = 400
            node.complaint = '{"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}'
        for stream in (False, True):
            answer = await http.post(CHAT, json=chat("m-complains", stream=stream))
            assert error(answer, 400, "exceed_context_size_error")["message"] == "too long"
        assert len(one.asked) + len(two.asked) == 2


async def test_what_a_node_says_does_not_become_part_of_the_protocol(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """A name with line ends is no header, and a status that there is not is none of ours."""
    async with engines(mesh, "m-odd", "odd1") as (node,):
        node.device = "gpu:0\r\nx-evil: 1\u20ac"
        answer = await http.post(CHAT, json=chat("m-odd"))
        assert (answer.status_code, answer.headers["x-computemesh-device"]) == (200, "gpu:0??x-evil: 1?")
        assert "x-evil" not in answer.headers
        for status in (7, 204, 302, 999):
            node.status, node.complaint = status, "odd"
            assert error(await http.post(CHAT, json=chat("m-odd")), 500, "engine_failed")["message"] == "odd"


async def test_a_model_whose_nodes_are_away_is_unavailable(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """For the moment, which is not the same as not found; and it is told among the models as well."""
    async with engines(mesh, "m-away", "a1") as (node,):
        node.accepting = False
        async with asyncio.timeout(30):
            while await serving(http, "m-away"):
                await asyncio.sleep(0.02)
        answer = await http.post(CHAT, json=chat("m-away"))
        error(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert "m-away" in (await http.get("/v1/models")).json()["rolemesh"]["unavailable_models"]
        error(await http.get("/v1/models/m-away"), 503, "unavailable")
        node.accepting = True
        await node.tell()
        async with asyncio.timeout(30):
            while (await http.post(CHAT, json=chat("m-away"))).status_code != 200:
                await asyncio.sleep(0.05)


async def test_a_node_that_an_operator_drains_gets_nothing_new(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """Long before the registry is asked again, and by a gateway that starts; given work again it is asked at once."""
    async with engines(mesh, "m-drained", "d1", "d2") as (one, two):
        operator = await mesh.bus(Role.SERVICES)
        for names, drained in ((["d2"], True), (["d1", "d2"], False), (["d2"], True)):
            if drained:
                assert not isinstance(await operator.ask(nodes.DRAIN, NodeDrain(node_id="d1")), Refused)
            else:
                assert not isinstance(await operator.ask(nodes.UNDRAIN, NodeUndrain(node_id="d1")), Refused)
            async with asyncio.timeout(LIST_EVERY_S / 3):
                while await serving(http, "m-drained") != names:
                    await asyncio.sleep(0.02)
        mesh.kill("gateway-2")
        await until(lambda: mesh.service("gateway-2").status.restarts > 0, what="another life of the gateway")
        await until(lambda: mesh.service("gateway-2").status.state == "ready", what="the gateway to be back")
        async with httpx.AsyncClient(base_url=mesh.http("gateway-2"), timeout=30) as other:
            async with asyncio.timeout(30):
                while await serving(other, "m-drained") != ["d2"]:
                    await asyncio.sleep(0.05)
            before = len(one.asked)
            for at in range(8):
                assert (await other.post(CHAT, json=chat("m-drained", f"{at}"))).status_code == 200
            assert len(one.asked) == before
            assert len(two.asked) == 8
        await operator.ask(nodes.UNDRAIN, NodeUndrain(node_id="d1"))


# --- when engines fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", ["refuses", "breaks", "not ready"])
async def test_a_request_that_an_engine_fails_is_answered_by_another(
    mesh: RunningMesh, http: httpx.AsyncClient, failure: str, stream: bool
) -> None:
    """As long as nothing of the answer is out; the client sees nothing of it."""
    model = f"m-fails-{failure.split()[-1]}-{stream}".lower()
    async with engines(mesh, model, "f1", "f2") as (one, two):
        for node, other in ((one, two), (two, one)):
            text = first_to(node, other, model)
            if failure == "refuses":
                node.refuses = UNAVAILABLE
            elif failure == "breaks":
                node.breaks = (0 if stream else 1, LOST)
            else:
                node.status, node.complaint = 503, '{"error": {"message": "Loading model", "code": 503}}'
            answer = await http.post(CHAT, json=chat(model, text, stream=stream, max_tokens=2))
            node.refuses, node.breaks, node.status = None, None, 200
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-computemesh-node"] != node.node_id
            assert len(node.asked) == 1
            one.asked.clear()
            two.asked.clear()
            await asyncio.sleep(2.1)  # The node is avoided for two seconds.


def first_to(node: EngineNode, other: EngineNode, model: str) -> str:
    """A prompt that is sent to this node before the other."""
    for at in range(1000):
        asked = shapes.read(CHAT, json.dumps(chat(model, f"{at}")).encode())
        assert not isinstance(asked, Refused)
        mine, others = (routing.score(routing.prefix_of(asked), idle(each.node_id)) for each in (node, other))
        if mine > others:
            return f"{at}"
    raise AssertionError("no prompt prefers it")


def idle(node_id: str) -> Candidate:
    spot = Spot(node_id, DEVICE)
    return Candidate(spot=spot, load=0, slots=64, full=False, loaded=True, free=True, present=True, sound=True)


async def test_a_node_that_is_gone_costs_a_request_nothing_but_a_moment(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """Long before anybody declares it lost: nobody answers for it, so another one is asked."""
    async with engines(mesh, "m-gone", "g1", "g2") as (one, two):
        text = first_to(one, two, "m-gone")
        assert (await http.post(CHAT, json=chat("m-gone", text))).headers["x-computemesh-node"] == "g1"
        await one.vanish()
        began_s = time.monotonic()
        answer = await http.post(CHAT, json=chat("m-gone", text))
        assert (answer.status_code, answer.headers["x-computemesh-node"]) == (200, "g2")
        assert time.monotonic() - began_s < 2
        assert len(two.asked) == 1


async def test_a_stream_that_breaks_after_its_first_token_ends_with_an_error(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """And without the end mark, so that nobody takes it for whole; the official client raises."""
    async with engines(mesh, "m-broken", "b1", "b2") as (one, two), official(mesh) as client:
        for node in (one, two):
            node.breaks = (2, LOST)
        answer = await http.post(CHAT, json=chat("m-broken", stream=True, max_tokens=5))
        assert answer.status_code == 200
        said = events(answer.text)
        assert [event["choices"][0]["delta"]["content"].partition(":")[2] for event in said[:2]] == ["0 ", "1 "]
        assert said[2]["error"]["code"] == "engine_lost"
        assert len(said) == 3
        assert len(one.asked) + len(two.asked) == 1
        messages: list[Any] = [{"role": "user", "content": "x"}]
        stream = await client.chat.completions.create(model="m-broken", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="the engine ended"):
            [chunk async for chunk in stream]


async def test_when_all_engines_fail_the_client_is_told_after_a_bounded_number_of_tries(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """With what the last one said."""
    async with engines(mesh, "m-none", "x1", "x2") as (one, two):
        one.refuses = two.refuses = UNAVAILABLE
        answer = await http.post(CHAT, json=chat("m-none"))
        assert error(answer, 503, "unavailable")["message"] == UNAVAILABLE.reason
        assert len(one.asked) + len(two.asked) == 5


# --- when engines are full ---------------------------------------------------------------------------------------


async def test_requests_wait_in_order_while_every_engine_is_full(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """And each gets its place when one falls free."""
    async with engines(mesh, "m-queue", "q1", slots=1, pending_max=1) as (node,):
        node.go.clear()
        asking: list[asyncio.Task[httpx.Response]] = []
        for at in range(5):
            asking.append(asyncio.create_task(http.post(CHAT, json=chat("m-queue", f"{at}", max_tokens=1))))
            await held(http, at + 1)
            await asyncio.sleep(0.05)
        assert len(node.asked) == 1
        node.go.set()
        answers = await asyncio.gather(*asking)
        assert [answer.status_code for answer in answers] == [200] * 5
        assert [asked.body["messages"][0]["content"] for asked in node.asked] == ["0", "1", "2", "3", "4"]


async def held(http: httpx.AsyncClient, count: int) -> None:
    """Returns once the gateway has so many requests, running or waiting."""
    async with asyncio.timeout(30):
        while True:
            facts = (await http.get("/healthz")).json()["inference"]
            if facts["running"] + facts["waiting"] >= count:
                return
            await asyncio.sleep(0.01)


async def test_a_request_that_waits_too_long_or_finds_too_many_is_told_to_come_back(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """429, with the time to wait; what has its place is not touched."""
    async with engines(mesh, "m-late", "l1", slots=1, pending_max=1) as (node,):
        node.go.clear()
        first = asyncio.create_task(http.post(CHAT, json=chat("m-late")))
        await until(lambda: node.open, what="the first to run")
        waiting = [asyncio.create_task(http.post(CHAT, json=chat("m-late"))) for _ in range(QUEUE_MAX)]
        await held(http, 1 + QUEUE_MAX)
        began_s = time.monotonic()
        crowded = await http.post(CHAT, json=chat("m-late"))
        assert "wait already" in error(crowded, 429, "too_many_requests")["message"]
        assert time.monotonic() - began_s < QUEUE_TIMEOUT_S / 2
        for late in await asyncio.gather(*waiting):
            error(late, 429, "too_many_requests")
            assert int(late.headers["retry-after"]) >= 1
        node.go.set()
        assert (await first).status_code == 200
        assert len(node.asked) == 1


async def test_a_node_that_says_it_is_full_is_not_asked_in_vain_and_the_request_waits(
    mesh: RunningMesh, http: httpx.AsyncClient
) -> None:
    """Somebody else has its places; once it has room, the request gets it."""
    async with engines(mesh, "m-others", "z1") as (node,):
        node.refuses = FULL
        asking = asyncio.create_task(http.post(CHAT, json=chat("m-others")))
        await until(lambda: node.asked, what="the node to be asked")
        await asyncio.sleep(0.5)
        assert len(node.asked) < 10
        node.refuses = None
        assert (await asking).status_code == 200


# --- when clients go ---------------------------------------------------------------------------------------------


async def test_a_client_that_goes_away_frees_the_engine(mesh: RunningMesh, http: httpx.AsyncClient) -> None:
    """Within a second, while it reads as well as before the first token; one that waits leaves the queue."""
    async with engines(mesh, "m-leaves", "v1", slots=1, pending_max=1) as (node,):
        for stops_at in (0, 2):
            node.stops_at = stops_at
            node.go.clear()
            asking = asyncio.create_task(http.post(CHAT, json=chat("m-leaves", stream=True)))
            await until(lambda: node.open, what="the request to run")
            names = set(node.open)
            queued = asyncio.create_task(http.post(CHAT, json=chat("m-leaves")))
            await held(http, 2)
            queued.cancel()
            await asyncio.wait([queued])
            asking.cancel()
            began_s = time.monotonic()
            async with asyncio.timeout(30):
                while not names <= set(node.cancelled):
                    await asyncio.sleep(0.01)
            assert time.monotonic() - began_s < 1
            node.go.set()
            count = len(node.asked)
            assert (await http.post(CHAT, json=chat("m-leaves"))).status_code == 200
            assert len(node.asked) == count + 1


# --- many gateways -----------------------------------------------------------------------------------------------


async def test_all_gateways_send_a_conversation_to_the_same_engine(mesh: RunningMesh) -> None:
    """Without a word between them; and many conversations spread."""
    async with engines(mesh, "m-affine", "k1", "k2", "k3"):
        chosen: list[list[str]] = []
        for name in GATEWAYS:
            async with httpx.AsyncClient(base_url=mesh.http(name), timeout=30) as client:
                answers = [await client.post(CHAT, json=chat("m-affine", f"{at}", max_tokens=1)) for at in range(30)]
            chosen.append([answer.headers["x-computemesh-node"] for answer in answers])
        assert chosen[0] == chosen[1]
        assert set(chosen[0]) == {"k1", "k2", "k3"}


# --- the end of a gateway (last, as it ends one) -------------------------------------------------------------------


async def test_a_gateway_that_is_told_to_end_finishes_its_streams(mesh: RunningMesh) -> None:
    """Within its time to drain."""
    async with engines(mesh, "m-drain", "dr1") as (node,):
        node.stops_at = 2
        node.go.clear()
        async with (
            httpx.AsyncClient(base_url=mesh.http("gateway-2"), timeout=30) as client,
            client.stream("POST", CHAT, json=chat("m-drain", stream=True)) as answer,
        ):
            lines = answer.aiter_text()
            text = await anext(lines)
            mesh.kill("gateway-2", signal.SIGTERM)
            await until(lambda: any("gateway-2" in line and '"draining"' in line for line in mesh.lines), what="drain")
            node.go.set()
            text += "".join([part async for part in lines])
        assert events(text)[-1] == "[DONE]"
        assert len(events(text)) == 4 + 2


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error(tmp_path: Path) -> None:
    """And does not just break off."""
    services = ("node-registry", "gateway")
    async with running_mesh(tmp_path, services, environment={"COMPUTEMESH_DRAIN_TIMEOUT_S": "2"}) as mesh:
        node = EngineNode(await mesh.bus(Role.NODE, "e1"), "e1", ["m"])
        await node.join()
        node.stops_at = 2
        node.go.clear()
        async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=30) as client:
            async with asyncio.timeout(30):
                while not await serving(client, "m"):
                    await asyncio.sleep(0.02)
            async with client.stream("POST", CHAT, json=chat("m", stream=True)) as answer:
                texts = answer.aiter_text()
                text = await anext(texts)
                (name,) = node.open
                mesh.kill("gateway", signal.SIGTERM)
                text += "".join([part async for part in texts])
        assert events(text)[-1]["error"]["code"] == "unavailable"
        await until(lambda: name in node.cancelled, what="the node to be told")
        await node.leave()
