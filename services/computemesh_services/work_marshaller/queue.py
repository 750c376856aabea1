"""Who is next of the items that wait. Pure.

Three rules, one after the other:

1. **Priority, with age.** Of several priorities, the one whose oldest item has waited longest goes first; each step
   of priority counts as `step_s` of waiting. So no item of priority *q* passes one of priority *p* < *q* that came
   more than (*q* - *p*) x `step_s` before it, but for the turns of rule 2.
2. **Owners take turns** within a priority. An item is one turn; one with replicas is one for each. Who has not waited
   gets no turns for that time: an owner who comes back begins where the others are.
3. **Order of submission** within a priority and an owner.

An item that fits no node now is in nobody's way: only items that could start are compared.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final

from computemesh.contracts.work import REPLICAS_MAX, WorkRecord
from computemesh_services.work_marshaller.needs import Shape, ShapeKey, shape_key

_NEVER: Final = float("inf")

IDLE_OWNERS: Final = 1000
"""Owners without waiting items whose last turn may be remembered before those are swept."""


class Entry:
    """An item that waits."""

    __slots__ = ("left", "line", "owner", "seq", "submitted_at", "work_id")

    def __init__(self, record: WorkRecord, line: Line) -> None:
        self.work_id: Final = record.work_id
        self.seq: Final = record.inbox_seq
        self.owner: Final = record.owner
        self.submitted_at: Final = record.submitted_at
        self.line: Final = line
        self.left = False
        """It waits no more, and only stands here until it comes to the front."""


class Turns:
    """Whose turn it is within one priority. Turns are counted, not timed; the lowest number is next."""

    __slots__ = ("_next", "_now", "_waiting")

    def __init__(self) -> None:
        self._now = 0.0
        """Where those who come now begin: it grows by one while each owner who waits has a turn."""
        self._next: dict[str, float] = {}
        self._waiting: dict[str, int] = {}

    @property
    def remembered(self) -> int:
        """Owners of whom something is remembered."""
        return len(self._next)

    def of(self, owner: str) -> float:
        """Number of the next turn of an owner with items that wait."""
        return self._next[owner]

    def came(self, owner: str) -> None:
        """An item of *owner* begins to wait."""
        waiting = self._waiting.get(owner, 0)
        if not waiting:
            self._next[owner] = max(self._next.get(owner, 0.0), self._now)
        self._waiting[owner] = waiting + 1

    def left(self, owner: str) -> None:
        """An item of *owner* waits no more."""
        waiting = self._waiting[owner] - 1
        if waiting:
            self._waiting[owner] = waiting
            return
        del self._waiting[owner]
        if not self._waiting:
            self._next.clear()
            self._now = 0.0
        elif len(self._next) > IDLE_OWNERS + 2 * len(self._waiting):
            self._next = {name: turn for name, turn in self._next.items() if name in self._waiting}

    def take(self, owner: str, count: int) -> None:
        """*owner* gets its turn. One whose items could not start for long catches up a little, and not all at once."""
        turn = max(self._next[owner], self._now - REPLICAS_MAX)
        self._next[owner] = turn + count
        self._now = max(self._now + count / len(self._waiting), turn)


class Line:
    """Waiting items of one shape and one priority, by owner."""

    __slots__ = ("_oldest", "_owners", "_pushed", "_turns", "count", "oldest_at", "priority", "turns")

    def __init__(self, priority: int, turns: Turns) -> None:
        self.priority: Final = priority
        self.turns: Final = turns
        self.count = 0
        """Items that wait here; those that left may still stand in the heaps."""
        self.oldest_at: float | None = None
        """What :meth:`oldest` gave, while it holds."""
        self._pushed = 0
        self._owners: dict[str, list[tuple[int, int, Entry]]] = {}
        # What these hold may have changed since; it is put right when it comes to the front.
        self._turns: list[tuple[float, int, str]] = []
        self._oldest: list[tuple[float, str]] = []

    def push(self, entry: Entry) -> None:
        self.count += 1
        self._pushed += 1
        items = self._owners.get(entry.owner)
        if items is None:
            items = self._owners[entry.owner] = []
        heapq.heappush(items, (entry.seq, self._pushed, entry))
        if items[0][2] is entry:
            heapq.heappush(self._turns, (self.turns.of(entry.owner), entry.seq, entry.owner))
            heapq.heappush(self._oldest, (entry.submitted_at, entry.owner))
            self.oldest_at = None

    def oldest(self) -> float:
        """Unix seconds of the submission of the item that waits longest."""
        while True:
            submitted_at, owner = self._oldest[0]
            first = self._first_of(owner)
            if first is None:
                heapq.heappop(self._oldest)
            elif first.submitted_at == submitted_at:
                self.oldest_at = submitted_at
                return submitted_at
            else:
                heapq.heapreplace(self._oldest, (first.submitted_at, owner))

    def first(self) -> tuple[float, int, Entry]:
        """The item whose turn it is: the number of the turn, the item's place in the inbox, and the item."""
        while True:
            turn, seq, owner = self._turns[0]
            first = self._first_of(owner)
            if first is None:
                heapq.heappop(self._turns)
                continue
            now = self.turns.of(owner)
            if now == turn and first.seq == seq:
                return turn, seq, first
            heapq.heapreplace(self._turns, (now, first.seq, owner))

    def _first_of(self, owner: str) -> Entry | None:
        items = self._owners.get(owner)
        if items is None:
            return None
        while items and items[0][2].left:
            heapq.heappop(items)
        if items:
            return items[0][2]
        del self._owners[owner]
        return None


class Backlog:
    """All waiting items of one shape."""

    __slots__ = ("lines", "shape")

    def __init__(self, shape: Shape) -> None:
        self.shape: Final = shape
        self.lines: dict[int, Line] = {}
        """By priority; none is empty."""


class Queue:
    """All items that wait for a node."""

    def __init__(self, *, step_s: float) -> None:
        self._step_s: Final = step_s
        self._entries: dict[str, tuple[Backlog, Entry]] = {}
        self._backlogs: dict[ShapeKey, Backlog] = {}
        self._open: dict[Backlog, None] = {}
        """Those of items that name no nodes."""
        self._named: dict[str, dict[Backlog, None]] = {}
        """The others, by the nodes they name."""
        self._turns: dict[int, Turns] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, work_id: str) -> bool:
        return work_id in self._entries

    def __iter__(self) -> Iterator[Backlog]:
        return iter(self._backlogs.values())

    def push(self, record: WorkRecord, owner: str | None = None) -> tuple[Backlog, bool]:
        """An item begins to wait. Gives the items it waits with, and whether it is the first of them.

        Args:
            owner: it waits only with others of this owner.
        """
        key = shape_key(record, owner)
        backlog = self._backlogs.get(key)
        is_new = backlog is None
        if backlog is None:
            backlog = self._add(Shape(record, key))
        line = backlog.lines.get(record.priority)
        if line is None:
            turns = self._turns.get(record.priority)
            if turns is None:
                turns = self._turns[record.priority] = Turns()
            line = backlog.lines[record.priority] = Line(record.priority, turns)
        entry = Entry(record, line)
        line.turns.came(entry.owner)
        line.push(entry)
        self._entries[entry.work_id] = (backlog, entry)
        return backlog, is_new

    def backlog(self, work_id: str) -> Backlog:
        """Those that an item waits with."""
        return self._entries[work_id][0]

    def drop(self, work_id: str) -> Backlog:
        """An item waits no more. Gives those it waited with."""
        backlog, entry = self._entries.pop(work_id)
        line = entry.line
        entry.left = True
        line.count -= 1
        if entry.submitted_at == line.oldest_at:
            line.oldest_at = None
        line.turns.left(entry.owner)
        if not line.count:
            del backlog.lines[line.priority]
            if not backlog.lines:
                self._remove(backlog)
        return backlog

    def _add(self, shape: Shape) -> Backlog:
        backlog = self._backlogs[shape.key] = Backlog(shape)
        if shape.named is None:
            self._open[backlog] = None
        else:
            for node_id in shape.named:
                self._named.setdefault(node_id, {})[backlog] = None
        return backlog

    def _remove(self, backlog: Backlog) -> None:
        del self._backlogs[backlog.shape.key]
        if backlog.shape.named is None:
            del self._open[backlog]
            return
        for node_id in backlog.shape.named:
            del self._named[node_id][backlog]
            if not self._named[node_id]:
                del self._named[node_id]

    def of_node(self, node_id: str) -> Iterator[Backlog]:
        """Every backlog that does not name only other nodes."""
        yield from self._open
        yield from self._named.get(node_id, ())

    def first(self, backlogs: Iterable[Backlog]) -> tuple[Backlog, Entry]:
        """Whose turn it is among the items of *backlogs*, of which there is at least one."""
        lines = [(line, backlog) for backlog in backlogs for line in backlog.lines.values()]
        if len(lines) == 1:
            return lines[0][1], lines[0][0].first()[2]
        priority = self._priority({line.priority for line, _ in lines}, lines)
        best: tuple[float, int] | None = None
        chosen: tuple[Backlog, Entry] | None = None
        for line, backlog in lines:
            if line.priority == priority:
                turn, seq, entry = line.first()
                if best is None or (turn, seq) < best:
                    best, chosen = (turn, seq), (backlog, entry)
        assert chosen is not None
        return chosen

    def _priority(self, priorities: AbstractSet[int], lines: Iterable[tuple[Line, Backlog]]) -> int:
        """The priority whose turn it is."""
        if len(priorities) == 1:
            return next(iter(priorities))
        oldest: dict[int, float] = {}
        for line, _ in lines:
            oldest_at = line.oldest() if line.oldest_at is None else line.oldest_at
            if oldest_at < oldest.get(line.priority, _NEVER):
                oldest[line.priority] = oldest_at
        return min(oldest, key=lambda priority: (oldest[priority] - priority * self._step_s, -priority))

    def charge(self, entry: Entry, turns: int) -> None:
        """The item goes to a node: so many turns of its owner are used."""
        entry.line.turns.take(entry.owner, turns)
