"""A peer that the peer-agent runs for a process: the same as :mod:`computemesh.peer` runs in a process.

It is attached to the peer-agent's own socket like any other, so nothing else here knows of it. The process hands over
its memory as descriptors and says what is to be moved; a program in any language can do that.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Transfer, Transferred
from computemesh.peer.agent import default_endpoints
from computemesh.peer.attachment import OnClosed, OnTold, Signals
from computemesh.peer.core import Core
from computemesh.peer.errors import PeerError
from computemesh.peer.frames import close_fds
from computemesh.peer.memory import SharedMemory, seal
from computemesh.peer.regions import memory_of
from computemesh.peer.signals import Done, DropRegion, Hello, PutRegion, Welcome
from computemesh.peer.socket import AgentSocket

MOVES_MAX: Final = 8
"""Transfers of one hosted process that run at once; more of it wait, and those of others do not."""

T = TypeVar("T")


class Hosted:
    """One of them. What is not ``async`` blocks."""

    def __init__(self, hello: Hello, path: Path, local_host: str) -> None:
        """
        Args:
            path: of the peer-agent's own socket.

        Raises:
            PeerError: it is not taken.
        """

        def attach(on_told: OnTold, on_closed: OnClosed) -> Signals:
            return AgentSocket(path, replace(hello, hosted=False), on_told=on_told, on_closed=on_closed)

        self._core = Core(attach, default_endpoints(hello.device or None, local_host or None))
        self._epochs: dict[str, int] = {}
        """What the process calls the epochs of its regions, by name."""
        self._movers = ThreadPoolExecutor(MOVES_MAX, thread_name_prefix="hosted-move")

    @property
    def welcome(self) -> Welcome:
        return self._core.welcome

    def put(self, ask: PutRegion, fds: tuple[int, ...]) -> Done | Refused:
        """Takes memory of the process. The descriptor is closed."""
        try:
            if not fds:
                reason = "a hosted process hands its memory over as a descriptor"
                return Refused(code="bad_message", reason=reason, field="ask.fds")
            offset = ask.tokens.get("shm", {}).get("offset", 0)
            if not isinstance(offset, int) or offset < 0:
                reason = f"offset {offset!r} is no place in an object"
                return Refused(code="bad_message", reason=reason, field="ask.tokens.shm")
            seal(fds[0])  # Where that is possible; what can shrink is refused next.
            memory = SharedMemory.attach(fds[0], offset, ask.length)
            self._core.register(
                ask.name, memory_of(memory.view()), writable=ask.writable, fd=memory.fd, fd_offset=memory.offset
            )
            self._epochs[ask.name] = ask.epoch
            return Done()
        except PeerError as error:
            return _refused(error)
        except (ValueError, OSError) as error:
            reason = f"its memory cannot be mapped: {error}"
            return Refused(code="bad_message", reason=reason, field="ask.fds")
        finally:
            close_fds(fds)

    def drop(self, ask: DropRegion) -> Done | Refused:
        if self._epochs.get(ask.name) != ask.epoch:
            return Done(found=False)
        del self._epochs[ask.name]
        try:
            return Done(found=self._core.unregister(ask.name))
        except PeerError as error:
            return _refused(error)

    async def move(self, transfer: Transfer) -> Transferred:
        """Moves bytes, and says how it ended."""
        return await asyncio.get_running_loop().run_in_executor(self._movers, self._core.orders.run, transfer)

    def close(self) -> None:
        """Ends it; transfers that run fail."""
        self._movers.shutdown(wait=False, cancel_futures=True)
        self._core.close("the process has ended")


class Hosts:
    """Where they begin, are told of memory, and end: threads beside the event loop.

    Args:
        hosted_max: processes at once. Each does one of these at a time, so none waits for another one's.
    """

    def __init__(self, path: Path, local_host: str, hosted_max: int) -> None:
        self._path = path
        self._local_host = local_host
        self._threads = ThreadPoolExecutor(hosted_max, thread_name_prefix="hosted")

    async def enter(self, hello: Hello) -> Hosted | Refused:
        try:
            return await self.run(lambda: Hosted(hello, self._path, self._local_host))
        except PeerError as error:
            return _refused(error)
        except OSError as error:  # No descriptors are left, say.
            reason = f"the peer-agent has no place for it: {error.strerror or error}"
            return Refused(code="unavailable", reason=reason, status=503, retry="later")

    async def leave(self, hosted: Hosted) -> None:
        """Ends one; its memory and its descriptors are given back."""
        await self.run(hosted.close)
        del hosted
        # What it held goes in circles, and in a service the collector comes by rarely.
        await self.run(gc.collect)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def end(self) -> None:
        """Does not wait for what runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _refused(error: PeerError) -> Refused:
    return Refused(code=error.code, reason=str(error), status=409)
