"""The processes that hold GPU memory: their names, and the reservations they were started under."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from computemesh.ids import is_token

PROC: Final = Path("/proc")

VARIABLE: Final = b"COMPUTEMESH_RESERVATION_ID="
"""What a process that runs under a GPU reservation has in its environment."""

LISTED_MAX: Final = 1000
"""Processes that are told of one GPU, as the contract bounds it."""


def reservation_of(pid: int, *, proc: Path = PROC) -> str:
    """The reservation that a process was started under; empty when there is none, or when it is not ours to read."""
    try:
        environment = (proc / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    values = (entry[len(VARIABLE) :] for entry in environment.split(b"\0") if entry.startswith(VARIABLE))
    value = next(values, b"").decode("ascii", "replace")
    return value if is_token(value) else ""


def name_of(pid: int, *, proc: Path = PROC) -> str:
    """The name of a process; empty when it has ended."""
    try:
        return short((proc / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return ""


def short(name: str) -> str:
    """A process's name as it fits into a message."""
    return name[:200]
