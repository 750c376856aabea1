"""The servers that flows outside the mesh run on, each on a port of its own, ended with the block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from computemesh.nats_server.process import find_binary
from computemesh.process import end

GRACE_S: Final = 10.0


@asynccontextmanager
async def nats_server(folder: Path) -> AsyncGenerator[tuple[str, int]]:
    """A server without accounts or permissions; gives its address and process."""
    ports = folder / "ports"
    ports.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec(
        *(str(find_binary()), "-a", "127.0.0.1", "-p", "-1", "-js", "-sd", str(folder)),
        *("--ports_file_dir", str(ports)),
        stderr=DEVNULL,
        start_new_session=True,
    )
    try:
        while not (found := list(ports.glob("*.ports"))):
            await asyncio.sleep(0.02)
        yield str(msgspec.json.decode(found[0].read_bytes())["nats"][0]), process.pid
    finally:
        await end(process, grace_s=GRACE_S)


@asynccontextmanager
async def redis_server(folder: Path, *, durable: bool = True) -> AsyncGenerator[tuple[str, int]]:
    """A Redis; a durable one appends every write to a file and syncs it each second, as its documentation advises."""
    port = free_port()
    keeps = ("--appendonly", "yes", "--appendfsync", "everysec") if durable else ()
    process = await asyncio.create_subprocess_exec(
        *("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
        *("--save", "", *keeps),
        stdout=DEVNULL,
        start_new_session=True,
    )
    try:
        await until_open(port)
        yield f"redis://127.0.0.1:{port}", process.pid
    finally:
        await end(process, grace_s=GRACE_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until_open(port: int) -> None:
    """Returns once something listens on a port of this machine."""
    async with asyncio.timeout(GRACE_S):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)
