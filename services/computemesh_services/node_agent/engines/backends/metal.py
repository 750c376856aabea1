"""The GPU of a Mac, as macOS's own tools tell of it.

Metal gives a process its default device, so there is one device here; on a Mac with two it is the one with memory of
its own.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Final

from computemesh.hardware import Gpu
from computemesh.macos import DISPLAYS, KERNEL, parse
from computemesh_services.node_agent.engines.backends import (
    BYTES_PER_MB,
    Found,
    MachineMemory,
    free_of,
    megabytes,
    percent,
)
from computemesh_services.node_agent.engines.backends.cpu import machine_memory
from computemesh_services.node_agent.engines.backends.tool import Run, ToolError, run
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

ACCELERATORS: Final = ("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")

_BUSY: Final = re.compile(r'"Device Utilization %"=(\d+)')
_USED: Final = re.compile(r'"vramUsedBytes"=(\d+)')
"""Only of GPUs with memory of their own."""


@dataclass
class Metal:
    """The GPU that Metal runs on."""

    run: Run = run
    memory: MachineMemory | None = None
    mac: bool = sys.platform == "darwin"

    name: Final = "metal"

    def __post_init__(self) -> None:
        self._gpu: Gpu | None = None

    def discover(self) -> Found:
        if not self.mac:
            return Found()
        try:
            # sysctl fails when one name of several is unknown, and tells of the others all the same.
            gpus = parse(self.run(DISPLAYS).checked(), self.run(KERNEL).out)
        except (ToolError, ValueError) as error:
            return Found(warnings=(f"no Apple GPU: {error}",))
        if not gpus:
            return Found()
        self._gpu = next((gpu for gpu in gpus if not gpu.unified_memory), gpus[0])
        return Found(devices=(DeviceRef(id="gpu:0", backend="metal", name=self._gpu.name),))

    def metrics(self) -> dict[str, DeviceMetrics]:
        gpu = self._gpu
        if gpu is None:
            return {}
        try:
            told = self.run(ACCELERATORS).checked()
        except ToolError:
            told = ""
        total_mb = gpu.vram_total_mb
        if gpu.unified_memory:
            _, available_mb = (self.memory or machine_memory)()
            free_mb: int | None = min(available_mb, total_mb)
        else:
            free_mb = free_of(total_mb, parse_used_mb(told))
        return {
            "gpu:0": DeviceMetrics(
                memory_total_mb=total_mb, memory_free_mb=free_mb, utilisation_percent=parse_busy(told)
            )
        }


def parse_busy(text: str) -> float | None:
    """How busy the busiest GPU is, in percent, from the output of :data:`ACCELERATORS`."""
    return max((value for one in _BUSY.findall(text) if (value := percent(one)) is not None), default=None)


def parse_used_mb(text: str) -> int | None:
    """Memory in use of the GPU that has its own, in MiB, from the output of :data:`ACCELERATORS`."""
    found = _USED.search(text)
    return megabytes(found[1], per_mb=BYTES_PER_MB) if found else None
