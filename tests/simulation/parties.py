"""The programs of a simulated mesh: the services themselves, and what stands for executors, plain nodes and people."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from computemesh.bus import Bus, BusError, MicroService, Where
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.contracts.work import (
    Assignment,
    WorkCompleted,
    WorkFailed,
    WorkItem,
    WorkRecord,
    WorkState,
)
from computemesh.executors import Task
from computemesh.executors.protocol import Broke, Done, Outcome, Ready
from computemesh.lifecycle import Service
from computemesh.models import Found
from computemesh.paths import Home
from computemesh.tasks import end_all
from computemesh_services.node_agent import service as agent
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_agent.service import NodeAgent
from computemesh_services.node_registry.config import RegistryConfig
from computemesh_services.node_registry.service import NodeRegistry
from computemesh_services.work_marshaller.config import MarshallerConfig
from computemesh_services.work_marshaller.service import WorkMarshaller
from tests.simulation.world import HERE

# pyright: reportPrivateUsage=false

URL: Final = "nats://server:4222"
RETRIES_MAX: Final = 2

Defect = Callable[[str, BaseException], None]


class Served:
    """A service, run as its process does, without its HTTP edge."""

    def __init__(self, name: str, role: Role, make: Callable[[Bus], Service], on_defect: Defect) -> None:
        self.name = name
        self.service: Any = None
        self.stop = asyncio.Event()
        self._role = role
        self._make = make
        self._on_defect = on_defect

    async def run(self) -> None:
        """Until it is told to stop, or fails."""
        bus = Bus(Where(url=URL, role=self._role, name=self.name), on_defect=self._on_handler)
        await bus.connect()
        service = self._make(bus)
        micro = MicroService(bus, name=self.name.rstrip("0123456789"), description="", metadata={})
        try:
            async with asyncio.TaskGroup() as group:
                background: list[asyncio.Task[None]] = []
                try:
                    await service.start(lambda coroutine: background.append(group.create_task(coroutine)), micro)
                    await micro.start([bound for bound in service.endpoints() if not bound.acting])
                    await bus.flush()
                    self.service = service
                    await self.stop.wait()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(20.0):
                            await micro.drain()
                            await service.drain()
                finally:
                    await end_all(background)
        except* BusError:
            pass  # Its supervisor starts it again.
        except* Exception as group_of:
            for error in group_of.exceptions:
                self._on_defect(self.name, error)
        await bus.close()

    def _on_handler(self, error: BaseException) -> None:
        if not isinstance(error, BusError):
            self._on_defect(self.name, error)


def a_marshaller(name: str, on_defect: Defect, *, waiting_max: int, blacklist_after: int) -> Served:
    config = MarshallerConfig(
        work_retry_max=RETRIES_MAX,
        work_retry_delay=0.2,
        work_waiting_max=waiting_max,
        work_blacklist_after=blacklist_after,
        work_blacklist_s=1.0,
    )
    return Served(name, Role.SERVICES, lambda bus: WorkMarshaller(bus, config, name), on_defect)


def a_registry(name: str, on_defect: Defect) -> Served:
    config = RegistryConfig(suspect_after_s=2.5, lost_after_s=4.5)
    return Served(name, Role.SERVICES, lambda bus: NodeRegistry(bus, config, name), on_defect)


def an_agent(name: str, on_defect: Defect, *, slots: int) -> Served:
    config = AgentConfig(node_id=name, machine_id=name, slots=slots, heartbeat_interval_s=1.0, finish_s=1.0)
    home = Home(Path("/nonexistent"))
    return Served(name, Role.NODE, lambda bus: NodeAgent(bus, config, home, lambda: "http://127.0.0.1:8091"), on_defect)


class Runner:
    """Stands for executor processes: takes the time, and ends the way, that the payload says."""

    def __init__(self, **_: object) -> None:
        self._closed = False

    async def probe(self, work_type: str) -> Ready | Broke:
        return Ready()

    async def run(self, task: Task, out_dir: Path, **_: object) -> Outcome:
        outcome = planned(task.payload, task.attempt)
        takes_s = task.payload["takes_s"]
        if takes_s > task.timeout_s:
            await asyncio.sleep(task.timeout_s)
            return Broke(code="timeout", reason="too slow")
        await asyncio.sleep(takes_s)
        if isinstance(outcome, Done):
            here = HERE.get()
            assert here is not None
            return Done(result={"plain": False, "node": here.name, "attempt": task.attempt})
        return outcome

    def warm(self) -> None:
        """There is nothing to warm."""

    async def close(self) -> None:
        self._closed = True


def planned(payload: dict[str, Any], attempt: int) -> Outcome:
    """What becomes of an attempt, whoever makes it."""
    if attempt <= payload["fails"]:
        return Broke(code="failed", fault=payload["fault"], reason=f"attempt {attempt} was to fail")
    return Done(result=attempt)


@contextmanager
def no_machine() -> Generator[None]:
    """Node agents find neither executors, models nor engines of this machine."""

    def available() -> dict[str, EntryPoint]:
        return {"inference": EntryPoint("inference", "nowhere:Inference", "computemesh.executors")}

    def found(_: str) -> Found:
        return Found({})

    with (
        patch.object(agent, "Runner", Runner),
        patch("computemesh_services.node_agent.service.registry.available", available),
        patch.object(agent, "find_models", found),
        patch("computemesh_services.node_agent.service.socket.gethostname", lambda: "machine"),
    ):
        yield


class PlainNode:
    """A program that subscribes, works and publishes, as somebody writes it in an afternoon."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self._rng = rng
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        bus = Bus(Where(url=URL, role=Role.NODE, name=self.name))
        await bus.connect()
        self._bus = bus
        await bus.subscribe(work.ASSIGNED, self._on_assigned)
        said = NodeAnnouncement(node_id=self.name, hostname=self.name, delivery="plain", slots=2)
        while True:
            with contextlib.suppress(BusError):
                await bus.publish(nodes.ANNOUNCE, said)
            await asyncio.sleep(2.0)

    async def _on_assigned(self, asked: Assignment) -> None:
        if asked.node_id == self.name:
            task = asyncio.create_task(self._attempt(asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _attempt(self, asked: Assignment) -> None:
        await asyncio.sleep(asked.payload["takes_s"])
        outcome = planned(asked.payload, asked.attempt)
        named = asked.attempt if self._rng.random() < 0.5 else None
        while True:
            try:
                if isinstance(outcome, Done):
                    done = WorkCompleted(
                        work_id=asked.work_id, result={"plain": True}, attempt=named, replica=asked.replica
                    )
                    await self._bus.store(work.COMPLETED, done)
                else:
                    broke = WorkFailed(
                        work_id=asked.work_id, error="planned", fault=outcome.fault, attempt=named,
                        replica=asked.replica,
                    )  # fmt: skip
                    await self._bus.store(work.FAILED, broke)
                return
            except BusError:
                await asyncio.sleep(0.5)


class Person:
    """Submits, asks, cancels, and remembers what it was told."""

    def __init__(
        self,
        name: str,
        plans: list[tuple[float, str, WorkItem]],
        *,
        on_cancelled: Callable[[WorkRecord], None],
        on_shown: Callable[[WorkRecord], None],
    ) -> None:
        self.name = name
        self.accepted: set[str] = set()
        """Ids of what was said to be stored."""
        self.left = len(plans)
        self._plans = plans
        self._on_cancelled = on_cancelled
        self._on_shown = on_shown

    async def run(self) -> None:
        bus = Bus(Where(url=URL, role=Role.CLIENT, name=self.name))
        await bus.connect()
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            for at_s, what, item in self._plans:
                if at_s > loop.time():
                    await asyncio.sleep(at_s - loop.time())
                group.create_task(self._do(bus, what, item))

    async def _do(self, bus: Bus, what: str, item: WorkItem) -> None:
        asking: dict[str, Callable[[Bus, WorkItem], Awaitable[bool]]] = {
            "submit": self._submit, "request": self._request, "cancel": self._cancel, "get": self._get,
        }  # fmt: skip
        while True:
            try:
                if await asking[what](bus, item):
                    break
            except BusError:
                pass
            await asyncio.sleep(0.7)
        self.left -= 1

    async def _submit(self, bus: Bus, item: WorkItem) -> bool:
        await bus.store(work.SUBMIT, item, timeout_s=2.0)
        self.accepted.add(item.work_id or "")
        return True

    async def _request(self, bus: Bus, item: WorkItem) -> bool:
        answer = await bus.ask(work.REQUEST, item, timeout_s=2.0)
        if isinstance(answer, Refused):
            return answer.retry == "never" or answer.code == "queue_full"
        self.accepted.add(answer.work_id)
        return True

    async def _cancel(self, bus: Bus, item: WorkItem) -> bool:
        answer = await bus.ask(work.CANCEL, work.WorkCancel(work_id=item.work_id or "none"), timeout_s=2.0)
        if isinstance(answer, WorkRecord):
            if answer.state is WorkState.CANCELLED:
                self._on_cancelled(answer)
            return True
        return answer.code in ("not_found", "already_final")

    async def _get(self, bus: Bus, item: WorkItem) -> bool:
        answer = await bus.ask(work.GET, work.WorkGet(work_id=item.work_id or "none"), timeout_s=2.0)
        if isinstance(answer, WorkRecord):
            self._on_shown(answer)
        return True
