"""Three real NATS servers that keep everything three times, for tests that end one of them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from computemesh.bus import Bus, BusError, survey
from computemesh.bus.provision import wanted
from computemesh.contracts.base import Role
from computemesh.nats_server import LOOPBACK, ClusterConfig, NatsServer, ServerError, admit_node

SIZE: Final = 3
AGAIN_S: Final = 0.1


class NatsCluster:
    """The servers of one cluster. Each has a folder, and all have the same credentials.

    One that dies is started again, unless it is held down.
    """

    def __init__(self, folder: Path, credentials_file: Path) -> None:
        self.servers: Final[dict[str, NatsServer]] = {}
        """By name: ``nats-1`` and so on."""
        self._credentials_file = credentials_file
        self._may_run: dict[str, asyncio.Event] = {}
        self._keepers: list[asyncio.Task[None]] = []
        ports = free_ports(SIZE)
        password = secrets.token_urlsafe(24)
        for number, port in enumerate(ports, 1):
            name = f"nats-{number}"
            config = ClusterConfig(
                server=name, port=port, routes=tuple(f"{LOOPBACK}:{other}" for other in ports), password=password
            )
            self.servers[name] = NatsServer(folder / name, credentials_file, cluster=config)
            self._may_run[name] = asyncio.Event()
            self._may_run[name].set()

    def url(self, role: Role, node_id: str = "") -> str:
        """The addresses of all servers, with the credentials of *role*, or of one node."""
        return ",".join(server.url(role, node_id) for server in self.servers.values())

    async def start(self) -> None:
        """Returns when all take connections; what is stored is there some seconds later, when they chose a leader."""
        await asyncio.gather(*(server.start() for server in self.servers.values()))
        self._keepers = [asyncio.create_task(self._keep(name)) for name in self.servers]

    async def stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in self.servers.values()))

    async def admit(self, node_id: str) -> None:
        """Makes a user for a node, on every server."""
        for server in self.servers.values():
            await admit_node(server.folder, self._credentials_file, node_id)

    @asynccontextmanager
    async def without(self, name: str) -> AsyncGenerator[None]:
        """Kills a server, and keeps it from coming back until the end of the block."""
        self._may_run[name].clear()
        self.servers[name].kill()
        try:
            yield
        finally:
            self._may_run[name].set()

    async def _keep(self, name: str) -> None:
        server = self.servers[name]
        while True:
            await server.wait()
            await self._may_run[name].wait()
            while True:
                try:
                    await server.start()
                    break
                except ServerError:  # Its port or its folder is not free yet.
                    await asyncio.sleep(AGAIN_S)


async def leader(bus: Bus, stream: str) -> str:
    """The server that decides what is stored in a stream; empty while none does."""
    with contextlib.suppress(BusError):
        if info := await survey.stream(bus, stream):
            return info.cluster.leader
    return ""


async def is_whole(bus: Bus) -> bool:
    """Whether every copy of every stream and bucket is up to date, so that one server fewer does no harm."""
    try:
        for config in wanted(replicas=SIZE):
            info = await survey.stream(bus, config["name"])
            if info is None or not info.cluster.leader or len(info.cluster.replicas) < SIZE - 1:
                return False
            if not all(replica.current and not replica.offline for replica in info.cluster.replicas):
                return False
    except BusError:
        return False
    return True


def free_ports(count: int) -> Sequence[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
