"""What a machine is made of, and the tier that follows from it. Facts only: no probing here.

Tiers are decided by a table of facts (VRAM, compute capability, architecture), so a card nobody had heard of
when the table was written still lands where it belongs:

==============  ========================================================  ==============================
tier            at least one GPU with                                     for example
==============  ========================================================  ==============================
``AI_FACTORY``  30 GiB of VRAM and CUDA compute capability 8.0 or above,  H100, H200, A100 40 GB, RTX 5090
                or AMD CDNA 2 or above (gfx90a, gfx94x, gfx95x)           MI210, MI300X
``GPU_PEER``    20 GiB of VRAM                                            RTX 4090, RTX 3090, RX 7900 XTX
``GPU_INFRA``   any GPU                                                   RTX 4070, RTX 3060
``CPU_ONLY``    none
==============  ========================================================  ==============================

Thresholds sit below the nominal sizes (32, 24 GiB) because drivers report less than the box says. Memory that a
GPU shares with its machine counts as far as the GPU may use it, and a slice of a GPU counts as what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from computemesh.contracts.base import Message


class Tier(StrEnum):
    """A machine's class. Accepted in any case, printed in upper case."""

    AI_FACTORY = "AI_FACTORY"
    GPU_PEER = "GPU_PEER"
    GPU_INFRA = "GPU_INFRA"
    CPU_ONLY = "CPU_ONLY"

    @classmethod
    def _missing_(cls, value: object) -> Tier | None:
        upper = value.upper() if isinstance(value, str) else ""
        return cls(upper) if upper != value and upper in cls.__members__ else None

    def at_least(self, least: Tier) -> bool:
        """Whether this tier is *least* or a stronger one."""
        return _RANK[self] >= _RANK[least]


_RANK: Final = {Tier.CPU_ONLY: 0, Tier.GPU_INFRA: 1, Tier.GPU_PEER: 2, Tier.AI_FACTORY: 3}


class Platform(StrEnum):
    """What accelerates this machine. Accepted in any case, printed in upper case."""

    CUDA = "CUDA"
    ROCM = "ROCM"
    METAL = "METAL"
    CPU = "CPU"

    @classmethod
    def _missing_(cls, value: object) -> Platform | None:
        upper = value.upper() if isinstance(value, str) else ""
        return cls(upper) if upper != value and upper in cls.__members__ else None


Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
ByteCount = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
MegaBytes = Annotated[int, msgspec.Meta(ge=0, le=2**40, description="MiB, 1024 × 1024 bytes.")]
ToldGiB = Annotated[float, msgspec.Meta(ge=0, le=2**30, description="GiB.")]
ToldMiB = Annotated[float, msgspec.Meta(ge=0, le=2**40, description="MiB.")]


class Cpu(Message, frozen=True, kw_only=True):
    model: str = ""
    cores: Count = 0
    """Physical cores; 0 = not told."""
    threads: Count = 0
    """Logical CPUs; 0 = not told."""
    frequency_mhz: float = 0.0
    sockets: Count = 0
    """0 = not told."""
    numa_nodes: Count = 0
    """0 = not told."""
    architecture: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """``x86_64``, ``aarch64``, ``arm64`` …"""
    features: Annotated[list[Annotated[str, msgspec.Meta(max_length=63)]], msgspec.Meta(max_length=100)] = []
    """Instructions that inference gains from, such as ``avx2``, ``amx_int8``, ``i8mm``; as the kernel calls them."""


class Memory(Message, frozen=True, kw_only=True):
    total_mb: MegaBytes = 0
    available_mb: MegaBytes = 0
    swap_total_mb: MegaBytes = 0
    swap_free_mb: MegaBytes = 0
    total_gb: ToldGiB | UnsetType = UNSET
    """Another spelling of `total_mb`, which counts where both are given."""
    available_gb: ToldGiB | UnsetType = UNSET
    """Another spelling of `available_mb`."""


class GpuProcess(Message, frozen=True, kw_only=True):
    """A process that holds memory of a GPU."""

    pid: Annotated[int, msgspec.Meta(ge=0, le=2**32)]
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    memory_mb: MegaBytes | None = None
    """Left out where the driver does not tell it per process."""
    reservation_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """The GPU reservation it was started under, by its environment variable ``COMPUTEMESH_RESERVATION_ID``."""


class Gpu(Message, frozen=True, kw_only=True):
    """A GPU, or one MIG slice of it: what programs see as one device."""

    index: Count = 0
    name: str = ""
    uuid: str = ""
    vram_total_mb: MegaBytes = 0
    vram_used_mb: MegaBytes = 0
    compute_capability: str = ""
    """``major.minor``, for CUDA devices."""
    architecture: str = ""
    """What code is compiled for, where that is no compute capability: ``gfx942``, ``apple8``."""
    driver: str = ""
    """Version of the driver."""
    pci_bus_id: str = ""
    pcie_generation: Count = 0
    """Of the link as it could be; 0 = not told."""
    pcie_lanes: Count = 0
    numa_node: Count | None = None
    unified_memory: bool = False
    """Its memory is the machine's memory."""
    mig_parent: str = ""
    """UUID of the GPU this is a slice of."""
    mig_profile: str = ""
    """Size of the slice, as in ``1g.10gb``."""
    utilization_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    temperature_c: float | None = None
    power_w: Annotated[float, msgspec.Meta(ge=0)] | None = None
    processes: Annotated[list[GpuProcess], msgspec.Meta(max_length=1000)] | None = None
    """Who holds its memory; left out where the driver does not tell."""
    error: str = ""
    """What the driver answered when this device could not be read; the other fields are then what is known."""
    vram_gb: ToldGiB | UnsetType = UNSET
    """Another spelling of `vram_total_mb`, which counts where both are given."""
    vram_mb: ToldMiB | UnsetType = UNSET
    """Another spelling of `vram_total_mb`."""
    total_vram_mb: ToldMiB | UnsetType = UNSET
    """Another spelling of `vram_total_mb`."""


class GpuUse(Message, frozen=True, kw_only=True):
    """How much of a GPU is in use now, as heartbeats carry it."""

    index: Count
    uuid: str = ""
    vram_used_mb: MegaBytes = 0
    utilization_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    processes: Annotated[list[GpuProcess], msgspec.Meta(max_length=1000)] | None = None
    error: str = ""


class LinkKind(StrEnum):
    """How two GPUs reach each other, best first. The PCIe distances have the names that nvidia-smi uses."""

    NVLINK = "NVLINK"
    XGMI = "XGMI"
    """AMD Infinity Fabric."""
    PIX = "PIX"
    """Through one PCIe switch."""
    PXB = "PXB"
    """Through several PCIe switches."""
    PHB = "PHB"
    """Through a PCIe host bridge."""
    NODE = "NODE"
    """Through several host bridges of one NUMA node."""
    SYS = "SYS"
    """Across NUMA nodes."""


class GpuLink(Message, frozen=True, kw_only=True):
    """How the GPUs with these two indices reach each other; each pair stands once, *a* below *b*."""

    a: Count
    b: Count
    kind: LinkKind
    lanes: Count = 0
    """NVLink or Infinity Fabric links between the two."""


def canonical(memory: Memory | None, gpus: Sequence[Gpu]) -> tuple[Memory | None, list[Gpu]]:
    """Hardware as others tell it, in the declared fields alone: sizes in GiB become MiB, other spellings go.

    A declared field that is not 0 counts against any other spelling. GPUs of which none says its index are
    numbered by their place.
    """
    placeless = len(gpus) > 1 and not any(gpu.index for gpu in gpus)
    return memory and _canonical_memory(memory), [
        _canonical_gpu(replace(gpu, index=place) if placeless else gpu) for place, gpu in enumerate(gpus)
    ]


def _canonical_memory(told: Memory) -> Memory:
    if told.total_gb is UNSET and told.available_gb is UNSET:
        return told
    return replace(
        told,
        total_mb=told.total_mb or _mib(told.total_gb, 1024),
        available_mb=told.available_mb or _mib(told.available_gb, 1024),
        total_gb=UNSET,
        available_gb=UNSET,
    )


def _canonical_gpu(told: Gpu) -> Gpu:
    if told.vram_gb is UNSET and told.vram_mb is UNSET and told.total_vram_mb is UNSET:
        return told
    total_mb = told.vram_total_mb or _mib(told.total_vram_mb) or _mib(told.vram_mb) or _mib(told.vram_gb, 1024)
    return replace(told, vram_total_mb=total_mb, vram_gb=UNSET, vram_mb=UNSET, total_vram_mb=UNSET)


def _mib(value: float | UnsetType, unit: int = 1) -> int:
    return 0 if value is UNSET else round(value * unit)


def tier_of(gpus: Sequence[Gpu]) -> Tier:
    """The tier of a machine with these GPUs: that of its strongest one that works."""
    working = (gpu for gpu in gpus if not gpu.error)
    return max((_tier_of_one(gpu) for gpu in working), key=_RANK.__getitem__, default=Tier.CPU_ONLY)


def _tier_of_one(gpu: Gpu) -> Tier:
    if gpu.vram_total_mb >= 30 * 1024 and (_capability(gpu) >= (8, 0) or gpu.architecture.startswith(_CDNA)):
        return Tier.AI_FACTORY
    if gpu.vram_total_mb >= 20 * 1024:
        return Tier.GPU_PEER
    return Tier.GPU_INFRA


_CDNA: Final = ("gfx90a", "gfx94", "gfx95")
"""CDNA 2, 3 and 4: AMD's accelerators with bf16 matrix units."""


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() and (minor or "0").isdecimal() else (0, 0)


def lasting(gpu: Gpu) -> Gpu:
    """What stays while a GPU works: everything but its use, its heat and the wording of its error."""
    return replace(
        gpu,
        vram_used_mb=0,
        utilization_percent=None,
        temperature_c=None,
        power_w=None,
        processes=None,
        error="broken" if gpu.error else "",
    )


PROCESSES_TOLD_MAX: Final = 64
"""A node that runs more GPU processes than this keeps them to itself in heartbeats; the inventory has them."""


def use_of(gpus: Sequence[Gpu]) -> list[GpuUse]:
    """What heartbeats say of these GPUs."""
    few = sum(len(gpu.processes or ()) for gpu in gpus) <= PROCESSES_TOLD_MAX
    return [
        GpuUse(
            index=gpu.index,
            uuid=gpu.uuid,
            vram_used_mb=gpu.vram_used_mb,
            utilization_percent=gpu.utilization_percent,
            processes=gpu.processes if few else None,
            error=gpu.error,
        )
        for gpu in gpus
    ]
