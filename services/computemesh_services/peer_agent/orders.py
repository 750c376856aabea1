"""Transfers that are ordered over the bus: given to the process whose they are, and their ends told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from msgspec.structs import replace

from computemesh import log
from computemesh.bus import BusError, NotStored
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Transfer, TransferBegun, Transferred
from computemesh.peer.signals import Begun, Order
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.measures import UNTOLD, count
from computemesh_services.peer_agent.node import Node
from computemesh_services.peer_agent.transfers import Transfers

ORDER_S: Final = 3.0
"""For a process to say that it begins a transfer; then it is taken to have begun."""

AGAIN_S: Final = 1.0
UNTOLD_MAX: Final = 10_000
"""Ends that wait to be told while the bus is away; more are lost."""

_log = log.get("orders")


class Orders:
    """Each is begun once, and its end told once."""

    def __init__(self, node: Node, running_max: int) -> None:
        self._node = node
        self._transfers = Transfers(running_max, node.id)
        self._untold: asyncio.Queue[Transferred] = asyncio.Queue(UNTOLD_MAX)
        self._one_ended = asyncio.Event()

    @property
    def running(self) -> int:
        return self._transfers.running

    async def on_transfer(self, transfer: Transfer) -> TransferBegun | Refused:
        """Somebody wants bytes to be moved."""
        name = Name(transfer.scope, transfer.alias)
        answer = (
            self._transfers.known(transfer)  # First: the process may have ended since.
            or self._node.desk.may_move(transfer)
            or self._transfers.begin(transfer, time.monotonic())
        )
        if answer is not None:
            return answer
        begun = await self._node.lines[name].ask(Order(transfer=transfer), timeout_s=ORDER_S)
        if isinstance(begun, Refused):
            self._transfers.forget(transfer.transfer_id)
            return begun
        if isinstance(begun, Begun):
            return begun.body
        return TransferBegun(transfer_id=transfer.transfer_id, state="running")

    def _ended(self, ended: Transferred) -> None:
        count(ended)
        self._one_ended.set()
        try:
            self._untold.put_nowait(ended)
        except asyncio.QueueFull:
            UNTOLD.inc()

    async def tell_forever(self) -> None:
        """Each end is told once, as soon as the bus takes it."""
        while True:
            ended = await self._untold.get()
            await self._tell(ended)
            self._untold.task_done()

    async def _tell(self, ended: Transferred) -> None:
        while True:
            try:
                await self._node.bus.publish(peers.TRANSFERRED, ended)
                return
            except NotStored:  # What is said of each piece makes it larger than a message may be.
                ended = replace(ended, epochs=[], checksums=[], transports=[])
            except BusError as error:
                _log.warning("cannot tell of a transfer", transfer_id=ended.transfer_id, reason=str(error))
                await asyncio.sleep(AGAIN_S)

    def told(self, name: Name, outcome: Transferred) -> None:
        """A process says that one of its transfers has ended."""
        if (ended := self._transfers.end(name, outcome)) is not None:
            self._ended(ended)

    def process_ended(self, name: Name, reason: str) -> None:
        """What it had in hand fails."""
        for ended in self._transfers.fail_of(name, "no_peer", reason, time.monotonic(), time.time()):
            self._ended(ended)

    def look(self) -> None:
        """What should have ended by now fails."""
        for ended in self._transfers.fail_overdue(time.monotonic(), time.time()):
            self._ended(ended)

    async def drain(self, within_s: float) -> None:
        """Those that run may end, in that time; then they are cancelled. All ends are told, if the bus takes them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.75 * within_s):
                while self._transfers.running:
                    self._one_ended.clear()
                    await self._one_ended.wait()
        for ended in self._transfers.fail_all("cancelled", "the peer-agent ends", time.monotonic(), time.time()):
            self._ended(ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.25 * within_s):
                await self._untold.join()
