"""Short ways to nodes, items and records for tests: what a test does not care about has a default."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord, RunningWork
from computemesh.contracts.work import WorkItem, WorkRecord, WorkState
from computemesh.hardware import Gpu


def a_node(node_id: str = "n1", **changes: Any) -> NodeRecord:
    """A direct node that is online, takes any work and has one slot."""
    node = NodeRecord(node_id=node_id, delivery="direct", session="s1", monitored=True)
    return replace(node, **changes)


def a_plain_node(node_id: str = "p1", **changes: Any) -> NodeRecord:
    """A node without direct delivery, session or heartbeats."""
    return replace(NodeRecord(node_id=node_id), **changes)


def a_gpu(vram_mb: int = 24_000) -> Gpu:
    return Gpu(name="card", vram_total_mb=vram_mb, compute_capability="8.9")


def an_item(**changes: Any) -> WorkItem:
    return replace(WorkItem(work_type="inference"), **changes)


def a_record(work_id: str = "w1", state: WorkState = WorkState.PENDING, **changes: Any) -> WorkRecord:
    """A record as if it had got into *state* by itself: without a story."""
    return replace(WorkRecord(work_id=work_id, state=state, work_type="inference"), **changes)


def a_beat(node_id: str = "n1", *running: tuple[str, int], **changes: Any) -> NodeHeartbeat:
    """A heartbeat of session ``s1`` that lists these (work_id, attempt) pairs."""
    listed = [RunningWork(work_id=work_id, attempt=attempt) for work_id, attempt in running]
    return replace(NodeHeartbeat(node_id=node_id, session="s1", running=listed), **changes)
