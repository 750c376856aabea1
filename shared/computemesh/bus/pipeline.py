"""Many requests in flight without a task or future each: one inbox, a callback per reply, one timeout.

This is how records are written at speed. ``publish_async`` of nats-py never resolves when the server
answers with an error, such as a lost compare-and-set, so it cannot carry a truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh.bus.connection import Bus

SWEEP_S: Final = 0.1
"""How late a timeout may be noticed."""


@dataclass(frozen=True)
class Reply:
    """What came back: data, or nothing because nobody serves the subject or nobody answered in time."""

    data: bytes
    no_responder: bool = False
    timed_out: bool = False


OnReply = Callable[[Reply], Awaitable[None]]


class Pipeline:
    """Requests that are answered by callback, each exactly once: by its reply or by its timeout."""

    def __init__(self, bus: Bus, *, timeout_s: float) -> None:
        self._bus = bus
        self._timeout_s = timeout_s
        self.empty = asyncio.Event()
        """Set while nothing waits for a reply and no callback runs."""
        self.empty.set()
        self._waiting: dict[str, tuple[float, OnReply]] = {}
        self._next = 0
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._inbox = self._bus.new_inbox()
        self._subscription = await self._bus.listen(f"{self._inbox}.*", self._on_message)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Forgets what was not answered; no callback runs after this."""
        self._waiting.clear()
        if self._subscription is not None:
            await self._bus.forget(self._subscription)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})

    async def send(
        self, subject: str, data: bytes, on_reply: OnReply, *, headers: dict[str, str] | None = None
    ) -> None:
        self._next += 1
        self.empty.clear()
        token = str(self._next)
        self._waiting[token] = (asyncio.get_running_loop().time() + self._timeout_s, on_reply)
        await self._bus.send(subject, data, reply=f"{self._inbox}.{token}", headers=headers)

    async def _on_message(self, message: Msg) -> None:
        _, on_reply = self._waiting.pop(message.subject.rsplit(".", 1)[1], (0.0, None))
        if on_reply is not None:
            nobody = not message.data and (message.headers or {}).get("Status") == "503"
            await self._finish(on_reply, Reply(message.data, no_responder=nobody))

    async def _finish(self, on_reply: OnReply, reply: Reply) -> None:
        await on_reply(reply)
        if not self._waiting:
            self.empty.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            # One timeout for all, so the oldest come first.
            while self._waiting and (oldest := next(iter(self._waiting.items())))[1][0] <= now:
                del self._waiting[oldest[0]]
                await self._finish(oldest[1][1], Reply(b"", timed_out=True))
