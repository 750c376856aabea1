"""Descriptors of memory: what is behind them, and the same again with fewer rights."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from typing import Final

EPOCHS_BYTES_MAX: Final = 16 * 1024 * 1024


def size_of(fd: int) -> int:
    """Bytes of the object behind a descriptor; -1 when it is no memory object or file."""
    found = os.fstat(fd)
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def again(fd: int, *, writable: bool) -> int:
    """The same object by another descriptor, which can write only if it may.

    Raises:
        OSError: there are no descriptors left.
    """
    return os.dup(fd) if writable else os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def zero(fd: int) -> None:
    """Writes zeros over a page of epochs, if it is one that can be written."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, bytes(min(size_of(fd), EPOCHS_BYTES_MAX)), 0)


def allow_descriptors() -> None:
    """As many descriptors as the system lets this process have; each region of shared memory takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
