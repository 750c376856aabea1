"""AMD GPUs, through amdsmi where ROCm has installed it, else from the files of the kernel's own driver.

The kernel lists in ``/sys/class/kfd/kfd/topology/nodes`` what compute runs on, CPUs among it, and in
``/sys/class/drm`` the cards. All paths lie under a root folder, so that tests read trees of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

from computemesh.hardware import Gpu, GpuLink, GpuProcess, LinkKind, Platform
from computemesh_services.resource_detector.probes import GpuReading, amdsmi, processes, system
from computemesh_services.resource_detector.probes.amdsmi import AmdSmiModule

BYTES_PER_MB: Final = 1024 * 1024

KFD: Final = Path("sys/class/kfd/kfd")
DRM: Final = Path("sys/class/drm")
MODULE: Final = Path("sys/module/amdgpu/version")

XGMI: Final = 11
"""``HSA_IOLINK_TYPE_XGMI``"""
FRAME_BUFFERS: Final = (1, 2)
"""``HSA_MEM_HEAP_TYPE_FB_PUBLIC`` and ``_PRIVATE``: memory banks that are the GPU's own."""

GENERATIONS: Final = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""PCIe generation by the speed of a lane, in GT/s."""

_ENGINE: Final = re.compile(r"(\d+)(\d\d)(\d\d)$")


class RocmProvider:
    """The GPUs of AMD's driver."""

    name = "rocm"

    def __init__(
        self,
        smi: AmdSmiModule | None = None,
        *,
        expected: bool = True,
        root: Path = Path("/"),
        reservation_of: Callable[[int], str] = processes.reservation_of,
    ) -> None:
        """
        Args:
            smi: the binding; None = read the files of the kernel.
            expected: say so when there is no driver at all.
        """
        self._smi = smi
        self._expected = expected
        self._root = root
        self._reservation_of = reservation_of

    def read(self, *, links: bool = True) -> GpuReading:
        warnings: list[str] = []
        if self._smi is not None:
            try:
                found = amdsmi.read(self._smi, links=links, reservation_of=self._reservation_of, root=self._root)
                if found.gpus:
                    return found
            # Releases differ in what they have and return.
            except (self._smi.AmdSmiException, AttributeError, LookupError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings = [f"amdsmi is of no use, so the kernel's files are read: {reason}"]
        if not (self._root / KFD).exists():
            missing = "AMD GPUs cannot be read: the driver amdgpu is not loaded, or has no compute part (amdkfd)"
            return GpuReading(provider=self.name, warnings=[missing] if self._expected else [])
        return self._read_files(warnings, links)

    def _read_files(self, warnings: list[str], links: bool) -> GpuReading:
        nodes = _nodes(self._root / KFD)
        driver = system.read_text(self._root / MODULE)
        gpus = [self._gpu(index, node, driver, warnings) for index, node in enumerate(nodes)]
        return GpuReading(
            provider=self.name,
            platform=Platform.ROCM if gpus else Platform.CPU,
            gpus=gpus,
            links=_links(nodes, gpus, self._root) if links else [],
            warnings=warnings,
        )

    def _gpu(self, index: int, node: _Node, driver: str, warnings: list[str]) -> Gpu:
        card = self._root / DRM / f"renderD{node.facts.get('drm_render_minor', 0)}" / "device"
        used = _number(card / "mem_info_vram_used")
        total = _number(card / "mem_info_vram_total") or node.memory_bytes
        error = "" if used is not None else "memory in use: the driver does not tell it"
        if error:
            warnings.append(f"GPU {index}, {error}")
        architecture = gfx(node.facts.get("gfx_target_version", 0))
        busy = _number(card / "gpu_busy_percent")
        unique = node.facts.get("unique_id", 0)
        return Gpu(
            index=index,
            name=system.read_text(card / "product_name") or f"AMD {architecture}".strip(),
            uuid=f"GPU-{unique:016x}" if unique else "",
            vram_total_mb=total // BYTES_PER_MB,
            vram_used_mb=(used or 0) // BYTES_PER_MB,
            architecture=architecture,
            driver=driver,
            pci_bus_id=node.pci_bus_id,
            pcie_generation=GENERATIONS.get(system.read_text(card / "max_link_speed").partition(" ")[0], 0),
            pcie_lanes=_number(card / "max_link_width") or 0,
            numa_node=system.numa_node(card),
            utilization_percent=None if busy is None else min(busy, 100),
            temperature_c=_temperature(card),
            power_w=_power(card),
            processes=self._processes(node.gpu_id),
            error=error,
        )

    def _processes(self, gpu_id: int) -> list[GpuProcess] | None:
        folder = self._root / KFD / "proc"
        try:
            pids = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
        except OSError:
            return None
        held = ((pid, _number(folder / str(pid) / f"vram_{gpu_id}")) for pid in pids)
        return [
            GpuProcess(
                pid=pid,
                name=processes.name_of(pid, proc=self._root / "proc"),
                memory_mb=size // BYTES_PER_MB,
                reservation_id=self._reservation_of(pid),
            )
            for pid, size in held
            if size
        ][: processes.LISTED_MAX]


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A GPU in the topology of the kernel."""

    number: int
    gpu_id: int
    facts: Mapping[str, int]
    memory_bytes: int
    xgmi: frozenset[int]
    """Numbers of the nodes that Infinity Fabric leads to."""

    @property
    def pci_bus_id(self) -> str:
        place = self.facts.get("location_id", 0)
        domain = self.facts.get("domain", 0)
        return f"{domain:04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"


def _nodes(kfd: Path) -> list[_Node]:
    """The GPUs, in the order that ROCm numbers them."""
    found: list[_Node] = []
    for folder in sorted((kfd / "topology" / "nodes").glob("[0-9]*"), key=lambda path: int(path.name)):
        gpu_id = _number(folder / "gpu_id")
        if not gpu_id:  # A CPU, or a GPU that this container may not use.
            continue
        links = [_facts(path) for path in sorted(folder.glob("io_links/*/properties"))]
        banks = [_facts(path) for path in sorted(folder.glob("mem_banks/*/properties"))]
        found.append(
            _Node(
                number=int(folder.name),
                gpu_id=gpu_id,
                facts=_facts(folder / "properties"),
                memory_bytes=sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in FRAME_BUFFERS),
                xgmi=frozenset(link["node_to"] for link in links if link.get("type") == XGMI and "node_to" in link),
            )
        )
    return found


def _links(nodes: list[_Node], gpus: list[Gpu], root: Path) -> list[GpuLink]:
    found: list[GpuLink] = []
    for (one, a), (other, b) in combinations(zip(nodes, gpus, strict=True), 2):
        if other.number in one.xgmi or one.number in other.xgmi:
            found.append(GpuLink(a=a.index, b=b.index, kind=LinkKind.XGMI))
        elif (distance := system.pcie_distance(a.pci_bus_id, b.pci_bus_id, root=root)) is not None:
            found.append(GpuLink(a=a.index, b=b.index, kind=distance))
    return found


def gfx(version: int) -> str:
    """What code is compiled for: 90402 is ``gfx942``, 90010 ``gfx90a``, 110001 ``gfx1101``; empty for none."""
    parts = _ENGINE.match(str(version))
    return f"gfx{int(parts[1])}{int(parts[2]):x}{int(parts[3]):x}" if parts else ""


def _temperature(card: Path) -> float | None:
    """Of the hottest place the card tells, else of its edge."""
    sensors = sorted(card.glob("hwmon/hwmon*/temp*_input"))
    labels = {system.read_text(path.with_name(path.name.replace("_input", "_label"))): path for path in sensors}
    chosen = labels.get("junction") or labels.get("edge") or next(iter(sensors), None)
    value = _number(chosen) if chosen else None
    return None if value is None else value / 1000


def _power(card: Path) -> float | None:
    for pattern in ("hwmon/hwmon*/power1_average", "hwmon/hwmon*/power1_input"):
        for path in card.glob(pattern):
            if (microwatts := _number(path)) is not None:
                return microwatts / 1e6
    return None


def _facts(path: Path) -> dict[str, int]:
    """A file of lines with a name and a number each."""
    lines = (line.split() for line in system.read_text(path).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    text = system.read_text(path)
    return int(text) if text.isdecimal() else None


def provider(*, expected: bool) -> RocmProvider:
    """The provider for this machine."""
    return RocmProvider(amdsmi.load(), expected=expected)
