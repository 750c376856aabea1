"""Items whose replicas start together: all of them get a place at once, or none does. Pure.

Two such items can never each hold half of what the other needs, since nothing is held before all is found.
"""

from __future__ import annotations

from computemesh_services.work_marshaller.groups import Groups
from computemesh_services.work_marshaller.needs import Shape
from computemesh_services.work_marshaller.seats import Seat


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
