"""Goal: whatever NVML tells is told, and a GPU, one call, or the whole driver may fail while the rest is still told.

Method: the NVML that plays scripted hardware, behind the interface that the provider asks of ``pynvml``; a last
test holds both against the real binding. Each test breaks one thing and looks at the reading.
"""

# ruff: noqa: N802 - the names are NVML's.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from computemesh.contracts.base import decode, encode
from computemesh.hardware import Gpu, GpuLink, GpuProcess, LinkKind, Memory, Platform, Tier, tier_of
from computemesh_services.resource_detector.probes import NoGpus, nvml, scripted, system
from computemesh_services.resource_detector.probes.nvml import NvmlProvider, mig_profile, pci_bus_id
from computemesh_services.resource_detector.probes.scripted import CALLS, ERRORS, Fault, ScriptedNvml, parse

CARD: Final = {
    "name": "NVIDIA GeForce RTX 4090",
    "vram_total_mb": 24564,
    "vram_used_mb": 512,
    "compute_capability": "8.9",
    "driver": "550.54.15",
    "pcie_generation": 4,
    "pcie_lanes": 16,
    "utilization_percent": 40,
    "temperature_c": 55,
    "power_w": 120.5,
    "processes": [{"pid": 71, "name": "python", "memory_mb": 500}, {"pid": 72}],
}
TWO: Final = ({**CARD, "uuid": "GPU-a", "numa_node": 1}, {**CARD, "uuid": "GPU-b"})

MIG: Final = {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0", "mig_parent": "GPU-whole"}
HALVES: Final = tuple({**MIG, "vram_total_mb": 40192, "uuid": f"MIG-{half}", "mig_profile": "3g.40gb"} for half in "ab")


def hardware(*gpus: dict[str, Any], **rest: Any) -> ScriptedNvml:
    """NVML with these GPUs, of which the first reading runs."""
    fake = ScriptedNvml(parse(msgspec.json.encode({"platform": "CUDA", "gpus": gpus, **rest})))
    fake.reads = 1
    return fake


def provider(
    fake: ScriptedNvml, *, expected: bool = True, memory: Callable[[], Memory] = system.read_memory
) -> NvmlProvider:
    """The provider as a machine has it, on one whose first GPU belongs to NUMA node 1."""
    nodes = {"0000:01:00.0": 1}

    def reservation_of(pid: int) -> str:
        return "r-71" if pid == 71 else ""

    return NvmlProvider(fake, expected=expected, numa_node=nodes.get, reservation_of=reservation_of, memory=memory)


def test_every_fact_of_a_gpu_is_told() -> None:
    """Bytes become MiB, milliwatts watts, NVML's PCI address the kernel's, and nothing is warned about."""
    reading = provider(hardware(*TWO)).read()
    first, second = reading.gpus
    assert first == Gpu(
        index=0,
        name="NVIDIA GeForce RTX 4090",
        uuid="GPU-a",
        vram_total_mb=24564,
        vram_used_mb=512,
        compute_capability="8.9",
        driver="550.54.15",
        pci_bus_id="0000:01:00.0",
        pcie_generation=4,
        pcie_lanes=16,
        numa_node=1,
        utilization_percent=40,
        temperature_c=55,
        power_w=120.5,
        processes=[
            GpuProcess(pid=71, name="python", memory_mb=500, reservation_id="r-71"),
            GpuProcess(pid=72, memory_mb=None),
        ],
    )
    assert second == replace(first, index=1, uuid="GPU-b", pci_bus_id="0000:02:00.0", numa_node=None)
    assert (reading.provider, reading.platform, reading.warnings) == ("nvml", Platform.CUDA, [])
    assert tier_of(reading.gpus) is Tier.GPU_PEER


def test_a_gpu_that_tells_only_what_it_must_is_whole() -> None:
    """Old and small cards support little; that is no error and no warning."""
    reading = provider(hardware({"uuid": "GPU-a", "name": "Tesla K80", "vram_total_mb": 11441})).read()
    assert reading.gpus == [
        Gpu(name="Tesla K80", uuid="GPU-a", vram_total_mb=11441, pci_bus_id="0000:01:00.0", numa_node=1)
    ]
    assert reading.warnings == []


class Bytes(ScriptedNvml):
    """As releases of the binding before 11 answer."""

    def nvmlDeviceGetName(self, handle: object, /) -> Any:
        return super().nvmlDeviceGetName(handle).encode() + b" \xff"

    def nvmlDeviceGetUUID(self, handle: object, /) -> Any:
        return super().nvmlDeviceGetUUID(handle).encode()


def test_names_that_come_as_bytes_travel_as_text() -> None:
    """A byte that is no UTF-8 must not cost the reading or the message."""
    fake = Bytes(parse(msgspec.json.encode({"platform": "CUDA", "gpus": [TWO[0]]})))
    gpu = provider(fake).read().gpus[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA GeForce RTX 4090 �", "GPU-a")
    assert decode(encode(gpu), Gpu) == gpu


VITAL: Final = (
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetCudaComputeCapability",
)
ABOUT_A_GPU: Final = sorted(
    call for call in CALLS if call.startswith("nvmlDevice") and call not in ("nvmlDeviceGetCount", *VITAL)
)


@pytest.mark.parametrize("call", VITAL)
@pytest.mark.parametrize("word", ["GPU_IS_LOST", "UNKNOWN"])
def test_a_gpu_that_fails_carries_its_error_and_the_other_is_whole(call: str, word: str) -> None:
    """Whatever is asked last of the broken card, its neighbour is read."""
    fake = hardware(*TWO)
    whole = provider(fake).read().gpus[1]
    fake.faults.append(Fault(call=call, gpu=0, error=word))
    reading = provider(fake).read()
    assert ERRORS[word] in reading.gpus[0].error
    assert len([warning for warning in reading.warnings if "GPU 0" in warning and ERRORS[word] in warning]) == 1
    assert reading.gpus[1] == whole
    assert tier_of(reading.gpus[:1]) is Tier.CPU_ONLY


@pytest.mark.parametrize("call", ABOUT_A_GPU)
def test_no_call_that_fails_with_an_unknown_error_costs_more_than_its_fact(call: str) -> None:
    """The GPU works all the same, and both are told with their memory."""
    fake = hardware(*TWO, nvlink="all")
    fake.faults.append(Fault(call=call, error="UNKNOWN"))
    reading = provider(fake).read()
    assert [(gpu.uuid, gpu.vram_total_mb, gpu.error) for gpu in reading.gpus] == [
        ("GPU-a", 24564, ""),
        ("GPU-b", 24564, ""),
    ]


@given(
    faults=st.lists(
        st.builds(
            Fault,
            call=st.sampled_from(sorted(CALLS)),
            gpu=st.sampled_from([None, 0, 1]),
            error=st.sampled_from(sorted(ERRORS)),
        ),
        max_size=6,
    )
)
def test_a_reading_never_raises_and_always_travels_whatever_fails_together(faults: list[Fault]) -> None:
    """And what comes after all faults are over is what was before them."""
    fake = hardware(*TWO, *HALVES, links=[{"a": 0, "b": 1, "kind": "NVLINK", "lanes": 4}])
    mine = provider(fake)
    whole = mine.read()
    fake.faults += faults
    for gpu in mine.read().gpus:
        assert decode(encode(gpu), Gpu) == gpu
    fake.faults.clear()
    assert mine.read() == whole


def test_a_gpu_that_is_lost_is_still_known_by_what_it_was() -> None:
    """Its uuid says which one is gone, and the others keep their places."""
    fake = hardware(*TWO)
    mine = provider(fake)
    before = mine.read().gpus
    fake.faults.append(Fault(call="nvmlDeviceGetHandleByIndex", gpu=0, error="GPU_IS_LOST"))
    lost, other = mine.read().gpus
    assert lost.error == "handle: GPU is lost"
    assert (lost.index, lost.uuid, lost.name, lost.vram_total_mb) == (0, "GPU-a", before[0].name, 24564)
    assert (lost.vram_used_mb, lost.processes, lost.utilization_percent) == (0, None, None)
    assert other == before[1]


def test_a_gpu_that_is_lost_is_asked_no_more() -> None:
    """Each question to a card that fell off the bus takes its time, and each answer would be a warning."""
    fake = hardware(*TWO)
    fake.faults += [Fault(call=call, gpu=0, error="GPU_IS_LOST") for call in CALLS]
    assert provider(fake).read().warnings == ["GPU 0, handle: GPU is lost"]
    fake.faults = [fault for fault in fake.faults if fault.call != "nvmlDeviceGetHandleByIndex"]
    assert len(provider(fake).read().warnings) == 1


def test_what_was_known_of_a_gpu_is_not_told_of_another_in_its_place() -> None:
    """A card was swapped for one that cannot tell its memory."""
    fake = hardware(TWO[0])
    mine = provider(fake)
    mine.read()
    other = hardware({**CARD, "uuid": "GPU-other"})
    fake.__dict__.update(other.__dict__ | {"inits": fake.inits})
    fake.faults.append(Fault(call="nvmlDeviceGetMemoryInfo", gpu=0, error="UNKNOWN"))
    gpu = mine.read().gpus[0]
    assert (gpu.uuid, gpu.vram_total_mb, gpu.error) == ("GPU-other", 0, "memory: Unknown Error")


def test_a_process_that_computes_and_draws_is_told_once() -> None:
    """The driver lists it twice, each time with all it holds."""

    class Drawing(ScriptedNvml):
        def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> Any:
            return super().nvmlDeviceGetComputeRunningProcesses(handle)

    fake = Drawing(parse(msgspec.json.encode({"platform": "CUDA", "gpus": [TWO[0]]})))
    told = provider(fake).read().gpus[0].processes
    assert [(process.pid, process.memory_mb) for process in told or ()] == [(71, 500), (72, None)]


def test_a_name_the_binding_cannot_decode_is_an_error_of_that_gpu() -> None:
    """The binding decodes strictly, and its exception is not one of NVML's."""

    class Garbled(ScriptedNvml):
        def nvmlDeviceGetName(self, handle: object, /) -> str:
            if super().nvmlDeviceGetUUID(handle) == "GPU-a":
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return super().nvmlDeviceGetName(handle)

    fake = Garbled(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO})))
    first, second = provider(fake).read().gpus
    assert "invalid start byte" in first.error
    assert second.error == ""


def test_a_gpu_without_memory_of_its_own_has_the_machines() -> None:
    """It works; NVML only has no memory to report for it."""
    fake = hardware({"name": "NVIDIA GB10", "compute_capability": "12.1", "unified_memory": True})
    reading = provider(fake, memory=lambda: Memory(total_mb=122_500, available_mb=100_000)).read()
    gpu = reading.gpus[0]
    assert (gpu.error, gpu.unified_memory, gpu.vram_total_mb, gpu.vram_used_mb) == ("", True, 122_500, 22_500)
    assert reading.warnings == []
    assert tier_of(reading.gpus) is Tier.AI_FACTORY


# --- the driver -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["nvmlDeviceGetCount", "nvmlInit"])
def test_a_driver_lost_between_reads_gives_no_gpus_and_comes_back(call: str) -> None:
    """The read after the loss initialises the driver again."""
    fake = hardware(*TWO)
    mine = provider(fake)
    whole = mine.read()
    fake.inits = 0 if call == "nvmlInit" else fake.inits
    fake.faults.append(Fault(call=call, error="DRIVER_NOT_LOADED"))
    lost = [mine.read() for _ in range(3)][-1]
    assert (lost.gpus, lost.platform) == ([], Platform.CPU)
    assert lost.warnings == ["the NVIDIA driver does not answer: Driver Not Loaded"]
    fake.faults.clear()
    assert mine.read() == whole
    assert fake.inits == 1


@pytest.mark.parametrize("gone", ["UNINITIALIZED", "DRIVER_NOT_LOADED"])
@pytest.mark.parametrize("call", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetTemperature", "nvmlDeviceGetNvLinkState"])
def test_a_driver_lost_in_the_middle_of_a_read_is_not_blamed_on_one_gpu(gone: str, call: str) -> None:
    """Half a reading would look like a broken card."""
    fake = hardware(*TWO)
    mine = provider(fake)
    fake.faults.append(Fault(call=call, gpu=1, error=gone))
    lost = mine.read()
    assert lost.gpus == []
    assert len(lost.warnings) == 1
    fake.faults.clear()
    assert len(mine.read().gpus) == 2


def test_reads_in_a_row_initialise_the_driver_once() -> None:
    """Initialising takes long on some machines, and holds a reference on the driver."""
    fake = hardware(*TWO)
    mine = provider(fake)
    assert mine.read() == mine.read()
    assert fake.inits == 1


def test_a_driver_without_a_gpu_is_a_cpu_platform() -> None:
    """CUDA without a device accelerates nothing."""
    reading = provider(hardware()).read()
    assert (reading.gpus, reading.platform, reading.warnings) == ([], Platform.CPU, [])


@pytest.mark.parametrize("expected", [False, True])
def test_a_machine_without_the_library_is_warned_about_only_when_nvml_was_asked_for(expected: bool) -> None:
    """A machine without an NVIDIA driver is nothing to warn about."""
    reading = provider(hardware(faults=[{"call": "nvmlInit", "error": "LIBRARY_NOT_FOUND"}]), expected=expected).read()
    assert (reading.gpus, reading.platform, bool(reading.warnings)) == ([], Platform.CPU, expected)


@pytest.mark.parametrize(("loaded", "expected"), [(False, False), (True, False), (False, True)])
def test_a_missing_binding_is_warned_about_beside_a_loaded_driver_or_when_asked_for(
    loaded: bool, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The binding is an optional dependency: most machines do not miss it."""
    driver = tmp_path / "version"
    if loaded:
        driver.touch()
    monkeypatch.setattr(nvml, "DRIVER", driver)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = nvml.provider(expected=expected)
    assert isinstance(found, NoGpus)
    assert bool(found.read().warnings) is (loaded or expected)


# --- slices -----------------------------------------------------------------------------------------------------


def test_a_gpu_in_mig_mode_is_told_as_its_slices_and_not_as_a_whole() -> None:
    """Places are counted over slices and whole GPUs, as programs see devices."""
    reading = provider(hardware(TWO[0], *HALVES, TWO[1])).read()
    assert [(gpu.index, gpu.uuid, gpu.mig_parent, gpu.mig_profile) for gpu in reading.gpus] == [
        (0, "GPU-a", "", ""),
        (1, "MIG-a", "GPU-whole", "3g.40gb"),
        (2, "MIG-b", "GPU-whole", "3g.40gb"),
        (3, "GPU-b", "", ""),
    ]
    part = reading.gpus[1]
    assert (part.vram_total_mb, part.compute_capability, part.pci_bus_id) == (40192, "8.0", "0000:02:00.0")
    assert part.error == ""


def test_slices_are_whole_for_one_who_may_not_ask_the_gpu_they_are_cut_from() -> None:
    """NVML answers such questions about the whole only to the privileged."""

    class Private(ScriptedNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any:
            return super().nvmlDeviceGetMemoryInfo(permitted(handle))

        def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Any:
            return super().nvmlDeviceGetComputeRunningProcesses(permitted(handle))

    def permitted(handle: Any) -> Any:
        if not handle.slice:
            raise scripted.error("NO_PERMISSION")
        return handle

    fake = Private(parse(msgspec.json.encode({"platform": "CUDA", "gpus": HALVES})))
    assert [(gpu.vram_total_mb, gpu.error) for gpu in provider(fake).read().gpus] == [(40192, ""), (40192, "")]


def test_a_gpu_in_mig_mode_without_slices_is_a_warning() -> None:
    """There is no device to run anything on."""

    class Uncut(ScriptedNvml):
        def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int:
            return 0

    fake = Uncut(parse(msgspec.json.encode({"platform": "CUDA", "gpus": HALVES})))
    reading = provider(fake).read()
    assert (reading.gpus, reading.warnings) == ([], ["GPU 0 is in MIG mode and has no slices"])


@dataclass
class Slice:
    gpuInstanceSliceCount: int  # noqa: N815
    computeInstanceSliceCount: int  # noqa: N815
    memorySizeMB: int  # noqa: N815


@pytest.mark.parametrize(
    ("gpu_slices", "compute_slices", "memory_mb", "whole_mb", "profile"),
    [
        (1, 1, 4864, 40960, "1g.5gb"),
        (3, 3, 20096, 40960, "3g.20gb"),
        (7, 7, 40192, 40960, "7g.40gb"),
        (1, 1, 9728, 81920, "1g.10gb"),
        (3, 1, 40192, 81920, "1c.3g.40gb"),
        (1, 1, 11008, 81559, "1g.20gb"),
        (1, 1, 9984, 0, ""),
    ],
)
def test_a_slice_is_named_by_its_parts_and_the_eighths_of_memory_it_has(
    gpu_slices: int, compute_slices: int, memory_mb: int, whole_mb: int, profile: str
) -> None:
    """As NVIDIA names the profiles of A100 and H100."""
    assert mig_profile(Slice(gpu_slices, compute_slices, memory_mb), whole_mb) == profile


# --- links ------------------------------------------------------------------------------------------------------


def links(fake: ScriptedNvml) -> list[GpuLink]:
    return provider(fake).read().links


def test_gpus_behind_nvswitches_all_reach_each_other_with_all_their_links() -> None:
    """Eight GPUs are 28 pairs."""
    found = links(hardware({**CARD, "count": 8}, nvlink="all"))
    assert len(found) == 28
    assert {(link.kind, link.lanes) for link in found} == {(LinkKind.NVLINK, scripted.NVSWITCH_LANES)}
    assert all(link.a < link.b for link in found)


def test_nvlinks_between_two_gpus_are_counted_per_pair() -> None:
    """A pair without one has the distance of its common ancestor."""
    told = [
        {"a": 0, "b": 1, "kind": "NVLINK", "lanes": 4},
        {"a": 0, "b": 2, "kind": "NVLINK", "lanes": 2},
        {"a": 1, "b": 2, "kind": "SYS"},
    ]
    assert links(hardware({**CARD, "count": 3}, links=told)) == msgspec.convert(told, list[GpuLink])


@pytest.mark.parametrize("kind", ["PIX", "PXB", "PHB", "NODE", "SYS"])
def test_gpus_without_nvlink_have_their_pcie_distance(kind: str) -> None:
    """Under the names of nvidia-smi."""
    assert links(hardware(*TWO, links=[{"a": 0, "b": 1, "kind": kind}])) == [GpuLink(a=0, b=1, kind=LinkKind(kind))]


def test_a_fabric_whose_links_are_up_but_cannot_be_used_is_no_nvlink() -> None:
    """As while the fabric manager is not running."""

    class NoFabric(ScriptedNvml):
        def nvmlDeviceGetP2PStatus(self, one: object, other: object, index: int, /) -> int:
            assert index == nvml.P2P_NVLINK
            return 5

        def nvmlDeviceGetTopologyCommonAncestor(self, one: object, other: object, /) -> int:
            return 50

    fake = NoFabric(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO, "nvlink": "all"})))
    assert links(fake) == [GpuLink(a=0, b=1, kind=LinkKind.SYS)]


class Old(ScriptedNvml):
    """A driver before 470, which does not tell what a link leads to."""

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: object, link: int, /) -> int:
        raise scripted.error("FUNCTION_NOT_FOUND")


@pytest.mark.parametrize(
    ("rest", "lanes"), [({"nvlink": "all"}, 18), ({"links": [{"a": 0, "b": 1, "kind": "NVLINK", "lanes": 4}]}, 4)]
)
def test_an_old_driver_shows_by_the_addresses_where_links_lead(rest: dict[str, Any], lanes: int) -> None:
    """What is not one of the machine's GPUs is a switch."""
    fake = Old(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO, **rest})))
    assert links(fake) == [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=lanes)]


def test_a_link_that_is_down_is_not_counted_and_those_after_it_are() -> None:
    """One broken link of a bridge leaves the others."""

    class TwoDown(ScriptedNvml):
        def nvmlDeviceGetNvLinkState(self, handle: object, link: int, /) -> int:
            if link == 2:
                raise scripted.error("UNKNOWN")
            state = super().nvmlDeviceGetNvLinkState(handle, link)
            return 0 if link == 1 else state

    told = [{"a": 0, "b": 1, "kind": "NVLINK", "lanes": 6}]
    fake = TwoDown(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO, "links": told})))
    assert links(fake) == [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=4)]


def test_a_pair_behind_switches_has_the_links_of_the_gpu_that_has_fewer() -> None:
    """One whose links are partly down slows both."""

    class Uneven(ScriptedNvml):
        def nvmlDeviceGetNvLinkState(self, handle: Any, link: int, /) -> int:
            state = super().nvmlDeviceGetNvLinkState(handle, link)
            return 0 if handle.gpu.uuid == "GPU-b" and link >= 12 else state

    fake = Uneven(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO, "nvlink": "all"})))
    assert links(fake) == [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=12)]


def test_a_gpu_that_is_somewhere_else_is_not_linked() -> None:
    """Another machine may own the GPU at the end of a link."""

    class Elsewhere(ScriptedNvml):
        def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: object, link: int, /) -> Any:
            return replace_bus_id(super().nvmlDeviceGetNvLinkRemotePciInfo(handle, link), "00000000:F0:00.0")

    told = [{"a": 0, "b": 1, "kind": "NVLINK", "lanes": 4}]
    fake = Elsewhere(parse(msgspec.json.encode({"platform": "CUDA", "gpus": TWO, "links": told})))
    assert [link.kind for link in links(fake)] == [LinkKind.SYS]


def replace_bus_id(told: Any, bus_id: str) -> Any:
    return type(told)(bus_id)


def test_links_are_read_only_when_they_are_asked_for() -> None:
    """They take many calls, and what is read every few seconds does not need them."""
    fake = hardware(*TWO, nvlink="all", faults=[{"call": "nvmlDeviceGetNvLinkState", "error": "UNINITIALIZED"}])
    assert len(provider(fake).read(links=False).gpus) == 2


@pytest.mark.parametrize(
    ("told", "written"),
    [
        ("00000000:3B:00.0", "0000:3b:00.0"),
        ("0000:3b:00.0", "0000:3b:00.0"),
        ("00010000:01:00.0", "10000:01:00.0"),
        ("", ""),
        ("garbage", ""),
    ],
)
def test_a_pci_address_is_written_as_the_kernel_does(told: str, written: str) -> None:
    """NVML has eight digits for the domain, and capital letters."""
    assert pci_bus_id(told) == written


# --- the binding ------------------------------------------------------------------------------------------------


def test_the_real_binding_has_everything_the_provider_asks_for() -> None:
    """Scripted hardware proves nothing about a name that the binding spells otherwise."""
    pynvml: Any = pytest.importorskip("pynvml", reason="the optional package nvidia-ml-py is not installed")
    names = {name for name in vars(nvml.NvmlModule) if name.lower().startswith("nvml")}
    names |= set(inspect.get_annotations(nvml.NvmlModule))
    assert len(names) > 30
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []
    assert names == {name for name in dir(ScriptedNvml) if name.lower().startswith("nvml")}
    for name in CALLS:
        ours = list(inspect.signature(getattr(nvml.NvmlModule, name)).parameters)[1:]
        theirs = inspect.signature(getattr(pynvml, name)).parameters.values()
        assert len(ours) == len([one for one in theirs if one.default is one.empty]), name


def test_the_real_binding_has_the_constants_fields_and_errors_that_are_relied_on() -> None:
    """Copied numbers and words are held against those they were copied from."""
    pynvml: Any = pytest.importorskip("pynvml", reason="the optional package nvidia-ml-py is not installed")
    assert nvml.LINKS_MAX == pynvml.NVML_NVLINK_MAX_LINKS
    assert (nvml.TEMPERATURE_GPU, nvml.MIG_ENABLE) == (pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_DEVICE_MIG_ENABLE)
    assert nvml.REMOTE_GPU == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU
    assert nvml.REMOTE_SWITCH == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    assert (nvml.P2P_NVLINK, nvml.P2P_OK) == (pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK)
    levels = ("INTERNAL", "SINGLE", "MULTIPLE", "HOSTBRIDGE", "NODE", "SYSTEM")
    assert list(nvml.DISTANCES) == [getattr(pynvml, f"NVML_TOPOLOGY_{level}") for level in levels]
    assert fields(pynvml.nvmlPciInfo_t) >= {"busId"}
    assert fields(pynvml.c_nvmlMemory_t) >= {"total", "used"}
    assert fields(pynvml.c_nvmlUtilization_t) >= {"gpu"}
    assert fields(pynvml.c_nvmlProcessInfo_v3_t) >= {"pid", "usedGpuMemory"}
    assert fields(pynvml.c_nvmlDeviceAttributes) >= set(inspect.get_annotations(Slice))
    for name, words in ERRORS.items():
        real = pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{name}"))
        assert (type(real).__name__, str(real)) == (type(scripted.error(name)).__name__, words)


def fields(structure: Any) -> set[str]:
    told: Sequence[tuple[str, Any]] = structure._fields_
    return {name for name, _ in told}
