"""What the ends of an RDMA link may send, so that a buffer is always laid out for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from computemesh.peer.rdma.notes import BUFFERS, HEAD, KEPT, WINDOW, Flow, Kind, Note

KINDS = [Kind.MESSAGE, Kind.LARGE, Kind.TOOK, Kind.REVOKE, None]


@given(
    st.builds(
        Note,
        st.sampled_from(Kind),
        flag=st.integers(0, 2),
        credits=st.integers(0, BUFFERS),
        taken=st.integers(0, WINDOW),
        number=st.integers(0, 2**32 - 1),
        key=st.integers(0, 2**32 - 1),
        length=st.integers(0, 2**64 - 1),
        address=st.integers(0, 2**64 - 1),
    ).filter(lambda note: note.kind is not Kind.LARGE or 0 < note.length < 2**64 - note.address)
)
def test_a_note_is_read_as_it_was_written(note: Note) -> None:
    assert Note.read(note.pack()) == note
    assert Note.read(note.pack() + b"content") == note


@pytest.mark.parametrize("data", [b"", bytes(HEAD.size - 1), bytes(HEAD.size), b"\xff" * HEAD.size])
def test_what_is_no_note_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Note.read(data)


@pytest.mark.parametrize(("length", "address"), [(0, 4096), (1, 2**64 - 1), (2**64 - 1, 1)])
def test_a_long_message_that_no_memory_holds_is_refused(length: int, address: int) -> None:
    """One of no bytes would never be done, since nothing of it is fetched."""
    with pytest.raises(ValueError, match="which no memory holds"):
        Note.read(Note(Kind.LARGE, length=length, address=address).pack())


def test_a_peer_that_gives_more_than_there_is_is_not_believed() -> None:
    flow = Flow()
    assert flow.may_send(Kind.MESSAGE)
    flow.sends(Kind.MESSAGE)
    assert flow.hears(Note(Kind.CREDITS, credits=1, taken=1))
    assert not flow.hears(Note(Kind.CREDITS, credits=1))
    assert not Flow().hears(Note(Kind.CREDITS, taken=1))


def test_programs_notes_and_credits_each_have_buffers_that_the_former_cannot_use() -> None:
    flow = Flow()
    for kind, left in ((Kind.MESSAGE, KEPT), (Kind.REVOKE, 1), (Kind.CREDITS, 0)):
        while flow.may_send(kind):
            flow.sends(kind)
        assert flow.credits == left
    flow = Flow()
    while flow.may_send(None):
        flow.sends(None)
    assert flow.credits == KEPT


def test_a_peer_keeps_so_many_messages_and_no_more() -> None:
    flow = Flow()
    sent = 0
    while flow.may_send(Kind.MESSAGE):
        flow.sends(Kind.MESSAGE)
        assert flow.hears(Note(Kind.CREDITS, credits=1))  # read at once, but no program takes it
        sent += 1
    assert sent == WINDOW
    assert flow.may_send(Kind.REVOKE)
    assert flow.hears(Note(Kind.CREDITS, taken=1))
    assert flow.may_send(Kind.LARGE)


def test_a_peer_that_waits_for_messages_to_be_taken_is_told() -> None:
    """All of them may have been read, and their buffers told of, before the program takes the first."""
    flow = Flow(taken=WINDOW // 2)
    assert flow.owed == 0
    assert flow.must_tell()
    flow.sends(Kind.CREDITS)
    assert not flow.must_tell()


class End:
    """One end of a link: what it wants to send, what is under way to its peer, and what its program has not taken."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.wanted: deque[Kind | None] = deque()
        self.under_way: deque[Note | None] = deque()
        self.kept = 0

    def send(self) -> bool:
        kind: Kind | None
        if self.flow.must_tell() and self.flow.may_send(Kind.CREDITS):
            kind = Kind.CREDITS
        elif self.wanted and self.flow.may_send(self.wanted[0]):
            kind = self.wanted.popleft()
        else:
            return False
        owed, taken = self.flow.sends(kind)
        self.under_way.append(None if kind is None else Note(kind, credits=owed, taken=taken))
        return True

    def hear(self, note: Note | None) -> None:
        self.flow.owed += 1
        if note is not None:
            assert self.flow.hears(note)
            self.kept += note.kind in (Kind.MESSAGE, Kind.LARGE)
        assert self.kept <= WINDOW

    def take(self) -> None:
        self.flow.taken += self.kept
        self.kept = 0


@given(
    st.lists(st.sampled_from(KINDS), max_size=150),
    st.lists(st.sampled_from(KINDS), max_size=150),
    st.randoms(use_true_random=False),
)
@example([Kind.MESSAGE] * 1000, [], Random(1))
@example([Kind.MESSAGE] * 1000, [None] * 1000, Random(2))
@example([Kind.LARGE] * 1000, [Kind.TOOK] * 1000, Random(3))
def test_two_ends_that_both_want_to_send_never_wait_for_each_other(
    ours: list[Kind | None], theirs: list[Kind | None], chance: Random
) -> None:
    a, b = End(), End()
    a.wanted.extend(ours)
    b.wanted.extend(theirs)
    while True:
        steps: list[Callable[[], object]] = []
        for mine, other in ((a, b), (b, a)):
            if mine.flow.must_tell() or mine.wanted:
                steps.append(mine.send)
            if mine.under_way:
                steps.append(lambda mine=mine, other=other: other.hear(mine.under_way.popleft()))  # type: ignore[misc]
            if mine.kept:
                steps.append(mine.take)
        chance.shuffle(steps)
        if not any(one() is not False for one in steps):
            break
        # What is under way lies in a buffer of the peer, which has so many and no more.
        assert max(len(a.under_way), len(b.under_way)) <= BUFFERS
    assert not a.wanted
    assert not b.wanted
