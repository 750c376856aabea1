"""What a node has taken on, and whether it takes more. Pure.

An assignment may arrive twice, late, or for an attempt that was overtaken. The answer never depends on how
often it was asked: an attempt that runs or ran here is accepted again without starting again.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import Final

from computemesh.contracts.work import Assignment

FINISHED_MAX: Final = 10_000
"""Attempts a node remembers to have finished."""


class Verdict(Enum):
    START = "start"
    REPLACE = "replace"
    """Start it, and end the older attempt at the same item that runs here."""
    KNOWN = "known"
    """It runs, or ran, already."""
    DECLINE = "decline"


class Desk:
    """Attempts in hand and attempts done."""

    def __init__(self, node_id: str, slots: int) -> None:
        self.node_id = node_id
        self.slots = slots
        self.accepting = True
        self.running: dict[str, int] = {}
        """Attempt by work id."""
        self._finished: OrderedDict[tuple[str, int], None] = OrderedDict()

    def judge(self, asked: Assignment, offered: frozenset[str]) -> tuple[Verdict, str]:
        """What to do with an assignment, and the reason of a refusal.

        Args:
            offered: work types this node runs.
        """
        if asked.node_id != self.node_id:
            return Verdict.DECLINE, f"this is node {self.node_id}, the assignment is for {asked.node_id}"
        key = (asked.work_id, asked.attempt)
        running = self.running.get(asked.work_id)
        if running == asked.attempt or key in self._finished:
            return Verdict.KNOWN, ""
        if running is not None and running > asked.attempt:
            return Verdict.DECLINE, f"attempt {running} runs here already"
        if not self.accepting:
            return Verdict.DECLINE, "draining"
        if asked.work_type not in offered:
            return Verdict.DECLINE, f"runs no {asked.work_type!r}, but {', '.join(sorted(offered)) or 'nothing'}"
        if running is not None:
            return Verdict.REPLACE, ""
        if len(self.running) >= self.slots:
            return Verdict.DECLINE, f"busy: {len(self.running)} of {self.slots} slots taken"
        return Verdict.START, ""

    def started(self, work_id: str, attempt: int) -> None:
        self.running[work_id] = attempt

    def ended(self, work_id: str, attempt: int) -> None:
        """The attempt is over and its report is stored, or no longer wanted."""
        if self.running.get(work_id) == attempt:
            del self.running[work_id]
        self._finished[work_id, attempt] = None
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)
