"""Which backend serves the engines of a machine, and so which devices it has.

``auto`` takes the first of :data:`ORDER` that finds devices and that the installed llama.cpp was built for, else the
CPUs. One backend serves all: a card that two of them reach is one device, and not two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from computemesh_services.node_agent.engines.backends import Backend, Found
from computemesh_services.node_agent.engines.backends.tool import Run, ToolError
from computemesh_services.node_agent.engines.device import BackendName

Choice = Literal["auto", "cuda", "rocm", "metal", "sycl", "vulkan", "cpu"]

ORDER: Final[tuple[BackendName, ...]] = ("cuda", "rocm", "metal", "sycl", "vulkan")

LISTED_AS: Final[dict[BackendName, tuple[str, ...]]] = {
    "cuda": ("CUDA", "MUSA"),
    "rocm": ("ROCm", "HIP"),
    "metal": ("MTL", "Metal"),
    "sycl": ("SYCL",),
    "vulkan": ("Vulkan",),
}
"""What llama.cpp calls the devices that a backend reaches, before their number."""

_LINE: Final = re.compile(r"\s+([A-Za-z]+)\d*: .+\(\d+ MiB, \d+ MiB free\)\s*$")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The backend that serves, what it found, and what else is to be said."""

    backend: Backend
    found: Found


def parse_served(text: str) -> set[BackendName]:
    """The backends that reach a device, in what ``llama-server --list-devices`` prints."""
    names = {told[1] for line in text.splitlines() if (told := _LINE.match(line)) is not None}
    return {backend for backend, listed in LISTED_AS.items() if names & set(listed)}


def served_by(launcher: Sequence[str], run: Run) -> set[BackendName]:
    """The backends that the llama.cpp which *launcher* starts can use here.

    Raises:
        ToolError: it does not tell.
    """
    if not launcher:
        raise ToolError("none is installed")
    said = run([*launcher, "--list-devices"])
    return parse_served(said.checked() + "\n" + said.error)


def choose(
    wanted: Choice,
    backends: Mapping[BackendName, Backend],
    served: Callable[[], set[BackendName]],
) -> Chosen:
    """The devices of this machine. Blocks for as long as its tools take; never raises.

    Args:
        backends: all there are; ``cpu`` always finds a device.
        served: asks llama.cpp which backends it can use; raises :class:`ToolError` when it does not tell. It is asked
            only if a GPU was found.
    """
    cpu = backends["cpu"]
    if wanted != "auto":
        found = backends[wanted].discover()
        if found.devices:
            return Chosen(backend=backends[wanted], found=found)
        why = "; ".join(found.warnings) or "its tool is not installed here, or finds none"
        return Chosen(backend=backends[wanted], found=Found(warnings=(f"backend {wanted} has no devices: {why}",)))
    warnings: list[str] = []
    can: set[BackendName] | None = None
    for name in ORDER:
        found = backends[name].discover()
        warnings += found.warnings
        if not found.devices:
            continue
        if can is None:
            try:
                can = served()
            except ToolError as error:
                can = set()
                warnings.append(f"llama.cpp does not tell which GPUs it can use: {error}")
        if name in can:
            return Chosen(backend=backends[name], found=Found(devices=found.devices, warnings=tuple(warnings)))
        names = ", ".join(device.name or device.id for device in found.devices)
        warnings.append(f"{names}: found by {name}, but the llama.cpp that is installed here cannot use {name}")
    found = cpu.discover()
    return Chosen(backend=cpu, found=Found(devices=found.devices, warnings=(*warnings, *found.warnings)))
