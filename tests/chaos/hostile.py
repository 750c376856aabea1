"""A reporter that means no good: reports twice, late, out of order, about what is over and about what never was.

Everything it says was true once or is about nothing that counts, so none of it may change an outcome. It
knows what any node may know, and has a node's credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any, Final

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

# pyright: reportUnknownMemberType=false

COMPLETED: Final = "compute.work.completed.v1"
FAILED: Final = "compute.work.failed.v1"

MARK: Final = "Test-Copy"

LATE_S_MAX: Final = 6.0
"""Longer than it takes until an attempt is given up and the next one begins."""


class Hostile:
    """Hears what nodes report and what is recorded, and makes trouble of it."""

    def __init__(self, nc: Client, dice: random.Random) -> None:
        self.said = 0
        self._nc = nc
        self._dice = dice
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._nc.subscribe(COMPLETED, cb=self._on_report)
        await self._nc.subscribe("compute.work.state.v1.*", cb=self._on_state)
        await self._nc.flush()

    async def stop(self) -> None:
        """Says what it still has to say, and no more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _on_report(self, message: Msg) -> None:
        if MARK in (message.headers or {}):  # Its own.
            return
        report = msgspec.json.decode(message.data)
        luck = self._dice.random()
        if luck < 0.2:
            self._say(COMPLETED, report, 0.0)
        elif luck < 0.5:
            self._say(COMPLETED, report, self._dice.uniform(0.0, LATE_S_MAX))
        elif luck < 0.6:
            failed = {"work_id": report["work_id"], "attempt": report["attempt"], "error": "late", "fault": "node"}
            self._say(FAILED, failed, self._dice.uniform(0.5, LATE_S_MAX))
        elif luck < 0.7:
            unknown = f"nothing-{self._dice.randrange(1000)}"
            self._say(COMPLETED, {"work_id": unknown, "attempt": 1}, 0.0)
        elif luck < 0.8:
            self._say(COMPLETED, {"work_id": report["work_id"], "result": "of no attempt"}, 0.0)

    async def _on_state(self, message: Msg) -> None:
        record = msgspec.json.decode(message.data)
        if record["state"] in ("assigned", "running") and record.get("attempt", 0) > 1:
            stale = {"work_id": record["work_id"], "attempt": record["attempt"] - 1}
            self._say(COMPLETED, stale | {"result": "of an old attempt"}, self._dice.uniform(0.0, 1.0))
            self._say(FAILED, stale | {"error": "of an old attempt", "fault": "work"}, self._dice.uniform(0.0, 1.0))

    def _say(self, subject: str, report: dict[str, Any], later_s: float) -> None:
        async def say() -> None:
            await asyncio.sleep(later_s)
            with contextlib.suppress(nats.errors.Error):
                await self._nc.publish(subject, msgspec.json.encode(report), headers={MARK: "yes"})
                self.said += 1

        task = asyncio.create_task(say())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
