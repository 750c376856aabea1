"""API keys: who may use the gateways' OpenAI interface. Kept here, as the gateways themselves keep nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from msgspec.structs import asdict

from computemesh import log
from computemesh.bus import Bucket, Bus, Conflict, Mirror
from computemesh.contracts import keys, storage
from computemesh.contracts.base import MESSAGE_BYTES_MAX, AnyBound, Refused, encode, serve
from computemesh.contracts.keys import (
    KEYS_MAX,
    KeyCreate,
    KeyList,
    KeyRecord,
    KeyRevoke,
    KeyRevoked,
    KeysChanged,
    KeysList,
)

ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 16 * 1024
"""Keys in one answer, as JSON; the rest is for what stands around them."""

REACH_S: Final = 2.0
"""How long an answer waits for what another replica stored."""

MARKER_S: Final = 3600
"""How long a revoked key leaves a marker in the store."""

_log = log.get("keys")


class Keys:
    """Creates, lists and revokes keys. Any replica does: the compare-and-set is the fence."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, storage.KEYS)
        self._mirror: Mirror[KeyRecord] = Mirror(bus, storage.KEYS)

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(keys.CREATE, self.on_create),
            serve(keys.LIST, self.on_list),
            serve(keys.REVOKE, self.on_revoke),
        ]

    async def follow(self) -> None:
        """Learns of what other replicas store, until cancelled."""
        await self._mirror.follow()

    @property
    def known(self) -> bool:
        """Whether all that is stored is known here."""
        return self._mirror.synced.is_set()

    async def on_create(self, ask: KeyCreate) -> KeyRecord | Refused:
        if not keys.is_digest(ask.digest):
            reason = "not a SHA-256 in hexadecimal: 64 of 0 to 9 and a to f"
            return Refused(code="bad_digest", reason=reason, field="digest")
        entry = await self._bucket.get(ask.name)
        if entry is not None:
            return entry.value if _is_repeated(entry.value, ask) else _exists(f"there is a key {ask.name!r} already")
        for record in self._mirror.values():
            if record.digest == ask.digest and record.name != ask.name:
                return _exists(f"the same key is there already, as {record.name!r}")
        if len(self._mirror.entries) >= KEYS_MAX:
            reason = f"there are {KEYS_MAX} keys, and no more are kept; revoke some"
            return Refused(code="too_many_keys", reason=reason, status=409)
        record = KeyRecord(**asdict(ask), created_at=time.time())
        try:
            revision = await self._bucket.create(ask.name, record)
        except Conflict:
            return _exists(f"there is a key {ask.name!r} already")
        await self._stored(ask.name, record, revision)
        _log.info("key created", key=ask.name)
        return record

    async def on_list(self, ask: KeysList) -> KeyList | Refused:
        try:
            async with asyncio.timeout(REACH_S):
                await self._mirror.reach(ask.revision)
        except TimeoutError:
            reason = "this replica does not know yet what was stored last"
            return Refused(code="unavailable", reason=reason, status=503, retry="later")
        return page(self._mirror.values(), ask)

    async def on_revoke(self, ask: KeyRevoke) -> KeyRevoked | Refused:
        while True:
            entry = await self._bucket.get(ask.name)
            if entry is None:
                reason = f"no key {ask.name!r}"
                return Refused(code="not_found", reason=reason, field="name", status=404)
            try:
                marker = await self._bucket.purge(ask.name, last=entry.revision, marker_ttl_s=MARKER_S)
            except Conflict:
                continue
            await self._stored(ask.name, None, marker)
            _log.info("key revoked", key=ask.name)
            return KeyRevoked(name=ask.name, left=len(self._mirror.entries))

    async def _stored(self, name: str, record: KeyRecord | None, revision: int) -> None:
        self._mirror.wrote(name, record, revision)
        await self._bus.publish(keys.CHANGED, KeysChanged(name=name, revision=revision))


def page(records: Iterable[KeyRecord], ask: KeysList, *, bytes_max: int = ANSWER_BYTES_MAX) -> KeyList:
    """The keys that follow ``ask.after`` by name, as many as were asked for and fit; one at least."""
    ordered = sorted(records, key=lambda record: record.name)
    following = [record for record in ordered if record.name > ask.after]
    taken: list[KeyRecord] = []
    size = 0
    for record in following[: ask.limit]:
        size += len(encode(record)) + 1
        if taken and size > bytes_max:
            break
        taken.append(record)
    more = len(taken) < len(following)
    return KeyList(keys=taken, count=len(ordered), next=taken[-1].name if more else "")


def _is_repeated(record: KeyRecord, ask: KeyCreate) -> bool:
    """Whether a key was asked for once more, as when the first answer was lost."""
    return KeyRecord(**asdict(ask), created_at=record.created_at) == record


def _exists(reason: str) -> Refused:
    return Refused(code="exists", reason=reason, field="name", status=409)
