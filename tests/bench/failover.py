"""How long it takes until requests are served elsewhere when what served them dies.

Two node agents with a fast engine each; more requests are under way than both have slots, so that some wait at their
engines. One is hit. Requests fall into three kinds, by how far they were at that moment:

    begun      their first token was out: they end with an error, as nobody can go on where another engine was
    waiting    they were sent, and had no token yet: another engine serves them
    sent after they were sent within the next two seconds

No request of the last two kinds may be lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from computemesh.testing import RunningMesh
from computemesh.testing.fake_engine import install
from tests.bench.doors import (
    AS_IN_PRODUCTION,
    MODEL,
    Load,
    another_agent,
    engine_of,
    inference_mesh,
    load,
)
from tests.bench.programs.openai_load import Asked, Plan

SLOTS: Final = 4
PENDING: Final = 8
"""Of each engine."""

WORKERS: Final = 14
"""More than the slots of both engines, and so many that the one which is left can take them all once in a while."""

AFTER_S: Final = 2.0
"""Requests that are sent so long after the blow count as sent after it."""

LASTS_S: Final = 8.0
"""How long requests are sent in all."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of blow did, over all repetitions. Seconds from the blow, or from the request if that was later."""

    next_s: float
    """Until the first token of the first request that was sent after it, median."""
    next_max_s: float
    after_p50_s: float
    """The wait for the first token of those sent after it."""
    after_max_s: float
    waiting: int
    """Requests that were waiting for their first token."""
    waiting_p50_s: float
    waiting_max_s: float
    """Until they had it."""
    begun: int
    """Requests that had begun on what was hit."""
    told_max_s: float
    """Until their clients were told that they had failed."""
    lost: int
    """Requests that were waiting or sent after it, and failed."""
    usual_s: float
    """The wait for the first token before it, median."""


class Blow(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one blow."""

    next_s: float
    after_s: list[float]
    waiting_s: list[float]
    told_s: list[float]
    lost: list[str]
    usual_s: list[float]


def judge(asked: Sequence[Asked], at: float) -> Blow:
    """Sorts requests by how far they were when the blow fell."""
    before = [one for one in asked if one.first and one.first <= at]
    waiting = [one for one in asked if one.sent <= at < (one.first or one.ended)]
    after = sorted((one for one in asked if at < one.sent < at + AFTER_S), key=lambda one: one.sent)
    return Blow(
        next_s=next(one.first - at for one in after if one.first),
        after_s=[one.first - one.sent for one in after if one.first],
        waiting_s=[one.first - at for one in waiting if one.first],
        told_s=[one.ended - at for one in before if one.error and one.ended > at],
        lost=[one.error for one in (*waiting, *after) if one.error],
        usual_s=[one.first - one.sent for one in before],
    )


def row(blows: Sequence[Blow]) -> Row:
    after = [wait for blow in blows for wait in blow.after_s]
    waiting = [wait for blow in blows for wait in blow.waiting_s]
    told = [wait for blow in blows for wait in blow.told_s]
    return Row(
        next_s=statistics.median(blow.next_s for blow in blows),
        next_max_s=max(blow.next_s for blow in blows),
        after_p50_s=statistics.median(after),
        after_max_s=max(after),
        waiting=len(waiting),
        waiting_p50_s=statistics.median(waiting) if waiting else 0.0,
        waiting_max_s=max(waiting, default=0.0),
        begun=len(told),
        told_max_s=max(told, default=0.0),
        lost=sum(len(blow.lost) for blow in blows),
        usual_s=statistics.median(wait for blow in blows for wait in blow.usual_s),
    )


async def strike(mesh: RunningMesh, folder: Path, asker: Load, *, kind: str) -> Blow:
    """Two agents; one is hit while requests run, and replaced by none."""
    settings = {
        **AS_IN_PRODUCTION,
        "COMPUTEMESH_LLAMA_SERVER": str(install(folder)),
        "COMPUTEMESH_ENGINE_SLOTS": str(SLOTS),
        "COMPUTEMESH_MAX_PENDING_REQUESTS_PER_DEVICE": str(PENDING),
    }
    url = mesh.http("gateway")
    async with another_agent(mesh, folder, f"n{time.monotonic_ns()}", settings=settings) as agent:
        plan = Plan(
            url=url,
            model=MODEL,
            workers=WORKERS,
            for_s=LASTS_S,
            tokens=20,
            prompt="id={worker}.{number} rate=50",
            give_up_s=30.0,
        )
        await both_serve(asker, plan)
        running = asyncio.create_task(asker.carry_out(plan))
        await asyncio.sleep(LASTS_S / 2)
        victim = agent if kind.startswith("agent") else engine_of(agent)[1]
        at = time.monotonic()
        os.kill(victim, signal.SIGSTOP if kind.endswith("halted") else signal.SIGKILL)
        try:
            result = await running
        finally:
            if kind.endswith("halted"):
                os.kill(victim, signal.SIGCONT)
    return judge(result.asked, at)


async def both_serve(asker: Load, plan: Plan) -> None:
    """Returns once two nodes have answered.

    Raises:
        TimeoutError: they do not.
    """
    short = msgspec.structs.replace(plan, for_s=0.0, tokens=2)
    async with asyncio.timeout(60.0):
        while len({one.node for one in (await asker.carry_out(short)).asked if not one.error}) < 2:
            await asyncio.sleep(0.2)


async def bench(*, reps: int, tell: Callable[[str], None]) -> dict[str, Row]:
    """All kinds of blow."""
    found: dict[str, Row] = {}
    for kind in ("engine killed", "agent killed", "agent halted"):
        blows: list[Blow] = []
        for rep in range(reps):
            tell(f"{kind}, {rep + 1}/{reps}")
            with tempfile.TemporaryDirectory(prefix="bench-") as name:
                folder = Path(name)
                async with inference_mesh(folder, fake=True, slots=SLOTS, pending=PENDING) as mesh, load() as asker:
                    blows.append(await strike(mesh, folder, asker, kind=kind))
        found[kind] = row(blows)
    tell("")
    return found


def table(rows: Mapping[str, Row]) -> list[str]:
    """For people, in Markdown."""
    return [
        "",
        "| | next, s | worst | sent after: p50 | worst | waiting: p50 | worst | begun: told | lost | usual |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {name} | {one.next_s:.2f} | {one.next_max_s:.2f} | {one.after_p50_s:.2f} | {one.after_max_s:.2f} "
            f"| {one.waiting_p50_s:.2f} ({one.waiting}) | {one.waiting_max_s:.2f} | {one.told_max_s:.2f} ({one.begun}) "
            f"| {one.lost} | {one.usual_s:.2f} |"
            for name, one in rows.items()
        ),
    ]
