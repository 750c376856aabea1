"""Goal: an item moves only along the table, and each move changes what it should and nothing else.

Method: the table is written out a second time here, as a person would, and every pair of states is tried.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.work import WorkCompleted, WorkError, WorkFailed, WorkRecord, WorkState
from computemesh.testing.builders import a_record, an_item
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.workitem import LOSSES_MAX, STORY_MAX, InvalidMove, RetryPolicy

NOW = 1_000_000.0
POLICY = RetryPolicy(retries_max=2, delay_s=4.0, delay_s_max=60.0)
NODE_FAULT = WorkError(reason="out of memory", code="oom", fault="node")
WORK_FAULT = WorkError(reason="no prompt", code="bad_payload", fault="work")

LEGAL = {
    "pending": {"assigned", "failed", "cancelled"},
    "assigned": {"pending", "running", "retrying", "completed", "failed", "cancelled", "dead"},
    "running": {"retrying", "completed", "failed", "cancelled", "dead"},
    "retrying": {"pending", "assigned", "failed", "cancelled"},
    "completed": set[str](),
    "failed": set[str](),
    "cancelled": set[str](),
    "dead": set[str](),
}

MOVES: dict[WorkState, list[Callable[[WorkRecord], WorkRecord]]] = {
    WorkState.PENDING: [
        lambda record: workitem.due(record, NOW),
        lambda record: workitem.undelivered(record, NOW, "nobody listens"),
    ],
    WorkState.ASSIGNED: [
        lambda record: workitem.assigned(record, "n9", NOW, plain=False),
        lambda record: workitem.assigned_together(record, ["n9", "n8"], NOW),
    ],
    WorkState.RUNNING: [lambda record: workitem.started(record, NOW)],
    WorkState.RETRYING: [
        lambda record: workitem.lost(record, "the node vanished", NOW),
        lambda record: workitem.failed(record, NODE_FAULT, POLICY, NOW, 1.0),
    ],
    WorkState.COMPLETED: [lambda record: workitem.completed(record, WorkCompleted(work_id="w1", result=42), NOW)],
    WorkState.FAILED: [
        lambda record: workitem.failed(record, WORK_FAULT, POLICY, NOW, 1.0),
        lambda record: workitem.hopeless(record, WORK_FAULT, NOW),
    ],
    WorkState.CANCELLED: [lambda record: workitem.cancelled(record, "not wanted", NOW)],
    WorkState.DEAD: [
        lambda record: workitem.failed(record, NODE_FAULT, RetryPolicy(retries_max=0), NOW, 1.0),
        lambda record: workitem.lost(a_record(state=record.state, losses=LOSSES_MAX), "the node vanished", NOW),
    ],
}


@pytest.mark.parametrize("to", WorkState)
@pytest.mark.parametrize("before", WorkState)
def test_a_move_happens_when_the_table_has_it_and_is_a_defect_when_not(before: WorkState, to: WorkState) -> None:
    """All 64 pairs, by every function that leads to the second state."""
    record = a_record(state=before, attempt=1, node_id="n1")
    for move in MOVES[to]:
        if to in LEGAL[before]:
            after = move(record)
            assert (after.state, after.changed_at, after.story[-1].state) == (to, NOW, to)
        else:
            with pytest.raises(InvalidMove):
                move(record)


def test_the_table_is_the_one_people_read() -> None:
    """The code's table and this test's say the same."""
    assert {str(state): {str(to) for to in targets} for state, targets in workitem.NEXT.items()} == LEGAL


def test_an_illegal_move_tells_the_item_and_its_story() -> None:
    """Whoever reads the log sees how it came to this."""
    record = workitem.cancelled(workitem.received(an_item(), "w7", 1, NOW), "not wanted", NOW)
    with pytest.raises(InvalidMove, match=r"w7: cancelled to running.*not wanted"):
        workitem.started(record, NOW)


def test_a_received_item_is_pending_and_keeps_all_that_was_asked() -> None:
    """Nothing of the submission is dropped; bookkeeping starts at zero."""
    item = an_item(model_name="m", priority=8, payload={"prompt": "hi"}, timeout_s=9.0, retries_max=1, owner="ann")
    record = workitem.received(item, "w1", 17, NOW)
    for name in ("work_type", "model_name", "priority", "payload", "requirements", "timeout_s", "retries_max", "owner"):
        assert getattr(record, name) == getattr(item, name), name
    assert (record.work_id, record.state, record.inbox_seq) == ("w1", WorkState.PENDING, 17)
    assert (record.attempt, record.failures, record.losses, record.submitted_at) == (0, 0, 0, NOW)


def test_only_an_assignment_starts_a_new_attempt() -> None:
    """Every other move keeps the number."""
    record = workitem.received(an_item(), "w1", 1, NOW)
    record = workitem.assigned(record, "n1", NOW, plain=False)
    assert record.attempt == 1
    record = workitem.undelivered(record, NOW, "nobody listens")
    assert record.attempt == 1
    record = workitem.started(workitem.assigned(record, "n2", NOW, plain=False), NOW)
    assert record.attempt == 2
    record = workitem.due(workitem.lost(record, "vanished", NOW), NOW)
    assert record.attempt == 2
    assert workitem.assigned(record, "n3", NOW, plain=True).attempt == 3


def test_the_works_own_fault_ends_it_at_once() -> None:
    """However many retries are left."""
    after = workitem.failed(a_record(state=WorkState.RUNNING), WORK_FAULT, POLICY, NOW, 1.0)
    assert (after.state, after.error, after.failures, after.finished_at) == (WorkState.FAILED, WORK_FAULT, 1, NOW)


@pytest.mark.parametrize(
    ("failures", "state"),
    [(0, WorkState.RETRYING), (1, WorkState.RETRYING), (2, WorkState.DEAD)],
)
def test_a_nodes_fault_is_tried_again_until_the_retries_are_used_up(failures: int, state: WorkState) -> None:
    """Two retries are three attempts."""
    after = workitem.failed(a_record(state=WorkState.RUNNING, failures=failures), NODE_FAULT, POLICY, NOW, 1.0)
    assert (after.state, after.failures, after.error) == (state, failures + 1, NODE_FAULT)
    assert (after.finished_at is not None) == (state is WorkState.DEAD)


@pytest.mark.parametrize(("retries_max", "state"), [(0, WorkState.DEAD), (1, WorkState.RETRYING)])
def test_an_items_own_retries_count_more_than_the_meshs(retries_max: int, state: WorkState) -> None:
    """Also when it wants none at all."""
    record = a_record(state=WorkState.RUNNING, retries_max=retries_max)
    assert workitem.failed(record, NODE_FAULT, POLICY, NOW, 1.0).state is state


def test_pauses_double_up_to_their_bound() -> None:
    """4, 8, 16, 32, 60, 60 seconds, and no overflow after very many failures."""
    assert [POLICY.wait_s(failures, 1.0) for failures in range(1, 7)] == [4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert POLICY.wait_s(100_000, 1.0) == 60.0


@given(failures=st.integers(0, 10_000), jitter=st.floats(0, 1))
def test_jitter_keeps_a_pause_between_half_and_all_of_it(failures: int, jitter: float) -> None:
    """Retries of many items spread, and none comes much too early."""
    full_s = POLICY.wait_s(failures, 1.0)
    assert full_s / 2 == POLICY.wait_s(failures, 0.0) <= POLICY.wait_s(failures, jitter) <= full_s


def test_a_retry_waits_for_its_pause() -> None:
    """The second failure pauses twice as long as the first."""
    first = workitem.failed(a_record(state=WorkState.RUNNING), NODE_FAULT, POLICY, NOW, 1.0)
    second = workitem.failed(a_record(state=WorkState.RUNNING, failures=1), NODE_FAULT, POLICY, NOW, 0.0)
    assert first.not_before == NOW + 4.0
    assert second.not_before == NOW + 4.0


def test_a_loss_is_no_failure_and_needs_no_pause() -> None:
    """The node vanished; the item may start elsewhere at once."""
    after = workitem.lost(a_record(state=WorkState.RUNNING, failures=1), "n1 was lost", NOW)
    assert (after.state, after.failures, after.losses, after.not_before) == (WorkState.RETRYING, 1, 1, NOW)
    assert after.error == WorkError(reason="n1 was lost", code="node_lost", fault="node")


def test_an_item_whose_nodes_vanish_again_and_again_is_dead() -> None:
    """It is suspected of killing them."""
    record = a_record(state=WorkState.RUNNING)
    for _ in range(LOSSES_MAX):
        record = workitem.lost(record, "vanished", NOW)
        assert record.state is WorkState.RETRYING
        record = workitem.assigned(record, "n1", NOW, plain=False)
    after = workitem.lost(record, "vanished", NOW)
    assert (after.state, after.losses, after.finished_at) == (WorkState.DEAD, LOSSES_MAX + 1, NOW)


@pytest.mark.parametrize(
    ("plain", "attempt", "current"),
    [
        (False, 2, True),
        (False, 1, False),
        (False, 3, False),
        (False, None, False),
        (True, 2, True),
        (True, 1, False),
        (True, None, True),
    ],
)
@pytest.mark.parametrize("state", WorkState)
def test_a_report_counts_only_for_the_attempt_that_is_out(
    state: WorkState, plain: bool, attempt: int | None, current: bool
) -> None:
    """Only a plain node may leave the number out, and nothing counts for an item that is not out."""
    record = a_record(state=state, attempt=2, plain=plain)
    out = state in (WorkState.ASSIGNED, WorkState.RUNNING)
    assert workitem.is_current(record, attempt) is (current and out)


def test_a_story_keeps_the_latest_moves_and_no_more() -> None:
    """However long an item is passed around, its record does not grow."""
    record = workitem.received(an_item(), "w1", 1, NOW)
    for n in range(STORY_MAX):
        record = workitem.assigned(record, f"n{n}", NOW + n, plain=False)
        record = workitem.undelivered(record, NOW + n, "x" * 5000)
        assert len(record.story) == min(STORY_MAX, 1 + 2 * (n + 1))
    assert record.story[-1].state is WorkState.PENDING
    assert record.story[-2].node_id == f"n{STORY_MAX - 1}"
    assert record.story[-1].reason == "x" * 200


def test_a_result_is_kept_with_the_time_it_came() -> None:
    """The error of an earlier attempt stays beside it."""
    record = a_record(state=WorkState.RUNNING, error=NODE_FAULT)
    after = workitem.completed(record, WorkCompleted(work_id="w1", result={"text": "hi"}), NOW)
    assert (after.result, after.finished_at, after.error) == ({"text": "hi"}, NOW, NODE_FAULT)
    assert workitem.is_final(after)


def test_a_failure_report_becomes_the_records_error() -> None:
    """Reason, code and fault, as the node said them."""
    assert (
        workitem.error_of(WorkFailed(work_id="w1", error="no prompt", code="bad_payload", fault="work")) == WORK_FAULT
    )


def test_an_assignment_names_the_attempt_and_the_node() -> None:
    """What a node needs to run it and to report on it."""
    record = workitem.received(an_item(payload={"prompt": "hi"}, model_name="m", owner="ann"), "w1", 1, NOW)
    sent = workitem.assignment(workitem.assigned(record, "n1", NOW, plain=False))
    assert (sent.work_id, sent.attempt, sent.node_id, sent.payload) == ("w1", 1, "n1", {"prompt": "hi"})
    assert (sent.model_name, sent.owner, sent.timeout_s) == ("m", "ann", record.timeout_s)


def test_a_summary_says_where_an_item_is_without_its_payload() -> None:
    """A line of a list."""
    record = a_record(state=WorkState.RUNNING, attempt=2, node_id="n1", error=NODE_FAULT, payload={"prompt": "hi"})
    line = workitem.summary(record)
    assert (line.work_id, line.state, line.attempt, line.node_id) == ("w1", WorkState.RUNNING, 2, "n1")
    assert line.error == NODE_FAULT
    assert "payload" not in line.__struct_fields__


@pytest.mark.parametrize(
    ("attempt", "seq", "state", "plain", "why"),
    [
        (1, 9, WorkState.RUNNING, False, "old_attempt"),
        (1, 9, WorkState.COMPLETED, False, "old_attempt"),
        (2, 9, WorkState.CANCELLED, False, "ended"),
        (2, 5, WorkState.COMPLETED, False, "repeated"),
        (1, 4, WorkState.RUNNING, False, "repeated"),
        (None, 9, WorkState.RUNNING, False, "no_attempt"),
        (None, 9, WorkState.COMPLETED, True, "ended"),
    ],
)
def test_a_report_that_changes_nothing_says_why(
    attempt: int | None, seq: int, state: WorkState, plain: bool, why: str
) -> None:
    """The item is at its second attempt, and a report that stood fifth in the inbox was applied."""
    record = a_record(state=state, attempt=2, node_id="n1", report_seq=5, plain=plain)
    assert workitem.why_ignored(record, attempt, seq) == why
    assert workitem.why_ignored(None, attempt, seq) == "unknown"
