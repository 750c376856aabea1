"""Frames between a process and its peer-agent: cut anywhere, with anything in them, and whose descriptors are whose.

Each test counts the descriptors of this process before and after: none may be left open.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.base import encode
from computemesh.contracts.peers import Region, Resolve
from computemesh.peer.frames import (
    OUTBOX_BYTES_MAX,
    OUTBOX_FDS_MAX,
    FrameError,
    Outbox,
    Said,
    Splitter,
    Unreadable,
    close_fds,
    discard,
    pack,
    receive,
)
from computemesh.peer.signals import (
    FDS_MAX,
    FRAME_MAX,
    LINKS_MAX,
    Call,
    Called,
    Done,
    Frame,
    Hello,
    ListPeers,
    PutEpochs,
    PutRegion,
    RegionsResolved,
)

FOLDER = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(list(FOLDER.iterdir()))


@pytest.fixture(autouse=True)
def no_leak() -> Generator[None]:
    """No descriptor is left open by a test."""
    before = open_fds()
    yield
    assert open_fds() == before


@contextlib.contextmanager
def pair() -> Generator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with here, there:
        yield here, there


@contextlib.contextmanager
def files(count: int) -> Generator[list[int]]:
    """Descriptors of files, each with its number in it."""
    with contextlib.ExitStack() as stack:
        made: list[int] = []
        for number in range(count):
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(str(number).encode())
            file.flush()
            made.append(file.fileno())
        yield made


def written(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


FRAMES = [
    Frame(id=1, ask=Hello(scope="job", alias="a", resource={"nics": ["ü"]})),
    Frame(id=2, answer=Done(found=False)),
    Frame(id=3, ask=Call(peer="b", body=Resolve(link="l-1", names=["kv"]))),
    Frame(id=4, ask=ListPeers()),
]


@given(cuts=st.lists(st.integers(min_value=0, max_value=sum(len(pack(frame)) for frame in FRAMES)), max_size=12))
def test_frames_come_out_whole_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    """Also in the middle of a length, and many at once."""
    data = b"".join(pack(frame) for frame in FRAMES)
    splitter = Splitter()
    found: list[Said | Unreadable] = []
    edges = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        found += splitter.feed(data[start:end])
    assert found == [Said(frame) for frame in FRAMES]


def test_descriptors_come_with_the_frame_that_names_them_and_with_no_other() -> None:
    """Frames without any stand before, between and behind; the files are those that were sent, in their order."""
    resolved = RegionsResolved(
        regions=[Region(name="kv", epoch=1, length=4, tokens={"shm": {"offset": 0}})], fds=["", "kv"]
    )
    frames = [
        (Frame(id=1, ask=ListPeers()), 0),
        (Frame(id=2, ask=PutEpochs()), 1),
        (Frame(id=3, ask=ListPeers()), 0),
        (Frame(id=4, ask=PutRegion(name="kv", length=4, epoch=1, fds=1)), 1),
        (Frame(id=5, answer=Called(body=resolved, same_host=True)), 2),
        (Frame(id=6, ask=PutRegion(name="private", length=4, epoch=2)), 0),
    ]
    with pair() as (here, there), files(4) as fds:
        outbox, splitter = Outbox(), Splitter()
        at = 0
        for frame, count in frames:
            outbox.put(frame, fds[at : at + count])
            at += count
        assert outbox.flush(here)
        here.shutdown(socket.SHUT_WR)
        found: list[Said] = []
        while (got := receive(there))[0]:
            found += [said for said in splitter.feed(*got) if isinstance(said, Said)]
        assert [said.frame for said in found] == [frame for frame, _ in frames]
        assert [[written(fd) for fd in said.fds] for said in found] == [[], [b"0"], [], [b"1"], [b"2", b"3"], []]
        assert not any(os.get_inheritable(fd) for said in found for fd in said.fds)
        for said in found:
            discard(said)


def test_a_large_frame_keeps_its_descriptors_though_it_comes_in_many_pieces() -> None:
    """The socket takes only a part at once; the rest goes when there is room, without the descriptors."""
    big = Frame(id=1, ask=PutRegion(name="kv", length=4, epoch=1, tokens={"rdma": {"pad": "x" * 3_000_000}}, fds=1))
    with pair() as (here, there), files(1) as fds:
        here.setblocking(False)
        there.setblocking(False)
        outbox, splitter = Outbox(), Splitter()
        outbox.put(big, fds)
        assert not outbox.flush(here)
        found: list[Said | Unreadable] = []
        while not found:
            found += splitter.feed(*receive(there))
            outbox.flush(here)
        (said,) = found
        assert isinstance(said, Said)
        assert said.frame == big
        assert [written(fd) for fd in said.fds] == [b"0"]
        assert not outbox
        discard(said)


MANY_LINKS = encode({"id": 7, "ask": {"kind": "hello", "links": {f"l-{n}": "a" for n in range(LINKS_MAX + 1)}}})


@pytest.mark.parametrize(
    ("body", "number", "answers", "field", "reason"),
    [
        (b"no json", 0, False, "", "JSON is malformed"),
        (b"", 0, False, "", "one of 'ask', 'answer' and 'refused'"),
        (b"[]", 0, False, "", "Expected 'object'"),
        (b'{"id":7,"ask":{"kind":"helo"}}', 7, False, "ask.kind", "helo"),
        (b'{"id":7,"ask":{"kind":"hello","pid":"x"}}', 7, False, "ask.pid", "Expected 'int'"),
        (b'{"id":7,"ask":{"kind":"hello","alias":"a b"}}', 7, False, "ask.alias", "an id is"),
        (b'{"id":7,"answer":{"kind":"done","found":1}}', 7, True, "answer.found", "Expected 'bool'"),
        (b'{"id":7,"answer":{"kind":"done"},"ask":{"kind":"list_peers"}}', 7, False, "", "one of"),
        (b'{"id":7,"ask":{"kind":"put_epochs"}}', 7, False, "ask.fds", "names 1 descriptors, and 0 came"),
        (b'{"id":7,"ask":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, False, "", "nested deeper"),
        (b'{"id":7,"ask":{"kind":"hello","scope":"\xff"}}', 7, False, "", "UTF-8"),
        (MANY_LINKS, 7, False, "ask.links", str(LINKS_MAX)),
    ],
)
def test_a_frame_that_cannot_be_read_is_a_refusal_and_the_next_one_is_read(
    body: bytes, number: int, answers: bool, field: str, reason: str
) -> None:
    """It names the field, and the question if there is one to be seen."""
    splitter = Splitter()
    bad, good = splitter.feed(struct.pack("!I", len(body)) + body + pack(FRAMES[0]))
    assert isinstance(bad, Unreadable)
    assert (bad.id, bad.answers, bad.refused.code, bad.refused.field) == (number, answers, "bad_message", field)
    assert reason in bad.refused.reason
    assert good == Said(FRAMES[0])


def test_a_frame_beyond_the_bound_ends_the_connection_before_its_bytes_are_kept() -> None:
    """Its length alone is enough."""
    splitter = Splitter()
    with pytest.raises(FrameError, match=f"{FRAME_MAX + 1} bytes; {FRAME_MAX} may be sent"):
        splitter.feed(pack(FRAMES[0]) + struct.pack("!I", FRAME_MAX + 1))
    with pytest.raises(FrameError, match="may be sent"):
        pack(Frame(id=1, ask=Hello(resource={"x": "y" * FRAME_MAX})))


@pytest.mark.parametrize("cut", [1, 3, 4, 20])
def test_who_closes_in_the_middle_of_a_frame_leaves_no_descriptor_behind(cut: int) -> None:
    """The first bytes came, and the descriptors with them; the rest never does."""
    with pair() as (here, there), files(1) as fds:
        data = pack(Frame(id=4, ask=PutRegion(name="kv", length=4, epoch=1, fds=1)))
        socket.send_fds(here, [data[:cut]], fds)
        here.shutdown(socket.SHUT_WR)
        splitter = Splitter()
        assert splitter.feed(*receive(there)) == []
        assert receive(there) == (b"", [])
        splitter.close()


def test_descriptors_that_no_frame_names_are_closed() -> None:
    """With a frame that names none, with one that cannot be read, and beyond those that were named."""
    bad = b'{"ask":{"kind":"put_epochs","fds":3}}'
    sent = [
        (pack(Frame(id=4, ask=ListPeers())), 3, 0),
        (struct.pack("!I", len(bad)) + bad, 3, 0),
        (pack(Frame(id=4, ask=PutEpochs())), 3, 1),
    ]
    with pair() as (here, there), files(3) as fds:
        splitter = Splitter()
        for data, count, taken in sent:
            socket.send_fds(here, [data], fds[:count])
            before = open_fds()
            (said,) = splitter.feed(*receive(there))
            assert open_fds() == before + taken
            discard(said)


def test_who_sends_more_descriptors_than_a_frame_may_have_is_cut_off() -> None:
    """They would be kept until the frame is whole, which it need never be."""
    with pair() as (here, there), files(FDS_MAX) as fds:
        splitter = Splitter()
        socket.send_fds(here, [b"\0"], fds)
        assert splitter.feed(*receive(there)) == []
        socket.send_fds(here, [b"\0"], fds[:1])
        with pytest.raises(FrameError, match="65 descriptors that no frame names"):
            splitter.feed(*receive(there))


def test_what_waits_for_a_side_that_does_not_read_is_bounded_and_gives_its_descriptors_back() -> None:
    """The outbox refuses more; closed, it leaves nothing open."""
    big = Frame(id=1, ask=PutRegion(name="kv", length=4, epoch=1, tokens={"rdma": {"pad": "x" * 4_000_000}}, fds=1))
    with files(1) as fds:
        outbox = Outbox()
        for _ in range(OUTBOX_BYTES_MAX // len(pack(big))):
            outbox.put(big, fds)
        with pytest.raises(FrameError, match="wait to be read"):
            outbox.put(big, fds)
        outbox.close()
        assert not outbox


def test_descriptors_that_wait_for_a_side_that_does_not_read_are_bounded() -> None:
    """Small frames may carry many. Those that were taken count no more."""
    small = Frame(id=1, answer=Called(body=RegionsResolved(regions=[], fds=["x"] * FDS_MAX)))
    here, there = socket.socketpair()
    with here, there, files(FDS_MAX) as fds:
        outbox = Outbox()
        outbox.put(small, fds)
        assert outbox.flush(here)
        for fd in receive(there)[1]:
            os.close(fd)
        for _ in range(OUTBOX_FDS_MAX // FDS_MAX):
            outbox.put(small, fds)
        with pytest.raises(FrameError, match="wait to be taken"):
            outbox.put(small, fds)
        outbox.close()


def test_a_descriptor_that_cannot_be_copied_sends_nothing() -> None:
    """The others are given back."""
    with files(1) as fds:
        outbox = Outbox()
        answer = Called(body=RegionsResolved(regions=[], fds=["a", "b"]))
        with pytest.raises(OSError, match="Bad file descriptor"):
            outbox.put(Frame(id=1, answer=answer), [fds[0], 10_000])
        assert not outbox
        close_fds([])
