"""A node in the hands of a test: on the bus it is a node like any other, with direct delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, serve
from computemesh.contracts.nodes import Discover, NodeAnnouncement, NodeHeartbeat, RunningWork
from computemesh.contracts.work import Assignment, Delivery, Stopped, WorkCompleted, WorkStop
from computemesh.ids import new_id
from computemesh.tasks import end_all

BEAT_S: Final = 0.3

Run = Callable[[Assignment], Awaitable[Any]]
"""Gives the result of an attempt."""


class DirectNode:
    """A node that takes whatever it is given, and remembers all of it. Of an item with replicas it takes one.

    Args:
        bus: connected as a node.
        run: does the work by itself; left out, the test says with :meth:`complete` when an attempt is done.
    """

    def __init__(
        self, bus: Bus, node_id: str, *, work_types: tuple[str, ...] = (), slots: int = 4, run: Run | None = None
    ) -> None:
        self.node_id: Final = node_id
        self.session = new_id("s")
        self.answers = asyncio.Event()
        """While it is not set, deliveries are taken and not answered."""
        self.answers.set()
        self.given: list[Assignment] = []
        """Every assignment that arrived, in order."""
        self.stops: list[WorkStop] = []
        """Every stop that arrived, in order."""
        self.running: dict[tuple[str, int], Assignment] = {}
        self._bus = bus
        self._work_types = work_types
        self._slots = slots
        self._run = run
        self._beating: asyncio.Task[None] | None = None
        self._known: set[tuple[str, int]] = set()
        self._attempts: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def join(self) -> None:
        """Listens, registers, and sends heartbeats from now on.

        Raises:
            AssertionError: the registry refuses it.
            BusError: no registry answers.
        """
        micro = MicroService(self._bus, name=self.node_id, description="a node of a test", metadata={})
        deliver = serve(work.DELIVER, self._on_deliver, target=self.node_id)
        await micro.start([deliver, serve(work.STOP, self._on_stop, target=self.node_id)])
        await self._bus.subscribe(nodes.DISCOVER, self._on_discover)
        await self._bus.flush()
        answer = await self._bus.ask(nodes.REGISTER, self._announcement())
        assert not isinstance(answer, Refused), answer
        self._beating = asyncio.create_task(self._beat_forever())

    async def leave(self) -> None:
        """Falls silent, as a machine that lost its power."""
        self.answers.set()
        await end_all(task for task in (self._beating, *self._attempts.values()) if task is not None)

    async def restart(self) -> None:
        """A new life, which knows nothing of what ran in the old one."""
        await end_all(self._attempts.values())
        self.running.clear()
        self._known.clear()
        self.session = new_id("s")
        await self._bus.publish(nodes.ANNOUNCE, self._announcement())
        await self._beat()

    async def complete(self, asked: Assignment, result: Any = None) -> None:
        """Reports an attempt as done and returns once that is stored, however long the bus is away."""
        done = WorkCompleted(
            work_id=asked.work_id, attempt=asked.attempt, node_id=self.node_id, result=result, replica=asked.replica
        )
        while True:
            with contextlib.suppress(BusError):
                message_id = f"{asked.work_id}.{asked.attempt}.{asked.replica}"
                await self._bus.store(work.COMPLETED, done, message_id=message_id, timeout_s=1)
                break
            await asyncio.sleep(0.1)
        self.running.pop((asked.work_id, asked.attempt), None)

    def attempts(self, work_id: str) -> list[int]:
        """The attempts at an item that arrived here, repetitions included."""
        return [asked.attempt for asked in self.given if asked.work_id == work_id]

    # --- what it hears -------------------------------------------------------------------------------------------

    async def _on_deliver(self, asked: Assignment) -> Delivery | Refused:
        key = (asked.work_id, asked.attempt)
        self.given.append(asked)
        if key not in self._known:
            self._known.add(key)
            self.running[key] = asked
            if self._run is not None:
                self._attempts[key] = asyncio.create_task(self._attempt(asked, self._run))
        await self.answers.wait()
        return Delivery(accepted=True, session=self.session)

    async def _on_stop(self, stop: WorkStop) -> Stopped | Refused:
        self.stops.append(stop)
        if task := self._attempts.get((stop.work_id, stop.attempt)):
            task.cancel()
        return Stopped(was_running=self.running.pop((stop.work_id, stop.attempt), None) is not None)

    async def _on_discover(self, ask: Discover) -> None:
        if not ask.node_ids or self.node_id in ask.node_ids:
            await self._bus.publish(nodes.ANNOUNCE, self._announcement())

    async def _attempt(self, asked: Assignment, run: Run) -> None:
        try:
            await self.complete(asked, await run(asked))
        finally:
            del self._attempts[asked.work_id, asked.attempt]

    # --- what it says --------------------------------------------------------------------------------------------

    def _announcement(self) -> NodeAnnouncement:
        return NodeAnnouncement(
            node_id=self.node_id,
            session=self.session,
            delivery="direct",
            work_types=list(self._work_types),
            slots=self._slots,
        )

    async def _beat_forever(self) -> None:
        while True:
            with contextlib.suppress(BusError):
                await self._beat()
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        running = [
            RunningWork(work_id=work_id, attempt=attempt, replica=asked.replica)
            for (work_id, attempt), asked in self.running.items()
        ]
        beat = NodeHeartbeat(node_id=self.node_id, session=self.session, running=running)
        await self._bus.publish(nodes.HEARTBEAT, beat)
