"""Making room: the inbox and the bucket have limits, and must not stand full of what nobody needs.

The inbox keeps what was read already, for whoever wants to look, until it is half full. Finished items stay
for their time, unless the bucket fills up: then the oldest of them go first, and so do the oldest objects when
their store fills up. None ever loses an item that is not finished, its payload, or a message that is not reflected
in the bucket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus import Bus, BusError, ObjectStore, Pipeline, Pull, Reply, Stored
from computemesh.contracts import storage
from computemesh.contracts.work import FINAL, WorkState

LOOK_S: Final = 5.0
"""How often the sizes are looked at."""

INBOX_FULL: Final = 0.5
BUCKET_FULL: Final = 0.8
OBJECTS_FULL: Final = 0.8
"""Shares of their limits above which room is made."""

OBJECTS_LEFT: Final = 0.6
"""Share of its limit down to which the object store is emptied."""

ABANDONED_S: Final = 3600.0
"""An object of which no part came for so long is not being put any more."""

BATCH: Final = 20_000
"""Records looked at in one go when the bucket is nearly full."""

_log = log.get("retention")


class _Head(msgspec.Struct):
    """As much of a record as is needed here."""

    state: WorkState


async def make_room_forever(
    bus: Bus, stored_up_to: Callable[[], int], objects_needed: Callable[[], Collection[str]]
) -> None:
    """Keeps all three below their limits until cancelled.

    Args:
        stored_up_to: the inbox sequence below which everything is reflected in the bucket.
        objects_needed: the objects that items refer to which have not ended.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if await _share(bus, storage.WORK_INBOX.name) > INBOX_FULL:
                await _purge(bus, storage.WORK_INBOX.name, {"seq": stored_up_to()})
                _log.info("made room in the inbox", below_seq=stored_up_to())
            if await _share(bus, storage.WORK.stream) > BUCKET_FULL:
                _log.warning("made room in the bucket", finished_items=await drop_finished(bus))
            if await _share(bus, storage.OBJECTS.stream) > OBJECTS_FULL:
                limit = int(storage.OBJECTS.max_bytes * OBJECTS_LEFT)
                dropped = await drop_objects(bus, objects_needed(), bytes_max=limit)
                _log.warning("made room in the object store", objects=dropped)
        except BusError as error:
            _log.warning("cannot make room", reason=str(error))


async def drop_finished(bus: Bus) -> int:
    """Removes the finished items among the oldest records, and gives their number."""
    subjects: list[str] = []
    seen = 0
    enough = asyncio.Event()

    async def on_stored(stored: Stored) -> None:
        nonlocal seen
        seen += 1
        if seen <= BATCH and stored.data and _is_finished(stored.data):
            subjects.append(stored.subject)
        if seen >= BATCH or stored.pending == 0:
            enough.set()

    pull = Pull(bus, storage.WORK.stream)
    purges = Pipeline(bus, timeout_s=10.0)
    try:
        await purges.start()
        if await pull.start(on_stored, subjects=[storage.WORK.subject("*")]):
            await asyncio.wait_for(enough.wait(), 30.0)
        for subject in subjects:
            await purges.send(_purge_subject(storage.WORK.stream), _json({"filter": subject}), _ignore)
        await purges.empty.wait()
    except TimeoutError:
        raise BusError("the bucket could not be read in time") from None
    finally:
        await pull.stop()
        await purges.stop()
    return len(subjects)


async def drop_objects(bus: Bus, needed: Collection[str], *, bytes_max: int) -> int:
    """Removes the oldest objects until those that are left have *bytes_max* together, and gives their number.

    Args:
        needed: objects that stay in any case.
    """
    store = ObjectStore(bus, storage.OBJECTS)
    complete = await store.list()
    left = sum(info.size for info in complete)
    gone: list[str] = []
    for object_id in (await store.begun()).keys() - {info.name for info in complete}:
        part_at = await store.last_part_at(object_id)
        if part_at is not None and time.time() - part_at > ABANDONED_S:
            gone.append(object_id)
    for info in complete:
        if left <= bytes_max:
            break
        if info.name not in needed:
            left -= info.size
            gone.append(info.name)
    for object_id in gone:
        await store.remove(object_id)
    return len(gone)


def _is_finished(data: bytes) -> bool:
    try:
        return msgspec.json.decode(data, type=_Head).state in FINAL
    except ValueError:
        return False


async def _share(bus: Bus, stream: str) -> float:
    """How full a stream is: 0 to 1."""
    reply = await bus.call(f"$JS.API.STREAM.INFO.{stream}", b"")
    info: dict[str, Any] = msgspec.json.decode(reply.data)
    limit = info.get("config", {}).get("max_bytes", -1)
    return float(info.get("state", {}).get("bytes", 0)) / limit if limit > 0 else 0.0


async def _purge(bus: Bus, stream: str, what: dict[str, Any]) -> None:
    await bus.call(_purge_subject(stream), _json(what), timeout_s=30.0)


def _purge_subject(stream: str) -> str:
    return f"$JS.API.STREAM.PURGE.{stream}"


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)


async def _ignore(_: Reply) -> None:
    """A purge that failed is tried again at the next look."""
