"""The same for programs with an event loop: `await` in the place of `wait()`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from computemesh.peer.agent import Expected, PeerAgent, PeerMemoryRegion, start_peer_agent
from computemesh.peer.assignments import Assignments, parse
from computemesh.peer.connection import PeerConnection
from computemesh.peer.futures import ImmFuture, MessageFuture, PeerFuture, TransferFuture

INLINE_MAX: Final = 256 * 1024
"""Bytes that are copied in the loop's own thread where memory is shared, 50 µs or so; more goes to another thread."""

F = TypeVar("F", bound=PeerFuture)


async def ended(future: F) -> F:
    """Waits until a future has ended.

    Raises:
        PeerError: it failed.
    """
    if not future.done():
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not waiting.done():
                waiting.set_result(None)

        def tell(_: object) -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # The loop is closed; nobody waits any more.
                return

        future.add_done_callback(tell)
        await waiting
    future.wait(0)
    return future


class AsyncPeerAgent:
    """A :class:`PeerAgent` whose methods are awaited. What is not awaited answers at once.

    Attributes:
        agent: the agent behind it, which may be used at the same time.
    """

    def __init__(self, agent: PeerAgent) -> None:
        self.agent = agent
        self.alias = agent.alias
        self.scope = agent.scope

    async def list_agents(self) -> list[str]:
        return await asyncio.to_thread(self.agent.list_agents)

    async def get_resource(self, peer_alias: str | None = None) -> dict[str, Any] | None:
        return await asyncio.to_thread(self.agent.get_resource, peer_alias)

    async def list_mem_keys(self, peer_alias: str | None = None) -> list[str]:
        return await asyncio.to_thread(self.agent.list_mem_keys, peer_alias)

    async def set_desired_topology(
        self, target_peers: Sequence[str], *, min_bw: str | None = None, symmetric: bool = False
    ) -> None:
        await asyncio.to_thread(self.agent.set_desired_topology, target_peers, min_bw=min_bw, symmetric=symmetric)

    async def connect_to(self, peer_alias: str, *, timeout: float | None = 60.0, **options: Any) -> PeerConnection:
        """As :meth:`PeerAgent.connect_to`, and waits until bytes can go both ways.

        Raises:
            TimeoutError: they can't in so many seconds; it goes on trying.
        """
        conn = await asyncio.to_thread(self.agent.connect_to, peer_alias, **options)
        return await asyncio.to_thread(conn.wait, timeout)

    def get_connections(self) -> dict[str, dict[str, PeerConnection]]:
        return self.agent.get_connections()

    def query_connection(
        self, peer_alias: str, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> PeerConnection | None:
        return self.agent.query_connection(peer_alias, local_nic=local_nic, remote_nic=remote_nic)

    async def register_memory_region(
        self, mr_name: str, ptr: Any, offset: int = 0, length: int | None = None, **options: Any
    ) -> int:
        return await asyncio.to_thread(
            lambda: self.agent.register_memory_region(mr_name, ptr, offset, length, **options)
        )

    async def allocate_memory_region(self, name: str, length: int, *, writable: bool = True) -> PeerMemoryRegion:
        return await asyncio.to_thread(lambda: self.agent.allocate_memory_region(name, length, writable=writable))

    async def unregister_memory_region(self, mr_name: str) -> bool:
        return await asyncio.to_thread(self.agent.unregister_memory_region, mr_name)

    async def get_mr_info(self, *names: str, **options: str) -> dict[str, Any] | None:
        return await asyncio.to_thread(lambda: self.agent.get_mr_info(*names, **options))

    async def get_handle(self, mr_name: str, peer_alias: str | None = None) -> int:
        return await asyncio.to_thread(self.agent.get_handle, mr_name, peer_alias)

    async def read(
        self,
        peer_alias: str,
        assign: Assignments,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        epoch: Expected = None,
        checksum: Expected = None,
    ) -> TransferFuture:
        """As :meth:`PeerAgent.read`, and waits until the bytes are there. Returns the future, which is done."""
        return await self._transfer("read", peer_alias, assign, local_nic, remote_nic, epoch, checksum)

    async def write(
        self,
        peer_alias: str,
        assign: Assignments,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        epoch: Expected = None,
        checksum: Expected = None,
    ) -> TransferFuture:
        """As :meth:`PeerAgent.write`, and waits until the bytes are there. Returns the future, which is done."""
        return await self._transfer("write", peer_alias, assign, local_nic, remote_nic, epoch, checksum)

    async def write_with_imm(
        self, peer_alias: str, assign: Assignments, imm_data: int = 0, **options: Any
    ) -> TransferFuture:
        return await ended(
            await asyncio.to_thread(lambda: self.agent.write_with_imm(peer_alias, assign, imm_data, **options))
        )

    async def send(self, peer_alias: str, chunk: Any, **options: Any) -> MessageFuture:
        """As :meth:`PeerAgent.send`, and waits until the peer has it."""
        return await ended(self.agent.send(peer_alias, chunk, **options))

    async def recv(self, peer_alias: str, chunk: Any, **options: Any) -> MessageFuture:
        """As :meth:`PeerAgent.recv`, and waits for it. When the task is cancelled the buffer stays promised."""
        return await ended(self.agent.recv(peer_alias, chunk, **options))

    async def imm_recv(self, peer_alias: str, **options: Any) -> ImmFuture:
        """As :meth:`PeerAgent.imm_recv`, and waits for the number."""
        return await ended(self.agent.imm_recv(peer_alias, **options))

    async def _transfer(
        self,
        kind: Literal["read", "write"],
        peer_alias: str,
        assign: Assignments,
        local_nic: str | None,
        remote_nic: str | None,
        epoch: Expected,
        checksum: Expected,
    ) -> TransferFuture:
        def begin(*, cached_only: bool) -> TransferFuture | None:
            return self.agent.begin(
                kind,
                peer_alias,
                assign,
                local_nic=local_nic,
                remote_nic=remote_nic,
                epoch=epoch,
                checksum=checksum,
                cached_only=cached_only,
            )

        future = None
        if sum(one.length for one in parse(assign)) <= INLINE_MAX and epoch is None:
            future = begin(cached_only=True)
        if future is None:
            future = await asyncio.to_thread(begin, cached_only=False)
        assert future is not None
        return await ended(future)

    def stats(self) -> dict[str, Any]:
        return self.agent.stats()

    async def shutdown(self) -> None:
        await asyncio.to_thread(self.agent.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()


async def start_async_peer_agent(
    nanoctrl_url: str | os.PathLike[str] | None = None,
    alias: str | None = None,
    device: str | None = None,
    scope: str | None = None,
    **options: Any,
) -> AsyncPeerAgent:
    """As :func:`start_peer_agent`, with methods that are awaited."""
    return AsyncPeerAgent(await asyncio.to_thread(start_peer_agent, nanoctrl_url, alias, device, scope, **options))
