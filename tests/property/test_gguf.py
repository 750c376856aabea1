"""Goal: whatever bytes a file has, its head is understood or refused, quickly and with a reason.

Method: bytes at random; good heads that end anywhere; good heads with bytes changed.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh import gguf
from computemesh.gguf import GgufError, HeadCut
from computemesh.testing.ggufs import a_gguf

GOOD = a_gguf()
HEAD_BYTES = len(a_gguf(tensors=[])) + 8 + 1 + 4 + 16 + 4 + 8


def looked_at(data: bytes) -> None:
    """All that is told of a file can be asked of whatever was understood."""
    try:
        found = gguf.parse(data)
    except GgufError:
        return
    assert found.parameters >= 0
    for name in dir(found):
        getattr(found, name)


@given(st.binary(max_size=400))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    looked_at(data)
    looked_at(b"GGUF\x03\x00\x00\x00" + data)


@given(st.integers(0, HEAD_BYTES - 1))
def test_a_head_that_ends_anywhere_is_known_to_go_on(length: int) -> None:
    """Whoever reads a file part by part must tell "not yet" from "never"."""
    with pytest.raises(HeadCut):
        gguf.parse(GOOD[:length])


def test_the_head_ends_where_the_last_tensor_is_described() -> None:
    assert gguf.parse(GOOD[:HEAD_BYTES]).tensors == 1


@given(st.lists(st.tuples(st.integers(0, HEAD_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_head_with_changed_bytes_is_understood_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    looked_at(bytes(data))
