"""Calls that may never come back, such as those into a driver that hangs.

Each runs in a daemon thread of its own: unlike the threads of an executor, nobody waits for it when the
process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    value: T
    silent_s: float = 0.0
    """For how long the call that should renew it has not come back; 0 = the value is fresh."""


class Patient(Generic[T]):
    """Calls a function in a thread, one call at a time, and waits only so long for it.

    Callers that come while a call runs share its result. Of a call that does not come back they get the
    result of the one before; when it does come back after all, the next caller calls again.
    """

    def __init__(self, function: Callable[[], T], *, initial: T, patience_s: float) -> None:
        """
        Args:
            initial: what is answered while no call has ever come back.
        """
        self._function = function
        self._patience_s = patience_s
        self._latest = initial
        self._running: asyncio.Future[T] | None = None
        self._started_s = 0.0

    async def get(self) -> Answer[T]:
        """The result of a call, or the one before if it takes too long.

        Raises:
            Exception: whatever the function raised.
        """
        loop = asyncio.get_running_loop()
        running = self._running
        if running is None:
            running = self._running = loop.create_future()
            self._started_s = loop.time()
            threading.Thread(target=self._call, args=(loop, running), daemon=True, name="patient").start()
        patience_s = self._patience_s - (loop.time() - self._started_s)
        await asyncio.wait({running}, timeout=max(patience_s, 0.0))
        if running.done():
            return Answer(running.result())
        return Answer(self._latest, loop.time() - self._started_s)

    def _call(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[T]) -> None:
        try:
            value, error = self._function(), None
        except Exception as raised:
            value, error = None, raised

        def tell() -> None:
            self._running = None
            if error is not None:
                future.set_exception(error)
            else:
                self._latest = value  # type: ignore[assignment]
                future.set_result(value)  # type: ignore[arg-type]

        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(tell)
