"""Clients that ask as fast as they are answered, over HTTP or NATS, on bare sockets.

A library would cost more than what is measured. One process holds all connections; each has one request under way.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final, Literal, cast
from urllib.parse import urlsplit

import msgspec
import uvloop

from computemesh.bus import Where
from computemesh.contracts.base import Role

WARM_S: Final = 0.2
"""Time at the beginning that does not count."""

GIVE_UP_S: Final = 60.0
"""How long is waited for the answers that are under way at the end."""

_HEADER_END: Final = b"\r\n\r\n"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask, and how."""

    kind: Literal["http", "nats"]
    address: str
    """``http://host:port`` or ``nats://user:password@host:port``."""
    target: str
    """The path that is posted to, or the subject."""
    bodies: list[str]
    """Asked in turn."""
    connections: int = 1
    seconds: float = 2.0
    paged: bool = False
    """Asked on with ``next`` until all pages came; they count as one request."""
    once: bool = False
    """Each body once, and no longer."""


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    requests: int
    per_s: float
    p50_ms: float
    p99_ms: float
    answer_bytes: int
    """Of the last request, all its pages together."""
    client_cpu: float
    """Cores the client used: near 1, it is the client that was measured."""


class _Next(msgspec.Struct):
    next: str = ""


_decode_next: Final = msgspec.json.Decoder(_Next).decode


class Connection(asyncio.Protocol):
    """One connection with one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._wanted = 0
        """Bytes without which looking into the buffer is in vain."""
        self._answer: asyncio.Future[bytes] | None = None

    async def ask(self, target: str, body: bytes) -> bytes:
        """The body of the answer.

        Raises:
            ValueError: it is an error.
            ConnectionError: the other side hung up.
        """
        return await self._send(self._request(target, body))

    async def _send(self, request: bytes) -> bytes:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the other side hung up"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= max(1, self._wanted) and self._step():
            pass

    def _request(self, target: str, body: bytes) -> bytes:
        raise NotImplementedError

    def _step(self) -> bool:
        """Takes one piece from the buffer; False when it is not there yet."""
        raise NotImplementedError

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._wanted = 0
        return taken

    def _answered(self, answer: bytes | Exception) -> None:
        if self._answer is not None and not self._answer.done():
            if isinstance(answer, Exception):
                self._answer.set_exception(answer)
            else:
                self._answer.set_result(answer)


class HttpConnection(Connection):
    """Posts, on a connection that is kept."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self._host = host

    async def get(self, target: str) -> bytes:
        """As :meth:`ask`, without a body."""
        return await self._send(f"GET {target} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())

    def _request(self, target: str, body: bytes) -> bytes:
        return (
            f"POST {target} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    def _step(self) -> bool:
        end = self._buffer.find(_HEADER_END)
        if end < 0:
            return False
        head = bytes(self._buffer[:end]).lower()
        _, found, length = head.partition(b"content-length:")
        assert found, head
        whole = end + len(_HEADER_END) + int(length.partition(b"\r\n")[0])
        if len(self._buffer) < whole:
            self._wanted = whole
            return False
        body = self._take(whole)[end + len(_HEADER_END) :]
        ok = head.startswith(b"http/1.1 2")
        self._answered(body if ok else ValueError(f"{head.splitlines()[0].decode()}: {body[:300].decode()}"))
        return True


class NatsConnection(Connection):
    """Requests, with an inbox of its own. Waits for nothing but its answer."""

    def __init__(self, inbox: str) -> None:
        super().__init__()
        self._inbox = inbox

    def begin(self, user: str, password: str) -> None:
        """Says who it is, and listens to its inbox."""
        assert self._transport is not None
        options = {
            "verbose": False,
            "pedantic": False,
            "user": user,
            "pass": password,
            "lang": "bench",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
        }
        self._transport.write(b"CONNECT " + msgspec.json.encode(options) + f"\r\nSUB {self._inbox} 1\r\n".encode())

    def _request(self, target: str, body: bytes) -> bytes:
        return f"PUB {target} {self._inbox} {len(body)}\r\n".encode() + body + b"\r\n"

    def _step(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        words = bytes(self._buffer[:end]).split()
        if words[0] in (b"MSG", b"HMSG"):
            whole = end + 2 + int(words[-1]) + 2
            if len(self._buffer) < whole:
                self._wanted = whole
                return False
            answer = self._take(whole)[end + 2 : -2]
            headers = int(words[-2]) if words[0] == b"HMSG" else 0
            refused = b"Nats-Service-Error" in answer[:headers] or b" 503" in answer[:headers]
            self._answered(ValueError(answer[:300].decode()) if refused else answer[headers:])
            return True
        line = self._take(end + 2)
        if words[0] == b"PING":
            assert self._transport is not None
            self._transport.write(b"PONG\r\n")
        elif words[0] == b"-ERR":
            self._answered(ValueError(line.decode()))
        return True


async def connect_http(address: str) -> HttpConnection:
    """A connection to an HTTP server, ready to ask."""
    parts = urlsplit(address)
    assert parts.hostname
    assert parts.port
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(lambda: HttpConnection(parts.netloc), parts.hostname, parts.port))[1]


async def connect_nats(address: str) -> NatsConnection:
    """A connection to a NATS server, ready to ask."""
    parts = urlsplit(address)
    assert parts.hostname
    assert parts.port
    prefix = Where(url=address, role=Role.CLIENT, name="").inbox_prefix
    inbox = f"{prefix}.bench{time.perf_counter_ns()}"
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: NatsConnection(inbox), parts.hostname, parts.port)
    connection.begin(parts.username or "", parts.password or "")
    return connection


async def run(load: Load) -> Took:
    """Asks with all connections at once for as long as was said."""
    connect = connect_http if load.kind == "http" else connect_nats
    connections: list[Connection] = [await connect(load.address) for _ in range(load.connections)]
    bodies = [body.encode() for body in load.bodies]
    times_s: list[float] = []
    turn = answer_bytes = 0
    began_s = time.perf_counter() + (0.0 if load.once else WARM_S)
    until_s = began_s + load.seconds
    cpu_s = time.process_time()

    async def whole(connection: Connection, body: bytes) -> int:
        size = 0
        ask = body
        while True:
            answer = await connection.ask(load.target, ask)
            size += len(answer)
            # What comes before is not read: with large answers, reading would be all that is measured.
            last = answer.rfind(b'"next":') if load.paged else -1
            if last < 0 or not (after := _decode_next(b"{" + answer[last:]).next):
                return size
            fields = body[1:-1]
            ask = b'{%b%b"after":%b}' % (fields, b"," if fields else b"", msgspec.json.encode(after))

    async def go_on(connection: Connection) -> None:
        nonlocal turn, answer_bytes
        while turn < len(bodies) if load.once else time.perf_counter() < until_s or len(times_s) < load.connections:
            now_s = time.perf_counter()
            body = bodies[turn % len(bodies)]
            turn += 1
            answer_bytes = await whole(connection, body)
            if now_s >= began_s:
                times_s.append(time.perf_counter() - now_s)

    await asyncio.gather(*map(go_on, connections))
    took_s = time.perf_counter() - began_s
    cpu_s = time.process_time() - cpu_s
    for connection in connections:
        connection.close()
    times_s.sort()
    return Took(
        requests=len(times_s),
        per_s=len(times_s) / took_s,
        p50_ms=times_s[len(times_s) // 2] * 1e3 if times_s else 0.0,
        p99_ms=times_s[int(len(times_s) * 0.99)] * 1e3 if times_s else 0.0,
        answer_bytes=answer_bytes,
        client_cpu=cpu_s / took_s,
    )


async def measure(load: Load) -> Took:
    """As :func:`run`, in a process of its own.

    Raises:
        RuntimeError: it failed, and what it said; or an answer did not come.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(load.seconds + GIVE_UP_S):
            answer, trouble = await process.communicate(msgspec.json.encode(load))
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RuntimeError(f"{load.target}: no answer in {GIVE_UP_S:g} s") from None
    if process.returncode:
        raise RuntimeError(f"{load.target}: {trouble.decode().splitlines()[-1]}")
    return msgspec.json.decode(answer, type=Took)


if __name__ == "__main__":
    took = uvloop.run(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Load)))
    sys.stdout.buffer.write(msgspec.json.encode(took))
