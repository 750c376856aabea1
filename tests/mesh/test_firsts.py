"""First records that are stored together: journals on a real server, one after the other and against each other.

Method: real journals write records that are made up, and what a successor finds is compared with what was acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import pytest

from computemesh.bus import Bucket, Bus, Where
from computemesh.bus.provision import provision
from computemesh.bus.pull import read_all
from computemesh.contracts import nodes, storage, work
from computemesh.contracts.base import Refused, Role, encode
from computemesh.contracts.work import WorkCompleted, WorkItem, WorkRecord, WorkState
from computemesh.testing import DirectNode, running_mesh, running_server, until
from computemesh_services.work_marshaller import firsts, scheduler, workitem
from computemesh_services.work_marshaller.firsts import ENTRIES, ENTRY_BYTES_MAX, Place, Ring, Seen
from computemesh_services.work_marshaller.floor import Floor
from computemesh_services.work_marshaller.journal import CURSOR_KEY, Cursor, Journal
from computemesh_services.work_marshaller.reign import CURSOR_S
from tests.mesh.test_reign import a_reign

CREATED: Final = "2026-01-01T00:00:00Z"


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncGenerator[Bus]:
    """A connection as a service, with all streams and buckets."""
    async with running_server(tmp_path) as server:
        connection = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="test"))
        await connection.connect(timeout_s=5)
        await provision(connection)
        yield connection
        await connection.close()


class Writer:
    """A journal, what it found when it took over, and what it was told is stored."""

    def __init__(self, bus: Bus) -> None:
        self.floor = Floor(1)
        self.bucket = Bucket(bus, storage.WORK)
        self.journal = Journal(bus, self.bucket, self.floor, keep_s=60, timeout_s=5)
        self.stored: list[tuple[WorkRecord | None, WorkRecord]] = []
        self.found: dict[str, tuple[WorkRecord, Place]] = {}
        self.journal.on_stored = self._on_stored

    async def _on_stored(self, before: WorkRecord | None, record: WorkRecord) -> None:
        self.stored.append((before, record))

    async def take_over(self) -> None:
        for record, place in await self.journal.start(CREATED):
            self.found[record.work_id] = record, place

    async def assign(self, number: int, *, payload: str = "") -> WorkRecord:
        """Writes the assignment of an item that stands in the inbox under *number*."""
        item = WorkItem(work_type="inference", payload={"text": payload})
        record = workitem.assigned(workitem.received(item, f"w{number}", number, 1.0), "n1", 2.0, plain=False)
        self.floor.open(number)
        self.journal.carry(record.work_id, number)
        await self.journal.write(record)
        return record

    async def complete(self, record: WorkRecord) -> None:
        await self.journal.write(workitem.completed(record, WorkCompleted(work_id=record.work_id), 3.0))

    async def own(self) -> set[str]:
        """Items with a record of their own."""
        return set(await self.bucket.load())


async def entries(bus: Bus) -> list[list[str]]:
    """The items of each entry, in the order they were written; empty ones left out."""
    found = await read_all(bus, storage.WORK.stream, storage.WORK.subject(f"{firsts.KEY}.*"))
    read = [msgspec.json.decode(stored.data, type=firsts.Entry) for stored in sorted(found, key=lambda s: s.seq)]
    return [[record.work_id for record in entry.records] for entry in read if entry.records]


async def test_what_is_decided_while_one_write_is_under_way_is_one_write(bus: Bus) -> None:
    """The first goes at once, all others together. Each is told once, when it is stored, and has no record yet."""
    one = Writer(bus)
    await one.take_over()
    records = [await one.assign(number) for number in range(1, 51)]
    assert one.stored == []
    await one.journal.settled()
    assert one.stored == [(None, record) for record in records]
    assert await entries(bus) == [["w1"], [f"w{number}" for number in range(2, 51)]]
    assert await one.own() == set()
    assert all(one.journal.is_stored(record) for record in records)
    await one.journal.stop()


async def test_an_outcome_gives_an_item_its_record_and_lets_the_inbox_position_pass(bus: Bus) -> None:
    """An assignment alone does not: what follows the submission must be read again after a crash."""
    one = Writer(bus)
    await one.take_over()
    record = await one.assign(1)
    await one.journal.settled()
    assert one.floor.seq == 1
    await one.complete(record)
    await one.journal.settled()
    assert one.floor.seq == 2
    assert await one.own() == {"w1"}
    assert [(before and before.state, after.state) for before, after in one.stored] == [
        (None, WorkState.ASSIGNED),
        (WorkState.ASSIGNED, WorkState.COMPLETED),
    ]
    await one.journal.stop()


async def test_an_item_that_is_out_for_long_gets_a_record_of_its_own(bus: Bus) -> None:
    """So the inbox position moves on and its entry can be overwritten; nobody is told twice."""
    one = Writer(bus)
    await one.take_over()
    record = await one.assign(1)
    await one.journal.settled()
    async with asyncio.timeout(10):
        while not await one.own():
            await asyncio.sleep(0.02)
            await one.journal.write_late()
            await one.journal.settled()
    assert one.floor.seq == 2
    assert one.stored == [(None, record)]
    await one.complete(record)
    await one.journal.settled()
    assert one.stored[-1][0] is record
    await one.journal.stop()


async def test_whoever_takes_over_finds_all_that_was_acknowledged_and_deposes_the_writer(bus: Bus) -> None:
    """Also when many did so one after the other, and the ring was written round and round."""
    number = 0
    acknowledged: set[str] = set()
    before: Writer | None = None
    for _ in range(12):
        one = Writer(bus)
        await one.take_over()
        assert set(one.found) - await one.own() == acknowledged
        if before is not None:
            await before.assign(10_000 + number)
            await until(before.journal.broken.is_set, what="the deposed journal to notice")
            assert before.stored[-1][1].work_id != f"w{10_000 + number}"
            await before.journal.stop()
        for record, place in one.found.values():
            if record.work_id in acknowledged:
                one.journal.adopt_first(record, place)
        for _ in range(40):
            number += 1
            await one.assign(number)
            await one.journal.settled()
        acknowledged = {f"w{n}" for n in range(1, number + 1)} - await one.own()
        if number % 80 == 0:
            await one.journal.write_late(all_of_them=True)
            await one.journal.settled()
            acknowledged = set()
            assert len(await one.own()) == number
        before = one
    assert before is not None
    await before.journal.stop()


async def test_a_ring_whose_entries_are_all_needed_is_not_overwritten(bus: Bus) -> None:
    """The next waits until what stands there has records of its own, which it gets at once."""
    one = Writer(bus)
    await one.take_over()
    number = 0
    while not await one.own():
        number += 1
        await one.assign(number)
        await one.journal.settled()
        assert number <= ENTRIES + 1
    for _ in range(20):
        number += 1
        await one.assign(number)
        await one.journal.settled()
    assert [record.work_id for _, record in one.stored] == [f"w{n}" for n in range(1, number + 1)]
    together = {work_id for entry in await entries(bus) for work_id in entry}
    assert together | await one.own() == {f"w{n}" for n in range(1, number + 1)}
    await one.journal.write_late(all_of_them=True)
    await one.journal.settled()
    assert one.floor.seq == number + 1
    await one.journal.stop()


async def test_an_item_whose_first_record_is_its_last_gets_its_own_at_once(bus: Bus) -> None:
    """As one that is cancelled before anything else was written of it. It is told once."""
    one = Writer(bus)
    await one.take_over()
    one.floor.open(1)
    one.journal.carry("w1", 1)
    waits = workitem.received(WorkItem(work_type="inference"), "w1", 1, 1.0)
    record = workitem.cancelled(waits, "not wanted", 2.0)
    await one.journal.write(record)
    await one.journal.stored("w1")
    assert {key: entry.value for key, entry in (await one.bucket.load()).items()} == {"w1": record}
    assert (one.stored, one.floor.seq) == ([(None, record)], 2)
    await one.journal.stop()


async def test_a_cancellation_that_overtakes_the_write_is_what_stands(bus: Bus) -> None:
    """Of an item whose assignment is on its way, and of one whose assignment still waits for that."""
    one = Writer(bus)
    await one.take_over()
    records = [await one.assign(number) for number in (1, 2)]
    for record in records:
        await one.journal.write(workitem.cancelled(record, "not wanted", 3.0))
    for record in records:
        await one.journal.stored(record.work_id)
    assert {entry.value.state for entry in (await one.bucket.load()).values()} == {WorkState.CANCELLED}
    assert one.floor.seq == 3
    await one.journal.stop()


async def test_an_outcome_that_a_predecessor_could_store_in_an_entry_only_stands(bus: Bus) -> None:
    """Though nobody remembers the item, and it is read anew from the inbox (seed 41 of the simulation)."""
    waits = workitem.received(WorkItem(work_type="inference"), "w1", 1, 1.0)
    ended = workitem.cancelled(waits, "not wanted", 2.0)
    bucket = Bucket(bus, storage.WORK)
    await bus.call(bucket.spec.subject(firsts.key(0)), firsts.entry_bytes(CREATED, [encode(ended)]))
    one = Writer(bus)
    await one.take_over()
    one.journal.adopt_first(*one.found["w1"])
    duplicates: list[str] = []
    one.journal.on_duplicate = duplicates.append
    one.floor.open(1)
    one.journal.carry("w1", 1)
    await one.journal.write(workitem.assigned(waits, "n1", 3.0, plain=False))
    await one.journal.write_late()
    await one.journal.settled()
    assert duplicates == ["w1"]
    assert {key: entry.value for key, entry in (await bucket.load()).items()} == {"w1": ended}
    assert one.floor.seq == 2
    await one.journal.stop()


async def test_many_large_items_make_several_entries_and_a_very_large_one_stands_alone(bus: Bus) -> None:
    """So no entry grows beyond what a message may have."""
    one = Writer(bus)
    await one.take_over()
    for number in range(1, 12):
        await one.assign(number, payload="x" * (ENTRY_BYTES_MAX // 3))
    await one.assign(12, payload="x" * (900_000))
    await one.journal.settled()
    written = await entries(bus)
    assert [work_id for entry in written for work_id in entry] == [f"w{number}" for number in range(1, 13)]
    assert (max(len(entry) for entry in written), written[-1]) == (2, ["w12"])
    assert await one.own() == set()
    await one.journal.stop()


async def test_an_item_that_another_journal_ended_meanwhile_breaks_the_journal(bus: Bus) -> None:
    """Its assignment stands in an entry of ours, so it is no submission that came twice."""
    one, other = Writer(bus), Writer(bus)
    await one.take_over()
    record = await one.assign(1)
    await one.journal.settled()
    await other.bucket.create("w1", workitem.cancelled(record, "elsewhere", 3.0))
    await one.complete(record)
    await until(one.journal.broken.is_set, what="the journal to break")
    assert [after.state for _, after in one.stored] == [WorkState.ASSIGNED]
    await one.journal.stop()


async def test_first_records_of_another_inbox_do_not_count(bus: Bus) -> None:
    """A stream that was made anew numbers its messages anew."""
    one = Writer(bus)
    await one.take_over()
    await one.assign(1)
    await one.journal.settled()
    await one.journal.stop()
    next_one = Journal(bus, one.bucket, Floor(1), keep_s=60, timeout_s=5)
    assert await next_one.start("2027-01-01T00:00:00Z") == []
    await next_one.stop()


async def test_an_item_that_ended_and_was_forgotten_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reign that ended it, nor by the next, which finds it in the bucket. Submitting twice changes nothing."""
    monkeypatch.setattr(scheduler, "REMEMBERED_MAX", 1)
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        node = DirectNode(await mesh.bus(Role.NODE, "n2"), "n2")
        await node.join()
        client = await mesh.bus()
        for life in ("first", "second"):
            async with a_reign(mesh, life):
                for work_id in ("a", "b", f"{life}-new"):
                    await client.store(work.SUBMIT, WorkItem(work_id=work_id, work_type="inference"))
                await until(partial(node.attempts, f"{life}-new"), what="the new item")
                for asked in list(node.running.values()):
                    await node.complete(asked)
                for work_id in ("a", "b", f"{life}-last"):
                    await client.store(work.SUBMIT, WorkItem(work_id=work_id, work_type="inference"))
                await until(partial(node.attempts, f"{life}-last"), what="the last item")
                assert (node.attempts("a"), node.attempts("b")) == ([1], [1])
                for asked in list(node.running.values()):
                    await node.complete(asked)
        await node.leave()


async def test_the_inbox_position_does_not_pass_an_item_that_has_no_record_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many reigns find it in an entry and end before it gets one: each sends it again as the same attempt."""

    async def never(_: Journal, *, all_of_them: bool = False) -> None: ...

    monkeypatch.setattr(Journal, "write_late", never)
    async with running_mesh(tmp_path, ("node-registry",)) as mesh:
        given: list[tuple[str, int]] = []
        bus = await mesh.bus(Role.NODE, "plain")

        async def on_work(asked: work.Assignment) -> None:
            given.append((asked.work_id, asked.attempt))
            if asked.work_id != "stays":
                done = WorkCompleted(work_id=asked.work_id, attempt=asked.attempt)
                await bus.send(work.COMPLETED.subject, encode(done))

        await bus.subscribe(work.ASSIGNED, on_work)
        await bus.flush()
        plain = nodes.NodeAnnouncement(node_id="plain", hostname="h", slots=4)
        assert not isinstance(await bus.ask(nodes.REGISTER, plain), Refused)
        client = await mesh.bus()
        bucket = Bucket(await mesh.bus(Role.SERVICES), storage.WORK)
        await client.store(work.SUBMIT, WorkItem(work_id="stays", work_type="inference"))
        for life in ("first", "second", "third"):
            async with a_reign(mesh, life):
                seq = await client.store(work.SUBMIT, WorkItem(work_id=life, work_type="inference"))
                await until(partial(given.count, (life, 1)), what="the new item")
                async with asyncio.timeout(10):
                    while (await bucket.get(life)) is None:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(2 * CURSOR_S)  # Time to note a position, were there one that passes.
                cursor = await bucket.read_other(CURSOR_KEY, Cursor)
                assert cursor is None or cursor.value.next_seq <= 1 < seq
                await until(partial(given.count, ("stays", 1)), what="the item that stays")
        assert given.count(("stays", 1)) == 3
        assert await bucket.get("stays") is None


def test_the_turn_after_a_restart_is_the_one_after_the_newest_entry() -> None:
    """Wherever in the ring that stands."""
    ring = Ring()
    ring.restore({})
    assert ring.turn == 0
    ring.restore({0: 90, 1: 91, 2: 40})
    assert (ring.turn, ring.places[2].revision) == (2, 40)
    ring.restore({ENTRIES - 1: 99})
    assert ring.turn == 0


def test_what_was_seen_is_never_forgotten_and_little_else_is_taken_for_it() -> None:
    """Of a hundred thousand ids."""
    seen = Seen()
    for number in range(100_000):
        seen.add(f"w-{number}")
    assert all(f"w-{number}" in seen for number in range(100_000))
    assert sum(f"x-{number}" in seen for number in range(10_000)) < 200
