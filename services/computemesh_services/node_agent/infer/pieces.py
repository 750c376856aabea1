"""What an engine puts out, cut into pieces of text. Pure."""

from __future__ import annotations

import codecs
from typing import Final, Protocol

from computemesh.contracts.infer import PART_MAX

_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class TooLong(ValueError):
    """An event is longer than a piece may be."""


class Cutter(Protocol):
    """Cuts bytes, as they come, into pieces of at most ``PART_MAX`` characters."""

    def feed(self, data: bytes) -> list[str]:
        """The pieces that are whole now.

        Raises:
            TooLong: this cannot be cut.
        """
        ...

    def end(self) -> list[str]:
        """What is left when nothing more comes."""
        ...


class EventCutter:
    """Cuts server-sent events: never within one, and as many together as there are."""

    def __init__(self) -> None:
        self._rest = b""
        """The beginning of an event that is not whole yet."""

    def feed(self, data: bytes) -> list[str]:
        if self._rest:
            data = self._rest + data
        if data.endswith(b"\n\n"):  # As nearly always.
            end = len(data)
        else:
            end = max((found + len(mark) for mark in _EVENT_ENDS if (found := data.rfind(mark)) >= 0), default=0)
        self._rest = data[end:]
        if len(self._rest) > PART_MAX * 4:
            raise TooLong(f"an event of more than {PART_MAX} characters")
        return _cut(data[:end].decode("utf-8", "replace")) if end else []

    def end(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return _cut(rest.decode("utf-8", "replace")) if rest else []


def _cut(text: str) -> list[str]:
    """Events in pieces that are not too long."""
    pieces: list[str] = []
    at = 0
    while len(text) - at > PART_MAX:
        ends = (mark.decode() for mark in _EVENT_ENDS)
        end = max(
            (found + len(mark) for mark in ends if (found := text.rfind(mark, at, at + PART_MAX)) >= 0), default=at
        )
        if end == at:
            raise TooLong(f"an event of more than {PART_MAX} characters")
        pieces.append(text[at:end])
        at = end
    pieces.append(text[at:] if at else text)
    return pieces


class TextCutter:
    """Cuts any other text, anywhere between two characters."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, data: bytes) -> list[str]:
        text = self._decode(data)
        return [text[at : at + PART_MAX] for at in range(0, len(text), PART_MAX)]

    def end(self) -> list[str]:
        rest = self._decode(b"", final=True)
        return [rest] if rest else []
