"""The tcp transport between two ends: every order, every refusal, messages and numbers."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest

from computemesh.peer.tcp import TcpEndpoint
from computemesh.peer.tcp.asker import TRUSTED, Asker
from computemesh.peer.tcp.link import SMALL_MAX
from computemesh.peer.tcp.mail import SENDS_MAX, STORED_MAX
from computemesh.peer.tcp.wire import EAGER_MAX, FRAME_MAX, PIECES_MAX
from computemesh.peer.transport import DONE, Copy, Outcome, RemoteRegion
from tests.unit.tcp_peers import (
    MIB,
    PATIENCE_S,
    Pair,
    Settled,
    bytes_of,
    exposed,
    held,
    move,
    not_reading,
    region,
    seen,
    until,
)

# --- orders


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize(
    "size", [0, 1, 4096, 16384, 65536, SMALL_MAX, SMALL_MAX + 1, FRAME_MAX, FRAME_MAX + 1, 9 * MIB]
)
def test_what_is_read_and_written_is_what_was_there(
    endpoints: Callable[..., TcpEndpoint], lanes: int, size: int
) -> None:
    pair = Pair(endpoints(lanes=lanes), endpoints(lanes=lanes), size + 64)
    before = bytes_of(pair.mine)
    assert move(pair.link, "read", Copy(pair.mine, 3, pair.remote, 5, size)) == DONE
    assert bytes_of(pair.mine) == before[:3] + bytes_of(pair.theirs)[5 : 5 + size] + before[3 + size :]
    sent = bytes_of(pair.theirs)
    assert move(pair.link, "write", Copy(pair.mine, 3, pair.remote, 60, size)) == DONE
    assert bytes_of(pair.theirs) == sent[:60] + sent[5 : 5 + size] + sent[60 + size :]


def test_either_side_orders(pair: Pair) -> None:
    assert pair.theirs.view is not None
    remote = exposed(pair.a, pair.mine)
    assert move(pair.back, "write", Copy(pair.theirs, 0, remote, 0, 100)) == DONE
    assert bytes_of(pair.mine)[:100] == bytes_of(pair.theirs)[:100]
    assert move(pair.back, "read", Copy(pair.theirs, 0, remote, 200, 100)) == DONE
    assert bytes_of(pair.theirs)[:100] == bytes(100)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_any_number_of_ranges_is_one_order(pair: Pair, kind: Literal["read", "write"]) -> None:
    """More than fit into a question, small and large, some of them empty, in no order."""
    rng = random.Random(1)
    sizes = [rng.choice([0, 1, 7, 100, 3000]) for _ in range(3 * PIECES_MAX + 5)] + [40_000, 90_000]
    rng.shuffle(sizes)
    places = [sum(sizes[:index]) for index in range(len(sizes))]
    copies = [
        Copy(pair.mine, place, pair.remote, len(bytes_of(pair.mine)) - place - size, size)
        for place, size in zip(places, sizes, strict=True)
    ]
    rng.shuffle(copies)
    assert pair.mine.view is not None
    pair.mine.view[:] = secrets.token_bytes(len(pair.mine.view))
    assert move(pair.link, kind, *copies) == DONE
    mine, theirs = bytes_of(pair.mine), bytes_of(pair.theirs)
    for copy in copies:
        here = mine[copy.local_offset :][: copy.length]
        assert here == theirs[copy.remote_offset :][: copy.length]


def test_an_order_of_nothing_is_done(pair: Pair) -> None:
    assert move(pair.link, "read") == DONE
    assert move(pair.link, "write") == DONE


@pytest.mark.parametrize("drive", [True, False])
def test_many_orders_are_under_way_at_once(pair: Pair, drive: bool) -> None:
    """From several threads, some of which wait themselves for the answer, over the same sockets."""
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        own = region(bytearray(300_000))
        assert own.view is not None
        try:
            for _ in range(60):
                size = rng.choice([10, 5000, 70_000, 300_000])
                at = rng.randrange(pair.theirs.length - size)
                settled = Settled()
                driven = pair.link.order("read", [Copy(own, 0, pair.remote, at, size)], settled)
                if drive and driven is not None and rng.random() < 0.7:
                    driven(rng.choice([None, 0.001, 5]))
                assert settled.wait() == DONE
                assert bytes(own.view[:size]) == bytes_of(pair.theirs)[at : at + size]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


def test_large_writes_of_both_sides_do_not_wait_for_each_other(pair: Pair) -> None:
    """Each has more to send than the sockets hold, and nobody has to wait for what it sends itself."""
    remote = exposed(pair.a, pair.mine)
    ours, theirs = Settled(), Settled()
    pair.link.order("write", [Copy(pair.mine, 0, pair.remote, 0, 4 * MIB)] * 8, ours)
    pair.back.order("write", [Copy(pair.theirs, 0, remote, 0, 4 * MIB)] * 8, theirs)
    assert (ours.wait(), theirs.wait()) == (DONE, DONE)


def test_a_drive_ends_when_the_time_is_over(endpoints: Callable[..., TcpEndpoint]) -> None:
    pair = Pair(endpoints(), endpoints())
    settled = Settled()
    # A message that nobody takes has an answer at once, but a large order of a peer that is busy has none yet.
    with held(pair.back):
        drive = pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, 10)], settled)
        assert drive is not None
        begun = time.monotonic()
        drive(0.05)
        assert settled.outcome is None
        assert time.monotonic() - begun >= 0.04
    drive(None)
    assert settled.wait() == DONE


# --- refusals


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("size", [16, 100_000, 2 * MIB])
def test_a_range_beyond_the_region_is_refused_and_counted(
    pair: Pair, kind: Literal["read", "write"], size: int
) -> None:
    mine, theirs = bytes_of(pair.mine), bytes_of(pair.theirs)
    good = Copy(pair.mine, 0, pair.remote, 0, 1)
    bad = Copy(pair.mine, 1, pair.remote, pair.remote.length - size + 1, size)
    assert move(pair.link, kind, good, bad).code == "out_of_range"
    assert pair.b.stats()["refused_out_of_range"] == 1
    assert (bytes_of(pair.mine), bytes_of(pair.theirs)) == (mine, theirs), "nothing moves when one range is refused"
    assert move(pair.link, kind, good) == DONE, "the link goes on"


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_region_that_was_registered_again_or_is_gone_is_stale(pair: Pair, kind: Literal["read", "write"]) -> None:
    copy = Copy(pair.mine, 0, pair.remote, 0, 10)
    again = region(bytearray(10), handle=2, epoch=2)
    pair.b.expose(again)
    assert move(pair.link, kind, copy).code == "stale_epoch"
    pair.b.conceal(pair.theirs)
    assert move(pair.link, kind, copy).code == "stale_epoch"
    now = RemoteRegion(name="r2", epoch=2, length=10, writable=True, token={"handle": 2})
    assert move(pair.link, kind, Copy(pair.mine, 0, now, 0, 10)) == DONE, "concealing the old one left the new one"
    pair.b.conceal(again)
    assert move(pair.link, kind, Copy(pair.mine, 0, now, 0, 10)).code == "stale_epoch"
    assert pair.b.stats()["refused_stale_epoch"] == 3


def test_a_region_that_is_no_longer_live_is_stale(pair: Pair) -> None:
    pair.theirs.live = False
    assert move(pair.link, "read", Copy(pair.mine, 0, pair.remote, 0, 1)).code == "stale_epoch"


def test_a_region_that_never_was_is_none(pair: Pair) -> None:
    guessed = RemoteRegion(name="x", epoch=99, length=10, writable=True, token={"handle": 77})
    assert move(pair.link, "read", Copy(pair.mine, 0, guessed, 0, 1)).code == "no_region"
    assert pair.b.stats()["refused_no_region"] == 1


@pytest.mark.parametrize("token", [{}, {"handle": "1"}, {"handle": None}, {"handle": -1}, {"handle": 2**64}])
@pytest.mark.parametrize("count", [1, 2])
def test_a_region_of_which_the_peer_tells_nonsense_is_none(pair: Pair, token: dict[str, Any], count: int) -> None:
    copies = [Copy(pair.mine, 0, seen(pair.theirs, token), 0, 4)] * count
    assert move(pair.link, "read", *copies).code == "no_region"
    assert move(pair.link, "read", Copy(pair.mine, 0, pair.remote, 0, 4)) == DONE


def test_a_region_for_reading_is_not_written(pair: Pair) -> None:
    readable = exposed(pair.b, region(bytearray(b"x" * 10), handle=3, epoch=3, writable=False))
    assert move(pair.link, "write", Copy(pair.mine, 0, readable, 0, 10)).code == "read_only"
    assert move(pair.link, "read", Copy(pair.mine, 0, readable, 0, 10)) == DONE
    assert bytes_of(pair.mine)[:10] == b"x" * 10


def test_what_this_side_cannot_do_is_not_asked(pair: Pair) -> None:
    beyond = Copy(pair.mine, pair.mine.length - 1, pair.remote, 0, 2)
    assert move(pair.link, "read", beyond).code == "out_of_range"
    negative = Copy(pair.mine, -1, pair.remote, 0, 1)
    assert move(pair.link, "write", negative).code == "out_of_range"
    fixed = region(memoryview(b"constant"))
    assert move(pair.link, "read", Copy(fixed, 0, pair.remote, 0, 8)).code == "read_only"
    assert move(pair.link, "write", Copy(fixed, 0, pair.remote, 0, 8)) == DONE
    assert bytes_of(pair.theirs)[:8] == b"constant"
    elsewhere = region(bytearray(8))
    elsewhere.view = None
    assert move(pair.link, "read", Copy(elsewhere, 0, pair.remote, 0, 8)).code == "no_region"
    assert pair.b.stats().keys() == {"links"}


def test_memory_that_the_processor_cannot_read_is_not_exposed() -> None:
    there = region(bytearray(8))
    there.view = None
    assert TcpEndpoint().expose(there) is None


# --- concealing


@pytest.mark.parametrize("kind", ["read", "write"])
def test_nothing_touches_a_region_once_it_is_concealed(pair: Pair, kind: Literal["read", "write"]) -> None:
    """Also not the rest of what is under way, and also when the peer has stopped in the middle of it."""
    buffer = bytearray(4 * MIB)
    mine = region(buffer, handle=9, epoch=9)
    remote = exposed(pair.a, mine)
    settled = Settled()
    pair.back.order(kind, [Copy(pair.theirs, 0, remote, 0, 4 * MIB)] * 100, settled)
    until(lambda: any(lane.progress > 20 for lane in pair.link._answerers))
    with not_reading(pair.back):
        until(lambda: any(lane.busy for lane in pair.link._answerers))
        pair.a.conceal(mine)
        assert settled.outcome is None
        mine.view = None
        buffer.clear()  # an error while anything still has a view of it
    assert settled.wait().code == "stale_epoch"
    assert move(pair.back, "read", Copy(pair.theirs, 0, exposed(pair.a, pair.mine), 0, 100)) == DONE


def test_a_region_may_go_between_any_two_frames(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane lets others go on after each of them, and what was begun is ended in good order."""
    monkeypatch.setattr("computemesh.peer.tcp.answerer.TURN", 1)
    for epoch in range(2, 42):
        mine = region(bytearray(4 * MIB), handle=9, epoch=epoch)
        remote = exposed(pair.a, mine)
        settled = Settled()
        before = sum(lane.progress for lane in pair.link._answerers)
        pair.back.order("read", [Copy(pair.theirs, 0, remote, 0, 4 * MIB)] * 50, settled)
        while sum(lane.progress for lane in pair.link._answerers) < before + epoch:
            pass
        pair.a.conceal(mine)
        assert settled.wait().code == "stale_epoch"


def test_concealing_one_region_does_not_end_orders_on_another(pair: Pair) -> None:
    other = region(bytearray(10), handle=5, epoch=5)
    pair.b.expose(other)
    settled = Settled()
    pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, 4 * MIB)] * 4, settled)
    pair.b.conceal(other)
    assert settled.wait() == DONE


# --- messages and numbers


@pytest.mark.parametrize("size", [0, 1, 4096, EAGER_MAX, EAGER_MAX + 1, 5 * MIB])
@pytest.mark.parametrize("early", [True, False])
def test_a_message_comes_whole_before_or_after_it_is_asked_for(pair: Pair, size: int, early: bool) -> None:
    data = secrets.token_bytes(size)
    into = bytearray(size + 3)
    sent, received = Settled(), Settled()
    if early:
        pair.back.recv(memoryview(into), received)
    drive = pair.link.send(memoryview(data), sent)
    if drive is not None:
        drive(None)
    if not early:
        if size <= EAGER_MAX:
            assert sent.wait() == DONE, "a small one is stored"
        else:
            assert sent.outcome is None, "a large one waits"
        pair.back.recv(memoryview(into), received)
    assert received.wait() == Outcome(received=size)
    assert sent.wait() == DONE
    assert into == data + bytes(3)


def test_messages_come_in_the_order_in_which_they_were_sent(pair: Pair) -> None:
    sizes = [0, 5, EAGER_MAX + 7, 100, 3 * MIB, 1, EAGER_MAX, 2] * 3
    sent = [Settled() for _ in sizes]
    for index, (size, settled) in enumerate(zip(sizes, sent, strict=True)):
        pair.link.send(memoryview(bytes([index]) * size), settled)
    for index, size in enumerate(sizes):
        into = bytearray(3 * MIB)
        received = Settled()
        pair.back.recv(memoryview(into), received)
        assert received.wait() == Outcome(received=size)
        assert into[:size] == bytes([index]) * size
    assert all(settled.wait() == DONE for settled in sent)


def test_messages_that_come_at_once_each_find_their_recv(pair: Pair) -> None:
    """The second one begins to come before anybody was told of the first one."""
    received = [Settled() for _ in range(3)]
    buffers = [bytearray(10) for _ in received]
    for into, settled in zip(buffers, received, strict=True):
        pair.back.recv(memoryview(into), settled)
    with held(pair.back):
        for index in range(3):
            pair.link.send(memoryview(bytes([index]) * (index + 1)), Settled())
    assert [settled.wait().received for settled in received] == [1, 2, 3]
    assert [bytes(into[: index + 1]) for index, into in enumerate(buffers)] == [b"\0", b"\1\1", b"\2\2\2"]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("size", [100, EAGER_MAX + 1])
def test_a_message_that_does_not_fit_is_left_out(pair: Pair, size: int, early: bool) -> None:
    into = bytearray(10)
    sent, received, after = Settled(), Settled(), Settled()
    if early:
        pair.back.recv(memoryview(into), received)
    pair.link.send(memoryview(bytes(b"x" * size)), sent)
    if not early:
        if size <= EAGER_MAX:
            assert sent.wait() == DONE, "it had been stored"
        pair.back.recv(memoryview(into), received)
    assert received.wait().code == "too_large"
    if early or size > EAGER_MAX:
        assert sent.wait().code == "too_large"
    assert into == bytes(10)
    pair.link.send(memoryview(b"fits"), Settled())
    pair.back.recv(memoryview(into), after)
    assert after.wait() == Outcome(received=4)


def test_messages_that_nobody_takes_have_bounded_room(pair: Pair) -> None:
    """What is beyond stays with who sends it, and comes in its turn."""
    count = 3 * STORED_MAX // EAGER_MAX + SENDS_MAX
    sent = [Settled() for _ in range(count)]
    for index, settled in enumerate(sent):
        pair.link.send(memoryview(index.to_bytes(8, "little") * (EAGER_MAX // 8)), settled)
    until(lambda: len(pair.link.mail._sends) == SENDS_MAX)
    until(lambda: not pair.link._askers[0].busy)
    assert pair.back.mail._stored <= STORED_MAX
    assert len(pair.back.mail._arrived) <= SENDS_MAX + STORED_MAX // EAGER_MAX
    into = bytearray(EAGER_MAX)
    for index in range(count):
        received = Settled()
        pair.back.recv(memoryview(into), received)
        assert received.wait() == Outcome(received=EAGER_MAX)
        assert into == index.to_bytes(8, "little") * (EAGER_MAX // 8)
    assert all(settled.wait() == DONE for settled in sent)
    assert pair.back.mail._stored == 0


def test_a_large_message_that_waits_holds_up_nothing(pair: Pair) -> None:
    sent = Settled()
    pair.link.send(memoryview(bytes(5 * MIB)), sent)
    assert move(pair.link, "read", Copy(pair.mine, 0, pair.remote, 0, 4 * MIB)) == DONE
    assert sent.outcome is None


@pytest.mark.parametrize("size", [0, 10, 3 * MIB, 9 * MIB])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_number_comes_after_the_bytes_it_came_with(
    endpoints: Callable[..., TcpEndpoint], size: int, lanes: int
) -> None:
    pair = Pair(endpoints(lanes=lanes), endpoints(lanes=lanes), 9 * MIB)
    assert pair.mine.view is not None
    for turn in range(1, 4):
        pair.mine.view[:] = bytes([turn]) * pair.mine.length
        seen: list[bytes] = []
        arrived = Settled()

        def look(outcome: Outcome, seen: list[bytes] = seen, arrived: Settled = arrived) -> None:
            seen.append(bytes_of(pair.theirs)[:size])
            arrived(outcome)

        if turn > 1:
            pair.back.recv_imm(look)
        assert move(pair.link, "write", Copy(pair.mine, 0, pair.remote, 0, size), imm=2**32 - turn) == DONE
        if turn == 1:
            pair.back.recv_imm(look)
        assert arrived.wait() == Outcome(imm=2**32 - turn)
        assert seen == [bytes([turn]) * size]


def test_a_write_that_is_refused_brings_no_number(pair: Pair) -> None:
    arrived = Settled()
    pair.back.recv_imm(arrived)
    beyond = Copy(pair.mine, 0, pair.remote, pair.remote.length, 1)
    assert move(pair.link, "write", beyond, imm=1).code == "out_of_range"
    assert move(pair.link, "write", imm=2) == DONE, "a number without bytes"
    assert arrived.wait() == Outcome(imm=2)


def test_numbers_that_nobody_takes_have_bounded_room(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computemesh.peer.immediates.KEPT_MAX", 3)
    copy = Copy(pair.mine, 0, pair.remote, 0, 1)
    for number in range(3):
        assert move(pair.link, "write", copy, imm=number) == DONE
    assert move(pair.link, "write", copy, imm=3).code == "no_room"
    for number in range(3):
        arrived = Settled()
        pair.back.recv_imm(arrived)
        assert arrived.wait() == Outcome(imm=number)
    assert move(pair.link, "write", copy, imm=4) == DONE


def test_who_answers_and_goes_has_answered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is seen on one socket before what came over the other one has been read."""
    sent, received = Settled(), Settled()
    asker, ends = pair.link._askers[0], threading.Event()

    def dispose() -> None:
        ends.set()
        Asker.dispose(asker)

    monkeypatch.setattr(asker, "dispose", dispose)
    with asker._receiving:
        pair.back.recv(memoryview(bytearray(4)), received)
        pair.link.send(memoryview(b"last"), sent)
        assert received.wait() == Outcome(received=4)
        pair.back.close()
        assert ends.wait(PATIENCE_S)
    assert sent.wait() == DONE


def test_a_callback_may_do_what_it_likes(pair: Pair) -> None:
    """Order again, unregister, close: from within `done`, on whichever thread that is."""
    ended = Settled()

    def third(outcome: Outcome) -> None:
        assert outcome == Outcome(imm=5)
        pair.b.conceal(pair.theirs)
        pair.back.close()
        ended(DONE)

    def second(outcome: Outcome) -> None:
        assert outcome == DONE
        pair.back.recv_imm(third)
        pair.link.order("write", [Copy(pair.mine, 0, pair.remote, 0, 9)], lambda _: None, imm=5)

    pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, 9)], second)
    assert ended.wait() == DONE


def test_a_thread_that_always_waits_keeps_the_reactor_out_of_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some reads in a row nobody tells epoll of each one any more."""
    told: list[int] = []

    def modify(_: int, events: int) -> None:
        told.append(events)

    for lane in pair.link._askers:
        monkeypatch.setattr(lane.reactor, "modify", modify)
    copy = Copy(pair.mine, 0, pair.remote, 0, 4096)
    for _ in range(TRUSTED):
        assert move(pair.link, "read", copy) == DONE
    del told[:]
    for _ in range(100):
        assert move(pair.link, "read", copy) == DONE
    assert len(told) < 100, "of 200 without that"
    assert bytes_of(pair.mine)[:4096] == bytes_of(pair.theirs)[:4096]


@pytest.mark.parametrize("size", [1, 4096, 20_000])
def test_an_answer_that_nobody_waits_for_comes_also_after_many_that_were_waited_for(pair: Pair, size: int) -> None:
    copy = Copy(pair.mine, 0, pair.remote, 0, size)
    for _ in range(3):
        for _ in range(TRUSTED + 1):
            assert move(pair.link, "read", copy) == DONE
        orders = [Settled() for _ in range(5)]
        for order in orders:
            pair.link.order("read", [copy], order)
        assert [order.wait() for order in orders] == [DONE] * 5


def test_the_reactor_stops_glancing_where_nothing_is_asked_any_more(pair: Pair) -> None:
    copy = Copy(pair.mine, 0, pair.remote, 0, 1)
    lane = pair.link._askers[0]
    while lane._waited < TRUSTED:
        assert move(pair.link, "read", copy) == DONE
    until(lambda: not lane._waited and not lane.reactor._glances)
    assert move(pair.link, "read", copy) == DONE


def test_an_answer_that_the_socket_takes_in_parts_comes_whole(pair: Pair) -> None:
    size = SMALL_MAX
    answerer, asker = pair.back._answerers[0], pair.link._askers[0]
    answerer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    order = Settled()
    with asker._receiving:
        pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, size)], order)
        until(lambda: answerer.busy and answerer._out)
    assert order.wait() == DONE
    assert bytes_of(pair.mine)[:size] == bytes_of(pair.theirs)[:size]
    assert move(pair.link, "read", Copy(pair.mine, size, pair.remote, size, 1)) == DONE
