"""Apple GPUs, as macOS's own tools tell of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from computemesh.hardware import Gpu, Memory, Platform
from computemesh.macos import DISPLAYS, KERNEL, parse
from computemesh_services.resource_detector.probes import GpuReading, system

TOOL_S: Final = 30.0
"""How long a tool may take."""

Run = Callable[[Sequence[str]], str]


def run(command: Sequence[str]) -> str:
    """What a tool prints. A status other than 0 is no error: sysctl has it when one name of several is unknown.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be run, or takes too long.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TOOL_S, check=False)
    return done.stdout


class MetalProvider:
    """The GPUs of a Mac. What does not change is asked for once."""

    name = "metal"

    def __init__(
        self,
        *,
        expected: bool = True,
        run: Run = run,
        memory: Callable[[], Memory] = system.read_memory,
        mac: bool = sys.platform == "darwin",
    ) -> None:
        self._expected = expected
        self._run = run
        self._memory = memory
        self._mac = mac
        self._found: list[Gpu] | None = None

    def read(self, *, links: bool = True) -> GpuReading:
        del links  # There is one GPU.
        if not self._mac:
            missing = "Metal GPUs cannot be read: this is not macOS"
            return GpuReading(provider=self.name, warnings=[missing] if self._expected else [])
        try:
            if self._found is None:
                self._found = parse(self._run(DISPLAYS), self._run(KERNEL))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return GpuReading(provider=self.name, warnings=[f"Metal GPUs cannot be read: {error}"])
        memory = self._memory()
        used_mb = max(memory.total_mb - memory.available_mb, 0)
        return GpuReading(
            provider=self.name,
            platform=Platform.METAL if self._found else Platform.CPU,
            gpus=[
                replace(gpu, vram_used_mb=min(used_mb, gpu.vram_total_mb)) if gpu.unified_memory else gpu
                for gpu in self._found
            ],
        )


def provider(*, expected: bool) -> MetalProvider:
    """The provider for this machine."""
    return MetalProvider(expected=expected)
