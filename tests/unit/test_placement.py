"""Goal: the best node that fits gets an item, and each of the others is told apart: not now, or never.

Method: one node and one item that fit; each test changes the one thing it is about.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.contracts.work import NodeVerdict, ObjectRef, Requirements, WorkError, WorkRecord
from computemesh.hardware import Cpu, Memory, Platform, Tier
from computemesh.testing.builders import a_gpu, a_node, a_record
from computemesh_services.work_marshaller import placement
from computemesh_services.work_marshaller.groups import EMPTY_SLACK, Groups
from computemesh_services.work_marshaller.needs import NOTHING, Shape, shape_of
from computemesh_services.work_marshaller.rooms import Refusal
from computemesh_services.work_marshaller.seats import Seat

NOW = 1_000_000.0
ERROR = WorkError(reason="out of memory")

NODE = a_node(
    work_types=["inference"],
    models=["llama"],
    slots=2,
    tier=Tier.GPU_PEER,
    platform=Platform.CUDA,
    gpus=[a_gpu(24_000), a_gpu(8_000)],
    memory=Memory(total_mb=64_000),
    cpu=Cpu(threads=16),
    labels={"zone": "a"},
)


def needing(**requirements: Any) -> WorkRecord:
    return a_record(model_name="llama", requirements=Requirements(**requirements))


def a_seat(node: NodeRecord = NODE, taken: int = 0, loaded: str = "", **changes: Any) -> Seat:
    """A node with so many items that asked for nothing."""
    seat = Seat(node)
    for n in range(taken):
        seat.take((f"other{n}", 0), NOTHING)
    seat.loaded_models = frozenset({loaded} - {""})
    for name, value in changes.items():
        setattr(seat, name, value)
    return seat


def seat(node_id: str, taken: int = 0, slots: int = 2, loaded: str = "", **changes: Any) -> Seat:
    return a_seat(a_node(node_id, slots=slots, **changes), taken, loaded)


def no_objection(_shape: Shape, _node_id: str, _now: float) -> str:
    return ""


def refusals(record: WorkRecord, node: Seat) -> list[Refusal]:
    return list(placement.refusals(shape_of(record), node, no_objection, NOW))


def explain(record: WorkRecord, seats: list[Seat]) -> list[NodeVerdict]:
    return placement.explain(record, seats, no_objection, NOW)


def choose(record: WorkRecord, seats: list[Seat]) -> str | None:
    """As the scheduler does; and as the explanation says."""
    groups = Groups(no_objection)
    for node in seats:
        groups.settle(node, NOW)
    best = groups.best(shape_of(record), placement.avoided(record), NOW)
    chosen = best.node.node_id if best else None
    assert chosen == next((verdict.node_id for verdict in explain(record, seats) if verdict.fits), None)
    return chosen


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"replicas": 2}, "takes no items with replicas: it has no direct delivery"),
        (
            {"payload_object": ObjectRef(object_id="o1", size=1)},
            "takes no payload too large for a message: it has no direct delivery",
        ),
    ],
)
def test_a_node_that_only_listens_gets_nothing_that_it_need_not_know_of(changes: dict[str, Any], reason: str) -> None:
    """A program of the README's kind would take an empty payload for the item's own, and say that it is done."""
    record = replace(needing(), **changes)
    (refusal,) = refusals(record, a_seat(replace(NODE, delivery="plain")))
    assert (refusal.reason, refusal.may_change) == (reason, False)
    assert refusals(record, a_seat(replace(NODE, delivery="direct"))) == []


def test_a_node_that_has_everything_fits() -> None:
    """All requirements at once, each exactly met."""
    record = needing(
        gpus=1, vram_mb=24_000, ram_mb=64_000, cpus=16, min_tier=Tier.GPU_PEER, labels={"zone": "a"}, node_id="n1",
        not_labels={"zone": "b", "rack": "1"}, node_ids=["n0", "n1"], not_node_ids=["n0"], gpu_model="Card",
        platform=Platform.CUDA,
    )  # fmt: skip
    assert refusals(record, a_seat()) == []
    assert choose(record, [a_seat()]) == "n1"


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (a_seat(taken=2), "busy: 2 of 2 slots taken"),
        (a_seat(taken=3), "busy: 3 of 2 slots taken"),
        (a_seat(replace(NODE, state=NodeState.SUSPECT)), "suspect"),
        (a_seat(replace(NODE, state=NodeState.LOST)), "lost"),
        (a_seat(accepting=False), "draining"),
        (a_seat(replace(NODE, drained=True)), "drained"),
        (a_seat(replace(NODE, drained=True, drain_reason="new fans")), "drained: new fans"),
        (a_seat(rests_until=NOW + 1, rest_reason="nobody listens for it"), "nobody listens for it"),
    ],
)
def test_a_node_that_cannot_now_may_later(candidate: Seat, reason: str) -> None:
    """Busy, silent, draining and unreachable pass."""
    (refusal,) = refusals(needing(), candidate)
    assert (refusal.reason, refusal.may_change) == (reason, True)
    assert choose(needing(), [candidate]) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (replace(needing(), work_type="ppo"), "does no 'ppo', but inference"),
        (replace(needing(), model_name="qwen"), "has no model 'qwen', but llama"),
        (needing(node_id="n2"), "the item is only for n2"),
        (needing(min_tier=Tier.AI_FACTORY), "tier GPU_PEER, needs AI_FACTORY"),
        (needing(gpus=3), "2 GPUs, needs 3"),
        (needing(gpus=2, vram_mb=16_000), "1 GPUs with 16000 MiB, needs 2"),
        (needing(vram_mb=40_000), "0 GPUs with 40000 MiB, needs 1"),
        (needing(ram_mb=64_001), "64000 MiB of RAM, needs 64001"),
        (needing(cpus=17), "16 CPUs, needs 17"),
        (needing(labels={"zone": "b"}), "label zone=a, needs b"),
        (needing(labels={"rack": "1"}), "label rack=(none), needs 1"),
        (needing(not_labels={"zone": "a"}), "label zone=a, which the item must not have"),
        (needing(node_ids=["n2", "n3"]), "the item is only for n2, n3"),
        (needing(node_id="n1", node_ids=["n2"]), "the item is only for no node"),
        (needing(not_node_ids=["n0", "n1"]), "the item is not for this node"),
        (needing(gpu_model="H100"), "0 GPUs with 'h100' in their name, needs 1"),
        (needing(gpus=2, vram_mb=10_000, gpu_model="CARD"), "1 GPUs with 'card' in their name with 10000 MiB, needs 2"),
        (needing(platform=Platform.ROCM), "platform CUDA, needs ROCM"),
    ],
)
def test_a_node_that_is_not_made_for_an_item_never_will_be(record: WorkRecord, reason: str) -> None:
    """Wrong kind, too small, elsewhere: the reason says what is there and what is needed."""
    (refusal,) = refusals(record, a_seat())
    assert (refusal.reason, refusal.may_change) == (reason, False)
    assert choose(record, [a_seat()]) is None


def test_a_node_without_slots_takes_no_work() -> None:
    """It is there for something else, and is not merely busy."""
    host = a_seat(replace(NODE, slots=0))
    (refusal,) = refusals(needing(), host)
    assert (refusal.reason, refusal.may_change) == ("takes no work", False)
    assert choose(needing(), [host]) is None


def test_all_reasons_are_told_and_not_only_the_first() -> None:
    """Who reads them need not try again to see the next."""
    candidate = a_seat(taken=2, accepting=False)
    found = [refusal.reason for refusal in refusals(needing(cpus=99, node_id="n2"), candidate)]
    assert found == ["busy: 2 of 2 slots taken", "draining", "the item is only for n2", "16 CPUs, needs 99"]


@pytest.mark.parametrize(
    ("changes", "record"),
    [
        ({"work_types": []}, replace(needing(), work_type="anything")),
        ({"models": []}, replace(needing(), model_name="anything")),
        ({"memory": None}, needing(ram_mb=10**6)),
        ({"memory": Memory()}, needing(ram_mb=10**6)),
        ({"cpu": None}, needing(cpus=1000)),
        ({"cpu": Cpu()}, needing(cpus=1000)),
        ({}, replace(needing(), model_name="")),
    ],
)
def test_what_a_node_does_not_tell_is_not_held_against_it(changes: dict[str, Any], record: WorkRecord) -> None:
    """An empty list takes any; an unknown size may be large enough."""
    node: NodeRecord = replace(NODE, **changes)
    assert choose(record, [a_seat(node)]) == "n1"


def test_the_emptier_node_is_chosen() -> None:
    """In proportion to its slots, not by their number."""
    assert choose(a_record(), [seat("a", taken=1), seat("b", taken=0)]) == "b"
    assert choose(a_record(), [seat("a", taken=3, slots=4), seat("b", taken=5, slots=10)]) == "b"


def test_another_node_than_the_one_that_failed_is_preferred_to_room() -> None:
    """The last attempt failed on a, so a busier b is tried."""
    record = a_record(node_id="a", error=ERROR)
    assert choose(record, [seat("a"), seat("b", taken=1)]) == "b"


def test_a_node_whose_last_attempt_did_not_fail_is_not_avoided() -> None:
    """Only an error speaks against going back."""
    assert choose(a_record(node_id="a"), [seat("a"), seat("b", taken=1)]) == "a"


def test_a_model_in_memory_beats_another_node_and_room() -> None:
    """Loading costs more than anything else here."""
    record = a_record(node_id="a", error=ERROR, model_name="llama")
    assert choose(record, [seat("a", taken=1, loaded="llama"), seat("b")]) == "a"


def test_a_loaded_model_counts_only_for_items_that_want_it() -> None:
    """Neither for another model nor for none."""
    for wanted in ("qwen", ""):
        assert choose(a_record(model_name=wanted), [seat("a", taken=1, loaded="llama"), seat("b")]) == "b"


def test_the_failed_node_is_still_chosen_when_it_is_the_only_one() -> None:
    """A preference is not a ban."""
    assert choose(a_record(node_id="a", error=ERROR), [seat("a"), seat("b", taken=2)]) == "a"


def test_a_tie_goes_to_the_lower_id_in_any_order() -> None:
    """So a decision does not depend on who registered first."""
    assert choose(a_record(), [seat("b"), seat("a"), seat("c")]) == "a"
    assert choose(a_record(), [seat("c"), seat("a"), seat("b")]) == "a"


def test_no_nodes_means_no_choice() -> None:
    """And nothing to explain."""
    assert choose(a_record(), []) is None
    assert explain(a_record(), []) == []


def test_an_explanation_lists_the_best_first_and_the_hopeless_last() -> None:
    """Those that fit by score, then those that may, then those that never will."""
    record = a_record(requirements=Requirements(cpus=4))
    small = Cpu(threads=2)
    verdicts = explain(
        record,
        [
            seat("never-b", cpu=small),
            seat("later-b", taken=2),
            seat("fits-half", taken=1),
            seat("never-a", taken=2, cpu=small),
            seat("later-a", state=NodeState.SUSPECT),
            seat("fits-free"),
        ],
    )
    assert [verdict.node_id for verdict in verdicts] == [
        "fits-free", "fits-half", "later-b", "later-a", "never-b", "never-a",
    ]  # fmt: skip
    assert [(v.fits, v.may_change) for v in verdicts] == [(True, True)] * 2 + [(False, True)] * 2 + [(False, False)] * 2
    assert verdicts[5].reasons == ["busy: 2 of 2 slots taken", "2 CPUs, needs 4"]
    assert verdicts[0].node_id == choose(record, [seat("fits-half", taken=1), seat("fits-free")])


def test_the_nearest_miss_lacks_the_least_for_good_then_is_online_then_lacks_the_least_for_now() -> None:
    """A lost node is not near because it would have the right label, were it there."""
    labels = {"zone": "a"}
    verdicts = explain(
        a_record(requirements=Requirements(cpus=4, labels=labels)),
        [
            seat("lost-b", state=NodeState.LOST),
            seat("lost-a", state=NodeState.LOST),
            seat("suspect", state=NodeState.SUSPECT),
            seat("two-nevers", cpu=Cpu(threads=2)),
            seat("busy", taken=2),
            seat("label-only"),
            seat("lost-but-right", state=NodeState.LOST, labels=labels),
        ],
    )
    assert [verdict.node_id for verdict in verdicts] == [
        "lost-but-right", "label-only", "busy", "suspect", "lost-a", "lost-b", "two-nevers",
    ]  # fmt: skip
    assert [verdict.may_change for verdict in verdicts] == [True] + [False] * 6


@pytest.mark.parametrize(
    ("record", "seats", "chosen"),
    [
        # The smallest tier that will do.
        (a_record(), [seat("a", tier=Tier.GPU_PEER), seat("b", tier=Tier.CPU_ONLY, taken=1)], "b"),
        # GPUs are left for those who ask for them.
        (a_record(), [seat("a", gpus=[a_gpu()] * 8), seat("b", gpus=[a_gpu()], taken=1)], "b"),
        # The least that is left over.
        (needing(gpus=1), [seat("a", gpus=[a_gpu()] * 8), seat("b", gpus=[a_gpu()] * 2)], "b"),
        (needing(vram_mb=1), [seat("a", gpus=[a_gpu(24_000)]), seat("b", gpus=[a_gpu(8_000)], taken=1)], "b"),
        # The smaller machine, for items that ask for some of it.
        (needing(cpus=2), [seat("a", cpu=Cpu(threads=64)), seat("b", cpu=Cpu(threads=8), taken=1)], "b"),
        (needing(ram_mb=2), [seat("a", memory=Memory(total_mb=64)), seat("b", memory=Memory(total_mb=8))], "b"),
        (needing(), [seat("a", cpu=Cpu(threads=64)), seat("b", cpu=Cpu(threads=8), taken=1)], "a"),
        # Preferred labels, then no failure there, then the size.
        (needing(prefer_labels={"zone": "a"}), [seat("a"), seat("b", labels={"zone": "a"}, taken=1)], "b"),
        (
            needing(prefer_labels={"zone": "a", "rack": "1"}),
            [seat("a", labels={"zone": "a", "rack": "2"}), seat("b", labels={"zone": "a", "rack": "1"}, taken=1)],
            "b",
        ),
        (
            replace(needing(prefer_labels={"zone": "a"}), node_id="b", error=ERROR),
            [seat("a"), seat("b", labels={"zone": "a"})],
            "b",
        ),
        (replace(needing(), node_id="a", error=ERROR), [seat("a"), seat("b", tier=Tier.AI_FACTORY)], "b"),
        # A model in memory before all that.
        (
            needing(prefer_labels={"zone": "a"}),
            [seat("a", labels={"zone": "a"}), seat("b", loaded="llama", tier=Tier.GPU_PEER)],
            "b",
        ),
        # Only those that are named, and of these the best.
        (needing(node_ids=["b", "c", "d"]), [seat("a"), seat("b", taken=1), seat("c")], "c"),
        (needing(not_node_ids=["a", "b"]), [seat("a"), seat("b"), seat("c", taken=1)], "c"),
    ],
)
def test_the_best_fit_is_chosen(record: WorkRecord, seats: list[Seat], chosen: str) -> None:
    assert choose(record, seats) == chosen
    assert choose(record, seats[::-1]) == chosen


def test_an_explanation_says_what_a_place_follows_from() -> None:
    """What counts most first."""
    record = needing(prefer_labels={"zone": "a", "rack": "1"})
    best, second = explain(
        replace(record, node_id="b", error=ERROR),
        [seat("a", loaded="llama", labels={"zone": "a"}, taken=1), seat("b", gpus=[a_gpu()], tier=Tier.GPU_PEER)],
    )
    assert (best.node_id, best.score, best.reasons) == (
        "a", 2.0, ["the model is in memory", "1 of 2 preferred labels", "tier CPU_ONLY", "1 of 2 slots taken"],
    )  # fmt: skip
    assert (second.score, second.reasons) == (
        1.0,
        ["the model is not in memory", "0 of 2 preferred labels", "the latest attempt failed here", "tier GPU_PEER",
         "1 GPUs that are not asked for", "0 of 2 slots taken"],
    )  # fmt: skip


def test_groups_without_nodes_are_forgotten() -> None:
    """Nodes that load one model after the other would leave one behind for each."""
    groups, node = Groups(no_objection), seat("a")
    for n in range(500):
        node.loaded_models = frozenset({f"m{n}"})
        groups.settle(node, NOW)
        assert groups.best(shape_of(a_record(model_name="m")), "", NOW) is node
    assert groups.kinds <= 2 * EMPTY_SLACK
