"""Goal: a node is online, suspect or lost exactly when it should be, and a life that ended is told by the epoch.

Method: records in, records out; time is a number the test chooses.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.contracts.nodes import NodeAnnouncement, NodeRecord, NodesQuery, NodeState
from computemesh.hardware import Tier
from computemesh.testing.builders import a_beat, a_gpu, a_node
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.roster import Patience

PATIENCE = Patience(suspect_after_s=25, lost_after_s=45, unmonitored_ttl_s=1000)


def said(**changes: Any) -> NodeAnnouncement:
    return replace(NodeAnnouncement(node_id="n1", session="s1", slots=2), **changes)


def known(**changes: Any) -> NodeRecord:
    return replace(roster.announced(None, said(), 100.0), **changes)


def test_a_first_announcement_makes_an_online_unmonitored_node() -> None:
    """Silence means nothing until it has sent a heartbeat."""
    record = roster.announced(None, said(labels={"zone": "a"}), 100.0)
    assert (record.state, record.monitored, record.epoch) == (NodeState.ONLINE, False, 1)
    assert (record.registered_at, record.changed_at, record.last_seen) == (100.0, 100.0, 100.0)
    assert (record.slots, record.labels, record.session) == (2, {"zone": "a"}, "s1")


def test_a_tier_follows_from_the_gpus_unless_it_is_said() -> None:
    """An announced tier wins."""
    assert roster.announced(None, said(), 1.0).tier is Tier.CPU_ONLY
    assert roster.announced(None, said(gpus=[a_gpu(24_000)]), 1.0).tier is Tier.GPU_PEER
    assert roster.announced(None, said(gpus=[a_gpu(24_000)], tier=Tier.GPU_INFRA), 1.0).tier is Tier.GPU_INFRA


def test_an_announcement_that_says_nothing_new_changes_nothing() -> None:
    """The same object, so that nothing is written."""
    record = known()
    assert roster.announced(record, said(), 200.0) is record


def test_a_changed_announcement_replaces_what_is_known_and_keeps_the_first_time() -> None:
    """Everything is taken over, also what is now left out."""
    after = roster.announced(known(models=["llama"], monitored=True), said(slots=4), 200.0)
    assert (after.slots, after.models, after.monitored) == (4, [], True)
    assert (after.registered_at, after.changed_at, after.epoch) == (100.0, 200.0, 1)


def test_an_announcement_with_a_new_session_is_a_new_life() -> None:
    """The epoch grows, once."""
    after = roster.announced(known(), said(session="s2"), 200.0)
    assert (after.epoch, after.session) == (2, "s2")
    assert roster.announced(after, said(session="s2"), 300.0) is after


def test_a_node_without_sessions_does_not_get_a_new_epoch_by_announcing() -> None:
    """It has nothing to tell its lives apart by."""
    assert roster.announced(known(), said(session="", slots=3), 200.0).epoch == 1


def test_a_lost_node_that_announces_itself_is_back_in_a_new_epoch() -> None:
    """Even when it says what it said before."""
    after = roster.announced(known(state=NodeState.LOST), said(), 200.0)
    assert (after.state, after.epoch, after.changed_at) == (NodeState.ONLINE, 2, 200.0)


def test_a_suspect_node_that_announces_itself_is_back_in_the_same_epoch() -> None:
    """It was never given up."""
    after = roster.announced(known(state=NodeState.SUSPECT), said(), 200.0)
    assert (after.state, after.epoch) == (NodeState.ONLINE, 1)


def test_a_registration_is_written_even_when_it_says_nothing_new() -> None:
    """So a node without heartbeats can show that it is still there."""
    after = roster.registered(known(), said(), 200.0)
    assert (after.changed_at, after.last_seen, after.registered_at, after.epoch) == (200.0, 200.0, 100.0, 1)
    assert roster.registered(None, said(), 50.0).registered_at == 50.0


def test_a_first_heartbeat_makes_a_node_monitored() -> None:
    """From then on silence means something."""
    after = roster.heard(known(), a_beat(), 200.0)
    assert (after.monitored, after.epoch, after.changed_at, after.last_seen) == (True, 1, 200.0, 200.0)


def test_further_heartbeats_change_nothing() -> None:
    """The same object: ten thousand nodes must not mean a write per beat."""
    record = known(monitored=True)
    assert roster.heard(record, a_beat(), 300.0) is record
    assert roster.heard(record, a_beat(session=""), 300.0) is record


@pytest.mark.parametrize(
    ("state", "session", "epoch"),
    [
        (NodeState.ONLINE, "s2", 2),
        (NodeState.SUSPECT, "s1", 1),
        (NodeState.SUSPECT, "s2", 2),
        (NodeState.LOST, "s1", 2),
        (NodeState.LOST, "s2", 2),
        (NodeState.LOST, "", 2),
    ],
)
def test_a_heartbeat_brings_a_node_back_and_its_epoch_tells_whether_its_work_was_given_away(
    state: NodeState, session: str, epoch: int
) -> None:
    """A new epoch after a loss or with a new session, and only then."""
    after = roster.heard(known(monitored=True, state=state), a_beat(session=session), 200.0)
    assert (after.state, after.epoch, after.session) == (NodeState.ONLINE, epoch, session or "s1")


@pytest.mark.parametrize(
    ("before", "silent_s", "after"),
    [
        (NodeState.ONLINE, 24.9, NodeState.ONLINE),
        (NodeState.ONLINE, 25.0, NodeState.SUSPECT),
        (NodeState.ONLINE, 45.0, NodeState.LOST),
        (NodeState.SUSPECT, 44.9, NodeState.SUSPECT),
        (NodeState.SUSPECT, 45.0, NodeState.LOST),
        (NodeState.LOST, 1e9, NodeState.LOST),
        (NodeState.LOST, 1.0, NodeState.LOST),
        (NodeState.LOST, 30.0, NodeState.LOST),
        (NodeState.SUSPECT, 1.0, NodeState.SUSPECT),
    ],
)
def test_a_monitored_node_is_suspected_and_then_lost(before: NodeState, silent_s: float, after: NodeState) -> None:
    """Silence never makes a node better: only a sign of life does."""
    record = known(monitored=True, state=before)
    result = roster.silent(record, silent_s, 200.0, PATIENCE)
    assert result.state is after
    assert (result is record) == (before is after)
    assert result.changed_at == (100.0 if before is after else 200.0)
    assert (result.epoch, result.last_seen) == (1, 100.0)


@pytest.mark.parametrize(("silent_s", "state"), [(999.9, NodeState.ONLINE), (1000.0, NodeState.LOST)])
def test_an_unmonitored_node_stays_until_its_time_to_live(silent_s: float, state: NodeState) -> None:
    """It is never merely suspect."""
    assert roster.silent(known(), silent_s, 200.0, PATIENCE).state is state


def test_a_query_gives_the_nodes_that_match_by_id() -> None:
    """Each filter alone; an empty list of types or models matches any."""
    gpu = a_node("gpu", gpus=[a_gpu()], tier=Tier.GPU_PEER, work_types=["inference"], models=["llama"])
    cpu = a_node("cpu", work_types=["ppo"], models=["qwen"])
    gone = a_node("gone", state=NodeState.LOST)
    dim = a_node("dim", state=NodeState.SUSPECT, work_types=["ppo"], models=["qwen"])

    def ids(**query: Any) -> list[str]:
        return [record.node_id for record in roster.matching([gpu, cpu, gone, dim], NodesQuery(**query))]

    assert ids() == ["cpu", "dim", "gone", "gpu"]
    assert ids(requires_gpu=True) == ["gpu"]
    assert ids(min_tier=Tier.GPU_INFRA) == ["gpu"]
    assert ids(online_only=True) == ["cpu", "gpu"]
    assert ids(work_type="ppo") == ["cpu", "dim", "gone"]
    assert ids(model_name="llama") == ["gone", "gpu"]
    assert ids(work_type="ppo", online_only=True) == ["cpu"]
