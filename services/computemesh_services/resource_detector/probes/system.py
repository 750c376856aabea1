"""CPU, memory, disks and load of this machine, by psutil.

Inside a container psutil sees the whole machine; where the kernel tells what the container may use, that is
what is reported. What cannot be read is left out, or 0 where the contract says "not told".
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from computemesh.contracts.resources import Disk, Load
from computemesh.hardware import Cpu, Gpu, Memory

BYTES_PER_MB: Final = 1024 * 1024

CPUINFO: Final = Path("/proc/cpuinfo")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
CGROUPS: Final = Path("/sys/fs/cgroup")
ROOT: Final = "/"

_MODEL_KEYS: Final = ("model name", "hardware", "cpu model", "model")
"""As architectures spell it in cpuinfo, best first; ``model`` alone is a number on x86."""


def read_cpu(*, cpuinfo: Path = CPUINFO) -> Cpu:
    """The processor, with the threads that this process may run on."""
    threads = _threads()
    return Cpu(
        model=_cpu_model(cpuinfo),
        cores=min(psutil.cpu_count(logical=False) or 0, threads),
        threads=threads,
        frequency_mhz=_frequency_mhz(),
    )


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 0


def _cpu_model(cpuinfo: Path) -> str:
    facts: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
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
