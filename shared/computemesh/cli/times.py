"""Times, as people write them."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Final

import click

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_SPAN: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")

SECONDS_MAX: Final = 100 * 366 * 86_400.0


class Span(click.ParamType[float]):
    """A duration in seconds, written as ``90s``, ``10m``, ``12h``, ``30d`` or ``2w``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        seconds = span(str(value))
        if seconds is None:
            self.fail(f"{value!r} is no duration: write 90s, 10m, 12h or 30d", param, ctx)
        return seconds


class Moment(click.ParamType[float]):
    """A time in Unix seconds: how far from now, as in :class:`Span`, or a date, with or without a time of day.

    Args:
        past: a duration says how long ago, and not how long from now.
    """

    name = "time"

    def __init__(self, *, past: bool = False) -> None:
        self._past = past

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if (seconds := span(str(value))) is not None:
            return time.time() + (-seconds if self._past else seconds)
        try:
            return datetime.fromisoformat(str(value)).timestamp()  # Without a zone it is meant in the local one.
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: write 10m, 12h or 30d, or a date as 2030-01-31T12:00", param, ctx)


def span(text: str) -> float | None:
    """The seconds of a duration; None when it is none."""
    found = _SPAN.fullmatch(text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else None
    return seconds if seconds is not None and seconds <= SECONDS_MAX else None


def date(at: float) -> str:
    """A day and time of day."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
