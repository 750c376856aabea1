"""Which engines there are, how busy they are, and what this gateway has given them. Pure.

What nodes say themselves is heard as it is said, and so is whom an operator drained. The registry's list, asked for now
and then, says the rest: who is suspect, and whatever was missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

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
from computemesh.contracts.openai import Model

REPORT_S: Final = 1.0
"""For so long a report that an engine is full is believed; then it is asked, as it may have room again."""

SUSPECT_BEATS: Final = 2.5
"""Silence in a node's own heartbeat intervals that is borne in any case."""


class Spot(NamedTuple):
    """An engine of the mesh."""

    node_id: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An engine that could answer for a model."""

    spot: Spot
    load: int
    """Requests it has, as far as is known."""
    slots: int
    """Requests it works on at the same time."""
    full: bool
    """It takes no more for the moment, or does not answer."""
    loaded: bool
    """The model is in its memory, or on the way there."""
    free: bool
    """No other model is in its memory."""
    present: bool
    """The model's file is on its node."""
    sound: bool
    """Nothing is known to be wrong with it."""


@dataclass(kw_only=True, slots=True)
class _Node:
    node_id: str
    session: str = ""
    engines: dict[str, EngineCard] = field(default_factory=dict[str, EngineCard])
    models: frozenset[str] = frozenset()
    cards: dict[str, ModelCard] = field(default_factory=dict[str, ModelCard])
    created_at: float = 0.0
    uses: dict[str, EngineUse] = field(default_factory=dict[str, EngineUse])
    others: dict[str, int] = field(default_factory=dict[str, int])
    """Requests of others that each engine had when it last told."""
    told_at: float = 0.0
    heard_at: float = 0.0
    silence_s: float = 0.0
    """After so much of it the node is suspect."""
    monitored: bool = False
    accepting: bool = True
    drained: bool = False
    marked_at: float = 0.0
    """When it was heard that it is drained, or no more."""
    lost: bool = False
    silent: bool = False
    """It did not answer, and has not been heard of since."""
    full_until: float = 0.0
    faulty_until: float = 0.0


Standing = Literal["here", "silent", "away", "unknown", "unsure"]


class Engines:
    """All engines, from what is heard. Times are seconds of one steady clock.

    Args:
        suspect_after_s: silence after which a node that sends heartbeats gets nothing new.
    """

    def __init__(self, *, suspect_after_s: float) -> None:
        self.complete = False
        """Whether the registry was heard, so that what is not known is not there."""
        self._suspect_after_s = suspect_after_s
        self._nodes: dict[str, _Node] = {}
        self._by_model: dict[str, set[str]] = {}
        self._mine: Counter[Spot] = Counter()
        self._mine_of: Counter[tuple[Spot, str]] = Counter()

    # --- what is heard -----------------------------------------------------------------------------------------------

    def announced(self, said: NodeAnnouncement, *, now: float) -> bool:
        """A node said what it is. True if it was not known."""
        new = said.node_id not in self._nodes
        node = self._known(said.node_id)
        if said.session != node.session:
            node.uses, node.others, node.full_until = {}, {}, 0.0
            node.accepting, node.faulty_until = True, 0.0
        self._describe(node, said)
        node.heard_at, node.silent, node.lost = now, False, False
        return new

    def beat(self, said: NodeHeartbeat, *, now: float) -> bool:
        """A sign of life. False, and nothing is taken of it, when that node, that life of it or that it has engines
        was not announced."""
        node = self._nodes.get(said.node_id)
        if node is None or (said.session and node.session and said.session != node.session):
            return False
        if said.engines and not node.engines:
            return False
        node.heard_at, node.monitored, node.silent = now, True, False
        node.lost = said.leaving
        node.accepting = said.accepting and not said.leaving
        if said.engines:
            self._use(node, said.engines, now)
            node.full_until = 0.0
        return True

    def lost(self, said: NodeLost, *, now: float) -> None:
        """The registry gave a node up."""
        if node := self._nodes.get(said.node_id):
            node.lost, node.heard_at = True, now

    def marked(self, said: NodeMarked, *, now: float) -> None:
        """An operator drained a node, or gave it work again."""
        if node := self._nodes.get(said.node_id):
            node.drained, node.marked_at = said.drained, now

    def listed(self, views: Iterable[NodeView], *, asked_at: float, now: float) -> None:
        """The registry's whole list, asked for at *asked_at*. What was heard of a node since is newer than the list."""
        self.complete = True
        found: set[str] = set()
        for view in views:
            found.add(view.node_id)
            node = self._known(view.node_id)
            node.created_at = view.registered_at
            if node.marked_at <= asked_at:
                node.drained = view.drained
            if node.heard_at > asked_at:
                continue
            if view.session != node.session:
                node.uses, node.others = {}, {}
            self._describe(node, view)
            node.lost = view.state is not NodeState.ONLINE or view.left
            node.monitored = view.monitored
            node.accepting = view.accepting is not False
            node.heard_at = now
            if view.engine_use:
                self._use(node, view.engine_use, now)
        for node in [each for each in self._nodes.values() if each.node_id not in found and each.heard_at <= asked_at]:
            self._index(node, frozenset())
            del self._nodes[node.node_id]

    def patience(self, *, now: float) -> None:
        """Nothing could be heard until now, so nobody was silent."""
        for node in self._nodes.values():
            node.heard_at = max(node.heard_at, now)

    # --- what came of asking -----------------------------------------------------------------------------------------

    def began(self, spot: Spot, model: str) -> None:
        """This gateway gives an engine a request."""
        self._mine[spot] += 1
        self._mine_of[spot, model] += 1

    def ended(self, spot: Spot, model: str) -> None:
        """The engine has it no more."""
        self._mine[spot] -= 1
        self._mine_of[spot, model] -= 1
        if not self._mine_of[spot, model]:
            del self._mine_of[spot, model]
        if not self._mine[spot]:
            del self._mine[spot]
        if node := self._nodes.get(spot.node_id):
            node.full_until = 0.0

    def unanswered(self, node_id: str) -> None:
        """A node did not answer; until it is heard of it is given nothing more."""
        if node := self._nodes.get(node_id):
            node.silent = True

    def was_full(self, node_id: str, *, until: float) -> None:
        """A node said that all its engines are."""
        if node := self._nodes.get(node_id):
            node.full_until = until

    def was_faulty(self, node_id: str, *, until: float) -> None:
        """A node's engine could not answer; for a while others go before."""
        if node := self._nodes.get(node_id):
            node.faulty_until = until

    # --- what is known -----------------------------------------------------------------------------------------------

    def candidates(self, model: str, *, now: float) -> list[Candidate]:
        """Every engine that could answer for a model, the full ones too, in no order."""
        found: list[Candidate] = []
        for node_id in self._by_model.get(model, ()):
            node = self._nodes[node_id]
            if self._takes(node, now):
                found += [self._candidate(node, card, model, now) for card in node.engines.values()]
        return found

    def standing(self, model: str, *, now: float) -> Standing:
        """Whether a model can be had now, is on nodes that did not answer or are away, or on none; which is not sure at
        the beginning."""
        nodes = [self._nodes[node_id] for node_id in self._by_model.get(model, ())]
        if not nodes:
            return "unknown" if self.complete else "unsure"
        taking = [node for node in nodes if self._takes(node, now)]
        if not taking:
            return "away"
        return "silent" if all(node.silent for node in taking) else "here"

    def embeds(self, model: str) -> bool | None:
        """Whether a model gives embeddings, or texts; None when not all of its nodes say the same."""
        nodes = [self._nodes[node_id] for node_id in self._by_model.get(model, ())]
        said = {node.cards[model].embeddings if model in node.cards else None for node in nodes}
        return said.pop() if len(said) == 1 else None

    def models(self, *, now: float) -> tuple[list[Model], list[str]]:
        """The models that can be asked, and those that are known but out of reach, by name."""
        here: list[Model] = []
        away: list[str] = []
        for name, node_ids in sorted(self._by_model.items()):
            nodes = [node for node_id in sorted(node_ids) if self._takes(node := self._nodes[node_id], now)]
            if not nodes:
                away.append(name)
                continue
            cards = [node.cards[name] for node in nodes if name in node.cards]
            spots = [(node, card) for node in nodes for card in node.engines.values()]
            here.append(
                Model(
                    id=name,
                    created=int(min((node.created_at for node in nodes if node.created_at), default=0.0)),
                    nodes=[node.node_id for node in nodes],
                    loaded=any(self._candidate(node, card, name, now).loaded for node, card in spots),
                    context_tokens=max((card.context_tokens or 0 for card in cards), default=0) or None,
                    embeddings=any(card.embeddings for card in cards),
                )
            )
        return here, away

    @property
    def in_flight(self) -> int:
        """Requests that this gateway has with engines."""
        return self._mine.total()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _known(self, node_id: str) -> _Node:
        return self._nodes.setdefault(node_id, _Node(node_id=node_id))

    def _describe(self, node: _Node, said: NodeAnnouncement) -> None:
        node.session = said.session
        node.silence_s = max(self._suspect_after_s, SUSPECT_BEATS * (said.heartbeat_interval_s or 0.0))
        node.engines = {card.device: card for card in said.engines}
        node.cards = {card.name: card for card in said.model_cards}
        self._index(node, frozenset(said.models) if said.engines else frozenset())

    def _index(self, node: _Node, models: frozenset[str]) -> None:
        for name in node.models - models:
            self._by_model[name].discard(node.node_id)
            if not self._by_model[name]:
                del self._by_model[name]
        for name in models - node.models:
            self._by_model.setdefault(name, set()).add(node.node_id)
        node.models = models

    def _use(self, node: _Node, uses: Iterable[EngineUse], now: float) -> None:
        node.uses = {use.device: use for use in uses}
        # Ours are known better than they are told, so only those of others are kept.
        node.others = {
            use.device: max(0, use.pending - self._mine[Spot(node.node_id, use.device)]) for use in node.uses.values()
        }
        node.told_at = now

    def _takes(self, node: _Node, now: float) -> bool:
        """Whether it may be given anything new."""
        suspect = node.monitored and now - node.heard_at > node.silence_s
        return node.accepting and not (node.drained or node.lost or suspect)

    def _candidate(self, node: _Node, card: EngineCard, model: str, now: float) -> Candidate:
        spot = Spot(node.node_id, card.device)
        mine = self._mine[spot]
        load = mine + node.others.get(card.device, 0)
        use = node.uses.get(card.device)
        state = use.state if use else EngineState.IDLE
        holds = use.model if use and state not in (EngineState.IDLE, EngineState.FAILED) else ""
        on_the_way = self._mine_of[spot, model] > 0
        fresh = now - node.told_at <= REPORT_S
        return Candidate(
            spot=spot,
            load=load,
            slots=card.slots,
            full=node.silent or now < node.full_until or (load if fresh else mine) >= card.pending_max,
            loaded=(holds == model and state is not EngineState.DRAINING) or on_the_way,
            free=not holds or holds == model,
            present=node.cards[model].present if model in node.cards else True,
            sound=not node.silent
            and now >= node.faulty_until
            and state not in (EngineState.FAILED, EngineState.RESTARTING),
        )
