"""Futures of transfers: they wake whoever waits, whenever the end comes, and say it once."""

from __future__ import annotations

import threading

import pytest

from computemesh.peer.errors import LINK_LOST, PeerError
from computemesh.peer.futures import Gathered, ImmFuture, MessageFuture, PeerFuture, TransferFuture
from computemesh.peer.transport import DONE, Outcome

LOST = Outcome(LINK_LOST, "the peer has ended")


def test_what_was_done_before_it_was_handed_out_is_waited_for_in_no_time() -> None:
    future = TransferFuture()
    future.settle(DONE)
    assert future.done()
    assert future.wait() == future.wait(0) == future.wait_for(0) == 0
    assert future.error() is None


def test_what_is_not_done_in_time_may_be_waited_for_again() -> None:
    future = TransferFuture()
    with pytest.raises(TimeoutError):
        future.wait(0.01)
    assert future.wait_for(0.01) is None
    assert not future.done()
    future.settle(DONE)
    assert future.wait() == 0


def test_a_failure_is_raised_each_time_with_its_code() -> None:
    future = MessageFuture()
    future.settle(LOST)
    with pytest.raises(RuntimeError, match="the peer has ended"):
        future.wait()
    with pytest.raises(RuntimeError, match="the peer has ended"):
        future.wait_for(1)
    error = future.error()
    assert isinstance(error, PeerError)
    assert error.code == LINK_LOST


def test_a_future_says_what_it_is_of_and_how_it_stands() -> None:
    futures: list[PeerFuture] = [TransferFuture(), MessageFuture(), ImmFuture()]
    assert [repr(one) for one in futures] == [
        "<future of a transfer, under way>",
        "<future of a message, under way>",
        "<future of a number, under way>",
    ]
    futures[0].settle(DONE)
    futures[1].settle(LOST)
    assert [repr(one) for one in futures[:2]] == [
        "<future of a transfer, done>",
        "<future of a message, failed: link_lost>",
    ]


def test_only_the_first_end_counts() -> None:
    future = PeerFuture()
    future.settle(DONE)
    future.settle(LOST)
    assert future.wait() == 0


def test_however_the_end_and_those_that_wait_meet_all_are_woken() -> None:
    for _ in range(300):
        future = TransferFuture()
        woken: list[int] = []
        called: list[PeerFuture] = []
        start = threading.Barrier(4)

        def wait(future: TransferFuture = future, woken: list[int] = woken, start: threading.Barrier = start) -> None:
            start.wait()
            woken.append(future.wait(30))

        threads = [threading.Thread(target=wait) for _ in range(2)]

        def call(
            future: TransferFuture = future, called: list[PeerFuture] = called, start: threading.Barrier = start
        ) -> None:
            start.wait()
            future.add_done_callback(called.append)

        threads.append(threading.Thread(target=call))
        for thread in threads:
            thread.start()
        start.wait()
        future.settle(DONE)
        for thread in threads:
            thread.join(30)
        assert woken == [0, 0]
        assert called == [future]


def test_a_callback_that_fails_keeps_no_other_from_being_called(caplog: pytest.LogCaptureFixture) -> None:
    future, called = PeerFuture(), list[PeerFuture]()

    def fail(_: PeerFuture) -> None:
        raise ValueError("mine")

    future.add_done_callback(fail)
    future.add_done_callback(called.append)
    future.settle(DONE)
    assert called == [future]
    assert "a callback of a transfer failed" in caplog.text


def test_a_thread_that_waits_drives_the_transfer_itself_where_it_can() -> None:
    future, threads = PeerFuture(), list[threading.Thread]()

    def drive(timeout_s: float | None) -> None:
        threads.append(threading.current_thread())
        future.settle(DONE)

    future.drive = drive
    assert future.wait() == 0
    assert threads == [threading.current_thread()]


def test_a_thread_that_can_drive_no_further_waits_for_the_rest() -> None:
    future = PeerFuture()
    future.drive = lambda timeout_s: None
    threading.Timer(0.05, lambda: future.settle(DONE)).start()
    assert future.wait(30) == 0


@pytest.mark.parametrize("number", [0, 1, -1, -(2**31), 2**31 - 1])
def test_a_number_that_came_with_a_write_is_the_one_that_was_sent(number: int) -> None:
    future = ImmFuture()
    future.settle(Outcome(imm=number & 0xFFFFFFFF))
    assert future.imm_data() == number
    assert future.received_at is not None
    assert future.received_at >= future.started_at


def test_buffers_are_let_go_once_the_transport_is_done_with_them() -> None:
    future = MessageFuture()
    future.held = bytearray(4)
    future.settle(Outcome(received=3))
    assert future.held is None
    assert future.received == 3


def test_parts_are_one_whole_which_fails_as_its_first_failure_and_only_when_all_have_ended() -> None:
    ends: list[Outcome] = []
    gathered = Gathered(3, ends.append)
    gathered.settle(DONE)
    gathered.settle(LOST)
    assert not ends
    gathered.settle(Outcome("other"))
    assert ends == [LOST]


def test_the_collector_may_end_a_future_while_somebody_begins_to_wait_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes by whenever objects are made, as that by which is waited."""
    ends: list[PeerFuture] = []
    forgotten = PeerFuture()
    forgotten.add_done_callback(ends.append)
    make = threading.Event
    waited = threading.Event()

    def collect() -> threading.Event:
        forgotten.settle(LOST)
        return make()

    def wait() -> None:
        monkeypatch.setattr(threading, "Event", collect)
        PeerFuture().wait_for(0)
        waited.set()

    threading.Thread(target=wait, daemon=True).start()
    assert waited.wait(20)
    assert ends == [forgotten]
