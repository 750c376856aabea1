"""Where GPU facts come from: one provider for each kind of driver.

A provider answers every read, also when its driver does not: what went wrong is then a warning in the
reading, and the next read tries again. The system's own facts (CPU, memory, disks, network) are the same on
every platform and live in :mod:`.system` and :mod:`.network`; what is installed lives in :mod:`.software`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from computemesh.contracts.resources import Nic
from computemesh.hardware import Cpu, Gpu, GpuLink, Memory, Platform


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts that a scripted machine tells instead of the real one; None = as they are."""

    cpu: Cpu | None = None
    memory: Memory | None = None
    nics: list[Nic] | None = None


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """What a provider found, once."""

    provider: str
    """Name of the provider that read this."""
    platform: Platform = Platform.CPU
    """``CPU`` while no GPU is seen."""
    gpus: list[Gpu] = field(default_factory=list[Gpu])
    links: list[GpuLink] = field(default_factory=list[GpuLink])
    """Empty also when they were not asked for."""
    warnings: list[str] = field(default_factory=list[str])
    machine: Machine = Machine()


class GpuProvider(Protocol):
    """Reads the GPUs of this machine."""

    @property
    def name(self) -> str:
        """As it stands in ``Inventory.provider``."""
        ...

    def read(self, *, links: bool = True) -> GpuReading:
        """The GPUs now. Never raises; it may block for as long as the driver does, so call it in a thread.

        Args:
            links: read how the GPUs reach each other as well, which takes many questions to the driver.
        """
        ...


class NoGpus:
    """The provider of a machine without a GPU, or without a driver that can be asked."""

    def __init__(self, name: str = "none", why: str = "") -> None:
        """*why* becomes a warning: pass it when there may be a GPU all the same."""
        self.name = name
        self._warnings = [why] if why else []

    def read(self, *, links: bool = True) -> GpuReading:
        del links
        return GpuReading(provider=self.name, warnings=list(self._warnings))
