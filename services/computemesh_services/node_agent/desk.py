"""What a node has taken on, and whether it takes more. Pure.

An assignment may arrive twice, late, or for an attempt that was overtaken. The answer never depends on how
often it was asked: an attempt that runs or ran here is accepted again without starting again.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import Final

from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.contracts.work import Assignment
from computemesh_services.node_agent.room import shortage

FINISHED_MAX: Final = 10_000
"""Attempts a node remembers to have finished."""


Key = tuple[str, int]
"""A replica of an item: the item's id, and the number of the replica."""


class Verdict(Enum):
    START = "start"
    KNOWN = "known"
    """It runs, or ran, already."""
    DECLINE = "decline"


class Desk:
    """Attempts in hand and attempts done."""

    def __init__(self, node_id: str, slots: int) -> None:
        self.node_id = node_id
        self.slots = slots
        self.accepting = True
        self.running: dict[Key, Assignment] = {}
        self._reporting: set[tuple[str, int, int]] = set()
        """Attempts that run no more, of which the report is on its way: work id, attempt, replica."""
        self._finished: OrderedDict[tuple[str, int, int], None] = OrderedDict()

    def judge(self, asked: Assignment, offered: frozenset[str], node: NodeAnnouncement) -> tuple[Verdict, str]:
        """What to do with an assignment, and the reason of a refusal.

        Args:
            offered: work types this node runs.
            node: what there is of this machine for work.
        """
        if asked.node_id != self.node_id:
            return Verdict.DECLINE, f"this is node {self.node_id}, the assignment is for {asked.node_id}"
        running = self.running.get((asked.work_id, asked.replica))
        if (running and running.attempt == asked.attempt) or _attempt(asked) in self._finished:
            return Verdict.KNOWN, ""
        same = [other for other in self.running.values() if other.work_id == asked.work_id]
        if newer := max((other.attempt for other in same if other.attempt > asked.attempt), default=0):
            return Verdict.DECLINE, f"attempt {newer} runs here already"
        if not self.accepting:
            return Verdict.DECLINE, "draining"
        if asked.work_type not in offered:
            return Verdict.DECLINE, f"runs no {asked.work_type!r}, but {', '.join(sorted(offered)) or 'nothing'}"
        # What an older attempt at the same item has is free once that one is ended, and what is only reported is free
        # already: the next assignment may come before the answer to the report.
        others = [
            other
            for other in self.running.values()
            if not _overtakes(asked, other) and _attempt(other) not in self._reporting
        ]
        if len(others) >= self.slots:
            return Verdict.DECLINE, f"busy: {len(others)} of {self.slots} slots taken"
        if reason := shortage(asked, others, node):
            return Verdict.DECLINE, reason
        return Verdict.START, ""

    def started(self, asked: Assignment) -> list[Assignment]:
        """Takes it in hand. Gives what runs here of older attempts at the same item: it is to be ended."""
        older = [other for other in self.running.values() if _overtakes(asked, other)]
        for other in older:
            del self.running[other.work_id, other.replica]
        self.running[asked.work_id, asked.replica] = asked
        return older

    def reporting(self, asked: Assignment) -> None:
        """Nothing of the attempt runs any more; it is in hand until its report is stored."""
        self._reporting.add(_attempt(asked))

    def ended(self, asked: Assignment) -> None:
        """The attempt is over and its report is stored, or no longer wanted."""
        self._reporting.discard(_attempt(asked))
        key = (asked.work_id, asked.replica)
        if (running := self.running.get(key)) and running.attempt == asked.attempt:
            del self.running[key]
        self._finished[_attempt(asked)] = None
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)


def _attempt(asked: Assignment) -> tuple[str, int, int]:
    return asked.work_id, asked.attempt, asked.replica


def _overtakes(asked: Assignment, other: Assignment) -> bool:
    return other.work_id == asked.work_id and other.attempt < asked.attempt
