"""What the clients ask a control plane, and how they take its answers, without the asking itself.

Each operation is a generator. It yields the :class:`Call` that it needs, is sent the body of the answer, or has a
:class:`NanoCtrlError` thrown into it, and returns what its caller gets. Both clients have these operations; they differ
in how a call is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote, urlsplit

import msgspec

T = TypeVar("T")

TIMEOUT_S: Final = 5.0

REGISTER_S: Final = 10.0
"""How long what registers may take, and what asks for the bus."""

INTERVAL_S: Final = 15.0
"""From one heartbeat to the next. A record lives for 60 s."""

STOP_S: Final = 2.0
"""How long it is waited for a heartbeat that is under way."""

HEARTBEAT_NAME: Final = "nanoctrl-hb"

TOKEN_NAME: Final = "COMPUTEMESH_TOKEN"  # noqa: S105
"""The variable with the token of the control plane's edge."""

log: Final = logging.getLogger("nanoctrl")
"""Of both clients: the one that programs written for NanoCtrl configure."""

_SAID_BYTES_MAX: Final = 500


class NanoCtrlError(RuntimeError):
    """A control plane that refused, could not be reached, or answered what cannot be read.

    Attributes:
        status_code: of the answer; 0 where there was none.
    """

    def __init__(self, message: str, *, status_code: int = 0) -> None:
        super().__init__(message)
        self.status_code = status_code


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request."""

    method: str
    path: str
    """Without a slash in front."""
    content: bytes = b""
    timeout_s: float = TIMEOUT_S
    again: bool = True
    """Whether it may reach the server twice: then it is sent once more where a kept connection has ended."""


Exchange = Generator[Call, bytes, T]
"""An operation that gives a T."""


@dataclass(frozen=True)
class Place:
    """Where a control plane is."""

    base: str
    """``http://host:port``, without a slash at the end."""
    token: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        found = {"Content-Type": "application/json", "Accept": "application/json, text/plain"}
        return found | ({"Authorization": f"Bearer {self.token}"} if self.token else {})


def place(address: str, token: str | None) -> Place:
    """The control plane at an address, ``host:port`` or a URL.

    Args:
        token: of its edge; None is what ``COMPUTEMESH_TOKEN`` says.

    Raises:
        ValueError: it is no address of an HTTP server, or the token cannot be sent.
    """
    base = (address if address.startswith(("http://", "https://")) else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(base)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"address: {address!r} is none; write host:port or http://host:port")
    found = os.environ.get(TOKEN_NAME, "") if token is None else token
    if not (found.isascii() and found.isprintable()):
        raise ValueError("token: it has characters that no header can have")
    return Place(base, found)


def check_interval(interval_s: float) -> None:
    """
    Raises:
        ValueError: it is no time between two heartbeats.
    """
    if not interval_s > 0:
        raise ValueError(f"interval: expected seconds above 0, got {interval_s!r}")


def tell_unknown(operations: Operations) -> None:
    log.warning("the control plane does not know the engine %s", operations.engine_id)


def _post(path: str, body: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, again: bool = True) -> Call:
    try:
        content = msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise NanoCtrlError(f"/{path}: what is sent must be JSON: {error}") from None
    return Call(method="POST", path=path, content=content, timeout_s=timeout_s, again=again)


# --- what is answered --------------------------------------------------------------------------------------------


def checked(call: Call, status_code: int, content: bytes) -> bytes:
    """The body of an answer.

    Raises:
        NanoCtrlError: it is a refusal; the message has what the control plane says of it.
    """
    if 200 <= status_code < 300:
        return content
    said = " ".join(content[:_SAID_BYTES_MAX].decode("utf-8", "replace").split())
    raise NanoCtrlError(f"/{call.path}: {status_code} {said}".rstrip(), status_code=status_code)


def _read(content: bytes, kind: type[T]) -> T:
    try:
        found = msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise NanoCtrlError(f"the answer is no JSON: {error}") from None
    if not isinstance(found, kind):
        raise NanoCtrlError(f"the answer is a {type(found).__name__}, where a {kind.__name__} was expected")
    return found


def _fields(content: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", _read(content, dict))


# --- the operations ----------------------------------------------------------------------------------------------


class Operations:
    """Those of one client, and what it knows of its engine."""

    def __init__(self, scope: str | None) -> None:
        self.engine_id: str | None = None
        self.registered = False
        self._scope = scope

    def _body(self, **fields: Any) -> dict[str, Any]:
        return fields | ({"scope": self._scope} if self._scope else {})

    def check(self, at: Place) -> Exchange[None]:
        try:
            yield Call(method="GET", path="")
        except NanoCtrlError as error:
            reason = f"no control plane at {at.base}: {error}"
            raise NanoCtrlError(reason, status_code=error.status_code) from None
        log.info("the control plane at %s answers", at.base)

    def register(self, engine_id: str, extra: Mapping[str, Any]) -> Exchange[bool]:
        body = self._body(engine_id=engine_id, **extra)
        self.engine_id = engine_id
        try:
            answer = _fields((yield _post("register_engine", body, timeout_s=REGISTER_S)))
        except NanoCtrlError as error:
            log.error("cannot register the engine %s: %s", engine_id, error)
            return False
        self.registered = answer.get("status") == "ok"
        if self.registered:
            log.info("the engine %s is registered", engine_id)
        else:
            log.error("the control plane does not register the engine %s: %s", engine_id, answer)
        return self.registered

    def unregister(self) -> Exchange[bool]:
        if not (engine_id := self.engine_id):
            return False
        try:
            answer = _fields((yield _post("unregister_engine", self._body(engine_id=engine_id))))
        except NanoCtrlError as error:
            log.error("cannot unregister the engine %s: %s", engine_id, error)
            return False
        if answer.get("status") != "ok":
            log.warning("the control plane does not unregister the engine %s: %s", engine_id, answer)
            return False
        self.registered = False
        log.info("the engine %s is no longer registered", engine_id)
        return True

    def heartbeat(self) -> Exchange[str]:
        if not (engine_id := self.engine_id):
            return "error"
        try:
            answer = _fields((yield self._heartbeat("engine", engine_id)))
        except NanoCtrlError as error:
            log.error("no heartbeat of the engine %s: %s", engine_id, error)
            return "error"
        return str(answer.get("status", "error"))

    def _heartbeat(self, entity_type: str, entity_id: str) -> Call:
        return _post("heartbeat", self._body(entity_type=entity_type, entity_id=entity_id))

    def bus_url(self) -> Exchange[str | None]:
        try:
            answer = _fields((yield _post("get_redis_address", {}, timeout_s=REGISTER_S)))
        except NanoCtrlError as error:
            log.error("cannot ask where the bus is: %s", error)
            return None
        if found := answer.get("redis_address"):
            # NanoCtrl leaves out the scheme, which is Redis's.
            return str(found) if "://" in str(found) else f"redis://{found}"
        log.error("the control plane does not say where the bus is: %s", answer)
        return None

    def engine_info(self, engine_id: str) -> Exchange[dict[str, Any] | None]:
        try:
            answer = _fields((yield _post("get_engine_info", self._body(engine_id=engine_id))))
        except NanoCtrlError as error:
            log.error("cannot ask about the engine %s: %s", engine_id, error)
            return None
        if answer.get("status") == "ok":
            found: dict[str, Any] | None = answer.get("engine_info")
            return found
        log.error("no engine %s: the control plane says %s", engine_id, answer.get("status"))
        return None

    def list_engines(self) -> Exchange[list[dict[str, Any]]]:
        try:
            answer = _fields((yield _post("list_engines", self._body())))
        except NanoCtrlError as error:
            log.error("cannot list the engines: %s", error)
            return []
        if answer.get("status") == "ok":
            found: list[dict[str, Any]] = answer.get("engines", [])
            return found
        log.error("the control plane does not list the engines: %s", answer)
        return []

    def register_peer(
        self, *, alias: str | None, device: str, ib_port: int, link_type: str, address: str, name_prefix: str
    ) -> Exchange[dict[str, Any]]:
        body = self._body(device=device, ib_port=ib_port, link_type=link_type, address=address, name_prefix=name_prefix)
        if alias is not None:
            body["alias"] = alias
        # Sent twice it would make two agents, or find its own alias taken.
        return _fields((yield _post("start_peer_agent", body, timeout_s=REGISTER_S, again=False)))

    def cleanup_peer(self, agent_name: str) -> Exchange[dict[str, Any]]:
        return _fields((yield _post("cleanup", self._body(agent_name=agent_name))))

    def heartbeat_peer(self, agent_name: str) -> Exchange[dict[str, Any]]:
        return _fields((yield self._heartbeat("agent", agent_name)))

    def set_desired_topology(
        self, alias: str, *, target_peers: list[str], min_bw: str | None, symmetric: bool
    ) -> Exchange[dict[str, Any]]:
        body = self._body(target_peers=target_peers)
        if min_bw is not None:
            body["min_bw"] = min_bw
        if symmetric:
            body["symmetric"] = True
        return _fields((yield _post(f"v1/desired_topology/{quote(alias, safe='')}", body)))

    def query_peers(self) -> Exchange[list[dict[str, Any]]]:
        return cast("list[dict[str, Any]]", _read((yield _post("query", self._body())), list))
