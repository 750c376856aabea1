"""Items whose replicas start together: all of them get a place at once, or none does. Pure.

Two such items can never each hold half of what the other needs, since nothing is held before all is found.

Smaller items would take each place that falls free before enough of them are. So once such an item has waited for
:data:`PATIENCE_S`, the nodes that it will run on are kept for it: nothing else starts there, and when what runs there
has ended, the item starts. That is its bound: the time that attempts may take. One item at a time has nodes kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from computemesh.contracts.nodes import NodeRecord
from computemesh_services.work_marshaller import placement
from computemesh_services.work_marshaller.groups import Groups
from computemesh_services.work_marshaller.needs import Shape
from computemesh_services.work_marshaller.rooms import Room
from computemesh_services.work_marshaller.seats import Seat

PATIENCE_S: Final = 60.0
"""How long an item with replicas waits before nodes are kept for it."""


class Kept(msgspec.Struct, frozen=True, gc=False):
    """Nodes on which nothing else starts, until an item does."""

    work_id: str
    shape: Shape
    node_ids: frozenset[str]

    def objection(self, shape: Shape, node_id: str) -> str:
        """Why an item of this shape gets nothing of a node; empty when it may."""
        if node_id not in self.node_ids or shape.key[:-1] == self.shape.key[:-1]:  # Whoever owns it.
            return ""
        return f"kept for {self.work_id}, which waits to start {self.shape.replicas} replicas together"


def choose(shape: Shape, groups: Groups, avoid: str, now: float) -> list[Seat]:
    """A node for each replica, by their order; empty when they do not all fit now.

    One after the other gets the best place that is left. Replicas are all alike, so this finds places if there are any.
    """
    chosen: list[Seat] = []
    spread: set[str] = set()
    while len(chosen) < shape.replicas and (seat := groups.best(shape, avoid, now, spread)):
        # Taken for as long as the others are looked for.
        seat.take(("", len(chosen)), shape.ask)
        groups.moved(seat)
        chosen.append(seat)
        if shape.need.spread:
            spread.add(seat.node.node_id)
    for replica, seat in enumerate(chosen):
        seat.free(("", replica))
        groups.moved(seat)
    return chosen if len(chosen) == shape.replicas else []


def nodes_to_keep(
    shape: Shape, seats: Iterable[Seat], objection: Callable[[Shape, str, float], str], now: float
) -> frozenset[str]:
    """The nodes to keep for an item of this shape: those where it takes the fewest others to end. Empty when all nodes
    together, with nothing on them, would not do, or when it is not others' work that is in the way."""
    kept: set[str] = set()
    found = 0
    busy = False
    for seat in sorted(seats, key=lambda seat: (len(seat.taken), seat.node.node_id)):
        if not (most := _most(shape, seat, objection, now)):
            continue
        kept.add(seat.node.node_id)
        busy |= bool(seat.taken)
        found += most
        if found >= shape.replicas:
            return frozenset(kept) if busy else frozenset()
    return frozenset()


def room_now(shape: Shape, seats: Iterable[Seat], objection: Callable[[Shape, str, float], str], now: float) -> int:
    """How many of the replicas have a place now."""
    found = 0
    for seat in seats:
        if next(placement.refusals(shape, seat, objection, now), None) is None:
            found += _fill(shape, seat.room, seat.node.slots - len(seat.taken))
    return min(found, shape.replicas)


def room_at_most(shape: Shape, seats: Iterable[Seat]) -> int:
    """How many of the replicas would have a place, were all nodes there with nothing on them."""
    return min(sum(_empty(shape, seat.node) for seat in seats), shape.replicas)


def _most(shape: Shape, seat: Seat, objection: Callable[[Shape, str, float], str], now: float) -> int:
    """How many of the replicas a node could have, with nothing on it."""
    if next(seat.closed(now), None) or objection(shape, seat.node.node_id, now):
        return 0
    return _empty(shape, seat.node)


def _empty(shape: Shape, node: NodeRecord) -> int:
    """The same, whether or not it gets work now."""
    if next(placement.unnamed(shape, node), None) or next(placement.unmade(shape, node), None):
        return 0
    return _fill(shape, Room(node), node.slots)


def _fill(shape: Shape, room: Room, slots: int) -> int:
    """How many of the replicas so much of a node has room for. Leaves *room* as it is."""
    most = min(slots, 1 if shape.need.spread else shape.replicas)
    count = 0
    while count < most and next(room.lacks(shape.ask), None) is None:
        room.take(("", count), shape.ask)
        count += 1
    for replica in range(count):
        room.free(("", replica))
    return count
