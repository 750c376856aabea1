"""Agents in one process, over their real transports; what the peer-agent would pass on is passed on in memory."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Connect, Piece, Topology, Transfer
from computemesh.peer import core, traffic
from computemesh.peer.agent import PeerAgent
from computemesh.peer.aio import AsyncPeerAgent
from computemesh.peer.attachment import Attachment
from computemesh.peer.connections import FAILED_MAX
from computemesh.peer.errors import (
    ALIAS_TAKEN,
    BAD_CHECKSUM,
    BAD_MESSAGE,
    CLOSED,
    CROSSED,
    LINK_LOST,
    NO_REGION,
    NO_WAY,
    NOT_CONNECTED,
    NOT_FOUND,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    TIMED_OUT,
    PeerError,
)
from computemesh.peer.shm import ShmEndpoint, ShmLink
from computemesh.peer.signals import Accept, Begun, Desired, Lost, Moves, Order, Traffic
from computemesh.peer.tcp import TcpLink
from computemesh.peer.transport import CANCELLED
from computemesh.testing.peers import Exchange, Seat

WAIT_S = 20.0


class Agents:
    """Agents that share an exchange, and end with the test."""

    def __init__(self) -> None:
        self.exchange = Exchange()
        self.started: list[PeerAgent] = []

    def __call__(self, alias: str, *, node_id: str = "node-1", scope: str = "") -> PeerAgent:
        agent = PeerAgent(alias=alias, scope=scope, attach=self.exchange.attach(alias, scope=scope, node_id=node_id))
        self.started.append(agent)
        return agent

    def pair(self, transport: str = "auto") -> tuple[PeerAgent, PeerAgent]:
        """`a` and `b`, connected on both sides."""
        a, b = self("a"), self("b")
        a.connect_to("b", transport=transport).wait(WAIT_S)
        there = b.query_connection("a")
        assert there is not None
        there.wait(WAIT_S)
        return a, b


@pytest.fixture
def agents() -> Generator[Agents]:
    made = Agents()
    yield made
    for agent in made.started:
        agent.shutdown()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(PeerError) as caught:
        call()
    return caught.value.code


# --- transfers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("shared", [True, False])
def test_bytes_are_read_and_written_at_the_offsets_that_were_said(agents: Agents, transport: str, shared: bool) -> None:
    a, b = agents.pair(transport)
    here, there = bytearray(64), bytearray(range(64))
    if shared:
        here_view, there_view = (agent.allocate_memory_region("kv", 64).view for agent in (a, b))
        there_view[:] = bytes(there)
    else:
        here_view, there_view = memoryview(here), memoryview(there)
        a.register_memory_region("kv", here)
        b.register_memory_region("kv", there)
    read = a.read("b", [("kv", 8, 0, 8), ("kv", 0, 32, 4)])
    assert read.wait(WAIT_S) == 0
    assert bytes(here_view[:16]) == bytes([32, 33, 34, 35, 0, 0, 0, 0, *range(8)])
    assert a.write("b", ("kv", 8, 60, 4)).wait(WAIT_S) == 0
    assert bytes(there_view[60:]) == bytes(range(4))
    expected = "shm" if shared and transport == "shm" else "tcp"
    assert read.transport == expected


def test_the_form_with_handles_has_its_offsets_the_other_way_round(agents: Agents) -> None:
    a, b = agents.pair()
    here, there = bytearray(8), bytearray(range(8))
    local = a.register_memory_region("mine", here)
    b.register_memory_region("theirs", there)
    remote = a.get_handle("theirs", "b")
    assert a.get_handle("theirs", "b") == remote != local
    assert a.get_handle("mine") == local
    a.read("b", [(local, remote, 6, 1, 2)]).wait(WAIT_S)
    assert here == bytes([0, 6, 7, 0, 0, 0, 0, 0])
    a.read("b", ("mine", "theirs", 4, 2, 3)).wait(WAIT_S)
    assert here == bytes([0, 6, 7, 0, 2, 3, 4, 0])


def test_one_order_may_need_two_transports(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("shared", 8)
    b.allocate_memory_region("shared", 8).view[:] = b"sharedkv"
    here = bytearray(8)
    a.register_memory_region("private", here)
    b.register_memory_region("private", bytearray(b"private!"))
    future = a.read("b", [("shared", 0, 0, 8), ("private", 0, 0, 8)])
    assert future.wait(WAIT_S) == 0
    assert set(future.transport.split("+")) == {"shm", "tcp"}
    assert here == b"private!"
    assert len(future.epochs) == 2


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_number_of_a_write_comes_after_its_bytes_and_waits_for_who_asks_later(
    agents: Agents, transport: str
) -> None:
    a, b = agents.pair(transport)
    a.allocate_memory_region("kv", 4096).view[:4] = b"new!"
    there = b.allocate_memory_region("kv", 4096)
    seen: list[bytes] = []
    early = b.imm_recv("a")
    early.add_done_callback(lambda _: seen.append(bytes(there.view[:4])))
    a.write_with_imm("b", [("kv", 0, 0, 4096)], -5).wait(WAIT_S)
    a.write_with_imm("b", ("kv", 0, 0, 1), 7).wait(WAIT_S)
    a.write_with_imm("b", ("kv", 0, 0, 1), 2**32 - 2).wait(WAIT_S)  # Numbers of verbs have no sign.
    assert early.imm_data() == -5
    assert seen == [b"new!"]
    assert [b.imm_recv("a").imm_data() for _ in range(2)] == [7, -2]


def test_messages_go_both_ways_whole_and_in_their_order(agents: Agents) -> None:
    a, b = agents.pair()
    for sender, receiver, peer in ((a, b, "b"), (b, a, "a")):
        back = "a" if peer == "b" else "b"
        into = [bytearray(8) for _ in range(3)]
        waiting = [receiver.recv(back, one) for one in into]
        for word in (b"one", b"two", b"three"):
            sender.send(peer, word).wait(WAIT_S)
        assert [future.wait(WAIT_S) for future in waiting] == [0, 0, 0]
        assert [bytes(one[: future.received]) for one, future in zip(into, waiting, strict=True)] == [
            b"one",
            b"two",
            b"three",
        ]


def test_a_chunk_is_an_address_with_an_offset_and_a_length(agents: Agents) -> None:
    a, b = agents.pair()
    data, into = (ctypes.c_ubyte * 8)(*range(8)), (ctypes.c_ubyte * 8)()
    future = b.recv("a", (ctypes.addressof(into), 4, 4))
    a.send("b", (ctypes.addressof(data), 2, 3)).wait(WAIT_S)
    future.wait(WAIT_S)
    assert bytes(into) == bytes([0, 0, 0, 0, 2, 3, 4, 0])


@pytest.mark.parametrize("size", [100, 300_000])
def test_what_is_withdrawn_takes_nothing_and_the_next_one_gets_it(agents: Agents, size: int) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    number, buffer = b.imm_recv("a"), bytearray(size)
    message = b.recv("a", buffer)
    assert number.cancel()
    assert message.cancel()
    assert code_of(number.wait) == code_of(message.wait) == CANCELLED
    buffer.clear()  # It is the program's own again.
    written, sent = a.write_with_imm("b", ("kv", 0, 0, 8), 8), a.send("b", bytes(size))
    number, message = b.imm_recv("a"), b.recv("a", bytearray(size))
    assert [number.imm_data(), message.wait(WAIT_S), message.received] == [8, 0, size]
    for future in (number, message, written, sent):
        assert future.wait(WAIT_S) == 0
        assert not future.cancel()
    assert not a.read("b", ("kv", 0, 0, 8)).cancel()


async def test_a_task_that_is_cancelled_leaves_what_comes_to_the_next_one(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    receiver, abandoned = AsyncPeerAgent(b), bytearray(5)
    for waiting in (receiver.imm_recv("a"), receiver.recv("a", abandoned)):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.05)
    a.write_with_imm("b", ("kv", 0, 0, 8), 8).wait(WAIT_S)
    a.send("b", b"hello").wait(WAIT_S)
    buffer = bytearray(5)
    assert (await asyncio.wait_for(receiver.imm_recv("a"), WAIT_S)).imm_data() == 8
    assert (await asyncio.wait_for(receiver.recv("a", buffer), WAIT_S)).received == 5
    assert [buffer, abandoned] == [b"hello", bytes(5)]


@pytest.mark.parametrize("size", [100, 300_000])
async def test_what_has_come_when_its_task_is_cancelled_is_given_to_the_next_one(agents: Agents, size: int) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    receiver = AsyncPeerAgent(b)
    tasks = [asyncio.ensure_future(one) for one in (receiver.imm_recv("a"), receiver.recv("a", bytearray(size)))]
    while b.stats()["under_way"] < 2:
        await asyncio.sleep(0.001)
    for number in range(2):  # The loop hears of none of it before the tasks are cancelled.
        a.write_with_imm("b", ("kv", 0, 0, 8), number).wait(WAIT_S)
        a.send("b", bytes([number]) * size)
    until(lambda: b.stats()["under_way"] == 0)
    assert [task.cancel() for task in tasks] == [True, True]
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
    for number in range(2):
        buffer = bytearray(size)
        assert (await asyncio.wait_for(receiver.imm_recv("a"), WAIT_S)).imm_data() == number
        assert (await asyncio.wait_for(receiver.recv("a", buffer), WAIT_S)).received == size
        assert buffer == bytes([number]) * size


@pytest.mark.parametrize("size", [100, 300_000])
async def test_however_often_a_program_gives_up_all_comes_once_and_in_order(agents: Agents, size: int) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    receiver, count, given_up = AsyncPeerAgent(b), 100, 0

    def say() -> None:
        for number in range(count):
            a.write_with_imm("b", ("kv", 0, 0, 8), number).wait(WAIT_S)
            a.send("b", bytes([number]) * size).wait(WAIT_S)

    async def hear(begin: Callable[[], Any]) -> Any:
        nonlocal given_up
        for turn in range(10_000):
            try:
                return await asyncio.wait_for(begin(), 0.0001 * (turn % 20))
            except TimeoutError:
                given_up += 1
        raise AssertionError("it never came")

    talking = asyncio.ensure_future(asyncio.to_thread(say))
    for number in range(count):
        assert (await hear(lambda: receiver.imm_recv("a"))).imm_data() == number
        buffer = bytearray(size)
        assert (await hear(lambda: receiver.recv("a", buffer))).received == size  # noqa: B023  # It is awaited at once.
        assert buffer == bytes([number]) * size
    await talking
    assert given_up


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_moved_is_what_a_plain_model_says(data: st.DataObject) -> None:
    size = 96
    here, there, numbers = _model_pair()
    model = {"here": bytes(here[1]), "there": bytes(there[1])}
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["read", "write"]))
        pieces = data.draw(
            st.lists(
                st.tuples(st.integers(0, size), st.integers(0, size), st.integers(0, size)), min_size=1, max_size=3
            )
        )
        by_handle = data.draw(st.booleans())
        assign: Any = [
            (*numbers, remote, local, length) if by_handle else ("kv", local, remote, length)
            for local, remote, length in pieces
        ]
        fits = all(max(local, remote) + length <= size for local, remote, length in pieces)
        order = here[0].read if kind == "read" else here[0].write
        if not fits:
            assert code_of(partial(order, "b", assign)) == OUT_OF_RANGE
            continue
        if len(pieces) > 1:  # Whether pieces that overlap come in order is not promised.
            pieces, assign = pieces[:1], assign[:1]
        order("b", assign).wait(WAIT_S)
        for local, remote, length in pieces:
            source, target = ("there", "here") if kind == "read" else ("here", "there")
            begin, at = (remote, local) if kind == "read" else (local, remote)
            moved = model[source][begin : begin + length]
            model[target] = model[target][:at] + moved + model[target][at + length :]
        assert bytes(here[1]) == model["here"]
        assert bytes(there[1]) == model["there"]


_pairs: list[Any] = []


def _model_pair() -> Any:
    """Agents for all examples; a property test has no fixture of its own for each."""
    if not _pairs:
        made = Agents()
        a, b = made.pair()
        here, there = a.allocate_memory_region("kv", 96), b.allocate_memory_region("kv", 96)
        here.view[:], there.view[:] = bytes(range(96)), bytes(range(100, 196))
        _pairs.extend([(a, here.view), (b, there.view), (a.get_handle("kv"), a.get_handle("kv", "b")), made])
    return _pairs[:3]


@pytest.fixture(scope="module", autouse=True)
def _end_model() -> Generator[None]:
    yield
    for agent in _pairs[3].started if _pairs else ():
        agent.shutdown()
    _pairs.clear()


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_leaves_a_region_is_refused_and_says_which_and_by_how_much(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 128)
    b.allocate_memory_region("kv", 64)
    with pytest.raises(PeerError, match="16 bytes from 60 on leave region 'kv' of the peer, which has 64") as caught:
        a.read("b", [("kv", 0, 60, 16)])
    assert caught.value.code == OUT_OF_RANGE
    with pytest.raises(PeerError, match="16 bytes from 120 on leave region 'kv' here, which has 128"):
        a.read("b", [("kv", 120, 0, 16)])


def test_a_region_that_may_only_be_read_is_not_written(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.register_memory_region("kv", bytearray(b"constant"), writable=False)
    assert a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S) == 0
    assert code_of(lambda: a.write("b", ("kv", 0, 0, 8))) == READ_ONLY


def test_without_a_connection_it_is_said_what_to_do(agents: Agents) -> None:
    a, _ = agents("a"), agents("b")
    a.allocate_memory_region("kv", 8)
    with pytest.raises(RuntimeError, match=r"Connection for b not found. Call connect_to\('b', ...\) first") as caught:
        a.read("b", [("kv", 0, 0, 8)])
    assert isinstance(caught.value, PeerError)
    assert caught.value.code == NOT_CONNECTED


def test_regions_that_are_not_there_are_named(agents: Agents) -> None:
    a, b = agents.pair()
    with pytest.raises(PeerError, match="memory region 'kv' is not registered here") as caught:
        a.read("b", ("kv", 0, 0, 8))
    assert caught.value.code == NO_REGION
    a.allocate_memory_region("kv", 8)
    with pytest.raises(PeerError, match="peer 'b' has no memory region 'kv'"):
        a.read("b", ("kv", 0, 0, 8))
    b.allocate_memory_region("kv", 8)
    assert a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S) == 0
    assert code_of(lambda: a.get_handle("none")) == code_of(lambda: a.get_handle("none", "b")) == NO_REGION
    assert code_of(lambda: a.read("b", (a.get_handle("kv"), 999, 0, 0, 8))) == NO_REGION


BAD: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda a: a.connect_to(""), TypeError, "peer_alias: .* must not be empty"),
    (lambda a: a.connect_to(None), TypeError, "peer_alias"),
    (lambda a: a.connect_to("a"), ValueError, "is this agent itself"),
    (lambda a: a.connect_to("b", transport="pigeon"), ValueError, "'pigeon' is none of auto, rdma, shm, tcp"),
    (lambda a: a.connect_to("b", qp_num=0), ValueError, "qp_num: 0 is not between"),
    (lambda a: a.connect_to("b", ib_port=256), ValueError, "ib_port: 256 is not between"),
    (lambda a: a.connect_to("b", ib_port="1"), TypeError, "ib_port: a whole number is wanted, not str"),
    (lambda a: a.connect_to("b", qp_num=1.5), TypeError, "qp_num: a whole number is wanted, not float"),
    (lambda a: a.connect_to("b", min_bw=3), TypeError, "min_bw: text is wanted"),
    (lambda a: a.connect_to("b", local_port=9), ValueError, "COMPUTEMESH_PEER_HOST"),
    (lambda a: a.connect_to("b", transport="rdma"), RuntimeError, "transport 'rdma'"),
    (lambda a: a.connect_to("b", local_device="mlx5_7"), RuntimeError, "rdma"),
    (lambda a: a.connect_to("zoe"), RuntimeError, "there is no peer 'zoe' in scope ''"),
    (lambda a: a.register_memory_region("kv", 4096, 16, 64), ValueError, "offset: .* with an address it must be 0"),
    (lambda a: a.register_memory_region("", bytearray(1)), ValueError, "name"),
    (lambda a: a.allocate_memory_region("kv", 64, "cuda_fabric"), ValueError, "memory_kind: 'cuda_fabric'"),
    (lambda a: a.allocate_memory_region("kv", 0), ValueError, "length"),
    (lambda a: a.allocate_memory_region("kv", 1e6), TypeError, "length: a whole number is wanted, not float"),
    (lambda a: a.register_memory_region("kv", bytearray(4), fd=99999), ValueError, "fd: 99999 is no descriptor"),
    (lambda a: a.register_memory_region("kv", bytearray(4), fd="x"), TypeError, "fd: a whole number"),
    (lambda a: a.register_memory_region("kv", bytearray(4), fd=0, fd_offset=-1), ValueError, "fd_offset: -1"),
    (lambda a: a.unregister_memory_region(1), TypeError, "mr_name: text is wanted, not int"),
    (lambda a: a.set_desired_topology("b"), TypeError, "target_peers: a list of aliases is wanted, not str"),
    (lambda a: a.set_desired_topology(["b"], min_bw="fast"), ValueError, "min_bw: 'fast' is no bandwidth"),
    (lambda a: a.set_desired_topology(["b"], min_bw=100), TypeError, "min_bw: text is wanted, not int"),
    (lambda a: a.connect_to("b", min_bw="fast"), ValueError, "min_bw: 'fast' is no bandwidth"),
    (lambda a: a.imm_recv("b").wait("x"), TypeError, "timeout: seconds are wanted, not str"),
    (lambda a: a.imm_recv("b").wait_for([]), TypeError, "timeout: seconds are wanted, not list"),
    (lambda a: a.connect_to("b").wait("x"), TypeError, "timeout: seconds are wanted, not str"),
    (lambda a: a.imm_recv("b").add_done_callback(5), TypeError, "call: something to call is wanted, not int"),
    (lambda a: a.set_desired_topology(None), TypeError, "target_peers: a list of aliases is wanted"),
    (lambda a: a.get_mr_info(), TypeError, "get_mr_info"),
    (lambda a: a.get_mr_info("b", "kv", peer_alias="b"), TypeError, "get_mr_info"),
    (lambda a: a.read("b", []), ValueError, "assign"),
    (lambda a: a.read("b", [("kv", 0, 0)]), TypeError, r"assign\[0\]"),
    (lambda a: a.read("b", ("kv", 0, 0, 1), object()), ValueError, "stream"),
    (lambda a: a.read("b", ("kv", 0, 0, 1), epoch=[1, 2]), ValueError, "epoch: 2 of them for 1"),
    (lambda a: a.read("b", ("kv", 0, 0, 1), epoch="1"), TypeError, "epoch: a whole number is wanted, not str"),
    (lambda a: a.read("b", ("kv", 0, 0, 1), checksum=-1), ValueError, "checksum: -1 is negative"),
    (lambda a: a.write_with_imm("b", ("kv", 0, 0, 1), 2**32), ValueError, "imm_data"),
    (lambda a: a.write_with_imm("b", ("kv", 0, 0, 1), -(2**31) - 1), ValueError, "imm_data"),
    (lambda a: a.write_with_imm("b", ("kv", 0, 0, 1), "1"), TypeError, "imm_data"),
    (lambda a: a.send("b", (1, 2)), TypeError, "chunk"),
    (lambda a: a.send("b", 4096), TypeError, "chunk"),
    (lambda a: a.send("b", "text"), TypeError, "chunk"),
    (lambda a: a.recv("b", b"constant"), ValueError, "chunk: it can only be read"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD)
def test_bad_arguments_are_refused_by_name(
    agents: Agents, call: Callable[[Any], object], error: type[Exception], says: str
) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    with pytest.raises(error, match=says):
        call(a)


@pytest.mark.parametrize(("field", "value"), [("alias", "a b"), ("scope", "*"), ("scope", "a b"), ("name_prefix", "")])
def test_a_name_that_is_none_is_refused_before_anybody_hears_of_it(field: str, value: str) -> None:
    def attach(*_: object) -> Any:
        raise AssertionError("it was asked for")

    with pytest.raises(ValueError, match=f"^{field}: "):
        cast(Any, PeerAgent)(**{"attach": attach, field: value})


# --- registered again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_who_names_a_region_gets_the_one_of_now_and_who_has_a_handle_is_told_that_it_is_gone(
    agents: Agents, transport: str
) -> None:
    a, b = agents.pair(transport)
    local = a.register_memory_region("kv", bytearray(8))
    b.allocate_memory_region("kv", 8).view[:] = b"first..."
    here = a.allocate_memory_region("kv", 8)
    handle = a.get_handle("kv", "b")
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    a.read("b", (here.handle, handle, 0, 0, 8)).wait(WAIT_S)
    b.allocate_memory_region("kv", 8).view[:] = b"second.."
    assert code_of(lambda: a.read("b", (here.handle, handle, 0, 0, 8)).wait(WAIT_S)) == STALE_EPOCH
    future = a.read("b", ("kv", 0, 0, 8))
    assert future.wait(WAIT_S) == 0
    assert bytes(here.view) == b"second.."
    assert code_of(lambda: a.read("b", (here.handle, handle, 0, 0, 8)).wait(WAIT_S)) == STALE_EPOCH
    assert a.get_handle("kv", "b") != handle
    assert code_of(lambda: a.read("b", (local, handle, 0, 0, 8))) == NO_REGION


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_region_that_was_unregistered_is_out_of_reach(agents: Agents, transport: str) -> None:
    a, b = agents.pair(transport)
    a.allocate_memory_region("kv", 8)
    with b.allocate_memory_region("kv", 8):
        a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)) == NO_REGION
    assert not b.unregister_memory_region("kv")
    assert b.list_mem_keys() == a.list_mem_keys("b") == []


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_bytes_never_go_to_memory_that_is_registered_here_no_longer(agents: Agents, transport: str) -> None:
    a, b = agents.pair(transport)
    first, second = bytearray(8), bytearray(8)
    a.register_memory_region("kv", first)
    b.allocate_memory_region("kv", 8).view[:] = b"12345678"
    a.read("b", ("kv", 0, 0, 4)).wait(WAIT_S)
    a.register_memory_region("kv", second)
    a.read("b", ("kv", 4, 4, 4)).wait(WAIT_S)
    assert (bytes(first), bytes(second)) == (b"1234\0\0\0\0", b"\0\0\0\x005678")
    a.unregister_memory_region("kv")
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 8))) == NO_REGION


def _nothing(*_: object) -> None:
    pass


LARGE = 64 * 1024**2


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_region_ends_only_when_the_transfers_that_use_it_have(agents: Agents, transport: str) -> None:
    """Behind an address there is nobody who keeps the memory."""
    a, b = agents.pair(transport)
    memory = (ctypes.c_ubyte * LARGE)()
    b.allocate_memory_region("kv", LARGE).view[-4:] = b"last"
    a.register_memory_region("kv", ctypes.addressof(memory), 0, LARGE)
    for end in (
        partial(a.unregister_memory_region, "kv"),
        partial(a.register_memory_region, "kv", bytearray(8)),
        a.shutdown,
    ):
        a.register_memory_region("kv", ctypes.addressof(memory), 0, LARGE)
        future = a.read("b", ("kv", 0, 0, LARGE))
        end()
        assert future.done()
    assert bytes(memory[-4:]) == b"last"


def test_who_ends_a_region_that_a_transfer_does_not_let_go_is_told(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = agents.pair("shm")
    for agent in (a, b):
        agent.allocate_memory_region("kv", LARGE)
    go_on = threading.Event()
    move = ShmLink.move

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(WAIT_S)
        return move(*arguments)

    monkeypatch.setattr(ShmLink, "move", slow)
    monkeypatch.setattr("computemesh.peer.shm._Job.drive", _nothing)
    monkeypatch.setattr(core, "STALL_S", 0.1)
    future = a.read("b", ("kv", 0, 0, LARGE))
    threading.Timer(0.5, go_on.set).start()
    with pytest.raises(PeerError, match="a transfer of this process still uses it") as caught:
        a.unregister_memory_region("kv")
    assert caught.value.code == TIMED_OUT
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 8))) == NO_REGION
    assert future.wait(WAIT_S) == 0


def test_what_is_begun_without_asking_is_begun_without_asking_also_when_it_does_not_fit(agents: Agents) -> None:
    """As the loop of an async program must: the peer-agent may take its time."""
    a, b = agents.pair()
    a.allocate_memory_region("kv", 64)
    b.allocate_memory_region("kv", 8)
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    seat = agents.exchange.seats["", "a"]
    seat.asked.clear()
    for checksum in (None, 0):
        assert a.begin("read", "b", ("kv", 0, 0, 64), checksum=checksum, cached_only=True) is None
        assert a.begin("read", "b", ("other", 0, 0, 8), checksum=checksum, cached_only=True) is None
    assert seat.asked == []
    assert a.begin("read", "b", ("kv", 0, 0, 8), cached_only=True) is not None
    assert seat.asked == []
    assert code_of(lambda: a.begin("read", "b", ("kv", 0, 0, 64))) == OUT_OF_RANGE
    assert seat.asked


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_what_is_moved_and_what_fails_is_counted(agents: Agents, transport: str) -> None:
    a, b = agents.pair(transport)
    for agent in (a, b):
        agent.allocate_memory_region("kv", 64)
    for _ in range(3):
        a.read("b", [("kv", 0, 0, 8), ("kv", 8, 8, 16)]).wait(WAIT_S)
    a.write("b", ("kv", 0, 0, 5)).wait(WAIT_S)
    a.read("b", ("kv", 0, 0, 1), checksum=zlib.crc32(b"\0")).wait(WAIT_S)
    stats = a.stats()
    assert {"reads": 4, "writes": 1, "bytes_read": 73, "bytes_written": 5}.items() <= stats[transport].items()
    assert (stats["under_way"], stats["failed"], stats["regions"]) == (0, {}, 1)
    assert stats["connections"] == {"connecting": 0, "connected": 1, "failed": 0}
    assert b.stats()[transport]["bytes_read"] == 0
    message = a.recv("b", bytearray(8))
    assert a.stats()["under_way"] == 1
    b.shutdown()
    assert code_of(lambda: message.wait(WAIT_S)) == LINK_LOST
    assert (a.stats()["under_way"], a.stats()["failed"]) == (0, {LINK_LOST: 1})


def told(seat: Seat, transport: str) -> tuple[int, int, int, int, dict[str, int]]:
    """The sums of what an agent told its peer-agent that it moved, and what failed."""
    moves = [said.moved[cast(Any, transport)] for said in seat.reports if said.moved]
    assert all(said.moved.keys() <= {transport} for said in seat.reports)
    failed: Counter[str] = Counter()
    for said in seat.reports:
        failed.update(said.failed)
    sums = [sum(getattr(one, name) for one in moves) for name in Moves.__struct_fields__]
    return (sums[0], sums[1], sums[2], sums[3], dict(failed))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_what_is_moved_is_told_to_the_peer_agent(
    agents: Agents, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, and nothing while nothing moves; a peer-agent that is away hears it later."""
    looked: list[threading.Thread] = []
    since = traffic.since

    def look(before: Traffic, now: Traffic) -> Traffic:
        looked.append(threading.current_thread())
        return since(before, now)

    def until_both_looked_again() -> None:
        count = len(looked)
        until(lambda: [times for times in Counter(looked[count:]).values() if times > 1][1:])

    monkeypatch.setattr(traffic, "TELL_S", 0.05)
    monkeypatch.setattr(traffic, "since", look)
    a, b = agents.pair(transport)
    seat = agents.exchange.seats["", "a"]
    for agent in (a, b):
        agent.allocate_memory_region("kv", 64)
    for _ in range(3):
        a.read("b", [("kv", 0, 0, 8), ("kv", 8, 8, 16)]).wait(WAIT_S)
    until(lambda: told(seat, transport) == (3, 0, 72, 0, {}))
    count = len(seat.reports)
    until_both_looked_again()
    assert len(seat.reports) == count
    seat.away = True
    a.write("b", ("kv", 0, 0, 5)).wait(WAIT_S)
    until_both_looked_again()
    assert len(seat.reports) == count
    seat.away = False
    until(lambda: told(seat, transport) == (3, 1, 72, 5, {}))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_rest_of_what_is_moved_and_what_fails_is_told_at_the_end(
    agents: Agents, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "TELL_S", 60.0)
    a, b = agents.pair(transport)
    seat, other = (agents.exchange.seats["", alias] for alias in ("a", "b"))
    for agent in (a, b):
        agent.allocate_memory_region("kv", 64)
    message = a.recv("b", bytearray(8))
    a.read("b", ("kv", 0, 0, 1)).wait(WAIT_S)
    b.shutdown()
    assert code_of(lambda: message.wait(WAIT_S)) == LINK_LOST
    assert not seat.reports
    a.shutdown()
    assert told(seat, transport) == (1, 0, 1, 0, {LINK_LOST: 1})
    assert told(other, transport) == (0, 0, 0, 0, {})


def test_memory_of_an_earlier_registration_ends_only_that_one(agents: Agents) -> None:
    a = agents("a")
    first = a.allocate_memory_region("kv", 8)
    a.allocate_memory_region("kv", 16)
    first.close()
    assert a.list_mem_keys() == ["kv"]


def test_what_was_registered_larger_is_found_so(agents: Agents) -> None:
    a, b = agents.pair("tcp")
    a.register_memory_region("kv", bytearray(64))
    b.register_memory_region("kv", bytearray(8))
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 64))) == OUT_OF_RANGE
    b.register_memory_region("kv", bytearray(64))
    assert a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S) == 0


# --- epochs and checksums ---------------------------------------------------------------------------------------


def test_stale_bytes_are_not_taken_for_fresh_ones(agents: Agents) -> None:
    a, b = agents.pair()
    here = a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8).view[:] = b"first..."
    epochs = a.read("b", ("kv", 0, 0, 8)).epochs
    assert a.read("b", ("kv", 0, 0, 8), epoch=epochs[0]).wait(WAIT_S) == 0
    b.allocate_memory_region("kv", 8).view[:] = b"second.."
    assert code_of(lambda: a.read("b", [("kv", 0, 0, 8)], epoch=epochs).wait(WAIT_S)) == STALE_EPOCH
    assert bytes(here.view) == b"first..."


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_bytes_that_are_not_those_that_were_meant_are_told_apart_by_their_checksum(
    agents: Agents, transport: str
) -> None:
    a, b = agents.pair(transport)
    a.allocate_memory_region("kv", 8).view[:] = b"00000000"
    there = b.allocate_memory_region("kv", 8)
    there.view[:] = b"12345678"
    good = zlib.crc32(b"1234")
    assert a.read("b", ("kv", 0, 0, 4), checksum=good).wait(WAIT_S) == 0
    assert code_of(lambda: a.read("b", ("kv", 0, 4, 4), checksum=good).wait(WAIT_S)) == BAD_CHECKSUM
    assert a.read("b", [("kv", 0, 0, 4), ("kv", 4, 4, 4)], checksum=[good, None]).wait(WAIT_S) == 0
    a.core.regions.get("kv").view[:4] = b"xxxx"  # type: ignore[index]
    assert code_of(lambda: a.write("b", ("kv", 0, 0, 4), checksum=good)) == BAD_CHECKSUM
    assert bytes(there.view) == b"12345678"


# --- connections ------------------------------------------------------------------------------------------------


def test_one_connection_serves_both_sides_whoever_asks(agents: Agents) -> None:
    a, b = agents.pair()
    there = b.connect_to("a")
    assert there is b.query_connection("a")
    assert there is b.connect_to("a").wait(WAIT_S)
    assert there.conn_id == "b:shm:port1->a:shm:port1#qp1"
    assert list(a.get_connections()["b"]) == ["a:shm:port1->b:shm:port1#qp1"]
    assert (there.peer_alias, there.local_nic, there.remote_nic, there.transport) == ("a", "shm", "shm", "shm")
    assert there.endpoint is not None
    assert a.query_connection("b", local_nic="mlx5_0") is None
    assert code_of(lambda: a.connect_to("b", qp_num=2)) == NO_WAY


def test_a_transport_that_is_asked_for_is_taken_and_says_so(agents: Agents) -> None:
    a, _ = agents.pair("tcp")
    conn = a.query_connection("b")
    assert conn is not None
    assert (conn.transport, conn.selection_reason) == ("tcp", "asked for")
    assert conn.peer_endpoint_info is not None
    other = a.connect_to("b").wait(WAIT_S)
    assert other.transport == "shm"
    assert len(a.get_connections()["b"]) == 2


def test_peers_of_two_machines_use_tcp_and_the_reason_says_why_not_rdma(agents: Agents) -> None:
    a, b = agents("a"), agents("b", node_id="node-2")
    with pytest.raises(PeerError, match="not on this machine"):
        a.connect_to("b", transport="shm")
    assert "rdma" in a.connect_to("b").selection_reason or "no other transport" in a.connect_to("b").selection_reason
    del b


@pytest.mark.parametrize("slow", ["a", "b"])
def test_when_one_side_is_connected_the_other_is_too_for_all_that_it_may_be_asked(
    agents: Agents, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    ready, hold = TcpLink.ready, threading.Event()

    def late(link: TcpLink, timeout_s: float) -> None:
        ready(link, timeout_s)
        if link.parties.me == slow:
            assert hold.wait(WAIT_S)

    monkeypatch.setattr(TcpLink, "ready", late)
    a, b = agents("a"), agents("b")
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    mine = a.connect_to("b")
    until(lambda: b.query_connection("a") is not None)
    theirs = b.connect_to("a")
    (theirs if slow == "a" else mine).wait(WAIT_S)
    assert (mine if slow == "a" else theirs).state == "connecting"
    timer = threading.Timer(0.1, hold.set)
    timer.start()
    late_one, other = (a, "b") if slow == "a" else (b, "a")
    number = late_one.imm_recv(other)
    assert late_one.read(other, ("kv", 0, 0, 8)).wait(WAIT_S) == 0
    (b if slow == "a" else a).write_with_imm(slow, ("kv", 0, 0, 8), 7).wait(WAIT_S)
    assert number.imm_data() == 7
    timer.join()


def test_two_that_ask_for_each_other_at_once_have_one_connection(agents: Agents) -> None:
    for number in range(25):
        a, b = agents(f"a{number}"), agents(f"b{number}")
        start = threading.Barrier(2)
        found: list[Any] = []

        def ask(one: PeerAgent, other: str, start: threading.Barrier = start, found: list[Any] = found) -> None:
            start.wait()
            found.append(one.connect_to(other).wait(WAIT_S))

        threads = [threading.Thread(target=ask, args=pair) for pair in ((a, b.alias), (b, a.alias))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(found) == 2
        assert len({conn.link_id for conn in found}) == 1
        assert all(conn.is_connected() for conn in found)
        a.shutdown()
        b.shutdown()


def test_of_two_that_ask_at_once_the_first_in_the_order_of_names_refuses_and_the_other_waits_for_it(
    agents: Agents,
) -> None:
    a, b = agents("a"), agents("b")
    answer, crossed = agents.exchange.answer, threading.Event()
    meet = threading.Barrier(2)

    def at_once(seat: Any, question: Any, fds: Any) -> Any:
        if isinstance(getattr(question, "body", None), Connect) and not crossed.is_set():
            meet.wait(WAIT_S)
            if seat.welcome.alias == "a":  # It goes on when the other has been refused, and was told so.
                until(crossed.is_set)
                return answer(seat, question, fds)
            with pytest.raises(PeerError) as caught:
                answer(seat, question, fds)
            assert caught.value.code == CROSSED
            crossed.set()
            raise caught.value
        return answer(seat, question, fds)

    agents.exchange.answer = at_once  # type: ignore[method-assign]
    mine, theirs = a.connect_to("b"), b.connect_to("a")
    assert mine.wait(WAIT_S).link_id == theirs.wait(WAIT_S).link_id
    assert crossed.is_set()


@pytest.mark.parametrize("conn_id", ["nonsense", "a:shm:port1->z:shm:port1#qp1", "z:shm:port1->b:shm:port1#qp1"])
def test_a_connection_between_others_is_refused(agents: Agents, conn_id: str) -> None:
    agents("b")
    body = Connect(conn_id=conn_id, link="l-x", key="0" * 64, offers={"tcp": {}}, wants=["tcp"])
    said = agents.exchange.tell("b", Accept(peer="a", node_id="node-1", same_host=True, body=body))
    assert isinstance(said, Refused)
    assert (said.code, said.field) == (BAD_MESSAGE, "body.conn_id")


@pytest.mark.parametrize("offer", [{}, {"port": "x"}, {"host": 3, "port": -1}, {"address": ["127.0.0.1", 1]}])
def test_an_offer_that_makes_no_sense_is_refused_and_leaves_no_connection(
    agents: Agents, offer: dict[str, Any]
) -> None:
    b = agents("b")
    body = Connect(
        conn_id="a:tcp:port1->b:tcp:port1#qp1", link="l-x", key="0" * 64, offers={"tcp": offer}, wants=["tcp"]
    )
    agents.exchange.tell("b", Accept(peer="a", node_id="node-1", same_host=True, body=body))
    until(lambda: all(conn.state == "failed" for conns in b.get_connections().values() for conn in conns.values()) or 1)
    assert not b.core.connections.ready


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_when_a_peer_ends_its_connections_fail_at_once_and_say_why(agents: Agents, transport: str) -> None:
    a, b = agents.pair(transport)
    conn = a.query_connection("b")
    assert conn is not None
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    waiting = [a.imm_recv("b"), a.recv("b", bytearray(8))]
    b.shutdown()
    for future in waiting:
        assert code_of(partial(future.wait, WAIT_S)) == LINK_LOST
    until(lambda: conn.state == "failed")
    assert not conn.is_connected()
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 8))) == LINK_LOST
    assert code_of(lambda: conn.wait(1)) == LINK_LOST
    assert a.list_agents() == ["a"]
    assert code_of(lambda: a.connect_to("b")) == NOT_FOUND


def test_a_peer_whose_end_is_heard_of_from_the_peer_agent_first_is_lost_and_not_cancelled(agents: Agents) -> None:
    a, _ = agents.pair("tcp")
    waiting = a.imm_recv("b")
    agents.exchange.tell("a", Lost(peer="b", reason="its process has ended"))
    with pytest.raises(PeerError, match="its process has ended") as caught:
        waiting.wait(WAIT_S)
    assert caught.value.code == LINK_LOST


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_peer_that_came_back_is_connected_to_anew_and_its_old_memory_is_not_taken_for_the_new(
    agents: Agents, transport: str
) -> None:
    a, b = agents.pair(transport)
    here = a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8).view[:] = b"old life"
    old = a.get_handle("kv", "b")
    first = a.query_connection("b")
    b.shutdown()
    assert first is not None
    until(lambda: first.state == "failed")
    again = agents("b")
    again.allocate_memory_region("kv", 8).view[:] = b"new life"
    conn = a.connect_to("b", transport=transport).wait(WAIT_S)
    assert conn is not first
    assert first.state == "failed"
    assert code_of(lambda: a.read("b", (here.handle, old, 0, 0, 8)).wait(WAIT_S)) == STALE_EPOCH
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    assert bytes(here.view) == b"new life"


def test_a_connection_that_one_side_closes_ends_on_both(agents: Agents) -> None:
    a, b = agents.pair()
    mine, theirs = a.query_connection("b"), b.query_connection("a")
    assert mine is not None
    assert theirs is not None
    mine.close()
    until(lambda: theirs.state == "failed")
    assert code_of(lambda: mine.wait(1)) == CLOSED
    assert a.connect_to("b").wait(WAIT_S) is not mine


def test_what_a_peer_offers_can_be_learnt_anew(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    b.allocate_memory_region("kv", 16)
    conn = a.query_connection("b")
    assert conn is not None
    assert conn.sync_memory_regions(timeout=WAIT_S) is conn
    assert a.read("b", ("kv", 0, 8, 8)).wait(WAIT_S) == 0


def test_any_number_of_regions_is_learnt_anew(agents: Agents) -> None:
    a, b = agents.pair()
    for number in range(150):
        b.allocate_memory_region(f"kv-{number}", 8)
    a.allocate_memory_region("here", 8)
    everything = [("here", f"kv-{number}", 0, 0, 8) for number in range(150)]
    a.read("b", everything).wait(WAIT_S)
    conn = a.query_connection("b")
    assert conn is not None
    for number in range(150):
        b.register_memory_region(f"kv-{number}", bytearray(8))
    conn.sync_memory_regions(timeout=WAIT_S)
    asked = len(agents.exchange.seats["", "a"].asked)
    assert a.read("b", everything).transport == "tcp"
    assert len(agents.exchange.seats["", "a"].asked) == asked


@pytest.mark.parametrize("said", [{}, {"epoch": None, "checksum": [None] * 50}])
def test_the_regions_of_an_order_are_asked_for_at_once(agents: Agents, said: dict[str, Any]) -> None:
    a, b = agents.pair()
    for number in range(50):
        for agent in (a, b):
            agent.allocate_memory_region(f"layer-{number}", 8)
    known = a.get_handle("layer-0", "b")
    here = a.get_handle("layer-0")
    asked = len(agents.exchange.seats["", "a"].asked)
    everything: list[Any] = [(f"layer-{number}", 0, 0, 8) for number in range(50)]
    everything[0] = (here, known, 0, 0, 8)
    assert a.read("b", everything, **said).wait(WAIT_S) == 0
    assert len(agents.exchange.seats["", "a"].asked) == asked + 1


# --- what is known of others ------------------------------------------------------------------------------------


def test_peers_see_each_other_within_their_scope_only(agents: Agents) -> None:
    a, b, other = agents("a"), agents("b"), agents("c", scope="job")
    assert a.list_agents() == b.list_agents() == ["a", "b"]
    assert other.list_agents() == ["c"]
    assert code_of(lambda: a.connect_to("c")) == NOT_FOUND
    assert a.get_resource("c") is None
    assert a.list_mem_keys("c") == []
    assert a.get_mr_info("c", "kv") is None


def test_a_resource_record_has_the_shape_that_dlslime_gives_it(agents: Agents) -> None:
    a = agents("a")
    a.allocate_memory_region("kv", 8)
    resource = a.get_resource()
    assert resource is not None
    assert set(resource) == {
        "schema_version",
        "topology_epoch",
        "host",
        "nics",
        "accelerators",
        "memory_keys",
        "topology_backends",
    }
    assert set(resource["host"]) == {"hostname", "address"}
    assert resource["memory_keys"] == ["kv"]
    assert resource["topology_backends"]["tcp"] == {"available": True}


def test_the_record_of_a_region_is_found_by_all_forms_that_are_documented_and_those_that_are_real(
    agents: Agents,
) -> None:
    a, b = agents("a"), agents("b")
    mine, theirs = bytearray(8), bytearray(16)
    a.register_memory_region("kv", mine)
    b.register_memory_region("kv", theirs)
    info = a.get_mr_info("kv")
    assert info is not None
    assert {key: info[key] for key in ("agent_name", "mr_name", "length", "lkey")} == {
        "agent_name": "a",
        "mr_name": "kv",
        "length": 8,
        "lkey": 0,
    }
    assert info["addr"] == ctypes.addressof(ctypes.c_ubyte.from_buffer(mine))
    there = a.get_mr_info("kv", peer_alias="b")
    assert there is not None
    assert there["length"] == 16
    assert there == a.get_mr_info("b", "kv") == a.get_mr_info("b", mr_name="kv") == b.get_mr_info("kv")
    assert a.get_mr_info("none") is None
    assert a.get_mr_info("b", "none") is None
    assert a.list_mem_keys("b") == b.list_mem_keys() == ["kv"]


# --- lives ------------------------------------------------------------------------------------------------------


def test_who_asks_for_a_taken_alias_is_refused_and_harms_nobody(agents: Agents) -> None:
    a, b = agents.pair()
    a.allocate_memory_region("kv", 8)
    b.allocate_memory_region("kv", 8)
    assert code_of(lambda: agents("a")) == ALIAS_TAKEN
    gc.collect()
    assert b.list_agents() == ["a", "b"]
    assert b.list_mem_keys("a") == ["kv"]
    assert b.read("a", ("kv", 0, 0, 8)).wait(WAIT_S) == 0


def test_an_agent_that_nobody_holds_ends_by_itself_and_twice_is_fine(agents: Agents) -> None:
    agent = agents("a")
    agents.started.clear()
    ref = weakref.ref(agent)
    agent.allocate_memory_region("kv", 8)
    del agent
    gc.collect()
    assert ref() is None
    assert not agents.exchange.seats
    with agents("a") as again:
        again.shutdown()
    again.shutdown()
    assert code_of(again.list_agents) == CLOSED
    assert code_of(lambda: again.allocate_memory_region("kv", 8)) == CLOSED


def test_lives_leave_no_threads_and_no_descriptors(agents: Agents) -> None:
    others = set(threading.enumerate())  # Of agents that go on.

    def threads() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name.startswith("peer-") and one not in others]

    def live() -> None:
        a, b = agents.pair()
        a.allocate_memory_region("kv", 8)
        b.allocate_memory_region("kv", 8)
        a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
        b.shutdown()
        a.shutdown()
        agents.started.clear()

    live()
    gc.collect()
    until(lambda: not threads())
    before = _open_files()
    for _ in range(10):
        live()
    gc.collect()
    until(lambda: _open_files() < before + 10)  # What earlier tests left may come and go.
    until(lambda: not threads())


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def _sockets() -> set[str]:
    return {link for fd in Path("/proc/self/fd").iterdir() if "socket:" in (link := _target(fd)) or "event" in link}


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except FileNotFoundError:  # That of the folder itself.
        return ""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_child_made_by_fork_has_none_of_the_connections_and_its_parent_keeps_them(
    agents: Agents, transport: str
) -> None:
    before = _sockets()
    a, b = agents.pair(transport)
    a.register_memory_region("kv", bytearray(8))
    b.allocate_memory_region("kv", 8).view[:] = b"12345678"
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    conn = a.query_connection("b")
    assert conn is not None
    told: list[object] = []
    message, number = a.recv("b", bytearray(8)), a.imm_recv("b")
    message.add_done_callback(told.append)
    child = os.fork()
    if not child:  # pragma: no cover
        try:
            assert conn.state == "failed"
            for call in (
                lambda: a.read("b", ("kv", 0, 0, 8)),
                lambda: a.register_memory_region("kv", bytearray(8)),
                lambda: a.send("b", b"hello"),
                lambda: a.connect_to("b"),
                lambda: message.wait(WAIT_S),
                number.imm_data,
            ):
                assert code_of(call) == CLOSED
            assert not told
            assert _sockets() <= before
            a.shutdown()
            a.unregister_memory_region("kv")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    b.send("a", b"message").wait(WAIT_S)
    assert (message.wait(WAIT_S), message.received, told) == (0, 7, [message])
    assert a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S) == 0
    b.write_with_imm("a", ("kv", 0, 0, 8), 7).wait(WAIT_S)
    assert number.imm_data() == 7


# --- what others order ------------------------------------------------------------------------------------------


def order(agents: Agents, **said: Any) -> Any:
    terms: dict[str, Any] = {
        "transfer_id": "t-1",
        "alias": "a",
        "peer": "b",
        "kind": "read",
        "timeout_s": WAIT_S,
        **said,
    }
    return agents.exchange.tell("a", Order(transfer=Transfer(**terms)))


def outcome(agents: Agents) -> Any:
    seat = agents.exchange.seats["", "a"]
    until(lambda: seat.ended)
    return seat.ended.pop().outcome


def test_a_transfer_that_is_ordered_is_done_and_told_with_epochs_and_checksums(agents: Agents) -> None:
    a, b = agents("a"), agents("b")
    here, there = a.allocate_memory_region("kv", 8), b.allocate_memory_region("kv", 8)
    there.view[:] = b"12345678"
    said = order(agents, pieces=[Piece(local="kv", local_offset=4, length=4)], checksums=True)
    assert isinstance(said, Begun)
    end = outcome(agents)
    assert (end.ok, end.bytes, end.transports, end.code) == (True, 4, ["shm"], "")
    assert end.checksums == [f"{zlib.crc32(b'1234'):08x}"]
    assert bytes(here.view) == b"\0\0\0\x001234"
    piece = Piece(local="kv", length=4, epoch=end.epochs[0], checksum=end.checksums[0])
    order(agents, pieces=[piece])
    assert outcome(agents).ok
    b.allocate_memory_region("kv", 8)
    order(agents, pieces=[piece])
    assert outcome(agents).code == STALE_EPOCH


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"pieces": [Piece(local="none", length=4)]}, NO_REGION),
        ({"pieces": [Piece(local="kv", local_offset=8, length=4)]}, OUT_OF_RANGE),
    ],
)
def test_an_order_that_cannot_be_begun_is_refused(agents: Agents, said: Any, code: str) -> None:
    agents("a").allocate_memory_region("kv", 8)
    refused = order(agents, **said)
    assert isinstance(refused, Refused)
    assert refused.code == code


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"peer": "zoe", "pieces": [Piece(local="kv", length=4)]}, NOT_FOUND),
        ({"pieces": [Piece(local="kv", remote="none", length=4)]}, NO_REGION),
        ({"pieces": [Piece(local="kv", remote_offset=8, length=4)]}, OUT_OF_RANGE),
        ({"pieces": [Piece(local="kv", length=4, checksum="00000000")]}, BAD_CHECKSUM),
        ({"kind": "write", "pieces": [Piece(local="kv", remote="constant", length=4)]}, READ_ONLY),
    ],
)
def test_an_order_that_goes_wrong_ends_with_its_reason(agents: Agents, said: Any, code: str) -> None:
    agents("a").allocate_memory_region("kv", 8)
    b = agents("b")
    b.allocate_memory_region("kv", 8).view[:] = b"12345678"
    b.register_memory_region("constant", bytearray(8), writable=False)
    assert isinstance(order(agents, **said), Begun)
    end = outcome(agents)
    assert (end.ok, end.code, end.bytes) == (False, code, 0)
    assert end.reason


def test_desired_connections_are_made_and_made_again_when_the_peer_comes_back(agents: Agents) -> None:
    a = agents("a")
    agents.exchange.tell("a", Desired(topology=Topology(alias="a", target_peers=["a", "b"])))
    b = agents("b")
    until(lambda: "b" in a.core.connections.ready)
    b.shutdown()
    until(lambda: "b" not in a.core.connections.ready)
    agents("b")
    until(lambda: "b" in a.core.connections.ready)


# --- the end ----------------------------------------------------------------------------------------------------

FORGETFUL = """
from computemesh.peer.agent import PeerAgent
from computemesh.testing.peers import Exchange

exchange = Exchange()
a = PeerAgent(alias="a", attach=exchange.attach("a"))
b = PeerAgent(alias="b", attach=exchange.attach("b"))
a.register_memory_region("kv", bytearray(8))
b.register_memory_region("kv", bytearray(8))
a.connect_to("b", transport="tcp").wait(20)
a.read("b", ("kv", 0, 0, 8)).wait(20)
"""


def test_a_program_that_forgets_to_shut_its_agents_down_ends_all_the_same(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FORGETFUL)
    assert subprocess.run([sys.executable, program], timeout=WAIT_S, check=False).returncode == 0


def test_who_interrupts_a_thread_that_copies_ends_the_transfer(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = agents.pair("shm")
    size = 64 * 1024**2
    for agent in (a, b):
        agent.allocate_memory_region("kv", size)
    a.read("b", ("kv", 0, 0, 8)).wait(WAIT_S)
    move = ShmLink.move

    def interrupted(*arguments: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return move(*arguments)

    def nothing(endpoint: Any, job: Any) -> None:
        pass

    monkeypatch.setattr(ShmLink, "move", interrupted)
    monkeypatch.setattr(ShmEndpoint, "work", nothing)  # The one that waits is faster than they are.
    future = a.write("b", ("kv", 0, 0, size))
    with pytest.raises(KeyboardInterrupt):
        future.wait(WAIT_S)
    assert future.done()
    assert future.error() is not None
    b.unregister_memory_region("kv")  # Nobody writes to it any more.


def test_what_a_transfer_left_to_be_done_is_done_also_when_the_peer_has_ended_meanwhile() -> None:
    life, first, last = Attachment(), threading.Event(), threading.Event()
    life.chore(first.set)
    assert first.wait(WAIT_S)
    life.end("the end")
    life.chore(last.set)
    assert last.wait(WAIT_S)


def test_an_agent_may_be_shut_down_by_who_is_told_that_a_transfer_has_ended(agents: Agents) -> None:
    a, b = agents.pair("tcp")
    a.register_memory_region("kv", bytearray(8))
    b.register_memory_region("kv", bytearray(8))
    future = a.read("b", ("kv", 0, 0, 8))
    ended = threading.Event()

    def end(_: object) -> None:
        a.shutdown()
        ended.set()

    def wait() -> None:
        future.add_done_callback(end)
        future.wait(WAIT_S)

    threading.Thread(target=wait, daemon=True).start()
    assert ended.wait(WAIT_S)


@pytest.mark.parametrize("address", [["127.0.0.1", 10**9], ["a" * 70, 1], ["\0", 1], ["..", 1]])
def test_an_offer_with_an_address_that_is_none_is_refused_and_the_next_one_is_taken(
    agents: Agents, address: list[Any]
) -> None:
    b = agents("b")
    offers: dict[Any, Any] = {"tcp": {"version": 1, "lanes": 2, "address": address}}
    connect = Connect(conn_id="a:tcp:port1->b:tcp:port1#qp1", link="l-1", key="0" * 64, offers=offers, wants=["tcp"])
    refused = agents.exchange.tell("b", Accept(peer="a", node_id="node-2", same_host=False, body=connect))
    assert isinstance(refused, Refused)
    assert refused.code == NO_WAY
    agents("a")
    b.connect_to("a", transport="tcp").wait(WAIT_S)


def test_an_agent_that_lives_long_forgets_the_first_of_its_failed_connections(agents: Agents) -> None:
    b = agents("b")
    for number in range(FAILED_MAX + 10):
        connect = Connect(
            conn_id=f"a-{number}:tcp:port1->b:tcp:port1#qp1", link=f"l-{number}", key="0" * 64, offers={}, wants=["tcp"]
        )
        told = agents.exchange.tell("b", Accept(peer=f"a-{number}", node_id="n", same_host=True, body=connect))
        assert isinstance(told, Refused)
    found = b.get_connections()
    assert len(found) == FAILED_MAX
    assert "a-0" not in found
    assert f"a-{FAILED_MAX + 9}" in found
