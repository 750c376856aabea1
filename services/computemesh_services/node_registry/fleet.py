"""All nodes in memory, and the answers about them. Pure: no clock, no bus.

A record comes from the store, what a heartbeat said is kept beside it and never stored. Queries walk over
the nodes in the order of their ids, one narrowing pass for each condition, and encode each node once until
it says something new: ten thousand nodes cost a few milliseconds at most.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import Final

import msgspec
from msgspec.structs import replace

from computemesh.contracts.base import Refused, encode
from computemesh.contracts.nodes import (
    NodeBrief,
    NodeHeartbeat,
    NodeRecord,
    NodeSort,
    NodesQuery,
    NodesStats,
    NodeState,
    NodeView,
)
from computemesh.hardware import Gpu, GpuUse, Tier

Raw = msgspec.Raw
RANK: Final = {tier: rank for rank, tier in enumerate(reversed(Tier))}
ORDER: Final = {state: rank for rank, state in enumerate(NodeState)}
FOUND_MAX: Final = 64
"""Queries whose matches are remembered."""

VIEW_BYTES_MAX: Final = 512 * 1024
"""Above this the processes on its GPUs are left out of a node's view."""


class Known:
    """One node: its record, and what was heard of it since."""

    __slots__ = (
        "_brief", "_full", "_gpus", "_used_mb", "beat", "heard_s", "record", "seen_at", "skew_s", "vram_total_mb",
    )  # fmt: skip

    def __init__(self, record: NodeRecord) -> None:
        self.heard_s: float | None = None
        """Monotonic seconds of the last sign of life; None = none since the start."""
        self.seen_at = 0.0
        """The same in Unix seconds; 0 = none since the start."""
        self.beat: NodeHeartbeat | None = None
        self.skew_s: float | None = None
        self.take(record)

    def take(self, record: NodeRecord) -> None:
        """The record was written."""
        before: NodeRecord | None = getattr(self, "record", None)
        if before is not None and (record.session != before.session or record.state is NodeState.LOST):
            self.beat = None
            self.skew_s = None
        self.record = record
        self.vram_total_mb = sum(gpu.vram_total_mb for gpu in record.gpus)
        self._changed()

    def says(self, beat: NodeHeartbeat, now_s: float, at: float) -> None:
        """A heartbeat of the recorded agent came: at *now_s* of the monotonic clock, *at* in Unix seconds."""
        self.beat = beat
        self.heard_s, self.seen_at = now_s, at
        self.skew_s = None if beat.sent_at is None else beat.sent_at - at
        self._changed()

    def seen(self, now_s: float, at: float) -> None:
        """Another sign of life came."""
        self.heard_s, self.seen_at = now_s, at
        self._changed()

    def _changed(self) -> None:
        self._full: bytes | None = None
        self._brief: bytes | None = None
        self._gpus: list[Gpu] | None = None
        self._used_mb = 0

    # --- what it is like now ---------------------------------------------------------------------------------

    @property
    def gpus(self) -> list[Gpu]:
        """Its GPUs with what is in use of them."""
        if self._gpus is None:
            used = self.beat.gpus if self.beat else []
            self._gpus = with_use(self.record.gpus, used) if used else self.record.gpus
            self._used_mb = sum(gpu.vram_used_mb for gpu in self._gpus)
        return self._gpus

    @property
    def vram_used_mb(self) -> int:
        return self._used_mb if self.gpus else 0

    @property
    def memory_available_mb(self) -> int | None:
        if self.beat is not None and self.beat.memory_available_mb is not None:
            return self.beat.memory_available_mb
        memory = self.record.memory
        return memory.available_mb if memory is not None and memory.available_mb else None

    @property
    def running(self) -> int | None:
        return len(self.beat.running) if self.beat else None

    @property
    def last_seen(self) -> float:
        """Unix seconds of the last sign of life."""
        return max(self.record.last_seen, self.seen_at)

    def full(self) -> bytes:
        """Its :class:`NodeView` as JSON."""
        if self._full is None:
            view = self.view()
            self._full = encode(view)
            if len(self._full) > VIEW_BYTES_MAX:
                self._full = encode(replace(view, gpus=[replace(gpu, processes=None) for gpu in view.gpus]))
        return self._full

    def brief(self) -> bytes:
        """Its :class:`NodeBrief` as JSON."""
        if self._brief is None:
            record = self.record
            self._brief = encode(
                NodeBrief(
                    node_id=record.node_id,
                    state=record.state,
                    tier=record.tier,
                    drained=record.drained,
                    gpus=len(record.gpus),
                    vram_total_mb=self.vram_total_mb,
                    vram_used_mb=self.vram_used_mb,
                    slots=record.slots,
                    running=self.running,
                    cpu_percent=self.beat.cpu_percent if self.beat else None,
                    memory_available_mb=self.memory_available_mb,
                    last_seen=self.last_seen,
                )
            )
        return self._brief

    def view(self) -> NodeView:
        facts = {name: getattr(self.record, name) for name in NodeRecord.__struct_fields__}
        facts["gpus"] = self.gpus
        facts["last_seen"] = self.last_seen
        beat = self.beat
        if beat is None:
            return NodeView(**facts, memory_available_mb=self.memory_available_mb)
        return NodeView(
            **facts,
            cpu_percent=beat.cpu_percent,
            memory_available_mb=self.memory_available_mb,
            loaded_models=beat.loaded_models,
            engine_use=beat.engines,
            fetches=beat.fetches,
            running=len(beat.running),
            accepting=beat.accepting,
            clock_skew_s=self.skew_s,
        )


def with_use(gpus: Sequence[Gpu], used: Sequence[GpuUse]) -> list[Gpu]:
    """GPUs with what is in use of them: told apart by UUID, or by index where one has none."""
    by_uuid = {use.uuid: use for use in used if use.uuid}
    by_index = {use.index: use for use in used if not use.uuid}
    found: list[Gpu] = []
    for gpu in gpus:
        use = by_uuid.get(gpu.uuid) or by_index.get(gpu.index)
        if use is None and not gpu.uuid:
            use = next((other for other in used if other.index == gpu.index), None)
        if use is not None:
            gpu = replace(  # noqa: PLW2901
                gpu,
                vram_used_mb=use.vram_used_mb,
                utilization_percent=use.utilization_percent,
                processes=use.processes if use.processes is not None else gpu.processes,
                error=use.error,
            )
        found.append(gpu)
    return found


class Fleet:
    """Every node that is recorded."""

    def __init__(self) -> None:
        self.nodes: dict[str, Known] = {}
        self.states: Counter[NodeState] = Counter()
        """How many are in each state."""
        self._order: list[Known] = []
        """By id."""
        self._found: dict[bytes, list[Known]] = {}
        """What matched the recorded part of recent queries, until any record changes."""

    def get(self, node_id: str) -> Known | None:
        return self.nodes.get(node_id)

    def take(self, record: NodeRecord, now_s: float, at: float, *, fresh: bool) -> None:
        """A record was written, here or elsewhere.

        Args:
            now_s: monotonic seconds.
            at: the same moment in Unix seconds.
            fresh: it was written just now; when not, it was read from the store after a start.
        """
        self._found.clear()
        known = self.nodes.get(record.node_id)
        if known is None:
            known = self.nodes[record.node_id] = Known(record)
            insort(self._order, known, key=_node_id)
            seen = fresh
        else:
            self.states[known.record.state] -= 1
            seen = fresh and record.last_seen > known.record.last_seen and record.state is NodeState.ONLINE
            known.take(record)
        if seen:
            known.seen(now_s, at)
        self.states[record.state] += 1

    def drop(self, node_id: str) -> None:
        """A record was removed."""
        self._found.clear()
        known = self.nodes.pop(node_id, None)
        if known is not None:
            self.states[known.record.state] -= 1
            del self._order[bisect_left(self._order, node_id, key=_node_id)]

    # --- queries ---------------------------------------------------------------------------------------------

    def page(self, query: NodesQuery) -> Page | Refused:
        """The nodes that a query asks for, in its order, from its cursor on.

        Nodes that join, leave or say something new between two pages neither hide nor repeat others; one
        that moves in the order meanwhile may be met at both places, or at none.
        """
        cursor = read_cursor(query)
        if isinstance(cursor, Refused):
            return cursor
        if query.min_compute_capability and not capability(query.min_compute_capability):
            reason = f"{query.min_compute_capability!r} is no compute capability such as 8.9"
            return Refused(code="bad_message", field="min_compute_capability", reason=reason)
        found = self._recorded(query)
        for holds in of_heartbeats(query):
            found = [known for known in found if holds(known)]
        ordered = _from_id if query.sort is NodeSort.NODE_ID else _from_value
        return Page(len(found), ordered(found, query, cursor), query)

    def _recorded(self, query: NodesQuery) -> list[Known]:
        """The nodes whose records match, by id. A query that is repeated does not look at all of them again."""
        passes = of_records(query)
        if not passes:
            return self._order
        key = encode({name: getattr(query, name) for name in OF_RECORDS})
        found = self._found.get(key)
        if found is None:
            found = self._order
            for holds in passes:
                found = [known for known in found if holds(known)]
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            self._found[key] = found
        return found

    def stats(self) -> NodesStats:
        """The mesh in numbers."""
        tiers: Counter[str] = Counter()
        platforms: Counter[str] = Counter()
        drained = cpus = memory_mb = available_mb = gpus = vram_mb = used_mb = slots = running = 0
        for known in self.nodes.values():
            record = known.record
            tiers[record.tier.value] += 1
            if record.platform is not None:
                platforms[record.platform.value] += 1
            drained += record.drained
            if record.state is NodeState.LOST:
                continue
            cpus += record.cpu.threads if record.cpu else 0
            memory_mb += record.memory.total_mb if record.memory else 0
            available_mb += known.memory_available_mb or 0
            slots += record.slots
            running += len(known.beat.running) if known.beat else 0
            if record.gpus:
                gpus += len(record.gpus)
                vram_mb += known.vram_total_mb
                used_mb += known.vram_used_mb
        return NodesStats(
            nodes=len(self.nodes),
            states={state.value: self.states[state] for state in NodeState},
            tiers={tier.value: tiers[tier.value] for tier in Tier},
            platforms=dict(sorted(platforms.items())),
            drained=drained,
            cpus=cpus,
            memory_total_mb=memory_mb,
            memory_available_mb=available_mb,
            gpus=gpus,
            vram_total_mb=vram_mb,
            vram_used_mb=used_mb,
            slots=slots,
            running=running,
        )


class Page:
    """One answer: how many nodes match, and those of them that fit into it, encoded."""

    def __init__(self, count: int, nodes: list[Known], query: NodesQuery) -> None:
        """*nodes* has one more than the query's limit when there are more."""
        self.count: Final = count
        self.taken: list[Raw] = []
        self._nodes = nodes
        self._query = query
        self._size = 0

    def fill(self, encoded: Callable[[Known], bytes], *, bytes_max: int, nodes_max: int) -> bool:
        """Takes up to *nodes_max* further nodes, and says whether that was all.

        A first node is taken in any case; others while all together have at most *bytes_max*.
        """
        start = len(self.taken)
        for known in self._nodes[start : min(start + nodes_max, self._query.limit)]:
            data = encoded(known)
            if self.taken and self._size + len(data) + 1 > bytes_max:
                return True
            self._size += len(data) + 1
            self.taken.append(Raw(data))
        return len(self.taken) in (len(self._nodes), self._query.limit)

    @property
    def next(self) -> str:
        """The cursor behind the last node that was taken; empty when none follows."""
        if len(self.taken) == len(self._nodes):
            return ""
        return write_cursor(self._query, self._nodes[len(self.taken) - 1])


# --- conditions --------------------------------------------------------------------------------------------------

Condition = Callable[[Known], bool]

_CAPABILITY: Final = re.compile(r"([0-9]{1,4})(?:\.([0-9]{1,4}))?")


def of_records(query: NodesQuery) -> list[Condition]:
    """What a query asks of what is recorded, one test for each thing asked; the cheap ones first."""
    found: list[Condition] = []
    if query.online_only or query.states:
        wanted = set(query.states or NodeState) & ({NodeState.ONLINE} if query.online_only else set(NodeState))
        found.append(lambda known: known.record.state in wanted)
    if query.drained is not None:
        drained = query.drained
        found.append(lambda known: known.record.drained is drained)
    if query.requires_gpu:
        found.append(lambda known: bool(known.record.gpus))
    if query.min_tier is not None:
        good = {tier for tier in Tier if tier.at_least(query.min_tier)}
        found.append(lambda known: known.record.tier in good)
    if query.platform is not None:
        platform = query.platform
        found.append(lambda known: known.record.platform is platform)
    if query.work_type:
        work_type = query.work_type
        found.append(lambda known: not known.record.work_types or work_type in known.record.work_types)
    if query.model_name:
        model = query.model_name
        found.append(lambda known: not known.record.models or model in known.record.models)
    if query.labels:
        labels = query.labels.items()
        found.append(lambda known: known.record.labels.items() >= labels)
    if memory_mb := query.min_memory_mb:
        found.append(lambda known: known.record.memory is not None and known.record.memory.total_mb >= memory_mb)
    if query.min_gpus or query.min_vram_mb or query.min_vram_free_mb or query.min_compute_capability:
        gpus = max(1, query.min_gpus)
        found.append(lambda known: len(known.record.gpus) >= gpus)
    return found


OF_RECORDS: Final = (
    "requires_gpu", "min_tier", "online_only", "states", "drained", "platform", "labels", "work_type", "model_name",
    "min_memory_mb", "min_gpus", "min_vram_mb", "min_vram_free_mb", "min_compute_capability",
)  # fmt: skip
"""The fields that :func:`of_records` looks at."""


def of_heartbeats(query: NodesQuery) -> list[Condition]:
    """What a query asks that changes with every heartbeat."""
    found: list[Condition] = []
    if query.loaded_model:
        loaded = query.loaded_model
        found.append(lambda known: known.beat is not None and loaded in known.beat.loaded_models)
    if available_mb := query.min_memory_available_mb:
        found.append(lambda known: (known.memory_available_mb or 0) >= available_mb)
    if slots := query.min_free_slots:
        found.append(lambda known: known.beat is not None and known.record.slots - len(known.beat.running) >= slots)
    gpus = max(1, query.min_gpus)
    # Most nodes have too little in all, which is seen at once.
    if free_mb := query.min_vram_free_mb * gpus:
        found.append(lambda known: known.vram_total_mb - known.vram_used_mb >= free_mb)
    if (holds := _of_a_gpu(query)) is not None:
        found.append(lambda known: sum(map(holds, known.gpus)) >= gpus)
    return found


def _of_a_gpu(query: NodesQuery) -> Callable[[Gpu], bool] | None:
    total_mb, free_mb, least = query.min_vram_mb, query.min_vram_free_mb, capability(query.min_compute_capability)
    if not (total_mb or free_mb or least):
        return None
    return lambda gpu: (
        not gpu.error
        and gpu.vram_total_mb >= total_mb
        and gpu.vram_total_mb - gpu.vram_used_mb >= free_mb
        and (not least or capability(gpu.compute_capability) >= least)
    )


def capability(text: str) -> tuple[int, ...]:
    """``8.9`` as (8, 9); empty for what is none."""
    found = _CAPABILITY.fullmatch(text)
    return (int(found[1]), int(found[2] or 0)) if found else ()


# --- order and cursors -------------------------------------------------------------------------------------------


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The last node of a page, and its place in the order."""

    sort: NodeSort
    descending: bool
    value: float | None
    """What the nodes are ordered by; None for a node that does not tell it, and for the order by id."""
    node_id: str


_decode: Final = msgspec.json.Decoder(Cursor).decode


def read_cursor(query: NodesQuery) -> Cursor | Refused | None:
    """Where a query goes on; None at the beginning."""
    if not query.after:
        return None
    try:
        padded = query.after + "=" * (-len(query.after) % 4)
        cursor = _decode(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        return Refused(code="bad_message", field="after", reason="not the `next` of an answer")
    if (cursor.sort, cursor.descending) != (query.sort, query.descending):
        order = f"sort={cursor.sort}, descending={str(cursor.descending).lower()}"
        return Refused(code="bad_message", field="after", reason=f"that answer was ordered by {order}")
    return cursor


def write_cursor(query: NodesQuery, last: Known) -> str:
    """The cursor behind a node."""
    value = None
    if query.sort is not NodeSort.NODE_ID:
        value = VALUES[query.sort](last)
    cursor = Cursor(query.sort, query.descending, value, last.record.node_id)
    return base64.urlsafe_b64encode(msgspec.json.encode(cursor)).decode().rstrip("=")


def _node_id(known: Known) -> str:
    return known.record.node_id


def _from_id(found: list[Known], query: NodesQuery, cursor: Cursor | None) -> list[Known]:
    if query.descending:
        end = bisect_left(found, cursor.node_id, key=_node_id) if cursor else len(found)
        return found[max(0, end - query.limit - 1) : end][::-1]
    start = bisect_right(found, cursor.node_id, key=_node_id) if cursor else 0
    return found[start : start + query.limit + 1]


def _from_value(found: list[Known], query: NodesQuery, cursor: Cursor | None) -> list[Known]:
    sign = -1.0 if query.descending else 1.0
    value_of = VALUES[query.sort]
    # They come in the order of their ids, and equals stay in it.
    places = [(math.inf if value is None else sign * value, at) for at, value in enumerate(map(value_of, found))]
    if cursor is not None:
        behind = math.inf if cursor.value is None else sign * cursor.value
        first = bisect_right(found, cursor.node_id, key=_node_id)
        places = [place for place in places if place[0] > behind or (place[0] == behind and place[1] >= first)]
    many = (query.limit + 1) * 8 > len(places)
    taken = sorted(places)[: query.limit + 1] if many else nsmallest(query.limit + 1, places)
    return [found[at] for _, at in taken]


VALUES: Final[dict[NodeSort, Callable[[Known], float | None]]] = {
    NodeSort.STATE: lambda known: ORDER[known.record.state],
    NodeSort.TIER: lambda known: RANK[known.record.tier],
    NodeSort.VRAM_TOTAL: lambda known: known.vram_total_mb,
    NodeSort.VRAM_FREE: lambda known: known.vram_total_mb - known.vram_used_mb,
    NodeSort.MEMORY_AVAILABLE: lambda known: known.memory_available_mb,
    NodeSort.CPU_PERCENT: lambda known: known.beat.cpu_percent if known.beat else None,
    NodeSort.RUNNING: lambda known: known.running,
    NodeSort.LAST_SEEN: lambda known: known.last_seen,
    NodeSort.CHANGED_AT: lambda known: known.record.changed_at,
    NodeSort.REGISTERED_AT: lambda known: known.record.registered_at,
}
"""What nodes are ordered by, other than their ids; None when a node does not tell."""
