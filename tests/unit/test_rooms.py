"""Goal: work is never promised more of a node than it has, and what others use there counts as far as it is told.

Method: a node, attempts that come and go, heartbeats; then what is lacking for one more.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord
from computemesh.contracts.work import Requirements
from computemesh.hardware import Cpu, GpuUse, Memory
from computemesh.testing.builders import a_gpu, a_node
from computemesh_services.work_marshaller.needs import NOTHING, ask_of
from computemesh_services.work_marshaller.rooms import Room

NODE = a_node(
    cpu=Cpu(threads=16), memory=Memory(total_mb=64_000), gpus=[a_gpu(24_000), replace(a_gpu(24_000), index=1)]
)


def lacking(room: Room, **need: Any) -> list[tuple[str, bool]]:
    return [(refusal.reason, refusal.may_change) for refusal in room.lacks(ask_of(Requirements(**need)))]


def room(*attempts: dict[str, Any], node: NodeRecord = NODE) -> Room:
    """A node with these attempts, named 0, 1 …"""
    made = Room(node)
    for n, need in enumerate(attempts):
        made.take((str(n), 0), ask_of(Requirements(**need)))
    return made


def beat(*used_mb: int, available_mb: int | None = None) -> NodeHeartbeat:
    gpus = [GpuUse(index=index, vram_used_mb=mb) for index, mb in enumerate(used_mb)]
    return NodeHeartbeat(node_id="n1", gpus=gpus, memory_available_mb=available_mb)


@pytest.mark.parametrize(
    ("attempts", "need", "reason"),
    [
        ([{"cpus": 12}], {"cpus": 5}, "12 of 16 CPUs taken by work, needs 5"),
        ([{"ram_mb": 60_000}], {"ram_mb": 4_001}, "60000 of 64000 MiB of RAM taken by work, needs 4001"),
        ([{"gpus": 1}], {"gpus": 2}, "1 of 2 GPUs are free, needs 2"),
        ([{"vram_mb": 16_000}, {"vram_mb": 16_000}], {"vram_mb": 8_001}, "0 of 2 GPUs have 8001 MiB free, needs 1"),
        ([{"vram_mb": 1}], {"gpus": 2}, "1 of 2 GPUs are free, needs 2"),
        ([{"gpu_model": "card"}] * 2, {"gpu_model": "CARD"}, "0 of 2 GPUs with 'card' in their name are free, needs 1"),
    ],
)
def test_what_attempts_asked_for_is_not_given_twice(
    attempts: list[dict[str, Any]], need: dict[str, Any], reason: str
) -> None:
    """It will be free again; and one MiB, CPU or GPU less would fit."""
    made = room(*attempts)
    assert lacking(made, **need) == [(reason, True)]
    for n in range(len(attempts)):
        made.free((str(n), 0))
    assert lacking(made, **need) == []


@pytest.mark.parametrize(
    ("attempts", "need"),
    [
        ([{"cpus": 12}], {"cpus": 4}),
        ([{"ram_mb": 60_000}], {"ram_mb": 4_000}),
        ([{"gpus": 1}], {"gpus": 1}),
        ([{"vram_mb": 16_000}, {"vram_mb": 8_000}], {"gpus": 1}),  # Both on one GPU: the fullest that has room.
        ([{"vram_mb": 16_000}, {"vram_mb": 16_000}], {"gpus": 2, "vram_mb": 8_000}),
        ([{"cpus": 16, "ram_mb": 64_000, "gpus": 2}], {}),
    ],
)
def test_what_is_left_may_be_used_to_the_last(attempts: list[dict[str, Any]], need: dict[str, Any]) -> None:
    assert lacking(room(*attempts), **need) == []


def test_what_a_node_does_not_have_at_all_will_never_do() -> None:
    made = room(node=NODE)
    assert lacking(made, cpus=17, ram_mb=64_001, gpus=3) == [
        ("16 CPUs, needs 17", False),
        ("64000 MiB of RAM, needs 64001", False),
        ("2 GPUs, needs 3", False),
    ]


def test_a_node_that_does_not_tell_its_size_takes_any_and_one_that_keeps_all_for_itself_none() -> None:
    assert lacking(room({"cpus": 100}, node=a_node()), cpus=1000, ram_mb=10**6) == []
    assert lacking(room(node=a_node(work_cpus=0, cpu=Cpu(threads=8))), cpus=1) == [("0 CPUs, needs 1", False)]


def test_an_attempt_that_is_counted_twice_is_counted_once_and_one_that_asked_for_nothing_never() -> None:
    made = room({"cpus": 8})
    made.take(("0", 0), ask_of(Requirements(cpus=8)))
    made.take(("x", 0), NOTHING)
    made.free(("unheard of", 0))
    assert lacking(made, cpus=8) == []


def test_memory_that_others_use_is_not_free_and_what_work_uses_of_its_own_is_not_theirs() -> None:
    """A node of 64,000 MiB on which work asked for 20,000: 30,000 in use are 10,000 of others."""
    made = room({"ram_mb": 20_000})
    assert not made.told(beat(available_mb=34_000))
    assert lacking(made, ram_mb=34_000) == []
    assert lacking(made, ram_mb=34_001) == [
        ("20000 of 64000 MiB of RAM taken by work and 10000 by others, needs 34001", True)
    ]
    assert made.told(beat(available_mb=44_000)), "more is free"
    assert lacking(made, ram_mb=44_000) == []


def test_what_a_node_keeps_for_others_may_be_used_by_them() -> None:
    made = room(node=a_node(memory=Memory(total_mb=64_000), work_ram_mb=50_000))
    made.told(beat(available_mb=50_000))
    assert lacking(made, ram_mb=50_000) == []
    made.told(beat(available_mb=40_000))
    assert lacking(made, ram_mb=40_001) != []


def test_gpu_memory_that_others_use_is_not_free() -> None:
    made = room()
    assert not made.told(beat(20_000, 0))
    assert lacking(made, gpus=2, vram_mb=5_000) == [("1 of 2 GPUs have 5000 MiB free, needs 2", True)]
    assert lacking(made, gpus=2, vram_mb=4_000) == []
    assert made.told(beat(0, 0))
    assert lacking(made, gpus=2, vram_mb=24_000) == []


def test_a_little_use_does_not_spoil_a_whole_gpu() -> None:
    """Drivers and desktops hold some memory of GPUs that nobody computes on."""
    made = room()
    made.told(beat(2_400, 2_401))
    assert lacking(made, gpus=2) == [("1 of 2 GPUs are free, needs 2", True)]


def test_an_attempt_is_assumed_on_the_gpu_that_is_in_use() -> None:
    """Otherwise its memory would count twice: on the GPU it was assumed on, and as another's on its own."""
    made = room({"vram_mb": 20_000})
    made.told(beat(0, 20_000))
    assert lacking(made, gpus=1, vram_mb=24_000) == []
    assert made.vram_free_mb == 28_000
    made.free(("0", 0))
    assert lacking(made, gpus=1, vram_mb=24_000) == [], "on the other GPU"


def test_attempts_beyond_what_there_is_are_counted_and_leave_no_trace() -> None:
    """A crash may leave a node with more than it has."""
    made = room({"gpus": 2}, {"gpus": 2}, {"vram_mb": 1})
    assert made.vram_free_mb == 0
    for n in range(3):
        made.free((str(n), 0))
    assert made.vram_free_mb == 48_000
    assert lacking(made, gpus=2) == []
