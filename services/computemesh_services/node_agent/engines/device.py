"""What an engine runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BackendName = Literal["cuda", "rocm", "metal", "sycl", "vulkan", "cpu"]
"""How an engine reaches a device."""


@dataclass(frozen=True, kw_only=True)
class DeviceRef:
    """A device with room for one engine: a GPU, or a set of CPU threads."""

    id: str
    """Names the device on its node, such as ``gpu:0`` or ``cpu:0``."""
    backend: BackendName = "cpu"
    index: int = 0
    """As the backend's own tool counts."""
    name: str = ""
    """As its maker calls it."""
    uuid: str = ""
    """The maker's own number for it; empty where there is none."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """Variables that keep a child process to this device, such as ``CUDA_VISIBLE_DEVICES``."""
    threads: int = 0
    """CPU threads of an engine on it; 0 = chosen from the machine."""
    cpus: tuple[int, ...] = ()
    """Logical CPUs that an engine on it is kept to; empty = all."""


@dataclass(frozen=True, kw_only=True)
class DeviceMetrics:
    """How a device is doing; None is "not known". The memory of a CPU device is the machine's."""

    memory_total_mb: int | None = None
    """MiB."""
    memory_free_mb: int | None = None
    """MiB."""
    utilisation_percent: float | None = None
    """0 to 100."""
    temperature_c: float | None = None
    """Degrees Celsius."""
