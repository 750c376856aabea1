"""Which node gets an item, and why each of the others does not. Pure.

First filters: a node that fails one cannot have the item, and the reason is kept, with whether it may
change (busy, silent) or never will (wrong work type, too small). Then a score among those that fit: model
already in memory, no earlier failure there, most room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.contracts.work import NodeVerdict, Requirements, WorkRecord

NO_REQUIREMENTS: Final = Requirements()

SCORE_LOADED: Final = 100.0
"""The model is in memory: no load time."""

SCORE_OTHER_NODE: Final = 50.0
"""The last attempt failed on another node."""

SCORE_ROOM: Final = 10.0
"""All slots free; less in proportion when some are taken."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A node and what the scheduler knows of it beyond its record."""

    node: NodeRecord
    taken: int
    """Items assigned to it or running on it."""
    loaded_models: frozenset[str] = frozenset()
    accepting: bool = True
    unreachable: str = ""
    """Why nothing can be delivered to it now."""


class Refusal(msgspec.Struct, frozen=True, gc=False):
    reason: str
    may_change: bool


def choose(record: WorkRecord, candidates: Iterable[Candidate]) -> str | None:
    """The node id of the best fit, or None when no node fits now. Ties go to the lower id."""
    best: tuple[float, str] | None = None
    for candidate in candidates:
        if next(refusals(record, candidate), None) is None:
            rank = (-score(record, candidate), candidate.node.node_id)
            best = rank if best is None else min(best, rank)
    return best[1] if best else None


def explain(record: WorkRecord, candidates: Iterable[Candidate]) -> list[NodeVerdict]:
    """A verdict per node, the best first."""
    verdicts = [_verdict(record, candidate) for candidate in candidates]
    return sorted(verdicts, key=lambda v: (not v.fits, not v.may_change, -v.score, v.node_id))


def _verdict(record: WorkRecord, candidate: Candidate) -> NodeVerdict:
    against = list(refusals(record, candidate))
    return NodeVerdict(
        node_id=candidate.node.node_id,
        fits=not against,
        may_change=all(refusal.may_change for refusal in against),
        reasons=[refusal.reason for refusal in against],
        score=0.0 if against else score(record, candidate),
    )


def score(record: WorkRecord, candidate: Candidate) -> float:
    """How good a fitting node is; only the order matters."""
    loaded = SCORE_LOADED if record.model_name and record.model_name in candidate.loaded_models else 0.0
    elsewhere = SCORE_OTHER_NODE if record.error and record.node_id != candidate.node.node_id else 0.0
    return loaded + elsewhere + SCORE_ROOM * (1 - candidate.taken / candidate.node.slots)


def refusals(record: WorkRecord, candidate: Candidate) -> Iterator[Refusal]:
    """Everything that speaks against a node, what decides fastest first."""
    node = candidate.node
    if node.slots == 0:
        yield Refusal("takes no work", may_change=False)
    elif candidate.taken >= node.slots:
        yield Refusal(f"busy: {candidate.taken} of {node.slots} slots taken", may_change=True)
    if node.state is not NodeState.ONLINE:
        yield Refusal(f"{node.state}", may_change=True)
    if node.drained:
        yield Refusal(f"drained: {node.drain_reason}" if node.drain_reason else "drained", may_change=True)
    if not candidate.accepting:
        yield Refusal("draining", may_change=True)
    if candidate.unreachable:
        yield Refusal(candidate.unreachable, may_change=True)
    if record.replicas > 1 and node.delivery != "direct":
        yield Refusal("takes no items with replicas: it has no direct delivery", may_change=False)
    if node.work_types and record.work_type not in node.work_types:
        yield Refusal(f"does no {record.work_type!r}, but {', '.join(node.work_types)}", may_change=False)
    if record.model_name and node.models and record.model_name not in node.models:
        yield Refusal(f"has no model {record.model_name!r}, but {', '.join(node.models[:5])}", may_change=False)
    if record.requirements != NO_REQUIREMENTS:
        yield from _hardware(record, node)


def _hardware(record: WorkRecord, node: NodeRecord) -> Iterator[Refusal]:
    need = record.requirements
    if need.node_id is not None and need.node_id != node.node_id:
        yield Refusal(f"the item is only for {need.node_id}", may_change=False)
    if need.min_tier is not None and not node.tier.at_least(need.min_tier):
        yield Refusal(f"tier {node.tier}, needs {need.min_tier}", may_change=False)
    gpus = max(need.gpus, 1 if need.vram_mb else 0)
    if gpus:
        fit = sum(gpu.vram_total_mb >= need.vram_mb for gpu in node.gpus)
        if fit < gpus:
            size = f" with {need.vram_mb} MiB" if need.vram_mb else ""
            yield Refusal(f"{fit} GPUs{size}, needs {gpus}", may_change=False)
    # A node that tells nothing of its size is not refused for it.
    if need.ram_mb and node.memory is not None and 0 < node.memory.total_mb < need.ram_mb:
        yield Refusal(f"{node.memory.total_mb} MiB of RAM, needs {need.ram_mb}", may_change=False)
    if need.cpus and node.cpu is not None and 0 < node.cpu.threads < need.cpus:
        yield Refusal(f"{node.cpu.threads} CPUs, needs {need.cpus}", may_change=False)
    for name, value in need.labels.items():
        if node.labels.get(name) != value:
            yield Refusal(f"label {name}={node.labels.get(name, '(none)')}, needs {value}", may_change=False)
