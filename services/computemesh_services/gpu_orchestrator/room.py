"""What is free of a node's GPUs, what of it a request gets, and why not. Pure: plain data in, plain data out.

    free = physical - headroom - reserved - in use by others

*Others* are processes that belong to no reservation, and what a reservation's processes use beyond its size. A
process belongs to the reservation whose id it carries in its environment, or that names its pid. Where the
driver does not tell processes, what others use was noted at the latest grant; growth since then is taken for
the holders' own, up to what they reserved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import nsmallest
from operator import attrgetter
from typing import Final

import msgspec

from computemesh.contracts.gpus import (
    GpuCanFit,
    GpuGrant,
    GpuHolder,
    GpuLedger,
    GpuShare,
    GpuState,
    GpuVerdict,
    WhyNot,
)
from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.hardware import Gpu, GpuUse
from computemesh_services.gpu_orchestrator.topology import Group, Topology, best_group, joined, measured, topology_of

VERDICTS_MAX: Final = 32
"""GPUs of which an answer says why not."""

GRANTS_MAX: Final = 500
SHARES_MAX: Final = 2000
PIDS_MAX: Final = 4000
"""Reservations of one node, their GPUs and their pids: what keeps a record below the size of a message."""


class Facts(msgspec.Struct, frozen=True, gc=False):
    """A node as it was announced, and what its heartbeats told since."""

    node: NodeRecord
    topology: Topology
    revision: int = 0
    """Of the node's record."""
    uses: tuple[GpuUse, ...] = ()
    """What the latest heartbeat told; empty = nothing yet, the announcement stands."""
    accepting: bool = True
    heard_at: float | None = None
    """Unix seconds of that heartbeat."""


def facts_of(node: NodeRecord, revision: int = 0) -> Facts:
    """What an announcement alone tells."""
    return Facts(node=node, topology=topology_of(node), revision=revision)


class Spot(msgspec.Struct, frozen=True, gc=False):
    """One GPU and what is left of it."""

    gpu: Gpu
    key: str
    total_mb: int
    most_mb: int
    """What could be reserved of it, were it all free."""
    used_mb: int
    reserved_mb: int
    external_mb: int
    free_mb: int
    over_mb: int
    against: WhyNot | None
    """Why nothing of it can be had, whatever is asked."""
    because: str
    holders: tuple[GpuHolder, ...]
    use: GpuUse | None


class Room(msgspec.Struct, frozen=True, gc=False):
    """A node and what is left of it."""

    node: NodeRecord
    topology: Topology
    spots: tuple[Spot, ...]
    """In the order of the announcement; behind them, GPUs that are gone and still reserved."""
    against: str
    """Why nothing of the node can be had; empty when it can."""
    free_mb: tuple[int, ...]
    """By position, below 0 where nothing can be had."""
    best_mb: int
    """The most that one GPU has free; below 0 when nothing can be had."""
    until: float
    """Unix seconds until which this holds if nothing is said: when the next reservation ends."""
    heard_at: float | None
    sliced: bool
    """Whether some of its GPUs are slices."""
    total_mb: int
    reserved_mb: int
    external_mb: int
    """Of all GPUs together."""


class Pick(msgspec.Struct, frozen=True, gc=False):
    """GPUs of a node that a request may have, and how good they are."""

    node_id: str
    spots: tuple[Spot, ...]
    rank: tuple[int, int, int]
    """Of two picks, the lower one is better."""


def key_of(uuid: str, index: int) -> str:
    """What a GPU is known by: its uuid, since indices shift when one is removed."""
    return uuid or f"#{index}"


def live(ledger: GpuLedger, now: float) -> list[GpuGrant]:
    return [grant for grant in ledger.grants if grant.expires_at > now]


# --- what is left --------------------------------------------------------------------------------------------------


def room_of(ledger: GpuLedger, facts: Facts, now: float, *, headroom_mb: int = 0) -> Room:
    """What is left of a node: *ledger* says what is reserved, *facts* what there is and what is in use."""
    node = facts.node
    held: dict[str, list[tuple[GpuGrant, GpuShare]]] = {}
    grants = live(ledger, now)
    for grant in grants:
        for share in grant.gpus:
            held.setdefault(key_of(share.uuid, share.index), []).append((grant, share))
    by_uuid = {use.uuid: use for use in facts.uses if use.uuid}
    by_index = {use.index: use for use in facts.uses if not use.uuid}
    split = {gpu.mig_parent for gpu in node.gpus if gpu.mig_parent}
    spots: list[Spot] = []
    for gpu in node.gpus:
        key = key_of(gpu.uuid, gpu.index)
        use = by_uuid.get(gpu.uuid) if gpu.uuid else by_index.get(gpu.index)
        gone = bool(facts.uses) and use is None and facts.heard_at is not None
        spots.append(_spot(gpu, key, use, held, ledger.baselines.get(key), split, headroom_mb, gone=gone))
    known = {spot.key for spot in spots}
    spots += [_ghost(key, pairs) for key, pairs in held.items() if key not in known]
    against = _against_node(node, facts, grants)
    free = tuple(-1 if against or spot.against else spot.free_mb for spot in spots[: len(node.gpus)])
    return Room(
        node=node,
        topology=facts.topology,
        spots=tuple(spots),
        against=against,
        free_mb=free,
        best_mb=max(free, default=-1),
        until=min((grant.expires_at for grant in grants), default=float("inf")),
        heard_at=facts.heard_at,
        sliced=bool(split),
        total_mb=sum(spot.total_mb for spot in spots),
        reserved_mb=sum(spot.reserved_mb for spot in spots),
        external_mb=sum(spot.external_mb for spot in spots),
    )


def _against_node(node: NodeRecord, facts: Facts, grants: Sequence[GpuGrant]) -> str:
    if node.state is not NodeState.ONLINE:
        return f"the node is {node.state}"
    if node.drained or not facts.accepting:
        return "the node is drained"
    shares = sum(len(grant.gpus) for grant in grants)
    pids = sum(len(grant.pids) for grant in grants)
    if len(grants) >= GRANTS_MAX or shares >= SHARES_MAX or pids >= PIDS_MAX:
        return (
            f"the node has {len(grants)} reservations of {shares} GPUs by {pids} processes, as many as its record holds"
        )
    return ""


def _spot(
    gpu: Gpu,
    key: str,
    use: GpuUse | None,
    held: dict[str, list[tuple[GpuGrant, GpuShare]]],
    baseline_mb: int | None,
    split: set[str],
    headroom_mb: int,
    *,
    gone: bool,
) -> Spot:
    pairs = held.get(key, [])
    seen = use or GpuUse(index=gpu.index, vram_used_mb=gpu.vram_used_mb, processes=gpu.processes, error=gpu.error)
    external, used_by = _others(seen, pairs, baseline_mb)
    reserved = sum(share.mb for _, share in pairs)
    most = max(0, gpu.vram_total_mb - headroom_mb)
    against, because = _against_gpu(gpu, seen, split, held, gone=gone)
    return Spot(
        gpu=gpu,
        key=key,
        total_mb=gpu.vram_total_mb,
        most_mb=most,
        used_mb=seen.vram_used_mb,
        reserved_mb=reserved,
        external_mb=external,
        free_mb=max(0, most - reserved - external),
        over_mb=max(0, reserved + external - gpu.vram_total_mb),
        against=against,
        because=because,
        holders=tuple(_holder(grant, share, used_by.get(grant.reservation_id)) for grant, share in pairs),
        use=use,
    )


def _against_gpu(
    gpu: Gpu, seen: GpuUse, split: set[str], held: dict[str, list[tuple[GpuGrant, GpuShare]]], *, gone: bool
) -> tuple[WhyNot | None, str]:
    if gone:
        return WhyNot.GONE, "the node no longer tells of it"
    if seen.error or gpu.error:
        return WhyNot.ERROR, f"the driver cannot read it: {seen.error or gpu.error}"
    if gpu.uuid and gpu.uuid in split:
        return WhyNot.MIG, "it is split into slices, which are had one by one"
    if gpu.mig_parent and gpu.mig_parent in held:
        return WhyNot.RESERVED, "the GPU it is a slice of was reserved whole"
    return None, ""


def _others(
    seen: GpuUse, pairs: Sequence[tuple[GpuGrant, GpuShare]], baseline_mb: int | None
) -> tuple[int, dict[str, int]]:
    """What others use of a GPU, and what each holder does where that is told."""
    used = seen.vram_used_mb
    if not pairs:
        return used, {}
    processes = seen.processes
    if processes is None or any(process.memory_mb is None for process in processes):
        before = used if baseline_mb is None else baseline_mb
        own = min(max(0, used - before), sum(share.mb for _, share in pairs))
        return used - own, {}
    owners = {pid: grant.reservation_id for grant, _ in pairs for pid in grant.pids}
    own_by = {grant.reservation_id: 0 for grant, _ in pairs}
    for process in processes:
        owner = process.reservation_id if process.reservation_id in own_by else owners.get(process.pid)
        if owner is not None:
            own_by[owner] += process.memory_mb or 0
    # What holders use within what they reserved is reserved already.
    within = sum(min(own_by[grant.reservation_id], share.mb) for grant, share in pairs)
    return max(0, used - within), own_by


def _ghost(key: str, pairs: Sequence[tuple[GpuGrant, GpuShare]]) -> Spot:
    """A GPU that is gone and still reserved."""
    share = pairs[0][1]
    return Spot(
        gpu=Gpu(index=share.index, uuid=share.uuid),
        key=key,
        total_mb=0,
        most_mb=0,
        used_mb=0,
        reserved_mb=sum(share.mb for _, share in pairs),
        external_mb=0,
        free_mb=0,
        over_mb=0,
        against=WhyNot.GONE,
        because="the node no longer tells of it",
        holders=tuple(_holder(grant, share, None) for grant, share in pairs),
        use=None,
    )


def _holder(grant: GpuGrant, share: GpuShare, used_mb: int | None) -> GpuHolder:
    return GpuHolder(
        reservation_id=grant.reservation_id,
        owner=grant.owner,
        mb=share.mb,
        used_mb=used_mb,
        expires_at=grant.expires_at,
    )


def state_of(spot: Spot, room: Room) -> GpuState:
    """A GPU as it is shown."""
    gpu, use = spot.gpu, spot.use
    return GpuState(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        total_mb=spot.total_mb,
        used_mb=spot.used_mb,
        reserved_mb=spot.reserved_mb,
        external_mb=spot.external_mb,
        free_mb=0 if room.against or spot.against else spot.free_mb,
        over_mb=spot.over_mb,
        utilization_percent=use.utilization_percent if use else gpu.utilization_percent,
        compute_capability=gpu.compute_capability,
        mig_parent=gpu.mig_parent,
        mig_profile=gpu.mig_profile,
        unavailable=room.against or spot.because,
        reservations=list(spot.holders),
    )


# --- what a request gets of it ---------------------------------------------------------------------------------------


def count_of(ask: GpuCanFit) -> int:
    """How many GPUs a request wants."""
    return ask.gpu_count or len(ask.gpu_indices) or 1


def pick(room: Room, ask: GpuCanFit) -> Pick | None:
    """The GPUs of a node that suit a request best; None when it cannot have them now.

    Named GPUs are taken as named. Otherwise, where links are preferred, the group that
    :mod:`~computemesh_services.gpu_orchestrator.topology` finds; else the GPUs with the least free that is
    enough, so that large holes stay.
    """
    found = _ranked(room, ask)
    return _picked(room, *found) if found else None


def best_of(rooms: Iterable[Room], ask: GpuCanFit) -> Pick | None:
    """The best of many nodes: linked if that is preferred, then with the least left over, then the lowest id."""
    best: tuple[tuple[int, int, int], str] | None = None
    where: tuple[Room, Group] | None = None
    for room in rooms:
        if room.best_mb < ask.required_mb or (found := _ranked(room, ask)) is None:
            continue
        group, rank = found
        if best is None or (rank, room.node.node_id) < best:
            best, where = (rank, room.node.node_id), (room, group)
    return _picked(*where, best[0]) if best and where else None


def _picked(room: Room, group: Group, rank: tuple[int, int, int]) -> Pick:
    return Pick(room.node.node_id, tuple(room.spots[at] for at in group.chosen), rank)


def _ranked(room: Room, ask: GpuCanFit) -> tuple[Group, tuple[int, int, int]] | None:
    if room.against or room.best_mb < ask.required_mb or _node_filter(room.node, ask):
        return None
    return _chosen(room, ask, _open(room, ask, room.free_mb))


def _chosen(room: Room, ask: GpuCanFit, free: tuple[int, ...]) -> tuple[Group, tuple[int, int, int]] | None:
    """The best group, were so much *free* by position, and how good it is."""
    count = count_of(ask)
    if ask.gpu_indices:
        at_index = {spot.gpu.index: at for at, spot in enumerate(room.spots[: len(free)])}
        chosen = tuple(at_index.get(index, -1) for index in ask.gpu_indices)
        if any(at < 0 or free[at] < ask.required_mb for at in chosen):
            return None
        group = measured(room.topology, chosen)
    elif count > 1 and (ask.prefer_nvlink or ask.require_nvlink):
        found = best_group(room.topology, free, count, ask.required_mb)
        if found is None:
            return None
        group = found
    else:
        tight = _tightest(free, count, ask.required_mb)
        if tight is None:
            return None
        group = tight
    if ask.require_nvlink and count > 1 and not joined(room.topology.linked, group.chosen):
        return None
    left = sum(free[at] for at in group.chosen) - ask.required_mb * count
    linked = ask.prefer_nvlink and group.joined
    return group, (-int(linked), left, -group.gain if ask.prefer_nvlink else 0)


@lru_cache(maxsize=4096)
def _tightest(free: tuple[int, ...], count: int, required_mb: int) -> Group | None:
    """The GPUs with the least free that is enough."""
    fit = nsmallest(count, ((mb, at) for at, mb in enumerate(free) if mb >= required_mb))
    if len(fit) < count:
        return None
    return Group(tuple(sorted(at for _, at in fit)), joined=False, gain=0)


def _open(room: Room, ask: GpuCanFit, free: tuple[int, ...]) -> tuple[int, ...]:
    """What is free by position, below 0 where the request does not want that GPU."""
    slices = room.sliced and _one_program(ask)
    if not slices and not ask.min_compute_capability and not ask.min_vram_mb and not ask.gpu_model:
        return free
    return tuple(
        -1 if _gpu_filter(room.spots[at].gpu, ask) or (slices and room.spots[at].gpu.mig_parent) else mb
        for at, mb in enumerate(free)
    )


def _one_program(ask: GpuCanFit) -> bool:
    """Whether several GPUs are wanted for a program, which can use one slice only. Who names GPUs of a certain
    node knows what they are."""
    return count_of(ask) > 1 and not (ask.gpu_indices and ask.node_id)


def _node_filter(node: NodeRecord, ask: GpuCanFit) -> str:
    """Why a request does not want a node, if it does not."""
    if ask.node_id is not None and ask.node_id != node.node_id:
        return f"only {ask.node_id} is asked for"
    if ask.min_tier is not None and not node.tier.at_least(ask.min_tier):
        return f"tier {node.tier}, needs {ask.min_tier}"
    if ask.platform is not None and node.platform is not ask.platform:
        return f"platform {node.platform or 'not told'}, needs {ask.platform}"
    for name, value in ask.labels.items():
        if node.labels.get(name) != value:
            return f"label {name}={node.labels.get(name, '(none)')}, needs {value}"
    return ""


def _gpu_filter(gpu: Gpu, ask: GpuCanFit) -> str:
    if ask.min_vram_mb > gpu.vram_total_mb:
        return f"{gpu.vram_total_mb} MiB in all, needs {ask.min_vram_mb}"
    if ask.gpu_model.lower() not in gpu.name.lower():
        return f"{gpu.name or 'a GPU without a name'}, needs {ask.gpu_model}"
    if ask.min_compute_capability and version(gpu.compute_capability) < version(ask.min_compute_capability):
        return f"compute capability {gpu.compute_capability or 'not told'}, needs {ask.min_compute_capability}"
    return ""


def version(text: str) -> tuple[int, int]:
    """A compute capability as numbers; below all others when it is none."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() and (minor or "0").isdecimal() else (-1, 0)


# --- why not ---------------------------------------------------------------------------------------------------------

_NEAREST: Final = {code: max(0, place - 4) for place, code in enumerate(WhyNot)}
"""Memory that is taken, a quota and the wrong neighbours are equally near: what is missing decides."""


class Against(msgspec.Struct, frozen=True, gc=False):
    """What speaks against one GPU. Put in words only for those that are told."""

    room: Room
    spot: Spot | None
    """None for a GPU that is named and does not exist."""
    index: int
    code: WhyNot
    short_mb: int
    may_change: bool
    """False: this GPU can never do, as it is now."""
    text: str
    """Empty where the numbers say it."""

    @property
    def distance(self) -> tuple[bool, int, int, str, int]:
        return not self.may_change, _NEAREST[self.code], self.short_mb, self.room.node.node_id, self.index


class Refusals:
    """Collects why not, of as many nodes as there are, and keeps what comes closest."""

    def __init__(self, ask: GpuCanFit) -> None:
        self.counts: Counter[WhyNot] = Counter()
        self.may_change = False
        """Whether it could be had one day, as things are made."""
        self._ask = ask
        self._kept: list[Against] = []

    def add(self, room: Room) -> None:
        """Takes the reasons of a node that :func:`pick` gets nothing from."""
        for against in why_not(room, self._ask):
            self.counts[against.code] += 1
            self.may_change = self.may_change or against.may_change
            self._kept.append(against)
        if len(self._kept) > 64 * VERDICTS_MAX:
            self._kept = nsmallest(VERDICTS_MAX, self._kept, key=_distance)

    @property
    def closest(self) -> list[GpuVerdict]:
        return [_verdict(against, self._ask) for against in nsmallest(VERDICTS_MAX, self._kept, key=_distance)]


_distance = attrgetter("distance")


def why_not(room: Room, ask: GpuCanFit) -> Iterator[Against]:
    """Why a node that :func:`pick` got nothing from gives nothing, GPU by GPU."""
    named = set(ask.gpu_indices)
    several = _one_program(ask)
    against_node = _node_filter(room.node, ask)
    ever = not against_node and _could_ever(room, ask)
    would_do: list[Spot] = []
    for at, spot in enumerate(room.spots):
        if named and spot.gpu.index not in named:
            continue
        if against_node:
            yield _against(room, spot, ask, WhyNot.FILTER, against_node, may_change=False)
        elif kind := _gpu_filter(spot.gpu, ask):
            yield _against(room, spot, ask, WhyNot.FILTER, kind, may_change=False)
        elif spot.against is not None:
            may = ever and spot.against is not WhyNot.MIG
            yield _against(room, spot, ask, spot.against, spot.because, may_change=may)
        elif several and spot.gpu.mig_parent:
            text = "it is a slice, and a program uses one slice only"
            yield _against(room, spot, ask, WhyNot.MIG, text, may_change=False)
        elif spot.most_mb < ask.required_mb:
            yield _against(room, spot, ask, WhyNot.TOO_SMALL, "", may_change=False)
        elif room.against:
            yield _against(room, spot, ask, WhyNot.NODE_STATE, room.against, may_change=ever)
        elif at >= len(room.free_mb) or spot.free_mb < ask.required_mb:
            held = spot.reserved_mb >= ask.required_mb - spot.free_mb
            yield _against(room, spot, ask, WhyNot.RESERVED if held else WhyNot.USED, "", may_change=ever)
        else:
            would_do.append(spot)
    for index in sorted(named - {spot.gpu.index for spot in room.spots}):
        text = "the node has no such GPU"
        yield Against(room, None, index, WhyNot.ABSENT, ask.required_mb, may_change=False, text=text)
    unlinked = ask.require_nvlink and len(would_do) >= count_of(ask)
    for spot in would_do:
        if unlinked:
            text = f"no fabric joins it to {count_of(ask) - 1} others that have {ask.required_mb} MiB free"
            yield _against(room, spot, ask, WhyNot.UNLINKED, text, may_change=ever)
        else:
            would = f"{len(would_do)} GPU{'s' * (len(would_do) > 1)} of the node would do"
            text = f"{would}, needs {'GPUs ' + ', '.join(map(str, ask.gpu_indices)) if named else count_of(ask)}"
            yield _against(room, spot, ask, WhyNot.TOO_FEW, text, may_change=ever)


def _could_ever(room: Room, ask: GpuCanFit) -> bool:
    """Whether the node, with nothing on it, could give what is asked for."""
    empty = tuple(-1 if spot.against is WhyNot.MIG else spot.most_mb for spot in room.spots[: len(room.node.gpus)])
    return _chosen(room, ask, _open(room, ask, empty)) is not None


def _against(room: Room, spot: Spot, ask: GpuCanFit, code: WhyNot, text: str, *, may_change: bool) -> Against:
    short = max(0, ask.required_mb - spot.free_mb)
    return Against(room, spot, spot.gpu.index, code, short, may_change=may_change, text=text)


def _in_words(against: Against, spot: Spot, ask: GpuCanFit) -> str:
    if against.text:
        return against.text
    if against.code is WhyNot.TOO_SMALL:
        return f"{spot.most_mb} MiB in all, needs {ask.required_mb}"
    parts = [f"{spot.free_mb} of {spot.total_mb} MiB free, needs {ask.required_mb}"]
    if spot.reserved_mb:
        parts.append(f"{spot.reserved_mb} reserved by {_names(spot.holders)}")
    if spot.external_mb:
        parts.append(f"{spot.external_mb} used by others")
    return "; ".join(parts)


def _names(holders: Sequence[GpuHolder], names_max: int = 3) -> str:
    names = list(dict.fromkeys(holder.owner or holder.reservation_id for holder in holders))
    more = f" and {len(names) - names_max} more" if len(names) > names_max else ""
    return ", ".join(names[:names_max]) + more


def _verdict(against: Against, ask: GpuCanFit) -> GpuVerdict:
    spot = against.spot
    told = GpuVerdict(
        node_id=against.room.node.node_id,
        index=against.index,
        code=against.code,
        reason=against.text,
        short_mb=against.short_mb,
        may_change=against.may_change,
    )
    if spot is None:
        return told
    return msgspec.structs.replace(
        told,
        uuid=spot.gpu.uuid,
        name=spot.gpu.name,
        reason=_in_words(against, spot, ask),
        total_mb=spot.total_mb,
        reserved_mb=spot.reserved_mb,
        external_mb=spot.external_mb,
        free_mb=spot.free_mb,
    )
