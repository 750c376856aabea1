"""Examples of payloads, with every field set: what golden files are made from.

``python -m computemesh.testing.golden FOLDER`` writes a file for each payload type that has none yet.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from computemesh.contracts.base import Refused, encode
from computemesh.contracts.catalog import events, requests


def payload_types() -> list[type[Any]]:
    """Every type that crosses the bus, in the order of declaration."""
    found: list[type[Any]] = [event.payload for event in events()]
    for request in requests():
        found += [request.takes, request.gives]
    return list(dict.fromkeys([*found, Refused]))


def file_name(kind: type[Any]) -> str:
    """``work.WorkItem.1.json``: conversation, type, version of the subject."""
    return f"{kind.__module__.rsplit('.', 1)[1]}.{kind.__name__}.1.json"


def example(kind: type[Any]) -> Any:
    """A message of type *kind* with a value in every field, the same each time."""
    return kind(
        **{
            field.name: _sample(msgspec.inspect.type_info(field.type), field.name)
            for field in msgspec.structs.fields(kind)
        }
    )


def _sample(info: msgspec.inspect.Type, name: str) -> Any:
    match info:
        case msgspec.inspect.Metadata(type=inner):
            return _sample(inner, name)
        case msgspec.inspect.UnionType(types=types):
            return _sample(next(t for t in types if not isinstance(t, msgspec.inspect.NoneType)), name)
        case msgspec.inspect.StrType(pattern=pattern):
            least = info.min_length or 0
            texts = [f"{name}-1"[: info.max_length or 63], *("a" * length for length in range(max(least, 1), 129))]
            return next(text for text in texts if len(text) >= least and re.search(pattern or "", text))
        case msgspec.inspect.BytesType():
            return f"{name}-1".encode()
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.IntType(ge=low, gt=above):
            return max(1, low or 0, (above or 0) + 1)
        case msgspec.inspect.FloatType():
            return 0.5
        case msgspec.inspect.ListType(item_type=item):
            return [_sample(item, name)]
        case msgspec.inspect.DictType(key_type=msgspec.inspect.LiteralType(values=keys), value_type=value):
            return {keys[0]: _sample(value, name)}
        case msgspec.inspect.DictType(value_type=value):
            return {"key": _sample(value, name)}
        case msgspec.inspect.EnumType(cls=cls):
            return next(iter(cls))
        case msgspec.inspect.LiteralType(values=values):
            return values[0]
        case msgspec.inspect.StructType(cls=cls):
            return example(cls)
        case msgspec.inspect.AnyType():
            return {"any": ["thing", 1]}
        case _:
            raise TypeError(f"no example for {info}")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for kind in payload_types():
        path = folder / file_name(kind)
        if not path.exists():
            path.write_bytes(msgspec.json.format(encode(example(kind)), indent=2) + b"\n")


if __name__ == "__main__":
    main()
