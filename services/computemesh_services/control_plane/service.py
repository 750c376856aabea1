"""The shell: engines, peers and NanoCtrl's door in one process, of which any number may run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from computemesh.bus import Bus, MicroService
from computemesh.contracts.base import AnyBound
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh_services.control_plane.config import ControlPlaneConfig
from computemesh_services.control_plane.engine_desk import EngineDesk
from computemesh_services.control_plane.nanoctrl_door import NanoCtrlDoor
from computemesh_services.control_plane.peer_desk import PeerDesk


class ControlPlane:
    """Every replica writes, by compare-and-set; the one that holds the lease tells what changed."""

    def __init__(self, bus: Bus, config: ControlPlaneConfig, instance: str) -> None:
        self._bus = bus
        self._engines = EngineDesk(bus, instance, config.entity_ttl_s)
        self._peers = PeerDesk(bus, self._engines.ledger, config.entity_ttl_s)
        self._door = NanoCtrlDoor(
            self._engines,
            self._peers,
            nats_url=config.nats_url,
            public_address=config.public_nats_address,
            away=self._away,
        )

    def endpoints(self) -> list[AnyBound]:
        return [*self._engines.endpoints(), *self._peers.endpoints()]

    def extras(self) -> list[Extra]:
        return self._door.routes()

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        await self._engines.start(spawn)
        await self._peers.start(spawn)

    async def drain(self) -> None:
        await self._engines.drain()
        await self._peers.drain()

    def health(self) -> Mapping[str, Any]:
        return {**self._engines.health(), **self._peers.health()}

    def unready(self) -> str:
        return self._engines.unready() or self._peers.unready()

    def _away(self) -> str:
        return "no connection to NATS" if not self._bus.up else self.unready()
