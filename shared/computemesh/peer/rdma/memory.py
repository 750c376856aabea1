"""Memory that interfaces may use, and who is using it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from computemesh.peer.rdma.verbs import Memory
from computemesh.peer.transport import LocalRegion


@dataclass(slots=True, eq=False)
class Exposed:
    """A region that is registered with interfaces."""

    number: int
    """Its name towards peers. No other region of this process ever has it."""
    memories: dict[str, Memory]
    """By the name of the interface."""
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _users: int = 0
    _ended: bool = False

    def take(self) -> bool:
        """Counts one that uses it; False if it is no more."""
        with self._lock:
            self._users += not self._ended
            return not self._ended

    def give_back(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._lock.notify_all()

    def end(self, until: float) -> bool:
        """Nobody may take it any more; waits for those who did, and says whether they have all given it back."""
        with self._lock:
            self._ended = True
            return self._lock.wait_for(lambda: not self._users, max(0.0, until - time.monotonic()))


class Exposures:
    """The regions of this process that peers may reach."""

    def __init__(self) -> None:
        self._regions: dict[LocalRegion, Exposed] = {}

    def add(self, region: LocalRegion, exposed: Exposed) -> None:
        self._regions[region] = exposed

    def held(self, region: LocalRegion) -> Exposed | None:
        return self._regions.get(region)

    def pop(self, region: LocalRegion) -> Exposed | None:
        return self._regions.pop(region, None)

    def drain(self) -> list[Exposed]:
        exposed = list(self._regions.values())
        self._regions.clear()
        return exposed
