"""Goal: what the marshaller decides about items and nodes is what its contract promises.

Method: feed the scheduler what happened, look at the records it wants stored. No clock: every time is a
number. What must be *sent* is :func:`consequences` of two stored records, tried as a table.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
from msgspec.structs import replace

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.contracts.work import (
    HANDED_BACK,
    Requirements,
    WorkCompleted,
    WorkError,
    WorkFailed,
    WorkRecord,
    WorkState,
)
from computemesh.hardware import Cpu, Memory
from computemesh.testing.builders import a_beat, a_gpu, a_node, a_plain_node, a_record, an_item
from computemesh_services.work_marshaller import scheduler as scheduling
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.effects import Deliver, Effect, Stop, consequences
from computemesh_services.work_marshaller.scheduler import ANSWER_GRACE_S, MISSED_S, WRITE_LATE_S, Limits, Scheduler
from computemesh_services.work_marshaller.seats import REST_S, STRIKES_MAX
from computemesh_services.work_marshaller.workitem import RetryPolicy

NOW = 1_000_000.0
RETRY = RetryPolicy(retries_max=1, delay_s=4.0)


def with_nodes(*nodes: NodeRecord, waiting_max: int = 100) -> Scheduler:
    scheduler = Scheduler(Limits(waiting_max=waiting_max, retry=RETRY), jitter=lambda: 1.0)
    for node in nodes:
        scheduler.node_changed(node, NOW)
    return scheduler


def submit(scheduler: Scheduler, work_id: str = "w1", seq: int = 1, now: float = NOW, **item: Any) -> WorkRecord:
    record = scheduler.submitted(an_item(**item), work_id, seq, now)
    assert record is not None
    return record


def wanted(scheduler: Scheduler) -> list[WorkRecord]:
    """Takes what is to be stored, as the shell does."""
    records = list(scheduler.outbox)
    scheduler.outbox.clear()
    return records


def states(scheduler: Scheduler) -> dict[str, str]:
    return {work_id: str(record.state) for work_id, record in scheduler.records.items()}


def advance(scheduler: Scheduler, now: float) -> list[WorkRecord]:
    scheduler.tick(now)
    scheduler.place(now)
    return wanted(scheduler)


def out(*nodes: NodeRecord, now: float = NOW, **item: Any) -> tuple[Scheduler, WorkRecord]:
    """A scheduler whose only item, w1, was just assigned."""
    scheduler = with_nodes(*(nodes or (a_node(),)))
    submit(scheduler, now=now, **item)
    (record,) = advance(scheduler, now)
    assert record.state is WorkState.ASSIGNED
    return scheduler, record


def accepted(*nodes: NodeRecord, **item: Any) -> tuple[Scheduler, WorkRecord]:
    """As :func:`out`, and the node took it."""
    scheduler, record = out(*nodes, **item)
    scheduler.accepted("w1", 1, "s1", NOW)
    return scheduler, record


def running(*nodes: NodeRecord, **item: Any) -> tuple[Scheduler, WorkRecord]:
    """As :func:`accepted`, for long enough to be written."""
    scheduler, _ = accepted(*nodes, **item)
    (record,) = advance(scheduler, NOW + WRITE_LATE_S)
    assert record.state is WorkState.RUNNING
    return scheduler, record


# --- submissions ---------------------------------------------------------------------------------------------------


def test_an_item_submitted_twice_is_one_item() -> None:
    """The second submission changes nothing, whatever it says."""
    scheduler = with_nodes()
    first = submit(scheduler)
    assert scheduler.submitted(an_item(priority=9), "w1", 2, NOW + 1) is None
    assert scheduler.records == {"w1": first}
    assert scheduler.waiting == 1


def test_a_submission_repeated_after_the_end_does_not_start_again() -> None:
    """A finished item is still known."""
    scheduler, _ = out()
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW)
    assert scheduler.submitted(an_item(), "w1", 9, NOW) is None
    assert states(scheduler) == {"w1": "completed"}


def test_a_host_that_takes_no_work_makes_no_work_type_known() -> None:
    """It names no work types, which elsewhere means any."""
    scheduler = with_nodes(a_node("host", slots=0), a_node("odd", slots=0, work_types=["pop"]))
    refusal = scheduler.refusal(an_item(work_type="pop"), NOW)
    assert isinstance(refusal, Refused)
    assert "'pop';" in refusal.reason
    assert not refusal.reason.endswith("pop")


def test_a_work_type_that_nobody_announced_is_refused_with_those_that_are_known() -> None:
    """The submitter sees what it could have meant."""
    refusal = with_nodes(a_node(work_types=["tune"])).refusal(an_item(work_type="dig"), NOW)
    assert isinstance(refusal, Refused)
    assert (refusal.code, refusal.field, refusal.retry) == ("unknown_work_type", "work_type", "never")
    assert "'dig'" in refusal.reason
    assert refusal.reason.endswith("; known: benchmark, command, inference, ppo, tune")


def test_a_work_type_that_is_mistyped_is_refused_with_the_one_that_was_meant() -> None:
    refusal = with_nodes(a_node(work_types=["tune"])).refusal(an_item(work_type="inferense"), NOW)
    assert isinstance(refusal, Refused)
    assert refusal.reason.startswith("there is no work of type 'inferense'; did you mean inference? known: ")


@pytest.mark.parametrize(
    ("nodes", "work_type"),
    [([], "inference"), ([a_node(work_types=["ppo"])], "ppo"), ([a_node(work_types=[])], "whatever")],
)
def test_a_work_type_is_known_by_itself_when_announced_or_when_a_node_takes_any(
    nodes: list[NodeRecord], work_type: str
) -> None:
    """Inference needs no node; a node without a list takes every type."""
    assert with_nodes(*nodes).refusal(an_item(work_type=work_type), NOW) is None


def test_a_full_queue_refuses_more_until_something_leaves_it() -> None:
    """Refused, never dropped, and the caller may come again."""
    scheduler = with_nodes(waiting_max=2)
    submit(scheduler, "w1")
    assert scheduler.refusal(an_item(), NOW) is None
    submit(scheduler, "w2", 2)
    refusal = scheduler.refusal(an_item(), NOW)
    assert isinstance(refusal, Refused)
    assert (refusal.code, refusal.status, refusal.retry) == ("queue_full", 503, "later")
    scheduler.cancel("w1", "", NOW)
    assert scheduler.refusal(an_item(), NOW) is None


def test_items_with_nodes_do_not_fill_the_queue() -> None:
    """Only what waits counts, and what waits for a retry does."""
    scheduler, _ = out()
    assert (scheduler.waiting, scheduler.out) == (0, 1)
    scheduler.failed(WorkFailed(work_id="w1", attempt=1), NOW)
    assert (scheduler.waiting, scheduler.out) == (1, 0)


def test_a_forgotten_item_leaves_no_trace_and_frees_its_seat() -> None:
    """It turned out to be recorded elsewhere."""
    scheduler, _ = out()
    scheduler.forget("w1")
    scheduler.forget("w1")
    assert (scheduler.records, scheduler.waiting, scheduler.out) == ({}, 0, 0)
    submit(scheduler, "w2", 2)
    assert [record.work_id for record in advance(scheduler, NOW)] == ["w2"]


def test_only_so_many_finished_items_are_remembered_the_latest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded; items that are not finished are never dropped."""
    monkeypatch.setattr(scheduling, "REMEMBERED_MAX", 2)
    scheduler = with_nodes()
    for n in range(5):
        submit(scheduler, f"w{n}", n)
    for n in range(4):
        scheduler.cancel(f"w{n}", "", NOW)
    assert states(scheduler) == {"w4": "pending", "w2": "cancelled", "w3": "cancelled"}


# --- placement -----------------------------------------------------------------------------------------------------


def test_items_go_by_priority_and_then_in_the_order_of_submission() -> None:
    """One slot, four items: the order of their turns."""
    scheduler = with_nodes(a_node(slots=1))
    for seq, (work_id, priority) in enumerate([("low", 1), ("first", 5), ("second", 5), ("high", 9)]):
        submit(scheduler, work_id, seq, priority=priority)
    turns: list[str] = []
    for _ in range(4):
        (record,) = advance(scheduler, NOW)
        turns.append(record.work_id)
        scheduler.completed(WorkCompleted(work_id=record.work_id, attempt=1), NOW)
        wanted(scheduler)
    assert turns == ["high", "first", "second", "low"]


def test_priority_counts_between_items_of_different_needs() -> None:
    """They stand in different queues, and share the node."""
    scheduler = with_nodes(a_node(slots=1))
    submit(scheduler, "low", 1, priority=1, model_name="llama")
    submit(scheduler, "high", 2, priority=9)
    assert [record.work_id for record in advance(scheduler, NOW)] == ["high"]


def test_items_that_fit_nowhere_do_not_hold_up_those_that_do() -> None:
    """Higher priority, submitted earlier, and still in nobody's way."""
    scheduler = with_nodes(a_node(slots=2))
    for seq in range(3):
        submit(scheduler, f"huge{seq}", seq, priority=9, requirements=Requirements(gpus=8))
    submit(scheduler, "small1", 8)
    submit(scheduler, "small2", 9)
    assert [record.work_id for record in advance(scheduler, NOW)] == ["small1", "small2"]
    assert scheduler.waiting == 3


def test_a_node_gets_no_more_items_than_it_has_slots() -> None:
    """The rest wait, and go as slots become free."""
    scheduler = with_nodes(a_node("a", slots=2), a_node("b", slots=1))
    for seq in range(5):
        submit(scheduler, f"w{seq}", seq)
    placed = advance(scheduler, NOW)
    assert sorted(record.node_id for record in placed) == ["a", "a", "b"]
    scheduler.completed(WorkCompleted(work_id="w0", attempt=1), NOW)
    done, next_one = advance(scheduler, NOW)
    assert (done.work_id, next_one.work_id, next_one.node_id) == ("w0", "w3", done.node_id)


def test_a_node_that_comes_gets_what_waited_for_it() -> None:
    """Without anything else happening."""
    scheduler = with_nodes()
    submit(scheduler)
    assert advance(scheduler, NOW) == []
    scheduler.node_changed(a_node(), NOW + 1)
    scheduler.place(NOW + 1)
    assert scheduler.records["w1"].node_id == "n1"


def test_a_draining_node_gets_nothing_new_until_it_accepts_again() -> None:
    """And keeps what it has."""
    scheduler, _ = accepted(a_node(slots=2))
    scheduler.heartbeat(a_beat("n1", ("w1", 1), accepting=False), NOW)
    submit(scheduler, "w2", 2)
    assert advance(scheduler, NOW) == []
    assert states(scheduler)["w1"] == "assigned"
    scheduler.heartbeat(a_beat("n1", ("w1", 1)), NOW + 0.1)
    assert [record.work_id for record in advance(scheduler, NOW + 0.1)] == ["w2"]


def test_a_model_in_a_heartbeat_draws_the_next_item_for_it() -> None:
    """The busier node has it in memory."""
    scheduler = with_nodes(a_node("a"), a_node("b"))
    scheduler.heartbeat(a_beat("b", loaded_models=["llama"]), NOW)
    submit(scheduler, model_name="llama")
    assert advance(scheduler, NOW)[0].node_id == "b"


def test_a_cancelled_item_at_the_head_of_a_queue_holds_nobody_up() -> None:
    """Its place in the queue is stale."""
    scheduler = with_nodes()
    submit(scheduler, "w1", 1)
    submit(scheduler, "w2", 2)
    scheduler.cancel("w1", "", NOW)
    scheduler.node_changed(a_node(), NOW)
    assert [(r.work_id, r.state) for r in advance(scheduler, NOW)][-1] == ("w2", WorkState.ASSIGNED)


# --- answers of nodes ----------------------------------------------------------------------------------------------


def test_a_declined_item_goes_back_at_once_and_no_failure_is_counted() -> None:
    """As if it had not been assigned; only the number of the attempt stays used."""
    scheduler, _ = out()
    scheduler.declined("w1", 1, "draining", NOW)
    record = scheduler.records["w1"]
    assert (record.state, record.failures, record.losses, record.attempt) == (WorkState.PENDING, 0, 0, 1)
    assert record.story[-1].reason == "draining"


def test_a_node_that_declined_rests_and_then_gets_work_again() -> None:
    """So an item does not go in circles."""
    scheduler, _ = out()
    scheduler.declined("w1", 1, "draining", NOW)
    wanted(scheduler)
    scheduler.place(NOW)
    scheduler.place(NOW + REST_S - 0.01)
    assert states(scheduler) == {"w1": "pending"}
    (record,) = [r for r in advance(scheduler, NOW + REST_S) if r.state is WorkState.ASSIGNED]
    assert record.attempt == 2


def test_a_node_that_goes_on_declining_rests_longer_until_it_shows_up() -> None:
    """Twice as long each time, up to a bound; a heartbeat or a report makes it short again."""
    scheduler, _ = out()
    now = NOW
    for attempt, rest_s in enumerate([1, 2, 4, 8, 16, 30, 30], start=1):
        scheduler.declined("w1", attempt, "busy", now)
        advance(scheduler, now + rest_s * REST_S - 0.01)
        assert states(scheduler) == {"w1": "pending"}, rest_s
        now += rest_s * REST_S
        advance(scheduler, now)
        assert scheduler.records["w1"].attempt == attempt + 1
    scheduler.heartbeat(a_beat(), now)
    scheduler.declined("w1", 8, "busy", now)
    advance(scheduler, now + REST_S)
    assert scheduler.records["w1"].attempt == 9
    scheduler.failed(WorkFailed(work_id="w1", attempt=9), now)
    advance(scheduler, now + 60)
    scheduler.declined("w1", 10, "busy", now + 60)
    advance(scheduler, now + 60 + REST_S)
    assert scheduler.records["w1"].attempt == 11


def test_a_declined_item_goes_to_another_node_without_waiting() -> None:
    """Only the node that declined rests."""
    scheduler, record = out(a_node("a"), a_node("b"))
    assert record.node_id == "a"
    scheduler.declined("w1", 1, "draining", NOW)
    scheduler.place(NOW)
    assert (scheduler.records["w1"].node_id, scheduler.records["w1"].attempt) == ("b", 2)


def test_a_resting_node_that_shows_up_gets_work_at_once() -> None:
    """By a heartbeat, or by the registry's word that it is back."""
    for shows_up in ("heartbeat", "registry"):
        scheduler, _ = out()
        scheduler.declined("w1", 1, "nobody listens", NOW)
        scheduler.place(NOW)
        assert states(scheduler) == {"w1": "pending"}
        if shows_up == "heartbeat":
            scheduler.heartbeat(a_beat(), NOW + 0.1)
        else:
            scheduler.node_changed(a_node(changed_at=NOW + 0.1), NOW + 0.1)
        scheduler.place(NOW + 0.1)
        assert states(scheduler) == {"w1": "assigned"}, shows_up


def test_an_answer_about_an_old_attempt_changes_nothing() -> None:
    """Declined or accepted, it is about what no longer is."""
    scheduler, _ = out(a_node("a"), a_node("b"))
    scheduler.declined("w1", 1, "", NOW)
    scheduler.place(NOW)
    before = scheduler.records["w1"]
    scheduler.declined("w1", 1, "", NOW)
    scheduler.accepted("w1", 1, "s1", NOW)
    scheduler.accepted("w9", 1, "s1", NOW)
    assert scheduler.records["w1"] is before
    assert all(record.state is not WorkState.RUNNING for record in advance(scheduler, NOW + WRITE_LATE_S))


def test_what_runs_can_no_longer_be_declined() -> None:
    """A late answer to a repeated delivery does not cut it short."""
    scheduler, record = running()
    scheduler.declined("w1", 1, "did not answer", NOW + 1)
    assert scheduler.records["w1"] is record


# --- heartbeats ----------------------------------------------------------------------------------------------------


def test_an_accepted_attempt_that_heartbeats_do_not_list_for_too_long_is_lost() -> None:
    """Not at the first: it may have crossed the answer."""
    scheduler, _ = accepted()
    scheduler.heartbeat(a_beat(), NOW + 1)
    scheduler.heartbeat(a_beat(), NOW + 1 + MISSED_S - 0.01)
    assert states(scheduler) == {"w1": "assigned"}
    scheduler.heartbeat(a_beat(), NOW + 1 + MISSED_S)
    record = scheduler.records["w1"]
    assert (record.state, record.losses, record.failures) == (WorkState.RETRYING, 1, 0)


def test_a_heartbeat_that_lists_the_attempt_renews_it() -> None:
    """The time without it counts from anew."""
    scheduler, _ = running()
    scheduler.heartbeat(a_beat(), NOW + 1)
    scheduler.heartbeat(a_beat("n1", ("w1", 1)), NOW + 2)
    scheduler.heartbeat(a_beat(), NOW + 1 + MISSED_S)
    assert states(scheduler) == {"w1": "running"}


def test_an_attempt_that_is_still_being_delivered_is_not_missed() -> None:
    """The node may not have got it yet."""
    scheduler, _ = out()
    for n in range(10):
        scheduler.heartbeat(a_beat(), NOW + n * MISSED_S)
    assert states(scheduler) == {"w1": "assigned"}


def test_an_attempt_that_a_heartbeat_lists_counts_as_accepted_even_if_the_answer_was_lost() -> None:
    """When the node then stops listing it, it is lost."""
    scheduler, _ = out()
    scheduler.heartbeat(a_beat("n1", ("w1", 1)), NOW + 1)
    scheduler.heartbeat(a_beat(), NOW + 2)
    scheduler.heartbeat(a_beat(), NOW + 2 + MISSED_S)
    assert states(scheduler) == {"w1": "retrying"}


def test_heartbeats_of_a_plain_node_say_nothing_about_its_work() -> None:
    """It does not know attempts."""
    scheduler, _ = out(a_plain_node("n1"))
    for n in range(10):
        scheduler.heartbeat(a_beat(session=""), NOW + n * MISSED_S)
    assert states(scheduler) == {"w1": "assigned"}


@pytest.mark.parametrize(
    ("work_id", "attempt", "node_id", "stale"),
    [
        ("w1", 2, "n1", False),
        ("w1", 1, "n1", True),
        ("w1", 2, "n2", True),
        ("ended", 1, "n1", True),
        ("waits", 1, "n1", True),
        ("unheard-of", 1, "n1", False),
    ],
)
def test_a_heartbeat_that_lists_an_attempt_that_no_longer_counts_is_answered_with_a_stop(
    work_id: str, attempt: int, node_id: str, stale: bool
) -> None:
    """Of an item nobody knows, nothing is said: it may be known a moment later."""
    scheduler = with_nodes(a_node("n1"), a_node("n2"))
    scheduler.restore(a_record("w1", WorkState.RUNNING, attempt=2, node_id="n1"), NOW)
    scheduler.restore(a_record("ended", WorkState.COMPLETED, attempt=1, node_id="n1"), NOW)
    scheduler.restore(a_record("waits", WorkState.PENDING, attempt=1, node_id="n1"), NOW)
    stops = scheduler.heartbeat(a_beat(node_id, (work_id, attempt)), NOW)
    assert [(stop.work_id, stop.attempt, stop.node_id) for stop in stops] == (
        [(work_id, attempt, node_id)] if stale else []
    )


def test_a_heartbeat_of_an_unknown_node_is_ignored() -> None:
    """The registry speaks first."""
    assert with_nodes().heartbeat(a_beat("nobody", ("w1", 1)), NOW) == []


# --- nodes that come, go and restart -------------------------------------------------------------------------------


@pytest.mark.parametrize("told_by", ["heartbeat", "registry"])
def test_a_new_session_loses_what_was_accepted_and_not_what_is_still_being_delivered(told_by: str) -> None:
    """The delivery is repeated to the new agent anyway. A heartbeat tells of it when the node announced none."""
    scheduler = with_nodes(a_node(slots=3, session="" if told_by == "heartbeat" else "s1"))
    scheduler.heartbeat(a_beat(session="s1"), NOW)
    for seq, work_id in enumerate(("accepted", "undelivered", "again")):
        submit(scheduler, work_id, seq)
    advance(scheduler, NOW)
    scheduler.accepted("accepted", 1, "s1", NOW)
    scheduler.accepted("again", 1, "s2", NOW)
    if told_by == "heartbeat":
        scheduler.heartbeat(a_beat(session="s2"), NOW + 1)
    else:
        scheduler.node_changed(a_node(slots=3, session="s2", changed_at=NOW + 1), NOW + 1)
    assert states(scheduler) == {"accepted": "retrying", "undelivered": "assigned", "again": "assigned"}
    assert scheduler.records["accepted"].losses == 1


def test_a_running_attempt_is_lost_with_its_session_and_a_report_of_it_comes_too_late() -> None:
    """The item is tried again at once."""
    scheduler, _ = running()
    scheduler.node_changed(a_node(session="s2", changed_at=NOW + 1), NOW + 1)
    record = advance(scheduler, NOW + 1)[-1]
    assert (record.state, record.attempt) == (WorkState.ASSIGNED, 2)
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result="old"), NOW + 1) is None


def test_a_heartbeat_of_another_agent_with_the_same_node_id_does_not_count() -> None:
    """Two agents that take turns would lose each other's work. It lists nothing, and nothing is missed."""
    scheduler, record = running()
    for n in range(3):
        assert scheduler.heartbeat(a_beat("n1", ("w9", 1), session="s9", accepting=False), NOW + n * MISSED_S) == []
    assert scheduler.records["w1"] is record
    assert scheduler.seats["n1"].accepting


def test_a_heartbeat_without_a_session_is_not_a_new_life() -> None:
    """The node does not tell."""
    scheduler, record = running()
    scheduler.heartbeat(a_beat("n1", ("w1", 1), session=""), NOW + 1)
    assert scheduler.records["w1"] is record


@pytest.mark.parametrize("ends", ["lost", "removed"])
@pytest.mark.parametrize("node", [a_node("n1"), a_plain_node("n1")])
def test_the_work_of_a_node_that_is_lost_or_removed_goes_to_another(ends: str, node: NodeRecord) -> None:
    """No failure is counted."""
    scheduler, _ = out(node, a_node("n2", state=NodeState.SUSPECT))
    if ends == "lost":
        scheduler.node_changed(replace(node, state=NodeState.LOST, changed_at=NOW), NOW)
    else:
        scheduler.node_gone("n1", NOW)
    scheduler.node_changed(a_node("n2", changed_at=NOW), NOW)
    record = advance(scheduler, NOW)[-1]
    assert (record.state, record.node_id, record.attempt) == (WorkState.ASSIGNED, "n2", 2)
    assert (record.failures, record.losses) == (0, 1)


def test_a_suspect_node_keeps_its_work_and_gets_no_more() -> None:
    """One missed heartbeat must never stop what runs."""
    scheduler, record = out(a_node(slots=2))
    scheduler.node_changed(a_node(slots=2, state=NodeState.SUSPECT, changed_at=NOW), NOW)
    submit(scheduler, "w2", 2)
    assert advance(scheduler, NOW) == []
    assert scheduler.records["w1"] is record


def test_a_node_that_is_gone_and_unknown_does_nothing() -> None:
    """Removed twice, say."""
    scheduler, _ = out()
    scheduler.node_gone("n9", NOW)
    assert states(scheduler) == {"w1": "assigned"}


def test_a_restored_attempt_takes_its_seat_whichever_is_known_first() -> None:
    """The node or the record."""
    record = a_record(state=WorkState.RUNNING, attempt=1, node_id="n1", changed_at=NOW)
    for node_first in (True, False):
        scheduler = with_nodes(*([a_node()] if node_first else []))
        scheduler.restore(record, NOW)
        if not node_first:
            scheduler.node_changed(a_node(), NOW)
        assert scheduler.seats["n1"].taken == {("w1", 0)}
        submit(scheduler, "w2", 2)
        assert advance(scheduler, NOW) == []


@pytest.mark.parametrize("state", [WorkState.ASSIGNED, WorkState.RUNNING])
@pytest.mark.parametrize("node", ["lost", "removed", "suspect"])
def test_an_attempt_whose_node_went_while_nobody_reigned_is_lost_once_all_is_read(state: WorkState, node: str) -> None:
    """Not only at its timeout, and not before the inbox had its say; a node that is merely silent keeps it."""
    nodes = [] if node == "removed" else [a_node(state=NodeState(node))]
    scheduler = with_nodes(*nodes, a_node("n2"))
    record = a_record(state=state, attempt=1, node_id="n1", changed_at=NOW - 60)
    scheduler.restore(record, NOW)
    advance(scheduler, NOW + 1)
    assert scheduler.records["w1"] is record
    scheduler.recovered(NOW + 1)
    advance(scheduler, NOW + 1)
    after = scheduler.records["w1"]
    assert (after.state, after.node_id, after.attempt, after.losses) == (
        (state, "n1", 1, 0) if node == "suspect" else (WorkState.ASSIGNED, "n2", 2, 1)
    )


def test_a_restored_attempt_that_its_node_no_longer_runs_is_lost() -> None:
    """The node finished its life while nobody reigned; a heartbeat of the new one tells."""
    scheduler = with_nodes(a_node(session="s2"))
    scheduler.restore(a_record(state=WorkState.RUNNING, attempt=1, node_id="n1", changed_at=NOW), NOW)
    scheduler.heartbeat(a_beat(session="s2"), NOW)
    scheduler.heartbeat(a_beat(session="s2"), NOW + MISSED_S)
    assert states(scheduler) == {"w1": "retrying"}


# --- reports -------------------------------------------------------------------------------------------------------


def test_a_report_ends_the_attempt_and_frees_the_slot() -> None:
    """The result is the record's, and the next item gets its turn."""
    scheduler, _ = running()
    submit(scheduler, "w2", 2, now=NOW + 1)
    done = scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result=42), NOW + 1)
    assert done is not None
    assert (done.state, done.result, done.finished_at) == (WorkState.COMPLETED, 42, NOW + 1)
    assert [record.work_id for record in advance(scheduler, NOW + 1)] == ["w1", "w2"]


@pytest.mark.parametrize("attempt", [0, 1, 3, None])
def test_a_report_about_another_attempt_is_ignored(attempt: int | None) -> None:
    """Success or failure, early or late, or without saying which."""
    scheduler = with_nodes(a_node())
    scheduler.restore(a_record(state=WorkState.RUNNING, attempt=2, node_id="n1"), NOW)
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=attempt), NOW) is None
    assert scheduler.failed(WorkFailed(work_id="w1", attempt=attempt), NOW) is None
    assert states(scheduler) == {"w1": "running"}
    assert scheduler.outbox == []


def test_a_second_report_changes_nothing() -> None:
    """The first recorded outcome stays."""
    scheduler, _ = out()
    first = scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result="first"), NOW)
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=1, result="second"), NOW) is None
    assert scheduler.failed(WorkFailed(work_id="w1", attempt=1, fault="work"), NOW) is None
    assert scheduler.records["w1"] is first


def test_a_report_about_an_unknown_item_is_ignored() -> None:
    """It was finished long ago, or never was."""
    scheduler = with_nodes()
    assert scheduler.completed(WorkCompleted(work_id="w9", attempt=1), NOW) is None
    assert scheduler.failed(WorkFailed(work_id="w9", attempt=1), NOW) is None


def test_a_plain_node_need_not_name_the_attempt() -> None:
    """The first report wins."""
    scheduler, record = out(a_plain_node())
    assert record.plain
    assert scheduler.completed(WorkCompleted(work_id="w1", result=1), NOW) is not None
    assert scheduler.completed(WorkCompleted(work_id="w1", result=2), NOW) is None
    assert scheduler.records["w1"].result == 1


def test_a_failed_attempt_is_tried_again_after_its_pause_and_elsewhere_if_possible() -> None:
    """Then the retries are used up and the item is dead."""
    scheduler, _ = out(a_node("a"), a_node("b"))
    scheduler.failed(WorkFailed(work_id="w1", attempt=1, error="out of memory"), NOW)
    assert [str(record.state) for record in advance(scheduler, NOW + 3.99)] == ["retrying"]
    due, again = advance(scheduler, NOW + 4)
    assert (due.state, again.state, again.node_id, again.attempt) == (WorkState.PENDING, WorkState.ASSIGNED, "b", 2)
    dead = scheduler.failed(WorkFailed(work_id="w1", attempt=2, error="again"), NOW + 5)
    assert dead is not None
    assert (dead.state, dead.failures) == (WorkState.DEAD, 2)


def test_an_item_that_its_node_hands_back_is_tried_again_at_once_and_no_failure_is_counted() -> None:
    """The node ends; the item did nothing wrong."""
    scheduler, _ = out()
    record = scheduler.failed(WorkFailed(work_id="w1", attempt=1, code=HANDED_BACK, error="node n1 ended"), NOW)
    assert record is not None
    assert (record.state, record.failures, record.losses) == (WorkState.RETRYING, 0, 1)
    assert advance(scheduler, NOW)[-1].attempt == 2


def test_the_works_own_fault_is_not_tried_again() -> None:
    """It would fail anywhere."""
    scheduler, _ = out()
    record = scheduler.failed(WorkFailed(work_id="w1", attempt=1, fault="work", error="no prompt"), NOW)
    assert record is not None
    assert record.state is WorkState.FAILED


# --- time ----------------------------------------------------------------------------------------------------------


def test_an_item_that_waits_is_written_as_pending_and_not_before_it_has_waited() -> None:
    """One that is placed at once costs no write for having been pending."""
    scheduler = with_nodes()
    record = submit(scheduler)
    assert scheduler.outbox == []
    assert scheduler.next_at() == NOW + WRITE_LATE_S
    assert advance(scheduler, NOW + WRITE_LATE_S - 0.001) == []
    assert advance(scheduler, NOW + WRITE_LATE_S) == [record]
    assert scheduler.next_at() is None


def test_an_accepted_attempt_is_written_as_running_once_it_takes_long() -> None:
    """A short one goes from assigned to its end."""
    scheduler, _ = accepted()
    assert advance(scheduler, NOW + WRITE_LATE_S - 0.001) == []
    (record,) = advance(scheduler, NOW + WRITE_LATE_S)
    assert (record.state, record.attempt, record.node_id) == (WorkState.RUNNING, 1, "n1")
    assert (scheduler.out, scheduler.seats["n1"].taken) == (1, {("w1", 0)})


def test_an_attempt_that_was_not_accepted_is_not_written_as_running() -> None:
    """It may never have arrived."""
    scheduler, _ = out()
    assert advance(scheduler, NOW + 1) == []


@pytest.mark.parametrize(
    ("node", "after_s"), [(a_plain_node("n1"), 10.0), (a_node("n1", monitored=False), 10.0 + ANSWER_GRACE_S)]
)
def test_an_attempt_without_outcome_times_out_and_a_direct_node_has_grace_to_say_so_itself(
    node: NodeRecord, after_s: float
) -> None:
    """Counted from the assignment, as the node's failure."""
    scheduler, _ = out(node, timeout_s=10.0)
    assert advance(scheduler, NOW + after_s - 0.01) == []
    record = advance(scheduler, NOW + after_s)[-1]
    assert (record.state, record.failures) == (WorkState.RETRYING, 1)
    assert record.error == WorkError(reason="no outcome after 10 s", code="timeout", fault="node")


def test_a_timeout_counts_from_the_assignment_and_not_from_the_start() -> None:
    """Being written as running does not prolong it."""
    scheduler, _ = running(timeout_s=10.0)
    assert advance(scheduler, NOW + 10.0 + ANSWER_GRACE_S - 0.01) == []
    assert advance(scheduler, NOW + 10.0 + ANSWER_GRACE_S)[-1].state is WorkState.RETRYING


def test_the_deadline_of_an_attempt_does_not_end_the_next_one() -> None:
    """It was set for the attempt before."""
    scheduler, _ = out(a_node("a"), a_node("b"), timeout_s=10.0)
    scheduler.declined("w1", 1, "", NOW + 9)
    advance(scheduler, NOW + 9)
    advance(scheduler, NOW + 10.0 + ANSWER_GRACE_S)
    assert (scheduler.records["w1"].state, scheduler.records["w1"].attempt) == (WorkState.ASSIGNED, 2)


def test_a_restored_retry_and_a_restored_attempt_still_end_in_time() -> None:
    """Clocks survive a crash: they follow from the record."""
    scheduler = with_nodes(a_node())
    error = WorkError(reason="out of memory")
    scheduler.restore(a_record("retry", WorkState.RETRYING, attempt=1, error=error, not_before=NOW + 7), NOW)
    out_since = workitem.assigned(a_record("late", timeout_s=1.0), "n9", NOW - 60, plain=True)
    scheduler.restore(out_since, NOW)
    scheduler.tick(NOW)
    assert states(scheduler) == {"retry": "retrying", "late": "retrying"}
    scheduler.tick(NOW + 7)
    assert states(scheduler) == {"retry": "pending", "late": "pending"}


def test_a_swept_clock_forgets_only_what_no_longer_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries, deadlines and rests still come; thousands of ended attempts leave nothing behind."""
    monkeypatch.setattr(scheduling, "CLOCK_SLACK", 0)
    scheduler, _ = out(a_plain_node(), timeout_s=10.0)
    error = WorkError(reason="out of memory")
    scheduler.restore(a_record("retry", WorkState.RETRYING, attempt=1, error=error, not_before=NOW + 7), NOW)
    for n in range(50):
        submit(scheduler, f"x{n}", n + 10)
        scheduler.cancel(f"x{n}", "", NOW)
    scheduler.tick(NOW + 7)
    assert states(scheduler)["retry"] == "pending"
    scheduler.tick(NOW + 10)
    assert states(scheduler)["w1"] == "retrying"
    for n in range(10):
        scheduler.tick(NOW + 10_000 + n)
    assert scheduler.next_at() is None


def timed_out(scheduler: Scheduler, work_id: str, now: float) -> None:
    """One item, assigned at *now*, times out."""
    submit(scheduler, work_id, 1, now=now, timeout_s=1.0, retries_max=0)
    assert advance(scheduler, now)[-1].state is WorkState.ASSIGNED
    assert advance(scheduler, now + 1.0)[0].state is WorkState.DEAD


def test_a_silent_node_that_lets_items_time_out_gets_no_more_until_it_shows_up() -> None:
    """It never sends heartbeats, so nothing else would tell that it is gone."""
    scheduler = with_nodes(a_plain_node(work_types=["inference"]))
    for n in range(STRIKES_MAX):
        timed_out(scheduler, f"w{n}", NOW + 2 * n)
    record = submit(scheduler, "next", 9)
    advance(scheduler, NOW + 100)
    assert states(scheduler)["next"] == "pending"
    (verdict,) = scheduler.explain(record, NOW + 100).nodes
    assert (verdict.may_change, verdict.reasons) == (True, [f"let {STRIKES_MAX} items time out in a row"])
    scheduler.node_changed(a_plain_node(changed_at=NOW + 101), NOW + 101)
    advance(scheduler, NOW + 101)
    assert states(scheduler)["next"] == "assigned"


def test_a_report_clears_a_nodes_strikes() -> None:
    """Only timeouts in a row count."""
    scheduler = with_nodes(a_plain_node())
    for n in range(STRIKES_MAX - 1):
        timed_out(scheduler, f"w{n}", NOW + 2 * n)
    submit(scheduler, "reported", 1)
    advance(scheduler, NOW + 50)
    scheduler.failed(WorkFailed(work_id="reported", fault="work"), NOW + 50)
    for n in range(STRIKES_MAX - 1):
        timed_out(scheduler, f"v{n}", NOW + 60 + 2 * n)
    submit(scheduler, "next", 9)
    advance(scheduler, NOW + 100)
    assert states(scheduler)["next"] == "assigned"


def test_strikes_mean_nothing_for_a_node_that_sends_heartbeats() -> None:
    """Its heartbeats tell that it is there; long items time out on good nodes too."""
    scheduler = with_nodes(a_plain_node(monitored=True))
    for n in range(STRIKES_MAX + 1):
        timed_out(scheduler, f"w{n}", NOW + 2 * n)


# --- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [WorkState.PENDING, WorkState.ASSIGNED, WorkState.RUNNING, WorkState.RETRYING])
def test_an_item_is_cancelled_from_every_state_that_is_not_final(state: WorkState) -> None:
    """It leaves its queue or its seat, and nothing of it happens any more."""
    scheduler = with_nodes(a_node(work_types=["ppo"]))
    scheduler.restore(a_record(state=state, attempt=1, node_id="n1", changed_at=NOW, not_before=NOW + 5), NOW)
    record = scheduler.cancel("w1", "not wanted", NOW)
    assert record is not None
    assert (record.state, record.story[-1].reason, record.finished_at) == (WorkState.CANCELLED, "not wanted", NOW)
    assert wanted(scheduler) == [record]
    assert (scheduler.waiting, scheduler.out, scheduler.seats["n1"].taken) == (0, 0, set())
    assert advance(scheduler, NOW + 10_000) == []
    assert scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW) is None


@pytest.mark.parametrize("state", [WorkState.COMPLETED, WorkState.FAILED, WorkState.CANCELLED, WorkState.DEAD])
def test_a_final_item_stays_as_it_is_when_cancelled(state: WorkState) -> None:
    """And nothing is written."""
    scheduler = with_nodes()
    record = a_record(state=state)
    scheduler.restore(record, NOW)
    assert scheduler.cancel("w1", "", NOW) is record
    assert scheduler.outbox == []


def test_an_unknown_item_cannot_be_cancelled() -> None:
    """The caller looks elsewhere."""
    assert with_nodes().cancel("w9", "", NOW) is None


# --- what must be sent ---------------------------------------------------------------------------------------------


def on(state: WorkState, attempt: int = 1, node_id: str = "n1", *, plain: bool = False) -> WorkRecord:
    return a_record(state=state, attempt=attempt, node_id=node_id, plain=plain)


PENDING, ASSIGNED, RUNNING = on(WorkState.PENDING), on(WorkState.ASSIGNED), on(WorkState.RUNNING)
SECOND = on(WorkState.ASSIGNED, 2, "n2")


def stop(reason: str) -> Stop:
    return Stop("w1", 1, "n1", reason)


@pytest.mark.parametrize(
    ("before", "stored", "effects"),
    [
        (None, on(WorkState.PENDING, 0), []),
        (None, ASSIGNED, [Deliver(ASSIGNED)]),
        (on(WorkState.PENDING, 0), ASSIGNED, [Deliver(ASSIGNED)]),
        (ASSIGNED, RUNNING, []),
        (ASSIGNED, ASSIGNED, []),
        (ASSIGNED, PENDING, [stop("pending")]),
        (PENDING, SECOND, [Deliver(SECOND)]),
        (on(WorkState.RETRYING), SECOND, [Deliver(SECOND)]),
        # Lost or declined, and given to another before that was written.
        (ASSIGNED, SECOND, [stop("assigned"), Deliver(SECOND)]),
        (RUNNING, SECOND, [stop("assigned"), Deliver(SECOND)]),
        (RUNNING, on(WorkState.RETRYING), [stop("retrying")]),
        (RUNNING, on(WorkState.CANCELLED), [stop("cancelled")]),
        (ASSIGNED, on(WorkState.CANCELLED), [stop("cancelled")]),
        (RUNNING, on(WorkState.DEAD), [stop("dead")]),
        # The node reported these itself.
        (RUNNING, on(WorkState.COMPLETED), []),
        (RUNNING, on(WorkState.FAILED), []),
        (ASSIGNED, on(WorkState.COMPLETED), []),
        # A plain node cannot be told.
        (on(WorkState.ASSIGNED, plain=True), on(WorkState.CANCELLED, plain=True), []),
        (on(WorkState.ASSIGNED, plain=True), SECOND, [Deliver(SECOND)]),
        (PENDING, on(WorkState.CANCELLED), []),
        (None, on(WorkState.CANCELLED, 0), []),
    ],
)
def test_what_is_sent_follows_from_what_stood_and_what_now_stands(
    before: WorkRecord | None, stored: WorkRecord, effects: list[Effect]
) -> None:
    """Moves that were merged into one write are seen only as their ends."""
    assert consequences(before, stored) == effects


def test_a_stop_carries_the_reason_of_the_last_move() -> None:
    """The node's log then says why."""
    scheduler, before = running()
    stored = scheduler.cancel("w1", "not wanted", NOW)
    assert stored is not None
    assert consequences(before, stored) == [stop("not wanted")]


def test_an_item_that_came_back_and_went_out_again_before_it_was_written_is_stopped_and_delivered() -> None:
    """As the journal sees it: attempt 1 stands, attempt 2 is the next that is written."""
    scheduler, first = accepted(a_node("n1"), a_node("n2"))
    scheduler.node_changed(a_node("n1", state=NodeState.LOST), NOW + 1)
    second = advance(scheduler, NOW + 1)[-1]
    assert [type(effect) for effect in consequences(first, second)] == [Stop, Deliver]


# --- explaining ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "nodes", "summary"),
    [
        (on(WorkState.PENDING), [], "waits: no node is registered"),
        (on(WorkState.PENDING), [a_node(), a_node("n2", work_types=["ppo"])], "waits its turn: 1 of 2 nodes fit"),
        (
            on(WorkState.PENDING),
            [a_node(state=NodeState.SUSPECT), a_node("n2", work_types=["ppo"])],
            "waits: no node fits now, 1 of 2 could later; the nearest is n1: suspect",
        ),
        (
            a_record(requirements=Requirements(cpus=17, ram_mb=65_000)),
            [a_node(cpu=Cpu(threads=2), memory=Memory(total_mb=64_000)), a_node("n2", cpu=Cpu(threads=16))],
            "waits: none of the 2 nodes can ever run it; the nearest is n2: 16 CPUs, needs 17",
        ),
        (
            a_record(deadline_at=NOW + 90),
            [],
            "waits: no node is registered; fails in 90 s unless it has ended by then",
        ),
        (RUNNING, [a_node()], "attempt 1 is running on n1"),
        (
            a_record(state=WorkState.RETRYING, not_before=NOW + 3, error=WorkError(reason="out of memory")),
            [],
            "tried again in 3.0 s: out of memory",
        ),
        (a_record(state=WorkState.DEAD, error=WorkError(reason="out of memory")), [], "dead: out of memory"),
        (on(WorkState.COMPLETED), [], "completed"),
    ],
)
def test_an_item_can_be_explained_in_every_state(record: WorkRecord, nodes: list[NodeRecord], summary: str) -> None:
    """In one sentence, with a verdict per node."""
    scheduler = with_nodes(*nodes)
    explanation = scheduler.explain(record, NOW)
    assert (explanation.summary, len(explanation.nodes)) == (summary, len(nodes))


def test_an_explanation_names_why_a_node_rests() -> None:
    """With the node's own words."""
    scheduler, _ = out()
    scheduler.declined("w1", 1, "no memory left", NOW)
    (verdict,) = scheduler.explain(scheduler.records["w1"], NOW).nodes
    assert verdict.reasons == ["no memory left"]


# --- what a replay of the inbox must not change ---------------------------------------------------------------


def test_a_replayed_failure_without_an_attempt_is_not_counted_again() -> None:
    """It was about the attempt before; the inbox position tells."""
    scheduler, first = out(a_plain_node())
    report = WorkFailed(work_id=first.work_id, error="broken")
    after = scheduler.failed(report, NOW + 1, seq=7)
    assert after is not None
    (again,) = [record for record in advance(scheduler, NOW + 10) if record.state is WorkState.ASSIGNED]
    assert (again.attempt, again.report_seq) == (2, 7)
    assert scheduler.failed(report, NOW + 11, seq=7) is None
    assert scheduler.records[first.work_id].failures == 1


def test_a_replayed_submission_is_not_refused_because_many_wait_now() -> None:
    """It was stored when there was room; whatever is ahead of it in the replay waits only for want of placing."""
    scheduler = with_nodes(waiting_max=1)
    submit(scheduler)
    assert isinstance(scheduler.refusal(an_item(), NOW), Refused)
    assert scheduler.refusal(an_item(), NOW, fresh=False) is None


def test_an_attempt_that_a_heartbeat_showed_to_run_is_not_taken_back() -> None:
    """All answers to its delivery were lost, yet the node has it."""
    scheduler, record = out()
    scheduler.heartbeat(a_beat("n1", (record.work_id, record.attempt)), NOW + 1)
    scheduler.declined(record.work_id, record.attempt, "did not answer", NOW + 6)
    assert scheduler.records[record.work_id].state is WorkState.ASSIGNED
    scheduler.tick(NOW + 6)
    assert scheduler.records[record.work_id].state is WorkState.RUNNING


# --- the blacklist -------------------------------------------------------------------------------------------------


def broken(scheduler: Scheduler, work_id: str, now: float) -> str:
    """One item fails once by its node's fault; gives the node."""
    submit(scheduler, work_id, 1, now=now, retries_max=0)
    advance(scheduler, now)
    record = scheduler.records[work_id]
    assert record.state is WorkState.ASSIGNED
    scheduler.failed(WorkFailed(work_id=work_id, attempt=record.attempt, error="no CUDA", code="oom"), now)
    return record.node_id


def test_a_node_on_which_items_keep_failing_gets_no_more_of_them_for_a_while() -> None:
    """The others wait for another node, and are told why; once its time has passed one item is tried there."""
    scheduler = with_nodes(a_node("n1"))
    for n in range(3):
        assert broken(scheduler, f"w{n}", NOW) == "n1"
    record = submit(scheduler, "next", 9)
    submit(scheduler, "after it", 10)
    advance(scheduler, NOW + 59)
    (verdict,) = scheduler.explain(record, NOW + 50).nodes
    assert verdict.may_change
    assert verdict.reasons == ["blacklisted for 'inference' for 10 s more: 3 items failed, last: no CUDA"]
    advance(scheduler, NOW + 60)
    assert states(scheduler)["next"] == "assigned"
    assert states(scheduler)["after it"] == "pending"
    assert [entry.probing for entry in scheduler.blacklist.entries()] == ["next"]
    advance(scheduler, NOW + 61)
    scheduler.completed(WorkCompleted(work_id="next", attempt=1), NOW + 62)
    advance(scheduler, NOW + 62)
    assert states(scheduler)["after it"] == "assigned"


def test_a_blacklisted_node_does_other_kinds_of_work_and_other_nodes_do_this_one() -> None:
    scheduler = with_nodes(a_node("n1"))
    for n in range(3):
        broken(scheduler, f"w{n}", NOW)
    submit(scheduler, "other", 4, work_type="ppo")
    scheduler.node_changed(a_node("n2"), NOW)
    submit(scheduler, "next", 5)
    advance(scheduler, NOW)
    assert scheduler.records["other"].state is WorkState.ASSIGNED
    assert scheduler.records["next"].node_id == "n2"


@pytest.mark.parametrize(("code", "fault"), [("timeout", "node"), ("bad_payload", "work")])
def test_what_is_not_known_to_be_the_nodes_fault_is_not_held_against_it(
    code: str, fault: Literal["work", "node"]
) -> None:
    scheduler = with_nodes(a_node("n1"))
    for n in range(20):
        submit(scheduler, f"w{n}", n + 1, retries_max=0)
        advance(scheduler, NOW)
        scheduler.failed(WorkFailed(work_id=f"w{n}", attempt=1, code=code, fault=fault), NOW)
    assert scheduler.blacklist.tallies() == []


@pytest.mark.parametrize("how", ["cancelled", "lost", "declined", "known already"])
def test_a_try_that_tells_nothing_is_followed_by_another(how: str) -> None:
    scheduler = with_nodes(a_node("n1"))
    for n in range(3):
        broken(scheduler, f"w{n}", NOW)
    submit(scheduler, "try", 4)
    advance(scheduler, NOW + 60)
    if how != "declined":
        scheduler.accepted("try", 1, "", NOW + 60)
        advance(scheduler, NOW + 61)
        assert states(scheduler)["try"] == "running"  # And is still a try.
    assert [entry.probing for entry in scheduler.blacklist.entries()] == ["try"]
    match how:
        case "cancelled":
            scheduler.cancel("try", "", NOW + 61)
        case "known already":
            scheduler.forget("try")
        case "lost":
            scheduler.failed(WorkFailed(work_id="try", attempt=1, code=HANDED_BACK), NOW + 61)
        case _:
            scheduler.declined("try", 1, "busy", NOW + 61)
    assert [entry.probing for entry in scheduler.blacklist.entries()] == [""]


def test_a_pardoned_node_gets_work_at_once() -> None:
    scheduler = with_nodes(a_node("n1"))
    for n in range(3):
        broken(scheduler, f"w{n}", NOW)
    submit(scheduler, "next", 4)
    advance(scheduler, NOW)
    assert [entry.node_id for entry in scheduler.pardon("n1", "")] == ["n1"]
    advance(scheduler, NOW)
    assert states(scheduler)["next"] == "assigned"


def test_the_blacklist_is_the_same_for_a_successor_and_ends_there_too() -> None:
    before = with_nodes(a_node("n1"))
    for n in range(3):
        broken(before, f"w{n}", NOW)
    after = with_nodes(a_node("n1"))
    after.restore_blacklist(before.blacklist.tallies(), NOW)
    submit(after, "next", 4)
    advance(after, NOW + 59)
    assert states(after)["next"] == "pending"
    assert after.next_at() == NOW + 60
    advance(after, NOW + 60)
    assert states(after)["next"] == "assigned"


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_a_deadline_in_the_past_is_refused_and_one_that_passed_before_a_replay_is_not() -> None:
    """The second was good when it was submitted; it fails, and that is recorded."""
    scheduler = with_nodes()
    refusal = scheduler.refusal(an_item(deadline_at=NOW - 5), NOW)
    assert isinstance(refusal, Refused)
    assert (refusal.code, refusal.field, refusal.reason) == (
        "deadline_passed", "deadline_at", "the deadline, 1970-01-12 13:46:35 UTC, has passed",
    )  # fmt: skip
    assert scheduler.refusal(an_item(deadline_at=NOW - 5), NOW, fresh=False) is None
    assert scheduler.refusal(an_item(deadline_at=NOW + 5), NOW) is None


@pytest.mark.parametrize("state", [WorkState.PENDING, WorkState.ASSIGNED, WorkState.RUNNING, WorkState.RETRYING])
@pytest.mark.parametrize("restored", [True, False])
def test_an_item_that_has_not_ended_by_its_deadline_fails_by_its_own_fault(state: WorkState, restored: bool) -> None:
    """Wherever it is by then, also under a marshaller that began later; what runs of it is stopped."""
    deadline_at = NOW + 100
    record = a_record(
        state=state, attempt=1, node_id="n1", deadline_at=deadline_at, changed_at=NOW, not_before=NOW + 200,
        requirements=Requirements(gpus=8),
    )  # fmt: skip
    scheduler = with_nodes(a_node("n1"))
    if restored:
        scheduler.restore(record, NOW)
    elif state is WorkState.PENDING:
        submit(scheduler, deadline_at=deadline_at, requirements=Requirements(gpus=8))
    else:
        return
    advance(scheduler, deadline_at - 0.1)
    before = scheduler.records["w1"]
    assert before.state is state
    after = advance(scheduler, deadline_at)[-1]
    assert (after.state, after.finished_at) == (WorkState.FAILED, deadline_at)
    assert after.error == WorkError(reason="it had not ended by its deadline", code="deadline", fault="work")
    stops = [stop("it had not ended by its deadline")] if state in (WorkState.ASSIGNED, WorkState.RUNNING) else []
    assert consequences(before, after) == stops
    assert scheduler.seats["n1"].taken == set()
    assert scheduler.blacklist.tallies() == []


def test_an_item_that_ended_in_time_is_left_alone_by_its_deadline() -> None:
    scheduler, _ = out(deadline_at=NOW + 100)
    scheduler.completed(WorkCompleted(work_id="w1", attempt=1), NOW)
    wanted(scheduler)
    assert advance(scheduler, NOW + 200) == []
    assert states(scheduler) == {"w1": "completed"}


# --- what becomes free ---------------------------------------------------------------------------------------------


def test_memory_that_a_heartbeat_tells_to_be_free_is_used_at_once() -> None:
    """Without anything else happening."""
    scheduler = with_nodes(a_node(slots=5, memory=Memory(total_mb=1000)))
    scheduler.heartbeat(a_beat(memory_available_mb=300), NOW)
    record = submit(scheduler, requirements=Requirements(ram_mb=500))
    assert advance(scheduler, NOW) == []
    (verdict,) = scheduler.explain(record, NOW).nodes
    assert verdict.reasons == ["0 of 1000 MiB of RAM taken by work and 700 by others, needs 500"]
    scheduler.heartbeat(a_beat(memory_available_mb=600), NOW + 0.1)
    scheduler.place(NOW + 0.1)
    assert states(scheduler) == {"w1": "assigned"}


def test_a_node_that_is_announced_with_other_hardware_has_that_much() -> None:
    """What is out on it still counts."""
    scheduler = with_nodes(a_node(slots=5, cpu=Cpu(threads=8)))
    submit(scheduler, "w1", 1, requirements=Requirements(cpus=4))
    submit(scheduler, "w2", 2, requirements=Requirements(cpus=6))
    advance(scheduler, NOW)
    assert states(scheduler) == {"w1": "assigned", "w2": "pending"}
    scheduler.node_changed(a_node(slots=5, cpu=Cpu(threads=9)), NOW)
    advance(scheduler, NOW)
    assert states(scheduler)["w2"] == "pending"
    scheduler.node_changed(a_node(slots=5, cpu=Cpu(threads=10)), NOW)
    advance(scheduler, NOW)
    assert states(scheduler)["w2"] == "assigned"


def test_a_quota_that_one_owner_has_used_up_holds_up_no_other_owner() -> None:
    """Their items ask for the same, and wait apart."""
    scheduler = with_nodes(a_node("n1", slots=5, gpus=[a_gpu()]))
    submit(scheduler, "ann1", 1, owner="ann", requirements=Requirements(vram_mb=100))
    advance(scheduler, NOW)
    refused = Refused(code="quota_exceeded", reason="ann has enough")
    scheduler.refused_gpus("ann1", 1, refused, NOW)
    submit(scheduler, "bob1", 2, owner="bob", requirements=Requirements(vram_mb=100))
    advance(scheduler, NOW)
    assert states(scheduler) == {"ann1": "pending", "bob1": "assigned"}
    (verdict,) = scheduler.explain(scheduler.records["ann1"], NOW).nodes
    assert (verdict.reasons, verdict.may_change) == (["ann has enough"], True)
    advance(scheduler, NOW + 1)
    assert states(scheduler) == {"ann1": "assigned", "bob1": "assigned"}


def test_an_item_that_no_node_can_ever_run_waits_and_a_node_that_can_is_given_it() -> None:
    """Nodes may join."""
    scheduler = with_nodes(a_node("n1", gpus=[a_gpu(24_000)]))
    record = submit(scheduler, requirements=Requirements(vram_mb=80_000))
    advance(scheduler, NOW)
    assert scheduler.explain(record, NOW).summary == (
        "waits: the only node can never run it; the nearest is n1: 0 GPUs with 80000 MiB, needs 1"
    )
    scheduler.node_changed(a_node("n2", gpus=[a_gpu(81_000)]), NOW)
    assert advance(scheduler, NOW)[-1].node_id == "n2"


def test_an_explanation_shows_so_many_nodes_the_nearest_and_counts_all() -> None:
    scheduler = with_nodes(*(a_node(f"n{n:03}", state=NodeState.SUSPECT) for n in range(150)))
    explanation = scheduler.explain(submit(scheduler), NOW)
    assert explanation.summary == "waits: no node fits now, 150 of 150 could later; the nearest is n000: suspect"
    assert len(explanation.nodes) == scheduling.VERDICTS_MAX
