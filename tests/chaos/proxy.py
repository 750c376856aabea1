"""A TCP proxy that can be cut: what goes in does not come out before it is mended, and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

LOOPBACK: Final = "127.0.0.1"


class Proxy:
    """Stands between a program and a server."""

    def __init__(self, port: int) -> None:
        self.port = 0
        """Where it listens, once started."""
        self._to = port
        self._cut = False
        self._held: dict[asyncio.StreamWriter, bytearray] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._on_client, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """From now on bytes of both directions are held back, also those of new connections."""
        self._cut = True

    def holds(self, data: bytes) -> bool:
        """Whether this is on its way, and held back."""
        return any(data in held for held in self._held.values())

    def mend(self) -> None:
        """What was held back arrives, late."""
        self._cut = False
        for writer, held in self._held.items():
            writer.write(held)
            held.clear()

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(LOOPBACK, self._to)
            for pump in (self._pump(reader, back), self._pump(there, writer)):
                task = asyncio.create_task(pump)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            return
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held = self._held[writer] = bytearray()
        try:
            while data := await reader.read(65_536):
                if self._cut:
                    held += data
                    continue
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            del self._held[writer]
            writer.close()
