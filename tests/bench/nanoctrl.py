"""The peer: ``nanoctrl`` 0.0.5, a registry in Rust on Redis, asked over HTTP by the same client as ours."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from computemesh.process import end
from tests.bench.clients import Load, Took, measure
from tests.bench.servers import GRACE_S, free_port, redis_server, until_open

HOW_TO_GET: Final = (
    "for the peer: apt-get install redis-server; python3 -m venv PEER; PEER/bin/pip install nanoctrl==0.0.5; "
    "then --peer PEER/bin/nanoctrl"
)


def find_peer(named: Path | None) -> Path | None:
    """The peer's program, if it and its Redis are here."""
    program = named or shutil.which("nanoctrl")
    return Path(program) if program and Path(program).is_file() and shutil.which("redis-server") else None


@asynccontextmanager
async def running_peer(program: Path, folder: Path) -> AsyncGenerator[tuple[str, Callable[[], int]]]:
    """The peer on a Redis of its own that stores nothing; gives its address, and what tells the RSS of both."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCTRL_")}
    port = free_port()
    async with redis_server(folder, durable=False) as (redis_url, redis_pid):
        server = await asyncio.create_subprocess_exec(
            *(str(program), "server", "--host", "127.0.0.1", "--port", str(port), "--redis-url", redis_url),
            stdout=DEVNULL,
            stderr=DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            await until_open(port)
            processes = [psutil.Process(redis_pid), psutil.Process(server.pid)]
            yield f"http://127.0.0.1:{port}", lambda: sum(process.memory_info().rss for process in processes)
        finally:
            await end(server, grace_s=GRACE_S)


async def measure_peer(program: Path, folder: Path, size: int, seconds: float) -> dict[str, Any]:
    """Heartbeats and lists per second with this many records."""
    engines = [
        {
            "engine_id": f"engine-{number:05}",
            "role": "decode",
            "world_size": 8,
            "num_blocks": 15_000,
            "host": "10.0.0.2",
            "port": 6001,
            "peer_addrs": ["10.0.0.2:5000"],
        }
        for number in range(size)
    ]
    beats = [{"entity_type": "engine", "entity_id": engine["engine_id"]} for engine in engines]
    async with running_peer(program, folder) as (address, rss):

        async def ask(path: str, bodies: list[Any], connections: int, *, once: bool = False) -> Took:
            texts = [json.dumps(body) for body in bodies]
            load = Load(
                kind="http",
                address=address,
                target=path,
                bodies=texts,
                connections=connections,
                seconds=seconds,
                once=once,
            )
            return await measure(load)

        await ask("/register_engine", engines, 16, once=True)
        found: dict[str, Any] = {}
        for connections in (1, 16):
            # Records live for 60 s, which heartbeats renew.
            await ask("/heartbeat_engine", beats, 16, once=True)
            found[f"heartbeat({connections})"] = await ask("/heartbeat_engine", beats[:1000], connections)
            found[f"list({connections})"] = await ask("/list_engines", [{}], connections)
        return {"nodes": size, "rss_mb": round(rss() / 2**20), "requests": found}
