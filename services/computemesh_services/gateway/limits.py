"""How much an API key may ask: requests and tokens a minute, and requests at the same time. Pure: time is a parameter.

A budget holds at most a minute's worth and fills evenly. The tokens of a request are estimated before it runs, and put
right once its engine has counted them; what was spent beyond the budget is owed, and later requests wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from computemesh.contracts.keys import KeyLimits

MINUTE_S: Final = 60.0

PLACE_S: Final = 1.0
"""What somebody is told to wait who has too many requests at the same time; when one ends nobody knows."""

ANSWER_TOKENS: Final = 256
"""Tokens of an answer for which its client set no bound."""

CHARS_PER_TOKEN: Final = 4

_ROUNDING: Final = 1e-6
"""Of a token: what arithmetic may lose on the way."""


def estimate(prompt_chars: int, tokens_max: int | None, answers: int) -> int:
    """Tokens that a request will cost, prompt and answers together, roughly."""
    return -(-prompt_chars // CHARS_PER_TOKEN) + (ANSWER_TOKENS if tokens_max is None else tokens_max) * answers


class Budget:
    """So much a minute. It is full at first, and a minute's worth may be spent at once."""

    __slots__ = ("_at_s", "_left", "per_minute")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at_s = now_s

    def left(self, now_s: float) -> float:
        """What can be spent; negative when more is owed."""
        if now_s > self._at_s:
            self._left = min(self.per_minute, self._left + (now_s - self._at_s) * self.per_minute / MINUTE_S)
            self._at_s = now_s
        return self._left

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until *amount* can be spent, or, for more than it ever holds, until it is full; 0 when it can be now."""
        missing = min(amount, self.per_minute) - self.left(now_s)
        return missing * MINUTE_S / self.per_minute if missing > _ROUNDING else 0.0

    def spend(self, amount: float, now_s: float) -> None:
        """Takes *amount*, whether it is there or not; a negative one is given back."""
        self._left = min(self.per_minute, self.left(now_s) - amount)


@dataclass(frozen=True, kw_only=True)
class Over:
    """A limit is reached."""

    limit: str
    """Which one, as a field of :class:`KeyLimits`."""
    reason: str
    wait_s: float
    """After so long it may be asked again."""


class Booking:
    """A request that was let in."""

    __slots__ = ("estimate", "meter")

    def __init__(self, meter: Meter, tokens: int) -> None:
        self.meter: Meter | None = meter
        self.estimate = tokens

    def end(self, used: int | None, now_s: float) -> None:
        """The request has ended; telling it again changes nothing.

        Args:
            used: tokens that its engine counted; None when it did not tell, and the estimate holds.
        """
        meter, self.meter = self.meter, None
        if meter is not None:
            meter.ended(self.estimate, self.estimate if used is None else used, now_s)


class Meter:
    """What one key has spent of its limits."""

    def __init__(self, limits: KeyLimits, now_s: float) -> None:
        self._limits = limits
        self._requests = Budget(limits.requests_per_minute, now_s) if limits.requests_per_minute else None
        self._tokens = Budget(limits.tokens_per_minute, now_s) if limits.tokens_per_minute else None
        self.running = 0
        """Requests that were let in and have not ended."""

    def admit(self, tokens: int, now_s: float) -> Booking | Over:
        """Lets a request in that is estimated at *tokens*, or says which limit is in the way; that costs nothing."""
        if over := self._over(tokens, now_s):
            return over
        if self._requests is not None:
            self._requests.spend(1, now_s)
        if self._tokens is not None:
            tokens = min(tokens, self._tokens.per_minute)  # Or others would wait for what may never be used.
            self._tokens.spend(tokens, now_s)
        self.running += 1
        return Booking(self, tokens)

    def _over(self, tokens: int, now_s: float) -> Over | None:
        most = self._limits.concurrent
        if most is not None and self.running >= most:
            return Over(
                limit="concurrent",
                reason=f"this key may have {most} requests at the same time, and has {self.running}",
                wait_s=PLACE_S,
            )
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now_s)):
            return Over(
                limit="requests_per_minute",
                reason=f"this key may ask {self._requests.per_minute} times a minute; ask again in {span(wait_s)}",
                wait_s=wait_s,
            )
        if self._tokens is not None and (wait_s := self._tokens.wait_s(tokens, now_s)):
            left = max(0, math.floor(self._tokens.left(now_s)))
            return Over(
                limit="tokens_per_minute",
                reason=f"this key may use {self._tokens.per_minute} tokens a minute: {left} are left, about {tokens} "
                f"are asked for; ask again in {span(wait_s)}",
                wait_s=wait_s,
            )
        return None

    def ended(self, estimated: int, used: int, now_s: float) -> None:
        """A request has ended that cost *used* tokens instead of those that were estimated."""
        self.running -= 1
        if self._tokens is not None:
            self._tokens.spend(used - estimated, now_s)

    def headers(self, now_s: float) -> dict[str, str]:
        """How much is left, in the headers of OpenAI's interface."""
        found: dict[str, str] = {}
        for name, budget in (("requests", self._requests), ("tokens", self._tokens)):
            if budget is not None:
                found[f"x-ratelimit-limit-{name}"] = str(budget.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(budget.left(now_s) + _ROUNDING)))
                found[f"x-ratelimit-reset-{name}"] = span(budget.wait_s(budget.per_minute, now_s))
        return found


def span(seconds: float) -> str:
    """A duration as OpenAI writes it: ``12ms``, ``1.5s``, ``6m0s``. It is never shorter than it is."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{f'{minutes}m' if minutes else ''}{rest / 1000:g}s"
