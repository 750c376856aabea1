"""What the marshaller knows of a node: its record, its work, and whether it may have more. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh_services.work_marshaller.needs import Ask
from computemesh_services.work_marshaller.rooms import Refusal, Room

Place = tuple[str, int]
"""A replica of an item: the item's id, and the number of the replica."""

REST_S: Final = 1.0
REST_S_MAX: Final = 30.0
"""A node that could not be reached, or refused an item, is left alone this long unless it shows up; the
pause doubles while it goes on."""

STRIKES_MAX: Final = 3
"""Timeouts in a row after which a node that never sends heartbeats gets no more work."""


class Seat:
    """A node, and what is out on it."""

    __slots__ = ("accepting", "loaded_models", "node", "rest_reason", "rests", "rests_until", "room", "session",
                 "strikes", "taken")  # fmt: skip

    def __init__(self, node: NodeRecord) -> None:
        self.node = node
        self.room = Room(node)
        self.taken: set[Place] = set()
        """What of items is with it."""
        self.loaded_models: frozenset[str] = frozenset()
        self.accepting = True
        self.strikes = 0
        self.rests = 0
        """Rests in a row, without a sign of life between them."""
        self.rests_until = 0.0
        self.rest_reason = ""
        self.session = node.session

    def take(self, place: Place, ask: Ask) -> None:
        self.taken.add(place)
        self.room.take(place, ask)

    def free(self, place: Place) -> None:
        self.taken.discard(place)
        self.room.free(place)

    def rest(self, reason: str, now: float) -> None:
        """It declined, or could not be reached."""
        self.rests_until = now + min(REST_S_MAX, REST_S * 2.0**self.rests)
        self.rests = min(self.rests + 1, 30)
        self.rest_reason = reason

    def wake(self) -> None:
        """It showed up."""
        self.rests = 0
        self.rests_until = 0.0

    @property
    def full(self) -> bool:
        return len(self.taken) >= self.node.slots

    def closed(self, now: float) -> Iterator[Refusal]:
        """What speaks against it, whatever the item; that all slots are taken is told by `full`."""
        node = self.node
        if node.slots == 0:
            yield Refusal("takes no work", may_change=False)
        if node.state is not NodeState.ONLINE:
            yield Refusal(f"{node.state}", may_change=True)
        if node.drained:
            yield Refusal(f"drained: {node.drain_reason}" if node.drain_reason else "drained", may_change=True)
        if not self.accepting:
            yield Refusal("draining", may_change=True)
        if self.strikes >= STRIKES_MAX and not node.monitored:
            yield Refusal(f"let {self.strikes} items time out in a row", may_change=True)
        elif now < self.rests_until:
            yield Refusal(self.rest_reason, may_change=True)
