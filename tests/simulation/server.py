"""A NATS server with JetStream, as far as the mesh uses them, in virtual time.

It speaks NATS's own protocol on the network of :mod:`tests.simulation.world`, so the programs run unchanged, down
to the bytes their client library writes. Modelled after what nats-server does: queue groups, no responders,
streams with one message a subject, compare-and-set, times to live and their markers, duplicates by message id,
batches that are written together, republishing, and ephemeral consumers that end with their server. As in a cluster,
direct gets and consumers may be a moment behind, and messages may be lost although every connection stands.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from computemesh.bus.provision import wanted
from tests.simulation.world import End, Link, Loop, Process, ServerEnd

Headers = dict[str, str]

INFO: Final = (
    b'INFO {"server_id":"S","version":"2.12.0","proto":1,"headers":true,"max_payload":1048576,"jetstream":true}\r\n'
)
MARKER_TTL_S: Final = 60.0
DUPLICATE_WINDOW_S: Final = 120.0
INACTIVE_S: Final = 10.0
BEHIND_S_MAX: Final = 0.5
"""How far a direct get may be behind."""

WRONG_LAST: Final = b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence"}}'
FULL: Final = b'{"error":{"code":400,"err_code":10077,"description":"maximum bytes exceeded"}}'
NO_BATCH: Final = b'{"error":{"code":400,"err_code":10176,"description":"incomplete batch"}}'


def matches(pattern: str, subject: str) -> bool:
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        return len(given) > len(wanted) and all(w in ("*", g) for w, g in zip(wanted, given, strict=False))
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


@dataclass(eq=False)
class Subscription:
    connection: Connection
    pattern: str
    queue: str
    sid: str
    head: str = ""
    """Of its pattern, what comes before the first wildcard."""

    def __post_init__(self) -> None:
        self.head = self.pattern.partition("*")[0].partition(">")[0]


@dataclass
class Kept:
    """A message in a stream."""

    subject: str
    data: bytes
    headers: Headers
    seq: int
    at: float
    expires_at: float = float("inf")


@dataclass
class Stream:
    name: str
    subjects: list[str]
    config: dict[str, Any]
    messages: dict[int, Kept] = field(default_factory=dict[int, Kept])
    newest: dict[str, Kept] = field(default_factory=dict[str, Kept])
    replaced: dict[str, tuple[Kept | None, float]] = field(default_factory=dict[str, tuple[Kept | None, float]])
    """What stood there before, and since when it does not."""
    ids: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    last_seq: int = 0
    consumers: dict[str, Consumer] = field(default_factory=dict[str, "Consumer"])
    full: bool = False
    """It takes nothing."""
    crowded: bool = False
    """It says that it is nearly full."""

    @property
    def one_a_subject(self) -> bool:
        return self.config.get("max_msgs_per_subject") == 1


@dataclass(eq=False)
class Consumer:
    """An ephemeral pull consumer without acknowledgements."""

    stream: Stream
    name: str
    patterns: list[str]
    queue: list[int]
    """Sequences that are to be delivered; what is gone meanwhile is passed over."""
    inbox: str = ""
    behind_s: float = 0.0
    """It reads from a replica that is so far behind the leader."""
    left: int = 0
    sent: int = 0
    last_seq: int = 0
    heard_at: float = 0.0
    idle_since: float = 0.0


class Connection(ServerEnd):
    """One client, as the server sees it."""

    def __init__(self, server: Server, process: Process) -> None:
        self.process = process
        self.open = True
        self.end: End | None = None
        self.out: list[bytes] = []
        self.subscriptions: dict[str, Subscription] = {}
        self._server = server
        self._buffer = b""

    def received(self, data: bytes) -> None:
        if not self.open:
            return
        self._buffer += data
        for operation, arguments, payload in self._operations():
            self._server.handle(self, operation, arguments, payload)
        self._server.flush()

    def _operations(self) -> Iterator[tuple[str, list[str], bytes]]:
        start = 0
        buffer = self._buffer
        try:
            while (at := buffer.find(b"\r\n", start)) >= 0:
                operation, _, rest = buffer[start:at].decode().partition(" ")
                if operation not in ("PUB", "HPUB"):
                    start = at + 2
                    yield operation, rest.split(" "), b""
                    continue
                size = int(rest.rsplit(" ", 1)[1])
                if len(buffer) < at + 2 + size + 2:
                    return
                start = at + 2 + size + 2
                yield operation, rest.split(), buffer[at + 2 : at + 2 + size]
        finally:
            self._buffer = buffer[start:]

    def closed(self) -> None:
        if self.open:
            self.open = False
            self._server.forget(self)

    def send(self, data: bytes) -> None:
        if self.open:
            if not self.out:
                self._server.waiting.append(self)
            self.out.append(data)


@dataclass
class Weather:
    """How often the server loses something, of 1, and whether it answers as a cluster does."""

    lost: float = 0.0
    """Of messages to a subscriber, answers included."""
    lost_store: float = 0.0
    """Of publishes to a stream, before they are stored."""
    gaps: float = 0.0
    """Of what a consumer delivers."""
    behind: float = 0.0
    """Of direct gets and of new consumers: by a replica that has not heard of the newest yet."""


class Server:
    """What all connections share."""

    def __init__(self, loop: Loop, rng: random.Random) -> None:
        self.weather = Weather()
        self.up = True
        self.streams: dict[str, Stream] = {}
        self.connections: list[Connection] = []
        self.waiting: list[Connection] = []
        self.handled = 0
        self.on_stored: Callable[[Stream, Kept, Kept | None, Connection | None], None] = _nothing
        """After a message was stored: the stream, it, what stood there, and who sent it."""
        self.on_sent: Callable[[str, bytes, Connection], None] = _nothing
        """A message comes that is no stream's."""
        self.log: Callable[..., None] = _nothing
        self._loop = loop
        self._rng = rng
        self._stream_by_kind: dict[str, Stream | None] = {}
        self._exact: dict[str, list[Subscription]] = {}
        self._wild: list[Subscription] = []
        self._batches: dict[str, list[tuple[str, bytes, Headers]]] = {}
        self._names = 0
        self._context = contextvars.Context()
        for config in wanted(replicas=1):
            self.streams[config["name"]] = Stream(config["name"], config["subjects"], config)

    # --- connections -------------------------------------------------------------------------------------------------

    async def accept(self, process: Process, link: Link, make: Callable[[], asyncio.Protocol]) -> End:
        """A process connects.

        Raises:
            ConnectionRefusedError: the server is down.
        """
        await asyncio.sleep(link.delay_s())
        while (cut := max(link.cut_until.values())) > self._loop.now:
            await asyncio.sleep(cut - self._loop.now)
        if not self.up:
            raise ConnectionRefusedError("nobody listens")
        connection = Connection(self, process)
        protocol = make()
        connection.end = end = End(self._loop, link, protocol, connection)
        process.ends.append(end)
        self.connections.append(connection)
        protocol.connection_made(end)
        end.deliver(INFO)
        return end

    def forget(self, connection: Connection) -> None:
        self.connections.remove(connection)
        for subscription in connection.subscriptions.values():
            self._unsubscribe(subscription)
        connection.subscriptions.clear()

    def crash(self) -> None:
        """What is stored stays; all else is gone."""
        self.up = False
        for connection in list(self.connections):
            connection.closed()
            assert connection.end is not None
            connection.end.reset(lose_up=True)
        self._batches.clear()
        self.waiting.clear()
        for stream in self.streams.values():
            stream.consumers.clear()

    def restart(self) -> None:
        self.up = True

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, []
        for connection in waiting:
            data, connection.out = b"".join(connection.out), []
            if connection.open and connection.end is not None:
                connection.end.deliver(data)

    # --- the protocol ------------------------------------------------------------------------------------------------

    def handle(self, connection: Connection, operation: str, arguments: list[str], payload: bytes) -> None:
        if not self.up or not connection.open:
            return
        match operation:
            case "PUB" | "HPUB":
                self._publish(connection, operation == "HPUB", arguments, payload)
            case "SUB":
                # nats-py writes an empty queue as two blanks.
                subject, queue, sid = arguments if len(arguments) == 3 else (arguments[0], "", arguments[-1])
                self._subscribe(connection, subject, queue, sid)
            case "UNSUB":
                if (subscription := connection.subscriptions.pop(arguments[0], None)) is not None:
                    self._unsubscribe(subscription)
            case "PING":
                connection.send(b"PONG\r\n")
            case _:
                pass

    def _publish(self, connection: Connection, with_headers: bool, arguments: list[str], payload: bytes) -> None:
        self.handled += 1
        headers: Headers = {}
        sizes = 2 if with_headers else 1
        if with_headers:
            size = int(arguments[-2])
            headers, payload = _headers(payload[:size]), payload[size:]
        subject, reply = arguments[0], arguments[1] if len(arguments) - sizes == 2 else ""
        self.log(connection.process.name, "→", subject, reply, payload)
        if subject.startswith("$JS.API."):
            answer = self._api(subject.removeprefix("$JS.API."), payload, reply)
            if answer is not None and reply:
                self._route(reply, answer[0], answer[1], "")
            return
        stream = self._stream_of(subject)
        if stream is not None:
            if self._rng.random() >= self.weather.lost_store:
                answered = self._store(stream, subject, payload, headers, connection)
                if answered is not None and reply:
                    self._route(reply, answered, {}, "")
            if not stream.one_a_subject:
                self._route(subject, payload, headers, "")
            return
        self.on_sent(subject, payload, connection)
        heard = self._route(subject, payload, headers, reply)
        if not heard and reply and not subject.startswith("_INBOX"):
            self._route(reply, b"", {"Status": "503"}, "")

    def _subscribe(self, connection: Connection, pattern: str, queue: str, sid: str) -> None:
        subscription = connection.subscriptions[sid] = Subscription(connection, pattern, queue, sid)
        if "*" in pattern or ">" in pattern:
            self._wild.append(subscription)
        else:
            self._exact.setdefault(pattern, []).append(subscription)

    def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._wild:
            self._wild.remove(subscription)
        elif (present := self._exact.get(subscription.pattern)) is not None:
            present.remove(subscription)
            if not present:
                del self._exact[subscription.pattern]

    def _interested(self, subject: str) -> list[Subscription]:
        found = list(self._exact.get(subject, ()))
        return found + [w for w in self._wild if subject.startswith(w.head) and matches(w.pattern, subject)]

    def _route(self, subject: str, data: bytes, headers: Headers, reply: str) -> bool:
        """Hands a message to all that listen, and to one of each queue group; whether there were any."""
        found = self._interested(subject)
        if not found:
            return False
        groups: dict[str, list[Subscription]] = {}
        for subscription in found:
            if subscription.queue:
                groups.setdefault(subscription.queue, []).append(subscription)
            else:
                self._deliver(subscription, subject, data, headers, reply)
        for members in groups.values():
            self._deliver(self._rng.choice(members), subject, data, headers, reply)
        return True

    def _deliver(self, to: Subscription, subject: str, data: bytes, headers: Headers, reply: str) -> None:
        if self.weather.lost and self._rng.random() < self.weather.lost:
            self.log(to.connection.process.name, "lost", subject, reply, data)
            return
        to.connection.send(_message(to.sid, subject, data, headers, reply))

    # --- streams -----------------------------------------------------------------------------------------------------

    def inject(self, subject: str, data: bytes) -> None:
        """Somebody stores a message."""
        stream = self._stream_of(subject)
        assert stream is not None
        self._store(stream, subject, data, {}, None)
        self.flush()

    def _stream_of(self, subject: str) -> Stream | None:
        kind = subject[: subject.rfind(".")] if subject.startswith("$KV.") else subject
        if kind not in self._stream_by_kind:
            found = [one for one in self.streams.values() if any(matches(p, subject) for p in one.subjects)]
            self._stream_by_kind[kind] = found[0] if found else None
        return self._stream_by_kind[kind]

    def _store(
        self, stream: Stream, subject: str, data: bytes, headers: Headers, sender: Connection | None
    ) -> bytes | None:
        """Stores a message, and those staged before it; the answer is as the server gives it."""
        batch = headers.get("Nats-Batch-Id", "")
        if batch and "Nats-Batch-Commit" not in headers:
            self._batches.setdefault(batch, []).append((subject, data, headers))
            return None
        writes = [*self._batches.pop(batch, []), (subject, data, headers)]
        if batch and len(writes) != int(headers["Nats-Batch-Sequence"]):
            return NO_BATCH
        if stream.full:
            return FULL
        if (known := stream.ids.get(headers.get("Nats-Msg-Id", ""))) and self._loop.now - known[1] < DUPLICATE_WINDOW_S:
            return msgspec.json.encode({"stream": stream.name, "seq": known[0], "duplicate": True})
        for key, _, said in writes:
            last = said.get("Nats-Expected-Last-Subject-Sequence")
            present = stream.newest.get(key)
            if last is not None and int(last) != (present.seq if present else 0):
                return WRONG_LAST
            last = said.get("Nats-Expected-Last-Sequence")
            if last is not None and int(last) != stream.last_seq:
                return WRONG_LAST
        for key, value, said in writes:
            self._keep(stream, key, value, said, sender)
        if message_id := headers.get("Nats-Msg-Id"):
            stream.ids[message_id] = (stream.last_seq, self._loop.now)
        return msgspec.json.encode({"stream": stream.name, "seq": stream.last_seq})

    def _keep(self, stream: Stream, subject: str, data: bytes, headers: Headers, sender: Connection | None) -> None:
        before = stream.newest.get(subject)
        stream.last_seq += 1
        kept = Kept(subject, data, headers, stream.last_seq, self._loop.now)
        if ttl := headers.get("Nats-TTL"):
            kept.expires_at = self._loop.now + int(ttl.removesuffix("s"))
            late_s = self._rng.uniform(0.0, 0.5)
            self._loop.call_at(kept.expires_at + late_s, self._expire, stream, kept, context=self._context)
        stream.messages[kept.seq] = stream.newest[subject] = kept
        if stream.one_a_subject:
            stream.replaced[subject] = (before, self._loop.now)
            if before is not None:
                del stream.messages[before.seq]
        self.on_stored(stream, kept, before, sender)
        for consumer in list(stream.consumers.values()):
            if any(matches(pattern, subject) for pattern in consumer.patterns):
                self._hear(consumer, kept.seq)
        republish = stream.config.get("republish")
        if republish and matches(republish["src"], subject):
            to = republish["dest"].replace("{{wildcard(1)}}", subject.rsplit(".", 1)[1])
            self._route(to, data, headers, "")

    def _expire(self, stream: Stream, kept: Kept) -> None:
        if stream.newest.get(kept.subject) is kept:
            self._remove(stream, kept)
            self.log("server", "expired", kept.subject, "", b"")
            if stream.config.get("subject_delete_marker_ttl") and "Nats-Marker-Reason" not in kept.headers:
                marker = {"Nats-Marker-Reason": "MaxAge", "Nats-TTL": f"{int(MARKER_TTL_S)}s"}
                self._keep(stream, kept.subject, b"", marker, None)
        self.flush()

    def _remove(self, stream: Stream, kept: Kept) -> None:
        del stream.messages[kept.seq]
        if stream.newest.get(kept.subject) is kept:
            del stream.newest[kept.subject]

    # --- the API -----------------------------------------------------------------------------------------------------

    def _api(self, what: str, payload: bytes, reply: str) -> tuple[bytes, Headers] | None:
        if what.startswith("DIRECT.GET."):
            name, _, subject = what.removeprefix("DIRECT.GET.").partition(".")
            return self._direct_get(self.streams[name], subject, payload)
        if what.startswith("CONSUMER.CREATE."):
            return self._create_consumer(self.streams[what.split(".")[2]], msgspec.json.decode(payload)["config"])
        if what.startswith("CONSUMER.DELETE."):
            _, _, name, consumer = what.split(".")
            self.streams[name].consumers.pop(consumer, None)
            return b'{"success":true}', {}
        if what.startswith("CONSUMER.MSG.NEXT."):
            _, _, _, name, consumer = what.split(".")
            return self._next(self.streams[name].consumers.get(consumer), msgspec.json.decode(payload), reply)
        if what.startswith("STREAM.MSG.GET."):
            return self._get(self.streams[what.split(".")[3]], msgspec.json.decode(payload)["last_by_subj"])
        if what.startswith("STREAM.INFO."):
            return self._info(self.streams[what.split(".")[2]])
        assert what.startswith("STREAM.PURGE."), what
        return self._purge(self.streams[what.split(".")[2]], msgspec.json.decode(payload))

    def _direct_get(self, stream: Stream, subject: str, payload: bytes) -> tuple[bytes, Headers]:
        if not subject:
            pattern = msgspec.json.decode(payload)["last_by_subj"]
            found = [kept for key, kept in stream.newest.items() if matches(pattern, key)]
            kept = max(found, key=lambda kept: kept.seq, default=None)
        else:
            kept = stream.newest.get(subject)
            before, since = stream.replaced.get(subject, (None, -1e9))
            if self._loop.now - since < BEHIND_S_MAX and self._rng.random() < self.weather.behind:
                kept = before  # From a replica that has not heard of the newest yet.
        if kept is None:
            return b"", {"Status": "404", "Description": "Message Not Found"}
        own = {"Nats-Stream": stream.name, "Nats-Subject": kept.subject, "Nats-Sequence": str(kept.seq)}
        return kept.data, {**kept.headers, **own}

    def _get(self, stream: Stream, pattern: str) -> tuple[bytes, Headers]:
        """From the stream's leader, which knows the newest."""
        found = [kept for key, kept in stream.newest.items() if matches(pattern, key)]
        if not found:
            return b'{"error":{"code":404,"err_code":10037,"description":"no message found"}}', {}
        kept = max(found, key=lambda kept: kept.seq)
        message = {"subject": kept.subject, "seq": kept.seq, "data": kept.data}
        if kept.headers:
            lines = "".join(f"{name}: {value}\r\n" for name, value in kept.headers.items())
            message["hdrs"] = f"NATS/1.0\r\n{lines}\r\n".encode()
        return msgspec.json.encode({"message": message}), {}

    def _create_consumer(self, stream: Stream, config: dict[str, Any]) -> tuple[bytes, Headers]:
        patterns: list[str] = config["filter_subjects"]
        if config["deliver_policy"] == "last_per_subject":
            present = sorted(kept.seq for kept in stream.newest.values())
        else:
            start = config.get("opt_start_seq", 1) if config["deliver_policy"] != "new" else stream.last_seq + 1
            present = [seq for seq in stream.messages if seq >= start]
        queue = [seq for seq in present if any(matches(p, stream.messages[seq].subject) for p in patterns)]
        self._names += 1
        consumer = Consumer(stream, f"c{self._names}", patterns, queue, idle_since=self._loop.now)
        stream.consumers[consumer.name] = consumer
        if self._rng.random() < self.weather.behind:
            consumer.behind_s = self._rng.uniform(0.0, BEHIND_S_MAX)
            late = [seq for seq in queue if stream.messages[seq].at > self._loop.now - consumer.behind_s]
            consumer.queue = queue = [seq for seq in queue if seq not in late]
            for seq in late:
                self._hear(consumer, seq)
        self._loop.call_later(INACTIVE_S, self._look_after, consumer, context=self._context)
        return msgspec.json.encode({"name": consumer.name, "num_pending": len(queue)}), {}

    def _next(self, consumer: Consumer | None, ask: dict[str, Any], reply: str) -> tuple[bytes, Headers] | None:
        if consumer is None:
            return b"", {"Status": "503"}
        first = not consumer.inbox
        consumer.inbox = reply
        consumer.left += ask["batch"]
        consumer.heard_at = self._loop.now
        self._pump(consumer)
        if first:
            self._loop.call_later(ask["idle_heartbeat"] / 1e9, self._beat, consumer, context=self._context)
        return None

    def _look_after(self, consumer: Consumer) -> None:
        """A consumer that nobody listens to ends."""
        if consumer.stream.consumers.get(consumer.name) is not consumer:
            return
        if not self._exact.get(consumer.inbox) and self._loop.now - consumer.idle_since >= INACTIVE_S:
            del consumer.stream.consumers[consumer.name]
            return
        self._loop.call_later(INACTIVE_S, self._look_after, consumer, context=self._context)

    def _pump(self, consumer: Consumer) -> None:
        listeners = self._exact.get(consumer.inbox)
        if not listeners:
            return
        consumer.idle_since = self._loop.now
        while consumer.queue and consumer.left > 0:
            kept = consumer.stream.messages.get(consumer.queue.pop(0))
            if kept is None:
                continue
            consumer.left -= 1
            consumer.sent += 1
            consumer.last_seq = kept.seq
            consumer.heard_at = self._loop.now
            if self._rng.random() < self.weather.gaps:
                self.log(listeners[0].connection.process.name, "gap", kept.subject, "", b"")
                continue
            left = sum(seq in consumer.stream.messages for seq in consumer.queue) if consumer.queue else 0
            reply = f"$JS.ACK.{consumer.stream.name}.{consumer.name}.1.{kept.seq}.{consumer.sent}.0.{left}"
            listeners[0].connection.send(_message(listeners[0].sid, kept.subject, kept.data, kept.headers, reply))

    def _hear(self, consumer: Consumer, seq: int) -> None:
        """The consumer's server learns of a message."""

        def heard() -> None:
            consumer.queue.append(seq)
            self._pump(consumer)
            self.flush()

        if consumer.behind_s:
            self._loop.call_later(consumer.behind_s, heard, context=self._context)
        else:
            consumer.queue.append(seq)
            self._pump(consumer)

    def _beat(self, consumer: Consumer) -> None:
        if consumer.stream.consumers.get(consumer.name) is not consumer:
            return
        listeners = self._exact.get(consumer.inbox)
        if listeners and self._loop.now - consumer.heard_at >= 1.0:
            consumer.idle_since = consumer.heard_at = self._loop.now
            beat = {
                "Status": "100",
                "Nats-Last-Consumer": str(consumer.sent),
                "Nats-Last-Stream": str(consumer.last_seq),
            }
            listeners[0].connection.send(_message(listeners[0].sid, consumer.inbox, b"", beat, ""))
            self.flush()
        when = max(consumer.heard_at, self._loop.now - 0.5) + 1.0
        self._loop.call_at(when, self._beat, consumer, context=self._context)

    def _info(self, stream: Stream) -> tuple[bytes, Headers]:
        held = int(0.9 * stream.config["max_bytes"]) if stream.crowded else 0
        state = {"bytes": held, "messages": len(stream.messages), "last_seq": stream.last_seq}
        created = "2027-01-15T08:00:00.000000000Z"
        return msgspec.json.encode({"created": created, "config": stream.config, "state": state}), {}

    def _purge(self, stream: Stream, what: dict[str, Any]) -> tuple[bytes, Headers]:
        for kept in list(stream.messages.values()):
            if kept.seq < what.get("seq", 1 << 62) and matches(what.get("filter", ">"), kept.subject):
                self._remove(stream, kept)
        return b'{"success":true}', {}


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def _headers(raw: bytes) -> Headers:
    pairs = (line.partition(": ") for line in raw.decode().split("\r\n")[1:] if line)
    return {name.rstrip(":"): value for name, _, value in pairs}


def _message(sid: str, subject: str, data: bytes, headers: Headers, reply: str) -> bytes:
    to = f"{subject} {sid} {reply} " if reply else f"{subject} {sid} "
    if not headers:
        return f"MSG {to}{len(data)}\r\n".encode() + data + b"\r\n"
    status = headers.get("Status", "")
    first = f"NATS/1.0 {status} {headers.get('Description', '')}".rstrip() if status else "NATS/1.0"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if name not in ("Status", "Description"))
    head = f"{first}\r\n{lines}\r\n".encode()
    return f"HMSG {to}{len(head)} {len(head) + len(data)}\r\n".encode() + head + data + b"\r\n"
