"""Two processes, two interfaces, one cable: what the transport does on real verbs."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from computemesh.peer.rdma.link import PIECE_BYTES
from computemesh.peer.rdma.notes import SMALL, WINDOW
from computemesh.peer.transport import (
    CANCELLED,
    LINK_LOST,
    NO_REGION,
    NO_WAY,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    TOO_LARGE,
    TransportError,
)
from tests.rdma.sides import Remote, Side, pattern

pytestmark = pytest.mark.rdma

MB = 1 << 20
NAMES = (f"link-{number}" for number in itertools.count(1))


class Two:
    """`a` in this process, with rxe0; `b` in another, with rxe1."""

    def __init__(self, library: str, peers_library: str) -> None:
        self.peers_library = peers_library
        self.a = Side("a", "b", "rxe0", library)
        self.b = Remote("b", "a", "rxe1", peers_library)

    def connect(self, pairs: int = 1) -> None:
        if self.a.link is not None:
            self.a.close_link()
        name = next(NAMES)
        answer = self.b.accept(name, self.a.offer(name, pairs, peer_device="rxe1"))
        self.a.establish(name, answer)
        self.a.ready()
        self.b.ready()

    def another_b(self) -> None:
        self.b.kill()
        self.b = Remote("b", "a", "rxe1", self.peers_library)

    def end(self) -> None:
        self.a.close()
        self.b.end()


@pytest.fixture(scope="module")
def two() -> Generator[Two]:
    both = Two("ibverbs", "ibverbs")
    yield both
    both.end()


@pytest.fixture
def linked(two: Two) -> Generator[Two]:
    two.connect()
    yield two
    two.a.close_link()


def test_a_link_is_named_and_its_interfaces_are_told(two: Two) -> None:
    two.connect(pairs=2)
    assert two.a.ready() == {
        "local_device": "rxe0",
        "peer_device": "rxe1",
        "link_type": "RoCE",
        "pairs": 2,
        "mtu": 4096,
    }
    assert two.b.ready()["local_device"] == "rxe1"
    (first, second) = two.a.facts()["nics"]
    assert first["name"] == "rxe0"  # the one that was preferred
    assert second["name"] == "rxe1"
    assert first["health"] == "AVAILABLE"
    assert first["ports"][0] == {
        "port": 1, "state": "ACTIVE", "link_type": "RoCE", "active_mtu": 4096, "gbps": first["ports"][0]["gbps"],
    }  # fmt: skip


def test_what_is_read_is_what_the_peer_has(two: Two) -> None:
    two.connect(3)
    for length in (0, 1, 4096, 3 * PIECE_BYTES + 5):
        theirs = two.b.expose("source", length + 7, 1)
        two.a.expose("target", length + 9, 2)
        before = two.a.bytes_of("target")
        assert two.a.outcome(two.a.order("read", [("target", 3, theirs, 5, length)])).code == ""
        after = two.a.bytes_of("target")
        assert after[3 : 3 + length] == pattern(1, length + 7)[5 : 5 + length]
        assert after[:3] == before[:3]
        assert after[3 + length :] == before[3 + length :]


def test_what_is_written_is_in_the_peers_memory_when_it_is_done(two: Two) -> None:
    two.connect(3)
    theirs = two.b.expose("target", 3 * MB, 3)
    two.a.expose("source", 3 * MB, 4)
    ours, expected = two.a.bytes_of("source"), bytearray(two.b.bytes_of("target"))
    chosen = random.Random(5)
    copies = [("source", chosen.randrange(MB), theirs, 100 * number, 90) for number in range(300)]
    copies.append(("source", 11, theirs, MB, 2 * MB - 13))
    for _, local, _, remote, length in copies:
        expected[remote : remote + length] = ours[local : local + length]
    assert two.a.outcome(two.a.order("write", copies)).code == ""
    assert two.b.bytes_of("target") == expected


def test_both_ends_may_order(linked: Two) -> None:
    of_a, of_b = linked.a.expose("of-a", MB, 6), linked.b.expose("of-b", MB, 7)
    ours = linked.a.order("read", [("of-a", 0, of_b, 0, MB // 2)])
    theirs = linked.b.order("read", [("of-b", MB // 2, of_a, MB // 2, MB // 2)])
    assert linked.a.outcome(ours).code == ""
    assert linked.b.outcome(theirs).code == ""
    both = pattern(7, MB)[: MB // 2] + pattern(6, MB)[MB // 2 :]
    assert linked.a.bytes_of("of-a") == both
    assert linked.b.bytes_of("of-b") == both


def test_a_number_comes_after_the_bytes_of_its_write(linked: Two) -> None:
    for seed, imm in enumerate((0, 7, 2**31 - 1, -1)):
        theirs = linked.b.expose("target", 2 * MB, 8)
        linked.a.expose("source", 2 * MB, 40 + seed)
        waiting = linked.b.recv_imm()
        linked.a.order("write", [("source", 0, theirs, 0, 2 * MB)], imm)
        assert linked.b.outcome(waiting).imm == imm
        assert linked.b.bytes_of("target") == pattern(40 + seed, 2 * MB)


def test_numbers_that_nobody_waited_for_are_kept_in_order(linked: Two) -> None:
    theirs = linked.b.expose("target", 4096, 10)
    linked.a.expose("source", 4096, 11)
    tickets = [linked.a.order("write", [("source", 0, theirs, 0, 8)] if n % 2 else [], n) for n in range(100)]
    assert {linked.a.outcome(ticket).code for ticket in tickets} == {""}
    assert [linked.b.outcome(linked.b.recv_imm()).imm for _ in range(100)] == list(range(100))


def test_a_message_arrives_whole(linked: Two) -> None:
    for length in (0, 1, SMALL, SMALL + 1, 3 * PIECE_BYTES + 1):
        waiting = linked.b.recv(length)
        sent = linked.a.send(pattern(12, length))
        assert linked.b.received(waiting) == pattern(12, length)
        assert linked.a.outcome(sent).code == ""


def test_messages_come_in_order_though_nobody_receives_at_first(linked: Two) -> None:
    """More than the peer keeps: the rest waits at its sender."""
    count = WINDOW + 60
    sizes = [3 * SMALL if number % 50 == 0 else 1 + number for number in range(count)]
    tickets = [linked.a.send(pattern(number, size)) for number, size in enumerate(sizes)]
    theirs = linked.b.expose("source", 4096, 13)
    linked.a.expose("target", 4096, 14)
    assert linked.a.outcome(linked.a.order("read", [("target", 0, theirs, 0, 4096)])).code == ""  # nothing blocks it
    for number, size in enumerate(sizes):
        assert linked.b.received(linked.b.recv(3 * SMALL)) == pattern(number, size)
    assert {linked.a.outcome(ticket).code for ticket in tickets} == {""}


@pytest.mark.parametrize("length", [SMALL, MB])
def test_what_is_withdrawn_takes_nothing_and_what_is_given_back_comes_again(linked: Two, length: int) -> None:
    message, number = linked.b.recv(length), linked.b.recv_imm()
    assert linked.b.withdraw(message)
    assert linked.b.withdraw(number)
    sent = [linked.a.send(pattern(seed, length)) for seed in range(2)]
    for imm in range(2):
        linked.a.order("write", [], imm)
    first = linked.b.received(linked.b.recv(length))
    assert first == pattern(0, length)
    for _ in range(2 * WINDOW if length == SMALL else 2):  # More than may be on their way: each counts once.
        linked.b.give_back(first)
        assert linked.b.received(linked.b.recv(length)) == first
    assert linked.b.outcome(linked.b.recv_imm()).imm == 0
    linked.b.give_back(0)
    assert [linked.b.outcome(linked.b.recv_imm()).imm for _ in range(2)] == [0, 1]
    assert linked.b.received(linked.b.recv(length)) == pattern(1, length)
    assert {linked.a.outcome(ticket).code for ticket in sent} == {""}
    assert not linked.b.withdraw(message)


def test_both_ends_may_send_as_much_as_they_like_at_once(linked: Two) -> None:
    count = 150
    ours = [linked.a.send(pattern(number, 1000)) for number in range(count)]
    theirs = [linked.b.send(pattern(number, 900)) for number in range(count)]
    for number in range(count):
        assert linked.b.received(linked.b.recv(1000)) == pattern(number, 1000)
        assert linked.a.received(linked.a.recv(1000)) == pattern(number, 900)
    assert {linked.a.outcome(ticket).code for ticket in ours} == {""}
    assert {linked.b.outcome(ticket).code for ticket in theirs} == {""}


def test_a_message_without_room_is_left_out(linked: Two) -> None:
    for length, code in ((100, ""), (SMALL + 100, TOO_LARGE)):  # a small one has gone before anybody looks at it
        waiting = linked.b.recv(50)
        sent = linked.a.send(pattern(15, length))
        assert linked.b.outcome(waiting).code == TOO_LARGE
        assert linked.a.outcome(sent).code == code
        linked.a.send(b"next")
        assert linked.b.received(linked.b.recv(50)) == b"next"


def test_a_range_outside_of_the_region_is_refused_here(linked: Two) -> None:
    theirs = linked.b.expose("source", 4096, 16)
    linked.a.expose("target", 4096, 17)
    for offset, length in ((4000, 97), (4096, 1), (-1, 4)):
        assert linked.a.outcome(linked.a.order("read", [("target", 0, theirs, offset, length)])).code == OUT_OF_RANGE
        assert linked.a.outcome(linked.a.order("read", [("target", offset, theirs, 0, length)])).code == OUT_OF_RANGE
    assert linked.a.bytes_of("target") == pattern(17, 4096)
    assert linked.a.losses() == 0


def test_a_read_only_region_is_not_written_to(linked: Two) -> None:
    theirs = linked.b.expose("source", 4096, 18, writable=False)
    linked.a.expose("target", 4096, 19)
    assert linked.a.outcome(linked.a.order("write", [("target", 0, theirs, 0, 8)])).code == READ_ONLY
    assert linked.a.outcome(linked.a.order("read", [("target", 0, theirs, 0, 8)])).code == ""


@pytest.mark.parametrize("lie", ["key", "length", "writable"])
def test_a_peer_that_lies_is_refused_by_the_interface_and_loses_its_link(two: Two, lie: str) -> None:
    """This end believes that the region is more than it is, as a program that means ill would."""
    two.connect()
    theirs = two.b.expose("source", 8192, 20, writable=False)
    two.a.expose("target", 3 * 8192, 21)
    token = dict(theirs["token"])
    if lie == "key":
        token["keys"] = {name: key ^ 0x5500 for name, key in token["keys"].items()}
    told = {**theirs, "token": token}
    if lie == "length":
        told["length"] = 3 * 8192
    if lie == "writable":
        told["writable"] = True
    kind, offset = ("write" if lie == "writable" else "read"), (8192 if lie == "length" else 0)
    outcome = two.a.outcome(two.a.order(kind, [("target", 0, told, offset, 8192)]))  # type: ignore[arg-type]
    assert outcome.code == LINK_LOST
    assert "remote access error" in outcome.reason or "invalid request" in outcome.reason
    assert two.a.loss()
    assert two.b.loss()
    assert two.a.bytes_of("target") == pattern(21, 3 * 8192)
    assert two.b.bytes_of("source") == pattern(20, 8192)
    two.connect()
    assert two.a.outcome(two.a.order("read", [("target", 0, theirs, 0, 8192)])).code == ""
    assert two.a.bytes_of("target")[:8192] == pattern(20, 8192)


def test_a_region_that_has_ended_is_refused_and_the_link_stays(linked: Two) -> None:
    theirs = linked.b.expose("source", 4096, 22)
    linked.a.expose("target", 4096, 23)
    assert linked.b.conceal("source") < 2.0
    assert linked.a.outcome(linked.a.order("read", [("target", 0, theirs, 0, 8)])).code == STALE_EPOCH
    again = linked.b.expose("source", 4096, 24, epoch=2)
    assert linked.a.outcome(linked.a.order("read", [("target", 0, again, 0, 4096)])).code == ""
    assert linked.a.bytes_of("target") == pattern(24, 4096)
    linked.a.conceal("target")
    assert linked.a.outcome(linked.a.order("read", [("target", 0, again, 0, 8)])).code == NO_REGION
    assert linked.a.losses() == linked.b.losses() == 0


def test_a_region_ends_after_what_is_under_way(linked: Two) -> None:
    theirs = linked.b.expose("source", 8 * MB, 25)
    linked.a.expose("target", 8 * MB, 26)
    ticket = linked.a.order("read", [("target", 0, theirs, 0, 8 * MB)])
    linked.b.conceal("source")
    assert linked.a.outcome(ticket).code == ""
    assert linked.a.bytes_of("target") == pattern(25, 8 * MB)
    assert linked.a.losses() == 0


def test_a_peer_that_does_not_know_the_key_is_refused(two: Two) -> None:
    name = next(NAMES)
    answer = two.b.accept(name, two.a.offer(name, 1, peer_device="rxe1"), b"another key, of as many bytes.!!")
    before = two.b.refused()
    two.a.establish(name, answer)
    with pytest.raises(TransportError):
        two.a.ready()
    assert "prove" in two.b.loss()
    assert two.b.refused() == before + 1


def test_a_peer_that_is_killed_in_the_middle_fails_what_is_under_way(two: Two) -> None:
    two.connect(2)
    theirs = two.b.expose("source", 32 * MB, 27)
    two.a.expose("target", 32 * MB, 28)
    before = two.a.bytes_of("target", 1024)
    reading = two.a.order("read", [("target", 0, theirs, 0, 32 * MB)] * 32)  # Enough for any machine.
    receiving, number = two.a.recv(100), two.a.recv_imm()
    end = time.monotonic() + 60
    while two.a.bytes_of("target", 1024) == before:  # until the first bytes have come
        assert time.monotonic() < end
    two.another_b()
    for ticket in (reading, receiving, number):
        assert two.a.outcome(ticket, 30).code == LINK_LOST
    assert two.a.losses() == 1
    two.connect(2)
    again = two.b.expose("source", MB, 29)
    assert two.a.outcome(two.a.order("read", [("target", 0, again, 0, MB)])).code == ""
    assert two.a.bytes_of("target", MB) == pattern(29, MB)


def test_a_peer_that_is_killed_while_nothing_is_ordered_is_noticed(two: Two) -> None:
    two.connect()
    receiving = two.a.recv(100)
    two.another_b()
    assert two.a.outcome(receiving, 30).code == LINK_LOST
    assert two.a.loss()


def test_the_peer_of_a_link_that_is_closed_hears_of_it_at_once(two: Two) -> None:
    two.connect()
    receiving, theirs = two.a.recv(100), two.b.recv(100)
    two.b.close_link()
    assert two.a.outcome(receiving, 10).code == LINK_LOST
    assert "closed" in two.a.loss()
    assert two.b.outcome(theirs).code == CANCELLED
    assert two.b.losses() == 0


def test_what_cannot_be_is_said(two: Two) -> None:
    with pytest.raises(TransportError, match="no network interface 'mlx5_9'") as error:
        two.a.offer("link", 1, local_device="mlx5_9")
    assert error.value.code == NO_WAY
    with pytest.raises(TransportError, match="no port 2"):
        two.a.offer("link", 1, ib_port=2)
    with pytest.raises(TransportError, match="qp_num must be 1 to 64"):
        two.a.offer("link", 65)
    with pytest.raises(TransportError, match="min_bw"):
        two.a.offer("link", 1, min_bw="fast")
    with pytest.raises(TransportError, match="9e\\+06 are wanted"):
        two.a.offer("link", 1, min_bw="9000Tbps")
    with pytest.raises(TransportError, match=r"offer: .*gid"):
        two.a.accept("link", {**two.a.offer("link-x", 1), "gid": "xyz"})


@pytest.mark.parametrize(("library", "peers_library"), [("pyverbs", "pyverbs"), ("ibverbs", "pyverbs")])
def test_either_library_speaks_verbs_and_they_understand_each_other(library: str, peers_library: str) -> None:
    both = Two(library, peers_library)
    try:
        both.connect(2)
        of_a, of_b = both.a.expose("of-a", 3 * MB, 30), both.b.expose("of-b", 3 * MB, 31)
        assert both.a.outcome(both.a.order("read", [("of-a", 0, of_b, 0, MB)])).code == ""
        assert both.b.outcome(both.b.order("read", [("of-b", MB, of_a, MB, MB)])).code == ""
        number = both.b.recv_imm()
        assert both.a.outcome(both.a.order("write", [("of-a", 2 * MB, of_b, 2 * MB, MB)], -5)).code == ""
        assert both.b.outcome(number).imm == -5
        ours, theirs = pattern(30, 3 * MB), pattern(31, 3 * MB)
        assert both.a.bytes_of("of-a") == theirs[:MB] + ours[MB:]
        assert both.b.bytes_of("of-b") == theirs[:MB] + ours[MB:]
        for length in (5, 2 * SMALL):
            sent = both.b.send(pattern(32, length))
            assert both.a.received(both.a.recv(length)) == pattern(32, length)
            assert both.b.outcome(sent).code == ""
        both.b.conceal("of-b")
        assert both.a.outcome(both.a.order("read", [("of-a", 0, of_b, 0, 1)])).code == STALE_EPOCH
        lie = {**of_b, "token": {**of_b["token"], "number": 77}}
        assert both.a.outcome(both.a.order("read", [("of-a", 0, lie, 0, 1)])).code == LINK_LOST
        both.connect()
        both.b.close_link()
        assert "closed" in both.a.loss()
        with pytest.raises(OSError, match="xyz"):
            both.a.endpoint._speaks().open("xyz")  # pyright: ignore[reportPrivateUsage]
    finally:
        both.end()


def test_nothing_is_left_of_links(two: Two) -> None:
    """Completion channels are descriptors: those of links that have ended are closed."""
    two.connect()
    two.b.close_link()  # the end here is no more when it is lost
    two.a.loss()
    time.sleep(1.0)
    before = channels()
    for pairs in (1, 2, 1):
        two.connect(pairs)
        assert channels() > before
        two.a.close_link()
        assert "closed" in two.b.loss()
        end = time.monotonic() + 30
        while channels() != before:
            assert time.monotonic() < end, "a completion channel was left open"
            time.sleep(0.01)


def channels() -> int:
    """Open descriptors of events; each device has one, too."""
    return sum(
        "infinibandevent" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )
