"""Logs of services: what a line says, which entries come last, and files that are rotated while they are read.

Method: files are written by the handler that the supervisor writes them with, and rotated by it.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from computemesh.cli import log_files, log_lines
from computemesh.cli.log_files import LogFile
from computemesh.cli.log_lines import Entry, as_json, as_text, newest_first, oldest_first, parse

NOON = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))


def line(event: str, second: float = 0.0, **fields: Any) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(NOON + second)) + f".{int(second * 1000) % 1000:03}Z"
    return json.dumps({"event": event, "level": "info", "service": "s", "at": at, **fields})


def text(entry: Entry, **more: Any) -> str:
    return "".join(piece for piece, _ in as_text(entry, now=NOON, **more))


def entries(source: str, *lines: str) -> Iterator[Entry]:
    return newest_first(source, reversed(lines))


def events(found: list[Entry]) -> list[str]:
    return [entry.event for entry in found]


# --- one line ----------------------------------------------------------------------------------------------------


def test_a_line_of_a_service_is_time_level_event_and_fields() -> None:
    """What every line has stands in front, and what it has of its own behind."""
    entry = parse("gateway", line("stored", 1.5, level="warning", part="x", items=3))
    assert entry is not None
    assert (entry.at, entry.level, entry.event) == (NOON + 1.5, "warning", "stored")
    assert text(entry) == "12:00:01.500 WARNING stored  items=3"
    assert text(entry, width=10) == "12:00:01.500 gateway    WARNING stored  items=3"


def test_a_line_of_the_server_is_read_as_one_of_ours() -> None:
    """Its time is local, its levels are three letters."""
    entry = parse(
        "nats-server", "[2251] 2026/11/21 12:00:02.250000 [ERR] 127.0.0.1:1 - cid:3 - Authorization Violation"
    )
    assert entry is not None
    assert (entry.at, entry.level) == (NOON + 2.25, "error")
    assert entry.event.endswith("Authorization Violation")
    told = json.loads(as_json(entry))
    assert (told["service"], told["level"], told["source"]) == ("nats-server", "error", "nats-server")


@pytest.mark.parametrize(
    "words",
    ["Traceback (most recent call last):", "", "{", '{"event": "x"}', '{"at": 5}', "[1] 2026/99/99 [INF] x", "[" * 99],
)
def test_what_says_nothing_of_itself_belongs_to_the_line_before(words: str) -> None:
    """And what was printed before any line is an entry without a time."""
    assert parse("s", words) is None
    (entry,) = entries("s", line("failed"), words, "  more")
    assert (entry.event, entry.more) == ("failed", (words, "  more"))
    first, second = entries("s", words, line("begun"))
    assert (first.event, second.at, second.event) == ("begun", 0.0, words)
    (lonely,) = oldest_first("s", [words], entry)
    assert (lonely.at, lonely.level, lonely.event) == (entry.at, entry.level, words)


def test_nothing_that_was_logged_can_steer_the_terminal() -> None:
    """Neither by an event nor by a field, its name, or a line behind."""
    spoilt = "a\x1b[2Jb\nc\x9b"
    for entry in (parse("s", line(spoilt, 0.0, **{spoilt: spoilt})), next(entries("s", line("x"), spoilt))):
        assert entry is not None
        shown = text(entry)
        assert "\x1b" not in shown
        assert "\x9b" not in shown
        assert len(shown.splitlines()) == 1 + len(entry.more)


def test_the_day_is_told_when_it_is_not_today() -> None:
    """A time alone would be taken for one of today."""
    assert log_lines.clock(NOON + 0.5, NOON) == "12:00:00.500"
    assert log_lines.clock(NOON, NOON + 86_400) == "2026-11-21 12:00:00.000"
    assert log_lines.clock(0.0, NOON) == ""


# --- which ones --------------------------------------------------------------------------------------------------


def test_the_last_entries_of_all_logs_come_in_the_order_of_their_time() -> None:
    """Whoever wrote them, and however many."""

    def logs() -> list[Iterator[Entry]]:
        return [
            entries("a", line("a1", 1), line("a2", 3), line("a3", 5, level="error")),
            entries("b", line("b1", 2, level="warning"), "  trace", line("b2", 4)),
        ]

    everything = log_lines.last(logs(), None, level="debug", since=0.0)
    assert events(everything) == ["a1", "b1", "a2", "b2", "a3"]
    assert everything[1].more == ("  trace",)
    assert events(log_lines.last(logs(), 2, level="debug", since=0.0)) == ["b2", "a3"]
    assert events(log_lines.last(logs(), 2, level="warning", since=0.0)) == ["b1", "a3"]
    assert events(log_lines.last(logs(), None, level="debug", since=NOON + 3)) == ["a2", "b2", "a3"]
    assert log_lines.last(logs(), 0, level="debug", since=0.0) == []


# --- files that grow ---------------------------------------------------------------------------------------------


class Writer:
    """Writes a log as the supervisor does, in small files."""

    def __init__(self, path: Path, files: int = 3, bytes_max: int = 200) -> None:
        self._handler = logging.handlers.RotatingFileHandler(path, maxBytes=bytes_max, backupCount=files)

    def write(self, *lines: str) -> None:
        for text in lines:
            self._handler.emit(logging.makeLogRecord({"msg": text}))


def test_the_lines_before_are_read_backwards_through_rotated_files(tmp_path: Path) -> None:
    """As far as they are kept."""
    writer = Writer(tmp_path / "s.log", files=2)
    lines = [f"line {number:03} {'x' * (number % 7)}" for number in range(100)]
    writer.write(*lines)
    assert len(list(tmp_path.iterdir())) == 3
    found = list(LogFile(tmp_path / "s.log").before())
    assert len(found) > 20
    assert found == lines[::-1][: len(found)]


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """In the middle of a line, of a character, or at its end; empty lines are lines."""
    monkeypatch.setattr(log_files, "BLOCK_BYTES", block)
    path = tmp_path / "s.log"
    path.write_text("erste\n\nzweite ä€\nhalf")
    log = LogFile(path)
    assert list(log.before()) == ["zweite ä€", "", "erste"]
    with path.open("a") as file:
        file.write(" done\n")
    assert log.after() == ["half done"]


def test_no_line_is_lost_or_shown_twice_however_reading_and_rotation_meet(tmp_path: Path) -> None:
    """Whether much or little was written since the last look, as long as the files are kept."""
    chance = random.Random(7)
    writer = Writer(tmp_path / "s.log", files=9, bytes_max=500)
    lines = [f"{number} " + "y" * chance.randrange(20) for number in range(3000)]
    writer.write(*lines[:100])
    log = LogFile(tmp_path / "s.log")
    writer.write(*lines[100:105])
    before = list(log.before())
    assert before[::-1] == lines[100 - len(before) : 100]
    at, seen = 105, log.after()
    while at < len(lines):
        more = chance.randrange(15)  # No more than one file in between.
        writer.write(*lines[at : at + more])
        seen += log.after()
        at += more
    assert seen == lines[100:]


def test_a_log_that_is_not_there_yet_is_read_from_its_beginning(tmp_path: Path) -> None:
    """And one that was begun anew, too."""
    path = tmp_path / "s.log"
    log = LogFile(path)
    assert (list(log.before()), log.after()) == ([], [])
    path.write_text("one\ntwo")
    assert log.after() == ["one"]
    path.write_text("x\n")
    assert log.after() == ["x"]
    path.unlink()
    assert log.after() == []
    path.write_text("back\n")
    assert log.after() == ["back"]
    log.close()
