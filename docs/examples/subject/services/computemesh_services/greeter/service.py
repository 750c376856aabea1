"""The shell around the wording: takes a request, answers, and tells it to whoever listens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from computemesh import log
from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import greetings
from computemesh.contracts.base import AnyBound, Refused, serve
from computemesh.contracts.greetings import Greet, Greeted, Greeting
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh_services.greeter import wording
from computemesh_services.greeter.config import GreeterConfig

_log = log.get("service")


class Greeter:
    """Greets. Nothing awaits between reading the count and writing it, so no two greetings share a number."""

    def __init__(self, bus: Bus, config: GreeterConfig) -> None:
        self._bus = bus
        self._config = config
        self._said = 0

    def endpoints(self) -> list[AnyBound]:
        return [serve(greetings.GREET, self.on_greet)]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        """It has no loops of its own."""

    async def drain(self) -> None:
        """Nothing is in hand but requests, which are answered before."""

    def health(self) -> Mapping[str, Any]:
        return {"said": self._said}

    def unready(self) -> str:
        return ""

    async def on_greet(self, asked: Greet) -> Greeting | Refused:
        answer = wording.greet(asked, said=self._said, said_max=self._config.greetings_max)
        if isinstance(answer, Greeting):
            self._said = answer.number
            await self._tell(Greeted(name=asked.name, number=answer.number))
        return answer

    async def _tell(self, fact: Greeted) -> None:
        try:
            await self._bus.publish(greetings.GREETED, fact)
        except BusError as error:
            _log.warning("cannot tell", subject=greetings.GREETED.subject, reason=str(error))
