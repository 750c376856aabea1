"""The HTTP edge of a service: its contracts as routes, and the doors that every edge has.

``/healthz`` the process and its loops are alive; ``/readyz`` it can serve now; ``/metrics`` Prometheus;
``/openapi.json`` and, as a page, ``/docs``. Refusals are RFC 9457 problem details.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import socket
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Match, Route, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from computemesh import openai, trace
from computemesh.bus import micro
from computemesh.config import ConfigError, ServiceConfig
from computemesh.contracts.base import (
    MESSAGE_BYTES_MAX,
    AnyBound,
    AnyServed,
    Bound,
    Http,
    Message,
    Refused,
    ServiceCard,
    convert,
    encode,
    refused,
    too_deep,
)
from computemesh.contracts.base import Route as RouteContract
from computemesh.contracts.nanoctrl import NanoRefused
from computemesh.contracts.openai import ApiRefusal
from computemesh.contracts.openapi import document, problem_of
from computemesh.edge import page
from computemesh.edge.observe import ROUTE, Observed
from computemesh.edge.protocol import Protocol

KEY_HEADERS: Final = (b"x-api-key", b"x-rolemesh-node-key")
"""Where a key, or the token, may stand as well; the latter is where RoleMesh's node agents show it."""

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/health", "/ready"})
"""Answered to anybody: they tell nothing but how this process is."""

HOSTS_KNOWN: Final = 256
"""``Host`` headers of which it is remembered whether they mean this machine."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A hand-written route, for an ecosystem whose shapes are not ours, or for bodies too large for a message. It goes
    before a route of a contract."""

    method: str
    path: str
    handler: Callable[[Request], Any]
    accept: str = ""
    """Only for callers whose ``Accept`` header names this media type; others get the next route of that path."""
    route: RouteContract | None = None
    """What is declared of it; left out, it is in no document."""


def declared(route: RouteContract, handler: Callable[[Request], Any]) -> Extra:
    """A hand-written route that is declared among the contracts."""
    return Extra(method=route.http.method, path=route.http.path, handler=handler, route=route)


@dataclass(frozen=True, kw_only=True)
class Doors:
    """What the common doors need to know of the service."""

    card: ServiceCard
    health: Callable[[], Mapping[str, Any]]
    """Facts for ``/healthz``; the key ``problem`` is empty when all is well."""
    unready: Callable[[], str]
    """Why it cannot serve now; empty when it can."""


def application(config: ServiceConfig, doors: Doors, bounds: Sequence[AnyServed], extras: list[Extra]) -> ASGIApp:
    """The ASGI application of one service's edge."""
    routes: list[Route] = [_Extra(extra) for extra in extras]
    routes += [
        _Route(route.path, _handler(bound, route), methods=[route.method])
        for bound in bounds
        if isinstance(bound, Bound)
        for route in bound.contract.http
    ]
    routes += _common(config, doors, bounds, [extra.route for extra in extras if extra.route])
    say = _say([extra.route for extra in extras if extra.route])

    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        answer = say(request.url.path, Refused(code=code, reason=str(error.detail), status=error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    async def defect(request: Request, _error: Exception) -> Response:
        reason = "the service failed on this request; its log says why"
        return say(request.url.path, Refused(code="internal", reason=reason, status=500))

    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: http_error, Exception: defect},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False  # What is not here is not found.
    return Observed(Gate(app, config, say))


class _Route(Route):
    """A route that leaves its template in the scope of the requests it takes, for their measurement."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if not self.param_convertors and scope["path"] != self.path:
            return Match.NONE, {}
        match, found = super().matches(scope)
        return match, {**found, ROUTE: self.path} if found else found


class _Extra(_Route):
    """An extra's route, which matches only those it is for."""

    def __init__(self, extra: Extra) -> None:
        super().__init__(extra.path, extra.handler, methods=[extra.method])
        self._accept = extra.accept

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is Match.FULL and self._accept and self._accept not in Headers(scope=scope).get("accept", ""):
            return Match.NONE, {}
        return match, found


def _common(
    config: ServiceConfig, doors: Doors, bounds: Sequence[AnyServed], declared: list[RouteContract]
) -> list[Route]:
    @cache
    def described() -> dict[str, Any]:
        return document(doors.card, [bound.contract for bound in bounds], declared)

    async def healthz(_: Request) -> Response:
        facts = {"service": doors.card.name, **doors.health()}
        ok = not facts.get("problem")
        return JSONResponse({"status": "ok" if ok else "failing", "ok": ok, **facts}, 200 if ok else 503)

    async def readyz(_: Request) -> Response:
        reason = doors.unready()
        return JSONResponse({"status": "not ready" if reason else "ready", "reason": reason}, 503 if reason else 200)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def schema(_: Request) -> Response:
        return JSONResponse(described())

    async def docs(request: Request) -> Response:
        base_url = f"{request.url.scheme}://{request.url.netloc}"
        text = page.render(described(), base_url, token=token_needed(config))
        return HTMLResponse(text, headers=page.HEADERS)

    async def root(_: Request) -> Response:
        return RedirectResponse("/docs")

    return [
        _Route("/healthz", healthz),
        _Route("/readyz", readyz),
        _Route("/metrics", metrics),
        _Route("/openapi.json", schema),
        _Route("/docs", docs),
        _Route("/", root),
    ]


# --- one request ---------------------------------------------------------------------------------------------


def _handler(bound: AnyBound, route: Http) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        question = await read_question(request, bound.contract.takes)
        answer = question if isinstance(question, Refused) else await micro.run(bound, question)
        if isinstance(answer, Refused):
            return problem(answer)
        return Response(encode(answer), route.status, media_type="application/json")

    return handle


async def read_question(request: Request, kind: type[Any]) -> Any:
    """The request's body, query and path as a message of *kind*, or the refusal."""
    body = await read_body(request)
    return body if isinstance(body, Refused) else question_of(request, body, kind)


def question_of(request: Request, body: bytes, kind: type[Any]) -> Any:
    """A body that was read, and the query and path, as a message of *kind*, or the refusal."""
    fields = parse_object(body)
    if isinstance(fields, Refused):
        return fields
    texts = _texts(request, kind)
    if isinstance(texts, Refused):
        return texts
    return convert({**fields, **texts}, kind)


def media_type(request: Request) -> str:
    """What the body is declared as, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(
    request: Request, texts: Collection[str] = (), *, bytes_max: int = MESSAGE_BYTES_MAX
) -> bytes | Refused:
    """The body, refused when it has more than *bytes_max*, or is declared neither as JSON nor as one of *texts*.

    The content type matters: a browser lets any page post plain text to a port on this machine, but asks
    first before it sends JSON, or YAML.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > bytes_max:
                return Refused(code="too_large", reason=f"the body is larger than {bytes_max} bytes", status=413)
    except ClientDisconnect:
        return Refused(code="bad_message", reason="the caller went away while sending")
    kind, known = media_type(request), ["application/json", *texts]
    if body and kind not in known:
        reason = f"send Content-Type: {' or '.join(known)}, not {kind or 'none'}"
        return Refused(code="bad_content_type", reason=reason, status=415)
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any] | Refused:
    """A JSON object, or the refusal; no bytes are an empty one."""
    if not body:
        return {}
    if too_deep(body):
        return Refused(code="bad_message", reason="nested too deep")
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        return refused(error, data=body)


def _texts(request: Request, kind: type[Any]) -> dict[str, Any] | Refused:
    """Path segments and query parameters, turned from text into what their fields hold."""
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    given: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        base, bracket, key = name.partition("[")
        shape = _shape(types[base]) if base in types else None
        if shape is dict and key.endswith("]"):
            given.setdefault(base, {})[key[:-1]] = text
        elif shape is list and not bracket:
            given.setdefault(base, []).append(text)
        elif shape is None or bracket:
            known = ", ".join(sorted(types)) or "none"
            return Refused(code="bad_message", field=name, reason=f"unknown parameter; known: {known}")
        elif shape is dict:
            return Refused(code="bad_message", field=name, reason=f"name a key: {name}[key]=value")
        elif name in given:
            return Refused(code="bad_message", field=name, reason="given twice")
        else:
            given[name] = text
    found: dict[str, Any] = {}
    for name, text in {**given, **request.path_params}.items():
        try:
            value = msgspec.convert(text, types[name], strict=False)
        except ValueError as error:
            return msgspec.structs.replace(refused(error, types[name]), field=name)
        found[name] = msgspec.to_builtins(value)
    return found


@cache
def _shape(kind: Any) -> type[Any]:
    """Whether a field holds a list, a mapping or one value."""
    info = msgspec.inspect.type_info(kind)
    while isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    if isinstance(info, msgspec.inspect.ListType):
        return list
    return dict if isinstance(info, msgspec.inspect.DictType) else str


def problem(answer: Refused) -> Response:
    """A refusal as RFC 9457 problem details."""
    here = trace.current()
    body = encode(problem_of(answer, here.trace_id if here else ""))
    headers = {"Retry-After": _wait_s(answer)} if answer.retry == "later" else {}
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body, answer.status, headers, media_type="application/problem+json")


def api_error(answer: Refused) -> Response:
    """A refusal in OpenAI's shape."""
    answer = openai.in_its_words(answer)
    # OpenAI's clients ask again by themselves after a 429, a 409 and a 5xx, unless they are told not to.
    headers = {"x-should-retry": "false"} if answer.retry == "never" else {"Retry-After": _wait_s(answer)}
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode(openai.error_of(answer)), answer.status, headers, media_type="application/json")


def nano_error(answer: Refused) -> Response:
    """A refusal in NanoCtrl's shape."""
    said = NanoRefused(message=answer.reason, code=answer.code, field=answer.field)
    headers = {"Retry-After": _wait_s(answer)} if answer.retry == "later" else {}
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode(said), answer.status, headers, media_type="application/json")


def _wait_s(answer: Refused) -> str:
    """What a caller is told to wait, in whole seconds as HTTP has it."""
    return str(max(1, ceil(answer.retry_after_s or 0.0)))


Say = Callable[[str, Refused], Response]
"""What is answered to a call of a path that is refused."""


def _as_problem(_: str, answer: Refused) -> Response:
    return problem(answer)


def _in_openai_shape(path: str, answer: Refused) -> Response:
    return api_error(answer) if path.startswith(openai.ROOT) else problem(answer)


def _say(declared: Sequence[RouteContract]) -> Say:
    """How an edge with these routes refuses calls: each path in the shape of its system."""
    kinds = {route.refused_as for route in declared}
    if NanoRefused not in kinds:
        return _in_openai_shape if ApiRefusal in kinds else _as_problem
    paths = [compile_path(route.http.path)[0] for route in declared if route.refused_as is NanoRefused]

    def say(path: str, answer: Refused) -> Response:
        return nano_error(answer) if any(known.match(path) for known in paths) else problem(answer)

    return say


# --- who may come in -----------------------------------------------------------------------------------------


class Gate:
    """Checks who calls, before anything else sees the request.

    On loopback no token is needed, so the names a browser was told (``Host``, ``Origin``) are checked
    instead: a web page, or a DNS name that was re-pointed at this machine, must not reach the edge. Beyond
    loopback the bearer token decides.
    """

    def __init__(self, app: ASGIApp, config: ServiceConfig, say: Say) -> None:
        self._app = app
        self._say = say
        self._loopback = is_loopback(config.http_host)
        self._entrance = config.entrance()
        self._tokens = [token.encode() for token in self._entrance.tokens]
        self._keys = [
            (start, [key.encode() for key in keys] + self._tokens) for start, keys in self._entrance.keys.items()
        ]
        self._keys.sort(key=lambda each: len(each[0]), reverse=True)
        self._token_needed = token_needed(config)
        guarded = bool(self._tokens) or "/" in self._entrance.keys
        if not self._loopback and not guarded and not config.allow_open:
            raise ConfigError(
                f"COMPUTEMESH_HTTP_HOST={config.http_host} is reachable from other machines: set "
                "COMPUTEMESH_TOKEN, or COMPUTEMESH_ALLOW_OPEN=true inside a closed network"
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (answer := self._refusal(scope)) is not None:
            await self._say(scope["path"], answer)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._loopback and not _names_loopback(host):
            return Refused(code="bad_host", reason=f"this edge is not called {host!r}", status=421)
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refused(code="bad_origin", reason=f"calls from {origin!r} are not allowed", status=403)
        wanted = self._wanted(scope["path"])
        if not wanted:
            return None
        scheme, _, shown = headers.get(b"authorization", "").partition(" ")
        if not scheme and (other := next((name for name in KEY_HEADERS if name in headers), None)):
            scheme, shown = "bearer", headers[other]
        if scheme.lower() != "bearer":
            return Refused(code="no_token", reason=self._entrance.missing, status=401)
        given = shown.strip().encode()
        fits = [hmac.compare_digest(given, key) for key in wanted]  # Each is tried, so that time tells nothing.
        if not any(fits):
            return Refused(code="bad_token", reason=self._entrance.wrong, status=403)
        return None

    def _wanted(self, path: str) -> list[bytes]:
        """The keys and tokens of which a caller of a path must show one; none where it need not."""
        if path in OPEN_PATHS or path.startswith(self._entrance.apart):
            return []
        for start, keys in self._keys:
            if path.startswith(start):
                return keys
        return self._tokens if self._token_needed else []


def token_needed(config: ServiceConfig) -> bool:
    """Whether callers of the edge must show a token, where nothing else is said."""
    entrance = config.entrance()
    return bool(entrance.tokens) and not (entrance.loopback_is_open and is_loopback(config.http_host))


@lru_cache(HOSTS_KNOWN)
def _names_loopback(host: str) -> bool:
    """Whether a ``Host`` header can only mean this machine."""
    return is_loopback(urlsplit(f"//{host}").hostname or "")


def is_loopback(host: str) -> bool:
    """Whether *host*, a name or an address, can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the server ------------------------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the lifecycle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Edge:
    """A bound port and the server on it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._server: uvicorn.Server | None = None
        family = socket.AF_INET6 if ":" in config.http_host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((config.http_host, config.http_port))
        except OSError as error:
            self._socket.close()
            taken = ": another program has it" if error.errno == errno.EADDRINUSE else ""
            raise ConfigError(
                f"port {config.http_port} on {config.http_host} cannot be bound ({error.strerror}){taken}"
            ) from None

    @property
    def url(self) -> str:
        host = f"[{self._config.http_host}]" if ":" in self._config.http_host else self._config.http_host
        return f"http://{host}:{self._socket.getsockname()[1]}"

    async def serve(self, app: ASGIApp) -> None:
        """Serves until :meth:`stop`; requests in hand are answered first, for as long as they may."""
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http=Protocol,
                loop="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=max(1, int(self._config.answering_s())),
            )
        )
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Takes no new connection and lets :meth:`serve` end."""
        if self._server is not None:
            self._server.should_exit = True
        self._socket.close()


def as_json(message: Message, status: int = 200) -> Response:
    """A message as an HTTP answer, for hand-written routes."""
    return Response(encode(message), status, media_type="application/json")
