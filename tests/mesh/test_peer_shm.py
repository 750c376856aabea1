"""Shared memory between two processes: what comes over is right, whatever happens to the region meanwhile."""

from __future__ import annotations

import gc
import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from computemesh.peer import epochs, memory, shm
from computemesh.peer.epochs import ROWS, SLOTS, Epochs, PeerEpochs
from computemesh.peer.memory import Descriptor, SharedMemory, is_sealed, reopened
from computemesh.peer.shm import COPIES_MAX, INLINE_MAX, PIECE, SLICE_MAX, ShmEndpoint, pieces
from computemesh.peer.transport import Copy, LocalRegion, Outcome, RemoteRegion, TransportError
from tests.mesh.peer_process import PARTIES, PeerProcess, Reader, digest, local_region, moved, pattern

MIB = 1024**2
Place = tuple[bool, int, int, int]
PEER_ZEROED = bytes(SLOTS * 8)


@pytest.fixture(scope="module")
def other() -> Iterator[PeerProcess]:
    with PeerProcess() as process:
        yield process


@pytest.fixture
def mine() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def room(length: int, name: str = "mine") -> LocalRegion:
    return local_region(SharedMemory.allocate(length), name)


def view_of(region: LocalRegion) -> memoryview:
    assert region.view is not None
    return region.view


def held() -> tuple[int, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("/memfd:computemesh")  # noqa: PTH208


def peer_is_gone(remote: RemoteRegion) -> None:
    """What its peer-agent does then."""
    page = reopened(remote.token["epochs_fd"].fd, writable=True)
    os.pwrite(page.fd, PEER_ZEROED, 0)


@pytest.mark.parametrize(
    "length", [0, 1, 4096, SLICE_MAX, SLICE_MAX + 1, INLINE_MAX, INLINE_MAX + 1, 2 * PIECE + INLINE_MAX + 4097]
)
def test_bytes_come_and_go_whole_whatever_the_size(other: PeerProcess, mine: Reader, length: int) -> None:
    """Each size of copy goes its own way: by slices, by memmove, by several threads."""
    remote = other.put(length=max(length, 1), seed=length)
    local = room(max(length, 1))
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)) == Outcome()
    assert digest(view_of(local)[:length]) == digest(pattern(length, length))
    view_of(local)[:] = pattern(max(length, 1), 77)
    assert moved(mine.link, "write", Copy(local, 0, remote, 0, length)) == Outcome()
    assert other.digest() == digest(pattern(max(length, 1), 77 if length else 0))
    other.ask("end", name="kv")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orders=st.lists(
        st.tuples(
            st.booleans(),
            st.lists(
                st.tuples(st.booleans(), st.integers(0, 300_000), st.integers(0, 300_000), st.integers(0, 300_000)),
                min_size=1,
                max_size=6,
            ),
        ),
        max_size=8,
    ),
    limits=st.sampled_from([(INLINE_MAX, 1024, SLICE_MAX, PIECE), (100, 2, 50, 1000), (0, 0, 0, 65_536)]),
)
def test_transfers_do_what_copies_of_bytes_do(
    other: PeerProcess, orders: list[tuple[bool, list[Place]]], limits: tuple[int, int, int, int]
) -> None:
    """Held against two bytearrays: orders of several copies, between several regions, with all ways of copying."""
    mine, size = Reader(), 300_000
    remotes = [other.put(f"r{number}", length=size, seed=number) for number in range(2)]
    models = [bytearray(pattern(size, number)) for number in range(2)]
    local, model = room(size), bytearray(size)
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in zip(("INLINE_MAX", "COPIES_MAX", "SLICE_MAX", "PIECE"), limits, strict=True):
            patch.setattr(shm, name, limit)
        for writing, places in orders:
            copies = [
                Copy(local, here, remotes[int(second)], there, min(length, size - here, size - there))
                for second, here, there, length in places
            ]
            if not writing and _overlap(copies):
                continue  # Whose bytes stay is not said.
            if writing and _overlap([Copy(local, c.remote_offset, c.remote, 0, c.length) for c in copies]):
                continue
            assert moved(mine.link, "write" if writing else "read", *copies) == Outcome()
            for copy in copies:
                here = slice(copy.local_offset, copy.local_offset + copy.length)
                there = slice(copy.remote_offset, copy.remote_offset + copy.length)
                distant = models[remotes.index(copy.remote)]
                if writing:
                    distant[there] = model[here]
                else:
                    model[here] = distant[there]
    assert view_of(local) == model
    assert [other.digest(f"r{number}") for number in range(2)] == [digest(bytes(distant)) for distant in models]
    mine.close()


def _overlap(copies: list[Copy]) -> bool:
    spans = sorted((copy.local_offset, copy.local_offset + copy.length) for copy in copies if copy.length)
    return any(after[0] < before[1] for before, after in itertools.pairwise(spans))


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), max_size=30), st.integers(1, 200))
def test_a_large_order_is_cut_into_parts_that_are_all_of_it(lengths: list[int], piece: int) -> None:
    local, remote = room(1), RemoteRegion("r", 1, 1, True, {})
    copies = [Copy(local, 0, remote, 0, length) for length in lengths]
    parts = list(pieces(copies, piece))
    assert all(0 < sum(length for _, _, length in part) <= piece for part in parts)
    assert all(sum(length for _, _, length in part) == piece for part in parts[:-1])
    found = [(copy, at + byte) for part in parts for copy, at, length in part for byte in range(length)]
    assert found == [(copy, byte) for copy in copies for byte in range(copy.length)]


@pytest.mark.parametrize(
    ("here", "there", "length"),
    [(0, 1, 4096), (1, 0, 4096), (0, 4096, 1), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (0, 2**63, 1), (0, 0, 8192)],
)
@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_leaves_a_region_is_refused_and_touches_nothing(
    other: PeerProcess, mine: Reader, kind: str, here: int, there: int, length: int, mapped: bool
) -> None:
    remote, local = other.put(length=4096, seed=1), room(4096)
    if mapped:
        assert moved(mine.link, kind, Copy(local, 0, remote, 0, 0)) == Outcome()
    assert moved(mine.link, kind, Copy(local, here, remote, there, length)).code == "out_of_range"
    assert other.digest() == digest(pattern(4096, 1))
    assert bytes(view_of(local)) == bytes(4096)
    other.ask("end", name="kv")


@pytest.mark.parametrize("length", [4096, INLINE_MAX + 1])
def test_a_region_that_may_only_be_read_is_mapped_so_and_writes_are_refused(
    other: PeerProcess, mine: Reader, length: int
) -> None:
    remote, local = other.put("ro", length=length, seed=2, writable=False), room(length)
    assert moved(mine.link, "write", Copy(local, 0, remote, 0, length)).code == "read_only"
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)) == Outcome()
    assert other.digest("ro") == digest(view_of(local)) == digest(pattern(length, 2))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if _start(line) == _address(remote)]
    assert [line.split()[1] for line in mapped] == ["r--s"]
    other.ask("end", name="ro")


def test_a_descriptor_that_can_only_be_read_makes_a_region_that_can_only_be_read(
    other: PeerProcess, mine: Reader
) -> None:
    """Whatever its owner says of it."""
    remote = other.put("ro", length=4096, writable=False)
    lying = RemoteRegion("ro", remote.epoch, 4096, True, remote.token)
    assert moved(mine.link, "write", Copy(room(4096), 0, lying, 0, 1)).code == "read_only"
    assert moved(mine.link, "read", Copy(room(4096), 0, lying, 0, 1)) == Outcome()
    other.ask("end", name="ro")


def _start(line: str) -> int:
    return int(line.partition("-")[0], 16)


def _address(remote: RemoteRegion) -> int:
    return int(remote.state.address)


# --- stale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("length", [64, INLINE_MAX + 1])
def test_a_region_that_was_found_earlier_is_stale_once_it_ended_or_was_registered_again(
    other: PeerProcess, mine: Reader, kind: str, length: int
) -> None:
    old, local = other.put(length=length, seed=1), room(length)
    unused = RemoteRegion(
        "kv", old.epoch, length, True, {**old.token, "fd": reopened(old.token["fd"].fd, writable=True)}
    )
    assert moved(mine.link, kind, Copy(local, 0, old, 0, length)) == Outcome()
    new = other.put(length=length, seed=2)
    for one in (old, unused):
        assert moved(mine.link, kind, Copy(local, 0, one, 0, length)).code == "stale_epoch"
    assert other.digest() == digest(pattern(length, 2))
    assert moved(mine.link, "read", Copy(local, 0, new, 0, length)) == Outcome()
    assert digest(view_of(local)) == digest(pattern(length, 2))
    other.ask("end", name="kv")
    assert moved(mine.link, kind, Copy(local, 0, new, 0, length)).code == "stale_epoch"


def test_another_region_in_the_same_slot_is_not_taken_for_the_old_one(other: PeerProcess, mine: Reader) -> None:
    old, local = other.put("one", length=64), room(64)
    other.ask("end", name="one")
    new = other.put("two", length=64)
    assert new.token["slot"] == old.token["slot"]
    assert moved(mine.link, "read", Copy(local, 0, old, 0, 64)).code == "stale_epoch"
    assert moved(mine.link, "read", Copy(local, 0, new, 0, 64)) == Outcome()
    other.ask("end", name="two")


@pytest.mark.parametrize("length", [4096, INLINE_MAX + PIECE])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_region_that_is_registered_again_during_a_read_is_found_stale_at_its_end(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch, length: int, before: bool, mapped: bool
) -> None:
    """Between the first look and the copy, and between the copy and the last look."""
    old, local = other.put(length=length, seed=1), room(length)
    if mapped:
        assert moved(mine.link, "read", Copy(local, 0, old, 0, 1)) == Outcome()
    reading = shm.Mapped.read
    again: list[RemoteRegion] = []
    first = threading.Lock()

    def read(self: Any, *where: Any) -> None:
        if not before:
            reading(self, *where)
        if first.acquire(blocking=False):
            again.append(other.put(length=length, seed=2))
        if before:
            reading(self, *where)

    monkeypatch.setattr(shm.Mapped, "read", read)
    assert moved(mine.link, "read", Copy(local, 0, old, 0, length)).code == "stale_epoch"
    assert moved(mine.link, "read", Copy(local, 0, again[0], 0, length)) == Outcome()
    assert digest(view_of(local)) == digest(pattern(length, 2))
    other.ask("end", name="kv")


@pytest.mark.parametrize("length", [4096, INLINE_MAX + PIECE])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_region_does_not_end_before_the_write_that_goes_on(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch, length: int, mapped: bool
) -> None:
    """Its memory may serve something else right after, which no late write may spoil. Who wrote hears of it."""
    remote, local = other.put(length=length, seed=1), room(length)
    if mapped:
        assert moved(mine.link, "write", Copy(local, 0, remote, 0, 1)) == Outcome()
    view_of(local)[:] = pattern(length, 9)
    writing = shm.Mapped.write
    ended_early: list[bool] = []
    first = threading.Lock()

    def write(self: Any, *where: Any) -> None:
        if first.acquire(blocking=False):
            other.tell("end", name="kv")
            while self.fresh():
                pass
            ended_early.append(bool(select.select([other.socket], [], [], 0.05)[0]))
        writing(self, *where)

    monkeypatch.setattr(shm.Mapped, "write", write)
    assert moved(mine.link, "write", Copy(local, 0, remote, 0, length)).code == "stale_epoch"
    assert ended_early == [False]
    assert other.hear() == ({}, [])


def test_the_end_of_a_region_waits_for_who_writes_but_not_for_the_dead(other: PeerProcess) -> None:
    page = Epochs()
    slots = [page.put(epoch) for epoch in (5, 6, 7)]
    first, second, third = (slot for slot in slots if slot is not None)
    with PeerProcess() as writer:
        writer.ask("enter", [page.fd], slot=first)
        assert page.clear(second, 0.0)  # It is another one's.
        assert not page.clear(first, 0.05)
        writer.ask("leave", slot=first)
        writer.ask("enter", [page.fd], slot=third)
        writer.process.send_signal(signal.SIGSTOP)
        assert not page.clear(third, 0.05)
        again = page.put(8)
        assert again == second  # What could not be ended is not used again.
    with PeerProcess() as writer:
        writer.ask("enter", [page.fd], slot=second)
        writer.kill()
        assert page.clear(second, 5.0)
    assert page.put(9) == second
    assert page.clear(second, 0.0)  # The dead one's word is forgotten.


def test_a_region_ends_only_when_the_last_of_a_connections_threads_has_written() -> None:
    page = Epochs()
    slot = page.put(5)
    assert slot is not None
    writer = PeerEpochs(reopened(page.fd))
    writer.enter(slot)
    writer.enter(slot)
    writer.leave(slot)
    assert not page.clear(slot, 0.05)
    writer.leave(slot)
    assert page.clear(slot, 0.0)


def test_the_word_of_a_child_that_writes_is_not_that_of_its_parent() -> None:
    page = Epochs()
    slot = page.put(5)
    assert slot is not None
    writer = PeerEpochs(reopened(page.fd))
    writer.enter(slot)
    child = os.fork()
    if not child:  # pragma: no cover
        writer.enter(slot)
        writer.leave(slot)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not page.clear(slot, 0.05)
    writer.leave(slot)
    assert page.clear(slot, 0.0)


def test_an_order_of_nothing_is_done(other: PeerProcess, mine: Reader) -> None:
    """However many times nothing."""
    remote, local = other.put(length=64), room(64)
    for count in (0, 1, 5, COPIES_MAX + 1):
        for kind in ("read", "write"):
            assert moved(mine.link, kind, *[Copy(local, 0, remote, 0, 0)] * count) == Outcome()
    other.ask("end", name="kv")


def test_many_small_copies_are_one_order(other: PeerProcess, mine: Reader) -> None:
    count = 2 * COPIES_MAX
    remote, local = other.put(length=2 * count, seed=3), room(2 * count)
    copies = [Copy(local, 2 * number, remote, 2 * (count - 1 - number), 2) for number in range(count)]
    assert moved(mine.link, "read", *copies) == Outcome()
    data = pattern(2 * count, 3)
    assert bytes(view_of(local)) == b"".join(data[at : at + 2] for at in range(2 * count - 2, -1, -2))
    other.ask("end", name="kv")


def test_a_region_that_cannot_end_says_so(other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer was stopped in the middle of a write: nobody may believe that it is over."""
    region = room(64)
    token = mine.endpoint.expose(region)
    assert token is not None
    with PeerProcess() as writer:
        writer.ask("enter", [mine.endpoint.epochs_fd], slot=token["slot"])
        monkeypatch.setattr(shm, "STALL_S", 0.05)
        with pytest.raises(TransportError, match="stopped in the middle") as refused:
            mine.endpoint.conceal(region)
    assert refused.value.code == "timed_out"


def test_each_connection_that_writes_has_a_row_and_one_too_many_is_told() -> None:
    page = Epochs()
    slot = page.put(5)
    assert slot is not None
    opened = reopened(page.fd)
    writers = [PeerEpochs(opened) for _ in range(ROWS + 1)]
    for one in range(ROWS):
        writers[one].enter(slot)
    with pytest.raises(OSError, match=str(ROWS)):
        writers[-1].enter(slot)
    for one in range(1, ROWS):
        writers[one].leave(slot)
    assert not page.clear(slot, 0.01)
    writers[0].leave(slot)
    del writers[:5]
    gc.collect()
    writers[-1].enter(slot)  # Rows of connections that are gone are free.


# --- kills ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
def test_the_owner_may_be_killed_in_the_middle_of_a_copy(
    mine: Reader, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The memory stays until the last one has let go; the order ends as stale, and so do later ones."""
    length = INLINE_MAX + 4 * PIECE
    with PeerProcess() as owner:
        remote, local = owner.put(length=length, seed=3), room(length)
        copying = getattr(shm.Mapped, kind)
        alive = threading.Lock()

        def copy(self: Any, *where: Any) -> None:
            copying(self, *where)
            if alive.acquire(blocking=False):
                owner.kill()
                peer_is_gone(remote)

        monkeypatch.setattr(shm, "PIECE_MAX", PIECE)
        monkeypatch.setattr(shm.Mapped, kind, copy)
        order = Copy(local, 0, remote, 0, length)
        assert moved(mine.link, kind, order).code == "stale_epoch"
        assert alive.locked()
        assert moved(mine.link, kind, order).code == "stale_epoch"


def test_a_region_can_be_mapped_when_its_owner_is_gone_and_is_stale(mine: Reader) -> None:
    with PeerProcess() as owner:
        remote, local = owner.put(length=4096), room(4096)
        owner.kill()
    peer_is_gone(remote)
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, 4096)).code == "stale_epoch"


def test_a_writer_may_be_killed_in_the_middle_of_a_copy(mine: Reader) -> None:
    """Its row is free again, so the region can end at once."""
    length = 64 * MIB
    region = room(length)
    token = mine.endpoint.expose(region)
    assert token is not None
    for _ in range(3):
        with PeerProcess() as writer:
            writer.put(length=length)
            facts = {"name": "kv", "epoch": 1, "length": length, "writable": True, "token": token}
            writer.ask("reach", [region.fd, mine.endpoint.epochs_fd], **facts)
            view_of(region)[:64] = bytes(64)
            writer.tell("move", kind="write", name="kv", length=length)
            while bytes(view_of(region)[:64]) == bytes(64):
                assert writer.process.poll() is None
            writer.kill()
    mine.endpoint.conceal(region)


# --- threads, forks, ends ---------------------------------------------------------------------------------------


def test_many_threads_read_and_write_over_one_link(other: PeerProcess, mine: Reader) -> None:
    """Each order ends once and well; nobody is left that seems to write."""
    count, length = 8, INLINE_MAX + 4096
    remote = other.put(length=count * length)
    wrong: list[Any] = []

    def work(number: int) -> None:
        local = room(length)
        try:
            for turn in range(20):
                size = length if turn % 4 == 0 else 1 + turn * 4001
                data = pattern(size, number * 100 + turn)
                view_of(local)[:size] = data
                for kind in ("write", "read"):
                    outcome = moved(mine.link, kind, Copy(local, 0, remote, number * length, size))
                    if outcome.code or bytes(view_of(local)[:size]) != data:
                        wrong.append((number, turn, outcome))
                    view_of(local)[:size] = bytes(size)
        except Exception as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    other.ask("end", name="kv")


def test_a_child_goes_on_with_a_link_and_its_parent_too(other: PeerProcess, mine: Reader) -> None:
    """It has none of the threads, and no row, of its parent: also when that one is just writing."""
    length = INLINE_MAX + PIECE
    remote, local = other.put(length=length, seed=4), room(length)
    for kind in ("read", "write"):
        assert moved(mine.link, kind, Copy(local, 0, remote, 0, length)) == Outcome()
    remote.state.epochs.enter(remote.state.slot)
    child = os.fork()
    if not child:  # pragma: no cover
        code = 1
        try:
            own = room(length)
            assert moved(mine.link, "read", Copy(own, 0, remote, 0, length)) == Outcome()
            assert digest(view_of(own)) == digest(pattern(length, 4))
            view_of(own)[:] = pattern(length, 5)
            assert moved(mine.link, "write", Copy(own, 0, remote, 0, length)) == Outcome()
            assert moved(mine.link, "write", Copy(own, 0, remote, 0, 10)) == Outcome()
            ended = threading.Event()  # This time, only a thread of the endpoint can do it.
            mine.link.order("read", [Copy(own, 0, remote, 0, length)], lambda _: ended.set())
            assert ended.wait(60)
            mine.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert other.digest() == digest(pattern(length, 5))
    remote.state.epochs.leave(remote.state.slot)
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)) == Outcome()
    assert digest(view_of(local)) == digest(pattern(length, 5))
    other.ask("end", name="kv")


def test_the_end_of_a_child_does_not_end_the_regions_of_its_parent(mine: Reader) -> None:
    region = room(64)
    token = mine.endpoint.expose(region)
    assert token is not None
    child = os.fork()
    if not child:  # pragma: no cover
        exposed = mine.endpoint.expose(room(64))
        mine.endpoint.conceal(region)
        mine.endpoint.close()
        os._exit(0 if exposed is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    page = PeerEpochs(reopened(mine.endpoint.epochs_fd))
    assert page.slots[token["slot"]] == region.epoch


def test_a_closed_link_refuses_orders_and_ends_those_under_way(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = INLINE_MAX + 3 * PIECE
    remote, local = other.put(length=length, seed=1), room(length)
    reading = shm.Mapped.read

    def read(self: Any, *where: Any) -> None:
        reading(self, *where)
        mine.link.close()

    monkeypatch.setattr(shm, "PIECE_MAX", PIECE)
    monkeypatch.setattr(shm.Mapped, "read", read)
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)).code == "cancelled"
    assert bytes(view_of(local)[-4096:]) == bytes(4096)
    for kind in ("read", "write"):
        assert moved(mine.link, kind, Copy(local, 0, remote, 0, 1)).code == "cancelled"
    other.ask("end", name="kv")


def test_a_link_that_ends_since_its_peer_is_lost_says_that(other: PeerProcess, mine: Reader) -> None:
    remote, local = other.put(length=64, seed=1), room(64)
    mine.link.close(Outcome("link_lost", "the peer has ended"))
    mine.link.close()
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, 64)) == Outcome("link_lost", "the peer has ended")
    other.ask("end", name="kv")


def test_an_order_that_nobody_waits_for_ends_all_the_same(other: PeerProcess, mine: Reader) -> None:
    length = INLINE_MAX + PIECE
    remote, local = other.put(length=length, seed=6), room(length)
    ended = threading.Event()
    assert mine.link.order("read", [Copy(local, 0, remote, 0, length)], lambda _: ended.set()) is not None
    assert ended.wait(60)
    assert digest(view_of(local)) == digest(pattern(length, 6))
    other.ask("end", name="kv")


def test_a_waiter_that_has_no_more_time_leaves_the_rest_to_others(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = INLINE_MAX + PIECE
    remote, local = other.put(length=length, seed=6), room(length)
    jobs: list[Any] = []
    ended: list[Outcome] = []
    monkeypatch.setattr(mine.endpoint, "work", jobs.append)
    drive = mine.link.order("read", [Copy(local, 0, remote, 0, length)], ended.append)
    assert drive is not None
    drive(0.0)
    assert (len(jobs), ended) == (2, [])
    jobs[-1].run()
    drive(1.0)  # It may be called again, also when there is nothing left to do.
    assert (len(jobs), ended) == (2, [Outcome()])
    assert digest(view_of(local)) == digest(pattern(length, 6))
    other.ask("end", name="kv")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_make_room_for_who_waits(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """With two processors, a second one that copies takes the other from somebody else."""
    length = INLINE_MAX + 3 * PIECE
    remote, local = other.put(length=length, seed=6), room(length)
    jobs: list[Any] = []
    at_once = [0]
    reading = shm.Mapped.read

    def read(self: Any, *where: Any) -> None:
        at_once.append(at_once[-1] + 1)
        helper = threading.Thread(target=jobs[0].run)
        helper.start()
        helper.join()
        reading(self, *where)
        at_once.append(at_once[-1] - 1)

    monkeypatch.setattr(shm, "PIECE_MAX", PIECE)
    monkeypatch.setattr(shm, "_threads", lambda: threads)
    monkeypatch.setattr(mine.endpoint, "work", jobs.append)
    monkeypatch.setattr(shm.Mapped, "read", read)
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)) == Outcome()
    assert max(at_once) == threads
    assert digest(view_of(local)) == digest(pattern(length, 6))
    other.ask("end", name="kv")


def test_where_one_thread_is_to_work_it_is_the_one_that_waits_and_copies_all_at_once(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nobody takes the first part before it comes, and the C library may go past the caches."""
    length = INLINE_MAX + 3 * PIECE
    remote, local = other.put(length=length, seed=6), room(length)
    copied: list[tuple[threading.Thread, int]] = []
    reading = shm.Mapped.read

    def read(self: Any, *where: Any) -> None:
        copied.append((threading.current_thread(), where[-1]))
        reading(self, *where)

    monkeypatch.setattr(shm, "COMES_S", 60.0)
    monkeypatch.setattr(shm, "_threads", lambda: 1)
    monkeypatch.setattr(shm.Mapped, "read", read)
    ended: list[Outcome] = []
    drive = mine.link.order("read", [Copy(local, 0, remote, 0, length)], ended.append)
    assert drive is not None
    time.sleep(0.1)  # A thread of the endpoint would have begun by now, if it did.
    assert not copied
    drive(None)
    assert ended == [Outcome()]
    assert copied == [(threading.current_thread(), length)]
    assert digest(view_of(local)) == digest(pattern(length, 6))
    other.ask("end", name="kv")


def test_it_works_on_processors_that_promise_less_of_the_order_of_memory(
    other: PeerProcess, mine: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can be seen on one that promises more: the way through the fences is walked."""
    fences: list[None] = []
    for module in (memory, epochs):
        monkeypatch.setattr(module, "STRONGLY_ORDERED", False)
        monkeypatch.setattr(module, "fence", lambda: fences.append(None))
    for length, count in ((4096, 3), (INLINE_MAX + PIECE, 4)):
        remote, local = other.put(length=length, seed=1), room(length)
        assert moved(mine.link, "read", Copy(local, 0, remote, 0, 1)) == Outcome()
        fences.clear()
        for kind in ("read", "write"):
            assert moved(mine.link, kind, Copy(local, 0, remote, 0, length)) == Outcome()
        assert len(fences) == count
        assert other.digest() == digest(view_of(local))
        other.ask("end", name="kv")


def test_an_order_after_the_endpoint_was_closed_is_still_answered(other: PeerProcess, mine: Reader) -> None:
    length = INLINE_MAX + PIECE
    remote, local = other.put(length=length, seed=6), room(length)
    mine.endpoint.close()
    assert moved(mine.link, "read", Copy(local, 0, remote, 0, length)) == Outcome()
    with pytest.raises(TransportError) as refused:
        mine.endpoint.accept(PARTIES, {})
    assert refused.value.code == "no_way"
    other.ask("end", name="kv")


def test_thousands_of_regions_leave_no_descriptor_and_no_mapping_behind(other: PeerProcess, mine: Reader) -> None:
    local = room(9000)
    other.put("warm", length=64)
    here, there = held(), other.ask("held")[0]
    remote: RemoteRegion | None = None
    for number in range(2000):
        remote = other.put(length=4096 + number, seed=number)
        if number % 3:
            kind = "read" if number % 2 else "write"
            assert moved(mine.link, kind, Copy(local, 0, remote, 0, 4096)) == Outcome()
        other.ask("end", name="kv")
        if number % 5 == 0:
            assert moved(mine.link, "read", Copy(local, 0, remote, 0, 4096)).code == "stale_epoch"
    del remote
    mine.link.close()
    assert held() == here
    assert other.ask("held")[0] == there
    other.ask("end", name="warm")


# --- what is no sealed memory -----------------------------------------------------------------------------------


def file_region(path: Path, epoch: int = 1) -> LocalRegion:
    region = room(path.stat().st_size)
    region.fd, region.fd_offset, region.epoch = os.open(path, os.O_RDWR), 0, epoch
    return region


@pytest.fixture
def file() -> Iterator[Path]:
    path = Path(f"/dev/shm/computemesh-test-{os.getpid()}")
    path.write_bytes(pattern(10 * MIB, 8))
    yield path
    path.unlink()


def filed(owner: Reader, path: Path) -> RemoteRegion:
    region = file_region(path)
    token = owner.endpoint.expose(region)
    assert token is not None
    page = reopened(owner.endpoint.epochs_fd)
    return RemoteRegion("file", 1, region.length, True, {**token, "fd": Descriptor(region.fd), "epochs_fd": page})


@pytest.mark.parametrize("length", [4096, SLICE_MAX + 1, 9 * MIB])
def test_a_file_that_anybody_may_cut_is_read_and_written_without_a_mapping(
    mine: Reader, file: Path, length: int
) -> None:
    remote, local = filed(mine, file), room(length)
    assert moved(mine.link, "read", Copy(local, 0, remote, 100, length)) == Outcome()
    assert digest(view_of(local)) == digest(pattern(10 * MIB, 8)[100 : 100 + length])
    view_of(local)[:] = pattern(length, 9)
    assert moved(mine.link, "write", Copy(local, 0, remote, 7, length)) == Outcome()
    assert file.read_bytes()[7 : 7 + length] == pattern(length, 9)
    assert file.name not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_file_that_was_cut_is_an_error_and_no_signal(mine: Reader, file: Path, kind: str) -> None:
    """And it does not grow again."""
    remote, local = filed(mine, file), room(10 * MIB)
    assert moved(mine.link, kind, Copy(local, 0, remote, 0, 10 * MIB)) == Outcome()
    os.truncate(file, 5000)
    for length in (4096, 10 * MIB):
        outcome = moved(mine.link, kind, Copy(local, 0, remote, 10 * MIB - length, length))
        assert (outcome.code, "short" in outcome.reason) == ("io_error", True)
    assert file.stat().st_size == 5000
    assert moved(mine.link, kind, Copy(local, 0, remote, 0, 5000)) == Outcome()


def test_a_memfd_is_sealed_when_it_is_exposed(mine: Reader) -> None:
    given_fd = Descriptor(os.memfd_create("test", os.MFD_ALLOW_SEALING))
    os.ftruncate(given_fd.fd, 8192)
    region = room(4096)
    region.fd, region.fd_offset = given_fd.fd, 10
    token = mine.endpoint.expose(region)
    assert token == {"offset": 10, "slot": 0}
    assert mine.endpoint.expose(region) == token  # Again is the same.
    assert is_sealed(given_fd.fd)


def test_what_has_no_bytes_at_offsets_is_not_exposed(mine: Reader) -> None:
    read_end, write_end = os.pipe()
    pipe = room(64)
    pipe.fd = read_end
    private = room(64)
    private.fd = -1
    assert mine.endpoint.expose(pipe) is None
    assert mine.endpoint.expose(private) is None
    assert mine.endpoint.epochs_fd == -1
    mine.endpoint.conceal(private)
    os.close(read_end)
    os.close(write_end)


def test_no_more_regions_are_exposed_than_the_page_has_slots(mine: Reader) -> None:
    made = SharedMemory.allocate(64)
    regions = [local_region(made, str(number), number + 1) for number in range(SLOTS + 1)]
    tokens = [mine.endpoint.expose(region) for region in regions]
    assert len({token["slot"] for token in tokens if token is not None}) == SLOTS
    assert tokens[-1] is None
    mine.endpoint.conceal(regions[5])
    assert mine.endpoint.expose(regions[-1]) == tokens[5]


@pytest.mark.parametrize("lie", ["slot", "slot below", "offset", "length", "pipe", "no page", "small page", "missing"])
def test_what_a_peer_says_of_a_region_is_checked(other: PeerProcess, mine: Reader, lie: str) -> None:
    """An order says what is wrong; nothing is raised, and nothing is mapped."""
    remote, local = other.put(length=4096), room(4096)
    token = dict(remote.token)
    length = 4096
    small = SharedMemory.allocate(64)
    match lie:
        case "slot":
            token["slot"] = SLOTS
        case "slot below":
            token["slot"] = -1
        case "offset":
            token["offset"] = 1
        case "length":
            length = 2**62
        case "pipe":
            ends = os.pipe()
            os.close(ends[1])
            token["fd"] = Descriptor(ends[0])
        case "no page":
            made = Descriptor(os.memfd_create("test", os.MFD_ALLOW_SEALING))
            os.ftruncate(made.fd, os.fstat(token["epochs_fd"].fd).st_size)
            token["epochs_fd"] = made
        case "small page":
            token["epochs_fd"] = reopened(small.fd)
        case _:
            del token["fd"]
    lying = RemoteRegion("kv", remote.epoch, length, True, token)
    for kind in ("read", "write"):
        outcome = moved(mine.link, kind, Copy(local, 0, lying, 0, 64))
        assert (outcome.code, "'kv'" in outcome.reason) == ("no_way", True)
    other.ask("end", name="kv")


def test_memory_that_is_not_the_processors_and_memory_that_cannot_be_written_are_refused_here(
    other: PeerProcess, mine: Reader
) -> None:
    remote = other.put(length=4096)
    device, fixed = room(4096), room(4096)
    device.view = None
    fixed.view = view_of(fixed).toreadonly()
    assert moved(mine.link, "read", Copy(device, 0, remote, 0, 64)).code == "no_way"
    assert moved(mine.link, "read", Copy(fixed, 0, remote, 0, 64)).code == "read_only"
    assert moved(mine.link, "write", Copy(fixed, 0, remote, 0, 64)) == Outcome()
    other.ask("end", name="kv")


def test_messages_are_not_its_business(other: PeerProcess, mine: Reader) -> None:
    remote, local = other.put(length=64), room(64)
    ended: list[Outcome] = []
    mine.link.send(view_of(local), ended.append)
    mine.link.recv(view_of(local), ended.append)
    mine.link.recv_imm(ended.append)
    mine.link.order("write", [Copy(local, 0, remote, 0, 1)], ended.append, imm=7)
    assert [outcome.code for outcome in ended] == ["no_way"] * 4
    other.ask("end", name="kv")


def test_there_is_no_link_to_another_machine() -> None:
    far = type(PARTIES)(link="l", key=bytes(32), me="a", peer="b", deadline=0.0, options={}, same_host=False)
    endpoint = ShmEndpoint()
    for attempt in (lambda: endpoint.offer(far), lambda: endpoint.accept(far, {}), lambda: endpoint.establish(far, {})):
        with pytest.raises(TransportError, match="not on this machine") as refused:
            attempt()
        assert refused.value.code == "no_way"
    assert (endpoint.absent(), endpoint.facts(), endpoint.offer(PARTIES)) == ("", {}, {})
    endpoint.abandon(PARTIES)
