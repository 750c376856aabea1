"""Which provider tells of the GPUs of this machine.

Asked for by name it is that one, whether it works or not: what does not work is a warning in each reading.
``auto`` takes the first that finds a GPU, and stays with it. Scripted hardware is only ever asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from computemesh.config import ConfigError
from computemesh_services.resource_detector.probes import GpuProvider, GpuReading, NoGpus, metal, nvml, rocm, scripted

Name = Literal["auto", "nvml", "rocm", "metal", "none", "scripted"]

MAKERS: Final[dict[str, Callable[..., GpuProvider]]] = {
    "nvml": nvml.provider,
    "rocm": rocm.provider,
    "metal": metal.provider,
}
"""In the order in which ``auto`` looks."""


class Auto:
    """Whichever provider finds a GPU first."""

    name = "auto"

    def __init__(self, candidates: Sequence[GpuProvider]) -> None:
        self._candidates = list(candidates)
        self._chosen: GpuProvider | None = None

    def read(self, *, links: bool = True) -> GpuReading:
        """A driver that went away is waited for: the node does not turn into one of another kind meanwhile."""
        readings = [candidate.read(links=links) for candidate in self._candidates]
        if self._chosen is None:
            found = (one for one, reading in zip(self._candidates, readings, strict=True) if reading.gpus)
            self._chosen = next(found, None)
        if self._chosen is None:
            return GpuReading(provider="none", warnings=[text for reading in readings for text in reading.warnings])
        mine = readings.pop(self._candidates.index(self._chosen))
        others = [reading for reading in readings if reading.gpus]
        said = [
            f"{len(other.gpus)} more GPUs answer to the provider {other.provider!r}, which is not the one in use; "
            f"COMPUTEMESH_GPU_PROVIDER={other.provider} takes them instead"
            for other in others
        ]
        return replace(mine, warnings=[*mine.warnings, *said])


def choose(name: Name = "auto", *, hardware: str = "", seed: str = "") -> GpuProvider:
    """The provider of that name.

    Args:
        hardware: path of the file that ``scripted`` plays.
        seed: what the uuids of scripted GPUs follow from, where the file has none.

    Raises:
        ConfigError: there is no such file, or it cannot be used.
    """
    if name == "scripted":
        if not hardware:
            raise ConfigError("COMPUTEMESH_GPU_PROVIDER is scripted, but COMPUTEMESH_SCRIPTED_HARDWARE names no file")
        try:
            return scripted.ScriptedProvider(Path(hardware).expanduser(), seed=seed)
        except ValueError as error:
            raise ConfigError(f"COMPUTEMESH_SCRIPTED_HARDWARE: {error}") from None
    if hardware:
        raise ConfigError(
            f"COMPUTEMESH_SCRIPTED_HARDWARE is set, but COMPUTEMESH_GPU_PROVIDER is {name}; "
            "hardware that is made up must be asked for with COMPUTEMESH_GPU_PROVIDER=scripted"
        )
    if name == "none":
        return NoGpus()
    if name == "auto":
        return Auto([make(expected=False) for make in MAKERS.values()])
    return MAKERS[name](expected=True)
