"""AMD GPUs, as ``amd-smi`` tells of them, or ``rocm-smi`` where that is what ROCm has installed.

The tools number the GPUs otherwise than ROCm's runtime does. A GPU is therefore pinned by its unique id; one that has
none, such as the GPU of an APU, by its place in the order of the kernel's nodes, which is the runtime's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from computemesh.yamltext import is_list, is_mapping
from computemesh_services.node_agent.engines.backends import (
    BYTES_PER_MB,
    HIDE_VULKAN,
    Environ,
    Found,
    free_of,
    megabytes,
    narrowed,
    number,
    percent,
)
from computemesh_services.node_agent.engines.backends.tool import Run, Said, ToolError, run
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

AMD_LIST: Final = ("amd-smi", "list", "--json")
AMD_STATIC: Final = ("amd-smi", "static", "--asic", "--vram", "--json")
AMD_METRIC: Final = ("amd-smi", "metric", "--usage", "--mem-usage", "--temperature", "--json")
ROCM: Final = (
    "rocm-smi",
    "--showid",
    "--showproductname",
    "--showuniqueid",
    "--showmeminfo",
    "vram",
    "--showuse",
    "--showtemp",
    "--json",
)

TEMPERATURES: Final = ("Temperature (Sensor junction) (C)", "Temperature (Sensor edge) (C)")
"""Accelerators have no sensor at the edge."""

SMALL_MB: Final = 1024
"""What the GPU in a processor has less of, as its own."""

_CARD: Final = re.compile(r"card(\d+)$")


UNKNOWN: Final = DeviceMetrics()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as a tool tells of it."""

    index: int
    """As the tool counts."""
    name: str = ""
    unique_id: int = 0
    """0 when it has none."""
    node: int | None = None
    """Its number among the kernel's nodes."""
    metrics: DeviceMetrics = UNKNOWN


def parse_rocm_smi(text: str) -> list[Card]:
    """The GPUs in the output of :data:`ROCM`, of ROCm 4 to 7.

    Raises:
        ValueError: there is no JSON in it.
    """
    told = _json(text, "{")
    cards: list[Card] = []
    for key, facts in told.items():
        place = _CARD.match(key)
        if place is None or not is_mapping(facts):
            continue
        # Names of keys began in small letters up to ROCm 6.0: "Card series".
        said = {str(name).lower(): value for name, value in facts.items()}
        total = megabytes(said.get("vram total memory (b)"), per_mb=BYTES_PER_MB)
        used = megabytes(said.get("vram total used memory (b)"), per_mb=BYTES_PER_MB)
        heat = (number(said.get(sensor.lower())) for sensor in TEMPERATURES)
        node = number(said.get("node id"))
        cards.append(
            Card(
                index=int(place[1]),
                name=_name(said.get("card series"), said.get("device name")),
                unique_id=_hex(said.get("unique id")),
                node=None if node is None else int(node),
                metrics=DeviceMetrics(
                    memory_total_mb=total,
                    memory_free_mb=free_of(total, used),
                    utilisation_percent=percent(said.get("gpu use (%)")),
                    temperature_c=next((value for value in heat if value is not None), None),
                ),
            )
        )
    return sorted(cards, key=lambda card: card.index)


def parse_amd_smi(listed: str, static: str) -> list[Card]:
    """The GPUs in the output of :data:`AMD_LIST` and :data:`AMD_STATIC`.

    Raises:
        ValueError: there is no JSON in one of them.
    """
    facts = dict(_amd(static))
    cards: list[Card] = []
    for index, card in _amd(listed):
        asic = _part(facts.get(index, {}), "asic")
        node = number(card.get("node_id"))
        cards.append(
            Card(
                index=index,
                name=_name(asic.get("market_name")),
                unique_id=_hex(asic.get("asic_serial")),
                node=None if node is None else int(node),
                metrics=DeviceMetrics(
                    memory_total_mb=megabytes(_value(_part(facts.get(index, {}), "vram"), "size")),
                ),
            )
        )
    return cards


def parse_amd_metrics(text: str) -> dict[int, DeviceMetrics]:
    """How the GPUs are doing, from the output of :data:`AMD_METRIC`.

    Raises:
        ValueError: there is no JSON in it.
    """
    found: dict[int, DeviceMetrics] = {}
    for index, card in _amd(text):
        memory, heat = _part(card, "mem_usage"), _part(card, "temperature")
        total, used = megabytes(_value(memory, "total_vram")), megabytes(_value(memory, "used_vram"))
        sensors = (number(_value(heat, sensor)) for sensor in ("hotspot", "edge"))
        found[index] = DeviceMetrics(
            memory_total_mb=total,
            memory_free_mb=free_of(total, used),
            utilisation_percent=percent(_value(_part(card, "usage"), "gfx_activity")),
            temperature_c=next((value for value in sensors if value is not None), None),
        )
    return found


def devices_of(cards: list[Card]) -> list[DeviceRef]:
    """The devices, each with what keeps a process to it. The GPU in a processor is none beside a card."""
    tiny = {card.index for card in cards if (card.metrics.memory_total_mb or SMALL_MB) < SMALL_MB}
    left_out = tiny if len(tiny) < len(cards) else set[int]()
    return [
        DeviceRef(
            id=name,
            backend="rocm",
            index=card.index,
            name=card.name,
            uuid=_uuid(card),
            # Of what the first shows, the second counts from 0.
            environment={
                "ROCR_VISIBLE_DEVICES": _uuid(card) or str(rank),
                "HIP_VISIBLE_DEVICES": "0",
            }
            | HIDE_VULKAN,
        )
        for card, name, rank in zip(cards, _names(cards), _ranks(cards), strict=True)
        if card.index not in left_out
    ]


def _allowed(devices: list[DeviceRef], ranks: Mapping[str, int], environ: Environ) -> Found:
    """The devices that this process was given: the runtime's first variable counts in its own order, the second what
    the first one leaves.

    Args:
        ranks: the place of each device in the runtime's order, by its id.
    """
    own = {device.id: device for device in devices}
    counted = tuple(sorted((replace(one, index=ranks[one.id]) for one in devices), key=lambda one: one.index))
    found = narrowed(Found(devices=counted), environ, "ROCR_VISIBLE_DEVICES")
    if "ROCR_VISIBLE_DEVICES" in environ:
        found = replace(found, devices=tuple(replace(one, index=at) for at, one in enumerate(found.devices)))
    found = narrowed(found, environ, "HIP_VISIBLE_DEVICES")
    left = sorted((own[one.id] for one in found.devices), key=lambda one: one.index)
    return replace(found, devices=tuple(left))


def _names(cards: list[Card]) -> list[str]:
    return [f"gpu:{card.index}" for card in cards]


def _ranks(cards: list[Card]) -> list[int]:
    """The place of each in the runtime's order; the tool's own where it does not tell the kernel's nodes."""
    nodes = [card.node for card in cards if card.node is not None]
    if len(nodes) == len(cards):
        order = sorted(nodes)
        return [order.index(node) for node in nodes]
    return list(range(len(cards)))


def _uuid(card: Card) -> str:
    return f"GPU-{card.unique_id:016x}" if card.unique_id else ""


@dataclass
class Rocm:
    """AMD's GPUs."""

    run: Run = run
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    name: Final = "rocm"

    def __post_init__(self) -> None:
        self._by_amd_smi = True
        """Which of the two tools found the devices: they need not count alike."""

    def discover(self) -> Found:
        warnings: list[str] = []
        for by_amd_smi, cards_of in ((True, self._amd_smi), (False, self._rocm_smi)):
            try:
                cards = cards_of()
            except ToolError as error:
                warnings += [] if error.missing else [f"no AMD GPUs: {error}"]
                continue
            self._by_amd_smi = by_amd_smi
            return _allowed(devices_of(cards), dict(zip(_names(cards), _ranks(cards), strict=True)), self.environ)
        return Found(warnings=tuple(warnings))

    def metrics(self) -> dict[str, DeviceMetrics]:
        try:
            if self._by_amd_smi:
                found = parse_amd_metrics(_out(self.run(AMD_METRIC)))
            else:
                found = {card.index: card.metrics for card in self._rocm_smi()}
        except (ToolError, ValueError):
            return {}
        return {f"gpu:{index}": metrics for index, metrics in found.items()}

    def _amd_smi(self) -> list[Card]:
        try:
            return parse_amd_smi(_out(self.run(AMD_LIST)), _out(self.run(AMD_STATIC)))
        except ValueError as error:
            raise ToolError(f"amd-smi: {error}") from None

    def _rocm_smi(self) -> list[Card]:
        said = self.run(ROCM)
        try:
            return parse_rocm_smi(said.out)
        except ValueError as error:
            amiss = said.status != 0 or said.error.strip()
            raise ToolError(said.complaint if amiss else f"rocm-smi: {error}") from None


def _out(said: Said) -> str:
    """What amd-smi printed: on standard output, whether or not its status says that something was amiss."""
    if said.status != 0 and not said.out.lstrip().startswith(("[", "{")):
        raise ToolError(said.complaint)
    return said.out


def _json(text: str, first: str) -> dict[str, Any]:
    """The JSON object in *text*, which warnings may precede.

    Raises:
        ValueError: there is none.
    """
    start = text.find(first)
    if start < 0:
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        raise ValueError(f"it printed no JSON{f' but {line!r}' if line else ''}")
    told, _ = json.JSONDecoder().raw_decode(text, start)
    if not is_mapping(told):
        raise ValueError("it printed something else than its report")
    return told


def _amd(text: str) -> list[tuple[int, dict[str, Any]]]:
    """The GPUs that amd-smi tells of by their number: a list, or since ROCm 7 an object with one."""
    start = min((place for mark in "[{" if (place := text.find(mark)) >= 0), default=-1)
    told: Any = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    if is_mapping(told):
        told = told.get("gpu_data")
    if not is_list(told):
        raise ValueError("it printed something else than its report")
    return [(index, card) for card in told if is_mapping(card) and isinstance(index := card.get("gpu"), int)]


def _part(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = card.get(name)
    return part if is_mapping(part) else {}


def _value(facts: Mapping[str, Any], name: str) -> Any:
    """A fact, which is ``{"value": 284, "unit": "MB"}``, or in some releases the bare number; or ``"N/A"``."""
    told = facts.get(name)
    return told.get("value") if is_mapping(told) else told


def _name(*told: Any) -> str:
    """The first that is a name and no number of the PCI database."""
    names = (text for text in told if isinstance(text, str) and text != "N/A" and not text.startswith("0x"))
    return next(names, "AMD GPU")


def _hex(told: Any) -> int:
    try:
        return int(told, 16) if isinstance(told, str) else 0
    except ValueError:
        return 0
