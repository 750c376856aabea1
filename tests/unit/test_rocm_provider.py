"""Goal: AMD GPUs are told as the kernel and amdsmi tell of them, and neither costs a reading when it fails.

Method: a tree of files as the kernel of a machine with two MI300X and a Radeon shows it (the formats are those of
amdkfd's topology and amdgpu's sysfs), and a module with amdsmi's names and units. Each test changes one thing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import pytest

from computemesh.contracts.base import decode, encode
from computemesh.hardware import Gpu, GpuLink, GpuProcess, LinkKind, Platform, Tier, tier_of
from computemesh_services.resource_detector.probes import amdsmi
from computemesh_services.resource_detector.probes.rocm import RocmProvider, gfx

GIB: Final = 1024**3

MI300X: Final = {
    "product_name": "AMD Instinct MI300X OAM",
    "mem_info_vram_total": 191 * GIB,
    "mem_info_vram_used": 285 * 1024**2,
    "gpu_busy_percent": 12,
    "max_link_speed": "32.0 GT/s PCIe",
    "max_link_width": 16,
    "numa_node": 1,
    "hwmon/hwmon5/temp1_input": 40000,
    "hwmon/hwmon5/temp1_label": "mem",
    "hwmon/hwmon5/temp2_input": 51000,
    "hwmon/hwmon5/temp2_label": "junction",
    "hwmon/hwmon5/power1_input": 138_000_000,
}


def write(folder: Path, files: Mapping[str, object]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def properties(**facts: int) -> str:
    return "\n".join(f"{name} {value}" for name, value in facts.items())


def link(kind: int, here: int, there: int) -> str:
    return properties(type=kind, version_major=0, node_from=here, node_to=there, weight=15, max_bandwidth=64000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Node 0 is a CPU, 1 and 2 are MI300X joined by Infinity Fabric, 3 is a Radeon at another host bridge."""
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0", {"gpu_id": 0, "properties": properties(cpu_cores_count=96, simd_count=0, gfx_target_version=0)})
    bridges = {1: "pci0000:60/0000:60:01.0", 2: "pci0000:60/0000:60:02.0", 3: "pci0000:00/0000:00:01.0"}
    for number, bus, version, unique in (
        (1, 0x65, 90402, 0x21B6D61638A86F8C),
        (2, 0x66, 90402, 7),
        (3, 0x03, 110000, 0),
    ):
        address = f"0000:{bus:02x}:00.0"
        device = tmp_path / "sys/devices" / bridges[number] / address
        write(device, MI300X if number < 3 else {"mem_info_vram_total": 24 * GIB, "mem_info_vram_used": 0})
        for link_name in (f"sys/class/drm/renderD{127 + number}/device", f"sys/bus/pci/devices/{address}"):
            (tmp_path / link_name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / link_name).symlink_to(device)
        facts = properties(
            simd_count=1216,
            gfx_target_version=version,
            vendor_id=4098,
            location_id=bus << 8,
            domain=0,
            drm_render_minor=127 + number,
            unique_id=unique,
        )
        write(nodes / str(number), {"gpu_id": 51000 + number, "properties": facts})
        write(nodes / str(number) / "mem_banks/0", {"properties": properties(heap_type=1, size_in_bytes=191 * GIB)})
        write(nodes / str(number) / "io_links/0", {"properties": link(2, number, 0)})
    write(nodes / "1/io_links/1", {"properties": link(11, 1, 2)})
    write(nodes / "2/io_links/1", {"properties": link(11, 2, 1)})
    write(nodes / "1/io_links/2", {"properties": link(2, 1, 3)})
    kfd = tmp_path / "sys/class/kfd/kfd/proc"
    write(kfd / "4711", {"vram_51001": 30 * GIB, "vram_51002": 0})
    write(kfd / "4712", {"vram_51002": 2 * GIB})
    write(tmp_path / "proc/4711", {"comm": "python3"})
    write(tmp_path / "sys/module/amdgpu", {"version": "6.12.12"})
    return tmp_path


def provider(root: Path, smi: Any = None, *, expected: bool = True) -> RocmProvider:
    def reservation_of(pid: int) -> str:
        return "r-1" if pid == 4711 else ""

    return RocmProvider(smi, root=root, expected=expected, reservation_of=reservation_of)


def test_the_kernels_files_tell_every_fact_of_a_gpu(root: Path) -> None:
    """Bytes become MiB, microwatts watts; CPUs are not GPUs; the hottest sensor counts."""
    reading = provider(root).read()
    assert (reading.provider, reading.platform, reading.warnings) == ("rocm", Platform.ROCM, [])
    assert [gpu.index for gpu in reading.gpus] == [0, 1, 2]
    assert reading.gpus[0] == Gpu(
        index=0,
        name="AMD Instinct MI300X OAM",
        uuid="GPU-21b6d61638a86f8c",
        vram_total_mb=191 * 1024,
        vram_used_mb=285,
        architecture="gfx942",
        driver="6.12.12",
        pci_bus_id="0000:65:00.0",
        pcie_generation=5,
        pcie_lanes=16,
        numa_node=1,
        utilization_percent=12,
        temperature_c=51,
        power_w=138,
        processes=[GpuProcess(pid=4711, name="python3", memory_mb=30 * 1024, reservation_id="r-1")],
    )
    assert reading.gpus[1].processes == [GpuProcess(pid=4712, memory_mb=2048)]
    assert tier_of(reading.gpus) is Tier.AI_FACTORY


def test_a_card_that_tells_little_is_told_with_what_it_tells(root: Path) -> None:
    """Graphics cards have no name and no number of their own in these files."""
    card = provider(root).read().gpus[2]
    assert (card.name, card.uuid, card.architecture) == ("AMD gfx1100", "", "gfx1100")
    assert (card.numa_node, card.utilization_percent, card.power_w, card.error) == (None, None, None, "")
    assert tier_of([card]) is Tier.GPU_PEER


def test_infinity_fabric_joins_gpus_and_the_others_have_their_pcie_distance(root: Path) -> None:
    """The Radeon belongs to no NUMA node that is told, so it is as far as can be."""
    assert provider(root).read().links == [
        GpuLink(a=0, b=1, kind=LinkKind.XGMI),
        GpuLink(a=0, b=2, kind=LinkKind.SYS),
        GpuLink(a=1, b=2, kind=LinkKind.SYS),
    ]
    assert provider(root).read(links=False).links == []


def test_a_card_whose_memory_cannot_be_read_carries_an_error_and_the_others_are_whole(root: Path) -> None:
    """A GPU that fell off the bus has no such file any more; its size is still in the topology."""
    whole = provider(root).read().gpus
    for name in ("mem_info_vram_used", "mem_info_vram_total"):
        (root / "sys/class/drm/renderD129/device" / name).unlink()
    reading = provider(root).read()
    assert reading.gpus[1].error == "memory in use: the driver does not tell it"
    assert reading.gpus[1].vram_total_mb == 191 * 1024
    assert (reading.gpus[0], reading.gpus[2]) == (whole[0], whole[2])
    assert len(reading.warnings) == 1


def test_a_gpu_that_a_container_may_not_use_is_not_told(root: Path) -> None:
    """The kernel refuses its id, or gives none."""
    (root / "sys/class/kfd/kfd/topology/nodes/1/gpu_id").unlink()
    assert [gpu.pci_bus_id for gpu in provider(root).read().gpus] == ["0000:66:00.0", "0000:03:00.0"]


def test_processes_are_not_told_where_the_kernel_does_not(root: Path) -> None:
    """Nothing is something else than no processes."""
    for file in (root / "sys/class/kfd/kfd/proc").glob("*/*"):
        file.unlink()
    assert provider(root).read().gpus[0].processes == []
    for folder in (root / "sys/class/kfd/kfd/proc").glob("*"):
        folder.rmdir()
    (root / "sys/class/kfd/kfd/proc").rmdir()
    assert provider(root).read().gpus[0].processes is None


@pytest.mark.parametrize("expected", [False, True])
def test_a_machine_without_the_driver_is_warned_about_only_when_rocm_was_asked_for(
    expected: bool, tmp_path: Path
) -> None:
    """Most machines have no AMD GPU."""
    reading = provider(tmp_path, expected=expected).read()
    assert (reading.gpus, reading.platform, bool(reading.warnings)) == ([], Platform.CPU, expected)


def test_damaged_files_cost_their_facts_and_nothing_else(root: Path) -> None:
    """Whatever stands in them, the reading travels."""
    card = root / "sys/class/drm/renderD128/device"
    for file in [path for path in card.rglob("*") if path.is_file()]:
        file.write_bytes(b"\xff\x00 garbage -1")
    gpu = provider(root).read().gpus[0]
    assert decode(encode(gpu), Gpu) == gpu
    assert gpu.vram_total_mb == 191 * 1024


@pytest.mark.parametrize(
    ("version", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110001, "gfx1101"), (100306, "gfx1036"), (0, "")],
)
def test_the_target_of_code_is_named_as_compilers_name_it(version: int, name: str) -> None:
    """Two decimal digits each for minor and stepping become one hexadecimal digit each."""
    assert gfx(version) == name


# --- amdsmi -----------------------------------------------------------------------------------------------------


class AmdSmiException(Exception):
    pass


class AmdSmiMemoryType(IntEnum):
    VRAM = 0


class AmdSmiTemperatureType(IntEnum):
    EDGE = 0
    HOTSPOT = 1


class AmdSmiTemperatureMetric(IntEnum):
    CURRENT = 0


class AmdSmiLinkType(IntEnum):
    AMDSMI_LINK_TYPE_PCIE = 1
    AMDSMI_LINK_TYPE_XGMI = 2


class FakeSmi:
    """amdsmi 7.0 with two MI300X: its functions, and the shape and units of what they return."""

    AmdSmiException: type[Exception] = AmdSmiException
    AmdSmiMemoryType = AmdSmiMemoryType
    AmdSmiTemperatureType = AmdSmiTemperatureType
    AmdSmiTemperatureMetric = AmdSmiTemperatureMetric
    AmdSmiLinkType = AmdSmiLinkType

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.initialised = 0

    def _told(self, call: str, value: Any) -> Any:
        if call in self.broken:
            raise AmdSmiException(f"Error code:\n\t2 | {call}")
        return value

    def amdsmi_init(self) -> None:
        self._told("init", None)
        self.initialised += 1

    def amdsmi_shut_down(self) -> None:
        self.initialised -= 1

    def amdsmi_get_processor_handles(self) -> list[int]:
        return list(self._told("handles", [0, 1]))

    def amdsmi_get_gpu_asic_info(self, handle: Any, /) -> dict[str, Any]:
        name = {"market_name": "AMD Instinct MI300X", "target_graphics_version": "gfx942", "oam_id": "N/A"}
        return dict(self._told(f"asic{handle}", name))

    def amdsmi_get_gpu_device_uuid(self, handle: Any, /) -> str:
        return str(self._told("uuid", f"fcff74a1-0000-1000-807d-5f20dafbfb0{handle}"))

    def amdsmi_get_gpu_device_bdf(self, handle: Any, /) -> str:
        return str(self._told("bdf", f"0000:6{5 + handle}:00.0"))

    def amdsmi_get_gpu_driver_info(self, handle: Any, /) -> dict[str, str]:
        return dict(self._told("driver", {"driver_name": "amdgpu", "driver_version": "6.12.12", "driver_date": "N/A"}))

    def amdsmi_get_gpu_memory_total(self, handle: Any, kind: Any, /) -> int:
        assert kind is AmdSmiMemoryType.VRAM
        return int(self._told("total", 191 * GIB))

    def amdsmi_get_gpu_memory_usage(self, handle: Any, kind: Any, /) -> int:
        return int(self._told("used", 285 * 1024**2))

    def amdsmi_get_pcie_info(self, handle: Any, /) -> dict[str, dict[str, Any]]:
        return dict(self._told("pcie", {"pcie_static": {"max_pcie_width": 16, "pcie_interface_version": 5}}))

    def amdsmi_get_gpu_activity(self, handle: Any, /) -> dict[str, Any]:
        return dict(self._told("activity", {"gfx_activity": 12, "mm_activity": "N/A"}))

    def amdsmi_get_temp_metric(self, handle: Any, sensor: Any, metric: Any, /) -> int:
        assert metric is AmdSmiTemperatureMetric.CURRENT
        return int(
            self._told("temperature", {AmdSmiTemperatureType.HOTSPOT: 51, AmdSmiTemperatureType.EDGE: 40}[sensor])
        )

    def amdsmi_get_power_info(self, handle: Any, /) -> dict[str, Any]:
        return dict(self._told("power", {"current_socket_power": "N/A", "average_socket_power": 138}))

    def amdsmi_get_gpu_process_list(self, handle: Any, /) -> list[dict[str, Any]]:
        process = {"name": "python3", "pid": 4711, "mem": 0, "memory_usage": {"vram_mem": 30 * GIB, "gtt_mem": 0}}
        return list(self._told("processes", [process, {**process, "pid": 4712, "name": "N/A"}]))

    def amdsmi_topo_get_numa_node_number(self, handle: Any, /) -> int:
        return int(self._told("numa", 1 if handle == 0 else 2**32 - 1))

    def amdsmi_topo_get_link_type(self, one: Any, other: Any, /) -> dict[str, int]:
        return dict(self._told("link", {"hops": 1, "type": 2}))


def test_amdsmi_tells_every_fact_of_a_gpu(root: Path) -> None:
    """Where it is installed it is asked rather than the files; it is shut down again."""
    smi = FakeSmi()
    reading = provider(root, smi).read()
    assert reading.warnings == []
    assert reading.gpus[0] == Gpu(
        index=0,
        name="AMD Instinct MI300X",
        uuid="fcff74a1-0000-1000-807d-5f20dafbfb00",
        vram_total_mb=191 * 1024,
        vram_used_mb=285,
        architecture="gfx942",
        driver="6.12.12",
        pci_bus_id="0000:65:00.0",
        pcie_generation=5,
        pcie_lanes=16,
        numa_node=1,
        utilization_percent=12,
        temperature_c=51,
        power_w=138,
        processes=[
            GpuProcess(pid=4711, name="python3", memory_mb=30 * 1024, reservation_id="r-1"),
            GpuProcess(pid=4712, memory_mb=30 * 1024),
        ],
    )
    assert reading.gpus[1].numa_node is None
    assert reading.links == [GpuLink(a=0, b=1, kind=LinkKind.XGMI)]
    assert smi.initialised == 0


@pytest.mark.parametrize(
    "call", ["bdf", "driver", "pcie", "activity", "temperature", "power", "processes", "numa", "link"]
)
def test_a_call_to_amdsmi_that_fails_costs_its_fact(call: str, root: Path) -> None:
    """Partitions and graphics cards tell less than a whole accelerator."""
    smi = FakeSmi()
    smi.broken.add(call)
    reading = provider(root, smi).read()
    assert [(gpu.vram_total_mb, gpu.error) for gpu in reading.gpus] == [(191 * 1024, "")] * 2
    assert all(decode(encode(gpu), Gpu) == gpu for gpu in reading.gpus)


def test_a_gpu_that_amdsmi_cannot_read_carries_the_error_and_the_other_is_whole(root: Path) -> None:
    """On one line, as errors are shown."""
    smi = FakeSmi()
    smi.broken.add("asic0")
    first, second = provider(root, smi).read().gpus
    assert first.error == "name: Error code: 2 | asic0"
    assert second.error == ""


@pytest.mark.parametrize("call", ["init", "handles"])
def test_where_amdsmi_does_not_answer_the_kernels_files_are_read(call: str, root: Path) -> None:
    """A library that is older or newer than the driver is common."""
    smi = FakeSmi()
    smi.broken.add(call)
    reading = provider(root, smi).read()
    assert [gpu.architecture for gpu in reading.gpus] == ["gfx942", "gfx942", "gfx1100"]
    assert len(reading.warnings) == 1
    assert smi.initialised == 0


def test_another_release_of_amdsmi_costs_nothing_but_a_warning(root: Path) -> None:
    """Names and shapes have changed before."""

    class Other(FakeSmi):
        def amdsmi_get_gpu_process_list(self, handle: Any, /) -> list[dict[str, Any]]:
            return [{"process_id": 4711}]

    smi = Other()
    reading = provider(root, smi).read()
    assert len(reading.gpus) == 3
    assert reading.warnings == ["amdsmi is of no use, so the kernel's files are read: 'pid'"]
    assert smi.initialised == 0


def test_a_binding_that_prints_and_fails_without_its_library_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real one does: it prints, then raises a KeyError. Standard output belongs to whoever reads ours."""
    (tmp_path / "amdsmi.py").write_text("print('Unable to find libamd_smi.so')\n{}['libamd_smi.so']\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    assert amdsmi.load() is None
    assert capsys.readouterr().out == ""
