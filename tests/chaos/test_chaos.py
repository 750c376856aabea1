"""500 items are in flight while everything is killed, stopped and restarted, and each has one outcome.

Goal: with two marshallers, a registry, a node agent, a second node, a NATS server and a reporter that means
no good, whatever is done in whatever order, every promise in ``history.py`` holds.
Method: real processes under the real supervisor. What is done follows from a seed and waits for progress,
not for time. A failure names its seed; ``CHAOS_SEEDS=7,8`` runs those, ``make chaos N=20`` as many random ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import nats
import pytest
from msgspec.structs import replace
from nats.aio.client import Client

from computemesh.bus import Bucket, BusError
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.work import Assignment, Move, WorkItem, WorkList, WorkRecord, WorkState
from computemesh.testing import DirectNode, RunningMesh, install_executor, running_mesh, until
from computemesh.testing.builders import a_record
from tests.chaos import history as promises
from tests.chaos.history import Event, History, slowest_take_over_s, violations
from tests.chaos.hostile import Hostile
from tests.chaos.plan import (
    ACTING,
    AGENT,
    DEEDS,
    LONGER_THAN_A_LEASE_S,
    LONGER_THAN_PATIENCE_S,
    STANDBY,
    VICTIMS,
    Deed,
    Plan,
    Step,
    make_plan,
)

# pyright: reportUnknownMemberType=false

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")
AT_ONCE: Final = 500
PER_DEED: Final = 10
"""Items that are submitted at the moment when something is done to the mesh."""

ITEMS: Final = AT_ONCE + PER_DEED * DEEDS
CANCELLED: Final = range(0, ITEMS, 25)
"""Items that somebody changes their mind about."""

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


def seeds() -> list[int]:
    """Those of the environment, or one that is always the same and random ones."""
    if named := os.environ.get("CHAOS_SEEDS"):
        return [int(seed) for seed in named.split(",")]
    return [1, *(secrets.randbelow(1_000_000) for _ in range(int(os.environ.get("CHAOS_RUNS", "2")) - 1))]


@contextlib.asynccontextmanager
async def outsider(mesh: RunningMesh, role: Role) -> AsyncGenerator[Client]:
    """A program that speaks plain NATS and comes back as soon as it can."""

    async def ignore(_: Exception) -> None:
        """The server is killed on purpose."""

    nc = await nats.connect(mesh.url(role), max_reconnect_attempts=-1, reconnect_time_wait=0.05, error_cb=ignore)
    try:
        yield nc
    finally:
        await nc.close()


class Run:
    """One run of one plan."""

    def __init__(self, mesh: RunningMesh, plan: Plan, nc: Client) -> None:
        self.history = History()
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
        submitting = [asyncio.create_task(self._submit(number)) for number in range(AT_ONCE)]
        cancelling = [asyncio.create_task(self._cancel(number)) for number in CANCELLED]
        try:
            for number, step in enumerate(self._plan.steps):
                await self._moves(lambda goal=step.after: self.history.ended >= goal)  # type: ignore[misc]
                await self._do(step)
                first = AT_ONCE + number * PER_DEED
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
        self._mesh.kill(name, SIGNALS[step.deed])
        if step.deed is Deed.STOP:
            self._waking.append(asyncio.create_task(self._wake(name, pid, step.for_s)))

    async def _found(self, victim: str) -> str:
        """The name of a living process that is the victim now."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + QUIET_S
        while loop.time() < deadline_s:
            name = victim
            if victim in (ACTING, STANDBY):
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
        while seen < ITEMS and loop.time() - moved_s < QUIET_S:
            with contextlib.suppress(BusError):
                self.history.stored = {key: entry.value for key, entry in (await bucket.load()).items()}
            ended = sum(record.state in work.FINAL for record in self.history.stored.values())
            if ended > seen:
                seen, moved_s = ended, loop.time()
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("seed", seeds())
async def test_every_promise_holds_whatever_is_killed_stopped_and_restarted(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """500 items at once and some more at each deed, and a reporter that lies about what is over."""
    plan = make_plan(seed, ITEMS)
    environment = {
        **install_executor(tmp_path / "plugin", "square", EXECUTOR),
        "COMPUTEMESH_SLOTS": "3",
        "COMPUTEMESH_MODELS": "/nowhere",
    }
    async with (
        running_mesh(tmp_path, ALL, copies={"work-marshaller": 2}, environment=environment) as mesh,
        outsider(mesh, Role.CLIENT) as watcher,
        outsider(mesh, Role.NODE) as liar,
    ):
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2", work_types=("square",), slots=3, run=square)
        hostile = Hostile(liar, random.Random(seed))  # replayed, not secret
        await node.join()
        await hostile.start()
        run = Run(mesh, plan, watcher)
        await run.go()
        await hostile.stop()
        found = violations(run.history)
        leaders = [line for line in mesh.lines if line.startswith("work-marshaller")]
        assert not found, "\n".join([str(plan), *found[:20], *leaders[-60:]])
        assert len(run.history.accepted) == ITEMS
        assert hostile.said > ITEMS / 4, "the reporter had nothing to say"
        await until(lambda: not node.running, what="the second node to have nothing left")
        for status in mesh.supervisor.status().services:
            if "agent" in status.name or "marshaller" in status.name:
                await until_idle(status.name, status.http)
        record_property("slowest take-over in s", round(slowest_take_over_s(run.history), 1))
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


# --- the plan and the promises themselves --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan() -> None:
    """A failure that names its seed can be played again."""
    assert make_plan(7, ITEMS) == make_plan(7, ITEMS)
    assert make_plan(7, ITEMS) != make_plan(8, ITEMS)
    assert str(make_plan(7, ITEMS)).startswith("seed 7\nafter ")


@pytest.mark.parametrize("seed", range(50))
def test_every_plan_wakes_a_leader_and_a_node_after_they_were_given_up_and_kills_everything(seed: int) -> None:
    """All while work is in flight."""
    plan = make_plan(seed, ITEMS)
    stops = {(step.victim, step.for_s) for step in plan.steps if step.deed is Deed.STOP}
    assert any(victim == ACTING and for_s >= LONGER_THAN_A_LEASE_S for victim, for_s in stops)
    assert any(victim == AGENT and for_s >= LONGER_THAN_PATIENCE_S for victim, for_s in stops)
    assert {step.victim for step in plan.steps if step.deed is Deed.KILL} == set(VICTIMS)
    moments = [step.after for step in plan.steps]
    assert moments == sorted(moments)
    assert moments[-1] < ITEMS


def story(*states: WorkState, revision: int = 1, before: int = 0, **changes: Any) -> Event:
    """A published record of item c2 that went through these states."""
    moves = [Move(at=float(n), state=state, attempt=1, node_id="n1") for n, state in enumerate(states)]
    record = a_record("c2", states[-1], story=moves, **{"attempt": 1, "node_id": "n1", **changes})
    return Event(revision, before, record)


P, A, DONE = WorkState.PENDING, WorkState.ASSIGNED, WorkState.COMPLETED
FINE = (story(P, A), story(P, A, DONE, revision=2, before=1, result={"square": 4}))


def a_history(*events: Event) -> History:
    """Of one item, c2, whose last event is what is stored."""
    history = History(accepted={"c2": 2}, answered_s=[1.0, 2.0])
    for event in events:
        history.add(event)
    history.stored = {"c2": events[-1].record}
    return history


def test_a_history_as_it_should_be_violates_nothing() -> None:
    """Also when an event in the middle was not heard."""
    assert violations(a_history(*FINE)) == []
    assert violations(a_history(FINE[0], replace_event(FINE[1], revision=9, before=5))) == []


def replace_event(event: Event, *, revision: int, before: int) -> Event:
    return Event(revision, before, event.record)


@pytest.mark.parametrize(
    ("promise", "history"),
    [
        (promises.nothing_that_was_accepted_is_lost, a_history(FINE[0])),
        (
            promises.nothing_is_there_that_nobody_submitted,
            a_history(*FINE, Event(3, 0, replace(FINE[0].record, work_id="x"))),
        ),
        (
            promises.every_item_has_one_recorded_outcome,
            a_history(*FINE, replace_event(FINE[1], revision=3, before=2)),
        ),
        (promises.every_item_has_one_recorded_outcome, a_history(story(P, A, DONE, DONE))),
        (promises.every_result_is_right, a_history(story(P, A, DONE, result={"square": 5}))),
        (promises.every_result_is_right, a_history(story(P, A, WorkState.DEAD))),
        (promises.every_move_is_legal, a_history(story(P, DONE))),
        (promises.every_move_is_legal, a_history(FINE[1], story(P, A, DONE, P, revision=3, before=2))),
        (promises.every_move_is_legal, a_history(FINE[0], story(P, P, A, revision=3, before=2))),
        (promises.revisions_only_grow, a_history(story(P, A, revision=5, before=4), FINE[1])),
        (promises.revisions_only_grow, a_history(FINE[0], replace_event(FINE[1], revision=2, before=0))),
        (
            promises.attempts_and_their_counts_only_grow,
            a_history(story(P, A, attempt=2), story(P, A, DONE, revision=2, before=1)),
        ),
        (
            promises.attempts_and_their_counts_only_grow,
            a_history(FINE[0], story(P, A, DONE, revision=2, before=1, node_id="n9")),
        ),
    ],
)
def test_each_promise_notices_when_it_is_broken(promise: Callable[[History], Any], history: History) -> None:
    """A promise that cannot fail proves nothing."""
    assert list(promise(history))
    assert any(line.startswith(promise.__name__) for line in violations(history))


def test_a_lost_submission_a_broken_cancellation_and_a_late_take_over_are_noticed() -> None:
    """The other ways in which a history may be wrong."""
    lost = a_history(*FINE)
    lost.accepted["c3"] = 3
    assert violations(lost) == ["nothing_that_was_accepted_is_lost: c3 was accepted and is not there"]
    cancelled = a_history(*FINE)
    cancelled.cancelled.add("c2")
    assert [line.partition(":")[0] for line in violations(cancelled)] == ["a_cancellation_that_was_confirmed_stands"]
    late = a_history(*FINE)
    late.answered_s, late.disturbed_s = [1.0, 31.0], [2.0, 10.0]
    assert slowest_take_over_s(late) == 21.0
    assert [line.partition(":")[0] for line in violations(late)] == ["somebody_took_over_in_time"]
