"""Goal: the answer to an assignment does not depend on how often, how late or in which order it is asked."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from computemesh.contracts.gpus import GpuShare
from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.contracts.work import Assignment, Requirements
from computemesh.hardware import Cpu, Gpu, Memory, Platform
from computemesh_services.node_agent import desk as desks
from computemesh_services.node_agent.desk import Desk, Verdict
from computemesh_services.node_agent.environment import environment_of

OFFERED = frozenset({"render"})

NODE = NodeAnnouncement(
    node_id="n1",
    cpu=Cpu(threads=16),
    memory=Memory(total_mb=64_000),
    gpus=[Gpu(index=0, uuid="GPU-a", vram_total_mb=80_000), Gpu(index=1, vram_total_mb=24_000)],
)


def asked(attempt: int = 1, work_id: str = "w1", work_type: str = "render") -> Assignment:
    return Assignment(work_id=work_id, attempt=attempt, node_id="n1", work_type=work_type)


def a_desk(*running: tuple[str, int], slots: int = 2) -> Desk:
    """A desk at which these attempts run."""
    desk = Desk("n1", slots)
    for work_id, attempt in running:
        desk.started(asked(attempt, work_id))
    return desk


def needs(work_id: str, *gpus: GpuShare, attempt: int = 1, cpus: int = 0, ram_mb: int = 0) -> Assignment:
    """An attempt that was promised so much."""
    return Assignment(
        work_id=work_id,
        attempt=attempt,
        node_id="n1",
        work_type="render",
        requirements=Requirements(cpus=cpus, ram_mb=ram_mb),
        gpus=list(gpus),
    )


def answer(desk: Desk, one: Assignment, node: NodeAnnouncement = NODE) -> tuple[Verdict, str]:
    return desk.judge(one, OFFERED, node)


def test_an_attempt_that_is_only_reported_still_is_in_hand_and_takes_no_slot() -> None:
    """What the marshaller sends because of the report may come before the answer to it."""
    desk = a_desk(("w8", 1), ("w9", 1))
    desk.reporting(asked(1, "w8"))
    assert answer(desk, asked()) == (Verdict.START, "")
    assert answer(desk, asked(1, "w8")) == (Verdict.KNOWN, "")
    assert sorted(desk.running) == [("w8", 0), ("w9", 0)]
    desk.started(asked())
    desk.ended(asked(1, "w8"))
    assert answer(desk, asked(1, "w7")) == (Verdict.DECLINE, "busy: 2 of 2 slots taken")
    assert answer(desk, asked(1, "w8")) == (Verdict.KNOWN, "")


def test_a_new_item_is_started_while_there_are_slots() -> None:
    """The last slot is given away, no more than that."""
    assert a_desk().judge(asked(), OFFERED, NODE) == (Verdict.START, "")
    assert a_desk(("w8", 1)).judge(asked(), OFFERED, NODE) == (Verdict.START, "")
    verdict, reason = a_desk(("w8", 1), ("w9", 1)).judge(asked(), OFFERED, NODE)
    assert (verdict, reason) == (Verdict.DECLINE, "busy: 2 of 2 slots taken")


def test_an_attempt_that_runs_or_ran_is_accepted_again_and_not_started_again() -> None:
    """Also by a node that is full or ends: the answer was lost, not the work."""
    desk = a_desk(("w1", 1), slots=1)
    desk.accepting = False
    assert desk.judge(asked(), OFFERED, NODE) == (Verdict.KNOWN, "")
    desk.ended(asked(1))
    assert desk.running == {}
    assert desk.judge(asked(), OFFERED, NODE) == (Verdict.KNOWN, "")


def test_a_newer_attempt_replaces_the_one_that_runs_even_when_all_slots_are_taken() -> None:
    """It takes over the slot."""
    desk = a_desk(("w1", 1), slots=1)
    assert answer(desk, asked(2)) == (Verdict.START, "")
    assert desk.started(asked(2)) == [asked(1)]
    assert answer(desk, asked(2)) == (Verdict.KNOWN, "")
    assert desk.started(asked(1, "w2")) == []


def test_an_assignment_for_another_node_is_declined() -> None:
    """A node runs nothing under a name that is not its own: heartbeats would renew another's lease."""
    stray = Assignment(work_id="w1", attempt=1, node_id="n2", work_type="render")
    assert a_desk().judge(stray, OFFERED, NODE) == (Verdict.DECLINE, "this is node n1, the assignment is for n2")


def test_an_attempt_that_was_overtaken_is_declined() -> None:
    """It comes late; what runs is newer."""
    verdict, reason = a_desk(("w1", 2)).judge(asked(1), OFFERED, NODE)
    assert (verdict, reason) == (Verdict.DECLINE, "attempt 2 runs here already")


@pytest.mark.parametrize("running", [(), (("w1", 1),)])
def test_a_node_that_ends_takes_nothing_new(running: tuple[tuple[str, int], ...]) -> None:
    """Neither an item nor another attempt at one."""
    desk = a_desk(*running)
    desk.accepting = False
    assert desk.judge(asked(2), OFFERED, NODE) == (Verdict.DECLINE, "draining")


def test_work_that_the_node_does_not_do_is_declined_with_what_it_does() -> None:
    """The submitter sees it in the item's explanation."""
    verdict, reason = a_desk().judge(asked(work_type="bake"), OFFERED, NODE)
    assert (verdict, reason) == (Verdict.DECLINE, "runs no 'bake', but render")
    assert a_desk().judge(asked(), frozenset(), NODE) == (Verdict.DECLINE, "runs no 'render', but nothing")


def test_the_end_of_an_attempt_that_was_replaced_leaves_its_successor_running() -> None:
    """The old one's processes may take a moment to be gone."""
    desk = a_desk(("w1", 1))
    desk.started(asked(2))
    desk.ended(asked(1))
    assert desk.running == {("w1", 0): asked(2)}


def test_only_so_many_ended_attempts_are_remembered_the_latest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(desks, "FINISHED_MAX", 2)
    desk = a_desk()
    for attempt in (1, 2, 3):
        desk.started(asked(attempt))
        desk.ended(asked(attempt))
    assert [desk.judge(asked(attempt), OFFERED, NODE)[0] for attempt in (1, 2, 3)] == [
        Verdict.START,
        Verdict.KNOWN,
        Verdict.KNOWN,
    ]


def filled(*running: Assignment) -> Desk:
    """A desk with room for many at which these run."""
    desk = Desk("n1", 100)
    for one in running:
        desk.started(one)
    return desk


def test_cpus_and_ram_are_given_away_to_the_last_and_no_further() -> None:
    """What attempts asked for is counted together, whatever they use; the refusal has the numbers."""
    desk = filled(needs("w1", cpus=8, ram_mb=40_000), needs("w2", cpus=4, ram_mb=20_000))
    assert answer(desk, needs("w3", cpus=4, ram_mb=4_000)) == (Verdict.START, "")
    assert answer(desk, needs("w3", cpus=5)) == (Verdict.DECLINE, "12 of 16 CPUs taken by work, needs 5")
    reason = "60000 of 64000 MiB of RAM taken by work, needs 4001"
    assert answer(desk, needs("w3", cpus=4, ram_mb=4_001)) == (Verdict.DECLINE, reason)
    assert answer(filled(), needs("w1", cpus=17)) == (Verdict.DECLINE, "0 of 16 CPUs taken by work, needs 17")


def test_an_item_that_asks_for_nothing_fits_beside_any_other() -> None:
    """As many as there are slots, also on a node that is promised away, or has less than it had."""
    smaller = NodeAnnouncement(node_id="n1", cpu=Cpu(threads=8), memory=NODE.memory)
    for node in (NODE, smaller):
        assert answer(filled(needs("w1", cpus=16, ram_mb=64_000)), needs("w2"), node) == (Verdict.START, "")


def test_what_an_attempt_had_is_free_once_it_has_ended_and_for_its_own_successor() -> None:
    """Of two attempts at one item only one has anything."""
    desk = filled(needs("w1", cpus=16, ram_mb=64_000))
    assert answer(desk, needs("w1", attempt=2, cpus=16, ram_mb=64_000)) == (Verdict.START, "")
    desk.ended(asked(1))
    assert answer(desk, needs("w2", cpus=16, ram_mb=64_000)) == (Verdict.START, "")


def test_an_operator_may_leave_less_to_work_or_more() -> None:
    """What the node announces of it counts in place of what it has."""
    less = NodeAnnouncement(node_id="n1", cpu=NODE.cpu, memory=NODE.memory, work_cpus=2, work_ram_mb=1_000)
    assert answer(filled(), needs("w1", cpus=3), less) == (Verdict.DECLINE, "0 of 2 CPUs taken by work, needs 3")
    reason = "0 of 1000 MiB of RAM taken by work, needs 1001"
    assert answer(filled(), needs("w1", ram_mb=1_001), less) == (Verdict.DECLINE, reason)
    assert answer(filled(), needs("w1", cpus=2, ram_mb=1_000), less) == (Verdict.START, "")
    nothing = NodeAnnouncement(node_id="n1", cpu=NODE.cpu, work_cpus=0)
    assert answer(filled(), needs("w1", cpus=1), nothing) == (Verdict.DECLINE, "0 of 0 CPUs taken by work, needs 1")
    more = NodeAnnouncement(node_id="n1", cpu=NODE.cpu, work_cpus=64)
    assert answer(filled(), needs("w1", cpus=64), more) == (Verdict.START, "")


@pytest.mark.parametrize(
    "node", [NodeAnnouncement(node_id="n1"), NodeAnnouncement(node_id="n1", cpu=Cpu(), memory=Memory())]
)
def test_what_a_node_does_not_know_of_itself_is_not_bounded(node: NodeAnnouncement) -> None:
    """A node without a detector still works."""
    desk = filled(needs("w1", cpus=1_000, ram_mb=10**9))
    assert answer(desk, needs("w2", cpus=1_000, ram_mb=10**9), node) == (Verdict.START, "")


def test_gpu_memory_that_another_attempt_still_holds_is_not_used_twice() -> None:
    """The ledger may have granted it anew while the old attempt ends; GPUs are told by uuid, else by index."""
    desk = filled(needs("w1", GpuShare(index=0, uuid="GPU-a", mb=60_000), GpuShare(index=1, mb=24_000)))
    assert answer(desk, needs("w2", GpuShare(index=0, uuid="GPU-a", mb=20_000))) == (Verdict.START, "")
    reason = "60000 of 80000 MiB of GPU 0 taken by work, needs 20001"
    assert answer(desk, needs("w2", GpuShare(index=5, uuid="GPU-a", mb=20_001))) == (Verdict.DECLINE, reason)
    reason = "24000 of 24000 MiB of GPU 1 taken by work, needs 1"
    assert answer(desk, needs("w2", GpuShare(index=1, mb=1))) == (Verdict.DECLINE, reason)


def test_a_gpu_that_is_not_here_is_not_used() -> None:
    """The hardware changed after it was reserved."""
    assert answer(filled(), needs("w1", GpuShare(index=2, mb=1))) == (Verdict.DECLINE, "has no GPU 2")
    moved = needs("w1", GpuShare(index=0, uuid="GPU-b", mb=1))
    assert answer(filled(), moved) == (Verdict.DECLINE, "has no GPU GPU-b")


def replica(number: int, attempt: int = 1) -> Assignment:
    """One of several replicas of w1, all here."""
    return replace(asked(attempt), replica=number, replicas=3, peers=["n1", "n1", "n1"])


def test_replicas_of_one_item_run_side_by_side_each_in_a_slot() -> None:
    """Each is accepted once, and its end frees its own slot."""
    desk = filled()
    desk.slots = 2
    for number in (0, 1):
        assert answer(desk, replica(number)) == (Verdict.START, "")
        assert desk.started(replica(number)) == []
        assert answer(desk, replica(number)) == (Verdict.KNOWN, "")
    assert answer(desk, replica(2)) == (Verdict.DECLINE, "busy: 2 of 2 slots taken")
    desk.ended(replica(0))
    assert desk.running == {("w1", 1): replica(1)}
    assert answer(desk, replica(0)) == (Verdict.KNOWN, "")
    assert answer(desk, replica(2)) == (Verdict.START, "")


def test_a_newer_attempt_ends_all_replicas_of_the_older_one() -> None:
    """Whichever of its replicas arrives first, and it needs none of their slots; the older attempt never comes back."""
    desk = filled(replica(0), replica(2))
    desk.slots = 2
    assert answer(desk, replica(1, attempt=2)) == (Verdict.START, "")
    assert desk.started(replica(1, attempt=2)) == [replica(0), replica(2)]
    assert desk.running == {("w1", 1): replica(1, attempt=2)}
    assert answer(desk, replica(0)) == (Verdict.DECLINE, "attempt 2 runs here already")


@pytest.mark.parametrize(
    ("uuids", "platform", "expected"),
    [
        (("GPU-a", "MIG-b"), Platform.CUDA, {"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"}),
        (("GPU-a", ""), Platform.CUDA, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        (("GPU-a", "GPU-b"), Platform.ROCM, {"HIP_VISIBLE_DEVICES": "0,1"}),
        (("GPU-a", "GPU-b"), None, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
    ],
)
def test_an_attempt_sees_the_gpus_that_are_reserved_for_it(
    uuids: tuple[str, ...], platform: Platform | None, expected: dict[str, str]
) -> None:
    """And the id that makes its memory its own."""
    shares = [GpuShare(index=index, uuid=uuid, mb=1) for index, uuid in enumerate(uuids)]
    given = replace(asked(), reservation_id="w-1", gpus=shares)
    assert environment_of(given, platform) == {"COMPUTEMESH_RESERVATION_ID": "w-1", **expected}


def test_only_what_concerns_an_attempt_is_in_its_environment() -> None:
    """One without GPUs keeps what the node's own environment says of them; one of many knows the others."""
    assert environment_of(asked(), Platform.CUDA) == {}
    assert environment_of(replica(2), Platform.CUDA) == {
        "COMPUTEMESH_REPLICA": "2",
        "COMPUTEMESH_REPLICAS": "3",
        "COMPUTEMESH_PEERS": "n1,n1,n1",
    }
