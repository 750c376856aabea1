"""Goal: a reader that starts at the floor misses nothing that is not yet stored.

Method: any order of openings and closings, against the plain definition of a floor.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from computemesh_services.work_marshaller.floor import Floor


def test_a_fresh_floor_is_where_reading_starts() -> None:
    """Nothing was opened, so nothing below is needed."""
    floor = Floor(1)
    assert floor.seq == 1
    floor.start(40)
    assert floor.seq == 40


def test_an_open_message_holds_the_floor_whatever_closes_above_it() -> None:
    """The floor rises over everything that was closed meanwhile, at once."""
    floor = Floor(5)
    for seq in (5, 6, 7):
        floor.open(seq)
    floor.close(7)
    floor.close(6)
    assert floor.seq == 5
    floor.close(5)
    assert floor.seq == 8


def test_a_gap_in_the_sequence_does_not_hold_the_floor() -> None:
    """Messages may have been deleted from the inbox."""
    floor = Floor(1)
    floor.open(3)
    floor.open(10)
    floor.close(3)
    assert floor.seq == 10
    floor.close(10)
    assert floor.seq == 11


@given(gaps=st.lists(st.integers(1, 3), min_size=1, max_size=30), data=st.data())
def test_the_floor_is_the_lowest_open_message_in_any_order_of_closing(gaps: list[int], data: st.DataObject) -> None:
    """It never passes an open one, never falls, and reaches the end when all are closed."""
    seqs = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    floor, unopened, opened, last = Floor(1), list(seqs), set[int](), 0
    while unopened or opened:
        openable = ["open"] if unopened else []
        closable = sorted(opened)
        step = data.draw(st.sampled_from([*openable, *closable]))
        if isinstance(step, int):
            floor.close(step)
            opened.remove(step)
        else:
            floor.open(unopened[0])
            opened.add(unopened.pop(0))
        if opened:
            assert floor.seq == min(opened)
        assert floor.seq >= last
        last = floor.seq
    assert floor.seq == seqs[-1] + 1
