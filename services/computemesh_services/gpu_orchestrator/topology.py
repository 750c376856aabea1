"""Which GPUs of a node go well together. Pure.

Sets are compared by, in this order: whether NVLink or Infinity Fabric joins all of them (directly or through
each other), how many such links they have among themselves, how near they are over PCIe and NUMA, how little
stays free on them. The best set is found exactly among up to 16 GPUs; among more
it is grown from each GPU by adding the best next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import msgspec

from computemesh.contracts.nodes import NodeRecord
from computemesh.hardware import GpuLink, LinkKind

EXACT_MAX: Final = 16
"""GPUs among which every set is considered."""

_LANE: Final = 2**20
"""One link outweighs nearness over PCIe of every pair there can be."""

_NEARNESS: Final = {LinkKind.PIX: 5, LinkKind.PXB: 4, LinkKind.PHB: 3, LinkKind.NODE: 2, LinkKind.SYS: 0}
_UNKNOWN: Final = 1
"""Nearness of two GPUs of which nothing is known."""

_FABRICS: Final = (LinkKind.NVLINK, LinkKind.XGMI)


class Topology(msgspec.Struct, frozen=True, gc=False):
    """The GPUs of a node by their position in its announcement. Hashable: nodes of one make share answers."""

    gains: tuple[tuple[int, ...], ...]
    """How good each pair is to have together."""
    linked: tuple[int, ...]
    """For each GPU, a bit for every other that a fabric joins to it."""

    def __hash__(self) -> int:
        return hash((self.gains, self.linked))


def topology_of(node: NodeRecord) -> Topology:
    """How the GPUs of a node reach each other."""
    size = len(node.gpus)
    by_index = {gpu.index: at for at, gpu in enumerate(node.gpus)}
    gains = [[_by_numa(node, a, b) for b in range(size)] for a in range(size)]
    linked = [0] * size
    for link in node.gpu_links:
        a, b = by_index.get(link.a), by_index.get(link.b)
        if a is None or b is None or a == b:
            continue
        gains[a][b] = gains[b][a] = _gain(link)
        if link.kind in _FABRICS:
            linked[a] |= 1 << b
            linked[b] |= 1 << a
    return Topology(gains=tuple(map(tuple, gains)), linked=tuple(linked))


def _gain(link: GpuLink) -> int:
    if link.kind in _FABRICS:
        return _LANE * max(1, link.lanes)
    return _NEARNESS[link.kind]


def _by_numa(node: NodeRecord, a: int, b: int) -> int:
    first, second = node.gpus[a].numa_node, node.gpus[b].numa_node
    if first is None or second is None:
        return _UNKNOWN
    return _NEARNESS[LinkKind.NODE] if first == second else _NEARNESS[LinkKind.SYS]


def joined(linked: tuple[int, ...], chosen: Sequence[int]) -> bool:
    """Whether a fabric joins all of *chosen*, directly or through others of them."""
    return _reach(linked, chosen[0], chosen).bit_count() == len(chosen)


def _reach(linked: tuple[int, ...], start: int, among: Sequence[int]) -> int:
    """What a fabric joins to *start* by way of *among*, as bits."""
    members = sum(1 << at for at in among)
    reached = frontier = 1 << start
    while frontier:
        at = frontier.bit_length() - 1
        frontier &= ~(1 << at)
        new = linked[at] & members & ~reached
        reached |= new
        frontier |= new
    return reached


class Group(msgspec.Struct, frozen=True, gc=False):
    """GPUs that were chosen, by position, and how good they are together."""

    chosen: tuple[int, ...]
    joined: bool
    gain: int


def measured(topology: Topology, chosen: tuple[int, ...]) -> Group:
    gain = sum(topology.gains[a][b] for i, a in enumerate(chosen) for b in chosen[i + 1 :])
    return Group(chosen, joined(topology.linked, chosen), gain)


@lru_cache(maxsize=4096)
def best_group(topology: Topology, free_mb: tuple[int, ...], count: int, required_mb: int) -> Group | None:
    """The best *count* GPUs with at least *required_mb* free each; None when there are too few.

    Args:
        free_mb: by position; below 0 for a GPU that is not to be had.
    """
    fit = sorted((at for at, free in enumerate(free_mb) if free >= required_mb), key=lambda at: (free_mb[at], at))
    if len(fit) < count:
        return None
    if len(fit) > EXACT_MAX:
        return max((_grown(topology, free_mb, fit, first, count) for first in fit), key=lambda g: _rank(g, free_mb))
    return _Search(topology, free_mb, fit, count).run()


def _rank(group: Group, free_mb: tuple[int, ...]) -> tuple[bool, int, int, tuple[int, ...]]:
    free = sum(free_mb[at] for at in group.chosen)
    return group.joined, group.gain, -free, tuple(-at for at in group.chosen)


def _grown(topology: Topology, free_mb: tuple[int, ...], fit: list[int], first: int, count: int) -> Group:
    chosen, left = [first], [at for at in fit if at != first]
    reach = topology.linked[first]
    while len(chosen) < count:
        best = max(
            left, key=lambda at: (reach >> at & 1, sum(topology.gains[at][o] for o in chosen), -free_mb[at], -at)
        )
        left.remove(best)
        chosen.append(best)
        reach |= topology.linked[best]
    return measured(topology, tuple(sorted(chosen)))


class _Search:
    """All sets, the most promising first; a branch that cannot become better than the best is left."""

    def __init__(self, topology: Topology, free_mb: tuple[int, ...], fit: list[int], count: int) -> None:
        self._topology = topology
        self._free_mb = free_mb
        self._fit = fit
        self._count = count
        self._best: tuple[tuple[bool, int, int, tuple[int, ...]], Group] | None = None
        self._pair_max = max((topology.gains[a][b] for a in fit for b in fit if a != b), default=0)
        self._may_join = any(_reach(topology.linked, at, fit).bit_count() >= count for at in fit)
        self._least = [0]
        """The least that any so many GPUs have free together."""
        for at in fit:
            self._least.append(self._least[-1] + free_mb[at])

    def run(self) -> Group:
        gains = self._topology.gains
        starts = sorted(range(len(self._fit)), key=lambda i: -sum(gains[self._fit[i]][o] for o in self._fit))
        # Each set is visited once: a start excludes those before it.
        for number, start in enumerate(starts):
            rest = [self._fit[i] for i in starts[number + 1 :]]
            if len(rest) >= self._count - 1:
                at = self._fit[start]
                self._extend((at,), 0, self._free_mb[at], rest)
        assert self._best is not None
        return self._best[1]

    def _extend(self, chosen: tuple[int, ...], gain: int, free: int, rest: list[int]) -> None:
        missing = self._count - len(chosen)
        if missing == 0:
            group = measured(self._topology, tuple(sorted(chosen)))
            rank = _rank(group, self._free_mb)
            if self._best is None or rank > self._best[0]:
                self._best = rank, group
            return
        pairs = missing * len(chosen) + missing * (missing - 1) // 2
        if self._best is not None:
            bound = (self._may_join, gain + pairs * self._pair_max, -(free + self._least[missing]))
            if bound <= self._best[0][:3]:
                return
        gains = self._topology.gains
        added = sorted(((sum(gains[at][o] for o in chosen), -self._free_mb[at], -at) for at in rest), reverse=True)
        order = [-at for _, _, at in added]
        for number, (more, free_less, _) in enumerate(added):
            if len(order) - number < missing:
                break
            at = order[number]
            self._extend((*chosen, at), gain + more, free - free_less, order[number + 1 :])
