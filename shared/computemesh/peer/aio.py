"""The same for programs with an event loop: `await` in the place of `wait()`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, cast

from computemesh.peer.agent import Expected, PeerAgent, PeerMemoryRegion, start_peer_agent
from computemesh.peer.assignments import Assignments, parse
from computemesh.peer.connection import PeerConnection
from computemesh.peer.errors import PeerError
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


async def taken(future: F, give_back: Callable[[], None]) -> F:
    """As `ended`, for what a peer sends. When the task is cancelled, what has not begun to come is the next one's; what
    has is let in first, so that nothing is written to its buffer afterwards, and given back.
    """
    try:
        return await ended(future)
    except asyncio.CancelledError:
        if not future.cancel():
            try:
                with contextlib.suppress(PeerError):
                    await ended(future)
            finally:  # Also if the task does not wait for that either.
                future.add_done_callback(lambda _: give_back())
        raise


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

    async def connect_to(
        self,
        peer_alias: str,
        local_device: str | None = None,
        peer_device: str | None = None,
        ib_port: int | None = 1,
        qp_num: int | None = 1,
        min_bw: str | None = None,
        transport: str = "auto",
        *,
        timeout: float | None = 60.0,
    ) -> PeerConnection:
        """As :meth:`PeerAgent.connect_to`, and waits until bytes can go both ways.

        Raises:
            TimeoutError: they can't in so many seconds; it goes on trying.
        """
        conn = await asyncio.to_thread(
            self.agent.connect_to, peer_alias, local_device, peer_device, ib_port, qp_num, min_bw, transport
        )
        return await asyncio.to_thread(conn.wait, timeout)

    def get_connections(self) -> dict[str, dict[str, PeerConnection]]:
        return self.agent.get_connections()

    def query_connection(
        self, peer_alias: str, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> PeerConnection | None:
        return self.agent.query_connection(peer_alias, local_nic=local_nic, remote_nic=remote_nic)

    async def register_memory_region(
        self,
        mr_name: str,
        ptr: Any,
        offset: int = 0,
        length: int | None = None,
        *,
        writable: bool = True,
        fd: int | None = None,
        fd_offset: int = 0,
    ) -> int:
        return await asyncio.to_thread(
            self.agent.register_memory_region,
            mr_name,
            ptr,
            offset,
            length,
            writable=writable,
            fd=fd,
            fd_offset=fd_offset,
        )

    async def allocate_memory_region(self, name: str, length: int, *, writable: bool = True) -> PeerMemoryRegion:
        return await asyncio.to_thread(self.agent.allocate_memory_region, name, length, writable=writable)

    async def unregister_memory_region(self, mr_name: str, *, handle: int | None = None) -> bool:
        return await asyncio.to_thread(self.agent.unregister_memory_region, mr_name, handle=handle)

    async def get_mr_info(
        self, *names: str, peer_alias: str | None = None, mr_name: str | None = None
    ) -> dict[str, Any] | None:
        return await asyncio.to_thread(self.agent.get_mr_info, *names, peer_alias=peer_alias, mr_name=mr_name)

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
        return await self._move("read", peer_alias, assign, local_nic, remote_nic, epoch, checksum)

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
        return await self._move("write", peer_alias, assign, local_nic, remote_nic, epoch, checksum)

    async def write_with_imm(
        self,
        peer_alias: str,
        assign: Assignments,
        imm_data: int = 0,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
    ) -> TransferFuture:
        """As :meth:`PeerAgent.write_with_imm`, and waits until the bytes are there, and the number."""
        write = self.agent.write_with_imm
        return await ended(
            await asyncio.to_thread(write, peer_alias, assign, imm_data, local_nic=local_nic, remote_nic=remote_nic)
        )

    async def send(
        self, peer_alias: str, chunk: Any, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> MessageFuture:
        """As :meth:`PeerAgent.send`, and waits until the peer has it."""
        await self._up(peer_alias, local_nic, remote_nic)
        return await ended(self.agent.send(peer_alias, chunk, local_nic=local_nic, remote_nic=remote_nic))

    async def recv(
        self, peer_alias: str, chunk: Any, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> MessageFuture:
        """As :meth:`PeerAgent.recv`, and waits for it. When the task is cancelled, the message is that of the next
        `recv`."""
        await self._up(peer_alias, local_nic, remote_nic)
        future = self.agent.recv(peer_alias, chunk, local_nic=local_nic, remote_nic=remote_nic)
        into = future.held  # None if it is done, and nothing can come between.
        return await taken(future, lambda: future.give_back(cast(memoryview, into)))

    async def imm_recv(
        self, peer_alias: str, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> ImmFuture:
        """As :meth:`PeerAgent.imm_recv`, and waits for the number. When the task is cancelled, it is that of the next
        `imm_recv`."""
        await self._up(peer_alias, local_nic, remote_nic)
        future = self.agent.imm_recv(peer_alias, local_nic=local_nic, remote_nic=remote_nic)
        return await taken(future, future.give_back)

    async def _up(self, peer_alias: str, local_nic: str | None, remote_nic: str | None) -> None:
        """Waits for a connection that is about to be up, where the call itself would have the loop wait."""
        connections = self.agent.core.connections
        if peer_alias not in connections.ready or local_nic is not None or remote_nic is not None:
            await asyncio.to_thread(connections.connected, peer_alias, local_nic, remote_nic)

    async def _move(
        self,
        kind: Literal["read", "write"],
        peer_alias: str,
        assign: Assignments,
        local_nic: str | None,
        remote_nic: str | None,
        epoch: Expected,
        checksum: Expected,
    ) -> TransferFuture:
        await self._up(peer_alias, local_nic, remote_nic)
        begin = partial(self.agent.begin, kind, peer_alias, assign, local_nic, remote_nic, epoch, checksum)
        future = None
        if sum(one.length for one in parse(assign)) <= INLINE_MAX and epoch is None:
            future = begin(cached_only=True)
        if future is None:
            future = await asyncio.to_thread(begin)
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
    *,
    ctrl_url: str | None = None,
    address: str | None = None,
    name_prefix: str = "agent",
    local_host: str | None = None,
) -> AsyncPeerAgent:
    """As :func:`start_peer_agent`, with methods that are awaited."""
    agent = await asyncio.to_thread(
        start_peer_agent,
        nanoctrl_url,
        alias,
        device,
        scope,
        ctrl_url=ctrl_url,
        address=address,
        name_prefix=name_prefix,
        local_host=local_host,
    )
    return AsyncPeerAgent(agent)
