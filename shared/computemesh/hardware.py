"""What a machine is made of, and the tier that follows from it. Facts only: no probing here.

Tiers are decided by a table of facts (VRAM, compute capability), so a card nobody had heard of when the
table was written still lands where it belongs:

=============  =======================================================  ==============================
tier           at least one GPU with                                    for example
=============  =======================================================  ==============================
``AI_FACTORY``  30 GiB of VRAM and compute capability 8.0 or above      H100, H200, A100 40 GB, RTX 5090
``GPU_PEER``    20 GiB of VRAM                                          RTX 4090, RTX 3090, L4, A10
``GPU_INFRA``   any GPU                                                 RTX 4070, RTX 3060
``CPU_ONLY``    none
=============  =======================================================  ==============================

Thresholds sit below the nominal sizes (32, 24 GiB) because drivers report less than the box says.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final

import msgspec

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
MegaBytes = Annotated[int, msgspec.Meta(ge=0, le=2**40, description="MiB, 1024 × 1024 bytes.")]


class Cpu(Message, frozen=True, kw_only=True):
    model: str = ""
    cores: Count = 0
    """Physical cores; 0 = not told."""
    threads: Count = 0
    """Logical CPUs; 0 = not told."""
    frequency_mhz: float = 0.0


class Memory(Message, frozen=True, kw_only=True):
    total_mb: MegaBytes = 0
    available_mb: MegaBytes = 0
    swap_total_mb: MegaBytes = 0
    swap_free_mb: MegaBytes = 0


class Gpu(Message, frozen=True, kw_only=True):
    index: Count = 0
    name: str = ""
    uuid: str = ""
    vram_total_mb: MegaBytes = 0
    vram_used_mb: MegaBytes = 0
    compute_capability: str = ""
    """``major.minor``, for CUDA devices."""
    error: str = ""
    """What the driver answered when this device could not be read; the other fields are then what is known."""


def tier_of(gpus: Sequence[Gpu]) -> Tier:
    """The tier of a machine with these GPUs: that of its strongest one that works."""
    working = (gpu for gpu in gpus if not gpu.error)
    return max((_tier_of_one(gpu) for gpu in working), key=_RANK.__getitem__, default=Tier.CPU_ONLY)


def _tier_of_one(gpu: Gpu) -> Tier:
    if gpu.vram_total_mb >= 30 * 1024 and _capability(gpu) >= (8, 0):
        return Tier.AI_FACTORY
    if gpu.vram_total_mb >= 20 * 1024:
        return Tier.GPU_PEER
    return Tier.GPU_INFRA


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() and (minor or "0").isdecimal() else (0, 0)
