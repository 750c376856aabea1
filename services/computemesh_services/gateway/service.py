"""The shell of the gateway: HTTP on one side, questions on the bus on the other. It keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from computemesh.bus import Bus, MicroService
from computemesh.contracts.base import AnyBound
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh_services.gateway.config import GatewayConfig
from computemesh_services.gateway.tasks_door import TasksDoor
from computemesh_services.gateway.workers_door import WorkersDoor


class Gateway:
    """Lets people and programs in that speak HTTP."""

    def __init__(self, bus: Bus, config: GatewayConfig) -> None:
        self._tasks = TasksDoor(bus)
        self._workers = WorkersDoor(bus, ttl_s=config.heartbeat_ttl_sec)

    def endpoints(self) -> list[AnyBound]:
        return []

    def extras(self) -> list[Extra]:
        return [*self._tasks.routes(), *self._workers.routes()]

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        pass

    async def drain(self) -> None:
        pass

    def health(self) -> Mapping[str, Any]:
        return {}

    def unready(self) -> str:
        return ""
