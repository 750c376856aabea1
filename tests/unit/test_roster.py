"""Goal: a node is online, suspect or lost exactly when it should be, and a life that ended is told by the epoch.

Method: records in, records out; time is a number the test chooses.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.contracts.nodes import NodeAnnouncement, NodeRecord, NodeState
from computemesh.hardware import Gpu, Memory, Tier
from computemesh.testing.builders import a_beat, a_gpu
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.roster import Patience

PATIENCE = Patience(suspect_after_s=25, lost_after_s=45, unmonitored_ttl_s=1000)


def said(**changes: Any) -> NodeAnnouncement:
    return replace(NodeAnnouncement(node_id="n1", session="s1", slots=2), **changes)


def known(**changes: Any) -> NodeRecord:
    return replace(roster.announced(None, said(), 100.0), **changes)


def test_who_cleans_up_takes_lost_nodes_that_are_silent_and_not_drained() -> None:
    """What an operator said of a node stays with it."""
    lost = NodeRecord(node_id="n", state=NodeState.LOST, monitored=True, last_seen=100.0)
    assert roster.may_clean(lost, 220.0, 120.0)
    assert not roster.may_clean(lost, 219.0, 120.0)
    assert roster.may_clean(replace(lost, left=True), 101.0, 120.0)
    assert not roster.may_clean(replace(lost, drained=True), 1000.0, 120.0)
    assert not roster.may_clean(replace(lost, state=NodeState.SUSPECT), 1000.0, 120.0)


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


def test_what_others_call_their_hardware_is_recorded_in_our_words() -> None:
    """Sizes in GiB and other spellings become the declared fields, and the tier follows from them."""
    record = roster.announced(None, said(memory=Memory(total_gb=2), gpus=[Gpu(name="card", vram_gb=24)]), 1.0)
    assert (record.memory, record.gpus) == (Memory(total_mb=2048), [Gpu(name="card", vram_total_mb=24_576)])
    assert record.tier is Tier.GPU_PEER


def test_how_much_is_in_use_is_left_to_heartbeats_where_there_are_any() -> None:
    """Ten thousand nodes that are asked who they are must not mean as many writes."""
    facts = {"memory": Memory(total_mb=64, available_mb=10), "gpus": [replace(a_gpu(), vram_used_mb=5)]}
    now_used = {"memory": Memory(total_mb=64, available_mb=9), "gpus": [replace(a_gpu(), vram_used_mb=6)]}
    record = replace(roster.announced(None, said(**facts), 100.0), monitored=True)
    assert roster.announced(record, said(**now_used), 200.0) is record
    assert roster.announced(replace(record, monitored=False), said(**now_used), 200.0).gpus == now_used["gpus"]
    broken = {**facts, "gpus": [replace(a_gpu(), error="lost")]}
    assert roster.announced(record, said(**broken), 200.0).gpus == broken["gpus"]


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
    [(NodeState.SUSPECT, "s1", 1), (NodeState.SUSPECT, "", 1), (NodeState.LOST, "s1", 2), (NodeState.LOST, "", 2)],
)
def test_a_heartbeat_brings_a_node_back_and_its_epoch_tells_whether_its_work_was_given_away(
    state: NodeState, session: str, epoch: int
) -> None:
    """A new epoch after a loss, and only then."""
    after = roster.heard(known(monitored=True, state=state), a_beat(session=session), 200.0)
    assert (after.state, after.epoch, after.session) == (NodeState.ONLINE, epoch, "s1")


@pytest.mark.parametrize("state", NodeState)
def test_a_heartbeat_of_another_session_is_not_this_agents(state: NodeState) -> None:
    """A new life announces itself first. Two agents with one id would otherwise take turns."""
    record = known(monitored=True, state=state)
    assert not roster.of_this_life(record, a_beat(session="s2"))
    assert roster.heard(record, a_beat(session="s2"), 200.0) is record


def test_a_node_that_announced_no_session_takes_that_of_its_first_heartbeat() -> None:
    """From then on it is told apart."""
    after = roster.heard(known(session=""), a_beat(session="s7"), 200.0)
    assert (after.session, after.epoch) == ("s7", 1)
    assert not roster.of_this_life(after, a_beat(session="s8"))


# --- a node that ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [NodeState.ONLINE, NodeState.SUSPECT])
def test_a_node_that_says_goodbye_is_lost_at_once(state: NodeState) -> None:
    """Nobody waits for its silence; that it left by itself can be told."""
    gone = roster.heard(known(monitored=True, state=state), a_beat(leaving=True), 200.0)
    assert (gone.state, gone.left, gone.epoch, gone.last_seen) == (NodeState.LOST, True, 1, 200.0)
    assert roster.heard(gone, a_beat(leaving=True), 300.0) is gone


def test_a_goodbye_counts_only_from_the_recorded_agent() -> None:
    """The last word of an earlier life comes late, perhaps."""
    record = known(monitored=True)
    assert roster.heard(record, a_beat(session="s0", leaving=True), 200.0) is record


def test_what_was_on_its_way_when_the_last_heartbeat_came_brings_nobody_back() -> None:
    """A node that tells no sessions comes back with any heartbeat."""
    gone = roster.heard(known(monitored=True), a_beat(leaving=True), 200.0)
    assert roster.heard(gone, a_beat(), 200.1) is gone
    nameless = roster.heard(known(session="", monitored=True), a_beat(session="", leaving=True), 200.0)
    back = roster.heard(nameless, a_beat(session=""), 300.0)
    assert (back.state, back.left, back.epoch) == (NodeState.ONLINE, False, 2)


def test_the_next_life_of_a_node_that_left_is_like_that_of_any_other() -> None:
    """Online, and with a higher epoch."""
    gone = roster.heard(known(monitored=True), a_beat(leaving=True), 200.0)
    back = roster.announced(gone, said(session="s2"), 300.0)
    assert (back.state, back.left, back.epoch) == (NodeState.ONLINE, False, 2)


# --- one node id, two agents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "there", "refused"),
    [
        ({"machine_id": "a"}, {"machine_id": "b"}, True),
        ({"machine_id": "a", "hostname": "x"}, {"machine_id": "a", "hostname": "y"}, False),
        ({"hostname": "x"}, {"hostname": "y"}, True),
        ({"machine_id": "a", "hostname": "x"}, {"hostname": "y"}, True),
        ({"machine_id": "a", "hostname": "x"}, {"hostname": "x"}, False),
        ({"machine_id": "a"}, {}, False),
        ({}, {"machine_id": "b", "hostname": "y"}, False),
        ({}, {}, False),
    ],
)
def test_another_machine_cannot_have_the_id_of_a_node_that_is_alive(
    here: dict[str, str], there: dict[str, str], refused: bool
) -> None:
    """Told by the machine's id, or by the host name where one has none."""
    record = known(monitored=True, **here)
    assert bool(roster.why_refused(record, said(session="s2", **there))) is refused
    assert roster.why_refused(replace(record, state=NodeState.SUSPECT), said(session="s2", **there)) or not refused


def test_the_reason_names_the_id_and_the_host_that_has_it() -> None:
    """Whoever reads it knows where to look."""
    record = known(monitored=True, hostname="rack-7")
    reason = roster.why_refused(record, said(session="s2", hostname="rack-8"))
    assert "'n1'" in reason
    assert "rack-7" in reason


@pytest.mark.parametrize("free", [{"state": NodeState.LOST}, {"monitored": False}])
def test_an_id_that_nobody_shows_to_be_alive_may_be_taken(free: dict[str, Any]) -> None:
    """After a loss, or when there never were heartbeats, by any machine and any session."""
    record = known(**{"monitored": True, "machine_id": "a", "retired": ["s0"], **free})
    assert not roster.why_refused(record, said(session="s2", machine_id="b"))
    assert not roster.why_refused(record, said(session="s0", machine_id="a"))


def test_the_same_agent_may_say_that_its_host_has_another_name() -> None:
    """Its session shows who it is."""
    assert not roster.why_refused(known(monitored=True, hostname="x"), said(hostname="y"))


def test_a_session_that_was_replaced_does_not_come_back() -> None:
    """Of two agents on one machine the later one has the id, and they do not take turns."""
    record = replace(roster.announced(known(monitored=True), said(session="s2"), 200.0))
    assert (record.session, record.retired, record.epoch) == ("s2", ["s1"], 2)
    assert roster.why_refused(record, said(session="s1"))
    assert not roster.why_refused(record, said(session="s3"))


def test_of_the_sessions_that_were_replaced_the_latest_are_remembered() -> None:
    """And the one that has the id after all is none of them."""
    record = known(monitored=True)
    for n in range(2, 20):
        record = roster.announced(record, said(session=f"s{n}"), 100.0 + n)
    assert record.retired == [f"s{n}" for n in range(19 - roster.RETIRED_MAX, 19)]
    back = roster.announced(replace(record, state=NodeState.LOST), said(session="s15"), 200.0)
    assert back.retired == [*(f"s{n}" for n in range(11, 20) if n != 15)]


# --- silence -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("silent_s", "after"),
    [(74.9, NodeState.ONLINE), (75.0, NodeState.SUSPECT), (134.9, NodeState.SUSPECT), (135.0, NodeState.LOST)],
)
def test_the_silence_of_a_node_that_beats_rarely_is_borne_for_longer(silent_s: float, after: NodeState) -> None:
    """Two and a half of its own intervals, and four and a half."""
    record = known(monitored=True, heartbeat_interval_s=30.0)
    assert roster.silent(record, silent_s, 200.0, PATIENCE).state is after


@pytest.mark.parametrize(("silent_s", "after"), [(25.0, NodeState.SUSPECT), (45.0, NodeState.LOST)])
def test_a_node_that_beats_often_is_judged_as_all_others(silent_s: float, after: NodeState) -> None:
    """A hiccup of its machine is no loss."""
    record = known(monitored=True, heartbeat_interval_s=1.0)
    assert roster.silent(record, silent_s, 200.0, PATIENCE).state is after


def test_a_loss_records_when_the_node_was_last_seen() -> None:
    """As far as the registry that records it knows; never earlier than is recorded already."""
    record = known(monitored=True)
    assert roster.silent(record, 45.0, 200.0, PATIENCE, seen_at=155.0).last_seen == 155.0
    assert roster.silent(record, 45.0, 200.0, PATIENCE, seen_at=50.0).last_seen == 100.0


@pytest.mark.parametrize(("silent_s", "state"), [(999.9, NodeState.ONLINE), (1000.0, NodeState.LOST)])
def test_an_unmonitored_node_stays_until_its_time_to_live(silent_s: float, state: NodeState) -> None:
    """It is never merely suspect."""
    assert roster.silent(known(), silent_s, 200.0, PATIENCE).state is state


def test_what_was_judged_by_the_silence_of_one_life_does_not_hold_for_the_next() -> None:
    """Between the judgement and the write the node may have come back, or announced itself anew."""
    record = known(monitored=True)
    assert roster.same_life(replace(record, drained=True, changed_at=300.0), record)
    for change in ({"session": "s2"}, {"epoch": 2}, {"state": NodeState.SUSPECT}, {"last_seen": 300.0}):
        assert not roster.same_life(replace(record, **change), record)


# --- operators -----------------------------------------------------------------------------------------------------


def test_a_drained_node_stays_drained_until_it_is_told_otherwise() -> None:
    """Through announcements, new sessions, losses and returns."""
    record = roster.drained(known(monitored=True), "new fans", 150.0)
    assert (record.drained, record.drain_reason, record.changed_at) == (True, "new fans", 150.0)
    for after in (
        roster.announced(record, said(session="s2", slots=9), 200.0),
        roster.registered(record, said(), 200.0),
        roster.silent(record, 45.0, 200.0, PATIENCE),
        roster.heard(replace(record, state=NodeState.LOST), a_beat(), 200.0),
    ):
        assert (after.drained, after.drain_reason) == (True, "new fans")
    free = roster.undrained(record, 300.0)
    assert (free.drained, free.drain_reason, free.changed_at) == (False, "", 300.0)


def test_draining_twice_for_the_same_reason_and_undraining_twice_change_nothing() -> None:
    """The same object, so that nothing is written; another reason is written."""
    record = roster.drained(known(), "a", 150.0)
    assert roster.drained(record, "a", 200.0) is record
    assert roster.drained(record, "b", 200.0).drain_reason == "b"
    free = known()
    assert roster.undrained(free, 200.0) is free


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({"monitored": True}, False),
        ({"monitored": True, "state": NodeState.SUSPECT}, False),
        ({"monitored": True, "state": NodeState.LOST}, True),
        ({"monitored": False}, True),
    ],
)
def test_only_a_node_that_nobody_expects_may_be_forgotten(changes: dict[str, Any], may: bool) -> None:
    """Lost, or never monitored."""
    assert roster.may_forget(known(**changes)) is may


def test_a_lost_node_is_forgotten_after_its_time_and_no_other_ever_is() -> None:
    """Counted from its loss."""
    lost = known(state=NodeState.LOST)
    assert not roster.forgotten(lost, 199.9, 100.0)
    assert roster.forgotten(lost, 200.0, 100.0)
    for state in (NodeState.ONLINE, NodeState.SUSPECT):
        assert not roster.forgotten(known(state=state), 1e9, 100.0)


def test_an_announcement_that_is_larger_than_is_kept_is_refused_with_its_size() -> None:
    """So that every node fits into an answer."""
    assert not roster.too_large(said(), 10_000)
    assert "at most 100" in roster.too_large(said(labels={"a": "x" * 100}), 100)
