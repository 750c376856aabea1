"""A service for tests of the lifecycle: it holds requests in hand, breaks, or is wrong, as it is told.

A test module cannot be sharp with a service that answers at once: whether it drained or was cut off would
look the same. This one answers only after a ``discover`` event was heard. Run as ``python -m slow_service``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from computemesh.bus import Bus, MicroService
from computemesh.config import ConfigError, ServiceConfig
from computemesh.contracts import nodes
from computemesh.contracts.base import AnyBound, Refused, Role, ServiceCard, serve
from computemesh.contracts.nodes import Discover, NodeGet, NodeView
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn, run

CARD: Final = ServiceCard(name="slow-service", about="Answers when told to.", role=Role.SERVICES, port=0)


class SlowConfig(ServiceConfig, frozen=True, kw_only=True):
    fail: str = ""
    """``config``: it cannot be used. ``task``: a background task raises. ``handler``: an event is a defect."""


class SlowService:
    """Answers `nodes.get` once it has heard a discover event."""

    def __init__(self, bus: Bus, config: SlowConfig) -> None:
        self._bus = bus
        self._config = config
        self._gate = asyncio.Event()
        self._in_hand = 0

    def endpoints(self) -> list[AnyBound]:
        return [serve(nodes.GET, self.on_get)]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        await self._bus.subscribe(nodes.DISCOVER, self._on_discover)
        if self._config.fail == "task":
            spawn(_break())

    async def drain(self) -> None:
        assert self._in_hand == 0, "told to drain while requests are in hand"

    def health(self) -> Mapping[str, Any]:
        return {"in_hand": self._in_hand}

    def unready(self) -> str:
        return ""

    async def on_get(self, ask: NodeGet) -> NodeView | Refused:
        self._in_hand += 1
        await self._gate.wait()
        self._in_hand -= 1
        return NodeView(node_id=ask.node_id)

    async def _on_discover(self, _: Discover) -> None:
        if self._config.fail == "handler":
            await _break()
        self._gate.set()


async def _break() -> None:
    await asyncio.sleep(0)
    raise RuntimeError("broken on purpose")


def main() -> None:
    def make(bus: Bus, config: SlowConfig, _url: Callable[[], str]) -> SlowService:
        if config.fail == "config":
            raise ConfigError("COMPUTEMESH_FAIL='config': wrong on purpose")
        return SlowService(bus, config)

    run(CARD, SlowConfig, make)


if __name__ == "__main__":
    main()
