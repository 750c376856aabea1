"""Answers that come in pieces: each is sent when it is made, and nothing is made for a caller that is gone.

Method: an edge on a real socket, and callers that read, leave, or only stop reading.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, MutableMapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from computemesh.config import ServiceConfig
from computemesh.contracts import services
from computemesh.edge import Edge, Extra, application
from computemesh.edge.http import Doors
from computemesh.edge.streams import Stream, while_here
from computemesh.testing import until

ASK: Final = b"GET /it HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@contextlib.asynccontextmanager
async def served(
    handler: Callable[[Request], Any],
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A caller that has asked an edge for what *handler* answers."""
    config = ServiceConfig()
    edge = Edge(config)
    doors = Doors(card=services.NODE_AGENT, health=dict[str, Any], unready=lambda: "")
    app = application(config, doors, [], [Extra(method="GET", path="/it", handler=handler)])
    serving = asyncio.create_task(edge.serve(app))
    port = int(edge.url.rpartition(":")[2])
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
            break
        except ConnectionError:
            await asyncio.sleep(0.01)
    try:
        writer.write(ASK)
        yield reader, writer
    finally:
        writer.close()
        serving.cancel()
        await asyncio.wait({serving})
        edge.stop()


class Maker:
    """Makes pieces, and knows whether somebody still wants them."""

    def __init__(self) -> None:
        self.made = 0
        self.ended = False
        self.go_on = asyncio.Event()

    async def pieces(self, size: int = 10) -> AsyncGenerator[str, None]:
        try:
            while True:
                self.made += 1
                yield f"{self.made}".rjust(size)
                await self.go_on.wait()
        finally:
            self.ended = True


async def test_each_piece_is_sent_before_the_next_one_is_made() -> None:
    maker = Maker()

    async def handler(_: Request) -> Response:
        return Stream(maker.pieces(), media_type="text/event-stream")

    async with served(handler) as (reader, _):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-type: text/event-stream" in head
        assert await reader.readexactly(3 + 10 + 2) == b"a\r\n         1\r\n"
        assert maker.made == 1


async def test_nothing_is_made_for_a_caller_that_has_gone() -> None:
    """Also while the next piece is not there yet."""
    maker = Maker()

    async def handler(_: Request) -> Response:
        return Stream(maker.pieces(), media_type="text/plain")

    async with served(handler) as (reader, writer):
        await reader.readuntil(b"1\r\n")
        writer.close()
        await until(lambda: maker.ended, what="the stream to be closed", within_s=5)
        assert maker.made == 1


async def test_a_caller_that_only_stops_reading_is_given_up() -> None:
    maker = Maker()
    maker.go_on.set()

    async def handler(_: Request) -> Response:
        return Stream(maker.pieces(64 * 1024), media_type="text/plain", stalled_s=0.2)

    async with served(handler) as (reader, _):
        await reader.readexactly(10)
        await until(lambda: maker.ended, what="the stream to be closed")


async def test_a_stream_that_is_whole_ends_as_http_says() -> None:
    async def pieces() -> AsyncGenerator[str, None]:
        yield "a"
        yield "b"

    async def handler(_: Request) -> Response:
        return Stream(pieces(), media_type="text/plain", headers={"X-More": "yes"})

    async with served(handler) as (reader, _):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"x-more: yes" in head
        assert await reader.readexactly(17) == b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"


async def test_what_makes_the_pieces_is_closed_even_if_none_was_asked_for() -> None:
    closed = asyncio.Event()
    maker = Maker()

    async def close() -> None:
        closed.set()

    async def gone() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: MutableMapping[str, Any]) -> None:
        await asyncio.Event().wait()

    await Stream(maker.pieces(), media_type="text/plain", close=close)({"type": "http"}, gone, send)
    assert (maker.made, closed.is_set()) == (0, True)


async def test_work_for_a_caller_that_has_gone_is_cancelled() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    async def handler(request: Request) -> Response:
        await request.body()
        return PlainTextResponse(await while_here(request.receive, work()))

    async with served(handler) as (_, writer):
        await asyncio.wait_for(begun.wait(), 30)
        writer.close()
        await asyncio.wait_for(ended.wait(), 5)


async def test_work_for_a_caller_that_waits_is_answered() -> None:
    async def work() -> str:
        await asyncio.sleep(0.01)
        return "done"

    async def handler(request: Request) -> Response:
        await request.body()
        return PlainTextResponse(await while_here(request.receive, work()))

    async with served(handler) as (reader, _):
        assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
