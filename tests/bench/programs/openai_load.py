"""Asks an OpenAI-compatible server for streamed chat answers, and tells when each token came.

It must not be what limits the servers it measures: while answers come it only notes when bytes came, and reads them
once all are there. A plan is a line of JSON on standard input, its result a line on standard output. Times are those of
``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask, by how many at once."""

    url: str
    """Of the server, without a path."""
    model: str
    workers: int
    """Each has a connection of its own, and one request at a time on it."""
    each: int = 1
    """Requests of each worker, at least."""
    for_s: float = 0.0
    """Workers go on until so much time has passed; what they have begun then they end."""
    spread_s: float = 0.0
    """The workers begin one after the other, over so much time."""
    tokens: int
    """That are asked for, in each answer."""
    prompt: str
    """``{worker}`` and ``{number}`` in it are replaced, so that no two requests of a plan are the same."""
    more: dict[str, Any] = {}
    """Further fields of each request."""
    give_up_s: float = 120.0
    """After so much time without a byte a request has failed."""


class Asked(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One request, and what became of it. Times in seconds."""

    worker: int
    number: int
    """Of the request, among those of its worker."""
    sent: float
    first: float = 0.0
    """When its first text came; 0 if none did."""
    ended: float
    events: int = 0
    """That brought text."""
    tokens: int = 0
    """As the engine counted them."""
    digest: str = ""
    """Of the whole text."""
    node: str = ""
    """The node that answered, if the server tells."""
    error: str = ""
    """Why the answer is not whole."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    asked: list[Asked]
    gap_us: list[float]
    """Between an event with text and the next of the same answer, in microseconds: p50, p90, p99 and the longest. Those
    that came together count, with 0."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_DONE: Final = b"data: [DONE]"
_chunks: Final = msgspec.json.Decoder(_Chunk)


class _Answer(msgspec.Struct, gc=False):
    """An answer as it came."""

    status: int = 0
    node: str = ""
    came: list[float] = []
    """When each of `pieces` did."""
    pieces: list[bytes] = []
    whole: bool = False


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self.alive = False
        self._now = 0.0

    async def ask(self, request: bytes, give_up_s: float) -> _Answer:
        """Returns once the answer has ended, whole or not."""
        answer = self._answer = _Answer()
        self._parser = httptools.HttpResponseParser(self)
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._now = time.monotonic()
        self._transport.write(request)
        while not self._over.done():
            left_s = self._now + give_up_s - time.monotonic()
            if left_s <= 0:
                self.close()
                break
            await asyncio.wait({self._over}, timeout=left_s)
        return answer

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.alive = True

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self._end()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-computemesh-node":
            self._answer.node = value.decode()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._answer.came.append(self._now)
        self._answer.pieces.append(body)

    def on_message_complete(self) -> None:
        self._answer.whole = True
        self.alive = self.alive and self._parser.should_keep_alive()
        self._end()

    def _end(self) -> None:
        if hasattr(self, "_over") and not self._over.done():
            self._over.set_result(None)


def _request(plan: Plan, worker: int, number: int) -> bytes:
    prompt = plan.prompt.replace("{worker}", str(worker)).replace("{number}", str(number))
    body = msgspec.json.encode(
        {
            "model": plan.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": plan.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **plan.more,
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(plan.url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read(answer: _Answer, *, worker: int, number: int, sent: float, ended: float) -> tuple[Asked, list[float]]:
    """What the bytes of an answer were, and when its texts came."""
    body = b"".join(answer.pieces)
    times: list[float] = []
    texts: list[str] = []
    tokens, error, done = 0, "", False
    if answer.whole and answer.status != 200:
        error = f"{answer.status} {body[:300].decode('utf-8', 'replace')}"
    elif not answer.whole:
        error = "broke off"
    for came, event in _events(answer):
        done = done or event == _DONE
        if not event.startswith(b"data: {"):
            continue
        chunk = _chunks.decode(event[6:])
        if bytes(chunk.error):
            error = bytes(chunk.error).decode()[:300]
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if text := "".join(choice.delta.content or "" for choice in chunk.choices):
            texts.append(text)
            times.append(came)
    asked = Asked(
        worker=worker,
        number=number,
        sent=sent,
        first=times[0] if times else 0.0,
        ended=ended,
        events=len(texts),
        tokens=tokens,
        digest=hashlib.sha256("".join(texts).encode()).hexdigest()[:12],
        node=answer.node,
        error=error or ("" if done else "ended without [DONE]"),
    )
    return asked, times


def _events(answer: _Answer) -> Iterator[tuple[float, bytes]]:
    """Server-sent events that are whole, each with the time at which it was."""
    rest = b""
    for came, piece in zip(answer.came, answer.pieces, strict=True):
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield came, event


async def carry_out(plan: Plan, connections: list[_Connection]) -> Result:
    """Does what the plan says. Connections that live are used again."""
    loop = asyncio.get_running_loop()
    where = urlsplit(plan.url)
    host, port = where.hostname or "", where.port or 80
    kept: list[tuple[int, int, float, float, _Answer]] = []
    began = time.monotonic()

    async def connected(worker: int) -> _Connection:
        if not connections[worker].alive:
            connections[worker] = (await loop.create_connection(_Connection, host, port))[1]
        return connections[worker]

    async def work(worker: int) -> None:
        await asyncio.sleep(plan.spread_s * worker / plan.workers)
        number = 0
        while number < plan.each or time.monotonic() - began < plan.for_s:
            request = _request(plan, worker, number)
            sent = time.monotonic()
            used_before = connections[worker].alive
            answer = await (await connected(worker)).ask(request, plan.give_up_s)
            if used_before and not answer.status:
                # The server has just closed a connection that was idle. Every client asks again then.
                answer = await (await connected(worker)).ask(request, plan.give_up_s)
            kept.append((worker, number, sent, time.monotonic(), answer))
            if not answer.whole:
                await asyncio.sleep(0.02)  # A server that hangs up is not asked without a pause.
            number += 1

    connections += [_Connection() for _ in range(plan.workers - len(connections))]
    await asyncio.gather(*(work(worker) for worker in range(plan.workers)))
    asked: list[Asked] = []
    gaps: list[float] = []
    for worker, number, sent, ended, answer in kept:
        row, times = read(answer, worker=worker, number=number, sent=sent, ended=ended)
        asked.append(row)
        gaps += [(after - before) * 1e6 for before, after in pairwise(times)]
    gaps.sort()
    at = [0.5, 0.9, 0.99, 1.0]
    return Result(asked=asked, gap_us=[gaps[min(len(gaps) - 1, int(len(gaps) * q))] for q in at] if gaps else [])


async def main() -> None:
    """Carries out plans until the input ends; connections to the last server stay open."""
    plans = msgspec.json.Decoder(Plan)
    connections: list[_Connection] = []
    url = ""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        plan = plans.decode(line)
        if plan.url != url:
            for connection in connections:
                connection.close()
            connections, url = [], plan.url
        result = await carry_out(plan, connections)
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(main())
