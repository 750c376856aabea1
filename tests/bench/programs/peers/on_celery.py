"""A no-op task of Celery on Redis; its worker is ``python -m celery -A tests.bench.programs.peers.on_celery worker``.

For durability, a task is acknowledged after it ran. For speed, many are prefetched, as the optimizing guide advises for
short tasks, and the worker is started with a pool of threads, which is faster here than processes (the default).
Results go to Redis, which tells the client of each one through publish and subscribe.
"""

from __future__ import annotations

import asyncio
import os

from celery import Celery

from tests.bench.programs.driver import drive

TIMEOUT_S = 120

app = Celery("peer", broker=os.environ["BENCH_URL"] + "/0", backend=os.environ["BENCH_URL"] + "/1")
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=128)


@app.task(name="noop")
def noop(number: int) -> int:
    return number


async def each() -> None:
    noop.delay(0).get(timeout=TIMEOUT_S)


async def many(items: int) -> None:
    for result in [noop.delay(number) for number in range(items)]:
        result.get(timeout=TIMEOUT_S)


if __name__ == "__main__":
    asyncio.run(drive(each, many))
