"""A no-op on FastStream and JetStream: ``python -m tests.bench.programs.peers.on_faststream client|worker``.

As its documentation has it: a durable pull consumer on a work-queue stream, taking batches so that the next ones are
fetched at once, each message acknowledged after its handler (the default). uvloop, as its command line uses.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop
from faststream import FastStream
from faststream.nats import JStream, NatsBroker, PullSub, RetentionPolicy

from tests.bench.programs.driver import drive

IN_FLIGHT_MAX = 1000
DONE = "peer.done"

broker = NatsBroker(os.environ["BENCH_URL"], logger=None)
stream = JStream("PEER", subjects=["peer.submit"], retention=RetentionPolicy.WORK_QUEUE)


async def worker() -> None:
    @broker.subscriber("peer.submit", stream=stream, durable="worker", pull_sub=PullSub(batch_size=32))
    @broker.publisher(DONE)
    async def noop(work_id: str) -> str:
        return work_id

    app = FastStream(broker, logger=None)
    app.after_startup(lambda: print("ready", flush=True))  # noqa: T201
    await app.run()


async def client() -> None:
    waits: dict[str, asyncio.Future[None]] = {}
    number = 0

    @broker.subscriber(DONE)
    async def done(work_id: str) -> None:
        waits.pop(work_id).set_result(None)

    async def each() -> None:
        nonlocal number
        number += 1
        wait = waits[str(number)] = asyncio.get_running_loop().create_future()
        await broker.publish(str(number), "peer.submit", stream="PEER")
        await wait

    async def many(items: int) -> None:
        slots = asyncio.Semaphore(IN_FLIGHT_MAX)

        async def one() -> None:
            async with slots:
                await each()

        await asyncio.gather(*(one() for _ in range(items)))

    await broker.start()
    await drive(each, many)
    await broker.stop()


if __name__ == "__main__":
    uvloop.run(client() if sys.argv[1] == "client" else worker())
