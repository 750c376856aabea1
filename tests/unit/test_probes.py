"""Goal: network, processes, engines, models and the machine's own name are told as the system has them.

Method: trees of files as Linux shows them, under a folder of the test; engines and models as they lie on disks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh import models
from computemesh.contracts.resources import EngineFound, ModelFound, Nic, RdmaPort
from computemesh.hardware import PROCESSES_TOLD_MAX, Gpu, GpuProcess, LinkKind, lasting, use_of
from computemesh.machine import machine_id
from computemesh_services.resource_detector.probes import network, processes, software, system

HOME: Final = Path("/home/mesh")


def write(folder: Path, files: Mapping[str, object]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


# --- network ----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with a ConnectX-7, a port that is down, and interfaces that are only software."""
    device = tmp_path / "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0"
    write(device, {"numa_node": 1, "net/ibp23s0/type": 32})
    other = tmp_path / "sys/devices/pci0000:00/0000:00:03.0/virtio0"
    write(other, {"numa_node": -1})
    net = tmp_path / "sys/class/net"
    write(net, {"ibp23s0/operstate": "up", "ibp23s0/speed": 400_000, "eth0/operstate": "down", "eth0/speed": -1})
    write(net, {"lo/operstate": "unknown", "docker0/operstate": "up", "docker0/speed": 10_000})
    (net / "ibp23s0/device").symlink_to(device)
    (net / "eth0/device").symlink_to(other)
    ports = tmp_path / "sys/class/infiniband/mlx5_0/ports"
    write(ports / "1", {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"})
    write(ports / "2", {"state": "1: DOWN", "rate": "2.5 Gb/sec (1X SDR)", "link_layer": "Ethernet"})
    write(ports / "2", {"gid_attrs/ndevs/0": "eth9"})
    (tmp_path / "sys/class/infiniband/mlx5_0/device").symlink_to(device)
    return tmp_path


def test_interfaces_with_a_device_behind_them_are_told(root: Path) -> None:
    """A speed of -1 means that there is none now; a virtual device has the address of its PCI parent."""
    assert network.read_nics(root=root) == [
        Nic(name="eth0", pci_bus_id="0000:00:03.0"),
        Nic(name="ibp23s0", up=True, speed_mbps=400_000, pci_bus_id="0000:17:00.0", numa_node=1),
    ]


def test_rdma_ports_are_told_with_their_rate_and_their_interface(root: Path) -> None:
    """The interface is that of the port's first address, or the device's only one."""
    one = RdmaPort(
        device="mlx5_0",
        port=1,
        state="ACTIVE",
        rate_gbps=400,
        link_layer="InfiniBand",
        netdev="ibp23s0",
        pci_bus_id="0000:17:00.0",
        numa_node=1,
    )
    two = RdmaPort(
        device="mlx5_0",
        port=2,
        state="DOWN",
        rate_gbps=2.5,
        link_layer="Ethernet",
        netdev="eth9",
        pci_bus_id="0000:17:00.0",
        numa_node=1,
    )
    assert network.read_rdma(root=root) == [one, two]


def test_a_machine_without_such_files_has_no_rdma_and_still_tells_its_interfaces(tmp_path: Path) -> None:
    """As on macOS."""
    assert network.read_rdma(root=tmp_path) == []
    assert all(nic.speed_mbps > 0 for nic in network.read_nics(root=tmp_path))


TREE: Final = {
    "0000:01:00.0": "pci0000:00/0000:00:01.0",
    "0000:41:00.0": "pci0000:40/0000:40:01.0/0000:42:00.0/0000:43:00.0",
    "0000:44:00.0": "pci0000:40/0000:40:01.0/0000:42:00.0/0000:43:01.0",
    "0000:45:00.0": "pci0000:40/0000:40:01.0/0000:42:00.0/0000:43:02.0/0000:46:00.0",
    "0000:47:00.0": "pci0000:40/0000:40:02.0",
    "0000:61:00.0": "pci0000:60/0000:60:01.0",
}


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("0000:41:00.0", "0000:44:00.0", LinkKind.PIX),
        ("0000:41:00.0", "0000:45:00.0", LinkKind.PXB),
        ("0000:41:00.0", "0000:47:00.0", LinkKind.PHB),
        ("0000:41:00.0", "0000:61:00.0", LinkKind.NODE),
        ("0000:41:00.0", "0000:01:00.0", LinkKind.SYS),
        ("0000:41:00.0", "0000:ff:00.0", None),
    ],
)
def test_how_far_two_pci_devices_are_apart_follows_from_the_bridges_between(
    one: str, other: str, distance: LinkKind | None, tmp_path: Path
) -> None:
    """In the terms of nvidia-smi, the same in both directions."""
    for address, bridges in TREE.items():
        device = tmp_path / "sys/devices" / bridges / address
        write(device, {"numa_node": 0 if bridges.startswith("pci0000:00") else 1})
        link = tmp_path / "sys/bus/pci/devices" / address
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device)
    assert system.pcie_distance(one, other, root=tmp_path) == distance
    assert system.pcie_distance(other, one, root=tmp_path) == distance


# --- processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "reservation"),
    [
        (b"PATH=/bin\0COMPUTEMESH_RESERVATION_ID=r-12\0HOME=/\0", "r-12"),
        (b"COMPUTEMESH_RESERVATION_ID=\0", ""),
        (b"XCOMPUTEMESH_RESERVATION_ID=r-1\0", ""),
        (b"COMPUTEMESH_RESERVATION_ID=a.b\0", ""),
        (b"COMPUTEMESH_RESERVATION_ID=\xff\0", ""),
        (b"COMPUTEMESH_RESERVATION_ID=" + b"x" * 64 + b"\0", ""),
        (b"", ""),
    ],
)
def test_the_reservation_of_a_process_is_in_its_environment(
    environment: bytes, reservation: str, tmp_path: Path
) -> None:
    """Whatever else stands there, what is told is an id or nothing."""
    (tmp_path / "71").mkdir()
    (tmp_path / "71/environ").write_bytes(environment)
    assert processes.reservation_of(71, proc=tmp_path) == reservation


def test_a_process_that_is_not_ours_or_has_ended_has_no_reservation_and_no_name(tmp_path: Path) -> None:
    """The kernel shows each user the environment of his own processes only."""
    assert processes.reservation_of(71, proc=tmp_path) == ""
    assert processes.name_of(71, proc=tmp_path) == ""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_a_real_process_is_attributed_to_its_reservation() -> None:
    """As the kernel shows it."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"],
        env={**os.environ, "COMPUTEMESH_RESERVATION_ID": "r-real"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.reservation_of(process.pid) == "r-real"
        assert processes.name_of(process.pid).startswith("python")
        process.kill()


@given(counts=st.lists(st.integers(0, 2 * PROCESSES_TOLD_MAX), max_size=4))
def test_heartbeats_name_processes_while_a_node_has_few(counts: list[int]) -> None:
    """All of them, or none: half a list would look like the whole."""
    gpus = [
        Gpu(index=place, uuid=f"GPU-{place}", vram_used_mb=7, processes=[GpuProcess(pid=pid) for pid in range(count)])
        for place, count in enumerate(counts)
    ]
    told = use_of(gpus)
    assert [(use.index, use.uuid, use.vram_used_mb) for use in told] == [(gpu.index, gpu.uuid, 7) for gpu in gpus]
    few = sum(counts) <= PROCESSES_TOLD_MAX
    assert [use.processes for use in told] == [gpu.processes if few else None for gpu in gpus]


def test_what_lasts_of_a_gpu_is_what_it_is_and_whether_it_works() -> None:
    """Everything else moves while it works."""
    used = Gpu(
        uuid="a", vram_total_mb=5, vram_used_mb=4, utilization_percent=9, temperature_c=4, power_w=3, processes=[]
    )
    assert lasting(used) == Gpu(uuid="a", vram_total_mb=5)
    assert lasting(Gpu(error="x")) == lasting(Gpu(error="y")) != lasting(Gpu())


# --- engines and models -----------------------------------------------------------------------------------------


def test_engines_are_told_with_their_versions_and_nothing_is_imported(tmp_path: Path) -> None:
    """Importing vllm takes seconds and claims memory of the GPU."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'version: 5092 (d3bd7193)' >&2\necho 'built with cc' >&2\n")
    program.chmod(0o700)
    before = set(sys.modules)
    found = software.read_engines(packages=["psutil", "no-such-engine"], path=str(tmp_path))
    assert found == [
        EngineFound(name="psutil", version=found[0].version),
        EngineFound(name="llama-server", version="5092"),
    ]
    assert found[0].version
    assert set(sys.modules) == before


def test_a_program_that_cannot_tell_its_version_is_told_without(tmp_path: Path) -> None:
    """It is there all the same."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    assert software.read_engines(packages=[], path=str(tmp_path)) == [EngineFound(name="llama-server")]
    assert software.read_engines(packages=[], path=str(tmp_path / "elsewhere")) == []


MIB: Final = 1024 * 1024


def sized(path: Path, mb: int, start: bytes = b"GGUF") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(mb * MIB)


def test_gguf_files_and_the_hugging_face_cache_are_told_with_their_sizes(tmp_path: Path) -> None:
    """All parts of a split model count; downloads that are not complete do not."""
    folder = tmp_path / "models"
    sized(folder / "Qwen3-8B-Q4_K_M.gguf", 3)
    sized(folder / "llama-70b-Q8_0-00001-of-00002.gguf", 4)
    sized(folder / "llama-70b-Q8_0-00002-of-00002.gguf", 5)
    hub = tmp_path / "hub"
    sized(hub / "models--Qwen--Qwen3-8B/blobs/aa", 6)
    sized(hub / "models--Qwen--Qwen3-8B/blobs/bb.incomplete", 9)
    sized(hub / "models--Qwen--Qwen3-8B/snapshots/rev/model.safetensors", 0)
    sized(hub / "models--gpt2/blobs/aa", 1)
    sized(hub / "models--gpt2/snapshots/rev/model.safetensors", 0)
    sized(hub / "models--org--never-finished/blobs/aa.incomplete", 1)
    sized(hub / "datasets--org--data/blobs/aa", 1)
    assert software.read_models(str(folder), hub=hub) == [
        ModelFound(name="qwen3-8b", form="gguf", size_mb=3),
        ModelFound(name="llama-70b", form="gguf", size_mb=9),
        ModelFound(name="Qwen/Qwen3-8B", form="huggingface", size_mb=6),
        ModelFound(name="gpt2", form="huggingface", size_mb=1),
    ]


def test_the_parts_of_a_model_are_its_own(tmp_path: Path) -> None:
    """Another model whose name begins alike has others."""
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "a-b-00001-of-00001.gguf", "a.gguf"):
        (tmp_path / name).touch()
    assert [path.name for path in models.parts(tmp_path / "a-00001-of-00002.gguf")] == [
        "a-00001-of-00002.gguf",
        "a-00002-of-00002.gguf",
    ]
    assert models.parts(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({}, Path.home() / ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/huggingface/hub")),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/c"}, Path("/h/hub")),
        ({"HF_HUB_CACHE": "/b", "HF_HOME": "/h"}, Path("/b")),
    ],
)
def test_the_cache_of_the_hub_is_where_its_own_library_has_it(environ: dict[str, str], folder: Path) -> None:
    """The nearest setting counts."""
    assert software.hub_folder(environ) == folder


# --- the machine ------------------------------------------------------------------------------------------------


def test_a_machine_has_a_name_that_stays_and_does_not_tell_its_own_number(tmp_path: Path) -> None:
    """Another machine has another."""
    own = "4ebd8f0a0fd04c5c8b5f2f0f3f7d1a11"
    write(tmp_path, {"etc/machine-id": own})
    name = machine_id(HOME, root=tmp_path)
    assert name == machine_id(HOME, root=tmp_path)
    assert len(name) == 32
    assert own not in name
    write(tmp_path, {"etc/machine-id": "00000000000000000000000000000001"})
    assert machine_id(HOME, root=tmp_path) != name


def test_two_homes_on_one_machine_have_two_names(tmp_path: Path) -> None:
    """Each has a detector and an agent of its own, and one node id is for one of them."""
    write(tmp_path, {"etc/machine-id": "4ebd8f0a0fd04c5c8b5f2f0f3f7d1a11"})
    assert machine_id(Path("/a"), root=tmp_path) != machine_id(Path("/b"), root=tmp_path)


def test_a_machine_without_such_a_number_takes_the_next_it_has(tmp_path: Path) -> None:
    """An image that was never started says ``uninitialized``, and all its machines would be one."""
    write(tmp_path, {"etc/machine-id": "uninitialized"})
    none = machine_id(HOME, root=tmp_path)
    write(tmp_path, {"sys/class/dmi/id/product_uuid": "ec2f1a5c"})
    assert machine_id(HOME, root=tmp_path) not in (none, "")
    write(tmp_path, {"var/lib/dbus/machine-id": "beef"})
    assert machine_id(HOME, root=tmp_path) not in (none, "")
