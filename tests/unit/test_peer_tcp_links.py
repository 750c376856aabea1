"""How links of the tcp transport come about, and who gets none."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from computemesh.peer.tcp import TcpEndpoint, endpoint
from computemesh.peer.tcp.endpoint import KNOCKS_MAX
from computemesh.peer.tcp.wire import FRAME, READ, pack_hello, prove
from computemesh.peer.transport import DONE, Copy, TransportError
from tests.unit.tcp_peers import (
    KEY,
    MIB,
    PATIENCE_S,
    Pair,
    Settled,
    bytes_of,
    connect,
    exposed,
    held,
    loss_of,
    move,
    parties,
    region,
    until,
)

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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"])
def test_no_peer_is_told_an_address_that_is_none_of_this_machine(host: str) -> None:
    with pytest.raises(ValueError, match=f"COMPUTEMESH_PEER_HOST: .*{host}"):
        TcpEndpoint(host)


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


def test_a_peer_that_ends_while_it_is_dialled_is_lost(endpoints: Callable[..., TcpEndpoint]) -> None:
    """As one that is killed: what it listened on is there, and then nobody."""
    a = endpoints()
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def die() -> None:
            sock, _ = dying.accept()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

        thread = threading.Thread(target=die)
        thread.start()
        mine = parties()
        a.offer(mine)
        with pytest.raises(TransportError, match="went meanwhile") as refused:
            a.establish(mine, {"version": 1, "lanes": 1, "address": list(dying.getsockname())})
        thread.join()
    assert refused.value.code == "link_lost"


def test_a_peer_that_says_nothing_is_given_up_at_the_deadline(endpoints: Callable[..., TcpEndpoint]) -> None:
    a = endpoints()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mine = parties(timeout_s=0.2)
        a.offer(mine)
        with pytest.raises(TransportError, match="in time") as refused:
            a.establish(mine, {"version": 1, "lanes": 1, "address": list(silent.getsockname())})
    assert refused.value.code == "timed_out"


def test_who_is_asked_for_a_link_does_not_dial_for_long(
    endpoints: Callable[..., TcpEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has few threads that answer, and who waits for its answer gives up long before the connection's deadline."""
    monkeypatch.setattr(endpoint, "DIAL_S", 0.2)
    b = endpoints()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer = {"version": 1, "lanes": 1, "address": list(silent.getsockname())}
        theirs = parties("b", "a", same_host=False, timeout_s=60)
        with pytest.raises(TransportError, match="in time") as refused:
            b.accept(theirs, offer)
        assert theirs.deadline - time.monotonic() > 30
    assert refused.value.code == "timed_out"
    assert not b._links


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


def test_a_peer_that_goes_in_the_midst_of_the_beginning_leaves_nothing_behind(
    endpoints: Callable[..., TcpEndpoint],
) -> None:
    """At any step, with all proofs that it could give; the same link may be begun again meanwhile."""
    a, b = endpoints(), endpoints()
    for turn in range(40):
        link, answer = b.accept(parties("b", "a", link=f"l-{turn}"), a.offer(parties(link=f"l-{turn}")))
        address = (str(answer["address"][0]), int(answer["address"][1]))
        for lane, asks in ((0, True), (0, False), (1, True), (1, False))[: 1 + turn % 4]:
            hello = pack_hello(f"l-{turn}", KEY, lane, dialler_asks=asks, nonce=bytes(32))
            with socket.create_connection(address, timeout=PATIENCE_S) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends by a reset
                sock.sendall(hello)
                challenge = sock.recv(64)
                sock.sendall(prove(KEY, 3, hello, challenge))
        if turn % 4 == 3:
            loss_of(link)
        link.close()
    until(lambda: not b._links)
    assert not b._expected
    ours, theirs = connect(a, b)
    assert ours.is_open
    assert theirs.is_open


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
    until(lambda: pair.b.stats().get("breaches") == 1)
    assert pair.b.stats() == {"links": 1, "lost": 1, "breaches": 1}


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ((0, 0, 5, 1), "5 bytes too short"),
        ((0, 0, 11, 1), "where there were 10"),
        ((0, 0, 10, 2), "not asked"),
        ((3, 0, 5, 1), "refusal"),
    ],
    ids=["short", "long", "another", "refused"],
)
def test_an_answer_that_is_none_fails_the_order(pair: Pair, frame: tuple[int, int, int, int], reason: str) -> None:
    settled = Settled()
    with held(pair.back):
        pair.link.order("read", [Copy(pair.mine, 0, pair.remote, 0, 10)], settled)
        pair.back._answerers[0].sock.sendall(FRAME.pack(*frame) + b"x" * frame[2])
        outcome = settled.wait()
    assert outcome.code == "link_lost"
    assert reason in outcome.reason
