"""How links of the tcp transport end: closed, killed, halted; and that nothing of them is left."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Literal

import pytest

from computemesh.peer.tcp import TcpEndpoint
from computemesh.peer.transport import DONE, Copy, Outcome, TransportError
from tests.unit.tcp_peers import (
    MIB,
    OtherProcess,
    Pair,
    Settled,
    bytes_of,
    connect,
    exposed,
    held,
    loss_of,
    move,
    open_descriptors,
    parties,
    region,
    until,
)


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
        pair.back.recv_imm(far)
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
