"""HTTP as uvicorn speaks it, to callers who send what they began to send."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_S: Final = 30.0
"""How long a request may take to come. A body that is still coming then has as long again, and so on."""

COMING_BYTES: Final = 16 * 1024
"""A body of which less came in that time does not come."""

_TOO_SLOW: Final = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_WORDS: Final = b"the request did not come to its end in time\n"


class Protocol(HttpToolsProtocol):
    """Ends a connection on which half a request stays. uvicorn bounds only the time between two requests."""

    _begun = False
    """Whether anything came at all."""
    _coming = True
    """Whether a request is yet to come to its end."""
    _in_body = False
    _received = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._begun = self._coming = True
        self._received += len(data)
        super().data_received(data)
        if not self._coming:
            self._unwatch()
        elif self._timer is None and not self.transport.is_closing():
            self._watch()

    def on_message_begin(self) -> None:
        self._coming, self._in_body = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._coming = self._in_body = False
        super().on_message_complete()

    def _watch(self) -> None:
        self._received = 0
        self._timer = self.loop.call_later(REQUEST_S, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self.flow.read_paused or (self._in_body and self._received >= COMING_BYTES):
            self._watch()
            return
        answering = self.cycle and self.cycle.response_started and not self.cycle.response_complete
        if self._begun and not answering:
            self.transport.write(_TOO_SLOW % (len(_WORDS), _WORDS))
        self.transport.close()
