"""Nodes: who is here, what they can do, who is alive.

    a node          --announce-->   anyone          on change, and when asked by discover
    a node          --heartbeat-->  anyone          small and frequent
    node-registry   --discover-->   every node      "announce yourself"
    node-registry   --lost-->       anyone          a monitored node went silent
    anyone          --register / query / get-->     node-registry

A node that announces no work types, or no models, takes any. One whose announcement says
``delivery: "direct"`` answers assignments on its own subject; all others listen on the shared one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from computemesh.contracts.base import Event, Http, Message, Refusal, Request, Role
from computemesh.contracts.services import NODE_REGISTRY
from computemesh.hardware import Count, Cpu, Gpu, GpuLink, GpuUse, MegaBytes, Memory, Platform, Tier
from computemesh.ids import Id

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Names = Annotated[list[Name], msgspec.Meta(max_length=1000)]
Labels = Annotated[dict[Name, Annotated[str, msgspec.Meta(max_length=200)]], msgspec.Meta(max_length=64)]


class NodeAnnouncement(Message, frozen=True, kw_only=True):
    """What a node is and can do. Sent again whenever any of it changes."""

    node_id: Id
    hostname: Annotated[str, msgspec.Meta(max_length=253)] = ""
    session: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """One life of the node's agent. A new one means that whatever ran before is gone."""
    delivery: Literal["direct", "plain"] = "plain"
    work_types: Names = []
    """Work this node takes; empty = any."""
    models: Names = []
    """Models this node can serve; empty = any."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    """Work items it runs at the same time."""
    labels: Labels = {}
    tier: Tier | None = None
    """Left out, it follows from `gpus`."""
    platform: Platform | None = None
    cpu: Cpu | None = None
    memory: Memory | None = None
    gpus: Annotated[list[Gpu], msgspec.Meta(max_length=256)] = []
    gpu_links: Annotated[list[GpuLink], msgspec.Meta(max_length=32_640)] = []
    """How the GPUs reach each other; a pair that is left out is not known."""
    provider: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Where the GPU facts come from, as in `Inventory.provider`: `nvml`, or `scripted` for hardware that is
    made up."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Tells machines apart: two that announce the same node id are a mistake."""
    version: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Of the software that announces."""


class NodeState(StrEnum):
    ONLINE = "online"
    SUSPECT = "suspect"
    """Silent for longer than is usual; gets no new work."""
    LOST = "lost"
    """Silent for so long that its work is given to others."""


class NodeRecord(NodeAnnouncement, frozen=True, kw_only=True):
    """A node as the registry knows it: its announcement, and whether it is alive."""

    tier: Tier = Tier.CPU_ONLY
    state: NodeState = NodeState.ONLINE
    monitored: bool = False
    """It has sent heartbeats, so silence means something."""
    epoch: int = 1
    """Grows whenever the node comes back from being lost, or with a new session."""
    registered_at: float = 0.0
    """Unix seconds of the first announcement."""
    changed_at: float = 0.0
    """Unix seconds of the last change of this record."""
    last_seen: float = 0.0
    """Unix seconds of the last sign of life, as precise as the registry that answers knows it."""


class RunningWork(Message, frozen=True, kw_only=True):
    work_id: Id
    attempt: int = 0


class NodeHeartbeat(Message, frozen=True, kw_only=True):
    """A sign of life. `running` renews the lease on each item it lists."""

    node_id: Id
    session: Annotated[str, msgspec.Meta(max_length=63)] = ""
    running: Annotated[list[RunningWork], msgspec.Meta(max_length=100_000)] = []
    accepting: bool = True
    """False while the node drains: it finishes what it has and takes nothing new."""
    loaded_models: Names = []
    """Models in memory now: work for them starts without a load."""
    cpu_percent: Annotated[float, msgspec.Meta(ge=0)] | None = None
    memory_available_mb: MegaBytes | None = None
    gpus: Annotated[list[GpuUse], msgspec.Meta(max_length=256)] = []
    """What is in use of each GPU; empty = not told."""
    sent_at: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Unix seconds by the node's own clock, to notice one that is wrong."""


class NodeLost(Message, frozen=True, kw_only=True):
    node_id: Id
    epoch: int
    silent_s: float


class Discover(Message, frozen=True, kw_only=True):
    """Every node: announce yourself. With `node_ids`, only those."""

    node_ids: list[Id] = []


class NodesQuery(Message, frozen=True, kw_only=True):
    requires_gpu: bool = False
    min_tier: Tier | None = None
    """At least this tier."""
    online_only: bool = False
    work_type: str = ""
    model_name: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000


class NodeList(Message, frozen=True, kw_only=True):
    """The nodes that match a query."""

    nodes: list[NodeRecord]
    count: Count
    """Nodes that match, also those beyond `limit`."""


class NodeGet(Message, frozen=True, kw_only=True):
    node_id: Id


_EVERYONE: Final = frozenset(Role)
_SERVICES: Final = frozenset({Role.SERVICES})

ANNOUNCE: Final = Event(
    subject="compute.nodes.announce.v1",
    payload=NodeAnnouncement,
    sent_by=frozenset({Role.NODE}),
    read_by=_EVERYONE,
    about="What a node can do.",
)
HEARTBEAT: Final = Event(
    subject="compute.nodes.heartbeat.v1",
    payload=NodeHeartbeat,
    sent_by=frozenset({Role.NODE}),
    read_by=_EVERYONE,
    about="A sign of life, with load and running work.",
)
DISCOVER: Final = Event(
    subject="compute.nodes.discover.v1",
    payload=Discover,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="Asks nodes to announce themselves.",
)
LOST: Final = Event(
    subject="compute.nodes.lost.v1",
    payload=NodeLost,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="A node went silent; its work is given to others.",
)
REGISTER: Final = Request(
    subject="compute.nodes.register.v1",
    takes=NodeAnnouncement,
    gives=NodeRecord,
    asked_by=frozenset({Role.NODE, Role.SERVICES}),
    service=NODE_REGISTRY,
    http=(Http(method="POST", path="/api/v1/nodes/register"),),
    example=NodeAnnouncement(
        node_id="render-01",
        hostname="render-01.example",
        work_types=["render"],
        slots=2,
        labels={"zone": "a"},
        gpus=[Gpu(name="NVIDIA L4", vram_total_mb=23034, compute_capability="8.9")],
    ),
    about="Announces a node and waits until that is stored.",
)
QUERY: Final = Request(
    subject="compute.nodes.query.v1",
    takes=NodesQuery,
    gives=NodeList,
    asked_by=_EVERYONE,
    http=(Http(method="POST", path="/api/v1/nodes/query"), Http(method="GET", path="/api/v1/nodes")),
    service=NODE_REGISTRY,
    example=NodesQuery(min_tier=Tier.GPU_PEER, work_type="render", limit=10),
    about="The nodes that match a filter.",
)
GET: Final = Request(
    subject="compute.nodes.get.v1",
    takes=NodeGet,
    gives=NodeRecord,
    asked_by=_EVERYONE,
    http=(Http(method="GET", path="/api/v1/nodes/{node_id}"),),
    service=NODE_REGISTRY,
    refuses=(Refusal(code="not_found", status=404, when="there is no such node"),),
    example=NodeGet(node_id="render-01"),
    about="One node.",
)
