"""What goes over the sockets of the tcp transport."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from computemesh.peer.tcp.views import advance, upto
from computemesh.peer.tcp.wire import (
    ANNOUNCED,
    EAGER_MAX,
    FINISH,
    FRAME,
    HELLO_BYTES,
    IMM,
    LANES_MAX,
    LENGTH_MAX,
    MESSAGE,
    PIECE,
    PIECES_MAX,
    PING,
    PULL,
    QUESTION,
    READ,
    WITH_IMM,
    WRITE,
    Malformed,
    check_piece,
    check_question,
    cut,
    link_digest,
    pack_hello,
    parse_hello,
    prove,
    proven,
)
from computemesh.peer.transport import LocalRegion

KEY = secrets.token_bytes(32)
NONCE = bytes(range(32))


def region(*, length: int = 100, epoch: int = 7, writable: bool = True, live: bool = True) -> LocalRegion:
    return LocalRegion(
        name="kv", handle=1, epoch=epoch, address=0, length=length, writable=writable, view=None, live=live
    )


def test_the_sizes_are_those_of_the_page() -> None:
    """Two releases that differ here would not understand each other; then VERSION must differ as well."""
    assert (QUESTION.size, PIECE.size, FRAME.size, HELLO_BYTES) == (24, 32, 16, 104)
    assert QUESTION.pack(2, 1, 3, 4, 5, 6) == bytes.fromhex("02010300040000000500000000000000" + "0600000000000000")
    assert FRAME.pack(1, 1, 2, 3) == bytes.fromhex("01000100020000000300000000000000")


def test_a_hello_says_which_lane_of_which_link_the_socket_is_to_be() -> None:
    hello = parse_hello(pack_hello("l-1", KEY, 3, dialler_asks=False, nonce=NONCE))
    assert hello is not None
    assert (hello.link, hello.lane, hello.dialler_asks) == (link_digest("l-1"), 3, False)
    assert proven(KEY, hello.proof, 1, hello.body)
    assert not proven(secrets.token_bytes(32), hello.proof, 1, hello.body)


@pytest.mark.parametrize("at", range(HELLO_BYTES))
def test_a_hello_with_any_byte_changed_proves_nothing(at: int) -> None:
    raw = bytearray(pack_hello("l-1", KEY, 0, dialler_asks=True, nonce=NONCE))
    raw[at] ^= 1
    hello = parse_hello(bytes(raw))
    assert hello is None or hello.link != link_digest("l-1") or not proven(KEY, hello.proof, 1, hello.body)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, ord("X")), (4, 2), (5, 1), (6, LANES_MAX), (7, 2)],
    ids=["magic", "version", "high", "lane", "asker"],
)
def test_a_hello_of_something_else_is_none(at: int, value: int) -> None:
    raw = bytearray(pack_hello("l-1", KEY, 0, dialler_asks=True, nonce=NONCE))
    raw[at] = value
    assert parse_hello(bytes(raw)) is None


def test_a_proof_is_of_one_step_only() -> None:
    """What one side said cannot be said back to it."""
    assert len({prove(KEY, number, b"x") for number in (1, 2, 3)}) == 3


@pytest.mark.parametrize(
    ("kind", "flags", "pieces", "length"),
    [
        (READ, 0, 1, 0),
        (READ, 0, PIECES_MAX, 0),
        (WRITE, 0, 1, 0),
        (WRITE, WITH_IMM, PIECES_MAX, LENGTH_MAX),
        (MESSAGE, 0, 0, 0),
        (MESSAGE, 0, 0, EAGER_MAX),
        (MESSAGE, ANNOUNCED, 0, EAGER_MAX + 1),
        (PULL, 0, 1, 0),
        (FINISH, 0, 0, 9),
        (IMM, 0, 0, 0),
        (PING, 0, 0, 0),
    ],
)
def test_what_peers_ask_is_taken(kind: int, flags: int, pieces: int, length: int) -> None:
    check_question(kind, flags, pieces, 5, length, 5)
    with pytest.raises(Malformed):
        check_question(kind, flags, pieces, 6, length, 5)


@pytest.mark.parametrize(
    ("kind", "flags", "pieces", "length"),
    [
        (0, 0, 0, 0),
        (8, 0, 0, 0),
        (READ, WITH_IMM, 1, 0),
        (READ, 0, 0, 0),
        (READ, 0, PIECES_MAX + 1, 0),
        (READ, 0, 1, 1),
        (WRITE, ANNOUNCED, 1, 1),
        (WRITE, 0, 0, 1),
        (WRITE, 0, PIECES_MAX + 1, 1),
        (WRITE, 0, 1, LENGTH_MAX + 1),
        (MESSAGE, WITH_IMM, 0, 1),
        (MESSAGE, 0, 1, 1),
        (MESSAGE, 0, 0, EAGER_MAX + 1),
        (MESSAGE, ANNOUNCED, 0, LENGTH_MAX + 1),
        (PULL, 1, 1, 0),
        (PULL, 0, 2, 0),
        (PULL, 0, 1, 1),
        (FINISH, 1, 0, 0),
        (FINISH, 0, 1, 0),
        (IMM, 1, 0, 0),
        (IMM, 0, 0, 1),
        (PING, 0, 1, 0),
    ],
)
def test_what_no_peer_asks_ends_the_connection(kind: int, flags: int, pieces: int, length: int) -> None:
    with pytest.raises(Malformed):
        check_question(kind, flags, pieces, 1, length, 1)


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (0, 100, ""),
        (100, 0, ""),
        (99, 1, ""),
        (0, 101, "out_of_range"),
        (100, 1, "out_of_range"),
        (101, 0, "out_of_range"),
        (2**64 - 1, 1, "out_of_range"),
        (1, 2**64 - 1, "out_of_range"),
    ],
)
def test_a_request_stays_within_its_region(offset: int, length: int, code: str) -> None:
    assert check_piece(region(), 7, offset, length, write=True) == code
    assert check_piece(region(), 7, offset, length, write=False) == code


def test_a_region_is_reached_as_it_is_registered_now() -> None:
    assert check_piece(region(), 6, 0, 1, write=False) == "stale_epoch"
    assert check_piece(region(), 8, 0, 1, write=False) == "stale_epoch"
    assert check_piece(region(live=False), 7, 0, 1, write=False) == "stale_epoch"
    assert check_piece(region(writable=False), 7, 0, 1, write=True) == "read_only"
    assert check_piece(region(writable=False), 7, 0, 1, write=False) == ""


def test_a_region_that_was_there_is_stale_and_one_that_never_was_is_none() -> None:
    assert check_piece(None, 3, 0, 1, write=False, latest_epoch=3) == "stale_epoch"
    assert check_piece(None, 4, 0, 1, write=False, latest_epoch=3) == "no_region"
    assert check_piece(None, 0, 0, 1, write=False, latest_epoch=3) == "no_region"


@given(lengths=st.lists(st.integers(0, 40), max_size=8), parts=st.integers(1, 6))
@example(lengths=[1, 0], parts=1)
def test_parts_have_every_byte_once_and_are_of_about_one_size(lengths: list[int], parts: int) -> None:
    dealt = cut(list(enumerate(lengths)), parts)
    assert 1 <= len(dealt) <= parts
    assert [(i, o + n) for part in dealt for i, o, size in part for n in range(size)] == [
        (index, at) for index, length in enumerate(lengths) for at in range(length)
    ]
    # What is empty is asked for as well: it has bounds that are checked.
    assert {index for part in dealt for index, _, _ in part} == set(range(len(lengths)))
    share = -(-sum(lengths) // parts)
    assert all(sum(size for _, _, size in part) == max(share, 1) for part in dealt[:-1])


@given(sizes=st.lists(st.integers(1, 9), max_size=6), data=st.data())
def test_views_are_cut_at_any_byte(sizes: list[int], data: st.DataObject) -> None:
    whole = bytes(range(sum(sizes)))
    views: list[memoryview] = []
    for size in sizes:
        done = sum(len(view) for view in views)
        views.append(memoryview(whole)[done : done + size])
    at = data.draw(st.integers(0, len(whole)))
    assert b"".join(upto(views, at)) == whole[:at]
    views.reverse()
    advance(views, at)
    assert b"".join(reversed(views)) == whole[at:]
