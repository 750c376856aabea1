"""How many tokens an engine puts out lately."""

from __future__ import annotations

from collections import deque
from typing import Final

import urllib3

WINDOW_S: Final = 10.0
"""Over which the rate is taken."""

GRAIN_S: Final = 0.5
"""Counts within that time of each other are kept as one."""

DECODES: Final = "llamacpp:n_decode_total"
BUSY: Final = "llamacpp:n_busy_slots_per_decode"
TOKENS: Final = "llamacpp:tokens_predicted_total"

READ_TIMEOUT_S: Final = 2.0


class Rate:
    """Tokens a second over the last ``WINDOW_S``. Times are seconds of one clock that never goes back."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, tokens: float, now_s: float) -> None:
        """So many were put out since the last time."""
        if self._counts and now_s - self._counts[-1][0] < GRAIN_S:
            at_s, before = self._counts.pop()
            self._counts.append((at_s, before + tokens))
        else:
            self._counts.append((now_s, tokens))
        self._sum += tokens
        self._forget(now_s)

    def per_s(self, now_s: float) -> float:
        self._forget(now_s)
        return max(0.0, self._sum) / WINDOW_S if self._counts else 0.0

    def _forget(self, now_s: float) -> None:
        while self._counts and now_s - self._counts[0][0] > WINDOW_S:
            self._sum -= self._counts.popleft()[1]


def tokens_of(metrics: str) -> float | None:
    """The tokens that llama.cpp's server has computed since it began, as its ``/metrics`` tell; None if they do not.

    Its own count of tokens grows only when a request ends. Newer ones tell decodes, and how many requests shared each
    in the mean, as they go; a decode that reads a prompt then counts as one token.
    """
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        name, _, value = line.partition(" ")
        if name in (DECODES, BUSY, TOKENS):
            try:
                found[name] = float(value)
            except ValueError:
                return None
    return found[DECODES] * found[BUSY] if DECODES in found and BUSY in found else found.get(TOKENS)


def read_tokens(base_url: str) -> float | None:
    """:func:`tokens_of` the server at *base_url*. Blocks, for a bounded time."""
    try:
        answer = urllib3.request("GET", f"{base_url}/metrics", retries=False, timeout=READ_TIMEOUT_S)
    except urllib3.exceptions.HTTPError:
        return None
    return tokens_of(answer.data.decode("utf-8", "replace")) if answer.status == 200 else None
