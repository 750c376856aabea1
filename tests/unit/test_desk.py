"""Goal: the answer to an assignment does not depend on how often, how late or in which order it is asked."""

from __future__ import annotations

import pytest

from computemesh.contracts.work import Assignment
from computemesh_services.node_agent import desk as desks
from computemesh_services.node_agent.desk import Desk, Verdict

OFFERED = frozenset({"render"})


def asked(attempt: int = 1, work_id: str = "w1", work_type: str = "render") -> Assignment:
    return Assignment(work_id=work_id, attempt=attempt, node_id="n1", work_type=work_type)


def a_desk(*running: tuple[str, int], slots: int = 2) -> Desk:
    """A desk at which these attempts run."""
    desk = Desk("n1", slots)
    for work_id, attempt in running:
        desk.started(work_id, attempt)
    return desk


def test_a_new_item_is_started_while_there_are_slots() -> None:
    """The last slot is given away, no more than that."""
    assert a_desk().judge(asked(), OFFERED) == (Verdict.START, "")
    assert a_desk(("w8", 1)).judge(asked(), OFFERED) == (Verdict.START, "")
    verdict, reason = a_desk(("w8", 1), ("w9", 1)).judge(asked(), OFFERED)
    assert (verdict, reason) == (Verdict.DECLINE, "busy: 2 of 2 slots taken")


def test_an_attempt_that_runs_or_ran_is_accepted_again_and_not_started_again() -> None:
    """Also by a node that is full or ends: the answer was lost, not the work."""
    desk = a_desk(("w1", 1), slots=1)
    desk.accepting = False
    assert desk.judge(asked(), OFFERED) == (Verdict.KNOWN, "")
    desk.ended("w1", 1)
    assert desk.running == {}
    assert desk.judge(asked(), OFFERED) == (Verdict.KNOWN, "")


def test_a_newer_attempt_replaces_the_one_that_runs_even_when_all_slots_are_taken() -> None:
    """It takes over the slot."""
    assert a_desk(("w1", 1), slots=1).judge(asked(2), OFFERED) == (Verdict.REPLACE, "")


def test_an_assignment_for_another_node_is_declined() -> None:
    """A node runs nothing under a name that is not its own: heartbeats would renew another's lease."""
    stray = Assignment(work_id="w1", attempt=1, node_id="n2", work_type="render")
    assert a_desk().judge(stray, OFFERED) == (Verdict.DECLINE, "this is node n1, the assignment is for n2")


def test_an_attempt_that_was_overtaken_is_declined() -> None:
    """It comes late; what runs is newer."""
    verdict, reason = a_desk(("w1", 2)).judge(asked(1), OFFERED)
    assert (verdict, reason) == (Verdict.DECLINE, "attempt 2 runs here already")


@pytest.mark.parametrize("running", [(), (("w1", 1),)])
def test_a_node_that_ends_takes_nothing_new(running: tuple[tuple[str, int], ...]) -> None:
    """Neither an item nor another attempt at one."""
    desk = a_desk(*running)
    desk.accepting = False
    assert desk.judge(asked(2), OFFERED) == (Verdict.DECLINE, "draining")


def test_work_that_the_node_does_not_do_is_declined_with_what_it_does() -> None:
    """The submitter sees it in the item's explanation."""
    verdict, reason = a_desk().judge(asked(work_type="bake"), OFFERED)
    assert (verdict, reason) == (Verdict.DECLINE, "runs no 'bake', but render")
    assert a_desk().judge(asked(), frozenset()) == (Verdict.DECLINE, "runs no 'render', but nothing")


def test_the_end_of_an_attempt_that_was_replaced_leaves_its_successor_running() -> None:
    """The old one's processes may take a moment to be gone."""
    desk = a_desk(("w1", 1))
    desk.started("w1", 2)
    desk.ended("w1", 1)
    assert desk.running == {"w1": 2}


def test_only_so_many_ended_attempts_are_remembered_the_latest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(desks, "FINISHED_MAX", 2)
    desk = a_desk()
    for attempt in (1, 2, 3):
        desk.started("w1", attempt)
        desk.ended("w1", attempt)
    assert [desk.judge(asked(attempt), OFFERED)[0] for attempt in (1, 2, 3)] == [
        Verdict.START,
        Verdict.KNOWN,
        Verdict.KNOWN,
    ]
