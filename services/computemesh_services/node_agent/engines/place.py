"""What the pool of engines gives, and what it says instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

EngineCode = Literal["unknown_model", "too_many_requests", "unavailable", "no_engine", "engine_failed"]

STATUS: Final[dict[EngineCode, int]] = {
    "unknown_model": 404,
    "too_many_requests": 429,
    "unavailable": 503,
    "no_engine": 503,
    "engine_failed": 503,
}
"""The HTTP status that says the same."""


class EngineError(Exception):
    """No engine for this model, now.

    Args:
        code: ``unknown_model``; ``too_many_requests``: each device that could serve it has all it takes;
            ``unavailable``: it does not serve in time; ``no_engine``: nothing installed; ``engine_failed``.
        retry_after_s: seconds after which it is worth asking again; None when nobody can tell.
    """

    def __init__(self, reason: str, *, code: EngineCode = "engine_failed", retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code: EngineCode = code
        self.status = STATUS[code]
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place for one request on an engine."""

    base_url: str
    """Such as ``http://127.0.0.1:40001``; OpenAI paths start with ``/v1`` below it."""
    model: str
    """The name to send as ``model``."""
    device: str
    """The device it runs on, as in ``EngineCard``."""
