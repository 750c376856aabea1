"""How the gateway chooses an engine, and what it does when one fails.

Goal: a conversation meets its KV cache again, and no engine is overrun or forgotten for that. Method: the core alone,
with candidates made up, by examples and by Hypothesis.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh import openai
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import Path
from computemesh_services.gateway import routing
from computemesh_services.gateway.engines import Candidate, Spot
from computemesh_services.gateway.routing import EPS, TRIES_MAX, Rank, after, choose, prefix_of, rank_of


def engine(node_id: str, *, load: int = 0, slots: int = 4, **more: Any) -> Candidate:
    facts: dict[str, Any] = {"full": load >= 2 * slots, "loaded": True, "free": True, "present": True, "sound": True}
    return Candidate(spot=Spot(node_id, "gpu:0"), load=load, slots=slots, **{**facts, **more})


def chosen(candidates: list[Candidate], prefix: bytes = b"p") -> str:
    found = choose(candidates, prefix)
    assert found is not None
    return found.spot.node_id


FLEET = [engine(f"n{at}") for at in range(8)]
PREFIXES = [f"prefix {at}".encode() for at in range(800)]


# --- by prefix ---------------------------------------------------------------------------------------------------


def test_one_prefix_goes_to_one_engine_in_whatever_order_they_are_told() -> None:
    """So every gateway chooses the same."""
    for prefix in PREFIXES[:50]:
        assert chosen(FLEET, prefix) == chosen(FLEET[::-1], prefix)


def test_no_engine_starves_and_slots_weigh() -> None:
    """Each gets its share of many prefixes; one with twice the slots twice as many."""
    counts = Counter(chosen(FLEET, prefix) for prefix in PREFIXES)
    assert len(counts) == len(FLEET)
    assert min(counts.values()) > len(PREFIXES) / len(FLEET) / 2
    fleet = [*FLEET, engine("big", slots=8)]
    mean = len(PREFIXES) / 10
    assert 1.5 * mean < Counter(chosen(fleet, prefix) for prefix in PREFIXES)["big"] < 2.5 * mean


def test_when_an_engine_comes_or_goes_only_its_own_prefixes_move() -> None:
    """All others meet their KV cache again."""
    more = [*FLEET, engine("new")]
    before = {prefix: chosen(FLEET, prefix) for prefix in PREFIXES}
    with_it = {prefix: chosen(more, prefix) for prefix in PREFIXES}
    moved = [prefix for prefix in PREFIXES if before[prefix] != with_it[prefix]]
    assert {with_it[prefix] for prefix in moved} == {"new"}
    assert len(moved) < 2 * len(PREFIXES) / len(more)


loads = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=12)


@given(loads, st.binary(max_size=100))
def test_the_bound_on_the_load_holds(told: list[tuple[int, int]], prefix: bytes) -> None:
    """Where an engine has a free slot, the chosen one has one too, and with the request no more than 1 + EPS of the
    mean for its slots, rounded up."""
    fleet = [engine(f"n{at}", load=load, slots=slots) for at, (load, slots) in enumerate(told)]
    found = choose(fleet, prefix)
    if found is None:
        assert all(each.full for each in fleet)
        return
    one = next(each for each in fleet if each.spot == found.spot)
    assert not one.full
    if any(each.load < each.slots for each in fleet):
        assert one.load < one.slots
        total, slots = sum(each.load for each in fleet) + 1, sum(each.slots for each in fleet)
        assert one.load + 1 < (1 + EPS) * total * one.slots / slots + 1


def test_a_prefix_that_all_use_spreads_over_all_engines() -> None:
    """One after another, as each gets its share; within a fleet no two differ by much."""
    held: Counter[str] = Counter()
    for _ in range(16):
        fleet = [engine(each.spot.node_id, load=held[each.spot.node_id]) for each in FLEET]
        held[chosen(fleet, b"system prompt")] += 1
    assert len(held) >= len(FLEET) - 2
    assert max(held.values()) <= 3


def test_a_conversation_keeps_its_engine_while_that_one_is_not_overrun() -> None:
    """A request of somebody else there does not drive it away; a busy engine does."""
    first = chosen(FLEET, b"talk")
    some = [engine(each.spot.node_id, load=1) for each in FLEET]
    assert chosen(some, b"talk") == first
    busy = [engine(each.spot.node_id, load=4 if each.spot.node_id == first else 1) for each in FLEET]
    assert chosen(busy, b"talk") != first


# --- by rank -----------------------------------------------------------------------------------------------------

RANKED: dict[Rank, Candidate] = {
    Rank.READY: engine("ready", load=3),
    Rank.QUEUES: engine("queues", load=4),
    Rank.STARTS: engine("starts", loaded=False),
    Rank.SWITCHES: engine("switches", loaded=False, free=False),
    Rank.FETCHES: engine("fetches", loaded=False, present=False),
    Rank.AILS: engine("ails", sound=False),
}


@given(st.sets(st.sampled_from(sorted(RANKED)), min_size=1), st.binary(max_size=20))
def test_the_engine_that_can_begin_soonest_goes_first(ranks: set[Rank], prefix: bytes) -> None:
    """Whatever the prefix prefers: a model that is loaded goes before one that has to be."""
    for rank in ranks:
        assert rank_of(RANKED[rank]) is rank
    found = choose([RANKED[rank] for rank in ranks], prefix)
    assert found is not None
    assert found.rank is min(ranks)
    assert found.rank.name.lower() in found.why


def test_of_engines_that_must_load_the_model_the_least_loaded_does() -> None:
    """There is no KV cache to meet again."""
    fleet = [engine("a", load=3, loaded=False, free=False), engine("b", load=1, loaded=False, free=False)]
    assert {chosen(fleet, prefix) for prefix in PREFIXES[:20]} == {"b"}


def test_a_full_engine_gets_nothing() -> None:
    """When all are, none is chosen."""
    assert choose([engine("a", full=True)], b"") is None
    assert choose([], b"") is None


def test_an_engine_that_failed_a_request_gets_it_again_only_when_there_is_no_other() -> None:
    """Even one that ails goes before."""
    failed = {Spot("a", "gpu:0")}
    found = choose([engine("a"), engine("b", sound=False)], b"", failed)
    assert found is not None
    assert found.spot.node_id == "b"
    found = choose([engine("a"), engine("b", full=True, sound=False)], b"", failed)
    assert found is not None
    assert (found.spot.node_id, found.rank) == ("a", Rank.FAILED_IT)


def test_a_request_waits_for_a_full_engine_rather_than_go_to_one_that_has_just_failed() -> None:
    """The full one will answer; of the other that is not so sure."""
    assert choose([engine("a", sound=False), engine("b", full=True)], b"") is None
    assert choose([engine("a"), engine("b", full=True)], b"", {Spot("a", "gpu:0")}) is None


# --- the prefix --------------------------------------------------------------------------------------------------


def prefix(path: Path = "/v1/chat/completions", **fields: Any) -> bytes:
    asked = openai.read(path, json.dumps({"model": "m", **fields}).encode())
    assert not isinstance(asked, Refused), asked
    return prefix_of(asked)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_all_turns_of_a_conversation_have_one_prefix() -> None:
    """However short its first turn was; other conversations have others."""
    opening = [said("system", "Be brief."), said("user", "Hello?")]
    first = prefix(messages=opening)
    assert prefix(messages=[*opening, said("assistant", "Yes."), said("user", "Why?")]) == first
    assert prefix(messages=[opening[0], said("user", "Who?")]) != first
    assert prefix(messages=opening, model="k") != first
    parts = [said("user", [{"type": "text", "text": "x"}])]
    assert prefix(messages=parts) == prefix(messages=[*parts, said("assistant", None)]) != first


def test_a_long_opening_decides_by_its_beginning() -> None:
    """The bound is the same for everyone."""
    long = [said("system", "x" * routing.PREFIX_CHARS)]
    assert prefix(messages=[*long, said("user", "a")]) == prefix(messages=[*long, said("user", "b")])
    short = [said("system", "x" * (routing.PREFIX_CHARS - 1))]
    assert prefix(messages=[*short, said("user", "a")]) != prefix(messages=[*short, said("user", "b")])


def test_a_text_decides_by_its_beginning_and_a_key_of_the_caller_before_all() -> None:
    """Embeddings have nothing to gain."""
    text = "x" * routing.TEXT_PREFIX_CHARS
    assert prefix("/v1/completions", prompt=text + "a") == prefix("/v1/completions", prompt=text + "b")
    assert prefix("/v1/completions", prompt="a") != prefix("/v1/completions", prompt="b")
    keyed = [prefix("/v1/completions", prompt=text, prompt_cache_key="k") for text in "ab"]
    assert keyed[0] == keyed[1] == prefix(messages=[said("user", "x")], prompt_cache_key="k")
    assert prefix("/v1/embeddings", input="x") == b""


# --- when it fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "retry", "then"),
    [
        ("node_lost", 503, "elsewhere", "elsewhere"),
        ("engine_lost", 503, "elsewhere", "elsewhere"),
        ("stream_broken", 503, "elsewhere", "elsewhere"),
        ("unavailable", 503, "later", "elsewhere"),
        ("engine_failed", 503, "later", "elsewhere"),
        ("unknown_model", 404, "never", "elsewhere"),
        ("something_new", 503, "elsewhere", "elsewhere"),
        ("too_many_requests", 429, "later", "wait"),
        ("bad_message", 400, "never", "tell"),
        ("too_large", 413, "never", "tell"),
        ("invalid_request_error", 400, "never", "tell"),
    ],
)
def test_a_failure_of_the_engine_is_tried_elsewhere_and_one_of_the_request_is_told(
    code: str, status: int, retry: Any, then: str
) -> None:
    """Once the client has a part of the answer everything is told; and no request is tried without end."""
    told = Refused(code=code, reason="x", status=status, retry=retry)
    assert after(told, begun=False, failures=1) == then
    assert after(told, begun=True, failures=1) == "tell"
    assert after(told, begun=False, failures=TRIES_MAX) == ("wait" if then == "wait" else "tell")


def test_the_pauses_before_one_engine_is_asked_again_grow() -> None:
    """Long enough together for an agent to start again, short enough for a client to wait."""
    pauses = [routing.pause_s(failures) for failures in range(1, TRIES_MAX)]
    assert pauses == sorted(pauses)
    assert 4 < sum(pauses) < 10
