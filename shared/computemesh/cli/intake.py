"""What people type or keep in files, made into messages: JSON or YAML, checked before anything is sent.

Programs on the bus may say more than we know, so decoding ignores unknown fields. A person's unknown field is
a slip of the pen, so here it is refused, at any depth, with the name it is nearest to.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml
from msgspec import inspect

from computemesh.cli.common import Failure, is_list, is_mapping, refusal
from computemesh.contracts.base import DEPTH_MAX, MESSAGE_BYTES_MAX, Message, Refused, convert

VALUES_MAX: Final = MESSAGE_BYTES_MAX
"""Bound on the values in one document: more cannot fit a message. YAML's aliases can name billions in a line."""

M = TypeVar("M", bound=Message)


def read_bytes(source: str) -> bytes:
    """The bytes of a file, or of standard input for ``-``."""
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise Failure(f"{source}: {(error.strerror or 'unreadable').lower()}", code="bad_file") from None


def documents(data: bytes, name: str) -> list[tuple[str, Any]]:
    """The documents of a JSON or YAML text, each with where it stands.

    Args:
        name: of the text, for error messages.

    Raises:
        Failure: it is neither, or holds what a message cannot say.
    """
    try:
        found = _parse(data.decode())
    except UnicodeDecodeError:
        raise Failure(f"{name}: not text in UTF-8", code="bad_file") from None
    except RecursionError:
        raise Failure(f"{name}: nested too deep", code="bad_file") from None
    except (yaml.YAMLError, ValueError) as error:  # A date in YAML that is none is a ValueError.
        raise Failure(f"{name}: {' '.join(str(error).split())}", code="bad_file") from None
    places = [name if len(found) == 1 else f"{name}, document {number}" for number in range(1, len(found) + 1)]
    for where, document in zip(places, found, strict=True):
        if (fault := unsendable(document)) is not None:
            path, reason = fault
            raise Failure(f"{where}: {path + ': ' if path else ''}{reason}", field=path, code="bad_file")
    return list(zip(places, found, strict=True))


def _parse(text: str) -> list[Any]:
    try:
        # JSON is YAML too, but for tabs and a few escapes; so it is tried first.
        return [msgspec.json.decode(text)]
    except ValueError:
        return [document for document in yaml.safe_load_all(text) if document is not None]


def unsendable(document: Any) -> tuple[str, str] | None:
    """The path of the first value that JSON cannot carry, and why it cannot."""
    seen = 0
    waiting: list[tuple[str, Any, int]] = [("", document, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        seen += 1
        if seen > VALUES_MAX:
            return "", f"more than {VALUES_MAX} values"
        if depth > DEPTH_MAX:
            return _cut(path), f"nested deeper than {DEPTH_MAX} levels"
        if isinstance(value, float) and not math.isfinite(value):
            return path, f"{value} is no number that JSON can carry"
        if is_mapping(value):
            for key, inner in value.items():
                if not isinstance(key, str):
                    return path, f"the key {key!r} is not text; put it in quotes"
                waiting.append((f"{path}.{key}" if path else key, inner, depth + 1))
        elif is_list(value):
            waiting += [(f"{path}[{number}]", inner, depth + 1) for number, inner in enumerate(value)]
    return None


def _cut(path: str) -> str:
    return path if len(path) < 80 else path[:77] + "..."


def message(fields: Mapping[str, Any], kind: type[M], where: str = "") -> M:
    """*fields* as a message of type *kind*.

    Raises:
        Failure: a field is unknown or does not fit; it names the field.
    """
    prefix = f"{where}: " if where else ""
    if (unknown := unknown_field(fields, kind)) is not None:
        path, known = unknown
        near = difflib.get_close_matches(path.rpartition(".")[2], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        raise Failure(f"{prefix}{path}: unknown field", hint=hint, field=path, code="unknown_field")
    made = convert(fields, kind)
    if isinstance(made, Refused):
        raise refusal(made, where=prefix)
    return made


def unknown_field(fields: Mapping[str, Any], kind: type[Any]) -> tuple[str, list[str]] | None:
    """The path of the first field that *kind* does not have, and the names it does have there."""
    return _unknown(fields, [inspect.type_info(kind)], "")


def _unknown(value: Any, kinds: Iterable[inspect.Type], path: str) -> tuple[str, list[str]] | None:
    """Looks through those of *kinds* that *value* may be."""
    for kind in kinds:
        if isinstance(kind, inspect.Metadata):
            found = _unknown(value, [kind.type], path)
        elif isinstance(kind, inspect.UnionType):
            found = _unknown(value, kind.types, path)
        elif isinstance(kind, inspect.StructType) and is_mapping(value):
            found = _unknown_in(value, kind, path)
        elif isinstance(kind, inspect.ListType) and is_list(value):
            looked = (_unknown(item, [kind.item_type], f"{path}[{number}]") for number, item in enumerate(value))
            found = next((bad for bad in looked if bad is not None), None)
        else:
            found = None
        if found is not None:
            return found
    return None


def _unknown_in(fields: Mapping[str, Any], kind: inspect.StructType, path: str) -> tuple[str, list[str]] | None:
    known = {field.encode_name: field.type for field in kind.fields}
    for name, value in fields.items():
        inner = f"{path}.{name}" if path else name
        if name not in known:
            return inner, list(known)
        if (bad := _unknown(value, [known[name]], inner)) is not None:
            return bad
    return None
