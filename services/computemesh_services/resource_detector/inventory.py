"""The inventory of a node: put together from what the probes read, and compared with the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from computemesh.contracts.resources import Disk, EngineFound, Inventory, ModelFound, Nic, RdmaPort
from computemesh.hardware import Cpu, Memory, Tier, lasting, tier_of
from computemesh_services.resource_detector.probes import GpuReading


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a machine is made of beside its GPUs, and what is installed on it."""

    hostname: str = ""
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    disks: list[Disk] = field(default_factory=list[Disk])
    nics: list[Nic] = field(default_factory=list[Nic])
    rdma: list[RdmaPort] = field(default_factory=list[RdmaPort])
    engines: list[EngineFound] = field(default_factory=list[EngineFound])
    models: list[ModelFound] = field(default_factory=list[ModelFound])


def assemble(
    node_id: str,
    host: Host,
    reading: GpuReading,
    *,
    tier_override: Tier | None = None,
    warnings: Sequence[str] = (),
) -> Inventory:
    """The inventory of one node. *tier_override* wins over the tier that the GPUs would give; *warnings* are added
    to those of the reading."""
    scripted = reading.machine
    return Inventory(
        node_id=node_id,
        hostname=host.hostname,
        tier=tier_override or tier_of(reading.gpus),
        platform=reading.platform,
        cpu=scripted.cpu or host.cpu,
        memory=scripted.memory or host.memory,
        gpus=list(reading.gpus),
        gpu_links=list(reading.links),
        disks=host.disks,
        nics=host.nics if scripted.nics is None else scripted.nics,
        rdma=host.rdma,
        engines=host.engines,
        models=host.models,
        provider=reading.provider,
        warnings=[*warnings, *reading.warnings],
    )


def differs(before: Inventory, after: Inventory) -> bool:
    """Whether hardware came, went, broke, recovered or changed size, or an engine or a model did.

    How much of it is in use, swap, the CPU's frequency, the host's name and the wording of errors and
    warnings do not count. The tier does, also when only its override changed.
    """
    return _lasting(before) != _lasting(after)


def _lasting(inventory: Inventory) -> Inventory:
    return replace(
        inventory,
        hostname="",
        cpu=replace(inventory.cpu, frequency_mhz=0.0),
        memory=Memory(total_mb=inventory.memory.total_mb),
        gpus=[lasting(gpu) for gpu in inventory.gpus],
        disks=[replace(disk, free_mb=0) for disk in inventory.disks],
        provider="",
        warnings=[],
    )
