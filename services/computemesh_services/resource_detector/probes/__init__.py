"""Where GPU facts come from: one provider for each kind of driver, chosen once when the service starts.

A provider answers every read, also when its driver does not: what went wrong is then a warning in the
reading, and the next read tries again. The system's own facts (CPU, memory, disks) are the same on every
platform and live in :mod:`.system`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from computemesh.hardware import Gpu, Platform


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """What a provider found, once."""

    provider: str
    """Name of the provider that read this."""
    platform: Platform = Platform.CPU
    """``CPU`` while no GPU is seen."""
    gpus: list[Gpu] = field(default_factory=list[Gpu])
    warnings: list[str] = field(default_factory=list[str])


class GpuProvider(Protocol):
    """Reads the GPUs of this machine."""

    @property
    def name(self) -> str:
        """As it stands in ``Inventory.provider``."""
        ...

    def read(self) -> GpuReading:
        """The GPUs now. Never raises; it may block for as long as the driver does, so call it in a thread."""
        ...


class NoGpus:
    """The provider of a machine without a GPU, or without a driver that can be asked."""

    name = "none"

    def __init__(self, why: str = "") -> None:
        """*why* becomes a warning: pass it when there may be a GPU all the same."""
        self._warnings = [why] if why else []

    def read(self) -> GpuReading:
        return GpuReading(provider=self.name, warnings=list(self._warnings))


def choose_provider() -> GpuProvider:
    """NVML if its binding is installed and the driver lets itself be initialised, else none."""
    # Each adapter imports this module for its types.
    from computemesh_services.resource_detector.probes import nvml

    return nvml.detect()
