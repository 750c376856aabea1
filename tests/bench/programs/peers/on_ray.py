"""A no-op as a task of Ray core: ``python -m tests.bench.programs.peers.on_ray``. Its driver is the client.

Without the dashboard. Objects and tasks live in memory; a failed task is tried again by the owner that waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import os

import ray

from tests.bench.programs.driver import drive


@ray.remote
def noop(number: int) -> int:
    return number


async def each() -> None:
    ray.get(noop.remote(0))


async def many(items: int) -> None:
    # As "avoid calling ray.get in a loop" has it: all are submitted, then all are awaited.
    ray.get([noop.remote(number) for number in range(items)])


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    asyncio.run(drive(each, many))
    ray.shutdown()
