"""What an examination found: a line that says how one thing is, and what to do about it.

``computemesh doctor`` collects these. A service adds its own with a program named in ``computemesh.cli.services``
that prints them as a JSON list.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, and will not for long, or not for everybody."""
    PROBLEM = "problem"
    SKIPPED = "skipped"
    """It could not be looked at."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """How one thing is."""

    level: Level
    about: str
    """What was looked at: ``home``, ``node-registry``, ``compute-work`` …"""
    text: str
    todo: str = ""
    """What to do; not empty unless all is well."""


def ok(about: str, text: str) -> Finding:
    return Finding(level=Level.OK, about=about, text=text)


def warning(about: str, text: str, todo: str) -> Finding:
    return Finding(level=Level.WARNING, about=about, text=text, todo=todo)


def problem(about: str, text: str, todo: str) -> Finding:
    return Finding(level=Level.PROBLEM, about=about, text=text, todo=todo)


def skipped(about: str, text: str) -> Finding:
    return Finding(level=Level.SKIPPED, about=about, text=text)


encode: Final = msgspec.json.Encoder().encode
