"""Which items wait for which others. Pure.

An item may only name items that were submitted before it, so nothing can wait for itself, however long the way.
What it still waits for is in its record (`awaits`), so that a restart knows it without reading what ended long ago.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from computemesh.contracts.work import FINAL, WorkError, WorkRecord, WorkState

SHOWN_MAX: Final = 5
"""Items named in a sentence."""


class Dependencies:
    """The items that wait for others, by what they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, None]] = {}
        """By the id of an item, those that wait for it, in the order in which they came."""
        self._unknown: dict[str, None] = {}
        """Items that are waited for and are not in memory."""

    def wait(self, record: WorkRecord) -> None:
        """*record* waits for all that it awaits."""
        for other in record.awaits:
            self._waiting.setdefault(other, {})[record.work_id] = None

    def leave(self, record: WorkRecord) -> None:
        """*record* waits no longer."""
        for other in record.awaits:
            waiting = self._waiting.get(other, {})
            waiting.pop(record.work_id, None)
            if not waiting:
                self._waiting.pop(other, None)

    def waiting_for(self, work_id: str) -> list[str]:
        """Those that wait for an item."""
        return list(self._waiting.get(work_id, ()))

    def ask(self, work_id: str) -> None:
        """An item that is waited for must be looked up."""
        self._unknown[work_id] = None

    def take_unknown(self) -> list[str]:
        """What must be looked up now. Each is given once."""
        unknown = [work_id for work_id in self._unknown if work_id in self._waiting]
        self._unknown.clear()
        return unknown


def verdict(record: WorkRecord, work_id: str, other: WorkRecord | None) -> WorkError | bool:
    """What *other*, awaited by *record* as *work_id*, means for it: True = go on without it, False = wait.

    Args:
        other: None when there is no such item.
    """
    if other is None:
        return _unmet(f"there is no item {work_id}, and it must be submitted first")
    if other.state is WorkState.COMPLETED:
        return True
    if other.state in FINAL:
        why = f": {other.error.reason}" if other.error else ""
        return _unmet(f"{work_id}, which must complete first, is {other.state}{why}")
    if other.inbox_seq >= record.inbox_seq:
        return _unmet(f"{work_id} was submitted later, and must be submitted first")
    return False


def _unmet(reason: str) -> WorkError:
    return WorkError(reason=reason, code="dependency", fault="work")


def waits_for(record: WorkRecord, known: Callable[[str], WorkRecord | None]) -> str:
    """In words, what an item waits for.

    Args:
        known: an item by its id, if it is in memory.
    """
    names = [f"{other} ({found.state})" if (found := known(other)) else other for other in record.awaits[:SHOWN_MAX]]
    more = len(record.awaits) - len(names)
    return "waits until completed: " + ", ".join(names) + (f" and {more} more" if more else "")
