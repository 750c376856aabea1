"""AMD GPUs, read through amdsmi, the binding that ROCm installs.

It is imported only in :func:`load`; without it :mod:`.rocm` reads the kernel's own files. Names and units are
those of amdsmi 6.4 to 7.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

from computemesh.hardware import Gpu, GpuLink, GpuProcess, LinkKind, Platform
from computemesh_services.resource_detector.probes import GpuReading, processes, system

T = TypeVar("T")

BYTES_PER_MB: Final = 1024 * 1024


class AmdSmiModule(Protocol):
    """The part of ``amdsmi`` that is used. A handle is opaque; what is not known reads ``"N/A"``."""

    AmdSmiException: type[Exception]
    AmdSmiMemoryType: Any
    AmdSmiTemperatureType: Any
    AmdSmiTemperatureMetric: Any
    AmdSmiLinkType: Any

    def amdsmi_init(self) -> object: ...
    def amdsmi_shut_down(self) -> object: ...
    def amdsmi_get_processor_handles(self) -> Sequence[object]: ...
    def amdsmi_get_gpu_asic_info(self, handle: object, /) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_device_uuid(self, handle: object, /) -> str: ...
    def amdsmi_get_gpu_device_bdf(self, handle: object, /) -> str: ...
    def amdsmi_get_gpu_driver_info(self, handle: object, /) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_memory_total(self, handle: object, kind: Any, /) -> int: ...
    def amdsmi_get_gpu_memory_usage(self, handle: object, kind: Any, /) -> int: ...
    def amdsmi_get_pcie_info(self, handle: object, /) -> Mapping[str, Mapping[str, Any]]: ...
    def amdsmi_get_gpu_activity(self, handle: object, /) -> Mapping[str, Any]: ...
    def amdsmi_get_temp_metric(self, handle: object, sensor: Any, metric: Any, /) -> int: ...
    def amdsmi_get_power_info(self, handle: object, /) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_process_list(self, handle: object, /) -> Sequence[Mapping[str, Any]]: ...
    def amdsmi_topo_get_numa_node_number(self, handle: object, /) -> int: ...
    def amdsmi_topo_get_link_type(self, one: object, other: object, /) -> Mapping[str, int]: ...


def load() -> AmdSmiModule | None:
    """The binding, if it and the library it needs are installed."""
    try:
        # It prints its complaints, and what we print on standard output is read by others.
        with contextlib.redirect_stdout(sys.stderr):
            return cast(AmdSmiModule, importlib.import_module("amdsmi"))
    except (ImportError, OSError, LookupError, AttributeError):  # A missing library is a KeyError.
        return None


def read(smi: AmdSmiModule, *, links: bool, reservation_of: Callable[[int], str], root: Path) -> GpuReading:
    """The GPUs now.

    Raises:
        AmdSmiException: the driver does not answer.
    """
    smi.amdsmi_init()
    try:
        handles = smi.amdsmi_get_processor_handles()
        cards = [_Card(smi, index, handle) for index, handle in enumerate(handles)]
        gpus = [card.read(reservation_of) for card in cards]
        return GpuReading(
            provider="rocm",
            platform=Platform.ROCM if gpus else Platform.CPU,
            gpus=gpus,
            links=_links(smi, handles, gpus, root) if links else [],
            warnings=[warning for card in cards for warning in card.warnings],
        )
    finally:
        smi.amdsmi_shut_down()


class _Card:
    def __init__(self, smi: AmdSmiModule, index: int, handle: object) -> None:
        self._smi = smi
        self._index = index
        self._handle = handle
        self._error = ""
        self.warnings: list[str] = []

    def read(self, reservation_of: Callable[[int], str]) -> Gpu:
        smi, handle = self._smi, self._handle
        vram = smi.AmdSmiMemoryType.VRAM
        asic = self._must("name", lambda: smi.amdsmi_get_gpu_asic_info(handle)) or {}
        total = self._must("memory", lambda: smi.amdsmi_get_gpu_memory_total(handle, vram)) or 0
        used = self._must("memory in use", lambda: smi.amdsmi_get_gpu_memory_usage(handle, vram)) or 0
        pcie = (self._maybe(lambda: smi.amdsmi_get_pcie_info(handle)) or {}).get("pcie_static", {})
        activity = self._maybe(lambda: smi.amdsmi_get_gpu_activity(handle)) or {}
        node = self._maybe(lambda: smi.amdsmi_topo_get_numa_node_number(handle))
        return Gpu(
            index=self._index,
            name=_text(asic.get("market_name")),
            uuid=_text(self._must("uuid", lambda: smi.amdsmi_get_gpu_device_uuid(handle))),
            vram_total_mb=total // BYTES_PER_MB,
            vram_used_mb=used // BYTES_PER_MB,
            architecture=_text(asic.get("target_graphics_version")),
            driver=_text((self._maybe(lambda: smi.amdsmi_get_gpu_driver_info(handle)) or {}).get("driver_version")),
            pci_bus_id=_text(self._maybe(lambda: smi.amdsmi_get_gpu_device_bdf(handle))).lower(),
            pcie_generation=_whole(pcie.get("pcie_interface_version")) or 0,
            pcie_lanes=_whole(pcie.get("max_pcie_width")) or 0,
            numa_node=node if node is not None and node < 2**16 else None,  # -1 comes unsigned.
            utilization_percent=_percent(activity.get("gfx_activity")),
            temperature_c=self._temperature(),
            power_w=self._power(),
            processes=self._processes(reservation_of),
            error=self._error,
        )

    def _temperature(self) -> float | None:
        smi = self._smi
        now = smi.AmdSmiTemperatureMetric.CURRENT
        sensors = (smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureType.EDGE)
        found = (self._maybe(partial(smi.amdsmi_get_temp_metric, self._handle, sensor, now)) for sensor in sensors)
        return next((value for value in found if value), None)

    def _power(self) -> float | None:
        told = self._maybe(lambda: self._smi.amdsmi_get_power_info(self._handle)) or {}
        # Accelerators tell the one, graphics cards the other; the one that is not told is 0 or "N/A".
        return next(
            (watts for key in ("current_socket_power", "average_socket_power") if (watts := _whole(told.get(key)))),
            None,
        )

    def _processes(self, reservation_of: Callable[[int], str]) -> list[GpuProcess] | None:
        told = self._maybe(lambda: self._smi.amdsmi_get_gpu_process_list(self._handle))
        if told is None:
            return None
        return [
            GpuProcess(
                pid=process["pid"],
                name=processes.short(_text(process.get("name"))),
                memory_mb=process["memory_usage"]["vram_mem"] // BYTES_PER_MB,
                reservation_id=reservation_of(process["pid"]),
            )
            for process in told[: processes.LISTED_MAX]
        ]

    def _must(self, fact: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except (self._smi.AmdSmiException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            self.warnings.append(f"GPU {self._index}, {fact}: {reason}")
            self._error = self._error or f"{fact}: {reason}"
        return None

    def _maybe(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except (self._smi.AmdSmiException, UnicodeDecodeError):
            return None


def _links(smi: AmdSmiModule, handles: Sequence[object], gpus: Sequence[Gpu], root: Path) -> list[GpuLink]:
    """Pairs that Infinity Fabric joins, and how far the others are apart over PCIe."""
    found: list[GpuLink] = []
    for (a, one), (b, other) in combinations(enumerate(handles), 2):
        if _fabric(smi, one, other):
            found.append(GpuLink(a=a, b=b, kind=LinkKind.XGMI))
        elif (distance := system.pcie_distance(gpus[a].pci_bus_id, gpus[b].pci_bus_id, root=root)) is not None:
            found.append(GpuLink(a=a, b=b, kind=distance))
    return found


def _fabric(smi: AmdSmiModule, one: object, other: object) -> bool:
    try:
        kind = smi.amdsmi_topo_get_link_type(one, other)["type"]
    except smi.AmdSmiException:
        return False
    return kind == int(smi.AmdSmiLinkType.AMDSMI_LINK_TYPE_XGMI)


def _text(told: object) -> str:
    return told if isinstance(told, str) and told != "N/A" else ""


def _whole(told: object) -> int | None:
    return told if isinstance(told, int) and 0 <= told < 2**31 else None


def _percent(told: object) -> float | None:
    found = _whole(told)
    return None if found is None else min(found, 100)
