"""NVIDIA GPUs, read through NVML.

The binding (``pynvml``, from the distribution ``nvidia-ml-py``) is an optional dependency: it is imported
only in :func:`provider`. Everything else takes it as an argument, so scripted hardware passes a module of its
own.

What can go wrong, and what is then told:

=============================================  ===========================================================
a GPU does not answer, or is lost              that GPU carries ``error`` and what is known of it; the
                                               others are whole
one fact of a GPU cannot be read               the fact is left out; a warning says why, unless the GPU
                                               simply has no such thing
a GPU has no memory of its own                 its memory is the machine's (``unified_memory``)
the driver does not answer, or goes away       no GPUs and a warning; the next read initialises it again
=============================================  ===========================================================
"""

# ruff: noqa: N802 - the names of the functions are NVML's.

from __future__ import annotations

import importlib
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Final, Protocol, TypeVar, cast

from msgspec.structs import replace

from computemesh.hardware import Gpu, GpuLink, GpuProcess, LinkKind, Memory, Platform
from computemesh_services.resource_detector.probes import GpuProvider, GpuReading, NoGpus, processes, system

T = TypeVar("T")

BYTES_PER_MB: Final = 1024 * 1024

DRIVER: Final = Path("/proc/driver/nvidia/version")
"""There while the kernel module is loaded, whether or not the binding is installed."""

LINKS_MAX: Final = 36
"""``NVML_NVLINK_MAX_LINKS``: NVLinks a GPU may have. Older drivers refuse numbers beyond their own bound."""

TEMPERATURE_GPU: Final = 0
"""``NVML_TEMPERATURE_GPU``"""
MIG_ENABLE: Final = 1
"""``NVML_DEVICE_MIG_ENABLE``"""
REMOTE_GPU: Final = 0
"""``NVML_NVLINK_DEVICE_TYPE_GPU``"""
REMOTE_SWITCH: Final = 2
"""``NVML_NVLINK_DEVICE_TYPE_SWITCH``"""
P2P_NVLINK: Final = 2
"""``NVML_P2P_CAPS_INDEX_NVLINK``"""
P2P_OK: Final = 0
"""``NVML_P2P_STATUS_OK``"""

DISTANCES: Final = {
    0: LinkKind.PIX,  # NVML_TOPOLOGY_INTERNAL: two GPUs of one board, behind its own switch.
    10: LinkKind.PIX,  # NVML_TOPOLOGY_SINGLE
    20: LinkKind.PXB,  # NVML_TOPOLOGY_MULTIPLE
    30: LinkKind.PHB,  # NVML_TOPOLOGY_HOSTBRIDGE
    40: LinkKind.NODE,  # NVML_TOPOLOGY_NODE
    50: LinkKind.SYS,  # NVML_TOPOLOGY_SYSTEM
}

_PROFILE: Final = re.compile(r"\bMIG (\S+)$")


class MemoryInfo(Protocol):
    """In bytes."""

    @property
    def total(self) -> int: ...
    @property
    def used(self) -> int: ...


class Utilization(Protocol):
    """In per cent."""

    @property
    def gpu(self) -> int: ...


class PciInfo(Protocol):
    @property
    def busId(self) -> str | bytes: ...


class Attributes(Protocol):
    """Of a MIG slice."""

    @property
    def gpuInstanceSliceCount(self) -> int: ...
    @property
    def computeInstanceSliceCount(self) -> int: ...
    @property
    def memorySizeMB(self) -> int: ...


class RunningProcess(Protocol):
    @property
    def pid(self) -> int: ...
    @property
    def usedGpuMemory(self) -> int | None:
        """Bytes; None where the driver does not tell."""
        ...


class NvmlModule(Protocol):
    """The part of ``pynvml`` that is used. A handle is opaque; texts are ``bytes`` in older releases."""

    NVMLError: type[Exception]
    NVMLError_NotSupported: type[Exception]
    NVMLError_NotFound: type[Exception]
    NVMLError_InvalidArgument: type[Exception]
    NVMLError_NoPermission: type[Exception]
    NVMLError_FunctionNotFound: type[Exception]
    NVMLError_Uninitialized: type[Exception]
    NVMLError_DriverNotLoaded: type[Exception]
    NVMLError_LibraryNotFound: type[Exception]
    NVMLError_GpuIsLost: type[Exception]

    def nvmlInit(self) -> object: ...
    def nvmlShutdown(self) -> object: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetProcessName(self, pid: int, /) -> str | bytes: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> MemoryInfo: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> Sequence[int]: ...
    def nvmlDeviceGetPciInfo(self, handle: object, /) -> PciInfo: ...
    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: object, /) -> int: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> Utilization: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: object, /) -> Sequence[RunningProcess]: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> Sequence[RunningProcess]: ...
    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int, /) -> object: ...
    def nvmlDeviceGetAttributes(self, handle: object, /) -> Attributes: ...
    def nvmlDeviceGetNvLinkState(self, handle: object, link: int, /) -> int: ...
    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: object, link: int, /) -> int: ...
    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: object, link: int, /) -> PciInfo: ...
    def nvmlDeviceGetP2PStatus(self, one: object, other: object, index: int, /) -> int: ...
    def nvmlDeviceGetTopologyCommonAncestor(self, one: object, other: object, /) -> int: ...


class NvmlProvider:
    """The GPUs of the NVIDIA driver.

    Reads take turns, so several threads may share one provider. The driver stays initialised between reads
    until it fails.
    """

    name = "nvml"

    def __init__(
        self,
        nvml: NvmlModule,
        *,
        expected: bool = True,
        numa_node: Callable[[str], int | None] = system.pci_numa_node,
        reservation_of: Callable[[int], str] = processes.reservation_of,
        memory: Callable[[], Memory] = system.read_memory,
    ) -> None:
        """
        Args:
            expected: say so when there is no NVIDIA driver at all.
            numa_node: the NUMA node of a PCI bus id.
            memory: the machine's memory, for GPUs that have none of their own.
        """
        self._nvml = nvml
        self._expected = expected
        self._host = _Host(numa_node=numa_node, reservation_of=reservation_of, memory=memory)
        self._ready = False
        self._turn = threading.Lock()
        self._known: dict[int, Gpu] = {}
        """What was last read of the GPU at each of the driver's indices, for one that is lost."""

    def read(self, *, links: bool = True) -> GpuReading:
        with self._turn:
            try:
                return self._read_all(links)
            except self._nvml.NVMLError_LibraryNotFound as error:
                return GpuReading(provider=self.name, warnings=[_silent(error)] if self._expected else [])
            except self._nvml.NVMLError as error:
                self._forget()
                return GpuReading(provider=self.name, warnings=[_silent(error)])

    def _read_all(self, links: bool) -> GpuReading:
        nvml = self._nvml
        if not self._ready:
            nvml.nvmlInit()
            self._ready = True
        asked = _Asked(nvml)
        driver = _text(asked.maybe("driver version", nvml.nvmlSystemGetDriverVersion))
        cards = [_Card(nvml, place, driver, self._host) for place in range(nvml.nvmlDeviceGetCount())]
        gpus: list[Gpu] = []
        whole: list[tuple[Gpu, object]] = []
        for card in cards:
            for found in card.read():
                gpu = replace(found, index=len(gpus))
                if gpu.error and not gpu.mig_parent:
                    gpu = _completed(gpu, self._known.get(card.place))
                elif not gpu.mig_parent:
                    whole.append((gpu, card.handle))
                    self._known[card.place] = gpu
                gpus.append(gpu)
        warnings = [*asked.warnings, *(warning for card in cards for warning in card.warnings)]
        return GpuReading(
            provider=self.name,
            platform=Platform.CUDA if cards else Platform.CPU,
            gpus=gpus,
            links=read_links(nvml, whole) if links else [],
            warnings=warnings,
        )

    def _forget(self) -> None:
        """Leaves the driver uninitialised, so that the next read starts over."""
        if self._ready:
            self._ready = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                return  # A driver that is gone need not be shut down.


_STAYS: Final = (
    "name",
    "uuid",
    "vram_total_mb",
    "compute_capability",
    "driver",
    "pci_bus_id",
    "pcie_generation",
    "pcie_lanes",
    "numa_node",
    "unified_memory",
)


def _completed(broken: Gpu, known: Gpu | None) -> Gpu:
    """A GPU that cannot be read, with what was known of it when it still answered."""
    if known is None or (broken.uuid and broken.uuid != known.uuid):
        return broken
    return replace(broken, **{name: getattr(known, name) for name in _STAYS if not getattr(broken, name)})


@dataclass(frozen=True, kw_only=True)
class _Host:
    """What is asked of the system rather than of NVML."""

    numa_node: Callable[[str], int | None]
    reservation_of: Callable[[int], str]
    memory: Callable[[], Memory]


@dataclass
class _Asked:
    """Questions to NVML, of which some are not answered."""

    nvml: NvmlModule
    whose: str = "the driver"
    error: str = ""
    """Why the device, or one of the facts it must tell, could not be read."""
    lost: bool = False
    """Nothing more is asked of it."""
    warnings: list[str] = field(default_factory=list[str])
    unsupported: set[str] = field(default_factory=set[str])

    def must(self, fact: str, question: Callable[[], T]) -> T | None:
        """A fact that every device tells: without it the device is broken."""
        return self._ask(fact, question, vital=True)

    def maybe(self, fact: str, question: Callable[[], T]) -> T | None:
        """A fact that a device may not have, or not tell to everyone."""
        return self._ask(fact, question, vital=False)

    def _ask(self, fact: str, question: Callable[[], T], *, vital: bool) -> T | None:
        nvml = self.nvml
        if self.lost:
            return None
        try:
            return question()
        except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
            raise  # It is the driver that is gone, not this device.
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission) as error:
            if vital and isinstance(error, nvml.NVMLError_NoPermission):
                self._note(fact, error, vital)
            self.unsupported.add(fact)
        # Bindings decode names as UTF-8, which a failing card may not return.
        except (nvml.NVMLError, UnicodeDecodeError) as error:
            self.lost = isinstance(error, nvml.NVMLError_GpuIsLost)
            self._note(fact, error, vital or self.lost)
        return None

    def _note(self, fact: str, error: Exception, vital: bool) -> None:
        self.warnings.append(f"{self.whose}, {fact}: {error}")
        if vital:
            self.error = self.error or f"{fact}: {error}"


class _Card:
    """One physical GPU being read, fact by fact: what fails is noted and the rest is still asked for."""

    def __init__(self, nvml: NvmlModule, place: int, driver: str, host: _Host) -> None:
        self.place = place
        """Its index in NVML's own order."""
        self.handle: object | None = None
        self.warnings: list[str] = []
        self._nvml = nvml
        self._driver = driver
        self._host = host

    def read(self) -> list[Gpu]:
        """The GPU, or its slices if it is cut up. Raises ``NVMLError`` only when it is the driver that is gone."""
        nvml = self._nvml
        asked = _Asked(nvml, f"GPU {self.place}", warnings=self.warnings)
        handle = asked.must("handle", lambda: nvml.nvmlDeviceGetHandleByIndex(self.place))
        if handle is None:
            return [Gpu(error=asked.error or "it cannot be opened")]
        self.handle = handle
        mode = asked.maybe("MIG mode", lambda: nvml.nvmlDeviceGetMigMode(handle))
        gpu = self._facts(asked, handle, cut=bool(mode and mode[0] == MIG_ENABLE))
        return self._slices(asked, handle, gpu) if mode and mode[0] == MIG_ENABLE else [gpu]

    def _facts(self, asked: _Asked, handle: object, *, cut: bool) -> Gpu:
        nvml = self._nvml
        capability = asked.must("compute capability", lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
        pci = asked.maybe("PCI address", lambda: nvml.nvmlDeviceGetPciInfo(handle))
        bus_id = pci_bus_id(_text(pci.busId)) if pci else ""
        power_mw = asked.maybe("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        temperature = asked.maybe("temperature", lambda: nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE_GPU))
        shared = Gpu(
            compute_capability=".".join(map(str, capability or ())),
            driver=self._driver,
            pci_bus_id=bus_id,
            pcie_generation=asked.maybe("PCIe", lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)) or 0,
            pcie_lanes=asked.maybe("PCIe", lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)) or 0,
            numa_node=self._host.numa_node(bus_id) if bus_id else None,
            temperature_c=temperature,
            power_w=None if power_mw is None else power_mw / 1000,
        )
        return self._whole(asked, handle, shared) if not cut else self._named(asked, handle, shared)

    def _whole(self, asked: _Asked, handle: object, shared: Gpu) -> Gpu:
        gpu = self._device(asked, handle, shared)
        use = asked.maybe("utilization", lambda: self._nvml.nvmlDeviceGetUtilizationRates(handle))
        return replace(gpu, utilization_percent=None if use is None else min(max(use.gpu, 0), 100), error=asked.error)

    def _named(self, asked: _Asked, handle: object, shared: Gpu) -> Gpu:
        """A GPU that is cut up: not everyone may ask for its memory and processes, which are the slices' anyway."""
        nvml = self._nvml
        uuid = _text(asked.must("uuid", lambda: nvml.nvmlDeviceGetUUID(handle)))
        memory = asked.maybe("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        total_mb = memory.total // BYTES_PER_MB if memory else 0
        return replace(shared, uuid=uuid, vram_total_mb=total_mb, error=asked.error)

    def _device(self, asked: _Asked, handle: object, shared: Gpu) -> Gpu:
        """What a GPU and a slice of one have each for themselves, added to what they share."""
        nvml = self._nvml
        name = _text(asked.must("name", lambda: nvml.nvmlDeviceGetName(handle)))
        uuid = _text(asked.must("uuid", lambda: nvml.nvmlDeviceGetUUID(handle)))
        memory = asked.must("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        unified = memory is None and "memory" in asked.unsupported and not asked.error
        ram = self._host.memory() if unified else Memory()
        return replace(
            shared,
            name=name,
            uuid=uuid,
            vram_total_mb=memory.total // BYTES_PER_MB if memory else ram.total_mb,
            vram_used_mb=memory.used // BYTES_PER_MB if memory else max(ram.total_mb - ram.available_mb, 0),
            unified_memory=unified,
            processes=self._processes(asked, handle),
            error=asked.error,
        )

    def _slices(self, asked: _Asked, handle: object, whole: Gpu) -> list[Gpu]:
        nvml = self._nvml
        found: list[Gpu] = []
        for number in range(asked.maybe("slices", lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
                continue  # Numbers may have holes.
            except nvml.NVMLError as error:
                self.warnings.append(f"GPU {self.place}, slice {number}: {error}")
                continue
            about = _Asked(nvml, f"GPU {self.place}, slice {number}", error=whole.error, warnings=self.warnings)
            gpu = self._device(about, part, whole)
            found.append(replace(gpu, mig_parent=whole.uuid, mig_profile=self._profile(about, part, gpu, whole)))
        if not found:
            self.warnings.append(f"GPU {self.place} is in MIG mode and has no slices")
        return found

    def _profile(self, asked: _Asked, handle: object, part: Gpu, whole: Gpu) -> str:
        if named := _PROFILE.search(part.name):
            return named.group(1)
        told = asked.maybe("size", lambda: self._nvml.nvmlDeviceGetAttributes(handle))
        return mig_profile(told, whole.vram_total_mb) if told else ""

    def _processes(self, asked: _Asked, handle: object) -> list[GpuProcess] | None:
        nvml = self._nvml
        compute = asked.maybe("processes", lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        graphics = asked.maybe("processes", lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
        if compute is None and graphics is None:
            return None
        used: dict[int, int | None] = {}
        for process in [*(compute or ()), *(graphics or ())]:  # One that does both is listed twice, with one size.
            used[process.pid] = process.usedGpuMemory if used.get(process.pid) is None else used[process.pid]
        return [
            GpuProcess(
                pid=pid,
                name=self._process_name(pid),
                memory_mb=None if size is None else size // BYTES_PER_MB,
                reservation_id=self._host.reservation_of(pid),
            )
            for pid, size in sorted(used.items())
        ][: processes.LISTED_MAX]

    def _process_name(self, pid: int) -> str:
        try:
            return processes.short(_text(self._nvml.nvmlSystemGetProcessName(pid)))
        except (self._nvml.NVMLError, UnicodeDecodeError):
            return ""  # It has ended since, or is not ours to know.


def read_links(nvml: NvmlModule, gpus: Sequence[tuple[Gpu, object]]) -> list[GpuLink]:
    """How each pair of whole GPUs reaches the other, as far as the driver tells.

    NVLinks lead from GPU to GPU, or from each GPU into NVSwitches; behind those, every GPU reaches every other
    with all its links. A pair without NVLink has the distance of its nearest common PCIe ancestor.
    """
    here = {gpu.pci_bus_id for gpu, _ in gpus if gpu.pci_bus_id}
    ends = {gpu.index: _nvlink_ends(nvml, handle, here) for gpu, handle in gpus}
    found: list[GpuLink] = []
    for (one, one_handle), (other, other_handle) in combinations(gpus, 2):
        direct = max(ends[one.index][other.pci_bus_id], ends[other.index][one.pci_bus_id])
        switched = min(ends[one.index][SWITCH], ends[other.index][SWITCH])
        lanes = direct or switched
        if lanes and _nvlink_works(nvml, one_handle, other_handle):
            found.append(GpuLink(a=one.index, b=other.index, kind=LinkKind.NVLINK, lanes=lanes))
        elif (distance := _distance(nvml, one_handle, other_handle)) is not None:
            found.append(GpuLink(a=one.index, b=other.index, kind=distance))
    return found


SWITCH: Final = "NVSwitch"


def _nvlink_ends(nvml: NvmlModule, handle: object, here: set[str]) -> Counter[str]:
    """The active NVLinks of a GPU, by where they end: the PCI bus id of another GPU, or :data:`SWITCH`."""
    ends = Counter[str]()
    for link in range(LINKS_MAX):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                ends[_nvlink_end(nvml, handle, link, here)] += 1
        except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
            raise
        except nvml.NVMLError:
            if not link:
                break  # It has none. Otherwise it is this one that is broken.
    del ends[""]
    return ends


def _nvlink_end(nvml: NvmlModule, handle: object, link: int, here: set[str]) -> str:
    try:
        kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
    except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
        # Drivers before 470 do not tell. What is not one of our GPUs is then a switch, as NCCL takes it.
        bus_id = pci_bus_id(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
        return bus_id if bus_id in here else SWITCH
    if kind == REMOTE_SWITCH:
        return SWITCH
    return pci_bus_id(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)) if kind == REMOTE_GPU else ""


def _nvlink_works(nvml: NvmlModule, one: object, other: object) -> bool:
    """Whether programs may use it: links can be up while the fabric behind them is not."""
    try:
        return nvml.nvmlDeviceGetP2PStatus(one, other, P2P_NVLINK) == P2P_OK
    except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
        raise
    except nvml.NVMLError:
        return True  # It does not say.


def _distance(nvml: NvmlModule, one: object, other: object) -> LinkKind | None:
    try:
        return DISTANCES.get(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    except (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded):
        raise
    except nvml.NVMLError:
        return None


def pci_bus_id(told: str) -> str:
    """A PCI address as the kernel writes it: NVML's ``00000000:3B:00.0`` is ``0000:3b:00.0``."""
    domain, _, rest = told.strip().lower().partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest}"
    except ValueError:
        return ""


def mig_profile(slice_: Attributes, whole_mb: int) -> str:
    """The name of a slice's size, such as ``1g.10gb``, or ``1c.3g.40gb`` for a part of its compute.

    Args:
        whole_mb: memory of the whole GPU. A slice has eighths of it, of which it reports a little less.
    """
    if not whole_mb:
        return ""
    eighths = math.ceil(slice_.memorySizeMB / whole_mb * 8)
    memory = f"{slice_.gpuInstanceSliceCount}g.{round(math.ceil(whole_mb / 1024) * eighths / 8)}gb"
    part = slice_.computeInstanceSliceCount
    return memory if part == slice_.gpuInstanceSliceCount else f"{part}c.{memory}"


def _silent(error: Exception) -> str:
    return f"the NVIDIA driver does not answer: {error}"


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def provider(*, expected: bool) -> GpuProvider:
    """The provider for this machine.

    Args:
        expected: say so when the binding, or the driver, is not there at all.
    """
    try:
        nvml = cast(NvmlModule, importlib.import_module("pynvml"))
    except ImportError:
        why = "NVIDIA GPUs cannot be read: the package nvidia-ml-py is not installed"
        return NoGpus("nvml", why if expected or DRIVER.exists() else "")
    return NvmlProvider(nvml, expected=expected)
