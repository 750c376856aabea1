"""Which engine answers a request, and what is done when it does not. Pure.

A conversation should meet its KV cache again, so requests with one prompt prefix go to one engine, by rendezvous
hashing (Thaler and Ravishankar, 1998): each engine has a score for each prefix, and the highest goes first. When an
engine comes or goes, only the prefixes that it wins or loses move. An engine whose load would rise above ``1 + EPS`` of
the mean is passed over (Mirrokni, Thorup and Zadimoghaddam, 2018: consistent hashing with bounded loads), so a prefix
that everyone uses spreads over all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from math import ceil, log
from typing import Any, Final, Literal

from computemesh.contracts.base import Refused
from computemesh.openai import Question
from computemesh_services.gateway.engines import Candidate, Spot

EPS: Final = 0.25
"""How far above the mean the load of an engine may be for the sake of its KV cache."""

PREFIX_CHARS: Final = 4096
"""Characters of a prompt that decide, at most."""

TEXT_PREFIX_CHARS: Final = 256
"""The same of a prompt that is one text, in which no beginning is marked."""


class Rank(IntEnum):
    """How soon an engine could begin, the soonest first."""

    READY = 0
    """It has the model, and a slot."""
    QUEUES = 1
    """It has the model; the request waits in its queue."""
    STARTS = 2
    """It is idle, and loads the model."""
    SWITCHES = 3
    """It has another model, which ends first."""
    FETCHES = 4
    """The model's file is not there yet."""
    AILS = 5
    """It failed lately."""
    FAILED_IT = 6
    """It failed this very request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An engine for a request, and why."""

    spot: Spot
    rank: Rank
    first: bool
    """It is the one that the prefix prefers, of those of its rank."""
    load: int
    among: int
    """Engines that could answer."""

    @property
    def why(self) -> str:
        what = "first by prefix" if self.first else "next by prefix, for its load"
        return f"{self.rank.name.lower()}, {what}, load {self.load}, of {self.among}"


# --- the prefix --------------------------------------------------------------------------------------------------


def prefix_of(question: Question) -> bytes:
    """What requests share that should meet on one engine.

    Of a conversation it is the model and all messages up to the first of the user, which stay the same from turn to
    turn; of a text its beginning. A caller that knows better sends OpenAI's ``prompt_cache_key``. Empty for a request
    that has no KV cache to gain from, such as embeddings.
    """
    body = question.body
    if isinstance(key := body.get("prompt_cache_key"), str) and key:
        return f"{question.model}\0{key}".encode()
    match question.path:
        case "/v1/chat/completions":
            text = _opening(body["messages"])
        case "/v1/completions":
            text = repr(body["prompt"])[:TEXT_PREFIX_CHARS]
        case _:
            return b""
    return f"{question.model}\0{text}".encode()


def _opening(messages: Sequence[dict[str, Any]]) -> str:
    parts: list[str] = []
    left = PREFIX_CHARS
    for message in messages:
        content: Any = message.get("content")
        text = content[:left] if isinstance(content, str) else repr(content)[:left]
        parts.append(f"{message['role']}:{text}")
        left -= len(text)
        if message["role"] == "user" or left <= 0:
            break
    return "\0".join(parts)


# --- the choice --------------------------------------------------------------------------------------------------


def choose(candidates: Collection[Candidate], prefix: bytes, failed: Collection[Spot] = ()) -> Choice | None:
    """The engine for a request; None when each has all it takes, but for some that have just failed.

    Args:
        candidates: every engine that could answer for the model.
        prefix: of :func:`prefix_of`, or anything random where that is empty.
        failed: engines that failed this request.
    """
    open_ = [each for each in candidates if not each.full]
    if not open_:
        return None
    ranks = {each.spot: Rank.FAILED_IT if each.spot in failed else rank_of(each) for each in open_}
    rank = min(ranks.values())
    if rank >= Rank.AILS and any(each.full and each.sound and each.spot not in failed for each in candidates):
        return None
    here = sorted((each for each in open_ if ranks[each.spot] is rank), key=lambda each: -score(prefix, each))
    chosen = _within_bound(here, candidates) if rank <= Rank.QUEUES else _least(here)
    return Choice(spot=chosen.spot, rank=rank, first=chosen is here[0], load=chosen.load, among=len(candidates))


def rank_of(each: Candidate) -> Rank:
    if not each.sound:
        return Rank.AILS
    if each.loaded:
        return Rank.READY if each.load < each.slots else Rank.QUEUES
    if not each.present:
        return Rank.FETCHES
    return Rank.STARTS if each.free else Rank.SWITCHES


def _within_bound(here: Sequence[Candidate], candidates: Collection[Candidate]) -> Candidate:
    """The first whose load stays within the bound; one with more slots may have more."""
    loaded = [each for each in candidates if each.loaded]
    total = sum(each.load for each in loaded) + 1
    slots = sum(each.slots for each in loaded)
    fits = (each for each in here if each.load + 1 <= bound(total, each.slots, slots))
    return next(fits, None) or _least(here)


def bound(total: int, slots: int, slots_all: int) -> int:
    """Requests that an engine with so many slots may have when all have *total*."""
    return ceil((1 + EPS) * total * slots / slots_all)


def _least(here: Sequence[Candidate]) -> Candidate:
    return min(here, key=lambda each: each.load / each.slots)


def score(prefix: bytes, each: Candidate) -> float:
    """How much a prefix prefers an engine; one with twice the slots is preferred by twice as many."""
    digest = blake2b(f"{each.spot.node_id}/{each.spot.device}".encode(), key=_short(prefix), digest_size=8).digest()
    part = (int.from_bytes(digest, "big") + 0.5) / 2**64  # Above 0 and below 1.
    return -each.slots / log(part)


def _short(prefix: bytes) -> bytes:
    return prefix if len(prefix) <= 64 else blake2b(prefix).digest()


# --- when it fails -----------------------------------------------------------------------------------------------

TRIES_MAX: Final = 5
"""Engines that one request may fail on."""

PAUSE_S: Final = 0.4
"""Before an engine is asked again that failed a request, doubled each time."""

Next = Literal["tell", "elsewhere", "wait"]
"""Tell the client, ask another engine, or wait until one has room."""

_ELSEWHERE: Final = frozenset(
    {
        "node_lost", "no_responder", "stream_broken", "engine_lost", "engine_failed", "no_engine", "unavailable",
        "draining", "unknown_model", "duplicate_stream", "internal",
    }
)  # fmt: skip
"""Codes that say something of the engine or its node, and nothing of the request."""


def after(told: Refused, *, begun: bool, failures: int) -> Next:
    """What to do about a refusal.

    Args:
        begun: the client has a part of the answer, so another engine cannot begin again.
        failures: engines that failed this request, this one included.
    """
    if begun:
        return "tell"
    if told.code == "too_many_requests":
        return "wait"
    if told.code in _ELSEWHERE or told.retry == "elsewhere":
        return "elsewhere" if failures < TRIES_MAX else "tell"
    return "tell"


def pause_s(failures: int) -> float:
    """The pause before a request is given again to an engine that failed it."""
    return PAUSE_S * 2.0 ** max(0, failures - 1)
