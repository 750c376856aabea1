"""CPU devices: sets of the machine's threads.

Which sets is told by a word (``numa``, the default: one for each NUMA node that has CPUs, so one on most machines), a
number of sets of the same size, or the sets themselves, as in ``0-7,16-23 8-15,24-31``. Threads of one core stay
together.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from computemesh_services.node_agent.engines.backends import (
    BYTES_PER_MB,
    HIDE_CUDA,
    HIDE_ROCM,
    HIDE_VULKAN,
    Found,
    MachineMemory,
)
from computemesh_services.node_agent.engines.device import DeviceMetrics, DeviceRef

NUMA: Final = "numa"

SENSORS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "acpitz")
"""Names of the kernel's drivers for the temperature of a CPU, the best first."""

CPUS_MAX: Final = 8192
"""``CONFIG_NR_CPUS`` of Linux goes no further."""

HIDE_GPUS: Final = HIDE_CUDA | HIDE_ROCM | HIDE_VULKAN

Plan = str | int | tuple[tuple[int, ...], ...]
"""How CPUs are split: :data:`NUMA`, a number of devices, or the sets."""

_RANGE: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?$")


_MODEL: Final = re.compile(r"^model name\s*:\s*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LogicalCpu:
    """A thread of the machine that this process may use."""

    number: int
    core: tuple[int, int]
    """Socket and core; threads of one core have the same."""
    node: int = 0
    """NUMA node."""


def parse_set(text: str) -> tuple[int, ...]:
    """The CPUs in a set such as ``0-7,16-23``, in order.

    Raises:
        ValueError: it is no such set.
    """
    found: set[int] = set()
    for part in text.split(","):
        told = _RANGE.match(part.strip())
        if told is None:
            raise ValueError(f"{text.strip()!r} is no set of CPUs such as 0-7,16-23")
        first, last = int(told[1]), int(told[2] or told[1])
        if not first <= last < CPUS_MAX:
            raise ValueError(f"{part.strip()!r} is no range of CPUs")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def parse_plan(text: str) -> Plan:
    """How CPUs are to be split: :data:`NUMA`, a number of devices, or the sets.

    Raises:
        ValueError: it is none of these.
    """
    words = text.split()
    if words in ([], [NUMA]):
        return NUMA
    if len(words) == 1 and words[0].isdecimal():
        count = int(words[0])
        if not 1 <= count <= CPUS_MAX:
            raise ValueError(f"{count} CPU devices are no number from 1 to {CPUS_MAX}")
        return count
    sets = tuple(parse_set(word) for word in words)
    numbers = [number for one in sets for number in one]
    twice = sorted({number for number in numbers if numbers.count(number) > 1}) if len(numbers) <= CPUS_MAX else [0]
    if twice:
        raise ValueError(f"CPU {twice[0]} is in more than one set")
    return sets


def split(plan: Plan, cpus: Sequence[LogicalCpu], name: str = "CPU") -> list[DeviceRef]:
    """The devices of a machine with *cpus*, which their maker calls *name*.

    Raises:
        ValueError: the plan names CPUs that there are not, or more devices than CPUs.
    """
    if isinstance(plan, int):
        sets = _even(plan, cpus)
    elif isinstance(plan, tuple):
        missing = sorted({number for one in plan for number in one} - {cpu.number for cpu in cpus})
        if missing:
            raise ValueError(f"there is no CPU {missing[0]} that this process may use")
        sets = [list(one) for one in plan]
    else:
        nodes = sorted({cpu.node for cpu in cpus})
        sets = [[cpu.number for cpu in cpus if cpu.node == node] for node in nodes]
    if len(sets) == 1 and len(sets[0]) == len(cpus):
        return [DeviceRef(id="cpu:0", environment=HIDE_GPUS, name=name)]
    cores = {cpu.number: cpu.core for cpu in cpus}
    return [
        DeviceRef(
            id=f"cpu:{index}",
            index=index,
            name=f"{name}, CPUs {shown(one)}",
            environment=HIDE_GPUS,
            # As where all CPUs are one device: a thread a core, and never all that there are.
            threads=max(1, min(len({cores[number] for number in one}), len(one) - 1)),
            cpus=tuple(sorted(one)),
        )
        for index, one in enumerate(sets)
    ]


def _even(count: int, cpus: Sequence[LogicalCpu]) -> list[list[int]]:
    """*count* sets of neighbouring cores, none more than a core larger than another."""
    cores = sorted({(cpu.node, cpu.core) for cpu in cpus})
    if count > len(cores):
        raise ValueError(f"{count} CPU devices are more than the {len(cores)} cores that this process may use")
    bounds = [len(cores) * step // count for step in range(count + 1)]
    parts = [set(cores[first:last]) for first, last in itertools.pairwise(bounds)]
    return [[cpu.number for cpu in cpus if (cpu.node, cpu.core) in part] for part in parts]


def shown(numbers: Iterable[int]) -> str:
    """A set as people write it, such as ``0-7,16-23``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_cpus(*, root: Path = Path("/"), usable: Iterable[int] | None = None) -> list[LogicalCpu]:
    """The CPUs that this process may use, as the kernel lays them out; where it does not say, each is a core.

    Args:
        usable: their numbers; left out, this process's affinity.
    """
    numbers = sorted(_usable() if usable is None else usable)
    system = root / "sys/devices/system"
    nodes: dict[int, int] = {}
    for folder in system.glob("node/node[0-9]*"):
        try:
            on_it = parse_set(_read(folder / "cpulist"))
        except ValueError:  # A node of memory alone.
            continue
        nodes |= dict.fromkeys(on_it, int(folder.name.removeprefix("node")))
    return [
        LogicalCpu(number=number, core=_core(system / f"cpu/cpu{number}/topology", number), node=nodes.get(number, 0))
        for number in numbers
    ]


def parse_model(cpuinfo: str) -> str:
    """What the maker calls the CPU, in ``/proc/cpuinfo``; ``CPU`` where that does not tell."""
    found = _MODEL.search(cpuinfo)
    return found[1].strip() if found else "CPU"


def _core(topology: Path, number: int) -> tuple[int, int]:
    socket, core = _read(topology / "physical_package_id"), _read(topology / "core_id")
    return (int(socket), int(core)) if socket.isdecimal() and core.isdecimal() else (0, number)


def _usable() -> Iterable[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def busy_percent(before: Mapping[int, tuple[float, float]], now: Mapping[int, tuple[float, float]]) -> float | None:
    """How much of the time between two looks CPUs were busy.

    Args:
        before: seconds busy and seconds in all, by the number of the CPU.
    """
    both = before.keys() & now.keys()
    spent = sum(now[number][1] - before[number][1] for number in both)
    busy = sum(now[number][0] - before[number][0] for number in both)
    return min(max(100.0 * busy / spent, 0.0), 100.0) if spent > 0 else None


def read_times() -> dict[int, tuple[float, float]]:
    """Seconds busy and seconds in all of each CPU, since the machine began."""
    found: dict[int, tuple[float, float]] = {}
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        told: Any = times
        all_s = sum(told) - getattr(told, "guest", 0.0) - getattr(told, "guest_nice", 0.0)  # Both stand in user, too.
        found[number] = (all_s - told.idle - getattr(told, "iowait", 0.0), all_s)
    return found


def read_temperature() -> float | None:
    """The highest temperature of a CPU that the machine tells, in degrees Celsius."""
    sensors: Any = getattr(psutil, "sensors_temperatures", None)  # Not on every platform.
    if sensors is None:
        return None
    try:
        told: Mapping[str, Sequence[Any]] = sensors()
    except (OSError, ValueError):
        return None
    chosen = next((told[name] for name in SENSORS if told.get(name)), list[Any]())
    return max((float(one.current) for one in chosen if one.current), default=None)


def machine_memory() -> tuple[int, int]:
    """The machine's memory, all of it and what is available, in MiB."""
    told = psutil.virtual_memory()
    return told.total // BYTES_PER_MB, told.available // BYTES_PER_MB


@dataclass
class CpuSets:
    """The machine's CPUs, split as *plan* says."""

    plan: Plan = NUMA
    cpus: Callable[[], list[LogicalCpu]] = read_cpus
    memory: MachineMemory = machine_memory
    times: Callable[[], dict[int, tuple[float, float]]] = read_times
    temperature: Callable[[], float | None] = read_temperature
    model: Callable[[], str] = lambda: parse_model(_read(Path("/proc/cpuinfo")))

    name: Final = "cpu"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: list[DeviceRef] = []
        self._before: dict[int, tuple[float, float]] = {}

    def discover(self) -> Found:
        cpus, model = self.cpus(), self.model()
        try:
            devices, warnings = split(self.plan, cpus, model), list[str]()
        except ValueError as error:
            devices, warnings = split(NUMA, cpus, model), [f"CPUs are not split as told: {error}"]
        with self._lock:
            self._devices, self._before = devices, self.times()
        return Found(devices=tuple(devices), warnings=tuple(warnings))

    def metrics(self) -> dict[str, DeviceMetrics]:
        """The memory and the temperature are the machine's, the utilisation is since the last look."""
        total, available = self.memory()
        heat = self.temperature()
        with self._lock:
            now = self.times()
            before, self._before = self._before, now
            return {
                one.id: DeviceMetrics(
                    memory_total_mb=total,
                    memory_free_mb=available,
                    utilisation_percent=busy_percent(_of(one, before), _of(one, now)),
                    temperature_c=heat,
                )
                for one in self._devices
            }


def _of(device: DeviceRef, times: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    return {number: told for number, told in times.items() if not device.cpus or number in device.cpus}
