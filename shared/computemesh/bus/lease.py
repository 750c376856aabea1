"""Leases: which replica of a service acts at present.

A lease is a key with a time to live that its holder renews. It only saves effort: two holders at once do
no harm, because every write of theirs is a compare-and-set.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import Gauge

from computemesh import log
from computemesh.bus.connection import Bus
from computemesh.bus.errors import BusError, Conflict
from computemesh.bus.kv import Bucket, Entry
from computemesh.contracts import storage
from computemesh.contracts.storage import Lease
from computemesh.tasks import end_all

TTL_S: Final = 3
"""Silence after which another replica may take over. Whole seconds, as the server counts."""

OVERDUE_S: Final = 2.0 * TTL_S
"""Silence after which it may take over a lease that the server keeps all the same. One that was killed brings some back
that had expired, and forgets when they were to end."""

RENEW_S: Final = 1.0

ATTEMPT_S: Final = 0.5
"""How often a replica that waits tries again."""

HELD: Final = Gauge("computemesh_lease_held", "1 while this replica is the one that acts.", ["service"])

_log = log.get("lease")


class Held:
    """A lease in hand. ``lost`` is set as soon as it can no longer be relied upon."""

    def __init__(self, bucket: Bucket[Lease], service: str, lease: Lease, revision: int) -> None:
        self.epoch: Final = lease.epoch
        self.lost = asyncio.Event()
        self._bucket = bucket
        self._service = service
        self._lease = lease
        self._revision = revision
        self._good_until_s = time.monotonic() + TTL_S
        self._task = asyncio.create_task(self._renew())
        HELD.labels(service).set(1)

    @property
    def certain(self) -> bool:
        """Whether nobody else can hold it now. Asked before what no compare-and-set fences: a process that
        was stopped for a while learns of its loss only after it has gone on."""
        return not self.lost.is_set() and time.monotonic() < self._good_until_s

    async def _renew(self) -> None:
        while time.monotonic() < self._good_until_s:
            await asyncio.sleep(RENEW_S)
            try:
                asked_s = time.monotonic()
                self._revision = await self._bucket.update(self._service, self._lease, last=self._revision, ttl_s=TTL_S)
                self._good_until_s = asked_s + TTL_S
            except Conflict:
                break
            except BusError as error:
                _log.warning("cannot renew", lease=self._service, reason=str(error))
        self._lose()

    async def stop_renewing(self) -> None:
        """Lets the lease expire."""
        await end_all([self._task])

    async def release(self) -> None:
        """Gives the lease back, so that another replica need not wait for it to expire."""
        await self.stop_renewing()
        if not self.lost.is_set():
            with contextlib.suppress(BusError):
                await self._bucket.purge(self._service, last=self._revision)
        self._lose()

    def _lose(self) -> None:
        self.lost.set()
        HELD.labels(self._service).set(0)


async def acquire(bus: Bus, service: str, holder: str, *, on_wait: Callable[[], None]) -> Held:
    """Waits until *holder* has the lease of *service*.

    A holder that finds its own name in the lease takes it at once: it is its own next life.

    Args:
        on_wait: called when another replica is seen to hold it.
    """
    bucket = Bucket(bus, storage.LEASES)
    seen: Entry[Lease] | None = None
    while True:
        try:
            entry = await bucket.get(service)
            if entry is None or seen is None or entry.revision != seen.revision:
                seen = entry
            held = await _try(bucket, service, holder, seen)
        except BusError as error:
            _log.warning("cannot ask for the lease", lease=service, reason=str(error))
        else:
            if held is not None:
                _log.info("acting", lease=service, epoch=held.epoch)
                return held
            on_wait()
        await asyncio.sleep(ATTEMPT_S)


async def _try(bucket: Bucket[Lease], service: str, holder: str, entry: Entry[Lease] | None) -> Held | None:
    if entry is not None and entry.value.holder != holder and time.monotonic() - entry.since_s < OVERDUE_S:
        return None
    # The epoch grows with the bucket, also across leases that expired.
    lease = Lease(holder=holder, epoch=entry.revision if entry else 0)
    try:
        if entry is None:
            revision = await bucket.create(service, lease, ttl_s=TTL_S)
        else:
            revision = await bucket.update(service, lease, last=entry.revision, ttl_s=TTL_S)
        lease = Lease(holder=holder, epoch=revision)
        revision = await bucket.update(service, lease, last=revision, ttl_s=TTL_S)
    except Conflict:
        return None
    return Held(bucket, service, lease, revision)
