"""What simulated nodes say is what real ones would say."""

from __future__ import annotations

from collections import Counter

from computemesh.contracts.base import decode
from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat
from computemesh.hardware import LinkKind, Tier, tier_of
from computemesh.testing.fleet import MIX, SimulatedNode, announcement


def test_what_a_simulated_node_says_is_what_the_contracts_declare() -> None:
    """Of every kind of machine, under every load, and with the time that was spliced in."""
    for number in range(len(MIX)):
        node = SimulatedNode(f"sim-{number}", number)
        said = decode(node.announcement, NodeAnnouncement)
        assert isinstance(said, NodeAnnouncement), said
        for now in (1_700_000_000.25, 1_700_000_001.5, 1_700_000_002.0, 1_700_000_003.125):
            beat = decode(node.heartbeat(now), NodeHeartbeat)
            assert isinstance(beat, NodeHeartbeat), beat
            assert (beat.node_id, beat.session, beat.sent_at) == (said.node_id, said.session, now)
            assert [use.uuid for use in beat.gpus] == [gpu.uuid for gpu in said.gpus]
            assert all(use.vram_used_mb <= gpu.vram_total_mb for use, gpu in zip(beat.gpus, said.gpus, strict=True))


def test_heartbeats_of_a_node_differ_from_one_to_the_next() -> None:
    """Otherwise whoever stores only what changed would have nothing to do."""
    node = SimulatedNode("sim-5", 5)
    assert len({node.heartbeat(1.0) for _ in range(4)}) == 4


def test_a_fleet_has_every_tier_and_its_gpus_are_linked_as_such_machines_are() -> None:
    """Ten nodes are enough to see all of them."""
    said = [announcement(f"sim-{number}", number, "s") for number in range(10)]
    assert set(Counter(tier_of(one.gpus) for one in said)) == set(Tier)
    factory = next(one for one in said if tier_of(one.gpus) is Tier.AI_FACTORY)
    assert len(factory.gpus) == 8
    assert {(link.a, link.b) for link in factory.gpu_links} == {(a, b) for a in range(8) for b in range(8) if a < b}
    assert {link.kind for link in factory.gpu_links} == {LinkKind.NVLINK}
    assert [gpu.numa_node for gpu in factory.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_no_two_simulated_nodes_are_the_same_machine_and_a_new_life_is_another_session() -> None:
    """Neither by machine nor by GPU."""
    said = [announcement(f"sim-{number}", number, "s") for number in range(100)]
    assert len({one.machine_id for one in said}) == 100
    uuids = [gpu.uuid for one in said for gpu in one.gpus]
    assert len(set(uuids)) == len(uuids)
    node = SimulatedNode("sim-1", 1)
    before = node.session
    node.begin()
    assert node.session != before
    assert node.session.encode() in node.announcement
    assert node.session.encode() in node.heartbeat(1.0)
