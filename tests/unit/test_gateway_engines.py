"""What the gateway knows of engines: from announcements, heartbeats, losses and the registry's list.

Goal: nothing new goes to a node that cannot or must not take it, and a load is never counted twice. Method: the core
alone, fed by hand, with a clock of the test's own.
"""

from __future__ import annotations

from typing import Any

from computemesh.contracts.nodes import (
    EngineCard,
    EngineState,
    EngineUse,
    ModelCard,
    NodeAnnouncement,
    NodeHeartbeat,
    NodeLost,
    NodeMarked,
    NodeState,
    NodeView,
)
from computemesh_services.gateway.engines import Candidate, Engines, Spot

SUSPECT_S = 25.0


def node(node_id: str = "a", session: str = "1", *, models: tuple[str, ...] = ("m",), **more: Any) -> NodeAnnouncement:
    fields: dict[str, Any] = {"engines": [EngineCard(device="gpu:0", slots=1, pending_max=2)], **more}
    return NodeAnnouncement(node_id=node_id, session=session, models=list(models), **fields)


def view(node_id: str = "a", session: str = "1", **more: Any) -> NodeView:
    card = EngineCard(device="gpu:0", slots=1, pending_max=2)
    fields: dict[str, Any] = {"models": ["m"], "engines": [card], **more}
    return NodeView(node_id=node_id, session=session, **fields)


def beat(node_id: str = "a", session: str = "1", *, pending: int = 0, model: str = "", **more: Any) -> NodeHeartbeat:
    state = EngineState.READY if model else EngineState.IDLE
    use = EngineUse(device="gpu:0", pending=pending, model=model, state=more.pop("state", state))
    return NodeHeartbeat(node_id=node_id, session=session, engines=[use], **more)


def known(*said: NodeAnnouncement) -> Engines:
    engines = Engines(suspect_after_s=SUSPECT_S)
    for each in said or (node(),):
        engines.announced(each, now=0.0)
    return engines


def only(engines: Engines, model: str = "m", now: float = 0.0) -> Candidate:
    (found,) = engines.candidates(model, now=now)
    return found


def nobody(engines: Engines, model: str = "m", now: float = 0.0) -> bool:
    return not engines.candidates(model, now=now)


SPOT = Spot("a", "gpu:0")


def test_a_node_offers_each_of_its_devices_for_each_of_its_models() -> None:
    """And nothing for other models; a node without engines offers nothing."""
    cards = [EngineCard(device=f"gpu:{at}") for at in range(2)]
    engines = known(node(models=("m", "k"), engines=cards), node("b", engines=[]))
    assert {each.spot for each in engines.candidates("k", now=0)} == {Spot("a", "gpu:0"), Spot("a", "gpu:1")}
    assert nobody(engines, "other")


def test_a_node_whose_announcement_changes_offers_what_the_new_one_says() -> None:
    """What it had before is gone."""
    engines = known()
    engines.announced(node(models=("k",)), now=1)
    assert nobody(engines, "m")
    assert only(engines, "k").spot == SPOT


def test_what_an_operator_says_of_a_node_holds_at_once() -> None:
    """A list that was asked for before does not undo it; one asked for later does."""
    engines = known()
    for drained in (True, False):
        engines.marked(NodeMarked(node_id="a", drained=drained), now=2)
        assert nobody(engines, now=2) is drained
        engines.listed([view(drained=not drained)], asked_at=1, now=3)
        assert nobody(engines, now=3) is drained
    engines.listed([view(drained=True)], asked_at=4, now=5)
    assert nobody(engines, now=5)
    engines.marked(NodeMarked(node_id="other", drained=True), now=6)


def test_what_a_model_gives_is_known_when_all_of_its_nodes_say_the_same() -> None:
    """A node without a card for it does not say."""
    chats, embeds = ModelCard(name="m"), ModelCard(name="m", embeddings=True)
    cases: list[tuple[list[list[ModelCard]], bool | None]] = [
        ([[chats], [chats]], False),
        ([[embeds], [embeds]], True),
        ([[chats], [embeds]], None),
        ([[chats], []], None),
        ([[], []], None),
    ]
    for cards, found in cases:
        first, second = (node(name, model_cards=cards[at]) for at, name in enumerate("ab"))
        assert known(first, second).embeds("m") is found
    assert known().embeds("other") is None


def test_a_node_that_may_take_nothing_new_gets_nothing() -> None:
    """It drains, it leaves, it is lost, an operator drained it, or the registry suspects it."""
    for said in (beat(accepting=False), beat(leaving=True)):
        engines = known()
        engines.beat(said, now=1)
        assert nobody(engines, now=1)
    engines = known()
    engines.lost(NodeLost(node_id="a", epoch=1, silent_s=45), now=1)
    assert nobody(engines, now=1)
    for listed in (view(drained=True), view(state=NodeState.SUSPECT), view(state=NodeState.LOST), view(left=True),
                   view(accepting=False)):  # fmt: skip
        engines = known()
        engines.listed([listed], asked_at=1, now=2)
        assert nobody(engines, now=2), listed
        assert engines.standing("m", now=2) == "away"


def test_a_sign_of_life_brings_a_lost_node_back() -> None:
    """A heartbeat, or an announcement."""
    for said in (node(), beat()):
        engines = known()
        engines.lost(NodeLost(node_id="a", epoch=1, silent_s=45), now=1)
        if isinstance(said, NodeAnnouncement):
            engines.announced(said, now=2)
        else:
            engines.beat(said, now=2)
        assert only(engines, now=2).spot == SPOT


def test_a_node_that_sends_heartbeats_is_suspect_when_they_stop() -> None:
    """One that never sent any cannot be silent; and when nobody could be heard, nobody was."""
    engines = known()
    assert not nobody(engines, now=1000)
    engines.beat(beat(), now=1000)
    assert not nobody(engines, now=1000 + SUSPECT_S)
    assert nobody(engines, now=1001 + SUSPECT_S)
    engines.patience(now=1001 + SUSPECT_S)
    assert not nobody(engines, now=1001 + SUSPECT_S)


def test_a_heartbeat_of_another_life_says_nothing() -> None:
    """The announcement of that life was not heard yet, or is out of date."""
    engines = known()
    engines.beat(beat(session="2", accepting=False, pending=9), now=1)
    assert (only(engines, now=1).load, only(engines, now=1).full) == (0, False)
    engines.beat(beat("nobody"), now=1)
    assert engines.standing("m", now=1) == "here"


def test_engines_that_nobody_announced_are_a_reason_to_ask() -> None:
    """A node may have registered anew where this gateway did not hear it."""
    engines = known(node(engines=[]))
    assert engines.beat(beat(), now=1) is False
    assert engines.beat(NodeHeartbeat(node_id="a", session="1"), now=1) is True


def test_a_new_life_has_nothing_of_the_old_one() -> None:
    """No load, no loaded model, and it takes requests again."""
    engines = known()
    engines.beat(beat(pending=2, model="m", accepting=False), now=1)
    engines.announced(node(session="2"), now=2)
    found = only(engines, now=2)
    assert (found.load, found.loaded, found.full) == (0, False, False)


# --- load --------------------------------------------------------------------------------------------------------


def test_a_request_of_ours_is_counted_once() -> None:
    """Before the node tells of it, when it does, and after it has ended."""
    engines = known()
    engines.began(SPOT, "m")
    assert only(engines).load == 1
    engines.beat(beat(pending=1), now=1)
    assert only(engines, now=1).load == 1
    engines.beat(beat(pending=3), now=1)
    assert only(engines, now=1).load == 3
    engines.ended(SPOT, "m")
    assert only(engines, now=1).load == 2
    assert engines.in_flight == 0


def test_an_engine_is_full_with_as_many_as_it_takes() -> None:
    """Ours count for as long as they are ours; what it told of others for a second, then it is asked again."""
    engines = known()
    engines.beat(beat(pending=2), now=1)
    assert only(engines, now=1.9).full
    assert not only(engines, now=2.1).full
    engines.beat(beat(), now=3)
    engines.began(SPOT, "m")
    assert not only(engines, now=3).full
    engines.began(SPOT, "m")
    assert only(engines, now=20).full


def test_a_node_that_says_it_is_full_is_believed_until_something_changes() -> None:
    """Until the time given, its next heartbeat, or the end of a request of ours."""
    for change in ("time", "beat", "end"):
        engines = known()
        engines.began(SPOT, "m")
        engines.was_full("a", until=5)
        assert only(engines, now=4.9).full
        if change == "beat":
            engines.beat(beat(pending=1), now=4)
        if change == "end":
            engines.ended(SPOT, "m")
        assert only(engines, now=5 if change == "time" else 4.9).full is False


def test_an_engine_has_a_model_when_it_says_so_or_we_have_just_asked_for_it() -> None:
    """One that drains has it no more; one with another model is not free."""
    engines = known(node(models=("m", "k")))
    assert (only(engines).loaded, only(engines).free) == (False, True)
    engines.beat(beat(model="m"), now=1)
    assert (only(engines, "m", 1).loaded, only(engines, "k", 1).loaded, only(engines, "k", 1).free) == (
        True,
        False,
        False,
    )
    engines.beat(beat(model="m", state=EngineState.DRAINING), now=1)
    assert not only(engines, "m", 1).loaded
    engines.began(SPOT, "k")
    assert only(engines, "k", 1).loaded


def test_an_engine_that_ails_is_known_to() -> None:
    """It failed, restarts, or failed a request of ours lately."""
    for state in (EngineState.FAILED, EngineState.RESTARTING):
        engines = known()
        engines.beat(beat(model="m", state=state), now=1)
        assert not only(engines, now=1).sound
    engines = known()
    engines.was_faulty("a", until=3)
    assert [only(engines, now=at).sound for at in (2.9, 3.0)] == [False, True]


def test_a_node_that_did_not_answer_is_given_nothing_until_it_is_heard() -> None:
    """By a heartbeat or an announcement; while no other has the model, that is known of it."""
    for said in (node(session="2"), beat()):
        engines = known()
        engines.unanswered("a")
        assert only(engines, now=999).full
        assert engines.standing("m", now=1) == "silent"
        if isinstance(said, NodeAnnouncement):
            engines.announced(said, now=1)
        else:
            engines.beat(said, now=1)
        assert not only(engines, now=1).full
        assert engines.standing("m", now=1) == "here"
    engines = known(node(), node("b"))
    engines.unanswered("a")
    assert engines.standing("m", now=1) == "here"


def test_a_model_that_is_not_on_the_node_yet_is_marked() -> None:
    """It has to be fetched."""
    assert not only(known(node(model_cards=[ModelCard(name="m", present=False)]))).present
    assert only(known(node(model_cards=[ModelCard(name="m")]))).present


# --- the list ----------------------------------------------------------------------------------------------------


def test_the_list_tells_of_nodes_that_were_never_heard() -> None:
    """With what their last heartbeat said."""
    engines = Engines(suspect_after_s=SUSPECT_S)
    assert engines.standing("m", now=0) == "unsure"
    engines.listed([], asked_at=0, now=0)
    assert engines.standing("m", now=0) == "unknown"
    use = EngineUse(device="gpu:0", state=EngineState.READY, model="m", pending=1)
    engines.listed([view(engine_use=[use])], asked_at=0, now=1)
    assert (only(engines, now=1).loaded, only(engines, now=1).load) == (True, 1)


def test_what_was_heard_after_the_question_is_newer_than_the_answer() -> None:
    """Whatever the list says of that node, but for what only the registry knows."""
    engines = known()
    engines.announced(node(session="2", models=("k",)), now=5)
    engines.listed([view(state=NodeState.LOST)], asked_at=4, now=6)
    assert only(engines, "k", 6).spot == SPOT
    engines.listed([view(session="2", models=["k"], drained=True)], asked_at=4, now=6)
    assert nobody(engines, "k", 6)
    engines.announced(node("b"), now=8)
    engines.listed([], asked_at=7, now=9)
    assert (engines.standing("k", now=9), engines.standing("m", now=9)) == ("unknown", "here")


def test_the_models_that_can_be_asked_are_told_and_those_out_of_reach() -> None:
    """With the nodes that serve them now."""
    cards = [ModelCard(name="m", context_tokens=512)]
    engines = known(node(models=("m", "k"), model_cards=cards), node("b"), node("c", models=("away",)))
    listed = [view("a", models=["m", "k"], model_cards=cards), view("b"), view("c", models=["away"], drained=True)]
    engines.listed(listed, asked_at=1, now=2)
    engines.beat(beat("b", model="m"), now=3)
    here, away = engines.models(now=3)
    assert [(each.id, each.nodes, each.loaded, each.context_tokens) for each in here] == [
        ("k", ["a"], False, None),
        ("m", ["a", "b"], True, 512),
    ]
    assert away == ["away"]
