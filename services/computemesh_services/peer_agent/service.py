"""The shell around the desk: what comes in by the door and over the bus goes to who answers it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from computemesh import log
from computemesh.bus import Bus, MicroService
from computemesh.contracts import peers
from computemesh.contracts.base import AnyBound, serve
from computemesh.contracts.peers import PeerChanged
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh.peer.signals import Accept, Lost, News, Question
from computemesh_services.peer_agent import measures
from computemesh_services.peer_agent.attendance import Attendance
from computemesh_services.peer_agent.calls import CALLS_AT_ONCE, Calls
from computemesh_services.peer_agent.config import PeerAgentConfig
from computemesh_services.peer_agent.descriptors import allow_descriptors
from computemesh_services.peer_agent.desires import Desires
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.door import Door
from computemesh_services.peer_agent.hosted import Hosts
from computemesh_services.peer_agent.line import Line
from computemesh_services.peer_agent.node import Node
from computemesh_services.peer_agent.orders import Orders
from computemesh_services.peer_agent.plane import Plane
from computemesh_services.peer_agent.questions import Questions

HELLO_S: Final = 10.0
"""For a process to say who it is."""
TICK_S: Final = 1.0

_log = log.get("service")


class PeerAgentService:
    """Speaks for the processes of this node, and with them."""

    def __init__(self, bus: Bus, config: PeerAgentConfig, path: Path) -> None:
        self._config = config
        self._tasks: set[asyncio.Task[Any]] = set()
        self._defects: asyncio.Queue[BaseException] = asyncio.Queue()
        self._node = node = Node(config.node_id, bus, self._task)
        self._door = Door(path, config.peer_processes_max, self)
        self._hosts = hosts = Hosts(path, config.data_host(), config.peer_processes_max)
        self._plane = plane = Plane(node, self._lost, peers.HEARTBEAT_S)
        self._orders = orders = Orders(node, config.peer_transfers_max)
        self._calls = calls = Calls(node)
        self._desires = desires = Desires(node)
        self._attendance = attendance = Attendance(node, plane, calls, orders, hosts)
        self._questions = Questions(node, plane, calls, orders, hosts, attendance, desires)

    # --- the life of the service -------------------------------------------------------------------------------------

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(peers.ANSWER, self._calls.on_call, target=self._node.id, at_once=CALLS_AT_ONCE),
            serve(peers.TRANSFER, self._orders.on_transfer, target=self._node.id, at_once=CALLS_AT_ONCE),
        ]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        allow_descriptors()
        await self._node.bus.subscribe(peers.CHANGED, self.on_changed)
        self._door.open()
        spawn(self._plane.beat_forever())
        spawn(self._raise_defects())
        spawn(self._orders.tell_forever())
        spawn(self._tick())
        spawn(self._catch_up())
        _log.info("listening", socket=str(self._door.path), node_id=self._node.id)

    async def drain(self) -> None:
        """Transfers that run may end; processes look for the next life of the peer-agent, and stay who they are."""
        self._attendance.close()
        self._door.close()
        await self._orders.drain(0.8 * self._config.drain_timeout_s)
        await self._attendance.end_hosted(self._door.lines, 0.1 * self._config.drain_timeout_s)
        for line in list(self._door.lines):
            line.end("")
        for task in list(self._tasks):
            task.cancel()
        self._hosts.end()

    def health(self) -> Mapping[str, Any]:
        return {
            "node_id": self._node.id,
            "socket": str(self._door.path),
            "peers": len(self._node.desk),
            "regions": self._node.desk.regions(),
            "links": self._node.desk.links(),
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
            measures.PROCESSES.set(len(self._node.desk))
            measures.REGIONS.set(self._node.desk.regions())
            measures.LINKS.set(self._node.desk.links())
            measures.RUNNING.set(self._orders.running)

    async def _catch_up(self) -> None:
        """After the bus was away: who is known still, and what is desired now."""
        while True:
            await self._node.bus.interrupted.wait()
            await self._node.bus.connected.wait()
            self._plane.beat()
            for process in self._node.desk:
                self._task(self._desires.refresh(process.name))

    # --- what comes in by the door -----------------------------------------------------------------------------------

    def heard(self, line: Line, number: int, ask: Question | News, fds: tuple[int, ...]) -> None:
        """A process asks or tells something. The descriptors are ours from now on."""
        self._questions.heard(line, number, ask, fds)

    def late(self, line: Line, accept: Accept) -> None:
        """A process took a connection when nobody waited for that any more."""
        line.tell(Lost(peer=accept.peer, link=accept.body.link, reason="it was taken too late"))

    def refused(self, code: str) -> None:
        """A frame of a process could not be read, or a process not be taken."""
        measures.refused(code)

    def ended(self, line: Line) -> None:
        """A connection has ended."""
        self._attendance.ended(line)

    def _lost(self, name: Name, reason: str) -> None:
        self._attendance.lost(name, reason)

    # --- what comes in over the bus ----------------------------------------------------------------------------------

    async def on_changed(self, changed: PeerChanged) -> None:
        name = Name(changed.scope, changed.alias)
        match changed.change:
            case "topology" if name in self._node.lines:
                self._task(self._desires.refresh(name))
            case "removed" | "expired" if name in self._node.lines:
                self._plane.beat()
            case "added":
                self._desires.came(name)
            case _:
                pass
