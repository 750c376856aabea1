"""500 items are in flight while everything is killed, stopped and restarted, and each has one outcome.

Goal: with two marshallers, a registry, a node agent, a second node, a NATS server and a reporter that means
no good, whatever is done in whatever order, every promise in ``history.py`` holds.
Method: real processes under the real supervisor. What is done follows from a seed and waits for progress,
not for time. A failure names its seed; ``CHAOS_SEEDS=7,8`` runs those, ``make chaos N=20`` as many random ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from computemesh.contracts.work import Move, WorkState
from computemesh.testing import install_executor, running_mesh
from computemesh.testing.builders import a_record
from tests.chaos import history as promises
from tests.chaos.history import Event, History, slowest_take_over_s, violations
from tests.chaos.plan import (
    ACTING,
    AGENT,
    DEEDS,
    LONGER_THAN_A_LEASE_S,
    LONGER_THAN_PATIENCE_S,
    VICTIMS,
    Deed,
    make_plan,
)
from tests.chaos.play import EXECUTOR, PER_DEED, play, seeds

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")
AT_ONCE: Final = 500
ITEMS: Final = AT_ONCE + PER_DEED * DEEDS


@pytest.mark.parametrize("seed", seeds())
async def test_every_promise_holds_whatever_is_killed_stopped_and_restarted(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """500 items at once and some more at each deed, and a reporter that lies about what is over."""
    plan = make_plan(seed, ITEMS)
    environment = {
        **install_executor(tmp_path / "plugin", "square", EXECUTOR),
        "COMPUTEMESH_SLOTS": "3",
        "COMPUTEMESH_MODELS": "/nowhere",
    }
    async with running_mesh(tmp_path, ALL, copies={"work-marshaller": 2}, environment=environment) as mesh:
        await play(mesh, plan, at_once=AT_ONCE, note=record_property)


# --- the plan and the promises themselves --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan() -> None:
    """A failure that names its seed can be played again."""
    assert make_plan(7, ITEMS) == make_plan(7, ITEMS)
    assert make_plan(7, ITEMS) != make_plan(8, ITEMS)
    assert str(make_plan(7, ITEMS)).startswith("seed 7\nafter ")


@pytest.mark.parametrize("seed", range(50))
def test_every_plan_wakes_a_leader_and_a_node_after_they_were_given_up_and_kills_everything(seed: int) -> None:
    """All while work is in flight."""
    plan = make_plan(seed, ITEMS)
    stops = {(step.victim, step.for_s) for step in plan.steps if step.deed is Deed.STOP}
    assert any(victim == ACTING and for_s >= LONGER_THAN_A_LEASE_S for victim, for_s in stops)
    assert any(victim == AGENT and for_s >= LONGER_THAN_PATIENCE_S for victim, for_s in stops)
    assert {step.victim for step in plan.steps if step.deed is Deed.KILL} == set(VICTIMS)
    moments = [step.after for step in plan.steps]
    assert moments == sorted(moments)
    assert moments[-1] < ITEMS


def story(*states: WorkState, revision: int = 1, before: int = 0, **changes: Any) -> Event:
    """A published record of item c2 that went through these states."""
    moves = [Move(at=float(n), state=state, attempt=1, node_id="n1") for n, state in enumerate(states)]
    record = a_record("c2", states[-1], story=moves, **{"attempt": 1, "node_id": "n1", **changes})
    return Event(revision, before, record)


P, A, DONE = WorkState.PENDING, WorkState.ASSIGNED, WorkState.COMPLETED
FINE = (story(P, A), story(P, A, DONE, revision=2, before=1, result={"square": 4}))


def a_history(*events: Event) -> History:
    """Of one item, c2, whose last event is what is stored."""
    history = History(accepted={"c2": 2}, answered_s=[1.0, 2.0])
    for event in events:
        history.add(event)
    history.stored = {"c2": events[-1].record}
    return history


def test_a_history_as_it_should_be_violates_nothing() -> None:
    """Also when an event in the middle was not heard."""
    assert violations(a_history(*FINE)) == []
    assert violations(a_history(FINE[0], replace_event(FINE[1], revision=9, before=5))) == []


def replace_event(event: Event, *, revision: int, before: int) -> Event:
    return Event(revision, before, event.record)


@pytest.mark.parametrize(
    ("promise", "history"),
    [
        (promises.nothing_that_was_accepted_is_lost, a_history(FINE[0])),
        (
            promises.nothing_is_there_that_nobody_submitted,
            a_history(*FINE, Event(3, 0, replace(FINE[0].record, work_id="x"))),
        ),
        (
            promises.every_item_has_one_recorded_outcome,
            a_history(*FINE, replace_event(FINE[1], revision=3, before=2)),
        ),
        (promises.every_item_has_one_recorded_outcome, a_history(story(P, A, DONE, DONE))),
        (promises.every_result_is_right, a_history(story(P, A, DONE, result={"square": 5}))),
        (promises.every_result_is_right, a_history(story(P, A, WorkState.DEAD))),
        (promises.every_move_is_legal, a_history(story(P, DONE))),
        (promises.every_move_is_legal, a_history(FINE[1], story(P, A, DONE, P, revision=3, before=2))),
        (promises.every_move_is_legal, a_history(FINE[0], story(P, P, A, revision=3, before=2))),
        (promises.revisions_only_grow, a_history(story(P, A, revision=5, before=4), FINE[1])),
        (promises.revisions_only_grow, a_history(FINE[0], replace_event(FINE[1], revision=2, before=0))),
        (
            promises.attempts_and_their_counts_only_grow,
            a_history(story(P, A, attempt=2), story(P, A, DONE, revision=2, before=1)),
        ),
        (
            promises.attempts_and_their_counts_only_grow,
            a_history(FINE[0], story(P, A, DONE, revision=2, before=1, node_id="n9")),
        ),
    ],
)
def test_each_promise_notices_when_it_is_broken(promise: Callable[[History], Any], history: History) -> None:
    """A promise that cannot fail proves nothing."""
    assert list(promise(history))
    assert any(line.startswith(promise.__name__) for line in violations(history))


def test_a_lost_submission_a_broken_cancellation_and_a_late_take_over_are_noticed() -> None:
    """The other ways in which a history may be wrong."""
    lost = a_history(*FINE)
    lost.accepted["c3"] = 3
    assert violations(lost) == ["nothing_that_was_accepted_is_lost: c3 was accepted and is not there"]
    cancelled = a_history(*FINE)
    cancelled.cancelled.add("c2")
    assert [line.partition(":")[0] for line in violations(cancelled)] == ["a_cancellation_that_was_confirmed_stands"]
    late = a_history(*FINE)
    late.answered_s, late.disturbed_s = [1.0, 31.0], [2.0, 10.0]
    assert slowest_take_over_s(late) == 21.0
    assert [line.partition(":")[0] for line in violations(late)] == ["somebody_took_over_in_time"]
