"""Numbers that come with a peer's writes, and who waits for one. Each is taken in the order in which it came."""

from __future__ import annotations

from collections import deque
from typing import Final

from computemesh.peer.transport import Done, Outcome

KEPT_MAX: Final = 65536
"""Numbers that nobody has asked for yet."""


class Immediates:
    """Those of one link, which guards them by its own lock."""

    def __init__(self) -> None:
        self._came: deque[int] = deque()
        self._wanted: deque[Done] = deque()

    @property
    def is_full(self) -> bool:
        """Whether one that comes now has no place."""
        return len(self._came) >= KEPT_MAX

    def take(self) -> Outcome | None:
        """The first that came and was not taken; None if there is none."""
        return Outcome(imm=self._came.popleft()) if self._came else None

    def wait(self, done: Done) -> None:
        """`done` is to be told of one that comes."""
        self._wanted.append(done)

    def come(self, imm: int) -> Done | None:
        """Who is to be told of it; None: it is kept."""
        if self._wanted:
            return self._wanted.popleft()
        self._came.append(imm)
        return None

    def withdraw(self, done: Done) -> bool:
        """`done` waits no longer; False if it does not wait."""
        try:
            self._wanted.remove(done)
        except ValueError:
            return False
        return True

    def give_back(self, imm: int) -> Done | None:
        """One that was taken comes again, before all that came later. Who is to be told of it; None: it is kept."""
        if self._wanted:
            return self._wanted.popleft()
        self._came.appendleft(imm)
        return None

    def drop(self) -> list[Done]:
        """Forgets all; who waits in vain."""
        waiting = list(self._wanted)
        self._wanted.clear()
        self._came.clear()
        return waiting
