"""The newest revision of each scope, in bounded memory. Pure."""

from __future__ import annotations

from typing import Final

SCOPES_MAX: Final = 100_000
"""Scopes of which the newest revision is remembered."""


class Newest:
    """Knows it of the scopes that changed last. That of any other is not above the floor.

    Args:
        floor: no revision that matters is below this.
    """

    def __init__(self, floor: int = 0) -> None:
        self._floor = floor
        self._of: dict[str, int] = {}
        """In the order of their changes."""

    def of(self, scope: str) -> int:
        """The newest revision of a scope, or one that is not older."""
        return self._of.get(scope, self._floor)

    def note(self, scope: str, revision: int) -> bool:
        """Takes a revision over, and says whether it is the newest of its scope."""
        known = self._of.pop(scope, 0)
        self._of[scope] = max(known, revision)
        if len(self._of) > SCOPES_MAX:
            self.raise_floor(self._of.pop(next(iter(self._of))))
        return revision > known

    def raise_floor(self, floor: int) -> None:
        """What came up to *floor* may be forgotten."""
        self._floor = max(self._floor, floor)
