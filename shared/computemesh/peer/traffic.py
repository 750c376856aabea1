"""Tells the peer-agent what this peer has moved, from time to time and at its end: no byte of it passes there."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from computemesh.contracts.peers import Transport
from computemesh.peer.attachment import Attachment
from computemesh.peer.errors import outcome_of
from computemesh.peer.signals import Moves, Traffic
from computemesh.peer.transfers import Transfers

TELL_S: Final = 10.0


class Teller:
    """Says what has come since it said so last; what the peer-agent did not hear is said with the next."""

    def __init__(self, life: Attachment, transfers: Transfers) -> None:
        self._life = life
        self._transfers = transfers
        self._told = Traffic()
        self._telling = threading.Lock()
        self._over = threading.Event()

    def begin(self) -> None:
        self._life.spawn("traffic", self._run)

    def end(self) -> None:
        """Says the last of it."""
        self._over.set()
        self._tell()

    def _run(self) -> None:
        while not self._over.wait(TELL_S):
            self._tell()

    def _tell(self) -> None:
        with self._telling:
            now = self._now()
            more = since(self._told, now)
            if (more.moved or more.failed) and self._life.signals.report(more):
                self._told = now

    def _now(self) -> Traffic:
        moved: dict[Transport, Moves] = {
            name: Moves(reads=one.reads, writes=one.writes, bytes_read=one.bytes_read, bytes_written=one.bytes_written)
            for name, one in self._transfers.moved.items()
        }
        failed: Counter[str] = Counter()
        for code, count in self._transfers.failed().items():
            failed[outcome_of(code)] += count
        return Traffic(moved=moved, failed=dict(failed))


def since(before: Traffic, now: Traffic) -> Traffic:
    """What has come between two counts of the same peer; without transports and codes of which nothing has."""
    moved: dict[Transport, Moves] = {
        name: _less(count, before.moved.get(name, Moves())) for name, count in now.moved.items()
    }
    failed = {code: count - before.failed.get(code, 0) for code, count in now.failed.items()}
    some: dict[Transport, Moves] = {name: count for name, count in moved.items() if count != Moves()}
    return Traffic(
        moved=some,
        failed={code: count for code, count in failed.items() if count},
    )


def _less(now: Moves, before: Moves) -> Moves:
    return Moves(
        reads=now.reads - before.reads,
        writes=now.writes - before.writes,
        bytes_read=now.bytes_read - before.bytes_read,
        bytes_written=now.bytes_written - before.bytes_written,
    )
