"""Goal: a node that breaks gets no more work of the kind it breaks on, one that is well keeps its work, and a broken
item takes no node away from others.

Method: stories of failures and successes told to the list, in tables and by hypothesis.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from computemesh_services.work_marshaller.blacklist import ITEMS_MAX, KINDS_MAX, Blacklist, BlacklistPolicy, Kind

NOW = 1_000_000.0
POLICY = BlacklistPolicy(after=3, hold_s=60.0, hold_s_max=200.0)
N1: Kind = ("n1", "inference", "m")
N2: Kind = ("n2", "inference", "m")


def a_list(policy: BlacklistPolicy = POLICY) -> Blacklist:
    return Blacklist(policy)


def opened(kind: Kind = N1) -> Blacklist:
    """A list on which three different items have just failed on a node."""
    blacklist = a_list()
    for number in range(3):
        blacklist.failed(kind, f"w{number}", "no CUDA", NOW)
    return blacklist


def test_different_items_that_fail_in_a_row_blacklist_the_node_for_that_kind_of_work() -> None:
    blacklist = a_list()
    assert [blacklist.failed(N1, f"w{number}", "no CUDA", NOW) for number in range(3)] == [None, None, NOW + 60]
    assert blacklist.objection(N1, NOW + 1).startswith("blacklisted for 'inference' with 'm' for 59 s more")
    assert "3 items failed, last: no CUDA" in blacklist.objection(N1, NOW)
    assert not blacklist.objection(("n1", "inference", "other"), NOW)
    assert not blacklist.objection(("n1", "ppo", ""), NOW)
    assert not blacklist.objection(N2, NOW)


def test_one_item_however_often_it_fails_is_no_proof_against_a_node() -> None:
    blacklist = a_list()
    assert {blacklist.failed(N1, "w1", "crashed", NOW + number) for number in range(10)} == {None}
    assert not blacklist.objection(N1, NOW)


def test_a_success_begins_the_count_anew() -> None:
    blacklist = a_list()
    for number in range(10):
        assert blacklist.failed(N1, f"a{number}", "flaky", NOW) is None
        assert blacklist.failed(N1, f"b{number}", "flaky", NOW) is None
        blacklist.succeeded(N1, f"c{number}")
    assert not blacklist.objection(N1, NOW)


def test_an_item_that_fails_on_a_second_node_counts_against_neither() -> None:
    blacklist = a_list()
    for number in range(20):
        assert blacklist.failed(N1, f"poison{number}", "crashed", NOW) is None
        assert blacklist.failed(N2, f"poison{number}", "crashed", NOW) is None
    assert not blacklist.objection(N1, NOW)
    assert not blacklist.objection(N2, NOW)


def test_what_failed_already_on_another_node_is_still_no_proof_when_it_comes_back() -> None:
    blacklist = a_list()
    blacklist.failed(N2, "poison", "crashed", NOW)
    blacklist.failed(N1, "poison", "crashed", NOW)
    blacklist.failed(N1, "poison", "crashed", NOW)
    assert [blacklist.failed(N1, f"w{number}", "no CUDA", NOW) for number in range(3)] == [None, None, NOW + 60]


def test_once_its_time_has_passed_one_item_is_tried_and_the_others_wait_for_it() -> None:
    blacklist = opened()
    assert not blacklist.objection(N1, NOW + 60)
    blacklist.probe(N1, "try")
    assert "until try, which is tried on it, goes well; last failure: no CUDA" in blacklist.objection(N1, NOW + 61)
    assert [entry.probing for entry in blacklist.entries()] == ["try"]
    blacklist.succeeded(N1, "try")
    assert not blacklist.objection(N1, NOW + 61)
    assert blacklist.entries() == []


def test_a_try_that_fails_doubles_the_time_up_to_a_bound() -> None:
    blacklist = opened()
    now, holds = NOW + 60, list[float]()
    for number in range(4):
        blacklist.probe(N1, f"try{number}")
        until = blacklist.failed(N1, f"try{number}", "no CUDA", now)
        assert until is not None
        assert blacklist.objection(N1, until - 1)
        holds.append(until - now)
        now = until
    assert holds == [120.0, 200.0, 200.0, 200.0]


def test_a_try_with_a_suspect_holds_the_node_as_long_as_before() -> None:
    blacklist = opened()
    blacklist.failed(N2, "poison", "crashed", NOW)
    blacklist.probe(N1, "poison")
    assert blacklist.failed(N1, "poison", "crashed", NOW + 60) == NOW + 120


def test_a_try_with_an_item_that_failed_there_before_holds_the_node_as_long_as_before() -> None:
    blacklist = opened()
    blacklist.probe(N1, "w1")
    assert blacklist.failed(N1, "w1", "no CUDA", NOW + 60) == NOW + 120


def test_a_try_that_shows_nothing_lets_the_next_item_be_tried() -> None:
    blacklist = opened()
    blacklist.probe(N1, "try")
    blacklist.tried(N1, "other")
    assert blacklist.objection(N1, NOW + 61)
    blacklist.tried(N1, "try")
    assert not blacklist.objection(N1, NOW + 61)


def test_what_was_under_way_and_fails_later_does_not_hold_the_node_longer() -> None:
    blacklist = opened()
    assert blacklist.failed(N1, "late", "no CUDA", NOW + 50) is None
    assert not blacklist.objection(N1, NOW + 60)


def test_what_was_under_way_and_goes_well_frees_the_node() -> None:
    blacklist = opened()
    blacklist.succeeded(N1, "late")
    assert not blacklist.objection(N1, NOW)


@pytest.mark.parametrize(
    ("node_id", "work_type", "freed"),
    [("n1", "", True), ("n1", "inference", True), ("n1", "ppo", False), ("n2", "", False)],
)
def test_an_operator_can_pardon_a_node_for_all_or_for_one_type(node_id: str, work_type: str, freed: bool) -> None:
    blacklist = opened()
    pardoned = blacklist.pardon(node_id, work_type)
    assert [entry.node_id for entry in pardoned] == (["n1"] if freed else [])
    assert bool(blacklist.objection(N1, NOW)) is not freed
    assert bool(blacklist.entries()) is not freed


def test_a_pardon_also_forgets_failures_that_did_not_suffice() -> None:
    blacklist = a_list()
    blacklist.failed(N1, "w1", "flaky", NOW)
    blacklist.failed(N1, "w2", "flaky", NOW)
    assert blacklist.pardon("n1") == []
    assert blacklist.failed(N1, "w3", "flaky", NOW) is None


def test_the_list_says_what_an_operator_needs() -> None:
    (entry,) = opened().entries()
    assert (entry.node_id, entry.work_type, entry.model_name) == N1
    assert (entry.failures, entry.since, entry.until, entry.probing, entry.reason) == (3, NOW, NOW + 60, "", "no CUDA")
    assert opened().entries("n2") == []


def test_it_is_the_same_after_a_restart() -> None:
    before, after = opened(), a_list()
    before.failed(N2, "w8", "slow", NOW)
    after.restore(before.tallies(), [])
    assert after.entries() == before.entries()
    assert after.tallies() == before.tallies()
    assert after.objection(N1, NOW) == before.objection(N1, NOW)


@pytest.mark.parametrize(("out", "still"), [([("try", "n1")], True), ([("try", "n2")], False), ([], False)])
def test_after_a_restart_a_try_counts_only_while_it_is_on_the_node(out: list[tuple[str, str]], still: bool) -> None:
    before, after = opened(), a_list()
    before.probe(N1, "try")
    after.restore(before.tallies(), out)
    assert bool(after.objection(N1, NOW + 61)) is still


def test_it_says_when_there_is_something_to_store() -> None:
    blacklist = a_list()
    blacklist.succeeded(N1, "w1")
    blacklist.probe(N1, "w1")
    blacklist.tried(N1, "w1")
    assert not blacklist.changed
    blacklist.failed(N1, "w1", "flaky", NOW)
    assert blacklist.changed


def test_zero_means_never() -> None:
    blacklist = a_list(BlacklistPolicy(after=0))
    assert {blacklist.failed(N1, f"w{number}", "broken", NOW) for number in range(50)} == {None}
    assert blacklist.tallies() == []


def test_memory_is_bounded() -> None:
    blacklist = a_list()
    for number in range(KINDS_MAX + 50):
        blacklist.failed((f"n{number}", "inference", ""), f"w{number}", "broken", NOW)
    assert len(blacklist.tallies()) == KINDS_MAX
    assert blacklist.tallies()[0].node_id == "n50"
    assert len(blacklist._failed_on) == ITEMS_MAX  # pyright: ignore[reportPrivateUsage]


@given(
    st.lists(st.tuples(st.sampled_from(["fail", "well", "probe", "off"]), st.integers(0, 5), st.sampled_from([N1, N2])))
)
def test_whatever_happens_a_node_is_never_lost_for_good(steps: list[tuple[str, int, Kind]]) -> None:
    """Time passes and nothing is under way: then every node may be tried, and a success frees it wholly."""
    blacklist = a_list()
    now = NOW
    for what, number, kind in steps:
        now += 10.0
        match what:
            case "fail":
                blacklist.failed(kind, f"w{number}", "broken", now)
            case "well":
                blacklist.succeeded(kind, f"w{number}")
            case "probe":
                blacklist.probe(kind, f"w{number}")
            case _:
                blacklist.tried(kind, f"w{number}")
    for tally in blacklist.tallies():
        blacklist.tried(tally.kind, tally.probing)
        assert not blacklist.objection(tally.kind, now + POLICY.hold_s_max)
        blacklist.succeeded(tally.kind, "w")
    assert blacklist.entries() == []
