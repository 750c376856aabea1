"""Log files that grow and are rotated: their last lines, and what is written from then on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

BLOCK_BYTES: Final = 64 * 1024

ROTATED_MAX: Final = 9
"""Files before the present one: ``NAME.1`` is the latest of them."""


class LogFile:
    """One log, from its end on.

    Where it ends is fixed when this is made: :meth:`before` has all that stands before, :meth:`after` all that comes.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._open()
        self._begin = 0 if from_start or self._file is None else _last_newline(self._file)
        if self._file is not None:
            self._file.seek(self._begin)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def before(self) -> Iterator[str]:
        """The lines that stood there, the last one first, those of rotated files too."""
        if self._file is None:
            return
        mine = os.fstat(self._file.fileno()).st_ino
        yield from _reversed(self._file, self._begin)
        for number in range(1, ROTATED_MAX + 1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            try:
                file = older.open("rb")
            except FileNotFoundError:
                return
            with file:
                if os.fstat(file.fileno()).st_ino != mine:  # Else it was rotated just now.
                    yield from _reversed(file, os.fstat(file.fileno()).st_size)

    def after(self) -> list[str]:
        """The lines that were written since the last time, through any rotation."""
        lines: list[str] = []
        while True:
            moved = self._moved()
            if self._file is not None:  # Read after looking: nobody writes to a file that was rotated away.
                lines += self._take(self._file.read())
            if not moved:
                return lines
            self.close()
            self._rest = b""
            self._open()

    def _moved(self) -> bool:
        """Whether another file has the name by now, or this one was begun anew."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        if self._file is None:
            return True
        return found.st_ino != os.fstat(self._file.fileno()).st_ino or found.st_size < self._file.tell()

    def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file = self._path.open("rb")

    def _take(self, data: bytes) -> list[str]:
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        return [_text(line) for line in whole.split(b"\n")] if newline else []


def _last_newline(file: BinaryIO) -> int:
    """The place behind the last whole line."""
    end = os.fstat(file.fileno()).st_size
    while end:
        start = max(0, end - BLOCK_BYTES)
        found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _reversed(file: BinaryIO, end: int) -> Iterator[str]:
    """The lines before *end*, the last one first. Where the file is read otherwise does not change."""
    rest = b""
    first = True
    while end:
        start = max(0, end - BLOCK_BYTES)
        block = os.pread(file.fileno(), end - start, start) + rest
        rest, *lines = block.split(b"\n")
        if first and lines and not lines[-1]:
            lines.pop()  # Behind the last newline.
        first = False
        for line in reversed(lines):
            yield _text(line)
        end = start
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")
