"""Answers of engines over the bus between real processes: a node agent, its engine, an asker, and a NATS server, each
of which is killed, halted or told to end in the middle.

Method: the node agent starts the fake engine in the place of llama-server; what the engine says of itself is what
counts for places that fall free. An asker is this test, or a program of its own where it must die.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
import pytest

from computemesh.answers import Answer, AnswerFailed
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.infer import InferAsk
from computemesh.ids import new_id
from computemesh.infer_client import InferClient
from computemesh.testing import FakeEngine, RunningMesh, running_mesh, until
from computemesh.testing.fake_engine import install
from computemesh.testing.mesh import NODE_ID

STREAMS: Final = 1000

SLOW_TOKENS: Final = 60_000
"""More than fits the buffers of all sockets on the way."""

MODEL: Final = "smollm2-135m-instruct"

pytestmark = pytest.mark.model

ASKER: Final = """
import asyncio, contextlib, os, sys
from computemesh.bus import Bus, Where
from computemesh.contracts.base import Role
from computemesh.contracts.infer import InferAsk
from computemesh.infer_client import InferClient

async def main():
    bus = Bus(Where(url=os.environ["NATS_URL"], role=Role.CLIENT, name="asker"))
    await bus.connect(timeout_s=10)
    async with InferClient(bus) as engines:
        body = {"messages": [{"role": "user", "content": "tokens=100000 rate=20"}], "stream": True}
        answer = await engines.open(sys.argv[1], InferAsk(stream="i-doomed", model=sys.argv[2], body=body))
        async for text in answer:
            print("begun", flush=True)

asyncio.run(main())
"""


class Agent:
    """The node agent of a mesh, and its engine."""

    def __init__(self, mesh: RunningMesh) -> None:
        self.mesh = mesh

    def engine(self) -> FakeEngine | None:
        """The engine that runs now."""
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for process in psutil.Process(self.mesh.pid("node-agent")).children(recursive=True):
                words = process.cmdline()
                if any(word.endswith("fake_engine.py") for word in words):
                    return FakeEngine(f"http://127.0.0.1:{words[words.index('--port') + 1]}", process.pid)
        return None

    async def serving(self) -> FakeEngine:
        """The engine, once an answer has come from it over the bus."""
        async with InferClient(await self.mesh.bus()) as asker:
            deadline_s = asyncio.get_running_loop().time() + 60
            while True:
                answer = await asker.open(NODE_ID, ask("tokens=1"))
                if not isinstance(answer, Refused):
                    await read(answer)
                    engine = self.engine()
                    assert engine is not None
                    return engine
                assert asyncio.get_running_loop().time() < deadline_s, answer
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def running_agent(folder: Path, **settings: str) -> AsyncGenerator[Agent]:
    environment = {
        "COMPUTEMESH_LLAMA_SERVER": str(install(folder)),
        "COMPUTEMESH_ENGINE_SLOTS": str(STREAMS),
        "COMPUTEMESH_MAX_PENDING_REQUESTS_PER_DEVICE": str(2 * STREAMS),
        **settings,
    }
    async with running_mesh(folder, ("node-agent",), environment=environment) as mesh:
        yield Agent(mesh)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[Agent]:
    async with running_agent(tmp_path) as running:
        yield running


def ask(words: str, *, stream: bool = True) -> InferAsk:
    body = {"messages": [{"role": "user", "content": words}], "stream": stream}
    return InferAsk(stream=new_id("i"), model=MODEL, body=body)


async def opened(asker: InferClient, words: str) -> Answer:
    answer = await asker.open(NODE_ID, ask(words))
    assert not isinstance(answer, Refused), answer
    return answer


async def read(answer: Answer) -> str:
    async with contextlib.aclosing(answer):
        return "".join([text async for text in answer])


def tokens_of(text: str) -> list[str]:
    return re.findall(r'"content":"([^"]*)"', text)


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}:{number} " for number in range(count)]


async def broken_off(answers: list[Answer], within_s: float) -> list[Refused]:
    """Why answers that all break off do so."""
    async with asyncio.timeout(within_s):
        results: list[Any] = await asyncio.gather(*map(read, answers), return_exceptions=True)
    failures = [result.refused for result in results if isinstance(result, AnswerFailed)]
    assert len(failures) == len(answers), results
    return failures


# --- many -----------------------------------------------------------------------------------------------------------


async def test_a_thousand_answers_at_once_lose_and_mix_nothing_and_take_bounded_memory(agent: Agent) -> None:
    """Every token carries its stream's name and number. Among them are six, as fast as they are taken, which nobody
    takes until the others are done: they wait in their engine, not in anybody's memory."""
    engine = await agent.serving()
    node = psutil.Process(agent.mesh.pid("node-agent"))
    own = psutil.Process()
    before_mb = [process.memory_info().rss >> 20 for process in (node, own)]
    async with InferClient(await agent.mesh.bus()) as asker:
        slow = [await opened(asker, f"id=slow{number} tokens={SLOW_TOKENS}") for number in range(6)]

        async def chat(name: str) -> None:
            assert tokens_of(await read(await opened(asker, f"id={name} tokens=40 rate=2"))) == numbered(name, 40)

        chats = [asyncio.create_task(chat(f"s{number}")) for number in range(STREAMS - len(slow))]
        await engine.until(within_s=120, running=STREAMS)
        await asyncio.gather(*chats)
        after_mb = [process.memory_info().rss >> 20 for process in (node, own)]
        for number, answer in enumerate(slow):
            assert tokens_of(await read(answer)) == numbered(f"slow{number}", SLOW_TOKENS)
    state = await engine.until(running=0)
    assert state["cancelled"] == 0
    assert state["served"] == STREAMS + 1
    grown_mb = [after - before for after, before in zip(after_mb, before_mb, strict=True)]
    assert max(grown_mb) < 150, grown_mb


async def test_a_thousand_answers_at_once_through_the_gateway_lose_and_mix_nothing(tmp_path: Path) -> None:
    """The same over HTTP, through the front door: no answer is refused, none waits for another."""
    environment = {
        "COMPUTEMESH_LLAMA_SERVER": str(install(tmp_path)),
        "COMPUTEMESH_ENGINE_SLOTS": str(STREAMS),
        "COMPUTEMESH_MAX_PENDING_REQUESTS_PER_DEVICE": str(2 * STREAMS),
        # As in a real mesh: a machine that is busy is not away.
        "COMPUTEMESH_SUSPECT_AFTER_S": "25",
        "COMPUTEMESH_LOST_AFTER_S": "45",
    }
    services = ("node-registry", "node-agent", "gateway")
    async with running_mesh(tmp_path, services, environment=environment) as mesh:
        engine = await Agent(mesh).serving()
        door = mesh.http("gateway")
        async with aiohttp.ClientSession(door, connector=aiohttp.TCPConnector(limit=0)) as http:

            async def chat(name: str, words: str, expected: int) -> int:
                body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": f"id={name} {words}"}]}
                async with http.post("/v1/chat/completions", json=body) as answer:
                    text = await answer.text()
                    if answer.status == 200:
                        assert tokens_of(text) == numbered(name, expected)
                        assert text.endswith("data: [DONE]\n\n")
                    return answer.status

            deadline_s = asyncio.get_running_loop().time() + 60
            while await chat("first", "tokens=1", 1) != 200:
                assert asyncio.get_running_loop().time() < deadline_s, "the gateway does not find the node"
                await asyncio.sleep(0.2)
            chats = [asyncio.create_task(chat(f"g{number}", "tokens=80 rate=2", 80)) for number in range(STREAMS)]
            await engine.until(within_s=120, running=STREAMS)
            assert set(await asyncio.gather(*chats)) == {200}
        assert (await engine.until(running=0))["cancelled"] == 0


# --- those who go ---------------------------------------------------------------------------------------------------


async def test_the_agent_is_killed(agent: Agent) -> None:
    """Its engine goes with it. Answers break off within seconds; its next life serves."""
    engine = await agent.serving()
    async with InferClient(await agent.mesh.bus()) as asker:
        answers = [await opened(asker, "tokens=100000 rate=5") for _ in range(10)]
        agent.mesh.kill("node-agent")
        failures = await broken_off(answers, 8)
        assert {failure.retry for failure in failures} == {"elsewhere"}
        await until(lambda: not psutil.pid_exists(engine.pid), what="the engine ended")
        again = await agent.serving()
        assert again.pid != engine.pid


async def test_the_agent_is_halted(agent: Agent) -> None:
    """One that does not say that it is there is lost within seconds. When it goes on, it stops what nobody reads."""
    engine = await agent.serving()
    async with InferClient(await agent.mesh.bus()) as asker:
        answers = [await opened(asker, "tokens=100000 rate=5") for _ in range(3)]
        agent.mesh.kill("node-agent", signal.SIGSTOP)
        failures = await broken_off(answers, 10)
        assert {(failure.code, failure.retry) for failure in failures} == {("node_lost", "elsewhere")}
        agent.mesh.kill("node-agent", signal.SIGCONT)
        await engine.until(within_s=20, running=0)


async def test_the_engine_is_killed(agent: Agent) -> None:
    """Its answers break off at once; the next one comes from its next life."""
    engine = await agent.serving()
    async with InferClient(await agent.mesh.bus()) as asker:
        answers = [await opened(asker, "tokens=100000 rate=5") for _ in range(3)]
        engine.kill()
        failures = await broken_off(answers, 5)
        assert {(failure.code, failure.retry) for failure in failures} == {("engine_lost", "elsewhere")}
        again = await agent.serving()
        assert again.pid != engine.pid


async def test_the_asker_is_killed(agent: Agent) -> None:
    """Nobody tells the node; it stops what is not asked about any more."""
    engine = await agent.serving()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ASKER, NODE_ID, MODEL),
        env=agent.mesh.environment(Role.CLIENT),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), 30)
    await engine.until(running=1)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await engine.until(within_s=20, running=0, cancelled=1)


async def test_the_nats_server_is_killed(agent: Agent) -> None:
    """Answers break off and their engine is free; the next one comes over the next life of the server."""
    engine = await agent.serving()
    async with InferClient(await agent.mesh.bus()) as asker:
        answers = [await opened(asker, "tokens=100000 rate=5") for _ in range(3)]
        agent.mesh.kill("nats-server")
        failures = await broken_off(answers, 5)
        assert {failure.code for failure in failures} == {"stream_broken"}
        await engine.until(running=0)
    again = await agent.serving()
    assert again.pid == engine.pid


async def test_the_agent_is_told_to_end(tmp_path: Path) -> None:
    """What ends in time ends as it would; a new request is refused, to be asked elsewhere; the rest is broken off."""
    async with running_agent(tmp_path, COMPUTEMESH_FINISH_S="5") as agent:
        await agent.serving()
        async with InferClient(await agent.mesh.bus()) as asker:
            short = await opened(asker, "id=short tokens=20 rate=10")
            long = await opened(asker, "tokens=100000 rate=10")
            agent.mesh.kill("node-agent", signal.SIGTERM)
            await until(lambda: any("finishing answers" in line for line in agent.mesh.lines), what="it drains")
            refused = await asker.open(NODE_ID, ask("tokens=1"))
            assert isinstance(refused, Refused)
            assert (refused.code, refused.retry) == ("unavailable", "elsewhere")
            assert tokens_of(await read(short)) == numbered("short", 20)
            [failure] = await broken_off([long], 15)
            assert (failure.code, failure.retry) == ("unavailable", "elsewhere")


# --- the example ----------------------------------------------------------------------------------------------------


async def test_the_plain_program_of_the_page_prints_an_answer(agent: Agent) -> None:
    """And says so when it is refused, or nobody is there."""
    await agent.serving()
    program = Path(__file__).parents[2] / "docs/examples/streams/ask.py"

    async def run(*words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(program), *words),
            env=agent.mesh.environment(Role.CLIENT),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, out.decode(), err.decode()

    assert await run(NODE_ID, MODEL, "id=a tokens=5") == (0, "a:0 a:1 a:2 a:3 a:4 \n", "")
    assert await run("nowhere", MODEL, "x") == (1, "", "node nowhere is not there\n")
    status, _, complaint = await run(NODE_ID, "no-such-model", "x")
    assert status == 1
    assert complaint.startswith("refused: ")
