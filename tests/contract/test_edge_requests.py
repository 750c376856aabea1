"""Half a request does not keep a connection of an HTTP edge.

Method: an edge on the event loop that services run on, with a bound of less than a second; raw bytes by a socket.
Mutations these tests kill: a bound on the time between requests alone, one that is not renewed while a body comes, one
that goes on while the answer is made.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import pytest
import uvloop
from starlette.requests import Request
from starlette.responses import Response

from computemesh.config import ServiceConfig
from computemesh.contracts.base import Role, ServiceCard
from computemesh.edge import Edge, Extra, application, protocol
from computemesh.edge.http import Doors

CARD: Final = ServiceCard(name="test", about="A test.", role=Role.SERVICES, port=0)


@asynccontextmanager
async def listening() -> AsyncGenerator[tuple[str, int]]:
    """Host and port of an edge that counts the bytes that are sent to it, and answers after more than half a second."""

    async def count(request: Request) -> Response:
        size = len(await request.body())
        await asyncio.sleep(0.7)
        return Response(str(size))

    config = ServiceConfig(http_port=0)
    edge = Edge(config)
    doors = Doors(card=CARD, health=lambda: {"problem": ""}, unready=lambda: "")
    app = application(config, doors, [], [Extra(method="POST", path="/count", handler=count)])
    serving = asyncio.create_task(edge.serve(app))
    parts = urlsplit(edge.url)
    try:
        yield str(parts.hostname), int(parts.port or 0)
    finally:
        edge.stop()
        await serving


async def said_to(*pieces: bytes, pause_s: float = 0.0) -> bytes:
    """All that the edge says, until it closes the connection, to one who sends these pieces."""
    async with listening() as (host, port), asyncio.timeout(30):
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause_s)
        try:
            return await reader.read()
        finally:
            writer.close()


LINES: Final = b"POST /count HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n"
HEAD: Final = LINES + b"Content-Length: 200000\r\n\r\n"
GET: Final = b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"", []),
        (b"\r\n", [b"408"]),
        (b"POST /cou", [b"408"]),
        (LINES, [b"408"]),
        (HEAD, [b"408"]),
        (HEAD + b"x" * 100, [b"408"]),
        (GET + LINES, [b"200", b"408"]),
    ],
    ids=["nothing", "a blank line", "half a line", "half a head", "no body", "half a body", "half a second request"],
)
def test_half_a_request_is_not_kept_open(monkeypatch: pytest.MonkeyPatch, sent: bytes, statuses: list[bytes]) -> None:
    monkeypatch.setattr(protocol, "REQUEST_S", 0.4)
    said = uvloop.run(said_to(sent))
    assert re.findall(rb"HTTP/1.1 (\d+) ", said) == statuses


def test_a_body_that_keeps_coming_and_an_answer_that_takes_long_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded is a request that does not come."""
    monkeypatch.setattr(protocol, "REQUEST_S", 0.4)
    said = uvloop.run(said_to(HEAD, *[b"x" * 20_000] * 10, pause_s=0.2))
    assert re.findall(rb"HTTP/1.1 (\d+) ", said) == [b"200"]
    assert said.endswith(b"200000")
