"""What is free of a node's GPUs, which of them a request gets, and why not."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.contracts.gpus import GpuCanFit, GpuGrant, GpuLedger, GpuShare, WhyNot
from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.hardware import Gpu, GpuLink, GpuProcess, GpuUse, LinkKind, Platform, Tier
from computemesh_services.gpu_orchestrator import topology
from computemesh_services.gpu_orchestrator.ledger import refusal
from computemesh_services.gpu_orchestrator.room import (
    GRANTS_MAX,
    Facts,
    Refusals,
    best_of,
    facts_of,
    pick,
    room_of,
    state_of,
    why_not,
)

NOW = 1000.0


def a_card(index: int, mb: int = 24_000, **changes: Any) -> Gpu:
    return replace(Gpu(index=index, uuid=f"GPU-{index}", vram_total_mb=mb, compute_capability="8.9"), **changes)


def a_node(*cards: Gpu, **changes: Any) -> NodeRecord:
    return replace(NodeRecord(node_id="n1", gpus=list(cards)), **changes)


def a_grant(rid: str = "g1", *shares: tuple[int, int], **changes: Any) -> GpuGrant:
    """A grant of these (index, MiB)."""
    held = [GpuShare(index=index, uuid=f"GPU-{index}", mb=mb) for index, mb in shares]
    grant = GpuGrant(
        reservation_id=rid,
        node_id="n1",
        required_mb=held[0].mb,
        total_mb=sum(share.mb for share in held),
        gpus=held,
        granted_at=NOW - 10,
        expires_at=NOW + 10,
        timeout_seconds=20,
    )
    return replace(grant, **changes)


def a_ledger(*grants: GpuGrant, **baselines: int) -> GpuLedger:
    return GpuLedger(
        node_id="n1", grants=list(grants), baselines={k.replace("_", "-"): v for k, v in baselines.items()}
    )


def heard(node: NodeRecord, *uses: GpuUse, **changes: Any) -> Facts:
    return replace(facts_of(node, 7), uses=uses, heard_at=NOW, **changes)


def a_use(index: int, used_mb: int, *processes: tuple[int, int, str], tells: bool = True, error: str = "") -> GpuUse:
    """A use with these (pid, MiB, reservation) processes."""
    told = [GpuProcess(pid=pid, memory_mb=mb, reservation_id=rid) for pid, mb, rid in processes]
    return GpuUse(
        index=index, uuid=f"GPU-{index}", vram_used_mb=used_mb, processes=told if tells else None, error=error
    )


# --- free ------------------------------------------------------------------------------------------------------------


def free(ledger: GpuLedger, facts: Facts, headroom_mb: int = 0) -> list[int]:
    return list(room_of(ledger, facts, NOW, headroom_mb=headroom_mb).free_mb)


def test_free_is_what_is_neither_reserved_nor_used_by_others() -> None:
    """Until a heartbeat tells otherwise, the use that was announced stands."""
    node = a_node(a_card(0), a_card(1, vram_used_mb=4_000))
    assert free(a_ledger(a_grant("g1", (0, 10_000))), facts_of(node)) == [14_000, 20_000]
    assert free(a_ledger(a_grant("g1", (0, 10_000))), facts_of(node), headroom_mb=500) == [13_500, 19_500]


def test_what_has_run_out_counts_no_more() -> None:
    """Whether or not anybody has dropped it from the record."""
    assert free(a_ledger(a_grant("g1", (0, 10_000), expires_at=NOW)), facts_of(a_node(a_card(0)))) == [24_000]


def test_processes_of_a_reservation_use_what_it_reserved_and_beyond_it_what_is_free() -> None:
    """They are known by its id in their environment, or by the pids it names."""
    node = a_node(a_card(0))
    ledger = a_ledger(a_grant("g1", (0, 10_000), pids=[7]))
    assert free(ledger, heard(node, a_use(0, 9_000, (5, 4_000, "g1"), (7, 5_000, "")))) == [14_000]
    assert free(ledger, heard(node, a_use(0, 12_000, (5, 12_000, "g1")))) == [12_000]
    assert free(ledger, heard(node, a_use(0, 9_000, (5, 9_000, "g0")))) == [5_000]
    assert free(ledger, heard(node, a_use(0, 9_500, (5, 9_000, "g1")))) == [13_500]


def test_without_processes_growth_since_the_grant_is_the_holders_own_up_to_what_it_reserved() -> None:
    """What was in use at the grant, and what grows beyond the reservation, is others'."""
    node = a_node(a_card(0))
    ledger = a_ledger(a_grant("g1", (0, 10_000)), GPU_0=3_000)
    assert free(ledger, heard(node, a_use(0, 3_000, tells=False))) == [11_000]
    assert free(ledger, heard(node, a_use(0, 13_000, tells=False))) == [11_000]
    assert free(ledger, heard(node, a_use(0, 14_000, tells=False))) == [10_000]
    assert free(ledger, heard(node, a_use(0, 1_000, tells=False))) == [13_000]
    no_memory = GpuUse(index=0, uuid="GPU-0", vram_used_mb=13_000, processes=[GpuProcess(pid=1)])
    assert free(ledger, heard(node, no_memory)) == [11_000]


def test_a_reservation_follows_its_gpu_by_uuid_when_indices_shift() -> None:
    """One that was pulled out is shown with what is reserved of it, and gives nothing."""
    node = a_node(a_card(0, uuid="GPU-1"))
    room = room_of(a_ledger(a_grant("g1", (0, 8_000), (1, 8_000))), facts_of(node), NOW)
    assert room.free_mb == (16_000,)
    ghost = state_of(room.spots[1], room)
    assert (ghost.uuid, ghost.reserved_mb, ghost.free_mb, ghost.unavailable) == (
        "GPU-0",
        8_000,
        0,
        "the node no longer tells of it",
    )


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (heard(a_node(a_card(0)), a_use(0, 0, error="GPU is lost")), WhyNot.ERROR),
        (facts_of(a_node(a_card(0, error="GPU is lost"))), WhyNot.ERROR),
        (heard(a_node(a_card(0)), a_use(1, 0)), WhyNot.GONE),
        (facts_of(a_node(a_card(0), a_card(1, mig_parent="GPU-0", vram_total_mb=50))), WhyNot.MIG),
        (facts_of(a_node(a_card(0), state=NodeState.SUSPECT)), WhyNot.NODE_STATE),
        (facts_of(a_node(a_card(0), state=NodeState.LOST)), WhyNot.NODE_STATE),
        (facts_of(a_node(a_card(0), drained=True)), WhyNot.NODE_STATE),
        (heard(a_node(a_card(0)), a_use(0, 0), accepting=False), WhyNot.NODE_STATE),
        (heard(a_node(a_card(0)), a_use(0, 23_500)), WhyNot.USED),
    ],
)
def test_nothing_is_had_of_a_gpu_that_cannot_be_used_now(facts: Facts, code: WhyNot) -> None:
    """The answer says why."""
    room = room_of(a_ledger(), facts, NOW)
    ask = GpuCanFit(required_mb=1_000)
    assert pick(room, ask) is None
    assert code in {verdict.code for verdict in why_not(room, ask)}


def test_a_record_takes_no_more_reservations_than_fit_a_message() -> None:
    """Small ones would otherwise fill it until it cannot be stored."""
    full = a_ledger(*(a_grant(f"g{n}", (0, 1)) for n in range(GRANTS_MAX)))
    facts = facts_of(a_node(a_card(0)))
    assert pick(room_of(full, facts, NOW), GpuCanFit(required_mb=1)) is None
    assert pick(room_of(replace(full, grants=full.grants[1:]), facts, NOW), GpuCanFit(required_mb=1)) is not None


# --- which ------------------------------------------------------------------------------------------------------------


def chosen(facts: Facts, ask: GpuCanFit, *grants: GpuGrant) -> list[int] | None:
    found = pick(room_of(a_ledger(*grants), facts, NOW), ask)
    return [spot.gpu.index for spot in found.spots] if found else None


def test_the_gpu_with_the_least_room_that_is_enough_is_taken() -> None:
    """So that large holes stay."""
    facts = facts_of(a_node(a_card(0), a_card(1), a_card(2)))
    grants = (a_grant("g1", (1, 14_000)), a_grant("g2", (2, 16_000)))
    assert chosen(facts, GpuCanFit(required_mb=9_000), *grants) == [1]
    assert chosen(facts, GpuCanFit(required_mb=8_000), *grants) == [2]
    assert chosen(facts, GpuCanFit(required_mb=8_000, gpu_count=2), *grants) == [1, 2]
    assert chosen(facts, GpuCanFit(required_mb=11_000, gpu_count=2), *grants) is None


def test_gpus_that_are_named_are_taken_or_none() -> None:
    """In the order they are named."""
    facts = facts_of(a_node(a_card(0), a_card(1)))
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_indices=[1, 0])) == [1, 0]
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_indices=[0, 2])) is None
    assert chosen(facts, GpuCanFit(required_mb=11_000, gpu_indices=[0, 1]), a_grant("g1", (1, 14_000))) is None


def test_linked_gpus_are_preferred_when_asked_for_and_demanded_when_that_is_asked() -> None:
    """Also where others would leave larger holes."""
    pairs = [GpuLink(a=0, b=1, kind=LinkKind.NVLINK, lanes=4), GpuLink(a=2, b=3, kind=LinkKind.NVLINK, lanes=12)]
    facts = facts_of(a_node(*(a_card(n) for n in range(4)), gpu_links=pairs))
    crossing = (a_grant("g1", (0, 2_000)), a_grant("g2", (2, 2_000)))
    assert chosen(facts, GpuCanFit(required_mb=1_000, gpu_count=2), *crossing) == [0, 2]
    assert chosen(facts, GpuCanFit(required_mb=1_000, gpu_count=2, prefer_nvlink=True), *crossing) == [2, 3]
    big = (a_grant("g1", (0, 23_500)), a_grant("g2", (2, 23_500)))
    assert chosen(facts, GpuCanFit(required_mb=1_000, gpu_count=2, prefer_nvlink=True), *big) == [1, 3]
    assert chosen(facts, GpuCanFit(required_mb=1_000, gpu_count=2, require_nvlink=True), *big) is None
    assert chosen(facts, GpuCanFit(required_mb=1_000, gpu_indices=[1, 2], require_nvlink=True)) is None
    assert chosen(facts, GpuCanFit(required_mb=1_000, require_nvlink=True), *big) == [1]


def test_without_links_gpus_that_are_near_each_other_go_together() -> None:
    """Over PCIe as far as that is told, else by NUMA node."""
    near = [GpuLink(a=1, b=3, kind=LinkKind.PIX), GpuLink(a=0, b=1, kind=LinkKind.SYS)]
    facts = facts_of(a_node(*(a_card(n) for n in range(4)), gpu_links=near))
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_count=2, prefer_nvlink=True)) == [1, 3]
    by_numa = facts_of(a_node(*(a_card(n, numa_node=n % 2) for n in range(4))))
    assert chosen(by_numa, GpuCanFit(required_mb=1, gpu_count=2, prefer_nvlink=True)) == [0, 2]


@pytest.mark.parametrize("seed", range(120))
def test_the_best_group_is_the_one_that_trying_all_finds(seed: int) -> None:
    """Among up to twelve GPUs, linked at random."""
    chance = random.Random(seed)
    size = chance.randrange(1, 13)
    links = [
        GpuLink(a=a, b=b, kind=chance.choice(list(LinkKind)), lanes=chance.randrange(4))
        for a, b in itertools.combinations(range(size), 2)
        if chance.random() < 0.6
    ]
    made = topology.topology_of(a_node(*(a_card(n) for n in range(size)), gpu_links=links))
    free_mb = tuple(chance.randrange(-1, 5) * 1000 for _ in range(size))
    count = chance.randrange(1, size + 1)

    def rank(group: topology.Group) -> tuple[bool, int, int]:
        return group.joined, group.gain, -sum(free_mb[at] for at in group.chosen)

    fit = [at for at, mb in enumerate(free_mb) if mb >= 1000]
    best = max((rank(topology.measured(made, some)) for some in itertools.combinations(fit, count)), default=None)
    found = topology.best_group(made, free_mb, count, 1000)
    assert (rank(found) if found else None) == best
    assert found is None or len(set(found.chosen)) == count


def test_gpus_are_joined_also_through_each_other_and_a_link_is_worth_more_than_nearness() -> None:
    """A chain joins its ends; two that are linked beat three that are near."""
    chain = [GpuLink(a=0, b=1, kind=LinkKind.NVLINK), GpuLink(a=1, b=2, kind=LinkKind.NVLINK)]
    facts = facts_of(a_node(*(a_card(n) for n in range(4)), gpu_links=chain))
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_count=3, require_nvlink=True)) == [0, 1, 2]
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_indices=[0, 2], require_nvlink=True)) is None
    near = [GpuLink(a=a, b=b, kind=LinkKind.PIX) for a, b in [(2, 3), (3, 4), (2, 4)]]
    facts = facts_of(a_node(*(a_card(n) for n in range(5)), gpu_links=[chain[0], *near]))
    found = chosen(facts, GpuCanFit(required_mb=1, gpu_count=3, prefer_nvlink=True))
    assert found is not None
    assert {0, 1} < set(found)


def test_among_more_than_sixteen_gpus_a_good_group_is_grown() -> None:
    """Two islands of sixteen: eight of one of them."""
    links = [GpuLink(a=a, b=b, kind=LinkKind.XGMI) for a, b in itertools.combinations(range(32), 2) if a % 2 == b % 2]
    facts = facts_of(a_node(*(a_card(n) for n in range(32)), gpu_links=links))
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_count=8, require_nvlink=True)) == list(range(0, 16, 2))


def test_slices_are_had_one_by_one() -> None:
    """A program uses one slice; who names several of a certain node knows what it does."""
    facts = facts_of(a_node(a_card(0, mig_parent="GPU-x"), a_card(1, mig_parent="GPU-x")))
    assert chosen(facts, GpuCanFit(required_mb=1)) == [0]
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_count=2)) is None
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_indices=[0, 1])) is None
    assert chosen(facts, GpuCanFit(required_mb=1, gpu_indices=[0, 1], node_id="n1")) == [0, 1]


@pytest.mark.parametrize(
    "ask",
    [
        GpuCanFit(required_mb=1, node_id="n2"),
        GpuCanFit(required_mb=1, min_tier=Tier.AI_FACTORY),
        GpuCanFit(required_mb=1, platform=Platform.ROCM),
        GpuCanFit(required_mb=1, labels={"zone": "b"}),
        GpuCanFit(required_mb=1, min_compute_capability="9.0"),
        GpuCanFit(required_mb=1, min_compute_capability="10"),
        GpuCanFit(required_mb=1, min_vram_mb=24_001),
        GpuCanFit(required_mb=1, gpu_model="H200"),
    ],
)
def test_what_is_not_of_the_kind_that_is_asked_for_never_does(ask: GpuCanFit) -> None:
    """The same request without that filter is granted."""
    node = a_node(a_card(0, name="NVIDIA H100 PCIe"), tier=Tier.GPU_PEER, platform=Platform.CUDA, labels={"zone": "a"})
    room = room_of(a_ledger(), facts_of(node), NOW)
    assert pick(room, ask) is None
    assert [(v.code, v.may_change) for v in why_not(room, ask)] == [(WhyNot.FILTER, False)]
    fine = GpuCanFit(
        required_mb=1,
        node_id="n1",
        min_tier=Tier.GPU_PEER,
        platform=Platform.CUDA,
        labels={"zone": "a"},
        min_compute_capability="8.9",
        min_vram_mb=24_000,
        gpu_model="h100",
    )
    assert pick(room, fine) is not None


def test_over_nodes_the_best_fit_wins_and_linked_ones_first_where_preferred() -> None:
    """Equals are decided by the node's id, so that replicas agree."""
    link = [GpuLink(a=0, b=1, kind=LinkKind.NVLINK)]
    rooms = [
        room_of(a_ledger(), facts_of(a_node(a_card(0, mb), a_card(1, mb), node_id=name, gpu_links=links)), NOW)
        for name, mb, links in [("a", 80_000, link), ("c", 24_000, []), ("b", 24_000, [])]
    ]

    def best(ask: GpuCanFit) -> str:
        found = best_of(rooms, ask)
        return found.node_id if found else ""

    assert best(GpuCanFit(required_mb=1_000, gpu_count=2)) == "b"
    assert best(GpuCanFit(required_mb=1_000, gpu_count=2, prefer_nvlink=True)) == "a"
    assert best(GpuCanFit(required_mb=30_000)) == "a"
    assert best(GpuCanFit(required_mb=90_000)) == ""


# --- why not ----------------------------------------------------------------------------------------------------------


def test_why_not_names_the_numbers_and_the_holders() -> None:
    """Whose reservation it is, what others use, and how much is missing."""
    grant = a_grant("g1", (0, 10_000), owner="alice")
    facts = heard(a_node(a_card(0)), a_use(0, 4_000, (5, 4_000, "")))
    against = Refusals(GpuCanFit(required_mb=12_000))
    against.add(room_of(a_ledger(grant), facts, NOW))
    (verdict,) = against.closest
    assert (verdict.code, verdict.short_mb, verdict.may_change) == (WhyNot.RESERVED, 2_000, True)
    assert verdict.reason == "10000 of 24000 MiB free, needs 12000; 10000 reserved by alice; 4000 used by others"


@pytest.mark.parametrize(
    ("ask", "codes", "may_change"),
    [
        (GpuCanFit(required_mb=24_001), [WhyNot.TOO_SMALL, WhyNot.TOO_SMALL], False),
        (GpuCanFit(required_mb=1, gpu_count=3), [WhyNot.TOO_FEW, WhyNot.TOO_FEW], False),
        (GpuCanFit(required_mb=15_000, gpu_count=2), [WhyNot.RESERVED, WhyNot.TOO_FEW], True),
        (GpuCanFit(required_mb=1, gpu_count=2, require_nvlink=True), [WhyNot.UNLINKED, WhyNot.UNLINKED], False),
        (GpuCanFit(required_mb=1, gpu_indices=[0, 5]), [WhyNot.ABSENT, WhyNot.TOO_FEW], False),
    ],
)
def test_why_not_tells_what_may_change_from_what_never_will(
    ask: GpuCanFit, codes: list[WhyNot], may_change: bool
) -> None:
    """So that a caller knows whether to wait."""
    room = room_of(a_ledger(a_grant("g1", (0, 10_000))), facts_of(a_node(a_card(0), a_card(1))), NOW)
    against = Refusals(ask)
    against.add(room)
    assert sorted(verdict.code for verdict in against.closest) == sorted(codes)
    assert against.may_change is may_change


def test_of_many_gpus_those_that_come_closest_are_told_and_all_are_counted() -> None:
    """However many there are."""
    against = Refusals(GpuCanFit(required_mb=20_000))
    for n in range(50):
        cards = [a_card(i, vram_used_mb=10_000 + 100 * n + i) for i in range(8)]
        against.add(room_of(a_ledger(), facts_of(a_node(*cards, node_id=f"n{n}")), NOW))
    assert against.counts == {WhyNot.USED: 400}
    assert [verdict.node_id for verdict in against.closest] == [f"n{n}" for n in range(4) for _ in range(8)]


def test_a_refusal_blames_the_gpus_that_were_named_and_counts_all_that_it_counts() -> None:
    """Not a number of GPUs that nobody asked for."""
    ask = GpuCanFit(required_mb=1, gpu_indices=[0, 5])
    against = Refusals(ask)
    for n in range(4):
        against.add(room_of(a_ledger(), facts_of(a_node(a_card(0), a_card(1), node_id=f"n{n}")), NOW))
    refused = refusal(ask, against)
    assert (refused.code, refused.field) == ("impossible", "gpu_indices")
    assert "n0/0: 1 GPU of the node would do, needs GPUs 0, 5. " in refused.reason
    assert refused.reason.endswith(". 3 more; of all 8, by reason: 4 absent, 4 too_few")
