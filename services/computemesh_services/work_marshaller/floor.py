"""How far the inbox is reflected in the bucket. Pure.

Messages are opened in the order of their sequence and closed in any order, when what follows from them is
stored. Everything below the floor is safe, so a reader that starts there misses nothing.
"""

from __future__ import annotations

from collections import deque


class Floor:
    def __init__(self, next_seq: int) -> None:
        self._open: deque[int] = deque()
        self._closed: set[int] = set()
        self._next = next_seq

    def start(self, next_seq: int) -> None:
        """Nothing below *next_seq* will be opened."""
        self._next = next_seq

    def open(self, seq: int) -> None:
        self._open.append(seq)
        self._next = seq + 1

    def close(self, seq: int) -> None:
        self._closed.add(seq)
        while self._open and self._open[0] in self._closed:
            self._closed.remove(self._open.popleft())

    @property
    def seq(self) -> int:
        """The lowest sequence that a reader must see again after a crash."""
        return self._open[0] if self._open else self._next
