"""What people type or keep in files, made into messages: JSON or YAML, checked before anything is sent.

Programs on the bus may say more than we know, so decoding ignores unknown fields. A person's unknown field is
a slip of the pen, so here it is refused, at any depth, with the name it is nearest to.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect
from msgspec.structs import replace

from computemesh import yamltext
from computemesh.cli.common import Failure, is_list, is_mapping, refusal
from computemesh.contracts.base import DEPTH_MAX, MESSAGE_BYTES_MAX, Message, Refused, convert, too_deep
from computemesh.yamltext import Document, Place

VALUES_MAX: Final = MESSAGE_BYTES_MAX
"""Bound on the values in a YAML text: more cannot fit a message. Aliases can name billions in a line."""

YAML_BYTES_MAX: Final = 64 * 1024**2
"""Bound on a YAML text. A payload that is too large for a message goes to the object store."""

M = TypeVar("M", bound=Message)


def read_bytes(source: str) -> bytes:
    """The bytes of a file, or of standard input for ``-``."""
    try:
        return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise Failure(f"{source}: {(error.strerror or 'unreadable').lower()}", code="bad_file") from None


def documents(data: bytes, name: str) -> list[tuple[str, Document]]:
    """The documents of a JSON or YAML text, each with where it stands; empty ones are left out.

    Args:
        name: of the text, for error messages.

    Raises:
        Failure: it is neither, or holds what a message cannot say.
    """
    try:
        # JSON is YAML too, but for tabs and a few escapes; so it is tried first.
        found: list[Document] | Refused = [Document(msgspec.json.decode(data), data.decode())]
    except (ValueError, RecursionError):
        found = yamltext.read_all(data, bytes_max=YAML_BYTES_MAX, values_max=VALUES_MAX)
    else:
        if too_deep(data):
            found = Refused(code="bad_file", reason=f"nested deeper than {DEPTH_MAX} levels")
    if isinstance(found, Refused):
        raise Failure(f"{name}: {found.reason}", field=found.field, code="bad_file")
    found = [document for document in found if document.value is not None]
    places = [name if len(found) == 1 else f"{name}, document {number}" for number in range(1, len(found) + 1)]
    return list(zip(places, found, strict=True))


def message(
    fields: Mapping[str, Any], kind: type[M], where: str = "", placed: Callable[[str], Place | None] = lambda _: None
) -> M:
    """*fields* as a message of type *kind*.

    Args:
        where: they stand, for error messages.
        placed: where in that a field stands, by its path.

    Raises:
        Failure: a field is unknown or does not fit; it names the field.
    """
    prefix = f"{where}: " if where else ""
    if (unknown := unknown_field(fields, kind)) is not None:
        path, known = unknown
        near = difflib.get_close_matches(path.rpartition(".")[2], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        raise Failure(
            f"{prefix}{path}: unknown field{_stands(placed(path))}", hint=hint, field=path, code="unknown_field"
        )
    made = convert(fields, kind)
    if isinstance(made, Refused):
        raise refusal(replace(made, reason=made.reason + _stands(placed(made.field))), where=prefix)
    return made


def _stands(place: Place | None) -> str:
    return f" ({place})" if place else ""


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
