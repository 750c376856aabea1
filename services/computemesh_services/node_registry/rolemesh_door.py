"""``/v1/nodes/*``: where RoleMesh's node agents register and send heartbeats. The handlers are those of our own."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from computemesh.bus import micro
from computemesh.contracts.base import Message, Refused, decode
from computemesh.contracts.nodes import NodeAlive, NodeAnnouncement, NodeHeartbeat, NodeRecord
from computemesh.edge import Extra, problem, read_body
from computemesh_services.node_registry import rolemesh

S = TypeVar("S", bound=msgspec.Struct)


class Registry(Protocol):
    """What the door leads to."""

    async def on_register(self, said: NodeAnnouncement) -> NodeRecord | Refused: ...

    async def on_alive(self, beat: NodeHeartbeat) -> NodeAlive | Refused: ...

    async def record(self, node_id: str) -> NodeRecord | None: ...


class RoleMeshDoor:
    """Answers 404 to the heartbeat of an unknown node, whereupon such an agent registers again."""

    def __init__(self, registry: Registry, *, stale_after_s: float) -> None:
        self._registry = registry
        self._stale_after_s = stale_after_s

    def routes(self) -> list[Extra]:
        return [
            Extra(method="POST", path="/v1/nodes/register", handler=self.on_register),
            Extra(method="POST", path="/v1/nodes/heartbeat", handler=self.on_heartbeat),
        ]

    async def on_register(self, request: Request) -> Response:
        said = await _read(request, rolemesh.Register)
        if isinstance(said, Refused):
            return problem(said)
        announced = rolemesh.announcement(said)
        if isinstance(announced, Refused):
            return problem(announced)
        return await self._answer(request, self._register(announced, said))

    async def on_heartbeat(self, request: Request) -> Response:
        said = await _read(request, rolemesh.Heartbeat)
        if isinstance(said, Refused):
            return problem(said)
        return await self._answer(request, self._beat(said))

    async def _register(self, announced: NodeAnnouncement, said: rolemesh.Register) -> Message:
        record = await self._registry.record(said.node_id)
        if record is not None and rolemesh.on_the_bus(record, said.session):
            return record
        return await self._registry.on_register(announced)

    async def _beat(self, said: rolemesh.Heartbeat) -> Message:
        found = rolemesh.devices_of(said)
        record = await self._registry.record(said.node_id)
        if record is not None and rolemesh.on_the_bus(record, said.session):
            return record
        if record is not None and (news := rolemesh.reannouncement(record, found)) is not None:
            answer = await self._registry.on_register(news)
            if isinstance(answer, Refused):
                return answer
        return await self._registry.on_alive(rolemesh.heartbeat(said, found))

    async def _answer(self, request: Request, answering: Awaitable[Message]) -> Response:
        answer = await micro.guarded(request.url.path, answering)
        if isinstance(answer, Refused):
            return problem(answer)
        return JSONResponse({"ok": True, "status": "ok", "stale_after_s": self._stale_after_s})


async def _read(request: Request, kind: type[S]) -> S | Refused:
    body = await read_body(request)
    return body if isinstance(body, Refused) else decode(body, kind)
