"""Which node is best for an item, and why each of the others does not get it. Pure.

First filters: a node that fails one cannot have the item, and the reason is kept, with whether it may change
(busy, silent) or never will (wrong work type, too small). Then an order among those that fit:

1. the model is in memory
2. more of the preferred labels
3. the latest attempt did not fail there
4. best fit: the smallest tier, the fewest GPUs left unused, the smallest machine
5. the smallest share of slots taken; then the lower id

``groups.py`` finds the first of that order without looking at every node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.contracts.work import NodeVerdict, WorkRecord
from computemesh.hardware import Tier
from computemesh_services.work_marshaller.needs import NOTHING, Shape, shape_of
from computemesh_services.work_marshaller.rooms import Refusal
from computemesh_services.work_marshaller.seats import Seat

Liking = tuple[bool, int]
"""How far a node is not what the item would like: no model in memory, labels it lacks. Less is better."""

Fit = tuple[int, int, int, int]
"""How much larger than needed a kind of node is: tier, GPUs, CPUs, memory. Less is better."""

Rank = tuple[Liking, bool, Fit, int, float, str]
"""Of two nodes, the one with the lower rank is chosen."""

Objection = Callable[[Shape, str, float], str]
"""Why a node, by its id, gets nothing of a shape at a time; empty when it may."""

TIERS: Final = {tier: sum(tier.at_least(other) for other in Tier) for tier in Tier}
UNTOLD: Final = 99

AWAY: Final = {state: place for place, state in enumerate(NodeState)}
"""Online, suspect, lost: the later, the further from having an item."""


def avoided(record: WorkRecord) -> str:
    """The node on which its latest attempt failed, if one did."""
    return record.node_id if record.error else ""


def rank(shape: Shape, avoid: str, seat: Seat) -> Rank:
    node = seat.node
    return (
        liking(shape, node, seat.loaded_models),
        node.node_id == avoid,
        fit(shape, node),
        seat.room.vram_free_mb if shape.ask.gpus else 0,
        len(seat.taken) / max(1, node.slots),
        node.node_id,
    )


def liking(shape: Shape, node: NodeRecord, loaded_models: frozenset[str]) -> Liking:
    lacking = sum(node.labels.get(name) != value for name, value in shape.need.prefer_labels.items())
    return bool(shape.model_name) and shape.model_name not in loaded_models, lacking


def fit(shape: Shape, node: NodeRecord) -> Fit:
    ask = shape.ask
    return (
        TIERS[node.tier],
        0 if ask.gpus else len(node.gpus),
        size_class(node.cpus_for_work) if ask.cpus else 0,
        size_class(node.ram_mb_for_work) if ask.ram_mb else 0,
    )


def size_class(size: int | None) -> int:
    """Sizes between two powers of two are alike; one that is not told may be any."""
    return UNTOLD if size is None else size.bit_length()


def refusals(shape: Shape, seat: Seat, objection: Objection, now: float) -> Iterator[Refusal]:
    """Everything that speaks against a node."""
    if seat.full and seat.node.slots:
        yield Refusal(f"busy: {len(seat.taken)} of {seat.node.slots} slots taken", may_change=True)
    yield from seat.closed(now)
    if reason := objection(shape, seat.node.node_id, now):
        yield Refusal(reason, may_change=True)
    yield from unnamed(shape, seat.node)
    yield from unmade(shape, seat.node)
    if shape.ask is not NOTHING:
        yield from seat.room.lacks(shape.ask)


def unnamed(shape: Shape, node: NodeRecord) -> Iterator[Refusal]:
    """The item names the nodes it may or may not have."""
    if shape.named is not None and node.node_id not in shape.named:
        yield Refusal(f"the item is only for {', '.join(sorted(shape.named)[:5]) or 'no node'}", may_change=False)
    if node.node_id in shape.avoided:
        yield Refusal("the item is not for this node", may_change=False)


def unmade(shape: Shape, node: NodeRecord) -> Iterator[Refusal]:
    """What the node is not made for. Nodes of one kind (see ``groups.py``) agree in it."""
    if node.work_types and shape.work_type not in node.work_types:
        yield Refusal(f"does no {shape.work_type!r}, but {', '.join(node.work_types)}", may_change=False)
    if shape.model_name and node.models and shape.model_name not in node.models:
        yield Refusal(f"has no model {shape.model_name!r}, but {', '.join(node.models[:5])}", may_change=False)
    if shape.replicas > 1 and node.delivery != "direct":
        yield Refusal("takes no items with replicas: it has no direct delivery", may_change=False)
    if shape.by_reference and node.delivery != "direct":
        yield Refusal("takes no payload too large for a message: it has no direct delivery", may_change=False)
    need = shape.need
    if need.min_tier is not None and not node.tier.at_least(need.min_tier):
        yield Refusal(f"tier {node.tier}, needs {need.min_tier}", may_change=False)
    if need.platform is not None and node.platform is not need.platform:
        yield Refusal(f"platform {node.platform or '(not told)'}, needs {need.platform}", may_change=False)
    for name, value in need.labels.items():
        if node.labels.get(name) != value:
            yield Refusal(f"label {name}={node.labels.get(name, '(none)')}, needs {value}", may_change=False)
    for name, value in need.not_labels.items():
        if node.labels.get(name) == value:
            yield Refusal(f"label {name}={value}, which the item must not have", may_change=False)


def explain(record: WorkRecord, seats: Iterable[Seat], objection: Objection, now: float) -> list[NodeVerdict]:
    """A verdict per node: those that fit in the order in which they would be chosen, then those that may later, then
    those that never will. The nearest miss is first: the fewest reasons that never change, then a node that is online,
    then the fewest reasons."""
    shape, avoid = shape_of(record), avoided(record)
    fitting: list[tuple[Rank, Seat]] = []
    others: list[tuple[int, int, int, str, list[Refusal]]] = []
    for seat in seats:
        if against := list(refusals(shape, seat, objection, now)):
            never = sum(not refusal.may_change for refusal in against)
            others.append((never, AWAY[seat.node.state], len(against), seat.node.node_id, against))
        else:
            fitting.append((rank(shape, avoid, seat), seat))
    fitting.sort(key=lambda found: found[0])
    others.sort(key=lambda found: found[:4])
    return [
        NodeVerdict(
            node_id=seat.node.node_id, fits=True, reasons=_merits(shape, avoid, seat), score=float(len(fitting) - place)
        )
        for place, (_, seat) in enumerate(fitting)
    ] + [
        NodeVerdict(node_id=node_id, fits=False, may_change=not never, reasons=[refusal.reason for refusal in against])
        for never, _, _, node_id, against in others
    ]


def _merits(shape: Shape, avoid: str, seat: Seat) -> list[str]:
    """What its place among the nodes that fit follows from, what counts most first."""
    node, preferred, ask = seat.node, shape.need.prefer_labels, shape.ask
    unloaded, lacking = liking(shape, node, seat.loaded_models)
    merits: list[str] = []
    if shape.model_name:
        merits.append("the model is not in memory" if unloaded else "the model is in memory")
    if preferred:
        merits.append(f"{len(preferred) - lacking} of {len(preferred)} preferred labels")
    if node.node_id == avoid:
        merits.append("the latest attempt failed here")
    merits.append(f"tier {node.tier}")
    if ask.gpus:
        merits.append(f"{seat.room.vram_free_mb} MiB of VRAM free")
    elif node.gpus:
        merits.append(f"{len(node.gpus)} GPUs that are not asked for")
    merits.append(f"{len(seat.taken)} of {node.slots} slots taken")
    return merits
