"""The shell of the gateway: HTTP on one side, questions on the bus on the other. It keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from computemesh.bus import Bus, MicroService
from computemesh.contracts.base import AnyBound
from computemesh.edge import Extra
from computemesh.infer_client import InferClient
from computemesh.lifecycle import Spawn
from computemesh_services.gateway.config import GatewayConfig
from computemesh_services.gateway.engines import Engines
from computemesh_services.gateway.following import Following
from computemesh_services.gateway.keys import Doorkeeper
from computemesh_services.gateway.openai_door import OpenAIDoor
from computemesh_services.gateway.places import Places
from computemesh_services.gateway.tasks_door import TasksDoor
from computemesh_services.gateway.workers_door import WorkersDoor


class Gateway:
    """Lets people and programs in that speak HTTP."""

    def __init__(self, bus: Bus, config: GatewayConfig) -> None:
        self._tasks = TasksDoor(bus)
        self._workers = WorkersDoor(bus, ttl_s=config.heartbeat_ttl_sec)
        self._engines = Engines(suspect_after_s=config.suspect_after_s)
        self._places = Places(self._engines, queue_max=config.queue_max)
        self._following = Following(bus, self._engines, self._places.serve)
        self._asker = InferClient(bus)
        self._doorkeeper = Doorkeeper(bus, config)
        self._openai = OpenAIDoor(
            bus,
            self._engines,
            self._places,
            self._asker,
            queue_timeout_s=config.queue_timeout_s,
            entry=self._doorkeeper,
        )

    def endpoints(self) -> list[AnyBound]:
        return []

    def extras(self) -> list[Extra]:
        return [*self._tasks.routes(), *self._workers.routes(), *self._openai.routes()]

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        await self._asker.start()
        await self._following.start(spawn)
        await self._doorkeeper.start(spawn)
        spawn(self._places.serve_forever())

    async def drain(self) -> None:
        await self._openai.drain()
        await self._asker.stop()

    def health(self) -> Mapping[str, Any]:
        running, waiting = self._engines.in_flight, self._places.waiting
        return {"inference": {"running": running, "waiting": waiting}, "keys": self._doorkeeper.count}

    def unready(self) -> str:
        return ""
