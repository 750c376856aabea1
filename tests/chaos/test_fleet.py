"""A thousand nodes, and what watches over them is killed, stopped and restarted: nobody is called lost who is not.

Goal: whatever happens to the registry or to the server, no node is recorded as lost or suspect for it, epochs
stay as they are, and within 5 s of the return a query answers all nodes as online and lately seen. And then the
registry still does what it is for: of 200 nodes that truly fall silent each is told lost, once, and no other.
Method: real processes; simulated nodes with real messages. The loss of the 200 is awaited after each deed: when
it is told, the patience with everyone else was over, too. Patience is short, and the fleet says how late its own
heartbeats were, since a fleet that had no time to speak was truly silent.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest

from computemesh.testing import until
from tests.chaos.watch import INTERVAL_S, LOST_S, SIZE, SLACK, WHOLE_S, Watch, kill_and_wait, watched_fleet

SILENT: Final = 200
"""Nodes that truly fall silent after each deed."""

LONGER_THAN_PATIENCE: Final = int(SIZE * (LOST_S + 1.0) / INTERVAL_S)
"""Heartbeats that the fleet sends in that time."""

# --- deeds: each gives the time of the return, in Unix seconds -------------------------------------------------------


async def kill_the_registry(watch: Watch) -> float:
    await kill_and_wait(watch, "node-registry")
    return time.time()


async def suspend_the_registry_and_all_nodes(watch: Watch) -> float:
    """As when a machine that simulates all of them goes to sleep: nothing waits to be heard when they wake up."""
    watch.fleet.silence()
    watch.mesh.kill("node-registry", signal.SIGSTOP)
    await asyncio.sleep(LOST_S + 1.0)
    watch.mesh.kill("node-registry", signal.SIGCONT)
    await watch.fleet.wake()
    return time.time()


async def kill_the_acting_registry_of_two(watch: Watch) -> float:
    """The other one answers all the time, so time runs from the kill."""
    acting = await until_one_acts(watch)
    killed = time.time()
    await kill_and_wait(watch, acting)
    return killed


async def stop_the_acting_registry_of_two_for_longer_than_its_patience(watch: Watch) -> float:
    """The other one acts meanwhile, and the one that wakes up thinks for a moment that it still does."""
    return await stop_for_long(watch, await until_one_acts(watch))


async def kill_the_server(watch: Watch) -> float:
    await kill_and_wait(watch, "nats-server")
    return time.time()


async def stop_the_server_for_longer_than_the_patience(watch: Watch) -> float:
    """All connections stand, and nothing comes through them."""
    return await stop_for_long(watch, "nats-server")


async def stop_for_long(watch: Watch, name: str) -> float:
    """Stops a process while the fleet has, or would have, sent more than patience bears the lack of."""
    goal = watch.fleet.beats + LONGER_THAN_PATIENCE
    watch.mesh.kill(name, signal.SIGSTOP)
    await until(lambda: watch.fleet.beats >= goal, what=f"{LONGER_THAN_PATIENCE} heartbeats")
    watch.mesh.kill(name, signal.SIGCONT)
    return time.time()


async def until_one_acts(watch: Watch) -> str:
    """The replica that holds the lease."""
    async with asyncio.timeout(30):
        while not (name := await watch.mesh.holder("node-registry")):
            await asyncio.sleep(0.05)
    return name


Deed = Callable[[Watch], Awaitable[float]]


@pytest.mark.parametrize(
    ("registries", "deeds"),
    [
        (1, [kill_the_registry, suspend_the_registry_and_all_nodes]),
        (2, [kill_the_acting_registry_of_two, stop_the_acting_registry_of_two_for_longer_than_its_patience]),
        (1, [kill_the_server, stop_the_server_for_longer_than_the_patience]),
    ],
    ids=["one registry", "two registries", "the server"],
)
async def test_no_node_of_a_thousand_is_lost_but_those_that_are(
    tmp_path: Path, registries: int, deeds: list[Deed], record_property: Callable[[str, object], None]
) -> None:
    """After each deed all are seen again in time, and a true loss of 200 is found, exactly; then these come back."""
    async with watched_fleet(tmp_path, registries=registries) as watch:
        fleet = watch.fleet
        for number, deed in enumerate(deeds):
            epochs, doubted = dict(watch.epochs), set(watch.doubted)
            back = await deed(watch)
            took_s = await watch.seconds_until_all_are_seen(back)
            record_property(f"s until all were seen after {deed.__name__}", round(took_s, 2))
            assert took_s < WHOLE_S * SLACK, f"{deed.__name__}\n{watch.story()}"
            assert watch.epochs == epochs, f"{deed.__name__}: epochs grew\n{watch.story()}"
            assert watch.doubted == doubted, f"{deed.__name__}: {len(watch.doubted)} doubted\n{watch.story()}"

            silent = set(fleet.node_ids[number * SILENT : (number + 1) * SILENT])
            fleet.silence(silent)
            began = time.time()
            await until(lambda: set(watch.told) >= silent, what=f"losses of {deed.__name__}\n{watch.story()}")  # noqa: B023
            record_property(f"s until {SILENT} losses were told", round(time.time() - began - LOST_S, 2))
            assert {n for n in watch.told if n in silent or n not in doubted} == silent, watch.story()
            await until(lambda: watch.doubted == silent | doubted, what=f"the records; {len(watch.doubted)}")  # noqa: B023
            await (fleet.wake(silent) if number else fleet.restart(silent))
            came_back = {n: epoch + 1 if n in silent else epoch for n, epoch in epochs.items()}
            await until(lambda: watch.epochs == came_back, what=f"their return\n{watch.story()}")  # noqa: B023
        assert set(watch.told.values()) == {1}, watch.told
        assert len(watch.told) == SILENT * len(deeds)
        record_property("latest heartbeat of the fleet itself, in s", round(fleet.late_s, 2))
