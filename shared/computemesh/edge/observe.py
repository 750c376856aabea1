"""What every HTTP request leaves behind: a trace context and a measurement."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from computemesh import trace

# Named as OpenTelemetry's semantic conventions name it.
DURATION: Final = Histogram(
    "http_server_request_duration_seconds",
    "Time from a request's headers to the end of its answer.",
    ["http_request_method", "http_route", "http_response_status_code"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
ROUTE: Final = "computemesh.route"
"""Where a request's scope holds the template of its route, so that ids in paths do not make a series each."""

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Observed:
    """Puts each request into the trace its caller named, or a new one, and measures it.

    The answer names the trace in ``traceresponse``, as the next level of the standard has it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sender = trace.parse(dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1"))
        here = sender.child() if sender else trace.begin()
        trace.enter(here)
        started_s, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"traceresponse", here.header.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
            DURATION.labels(method, scope.get(ROUTE, ""), str(status)).observe(time.perf_counter() - started_s)
