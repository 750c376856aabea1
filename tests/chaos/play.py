"""Plays a plan: submits, cancels and asks as people do, and does to the mesh what the plan says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import httpx
import nats
from nats.aio.client import Client

from computemesh.addresses import servers_of
from computemesh.bus import Bucket, BusError
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.work import Assignment, WorkItem, WorkList, WorkRecord
from computemesh.testing import DirectNode, RunningMesh, until
from computemesh.testing.cluster import is_whole, leader
from tests.chaos.history import History, slowest_take_over_s, violations
from tests.chaos.hostile import Hostile
from tests.chaos.plan import ACTING, LEADING, SERVERS, STANDBY, Deed, Plan, Step

# pyright: reportUnknownMemberType=false

PER_DEED: Final = 10
"""Items that are submitted at the moment when something is done to the mesh."""

ONE_IN: Final = 25
"""Of so many items somebody changes their mind about one."""

QUIET_S: Final = 45.0
"""Without any outcome for this long, nothing will come any more."""

SIGNALS: Final = {Deed.KILL: signal.SIGKILL, Deed.RESTART: signal.SIGTERM, Deed.STOP: signal.SIGSTOP}

EXECUTOR: Final = """
import time
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        time.sleep(0.02)
        return {"square": task.payload["n"] ** 2}
"""


def seeds(*, runs: int = 2) -> list[int]:
    """Those of the environment, or one that is always the same and random ones."""
    if named := os.environ.get("CHAOS_SEEDS"):
        return [int(seed) for seed in named.split(",")]
    # The processes of one run, and those that try again what failed, must choose the same.
    chance = random.Random(os.environ.get("CHAOS_CHANCE") or os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    return [1, *(chance.randrange(1_000_000) for _ in range(int(os.environ.get("CHAOS_RUNS", runs)) - 1))]


@contextlib.asynccontextmanager
async def outsider(mesh: RunningMesh, role: Role) -> AsyncGenerator[Client]:
    """A program that speaks plain NATS and comes back as soon as it can."""

    async def ignore(_: Exception) -> None:
        """The server is killed on purpose."""

    nc = await nats.connect(
        servers_of(mesh.url(role)), max_reconnect_attempts=-1, reconnect_time_wait=0.05, error_cb=ignore
    )
    try:
        yield nc
    finally:
        await nc.close()


class Run:
    """One run of one plan."""

    def __init__(self, mesh: RunningMesh, plan: Plan, nc: Client, *, at_once: int) -> None:
        self.history = History()
        self.items: Final = at_once + PER_DEED * len(plan.steps)
        self._at_once = at_once
        self._mesh = mesh
        self._plan = plan
        self._nc = nc
        self._waking: list[asyncio.Task[None]] = []

    async def go(self) -> None:
        """Submits everything, does what the plan says, and returns when all has ended or nothing moves."""
        await self._nc.subscribe("compute.work.state.v1.*", cb=self.history.on_state)
        await self._nc.flush()
        await self._mesh.bus(Role.SERVICES)
        asking = asyncio.create_task(self._ask_forever())
        submitting = [asyncio.create_task(self._submit(number)) for number in range(self._at_once)]
        cancelling = [asyncio.create_task(self._cancel(number)) for number in range(0, self.items, ONE_IN)]
        try:
            for number, step in enumerate(self._plan.steps):
                await self._moves(lambda goal=step.after: self.history.ended >= goal)  # type: ignore[misc]
                await self._do(step)
                first = self._at_once + number * PER_DEED
                submitting += [asyncio.create_task(self._submit(first + more)) for more in range(PER_DEED)]
            await asyncio.gather(*self._waking, *submitting, *cancelling)
            await self._settle()
        finally:
            for task in (asking, *submitting, *cancelling, *self._waking):
                task.cancel()

    # --- what people do ------------------------------------------------------------------------------------------

    async def _submit(self, number: int) -> None:
        """Publishes until the server says that it is stored, as a careful program would."""
        item = WorkItem(work_id=f"c{number}", work_type="square", payload={"n": number})
        client = await self._mesh.bus()
        while True:
            with contextlib.suppress(BusError):
                await client.store(work.SUBMIT, item, timeout_s=1.0)
                self.history.accepted[f"c{number}"] = number
                return
            await asyncio.sleep(0.05)

    async def _cancel(self, number: int) -> None:
        """Asks until somebody answers. An item that is not found was lost, or is not read yet."""
        work_id = f"c{number}"
        await self._moves(lambda: self.history.ended > number and work_id in self.history.accepted)
        client = await self._mesh.bus()
        deadline_s = asyncio.get_running_loop().time() + QUIET_S
        while asyncio.get_running_loop().time() < deadline_s:
            with contextlib.suppress(BusError):
                answer = await client.ask(work.CANCEL, work.WorkCancel(work_id=work_id), timeout_s=1.0)
                if isinstance(answer, WorkRecord):
                    self.history.cancelled.add(work_id)
                    return
                if answer.code == "already_final":
                    return
            await asyncio.sleep(0.05)

    async def _ask_forever(self) -> None:
        client = await self._mesh.bus()
        while True:
            with contextlib.suppress(BusError):
                answer = await client.ask(work.LIST, WorkList(limit=1), timeout_s=0.5)
                if isinstance(answer, work.WorkItems):
                    self.history.answered_s.append(asyncio.get_running_loop().time())
            await asyncio.sleep(0.05)

    # --- what happens to the mesh ----------------------------------------------------------------------------------

    async def _do(self, step: Step) -> None:
        name = await self._found(step.victim)
        pid = self._mesh.pid(name)
        self._disturbed()
        if step.deed is Deed.AWAY:
            self._waking.append(asyncio.create_task(self._keep_away(name, step.for_s)))
            return
        self._mesh.kill(name, SIGNALS[step.deed])
        if step.deed is Deed.STOP:
            self._waking.append(asyncio.create_task(self._wake(name, pid, step.for_s)))

    async def _found(self, victim: str) -> str:
        """The name of a living process that is the victim now."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + QUIET_S
        while loop.time() < deadline_s:
            name = victim
            if victim == LEADING or victim in SERVERS:
                # One at a time: a second one while the first still lacks something would leave no majority.
                bus = await self._mesh.bus(Role.SERVICES)
                leads = await leader(bus, storage.WORK.stream)
                name = (leads if victim == LEADING else victim) if await is_whole(bus) else ""
            elif victim in (ACTING, STANDBY):
                holder = ""
                with contextlib.suppress(BusError):
                    holder = await self._mesh.holder("work-marshaller")
                others = {"work-marshaller", "work-marshaller-2"} - {holder}
                name = holder if victim == ACTING else min(others) if holder else ""
            if name and self._mesh.pid(name):
                return name
            await asyncio.sleep(0.02)
        raise AssertionError(f"there is no {victim}")

    async def _wake(self, name: str, pid: int, for_s: float) -> None:
        await asyncio.sleep(for_s)
        if self._mesh.pid(name) == pid:
            self._disturbed()
            self._mesh.kill(name, signal.SIGCONT)

    async def _keep_away(self, name: str, for_s: float) -> None:
        assert self._mesh.cluster is not None
        async with self._mesh.cluster.without(name):
            await asyncio.sleep(for_s)
        self._disturbed()

    def _disturbed(self) -> None:
        self.history.disturbed_s.append(asyncio.get_running_loop().time())

    # --- what comes of it ------------------------------------------------------------------------------------------

    async def _moves(self, condition: Callable[[], Any]) -> None:
        """Waits for a condition as long as there is progress. When there is none any more, the promises tell."""
        loop = asyncio.get_running_loop()
        seen, moved_s = -1, loop.time()
        while not condition() and loop.time() - moved_s < QUIET_S:
            if self.history.ended > seen:
                seen, moved_s = self.history.ended, loop.time()
            await asyncio.sleep(0.02)

    async def _settle(self) -> None:
        """Waits until all is stored as ended, or nothing moves; events may have been missed, the bucket tells."""
        loop = asyncio.get_running_loop()
        seen, moved_s = -1, loop.time()
        bucket = Bucket(await self._mesh.bus(Role.SERVICES), storage.WORK)
        while seen < self.items and loop.time() - moved_s < QUIET_S:
            with contextlib.suppress(BusError):
                self.history.stored = {key: entry.value for key, entry in (await bucket.load()).items()}
            ended = sum(record.state in work.FINAL for record in self.history.stored.values())
            if ended > seen:
                seen, moved_s = ended, loop.time()
            await asyncio.sleep(0.2)


async def play(mesh: RunningMesh, plan: Plan, *, at_once: int, note: Callable[[str, object], None]) -> None:
    """Adds a node of the test's own and a reporter that means no good, plays the plan, and asserts every promise.

    Args:
        note: takes what was measured.
    """
    async with outsider(mesh, Role.CLIENT) as watcher, outsider(mesh, Role.NODE) as liar:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("square",), slots=3, run=square)
        hostile = Hostile(liar, random.Random(plan.seed))  # replayed, not secret
        await node.join()
        await hostile.start()
        run = Run(mesh, plan, watcher, at_once=at_once)
        await run.go()
        await hostile.stop()
        found = violations(run.history)
        leaders = [line for line in mesh.lines if line.startswith("work-marshaller")]
        assert not found, "\n".join([str(plan), *found[:20], *leaders[-60:]])
        assert len(run.history.accepted) == run.items
        assert hostile.said > run.items / 4, "the reporter had nothing to say"
        await until(lambda: not node.running, what="the second node to have nothing left")
        for status in mesh.supervisor.status().services:
            if "agent" in status.name or "marshaller" in status.name:
                await until_idle(status.name, status.http)
        note("items", run.items)
        note("slowest take-over in s", round(slowest_take_over_s(run.history), 1))
        await node.leave()


async def square(asked: Assignment) -> dict[str, int]:
    """What the second node does."""
    await asyncio.sleep(0.1)
    return {"square": asked.payload["n"] ** 2}


async def until_idle(name: str, url: str) -> None:
    """Waits until a service says that it has nothing in hand."""
    health: dict[str, Any] = {}
    try:
        async with httpx.AsyncClient() as http, asyncio.timeout(30):
            while not health or any(health.get(what) for what in ("running", "waiting", "out")):
                health = (await http.get(f"{url}/healthz")).json()
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{name} has something in hand for ever: {health}") from None
