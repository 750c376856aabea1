"""Limits: what is full makes room by itself, and loses nothing that is still wanted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from computemesh.bus import Bucket, Bus, NotStored
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.work import WorkRecord, WorkState
from computemesh.testing import running_mesh
from computemesh_services.work_marshaller import retention


async def test_only_finished_items_go_when_the_bucket_is_nearly_full(tmp_path: Path) -> None:
    """The oldest finished ones are removed, without a trace; what is not finished stays."""
    async with running_mesh(tmp_path) as mesh:
        bus = await mesh.bus(Role.SERVICES)
        bucket = Bucket(bus, storage.WORK)
        for number in range(10):
            state = WorkState.COMPLETED if number % 2 else WorkState.RUNNING
            await bucket.create(f"w{number}", WorkRecord(work_id=f"w{number}", state=state, work_type="x"))
        assert await retention.drop_finished(bus) == 5
        assert sorted(await bucket.load()) == ["w0", "w2", "w4", "w6", "w8"]


async def test_an_inbox_that_fills_up_is_emptied_up_to_what_is_recorded(tmp_path: Path) -> None:
    """With a small inbox, more is submitted than fits; what was refused is taken once there is room again."""
    async with running_mesh(tmp_path) as mesh:
        bus = await mesh.bus(Role.SERVICES)
        reply = await bus.call(f"$JS.API.STREAM.INFO.{storage.WORK_INBOX.name}", b"")
        config = msgspec.json.decode(reply.data)["config"] | {"max_bytes": 400_000}
        await bus.call(f"$JS.API.STREAM.UPDATE.{storage.WORK_INBOX.name}", msgspec.json.encode(config))
        client = await mesh.bus()
        taken = {number for number in range(40) if await submit(client, number)}
        refused = next(number for number in range(40) if number not in taken)
        async with asyncio.timeout(30):
            while not await submit(client, refused):
                await asyncio.sleep(0.05)
        bucket = Bucket(bus, storage.WORK)
        async with asyncio.timeout(30):
            while not {f"w{number}" for number in {*taken, refused}} <= (await bucket.load()).keys():
                await asyncio.sleep(0.05)


async def submit(bus: Bus, number: int) -> bool:
    """Whether the server stored an item of 20 kB."""
    item = work.WorkItem(work_id=f"w{number}", work_type="inference", payload={"text": "x" * 20_000})
    try:
        return await bus.store(work.SUBMIT, item) > 0
    except NotStored:
        return False
