"""NVIDIA GPUs, read through NVML.

The binding (``pynvml``, from the distribution ``nvidia-ml-py``) is an optional dependency: it is imported
only in :func:`detect`. Everything else takes it as an argument, so a test passes a module of its own.

Three things can go wrong, and each has one outcome:

==========================================  ==============================================================
a GPU does not answer                       that GPU carries ``error`` and what is known; the others are whole
a GPU has no memory of its own to report    no error, its VRAM is 0 and a warning says so (unified memory)
the driver does not answer, or goes away    no GPUs and a warning; the next read initialises it again
==========================================  ==============================================================
"""

# ruff: noqa: N802 - the names of the functions are NVML's.

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar, cast

from computemesh.hardware import Gpu, Platform
from computemesh_services.resource_detector.probes import GpuProvider, GpuReading, NoGpus

T = TypeVar("T")

BYTES_PER_MB: Final = 1024 * 1024

DRIVER: Final = Path("/proc/driver/nvidia/version")
"""There while the kernel module is loaded, whether or not the binding is installed."""


class MemoryInfo(Protocol):
    """In bytes."""

    @property
    def total(self) -> int: ...
    @property
    def used(self) -> int: ...


class NvmlModule(Protocol):
    """The part of ``pynvml`` that is used. A handle is opaque; names are ``bytes`` in older releases."""

    NVMLError: type[Exception]
    NVMLError_NotSupported: type[Exception]
    NVMLError_Uninitialized: type[Exception]
    NVMLError_DriverNotLoaded: type[Exception]
    NVMLError_LibraryNotFound: type[Exception]

    def nvmlInit(self) -> object: ...
    def nvmlShutdown(self) -> object: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> MemoryInfo: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> tuple[int, int]: ...


class NvmlProvider:
    """The GPUs of the NVIDIA driver.

    Reads take turns, so several threads may share one provider. The driver stays initialised between reads
    until it fails.
    """

    name = "nvml"

    def __init__(self, nvml: NvmlModule) -> None:
        self._nvml = nvml
        self._ready = False
        self._turn = threading.Lock()

    def read(self) -> GpuReading:
        with self._turn:
            try:
                return self._read_all()
            except self._nvml.NVMLError as error:
                self._forget()
                return GpuReading(provider=self.name, warnings=[f"the NVIDIA driver does not answer: {error}"])

    def _read_all(self) -> GpuReading:
        if not self._ready:
            self._nvml.nvmlInit()
            self._ready = True
        cards = [_Card(self._nvml, index) for index in range(self._nvml.nvmlDeviceGetCount())]
        return GpuReading(
            provider=self.name,
            platform=Platform.CUDA if cards else Platform.CPU,
            gpus=[card.read() for card in cards],
            warnings=[warning for card in cards for warning in card.warnings],
        )

    def _forget(self) -> None:
        """Leaves the driver uninitialised, so that the next read starts over."""
        if self._ready:
            self._ready = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                return  # A driver that is gone need not be shut down.


class _Card:
    """One GPU being read, fact by fact: what fails is noted and the rest is still asked for."""

    def __init__(self, nvml: NvmlModule, index: int) -> None:
        self._nvml = nvml
        self._index = index
        self._driver_gone = (nvml.NVMLError_Uninitialized, nvml.NVMLError_DriverNotLoaded)
        self._error = ""
        self.warnings: list[str] = []

    def read(self) -> Gpu:
        """Raises ``NVMLError`` only when it is the driver that is gone, not this GPU."""
        nvml = self._nvml
        handle = self._ask("handle", lambda: nvml.nvmlDeviceGetHandleByIndex(self._index))
        if handle is None:
            return Gpu(index=self._index, error=self._error or self.warnings[-1])
        name = self._ask("name", lambda: nvml.nvmlDeviceGetName(handle))
        uuid = self._ask("uuid", lambda: nvml.nvmlDeviceGetUUID(handle))
        memory = self._ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        capability = self._ask("compute capability", lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
        return Gpu(
            index=self._index,
            name=_text(name),
            uuid=_text(uuid),
            vram_total_mb=memory.total // BYTES_PER_MB if memory else 0,
            vram_used_mb=memory.used // BYTES_PER_MB if memory else 0,
            compute_capability=".".join(map(str, capability or ())),
            error=self._error,
        )

    def _ask(self, fact: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self._driver_gone:
            raise
        except self._nvml.NVMLError_NotSupported:
            self.warnings.append(f"GPU {self._index} does not report its {fact}")
        # Bindings decode names as UTF-8, which a failing card may not return.
        except (self._nvml.NVMLError, UnicodeDecodeError) as error:
            self.warnings.append(f"GPU {self._index}, {fact}: {error}")
            self._error = self._error or f"{fact}: {error}"
        return None


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def detect() -> GpuProvider:
    """The NVML provider if NVML works here, else one without GPUs, which says why if a driver is there."""
    try:
        nvml = cast(NvmlModule, importlib.import_module("pynvml"))
    except ImportError:
        why = "NVIDIA GPUs cannot be read: the package nvidia-ml-py is not installed"
        return NoGpus(why if DRIVER.exists() else "")
    return provider_for(nvml)


def provider_for(nvml: NvmlModule) -> GpuProvider:
    """:func:`detect` once the binding is there."""
    try:
        nvml.nvmlInit()
        nvml.nvmlShutdown()
    except nvml.NVMLError_LibraryNotFound:
        return NoGpus()
    except nvml.NVMLError as error:
        return NoGpus(f"NVIDIA GPUs cannot be read: {error}")
    return NvmlProvider(nvml)
