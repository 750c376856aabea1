"""NVIDIA GPUs, as ``nvidia-smi`` tells of them.

A GPU that is split (MIG) is its instances: CUDA gives a process one of these at most. GPUs without memory of their own
(GB10, Jetson) work in the machine's.
"""

from __future__ import annotations

import csv
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree

from computemesh_services.node_agent.engines.backends import (
    HIDE_ROCM,
    HIDE_VULKAN,
    Found,
    MachineMemory,
    megabytes,
    narrowed,
    number,
    percent,
)
from computemesh_services.node_agent.engines.backends.cpu import machine_memory
from computemesh_services.node_agent.engines.backends.tool import Run, ToolError, run
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

FIELDS: Final = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.free",
    "utilization.gpu",
    "temperature.gpu",
    "mig.mode.current",
)
OLD_FIELDS: Final = FIELDS[:-1]
"""What drivers before 450 know."""


def _query(fields: Sequence[str]) -> tuple[str, ...]:
    return ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")


QUERY: Final = _query(FIELDS)
OLD_QUERY: Final = _query(OLD_FIELDS)
LIST: Final = ("nvidia-smi", "-L")
DETAILS: Final = ("nvidia-smi", "-q", "-x")
"""In XML; the only place where the memory of MIG instances stands."""

_UNKNOWN: Final = frozenset({"n/a", "[n/a]", "not supported", "[not supported]", ""})
_GPU: Final = re.compile(r"GPU (\d+): .*\(UUID: (\S+)\)")
_INSTANCE: Final = re.compile(r"\s+MIG\s+(\S+)\s+Device\s+(\d+):\s+\(UUID:\s+(\S+)\)")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A line of :data:`QUERY`."""

    index: int
    uuid: str
    name: str
    metrics: DeviceMetrics
    split: bool = False
    """In MIG mode: only its instances can be used."""
    fault: str = ""
    """Why it cannot be used, as the driver says it."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A part of a GPU (MIG)."""

    gpu: int
    """Index of its GPU."""
    index: int
    profile: str
    """Its size, such as ``1g.10gb``."""
    uuid: str

    @property
    def id(self) -> str:
        return f"gpu:{self.gpu}.{self.index}"


def parse_cards(text: str) -> tuple[list[Card], list[str]]:
    """The GPUs in the output of :data:`QUERY`, and the lines in it that are something else."""
    cards: list[Card] = []
    strange: list[str] = []
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(cells) not in (len(FIELDS), len(OLD_FIELDS)) or not cells[0].strip().isdecimal():
            if any(cell.strip() for cell in cells):
                strange.append(", ".join(cells).strip())
            continue
        index, uuid, name, total, free, busy, temperature = (cell.strip() for cell in cells[: len(OLD_FIELDS)])
        metrics = DeviceMetrics(
            memory_total_mb=megabytes(total),
            memory_free_mb=megabytes(free),
            utilisation_percent=percent(busy),
            temperature_c=number(temperature),
        )
        broken = number(total) is None and total.lower() not in _UNKNOWN
        cards.append(
            Card(
                index=int(index),
                uuid=uuid if uuid.startswith("GPU-") else "",
                name=name,
                metrics=metrics,
                split=cells[-1].strip() == "Enabled",
                fault=total.strip("[]") if broken else "",
            )
        )
    return cards, strange


def parse_instances(text: str) -> list[Instance]:
    """The MIG instances in the output of :data:`LIST`."""
    found: list[Instance] = []
    gpu: int | None = None
    for line in text.splitlines():
        if (card := _GPU.match(line)) is not None:
            gpu = int(card[1])
        elif gpu is not None and (part := _INSTANCE.match(line)) is not None:
            found.append(Instance(gpu=gpu, index=int(part[2]), profile=part[1], uuid=part[3]))
    return found


def parse_parts(text: str) -> dict[tuple[str, int], DeviceMetrics]:
    """How MIG instances are doing, by the uuid of their GPU and their index on it, from what :data:`DETAILS` prints.

    Raises:
        ValueError: it is no XML.
    """
    try:
        # The driver's own tool wrote it, and Python's parser fetches nothing that a document names.
        root = ElementTree.fromstring(text)  # noqa: S314
    except ElementTree.ParseError as error:
        raise ValueError(f"nvidia-smi -q -x printed no XML: {error}") from None
    found: dict[tuple[str, int], DeviceMetrics] = {}
    for gpu in root.iter("gpu"):
        temperature_c = number((gpu.findtext("temperature/gpu_temp") or "").removesuffix(" C"))
        for part in gpu.iter("mig_device"):
            index = number(part.findtext("index"))
            if index is not None:
                found[gpu.findtext("uuid", "").strip(), int(index)] = DeviceMetrics(
                    memory_total_mb=_mib(part.findtext("fb_memory_usage/total")),
                    memory_free_mb=_mib(part.findtext("fb_memory_usage/free")),
                    temperature_c=temperature_c,
                )
    return found


def _mib(text: str | None) -> int | None:
    return megabytes((text or "").removesuffix(" MiB"))


@dataclass
class Cuda:
    """NVIDIA's GPUs."""

    run: Run = run
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    memory: MachineMemory = machine_memory

    name: Final = "cuda"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._instances: dict[str, tuple[str, int]] = {}
        """The MIG instances found, by id: the uuid of their GPU and their index on it."""

    def discover(self) -> Found:
        try:
            cards, strange = self._cards()
            instances = parse_instances(self.run(LIST).out) if any(card.split for card in cards) else []
        except ToolError as error:
            return Found(warnings=() if error.missing else (f"no NVIDIA GPUs: {error}",))
        with self._lock:
            uuids = {card.index: card.uuid for card in cards}
            self._instances = {one.id: (uuids.get(one.gpu, ""), one.index) for one in instances}
        warnings = [f"nvidia-smi: {line}" for line in strange if not line.startswith("No devices were found")]
        devices: list[DeviceRef] = []
        for card in cards:
            parts = [_instance(one, card) for one in instances if one.gpu == card.index]
            if card.fault:
                warnings.append(f"GPU {card.index} ({card.name}) cannot be used: {card.fault}")
            elif card.split and not parts:
                warnings.append(f"GPU {card.index} ({card.name}) is in MIG mode and has no instances")
            else:
                devices += parts if card.split else [_card(card)]
        found = Found(devices=tuple(devices), warnings=tuple(warnings))
        return narrowed(found, self.environ, "CUDA_VISIBLE_DEVICES")

    def metrics(self) -> dict[str, DeviceMetrics]:
        try:
            cards, _ = self._cards()
        except ToolError:
            return {}
        found = {f"gpu:{card.index}": self._whole(card.metrics) for card in cards if not card.fault}
        with self._lock:
            instances = dict(self._instances)
        if instances:
            try:
                parts = parse_parts(self.run(DETAILS).checked())
            except (ToolError, ValueError):
                return found
            found |= {name: parts[place] for name, place in instances.items() if place in parts}
        return found

    def _cards(self) -> tuple[list[Card], list[str]]:
        """The GPUs, and what else the tool printed: it tells what it can when one of several GPUs is lost.

        Raises:
            ToolError: it tells of no GPU, and failed.
        """
        said = self.run(QUERY)
        if said.status != 0 and "not a valid field" in said.out + said.error:
            said = self.run(OLD_QUERY)
        cards, strange = parse_cards(said.out)
        if said.status != 0 and not cards:
            raise ToolError(said.complaint)
        return cards, strange

    def _whole(self, metrics: DeviceMetrics) -> DeviceMetrics:
        """With the machine's memory for a GPU that has none of its own."""
        if metrics.memory_total_mb is not None:
            return metrics
        total, available = self.memory()
        return DeviceMetrics(
            memory_total_mb=total,
            memory_free_mb=available,
            utilisation_percent=metrics.utilisation_percent,
            temperature_c=metrics.temperature_c,
        )


def _card(card: Card) -> DeviceRef:
    # Without a uuid a number has to do, in the order of nvidia-smi; CUDA's own is by speed.
    pin = (
        {"CUDA_VISIBLE_DEVICES": card.uuid}
        if card.uuid
        else {"CUDA_VISIBLE_DEVICES": str(card.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    )
    return DeviceRef(
        id=f"gpu:{card.index}",
        backend="cuda",
        index=card.index,
        name=card.name,
        uuid=card.uuid,
        environment=pin | HIDE_ROCM | HIDE_VULKAN,
    )


def _instance(one: Instance, card: Card) -> DeviceRef:
    return DeviceRef(
        id=one.id,
        backend="cuda",
        index=one.gpu,
        name=f"{card.name} MIG {one.profile}",
        uuid=one.uuid,
        environment={"CUDA_VISIBLE_DEVICES": one.uuid} | HIDE_ROCM | HIDE_VULKAN,
    )
