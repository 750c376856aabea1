"""What goes wrong between peers, as programs see it."""

from __future__ import annotations

from numbers import Real
from typing import Final

from computemesh.contracts.base import Refused
from computemesh.peer.transport import (
    CANCELLED,
    LINK_LOST,
    NO_REGION,
    NO_WAY,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    TIMED_OUT,
    TOO_LARGE,
)

__all__ = [
    "ALIAS_TAKEN",
    "BAD_CHECKSUM",
    "BAD_MESSAGE",
    "CANCELLED",
    "CLOSED",
    "CROSSED",
    "FORKED",
    "LINK_LOST",
    "NOT_CONNECTED",
    "NOT_FOUND",
    "NO_AGENT",
    "NO_REGION",
    "NO_WAY",
    "OTHER_MESH",
    "OUT_OF_RANGE",
    "READ_ONLY",
    "STALE_EPOCH",
    "TIMED_OUT",
    "TOO_LARGE",
    "UNAVAILABLE",
    "PeerError",
    "outcome_of",
]

ALIAS_TAKEN: Final = "alias_taken"
BAD_CHECKSUM: Final = "bad_checksum"
BAD_MESSAGE: Final = "bad_message"
CLOSED: Final = "closed"
CROSSED: Final = "crossed"
NOT_CONNECTED: Final = "not_connected"
NOT_FOUND: Final = "not_found"
"""No peer of that alias is in the scope."""
NO_AGENT: Final = "no_agent"
OTHER_MESH: Final = "other_mesh"
UNAVAILABLE: Final = "unavailable"

FORKED: Final = "this process is a fork of the one that is the peer; it needs its own agent"
"""A reason, with `closed`."""


_CODES: Final = {
    ALIAS_TAKEN,
    BAD_CHECKSUM,
    BAD_MESSAGE,
    CANCELLED,
    CLOSED,
    CROSSED,
    LINK_LOST,
    NOT_CONNECTED,
    NOT_FOUND,
    NO_AGENT,
    NO_REGION,
    NO_WAY,
    OTHER_MESH,
    OUT_OF_RANGE,
    READ_ONLY,
    STALE_EPOCH,
    TIMED_OUT,
    TOO_LARGE,
    UNAVAILABLE,
    "conflict",
    "failed",
    "full",
    "io_error",
    "no_link",
    "no_peer",
    "not_hosted",
    "not_yours",
    "refused",
    "too_many_requests",
}


def outcome_of(code: str) -> str:
    """A code as it is counted. Processes say what they like, and each new word would be a series for ever."""
    return code if code in _CODES else "other"


class PeerError(RuntimeError):
    """A peer, its memory, or the way to it is not as was asked for.

    Attributes:
        code: machine-readable, one of this module's constants or a transport's own.
        reason: one sentence for a person.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    @classmethod
    def of(cls, refused: Refused) -> PeerError:
        """What a refusal says, naming the field at fault: of what was asked, not of the frame it came in."""
        field = refused.field.removeprefix("ask.")
        return cls(refused.code, f"{field}: {refused.reason}" if field else refused.reason)


def check_timeout(timeout: object) -> None:
    """Raises TypeError if it is neither seconds nor None."""
    if timeout is not None and not isinstance(timeout, Real):
        raise TypeError(f"timeout: seconds are wanted, not {type(timeout).__name__}")
