"""Names of connections, their states, and who goes on when two peers ask for each other at once."""

from __future__ import annotations

import itertools
import threading
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.ids import ENTITY_PATTERN
from computemesh.peer.connection import NEXT, ConnId, PeerConnection, State, on_incoming
from computemesh.peer.errors import LINK_LOST, PeerError

ALIASES = st.from_regex(ENTITY_PATTERN.removesuffix(r"(?!\n)"), fullmatch=True).map(lambda text: text.rstrip("\n"))
NICS = st.sampled_from(["shm", "tcp", "mlx5_0", "rxe-1"])
IDENTS = st.builds(ConnId, ALIASES, NICS, st.integers(1, 255), ALIASES, NICS, st.integers(1, 255), st.integers(1, 99))


@given(IDENTS)
def test_a_name_can_be_read_back_and_is_the_other_sides_turned_round(ident: ConnId) -> None:
    assert ConnId.parse(str(ident)) == ident
    assert ident.mirrored().mirrored() == ident
    assert (ident.mirrored().me, ident.mirrored().peer) == (ident.peer, ident.me)


@given(st.text(max_size=60))
def test_what_is_no_name_is_refused_as_such(text: str) -> None:
    said = ""
    try:
        assert str(ConnId.parse(text))
    except ValueError as error:
        said = str(error)
    assert said.startswith("conn_id: ") or not said


def test_a_name_is_written_as_dlslime_writes_it() -> None:
    assert str(ConnId("a", "mlx5_0", 1, "b", "mlx5_1", 2, 4)) == "a:mlx5_0:port1->b:mlx5_1:port2#qp4"


def connection() -> PeerConnection:
    return PeerConnection(ConnId("a", "shm", 1, "b", "shm", 1, 1), "l-1", "shm", "")


def path_to(state: State) -> PeerConnection:
    conn = connection()
    if state != "connecting":
        assert conn.move("connected" if state == "connected" else "failed", PeerError(LINK_LOST, "gone"))
    return conn


@pytest.mark.parametrize(("start", "to"), list(itertools.product(get_args(State), get_args(State))))
def test_only_the_moves_of_the_table_are_made_and_failed_is_for_ever(start: State, to: State) -> None:
    conn = path_to(start)
    assert conn.move(to, PeerError(LINK_LOST, "gone")) == (to in NEXT[start])
    assert conn.state == (to if to in NEXT[start] else start)
    assert not NEXT["failed"]


def test_who_waits_for_a_connection_is_woken_by_its_failure_and_told_why() -> None:
    conn = connection()
    threading.Timer(0.05, lambda: conn.move("failed", PeerError(LINK_LOST, "the peer has ended"))).start()
    with pytest.raises(PeerError, match="a:shm:port1->b:shm:port1#qp1: the peer has ended") as caught:
        conn.wait(None)
    assert caught.value.code == LINK_LOST
    assert not conn.is_connected()


def test_who_waits_too_short_hears_so_and_may_wait_again() -> None:
    conn = connection()
    with pytest.raises(TimeoutError, match="not connected after 0"):
        conn.wait(0.01)
    conn.move("connected")
    assert conn.wait(0) is conn


def test_of_two_peers_that_ask_for_each_other_at_once_exactly_one_goes_on() -> None:
    assert on_incoming("a", "b", "connecting", "asking") == "crossed"
    assert on_incoming("b", "a", "connecting", "asking") == "wait"
    assert on_incoming("b", "a", "connecting", "awaiting") == "take"


@pytest.mark.parametrize("peer", ["a", "c"])
def test_a_connection_of_which_the_peer_knows_no_longer_is_replaced(peer: str) -> None:
    assert on_incoming("b", peer, "connected", "answered") == "replace"
    assert on_incoming("b", peer, "connecting", "answered") == "replace"
    assert on_incoming("b", peer, "failed", "answered") == "take"
    assert on_incoming("b", peer, None, "answered") == "take"
