"""Making room: the inbox and the bucket have limits, and must not stand full of what nobody needs.

The inbox keeps what was read already, for whoever wants to look, until it is half full. Finished items stay
for their time, unless the bucket fills up: then the oldest of them go first. Neither ever loses an item that
is not finished, or a message that is not reflected in the bucket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus import Bus, BusError, Pipeline, Pull, Reply, Stored
from computemesh.contracts import storage
from computemesh.contracts.work import FINAL, WorkState

LOOK_S: Final = 5.0
"""How often the sizes are looked at."""

INBOX_FULL: Final = 0.5
BUCKET_FULL: Final = 0.8
"""Shares of their limits above which room is made."""

BATCH: Final = 20_000
"""Records looked at in one go when the bucket is nearly full."""

_log = log.get("retention")


class _Head(msgspec.Struct):
    """As much of a record as is needed here."""

    state: WorkState


async def make_room_forever(bus: Bus, stored_up_to: Callable[[], int]) -> None:
    """Keeps both below their limits until cancelled.

    Args:
        stored_up_to: the inbox sequence below which everything is reflected in the bucket.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if await _share(bus, storage.WORK_INBOX.name) > INBOX_FULL:
                await _purge(bus, storage.WORK_INBOX.name, {"seq": stored_up_to()})
                _log.info("made room in the inbox", below_seq=stored_up_to())
            if await _share(bus, storage.WORK.stream) > BUCKET_FULL:
                _log.warning("made room in the bucket", finished_items=await drop_finished(bus))
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
