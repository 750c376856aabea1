"""CPU, memory, disks and load of this machine, by psutil and the kernel's files.

Inside a container psutil sees the whole machine; where the kernel tells what the container may use, that is
what is reported. What cannot be read is left out, or 0 where the contract says "not told".
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

import psutil

from computemesh.contracts.resources import Disk, Load
from computemesh.hardware import Cpu, Gpu, LinkKind, Memory

BYTES_PER_MB: Final = 1024 * 1024

CPUINFO: Final = Path("/proc/cpuinfo")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
CGROUPS: Final = Path("/sys/fs/cgroup")
ROOT: Final = "/"

DEVICES: Final = Path("/sys/devices/system")

# fmt: off
FEATURES: Final = frozenset((
    # x86
    "sse4_2", "f16c", "fma", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl",
    "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx512_bitalg", "avx512ifma",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    # Arm
    "neon", "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme",
    "sme2",
))
# fmt: on
"""Instructions that inference engines have code for, as Linux calls them."""

_MODEL_KEYS: Final = ("model name", "hardware", "cpu model", "model")
"""As architectures spell it in cpuinfo, best first; ``model`` alone is a number on x86."""


def read_cpu(*, cpuinfo: Path = CPUINFO, devices: Path = DEVICES) -> Cpu:
    """The processor, with the threads that this process may run on."""
    threads = _threads()
    lines = _facts(cpuinfo)
    packages = {read_text(path) for path in devices.glob("cpu/cpu[0-9]*/topology/physical_package_id")} - {""}
    flags = {flag for key, value in lines if key in ("flags", "features") for flag in value.split()}
    return Cpu(
        model=_cpu_model(lines),
        cores=min(psutil.cpu_count(logical=False) or 0, threads),
        threads=threads,
        frequency_mhz=_frequency_mhz(),
        sockets=len(packages or {value for key, value in lines if key == "physical id"}),
        numa_nodes=sum(1 for _ in devices.glob("node/node[0-9]*")),
        architecture=platform.machine(),
        features=sorted(flags & FEATURES),
    )


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 0


def _facts(cpuinfo: Path) -> list[tuple[str, str]]:
    """The lines of cpuinfo, names in lower case; each CPU repeats them."""
    pairs = (line.partition(":") for line in _text(cpuinfo).splitlines())
    return list(dict.fromkeys((key.strip().lower(), value.strip()) for key, _, value in pairs))


def _cpu_model(lines: list[tuple[str, str]]) -> str:
    facts = dict(reversed(lines))  # The first CPU counts.
    named = (facts[key] for key in _MODEL_KEYS if facts.get(key) and not facts[key].isdecimal())
    return next(named, "") or platform.processor() or platform.machine()


def _frequency_mhz() -> float:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError, RuntimeError):
        return 0.0  # Virtual machines often have no such file, and some platforms no such function.
    # The stubs promise a value; psutil returns None where the kernel tells nothing.
    return round((frequency.max or frequency.current) if frequency else 0.0, 1)


def read_memory(*, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Memory:
    """Memory and swap, cut down to the tightest cgroup v2 limit on the way from this process to the root."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limits = list(_memory_limits(cgroups, membership))
    return Memory(
        total_mb=min([memory.total, *(limit.bytes_max for limit in limits)]) // BYTES_PER_MB,
        available_mb=min([memory.available, *(limit.bytes_left for limit in limits)]) // BYTES_PER_MB,
        swap_total_mb=swap.total // BYTES_PER_MB,
        swap_free_mb=swap.free // BYTES_PER_MB,
    )


@dataclass(frozen=True, kw_only=True)
class _MemoryLimit:
    bytes_max: int
    bytes_left: int
    """Counts cached file pages that the kernel would drop as left, as ``available`` does for a machine."""


def _memory_limits(cgroups: Path, membership: Path) -> Iterator[_MemoryLimit]:
    for group in _own_groups(cgroups, membership):
        limit = _text(group / "memory.max").strip()
        if limit.isdecimal():  # Without a limit it reads "max".
            used = _number(_text(group / "memory.current"))
            dropped = _stat(_text(group / "memory.stat"), "inactive_file")
            left = int(limit) - max(used - dropped, 0)
            yield _MemoryLimit(bytes_max=int(limit), bytes_left=max(left, 0))


def _own_groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """The cgroup of this process and those around it, the root of the hierarchy last."""
    lines = _text(membership).splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    parts = [part for part in own.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield cgroups.joinpath(*parts[:depth])


def read_disks() -> list[Disk]:
    """The local file systems that lie on a device, each device once, at its shortest mount point.

    A container is shown no devices but those behind single mounts; it gets its root instead.
    """
    mounts: dict[str, str] = {}
    for partition in psutil.disk_partitions(all=False):
        if _is_disk(partition.device, partition.mountpoint):
            before = mounts.setdefault(partition.device, partition.mountpoint)
            mounts[partition.device] = min(before, partition.mountpoint, key=lambda mount: (len(mount), mount))
    disks = (_disk(mount) for mount in sorted(mounts.values()) or [ROOT])
    return [disk for disk in disks if disk is not None]


def _is_disk(device: str, mount: str) -> bool:
    # Container runtimes mount single files such as /etc/hosts; snaps and images are loop devices.
    try:
        return not device.startswith("/dev/loop") and Path(mount).is_dir()
    except OSError:
        return False


def _disk(mount: str) -> Disk | None:
    try:
        usage = psutil.disk_usage(mount)
    except OSError:
        return None
    return Disk(mount=mount, total_mb=usage.total // BYTES_PER_MB, free_mb=usage.free // BYTES_PER_MB)


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Seconds since boot, summed over all CPUs."""

    busy_s: float
    total_s: float


def read_cpu_times() -> CpuTimes:
    """Where the CPUs spent their time so far.

    psutil's own ``cpu_percent`` remembers its last call by thread, so it answers 0 to each new worker thread.
    """
    times = psutil.cpu_times()._asdict()
    # Linux counts the time of guests in user and nice as well.
    total_s = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    idle_s = times.get("idle", 0.0) + times.get("iowait", 0.0)
    return CpuTimes(busy_s=total_s - idle_s, total_s=total_s)


def cpu_percent(before: CpuTimes, now: CpuTimes) -> float:
    """How busy the CPUs were between two readings: 0 to 100, all CPUs together."""
    elapsed_s = now.total_s - before.total_s
    if elapsed_s <= 0:
        return 0.0
    return round(min(max((now.busy_s - before.busy_s) / elapsed_s, 0.0), 1.0) * 100, 1)


def read_load(node_id: str, gpus: list[Gpu], *, since: CpuTimes) -> tuple[Load, CpuTimes]:
    """How busy the node was since a reading of :func:`read_cpu_times`, and the reading to pass next time."""
    now = read_cpu_times()
    load = Load(
        node_id=node_id,
        cpu_percent=cpu_percent(since, now),
        memory_available_mb=read_memory().available_mb,
        gpus=gpus,
    )
    return load, now


PCI: Final = Path("sys/bus/pci/devices")

_PCI_ADDRESS: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_HOST_BRIDGE: Final = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")


def pci_numa_node(bus_id: str, *, root: Path = Path("/")) -> int | None:
    """The NUMA node that a PCI device belongs to, by its address such as ``0000:3b:00.0``; None if not told."""
    return numa_node(root / PCI / bus_id)


def numa_node(device: Path) -> int | None:
    """The NUMA node of a device, by its folder; None if not told."""
    text = read_text(device / "numa_node")
    return int(text) if text.isdecimal() else None  # "-1" where the firmware does not tell.


def pci_address(device: Path) -> str:
    """The address of the PCI device behind a device's folder; empty if there is none."""
    parts = reversed(device.resolve().parts)
    return next((part for part in parts if _PCI_ADDRESS.fullmatch(part)), "")


def pcie_distance(one: str, other: str, *, root: Path = Path("/")) -> LinkKind | None:
    """How two PCI devices reach each other, by the bridges on the way; None if the kernel does not tell."""
    a, b = _bridges(root / PCI / one), _bridges(root / PCI / other)
    if not a or not b:
        return None
    if a[0] != b[0]:
        nodes = pci_numa_node(one, root=root), pci_numa_node(other, root=root)
        return LinkKind.NODE if nodes[0] == nodes[1] is not None else LinkKind.SYS
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    if common == 1:
        return LinkKind.PHB
    return LinkKind.PIX if max(len(a), len(b)) - common <= 1 else LinkKind.PXB


def _bridges(device: Path) -> list[str]:
    """The host bridge above a PCI device and the bridges below that, downwards, without the device."""
    parts = device.resolve().parts
    start = next((number for number, part in enumerate(parts) if _HOST_BRIDGE.fullmatch(part)), None)
    return [] if start is None else list(parts[start:-1])


def read_text(path: Path) -> str:
    """The text of a file of the kernel, without the end of its line; empty when it cannot be read."""
    return _text(path).strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _stat(text: str, key: str) -> int:
    lines = (line.partition(" ") for line in text.splitlines())
    return next((_number(value) for name, _, value in lines if name == key), 0)
