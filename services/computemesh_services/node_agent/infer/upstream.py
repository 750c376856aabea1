"""A request to an engine beside the agent, and its answer as it streams. The bus and the HTTP edge both end here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, Protocol

import aiohttp
from prometheus_client import Counter, Gauge, Histogram

from computemesh import trace
from computemesh.answers import AnswerFailed
from computemesh.contracts.base import Refused, encode
from computemesh.contracts.infer import InferAsk
from computemesh_services.node_agent.engines.place import EngineError, Place
from computemesh_services.node_agent.infer.pieces import Cutter, EventCutter, TextCutter, TooLong

CONNECT_S: Final = 10.0
"""How long an engine that serves may take to accept a connection: it is on this machine."""

READ_BYTES: Final = 32 * 1024
"""Of an answer that nobody takes, about twice as much is read; then the engine has to wait."""

SOCKET_BYTES: Final = 128 * 1024
"""As much lies in the kernel meanwhile, and as much again where the engine writes."""

OPEN = Gauge("computemesh_agent_answers_open", "Answers of engines that are being waited for or given.")
ENDED = Counter(
    "computemesh_agent_answers_total", "Requests to engines that ended, by what became of them.", ["outcome"]
)
FIRST = Histogram(
    "computemesh_agent_first_text_seconds",
    "Time from a request's arrival to the first text of its answer.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)


class Engines(Protocol):
    """What is needed of the pool of engines."""

    def admit(self, model: str, device: str = "") -> AbstractAsyncContextManager[Place]:
        """A place on an engine, for as long as the block lasts.

        Raises:
            EngineError: there is none.
        """
        ...


class EngineAnswer:
    """The answer of an engine beside the agent. Implements :class:`computemesh.answers.Answer`."""

    def __init__(self, response: aiohttp.ClientResponse, device: str, held: AsyncExitStack, began_s: float) -> None:
        self.status: Final = response.status
        self.content_type: Final = response.headers.get("Content-Type", "application/octet-stream")
        self.device: Final = device
        self._response = response
        self._held = held
        """The place on the engine."""
        self._began_s = began_s
        self._cutter: Cutter = EventCutter() if response.content_type == "text/event-stream" else TextCutter()
        self._pieces: deque[str] = deque()
        self._begun = False
        self._outcome = ""
        self._closed = False

    @property
    def at_end(self) -> bool:
        """Nothing follows what was read."""
        return bool(self._outcome) and not self._pieces

    def __aiter__(self) -> EngineAnswer:
        return self

    async def __anext__(self) -> str:
        while not self._pieces:
            if self._outcome:
                raise StopAsyncIteration
            await self._read()
        return self._pieces.popleft()

    async def _read(self) -> None:
        content = self._response.content
        try:
            if data := await content.readany():
                self._pieces.extend(self._cutter.feed(data))
            if content.at_eof():
                self._pieces.extend(self._cutter.end())
                self._outcome = "complete"
        except TooLong as error:
            self._outcome = "failed"
            reason = f"the engine on {self.device} sent what cannot be passed on: {error}"
            raise AnswerFailed(Refused(code="engine_failed", reason=reason, status=502)) from None
        except (aiohttp.ClientError, OSError) as error:
            self._outcome = "failed"
            raise AnswerFailed(engine_lost(self.device, error)) from error
        if self._pieces and not self._begun:
            self._begun = True
            FIRST.observe(asyncio.get_running_loop().time() - self._began_s)

    async def aclose(self) -> None:
        # Else leaving it would wait until the engine has read the request to its end.
        self._response.close()
        if not self._closed:
            self._closed = True
            OPEN.dec()
            ENDED.labels(self._outcome or "cancelled").inc()
        await self._held.aclose()


class Inference:
    """Passes requests to engines.

    Args:
        engines: the pool.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._http: aiohttp.ClientSession | None = None

    async def stop(self) -> None:
        """Ends every answer."""
        if self._http is not None:
            await self._http.close()

    async def open(self, ask: InferAsk) -> EngineAnswer | Refused:
        """Asks an engine of this machine, and waits until it begins to answer. Cancelled, it leaves its place.

        Returns:
            The answer, or a refusal with a code of `contracts.infer.ASK`. Of a request that streams the answer tells
            the usage at its end, whether that was asked for or not.
        """
        if self._http is None:
            self._http = _new_session()
        began_s = asyncio.get_running_loop().time()
        outcome = "cancelled"
        OPEN.inc()
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    place = await stack.enter_async_context(self._engines.admit(ask.model, ask.device))
                    asking = self._http.post(
                        place.base_url + ask.path, data=encode(engine_body(ask, place.model)), headers=_headers()
                    )
                    try:
                        response = await stack.enter_async_context(asking)
                    except (aiohttp.ClientError, OSError) as error:
                        outcome = "refused"
                        return engine_lost(place.device, error)
                except EngineError as error:
                    outcome = "refused"
                    return _refused(error)
                outcome = ""
                return EngineAnswer(response, place.device, stack.pop_all(), began_s)
        finally:
            if outcome:
                OPEN.dec()
                ENDED.labels(outcome).inc()


def _new_session() -> aiohttp.ClientSession:
    # Each request has a connection of its own: llama.cpp closes one between two requests when it likes, and what was
    # asked on it then is lost.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_socket),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BYTES,
    )


def _socket(address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(*address[:3])
    # By itself the kernel would take in megabytes of an answer that nobody takes.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    return made


def engine_body(ask: InferAsk, model: str) -> dict[str, Any]:
    """What an engine is asked: with its own name of the model, and always for the usage."""
    body = {**ask.body, "model": model}
    options: Any = body.get("stream_options") or {}
    if body.get("stream") is True and ask.path != "/v1/embeddings" and isinstance(options, dict):
        body["stream_options"] = {**options, "include_usage": True}
    return body


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if here := trace.to_send():
        headers[trace.HEADER] = here
    return headers


def _refused(error: EngineError) -> Refused:
    return Refused(
        code=error.code,
        reason=error.reason,
        status=error.status,
        retry="elsewhere",
        retry_after_s=error.retry_after_s,
    )


def engine_lost(device: str, error: Exception) -> Refused:
    """The engine ended, or closed the connection, before its answer was whole."""
    match error:
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | ConnectionResetError():
            why = "it ended before its answer was whole"  # aiohttp's own words are about chunks and encodings.
        case _:
            why = str(error) or type(error).__name__
    reason = f"the engine on {device} is lost: {why}"
    return Refused(code="engine_lost", reason=reason, status=503, retry="elsewhere")
