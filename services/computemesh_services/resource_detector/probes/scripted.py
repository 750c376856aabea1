"""Hardware that is made up, from a JSON file: for tests, and to try a mesh of machines that are not there.

It is only ever asked for by name, and whatever follows from it says ``provider: scripted``. NVIDIA GPUs are
played through the provider of the real ones (:mod:`.nvml`): what fails in the file is handled as it would be on
a machine. The file is read again whenever it changes, so that hardware comes, goes and breaks while a node runs.
``docs/hardware.md`` describes the file.
"""

# ruff: noqa: N802 - the names of the functions are NVML's.

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from itertools import combinations, groupby
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from computemesh.contracts.base import refused
from computemesh.contracts.resources import Nic
from computemesh.hardware import Cpu, Gpu, GpuLink, LinkKind, Memory, Platform, canonical
from computemesh_services.resource_detector.probes import GpuReading, Machine, nvml, processes, system
from computemesh_services.resource_detector.probes.nvml import NvmlProvider

T = TypeVar("T")

NAME: Final = "scripted"
BYTES_PER_MB: Final = 1024 * 1024
GPUS_MAX: Final = 256

ERRORS: Final = {
    "UNINITIALIZED": "Uninitialized",
    "INVALID_ARGUMENT": "Invalid Argument",
    "NOT_SUPPORTED": "Not Supported",
    "NO_PERMISSION": "Insufficient Permissions",
    "NOT_FOUND": "Not Found",
    "INSUFFICIENT_POWER": "Insufficient External Power",
    "DRIVER_NOT_LOADED": "Driver Not Loaded",
    "TIMEOUT": "Timeout",
    "IRQ_ISSUE": "Interrupt Request Issue",
    "LIBRARY_NOT_FOUND": "NVML Shared Library Not Found",
    "FUNCTION_NOT_FOUND": "Function Not Found",
    "CORRUPTED_INFOROM": "Corrupted infoROM",
    "GPU_IS_LOST": "GPU is lost",
    "RESET_REQUIRED": "GPU requires restart",
    "OPERATING_SYSTEM": "The operating system has blocked the request.",
    "LIB_RM_VERSION_MISMATCH": "RM has detected an NVML/RM version mismatch.",
    "MEMORY": "Insufficient Memory",
    "UNKNOWN": "Unknown Error",
}
"""What NVML calls its errors, and how the binding words them."""


class ScriptedGpu(Gpu, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU, or several that are alike."""

    count: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] = 1


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call to NVML that goes wrong."""

    call: str
    """The name of the function."""
    gpu: Annotated[int, msgspec.Meta(ge=0, le=GPUS_MAX)] | None = None
    """The physical GPU it is asked of; left out, any, and calls to the driver itself."""
    error: str = ""
    """What it answers, as in ``GPU_IS_LOST``."""
    hang_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    """How long it takes to come back."""
    from_read: Annotated[int, msgspec.Meta(ge=1)] = 1
    """The first reading, counted since the file was read, in which it goes wrong."""
    until_read: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """The first reading in which it works again; left out, never."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says."""

    platform: Platform
    gpus: Annotated[list[ScriptedGpu], msgspec.Meta(max_length=GPUS_MAX)] = []
    links: Annotated[list[GpuLink], msgspec.Meta(max_length=32_640)] = []
    nvlink: Literal["all"] | None = None
    """All GPUs reach each other through NVSwitches."""
    xgmi: Literal["all"] | None = None
    """Infinity Fabric joins all pairs of GPUs."""
    cpu: Cpu | None = None
    memory: Memory | None = None
    nics: list[Nic] | None = None
    faults: Annotated[list[Fault], msgspec.Meta(max_length=1000)] = []


NVSWITCH_LANES: Final = 18
"""NVLinks from each GPU into the switches, as an H100 has."""


def parse(data: bytes, *, seed: str = "") -> Hardware:
    """The hardware that a file describes, its GPUs counted out, numbered, and each with a uuid and an address.

    Raises:
        ValueError: it cannot be used; the message names the field.
    """
    try:
        told = msgspec.json.decode(data, type=Hardware)
    except (ValueError, RecursionError) as error:
        no = refused(error, Hardware, data)
        raise ValueError(f"{no.field}: {no.reason}" if no.field else no.reason) from None
    alike = [gpu for gpu in told.gpus for _ in range(gpu.count)]
    if len(alike) > GPUS_MAX:
        raise ValueError(f"gpus: {len(alike)}, more than {GPUS_MAX}")
    given = [gpu.uuid for gpu in told.gpus if gpu.uuid]
    if len(set(given)) < len(given) or any(gpu.uuid and gpu.count > 1 for gpu in told.gpus):
        raise ValueError("gpus: a uuid belongs to one GPU")
    memory, gpus = canonical(told.memory, [_identified(gpu, index, seed) for index, gpu in enumerate(alike)])
    hardware = replace(told, gpus=gpus, memory=memory)
    _check(hardware)
    return hardware


def _identified(gpu: ScriptedGpu, index: int, seed: str) -> ScriptedGpu:
    prefix = "MIG" if gpu.mig_parent else "GPU"
    own = f"{prefix}-{uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{index}')}"
    address = f"0000:{index + 1:02x}:00.0" if index < 255 else "0001:01:00.0"
    return replace(gpu, index=index, count=1, uuid=gpu.uuid or own, pci_bus_id=gpu.pci_bus_id or address)


def _check(hardware: Hardware) -> None:
    count = len(hardware.gpus)
    cuda = hardware.platform is Platform.CUDA
    if hardware.platform is Platform.CPU and count:
        raise ValueError("platform: CPU has no gpus; CUDA, ROCM or METAL has")
    for place, link in enumerate(hardware.links):
        if not link.a < link.b < count:
            raise ValueError(f"links[{place}]: a must be below b, and both one of the {count} gpus")
        if cuda and link.kind is LinkKind.XGMI:
            raise ValueError(f"links[{place}].kind: XGMI joins AMD's GPUs, and the platform is CUDA")
    if hardware.nvlink and (hardware.links or not cuda):
        raise ValueError("nvlink: goes with the platform CUDA, and instead of links")
    if hardware.xgmi and (hardware.links or hardware.platform is not Platform.ROCM):
        raise ValueError("xgmi: goes with the platform ROCM, and instead of links")
    for place, gpu in enumerate(hardware.gpus):
        parts = gpu.compute_capability.split(".")
        if gpu.compute_capability and not (len(parts) == 2 and all(part.isdecimal() for part in parts)):
            raise ValueError(f"gpus[{place}].compute_capability: {gpu.compute_capability!r} is not like '9.0'")
    physical = len(_physical(hardware.gpus))
    for place, fault in enumerate(hardware.faults):
        at = f"faults[{place}]"
        if not cuda:
            raise ValueError(f"{at}: only calls to NVML can be made to fail, and the platform is {hardware.platform}")
        if fault.call not in CALLS:
            raise ValueError(f"{at}.call: {fault.call!r} is none of {', '.join(sorted(CALLS))}")
        if fault.error and fault.error not in ERRORS:
            raise ValueError(f"{at}.error: {fault.error!r} is none of {', '.join(sorted(ERRORS))}")
        if not fault.error and not fault.hang_s:
            raise ValueError(f"{at}: says neither error nor hang_s")
        if fault.gpu is not None and fault.gpu >= physical:
            raise ValueError(f"{at}.gpu: {fault.gpu}, but there are {physical} GPUs, numbered from 0")


class ScriptedProvider:
    """Plays a file."""

    name = NAME

    def __init__(self, path: Path, *, seed: str = "") -> None:
        """
        Raises:
            ValueError: the file cannot be used.
        """
        self._path = path
        self._seed = seed
        self._data: bytes | None = None
        self._player: _Player | None = None
        self._problem = ""
        self._load()
        if self._problem:
            raise ValueError(self._problem)

    def read(self, *, links: bool = True) -> GpuReading:
        self._load()
        assert self._player is not None
        reading = self._player.read(links)
        # A file that was edited into something that cannot be used changes nothing but the warnings.
        problems = [f"{self._problem}; what was read before it still counts"] if self._problem else []
        return with_fields(reading, provider=self.name, warnings=[*problems, *reading.warnings])

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            self._problem = f"{self._path}: {(error.strerror or 'unreadable').lower()}"
            return
        if data == self._data:
            return
        self._data, self._problem = data, ""
        try:
            self._player = _Player(parse(data, seed=self._seed))
        except ValueError as error:
            self._problem = f"{self._path}: {error}"


class _Player:
    """One state of the file."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._machine = Machine(cpu=hardware.cpu, memory=hardware.memory, nics=hardware.nics)
        self._nvml: ScriptedNvml | None = None
        if hardware.platform is Platform.CUDA:
            nodes = {gpu.pci_bus_id: gpu.numa_node for gpu in hardware.gpus}
            held = {p.pid: p.reservation_id for gpu in hardware.gpus for p in gpu.processes or ()}
            self._nvml = ScriptedNvml(hardware)
            self._provider = NvmlProvider(
                self._nvml,
                numa_node=nodes.get,
                reservation_of=lambda pid: held.get(pid) or processes.reservation_of(pid),
                memory=lambda: hardware.memory or system.read_memory(),
            )

    def read(self, links: bool) -> GpuReading:
        if self._nvml is not None:
            self._nvml.reads += 1
            return with_fields(self._provider.read(links=links), machine=self._machine)
        return GpuReading(
            provider=NAME,
            platform=self._hardware.platform,
            gpus=[_plain(gpu) for gpu in self._hardware.gpus],
            links=_fabric(len(self._hardware.gpus)) if self._hardware.xgmi else self._hardware.links,
            machine=self._machine,
        )


def _fabric(count: int) -> list[GpuLink]:
    return [GpuLink(a=a, b=b, kind=LinkKind.XGMI) for a, b in combinations(range(count), 2)]


def _plain(gpu: Gpu) -> Gpu:
    """Without what only a script says of it."""
    return Gpu(**{name: getattr(gpu, name) for name in Gpu.__struct_fields__})


def _physical(gpus: Sequence[Gpu]) -> list[list[Gpu]]:
    """The GPUs, or the slices, that each card has."""
    keyed = groupby(gpus, key=lambda gpu: gpu.mig_parent or gpu.uuid)
    return [list(group) for _, group in keyed]


class ScriptedError(Exception):
    """``NVMLError``"""


def _error_class(name: str) -> type[ScriptedError]:
    """As the binding names it: ``GPU_IS_LOST`` is ``NVMLError_GpuIsLost``."""
    return type(f"NVMLError_{name.title().replace('_', '')}", (ScriptedError,), {})


_CLASSES: Final = {name: _error_class(name) for name in ERRORS}


def error(name: str) -> ScriptedError:
    """An error of NVML, as a call raises it."""
    return _CLASSES[name](ERRORS[name])


@dataclass(frozen=True)
class _Handle:
    card: int
    gpu: Gpu
    slice: bool = False


@dataclass(frozen=True)
class _Memory:
    total: int
    used: int


@dataclass(frozen=True)
class _Utilization:
    gpu: int


@dataclass(frozen=True)
class _Pci:
    busId: str  # noqa: N815


@dataclass(frozen=True)
class _Attributes:
    gpuInstanceSliceCount: int  # noqa: N815
    computeInstanceSliceCount: int  # noqa: N815
    memorySizeMB: int  # noqa: N815


@dataclass(frozen=True)
class _Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815


class ScriptedNvml:
    """NVML, as far as the provider uses it, for hardware that is made up: the ``NvmlModule`` of a file."""

    NVMLError: type[Exception] = ScriptedError
    NVMLError_NotSupported: type[Exception] = _CLASSES["NOT_SUPPORTED"]
    NVMLError_NotFound: type[Exception] = _CLASSES["NOT_FOUND"]
    NVMLError_InvalidArgument: type[Exception] = _CLASSES["INVALID_ARGUMENT"]
    NVMLError_NoPermission: type[Exception] = _CLASSES["NO_PERMISSION"]
    NVMLError_FunctionNotFound: type[Exception] = _CLASSES["FUNCTION_NOT_FOUND"]
    NVMLError_Uninitialized: type[Exception] = _CLASSES["UNINITIALIZED"]
    NVMLError_DriverNotLoaded: type[Exception] = _CLASSES["DRIVER_NOT_LOADED"]
    NVMLError_LibraryNotFound: type[Exception] = _CLASSES["LIBRARY_NOT_FOUND"]
    NVMLError_GpuIsLost: type[Exception] = _CLASSES["GPU_IS_LOST"]

    def __init__(self, hardware: Hardware) -> None:
        self.reads = 0
        """Readings so far, the one that runs included."""
        self.inits = 0
        """Times it was initialised and not shut down."""
        self._cards = _physical(hardware.gpus)
        self.faults = list(hardware.faults)
        self._switched = hardware.nvlink == "all"
        self._links = {(link.a, link.b): link for link in hardware.links}
        self._names = {p.pid: p.name for gpu in hardware.gpus for p in gpu.processes or ()}
        self._gpus = hardware.gpus

    def nvmlInit(self) -> None:
        self._play("nvmlInit")
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self._asked("nvmlShutdown")
        self.inits -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._asked("nvmlSystemGetDriverVersion")
        return _told(next((gpu.driver for gpu in self._gpus if gpu.driver), None))

    def nvmlSystemGetProcessName(self, pid: int, /) -> str:
        self._asked("nvmlSystemGetProcessName")
        return _told(self._names.get(pid), "NOT_FOUND")

    def nvmlDeviceGetCount(self) -> int:
        self._asked("nvmlDeviceGetCount")
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> _Handle:
        self._asked("nvmlDeviceGetHandleByIndex", index)
        return _Handle(index, self._cards[index][0])

    def nvmlDeviceGetName(self, handle: object, /) -> str:
        device = self._device("nvmlDeviceGetName", handle)
        suffix = f" MIG {device.gpu.mig_profile}" if device.slice and device.gpu.mig_profile else ""
        return device.gpu.name if device.gpu.name.endswith(suffix) else device.gpu.name + suffix

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:
        device = self._device("nvmlDeviceGetUUID", handle)
        return device.gpu.uuid if device.slice else device.gpu.mig_parent or device.gpu.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> _Memory:
        device = self._device("nvmlDeviceGetMemoryInfo", handle)
        if device.gpu.unified_memory:
            raise error("NOT_SUPPORTED")
        gpus = [device.gpu] if device.slice else self._cards[device.card]
        return _Memory(
            sum(gpu.vram_total_mb for gpu in gpus) * BYTES_PER_MB, sum(gpu.vram_used_mb for gpu in gpus) * BYTES_PER_MB
        )

    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> list[int]:
        told = self._device("nvmlDeviceGetCudaComputeCapability", handle).gpu.compute_capability
        return [int(part) for part in told.split(".")] if told else _told(None)

    def nvmlDeviceGetPciInfo(self, handle: object, /) -> _Pci:
        return _Pci(f"0000{self._device('nvmlDeviceGetPciInfo', handle).gpu.pci_bus_id.upper()}")

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: object, /) -> int:
        return _told(self._device("nvmlDeviceGetMaxPcieLinkGeneration", handle).gpu.pcie_generation or None)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: object, /) -> int:
        return _told(self._device("nvmlDeviceGetMaxPcieLinkWidth", handle).gpu.pcie_lanes or None)

    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> _Utilization:
        device = self._device("nvmlDeviceGetUtilizationRates", handle)
        return _Utilization(round(_told(device.gpu.utilization_percent)))

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int:
        del sensor
        return round(_told(self._device("nvmlDeviceGetTemperature", handle).gpu.temperature_c))

    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int:
        return round(_told(self._device("nvmlDeviceGetPowerUsage", handle).gpu.power_w) * 1000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object, /) -> list[_Process]:
        told = _told(self._device("nvmlDeviceGetComputeRunningProcesses", handle).gpu.processes)
        return [_Process(p.pid, None if p.memory_mb is None else p.memory_mb * BYTES_PER_MB) for p in told]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> list[_Process]:
        _told(self._device("nvmlDeviceGetGraphicsRunningProcesses", handle).gpu.processes)
        return []

    def nvmlDeviceGetMigMode(self, handle: object, /) -> list[int]:
        device = self._device("nvmlDeviceGetMigMode", handle)
        return [nvml.MIG_ENABLE, nvml.MIG_ENABLE] if device.gpu.mig_parent else _told(None)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int:
        self._device("nvmlDeviceGetMaxMigDeviceCount", handle)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int, /) -> _Handle:
        device = self._device("nvmlDeviceGetMigDeviceHandleByIndex", handle)
        slices = self._cards[device.card]
        if index >= len(slices):
            raise error("NOT_FOUND")
        return _Handle(device.card, slices[index], slice=True)

    def nvmlDeviceGetAttributes(self, handle: object, /) -> _Attributes:
        self._device("nvmlDeviceGetAttributes", handle)
        raise error("NOT_SUPPORTED")

    def nvmlDeviceGetNvLinkState(self, handle: object, link: int, /) -> int:
        device = self._device("nvmlDeviceGetNvLinkState", handle)
        ends = self._ends(device.gpu)
        if link >= len(ends):
            raise error("INVALID_ARGUMENT" if ends else "NOT_SUPPORTED")
        return 1

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: object, link: int, /) -> int:
        device = self._device("nvmlDeviceGetNvLinkRemoteDeviceType", handle)
        return nvml.REMOTE_GPU if self._ends(device.gpu)[link] else nvml.REMOTE_SWITCH

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: object, link: int, /) -> _Pci:
        device = self._device("nvmlDeviceGetNvLinkRemotePciInfo", handle)
        return _Pci(f"0000{self._ends(device.gpu)[link].upper() or '0000:FF:00.0'}")

    def nvmlDeviceGetP2PStatus(self, one: object, other: object, index: int, /) -> int:
        self._device("nvmlDeviceGetP2PStatus", one)
        self._device("nvmlDeviceGetP2PStatus", other)
        del index
        return nvml.P2P_OK

    def nvmlDeviceGetTopologyCommonAncestor(self, one: object, other: object, /) -> int:
        a = self._device("nvmlDeviceGetTopologyCommonAncestor", one).gpu.index
        b = self._device("nvmlDeviceGetTopologyCommonAncestor", other).gpu.index
        link = self._links.get((min(a, b), max(a, b)))
        levels = {kind: level for level, kind in nvml.DISTANCES.items()}
        return levels.get(_told(link).kind, 50)

    def _ends(self, gpu: Gpu) -> list[str]:
        """Where the NVLinks of a GPU lead: to the PCI bus id of another, or "" for a switch."""
        if self._switched:
            return [""] * NVSWITCH_LANES
        mine = [link for link in self._links.values() if link.kind is LinkKind.NVLINK and gpu.index in (link.a, link.b)]
        return [
            self._gpus[link.b if gpu.index == link.a else link.a].pci_bus_id
            for link in mine
            for _ in range(link.lanes or 1)
        ]

    def _device(self, call: str, handle: object) -> _Handle:
        assert isinstance(handle, _Handle)
        self._asked(call, handle.card)
        return handle

    def _asked(self, call: str, card: int | None = None) -> None:
        if self.inits <= 0:
            raise error("UNINITIALIZED")
        self._play(call, card)

    def _play(self, call: str, card: int | None = None) -> None:
        for fault in self.faults:
            now = fault.from_read <= self.reads and (fault.until_read is None or self.reads < fault.until_read)
            if now and fault.call == call and (fault.gpu is None or fault.gpu == card):
                time.sleep(fault.hang_s)
                if fault.error:
                    raise error(fault.error)


CALLS: Final = frozenset(name for name in vars(ScriptedNvml) if name.startswith("nvml"))


def _told(value: T | None, name: str = "NOT_SUPPORTED") -> T:
    """A value that a script gives; without one, the call is answered with that error."""
    if value is None:
        raise error(name)
    return value
