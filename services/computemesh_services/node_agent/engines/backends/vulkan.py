"""GPUs of any maker, as ``vulkaninfo`` tells of them.

Not counted are renderers in software, and the GPU in a processor beside a card. A card with two drivers is one device,
through the driver that llama.cpp prefers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from computemesh_services.node_agent.engines.backends import (
    BYTES_PER_MB,
    HIDE_CUDA,
    HIDE_ROCM,
    Found,
    megabytes,
    narrowed,
)
from computemesh_services.node_agent.engines.backends.tool import Run, ToolError, run
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

SUMMARY: Final = ("vulkaninfo", "--summary")
FULL: Final = ("vulkaninfo",)
"""Tells memory as well, in many more lines."""

PREFERRED: Final = (
    "DRIVER_ID_MESA_RADV",
    "DRIVER_ID_INTEL_OPEN_SOURCE_MESA",
    "DRIVER_ID_NVIDIA_PROPRIETARY",
    "DRIVER_ID_AMD_OPEN_SOURCE",
)
"""Of two drivers for a card the one that stands here, or first."""

NO_GPU: Final = "ERROR_INCOMPATIBLE_DRIVER"
"""What the loader says when there is no driver at all."""

_GPU: Final = re.compile(r"GPU(\d+):\s*$")
_FACT: Final = re.compile(r"\s+(\w+)\s*=\s*(.*?)\s*$")
_HEAP: Final = re.compile(r"\s+memoryHeaps\[\d+\]:")
_DIGITS: Final = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device in the list of ``vulkaninfo``."""

    index: int
    name: str
    kind: str
    """Such as ``DISCRETE_GPU``."""
    uuid: str
    driver: str

    @property
    def rank(self) -> int:
        return PREFERRED.index(self.driver) if self.driver in PREFERRED else len(PREFERRED)


def parse_summary(text: str) -> list[Card]:
    """All devices in the output of :data:`SUMMARY`, renderers in software among them."""
    found: list[tuple[int, dict[str, str]]] = []
    for line in text.partition("\nDevices:\n")[2].splitlines():
        if (start := _GPU.match(line)) is not None:
            found.append((int(start[1]), {}))
        elif found and (fact := _FACT.match(line)) is not None:
            found[-1][1][fact[1]] = fact[2]
    return [
        Card(
            index=index,
            name=facts.get("deviceName", "GPU"),
            kind=facts.get("deviceType", "").removeprefix("PHYSICAL_DEVICE_TYPE_"),
            uuid=facts.get("deviceUUID", ""),
            driver=facts.get("driverID", ""),
        )
        for index, facts in found
    ]


def parse_memory(text: str) -> dict[int, DeviceMetrics]:
    """The memory of each device, in the output of :data:`FULL`: its largest heap of its own, and what this machine's
    processes leave of that, where the driver tells it."""
    found: dict[int, DeviceMetrics] = {}
    index: int | None = None
    heap: dict[str, int] = {}
    for line in text.partition("\nDevice Properties and Extensions:\n")[2].splitlines():
        if (start := _GPU.match(line)) is not None:
            index, heap = int(start[1]), {}
        elif index is None:
            continue
        elif _HEAP.match(line):
            heap = {}
        elif (fact := _FACT.match(line)) is not None and fact[1] in ("size", "budget"):
            if (digits := _DIGITS.match(fact[2])) is not None:
                heap[fact[1]] = int(digits[0])
        elif line.strip() == "MEMORY_HEAP_DEVICE_LOCAL_BIT" and "size" in heap:
            total = megabytes(heap["size"], per_mb=BYTES_PER_MB) or 0
            before = found.get(index)
            if before is None or total > (before.memory_total_mb or 0):
                # A budget of 0 is that of a driver that counts nothing.
                free = megabytes(heap["budget"], per_mb=BYTES_PER_MB) if heap.get("budget") else None
                found[index] = DeviceMetrics(memory_total_mb=total, memory_free_mb=free)
    return found


def devices_of(cards: list[Card]) -> list[DeviceRef]:
    """The devices, each with what keeps a process to it."""
    gpus = [card for card in cards if card.kind.endswith("_GPU")]
    own = [card for card in gpus if card.kind != "INTEGRATED_GPU"] or gpus
    best: dict[str, Card] = {}
    for card in own:
        key = card.uuid or f"number {card.index}"
        best[key] = min(best.get(key, card), card, key=lambda one: one.rank)
    return [
        DeviceRef(
            id=f"gpu:{card.index}",
            backend="vulkan",
            index=card.index,
            name=card.name,
            uuid=card.uuid,
            environment={"GGML_VK_VISIBLE_DEVICES": str(card.index)} | HIDE_CUDA | HIDE_ROCM,
        )
        for card in best.values()
    ]


@dataclass
class Vulkan:
    """The GPUs that Vulkan reaches."""

    run: Run = run
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    name: Final = "vulkan"

    def discover(self) -> Found:
        try:
            said = self.run(SUMMARY)
            if said.status != 0 and NO_GPU in said.error + said.out:
                return Found()
            devices = devices_of(parse_summary(said.checked()))
        except ToolError as error:
            return Found(warnings=() if error.missing else (f"no GPUs by Vulkan: {error}",))
        return narrowed(Found(devices=tuple(devices)), self.environ, "GGML_VK_VISIBLE_DEVICES")

    def metrics(self) -> dict[str, DeviceMetrics]:
        try:
            found = parse_memory(self.run(FULL).checked())
        except ToolError:
            return {}
        return {f"gpu:{index}": metrics for index, metrics in found.items()}
