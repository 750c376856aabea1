"""What is known of the devices of this machine, kept fresh without anyone waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from computemesh_services.node_agent.engines.backends import Backend
from computemesh_services.node_agent.engines.device import DeviceMetrics

INTERVAL_S: Final = 5.0

OLD_S: Final = 60.0
"""What a tool said longer ago is not told any more: it fails, or is stuck."""


class Readings:
    """Reads the metrics of a backend's devices again and again, in a thread.

    Args:
        interval_s: between the end of one reading and the begin of the next.
        old_s: after so long without a reading nothing is known.
    """

    def __init__(self, backend: Backend, *, interval_s: float = INTERVAL_S, old_s: float = OLD_S) -> None:
        self._backend = backend
        self._interval_s = interval_s
        self._old_s = old_s
        self._latest: Mapping[str, DeviceMetrics] = {}
        self._read_at_s = 0.0

    def latest(self) -> Mapping[str, DeviceMetrics]:
        """How the devices were doing at the last reading, by their ids; empty when that is long ago."""
        age_s = asyncio.get_running_loop().time() - self._read_at_s
        return self._latest if age_s < self._old_s else {}

    async def read(self) -> None:
        """Reads once. A tool may take its time."""
        found = await asyncio.to_thread(self._backend.metrics)
        if found:
            self._latest = found
            self._read_at_s = asyncio.get_running_loop().time()

    async def keep(self) -> None:
        """Reads until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(self._interval_s)
