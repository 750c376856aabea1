"""Intel GPUs, as ``xpu-smi`` tells of them, or ``sycl-ls`` where only oneAPI is installed.

``xpu-smi`` numbers GPUs in the order of the PCI bus; an engine is told to count alike. ``sycl-ls`` counts as the engine
does by default, and knows no memory.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from computemesh.yamltext import is_list, is_mapping
from computemesh_services.node_agent.engines.backends import (
    BYTES_PER_MB,
    HIDE_VULKAN,
    Found,
    free_of,
    megabytes,
    narrowed,
    number,
    percent,
)
from computemesh_services.node_agent.engines.backends.tool import Run, ToolError, run
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

DISCOVERY: Final = ("xpu-smi", "discovery", "-j")
SYCL_LS: Final = ("sycl-ls",)

ONLY: Final = {"ONEAPI_DEVICE_SELECTOR": "level_zero:0"}
"""The one that the mask leaves."""

_LEVEL_ZERO: Final = re.compile(r"\[(?:ext_oneapi_)?level_zero:gpu(?:\]\[level_zero)?:(\d+)\]\s*(.*)")
_VERSION: Final = re.compile(r"(?:\s+\d+(?:\.\d+)+)?\s*(?:\[[^\[\]]*\])?$")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as ``xpu-smi`` tells of it."""

    index: int
    name: str
    uuid: str
    pci: str
    """Such as ``0000:03:00.0``; empty when it is not told."""
    virtual: bool = False
    """A share of a GPU, for a virtual machine."""


def details(index: int) -> tuple[str, ...]:
    """The command that tells how much memory a GPU has."""
    return ("xpu-smi", "discovery", "-d", str(index), "-j")


def dump(indices: Sequence[int]) -> tuple[str, ...]:
    """The command that tells, once, how busy and warm GPUs are and what of their memory is used."""
    return ("xpu-smi", "dump", "-d", ",".join(map(str, indices)), "-m", "0,3,18", "-n", "1")


def parse_discovery(text: str) -> list[Card]:
    """The GPUs in the output of :data:`DISCOVERY`.

    Raises:
        ValueError: it says something else, such as an error.
    """
    told = _object(text)
    listed = told.get("device_list")
    if not is_list(listed):
        raise ValueError(str(told.get("error") or "it printed something else than a list of devices"))
    return [
        Card(
            index=int(index),
            name=str(one.get("device_name") or "Intel GPU"),
            uuid=str(one.get("uuid") or ""),
            pci=str(one.get("pci_bdf_address") or ""),
            virtual=str(one.get("device_function_type") or one.get("function_type") or "").lower() == "virtual",
        )
        for one in listed
        if is_mapping(one) and (index := number(one.get("device_id"))) is not None
    ]


def parse_total_mb(text: str) -> int | None:
    """A GPU's memory in MiB, from what :func:`details` prints; None when it is not told."""
    try:
        told = _object(text)
    except ValueError:
        return None
    exact = megabytes(told.get("memory_physical_size_byte"), per_mb=BYTES_PER_MB)
    return exact or megabytes(str(told.get("memory_physical_size") or "").removesuffix("MiB"))


def parse_dump(text: str, totals: Mapping[int, int | None]) -> dict[int, DeviceMetrics]:
    """How GPUs are doing, from the output of :func:`dump`: the last line of each. What a GPU has no sensor for, or
    what only root may see, reads ``N/A`` or nothing.

    Args:
        totals: memory of the GPUs in MiB.
    """
    found: dict[int, DeviceMetrics] = {}
    columns: list[str] = []
    for cells in ([cell.strip() for cell in row] for row in csv.reader(text.splitlines())):
        if "DeviceId" in cells:
            columns = cells
        elif len(cells) == len(columns):
            facts = dict(zip(columns, cells, strict=True))
            index = number(facts.get("DeviceId"))
            if index is not None:
                total = totals.get(int(index))
                found[int(index)] = DeviceMetrics(
                    memory_total_mb=total,
                    memory_free_mb=free_of(total, megabytes(facts.get("GPU Memory Used (MiB)"))),
                    utilisation_percent=percent(facts.get("GPU Utilization (%)")),
                    temperature_c=number(facts.get("GPU Core Temperature (Celsius Degree)")),
                )
    return found


def parse_sycl_ls(text: str) -> list[DeviceRef]:
    """The GPUs that Level Zero reaches, in the output of :data:`SYCL_LS`."""
    found: list[DeviceRef] = []
    for line in text.splitlines():
        if (told := _LEVEL_ZERO.match(line.strip())) is None:
            continue
        name = _VERSION.sub("", told[2].partition(", ")[2] or told[2])
        found.append(_device(int(told[1]), name.strip() or "Intel GPU", "", {}))
    return found


def devices_of(cards: Sequence[Card]) -> list[DeviceRef]:
    """The devices, each with what keeps a process to it. The GPU in a processor is none beside a card, nor is a share
    of a GPU beside the whole."""
    whole = [card for card in cards if not card.virtual] or list(cards)
    own = [card for card in whole if not card.pci.startswith("0000:00:")] or whole
    # Masks count cards, not the tiles in them, and in the order of the PCI bus as xpu-smi does.
    order = {"ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1", "ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}
    return [_device(card.index, card.name, card.uuid, order) for card in own]


def _device(index: int, name: str, uuid: str, order: Mapping[str, str]) -> DeviceRef:
    return DeviceRef(
        id=f"gpu:{index}",
        backend="sycl",
        index=index,
        name=name,
        uuid=uuid,
        environment={"ZE_AFFINITY_MASK": str(index), **order, **ONLY, **HIDE_VULKAN},
    )


@dataclass
class Sycl:
    """Intel's GPUs."""

    run: Run = run
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    name: Final = "sycl"

    def __post_init__(self) -> None:
        self._totals: dict[int, int | None] = {}
        """Memory of the GPUs that ``xpu-smi`` told of, in MiB."""

    def discover(self) -> Found:
        warnings: list[str] = []
        self._totals = {}
        try:
            devices = devices_of(self._cards())
            self._totals = {one.index: self._total_mb(one.index) for one in devices}
        except ToolError as error:
            warnings += [] if error.missing else [f"xpu-smi is of no use: {error}"]
            devices = []
        if not devices:
            try:
                devices = parse_sycl_ls(self.run(SYCL_LS).checked())
            except ToolError as error:
                warnings += [] if error.missing else [f"no Intel GPUs: {error}"]
        found = Found(devices=tuple(devices), warnings=tuple(warnings))
        return narrowed(found, self.environ, "ZE_AFFINITY_MASK")

    def metrics(self) -> dict[str, DeviceMetrics]:
        totals = dict(self._totals)
        if not totals:
            return {}
        found = {index: DeviceMetrics(memory_total_mb=total) for index, total in totals.items()}
        try:
            found |= parse_dump(self.run(dump(sorted(totals))).checked(), totals)
        except ToolError:
            return {}
        return {f"gpu:{index}": metrics for index, metrics in found.items()}

    def _cards(self) -> list[Card]:
        said = self.run(DISCOVERY)
        try:
            return parse_discovery(said.out)
        except ValueError as error:
            raise ToolError(said.complaint if said.status else f"xpu-smi: {error}") from None

    def _total_mb(self, index: int) -> int | None:
        try:
            return parse_total_mb(self.run(details(index)).out)
        except ToolError:
            return None


def _object(text: str) -> dict[str, Any]:
    """The JSON object that *text* is.

    Raises:
        ValueError: it is none.
    """
    told: Any = json.loads(text)
    if not is_mapping(told):
        raise ValueError("it printed no JSON object")
    return told
