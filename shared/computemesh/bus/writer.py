"""Compare-and-sets of many keys at once, decided from a mirror instead of a read each.

Ten thousand nodes that join in one second are ten thousand puts in flight, not as many round trips one
after the other. What the mirror does not know yet costs a lost race: then the key is read, and the
decision made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, TypeVar

import msgspec

from computemesh import log
from computemesh.bus.connection import Bus, read_ack
from computemesh.bus.errors import BusError, Conflict, NotStored
from computemesh.bus.kv import ATTEMPTS_MAX, Bucket, Entry, Mirror
from computemesh.bus.pipeline import Pipeline, Reply
from computemesh.contracts import storage
from computemesh.contracts.base import encode
from computemesh.tasks import end_all

IN_FLIGHT_MAX: Final = 2048
"""Keys that are written at the same time; whoever wants more waits."""

TIMEOUT_S: Final = 5.0
AGAIN_S: Final = 0.2
"""Pause before a key is read again that could not be written or read."""

V = TypeVar("V", bound=msgspec.Struct)

_log = log.get("writer")


class Turn(Generic[V]):
    """One decision about a key."""

    __slots__ = ("decide", "done")

    def __init__(self, decide: Callable[[V | None], V | None], done: asyncio.Future[V | None] | None) -> None:
        self.decide = decide
        self.done = done

    @property
    def given_up(self) -> bool:
        """Nobody waits for it any more who did."""
        return self.done is not None and self.done.done()


class Writer(Generic[V]):
    """Moves the values of a bucket by pure functions, many keys at the same time, each key in order.

    While a key's put is in flight, further decisions about it wait, and become one put together.

    Args:
        ttl_s: keys expire that long after they were written last; whole seconds, at least 1.
    """

    def __init__(self, bus: Bus, spec: storage.Bucket[V], mirror: Mirror[V], *, ttl_s: int | None = None) -> None:
        self._headers = {} if ttl_s is None else {"Nats-TTL": f"{ttl_s}s"}
        self._bucket = Bucket(bus, spec)
        self._mirror = mirror
        self._puts = Pipeline(bus, timeout_s=TIMEOUT_S)
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._waiting: dict[str, list[Turn[V]]] = {}
        """Decisions that wait, of every key that has a put in flight."""
        self._again: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._puts.start()

    async def stop(self) -> None:
        """Forgets what was not acknowledged."""
        await end_all(self._again)
        await self._puts.stop()

    def writing(self, key: str) -> bool:
        """Whether something about a key is decided that the mirror does not show yet."""
        return key in self._waiting

    async def submit(self, key: str, decide: Callable[[V | None], V | None]) -> None:
        """Moves a key's value some time soon. What cannot be written is logged.

        Args:
            decide: from the present value (None: not there) to the new one; None or the same value writes nothing.
                It runs again when a race was lost, or an acknowledgement: then perhaps on its own outcome.
        """
        await self._begin(key, Turn(decide, None))

    async def change(self, key: str, decide: Callable[[V | None], V | None]) -> V | None:
        """As :meth:`submit`, and gives the value that stands afterwards.

        Cancelled, it is not tried again; what was sent by then may be stored.

        Raises:
            BusError: it could not be written, or nobody knows whether it was.
        """
        done: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        await self._begin(key, Turn(decide, done))
        return await done

    async def _begin(self, key: str, turn: Turn[V]) -> None:
        if key not in self._waiting:
            await self._room.acquire()
            if key not in self._waiting:
                self._waiting[key] = []
                await self._decide_by_mirror(key, [turn])
                return
            self._room.release()
        self._waiting[key].append(turn)

    async def _decide_by_mirror(self, key: str, turns: list[Turn[V]]) -> None:
        entry = self._mirror.entries.get(key)
        await self._decide(key, turns, entry, entry.revision if entry else 0, 1)

    async def _decide(self, key: str, turns: list[Turn[V]], entry: Entry[V] | None, last: int, attempt: int) -> None:
        """Decides, and writes what was decided; at the end the key is free again."""
        before = entry.value if entry else None
        value = before
        stands: list[V | None] = []
        for turn in turns:
            decided = turn.decide(value)
            value = value if decided is None else decided
            stands.append(value)
        if value is None or value is before or value == before:
            await self._finish(key, turns, stands)
            return
        try:
            await self._puts.send(
                self._bucket.spec.subject(key),
                encode(value),
                partial(self._on_reply, key, turns, stands, value, attempt),
                headers={"Nats-Expected-Last-Subject-Sequence": str(last), **self._headers},
            )
        except BusError as error:
            await self._fail(key, turns, error)

    async def _on_reply(
        self, key: str, turns: list[Turn[V]], stands: list[V | None], value: V, attempt: int, reply: Reply
    ) -> None:
        try:
            if reply.timed_out or reply.no_responder:
                self._try_again(key, turns, attempt, BusError(f"{key}: no acknowledgement"), AGAIN_S)
                return
            revision = read_ack(key, reply.data).seq
        except Conflict as error:
            self._try_again(key, turns, attempt, error, 0.0)
        except NotStored as error:
            await self._fail(key, turns, error)
        else:
            self._mirror.wrote(key, value, revision)
            await self._finish(key, turns, stands)

    def _try_again(self, key: str, turns: list[Turn[V]], attempt: int, error: BusError, pause_s: float) -> None:
        task = asyncio.create_task(self._read_and_decide(key, turns, attempt, error, pause_s))
        self._again.add(task)
        task.add_done_callback(self._again.discard)

    async def _read_and_decide(
        self, key: str, turns: list[Turn[V]], attempt: int, error: BusError, pause_s: float
    ) -> None:
        while attempt < ATTEMPTS_MAX:
            await asyncio.sleep(pause_s)
            turns = [turn for turn in turns if not turn.given_up]
            if not turns:
                await self._next(key)
                return
            attempt += 1
            try:
                entry, last = await self._bucket.read(key)
            except BusError as failed:
                error, pause_s = failed, AGAIN_S
                continue
            if entry is not None:
                self._mirror.wrote(key, entry.value, entry.revision)
            await self._decide(key, turns, entry, last, attempt)
            return
        await self._fail(key, turns, error)

    async def _finish(self, key: str, turns: list[Turn[V]], stands: list[V | None]) -> None:
        for turn, value in zip(turns, stands, strict=True):
            if turn.done is not None and not turn.done.done():
                turn.done.set_result(value)
        await self._next(key)

    async def _fail(self, key: str, turns: list[Turn[V]], error: BusError) -> None:
        _log.warning("cannot write", bucket=self._bucket.spec.name, key=key, reason=str(error))
        for turn in turns:
            if turn.done is not None and not turn.done.done():
                turn.done.set_exception(error)
        await self._next(key)

    async def _next(self, key: str) -> None:
        if turns := self._waiting[key]:
            self._waiting[key] = []
            await self._decide_by_mirror(key, [turn for turn in turns if not turn.given_up])
        else:
            del self._waiting[key]
            self._room.release()
