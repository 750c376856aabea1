"""A real NATS server for one test."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from computemesh.nats_server import NatsServer, add_node
from computemesh.nats_server.process import find_binary
from computemesh.process import end


@asynccontextmanager
async def running_server(folder: Path, nodes: Sequence[str] = ()) -> AsyncGenerator[NatsServer]:
    """A server with its credentials and store under *folder*, ended with the block. The nodes have users there.

    Entered again with the same folder it has the same credentials, port and contents.
    """
    for node_id in nodes:
        add_node(folder / "credentials.json", node_id)
    server = NatsServer(folder / "nats", folder / "credentials.json")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def bare_server(folder: Path, *options: str) -> AsyncGenerator[str]:
    """A server with JetStream that we did not configure: by itself one without accounts, users and permissions.

    Args:
        options: further command line options.

    Yields:
        Its address, without credentials.
    """
    ports = folder / "ports"
    ports.mkdir(parents=True, exist_ok=True)
    command = [str(find_binary()), "-a", "127.0.0.1", "-p", "-1", "-js", "-sd", str(folder / "store")]
    process = await asyncio.create_subprocess_exec(
        *command, "--ports_file_dir", str(ports), *options, stderr=DEVNULL, start_new_session=True
    )
    try:
        while not (found := list(ports.glob(f"*_{process.pid}.ports"))):
            assert process.returncode is None, "the server did not start"
            await asyncio.sleep(0.01)
        yield str(msgspec.json.decode(found[0].read_bytes())["nats"][0])
    finally:
        await end(process, grace_s=10.0)
