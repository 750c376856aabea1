"""What this replica knows: nodes and their use of memory, and the reservations by id.

Every replica hears every heartbeat and mirrors both buckets, so any of them can answer.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import Final

import msgspec

from computemesh.bus import Mirror
from computemesh.contracts.gpus import GpuGrant, GpuLedger, RamState
from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord
from computemesh_services.gpu_orchestrator import ledger as ledgers
from computemesh_services.gpu_orchestrator import pressure
from computemesh_services.gpu_orchestrator.room import Facts, Room, facts_of, room_of

Sample = tuple[float, float]


class Samples:
    """The latest readings of a node's available memory, by monotonic time."""

    def __init__(self) -> None:
        self._at_s = array("d")
        self._mb = array("d")

    def add(self, at_s: float, mb: float) -> None:
        self._at_s.append(at_s)
        self._mb.append(mb)
        if len(self._mb) > pressure.SAMPLES_MAX:
            del self._at_s[0], self._mb[0]

    def all(self) -> list[Sample]:
        return list(zip(self._at_s, self._mb, strict=True))

    @property
    def latest_mb(self) -> int:
        return int(self._mb[-1])


class Known:
    """Facts by node, reservations by id, and what is left of each node."""

    def __init__(self, nodes: Mirror[NodeRecord], ledgers_: Mirror[GpuLedger], *, headroom_mb: int) -> None:
        self._nodes = nodes
        self._ledgers = ledgers_
        self._headroom_mb = headroom_mb
        self._facts: dict[str, Facts] = {}
        self._samples: dict[str, Samples] = {}
        self._rooms: dict[str, Room] = {}
        self._grants: dict[str, GpuGrant] = {}
        """Reservations by id, also those that have run out and were not dropped yet."""
        self._of_node: dict[str, list[GpuGrant]] = {}
        self.bound: dict[str, GpuGrant] = {}
        """Reservations that end with a node's life or a work item, by id."""
        self.changed: set[str] = set()
        """Nodes whose memory may look different since somebody cleared this."""

    # --- what it hears -----------------------------------------------------------------------------------------------

    def on_node(self, node_id: str, node: NodeRecord | None) -> None:
        self._forget_room(node_id)
        if node is None:
            self._facts.pop(node_id, None)
            self._samples.pop(node_id, None)
            return
        before = self._facts.get(node_id)
        revision = self._nodes.entries[node_id].revision
        if before is not None and _same_hardware(before.node, node):
            self._facts[node_id] = msgspec.structs.replace(before, node=node, revision=revision)
        else:
            self._facts[node_id] = facts_of(node, revision)

    def on_ledger(self, node_id: str, ledger: GpuLedger | None) -> None:
        self._forget_room(node_id)
        for grant in self._of_node.pop(node_id, ()):
            self._grants.pop(grant.reservation_id, None)
            self.bound.pop(grant.reservation_id, None)
        if ledger is None or not ledger.grants:
            return
        self._of_node[node_id] = ledger.grants
        for grant in ledger.grants:
            self._grants[grant.reservation_id] = grant
            if grant.session or grant.work_id:
                self.bound[grant.reservation_id] = grant

    def on_heartbeat(self, beat: NodeHeartbeat) -> None:
        facts = self._facts.get(beat.node_id)
        if facts is None or (beat.session and facts.node.session and beat.session != facts.node.session):
            return  # Of a life that is over, or that the registry has not recorded yet.
        if beat.memory_available_mb is not None:
            samples = self._samples.setdefault(beat.node_id, Samples())
            samples.add(time.monotonic(), beat.memory_available_mb)
            self.changed.add(beat.node_id)
        uses = tuple(beat.gpus) or facts.uses
        if uses != facts.uses or beat.accepting != facts.accepting:
            self._forget_room(beat.node_id)
        heard_at = time.time() if beat.gpus else facts.heard_at
        self._facts[beat.node_id] = msgspec.structs.replace(
            facts, uses=uses, accepting=beat.accepting, heard_at=heard_at
        )

    def _forget_room(self, node_id: str) -> None:
        self._rooms.pop(node_id, None)
        self.changed.add(node_id)

    # --- what it is asked --------------------------------------------------------------------------------------------

    def facts(self, node_id: str) -> Facts | None:
        return self._facts.get(node_id)

    def grant(self, reservation_id: str, now: float) -> GpuGrant | None:
        """A reservation that stands, as far as this replica has heard."""
        grant = self._grants.get(reservation_id)
        return grant if grant is not None and grant.expires_at > now else None

    def grants(self, now: float) -> Iterator[GpuGrant]:
        return (grant for grant in self._grants.values() if grant.expires_at > now)

    def run_out(self, now: float) -> list[str]:
        """Nodes with reservations whose time is over."""
        return [node for node, grants in self._of_node.items() if any(grant.expires_at <= now for grant in grants)]

    def room(self, node_id: str, now: float) -> Room | None:
        """What is left of a node; None when there is no such node."""
        room = self._rooms.get(node_id)
        if room is not None and now < room.until:
            return room
        facts = self._facts.get(node_id)
        if facts is None:
            return None
        ledger = self._ledgers.get(node_id) or ledgers.empty(node_id)
        room = self._rooms[node_id] = room_of(ledger, facts, now, headroom_mb=self._headroom_mb)
        return room

    def rooms(self, now: float) -> Iterator[Room]:
        """What is left of each node that has GPUs, or had some that are still reserved."""
        for node_id, facts in self._facts.items():
            if (facts.node.gpus or node_id in self._of_node) and (room := self.room(node_id, now)):
                yield room

    def without_use(self) -> list[str]:
        """Nodes with GPUs that send heartbeats, of whose use nothing was heard yet."""
        return [
            node_id
            for node_id, facts in self._facts.items()
            if facts.node.gpus and facts.node.monitored and not facts.uses and facts.node.state == "online"
        ]

    def samples(self, node_id: str) -> list[Sample]:
        samples = self._samples.get(node_id)
        return samples.all() if samples else []

    def ram(self, node_id: str) -> RamState:
        facts = self._facts.get(node_id)
        memory = facts.node.memory if facts else None
        total = memory.total_mb if memory else 0
        samples = self._samples.get(node_id)
        if samples is None:
            return RamState(total_mb=total, available_mb=memory.available_mb if memory else 0)
        return pressure.ram_of(samples.all(), total, samples.latest_mb)


_HARDWARE: Final = ("session", "gpus", "gpu_links")


def _same_hardware(before: NodeRecord, after: NodeRecord) -> bool:
    """Whether what was heard of the node's use still applies."""
    return all(getattr(before, name) == getattr(after, name) for name in _HARDWARE)
