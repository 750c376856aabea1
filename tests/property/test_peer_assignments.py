"""Assignments against a plain model: whatever a program says, the same bytes move, or it is told what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.peer.assignments import ASSIGNMENTS_MAX, Wanted, parse

NAMES = st.text(min_size=1, max_size=5)
NUMBERS = st.integers(0, 2**40)
WANTED = st.one_of(
    st.builds(Wanted, NAMES, NAMES, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Wanted, st.integers(1, 99), st.integers(1, 99), NUMBERS, NUMBERS, NUMBERS),
)


def said(one: Wanted) -> tuple[Any, ...]:
    """How a program says it: the form with handles has the remote offset first."""
    local, remote, here, there, length = one
    if not isinstance(local, str):
        return (local, remote, there, here, length)
    return (local, here, there, length) if local == remote else (local, remote, here, there, length)


@given(st.lists(WANTED, min_size=1, max_size=8))
def test_every_form_says_the_same_bytes_and_lists_keep_their_order(wanted: list[Wanted]) -> None:
    assert parse([said(one) for one in wanted]) == wanted
    assert parse(tuple(said(one) for one in wanted)) == wanted
    assert parse([list(said(one)) for one in wanted]) == wanted
    assert parse(said(wanted[0])) == wanted[:1]


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
        lambda inner: st.lists(inner, max_size=6) | st.tuples(inner, inner, inner, inner),
        max_leaves=20,
    )
)
def test_whatever_is_said_is_understood_or_refused_with_the_place_of_the_mistake(assign: Any) -> None:
    said = ""
    try:
        for one in parse(assign):
            assert min(one.local_offset, one.remote_offset, one.length) >= 0
            assert isinstance(one.local, str) == isinstance(one.remote, str)
    except (TypeError, ValueError) as error:
        said = str(error)
    assert said.startswith("assign") or not said


def test_a_negative_length_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"assign\[1\]: length is -1"):
        parse([("kv", 0, 0, 4), ("kv", 0, 0, -1)])


def test_a_handle_and_a_name_do_not_go_together() -> None:
    with pytest.raises(TypeError, match=r"assign: wanted is \(name, local_offset"):
        parse(("kv", 3, 0, 0, 4))


def test_a_truth_value_is_no_number_of_bytes() -> None:
    with pytest.raises(TypeError, match="length must be a whole number, not bool"):
        parse(("kv", 0, 0, True))


def test_an_empty_list_and_too_long_a_list_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        parse([])
    with pytest.raises(ValueError, match="at most"):
        parse([("kv", 0, 0, 1)] * (ASSIGNMENTS_MAX + 1))
