"""Apple GPUs, as macOS's own tools tell of them.

On Apple silicon the GPU works in the machine's memory. It may wire down a part of that: what
``iogpu.wired_limit_mb`` says, or by default three quarters (two thirds up to 36 GiB), which is what is
reported as its VRAM.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from msgspec.structs import replace

from computemesh.hardware import Gpu, Memory, Platform
from computemesh_services.resource_detector.probes import GpuReading, system

BYTES_PER_MB: Final = 1024 * 1024

DISPLAYS: Final = ("/usr/sbin/system_profiler", "SPDisplaysDataType", "-json")
KERNEL: Final = ("/usr/sbin/sysctl", "hw.memsize", "kern.osproductversion", "iogpu.wired_limit_mb")

TOOL_S: Final = 30.0
"""How long a tool may take."""

LARGE_MB: Final = 36 * 1024
"""Machines with more memory than this let the GPU have a larger part of it."""

_CHIP: Final = re.compile(r"Apple M(\d+)")
_FAMILIES: Final = {1: "apple7", 2: "apple8", 3: "apple9", 4: "apple9", 5: "apple10"}
"""Metal's GPU family by the generation of the chip."""
_SIZE: Final = re.compile(r"(\d+) (MB|GB)")

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


def parse(displays: str, kernel: str) -> list[Gpu]:
    """The GPUs that Metal runs on, from what :data:`DISPLAYS` and :data:`KERNEL` print.

    Raises:
        ValueError: it is not what these tools print.
    """
    told: Any = json.loads(displays)
    if not isinstance(told, dict):
        raise ValueError("system_profiler printed something else than its report")
    entries = cast(dict[str, Any], told).get("SPDisplaysDataType", [])
    facts = {name: value.strip() for name, _, value in (line.partition(":") for line in kernel.splitlines())}
    memory_mb = _number(facts.get("hw.memsize", "")) // BYTES_PER_MB
    metal = [entry for entry in entries if "spdisplays_mtlgpufamilysupport" in entry or "spdisplays_metal" in entry]
    return [
        _gpu(index, entry, memory_mb, _number(facts.get("iogpu.wired_limit_mb", "")), facts)
        for index, entry in enumerate(metal)
    ]


def _gpu(index: int, entry: dict[str, Any], memory_mb: int, limit_mb: int, facts: dict[str, str]) -> Gpu:
    name = str(entry.get("sppci_model") or entry.get("_name") or "")
    own = _SIZE.match(str(entry.get("spdisplays_vram", "")))
    chip = _CHIP.match(name)
    return Gpu(
        index=index,
        name=name,
        vram_total_mb=int(own[1]) * (1024 if own[2] == "GB" else 1) if own else limit_mb or usable_mb(memory_mb),
        unified_memory=own is None,
        architecture=_FAMILIES.get(int(chip[1]), "") if chip else "",
        driver=f"macOS {version}" if (version := facts.get("kern.osproductversion", "")) else "",
    )


def usable_mb(memory_mb: int) -> int:
    """How much of a machine's memory its GPU may use, where nobody set a limit."""
    return memory_mb * 3 // 4 if memory_mb > LARGE_MB else memory_mb * 2 // 3


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def provider(*, expected: bool) -> MetalProvider:
    """The provider for this machine."""
    return MetalProvider(expected=expected)
