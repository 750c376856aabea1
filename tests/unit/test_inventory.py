"""Goal: the inventory says what the probes read, and a change is announced exactly when hardware changed.

Method: the pure core on values; the system probes on files and partitions of the test's own making, and once
on the machine that runs the test.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from computemesh.contracts.base import decode, encode
from computemesh.contracts.resources import Disk, EngineFound, Inventory, Load, ModelFound, Nic, RdmaPort
from computemesh.hardware import Cpu, Gpu, GpuLink, GpuProcess, LinkKind, Memory, Platform, Tier
from computemesh_services.resource_detector.inventory import Host, assemble, differs
from computemesh_services.resource_detector.probes import GpuReading, Machine, system

MIB = 1024 * 1024

CPU = Cpu(model="EPYC", cores=8, threads=16, frequency_mhz=2600.0)
MEMORY = Memory(total_mb=65536, available_mb=60000, swap_total_mb=2048, swap_free_mb=2048)
DISK = Disk(mount="/", total_mb=500_000, free_mb=300_000)
GPU = Gpu(name="RTX 4090", uuid="GPU-a", vram_total_mb=24564, vram_used_mb=10, compute_capability="8.9")
LINK = GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=18)
READING = GpuReading(provider="nvml", platform=Platform.CUDA, gpus=[GPU], links=[LINK], warnings=["a warning"])
HOST = Host(
    hostname="host",
    cpu=CPU,
    memory=MEMORY,
    disks=[DISK],
    nics=[Nic(name="eth0", up=True, speed_mbps=10_000)],
    rdma=[RdmaPort(device="mlx5_0", port=1, state="ACTIVE", rate_gbps=400)],
    engines=[EngineFound(name="vllm", version="0.11.0")],
    models=[ModelFound(name="a", form="gguf", size_mb=93)],
)
BEFORE = assemble("node-7", HOST, READING)

sizes = st.integers(0, 2**40)


def test_an_inventory_holds_what_the_probes_read() -> None:
    """Nothing is dropped on the way, and it travels."""
    assert (
        Inventory(
            node_id="node-7",
            hostname="host",
            tier=Tier.GPU_PEER,
            platform=Platform.CUDA,
            cpu=CPU,
            memory=MEMORY,
            gpus=[GPU],
            gpu_links=[LINK],
            disks=[DISK],
            nics=HOST.nics,
            rdma=HOST.rdma,
            engines=HOST.engines,
            models=HOST.models,
            provider="nvml",
            warnings=["a warning"],
        )
        == BEFORE
    )
    assert decode(encode(BEFORE), Inventory) == BEFORE


@pytest.mark.parametrize("override", Tier)
def test_a_tier_override_wins_over_the_hardware(override: Tier) -> None:
    """In both directions; the GPUs are still told as they are."""
    inventory = assemble("node-7", HOST, READING, tier_override=override)
    assert (inventory.tier, inventory.gpus) == (override, [GPU])


def test_scripted_hardware_takes_the_place_of_the_machines_own() -> None:
    """What the script does not tell stays real, and the provider says that it is made up."""
    scripted = Machine(cpu=Cpu(model="made up"), memory=Memory(total_mb=7), nics=[])
    inventory = assemble("node-7", HOST, GpuReading(provider="scripted", machine=scripted), warnings=["first"])
    assert (inventory.cpu.model, inventory.memory.total_mb, inventory.nics) == ("made up", 7, [])
    assert (inventory.provider, inventory.disks, inventory.warnings) == ("scripted", [DISK], ["first"])


@given(frequency_mhz=st.floats(0, 6000), some=sizes, warnings=st.lists(st.text()))
def test_use_of_the_same_hardware_is_no_change(frequency_mhz: float, some: int, warnings: list[str]) -> None:
    """Whatever moves while a machine works is left out of the comparison."""
    after = replace(
        BEFORE,
        cpu=replace(CPU, frequency_mhz=frequency_mhz),
        memory=replace(MEMORY, available_mb=some, swap_total_mb=some, swap_free_mb=some),
        gpus=[
            replace(
                GPU,
                vram_used_mb=some,
                utilization_percent=frequency_mhz / 100,
                temperature_c=frequency_mhz,
                power_w=frequency_mhz,
                processes=[GpuProcess(pid=some % 2**32)],
            )
        ],
        disks=[replace(DISK, free_mb=some)],
        warnings=warnings,
    )
    assert not differs(BEFORE, after)
    assert not differs(after, BEFORE)


CHANGES: dict[str, Callable[[Inventory], Inventory]] = {
    "a GPU went": lambda i: replace(i, gpus=[]),
    "a GPU came": lambda i: replace(i, gpus=[*i.gpus, replace(GPU, index=1, uuid="GPU-b")]),
    "a GPU was swapped for its twin": lambda i: replace(i, gpus=[replace(GPU, uuid="GPU-b")]),
    "a GPU changed size": lambda i: replace(i, gpus=[replace(GPU, vram_total_mb=12000)]),
    "a GPU broke": lambda i: replace(i, gpus=[replace(GPU, error="GPU is lost")]),
    "memory was added": lambda i: replace(i, memory=replace(MEMORY, total_mb=131072)),
    "a disk came": lambda i: replace(i, disks=[DISK, replace(DISK, mount="/data")]),
    "a disk grew": lambda i: replace(i, disks=[replace(DISK, total_mb=600_000)]),
    "the CPU is another": lambda i: replace(i, cpu=replace(CPU, model="Xeon")),
    "the CPU has fewer threads": lambda i: replace(i, cpu=replace(CPU, threads=8)),
    "a link between GPUs broke": lambda i: replace(i, gpu_links=[]),
    "a GPU was cut into slices": lambda i: replace(i, gpus=[replace(GPU, uuid="MIG-a", mig_parent="GPU-a")]),
    "the driver is another": lambda i: replace(i, gpus=[replace(GPU, driver="560.1")]),
    "an RDMA port is down": lambda i: replace(i, rdma=[replace(i.rdma[0], state="DOWN")]),
    "a network interface went": lambda i: replace(i, nics=[]),
    "an engine was installed": lambda i: replace(i, engines=[*i.engines, EngineFound(name="llama-server")]),
    "a model was deleted": lambda i: replace(i, models=[]),
    "the tier was overridden": lambda i: replace(i, tier=Tier.GPU_INFRA),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_hardware_is_a_change_in_both_directions(change: Callable[[Inventory], Inventory]) -> None:
    """What came must be announced as much as what went."""
    assert differs(BEFORE, change(BEFORE))
    assert differs(change(BEFORE), BEFORE)


def test_a_broken_gpu_whose_driver_words_it_differently_is_no_change() -> None:
    """Else a failing card would be announced at every read."""
    lost, unknown = (replace(BEFORE, gpus=[replace(GPU, error=text)]) for text in ("GPU is lost", "Unknown"))
    assert not differs(lost, unknown)


def test_this_machine_is_read_with_plausible_numbers() -> None:
    """The probes work on the machine that runs the test, whichever it is."""
    cpu, memory, disks = system.read_cpu(), system.read_memory(), system.read_disks()
    assert 0 <= cpu.cores <= cpu.threads
    assert cpu.threads >= 1
    assert 0 < memory.available_mb <= memory.total_mb
    assert all(0 <= disk.free_mb <= disk.total_mb for disk in disks)
    assert cpu.architecture
    inventory = assemble("node-7", Host(cpu=cpu, memory=memory, disks=disks), GpuReading(provider="none"))
    assert inventory.tier is Tier.CPU_ONLY
    assert decode(encode(inventory), Inventory) == inventory


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (
            "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9654\nmodel name\t: other\n",
            "AMD EPYC 9654",
        ),
        ("processor\t: 0\nModel\t\t: Raspberry Pi 5 Model B\n", "Raspberry Pi 5 Model B"),
        ("processor\t: 0\nmodel\t: 17\n", "from the platform"),
        ("", "from the platform"),
    ],
)
def test_the_cpu_model_is_read_from_cpuinfo_or_else_from_the_platform(
    text: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare model number names nothing."""
    monkeypatch.setattr(platform, "processor", lambda: "from the platform")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert system.read_cpu(cpuinfo=cpuinfo).model == model
    assert system.read_cpu(cpuinfo=tmp_path / "missing").model == "from the platform"


EPYC = """processor\t: {0}
model name\t: AMD EPYC 9654
physical id\t: {1}
flags\t\t: fpu sse sse4_2 avx2 fma f16c avx512f avx512_bf16 nopl

"""


def test_sockets_numa_nodes_and_features_are_read(tmp_path: Path) -> None:
    """Features that inference does not gain from are left out."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(EPYC.format(cpu, cpu // 2) for cpu in range(4)))
    for node in range(3):
        (tmp_path / f"devices/node/node{node}").mkdir(parents=True)
    cpu = system.read_cpu(cpuinfo=cpuinfo, devices=tmp_path / "devices")
    assert (cpu.model, cpu.sockets, cpu.numa_nodes) == ("AMD EPYC 9654", 2, 3)
    assert cpu.features == ["avx2", "avx512_bf16", "avx512f", "f16c", "fma", "sse4_2"]
    for number in range(4):
        package = tmp_path / f"devices/cpu/cpu{number}/topology/physical_package_id"
        package.parent.mkdir(parents=True)
        package.write_text(f"{number}\n")
    assert system.read_cpu(cpuinfo=cpuinfo, devices=tmp_path / "devices").sockets == 4


def test_the_features_of_an_arm_cpu_are_read_and_nothing_is_told_where_nothing_is(tmp_path: Path) -> None:
    """Linux has them under another name there."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16 dcpop\n")
    cpu = system.read_cpu(cpuinfo=cpuinfo, devices=tmp_path)
    assert cpu.features == ["asimd", "asimddp", "bf16", "i8mm", "sve"]
    assert (cpu.sockets, cpu.numa_nodes) == (0, 0)


def limit(group: Path, *, max_mb: int | None, used_mb: int = 0, cached_mb: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("max\n" if max_mb is None else f"{max_mb * MIB}\n")
    (group / "memory.current").write_text(f"{used_mb * MIB}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached_mb * MIB}\n")


def read_memory_in(tmp_path: Path) -> Memory:
    membership = tmp_path / "membership"
    membership.write_text("1:cpu:/\n0::/pod/box\n")
    return system.read_memory(cgroups=tmp_path, membership=membership)


def test_the_tightest_memory_limit_around_the_process_is_the_memory(tmp_path: Path) -> None:
    """A limit of the pod binds the container in it; cached pages count as available."""
    limit(tmp_path / "pod" / "box", max_mb=None)
    limit(tmp_path / "pod", max_mb=64, used_mb=40, cached_mb=10)
    limit(tmp_path, max_mb=96)
    memory = read_memory_in(tmp_path)
    assert (memory.total_mb, memory.available_mb) == (64, 34)


def test_a_container_above_its_limit_has_nothing_available(tmp_path: Path) -> None:
    """The kernel may let use run over for a moment; a negative size would not be a message."""
    limit(tmp_path / "pod" / "box", max_mb=64, used_mb=70)
    assert read_memory_in(tmp_path).available_mb == 0


def test_without_a_limit_the_memory_is_the_machines(tmp_path: Path) -> None:
    """No files, an absent limit and one far above the machine all mean no limit."""
    total_mb = psutil.virtual_memory().total // MIB
    assert read_memory_in(tmp_path).total_mb == total_mb
    limit(tmp_path / "pod" / "box", max_mb=None)
    limit(tmp_path / "pod", max_mb=2**40)
    assert read_memory_in(tmp_path).total_mb == total_mb


def mounted(monkeypatch: pytest.MonkeyPatch, *mounts: tuple[str, Path]) -> None:
    partitions = [SimpleNamespace(device=device, mountpoint=str(mount)) for device, mount in mounts]

    def disk_partitions(*, all: bool) -> list[SimpleNamespace]:  # noqa: A002 - psutil names it so.
        assert not all, "pseudo file systems were asked for"
        return partitions

    monkeypatch.setattr(psutil, "disk_partitions", disk_partitions)


def test_a_device_mounted_twice_is_one_disk_at_its_shortest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bind mounts, single files and loop devices are not more disks."""
    for name in ("longer-name", "data", "snap"):
        (tmp_path / name).mkdir()
    (tmp_path / "hosts").touch()
    mounted(
        monkeypatch,
        ("/dev/a", tmp_path / "longer-name"),
        ("/dev/a", tmp_path / "data"),
        ("/dev/b", tmp_path / "hosts"),
        ("/dev/loop3", tmp_path / "snap"),
    )
    assert [disk.mount for disk in system.read_disks()] == [str(tmp_path / "data")]


def test_a_disk_that_cannot_be_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbour is still told."""
    usage = psutil.disk_usage

    def disk_usage(path: str) -> object:
        if path.endswith("stale"):
            raise PermissionError(path)
        return usage(path)

    (tmp_path / "stale").mkdir()
    monkeypatch.setattr(psutil, "disk_usage", disk_usage)
    mounted(monkeypatch, ("/dev/a", tmp_path / "stale"), ("/dev/b", tmp_path))
    assert [disk.mount for disk in system.read_disks()] == [str(tmp_path)]


def test_a_container_without_devices_tells_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its storage is real although no device of it is mounted."""
    mounted(monkeypatch)
    assert [disk.mount for disk in system.read_disks()] == ["/"]


def test_load_is_the_busy_share_since_the_last_reading() -> None:
    """Three of four CPU seconds were busy."""
    before = system.CpuTimes(busy_s=100.0, total_s=1000.0)
    assert system.cpu_percent(before, system.CpuTimes(busy_s=103.0, total_s=1004.0)) == 75.0
    assert system.cpu_percent(before, before) == 0.0


@given(*[st.floats(-1e9, 1e9)] * 4)
def test_load_stays_between_0_and_100_whatever_the_kernel_counts(
    busy_before_s: float, total_before_s: float, busy_s: float, total_s: float
) -> None:
    """Idle and iowait counters may run backwards."""
    before = system.CpuTimes(busy_s=busy_before_s, total_s=total_before_s)
    assert 0 <= system.cpu_percent(before, system.CpuTimes(busy_s=busy_s, total_s=total_s)) <= 100


def test_a_load_carries_the_gpus_and_the_reading_to_measure_the_next_from() -> None:
    """The second reading is later than the one passed in."""
    since = system.read_cpu_times()
    load, now = system.read_load("node-7", [GPU], since=since)
    assert (load.node_id, load.gpus) == ("node-7", [GPU])
    assert now.total_s >= since.total_s
    assert decode(encode(load), Load) == load
