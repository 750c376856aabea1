"""How far a fetch is, how fast, and when to try again. Pure: time is a parameter."""

from __future__ import annotations

from collections import deque
from typing import Final

MARK_S: Final = 0.5
"""Between two marks, at least."""
MARKS: Final = 20
"""The rate is that of the last ten seconds."""

PAUSE_S: Final = 2.0
"""Before the second try; doubles each time."""
PAUSE_S_MAX: Final = 600.0
LASTING_PAUSE_S: Final = 300.0
"""The same, for what will hardly go away by itself."""
LASTING_PAUSE_S_MAX: Final = 6 * 3600.0


class Meter:
    """Bytes that have come, of how many."""

    def __init__(self) -> None:
        self.done: int = 0
        self.total: int = 0
        self._marks = deque[tuple[float, int]](maxlen=MARKS)

    def note(self, done: int, total: int, now_s: float) -> None:
        if done < self.done or total != self.total:
            self._marks.clear()
        self.done, self.total = done, total
        if not self._marks or now_s - self._marks[-1][0] >= MARK_S:
            self._marks.append((now_s, done))

    def bytes_per_s(self, now_s: float) -> float | None:
        """Lately; None until that can be told."""
        marks = list(self._marks)  # The thread that fetches adds to them meanwhile.
        if not marks or now_s - marks[0][0] < MARK_S:
            return None
        return max(0.0, (self.done - marks[0][1]) / (now_s - marks[0][0]))

    def said(self, now_s: float) -> str:
        """Such as ``1.2 of 4.6 GiB (26 %), 35 MiB/s, about 99 s left``."""
        if not self.total:
            return "it has just begun"
        unit, name = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        text = f"{self.done / unit:.1f} of {self.total / unit:.1f} {name} ({100 * self.done // self.total} %)"
        rate = self.bytes_per_s(now_s)
        if not rate:
            return text
        return f"{text}, {rate / 2**20:.1f} MiB/s, about {(self.total - self.done) / rate:.0f} s left"

    def left_s(self, now_s: float) -> float | None:
        """Until all is there, at this rate; None when that cannot be told."""
        rate = self.bytes_per_s(now_s)
        return (self.total - self.done) / rate if rate and self.total else None


def pause_s(failures: int, *, lasting: bool, chance: float) -> float:
    """Before the next try after *failures* in a row: doubles up to a bound, half of it by *chance* (0 to 1)."""
    first, most = (LASTING_PAUSE_S, LASTING_PAUSE_S_MAX) if lasting else (PAUSE_S, PAUSE_S_MAX)
    return min(most, first * 2.0 ** min(failures - 1, 30)) * (0.5 + 0.5 * chance)
