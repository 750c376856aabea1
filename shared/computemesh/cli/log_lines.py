"""Lines of logs: what stands in one, which come last, and how people see them. Pure."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice, takewhile
from typing import Any, Final

import msgspec

from computemesh.cli.common import one_line

LEVELS: Final[Mapping[str, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

COLOURS: Final[Mapping[str, str]] = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "bold red"}

_HIDDEN: Final = frozenset({"event", "service", "level", "at", "part", "span_id"})
"""Fields that a line shows otherwise, or not at all."""

# [2251] 2026/11/21 16:54:11.450623 [INF] Starting nats-server
_SERVER_LINE: Final = re.compile(r"\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+) \[(\w+)\] (.*)", re.DOTALL)
_SERVER_LEVELS: Final = {"TRC": "debug", "DBG": "debug", "WRN": "warning", "ERR": "error", "FTL": "critical"}

Piece = tuple[str, str]
"""A piece of a line, and its style."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a log: a line, with those that belong to it, such as a traceback."""

    source: str
    at: float = 0.0
    """Unix seconds; 0 when it does not say."""
    level: str = "info"
    event: str = ""
    fields: Mapping[str, Any]
    """All that stands in it, by name."""
    more: tuple[str, ...] = ()
    """Lines that follow it and say nothing of themselves."""


def parse(source: str, line: str) -> Entry | None:
    """The entry that begins with *line*; None when the line belongs to the one before."""
    if line.startswith("{"):
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            at = datetime.fromisoformat(str(fields["at"])).timestamp()
        except (ValueError, KeyError, RecursionError):
            return None
        level = str(fields.get("level", "info"))
        return Entry(source=source, at=at, level=level, event=str(fields.get("event", "")), fields=fields)
    if found := _SERVER_LINE.match(line):
        try:
            at = datetime.strptime(found[1], "%Y/%m/%d %H:%M:%S.%f").timestamp()  # noqa: DTZ007  # local time, as logged
        except (ValueError, OverflowError):
            return None
        level = _SERVER_LEVELS.get(found[2], "info")
        when = datetime.fromtimestamp(at).astimezone().isoformat()
        fields = {"service": source, "level": level, "event": found[3].strip(), "at": when}
        return Entry(source=source, at=at, level=level, event=fields["event"], fields=fields)
    return None


def newest_first(source: str, lines: Iterable[str]) -> Iterator[Entry]:
    """The entries of a log.

    Args:
        lines: the last one first.
    """
    behind: list[str] = []
    for line in lines:
        entry = parse(source, line)
        if entry is None:
            behind.append(line)
            continue
        yield replace(entry, more=tuple(reversed(behind))) if behind else entry
        behind = []
    if behind:
        first, *rest = reversed(behind)
        yield Entry(source=source, event=first, fields={"service": source, "event": first}, more=tuple(rest))


def oldest_first(source: str, lines: Iterable[str], before: Entry | None) -> Iterator[Entry]:
    """The entries of lines that were written lately.

    Args:
        before: the entry to which the first lines may belong; they become entries of its time and level.
    """
    for line in lines:
        entry = parse(source, line)
        if entry is None:
            at, level = (before.at, before.level) if before else (0.0, "info")
            fields = {"service": source, "level": level, "event": line}
            yield Entry(source=source, at=at, level=level, event=line, fields=fields)
        else:
            before = entry
            yield entry


def wanted(entry: Entry, *, level: str, since: float) -> bool:
    """Whether an entry is at least of a level, and not older than a time."""
    return LEVELS.get(entry.level, 20) >= LEVELS[level] and entry.at >= since


def last(logs: Sequence[Iterator[Entry]], count: int | None, *, level: str, since: float) -> list[Entry]:
    """The last entries of all logs together, in the order of their time.

    Args:
        logs: each with its newest entry first.
        count: how many; None for all.
    """
    recent = [takewhile(lambda entry: entry.at >= since, log) for log in logs]
    merged = heapq.merge(*recent, key=lambda entry: entry.at, reverse=True)
    found = list(islice((entry for entry in merged if wanted(entry, level=level, since=since)), count))
    return found[::-1]


def as_json(entry: Entry) -> bytes:
    """One line for programs: the fields as they were logged, whatever wrote them."""
    more = {"more": entry.more} if entry.more else {}
    return msgspec.json.encode({**entry.fields, "source": entry.source, **more})


def as_text(entry: Entry, *, now: float, width: int = 0, colour: str = "") -> list[Piece]:
    """A line for people: when, who, how bad, what, and the fields.

    Args:
        width: of the name of the source, which is left out when it is 0.
        colour: of that name.
    """
    line: list[Piece] = [(f"{clock(entry.at, now):12} ", "dim")]
    if width:
        line.append((f"{one_line(entry.source):{width}} ", colour))
    style = COLOURS.get(entry.level, "")
    if entry.level != "info":
        line.append((f"{entry.level.upper()} ", style))
    line.append((one_line(entry.event), style))
    rest = [(name, value) for name, value in entry.fields.items() if name not in _HIDDEN]
    for number, (name, value) in enumerate(rest):
        line += [(f"{' ' if number else '  '}{one_line(name)}=", "dim"), (one_line(str(value)), "")]
    for text in entry.more:
        line.append((f"\n    {one_line(text)}", style or "dim"))
    return line


def clock(at: float, now: float) -> str:
    """A time of day, with the day when that is not today; empty when there is none."""
    if not at:
        return ""
    here, today = time.localtime(at), time.localtime(now)
    form = "%H:%M:%S" if here[:3] == today[:3] else "%Y-%m-%d %H:%M:%S"
    return f"{time.strftime(form, here)}.{int(at * 1000) % 1000:03}"
