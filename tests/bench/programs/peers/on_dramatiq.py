"""A no-op actor of dramatiq on Redis; ``python -m dramatiq tests.bench.programs.peers.on_dramatiq`` is its worker.

Messages are acknowledged after they ran, as always with dramatiq, and results are stored by its Results middleware. The
client waits for each result with a blocking read, which is how dramatiq tells of them.
"""

from __future__ import annotations

import asyncio
import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from tests.bench.programs.driver import drive

TIMEOUT_MS = 120_000

broker = RedisBroker(url=os.environ["BENCH_URL"] + "/0")
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_URL"] + "/1")))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(number: int) -> int:
    return number


async def each() -> None:
    noop.send(0).get_result(block=True, timeout=TIMEOUT_MS)


async def many(items: int) -> None:
    group = dramatiq.group([noop.message(number) for number in range(items)]).run()
    for _ in group.get_results(block=True, timeout=TIMEOUT_MS):
        pass


if __name__ == "__main__":
    asyncio.run(drive(each, many))
