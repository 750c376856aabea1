"""Goal: CPU devices are sets of the machine's threads, split as told, cores kept whole.

Method: machines as lists of CPUs, and the kernel's files for one as a tree of its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh_services.node_agent.engines.backends.cpu import (
    NUMA,
    CpuSets,
    LogicalCpu,
    busy_percent,
    parse_model,
    parse_plan,
    parse_set,
    read_cpus,
    shown,
    split,
)
from computemesh_services.node_agent.engines.device import DeviceMetrics


def machine(*, nodes: int = 1, cores: int = 4, threads: int = 2) -> list[LogicalCpu]:
    """Numbered as Linux does: first one thread of each core, then the second of each."""
    everything = nodes * cores
    return [
        LogicalCpu(number=thread * everything + node * cores + core, core=(node, core), node=node)
        for thread in range(threads)
        for node in range(nodes)
        for core in range(cores)
    ]


def test_all_cpus_are_one_device_which_leaves_the_choice_of_threads_to_the_node() -> None:
    (only,) = split(NUMA, machine())
    assert (only.id, only.threads, only.cpus) == ("cpu:0", 0, ())


def test_each_numa_node_is_a_device() -> None:
    found = split(NUMA, machine(nodes=2, cores=4))
    assert [(one.id, one.cpus, one.threads) for one in found] == [
        ("cpu:0", (0, 1, 2, 3, 8, 9, 10, 11), 4),
        ("cpu:1", (4, 5, 6, 7, 12, 13, 14, 15), 4),
    ]
    assert found[1].name == "CPU, CPUs 4-7,12-15"


def test_a_number_of_devices_splits_the_cores() -> None:
    found = split(2, machine(cores=4, threads=1))
    assert [(one.cpus, one.threads) for one in found] == [((0, 1), 1), ((2, 3), 1)]
    assert len(split(1, machine(nodes=2))) == 1


def test_sets_are_taken_as_they_are_told() -> None:
    found = split(parse_plan("0-1,4-5 2"), machine(cores=4))
    assert [(one.cpus, one.threads) for one in found] == [((0, 1, 4, 5), 2), ((2,), 1)]


def test_an_engine_on_a_cpu_device_sees_no_gpu() -> None:
    for device in split(2, machine()):
        assert device.environment == {
            "CUDA_VISIBLE_DEVICES": "-1",
            "HIP_VISIBLE_DEVICES": "-1",
            "GGML_VK_VISIBLE_DEVICES": "",
        }


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("0-3,x", "'0-3,x' is no set of CPUs such as 0-7,16-23"),
        ("3-1", "'3-1' is no range of CPUs"),
        ("0-9000", "'0-9000' is no range of CPUs"),
        ("0", "0 CPU devices are no number from 1 to 8192"),
        ("0-3 2-5", "CPU 2 is in more than one set"),
        ("fast", "'fast' is no set of CPUs such as 0-7,16-23"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_reason(plan: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        parse_plan(plan)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("0-1 6-9", "there is no CPU 8 that this process may use"),
        ("5", "5 CPU devices are more than the 4 cores that this process may use"),
    ],
)
def test_a_plan_that_does_not_fit_the_machine_is_not_followed_and_said(plan: str, reason: str) -> None:
    found = CpuSets(plan=parse_plan(plan), cpus=machine).discover()
    assert [one.id for one in found.devices] == ["cpu:0"]
    assert found.warnings == (f"CPUs are not split as told: {reason}",)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 2), st.data())
def test_however_cpus_are_split_evenly_each_has_one_place_and_cores_stay_whole(
    nodes: int, cores: int, threads: int, data: st.DataObject
) -> None:
    cpus = machine(nodes=nodes, cores=cores, threads=threads)
    count = data.draw(st.integers(2, nodes * cores)) if nodes * cores > 1 else 1
    devices = split(count, cpus)
    assert len(devices) == count
    if count == 1:
        return
    assert sorted(number for one in devices for number in one.cpus) == sorted(cpu.number for cpu in cpus)
    core_of = {cpu.number: (cpu.node, cpu.core) for cpu in cpus}
    homes = [{core_of[number] for number in one.cpus} for one in devices]
    assert sum(map(len, homes)) == nodes * cores
    assert max(map(len, homes)) - min(map(len, homes)) <= 1
    assert all(1 <= one.threads <= len(one.cpus) for one in devices)


@given(st.sets(st.integers(0, 8191), min_size=1, max_size=50))
def test_a_set_reads_back_as_it_is_shown(numbers: set[int]) -> None:
    assert set(parse_set(shown(numbers))) == numbers


def test_the_kernel_says_which_cpus_are_threads_of_one_core(tmp_path: Path) -> None:
    """CPU 3 is not ours: the agent was started without it."""
    system = tmp_path / "sys/devices/system"
    for number, (socket, core) in enumerate([(0, 0), (0, 0), (1, 0), (1, 0)]):
        topology = system / f"cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
    for node, cpulist in enumerate(["0-1\n", "2-3\n", "\n"]):
        (system / f"node/node{node}").mkdir(parents=True)
        (system / f"node/node{node}/cpulist").write_text(cpulist)
    assert read_cpus(root=tmp_path, usable={0, 1, 2}) == [
        LogicalCpu(number=0, core=(0, 0), node=0),
        LogicalCpu(number=1, core=(0, 0), node=0),
        LogicalCpu(number=2, core=(1, 0), node=1),
    ]


def test_a_machine_that_does_not_tell_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert read_cpus(root=tmp_path, usable=[1, 0]) == [
        LogicalCpu(number=0, core=(0, 0)),
        LogicalCpu(number=1, core=(0, 1)),
    ]


def test_how_busy_a_device_is_is_how_busy_its_own_cpus_are() -> None:
    looks = iter(
        [
            {0: (10.0, 100.0), 1: (10.0, 100.0), 2: (0.0, 100.0), 3: (0.0, 100.0)},
            {0: (20.0, 110.0), 1: (15.0, 110.0), 2: (0.0, 110.0), 3: (0.0, 110.0)},
        ]
    )
    cpus = machine(cores=4, threads=1)
    backend = CpuSets(
        plan=2, cpus=lambda: cpus, memory=lambda: (64_000, 48_000), times=lambda: next(looks), temperature=lambda: 55.0
    )
    backend.discover()
    assert backend.metrics() == {
        "cpu:0": DeviceMetrics(
            memory_total_mb=64_000, memory_free_mb=48_000, utilisation_percent=75.0, temperature_c=55.0
        ),
        "cpu:1": DeviceMetrics(
            memory_total_mb=64_000, memory_free_mb=48_000, utilisation_percent=0.0, temperature_c=55.0
        ),
    }


def test_a_cpu_has_the_name_that_its_maker_gave_it() -> None:
    assert (
        parse_model("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354P 32-Core\n") == "AMD EPYC 9354P 32-Core"
    )
    assert parse_model("processor\t: 0\nBogoMIPS\t: 50.00\n") == "CPU"


def test_two_looks_in_one_instant_tell_nothing_of_the_time_between() -> None:
    assert busy_percent({0: (1.0, 2.0)}, {0: (1.0, 2.0)}) is None


def test_this_machine_has_a_device_and_tells_of_its_memory() -> None:
    backend = CpuSets()
    found = backend.discover()
    assert found.devices[0].id == "cpu:0"
    told = backend.metrics()["cpu:0"]
    assert told.memory_total_mb is not None
    assert told.memory_free_mb is not None
    assert 0 < told.memory_free_mb <= told.memory_total_mb
    assert len(read_cpus()) == len(os.sched_getaffinity(0))
