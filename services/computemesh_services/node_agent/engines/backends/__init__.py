"""The devices of this machine, and how they are doing: one backend for each way to reach a device.

Each backend asks its platform's own tool (``nvidia-smi``, ``amd-smi`` or ``rocm-smi``, ``system_profiler``,
``xpu-smi`` or ``sycl-ls``, ``vulkaninfo``; for CPUs the files of the kernel). What such a tool prints is parsed by
functions without I/O. A tool that is missing, fails, or does not end costs its facts and never more: what went wrong
is a warning. ``choice`` says which backend serves, ``readings`` keeps what is known of the devices fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from computemesh_services.node_agent.engines.device import BackendName, DeviceMetrics, DeviceRef

BYTES_PER_MB: Final = 1024 * 1024

HIDE_VULKAN: Final = {"GGML_VK_VISIBLE_DEVICES": ""}
"""An engine that was built for several backends would take the other GPUs through Vulkan."""
HIDE_CUDA: Final = {"CUDA_VISIBLE_DEVICES": "-1"}
HIDE_ROCM: Final = {"HIP_VISIBLE_DEVICES": "-1"}


Environ = Mapping[str, str]

MachineMemory = Callable[[], tuple[int, int]]
"""The machine's own memory, all of it and what is available, in MiB."""

NOTHING: Final = ("", "-1")
"""What such a variable is when it means "no device"."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a backend found."""

    devices: tuple[DeviceRef, ...] = ()
    warnings: tuple[str, ...] = ()
    """Why there are none, or fewer than there should be; empty also when there is plainly no such hardware."""


class Backend(Protocol):
    """A way to reach devices. The methods block for as long as a tool may take: call them in a thread."""

    @property
    def name(self) -> BackendName: ...

    def discover(self) -> Found:
        """The devices there are. Never raises."""
        ...

    def metrics(self) -> dict[str, DeviceMetrics]:
        """How the devices that :meth:`discover` found are doing, by their ids; what cannot be told now is left out.
        Never raises."""
        ...


def allowed(devices: Sequence[DeviceRef], told: str | None) -> list[DeviceRef]:
    """Those of *devices* that a variable such as ``CUDA_VISIBLE_DEVICES`` allows, in its order.

    Args:
        told: numbers as the tool counts, or (beginnings of) uuids, separated by commas; what follows the first that
            names nothing does not count, as the drivers have it. None = all.
    """
    if told is None:
        return list(devices)
    chosen: list[DeviceRef] = []
    for part in (part.strip() for part in told.split(",")):
        matching = [one for one in devices if one not in chosen and _named(one, part)]
        if not matching:
            break
        chosen += matching
    return chosen


def narrowed(found: Found, environ: Environ, *names: str) -> Found:
    """*found* without the devices that variables of this process keep from it: who starts the agent with some GPUs
    means these."""
    devices = list(found.devices)
    warnings = list(found.warnings)
    for name in names:
        left = allowed(devices, environ.get(name))
        if devices and not left and environ[name] not in NOTHING:
            warnings.append(f"{name}={environ[name]} names none of the devices that there are")
        devices = left
    return Found(devices=tuple(devices), warnings=tuple(warnings))


def _named(device: DeviceRef, part: str) -> bool:
    if part.isdecimal():
        return device.index == int(part)
    return bool(part) and device.uuid.lower().startswith(part.lower())


def megabytes(text: str | float | None, *, per_mb: int = 1) -> int | None:
    """MiB, from what a tool prints; None for ``N/A`` and the like.

    Args:
        per_mb: how many of the tool's units make a MiB.
    """
    value = number(text)
    return None if value is None else int(value / per_mb)


def number(text: object) -> float | None:
    """What a tool prints for a number that it may not know, never negative; None for ``N/A`` and the like."""
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        return None
    try:
        value = float(text.strip()) if isinstance(text, str) else float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e18 else None


def percent(text: object) -> float | None:
    value = number(text)
    return None if value is None else min(value, 100.0)


def free_of(total: int | None, used: int | None) -> int | None:
    """What is left of *total* when *used* is gone; None when either is not known."""
    return None if total is None or used is None else max(total - used, 0)
