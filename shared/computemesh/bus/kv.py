"""Typed JetStream KV buckets, without the traps of the raw ones.

A key that expired or was deleted simply is not there: markers never surface. Every write is a
compare-and-set and raises :class:`Conflict` when it loses. :class:`Mirror` holds a whole bucket in memory
and stays right across reconnects and server restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import msgspec

from computemesh import log
from computemesh.bus.connection import Bus, read_ack
from computemesh.bus.errors import BusError, Conflict
from computemesh.bus.pull import Pull, Stored, read_all, read_last
from computemesh.contracts import storage
from computemesh.contracts.base import encode
from computemesh.ids import new_id

ATTEMPTS_MAX: Final = 32
"""Races one :meth:`Bucket.change` may lose in a row before it gives up."""

V = TypeVar("V", bound=msgspec.Struct)
Other = TypeVar("Other", bound=msgspec.Struct)

_log = log.get("kv")


@dataclass(frozen=True)
class Entry(Generic[V]):
    value: V
    revision: int
    """Sequence in the bucket's stream; the next compare-and-set names it."""
    since_s: float = field(default_factory=time.monotonic, compare=False)
    """When this process first saw it, by the monotonic clock."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """One of several writes that happen together."""

    key: str
    value: msgspec.Struct
    last: int
    """Revision the key must have; 0: it is not there."""
    ttl_s: int | None = None


def is_gone(headers: Mapping[str, str] | None) -> bool:
    """Whether a stored message only marks that its key was deleted, purged or expired."""
    return headers is not None and ("KV-Operation" in headers or "Nats-Marker-Reason" in headers)


def read_entry(
    spec: storage.Bucket[V], decode: Callable[[bytes], V], key: str, data: bytes, revision: int
) -> Entry[V] | None:
    """A stored value. One that somebody else spoiled is reported and taken as absent: it must not stop us."""
    try:
        return Entry(decode(data), revision)
    except (ValueError, RecursionError) as error:
        _log.error("a stored value cannot be read", bucket=spec.name, key=key, reason=str(error))
        return None


class Bucket(Generic[V]):
    """Reads and writes of one bucket."""

    def __init__(self, bus: Bus, spec: storage.Bucket[V]) -> None:
        self.spec: Final = spec
        self._bus = bus
        self._decode: Callable[[bytes], V] = msgspec.json.Decoder(spec.value).decode

    async def get(self, key: str) -> Entry[V] | None:
        entry, _ = await self.read(key)
        return entry

    def _entry(self, key: str, data: bytes, revision: int) -> Entry[V] | None:
        return read_entry(self.spec, self._decode, key, data, revision)

    async def read(self, key: str) -> tuple[Entry[V] | None, int]:
        """The entry, and the revision a write must name: also that of a marker, 0 when there is nothing."""
        stored = await read_last(self._bus, self.spec.stream, self.spec.subject(key))
        if stored is None:
            return None, 0
        return (None if is_gone(stored.headers) else self._entry(key, stored.data, stored.seq)), stored.seq

    async def update(self, key: str, value: V, *, last: int, ttl_s: int | None = None) -> int:
        """Writes if the key's revision is still *last* (0: it is not there), and gives the new revision.

        Args:
            ttl_s: the key expires after that long unless written again; at least 1.

        Raises:
            Conflict: somebody else wrote meanwhile.
        """
        return await self.update_other(key, value, last=last, ttl_s=ttl_s)

    async def update_together(self, writes: Sequence[Write]) -> int:
        """Writes several keys, all or none, and gives the revision of the last; those before it precede it by one each.

        Costs some ten times as much as a single write. Keys of several tokens may hold other types than the
        bucket's.

        Raises:
            Conflict: one of the keys is not at the revision that was named. Nothing was written.
        """
        batch = new_id("b")
        for number, write in enumerate(writes, 1):
            headers = {
                "Nats-Batch-Id": batch,
                "Nats-Batch-Sequence": str(number),
                "Nats-Expected-Last-Subject-Sequence": str(write.last),
            }
            if write.ttl_s is not None:
                headers["Nats-TTL"] = f"{write.ttl_s}s"
            subject, data = self.spec.subject(write.key), encode(write.value)
            if number < len(writes):
                await self._bus.send(subject, data, headers=headers)
                continue
            reply = await self._bus.call(subject, data, headers=headers | {"Nats-Batch-Commit": "1"})
            return read_ack(subject, reply.data).seq
        raise AssertionError("nothing to write")

    async def read_other(self, key: str, kind: type[Other]) -> Entry[Other] | None:
        """The value of a key of several tokens, which holds another type."""
        stored = await read_last(self._bus, self.spec.stream, self.spec.subject(key))
        if stored is None or is_gone(stored.headers):
            return None
        return Entry(msgspec.json.decode(stored.data, type=kind), stored.seq)

    async def update_other(self, key: str, value: msgspec.Struct, *, last: int, ttl_s: int | None = None) -> int:
        """As :meth:`update`, for a key of several tokens."""
        headers = {"Nats-Expected-Last-Subject-Sequence": str(last)}
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{ttl_s}s"
        subject = self.spec.subject(key)
        reply = await self._bus.call(subject, encode(value), headers=headers)
        return read_ack(subject, reply.data).seq

    async def newest(self, key: str = "*") -> int:
        """The revision of a key, that of a marker included; 0 when there is nothing. Without one, of the key that was
        written last; keys of several tokens do not count."""
        stored = await read_last(self._bus, self.spec.stream, self.spec.subject(key))
        return stored.seq if stored else 0

    async def create(self, key: str, value: V, *, ttl_s: int | None = None) -> int:
        """Writes a key that is not there, or only as a marker.

        Raises:
            Conflict: it is there.
        """
        try:
            return await self.update(key, value, last=0, ttl_s=ttl_s)
        except Conflict:
            entry, revision = await self.read(key)
            if entry is not None or revision == 0:
                raise
            return await self.update(key, value, last=revision, ttl_s=ttl_s)

    async def purge(self, key: str, *, last: int, marker_ttl_s: int | None = None) -> int:
        """Removes a key if its revision is still *last*, and gives the revision of the marker left in its place.

        Args:
            marker_ttl_s: the marker goes after that long; else it stays.
        """
        subject = self.spec.subject(key)
        headers = {
            "KV-Operation": "PURGE",
            "Nats-Rollup": "sub",
            "Nats-Expected-Last-Subject-Sequence": str(last),
        }
        if marker_ttl_s is not None:
            headers["Nats-TTL"] = f"{marker_ttl_s}s"
        reply = await self._bus.call(subject, b"", headers=headers)
        return read_ack(subject, reply.data).seq

    async def change(self, key: str, decide: Callable[[V | None], V | None]) -> V | None:
        """Moves a key's value by a pure function, which may run again when a race was lost.

        Args:
            decide: from the present value (None: not there) to the new one; None or the same value
                writes nothing.

        Returns:
            The value that stands afterwards.
        """
        for _ in range(ATTEMPTS_MAX):
            entry, revision = await self.read(key)
            before = entry.value if entry else None
            after = decide(before)
            if after is None or after == before:
                return before
            try:
                await self.update(key, after, last=revision)
            except Conflict:
                continue
            return after
        raise Conflict(f"{self.spec.name}/{key}: {ATTEMPTS_MAX} races lost in a row")

    async def load(self) -> dict[str, Entry[V]]:
        """Every key, as of now. Keys of several tokens are bookkeeping and left out."""
        prefix = self.spec.subject("")
        found: dict[str, Entry[V]] = {}
        for message in await read_all(self._bus, self.spec.stream, self.spec.subject("*")):
            key = message.subject.removeprefix(prefix)
            if not is_gone(message.headers) and (entry := self._entry(key, message.data, message.seq)):
                found[key] = entry
        return found


OnChange = Callable[[str, V | None], None]


class Mirror(Generic[V]):
    """A bucket in memory, kept equal to the stored one.

    Reading starts over after every interruption, and keys that vanished meanwhile are noticed. One mirror
    per bucket and process; *on_change* is called with the key and its value, None when it is gone.
    """

    def __init__(self, bus: Bus, spec: storage.Bucket[V], on_change: OnChange[V] | None = None) -> None:
        self.entries: dict[str, Entry[V]] = {}
        self.synced = asyncio.Event()
        """Set while the mirror is known to hold all that is stored."""
        self._bus = bus
        self._spec = spec
        self._decode: Callable[[bytes], V] = msgspec.json.Decoder(spec.value).decode
        self._on_change = on_change
        self._unseen: set[str] = set()
        self.seen = 0
        """While it is synced, everything that was stored up to this revision is reflected."""
        self._reached: list[tuple[int, asyncio.Future[None]]] = []
        self._synced_s = float("-inf")

    @property
    def behind_s(self) -> float:
        """How long it has not been known whether this is all that is stored; infinite before it ever was."""
        return 0.0 if self.synced.is_set() else time.monotonic() - self._synced_s

    def get(self, key: str) -> V | None:
        entry = self.entries.get(key)
        return entry.value if entry else None

    def values(self) -> list[V]:
        return [entry.value for entry in self.entries.values()]

    def wrote(self, key: str, value: V | None, revision: int) -> None:
        """This process stored *value* under *revision* (None: removed), or read it there: the mirror need not wait
        for the stream."""
        entry = self.entries.get(key)
        if entry is not None and entry.revision >= revision:
            return
        self._unseen.discard(key)
        if value is None:
            self._drop(key)
        else:
            self._take(key, Entry(value, revision))

    async def reach(self, revision: int) -> None:
        """Returns once all that was stored up to *revision* is reflected. Bound it: the stream may be away."""
        if self.synced.is_set() and self.seen >= revision:
            return
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reached.append((revision, reached))
        await reached

    async def follow(self) -> None:
        """Keeps the mirror equal to the bucket until cancelled. Run it as a background task."""
        while True:
            await self._bus.connected.wait()
            pull = Pull(self._bus, self._spec.stream)
            try:
                await self._read_from_start(pull)
                await pull.lost.wait()
            except BusError as error:
                _log.warning("cannot follow a bucket yet", bucket=self._spec.name, reason=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._bus.interrupted.wait()
            finally:
                if self.synced.is_set():
                    self._synced_s = time.monotonic()
                self.synced.clear()
                await pull.stop()

    async def _read_from_start(self, pull: Pull) -> None:
        self._unseen = set(self.entries)
        self.seen = 0
        subject = self._spec.subject("*")
        await pull.start(self._on_stored, subjects=[subject], last_per_subject=True)
        await pull.catch_up(subject)
        self._caught_up()

    async def _on_stored(self, stored: Stored) -> None:
        key = stored.subject.removeprefix(self._spec.subject(""))
        known = self.entries.get(key)
        # A store that was lost and made anew begins its revisions anew.
        older = known is not None and stored.seq < known.revision and key not in self._unseen
        self._unseen.discard(key)
        if older or (known is not None and stored.seq == known.revision):
            pass  # This process wrote it, and perhaps again since.
        elif is_gone(stored.headers):
            self._drop(key)
        elif entry := read_entry(self._spec, self._decode, key, stored.data, stored.seq):
            self._take(key, entry)
        self.seen = max(self.seen, stored.seq)
        if self._reached and self.synced.is_set():
            self._tell_reached()

    def _caught_up(self) -> None:
        for key in self._unseen:
            self._drop(key)
        self._unseen = set()
        self.synced.set()
        self._tell_reached()

    def _tell_reached(self) -> None:
        for wanted, reached in self._reached:
            if wanted <= self.seen and not reached.done():
                reached.set_result(None)
        self._reached = [(wanted, reached) for wanted, reached in self._reached if not reached.done()]

    def _take(self, key: str, entry: Entry[V]) -> None:
        self.entries[key] = entry
        if self._on_change:
            self._on_change(key, entry.value)

    def _drop(self, key: str) -> None:
        if self.entries.pop(key, None) is not None and self._on_change:
            self._on_change(key, None)
