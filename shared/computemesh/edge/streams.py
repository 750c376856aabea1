"""Answers that come in pieces, and callers that go away before they have them all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from computemesh.tasks import end_all

T = TypeVar("T")

STALLED_S: Final = 60.0
"""A caller that takes nothing for so long has lost interest: its stream is closed, and what makes it is free."""

STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""What keeps those in between from collecting the pieces of a stream."""


async def while_here(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What *work* gives, for a caller that waits for it. The body of the request must have been read.

    Raises:
        ClientDisconnect: the caller went away first; the work was cancelled, and has ended.
    """
    async with _caller(receive) as gone:
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            await end_all([working])
    # It may have ended well in the moment in which it was cancelled, and then holds something.
    if not working.cancelled() and working.exception() is None:
        return working.result()
    raise ClientDisconnect


class Stream(Response):
    """An answer whose pieces are sent as they come.

    Args:
        pieces: closed at the end, whoever ended it.
        close: called after that, also when not one piece was asked for.
        farewell: the last piece, when the service ends before the stream does.
        stalled_s: how long the caller may take for a piece, once the buffers between are full.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        close: Callable[[], Awaitable[None]] | None = None,
        farewell: str = "",
        stalled_s: float = STALLED_S,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self._pieces = pieces
        self._close = close
        self._farewell = farewell
        self._stalled_s = stalled_s
        self._begun = False
        self.init_headers({**STREAM_HEADERS, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._pieces):
                with contextlib.suppress(ClientDisconnect):
                    await while_here(receive, self._send_all(send))
        except asyncio.CancelledError:
            if self._begun:
                await self._send(send, self._farewell)
                await self._send(send, "", more=False)
            raise
        finally:
            if self._close is not None:
                await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._begun = True
        async for piece in self._pieces:
            await self._send(send, piece)
        await self._send(send, "", more=False)

    async def _send(self, send: Send, piece: str, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._stalled_s):
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": more})
        except TimeoutError:
            raise ClientDisconnect from None


@contextlib.asynccontextmanager
async def _caller(receive: Receive) -> AsyncGenerator[asyncio.Task[None]]:
    """A task that is done once the caller is gone."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(listen())
    try:
        yield gone
    finally:
        await end_all([gone])
