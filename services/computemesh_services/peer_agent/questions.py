"""What a process of this node asks over its connection, and who answers it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

from msgspec.structs import replace

from computemesh.bus import BusError
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import MEMORY_KEYS_MAX, MemoryList, PeerGet, PeersList, TopologyPut, Transfer
from computemesh.peer.frames import close_fds
from computemesh.peer.signals import (
    Aliases,
    Answer,
    Call,
    Done,
    DropRegion,
    Ended,
    GetMemory,
    GetPeer,
    Hello,
    HostedTransfer,
    HostedTransferred,
    ListPeers,
    MemoryFacts,
    News,
    PeerFacts,
    PutEpochs,
    PutRegion,
    Question,
    SetTopology,
    TopologyFacts,
    Traffic,
)
from computemesh_services.peer_agent.attendance import Attendance
from computemesh_services.peer_agent.calls import Calls
from computemesh_services.peer_agent.descriptors import EPOCHS_BYTES_MAX, size_of
from computemesh_services.peer_agent.desires import Desires
from computemesh_services.peer_agent.desk import Name, view
from computemesh_services.peer_agent.hosted import Hosted, Hosts
from computemesh_services.peer_agent.line import Line, gone
from computemesh_services.peer_agent.measures import answer, count, count_traffic
from computemesh_services.peer_agent.node import Node
from computemesh_services.peer_agent.orders import Orders
from computemesh_services.peer_agent.plane import Plane, no_answer

IN_HAND_MAX: Final = {"memory": 2 * MEMORY_KEYS_MAX, "other": 256}
"""Questions of one process that are not answered yet. After the peer-agent was away, all memory is said at once."""


class Questions:
    """What processes ask."""

    def __init__(
        self,
        node: Node,
        plane: Plane,
        calls: Calls,
        orders: Orders,
        hosts: Hosts,
        attendance: Attendance,
        desires: Desires,
    ) -> None:
        self._node = node
        self._plane = plane
        self._calls = calls
        self._orders = orders
        self._hosts = hosts
        self._attendance = attendance
        self._desires = desires

    def heard(self, line: Line, number: int, ask: Question | News, fds: tuple[int, ...]) -> None:
        """A process asks or tells something. The descriptors are ours from now on."""
        name = line.name
        if isinstance(ask, Hello) and not line.hello:
            line.hello = True
            self._node.spawn(self._hello(line, number, ask))
        elif (refused := self._not_now(line, ask)) is not None:
            close_fds(fds)
            answer(line, number, ask, refused)
        elif name is None:
            raise AssertionError("only who is welcome asks anything now")
        elif isinstance(ask, Ended):
            self._orders.told(name, ask.outcome)
        elif isinstance(ask, Traffic):
            count_traffic(ask)
        elif line.hosted is not None:
            self._begin(line, ask, self._asked_by_hosted(line, line.hosted, name, number, ask, fds))
        elif isinstance(ask, (PutRegion, PutEpochs, DropRegion)):
            said = self._memory(name, ask, fds)  # At once, so that all happens in its order.
            if isinstance(said, Refused) or isinstance(ask, PutEpochs):
                answer(line, number, ask, said)
            else:
                self._begin(line, ask, self._tell_memory(line, name, number, ask, said))
        else:
            self._begin(line, ask, self._asked(line, name, number, ask))

    def _not_now(self, line: Line, ask: Question | News) -> Refused | None:
        """Why a process cannot ask this at all, or not now."""
        if isinstance(ask, Hello) or not line.hello:
            reason = "hello was said already" if line.hello else "the first question is hello"
        elif line.name is None:
            reason = "the process is not welcome yet"
        elif line.hosted is None and self._node.lines.get(line.name) is not line:
            reason = "the process speaks over another connection now"
        elif not isinstance(ask, News) and line.in_hand[_sort(ask)] >= (most := IN_HAND_MAX[_sort(ask)]):
            reason = f"{most} questions of this process are in hand"
            return Refused(code="too_many_requests", reason=reason, status=429, retry="later")
        else:
            return None
        return Refused(code="bad_message", reason=reason, field="ask.kind")

    def _begin(self, line: Line, ask: Question, work: Coroutine[Any, Any, None]) -> None:
        sort = _sort(ask)
        line.in_hand[sort] += 1

        def done(_: asyncio.Task[None]) -> None:
            line.in_hand[sort] -= 1

        self._node.spawn(work).add_done_callback(done)

    async def _hello(self, line: Line, number: int, hello: Hello) -> None:
        said = await self._attendance.welcome(line, hello)
        answer(line, number, hello, said)
        if isinstance(said, Refused):
            line.end("")
        elif line.hosted is None and line.name is not None:
            await self._desires.refresh(line.name)

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, name: Name, ask: PutRegion | PutEpochs | DropRegion, fds: tuple[int, ...]) -> Done | Refused:
        match ask:
            case PutEpochs():
                if not 0 < size_of(fds[0]) <= EPOCHS_BYTES_MAX:
                    close_fds(fds)
                    reason = f"a page of epochs is memory of 1 to {EPOCHS_BYTES_MAX} bytes"
                    return Refused(code="bad_message", reason=reason, field="ask.fds")
                self._calls.do(self._node.desk.put_epochs(name, fds[0]))
                return Done()
            case PutRegion():
                fd = fds[0] if fds else -1
                effects = self._node.desk.put(name, ask, fd, size_of(fd) if fds else 0)
                if isinstance(effects, Refused):
                    close_fds(fds)
                    return effects
                self._calls.do(effects)
                return Done()
            case DropRegion():
                found, effects = self._node.desk.drop(name, ask.name, ask.epoch)
                self._calls.do(effects)
                return Done(found=found)

    async def _tell_memory(self, line: Line, name: Name, number: int, ask: PutRegion | DropRegion, said: Done) -> None:
        """The process hears that it is done when others can see it, or as soon as it is clear that they can't now."""
        refused = await self._plane.changed(name, ask.name) if said.found else None
        if isinstance(ask, PutRegion):
            self._calls.do(self._node.desk.taken(name, ask) if refused is None else self._node.desk.refused(name, ask))
        answer(line, number, ask, refused or said)

    # --- of a process that moves its bytes itself --------------------------------------------------------------------

    async def _asked(self, line: Line, name: Name, number: int, ask: Question) -> None:
        if self._node.lines.get(name) is not line:  # It has ended since.
            return
        try:
            if isinstance(ask, Call):
                await self._calls.call(line, name, number, ask)
            else:
                answer(line, number, ask, await self._found(name, ask))
        except BusError as error:
            answer(line, number, ask, no_answer(error))

    # --- of a process that is hosted ---------------------------------------------------------------------------------

    async def _asked_by_hosted(
        self, line: Line, hosted: Hosted, name: Name, number: int, ask: Question, fds: tuple[int, ...]
    ) -> None:
        said: Answer | Refused
        try:
            match ask:
                case PutRegion():
                    async with line.turn:
                        said = await self._hosts.run(lambda: hosted.put(ask, fds))
                case DropRegion():
                    async with line.turn:
                        said = await self._hosts.run(lambda: hosted.drop(ask))
                case HostedTransfer():
                    async with line.turn:  # What was put before is there.
                        pass
                    said = await self._move(line, hosted, name, ask.transfer)
                case PutEpochs() | Call():
                    close_fds(fds)
                    reason = "the peer-agent does that for a hosted process"
                    said = Refused(code="bad_message", reason=reason, field="ask.kind")
                case _:
                    said = await self._found(name, ask)
        except BusError as error:
            said = no_answer(error)
        answer(line, number, ask, said)

    async def _move(self, line: Line, hosted: Hosted, name: Name, transfer: Transfer) -> HostedTransferred | Refused:
        if line.hosted is not hosted:  # It has ended since.
            return gone()
        if (transfer.scope, transfer.alias) != name:
            reason = f"this process is {name.alias!r} in scope {name.scope!r}"
            return Refused(code="bad_message", reason=reason, field="ask.transfer.alias")
        if (refused := self._node.desk.may_move(transfer)) is not None:
            return replace(refused, field=f"ask.transfer.{refused.field}")
        outcome = await hosted.move(transfer)
        count(outcome)
        return HostedTransferred(outcome=outcome)

    # --- of both -----------------------------------------------------------------------------------------------------

    async def _found(self, name: Name, ask: Question) -> Answer | Refused:
        match ask:
            case ListPeers():
                return await self._aliases(name.scope)
            case GetPeer():
                here = self._node.desk.get(Name(name.scope, ask.alias))
                if here is not None:  # So that processes of one node find each other while the bus is away.
                    return PeerFacts(peer=view(here, time.time()))
                peer = await self._node.bus.ask(peers.GET, PeerGet(scope=name.scope, alias=ask.alias))
                if isinstance(peer, Refused):
                    return PeerFacts(peer=None) if peer.code == "not_found" else peer
                return PeerFacts(peer=peer)
            case GetMemory():
                kept = await self._node.bus.ask(peers.MEMORY_LIST, MemoryList(scope=name.scope, alias=ask.alias))
                return kept if isinstance(kept, Refused) else MemoryFacts(memories=kept.memories)
            case SetTopology():
                put = TopologyPut(
                    scope=name.scope,
                    alias=name.alias,
                    target_peers=ask.target_peers,
                    min_bw=ask.min_bw,
                    symmetric=ask.symmetric,
                )
                topology = await self._node.bus.ask(peers.TOPOLOGY_PUT, put)
                return topology if isinstance(topology, Refused) else TopologyFacts(topology=topology)
            case HostedTransfer():
                return Refused(code="not_hosted", reason="this process moves its bytes itself", field="ask.kind")
            case _:
                return Refused(code="bad_message", reason="this is not answered here", field="ask.kind")

    async def _aliases(self, scope: str) -> Aliases | Refused:
        found: list[str] = []
        after = ""
        while True:
            page = await self._node.bus.ask(peers.LIST, PeersList(scope=scope, after=after))
            if isinstance(page, Refused):
                return page
            found += [peer.alias for peer in page.peers]
            if not (after := page.next):
                return Aliases(aliases=found)


def _sort(ask: Question) -> str:
    """Of which sort a question is, of those that are counted apart."""
    return "memory" if isinstance(ask, (PutRegion, PutEpochs, DropRegion)) else "other"
