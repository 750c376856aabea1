"""Many requests in flight without a task or future each: one inbox, a callback per reply, one timeout.

This is how records are written at speed. ``publish_async`` of nats-py never resolves when the server
answers with an error, such as a lost compare-and-set, so it cannot carry a truth.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh.bus.connection import Bus

SWEEP_S: Final = 0.1
"""How late a timeout may be noticed."""


class Reply(msgspec.Struct, frozen=True, gc=False):
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
        self._waiting: dict[str, OnReply] = {}
        self._deadlines: deque[tuple[float, str]] = deque()
        """One timeout for all, so the oldest come first. Those at the front that were answered are gone."""
        self._next = 0
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._inbox = self._bus.new_inbox()
        self._subscription = await self._bus.listen(f"{self._inbox}.*", self._on_message, inline=True)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Forgets what was not answered; no callback runs after this."""
        self._waiting.clear()
        self._deadlines.clear()
        if self._subscription is not None:
            await self._bus.forget(self._subscription)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})

    async def send(
        self, subject: str, data: bytes, on_reply: OnReply, *, headers: dict[str, str] | None = None
    ) -> None:
        self._next += 1
        if not self._waiting:
            self.empty.clear()
        token = str(self._next)
        self._waiting[token] = on_reply
        self._deadlines.append((asyncio.get_running_loop().time() + self._timeout_s, token))
        await self._bus.send(subject, data, reply=f"{self._inbox}.{token}", headers=headers)

    async def _on_message(self, message: Msg) -> None:
        on_reply = self._waiting.pop(message.subject.rpartition(".")[2], None)
        if on_reply is not None:
            nobody = not message.data and (message.headers or {}).get("Status") == "503"
            self._forget_answered()
            await self._finish(on_reply, Reply(message.data, no_responder=nobody))

    async def _finish(self, on_reply: OnReply, reply: Reply) -> None:
        await on_reply(reply)
        if not self._waiting:
            self.empty.set()

    def _forget_answered(self) -> None:
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            self._deadlines.popleft()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            while self._deadlines and self._deadlines[0][0] <= now:
                _, token = self._deadlines.popleft()
                if on_reply := self._waiting.pop(token, None):
                    await self._finish(on_reply, Reply(b"", timed_out=True))


OnUnheard = Callable[[str, int], Awaitable[None]]


class Posts:
    """Publishes of which one learns when nobody heard them: whoever listens need not answer.

    The server says so on the reply subject, which carries what the post was about: an id and a number.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._inbox = ""
        self._subscription: Subscription | None = None

    async def start(self, on_unheard: OnUnheard) -> None:
        self._inbox = self._bus.new_inbox()

        async def on_message(message: Msg) -> None:
            if (message.headers or {}).get("Status") == "503":  # Anything else is a listener that answers.
                _, name, number = message.subject.rsplit(".", 2)
                await on_unheard(name, int(number))

        self._subscription = await self._bus.listen(f"{self._inbox}.*.*", on_message, inline=True)

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._bus.forget(self._subscription)

    async def send(
        self, subject: str, data: bytes, name: str, number: int, *, headers: dict[str, str] | None = None
    ) -> None:
        await self._bus.send(subject, data, reply=f"{self._inbox}.{name}.{number}", headers=headers)
