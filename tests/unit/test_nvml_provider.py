"""Goal: a GPU, or the whole driver, may fail at any moment and the rest is still reported.

Method: a fake NVML behind the interface that the provider asks of ``pynvml``. Each test breaks one thing in
it and looks at the reading.
"""

# ruff: noqa: N801, N802 - the names are NVML's.

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from computemesh.contracts.base import decode, encode
from computemesh.hardware import Gpu, Platform, Tier, tier_of
from computemesh_services.resource_detector.probes import NoGpus, choose_provider, nvml
from computemesh_services.resource_detector.probes.nvml import NvmlProvider, provider_for

MIB = 1024 * 1024


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_Uninitialized(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


@dataclass
class FakeMemory:
    total: int
    used: int


@dataclass
class FakeCard:
    name: str | bytes
    uuid: str | bytes
    vram_mb: int
    used_mb: int = 0
    capability: tuple[int, int] = (8, 9)
    broken: dict[str, Exception] = field(default_factory=dict[str, Exception])
    """By what is asked: ``handle``, ``name``, ``uuid``, ``memory``, ``capability``."""

    def told(self, fact: str) -> FakeCard:
        if fact in self.broken:
            raise self.broken[fact]
        return self


@dataclass
class FakeNvml:
    """NVML with these cards. Every function but ``nvmlInit`` refuses until it was initialised."""

    cards: list[FakeCard] = field(default_factory=list[FakeCard])
    init_error: Exception | None = None
    count_error: Exception | None = None
    inits: int = 0
    shutdowns: int = 0

    NVMLError: type[Exception] = NVMLError
    NVMLError_NotSupported: type[Exception] = NVMLError_NotSupported
    NVMLError_Uninitialized: type[Exception] = NVMLError_Uninitialized
    NVMLError_DriverNotLoaded: type[Exception] = NVMLError_DriverNotLoaded
    NVMLError_LibraryNotFound: type[Exception] = NVMLError_LibraryNotFound

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.init_error
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self._check()
        self.shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:
        self._check()
        if self.count_error:
            raise self.count_error
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> FakeCard:
        self._check()
        return self.cards[index].told("handle")

    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes:
        return self._ask(handle, "name").name

    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes:
        return self._ask(handle, "uuid").uuid

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> FakeMemory:
        card = self._ask(handle, "memory")
        return FakeMemory(total=card.vram_mb * MIB, used=card.used_mb * MIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> tuple[int, int]:
        return self._ask(handle, "capability").capability

    def _ask(self, handle: object, fact: str) -> FakeCard:
        self._check()
        assert isinstance(handle, FakeCard)
        return handle.told(fact)

    def _check(self) -> None:
        if self.inits == self.shutdowns:
            raise NVMLError_Uninitialized("Uninitialized")


def two_4090s() -> FakeNvml:
    name = "NVIDIA GeForce RTX 4090"
    return FakeNvml([FakeCard(name, "GPU-a", 24564, used_mb=512), FakeCard(name, "GPU-b", 24564)])


def test_two_24_gib_cards_are_read_whole_and_make_a_gpu_peer() -> None:
    """Bytes become MiB, and nothing is warned about."""
    reading = NvmlProvider(two_4090s()).read()
    first, second = reading.gpus
    assert first == Gpu(
        index=0,
        name="NVIDIA GeForce RTX 4090",
        uuid="GPU-a",
        vram_total_mb=24564,
        vram_used_mb=512,
        compute_capability="8.9",
    )
    assert (second.index, second.uuid) == (1, "GPU-b")
    assert (reading.provider, reading.platform, reading.warnings) == ("nvml", Platform.CUDA, [])
    assert tier_of(reading.gpus) is Tier.GPU_PEER


def test_an_h100_makes_an_ai_factory() -> None:
    """80 GiB as the driver reports it, compute capability 9.0."""
    card = FakeCard("NVIDIA H100 80GB HBM3", "GPU-h", 81559, capability=(9, 0))
    reading = NvmlProvider(FakeNvml([card])).read()
    assert reading.gpus[0].compute_capability == "9.0"
    assert tier_of(reading.gpus) is Tier.AI_FACTORY


def test_names_that_come_as_bytes_travel_as_text() -> None:
    """Older bindings answer bytes, and a byte that is no UTF-8 must not cost the reading or the message."""
    gpu = NvmlProvider(FakeNvml([FakeCard(b"NVIDIA T4 \xff", b"GPU-t", 15360)])).read().gpus[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA T4 �", "GPU-t")
    assert decode(encode(gpu), Gpu) == gpu


@pytest.mark.parametrize("fact", ["handle", "name", "uuid", "memory", "capability"])
def test_a_gpu_that_fails_carries_its_error_and_the_other_is_whole(fact: str) -> None:
    """Whatever is asked last of the broken card, its neighbour is read."""
    fake = two_4090s()
    whole = NvmlProvider(fake).read().gpus[1]
    fake.cards[0].broken[fact] = NVMLError("GPU is lost")
    reading = NvmlProvider(fake).read()
    assert "GPU is lost" in reading.gpus[0].error
    assert [warning for warning in reading.warnings if "GPU 0" in warning and "GPU is lost" in warning]
    assert reading.gpus[1] == whole


def test_a_gpu_that_fails_keeps_the_facts_that_were_read() -> None:
    """Only the memory is missing, so the name, the uuid and the capability stay."""
    fake = two_4090s()
    fake.cards[0].broken["memory"] = NVMLError("Unknown Error")
    gpu = NvmlProvider(fake).read().gpus[0]
    assert (gpu.name, gpu.uuid, gpu.vram_total_mb, gpu.compute_capability) == (
        "NVIDIA GeForce RTX 4090",
        "GPU-a",
        0,
        "8.9",
    )


def test_a_name_the_binding_cannot_decode_is_an_error_of_that_gpu() -> None:
    """The binding decodes strictly, and its exception is not one of NVML's."""
    fake = two_4090s()
    fake.cards[0].broken["name"] = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    reading = NvmlProvider(fake).read()
    assert "invalid start byte" in reading.gpus[0].error
    assert reading.gpus[1].error == ""


def test_a_gpu_with_unified_memory_is_no_error_but_a_warning() -> None:
    """The device works; it only has no memory of its own to report."""
    card = FakeCard("NVIDIA GB10", "GPU-u", 0, capability=(12, 1))
    card.broken["memory"] = NVMLError_NotSupported("Not Supported")
    reading = NvmlProvider(FakeNvml([card])).read()
    assert (reading.gpus[0].error, reading.gpus[0].vram_total_mb) == ("", 0)
    assert reading.gpus[0].compute_capability == "12.1"
    assert reading.warnings == ["GPU 0 does not report its memory"]


def test_a_driver_lost_between_reads_gives_no_gpus_and_comes_back() -> None:
    """The read after the loss initialises the driver again."""
    fake = two_4090s()
    provider = NvmlProvider(fake)
    whole = provider.read()
    fake.count_error = NVMLError("Unknown Error")
    lost = provider.read()
    assert (lost.gpus, lost.platform) == ([], Platform.CPU)
    assert lost.warnings == ["the NVIDIA driver does not answer: Unknown Error"]
    fake.count_error = None
    assert provider.read() == whole
    assert (fake.inits, fake.shutdowns) == (2, 1)


@pytest.mark.parametrize("gone", [NVMLError_Uninitialized, NVMLError_DriverNotLoaded])
def test_a_driver_lost_in_the_middle_of_a_read_is_not_blamed_on_one_gpu(gone: type[NVMLError]) -> None:
    """Half a reading would look like a broken card."""
    fake = two_4090s()
    provider = NvmlProvider(fake)
    fake.cards[1].broken["memory"] = gone("gone")
    lost = provider.read()
    assert lost.gpus == []
    assert len(lost.warnings) == 1
    fake.cards[1].broken.clear()
    assert len(provider.read().gpus) == 2


def test_a_driver_that_stays_away_is_asked_at_every_read() -> None:
    """Neither the loss, nor a shutdown that fails, nor a failing init is raised."""
    fake = two_4090s()
    provider = NvmlProvider(fake)
    provider.read()
    fake.shutdowns = fake.inits  # The driver forgot us: every call fails, the shutdown too.
    fake.init_error = NVMLError_DriverNotLoaded("Driver Not Loaded")
    assert [provider.read().gpus for _ in range(3)] == [[], [], []]
    assert provider.read().warnings == ["the NVIDIA driver does not answer: Driver Not Loaded"]
    fake.init_error = None
    assert len(provider.read().gpus) == 2


def test_reads_in_a_row_initialise_the_driver_once() -> None:
    """Initialising takes long on some machines, and holds a reference on the driver."""
    fake = two_4090s()
    provider = NvmlProvider(fake)
    assert provider.read() == provider.read()
    assert fake.inits == 1


def test_a_driver_without_a_gpu_is_a_cpu_platform() -> None:
    """CUDA without a device accelerates nothing."""
    reading = NvmlProvider(FakeNvml()).read()
    assert (reading.gpus, reading.platform, reading.warnings) == ([], Platform.CPU, [])


def test_nvml_is_chosen_where_the_driver_initialises() -> None:
    """The choice leaves the driver as it was found."""
    fake = two_4090s()
    assert provider_for(fake).name == "nvml"
    assert fake.inits == fake.shutdowns


def test_no_gpu_is_reported_without_a_driver_and_without_a_warning() -> None:
    """A machine without an NVIDIA driver is nothing to warn about."""
    reading = provider_for(FakeNvml(init_error=NVMLError_LibraryNotFound("not found"))).read()
    assert (reading.provider, reading.gpus, reading.platform) == ("none", [], Platform.CPU)
    assert reading.warnings == []


def test_a_driver_that_does_not_initialise_is_told_in_every_reading() -> None:
    """The library is there, so the owner of the machine expects a GPU."""
    provider = provider_for(FakeNvml(init_error=NVMLError("RM has detected a version mismatch")))
    assert provider.name == "none"
    assert provider.read().warnings == ["NVIDIA GPUs cannot be read: RM has detected a version mismatch"]
    assert provider.read() == provider.read()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_missing_binding_is_warned_about_only_beside_a_loaded_driver(
    loaded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The binding is an optional dependency: most machines do not miss it."""
    driver = tmp_path / "version"
    if loaded:
        driver.touch()
    monkeypatch.setattr(nvml, "DRIVER", driver)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    provider = choose_provider()
    assert isinstance(provider, NoGpus)
    assert bool(provider.read().warnings) is loaded


def test_the_real_binding_has_everything_the_provider_asks_for() -> None:
    """The fake above proves nothing about a name that the binding spells otherwise."""
    pynvml = pytest.importorskip("pynvml", reason="the optional package nvidia-ml-py is not installed")
    names = {name for name in vars(FakeNvml()) | vars(FakeNvml) if name.lower().startswith("nvml")}
    assert len(names) == 13
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []
    assert choose_provider().read().provider in ("nvml", "none")
