"""YAML that people write, read strictly, with the place of everything in it. Pure.

Refused, with line and column: a key that stands twice (YAML libraries keep the last), keys that are not text, tags that
would make objects, aliases that grow beyond bounds or contain themselves, and values that JSON cannot carry. Numbers
such as ``1e-5`` are numbers, as in YAML 1.2, and dates stay the text that they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeGuard

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.nodes import ScalarNode

from computemesh.contracts.base import DEPTH_MAX, MESSAGE_BYTES_MAX, Refused

TEXT_BYTES_MAX: Final = MESSAGE_BYTES_MAX
"""Bound on a text, and on what its aliases make of it."""

VALUES_MAX: Final = 20_000
"""Bound on the values in a document, aliases written out."""


class Place(NamedTuple):
    """Where something stands in a text, both counted from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass(frozen=True)
class Document:
    """What a text says, and where."""

    value: Any
    text: str = ""
    places: Mapping[str, Place] = field(default_factory=dict[str, Place])
    """By path, as in ``spec.resources.tags[0]``: of the key, or of the element of a list."""

    def place(self, path: str) -> Place | None:
        """Where *path* stands, or else the nearest of what contains it; None for what was no text."""
        while path and path not in self.places:
            path = path.rpartition("[" if path.endswith("]") else ".")[0]
        return self.places.get(path)


class _Bad(Exception):
    def __init__(self, reason: str, place: Place | None = None, path: str = "") -> None:
        super().__init__(reason)
        self.place = place
        self.path = path


# Without libyaml PyYAML is slower, and otherwise the same.
_Base: Final[type[Any]] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """Scans, and says what a plain scalar is."""


_TIMESTAMP: Final = "tag:yaml.org,2002:timestamp"
_FLOAT: Final = "tag:yaml.org,2002:float"
_MERGE: Final = "tag:yaml.org,2002:merge"
_SCALARS: Final = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_TIMESTAMP, "tag:yaml.org,2002:value")]
    for first, found in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read(data: bytes | str) -> Document | Refused:
    """The one document in a text, or why there is none: code ``bad_yaml``, line and column in the reason."""
    found = read_all(data, documents_max=1)
    if found == []:
        return Refused(code="bad_yaml", reason="Invalid YAML: there is nothing in it")
    return found if isinstance(found, Refused) else found[0]


def read_all(
    data: bytes | str,
    *,
    documents_max: int | None = None,
    bytes_max: int = TEXT_BYTES_MAX,
    values_max: int = VALUES_MAX,
) -> list[Document] | Refused:
    """All documents in a text, or why it cannot be read, as :func:`read` says it.

    The places are those in the whole text, which a document keeps when it is the only one.

    Args:
        bytes_max: bound on the text, and on what its aliases make of it.
        values_max: bound on the values in it, aliases written out.
    """
    if len(data) > bytes_max:
        return Refused(code="too_large", status=413, reason=f"the text is larger than {bytes_max} bytes")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return _Reader(text, bytes_max, values_max).documents(documents_max)
    except _Bad as bad:
        place, reason, path = bad.place, str(bad), bad.path
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else None
        reason, path = ", ".join(filter(None, [error.context, error.problem])), ""
    except UnicodeError:
        place, reason, path = None, "not text in UTF-8", ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place, reason, path = None, " ".join(str(error).split()), ""
    where = f"{place}: " if place else ""
    return Refused(code="bad_yaml", field=path, reason=f"Invalid YAML: {where}{reason}")


class _Made(NamedTuple):
    """A value, and how large it is with all aliases in it written out."""

    value: Any
    values: int
    chars: int


class _Reader:
    """Makes values from what the scanner sees, one after another, and stops at the first that is too much."""

    def __init__(self, text: str, bytes_max: int, values_max: int) -> None:
        self._text = text
        self._bytes_max = bytes_max
        self._values_max = values_max
        self._loader: Any = _Loader(text)
        self._places: dict[str, Place] = {}
        self._anchors: dict[str, _Made | None] = {}
        self._values = 0
        self._chars = 0

    def documents(self, documents_max: int | None) -> list[Document]:
        self._next()  # the start of the stream
        found: list[Document] = []
        while isinstance(event := self._peek(), DocumentStartEvent):
            if len(found) == documents_max:
                raise _Bad("a second document begins; send one at a time", _place(event))
            self._next()
            self._places, self._anchors = {}, {}
            found.append(Document(self._make("", 0).value, "", self._places))
            self._next()
        self._next()
        return [replace(found[0], text=self._text)] if len(found) == 1 else found

    def _next(self) -> Event:
        event: Event = self._loader.get_event()
        return event

    def _peek(self) -> Event:
        event: Event = self._loader.peek_event()
        return event

    def _make(self, path: str, depth: int) -> _Made:
        event = self._next()
        if depth > DEPTH_MAX:
            raise _Bad(f"nested deeper than {DEPTH_MAX} levels", _place(event), _cut(path))
        if isinstance(event, AliasEvent):
            return self._alias(event, path)
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = None
        before = self._values, self._chars
        match event:
            case ScalarEvent():
                value = self._scalar(event, path)
                self._grow(1, len(event.value), event)
            case SequenceStartEvent():
                self._no_tag(event, "seq", path)
                self._grow(1, 2, event)
                value = self._list(path, depth)
            case MappingStartEvent():
                self._no_tag(event, "map", path)
                self._grow(1, 2, event)
                value = self._mapping(path, depth)
            case _:
                raise _Bad("a value is missing", _place(event), path)
        made = _Made(value, self._values - before[0], self._chars - before[1])
        if anchor is not None:
            self._anchors[anchor] = made
        return made

    def _alias(self, event: AliasEvent, path: str) -> _Made:
        if event.anchor not in self._anchors:
            raise _Bad(f"the alias *{event.anchor} stands for nothing above it", _place(event), path)
        made = self._anchors[event.anchor]
        if made is None:
            raise _Bad(f"the alias *{event.anchor} contains itself", _place(event), path)
        self._grow(made.values, made.chars, event)
        return made

    def _grow(self, values: int, chars: int, event: Event) -> None:
        self._values += values
        self._chars += chars
        if self._values > self._values_max:
            raise _Bad(f"more than {self._values_max} values", _place(event))
        if self._chars > self._bytes_max:
            raise _Bad(f"with its aliases written out it is larger than {self._bytes_max} bytes", _place(event))

    def _list(self, path: str, depth: int) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._peek(), SequenceEndEvent):
            inner = f"{path}[{len(found)}]"
            self._places[inner] = _place(event)
            found.append(self._make(inner, depth + 1).value)
        self._next()
        return found

    def _mapping(self, path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := self._peek(), MappingEndEvent):
            place = _place(event)
            if isinstance(event, ScalarEvent) and self._tag(event) == _MERGE:
                self._next()
                merged = {**self._merge(path, depth, place), **merged}
                continue
            key = self._key(path)
            inner = f"{path}.{key}" if path else key
            if key in found:
                raise _Bad(f"{inner} stands twice, first at {self._places[inner]}", place, inner)
            self._places[inner] = place
            found[key] = self._make(inner, depth + 1).value
        self._next()
        return {**merged, **found}

    def _merge(self, path: str, depth: int, place: Place) -> dict[str, Any]:
        value = self._make(f"{path}.<<", depth + 1).value
        merged: dict[str, Any] = {}
        listed: list[Any] = [value] if is_mapping(value) else value if is_list(value) else [None]
        for each in reversed(listed):
            if not is_mapping(each):
                raise _Bad("<< takes a mapping, or a list of them", place, path)
            merged |= each
        return merged

    def _key(self, path: str) -> str:
        event = self._next()
        if isinstance(event, AliasEvent):
            made = self._alias(event, path)
            key: Any = made.value
        elif isinstance(event, ScalarEvent):
            key = self._scalar(event, path)
            self._grow(0, len(event.value), event)
            if event.anchor is not None:
                self._anchors[event.anchor] = _Made(key, 1, len(event.value))
        else:
            raise _Bad("a key is a word, not a list or a mapping", _place(event), path)
        if not isinstance(key, str):
            raise _Bad(f"the key {key!r} is not text; put it in quotes", _place(event), path)
        return key

    def _tag(self, event: ScalarEvent) -> str:
        if event.tag is not None and event.tag != "!":
            return event.tag
        tag: str = self._loader.resolve(ScalarNode, event.value, event.implicit)
        return tag

    def _scalar(self, event: ScalarEvent, path: str) -> Any:
        tag = self._tag(event)
        if tag not in _SCALARS:
            raise _Bad(
                f"values of the kind {tag.removeprefix('tag:yaml.org,2002:')} mean nothing here", _place(event), path
            )
        try:
            value = self._loader.construct_object(ScalarNode(tag, event.value))
        except (yaml.YAMLError, ValueError, KeyError, OverflowError):
            raise _Bad(f"{event.value[:80]!r} is no {tag.rpartition(':')[2]}", _place(event), path) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _Bad(f"{value} is no number that JSON can carry", _place(event), path)
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise _Bad("the number has more than 64 bits; put it in quotes", _place(event), path)
        if isinstance(value, str) and not _is_unicode(value):
            raise _Bad("not valid Unicode", _place(event), path)
        return value

    def _no_tag(self, event: SequenceStartEvent | MappingStartEvent, kind: str, path: str) -> None:
        if event.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            raise _Bad(f"values of the kind {event.tag} mean nothing here", _place(event), path)


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value that was read is a mapping."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _place(event: Event) -> Place:
    mark = event.start_mark
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(path: str) -> str:
    return path if len(path) < 80 else path[:77] + "..."
