"""The shell around the desk: takes what processes and the control plane say, and does what follows from it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from computemesh import log
from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import peers
from computemesh.contracts.base import AnyBound, Refused, serve
from computemesh.contracts.peers import (
    MemoryList,
    PeerChanged,
    PeerGet,
    PeerRegister,
    PeersList,
    TopologyGet,
    TopologyPut,
    Transfer,
)
from computemesh.edge import Extra
from computemesh.ids import new_id
from computemesh.lifecycle import Spawn
from computemesh.peer.frames import close_fds
from computemesh.peer.signals import (
    PROTOCOL,
    Accept,
    Aliases,
    Answer,
    Call,
    Desired,
    Done,
    DropRegion,
    Ended,
    GetMemory,
    GetPeer,
    Hello,
    HostedTransfer,
    HostedTransferred,
    ListPeers,
    Lost,
    MemoryFacts,
    PeerFacts,
    PutEpochs,
    PutRegion,
    Question,
    SetTopology,
    TopologyFacts,
    Welcome,
)
from computemesh_services.peer_agent.calls import Calls
from computemesh_services.peer_agent.config import PeerAgentConfig
from computemesh_services.peer_agent.descriptors import EPOCHS_BYTES_MAX, allow_descriptors, size_of
from computemesh_services.peer_agent.desk import (
    CloseFar,
    Desk,
    Name,
    Process,
    view,
)
from computemesh_services.peer_agent.door import Door, Line
from computemesh_services.peer_agent.hosted import Hosted, Hosts
from computemesh_services.peer_agent.measures import LINKS, PROCESSES, REFUSED, REGIONS, RUNNING, answer, count
from computemesh_services.peer_agent.orders import Orders
from computemesh_services.peer_agent.plane import Plane, within

HELLO_S: Final = 10.0
"""For a process to say who it is."""
REGISTER_S: Final = 20.0
"""How long the control plane is waited for when a process says hello."""
CLOSE_S: Final = 0.5
"""How long peers on other nodes are told of an end before the control plane forgets the process."""
BUSY_MAX: Final = 256
"""Questions of one process in hand."""
TICK_S: Final = 1.0

_log = log.get("service")


class PeerAgentService:
    """Speaks for the processes of this node, and with them."""

    def __init__(self, bus: Bus, config: PeerAgentConfig, path: Path) -> None:
        self._bus = bus
        self._config = config
        self._node_id = config.node_id
        self._desk = Desk()
        self._door = Door(path, config.peer_processes_max, self)
        self._hosts = Hosts(path, config.data_host())
        self._plane = Plane(bus, self._desk, self._on_lost, peers.HEARTBEAT_S)
        self._lines: dict[Name, Line] = {}
        self._leaving: dict[Name, asyncio.Task[None]] = {}
        """Processes that have ended, and that the control plane may not have forgotten yet."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._defects: asyncio.Queue[BaseException] = asyncio.Queue()
        self._orders = Orders(bus, self._desk, self._lines, config.node_id, config.peer_transfers_max)
        self._calls = Calls(bus, self._desk, self._lines, config.node_id, self._task)
        self._draining = False

    # --- the life of the service -------------------------------------------------------------------------------------

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(peers.ANSWER, self._calls.on_call, target=self._node_id),
            serve(peers.TRANSFER, self._orders.on_transfer, target=self._node_id),
        ]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        allow_descriptors()
        await self._bus.subscribe(peers.CHANGED, self.on_changed)
        self._door.open()
        spawn(self._plane.beat_forever())
        spawn(self._raise_defects())
        spawn(self._orders.tell_forever())
        spawn(self._tick())
        spawn(self._catch_up())
        _log.info("listening", socket=str(self._door.path), node_id=self._node_id)

    async def drain(self) -> None:
        """Transfers that run may end; processes look for the next life of the peer-agent, and stay who they are."""
        self._draining = True
        self._door.close()
        await self._orders.drain(0.8 * self._config.drain_timeout_s)
        hosted = [line.hosted for line in self._door.lines if line.hosted is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1 * self._config.drain_timeout_s):
                await asyncio.gather(*[self._hosts.leave(one) for one in hosted])
        for line in list(self._door.lines):
            line.end("")
        for task in list(self._tasks):
            task.cancel()
        self._hosts.end()

    def health(self) -> Mapping[str, Any]:
        return {
            "node_id": self._node_id,
            "socket": str(self._door.path),
            "peers": len(self._desk),
            "regions": self._desk.regions(),
            "links": self._desk.links(),
            "transfers": self._orders.running,
        }

    def unready(self) -> str:
        return ""

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defects.put_nowait(error)

    async def _raise_defects(self) -> None:
        raise await self._defects.get()

    async def _tick(self) -> None:
        """What is to be done from time to time."""
        while True:
            await asyncio.sleep(TICK_S)
            self._orders.look()
            for line in list(self._door.lines):
                if not line.hello and time.monotonic() - line.since > HELLO_S:
                    line.end(f"said no hello within {HELLO_S:g} s")
            self._measure()

    def _measure(self) -> None:
        PROCESSES.set(len(self._desk))
        REGIONS.set(self._desk.regions())
        LINKS.set(self._desk.links())
        RUNNING.set(self._orders.running)

    async def _catch_up(self) -> None:
        """After the bus was away: who is known still, and what is desired now."""
        while True:
            await self._bus.interrupted.wait()
            await self._bus.connected.wait()
            self._plane.beat()
            for process in self._desk:
                self._task(self._refresh(process.name))

    # --- what comes in over the socket -------------------------------------------------------------------------------

    def heard(self, line: Line, number: int, ask: Question | Ended, fds: tuple[int, ...]) -> None:
        """A process asks or tells something. The descriptors are ours from now on."""
        if isinstance(ask, Hello) == line.hello:
            close_fds(fds)
            reason = "hello was said already" if line.hello else "the first question is hello"
            answer(line, number, ask, Refused(code="bad_message", reason=reason, field="ask.kind"))
            return
        if isinstance(ask, Hello):
            line.hello = True
            self._task(self._hello(line, number, ask))
            return
        name = line.name
        if name is None or (self._lines.get(name) is not line and line.hosted is None):
            close_fds(fds)
            reason = (
                "the process is not welcome yet" if name is None else "the process speaks over another connection now"
            )
            answer(line, number, ask, Refused(code="bad_message", reason=reason, field="ask.kind"))
            return
        if isinstance(ask, Ended):
            self._orders.told(name, ask.outcome)
            return
        if line.busy >= BUSY_MAX:
            close_fds(fds)
            reason = f"{BUSY_MAX} questions of this process are in hand"
            refused = Refused(code="too_many_requests", reason=reason, status=429, retry="later")
            answer(line, number, ask, refused)
            return
        if line.hosted is not None:
            self._task(self._asked_by_hosted(line, line.hosted, name, number, ask, fds))
            return
        match ask:
            case PutRegion() | PutEpochs() | DropRegion():  # At once, so that they happen in their order.
                said = self._memory(name, ask, fds)
                if isinstance(said, Refused):
                    answer(line, number, ask, said)
                    return
                if isinstance(ask, PutEpochs):
                    answer(line, number, ask, Done())
                    return
                self._task(self._tell_memory(line, name, number, ask, said))
            case _:
                self._task(self._asked(line, name, number, ask))

    def late(self, line: Line, accept: Accept) -> None:
        """A process took a connection when nobody waited for that any more."""
        line.tell(Lost(peer=accept.peer, link=accept.body.link, reason="it was taken too late"))

    def refused(self, code: str) -> None:
        REFUSED.labels(code).inc()

    def ended(self, line: Line) -> None:
        """A connection has ended, and with it the process."""
        if line.hosted is not None:
            hosted, line.hosted = line.hosted, None
            assert line.name is not None, "it is hosted under a name"
            self._is_leaving(line.name, self._task(self._hosts.leave(hosted)))
            return
        name = line.name
        if name is None or self._lines.get(name) is not line or self._draining:
            return
        self._leave(name, "the process has ended")

    # --- processes come and go ---------------------------------------------------------------------------------------

    async def _hello(self, line: Line, number: int, hello: Hello) -> None:
        said = await (self._host(line, hello) if hello.hosted else self._welcome(line, hello))
        answer(line, number, hello, said)
        if isinstance(said, Refused):
            line.end("")
        elif line.name is not None and line.hosted is None:
            _log.info("welcome", scope=said.scope, alias=said.alias, pid=line.pid)
            await self._refresh(line.name)

    async def _welcome(self, line: Line, hello: Hello) -> Welcome | Refused:
        if hello.protocol != PROTOCOL:
            reason = f"this peer-agent speaks protocol {PROTOCOL}, not {hello.protocol}"
            return Refused(code="bad_message", reason=reason, field="ask.protocol")
        instance = hello.instance or new_id("i")
        if hello.alias is not None:
            name = Name(hello.scope, hello.alias)
            await self._gone(name)
            if (there := self._desk.get(name)) is not None:
                if there.instance != instance:
                    reason = f"{hello.alias!r} is another process of this node"
                    return Refused(code="alias_taken", reason=reason, field="ask.alias", status=409)
                self._taken_over(name)
        register = PeerRegister(
            scope=hello.scope,
            alias=hello.alias,
            name_prefix=hello.name_prefix,
            instance=instance,
            node_id=self._node_id,
            device=hello.device,
            resource=hello.resource,
        )
        try:
            peer = await within(REGISTER_S, lambda: self._bus.ask(peers.REGISTER, register))
        except BusError as error:
            reason = f"the control plane does not answer: {error}"
            return Refused(code="unavailable", reason=reason, status=503, retry="later")
        if isinstance(peer, Refused):
            return replace(peer, field=f"ask.{peer.field}") if peer.field else peer
        name = Name(peer.scope, peer.alias)
        if not line.open or self._draining or self._desk.get(name) is not None:
            if self._desk.get(name) is None:
                self._forget(name, instance)
            return Refused(code="unavailable", reason="the process has ended", status=503, retry="later")
        process = Process(name=name, instance=instance, peer=peer, pid=line.pid)
        self._desk.enter(process, hello.links)
        self._lines[name] = line
        line.name = name
        self._plane.enter(process, replace(register, alias=peer.alias))
        return Welcome(
            alias=peer.alias,
            scope=peer.scope,
            instance=instance,
            node_id=self._node_id,
            bus=self._bus.where.shown,
            peer=peer,
        )

    async def _host(self, line: Line, hello: Hello) -> Welcome | Refused:
        """A peer is run for the process, which comes in by the door as any other."""
        if hello.alias is not None:
            await self._gone(Name(hello.scope, hello.alias))
        hosted = await self._hosts.enter(hello)
        if isinstance(hosted, Refused):
            return hosted
        if not line.open or self._draining:
            await self._hosts.leave(hosted)
            return Refused(code="unavailable", reason="the process has ended", status=503, retry="later")
        line.hosted = hosted
        line.name = Name(hosted.welcome.scope, hosted.welcome.alias)
        _log.info("hosted", scope=line.name.scope, alias=line.name.alias, pid=line.pid)
        return hosted.welcome

    def _taken_over(self, name: Name) -> None:
        """The process is here a second time; its first connection is a leftover."""
        line = self._lines.pop(name)
        self._plane.leave(name)
        self._calls.do(self._desk.forget(name))
        line.end("")

    def _leave(self, name: Name, reason: str) -> None:
        """A process has ended: those that it was connected to hear of it, and the control plane forgets it."""
        _log.info("gone", scope=name.scope, alias=name.alias, reason=reason)
        process = self._desk.get(name)
        assert process is not None, f"{name} is not here"
        self._lines.pop(name, None)
        self._plane.leave(name)
        effects = self._desk.leave(name, f"{name.alias}: {reason}")
        far = [effect for effect in effects if isinstance(effect, CloseFar)]
        self._calls.do([effect for effect in effects if not isinstance(effect, CloseFar)])
        self._orders.process_ended(name, f"{name.alias}: {reason}")
        self._forget(name, process.instance, far)

    def _forget(self, name: Name, instance: str, far: Iterable[CloseFar] = ()) -> None:
        self._is_leaving(name, self._task(self._say_gone(name, instance, far)))

    def _is_leaving(self, name: Name, leaving: asyncio.Task[None]) -> None:
        self._leaving[name] = leaving

        def gone(_: asyncio.Task[None]) -> None:
            if self._leaving.get(name) is leaving:
                del self._leaving[name]

        leaving.add_done_callback(gone)

    async def _gone(self, name: Name) -> None:
        """Waits until a process that has ended is forgotten by all, so that its alias is free."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REGISTER_S):
                while (leaving := self._leaving.get(name)) is not None:
                    await asyncio.wait({leaving})

    async def _say_gone(self, name: Name, instance: str, far: Iterable[CloseFar]) -> None:
        closing = [self._task(self._calls.close_far(name, instance, effect)) for effect in far]
        if closing:  # While the control plane knows who says it.
            await asyncio.wait(closing, timeout=CLOSE_S)
        await self._plane.forget(name, instance)

    def _on_lost(self, name: Name, reason: str) -> None:
        """The control plane says that an alias is another's: the process has to find that out itself."""
        line = self._lines.get(name)
        if line is not None:
            _log.warning("an alias is another's now", scope=name.scope, alias=name.alias, reason=reason)
            line.end("its alias is another's now")

    # --- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, name: Name, ask: PutRegion | PutEpochs | DropRegion, fds: tuple[int, ...]) -> Done | Refused:
        match ask:
            case PutEpochs():
                size = size_of(fds[0])
                if not 0 < size <= EPOCHS_BYTES_MAX:
                    close_fds(fds)
                    reason = f"a page of epochs is memory of 1 to {EPOCHS_BYTES_MAX} bytes"
                    return Refused(code="bad_message", reason=reason, field="ask.fds")
                self._calls.do(self._desk.put_epochs(name, fds[0]))
                return Done()
            case PutRegion():
                fd = fds[0] if fds else -1
                effects = self._desk.put(name, ask, fd, size_of(fd) if fds else 0)
                if isinstance(effects, Refused):
                    close_fds(fds)
                    return effects
                self._calls.do(effects)
                return Done()
            case DropRegion():
                found, effects = self._desk.drop(name, ask.name, ask.epoch)
                self._calls.do(effects)
                return Done(found=found)

    async def _tell_memory(self, line: Line, name: Name, number: int, ask: PutRegion | DropRegion, said: Done) -> None:
        """The process hears that it is done when others can see it, or as soon as it is clear that they can't now."""
        line.busy += 1
        refused = await self._plane.changed(name, ask.name) if said.found else None
        line.busy -= 1
        if refused is not None and isinstance(ask, PutRegion) and self._lines.get(name) is line:
            self._calls.do(self._desk.drop(name, ask.name, ask.epoch)[1])
        answer(line, number, ask, refused or said)

    # --- questions ---------------------------------------------------------------------------------------------------

    async def _asked(self, line: Line, name: Name, number: int, ask: Question) -> None:
        if self._lines.get(name) is not line:  # It has ended since.
            return
        line.busy += 1
        try:
            if isinstance(ask, Call):
                await self._calls.call(line, name, number, ask)
            else:
                answer(line, number, ask, await self._found(name, ask))
        except BusError as error:
            reason = f"the control plane does not answer: {error}"
            answer(line, number, ask, Refused(code="unavailable", reason=reason, status=503, retry="later"))
        finally:
            line.busy -= 1

    async def _asked_by_hosted(
        self, line: Line, hosted: Hosted, name: Name, number: int, ask: Question, fds: tuple[int, ...]
    ) -> None:
        line.busy += 1
        try:
            said: Answer | Refused
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
                    said = await self._move(hosted, name, ask.transfer)
                case PutEpochs() | Call():
                    close_fds(fds)
                    reason = "the peer-agent does that for a hosted process"
                    said = Refused(code="bad_message", reason=reason, field="ask.kind")
                case _:
                    said = await self._found(name, ask)
        except BusError as error:
            reason = f"the control plane does not answer: {error}"
            said = Refused(code="unavailable", reason=reason, status=503, retry="later")
        finally:
            line.busy -= 1
        answer(line, number, ask, said)

    async def _move(self, hosted: Hosted, name: Name, transfer: Transfer) -> HostedTransferred | Refused:
        if (transfer.scope, transfer.alias) != name:
            reason = f"this process is {name.alias!r} in scope {name.scope!r}"
            return Refused(code="bad_message", reason=reason, field="ask.transfer.alias")
        if (refused := self._desk.may_move(transfer)) is not None:
            return replace(refused, field=f"ask.transfer.{refused.field}")
        outcome = await self._hosts.run(lambda: hosted.move(transfer))
        count(outcome)
        return HostedTransferred(outcome=outcome)

    async def _found(self, name: Name, ask: Question) -> Answer | Refused:
        match ask:
            case ListPeers():
                return await self._aliases(name.scope)
            case GetPeer():
                here = self._desk.get(Name(name.scope, ask.alias))
                if here is not None:  # So that processes of one node find each other while the bus is away.
                    return PeerFacts(peer=view(here, time.time()))
                peer = await self._bus.ask(peers.GET, PeerGet(scope=name.scope, alias=ask.alias))
                if isinstance(peer, Refused):
                    return PeerFacts(peer=None) if peer.code == "not_found" else peer
                return PeerFacts(peer=peer)
            case GetMemory():
                kept = await self._bus.ask(peers.MEMORY_LIST, MemoryList(scope=name.scope, alias=ask.alias))
                return kept if isinstance(kept, Refused) else MemoryFacts(memories=kept.memories)
            case SetTopology():
                put = TopologyPut(
                    scope=name.scope,
                    alias=name.alias,
                    target_peers=ask.target_peers,
                    min_bw=ask.min_bw,
                    symmetric=ask.symmetric,
                )
                topology = await self._bus.ask(peers.TOPOLOGY_PUT, put)
                return topology if isinstance(topology, Refused) else TopologyFacts(topology=topology)
            case HostedTransfer():
                return Refused(code="not_hosted", reason="this process moves its bytes itself", field="ask.kind")
            case _:
                return Refused(code="bad_message", reason="this is not answered here", field="ask.kind")

    async def _aliases(self, scope: str) -> Aliases | Refused:
        found: list[str] = []
        after: str | None = None
        while True:
            page = await self._bus.ask(peers.LIST, PeersList(scope=scope, after=after))
            if isinstance(page, Refused):
                return page
            found += [peer.alias for peer in page.peers]
            if (after := page.next) is None:
                return Aliases(aliases=found)

    # --- what comes in over the bus ----------------------------------------------------------------------------------

    async def on_changed(self, changed: PeerChanged) -> None:
        name = Name(changed.scope, changed.alias)
        match changed.change:
            case "topology":
                if name in self._lines:
                    self._task(self._refresh(name))
            case "removed" | "expired":
                if name in self._lines:
                    self._plane.beat()
            case "added":
                for process in self._desk:
                    wanted = process.topology
                    if process.name.scope == name.scope and wanted is not None and name.alias in wanted.target_peers:
                        self._lines[process.name].tell(Desired(topology=wanted))
            case _:
                pass

    async def _refresh(self, name: Name) -> None:
        """Tells a process whom it is to be connected to, if that is news."""
        try:
            topology = await self._bus.ask(peers.TOPOLOGY_GET, TopologyGet(scope=name.scope, alias=name.alias))
        except BusError as error:
            _log.warning("cannot ask for the topology", alias=name.alias, reason=str(error))
            return
        process, line = self._desk.get(name), self._lines.get(name)
        if isinstance(topology, Refused) or process is None or line is None:
            return
        news = topology.target_peers if process.topology is None else topology != process.topology
        process.topology = topology
        if news:
            line.tell(Desired(topology=topology))
