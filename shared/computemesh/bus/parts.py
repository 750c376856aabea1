"""Asks requests whose answers come in parts: one inbox for all of them, and a call for each part as it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh.bus.connection import Bus, read_answer, traced
from computemesh.contracts.base import Message, Refused, Request, encode

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

OnPart = Callable[[R | Refused | None], None]
"""Takes a part, a refusal, or None when nobody serves the subject. Called while the connection is read: it must not
take long, and must not raise."""

_NOBODY: Final = "503"


class PartsInbox:
    """Where parts of answers arrive."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: dict[str, tuple[Request[Any, Any], OnPart[Any]]] = {}
        self._asked = 0
        self._inbox = ""
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        self._inbox = self._bus.new_inbox()
        self._subscription = await self._bus.listen(f"{self._inbox}.*", self._on_message, inline=True)

    async def stop(self) -> None:
        """Nothing is called any more."""
        self._waiting.clear()
        if self._subscription is not None:
            await self._bus.forget(self._subscription)

    async def ask(self, request: Request[Q, R], question: Q, on_part: OnPart[R], *, target: str = "") -> str:
        """Asks.

        Returns:
            Names this answer to :meth:`forget`, which is due once nothing more of it is expected.

        Raises:
            Unreachable, NotStored: as :meth:`Bus.send`.
        """
        assert request.many, f"{request.subject} has one answer"
        self._asked += 1
        name = str(self._asked)
        self._waiting[name] = (request, on_part)
        try:
            reply = f"{self._inbox}.{name}"
            await self._bus.send(request.at(target), encode(question), reply=reply, headers=traced(None))
        except BaseException:
            self.forget(name)
            raise
        return name

    def forget(self, name: str) -> None:
        """Whatever still comes of an answer is dropped."""
        self._waiting.pop(name, None)

    async def _on_message(self, message: Msg) -> None:
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is None:
            return
        request, on_part = waiting
        if message.data:
            on_part(read_answer(request, message.data, message.headers))
        elif message.headers and message.headers.get("Status") == _NOBODY:
            on_part(None)
