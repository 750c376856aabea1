"""Background tasks that must be gone before something else may begin."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_S: Final = 0.2


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks until they are done. Their exceptions are not raised.

    Once is not enough: ``wait_for`` of Python 3.11, which nats-py uses for every request, swallows a
    cancellation that comes together with the result it waits for.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
