"""The shell around the probes: reads the machine in threads, answers, and tells what changed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from msgspec.structs import replace
from prometheus_client import Gauge

from computemesh import log
from computemesh.bus import Bus, BusError, MicroService
from computemesh.contracts import resources
from computemesh.contracts.base import AnyBound, Event, Message, Refused, serve
from computemesh.contracts.resources import Inventory, InventoryGet
from computemesh.edge import Extra
from computemesh.hardware import Gpu
from computemesh.lifecycle import Spawn
from computemesh_services.resource_detector import inventory
from computemesh_services.resource_detector.config import DetectorConfig
from computemesh_services.resource_detector.inventory import Host
from computemesh_services.resource_detector.patience import Answer, Patient
from computemesh_services.resource_detector.probes import GpuProvider, GpuReading, network, software, system

_log = log.get("service")

CPU = Gauge("computemesh_node_cpu_percent", "How busy the CPUs are, all together, 0 to 100.")
MEMORY = Gauge("computemesh_node_memory_available_bytes", "Memory that can be had without swapping.")
SILENT = Gauge("computemesh_gpu_silent_seconds", "For how long the driver of the GPUs has not answered.")

GPU_LABELS: Final = ["gpu"]
GPU_USED = Gauge("computemesh_gpu_memory_used_bytes", "VRAM in use.", GPU_LABELS)
GPU_TOTAL = Gauge("computemesh_gpu_memory_total_bytes", "VRAM there is.", GPU_LABELS)
GPU_BUSY = Gauge("computemesh_gpu_utilization_percent", "How busy a GPU is, 0 to 100.", GPU_LABELS)
GPU_HEAT = Gauge("computemesh_gpu_temperature_celsius", "Temperature of a GPU.", GPU_LABELS)
GPU_POWER = Gauge("computemesh_gpu_power_watts", "What a GPU draws.", GPU_LABELS)
GPU_BROKEN = Gauge("computemesh_gpu_broken", "1 while a GPU cannot be read.", GPU_LABELS)

_MB: Final = 1024 * 1024

M = TypeVar("M", bound=Message)


class ResourceDetector:
    """Tells what this machine is made of. Drivers may block or break; the service goes on."""

    def __init__(self, bus: Bus, config: DetectorConfig, provider: GpuProvider, machine_id: str) -> None:
        self._bus = bus
        self._config = config
        self._machine_id = machine_id
        nothing = GpuReading(provider=provider.name)
        patience_s = config.gpu_patience_s
        self._gpus = Patient(provider.read, initial=nothing, patience_s=patience_s)
        # A reading of its own: what is read often need not ask how the GPUs reach each other.
        self._use = Patient(lambda: provider.read(links=False), initial=nothing, patience_s=patience_s)
        self._host = Patient(self._read_host, initial=Host(hostname=socket.gethostname()), patience_s=patience_s)
        self._latest: Inventory | None = None

    def endpoints(self) -> list[AnyBound]:
        return [serve(resources.INVENTORY, self.on_get, target=self._config.node_id)]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        self._latest = found = await self._read()
        _log.info(
            "detected",
            tier=found.tier,
            platform=found.platform,
            gpus=len(found.gpus),
            cpus=found.cpu.threads,
            provider=found.provider,
        )
        for warning in found.warnings:
            _log.warning("probe", reason=warning)
        spawn(self._watch_hardware())
        spawn(self._publish_load())

    async def drain(self) -> None:
        """Nothing is in hand between two readings."""

    def health(self) -> Mapping[str, Any]:
        found = self._latest
        return {
            "node_id": self._config.node_id,
            "provider": found.provider if found else "",
            "gpus": len(found.gpus) if found else 0,
            "warnings": found.warnings if found else [],
        }

    def unready(self) -> str:
        return "" if self._latest is not None else "reading the hardware"

    async def on_get(self, _: InventoryGet) -> Inventory | Refused:
        self._latest = await self._read()
        return self._latest

    async def _read(self) -> Inventory:
        host, gpus = await asyncio.gather(self._host.get(), self._gpus.get())
        SILENT.set(gpus.silent_s)
        found = inventory.assemble(
            self._config.node_id,
            host.value,
            gpus.value,
            tier_override=self._config.tier,
            warnings=[*_silence("the machine", host), *_silence("the driver of the GPUs", gpus)],
        )
        return replace(found, machine_id=self._machine_id)

    def _read_host(self) -> Host:
        return Host(
            hostname=socket.gethostname(),
            cpu=system.read_cpu(),
            memory=system.read_memory(),
            disks=system.read_disks(),
            nics=network.read_nics(),
            rdma=network.read_rdma(),
            engines=software.read_engines(),
            models=software.read_models(self._config.models),
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
            before = set(self._latest.warnings if self._latest else ())
            self._latest = await self._read()
            for warning in self._latest.warnings:
                if warning not in before:
                    _log.warning("probe", reason=warning)

    async def _publish_load(self) -> None:
        times = system.read_cpu_times()
        while True:
            await asyncio.sleep(self._config.load_interval_s)
            reading = (await self._use.get()).value
            load, times = system.read_load(self._config.node_id, reading.gpus, since=times)
            if reading.machine.memory is not None:
                load = replace(load, memory_available_mb=reading.machine.memory.available_mb)
            CPU.set(load.cpu_percent)
            MEMORY.set(load.memory_available_mb * _MB)
            measure(reading.gpus)
            await self._tell(resources.LOAD, replace(load, machine_id=self._machine_id))

    async def _tell(self, event: Event[M], payload: M) -> None:
        try:
            await self._bus.publish(event, payload, target=self._config.node_id)
        except BusError as error:
            _log.warning("cannot tell", subject=event.subject, reason=str(error))


def _silence(whose: str, answer: Answer[Any]) -> list[str]:
    if not answer.silent_s:
        return []
    return [f"{whose} has not answered for {answer.silent_s:.0f} s; what is told was read before that"]


def measure(gpus: Sequence[Gpu]) -> None:
    """Sets the metrics of these GPUs, and removes those of GPUs that are gone."""
    for gauge in (GPU_USED, GPU_TOTAL, GPU_BUSY, GPU_HEAT, GPU_POWER, GPU_BROKEN):
        gauge.clear()
    for gpu in gpus:
        label = gpu.uuid or str(gpu.index)
        GPU_USED.labels(label).set(gpu.vram_used_mb * _MB)
        GPU_TOTAL.labels(label).set(gpu.vram_total_mb * _MB)
        GPU_BROKEN.labels(label).set(bool(gpu.error))
        for gauge, value in (
            (GPU_BUSY, gpu.utilization_percent),
            (GPU_HEAT, gpu.temperature_c),
            (GPU_POWER, gpu.power_w),
        ):
            if value is not None:
                gauge.labels(label).set(value)
