"""What attempts print: read while they run, and kept in the object store once they have ended."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from computemesh import log as logs
from computemesh.bus import BusError
from computemesh.contracts.work import ObjectRef
from computemesh.logtext import Part, as_text
from computemesh.objects import ObjectError, Put, upload

KEPT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of a longer log, only so much of its end is kept in the object store."""

PATIENCE_S: Final = 2.0
"""How long a report waits for the log before it goes without one."""

_log = logs.get("logs")


def read(path: Path, offset: int, limit: int, *, ended: bool) -> Part | None:
    """What stands in a log from *offset* on, at most *limit* bytes; None when there is no such log.

    Args:
        ended: nobody prints into it any more.
    """
    file = _opened(path)
    if file is None:
        return None
    try:
        size = os.fstat(file).st_size
        data = os.pread(file, limit, offset) if offset < size else b""
    finally:
        os.close(file)
    return as_text(data, rest=max(0, size - offset - len(data)), ended=ended)


def size(path: Path) -> int:
    """Bytes in a log; 0 when there is none."""
    file = _opened(path)
    if file is None:
        return 0
    try:
        return os.fstat(file).st_size
    finally:
        os.close(file)


def tail(path: Path, at_most: int) -> int:
    """Where the last lines of a log begin, which are *at_most* so many bytes."""
    file = _opened(path)
    if file is None:
        return 0
    try:
        start = max(0, os.fstat(file).st_size - at_most)
        cut = os.pread(file, at_most, start).find(b"\n") + 1 if start else 0
    finally:
        os.close(file)
    return start + cut


async def keep(put: Put, path: Path) -> ObjectRef | None:
    """Puts the end of a log into the object store, and gives the reference; None when nothing was printed, or it
    cannot be kept."""
    file = _opened(path)
    if file is None:
        return None
    try:
        size = os.fstat(file).st_size
        if size == 0:
            return None
        skipped = max(0, size - KEPT_BYTES_MAX)
        data = os.pread(file, KEPT_BYTES_MAX, skipped)
    finally:
        os.close(file)
    try:
        ref = await upload(put, data, patience_s=PATIENCE_S)
    except (ObjectError, BusError) as error:
        _log.warning("a log is kept on this machine only", log=str(path), reason=str(error))
        return None
    return replace(ref, skipped=skipped)


def _opened(path: Path) -> int | None:
    """A descriptor of a plain file. What an executor may have put in its place is not followed, and not waited for."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None
