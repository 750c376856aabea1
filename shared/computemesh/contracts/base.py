"""What a contract is: a subject, the types that cross it, who may use it, and its HTTP routes.

A contract is declared once, here in ``computemesh.contracts``. The codec, the bus endpoint, the HTTP edge,
the OpenAPI document and the permissions of the NATS server are derived from that declaration.

Every request is answered with its reply type *or* with :class:`Refused`; a refusal is a value, not an
exception.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from computemesh.ids import ID_PATTERN, is_token

DEPTH_MAX: Final = 64
"""Bound on nested arrays and objects in a message. Readers in other languages give up not far above it."""

MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""Bound on one captured message: the size the work stream accepts."""


STRICT: Final = os.environ.get("COMPUTEMESH_STRICT", "").lower() in ("1", "true")
"""Whether a field that no contract declares is refused. In production it is ignored, as a newer peer may say more
than we know; in tests it is a mistake. :mod:`computemesh.testing` sets it for the processes it starts."""


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=STRICT, gc=False):
    """Base of every payload: JSON on the wire, unknown fields ignored, new fields only with defaults.

    What was decoded from JSON holds no cycle, so the garbage collector need not look at it.
    """


class Refused(Message, frozen=True, kw_only=True):
    """An expected "no", with what the caller should do about it."""

    code: str
    """Machine-readable, ``snake_case``: ``bad_message``, ``not_found``, ``queue_full`` …"""
    reason: str
    """One sentence for a person, with the numbers that decided."""
    field: str = ""
    """Path of the field at fault, as in ``payload.prompt``; empty when no single field is."""
    status: int = 400
    """The HTTP status that says the same."""
    retry: Literal["never", "later", "elsewhere"] = "never"


class Role(StrEnum):
    """Who speaks on the bus. Each role has its own credentials, permissions and inbox prefix."""

    SERVICES = "services"
    NODE = "node"
    CLIENT = "client"
    OBSERVER = "observer"


M = TypeVar("M", bound=Message)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
S = TypeVar("S", bound=msgspec.Struct)

Handler = Callable[[Q], Awaitable[R | Refused]]


@dataclass(frozen=True, kw_only=True)
class ServiceCard:
    """A kind of service process, as the rest of the mesh knows it."""

    name: str
    """Also its queue group on the bus."""
    about: str
    role: Role
    port: int
    """Of its HTTP edge, where nothing else was asked for."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A :class:`Refused` that a request may be answered with for reasons of its own."""

    code: str
    status: int
    when: str


@dataclass(frozen=True, kw_only=True)
class Http:
    """A route on the HTTP edge of the service that answers the request."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    """``{name}`` segments and the query string fill fields of the request of the same name. In the query string a
    list is repeated, ``states=online&states=lost``, and a mapping names its keys, ``labels[zone]=a``."""
    status: int = 200


@dataclass(frozen=True, kw_only=True)
class Event(Generic[M]):
    """A fact, published to whoever listens."""

    subject: str
    payload: type[M]
    sent_by: frozenset[Role]
    read_by: frozenset[Role]
    target: str = ""
    """Name of the id that is appended to the subject as its last token, if any."""
    captured: bool = False
    """Stored by a stream: publish it through JetStream and the acknowledgement means *stored*."""
    about: str = ""

    def at(self, target: str = "") -> str:
        """The subject for one target, or for all of them with ``*``."""
        return _address(self.subject, self.target, target)


@dataclass(frozen=True, kw_only=True)
class Request(Generic[Q, R]):
    """A question with one answer."""

    subject: str
    takes: type[Q]
    gives: type[R]
    asked_by: frozenset[Role]
    service: ServiceCard
    """Who answers it."""
    target: str = ""
    http: tuple[Http, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    """Beside what any request may be refused for: a malformed message, an absent bus …"""
    example: Q | None = None
    """A question as somebody would ask it; every request with a route has one."""
    about: str = ""

    @property
    def answered_by(self) -> Role:
        return self.service.role

    def at(self, target: str = "") -> str:
        """The subject for one target, or for all of them with ``*``."""
        return _address(self.subject, self.target, target)


@dataclass(frozen=True)
class Bound(Generic[Q, R]):
    """A request with its handler: what a service is made of."""

    contract: Request[Q, R]
    handler: Handler[Q, R]
    target: str = ""
    acting: bool = False
    """Answered on the bus only by the replica that acts; the HTTP edges of the others pass it on."""

    @property
    def subject(self) -> str:
        return self.contract.at(self.target)


AnyBound = Bound[Any, Any]


def serve(contract: Request[Q, R], handler: Handler[Q, R], *, target: str = "", acting: bool = False) -> AnyBound:
    """Pairs a request with its handler; the type checker refuses a handler of another contract."""
    return Bound(contract, handler, target, acting)


def _address(subject: str, target_name: str, target: str) -> str:
    if not target_name:
        assert not target, f"{subject} takes no target"
        return subject
    assert target == "*" or is_token(target), f"{subject}: {target_name} {target!r} is not one token"
    return f"{subject}.{target}"


# --- codec -----------------------------------------------------------------------------------------------

encode: Final = msgspec.json.Encoder(enc_hook=str).encode
"""JSON bytes of any message."""


@cache
def _decoder(kind: type[S]) -> msgspec.json.Decoder[S]:
    return msgspec.json.Decoder(kind)


def decode(data: bytes, kind: type[S]) -> S | Refused:
    """The message in *data*, or why it is none. The only place where foreign bytes become values.

    Bad UTF-8 raises ``UnicodeDecodeError`` and deep nesting ``RecursionError`` in msgspec, so catching
    ``MsgspecError`` alone would let any peer stop a service.
    """
    if too_deep(data):
        return Refused(code="bad_message", reason=f"nested deeper than {DEPTH_MAX} levels")
    try:
        if not data.isascii():
            data.decode()  # msgspec checks only the strings of fields it knows.
        message: S = _decoder(kind).decode(data or b"{}")
        return message
    except (ValueError, RecursionError) as error:
        return refused(error)


def convert(fields: Mapping[str, Any], kind: type[M]) -> M | Refused:
    """Like :func:`decode`, from values that were parsed already (YAML, HTTP paths and queries)."""
    try:
        return msgspec.convert(fields, kind)
    except (ValueError, RecursionError) as error:
        return refused(error)


_AT: Final = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_NAMED: Final = re.compile(r"(?:missing required|unknown) field `(.*?)`")
_BACKTICK: Final = re.compile(r"`")
_ID_PATTERN_SHOWN: Final = repr(ID_PATTERN)[1:-1]


def refused(error: Exception) -> Refused:
    """A decoder's complaint as a refusal that names the field."""
    text = str(error) or type(error).__name__
    at = _AT.search(text)
    named = _NAMED.search(text)
    parts = [at.group(1) if at else "", named.group(1) if named else ""]
    if _ID_PATTERN_SHOWN in text:
        text = "an id is one token of letters, digits, '_' and '-', 1 to 63 long"
    elif isinstance(error, RecursionError):
        text = f"nested deeper than {DEPTH_MAX} levels"
    elif isinstance(error, UnicodeDecodeError):
        text = "not valid UTF-8"
    return Refused(
        code="bad_message",
        reason=_BACKTICK.sub("'", _AT.sub("", text)),
        field=".".join(part for part in parts if part),
    )


def too_deep(data: bytes) -> bool:
    """Whether *data* nests arrays or objects beyond :data:`DEPTH_MAX`.

    Counting opening brackets is fast and settles nearly every message; only one with many of them is
    walked, outside its strings.
    """
    if data.count(b"[") + data.count(b"{") <= DEPTH_MAX:
        return False
    depth = 0
    in_string = escaped = False
    for byte in data:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quote
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > DEPTH_MAX:
                return True
        elif byte in b"]}":
            depth -= 1
    return False
