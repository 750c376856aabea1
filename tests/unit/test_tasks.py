"""Ending background tasks."""

from __future__ import annotations

import asyncio

from computemesh.tasks import end_all


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    """As ``wait_for`` of Python 3.11 does when the result comes together with the cancellation."""
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 1:
                    raise

    async def fails() -> None:
        raise ValueError("not raised again")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    await asyncio.wait_for(end_all(tasks), 10)
    assert swallowed == 2
    assert all(task.done() for task in tasks)
    assert isinstance(tasks[1].exception(), ValueError)


async def test_ending_nothing_returns_at_once() -> None:
    """Also when all have ended already."""
    ended = asyncio.create_task(asyncio.sleep(0))
    await ended
    await end_all([ended])
    await end_all([])
