"""What the control plane is told of the processes of this node, again and again until it knows.

A process is registered before it is welcomed. Its memory follows as fast as the control plane takes it; while the bus
or the control plane is away, what changed waits. Who the control plane has lost is registered again, with all its
memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from computemesh import log
from computemesh.bus import BusError
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import (
    MemoryDrop,
    PeerBeat,
    PeerHeartbeat,
    PeerRegister,
    PeerUnregister,
)
from computemesh_services.peer_agent.desk import Name, Process, memory_of
from computemesh_services.peer_agent.node import Node

AT_ONCE: Final = 16
"""Pieces of memory of one process that are told at once."""
AGAIN_S: Final = 1.0
BEATS_MAX: Final = 1000
"""In one heartbeat."""

T = TypeVar("T")

_log = log.get("plane")


class Ownership:
    """Keeps one process's memory known. ``dirty`` names what the control plane may not know yet."""

    def __init__(self, process: Process, register: PeerRegister) -> None:
        self.process = process
        self.register = register
        self.dirty: dict[str, asyncio.Future[Refused | None]] = {}
        """By name of a region: who waits for it to be told."""
        self.epochs: dict[str, int] = {}
        """What the control plane was told last, by name."""
        self.more = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Plane:
    """
    Args:
        on_lost: called when the control plane says that a process's alias is another's, with the reason.
    """

    def __init__(self, node: Node, on_lost: Callable[[Name, str], None], heartbeat_s: float) -> None:
        self._node = node
        self._on_lost = on_lost
        self._heartbeat_s = heartbeat_s
        self._owned: dict[Name, Ownership] = {}
        self._beat_now = asyncio.Event()

    # --- one process -------------------------------------------------------------------------------------------------

    def enter(self, process: Process, register: PeerRegister) -> None:
        """A process was registered, and is kept known from now on."""
        owned = Ownership(process, register)
        self._owned[process.name] = owned
        owned.task = self._node.spawn(self._tell_memory(owned))

    def leave(self, name: Name) -> None:
        """A process is not kept known any longer."""
        owned = self._owned.pop(name)
        if owned.task is not None:
            owned.task.cancel()
        for waiting in owned.dirty.values():
            if not waiting.done():
                waiting.set_result(None)

    async def changed(self, name: Name, region: str) -> Refused | None:
        """A region of a process came, went or is another: returns once that is stored, or cannot be now; a refusal
        when it will not be."""
        owned = self._owned.get(name)
        if owned is None:
            return None
        waiting = owned.dirty.get(region)
        if waiting is None:
            waiting = owned.dirty[region] = asyncio.get_running_loop().create_future()
        owned.more.set()
        return await asyncio.shield(waiting) if self._node.bus.up else None

    async def _tell_memory(self, owned: Ownership) -> None:
        while True:
            await owned.more.wait()
            names = list(owned.dirty)[:AT_ONCE]
            if not names:
                owned.more.clear()
                continue
            told = await asyncio.gather(*[self._tell_region(owned, name) for name in names])
            if not all(told):
                await asyncio.sleep(AGAIN_S)

    async def _tell_region(self, owned: Ownership, region: str) -> bool:
        """Whether the control plane answered, and knows the process."""
        waiting = owned.dirty.pop(region)
        refused: Refused | None = None
        try:
            answer = await self._say_region(owned, region)
            if not isinstance(answer, Refused):
                return True
            if answer.code == "not_found":  # It was not heard of for too long. The heartbeat registers it again.
                self._put_off(owned, region)
                self._beat_now.set()
                return False
            refused = answer
            if answer.code == "not_yours":
                self._on_lost(owned.process.name, answer.reason)
            return True
        except BusError as error:
            _log.warning("cannot tell of memory", alias=owned.process.name.alias, region=region, reason=str(error))
            self._put_off(owned, region)
            return False
        finally:
            if not waiting.done():
                waiting.set_result(refused)

    def _put_off(self, owned: Ownership, region: str) -> None:
        if region not in owned.dirty:
            owned.dirty[region] = asyncio.get_running_loop().create_future()

    async def _say_region(self, owned: Ownership, region: str) -> object:
        name = owned.process.name
        put = memory_of(owned.process, region)
        if put is not None:
            answer = await self._node.bus.ask(peers.MEMORY_PUT, put)
            if not isinstance(answer, Refused):
                owned.epochs[region] = put.epoch
            return answer
        epoch = owned.epochs.get(region)
        if epoch is None:  # It came and went before it was told.
            return None
        drop = MemoryDrop(scope=name.scope, alias=name.alias, instance=owned.process.instance, name=region, epoch=epoch)
        answer_to_drop = await self._node.bus.ask(peers.MEMORY_DROP, drop)
        owned.epochs.pop(region, None)
        return answer_to_drop

    async def withdraw(self, register: PeerRegister) -> None:
        """Takes a registration back that was not answered, and of which nobody knows whether it is stored, or will be.

        It is asked for once more, so that it is before its end and not behind it.
        """
        try:
            peer = await within(peers.TTL_S, lambda: self._node.bus.ask(peers.REGISTER, register))
        except BusError as error:
            _log.warning("cannot take a registration back", alias=register.alias, reason=str(error))
            return
        if not isinstance(peer, Refused):
            await self.forget(Name(peer.scope, peer.alias), register.instance)

    async def forget(self, name: Name, instance: str) -> None:
        """Unregisters a process that has ended. While that cannot be told it is tried again, until the control plane
        has forgotten it by itself."""
        unregister = PeerUnregister(scope=name.scope, alias=name.alias, instance=instance)
        deadline_s = asyncio.get_running_loop().time() + peers.TTL_S
        while asyncio.get_running_loop().time() < deadline_s:
            try:
                answer = await self._node.bus.ask(peers.UNREGISTER, unregister)
            except BusError as error:
                _log.warning("cannot unregister a peer", alias=name.alias, reason=str(error))
            else:
                if not isinstance(answer, Refused) or answer.code == "not_yours":
                    return
                _log.warning("a peer is not unregistered", alias=name.alias, reason=answer.reason)
            await asyncio.sleep(AGAIN_S)

    # --- all of them -------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Does not wait for the time of the next heartbeat."""
        self._beat_now.set()

    async def beat_forever(self) -> None:
        """Lets the control plane hear of all processes, and registers again those it has lost."""
        while True:
            pause_s = self._heartbeat_s
            try:
                await self._beat_once()
            except BusError as error:
                _log.warning("cannot send a heartbeat", reason=str(error))
                pause_s = min(AGAIN_S, pause_s)
            try:
                async with asyncio.timeout(pause_s):
                    await self._beat_now.wait()
                await asyncio.sleep(min(0.1, pause_s))  # However often it is asked for.
            except TimeoutError:
                pass
            self._beat_now.clear()

    async def _beat_once(self) -> None:
        beats = self._node.desk.beats()
        for start in range(0, len(beats), BEATS_MAX):
            heard = await self._node.bus.ask(peers.HEARTBEAT, PeerHeartbeat(peers=beats[start : start + BEATS_MAX]))
            if isinstance(heard, Refused):
                _log.warning("a heartbeat was refused", reason=heard.reason, field=heard.field)
                continue
            for beat in heard.missing:
                await self._again(beat)

    async def _again(self, beat: PeerBeat) -> None:
        owned = self._owned.get(Name(beat.scope, beat.alias))
        if owned is None or owned.process.instance != beat.instance:
            return
        answer = await self._node.bus.ask(peers.REGISTER, owned.register)
        if self._owned.get(owned.process.name) is not owned:
            return
        if isinstance(answer, Refused):
            _log.warning("a peer is not registered again", alias=beat.alias, reason=answer.reason)
            if answer.code == "alias_taken":
                self._on_lost(owned.process.name, answer.reason)
            return
        _log.info("registered a peer again", scope=beat.scope, alias=beat.alias)
        owned.epochs.clear()
        for region in owned.process.offers:
            self._put_off(owned, region)
        owned.more.set()


async def within(seconds: float, asking: Callable[[], Awaitable[T]]) -> T:
    """The answer to what may be asked again, until there is one.

    Raises:
        BusError: there was none in that time; the last reason.
    """
    deadline_s = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await asking()
        except BusError:
            if asyncio.get_running_loop().time() >= deadline_s:
                raise
        await asyncio.sleep(0.2)


def no_answer(error: BusError) -> Refused:
    """What a process hears when the control plane cannot be asked."""
    reason = f"the control plane does not answer: {error}"
    return Refused(code="unavailable", reason=reason, status=503, retry="later")
