"""Requests and the engines they get: order, bounds, and places that are given exactly once.

Method: the desk on an event loop of the test, with a clock by hand; no server.
"""

from __future__ import annotations

import asyncio

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import EngineCard, NodeAnnouncement, NodeHeartbeat
from computemesh_services.gateway.engines import Engines, Spot
from computemesh_services.gateway.places import Places, Wish
from computemesh_services.gateway.routing import Choice

SPOT = Spot("a", "gpu:0")


def desk(*, queue_max: int = 10, pending_max: int = 1) -> tuple[Places, Engines]:
    engines = Engines(suspect_after_s=25)
    card = EngineCard(device="gpu:0", slots=1, pending_max=pending_max)
    engines.announced(NodeAnnouncement(node_id="a", session="1", models=["m", "k"], engines=[card]), now=0)
    engines.listed([], asked_at=-1, now=0)
    return Places(engines, queue_max=queue_max, clock=lambda: 0.0), engines


def wish(model: str = "m") -> Wish:
    return Wish(model=model, prefix=b"p")


def given(places: Places, asked: Wish | None = None, *, again: bool = False) -> Choice:
    found = places.take(asked or wish(), again=again)
    assert isinstance(found, Choice), found
    return found


def waits(places: Places, asked: Wish | None = None, *, again: bool = False) -> asyncio.Future[Choice | Refused]:
    found = places.take(asked or wish(), again=again)
    assert isinstance(found, asyncio.Future), found
    return found


async def test_a_place_that_falls_free_goes_to_the_one_that_has_waited_longest() -> None:
    """Nobody who comes later gets it, not even at that moment."""
    places, _ = desk()
    first = given(places)
    second, third = waits(places), waits(places)
    places.release(first, "m")
    assert second.done()
    assert not third.done()
    fourth = waits(places)
    for before, after in ((second, third), (third, fourth)):
        choice = before.result()
        assert isinstance(choice, Choice)
        places.release(choice, "m")
        assert after.done()


async def test_a_request_that_had_its_turn_goes_first() -> None:
    """An engine that was full all the same must not cost it its place in the queue."""
    places, _ = desk()
    first = given(places)
    later = waits(places)
    again = waits(places, again=True)
    places.release(first, "m")
    assert again.done()
    assert not later.done()


async def test_a_request_that_waits_is_not_overtaken_by_a_new_one_when_there_is_room() -> None:
    """The room may have come without anybody having looked."""
    places, engines = desk()
    taken = given(places)
    waiting = waits(places)
    engines.ended(taken.spot, "m")  # Not by way of the desk.
    newcomer = waits(places)
    places.serve()
    assert waiting.done()
    assert not newcomer.done()


async def test_the_queue_is_bounded_for_each_model() -> None:
    """One crowded model does not shut out another."""
    places, _ = desk(queue_max=1)
    given(places)
    waits(places)
    refused = places.take(wish())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("too_many_requests", 429, "later")
    waits(places, wish("k"))
    assert places.waiting == 2


async def test_whoever_gives_up_waiting_is_passed_over() -> None:
    """And its place goes to the next."""
    places, _ = desk()
    first = given(places)
    gone, next_ = waits(places), waits(places)
    gone.cancel()
    places.release(first, "m")
    assert next_.done()
    assert places.waiting == 0


async def test_a_place_is_given_once() -> None:
    """However many look at the same time."""
    places, engines = desk(pending_max=2)
    given(places)
    given(places)
    waiting = [waits(places) for _ in range(3)]
    for _ in range(5):
        places.serve()
    assert not any(each.done() for each in waiting)
    assert engines.in_flight == 2


async def test_why_there_is_none_is_told_at_once() -> None:
    """A model that nobody has, nodes that are away, and a mesh that is not known yet."""
    places, engines = desk()
    refused = places.take(wish("nothing"))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.field) == ("model_not_found", 404, "model")
    assert "k, m" in refused.reason
    engines.beat(NodeHeartbeat(node_id="a", session="1", accepting=False), now=0)
    refused = places.take(wish())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status, refused.retry) == ("unavailable", 503, "later")
    refused = Places(Engines(suspect_after_s=25), queue_max=1).take(wish())
    assert isinstance(refused, Refused)
    assert (refused.code, refused.status) == ("unavailable", 503)


async def test_those_that_wait_are_told_when_their_last_node_goes() -> None:
    """They need not wait out their time for it."""
    places, engines = desk()
    given(places)
    waiting = waits(places)
    engines.beat(NodeHeartbeat(node_id="a", session="1", leaving=True), now=0)
    places.serve()
    refused = waiting.result()
    assert isinstance(refused, Refused)
    assert refused.code == "unavailable"


async def test_requests_wait_for_a_node_that_did_not_answer() -> None:
    """Until it is heard; one that waits in vain is told that, and not that engines are busy."""
    places, engines = desk()
    engines.unanswered("a")
    waiting = waits(places)
    late = places.in_vain("m", 30.0)
    assert (late.code, late.status) == ("unavailable", 503)
    engines.beat(NodeHeartbeat(node_id="a", session="1"), now=0)
    places.serve()
    assert isinstance(waiting.result(), Choice)
    late = places.in_vain("m", 30.0)
    assert (late.code, late.status) == ("too_many_requests", 429)
