"""What engines put out, cut into pieces: whatever comes in whatever chunks, nothing is lost, and no event is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.infer import PART_MAX
from computemesh_services.node_agent.infer.pieces import Cutter, EventCutter, TextCutter, TooLong

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=40)


def fed(cutter: Cutter, data: bytes, cuts: list[int]) -> list[str]:
    """The pieces of *data*, which comes in chunks that end at *cuts*."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces: list[str] = []
    for start, end in itertools.pairwise(places):
        pieces += cutter.feed(data[start:end])
    return pieces + cutter.end()


@given(
    st.lists(LINES, min_size=1, max_size=20), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 10_000))
)
def test_events_come_out_as_they_went_in_and_none_is_cut(lines: list[str], newline: str, cuts: list[int]) -> None:
    """With any of the line ends that there are, and chunks that end anywhere, also within a character."""
    text = "".join(f"data: {line}{newline}{newline}" for line in lines)
    pieces = fed(EventCutter(), text.encode(), cuts)
    assert "".join(pieces) == text
    assert all(piece.endswith(newline * 2) for piece in pieces)


@given(st.integers(1, 3000), st.lists(st.integers(0, 10_000_000), max_size=5))
def test_many_events_at_once_are_pieces_of_bounded_length(count: int, cuts: list[int]) -> None:
    text = "".join(f"data: {'é' * (number % 400)}\n\n" for number in range(count))
    pieces = fed(EventCutter(), text.encode(), cuts)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n\n") and len(piece) <= PART_MAX for piece in pieces)


def test_an_event_that_is_too_long_for_a_piece_is_none() -> None:
    with pytest.raises(TooLong):
        EventCutter().feed(b"data: " + b"x" * PART_MAX + b"\n\n")


def test_an_engine_that_never_ends_an_event_does_not_fill_the_memory() -> None:
    """It is known while it comes."""
    cutter = EventCutter()
    with pytest.raises(TooLong):
        _ = [cutter.feed(b"x" * PART_MAX) for _ in range(100)]


def test_a_stream_that_ends_within_an_event_gives_what_there_was() -> None:
    assert fed(EventCutter(), b"data: 1\n\ndata: 2", []) == ["data: 1\n\n", "data: 2"]


@given(st.text(max_size=2000), st.integers(1, 200), st.lists(st.integers(0, 10_000)))
def test_any_other_text_comes_out_as_it_went_in(text: str, times: int, cuts: list[int]) -> None:
    """In chunks that end anywhere, also within a character."""
    text = text.encode("utf-8", "replace").decode() * times
    pieces = fed(TextCutter(), text.encode(), cuts)
    assert "".join(pieces) == text
    assert all(len(piece) <= PART_MAX for piece in pieces)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_bytes_that_are_no_text_become_text_all_the_same(data: bytes, cuts: list[int]) -> None:
    assert "".join(fed(TextCutter(), data, cuts)) == data.decode("utf-8", "replace")
    fed(EventCutter(), data, cuts)
