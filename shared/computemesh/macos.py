"""What macOS's own tools print about the GPUs of a Mac. Pure.

On Apple silicon the GPU works in the machine's memory. It may wire down a part of that: what
``iogpu.wired_limit_mb`` says, or by default three quarters (two thirds up to 36 GiB), which is what is
reported as its VRAM.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, cast

from computemesh.hardware import Gpu

BYTES_PER_MB: Final = 1024 * 1024

DISPLAYS: Final = ("/usr/sbin/system_profiler", "SPDisplaysDataType", "-json")
KERNEL: Final = ("/usr/sbin/sysctl", "hw.memsize", "kern.osproductversion", "iogpu.wired_limit_mb")

LARGE_MB: Final = 36 * 1024
"""Machines with more memory than this let the GPU have a larger part of it."""

_CHIP: Final = re.compile(r"Apple M(\d+)")
_FAMILIES: Final = {1: "apple7", 2: "apple8", 3: "apple9", 4: "apple9", 5: "apple10"}
"""Metal's GPU family by the generation of the chip."""
_SIZE: Final = re.compile(r"(\d+) (MB|GB)")


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
