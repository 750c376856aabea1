"""A mesh for the gpu-orchestrator to be wrong in: virtual time, and a server that loses, delays and repeats.

Everything of the service is real, down to the bytes it puts on the bus: replicas, their mirrors, desks and leases.
The server is a model of what JetStream does: streams with one message a subject, compare-and-set, batches that
are written together, times to live, consumers. What goes wrong follows from a seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from computemesh.bus import TimedOut
from computemesh.contracts import storage
from computemesh.contracts.base import encode

# pyright: reportPrivateUsage=false

BEAT_S: Final = 1.0
"""Of a consumer that has nothing to say."""


class Clock:
    """Time that passes only while everybody waits."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Selector(selectors.DefaultSelector):
    """Waits by letting time pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for ever"
        if timeout > 0:
            self._clock.now += timeout
        return super().select(0)


@dataclass
class Message:
    """What a handler gets, as nats-py makes it."""

    subject: str
    data: bytes = b""
    headers: dict[str, str] | None = None
    reply: str = ""


@dataclass
class Kept:
    seq: int
    data: bytes
    headers: dict[str, str] | None
    until: float


@dataclass
class Consumer:
    bus: SimulatedBus
    stream: str
    wants: str
    inbox: str = ""
    sent: int = 0
    queue: list[tuple[str, Kept]] = field(default_factory=list[tuple[str, Kept]])


Check = Callable[[str, bytes, bytes | None, object], None]


class Server:
    """What is stored, by subject, and who reads it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.kept: dict[str, Kept] = {}
        self.seqs: dict[str, int] = {}
        self.consumers: list[Consumer] = []
        self.listeners: list[tuple[SimulatedBus, str, Callable[[Any], Awaitable[None]]]] = []
        self.on_put: Check | None = None
        """Called with subject, new and old bytes, and what the writer knew."""
        self._batches: dict[str, list[tuple[str, bytes, Mapping[str, str]]]] = {}

    def get(self, subject: str) -> Kept | None:
        found = self.kept.get(subject)
        if found is not None and found.until <= self.clock.now:
            del self.kept[subject]
            return None
        return found

    def stage(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        self._batches.setdefault(headers["Nats-Batch-Id"], []).append((subject, data, headers))

    def put(self, subject: str, data: bytes, headers: Mapping[str, str], witness: object = None) -> bytes:
        """Stores a message, and those staged before it; the answer is as the server gives it."""
        writes = [*self._batches.pop(headers.get("Nats-Batch-Id", ""), []), (subject, data, headers)]
        if len(writes) != int(headers.get("Nats-Batch-Sequence", 1)):
            return b'{"error":{"code":400,"err_code":10176,"description":"incomplete batch"}}'
        for key, _, said in writes:
            last = said.get("Nats-Expected-Last-Subject-Sequence")
            present = self.get(key)
            if last is not None and int(last) != (present.seq if present else 0):
                return b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence"}}'
        seq = 0
        for key, value, said in writes:
            seq = self._store(key, value, said, witness)
        return msgspec.json.encode({"seq": seq})

    def _store(self, subject: str, data: bytes, headers: Mapping[str, str], witness: object) -> int:
        stream = subject.split(".")[1]
        before = self.get(subject)
        if self.on_put is not None:
            self.on_put(subject, data, before.data if before else None, witness)
        seq = self.seqs[stream] = self.seqs.get(stream, 0) + 1
        ttl = headers.get("Nats-TTL", "")
        until = self.clock.now + int(ttl[:-1]) if ttl else float("inf")
        gone = {"KV-Operation": headers["KV-Operation"]} if "KV-Operation" in headers else None
        self.kept[subject] = Kept(seq, data, gone, until)
        for consumer in self.consumers:
            if consumer.stream == stream and _matches(consumer.wants, subject):
                consumer.queue.append((subject, self.kept[subject]))
                consumer.bus.pump(consumer)
        return seq

    def answer(
        self, bus: SimulatedBus, subject: str, data: bytes, headers: Mapping[str, str], witness: object
    ) -> Message:
        if subject.startswith("$KV."):
            return Message(subject, self.put(subject, data, headers, witness))
        if subject.startswith("$JS.API.STREAM.MSG.GET.KV_"):
            return self._last(msgspec.json.decode(data)["last_by_subj"])
        assert subject.startswith("$JS.API.CONSUMER.CREATE.KV_"), subject
        return self._consume(bus, subject.removeprefix("$JS.API.CONSUMER.CREATE.KV_"), data)

    def _last(self, wants: str) -> Message:
        found = [(kept, key) for key in list(self.kept) if _matches(wants, key) and (kept := self.get(key))]
        if not found:
            return Message("", b'{"error":{"code":404,"err_code":10037,"description":"no message found"}}')
        kept, key = max(found, key=lambda pair: pair[0].seq)
        message: dict[str, Any] = {"subject": key, "seq": kept.seq, "data": kept.data}
        if kept.headers:
            lines = ["NATS/1.0", *(f"{name}: {value}" for name, value in kept.headers.items()), "", ""]
            message["hdrs"] = "\r\n".join(lines).encode()
        return Message("", msgspec.json.encode({"message": message}))

    def _consume(self, bus: SimulatedBus, stream: str, data: bytes) -> Message:
        wants = msgspec.json.decode(data)["config"]["filter_subjects"][0]
        consumer = Consumer(bus, stream, wants)
        present = [(key, kept) for key in list(self.kept) if _matches(wants, key) and (kept := self.get(key))]
        consumer.queue = sorted(present, key=lambda pair: pair[1].seq)
        self.consumers.append(consumer)
        name = f"c{len(self.consumers)}-{id(consumer)}"
        bus.consumers[name] = consumer
        return Message("", msgspec.json.encode({"name": name, "num_pending": len(present)}))

    def say(self, subject: str, payload: Any) -> None:
        """Delivers an event to whoever listens, to each in its own time."""
        for bus, wanted, handler in list(self.listeners):
            if wanted == subject:
                bus.deliver(handler, payload)


def _matches(wanted: str, subject: str) -> bool:
    prefix, star, _ = wanted.partition("*")
    return subject.startswith(prefix) and "." not in subject[len(prefix) :] if star else wanted == subject


@dataclass
class Weather:
    """How often things go wrong, of 1."""

    lost_request: float = 0.004
    lost_answer: float = 0.006
    late_request: float = 0.004
    lost_event: float = 0.02
    lag_s: float = 0.6
    """How far what a replica mirrors may be behind what is stored."""


class SimulatedBus:
    """One replica's connection."""

    def __init__(self, server: Server, rng: random.Random, weather: Weather, name: str) -> None:
        self.connected = asyncio.Event()
        self.connected.set()
        self.interrupted = asyncio.Event()
        self.up = True
        self.dead = False
        self.consumers: dict[str, Consumer] = {}
        self.witness: Callable[[str], object] = lambda _: None
        """What this replica knows of the node whose record it writes."""
        self.said: list[Any] = []
        self.on_publish: Callable[[str, Any], None] | None = None
        self._server = server
        self._rng = rng
        self._weather = weather
        self._name = name
        self._inboxes: dict[str, Callable[[Message], Awaitable[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pumping: set[int] = set()

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """The connection breaks: consumers and what was on its way are gone."""
        if self.up:
            self.up = False
            self.connected.clear()
            self.interrupted.set()
            self._drop_consumers()

    def mend(self) -> None:
        if not self.up and not self.dead:
            self.up = True
            self.interrupted = asyncio.Event()
            self.connected.set()

    def kill(self) -> None:
        """The process is gone; what it wrote may still arrive."""
        self.cut()
        self.dead = True
        self._server.listeners = [one for one in self._server.listeners if one[0] is not self]
        for task in list(self._tasks):
            task.cancel()

    def _drop_consumers(self) -> None:
        for consumer in self.consumers.values():
            with contextlib.suppress(ValueError):
                self._server.consumers.remove(consumer)
        self.consumers.clear()
        self._inboxes.clear()

    def _delay_s(self) -> float:
        return self._rng.choice((0.0, 0.0, 0.0005, 0.001, 0.003, 0.02, 0.1))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what the service uses ---------------------------------------------------------------------------------------

    async def call(
        self, subject: str, data: bytes, *, timeout_s: float = 5.0, headers: dict[str, str] | None = None
    ) -> Message:
        key = subject.removeprefix(f"$KV.{storage.GPUS.name}.")
        witness = self.witness(key) if key != subject else None
        fate = self._rng.random()
        weather = self._weather
        await asyncio.sleep(self._delay_s())
        if self.dead:
            await asyncio.Event().wait()
        if not self.up or fate < weather.lost_request:
            await self._time_out(subject, timeout_s)
        if fate > 1 - weather.late_request and subject.startswith("$KV."):
            late_s = self._rng.uniform(1.0, 20.0)
            asyncio.get_running_loop().call_later(
                late_s, self._server.answer, self, subject, data, headers or {}, witness
            )
            await self._time_out(subject, timeout_s)
        answer = self._server.answer(self, subject, data, headers or {}, witness)
        await asyncio.sleep(self._delay_s())
        if self.dead:
            await asyncio.Event().wait()
        if not self.up or fate > 1 - weather.late_request - weather.lost_answer:
            await self._time_out(subject, timeout_s)
        return answer

    async def _time_out(self, subject: str, timeout_s: float) -> None:
        waits_until = asyncio.get_running_loop().time() + timeout_s
        while self.up and asyncio.get_running_loop().time() < waits_until:
            await asyncio.sleep(0.25)
        raise TimedOut(f"{subject}: no answer")

    async def send(self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> None:
        if subject.startswith("$JS.API.CONSUMER.MSG.NEXT."):
            consumer = self.consumers.get(subject.rsplit(".", 1)[1])
            if consumer is not None:
                consumer.inbox = reply
                self.pump(consumer)
            return
        if self.up and headers and "Nats-Batch-Id" in headers:
            self._server.stage(subject, data, headers)

    async def publish(self, event: Any, payload: Any, *, target: str = "") -> None:
        if self.up and not self.dead:
            self.said.append(payload)
            if self.on_publish is not None:
                self.on_publish(event.subject, payload)

    async def subscribe(self, event: Any, handler: Callable[[Any], Awaitable[None]], *, target: str = "") -> object:
        mark = (self, event.at(target or ("*" if event.target else "")), handler)
        self._server.listeners.append(mark)
        return mark

    async def forget(self, subscription: Any) -> None:
        if subscription in self._server.listeners:
            self._server.listeners.remove(subscription)
        elif isinstance(subscription, str):
            self._inboxes.pop(subscription, None)

    async def flush(self) -> None:
        if not self.up:
            raise TimedOut("flush")

    def new_inbox(self) -> str:
        return f"_INBOX.{self._name}.{self._rng.getrandbits(64):x}"

    async def listen(
        self, subject: str, on_message: Callable[[Message], Awaitable[None]], *, queue: str = "", inline: bool = False
    ) -> str:
        self._inboxes[subject] = on_message
        return subject

    # --- what arrives ------------------------------------------------------------------------------------------------

    def deliver(self, handler: Callable[[Any], Awaitable[None]], payload: Any) -> None:
        async def later() -> None:
            await asyncio.sleep(self._delay_s())
            if self.up:
                await handler(payload)

        if self.up and self._rng.random() >= self._weather.lost_event:
            self._start(later())

    def pump(self, consumer: Consumer) -> None:
        """Delivers what a consumer has, in order and without gaps."""
        if consumer.inbox and id(consumer) not in self._pumping:
            self._pumping.add(id(consumer))
            self._start(self._pump(consumer))

    async def _pump(self, consumer: Consumer) -> None:
        idle_s = 0.0
        while consumer in self.consumers.values():
            handler = self._inboxes.get(consumer.inbox)
            if handler is None:
                break
            if not consumer.queue:
                await asyncio.sleep(0.05)
                idle_s += 0.05
                if idle_s >= BEAT_S:
                    idle_s = 0.0
                    await handler(Message(consumer.inbox, headers={"Status": "100"}))
                continue
            await asyncio.sleep(self._rng.choice((0.0, 0.001, 0.02, self._weather.lag_s)))
            batch, consumer.queue = consumer.queue, []
            for number, (subject, kept) in enumerate(batch, 1):
                consumer.sent += 1
                left = len(batch) - number + len(consumer.queue)
                reply = f"$JS.ACK.s.c.1.{kept.seq}.{consumer.sent}.0.{left}"
                await handler(Message(subject, kept.data, kept.headers, reply))
        self._pumping.discard(id(consumer))


def store(server: Server, bucket: storage.Bucket[Any], key: str, value: msgspec.Struct | None) -> None:
    """Writes as another service would; None removes the key."""
    if value is None:
        server.put(bucket.subject(key), b"", {"KV-Operation": "PURGE"})
    else:
        server.put(bucket.subject(key), encode(value), {})
