"""Reading a stream continuously: one pull request with a large batch, topped up at half.

``fetch()`` waits a round trip for each batch; this does not, and reads four times as fast. Consumers are
ephemeral and unacknowledged: whoever reads keeps its own position.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh import log
from computemesh.bus.connection import ApiError, Bus, inquire
from computemesh.bus.errors import BusError, NotStored

BATCH: Final = 2000
"""Messages the server may send ahead of us."""

HEARTBEAT_S: Final = 1.0
"""The server says this often that it is still there; three times that in silence and the pull is lost."""

EXPIRES_S: Final = 3600.0
"""How long one pull request stands."""

INACTIVE_S: Final = 10.0
"""After this long without us the server forgets the consumer."""

CAUGHT_UP_S: Final = 0.5
"""How often the leader is asked again what is newest, while that does not arrive."""

_NS: Final = 1_000_000_000
_NO_MESSAGE: Final = 10037
_log = log.get("pull")


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A message as it stands in a stream."""

    subject: str
    data: bytes
    seq: int
    pending: int
    """Messages behind this one when it was sent; 0 = caught up."""
    headers: Mapping[str, str] | None


OnStored = Callable[[Stored], Awaitable[None]]


class _Created(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    num_pending: int = 0
    error: ApiError | None = None


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    subject: str
    seq: int
    hdrs: bytes = b""
    data: bytes = b""


class _Last(msgspec.Struct, frozen=True, kw_only=True):
    message: _Message | None = None
    error: ApiError | None = None


class Pull:
    """One reader of one stream, from a position on, in order, without gaps.

    It never recovers by itself: when the server, the consumer or the connection went away, or a message was lost
    on its way, ``lost`` is set and whoever reads starts a new one from the position they know.
    """

    def __init__(self, bus: Bus, stream: str) -> None:
        self._bus = bus
        self._stream = stream
        self.lost = asyncio.Event()
        self._seen = 0
        """Sequence of the newest message that was handled."""
        self._wanted = 0
        self._arrived = asyncio.Event()
        """Set once the message that is wanted was handled."""
        self._left = 0
        self._taken = 0
        """Messages that the consumer delivered and that arrived; the server counts them too."""
        self._inbox = ""
        self._consumer = ""
        self._on_stored: OnStored | None = None
        self._subscription: Subscription | None = None
        self._watch: asyncio.Task[None] | None = None
        self._heard_s = 0.0

    async def start(
        self,
        on_stored: OnStored,
        *,
        subjects: list[str],
        start_seq: int | None = None,
        last_per_subject: bool = False,
    ) -> int:
        """Begins to read.

        Args:
            start_seq: first sequence to deliver; None = from the beginning.
            last_per_subject: only the newest message of each subject, then whatever follows.

        Returns:
            How many messages wait already; the last of them has ``pending == 0``.
        """
        config: dict[str, Any] = {
            "ack_policy": "none",
            "filter_subjects": subjects,
            "inactive_threshold": int(INACTIVE_S * _NS),
            "mem_storage": True,
            "deliver_policy": "all",
        }
        if last_per_subject:
            config["deliver_policy"] = "last_per_subject"
        elif start_seq is not None and start_seq > 1:
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start_seq}
        reply = await inquire(
            self._bus,
            f"$JS.API.CONSUMER.CREATE.{self._stream}",
            msgspec.json.encode({"stream_name": self._stream, "config": config}),
        )
        created = msgspec.json.decode(reply.data, type=_Created)
        if created.error is not None:
            raise NotStored(f"{self._stream}: {created.error.description}", code=created.error.err_code)
        self._on_stored = on_stored
        self._consumer = created.name
        self._inbox = self._bus.new_inbox()
        self._heard_s = asyncio.get_running_loop().time()
        self._subscription = await self._bus.listen(self._inbox, self._on_message, inline=True)
        await self._request(BATCH)
        self._watch = asyncio.create_task(self._watch_silence(self._bus.interrupted))
        return created.num_pending

    async def catch_up(self, subject: str) -> None:
        """Returns once everything that is stored under *subject* now was handled.

        What waits for this reader does not tell: in a cluster it may read from a server that lags behind the one that
        acknowledges. So the stream's leader is asked, and again while its newest does not arrive, which may be gone.

        Raises:
            BusError: the leader does not answer, or this reader was lost.
        """
        while not self.lost.is_set():
            newest = await read_last(self._bus, self._stream, subject)
            self._wanted = newest.seq if newest else 0
            if self._seen >= self._wanted:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CAUGHT_UP_S):
                    await self._arrived.wait()
            if self._seen >= self._wanted:
                return
        raise BusError(f"{self._stream}: reading it broke off")

    async def stop(self) -> None:
        """Ends it, and the consumer with it; of one that cannot be told, the server knows it after a while."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        if self._subscription is not None:
            await self._bus.forget(self._subscription)
            with contextlib.suppress(BusError):
                await self._bus.send(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}", b"")

    async def _request(self, batch: int) -> None:
        self._left += batch
        ask = {"batch": batch, "expires": int(EXPIRES_S * _NS), "idle_heartbeat": int(HEARTBEAT_S * _NS)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await self._bus.send(subject, msgspec.json.encode(ask), reply=self._inbox)

    async def _on_message(self, message: Msg) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        if not message.reply:
            await self._on_status(message.headers or {})
            return
        assert self._on_stored is not None
        parts = message.reply.split(".")
        # $JS.ACK.<stream>.<consumer>.<delivered>.<seq>.<consumer seq>.<time>.<pending>; the longer form
        # has domain and account before the stream, and a random token at the end.
        at = 5 if len(parts) == 9 else 7
        if not self._follows(int(parts[at + 1])):
            return
        seq = int(parts[at])
        await self._on_stored(Stored(message.subject, message.data, seq, int(parts[at + 3]), message.headers))
        self._seen = seq
        if seq >= self._wanted:
            self._arrived.set()
        self._left -= 1
        if self._left <= BATCH // 2:
            await self._request(BATCH // 2)

    async def _on_status(self, headers: Mapping[str, str]) -> None:
        status = headers.get("Status", "")
        if status == "408":  # A pull request ran out; the server says how much of it was unused.
            self._left -= int(headers.get("Nats-Pending-Messages", "0") or 0)
            if self._left <= BATCH // 2:
                await self._request(BATCH // 2)
        elif status != "100":
            self.lost.set()
        elif self._taken < int(headers.get("Nats-Last-Consumer", "0") or 0):
            self._miss()

    def _follows(self, number: int) -> bool:
        """Whether the consumer's message of this number is the next. Between the servers of a cluster one can be lost
        although our own connection stands, and nobody sends it again."""
        if self.lost.is_set():
            return False
        self._taken += 1
        if number == self._taken:
            return True
        self._miss()
        return False

    def _miss(self) -> None:
        _log.warning("a message was lost on its way", stream=self._stream)
        self.lost.set()

    async def _watch_silence(self, interrupted: asyncio.Event) -> None:
        """Consumers do not outlive their server, and whoever reconnects cannot tell whether it did."""
        while not self.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await interrupted.wait()
            if interrupted.is_set() or asyncio.get_running_loop().time() - self._heard_s > 3 * HEARTBEAT_S:
                self.lost.set()


async def read_all(bus: Bus, stream: str, subject: str, *, timeout_s: float = 60.0) -> list[Stored]:
    """The newest message of every subject that *subject* stands for, as of now.

    Raises:
        BusError: reading them broke off, or took too long.
    """
    found: list[Stored] = []

    async def on_stored(stored: Stored) -> None:
        found.append(stored)

    pull = Pull(bus, stream)
    try:
        waiting = await pull.start(on_stored, subjects=[subject], last_per_subject=True)
        try:
            async with asyncio.timeout(timeout_s):
                await pull.catch_up(subject)
        except (BusError, TimeoutError):
            raise BusError(f"{stream}: reading it broke off after {len(found)} of {waiting} messages") from None
    finally:
        await pull.stop()
    return found


async def read_last(bus: Bus, stream: str, subject: str) -> Stored | None:
    """The newest message of a subject, which may hold a wildcard; None when there is none.

    The stream's leader answers. A direct get is answered by any server that has a copy, which may lag behind what
    was acknowledged already.

    Raises:
        NotStored: the server refuses, with its reason.
    """
    ask = msgspec.json.encode({"last_by_subj": subject})
    reply = await inquire(bus, f"$JS.API.STREAM.MSG.GET.{stream}", ask)
    answer = msgspec.json.decode(reply.data, type=_Last)
    if answer.error is not None:
        if answer.error.err_code == _NO_MESSAGE:
            return None
        raise NotStored(f"{stream}: {answer.error.description}", code=answer.error.err_code)
    assert answer.message is not None
    found = answer.message
    return Stored(found.subject, found.data, found.seq, 0, _headers(found.hdrs))


def _headers(block: bytes) -> dict[str, str] | None:
    """The headers of a stored message, which the server gives as they were sent; None when it has none."""
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = [line.partition(":") for line in lines if line]
    return {name.strip(): value.strip() for name, _, value in pairs} or None
