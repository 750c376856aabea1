"""The inventory of a node: put together from what the probes read, and compared with the one before."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from computemesh.contracts.resources import Disk, Inventory
from computemesh.hardware import Cpu, Gpu, Memory, Tier, tier_of
from computemesh_services.resource_detector.probes import GpuReading


def assemble(
    node_id: str,
    hostname: str,
    cpu: Cpu,
    memory: Memory,
    disks: Sequence[Disk],
    reading: GpuReading,
    *,
    tier_override: Tier | None = None,
) -> Inventory:
    """The inventory of one node. *tier_override* wins over the tier that the GPUs would give."""
    return Inventory(
        node_id=node_id,
        hostname=hostname,
        tier=tier_override or tier_of(reading.gpus),
        platform=reading.platform,
        cpu=cpu,
        memory=memory,
        gpus=list(reading.gpus),
        disks=list(disks),
        provider=reading.provider,
        warnings=list(reading.warnings),
    )


def differs(before: Inventory, after: Inventory) -> bool:
    """Whether hardware came, went, broke, recovered or changed size.

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
        gpus=[_lasting_gpu(gpu) for gpu in inventory.gpus],
        disks=[replace(disk, free_mb=0) for disk in inventory.disks],
        provider="",
        warnings=[],
    )


def _lasting_gpu(gpu: Gpu) -> Gpu:
    return replace(gpu, vram_used_mb=0, error="broken" if gpu.error else "")
