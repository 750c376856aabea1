"""Pieces of logs as text that fits a message. Pure."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Final

from computemesh.contracts.base import encode

PART_JSON_MAX: Final = 700 * 1024
"""Bound on a part of a log as JSON, which may need six bytes for one."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a log."""

    text: str = ""
    used: int = 0
    """Bytes of the log that became *text*."""
    at_end: bool = True
    """Nothing follows it at present."""


def as_text(data: bytes, *, rest: int, ended: bool) -> Part:
    """Bytes of a log as text that fits a message; what is not UTF-8 is replaced, and no character is cut in two.

    Args:
        rest: bytes that follow them.
        ended: nothing will follow those.
    """
    while True:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data, final=ended and rest == 0)
        used = len(data) - len(decoder.getstate()[0])
        if len(encode(text)) <= PART_JSON_MAX:
            break
        rest += len(data) - len(data) // 2
        data = data[: len(data) // 2]
    if used == 0 and data and rest:  # Not even one character fits the limit.
        text, used = decoder.decode(b"", final=True), len(data)
    return Part(text=text, used=used, at_end=rest == 0 and used == len(data))
