"""A bucket as the control plane uses it: read from memory, written by compare-and-set, from any replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import msgspec

from computemesh import log
from computemesh.bus import Bucket, Bus, BusError, Conflict, Mirror, NoResponder, TimedOut, Unreachable, Writer
from computemesh.bus.kv import OnChange
from computemesh.contracts import storage
from computemesh.contracts.base import Refused

MARKER_S: Final = 3600
"""How long what was removed leaves a marker in the store."""

WITHIN_S: Final = 4.0
"""How long a change may take until who asked for it hears that nobody knows whether it was made, and it is not tried
again. NanoCtrl's clients wait for 5 s."""

OVERDUE_S: Final = 2.0
"""How long a record may stay behind its time."""

_log = log.get("shelf")

V = TypeVar("V", bound=msgspec.Struct)
Decide = Callable[[V | None], V | Refused | None]
"""From the record that stands (None: there is none) to the one that shall; None or the same one: nothing is written."""


class Shelf(Generic[V]):
    """Records of one kind.

    Args:
        on_change: called with a key and its record, None when it is gone.
        ttl_s: records go that long after they were written last.
    """

    def __init__(
        self, bus: Bus, spec: storage.Bucket[V], *, on_change: OnChange[V] | None = None, ttl_s: int | None = None
    ) -> None:
        self.bucket: Final = Bucket(bus, spec)
        self.mirror: Final[Mirror[V]] = Mirror(bus, spec, on_change)
        self._writer = Writer(bus, spec, self.mirror, ttl_s=ttl_s)
        self._ttl_s = ttl_s

    async def start(self) -> None:
        await self._writer.start()

    async def stop(self) -> None:
        await self._writer.stop()

    async def follow(self) -> None:
        """Learns of what other replicas store, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.mirror.follow())
            if self._ttl_s is not None:
                tasks.create_task(self._end_overdue(self._ttl_s))

    async def _end_overdue(self, ttl_s: int) -> None:
        """Gives records that outlived their time another second of it.

        A server that was killed may bring expired records back, and forgets when they were to end. How long one stands
        unchanged is measured by this process's own clock, so clocks that differ do no harm.
        """
        while True:
            await asyncio.sleep(OVERDUE_S)
            before_s = time.monotonic() - ttl_s - OVERDUE_S
            overdue = [(key, entry) for key, entry in self.mirror.entries.items() if entry.since_s < before_s]
            for key, entry in overdue:
                if not self.mirror.synced.is_set():
                    break
                if self._writer.writing(key):
                    continue
                try:
                    revision = await self.bucket.update(key, entry.value, last=entry.revision, ttl_s=1)
                except Conflict:
                    continue
                except BusError as error:
                    _log.warning("cannot end what outlived its time", bucket=self.bucket.spec.name, reason=str(error))
                    break
                self.mirror.wrote(key, entry.value, revision)
                _log.info("outlived its time", bucket=self.bucket.spec.name, key=key)

    def known(self, key: str) -> V | None:
        """The record as memory has it."""
        return self.mirror.get(key)

    async def get(self, key: str) -> V | None:
        """The record; one that memory does not have is looked for in the store.

        Raises:
            BusError: the store does not answer.
        """
        return self.mirror.get(key) or await self.read(key)

    async def read(self, key: str) -> V | None:
        """The record as the store has it.

        Raises:
            BusError: the store does not answer.
        """
        try:
            async with asyncio.timeout(WITHIN_S):
                entry, revision = await self.bucket.read(key)
        except (TimeoutError, TimedOut, NoResponder, Unreachable) as error:
            _log.debug("no answer from the store", bucket=self.bucket.spec.name, reason=str(error))
            raise TimedOut(f"the store did not answer: {self.bucket.spec.name} could not be read") from None
        self.mirror.wrote(key, entry.value if entry is not None else None, revision)
        return entry.value if entry is not None else None

    async def move(self, key: str, decide: Decide[V]) -> V | Refused | None:
        """Moves a record by a pure function, and gives what stands afterwards, or why nothing was changed.

        The function may run again when a race was lost. It says no, or that there is nothing to do, only by a record
        that is the newest.

        Raises:
            BusError: it could not be written, or nobody knows whether it was.
        """
        known = self.mirror.get(key)
        if known is not None and not self._writer.writing(key) and decide(known) is known:
            return known
        try:
            async with asyncio.timeout(WITHIN_S):
                return await self._move(key, decide)
        except TimeoutError:
            raise TimedOut(f"{self.bucket.spec.name}: no acknowledgement in {WITHIN_S:g} s") from None

    async def _move(self, key: str, decide: Decide[V]) -> V | Refused | None:
        for fresh in (False, True):
            refusal: list[Refused] = []

            def step(record: V | None, refusal: list[Refused] = refusal) -> V | None:
                refusal.clear()
                after = decide(record)
                if isinstance(after, Refused):
                    refusal.append(after)
                    return None
                return after

            if fresh:
                await self.read(key)
            after = await self._writer.change(key, step)
            if after is not None and not refusal:
                return after
            if fresh and refusal:
                return refusal[0]
        return None

    async def remove(
        self,
        key: str,
        allowed: Callable[[V], bool] = lambda _: True,
        *,
        still: Callable[[], Awaitable[bool]] | None = None,
    ) -> V | None:
        """Removes a record, and gives what was removed; None when there was none, or none that was allowed.

        Args:
            still: whether it is to be removed. It is asked once the record was read; what is written after that stays.

        Raises:
            BusError: nobody knows whether it was removed.
        """
        entry = self.mirror.entries.get(key)
        while True:
            if entry is None or not allowed(entry.value):
                entry = await self.bucket.get(key)
                if entry is None or not allowed(entry.value):
                    return None
            if still is not None and not await still():
                return None
            try:
                marker = await self.bucket.purge(key, last=entry.revision, marker_ttl_s=MARKER_S)
            except Conflict:
                entry = None
                continue
            self.mirror.wrote(key, None, marker)
            return entry.value
