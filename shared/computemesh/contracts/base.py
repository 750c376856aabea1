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
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import msgspec

from computemesh.ids import ID_PATTERN, is_token

DEPTH_MAX: Final = 64
"""Bound on nested arrays and objects in a message. Readers in other languages give up not far above it."""

RECORD_DEPTH_MAX: Final = DEPTH_MAX - 3
"""The same for what is kept, so that the answers and events which hold it can be read: in a field, a list, and a field
of that one's elements."""

MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""Bound on one captured message: the size the work stream accepts."""


AT_ONCE: Final = 64
"""Requests of one kind that a process has in hand at the same time, unless it says otherwise."""

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
    retry_after_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Seconds after which asking again may help, where that is known."""


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

SendPart = Callable[[R], Awaitable[None]]
"""Sends one more part of an answer."""

PartsHandler = Callable[[Q, SendPart[R]], Awaitable[Refused | None]]
"""Answers in parts; a refusal stands in the place of an answer, or of the rest of one."""


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
    """A question with one answer, or with many parts of one."""

    subject: str
    takes: type[Q]
    gives: type[R]
    """The answer, or each part of it."""
    asked_by: frozenset[Role]
    service: ServiceCard
    """Who answers it."""
    target: str = ""
    many: bool = False
    """The answer comes in parts, each a message; the last one says that it is the last, or is a refusal. Behind it
    comes an empty message, by which the NATS server learns that it may forget where the answer goes."""
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


@dataclass(frozen=True, kw_only=True)
class _Served(Generic[Q, R]):
    contract: Request[Q, R]
    target: str = ""
    acting: bool = False
    """Answered on the bus only by the replica that acts; the HTTP edges of the others pass it on."""
    lasting: bool = False
    """Goes on being answered while the service drains."""
    at_once: int = AT_ONCE
    """Requests in hand at the same time; more wait. One that is answered in parts bounds them by itself."""

    @property
    def subject(self) -> str:
        return self.contract.at(self.target)


@dataclass(frozen=True, kw_only=True)
class Bound(_Served[Q, R]):
    """A request with its handler: what a service is made of."""

    handler: Handler[Q, R]


@dataclass(frozen=True, kw_only=True)
class InParts(_Served[Q, R]):
    """A request that is answered in parts, with its handler."""

    handler: PartsHandler[Q, R]


AnyBound = Bound[Any, Any]
AnyInParts = InParts[Any, Any]
AnyServed = AnyBound | AnyInParts


@dataclass(frozen=True, kw_only=True)
class Route:
    """An HTTP route in the shapes of another system, with a handler written by hand. It is not on the bus."""

    name: str
    """Of the operation, for programs that are generated from the OpenAPI document."""
    service: ServiceCard
    http: Http
    takes: type[Message]
    """Its fields come from the path, the query string and, for POST, the JSON body."""
    gives: Any
    """A message type, or a list of one; ``Any`` for what only its maker knows."""
    texts: tuple[str, ...] = ()
    """Media types of a body that is text instead."""
    gives_text: bool = False
    """Whether the answer is plain text when the caller accepts that."""
    gives_events: bool = False
    """Whether the answer is server-sent events when the caller asks for a stream."""
    refused_as: type[Message] | None = None
    """The shape of its refusals, where that is not a problem document. Then ``refuses`` lists all there are."""
    refuses: tuple[Refusal, ...] = ()
    example: Message
    about: str


def serve(
    contract: Request[Q, R],
    handler: Handler[Q, R],
    *,
    target: str = "",
    acting: bool = False,
    lasting: bool = False,
    at_once: int = AT_ONCE,
) -> AnyBound:
    """Pairs a request with its handler; the type checker refuses a handler of another contract."""
    assert not contract.many, f"{contract.subject} is answered in parts"
    return Bound(contract=contract, handler=handler, target=target, acting=acting, lasting=lasting, at_once=at_once)


def serve_parts(
    contract: Request[Q, R],
    handler: PartsHandler[Q, R],
    *,
    target: str = "",
    acting: bool = False,
    lasting: bool = False,
) -> AnyInParts:
    """Pairs a request that is answered in parts with its handler."""
    assert contract.many, f"{contract.subject} has one answer"
    return InParts(contract=contract, handler=handler, target=target, acting=acting, lasting=lasting)


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
        return refused(error, kind, data)


def convert(fields: Mapping[str, Any], kind: type[M]) -> M | Refused:
    """Like :func:`decode`, from values that were parsed already (YAML, HTTP paths and queries)."""
    try:
        return msgspec.convert(fields, kind)
    except (ValueError, RecursionError) as error:
        return refused(error, kind)


_AT: Final = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_NAMED: Final = re.compile(r"(?:missing required|unknown) field `(.*?)`")
_NO_CHOICE: Final = re.compile(r"Invalid enum value ('.*'|\S+)")
_OFFSET: Final = re.compile(r"\(byte (\d+)\)$")
_NO_JSON: Final = re.compile(rb"-?(NaN|Infinity)")
_LAST_KEY: Final = re.compile(rb'"([^"\\]*)"\s*:[\s\[]*$')
_BACKTICK: Final = re.compile(r"`")
_ID_PATTERN_SHOWN: Final = repr(ID_PATTERN)[1:-1]
_ENTITY_PATTERN_SHOWN: Final = "[A-Za-z0-9_.:@/+-]{0,127}"


_IN_WORDS: Final[dict[str, str]] = {}
"""What a refusal says instead of a pattern, by how the decoder shows that."""


def in_words(pattern: str, words: str) -> str:
    """A pattern of a field, for which a refusal says what may stand there."""
    _IN_WORDS[repr(pattern)[1:-1]] = words
    return pattern


def refused(error: Exception, kind: Any = None, data: bytes = b"") -> Refused:
    """A decoder's complaint as a refusal that names the field.

    Args:
        kind: what was expected, to say what could have stood there.
        data: what was read.
    """
    text = str(error) or type(error).__name__
    at = _AT.search(text)
    named = _NAMED.search(text)
    where = at.group(1).removeprefix("[...]") if at else ""  # So the fields of any object are called.
    parts = [where, named.group(1) if named else ""]
    if no_number := _no_number(text, data):
        text, parts[0] = no_number
    elif (no_choice := _NO_CHOICE.match(text)) and (choices := _choices(kind, where)):
        text = f"{no_choice.group(1)} is none of {', '.join(choices)}"
    elif _ID_PATTERN_SHOWN in text:
        text = "an id is one token of letters, digits, '_' and '-', 1 to 63 long"
    elif _ENTITY_PATTERN_SHOWN in text:
        text = "an id is 1 to 128 of letters, digits and '_-.:@/+', and begins with a letter, a digit or '_'"
    elif words := next((words for shown, words in _IN_WORDS.items() if shown in text), ""):
        text = words
    elif isinstance(error, RecursionError):
        text = f"nested deeper than {DEPTH_MAX} levels"
    elif isinstance(error, UnicodeDecodeError):
        text = "not valid UTF-8"
    return Refused(
        code="bad_message",
        reason=_BACKTICK.sub("'", _AT.sub("", text)),
        field=".".join(part for part in parts if part),
    )


def _no_number(text: str, data: bytes) -> tuple[str, str] | None:
    """The reason and the field, where the decoder stumbled over what many programs write for want of a number."""
    offset = _OFFSET.search(text)
    if offset is None:
        return None
    start = int(offset.group(1))
    start -= data[start - 1 : start] == b"-"
    word = _NO_JSON.match(data, start)
    if word is None:
        return None
    key = _LAST_KEY.search(data[:start])
    return f"{word.group().decode()} is no JSON: leave the field out when nothing is known", key.group(
        1
    ).decode() if key else ""


def _choices(kind: Any, where: str) -> list[str]:
    """What may stand at a place in a message of a kind, as ``gpus[0].platform``; empty where it is no choice."""
    if kind is None:
        return []
    return _choices_at(msgspec.inspect.type_info(kind), re.findall(r"\[|[^.\[\]]+(?=[.\[]|$)", where))


def _choices_at(info: msgspec.inspect.Type, steps: list[str]) -> list[str]:
    match info:
        case msgspec.inspect.Metadata():
            return _choices_at(info.type, steps)
        case msgspec.inspect.UnionType():
            return [choice for one in info.types for choice in _choices_at(one, steps)]
        case msgspec.inspect.EnumType() if not steps:
            return [str(one.value) for one in info.cls]
        case msgspec.inspect.LiteralType() if not steps:
            return [str(one) for one in info.values]
        case msgspec.inspect.StructType() if steps:
            inner = [field.type for field in info.fields if field.encode_name == steps[0]]
            return [choice for one in inner for choice in _choices_at(one, steps[1:])]
        case msgspec.inspect.ListType() if steps:
            return _choices_at(info.item_type, steps[1:])
        case msgspec.inspect.DictType() if steps:
            return _choices_at(info.value_type, steps[1:])
        case _:
            return []


# Also one without an end. Nothing that matched is tried in another way, so time is linear.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def too_deep(data: bytes, levels: int = DEPTH_MAX) -> bool:
    """Whether *data* nests arrays or objects deeper than so many levels.

    Counting opening brackets is fast and settles nearly every message; only one with many of them is
    walked, outside its strings.
    """
    if data.count(b"[") + data.count(b"{") <= levels:
        return False
    depth = 0
    for byte in _STRING.sub(b"", data).translate(None, _NO_BRACKETS):
        if byte in b"[{":
            depth += 1
            if depth > levels:
                return True
        else:
            depth -= 1
    return False
