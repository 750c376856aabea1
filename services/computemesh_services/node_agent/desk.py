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
        self.running: dict[str, Assignment] = {}
        """By work id."""
        self._finished: OrderedDict[tuple[str, int], None] = OrderedDict()

    def judge(self, asked: Assignment, offered: frozenset[str], node: NodeAnnouncement) -> tuple[Verdict, str]:
        """What to do with an assignment, and the reason of a refusal.

        Args:
            offered: work types this node runs.
            node: what there is of this machine for work.
        """
        if asked.node_id != self.node_id:
            return Verdict.DECLINE, f"this is node {self.node_id}, the assignment is for {asked.node_id}"
        key = (asked.work_id, asked.attempt)
        running = self.running.get(asked.work_id)
        if (running and running.attempt == asked.attempt) or key in self._finished:
            return Verdict.KNOWN, ""
        if running and running.attempt > asked.attempt:
            return Verdict.DECLINE, f"attempt {running.attempt} runs here already"
        if not self.accepting:
            return Verdict.DECLINE, "draining"
        if asked.work_type not in offered:
            return Verdict.DECLINE, f"runs no {asked.work_type!r}, but {', '.join(sorted(offered)) or 'nothing'}"
        if running is None and len(self.running) >= self.slots:
            return Verdict.DECLINE, f"busy: {len(self.running)} of {self.slots} slots taken"
        # What an older attempt at the same item has is free once that one is ended.
        others = [other for other in self.running.values() if other is not running]
        if reason := shortage(asked, others, node):
            return Verdict.DECLINE, reason
        return Verdict.START, ""

    def started(self, asked: Assignment) -> Assignment | None:
        """Takes it in hand. Gives the older attempt at the same item that runs here, if one does: it is to be ended."""
        older = self.running.get(asked.work_id)
        self.running[asked.work_id] = asked
        return older

    def ended(self, work_id: str, attempt: int) -> None:
        """The attempt is over and its report is stored, or no longer wanted."""
        if (running := self.running.get(work_id)) and running.attempt == attempt:
            del self.running[work_id]
        self._finished[work_id, attempt] = None
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)
