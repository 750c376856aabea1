"""Goal: who is next follows from priority, age, owners' turns and the order of submission, and from nothing else.

Method: records in, items out, one after the other.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from computemesh.contracts.work import Requirements, WorkRecord
from computemesh.testing.builders import a_record
from computemesh_services.work_marshaller import queue as queues
from computemesh_services.work_marshaller.queue import Backlog, Queue

STEP_S = 600.0


class Line:
    """A queue of which everything fits."""

    def __init__(self) -> None:
        self.queue = Queue(step_s=STEP_S)
        self.ready: dict[Backlog, None] = {}
        self.records: dict[str, WorkRecord] = {}

    def push(self, work_id: str, seq: int, **changes: Any) -> None:
        fields: dict[str, Any] = {"inbox_seq": seq, "submitted_at": float(seq), **changes}
        record = a_record(work_id, **fields)
        self.records[work_id] = record
        backlog, _ = self.queue.push(record)
        self.ready[backlog] = None

    def drop(self, work_id: str) -> None:
        backlog = self.queue.drop(work_id)
        if not backlog.lines:
            self.ready.pop(backlog, None)

    def take(self) -> str:
        _, entry = self.queue.first(self.ready)
        self.queue.charge(entry, self.records[entry.work_id].replicas)
        self.drop(entry.work_id)
        return entry.work_id

    def take_all(self) -> list[str]:
        return [self.take() for _ in range(len(self.queue))]


def test_a_higher_priority_goes_first_and_then_who_came_first() -> None:
    line = Line()
    for seq, (work_id, priority) in enumerate([("low", 1), ("first", 5), ("second", 5), ("high", 9)]):
        line.push(work_id, seq, priority=priority)
    assert line.take_all() == ["high", "first", "second", "low"]


@pytest.mark.parametrize(
    ("after_s", "first"), [(STEP_S * 2 - 1, "high"), (STEP_S * 2, "high"), (STEP_S * 2 + 1, "low")]
)
def test_each_step_of_priority_is_worth_so_much_waiting(after_s: float, first: str) -> None:
    """Whatever comes later than that no longer passes."""
    line = Line()
    line.push("low", 1, priority=3, submitted_at=0.0)
    line.push("high", 2, priority=5, submitted_at=after_s)
    assert line.take() == first


def test_no_stream_of_higher_priority_holds_up_an_item_for_ever() -> None:
    """Nine steps of priority are nine steps of waiting, whatever comes meanwhile and whoever it belongs to."""
    line = Line()
    line.push("low", 0, priority=0, submitted_at=0.0)
    for n in range(1, 1000):
        now = n * 60.0
        line.push(f"h{n}", n, priority=9, submitted_at=now, owner=f"o{n % 7}")
        if line.take() == "low":
            assert now == pytest.approx(9 * STEP_S + 60.0, abs=60.0)
            return
    raise AssertionError("never")


def test_owners_take_turns_however_many_items_one_has() -> None:
    line = Line()
    for n in range(100):
        line.push(f"a{n}", n, owner="a")
    assert [line.take() for _ in range(3)] == ["a0", "a1", "a2"]
    line.push("b0", 200, owner="b")
    line.push("b1", 201, owner="b")
    line.push("c0", 202, owner="")
    assert [line.take() for _ in range(6)] == ["a3", "b0", "c0", "a4", "b1", "a5"]


def test_no_stream_of_new_owners_holds_up_an_item_for_ever() -> None:
    """Each of them has a first turn to get, and still the second of another has its turn after a few."""
    line = Line()
    for n in range(3):
        line.push(f"a{n}", n, owner="a")
    turns: list[str] = []
    for n in range(30):
        line.push(f"x{n}", 10 + n, owner=f"x{n}")
        turns.append(line.take())
    assert [turns.index(f"a{n}") for n in range(3)] == [0, 4, 8]


def test_who_could_not_start_for_long_catches_up_a_little_and_not_all_at_once() -> None:
    """Only items of *a* that fit nowhere wait for a thousand turns of *b*; then they fit."""
    line = Line()
    for n in range(500):
        line.push(f"a{n}", n, owner="a", requirements=Requirements(gpus=8))
    blocked = next(iter(line.ready))
    line.ready.clear()
    for n in range(1500):
        line.push(f"b{n}", 1000 + n, owner="b")
    for _ in range(1000):
        line.take()
    line.ready[blocked] = None
    turns = [line.take()[0] for _ in range(300)]
    assert 60 <= turns.index("b") <= 70
    assert 100 <= turns.count("b") <= 120


def test_who_comes_back_has_no_turns_to_catch_up_with() -> None:
    """Ten turns of the other while it had nothing to do are gone."""
    line = Line()
    for n in range(50):
        line.push(f"a{n}", n, owner="a")
    line.push("b0", 100, owner="b")
    for _ in range(12):
        line.take()
    for n in range(1, 10):
        line.push(f"b{n}", 100 + n, owner="b")
    turns = Counter(line.take()[0] for _ in range(8))
    assert turns == {"a": 4, "b": 4}


def test_an_item_with_replicas_is_a_turn_for_each_of_them() -> None:
    line = Line()
    for n in range(3):
        line.push(f"a{n}", n, owner="a", replicas=4)
    for n in range(8):
        line.push(f"b{n}", 10 + n, owner="b")
    assert [line.take() for _ in range(7)] == ["a0", "b0", "b1", "b2", "b3", "a1", "b4"]


def test_items_of_different_needs_share_turns_and_order() -> None:
    """They stand in different backlogs, and are compared as if they did not."""
    line = Line()
    for n in range(4):
        need = Requirements(cpus=n % 2)
        line.push(f"a{n}", n, owner="a", requirements=need)
        line.push(f"b{n}", 10 + n, owner="b", requirements=need)
    assert line.take_all() == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_a_backlog_that_is_not_ready_is_in_nobodys_way_and_costs_its_owner_no_turn() -> None:
    line = Line()
    for n in range(5):
        line.push(f"blocked{n}", n, owner="a", requirements=Requirements(gpus=8))
    blocked = next(iter(line.ready))
    line.ready.clear()
    for n in range(3):
        line.push(f"b{n}", 10 + n, owner="b")
    line.push("a0", 20, owner="a")
    assert [line.take() for _ in range(4)] == ["b0", "a0", "b1", "b2"]
    line.ready[blocked] = None
    assert line.take() == "blocked0"


def test_an_item_that_comes_again_stands_where_it_stood() -> None:
    """It was declined, or its retry is due: it keeps its age."""
    line = Line()
    for n in range(3):
        line.push(f"w{n}", n)
    assert line.take() == "w0"
    line.push("w0", 0)
    assert line.take_all() == ["w0", "w1", "w2"]


def test_what_left_the_queue_is_not_found_in_it() -> None:
    line = Line()
    for n in range(6):
        line.push(f"w{n}", n, owner=f"o{n % 2}", priority=5 + n % 3)
    for n in (0, 3, 5):
        line.drop(f"w{n}")
    assert line.take_all() == ["w2", "w1", "w4"]
    assert len(line.queue) == 0


def test_owners_who_left_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "IDLE_OWNERS", 10)
    line = Line()
    line.push("stays", 0, owner="stays", submitted_at=-1e9, requirements=Requirements(gpus=8))
    line.ready.clear()
    for n in range(200):
        line.push(f"w{n}", n + 1, owner=f"o{n}")
        line.take()
    (turns,) = {id(x.turns): x.turns for b in line.queue for x in b.lines.values()}.values()
    assert turns.remembered <= 20


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.integers(0, 3)), max_size=40), st.integers(0, 99)
)
def test_every_item_has_its_turn_once_and_in_order_of_submission_of_its_kind(
    items: list[tuple[int, str, int]], seed: int
) -> None:
    """Whatever is dropped and comes again meanwhile."""
    rng, line = random.Random(seed), Line()
    for seq, (priority, owner, cpus) in enumerate(items):
        line.push(f"w{seq}", seq, priority=priority, owner=owner, requirements=Requirements(cpus=cpus))
        if rng.random() < 0.2:
            again = rng.choice(list(line.records))
            line.drop(again)
            line.push(again, line.records[again].inbox_seq, **_same(line.records[again]))
    taken = [line.records[work_id] for work_id in line.take_all()]
    assert sorted(record.inbox_seq for record in taken) == list(range(len(items)))
    for kind in {(record.priority, record.owner) for record in taken}:
        seqs = [record.inbox_seq for record in taken if (record.priority, record.owner) == kind]
        assert seqs == sorted(seqs)


def _same(record: WorkRecord) -> dict[str, Any]:
    return {"priority": record.priority, "owner": record.owner, "requirements": record.requirements}


@given(st.lists(st.sampled_from("aaaaaaabcd"), min_size=1, max_size=60), st.lists(st.sampled_from("abcd"), max_size=60))
def test_of_two_owners_who_both_wait_none_is_two_turns_ahead(first: list[str], later: list[str]) -> None:
    """Between any two moments at which both had items waiting throughout."""
    line, seq = Line(), 0
    for owner in first:
        line.push(f"{owner}{seq}", seq, owner=owner)
        seq += 1
    turns: Counter[tuple[str, str]] = Counter()
    while len(line.queue):
        waiting = {work_id[0] for work_id in line.records if work_id in line.queue}
        owner = line.take()[0]
        for other in waiting - {owner}:
            turns[owner, other] += 1
            turns[other, owner] -= 1
            assert turns[owner, other] <= 2, (owner, other)
        for gone in "abcd":
            if gone not in {work_id[0] for work_id in line.records if work_id in line.queue}:
                for pair in [pair for pair in turns if gone in pair]:
                    turns[pair] = 0
        if later:
            owner = later.pop()
            line.push(f"{owner}{seq}", seq, owner=owner)
            seq += 1
