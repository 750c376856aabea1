"""OpenAI's interface from the client to the real model, through every process between them.

Goal: what the docs promise holds with llama.cpp at the end. Method: a mesh of processes with the embedded model; the
official client, and curl as the docs type it; engines and agents are killed where they are.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

import httpx
import openai
import psutil
import pytest
import pytest_asyncio

from computemesh.testing import RunningMesh, running_mesh, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.model]

# pyright: reportUnknownMemberType=false

MODEL: Final = "smollm2-135m-instruct"
PROCESSING: Final = "llamacpp:requests_processing "
CHAT: Final = "/v1/chat/completions"
ASKED: Final[list[Any]] = [{"role": "user", "content": "Name a colour."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    services = ("node-registry", "work-marshaller", "resource-detector", "node-agent", "gateway")
    # An agent that starts again must not be suspect meanwhile.
    patient = {"COMPUTEMESH_SUSPECT_AFTER_S": "20", "COMPUTEMESH_LOST_AFTER_S": "40"}
    async with running_mesh(tmp_path_factory.mktemp("openai"), services, environment=patient) as running:
        async with httpx.AsyncClient(base_url=running.http("gateway")) as client, asyncio.timeout(60):
            while MODEL not in [each["id"] for each in (await client.get("/v1/models")).json()["data"]]:
                await asyncio.sleep(0.05)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(mesh: RunningMesh) -> AsyncGenerator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{mesh.http('gateway')}/v1", api_key="none", max_retries=0) as found:
        yield found


def engines_of(mesh: RunningMesh) -> list[psutil.Process]:
    """The servers of the node agent."""
    children = psutil.Process(mesh.pid("node-agent")).children(recursive=True)
    return [child for child in children if "--port" in child.cmdline()]


async def test_the_official_client_chats_with_the_model(client: openai.AsyncOpenAI) -> None:
    """Whole, as a stream and as a text; always with the same words at temperature 0."""
    whole = await client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=12, temperature=0, seed=1, timeout=120
    )
    text = whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 12
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        max_tokens=12,
        temperature=0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    completion = await client.completions.create(model=MODEL, prompt="A mesh is", max_tokens=4)
    assert completion.choices[0].text
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]


async def test_plain_curl_gets_an_answer(mesh: RunningMesh) -> None:
    """As the README types it; and a stream line by line."""
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 8}
    for stream in (False, True):
        words = ["curl", "-sN", f"{mesh.http('gateway')}{CHAT}", "-H", "Content-Type: application/json"]
        words += ["-d", json.dumps({**body, "stream": stream})]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0
        if stream:
            assert out.endswith(b"data: [DONE]\n\n")
            assert b'"usage":{' not in out
        else:
            assert json.loads(out)["choices"][0]["message"]["content"]


async def test_what_the_engine_refuses_is_told_in_its_words(client: openai.AsyncOpenAI, mesh: RunningMesh) -> None:
    """A prompt beyond the context, a field that only the engine knows, and embeddings of a model that gives none."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}], max_tokens=4
        )
    assert caught.value.code
    async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=60) as plain:
        answer = await plain.post(CHAT, json={"model": MODEL, "messages": ASKED, "response_format": {"type": "x"}})
        assert answer.status_code >= 400
        assert answer.json()["error"]["message"]
        answer = await plain.post("/v1/embeddings", json={"model": MODEL, "input": "A mesh."})
        assert answer.status_code == 400  # It was not started for that.
        assert answer.json()["error"]["code"] == "unsupported_model"


async def test_a_schema_is_enforced_and_tools_are_left_out_as_the_docs_say(client: openai.AsyncOpenAI) -> None:
    """The chat template of the embedded model has no place for tools; the engine takes them, and answers with text."""
    colours: dict[str, object] = {"enum": ["mauve", "ochre"]}
    arguments: dict[str, object] = {"type": "object", "properties": {"colour": colours}, "required": ["colour"]}
    shaped = await client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": colours}},
    )
    assert json.loads(shaped.choices[0].message.content or "") in ("mauve", "ochre")
    plain = await client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=8, temperature=0)
    tooled = await client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        max_tokens=8,
        temperature=0,
        tools=[{"type": "function", "function": {"name": "paint", "parameters": arguments}}],
        tool_choice="required",
    )
    assert tooled.choices[0].message.content
    assert not tooled.choices[0].message.tool_calls
    assert plain.usage
    assert tooled.usage
    assert tooled.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_a_client_that_goes_away_frees_the_slot_of_the_engine(mesh: RunningMesh) -> None:
    """Within a second, as the engine itself tells."""
    async with httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=60) as plain:
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 2000, "stream": True, "ignore_eos": True}
        async with plain.stream("POST", CHAT, json=body) as answer:
            texts = answer.aiter_text()
            await anext(texts)
            assert await running(mesh)
        began_s = time.monotonic()
        while await running(mesh):
            assert time.monotonic() - began_s < 5
            await asyncio.sleep(0.02)
        assert time.monotonic() - began_s < 1.5


async def running(mesh: RunningMesh) -> bool:
    """Whether any engine works on a request."""
    found = 0.0
    for engine in engines_of(mesh):
        words = engine.cmdline()
        port = words[words.index("--port") + 1]
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        found += sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(PROCESSING))
    return found > 0


async def test_an_engine_that_is_killed_breaks_its_streams_and_serves_again(
    mesh: RunningMesh, client: openai.AsyncOpenAI
) -> None:
    """The stream that had begun ends with an error; a request that comes at that moment is answered."""
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    for engine in engines_of(mesh):
        os.kill(engine.pid, signal.SIGKILL)
    after = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=4, timeout=60))
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
    assert (await after).choices[0].message.content


async def test_an_agent_that_is_killed_comes_back_under_the_request(
    mesh: RunningMesh, client: openai.AsyncOpenAI
) -> None:
    """There is no other node, so the gateway asks again; the client sees nothing but the time it takes."""
    mesh.kill("node-agent")
    answer = await client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=4, timeout=120)
    assert answer.choices[0].message.content
    await until(lambda: mesh.service("node-agent").status.state == "ready", what="the agent to be back")
