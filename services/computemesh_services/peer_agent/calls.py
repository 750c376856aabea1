"""What peers say to each other: passed on to the control plane, or to a process of this node."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from computemesh.bus import BusError
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import (
    Close,
    Closed,
    Connect,
    Connected,
    PeerAnswered,
    PeerCall,
    PeerCalled,
    Resolve,
    Resolved,
)
from computemesh.peer.frames import close_fds
from computemesh.peer.signals import Accept, Accepted, Call, Called, Lost, RegionsResolved
from computemesh_services.peer_agent.descriptors import again, zero
from computemesh_services.peer_agent.desk import CloseFar, CloseFd, Effect, Name, TellLost, ZeroEpochs
from computemesh_services.peer_agent.line import Line
from computemesh_services.peer_agent.measures import answer
from computemesh_services.peer_agent.node import Node

ACCEPT_S: Final = 3.0
"""For a process to take a connection from another node; less than those who ask wait."""
ACCEPT_HERE_S: Final = 20.0
CALLS_AT_ONCE: Final = 1024
"""Calls from other nodes that are not answered yet. Each only waits."""
ACCEPTS_MAX: Final = 128
"""Of these, those that wait for one process: half of what is passed on to a node, so that one which is halted leaves
the others room."""
CALL_S: Final = 8.0


class Calls:
    """What peers say to each other."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._accepting = Counter[Name]()
        """How many connections from other nodes wait for a process to take them."""

    # --- what a process says to a peer -------------------------------------------------------------------------------

    async def call(self, line: Line, name: Name, number: int, ask: Call) -> None:
        """A process says something to a peer, and hears what that one says.

        Raises:
            BusError: the control plane does not answer.
        """
        if ask.peer == name.alias:
            reason = "a peer is not connected to itself"
            answer(line, number, ask, Refused(code="no_way", reason=reason, field="ask.peer", status=409))
            return
        match ask.body:
            case Connect():
                await self._connect(line, name, number, ask, ask.body)
            case Resolve() if Name(name.scope, ask.peer) in self._node.lines:
                self._resolve_here(line, name, number, ask, ask.body)
            case Resolve():
                answer(line, number, ask, await self._resolve_far(name, ask.peer, ask.body))
            case Close():
                found, effects = self._node.desk.close(name, ask.peer, ask.body.link, ask.body.reason)
                for effect in effects:
                    if isinstance(effect, CloseFar):
                        self._node.spawn(self.close_far(name, self._instance(name), effect))
                    else:
                        self.do([effect])
                here = Name(name.scope, ask.peer) in self._node.lines
                answer(line, number, ask, Called(body=Closed(found=found), same_host=here))

    def _instance(self, name: Name) -> str:
        process = self._node.desk.get(name)
        assert process is not None, "who asks is here"
        return process.instance

    async def _connect(self, line: Line, name: Name, number: int, ask: Call, body: Connect) -> None:
        if (refused := self._node.desk.opening(name, ask.peer, body.link)) is not None:
            answer(line, number, ask, _in_ask(refused))
            return
        peer = Name(name.scope, ask.peer)
        said: Connected | Refused | None = None
        if (here := self._node.lines.get(peer)) is None:
            said = await self._connect_far(name, ask.peer, body)
            if isinstance(said, Refused) and said.code == "unavailable":
                here = self._node.lines.get(peer)  # It has just come.
        if here is not None:
            said = await self._accept(here, peer, name.alias, self._node.id, body, near=True)
        assert said is not None, "it was asked here or over the bus"
        if self._node.lines.get(name) is not line:  # It ended meanwhile, and the peer was told so.
            return
        if isinstance(said, Refused):
            self._node.desk.not_opened(name, body.link)
            answer(line, number, ask, _in_ask(said))
            return
        answer(line, number, ask, Called(body=said, same_host=here is not None))
        self.do(self._node.desk.opened(name, body.link))

    async def _connect_far(self, name: Name, peer: str, body: Connect) -> Connected | Refused:
        instance = self._instance(name)
        call = PeerCall(scope=name.scope, alias=name.alias, instance=instance, peer=peer, body=body)
        try:
            said = await self._node.bus.ask(peers.CALL, call, timeout_s=CALL_S)
        except BusError as error:  # Whether the peer took it is not known.
            # One that has come here since refuses what comes by the bus, and is about to be asked without it.
            if Name(name.scope, peer) not in self._node.lines:
                effect = CloseFar(peer, body.link, "nobody waits for it any more")
                self._node.spawn(self.close_far(name, instance, effect))
            return Refused(code="unavailable", reason=f"no answer: {error}", status=503, retry="later")
        if isinstance(said, Refused):
            return said
        return said.body if isinstance(said.body, Connected) else _something_else()

    async def _accept(
        self, line: Line, name: Name, asker: str, node_id: str, body: Connect, *, near: bool
    ) -> Connected | Refused:
        """A process of this node is asked whether it takes a connection."""
        if (refused := self._node.desk.opening(name, asker, body.link)) is not None:
            return refused
        accept = Accept(peer=asker, node_id=node_id, same_host=near, body=body)
        timeout_s = ACCEPT_HERE_S if near else ACCEPT_S
        said = await line.ask(accept, timeout_s=timeout_s)
        if self._node.lines.get(name) is not line:
            return Refused(code="unavailable", reason=f"{name.alias} has ended", status=503, retry="later")
        if isinstance(said, Accepted) and said.body.link == body.link:
            self.do(self._node.desk.opened(name, body.link))
            return said.body
        self._node.desk.not_opened(name, body.link)
        if isinstance(said, Refused):
            return said
        what = f"did not answer within {timeout_s:g} s" if said is None else "answered something else"
        return Refused(code="unavailable", reason=f"{name.alias} {what}", status=503, retry="later")

    async def _resolve_far(self, name: Name, peer: str, body: Resolve) -> Called | Refused:
        call = PeerCall(scope=name.scope, alias=name.alias, instance=self._instance(name), peer=peer, body=body)
        said = await self._node.bus.ask(peers.CALL, call, timeout_s=CALL_S)
        if isinstance(said, Refused):
            return _in_ask(said)
        if not isinstance(said.body, Resolved):
            return _something_else()
        return Called(body=RegionsResolved(regions=said.body.regions))

    def _resolve_here(self, line: Line, name: Name, number: int, ask: Call, body: Resolve) -> None:
        found = self._node.desk.resolve(Name(name.scope, ask.peer), name.alias, body.link, body.names, same_host=True)
        if isinstance(found, Refused):
            answer(line, number, ask, found)
            return
        given: list[int] = []
        try:
            for fd, writable in found.fds:
                given.append(again(fd, writable=writable))
            called = Called(body=RegionsResolved(regions=found.regions, fds=found.names), same_host=True)
            answer(line, number, ask, called, given)
        except OSError as error:
            reason = f"the peer-agent cannot pass the memory on: {error.strerror}"
            answer(line, number, ask, Refused(code="unavailable", reason=reason, status=503, retry="later"))
        finally:
            close_fds(given)

    # --- what peers of other nodes say -------------------------------------------------------------------------------

    async def on_call(self, called: PeerCalled) -> PeerAnswered | Refused:
        name = Name(called.scope, called.peer)
        line = self._node.lines.get(name)
        if line is None:
            reason = f"there is no {called.peer!r} on this node"
            return Refused(code="not_found", reason=reason, field="peer", status=404)
        match called.body:
            case Connect() if called.node_id == self._node.id:
                # Whoever asked did not find it here a moment ago, and finds it now: they share their memory then.
                reason = f"{called.peer} has just come; ask again"
                return Refused(code="unavailable", reason=reason, field="peer", status=503, retry="later")
            case Connect() if self._accepting[name] >= ACCEPTS_MAX:
                reason = f"{ACCEPTS_MAX} connections wait for {called.peer} to take them"
                return Refused(code="unavailable", reason=reason, field="peer", status=503, retry="later")
            case Connect() as body:
                self._accepting[name] += 1
                try:
                    said = await self._accept(line, name, called.alias, called.node_id, body, near=False)
                finally:
                    self._accepting[name] -= 1
                    if not self._accepting[name]:
                        del self._accepting[name]
                return said if isinstance(said, Refused) else PeerAnswered(body=said)
            case Resolve() as body:
                found = self._node.desk.resolve(name, called.alias, body.link, body.names, same_host=False)
                return found if isinstance(found, Refused) else PeerAnswered(body=Resolved(regions=found.regions))
            case Close() as body:
                there, effects = self._node.desk.closed_by_peer(name, called.alias, body.link, body.reason)
                self.do(effects)
                return PeerAnswered(body=Closed(found=there))

    # --- what follows ------------------------------------------------------------------------------------------------

    def do(self, effects: Iterable[Effect]) -> None:
        """Does what follows from a decision of the desk."""
        for effect in effects:
            match effect:
                case TellLost():
                    if (line := self._node.lines.get(effect.to)) is not None:
                        line.tell(Lost(peer=effect.peer, link=effect.link, reason=effect.reason[:500]))
                case CloseFd():
                    os.close(effect.fd)
                case ZeroEpochs():
                    zero(effect.fd)
                case CloseFar():
                    raise AssertionError("said by who knows in whose name")

    async def close_far(self, name: Name, instance: str, effect: CloseFar) -> None:
        """Best effort: a peer whose node does not hear of it finds the connection broken."""
        body = Close(link=effect.link, reason=effect.reason[:500])
        call = PeerCall(scope=name.scope, alias=name.alias, instance=instance, peer=effect.peer, body=body)
        with contextlib.suppress(BusError):
            await self._node.bus.ask(peers.CALL, call)


def _something_else() -> Refused:
    return Refused(code="unavailable", reason="the peer's node answered something else", status=503)


def _in_ask(refused: Refused) -> Refused:
    """A refusal of a peer, or of the control plane, whose field is one of the question."""
    return replace(refused, field=f"ask.{refused.field}") if refused.field else refused
