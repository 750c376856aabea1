"""Nodes that are alike, in groups: the best node for an item without looking at every node. Pure.

Nodes of one group differ only in their ids, in what of them is taken and, within a power of two, in CPUs and memory.
So whether an item can run there at all, and most of how well it would, is decided once for each shape of items and
each group. Within a group the open nodes stand in the order in which they are chosen.

A choice is the same as the least :func:`placement.rank` of all nodes that fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from collections.abc import Set as AbstractSet
from typing import Final

from computemesh.contracts.nodes import NodeRecord
from computemesh_services.work_marshaller import placement
from computemesh_services.work_marshaller.needs import NOTHING, Shape, ShapeKey
from computemesh_services.work_marshaller.placement import Fit, Liking, Objection, size_class
from computemesh_services.work_marshaller.seats import Seat

ORDERS_MAX: Final = 1000
"""Shapes of items for which it is remembered how they like the groups."""

EMPTY_SLACK: Final = 64
"""Groups without nodes that may remain before they are swept."""

Spot = tuple[int, float, str]
"""Where an open node stands in its group, the best first: free VRAM (or 0), share of its slots taken, id."""


class Group:
    """Open nodes of one kind."""

    __slots__ = ("by_load", "by_vram", "loaded_models", "members", "node")

    def __init__(self, node: NodeRecord, loaded_models: frozenset[str]) -> None:
        self.node: Final = node
        """One of its kind."""
        self.loaded_models: Final = loaded_models
        self.members = 0
        """Nodes, also those that are not open."""
        self.by_load: list[Spot] = []
        self.by_vram: list[Spot] = []
        """The same nodes, the fullest GPUs first; empty where nodes have none."""


class _Place:
    """A node's group, and where it stands in it while it is open."""

    __slots__ = ("group", "load", "open", "seat", "vram")

    def __init__(self, seat: Seat, group: Group) -> None:
        self.seat: Final = seat
        self.group: Final = group
        self.open = False
        """Nothing but taken slots speaks against it."""
        self.load: Spot | None = None
        self.vram: Spot | None = None

    def stand(self, load: Spot | None, vram: Spot | None) -> None:
        """Moves to these spots."""
        if load != self.load:
            _move(self.group.by_load, self.load, load)
            self.load = load
        if vram != self.vram:
            _move(self.group.by_vram, self.vram, vram)
            self.vram = vram


def _move(spots: list[Spot], old: Spot | None, new: Spot | None) -> None:
    if old is not None:
        del spots[bisect_left(spots, old)]
    if new is not None:
        insort(spots, new)


class _Order:
    """The groups that items of one shape could run on, the best first."""

    __slots__ = ("could", "levels", "seen")

    def __init__(self) -> None:
        self.could: set[Group] = set()
        self.levels: list[tuple[Liking, Fit, list[Group]]] = []
        self.seen = 0
        """So many groups were looked at."""


class Groups:
    """All nodes, by kind."""

    def __init__(self, objection: Objection) -> None:
        self._objection: Final = objection
        self._groups: list[Group] = []
        self._by_kind: dict[Hashable, Group] = {}
        self._places: dict[str, _Place] = {}
        self._orders: dict[ShapeKey, _Order] = {}

    @property
    def kinds(self) -> int:
        """Kinds of nodes that are remembered."""
        return len(self._groups)

    # --- nodes -------------------------------------------------------------------------------------------------

    def settle(self, seat: Seat, now: float) -> None:
        """Puts a node where it belongs after anything about it may have changed."""
        node_id = seat.node.node_id
        place = self._places.get(node_id)
        group = self._group_of(seat)
        if place is None or place.group is not group or place.seat is not seat:
            group.members += 1  # First, so that it is not swept.
            self.gone(node_id)
            place = self._places[node_id] = _Place(seat, group)
        place.open = next(seat.closed(now), None) is None
        self.moved(seat)

    def moved(self, seat: Seat) -> None:
        """What is taken of a node has changed, and nothing else."""
        node = seat.node
        place = self._places[node.node_id]
        if not place.open or seat.full:
            place.stand(None, None)
            return
        share = len(seat.taken) / node.slots
        vram = (seat.room.vram_free_mb, share, node.node_id) if node.gpus else None
        place.stand((0, share, node.node_id), vram)

    def gone(self, node_id: str) -> None:
        if place := self._places.pop(node_id, None):
            place.stand(None, None)
            place.group.members -= 1
            self._sweep()

    def _group_of(self, seat: Seat) -> Group:
        kind = _kind_of(seat)
        group = self._by_kind.get(kind)
        if group is None:
            group = self._by_kind[kind] = Group(seat.node, seat.loaded_models)
            self._groups.append(group)
        return group

    def _sweep(self) -> None:
        """Forgets groups without nodes, once they are many."""
        if len(self._groups) <= EMPTY_SLACK + 2 * len(self._places):
            return
        self._by_kind = {kind: group for kind, group in self._by_kind.items() if group.members}
        self._groups = list(self._by_kind.values())
        self._orders.clear()

    # --- items -------------------------------------------------------------------------------------------------

    def takes(self, shape: Shape, seat: Seat, now: float) -> bool:
        """Whether an item of this shape fits a node now."""
        place = self._places[seat.node.node_id]
        return place.load is not None and place.group in self._order(shape).could and self._fits(shape, seat, now)

    def _fits(self, shape: Shape, seat: Seat, now: float) -> bool:
        """The same of an open node of a group that would do."""
        node_id = seat.node.node_id
        return (
            (shape.named is None or node_id in shape.named)
            and node_id not in shape.avoided
            and (shape.ask is NOTHING or next(seat.room.lacks(shape.ask), None) is None)
            and not self._objection(shape, node_id, now)
        )

    def best(self, shape: Shape, avoid: str, now: float, without: AbstractSet[str] = frozenset()) -> Seat | None:
        """The node that such an item gets.

        Args:
            avoid: where its latest attempt failed, if it did: the last choice.
            without: nodes that are out of the question.
        """
        if shape.named is not None:
            named = [self._places[node_id].seat for node_id in shape.named - without if node_id in self._places]
            return self.best_of(named, shape, avoid, now)
        fallback: Seat | None = None
        liked: Liking | None = None
        for liking, _, groups in self._order(shape).levels:
            if fallback is not None and liking != liked:
                break
            best: Spot | None = None
            for group in groups:
                spots = group.by_vram if shape.ask.gpus else group.by_load
                for at in range(_start(shape, spots), len(spots)):
                    spot = spots[at]
                    if best is not None and spot > best:
                        break
                    seat = self._places[spot[2]].seat
                    if spot[2] in without or not self._fits(shape, seat, now):
                        continue
                    if spot[2] != avoid:
                        best = spot
                        break
                    fallback, liked = seat, liking
            if best is not None:
                return self._places[best[2]].seat
        return fallback

    def best_of(self, seats: Iterable[Seat], shape: Shape, avoid: str, now: float) -> Seat | None:
        """The best of a few nodes, or None when it fits none of them."""
        fitting = [seat for seat in seats if self.takes(shape, seat, now)]
        if len(fitting) <= 1:
            return fitting[0] if fitting else None
        return min(fitting, key=lambda seat: placement.rank(shape, avoid, seat))

    def _order(self, shape: Shape) -> _Order:
        order = self._orders.get(shape.key)
        if order is None:
            if len(self._orders) >= ORDERS_MAX:
                self._orders.clear()
            order = self._orders[shape.key] = _Order()
        if order.seen < len(self._groups):
            self._extend(order, shape)
        return order

    def _extend(self, order: _Order, shape: Shape) -> None:
        """Takes in the groups that came since."""
        levels = {(liking, fit): groups for liking, fit, groups in order.levels}
        for group in self._groups[order.seen :]:
            if next(placement.unmade(shape, group.node), None) is None and _large_enough(shape, group.node):
                order.could.add(group)
                liking = placement.liking(shape, group.node, group.loaded_models)
                levels.setdefault((liking, placement.fit(shape, group.node)), []).append(group)
        order.seen = len(self._groups)
        order.levels = [(*level, levels[level]) for level in sorted(levels)]


def _start(shape: Shape, spots: list[Spot]) -> int:
    """Where the nodes begin that have enough VRAM in all."""
    ask = shape.ask
    return bisect_left(spots, (ask.vram_mb * ask.gpus, 0.0, "")) if ask.vram_mb else 0


def _large_enough(shape: Shape, node: NodeRecord) -> bool:
    """Whether some node of this kind may be."""
    ask = shape.ask
    return (
        (not ask.gpus or sum(ask.suits(gpu) for gpu in node.gpus) >= ask.gpus)
        and (not ask.cpus or size_class(node.cpus_for_work) >= size_class(ask.cpus))
        and (not ask.ram_mb or size_class(node.ram_mb_for_work) >= size_class(ask.ram_mb))
    )


def _kind_of(seat: Seat) -> Hashable:
    """What nodes of one group agree in."""
    node = seat.node
    return (
        tuple(node.work_types),
        tuple(node.models),
        seat.loaded_models,
        node.delivery,
        node.tier,
        node.platform,
        frozenset(node.labels.items()),
        tuple((gpu.name, gpu.vram_total_mb) for gpu in node.gpus),
        size_class(node.cpus_for_work),
        size_class(node.ram_mb_for_work),
    )
