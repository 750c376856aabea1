"""Where results and logs are, and pages of the list of items."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from computemesh.contracts.base import MESSAGE_BYTES_MAX, Refused, encode
from computemesh.contracts.work import (
    Member,
    Move,
    ObjectRef,
    WorkCompleted,
    WorkError,
    WorkFailed,
    WorkItems,
    WorkList,
    WorkLogsGet,
    WorkRecord,
    WorkState,
)
from computemesh.testing.builders import a_record
from computemesh_services.work_marshaller import workitem
from computemesh_services.work_marshaller.edge import answer_pieces, taken_apart
from computemesh_services.work_marshaller.listing import page
from computemesh_services.work_marshaller.outputs import LogPlace, log_place, result_of

LOG = ObjectRef(object_id="o-log", size=5)
RESULT = ObjectRef(object_id="o-result", size=7)

STORY = [
    Move(at=1, state=WorkState.ASSIGNED, attempt=1, node_id="n1"),
    Move(at=2, state=WorkState.RETRYING, attempt=1, node_id="n1"),
    Move(at=3, state=WorkState.ASSIGNED, attempt=2, node_id="n2"),
]


def ran(state: WorkState, **changes: Any) -> WorkRecord:
    return a_record("w1", state, **{"attempt": 2, "node_id": "n2", "story": STORY} | changes)


def code_of(answer: object) -> str:
    assert isinstance(answer, Refused)
    return answer.code


# --- logs ----------------------------------------------------------------------------------------------------------


def ask(**changes: Any) -> WorkLogsGet:
    return replace(WorkLogsGet(work_id="w1"), **changes)


def test_while_an_attempt_is_out_its_node_is_asked() -> None:
    assert log_place(ran(WorkState.RUNNING), ask()) == LogPlace(attempt=2, node_id="n2", ended=False)


def test_once_it_has_ended_the_kept_log_is_read() -> None:
    place = log_place(ran(WorkState.FAILED, log_object=LOG), ask(attempt=2))
    assert place == LogPlace(attempt=2, node_id="n2", object=LOG)


def test_an_earlier_attempt_is_asked_of_the_node_in_the_story() -> None:
    """The kept log is that of the latest."""
    assert log_place(ran(WorkState.RUNNING, log_object=LOG), ask(attempt=1)) == LogPlace(attempt=1, node_id="n1")
    assert code_of(log_place(ran(WorkState.RUNNING, story=STORY[2:]), ask(attempt=1))) == "no_log"


def test_each_replica_has_its_own_log_and_one_that_is_done_has_ended() -> None:
    members = [
        Member(replica=0, node_id="n1", completed=True, log_object=LOG),
        Member(replica=1, node_id="n2"),
    ]
    record = ran(WorkState.RUNNING, replicas=2, members=members)
    assert log_place(record, ask()) == LogPlace(attempt=2, node_id="n1", object=LOG)
    assert log_place(record, ask(replica=1)) == LogPlace(attempt=2, node_id="n2", ended=False)
    assert code_of(log_place(record, ask(replica=2))) == "no_log"


def test_a_log_that_never_was_is_refused_with_how_many_there_are() -> None:
    """One is not several."""
    for place, reason in (
        (log_place(a_record("w1"), ask(replica=1)), "w1 has 1 replica, the first is 0"),
        (log_place(ran(WorkState.RUNNING), ask(attempt=3)), "w1 had 2 attempts"),
        (log_place(a_record("w1", WorkState.RUNNING, attempt=1), ask(attempt=3)), "w1 had 1 attempt"),
    ):
        assert isinstance(place, Refused)
        assert place.reason == reason


def test_an_item_that_never_began_has_a_log_without_end_until_it_is_final() -> None:
    assert log_place(a_record("w1"), ask()) == LogPlace(attempt=0, ended=False)
    assert log_place(a_record("w1", WorkState.CANCELLED), ask()) == LogPlace(attempt=0, ended=True)


def test_a_plain_node_has_no_logs_for_us() -> None:
    assert code_of(log_place(ran(WorkState.RUNNING, plain=True), ask())) == "no_log"


@pytest.mark.parametrize(
    "report", [WorkCompleted(work_id="w1", log_object=LOG), WorkFailed(work_id="w1", log_object=LOG)]
)
def test_a_report_says_where_the_log_is_and_a_new_attempt_forgets_it(report: WorkCompleted | WorkFailed) -> None:
    record = workitem.logged(ran(WorkState.RUNNING), report)
    assert record.log_object == LOG
    waiting = replace(record, state=WorkState.RETRYING)
    assert workitem.assigned(waiting, "n3", 5.0, plain=False).log_object is None


def test_the_log_of_a_replica_stands_with_its_member() -> None:
    members = [Member(replica=0, node_id="n1"), Member(replica=1, node_id="n2")]
    record = ran(WorkState.RUNNING, replicas=2, members=members)
    logged = workitem.logged(record, WorkFailed(work_id="w1", replica=1, log_object=LOG))
    assert [member.log_object for member in logged.members] == [None, LOG]
    assert workitem.logged(record, WorkFailed(work_id="w1", replica=2, log_object=LOG)) is record


# --- results -------------------------------------------------------------------------------------------------------


def test_only_what_has_completed_has_a_result() -> None:
    """The refusal says what became of it instead."""
    assert code_of(result_of(ran(WorkState.RUNNING))) == "not_finished"
    failed = result_of(ran(WorkState.FAILED, error=WorkError(reason="no such file")))
    assert code_of(failed) == "no_result"
    assert isinstance(failed, Refused)
    assert failed.reason == "w1 is failed: no such file"


def test_results_in_the_object_store_are_put_in_their_place() -> None:
    """The one result, or those of some of the replicas."""
    whole = result_of(ran(WorkState.COMPLETED, result_object=RESULT))
    assert not isinstance(whole, Refused)
    assert answer_pieces(whole) == [b'{"work_id":"w1","result":', RESULT, b"}"]
    members = [Member(replica=0, node_id="n1"), Member(replica=1, node_id="n2", result_object=RESULT)]
    some = result_of(ran(WorkState.COMPLETED, members=members, result=[{"a": 1}, None]))
    assert not isinstance(some, Refused)
    pieces = [piece if isinstance(piece, bytes) else b"<object>" for piece in answer_pieces(some)]
    assert b"".join(pieces) == b'{"work_id":"w1","result":[{"a":1},<object>]}'
    small = result_of(ran(WorkState.COMPLETED, result=3))
    assert not isinstance(small, Refused)
    assert answer_pieces(small) == [encode(small)]


# --- large submissions ---------------------------------------------------------------------------------------------


def test_a_large_item_is_taken_apart_and_its_payload_stays_the_json_it_is() -> None:
    taken = taken_apart(b'{"priority": 8, "payload": {"a": [1,  2.50]}, "work_type": "x"}')
    assert not isinstance(taken, Refused)
    item, payload = taken
    assert (item.priority, item.work_type, item.payload) == (8, "x", {})
    assert payload == b'{"a": [1,  2.50]}'


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"work_type": "x", "payload": [1]}', "payload"),
        (b'{"work_type": "x", "priority": "high", "payload": {}}', "priority"),
        (b'{"payload": {}}', "work_type"),
        (b"[1, 2]", ""),
        (b"{", ""),
        (b'{"work_type": "x", "unheard_of": 1, "payload": {}}', "unheard_of"),
    ],
)
def test_what_is_no_item_is_refused_by_its_field(body: bytes, field: str) -> None:
    answer = taken_apart(body)
    assert isinstance(answer, Refused)
    assert (answer.code, answer.field) == ("bad_message", field)


# --- the list ------------------------------------------------------------------------------------------------------


def items(count: int, **changes: Any) -> list[WorkRecord]:
    return [a_record(f"w{n}", inbox_seq=n, **changes) for n in range(1, count + 1)]


def a_page(records: list[WorkRecord], ask: WorkList) -> WorkItems:
    answer = page(records, ask)
    assert not isinstance(answer, Refused)
    return answer


def pages(records: list[WorkRecord], ask: WorkList) -> list[list[str]]:
    found: list[list[str]] = []
    for _ in range(len(records) + 1):
        answer = a_page(records, ask)
        found.append([item.work_id for item in answer.items])
        if not answer.next:
            return found
        ask = replace(ask, after=answer.next)
    raise AssertionError("the pages have no end")


@given(st.integers(0, 30), st.integers(1, 12))
def test_all_pages_together_have_every_item_once_and_the_newest_first(count: int, limit: int) -> None:
    found = pages(items(count), WorkList(limit=limit))
    assert [work_id for one in found for work_id in one] == [f"w{n}" for n in range(count, 0, -1)]
    assert all(len(one) <= limit for one in found)


def test_a_new_item_does_not_shift_the_pages_that_follow() -> None:
    first = a_page(items(10), WorkList(limit=4))
    second = a_page(items(12), WorkList(limit=4, after=first.next))
    assert [item.work_id for item in second.items] == ["w6", "w5", "w4", "w3"]


def test_items_with_one_number_in_the_inbox_are_told_apart() -> None:
    """A stream that was lost and made anew counts from the start again."""
    records = [a_record(f"w{n}", inbox_seq=1) for n in range(5)]
    assert pages(records, WorkList(limit=2)) == [["w4", "w3"], ["w2", "w1"], ["w0"]]


def test_filters_narrow_what_is_counted() -> None:
    records = [
        a_record("a", inbox_seq=1, owner="ann", node_id="n1"),
        a_record("b", WorkState.RUNNING, inbox_seq=2, owner="bob", node_id="n2", work_type="ppo"),
        a_record("c", inbox_seq=3, members=[Member(replica=0, node_id="n1"), Member(replica=1, node_id="n2")]),
    ]

    def found(**changes: Any) -> tuple[list[str], int]:
        answer = a_page(records, replace(WorkList(), **changes))
        return [item.work_id for item in answer.items], answer.count

    assert found() == (["c", "b", "a"], 3)
    assert found(owner="ann") == (["a"], 1)
    assert found(owner="") == (["c"], 1)
    assert found(work_type="ppo") == (["b"], 1)
    assert found(node_id="n2") == (["c", "b"], 2)
    assert found(status=WorkState.RUNNING) == (["b"], 1)


def test_a_page_fits_a_message_whatever_stands_in_it() -> None:
    """Reasons are cut, and a page ends early rather than be too large; the rest follows."""
    error = WorkError(reason="\x00" * 60_000)
    records = items(5000, error=error, owner="ü" * 200, model_name="\x01" * 200)
    answer = a_page(records, WorkList(limit=5000))
    assert len(encode(answer)) < MESSAGE_BYTES_MAX
    assert 0 < len(answer.items) < 5000
    assert answer.count == 5000
    assert answer.next


@pytest.mark.parametrize("after", ["w1", ".w1", "-1.w1", "²3.w1", "1"])
def test_a_place_in_the_list_that_no_answer_gave_is_refused(after: str) -> None:
    answer = page(items(3), WorkList(after=after))
    assert isinstance(answer, Refused)
    assert answer.field == "after"
