"""Processes come and go: who is welcome under which alias, and who is to know when one has ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from computemesh import log
from computemesh.bus import BusError
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import PeerRegister
from computemesh.ids import new_id
from computemesh.peer.signals import PROTOCOL, Hello, Welcome
from computemesh_services.peer_agent.calls import Calls
from computemesh_services.peer_agent.desk import CloseFar, Name, Process
from computemesh_services.peer_agent.hosted import Hosts
from computemesh_services.peer_agent.line import Line, gone
from computemesh_services.peer_agent.node import Node
from computemesh_services.peer_agent.orders import Orders
from computemesh_services.peer_agent.plane import Plane, no_answer, within

REGISTER_S: Final = 20.0
"""How long the control plane is waited for when a process says hello."""
CLOSE_S: Final = 0.5
"""How long peers on other nodes are told of an end before the control plane forgets the process."""

_log = log.get("attendance")


class Attendance:
    """Who is here, from the hello to the end."""

    def __init__(self, node: Node, plane: Plane, calls: Calls, orders: Orders, hosts: Hosts) -> None:
        self._node = node
        self._plane = plane
        self._calls = calls
        self._orders = orders
        self._hosts = hosts
        self._leaving: dict[Name, asyncio.Task[None]] = {}
        """Processes that have ended, and that the control plane may not have forgotten yet."""
        self._closed = False

    def close(self) -> None:
        """Nobody else is taken, and who goes now has not ended: it looks for the next life of the peer-agent."""
        self._closed = True

    # --- they come ---------------------------------------------------------------------------------------------------

    async def welcome(self, line: Line, hello: Hello) -> Welcome | Refused:
        """Takes a process, under an alias that is its own."""
        if hello.protocol != PROTOCOL:
            reason = f"this peer-agent speaks protocol {PROTOCOL}, not {hello.protocol}"
            return Refused(code="bad_message", reason=reason, field="ask.protocol")
        until_s = asyncio.get_running_loop().time() + REGISTER_S
        if hello.alias is not None and not await self._gone(Name(hello.scope, hello.alias), until_s):
            reason = f"the control plane does not answer, and has to forget first who was {hello.alias!r} before"
            return Refused(code="unavailable", reason=reason, status=503, retry="later")
        return await (self._host(line, hello) if hello.hosted else self._enter(line, hello, until_s))

    async def _enter(self, line: Line, hello: Hello, until_s: float) -> Welcome | Refused:
        instance = hello.instance or new_id("i")
        if hello.alias is not None:
            name = Name(hello.scope, hello.alias)
            if (there := self._node.desk.get(name)) is not None:
                if there.instance != instance:
                    reason = f"{hello.alias!r} is another process of this node"
                    return Refused(code="alias_taken", reason=reason, field="ask.alias", status=409)
                self._take_over(name)
        register = PeerRegister(
            scope=hello.scope,
            alias=hello.alias,
            name_prefix=hello.name_prefix,
            instance=instance,
            node_id=self._node.id,
            device=hello.device,
            resource=hello.resource,
        )
        try:
            left_s = until_s - asyncio.get_running_loop().time()
            peer = await within(left_s, lambda: self._node.bus.ask(peers.REGISTER, register))
        except BusError as error:
            if hello.instance is None or not line.open:  # Nobody comes back who knows the instance.
                withdrawing = self._node.spawn(self._plane.withdraw(register))
                if hello.alias is not None:
                    self._is_leaving(Name(hello.scope, hello.alias), withdrawing)
            return no_answer(error)
        if isinstance(peer, Refused):
            return replace(peer, field=f"ask.{peer.field}") if peer.field else peer
        name = Name(peer.scope, peer.alias)
        if self._node.desk.get(name) is not None:
            return gone()
        if self._closed or not line.open:
            self._forget(name, instance)
            return gone()
        process = Process(name=name, instance=instance, peer=peer, pid=line.pid)
        self._node.desk.enter(process, hello.links)
        self._node.lines[name] = line
        line.name = name
        self._plane.enter(process, replace(register, alias=peer.alias))
        _log.info("welcome", scope=name.scope, alias=name.alias, pid=line.pid)
        return Welcome(
            alias=peer.alias,
            scope=peer.scope,
            instance=instance,
            node_id=self._node.id,
            bus=self._node.bus.where.shown,
            peer=peer,
        )

    async def _host(self, line: Line, hello: Hello) -> Welcome | Refused:
        """A peer is run for the process, which comes in by the door as any other."""
        hosted = await self._hosts.enter(hello)
        if isinstance(hosted, Refused):
            return hosted
        if self._closed or not line.open:
            await self._hosts.leave(hosted)
            return gone()
        line.hosted = hosted
        line.name = Name(hosted.welcome.scope, hosted.welcome.alias)
        _log.info("hosted", scope=line.name.scope, alias=line.name.alias, pid=line.pid)
        return hosted.welcome

    def _take_over(self, name: Name) -> None:
        """The process is here a second time; its first connection is a leftover."""
        line = self._node.lines.pop(name)
        self._plane.leave(name)
        self._calls.do(self._node.desk.forget(name))
        line.end("")

    async def _gone(self, name: Name, until_s: float) -> bool:
        """Waits until a process that has ended is forgotten by all, so that its alias is free."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                while (leaving := self._leaving.get(name)) is not None:
                    await asyncio.wait({leaving})
        return name not in self._leaving

    # --- they go -----------------------------------------------------------------------------------------------------

    def ended(self, line: Line) -> None:
        """A connection has ended, and with it the process."""
        name, hosted = line.name, line.hosted
        if name is None:
            return
        if hosted is not None:
            line.hosted = None
            self._is_leaving(name, self._node.spawn(self._hosts.leave(hosted)))
        elif self._node.lines.get(name) is line and not self._closed:
            self._leave(name, "the process has ended")

    def lost(self, name: Name, reason: str) -> None:
        """The control plane says that an alias is another's: the process has to find that out itself."""
        line = self._node.lines.get(name)
        if line is not None:
            _log.warning("an alias is another's now", scope=name.scope, alias=name.alias, reason=reason)
            line.end("its alias is another's now")

    async def end_hosted(self, lines: Iterable[Line], within_s: float) -> None:
        """Ends the peers that are run for processes. Who waits for a transfer hears that it has failed."""
        ending: list[asyncio.Task[None]] = []
        for line in lines:
            if line.hosted is not None:
                hosted, line.hosted = line.hosted, None
                ending.append(self._node.spawn(self._hosts.leave(hosted)))
        if ending:
            await asyncio.wait(ending, timeout=within_s)

    def _leave(self, name: Name, reason: str) -> None:
        """A process has ended: those that it was connected to hear of it, and the control plane forgets it."""
        _log.info("gone", scope=name.scope, alias=name.alias, reason=reason)
        process = self._node.desk.get(name)
        assert process is not None, f"{name} is not here"
        del self._node.lines[name]
        self._plane.leave(name)
        effects = self._node.desk.leave(name, f"{name.alias}: {reason}")
        far = [effect for effect in effects if isinstance(effect, CloseFar)]
        self._calls.do([effect for effect in effects if not isinstance(effect, CloseFar)])
        self._orders.process_ended(name, f"{name.alias}: {reason}")
        self._forget(name, process.instance, far)

    def _forget(self, name: Name, instance: str, far: Iterable[CloseFar] = ()) -> None:
        self._is_leaving(name, self._node.spawn(self._say_gone(name, instance, far)))

    def _is_leaving(self, name: Name, leaving: asyncio.Task[None]) -> None:
        self._leaving[name] = leaving

        def gone(_: asyncio.Task[None]) -> None:
            if self._leaving.get(name) is leaving:
                del self._leaving[name]

        leaving.add_done_callback(gone)

    async def _say_gone(self, name: Name, instance: str, far: Iterable[CloseFar]) -> None:
        closing = [self._node.spawn(self._calls.close_far(name, instance, effect)) for effect in far]
        if closing:  # While the control plane knows who says it.
            await asyncio.wait(closing, timeout=CLOSE_S)
        await self._plane.forget(name, instance)
