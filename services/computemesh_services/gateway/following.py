"""Keeps what is known of engines in step with the mesh: hears nodes, and asks the registry now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from computemesh import log
from computemesh.bus import Bus, BusError
from computemesh.contracts import nodes
from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat, NodeLost, NodeMarked, NodesQuery, NodeView
from computemesh.lifecycle import Spawn
from computemesh_services.gateway.engines import Engines

LIST_EVERY_S: Final = 30.0
"""How often the registry is asked, to learn of suspect nodes and of what was missed."""

LIST_AGAIN_S: Final = 1.0
"""The pause when it could not answer, or a new node was heard of."""

FIRST_AGAIN_S: Final = 0.2
"""The pause when it could not answer and never has: until it does, what is not known may well be there."""

_log = log.get("engines")


class Following:
    """Feeds *engines*.

    Args:
        changed: called when somebody who waits may have a chance now.
    """

    def __init__(self, bus: Bus, engines: Engines, changed: Callable[[], None]) -> None:
        self._bus = bus
        self._engines = engines
        self._changed = changed
        self._soon = asyncio.Event()

    async def start(self, spawn: Spawn) -> None:
        await self._bus.subscribe(nodes.ANNOUNCE, self._on_announce)
        await self._bus.subscribe(nodes.HEARTBEAT, self._on_beat)
        await self._bus.subscribe(nodes.LOST, self._on_lost)
        await self._bus.subscribe(nodes.MARKED, self._on_marked)
        spawn(self._list_forever())

    async def _on_announce(self, said: NodeAnnouncement) -> None:
        if self._engines.announced(said, now=time.monotonic()):
            self._soon.set()
        self._changed()

    async def _on_beat(self, said: NodeHeartbeat) -> None:
        if not self._engines.beat(said, now=time.monotonic()):
            self._soon.set()
        elif said.engines or said.leaving:
            self._changed()

    async def _on_lost(self, said: NodeLost) -> None:
        self._engines.lost(said, now=time.monotonic())
        self._changed()

    async def _on_marked(self, said: NodeMarked) -> None:
        self._engines.marked(said, now=time.monotonic())
        self._changed()

    async def _list_forever(self) -> None:
        while True:
            interrupted = self._bus.interrupted
            pause_s = LIST_EVERY_S
            if why_not := await self._list():
                _log.debug("the registry cannot answer", reason=why_not)
                pause_s = LIST_AGAIN_S if self._engines.complete else FIRST_AGAIN_S
            self._soon.clear()
            waits = [asyncio.ensure_future(self._soon.wait()), asyncio.ensure_future(interrupted.wait())]
            try:
                await asyncio.wait(waits, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            if interrupted.is_set():
                await self._bus.connected.wait()
                self._engines.patience(now=time.monotonic())
            elif self._soon.is_set():
                # A whole fleet may be starting; once is enough for all of it.
                await asyncio.sleep(LIST_AGAIN_S)

    async def _list(self) -> str:
        """Asks for all nodes; gives why that did not go."""
        found: list[NodeView] = []
        asked_at = time.monotonic()
        query = NodesQuery()
        while True:
            try:
                page = await self._bus.ask(nodes.QUERY, query)
            except BusError as error:
                return str(error)
            if isinstance(page, Refused):
                return page.reason
            found += page.nodes
            if not page.next:
                break
            query = NodesQuery(after=page.next)
        self._engines.listed(found, asked_at=asked_at, now=time.monotonic())
        self._changed()
        return ""
