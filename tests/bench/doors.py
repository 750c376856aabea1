"""The ways to an engine that `make bench-infer` compares, and the program that asks at each of them.

direct         the engine itself
agent's edge   client -> node-agent -> engine
mesh           client -> gateway -> NATS -> node-agent -> engine
LiteLLM        client -> LiteLLM proxy -> engine

All of them stand before the same engine, which the node agent has started.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import psutil
import urllib3

from computemesh.ids import token_from
from computemesh.process import end
from computemesh.testing import RunningMesh, running_mesh
from computemesh.testing.fake_engine import install
from computemesh.testing.mesh import CONTROL_PLANE
from tests.bench.harness import GIVE_UP_S, GRACE_S, program
from tests.bench.programs.openai_load import Plan, Result
from tests.bench.servers import free_port

MODEL: Final = "smollm2-135m-instruct"
DIRECT: Final = "direct"
EDGE: Final = "agent's edge"
MESH: Final = "mesh"
LITELLM: Final = "LiteLLM"

AS_IN_PRODUCTION: Final = {
    "COMPUTEMESH_STRICT": "",
    "COMPUTEMESH_HEARTBEAT_INTERVAL_S": "",
    "COMPUTEMESH_SUSPECT_AFTER_S": "",
    "COMPUTEMESH_LOST_AFTER_S": "",
}
"""Takes back what the meshes of tests have otherwise."""

_http: Final = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=10.0))


@dataclass(frozen=True)
class Door:
    """A way to an engine: its address, and the processes that take part behind it."""

    url: str
    parts: Mapping[str, int]


class Load:
    """The program that asks, in a process of its own."""

    def __init__(self, process: Process) -> None:
        self.pid: Final = process.pid
        self._process = process

    async def carry_out(self, plan: Plan) -> Result:
        """Returns once each request of the plan has ended, in whatever way.

        Raises:
            EOFError: the program ended; what it has to say about that is on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(plan) + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise EOFError("the program that asks ended before it answered")
        return msgspec.json.decode(line, type=Result)


@asynccontextmanager
async def load() -> AsyncGenerator[Load]:
    async with program("tests.bench.programs.openai_load", limit=2**26) as process:
        yield Load(process)


@asynccontextmanager
async def inference_mesh(folder: Path, *, fake: bool, slots: int, pending: int) -> AsyncGenerator[RunningMesh]:
    """A mesh with a gateway and a node agent, whose engine is ready.

    Args:
        fake: the engine is the fast stand-in of the tests, not llama.cpp.
        slots: requests that an engine works on at the same time.
        pending: requests that an engine takes, those that wait included.
    """
    settings = {
        **AS_IN_PRODUCTION,
        "COMPUTEMESH_ENGINE_SLOTS": str(slots),
        "COMPUTEMESH_MAX_PENDING_REQUESTS_PER_DEVICE": str(pending),
        "COMPUTEMESH_CONTEXT_TOKENS": "512",
    }
    if fake:
        settings["COMPUTEMESH_LLAMA_SERVER"] = str(install(folder))
    async with running_mesh(folder, (*CONTROL_PLANE, "gateway", "node-agent"), environment=settings) as mesh:
        await until_served(mesh.http("gateway"))
        yield mesh


async def until_served(url: str) -> None:
    """Returns once a server answers a chat.

    Raises:
        TimeoutError: it does not.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 1}
    last = ""
    try:
        async with asyncio.timeout(GIVE_UP_S):
            while True:
                try:
                    answer = await asyncio.to_thread(_http.request, "POST", f"{url}/v1/chat/completions", json=body)
                    if answer.status == 200:
                        return
                    last = f"{answer.status} {answer.data.decode(errors='replace')[:300]}"
                except urllib3.exceptions.HTTPError as error:
                    last = str(error)
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise TimeoutError(f"{url} serves no chat; last: {last}") from None


def engine_of(agent: int) -> tuple[str, int]:
    """The address of an agent's engine, and its process.

    Raises:
        LookupError: it has none that listens.
    """
    for child in psutil.Process(agent).children(recursive=True):
        for connection in child.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return f"http://127.0.0.1:{connection.laddr.port}", child.pid
    raise LookupError(f"process {agent} has no engine that listens")


def doors_of(mesh: RunningMesh) -> dict[str, Door]:
    """Those that need nothing else."""
    url, engine = engine_of(mesh.pid("node-agent"))
    agent = {"node-agent": mesh.pid("node-agent"), "engine": engine}
    through = {"gateway": mesh.pid("gateway"), "nats-server": mesh.pid("nats-server")}
    return {
        DIRECT: Door(url, {"engine": engine}),
        EDGE: Door(mesh.http("node-agent"), agent),
        MESH: Door(mesh.http("gateway"), {**through, **agent}),
    }


@asynccontextmanager
async def litellm(folder: Path, engine: Door, python: Path) -> AsyncGenerator[Door]:
    """A LiteLLM proxy as its documentation sets it up for production, but without a database, which it does not need to
    pass requests on, and without keys. One process, as the gateway is one. It sends nothing home, and fetches nothing.
    """
    port = free_port()
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{engine.url}/v1", "api_key": "none"},
            }
        ],
        "litellm_settings": {"telemetry": False, "request_timeout": 600},
    }
    path = folder / "litellm.json"
    path.write_bytes(msgspec.json.encode(config))  # JSON is YAML.
    process = await asyncio.create_subprocess_exec(
        *(str(python.parent / "litellm"), "--config", str(path), "--telemetry", "False"),
        *("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
        stdout=DEVNULL,
        stderr=DEVNULL,
        env={
            **os.environ,
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "AIOHTTP_CONNECTOR_LIMIT": "2000",
            "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "2000",
        },
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await until_served(url)
        yield Door(url, {"LiteLLM": process.pid, "engine": engine.parts["engine"]})
    finally:
        await end(process, grace_s=GRACE_S)


@asynccontextmanager
async def another_agent(
    mesh: RunningMesh, folder: Path, node_id: str, *, settings: Mapping[str, str]
) -> AsyncGenerator[int]:
    """A further node agent, as on a machine of its own; gives its process."""
    url = await mesh.invite(node_id)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "computemesh_services.node_agent"),
        env={
            **os.environ,
            **settings,
            "NATS_URL": url,
            "COMPUTEMESH_NODE_ID": node_id,
            "COMPUTEMESH_MACHINE_ID": token_from(node_id),
            "COMPUTEMESH_HOME": str(folder / node_id),
            "COMPUTEMESH_HTTP_PORT": "0",
        },
        stdout=DEVNULL,
        stderr=DEVNULL,
        start_new_session=True,
    )
    try:
        yield process.pid
    finally:
        await end(process, grace_s=GRACE_S)
