"""The shell around the probes: reads the machine in a thread, answers, and tells what changed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from prometheus_client import Gauge

from computemesh import log
from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import resources
from computemesh.contracts.base import AnyBound, Event, Message, Refused, serve
from computemesh.contracts.resources import Inventory, InventoryGet
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn
from computemesh_services.resource_detector import inventory
from computemesh_services.resource_detector.config import DetectorConfig
from computemesh_services.resource_detector.probes import GpuProvider, system

_log = log.get("service")

CPU = Gauge("computemesh_node_cpu_percent", "How busy the CPUs are, all together, 0 to 100.")
MEMORY = Gauge("computemesh_node_memory_available_bytes", "Memory that can be had without swapping.")
GPU_USED = Gauge("computemesh_gpu_memory_used_bytes", "VRAM in use.", ["gpu"])
GPU_TOTAL = Gauge("computemesh_gpu_memory_total_bytes", "VRAM there is.", ["gpu"])

_MB: Final = 1024 * 1024

M = TypeVar("M", bound=Message)


class ResourceDetector:
    """Tells what this machine is made of. Drivers may block or break; the service goes on."""

    def __init__(self, bus: Bus, config: DetectorConfig, provider: GpuProvider) -> None:
        self._bus = bus
        self._config = config
        self._provider = provider
        self._latest: Inventory | None = None

    def endpoints(self) -> list[AnyBound]:
        return [serve(resources.INVENTORY, self.on_get, target=self._config.node_id)]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        self._latest = found = await asyncio.to_thread(self._read)
        _log.info("detected", tier=found.tier, platform=found.platform, gpus=len(found.gpus), cpus=found.cpu.threads)
        for warning in found.warnings:
            _log.warning("probe", reason=warning)
        spawn(self._watch_hardware())
        spawn(self._publish_load())

    async def drain(self) -> None:
        """Nothing is in hand between two readings."""

    def health(self) -> Mapping[str, Any]:
        return {"node_id": self._config.node_id, "provider": self._provider.name}

    def unready(self) -> str:
        return "" if self._latest is not None else "reading the hardware"

    async def on_get(self, _: InventoryGet) -> Inventory | Refused:
        self._latest = await asyncio.to_thread(self._read)
        return self._latest

    def _read(self) -> Inventory:
        return inventory.assemble(
            self._config.node_id,
            socket.gethostname(),
            system.read_cpu(),
            system.read_memory(),
            system.read_disks(),
            self._provider.read(),
            tier_override=self._config.tier,
        )

    async def _watch_hardware(self) -> None:
        """Tells the hardware at the start and whenever it changed."""
        told: Inventory | None = None
        while True:
            if self._latest is not None and (told is None or inventory.differs(told, self._latest)):
                if told is not None:
                    _log.warning("hardware changed", tier=self._latest.tier, gpus=len(self._latest.gpus))
                told = self._latest
                await self._tell(resources.CHANGED, told)
            await asyncio.sleep(self._config.inventory_interval_s)
            self._latest = await asyncio.to_thread(self._read)

    async def _publish_load(self) -> None:
        times = system.read_cpu_times()
        while True:
            await asyncio.sleep(self._config.load_interval_s)
            gpus = (await asyncio.to_thread(self._provider.read)).gpus
            load, times = system.read_load(self._config.node_id, gpus, since=times)
            CPU.set(load.cpu_percent)
            MEMORY.set(load.memory_available_mb * _MB)
            for gpu in gpus:
                GPU_USED.labels(gpu.uuid or str(gpu.index)).set(gpu.vram_used_mb * _MB)
                GPU_TOTAL.labels(gpu.uuid or str(gpu.index)).set(gpu.vram_total_mb * _MB)
            await self._tell(resources.LOAD, load)

    async def _tell(self, event: Event[M], payload: M) -> None:
        try:
            await self._bus.publish(event, payload, target=self._config.node_id)
        except BusError as error:
            _log.warning("cannot tell", subject=event.subject, reason=str(error))
