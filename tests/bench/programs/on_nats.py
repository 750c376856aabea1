"""The programs of the raw flows and of the mesh, on plain nats-py and uvloop.

``python -m tests.bench.programs.on_nats ROLE [BATCH]``, with the bus in BENCH_URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import nats
import nats.errors
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import RetentionPolicy

from tests.bench.programs.driver import drive

# pyright: reportUnknownMemberType=false

IN_FLIGHT_MAX: Final = 1000
"""Publishes without acknowledgement at a time, when many items are submitted."""

RAW_SUBJECT: Final = "raw.submit"

encode: Final = msgspec.json.Encoder().encode


class Work(msgspec.Struct):
    """What a worker or an onlooker must know of an item."""

    work_id: str
    attempt: int = 0
    state: str = ""


class Report(msgspec.Struct):
    """What a node says of an item that is done."""

    work_id: str
    attempt: int
    result: None = None


decode_work: Final = msgspec.json.Decoder(Work).decode


def say_ready() -> None:
    """Tells the harness that this worker takes work."""
    print("ready", flush=True)  # noqa: T201


# --- the client ------------------------------------------------------------------------------------------------


class Submitter:
    """Submits durably and hears of each completion by its event."""

    def __init__(self, nc: Client, subject: str, work_type: str, is_done: Callable[[Msg], str]) -> None:
        self._js = nc.jetstream(publish_async_max_pending=20_000)
        self._subject, self._work_type, self._is_done = subject, work_type, is_done
        self._tag, self._number = f"b{time.time_ns()}", 0
        self._waits: dict[str, asyncio.Future[None]] = {}
        self._left, self._complete = 0, asyncio.Event()

    async def on_done(self, msg: Msg) -> None:
        if not (work_id := self._is_done(msg)):
            return
        if wait := self._waits.pop(work_id, None):
            wait.set_result(None)
        self._left -= 1
        if self._left == 0:
            self._complete.set()

    def _item(self) -> tuple[str, bytes]:
        self._number += 1
        work_id = f"{self._tag}-{self._number}"
        return work_id, encode({"work_id": work_id, "work_type": self._work_type})

    async def each(self) -> None:
        work_id, data = self._item()
        wait = self._waits[work_id] = asyncio.get_running_loop().create_future()
        await self._js.publish(self._subject, data)
        await asyncio.wait_for(wait, 10)

    async def many(self, items: int) -> None:
        self._left = items
        self._complete.clear()
        slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        for _ in range(items):
            await slots.acquire()
            future = await self._js.publish_async(self._subject, self._item()[1])
            future.add_done_callback(lambda _: slots.release())
        await asyncio.wait_for(self._complete.wait(), 120)


async def submitter(url: str, subject: str, done: str, work_type: str, is_done: Callable[[Msg], str]) -> None:
    nc = await nats.connect(url)
    side = Submitter(nc, subject, work_type, is_done)
    await nc.subscribe(done, cb=side.on_done)
    await nc.flush()
    await drive(side.each, side.many)
    await nc.close()


def raw_done(msg: Msg) -> str:
    return msg.subject.rsplit(".", 1)[1]


def mesh_done(msg: Msg) -> str:
    record = decode_work(msg.data)
    return record.work_id if record.state == "completed" else ""


async def raw_client(url: str, _: int) -> None:
    await submitter(url, RAW_SUBJECT, "raw.done.*", "noop", raw_done)


async def mesh_client(url: str, _: int) -> None:
    await submitter(url, "compute.work.submit.v1", "compute.work.state.v1.*", "noop", mesh_done)


# --- workers ---------------------------------------------------------------------------------------------------


async def raw_worker(url: str, batch: int) -> None:
    """The least a durable worker does on plain nats-py. ``batch`` 0 is a continuous pull."""
    nc = await nats.connect(url)
    js = nc.jetstream()
    await js.add_stream(name="RAW", subjects=[RAW_SUBJECT], retention=RetentionPolicy.WORK_QUEUE)

    async def done(msg: Msg) -> None:
        await nc.publish(msg.reply, b"+ACK")
        await nc.publish("raw.done." + decode_work(msg.data).work_id, b"{}")

    if batch == 0:
        await _continuous_pull(nc, done)
    subscription = await js.pull_subscribe(RAW_SUBJECT, "worker", stream="RAW") if batch else None
    say_ready()
    while subscription is not None:
        with contextlib.suppress(nats.errors.TimeoutError):
            for msg in await subscription.fetch(batch, timeout=30):
                await done(msg)
    await asyncio.Event().wait()


async def _continuous_pull(nc: Client, on_message: Callable[[Msg], Awaitable[None]], batch: int = 2000) -> None:
    config = {"ack_policy": "explicit", "max_ack_pending": 5000}
    answer = await nc.request("$JS.API.CONSUMER.CREATE.RAW", encode({"stream_name": "RAW", "config": config}))
    inbox, ask = nc.new_inbox(), f"$JS.API.CONSUMER.MSG.NEXT.RAW.{msgspec.json.decode(answer.data)['name']}"
    left = batch

    async def on_one(msg: Msg) -> None:
        nonlocal left
        await on_message(msg)
        left -= 1
        if left <= batch // 2:
            left += batch // 2
            await nc.publish(ask, encode({"batch": batch // 2}), reply=inbox)

    await nc.subscribe(inbox, cb=on_one)
    await nc.publish(ask, encode({"batch": batch}), reply=inbox)


async def bare_node(url: str, _: int) -> None:
    """A bare subscriber: hears plain assignments and does nothing but report."""
    nc = await nats.connect(url, inbox_prefix="_INBOX_node.bench")

    async def on_work(msg: Msg) -> None:
        item = decode_work(msg.data)
        await nc.publish("compute.work.completed.v1", encode(Report(item.work_id, item.attempt)))

    await nc.subscribe("compute.work.assigned.v1", cb=on_work)
    await _register(nc, {"node_id": "bench", "work_types": ["noop"], "slots": 100_000})


async def direct_node(url: str, _: int) -> None:
    """A node with acknowledged delivery, as our agent is one: answers each assignment, then reports."""
    nc = await nats.connect(url, inbox_prefix="_INBOX_node.bench")

    async def on_work(msg: Msg) -> None:
        item = decode_work(msg.data)
        await msg.respond(b'{"accepted":true}')
        await nc.publish("compute.work.completed.v1", encode(Report(item.work_id, item.attempt)))

    await nc.subscribe("compute.work.assigned.v1.bench", cb=on_work)
    await _register(nc, {"node_id": "bench", "delivery": "direct", "work_types": ["noop"], "slots": 100_000})


async def _register(nc: Client, node: dict[str, Any]) -> None:
    await nc.flush()
    await nc.request("compute.nodes.register.v1", encode(node))
    say_ready()
    await asyncio.Event().wait()


ROLES: Final[dict[str, Callable[[str, int], Awaitable[None]]]] = {
    "raw-client": raw_client,
    "raw-worker": raw_worker,
    "mesh-client": mesh_client,
    "bare-node": bare_node,
    "direct-node": direct_node,
}


async def main(role: str, batch: str = "0") -> None:
    await ROLES[role](os.environ["BENCH_URL"], int(batch))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
