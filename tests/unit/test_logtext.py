"""Pieces of logs: every character once, whole, and never more than a message holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.base import encode
from computemesh.logtext import PART_JSON_MAX, as_text


def read_through(data: bytes, limit: int) -> str:
    """The whole of a log, a piece after the other."""
    text, offset = "", 0
    while True:
        piece = data[offset : offset + limit]
        part = as_text(piece, rest=len(data) - offset - len(piece), ended=True)
        assert len(encode(part.text)) <= PART_JSON_MAX
        text, offset = text + part.text, offset + part.used
        if offset == len(data):
            assert part.at_end
            return text
        assert part.used > 0, "no piece stands still"


@given(st.text(max_size=50), st.integers(4, 30))
def test_text_read_in_pieces_is_the_text(text: str, limit: int) -> None:
    assert read_through(text.encode("utf-8", "replace"), limit) == text.encode("utf-8", "replace").decode()


@given(st.binary(max_size=50), st.integers(1, 30))
def test_anything_at_all_is_read_to_its_end(data: bytes, limit: int) -> None:
    """Whatever the bytes and however small the pieces, reading ends."""
    read_through(data, limit)


def test_what_grows_in_json_comes_in_smaller_pieces() -> None:
    """A control character takes six bytes there."""
    assert read_through(b"\x00" * 300_000, 262_144) == "\x00" * 300_000


def test_a_character_that_is_not_complete_yet_waits_for_its_rest() -> None:
    """Its first byte may have been printed a moment before the second."""
    part = as_text("aü".encode()[:2], rest=0, ended=False)
    assert (part.text, part.used, part.at_end) == ("a", 1, False)
