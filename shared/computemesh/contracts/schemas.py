"""JSON Schemas of payloads, with what the strings under their fields say."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec


def schemas_of(kinds: Sequence[type[Any]], ref_template: str) -> dict[str, dict[str, Any]]:
    """The schema of each type, and of each type in its fields, by name.

    Args:
        ref_template: where a schema is found, with ``{name}`` in it.
    """
    _, found = msgspec.json.schema_components(kinds, ref_template=ref_template)
    for kind in _with_parts(kinds):
        schema = found[kind.__name__]
        schema.pop("additionalProperties", None)  # A message is the same, however strictly this process reads it.
        for name, about in field_docs(kind).items():
            field = schema["properties"][name]
            # What is said of the field first, then what holds for its type.
            field["description"] = " ".join(filter(None, [about, field.get("description", "")]))
    return found


def field_docs(kind: type[Any]) -> dict[str, str]:
    """What the strings under the fields of *kind* and its bases say, in one line each."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        docs |= _docs_in(base.__module__).get(base.__qualname__, {})
    return docs


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """The documented fields of each class of a module. Python keeps no such strings, so the source is read."""
    if not module.startswith("computemesh"):
        return {}
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_documented(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, after in pairwise(node.body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.replace("``", "`").split())
            case _:
                pass


def _with_parts(kinds: Sequence[type[Any]]) -> list[type[Any]]:
    """These types, and those in their fields."""
    found: dict[type[Any], None] = {}
    waiting = [msgspec.inspect.type_info(kind) for kind in kinds]
    while waiting:
        match waiting.pop():
            case msgspec.inspect.StructType(cls=cls, fields=fields):
                if cls not in found:
                    found[cls] = None
                    waiting += [field.type for field in fields]
            case msgspec.inspect.Metadata(type=inner) | msgspec.inspect.ListType(item_type=inner):
                waiting.append(inner)
            case msgspec.inspect.DictType(value_type=inner):
                waiting.append(inner)
            case msgspec.inspect.UnionType(types=inners):
                waiting += inners
            case _:
                pass
    return list(found)
