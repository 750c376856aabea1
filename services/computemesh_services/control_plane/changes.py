"""What changed about engines, in order: told by the replica that holds the lease, known to every one.

The ledger's own sequence is the revision of a change. Each write names the sequence that the one before it must have,
so two replicas that both think they act cannot both tell. What the ledger says last of an engine is what was told of
it, so whoever begins to act finds by comparing what was not told yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from prometheus_client import Counter

from computemesh import log
from computemesh.bus import Bus, BusError, Mirror, Pipeline, Pull, Reply, Stored, lease
from computemesh.bus.connection import read_ack
from computemesh.bus.kv import is_gone
from computemesh.bus.provision import stream_bounds
from computemesh.bus.pull import read_last
from computemesh.contracts import storage
from computemesh.contracts.base import MESSAGE_BYTES_MAX, Refused, encode
from computemesh.contracts.engines import Changes, ChangesGet, Engine, EngineChange
from computemesh.contracts.services import CONTROL_PLANE
from computemesh.ids import token_of
from computemesh_services.control_plane import entities
from computemesh_services.control_plane.entities import Gone
from computemesh_services.control_plane.newest import Newest

AT_ONCE: Final = 256
"""Changes that are on their way to the ledger at the same time."""

REACH_S: Final = 5.0
"""How long a change that was told waits for the record it is about."""

AGAIN_S: Final = 0.2
"""Pause after changes could not be told."""

READ_S: Final = 5.0
"""How long changes are read from the ledger for one answer."""

ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 16 * 1024

TOLD: Final = Counter("computemesh_engine_changes_total", "Changes of engines told by this replica.", ["change"])

_log = log.get("changes")
_LEDGER: Final = storage.ENGINE_CHANGES
_decode: Final = msgspec.json.Decoder(EngineChange).decode


class ChangeLedger:
    """Follows the ledger, and while this replica acts writes it.

    Args:
        mirror: of the engines.
    """

    def __init__(self, bus: Bus, mirror: Mirror[Engine], instance: str) -> None:
        self._bus = bus
        self._mirror = mirror
        self._instance = instance
        self._told: dict[str, EngineChange] = {}
        """The last change of each engine that is there, or was told to be, by the key of its record."""
        self._latest = Newest()
        """Of each scope, the newest revision of which all is reflected in memory."""
        self._seen = 0
        """The newest revision that was read or written."""
        self._pull: Pull | None = None
        """Reads the ledger, while that is known to its end."""
        self.known = asyncio.Event()
        """Set while the ledger is followed and was read to its end."""
        self._arrived: asyncio.Queue[EngineChange] = asyncio.Queue()
        self._dirty: dict[str, None] = {}
        """Keys of engines about which there may be something to tell, in order."""
        self._something = asyncio.Event()
        self._held: lease.Held | None = None
        self._puts = Pipeline(bus, timeout_s=REACH_S)
        self._draining = False
        self._ended = asyncio.Event()

    @property
    def acting(self) -> bool:
        return self._held is not None and self._held.certain

    async def start(self) -> None:
        await self._puts.start()

    async def drain(self) -> None:
        """Tells what is left to tell, if it acts, and lets another replica."""
        self._draining = True
        self._something.set()
        if self._held is not None and not self._held.lost.is_set():
            await self._ended.wait()
        await self._puts.stop()

    def revision(self, scope: str) -> int:
        """The newest change of a scope that is known to be reflected in memory."""
        return self._latest.of(scope)

    def noticed(self, key: str) -> None:
        """The record under *key* is not what it was."""
        self._dirty[key] = None
        self._something.set()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Reads the ledger, and all that is added, until cancelled."""
        while True:
            await self._bus.connected.wait()
            pull = Pull(self._bus, _LEDGER.stream)
            try:
                await self._read(pull)
                await pull.lost.wait()
            except BusError as error:
                _log.warning("cannot follow the ledger yet", reason=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._bus.interrupted.wait()
            finally:
                self.known.clear()
                self._pull = None
                await pull.stop()

    async def _read(self, pull: Pull) -> None:
        first, last = await stream_bounds(self._bus, _LEDGER.stream)
        if last < self._seen:  # It was lost, and made anew.
            self._told, self._latest, self._seen = {}, Newest(), 0
        self._latest.raise_floor(first - 1)
        subject = _LEDGER.subject("*.*")
        await pull.start(self._on_stored, subjects=[subject], last_per_subject=True)
        await pull.catch_up(subject)
        await self._arrived.join()
        self._pull = pull
        self.known.set()

    async def _on_stored(self, stored: Stored) -> None:
        if stored.seq <= self._seen:
            return
        self._seen = stored.seq
        if (change := _change_in(stored)) is not None:
            self._arrived.put_nowait(change)

    async def take(self) -> None:
        """Takes changes over once memory reflects them, until cancelled."""
        lost = False
        """The records that changes are about were lost: what is not there does not come any more."""
        while True:
            lost = lost and not self._arrived.empty()
            change = await self._arrived.get()
            try:
                async with asyncio.timeout(0.0 if lost else REACH_S):
                    await self._mirror.reach(change.source)
            except TimeoutError:
                lost = self._mirror.synced.is_set()
            self._take(change)
            self._arrived.task_done()

    def _take(self, change: EngineChange) -> None:
        if not self._latest.note(change.scope, change.revision):
            return  # This replica told it, and perhaps more since.
        key = entities.key_of(change.scope, change.entity_type, change.engine_id)
        if change.engine is None:
            self._told.pop(key, None)
        else:
            self._told[key] = change

    async def since(self, ask: ChangesGet) -> Changes | Refused:
        """The changes of a scope.

        Raises:
            BusError: the ledger cannot be read.
        """
        latest = self.revision(ask.scope)
        if ask.since == latest:
            return Changes(changes=[], revision=latest)
        if ask.since > latest:
            _, last = await stream_bounds(self._bus, _LEDGER.stream)
            if ask.since > last:
                return Changes(changes=[], revision=latest, reset=True)
        found = await self._read_since(ask)
        if entities.misses(found, ask.since, latest):
            return Changes(changes=[], revision=latest, reset=True)
        taken: list[EngineChange] = []
        size = 0
        for change in found[: ask.limit]:
            size += len(encode(change)) + 1
            if taken and size > ANSWER_BYTES_MAX:
                break
            taken.append(change)
        revision = taken[-1].revision if taken else ask.since
        return Changes(changes=taken, revision=revision, more=len(taken) < len(found))

    async def _read_since(self, ask: ChangesGet) -> list[EngineChange]:
        """The changes there are of a scope after a revision, one more than was asked for at least."""
        found: list[EngineChange] = []
        enough = asyncio.Event()

        async def on_stored(stored: Stored) -> None:
            if len(found) <= ask.limit and (change := _change_in(stored)) is not None:
                found.append(change)
            if len(found) > ask.limit:
                enough.set()

        subject = _LEDGER.subject(f"{token_of(ask.scope)}.*")
        newest = await read_last(self._bus, _LEDGER.stream, subject)
        if newest is None or newest.seq <= ask.since:
            return []
        pull = Pull(self._bus, _LEDGER.stream)
        try:
            await pull.start(on_stored, subjects=[subject], start_seq=ask.since + 1)
            async with asyncio.timeout(READ_S):
                caught_up = asyncio.create_task(pull.catch_up(subject))
                waiting = asyncio.create_task(enough.wait())
                try:
                    await asyncio.wait({caught_up, waiting}, return_when=asyncio.FIRST_COMPLETED)
                    if caught_up.done():
                        caught_up.result()
                finally:
                    caught_up.cancel()
                    waiting.cancel()
                    await asyncio.wait({caught_up, waiting})
        except TimeoutError:
            raise BusError(f"{_LEDGER.name}: reading changes took too long") from None
        finally:
            await pull.stop()
        return found

    # --- writing -----------------------------------------------------------------------------------------------------

    async def act(self) -> None:
        """Holds the lease whenever possible, and tells what changes, until cancelled."""
        while not self._draining:
            await self._mirror.synced.wait()
            await self.known.wait()
            held = await lease.acquire(self._bus, CONTROL_PLANE.name, self._instance, on_wait=self._forget)
            self._held = held
            try:
                await self._reign(held)
            except BusError as error:
                _log.warning("cannot tell changes", reason=str(error))
                await asyncio.sleep(AGAIN_S)
            await held.release()
        self._ended.set()

    def _forget(self) -> None:
        """Another replica acts: whoever succeeds it compares everything."""
        self._dirty.clear()

    async def _reign(self, held: lease.Held) -> None:
        await self._catch_up()
        for key in [*self._told, *self._mirror.entries]:
            self.noticed(key)
        while True:
            await self._tell_all(held)
            if not held.certain or self._draining:
                return
            lost = asyncio.create_task(held.lost.wait())
            something = asyncio.create_task(self._something.wait())
            try:
                await asyncio.wait({lost, something}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (lost, something):
                    task.cancel()

    async def _catch_up(self) -> None:
        """Returns once all that is in the ledger is known.

        Raises:
            BusError: it cannot be read now.
        """
        if self._pull is None:
            raise BusError(f"{_LEDGER.name}: reading it broke off")
        _, last = await stream_bounds(self._bus, _LEDGER.stream)
        await self._pull.catch_up(_LEDGER.subject("*.*"))
        await self._arrived.join()
        self._seen = max(self._seen, last)  # What came last may be gone.

    async def _tell_all(self, held: lease.Held) -> None:
        """Tells what there is to tell.

        Raises:
            BusError: not all of it was told; another one may act.
        """
        while self._dirty and held.certain:
            keys = list(self._dirty)[:AT_ONCE]
            for key in keys:
                del self._dirty[key]
            if not self._dirty:
                self._something.clear()
            try:
                await self._tell(keys)
            except BusError:
                for key in keys:
                    self.noticed(key)
                raise

    async def _tell(self, keys: list[str]) -> None:
        differing = [key for key in keys if entities.told_differs(self._told.get(key), self._mirror.get(key))]
        gone = [key for key in differing if self._mirror.get(key) is None]
        why = dict(zip(gone, await asyncio.gather(*(self._why_gone(key) for key in gone)), strict=True))
        changes: list[EngineChange] = []
        latest: dict[str, int] = {}
        for key in differing:
            told, entry = self._told.get(key), self._mirror.entries.get(key)
            if not entities.told_differs(told, entry.value if entry else None):
                continue  # It came back while the reason was looked for.
            reason, marker = why.get(key, ("removed", 0))
            scope = entry.value.scope if entry else told.scope if told else ""
            change = entities.change(
                told,
                entry.value if entry else None,
                gone=reason,
                source=entry.revision if entry else marker,
                revision=self._seen + len(changes) + 1,
                previous=latest.get(scope, self.revision(scope)),
                at=time.time(),
            )
            latest[scope] = change.revision
            changes.append(change)
        await self._append(changes)

    async def _append(self, changes: list[EngineChange]) -> None:
        """Writes changes in a row; the first that is refused makes all behind it be refused as well."""
        loop = asyncio.get_running_loop()
        waiting: list[asyncio.Future[Reply]] = []
        for change in changes:
            done: asyncio.Future[Reply] = loop.create_future()
            waiting.append(done)
            await self._puts.send(
                _LEDGER.subject(entities.ledger_key(change)),
                encode(change),
                _settle(done),
                headers={"Nats-Expected-Last-Sequence": str(change.revision - 1)},
            )
        failed: BusError | None = None
        for change, done in zip(changes, waiting, strict=True):
            reply = await done
            try:
                if reply.timed_out or reply.no_responder:
                    raise BusError(f"{_LEDGER.name}: no acknowledgement")
                read_ack(_LEDGER.name, reply.data)
            except BusError as error:
                failed = failed or error
            else:
                self._seen = max(self._seen, change.revision)
                self._take(change)
                TOLD.labels(change.change).inc()
        if failed is not None:
            raise failed

    async def _why_gone(self, key: str) -> tuple[Gone, int]:
        """Why a record is gone, by the marker it left, and the revision of that. A record that expired leaves one for a
        minute, one that was removed for an hour."""
        stored = await read_last(self._bus, storage.ENGINES.stream, storage.ENGINES.subject(key))
        if stored is None:
            return "expired", 0
        removed = stored.headers is not None and "KV-Operation" in stored.headers
        return ("removed" if removed else "expired"), stored.seq


def _change_in(stored: Stored) -> EngineChange | None:
    """A stored change. One that somebody else spoiled is reported and left out: it must not stop us."""
    if is_gone(stored.headers):
        return None
    try:
        return _decode(stored.data)
    except (ValueError, RecursionError) as error:
        _log.error("a stored change cannot be read", key=stored.subject, reason=str(error))
        return None


def _settle(done: asyncio.Future[Reply]) -> Callable[[Reply], Awaitable[None]]:
    async def on_reply(reply: Reply) -> None:
        if not done.done():
            done.set_result(reply)

    return on_reply
