"""Small GGUF files, for tests: whole ones, though no engine could say anything with the numbers in them."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from computemesh.gguf import TENSOR_TYPES

ALIGNMENT: Final = 32

KEYS: Final[Mapping[str, Any]] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 15,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.chat_template": "{{ messages }}",
}
"""What a chat model says of itself."""


def a_gguf(
    keys: Mapping[str, Any] | None = None,
    *,
    tensors: Sequence[tuple[str, Sequence[int], int]] = (("w", (256, 4), 12),),
    version: int = 3,
    seed: int = 0,
) -> bytes:
    """A GGUF file.

    Args:
        keys: in place of :data:`KEYS`, or beside them: one that is None is left out. Integers are written as u32,
            texts as strings, lists of texts or integers as arrays.
        tensors: name, dimensions and ggml's number of the type of each.
        seed: of the bytes in the tensors.
    """
    told = {key: value for key, value in {**KEYS, **(keys or {})}.items() if value is not None}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(told))
    for key, value in told.items():
        head += _text(key) + _value(value)
    offset = 0
    for name, extents, kind in tensors:
        _, block, block_bytes = TENSOR_TYPES[kind]
        numbers = 1
        for extent in extents:
            numbers *= extent
        head += _text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)
        offset += _aligned(numbers // block * block_bytes)
    if not tensors:
        return head
    return head + bytes(_aligned(len(head)) - len(head)) + random.Random(seed).randbytes(offset)  # noqa: S311


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        case _:
            return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
