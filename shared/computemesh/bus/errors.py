"""What can go wrong between a service and the bus.

BusError
├── Unreachable      no server answers
│   └── NotAdmitted  it answers, and refuses the credentials
├── NoResponder      nobody serves that subject now
├── TimedOut         asked, and not answered in time: it may have happened or not
├── Conflict         the record changed under the writer (compare-and-set lost)
└── NotStored        the server refused to store: full, too large, unknown stream
"""

from __future__ import annotations

from typing import Final

NO_ROOM: Final = frozenset({10023, 10047, 10077})
"""The server's codes for a stream, an account or a disk that is full."""


class BusError(Exception):
    """Base of all bus failures. The message names the subject and what was tried."""


class Unreachable(BusError):
    pass


class NotAdmitted(Unreachable):
    pass


class NoResponder(BusError):
    pass


class TimedOut(BusError):
    pass


class Conflict(BusError):
    pass


class NotStored(BusError):
    def __init__(self, text: str, *, code: int = 0) -> None:
        super().__init__(text)
        self.code = code
        """The server's ``err_code``."""

    @property
    def full(self) -> bool:
        """Whether there was no room for it."""
        return self.code in NO_ROOM
