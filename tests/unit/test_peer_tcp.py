"""The tcp transport between two ends: every order, every refusal, and every way to end."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import gc
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

from computemesh.peer.tcp import TcpEndpoint, TcpLink
from computemesh.peer.tcp.endpoint import KNOCKS_MAX
from computemesh.peer.tcp.link import SENDS_MAX, SMALL_MAX, STORED_MAX
from computemesh.peer.tcp.wire import EAGER_MAX, FRAME_MAX, PIECES_MAX, READ, pack_hello
from computemesh.peer.transport import DONE, Copy, LocalRegion, Outcome, RemoteRegion, TransportError
from tests.unit.tcp_peers import KEY, PATIENCE_S, OtherProcess, Settled, connect, exposed, move, parties, region

MIB = 1024 * 1024


class Pair:
    """Two endpoints of one process, with a link, and a region of either."""

    def __init__(self, a: TcpEndpoint, b: TcpEndpoint, length: int = 4 * MIB) -> None:
        self.a, self.b = a, b
        self.link, self.back = connect(a, b)
        self.mine = region(bytearray(length), handle=1)
        self.theirs = region(bytearray(secrets.token_bytes(length)), handle=2)
        self.remote = exposed(b, self.theirs)

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(TcpEndpoint(), TcpEndpoint())
    yield pair
    pair.close()


@pytest.fixture
def endpoints() -> Iterator[Callable[..., TcpEndpoint]]:
    """Endpoints that are closed at the end."""
    made: list[TcpEndpoint] = []

    def make(host: str | None = None, *, lanes: int = 2, stall_s: float = 30) -> TcpEndpoint:
        made.append(TcpEndpoint(host, lanes=lanes, stall_s=stall_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


def bytes_of(region: LocalRegion) -> bytes:
    assert region.view is not None
    return bytes(region.view)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def loss_of(link: TcpLink) -> Settled:
    """Its reason is that for which the link is lost."""
    lost = Settled()

    def tell(reason: str) -> None:
        lost(Outcome(reason=reason))

    link.on_lost = tell
    return lost


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


@contextmanager
def held(link: TcpLink) -> Generator[None]:
    """Nothing is answered by this link meanwhile, as if its thread had no time."""
    with ExitStack() as locked:
        for lane in link._answerers:
            locked.enter_context(lane._lock)
        yield


@contextmanager
def not_reading(link: TcpLink) -> Generator[None]:
    """This link reads no answers meanwhile, and sends nothing more than the sockets took at once."""
    with ExitStack() as locked:
        for lane in link._askers:
            locked.enter_context(lane._receiving)
            locked.enter_context(lane._sending)
        yield


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
    pair.back.order(kind, [Copy(pair.theirs, 0, remote, 0, 4 * MIB)] * 1000, settled)
    until(lambda: any(lane.progress > 20 for lane in pair.link._answerers))
    with not_reading(pair.back):
        until(lambda: any(lane.busy for lane in pair.link._answerers))
        pair.a.conceal(mine)
        assert settled.outcome is None
        mine.view = None
        buffer.clear()  # an error while anything still has a view of it
    assert settled.wait().code == "stale_epoch"
    assert move(pair.back, "read", Copy(pair.theirs, 0, exposed(pair.a, pair.mine), 0, 100)) == DONE


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
    until(lambda: len(pair.link._sends) == SENDS_MAX)
    until(lambda: not pair.link._askers[0].busy)
    assert pair.back._stored <= STORED_MAX
    assert len(pair.back._arrived) <= SENDS_MAX + STORED_MAX // EAGER_MAX
    into = bytearray(EAGER_MAX)
    for index in range(count):
        received = Settled()
        pair.back.recv(memoryview(into), received)
        assert received.wait() == Outcome(received=EAGER_MAX)
        assert into == index.to_bytes(8, "little") * (EAGER_MAX // 8)
    assert all(settled.wait() == DONE for settled in sent)
    assert pair.back._stored == 0


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
    monkeypatch.setattr("computemesh.peer.tcp.link.IMMS_MAX", 3)
    copy = Copy(pair.mine, 0, pair.remote, 0, 1)
    for number in range(3):
        assert move(pair.link, "write", copy, imm=number) == DONE
    assert move(pair.link, "write", copy, imm=3).code == "no_room"
    for number in range(3):
        arrived = Settled()
        pair.back.recv_imm(arrived)
        assert arrived.wait() == Outcome(imm=number)
    assert move(pair.link, "write", copy, imm=4) == DONE


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


# --- making links


def test_the_side_with_an_address_is_dialled(endpoints: Callable[..., TcpEndpoint]) -> None:
    """Either is enough; the one that was asked is preferred."""
    ours, theirs = connect(endpoints(), endpoints("127.0.0.1"), same_host=False)
    assert (ours.detail.get("dialled"), theirs.detail.get("dialled")) == (True, None)
    ours, theirs = connect(endpoints("127.0.0.1"), endpoints(), same_host=False)
    assert (ours.detail.get("dialled"), theirs.detail.get("dialled")) == (None, True)
    ours, theirs = connect(endpoints("127.0.0.1"), endpoints("localhost"), same_host=False)
    assert (ours.detail.get("dialled"), theirs.detail.get("dialled")) == (True, None)


def test_two_machines_without_an_address_are_told_what_to_set(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    with pytest.raises(TransportError, match="COMPUTEMESH_PEER_HOST") as refused:
        b.accept(parties("b", "a", same_host=False), a.offer(parties(same_host=False)))
    assert refused.value.code == "no_way"
    a.abandon(parties())
    assert not a._links
    assert not b._links


def test_it_goes_over_ipv6(endpoints: Callable[..., TcpEndpoint]) -> None:
    pair = Pair(endpoints(), endpoints("::1"), 1000)
    assert str(pair.link.detail["remote"]).startswith("[::1]:")
    assert move(pair.link, "read", Copy(pair.mine, 0, pair.remote, 0, 1000)) == DONE
    assert bytes_of(pair.mine) == bytes_of(pair.theirs)


def test_the_address_may_be_that_of_one_connection(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    mine = parties(same_host=False)
    theirs, answer = b.accept(parties("b", "a", same_host=False, options={"local_host": "127.0.0.2"}), a.offer(mine))
    assert answer["address"][0] == "127.0.0.2"
    a.establish(mine, answer).ready(PATIENCE_S)
    theirs.ready(PATIENCE_S)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_peer_is_told_an_address_that_is_none(host: str) -> None:
    with pytest.raises(ValueError, match=f"COMPUTEMESH_PEER_HOST: {host}"):
        TcpEndpoint(host)


def test_an_address_of_another_machine_is_named(endpoints: Callable[..., TcpEndpoint]) -> None:
    with pytest.raises(TransportError, match=r"COMPUTEMESH_PEER_HOST: cannot listen on 192\.0\.2\.1") as refused:
        endpoints("192.0.2.1").offer(parties())
    assert refused.value.code == "no_way"


def test_it_listens_on_loopback_and_only_when_it_is_needed(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    offer = a.offer(parties())
    assert "address" not in offer
    _, answer = b.accept(parties("b", "a"), offer)
    assert answer["address"][0] == "127.0.0.1"
    _, again = b.accept(parties("b", "a", link="l-2"), offer)
    assert again["address"] == answer["address"], "one listener for all links"


@pytest.mark.parametrize(("mine", "theirs"), [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("back", [True, False])
def test_the_side_with_fewer_lanes_decides(
    endpoints: Callable[..., TcpEndpoint], mine: int, theirs: int, back: bool
) -> None:
    a = endpoints("127.0.0.1" if back else None, lanes=mine)
    b = endpoints(None if back else "127.0.0.1", lanes=theirs)
    ours, other = connect(a, b, same_host=False)
    assert ours.lanes == other.lanes == min(mine, theirs)
    source = region(bytearray(b"x" * 9 * MIB), handle=4)
    into = region(bytearray(9 * MIB))
    assert move(ours, "read", Copy(into, 0, exposed(b, source), 0, 9 * MIB)) == DONE
    assert bytes_of(into) == bytes_of(source)


@pytest.mark.parametrize(
    "said", [{}, {"version": 2, "lanes": 1}, {"version": 1}, {"version": 1, "lanes": 0}, {"version": 1, "lanes": "2"}]
)
def test_a_peer_that_speaks_otherwise_is_refused(
    endpoints: Callable[..., TcpEndpoint], said: dict[str, object]
) -> None:
    a = endpoints()
    with pytest.raises(TransportError) as refused:
        a.accept(parties(), said)
    assert refused.value.code == "no_way"
    a.offer(parties())
    with pytest.raises(TransportError) as refused:
        a.establish(parties(), said)
    assert refused.value.code == "no_way"
    assert not a._links


@pytest.mark.parametrize("address", [None, [], ["127.0.0.1"], ["127.0.0.1", "x"], 7])
def test_an_address_that_is_none_is_refused(endpoints: Callable[..., TcpEndpoint], address: object) -> None:
    a = endpoints()
    with pytest.raises(TransportError, match="address") as refused:
        a.accept(parties(same_host=False), {"version": 1, "lanes": 1, "address": address or [1]})
    assert refused.value.code == "no_way"


def test_a_peer_that_is_not_there_is_said_at_once(endpoints: Callable[..., TcpEndpoint]) -> None:
    a = endpoints()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = list(gone.getsockname())
    a.offer(parties())
    with pytest.raises(TransportError, match="cannot be reached") as refused:
        a.establish(parties(), {"version": 1, "lanes": 2, "address": address})
    assert refused.value.code == "no_way"
    assert not a._links


def test_a_peer_that_says_nothing_is_given_up_at_the_deadline(endpoints: Callable[..., TcpEndpoint]) -> None:
    a = endpoints()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mine = parties(timeout_s=0.2)
        a.offer(mine)
        with pytest.raises(TransportError, match="in time") as refused:
            a.establish(mine, {"version": 1, "lanes": 1, "address": list(silent.getsockname())})
    assert refused.value.code == "timed_out"


def test_a_link_whose_peer_never_dials_is_not_ready(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    link, _ = b.accept(parties("b", "a"), a.offer(parties()))
    with pytest.raises(TransportError) as refused:
        link.ready(0.05)
    assert refused.value.code == "timed_out"
    settled, message, number = Settled(), Settled(), Settled()
    link.order("read", [], settled)
    link.send(memoryview(b"x"), message)
    link.recv_imm(number)
    assert settled.wait().code == message.wait().code == "link_lost"
    link.close()
    assert number.wait().code == "cancelled"
    with pytest.raises(TransportError):
        link.ready(1)


def test_an_offer_that_was_abandoned_is_forgotten(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints("127.0.0.1"), endpoints()
    offer = a.offer(parties(same_host=False))
    a.abandon(parties())
    a.abandon(parties())
    with pytest.raises(TransportError) as refused:
        b.accept(parties("b", "a", same_host=False), offer)
    assert refused.value.code == "no_way"
    with pytest.raises(TransportError, match="abandoned"):
        a.establish(parties(), {"version": 1, "lanes": 1})


# --- strangers


def test_who_has_another_key_gets_no_link(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    wrong = parties(key=secrets.token_bytes(32))
    link, answer = b.accept(parties("b", "a"), a.offer(wrong))
    with pytest.raises(TransportError) as refused:
        a.establish(wrong, answer)
    assert refused.value.code == "no_way"
    until(lambda: b.stats().get("strangers", 0) >= 1)
    assert not link.is_open


def test_who_listens_with_another_key_gets_no_link(endpoints: Callable[..., TcpEndpoint]) -> None:
    """Also the side that dials wants a proof, before it sends anything of use."""
    a = endpoints()
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def pretend() -> None:
            sock, _ = impostor.accept()
            with sock:
                heard.append(sock.recv(104))
                sock.sendall(secrets.token_bytes(64))
                heard.append(sock.recv(1000))

        thread = threading.Thread(target=pretend)
        thread.start()
        mine = parties()
        a.offer(mine)
        with pytest.raises(TransportError, match="is not the peer") as refused:
            a.establish(mine, {"version": 1, "lanes": 1, "address": list(impostor.getsockname())})
        thread.join()
    assert refused.value.code == "no_way"
    assert heard[1] == b""
    assert KEY not in heard[0]


def stranger(address: list[object], *said: bytes) -> bytes:
    """What the listener says to somebody who says this, until it closes the connection."""
    host, port = address
    connected = socket.create_connection((str(host), int(str(port))), timeout=PATIENCE_S)
    with connected as sock, suppress(OSError):  # it may be closed already
        for each in said:
            sock.sendall(each)
        sock.shutdown(socket.SHUT_WR)
        return sock.recv(1000)
    return b""


def test_strangers_get_no_answer(endpoints: Callable[..., TcpEndpoint]) -> None:
    """Whatever they say: noise, the beginning of a hello, one for another link, one that was overheard."""
    a, b = endpoints(), endpoints()
    offer = a.offer(parties())
    link, answer = b.accept(parties("b", "a"), offer)
    nonce = secrets.token_bytes(32)
    hello = pack_hello("l-1", KEY, 0, dialler_asks=True, nonce=nonce)
    rng = random.Random(3)
    noises = [rng.randbytes(rng.randrange(300)) for _ in range(60)]
    noises += [hello[:cut] for cut in (0, 1, 50, 103)]
    noises += [hello[:-1] + bytes([hello[-1] ^ 1])]
    noises += [pack_hello("l-2", KEY, 0, dialler_asks=True, nonce=nonce)]
    noises += [pack_hello("l-1", KEY, 9, dialler_asks=True, nonce=nonce)]
    noises += [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(200), b"\xff" * 5000]
    for noise in noises:
        assert stranger(answer["address"], noise) == b""
    until(lambda: b.stats()["strangers"] == len(noises))
    assert len(stranger(answer["address"], hello, bytes(32))) == 64, "who has the key is answered"
    until(lambda: b.stats()["strangers"] == len(noises) + 1)
    ours = a.establish(parties(), answer)
    ours.ready(PATIENCE_S)
    link.ready(PATIENCE_S)
    assert stranger(answer["address"], hello) == b"", "a lane is given once"
    assert b.stats()["links"] == 1


def test_strangers_that_say_nothing_do_not_keep_peers_out(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(), endpoints()
    _, answer = b.accept(parties("b", "a"), a.offer(parties()))
    silent = [socket.create_connection(tuple(answer["address"])) for _ in range(KNOCKS_MAX + 20)]
    try:
        a.establish(parties(), answer).ready(PATIENCE_S)
        until(lambda: b.stats()["strangers"] >= 20)
        assert len(next(iter(b._listeners.values()))._knocks) <= KNOCKS_MAX
    finally:
        for sock in silent:
            sock.close()


def test_strangers_that_say_nothing_are_closed_after_a_while(
    endpoints: Callable[..., TcpEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("computemesh.peer.tcp.endpoint.KNOCK_S", 0.2)
    a, b = endpoints(), endpoints()
    _, answer = b.accept(parties("b", "a"), a.offer(parties()))
    with socket.create_connection(tuple(answer["address"]), timeout=PATIENCE_S) as silent:
        assert silent.recv(1) == b""
    assert b.stats()["strangers"] == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_peer_that_speaks_nonsense_loses_its_link_and_nothing_else(
    endpoints: Callable[..., TcpEndpoint], seed: int
) -> None:
    """One that has the key: random bytes, cut questions, huge numbers, on any lane and in either direction."""
    pair = Pair(endpoints(), endpoints(), 10_000)
    before = bytes_of(pair.theirs)
    other, _ = connect(pair.a, pair.b, link="l-2")
    rng = random.Random(seed)
    lane = rng.choice(pair.link._ends())
    lost = loss_of(pair.back)
    noise = rng.randbytes(rng.choice([24, 56, 1000, 200_000]))
    if rng.random() < 0.5:  # a sound header with nonsense behind it
        noise = bytes([rng.randrange(9), rng.randrange(3)]) + rng.randbytes(2) + bytes(4) + (1).to_bytes(8, "little")
        noise += rng.choice([bytes(8), rng.randbytes(8)]) + rng.randbytes(1000)
    lane.sock.sendall(noise)
    pair.link.close()
    lost.wait()
    assert bytes_of(pair.theirs) == before
    assert move(other, "read", Copy(pair.mine, 0, pair.remote, 0, 10_000)) == DONE


def test_a_breach_is_counted(pair: Pair) -> None:
    lost = loss_of(pair.back)
    pair.link._askers[0].sock.sendall(bytes([READ, 9]) + bytes(22))
    assert "kind 1" in lost.wait().reason
    assert pair.b.stats()["breaches"] == 1


# --- ends


def test_closing_ends_what_is_under_way_and_is_no_loss(pair: Pair) -> None:
    lost: list[str] = []
    pair.link.on_lost = lost.append
    theirs = loss_of(pair.back)
    order, sent, received, number, far = (Settled() for _ in range(5))
    with held(pair.back):
        pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, 100)], order)
        pair.link.send(memoryview(bytes(MIB)), sent)
        pair.link.recv(memoryview(bytearray(1)), received)
        pair.link.recv_imm(number)
        pair.back.recv(memoryview(bytearray(1)), far)
        pair.link.close()
        assert [each.wait().code for each in (order, sent, received, number)] == ["cancelled"] * 4
    assert far.wait().code == "link_lost"
    assert "closed" in theirs.wait().reason
    pair.link.close()
    assert move(pair.link, "read", Copy(pair.mine, 0, pair.remote, 0, 1)).code == "cancelled"
    assert lost == []


def test_who_asks_late_is_told_that_the_link_was_lost(pair: Pair) -> None:
    pair.link.close()
    until(lambda: not pair.b._links)
    told: list[str] = []
    pair.back.on_lost = told.append
    pair.back.on_lost = told.append
    assert len(told) == 1
    for ask in (pair.back.send, pair.back.recv):
        settled = Settled()
        ask(memoryview(bytearray(1)), settled)
        assert settled.wait().code == "link_lost"
    number = Settled()
    pair.back.recv_imm(number)
    assert number.wait().code == "link_lost"


def test_an_endpoint_that_is_closed_takes_its_links_along(pair: Pair) -> None:
    order = Settled()
    lost = loss_of(pair.back)
    pair.link.recv(memoryview(bytearray(1)), order)
    pair.a.close()
    assert order.outcome is not None, "told before it returned"
    lost.wait()
    pair.a.close()
    with pytest.raises(TransportError, match="closed"):
        pair.a.offer(parties())


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("drive", [True, False])
def test_a_peer_that_is_killed_amid_a_transfer_fails_it_at_once(
    endpoints: Callable[..., TcpEndpoint], kind: Literal["read", "write"], drive: bool
) -> None:
    a = endpoints()
    other = OtherProcess(a, 32 * MIB)
    try:
        settled, number = Settled(), Settled()
        lost = loss_of(other.link)
        mine = region(bytearray(32 * MIB))
        driven = other.link.order(kind, [Copy(mine, 0, other.region, 0, 32 * MIB)] * 100_000, settled)
        other.link.recv_imm(number)
        before = sum(lane.progress for lane in other.link._askers)
        thread = threading.Thread(target=driven, args=(None,)) if drive and driven is not None else None
        if thread is not None:
            thread.start()
        until(lambda: sum(lane.progress for lane in other.link._askers) > before + 20)
        assert settled.outcome is None
        begun = time.monotonic()
        other.kill()
        assert settled.wait().code == number.wait().code == "link_lost"
        lost.wait()
        assert time.monotonic() - begun < 10, "long before it would have been found to stall"
        if thread is not None:
            thread.join()
    finally:
        other.close()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_peer_that_is_killed_amid_its_own_transfer_leaves_nothing_behind(
    endpoints: Callable[..., TcpEndpoint], kind: str
) -> None:
    a = endpoints()
    mine = region(bytearray(32 * MIB))
    token = a.expose(mine)
    other = OtherProcess(a, 32 * MIB)
    try:
        lost = loss_of(other.link)
        other.tell({"order": kind, "token": token, "length": 32 * MIB, "times": 100_000})
        until(lambda: sum(lane.progress for lane in other.link._answerers) > 20)
        other.kill()
        lost.wait()
        a.conceal(mine)
        assert not a._links
    finally:
        other.close()


def test_a_process_reads_and_writes_the_memory_of_another(endpoints: Callable[..., TcpEndpoint]) -> None:
    a = endpoints()
    mine = region(bytearray(3 * MIB))
    token = a.expose(mine)
    other = OtherProcess(a, 3 * MIB)
    try:
        into = region(bytearray(3 * MIB))
        assert move(other.link, "read", Copy(into, 0, other.region, 0, 3 * MIB)) == DONE
        assert bytes_of(into) == b"\7" * 3 * MIB
        other.tell({"order": "write", "token": token, "length": 3 * MIB, "times": 1, "wait": True})
        until(lambda: bytes_of(mine) == b"\7" * 3 * MIB)
    finally:
        other.close()


@pytest.mark.parametrize("kind", ["read", "write", "send", "serve"])
def test_a_peer_that_stands_still_is_lost_after_a_while(endpoints: Callable[..., TcpEndpoint], kind: str) -> None:
    """Its machine still acknowledges every byte; only the process does nothing."""
    stall_s = 0.6
    a = endpoints(stall_s=stall_s)
    mine = region(bytearray(16 * MIB))
    token = a.expose(mine)
    other = OtherProcess(a, 16 * MIB)
    try:
        settled = Settled()
        lost = loss_of(other.link)
        if kind == "serve":
            other.tell({"order": "read", "token": token, "length": 16 * MIB, "times": 100_000})
            until(lambda: sum(lane.progress for lane in other.link._answerers) > 20)
        elif kind == "send":
            other.link.send(memoryview(bytes(MIB)), settled)
            until(lambda: not other.link._askers[0].busy)
        os.kill(other.pid, signal.SIGSTOP)
        begun = time.monotonic()
        if kind in ("read", "write"):
            copy = Copy(mine, 0, other.region, 0, 16 * MIB)
            drive = other.link.order("read" if kind == "read" else "write", [copy], settled)
            assert drive is not None
            drive(None)
        reason = lost.wait().reason
        assert stall_s * 0.9 <= time.monotonic() - begun < 20
        assert "nothing was heard" in reason or "timed out" in reason
        if kind != "serve":
            assert settled.wait().code == "link_lost"
    finally:
        os.kill(other.pid, signal.SIGCONT)
        other.close()


def test_a_link_without_orders_is_not_lost_for_being_quiet(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(stall_s=0.1), endpoints(stall_s=0.1)
    link, back = connect(a, b)
    link.send(memoryview(bytes(MIB)), sent := Settled())
    link.recv(memoryview(bytearray(1)), Settled())
    time.sleep(0.6)  # several times the stall
    assert sent.outcome is None
    back.recv(memoryview(bytearray(MIB)), received := Settled())
    assert received.wait() == Outcome(received=MIB)
    assert sent.wait() == DONE


def test_a_thousand_links_leave_no_thread_and_no_descriptor(endpoints: Callable[..., TcpEndpoint]) -> None:
    a, b = endpoints(lanes=1), endpoints("127.0.0.1", lanes=1)
    mine = region(bytearray(100))
    source = exposed(b, region(bytearray(b"x" * 100), handle=2))
    threads = descriptors = 0
    rng = random.Random(5)
    for turn in range(1000):
        link, back = connect(a, b, link=f"l-{turn}", same_host=rng.random() < 0.5)
        assert move(link, "read", Copy(mine, 0, source, 0, 100)) == DONE
        rng.choice([link, back]).close()
        if turn % 100 == 0:
            until(lambda: not a._links and not b._links)
            gc.collect()
            now = open_descriptors()
            if turn == 0:
                threads, descriptors = threading.active_count(), now
            assert (threading.active_count(), now) == (threads, descriptors)
    until(lambda: not a._links and not b._links)
    assert not a._expected
    assert not b._expected
    assert not a._offered


def test_a_closed_endpoint_leaves_no_thread_and_no_descriptor() -> None:
    threads, descriptors = threading.active_count(), open_descriptors()
    for _ in range(3):
        pair = Pair(TcpEndpoint(), TcpEndpoint("127.0.0.1"))
        pair.b.accept(parties("b", "a", link="l-9"), {"version": 1, "lanes": 2})
        pair.close()
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors
