"""A real NATS server for one test."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from computemesh.nats_server import NatsServer, load_or_create


@asynccontextmanager
async def running_server(folder: Path) -> AsyncGenerator[NatsServer]:
    """A server with its credentials and store under *folder*, ended with the block.

    Entered again with the same folder it has the same credentials, port and contents.
    """
    server = NatsServer(folder / "nats", load_or_create(folder / "credentials.json"))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
