"""Nodes: who is here, what they can do, who is alive.

    a node          --announce-->   anyone          on change, and when asked by discover
    a node          --heartbeat-->  anyone          small and frequent
    node-registry   --discover-->   every node      "announce yourself"
    node-registry   --lost-->       anyone          a node went silent
    node-registry   --refused-->    anyone          a node may not have the name it announced
    a node          --register / alive-->                   node-registry   the same as requests
    anyone          --query / list / get / stats-->         node-registry
    an operator     --drain / undrain / forget-->           node-registry

A node that announces no work types, or no models, takes any. One whose announcement says
``delivery: "direct"`` answers assignments on its own subject; all others listen on the shared one. One
with no slots takes no work at all.
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
Session = Annotated[str, msgspec.Meta(max_length=63)]
Reason = Annotated[str, msgspec.Meta(max_length=500)]


class EngineState(StrEnum):
    """What an inference engine is doing."""

    IDLE = "idle"
    """No process; it starts with the first request."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It ends the requests it has; then another model takes its place."""
    RESTARTING = "restarting"
    """It crashed, and is started again after a pause."""
    FAILED = "failed"
    """It did not start, or crashed over and over."""


class EngineCard(Message, frozen=True, kw_only=True):
    """A device of a node with an inference engine on it, or room for one."""

    device: Name
    """Names the engine on its node, such as `gpu:0` or `cpu:0`."""
    backend: Name = "cpu"
    """How the engine reaches the device: `cuda`, `rocm`, `metal`, `sycl`, `vulkan` or `cpu`."""
    kind: Name = "llama.cpp"
    """The software."""
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Of the device, as its maker calls it."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    """Requests it works on at the same time."""
    pending_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 2
    """Requests it takes, those that it works on and those that wait; more are refused."""


class ModelCard(Message, frozen=True, kw_only=True):
    """A model that a node can serve."""

    name: Name
    present: bool = True
    """Its file is on the node; else it is fetched when it is first asked for."""
    size_mb: MegaBytes | None = None
    """Of its files."""
    context_tokens: Count | None = None
    """Longest prompt and answer together."""
    embeddings: bool = False
    """It gives embeddings, not texts."""
    roles: Names = []
    """What it is there for, such as `chat`."""


class NodeAnnouncement(Message, frozen=True, kw_only=True):
    """What a node is and can do. Sent again whenever any of it changes."""

    node_id: Id
    hostname: Annotated[str, msgspec.Meta(max_length=253)] = ""
    session: Session = ""
    """One life of the node's agent. A new one means that whatever ran before is gone."""
    delivery: Literal["direct", "plain"] = "plain"
    work_types: Names = []
    """Work this node takes; empty = any."""
    models: Names = []
    """Models this node can serve; empty = any."""
    slots: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 1
    """Work items it runs at the same time; 0 for a host that takes none."""
    labels: Labels = {}
    tier: Tier | None = None
    """Left out, it follows from `gpus`."""
    platform: Platform | None = None
    cpu: Cpu | None = None
    memory: Memory | None = None
    work_cpus: Count | None = None
    """Logical CPUs that work may ask for, all items together; left out, all that `cpu` tells."""
    work_ram_mb: MegaBytes | None = None
    """RAM that work may ask for, all items together; left out, all that `memory` tells."""
    gpus: Annotated[list[Gpu], msgspec.Meta(max_length=256)] = []
    gpu_links: Annotated[list[GpuLink], msgspec.Meta(max_length=32_640)] = []
    """How the GPUs reach each other; a pair that is left out is not known."""
    provider: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Where the GPU facts come from, as in `Inventory.provider`: `nvml`, or `scripted` for hardware that is
    made up."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Tells machines apart: two that announce the same node id are a mistake."""
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    """How often it sends heartbeats, when that is rarer than every 10 s: its silence is borne for longer then."""
    version: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Of the software that announces."""
    base_url: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """Where it answers HTTP itself, if it does."""
    roles: Names = []
    """What a host that answers by itself is there for, such as `chat`."""
    engines: Annotated[list[EngineCard], msgspec.Meta(max_length=256)] = []
    """Its devices for inference. With any, it answers `compute.infer.v1.<node_id>` for the models in `models`."""
    model_cards: Annotated[list[ModelCard], msgspec.Meta(max_length=1000)] = []
    """More about models in `models`."""

    @property
    def cpus_for_work(self) -> int | None:
        """Logical CPUs for all work together; None when the node does not tell."""
        return (self.cpu.threads or None) if self.work_cpus is None and self.cpu else self.work_cpus

    @property
    def ram_mb_for_work(self) -> int | None:
        """MiB of RAM for all work together; None when the node does not tell."""
        return (self.memory.total_mb or None) if self.work_ram_mb is None and self.memory else self.work_ram_mb


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
    left: bool = False
    """It is lost because it said that it ends."""
    drained: bool = False
    """An operator said that it gets no new work."""
    drain_reason: Reason = ""
    retired: list[Session] = []
    """Sessions before the present one, the latest last. An agent that still speaks in the name of one is
    another one with the same node id."""


class NodeView(NodeRecord, frozen=True, kw_only=True):
    """A node's record, with what its last heartbeat said.

    What is used of each GPU stands in `gpus`. The other fields here are left out (null) until a heartbeat told them
    to the registry that answers: nothing of this is stored.
    """

    cpu_percent: float | None = None
    memory_available_mb: MegaBytes | None = None
    loaded_models: Names = []
    running: Count | None = None
    """Work items it runs."""
    accepting: bool | None = None
    """False while the node itself says that it takes nothing new."""
    engine_use: list[EngineUse] = []
    """How busy each of its `engines` is."""
    fetches: list[ModelFetch] = []
    """Models that it is fetching."""
    clock_skew_s: float | None = None
    """How far the node's clock is ahead of the registry's, with the time a heartbeat took on its way."""


class RunningWork(Message, frozen=True, kw_only=True):
    work_id: Id
    attempt: int = 0
    replica: int = 0


class EngineUse(Message, frozen=True, kw_only=True):
    """How busy an engine is."""

    device: Name
    """As in `EngineCard`."""
    state: EngineState = EngineState.IDLE
    model: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """In memory, or about to be; empty for none."""
    pending: Count = 0
    """Requests it has, those that it works on and those that wait."""
    tokens_per_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Put out lately, of all requests together."""
    restarts: Count = 0
    """After crashes, since the agent began."""


class ModelFetch(Message, frozen=True, kw_only=True):
    """A model that a node is fetching."""

    model: Name
    done_mb: MegaBytes = 0
    total_mb: MegaBytes | None = None
    """Left out until its source has said it."""
    mb_per_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """MiB a second, lately."""
    problem: Reason = ""
    """Why it could not be fetched; it is tried again."""


class NodeHeartbeat(Message, frozen=True, kw_only=True):
    """A sign of life. `running` renews the lease on each item it lists."""

    node_id: Id
    session: Session = ""
    running: Annotated[list[RunningWork], msgspec.Meta(max_length=100_000)] = []
    accepting: bool = True
    """False while the node drains: it finishes what it has and takes nothing new."""
    leaving: bool = False
    """The last one of this session: the node ends in good order, and need not be waited for."""
    loaded_models: Names = []
    """Models in memory now: work for them starts without a load."""
    cpu_percent: Annotated[float, msgspec.Meta(ge=0)] | None = None
    memory_available_mb: MegaBytes | None = None
    gpus: Annotated[list[GpuUse], msgspec.Meta(max_length=256)] = []
    """What is in use of each GPU; empty = not told."""
    engines: Annotated[list[EngineUse], msgspec.Meta(max_length=256)] = []
    """How busy each engine is; empty = not told."""
    fetches: Annotated[list[ModelFetch], msgspec.Meta(max_length=1000)] = []
    """Models that it is fetching."""
    sent_at: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Unix seconds by the node's own clock, to notice one that is wrong."""


class NodeAlive(Message, frozen=True, kw_only=True):
    """The registry knows the node that sent a heartbeat."""

    node_id: Id
    state: NodeState
    """As recorded before this heartbeat counted."""
    epoch: int
    drained: bool


class NodeLost(Message, frozen=True, kw_only=True):
    """A node was recorded as lost. Told once for each loss; after a crash of the registry at that moment perhaps
    twice, and then with the same epoch."""

    node_id: Id
    epoch: int
    silent_s: float
    left: bool = False
    """It said that it ends."""


class NodeMarked(Message, frozen=True, kw_only=True):
    """An operator drained a node, or gave it work again."""

    node_id: Id
    drained: bool


class NodeRefused(Message, frozen=True, kw_only=True):
    """An announcement that does not count: its node id belongs to another agent, it cannot be stored, or it is none."""

    node_id: Id
    session: Session = ""
    """Of the agent that is refused."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    hostname: Annotated[str, msgspec.Meta(max_length=253)] = ""
    code: str = "duplicate_node"
    reason: str = ""
    field: str = ""
    """Of the announcement, as in ``gpus[0].vram_gb``; empty when it is about all of it."""


class Discover(Message, frozen=True, kw_only=True):
    """Every node: announce yourself. With `node_ids`, only those."""

    node_ids: list[Id] = []


class NodeSort(StrEnum):
    """What nodes are ordered by. Those that do not tell it come last; equals are ordered by id."""

    NODE_ID = "node_id"
    STATE = "state"
    TIER = "tier"
    """The weakest first."""
    VRAM_TOTAL = "vram_total"
    """Of all its GPUs together."""
    VRAM_FREE = "vram_free"
    """Of all its GPUs together."""
    MEMORY_AVAILABLE = "memory_available"
    CPU_PERCENT = "cpu_percent"
    RUNNING = "running"
    LAST_SEEN = "last_seen"
    CHANGED_AT = "changed_at"
    REGISTERED_AT = "registered_at"


class NodesQuery(Message, frozen=True, kw_only=True):
    """The nodes for which everything that is asked here holds."""

    requires_gpu: bool = False
    min_tier: Tier | None = None
    """At least this tier."""
    online_only: bool = False
    states: Annotated[list[NodeState], msgspec.Meta(max_length=8)] = []
    """One of these; empty = any."""
    drained: bool | None = None
    """Drained by an operator, or not; left out, both."""
    platform: Platform | None = None
    labels: Labels = {}
    """All of these, each with this value."""
    work_type: str = ""
    model_name: str = ""
    loaded_model: str = ""
    """It has this model in memory now."""
    min_gpus: Count = 0
    """At least so many GPUs for which all that is asked of a GPU here holds; 1 when only that is asked."""
    min_vram_mb: MegaBytes = 0
    """A GPU with at least so much."""
    min_vram_free_mb: MegaBytes = 0
    """A GPU with at least so much unused, by the last heartbeat or else the announcement."""
    min_compute_capability: Annotated[str, msgspec.Meta(max_length=20)] = ""
    """A GPU with at least this, such as `8.9`."""
    min_memory_mb: MegaBytes = 0
    min_memory_available_mb: MegaBytes = 0
    """By the last heartbeat or else the announcement."""
    min_free_slots: Count = 0
    """Slots without work by the last heartbeat; a node that sent none has not said so."""
    sort: NodeSort = NodeSort.NODE_ID
    descending: bool = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    """Nodes in one answer, which may be fewer: an answer is at most one message."""
    after: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    """`next` of the answer before, to go on from there with the same `sort` and `descending`."""


class NodeList(Message, frozen=True, kw_only=True):
    """The nodes that match a query."""

    nodes: list[NodeView]
    count: Count
    """Nodes that match, also those in other answers."""
    next: str = ""
    """For `after`, to get those that follow; empty when these are the last."""


class NodeBrief(Message, frozen=True, kw_only=True):
    """A node in a line."""

    node_id: Id
    state: NodeState
    tier: Tier
    drained: bool = False
    gpus: Count = 0
    vram_total_mb: MegaBytes = 0
    """Of all its GPUs together."""
    vram_used_mb: MegaBytes = 0
    slots: Count = 0
    running: Count | None = None
    cpu_percent: float | None = None
    memory_available_mb: MegaBytes | None = None
    last_seen: float = 0.0


class NodeBriefs(Message, frozen=True, kw_only=True):
    """The nodes that match a query, in a line each."""

    nodes: list[NodeBrief]
    count: Count
    """Nodes that match, also those in other answers."""
    next: str = ""
    """For `after`, to get those that follow; empty when these are the last."""


class NodeGet(Message, frozen=True, kw_only=True):
    node_id: Id


class NodeDrain(Message, frozen=True, kw_only=True):
    node_id: Id
    reason: Reason = ""


class NodeUndrain(Message, frozen=True, kw_only=True):
    node_id: Id
    reason: Reason = ""


class NodeDrained(Message, frozen=True, kw_only=True):
    """Whether a node is drained now."""

    node: NodeView
    changed: bool
    """False when it was so before, for the same reason."""


class NodeForget(Message, frozen=True, kw_only=True):
    node_id: Id
    force: bool = False
    """Also one whose heartbeats are heard. If its agent still runs, it comes back as a new node."""


class NodeForgotten(Message, frozen=True, kw_only=True):
    node_id: Id


class NodesCleanup(Message, frozen=True, kw_only=True):
    """Asks that lost nodes are forgotten now."""

    silent_s: Annotated[float, msgspec.Meta(ge=0, le=366 * 86_400)] = 120.0
    """Those of which nothing has been heard for so many seconds, or that said that they end."""


class NodesCleaned(Message, frozen=True, kw_only=True):
    """Which nodes were forgotten."""

    node_ids: list[Id]


class StatsAsk(Message, frozen=True, kw_only=True):
    pass


class NodesStats(Message, frozen=True, kw_only=True):
    """The mesh in numbers. Sizes and work are of the nodes that are not lost."""

    nodes: Count
    states: dict[str, Count]
    tiers: dict[str, Count]
    platforms: dict[str, Count]
    """Without those that do not say theirs."""
    drained: Count
    cpus: Count
    """Logical ones."""
    memory_total_mb: int
    memory_available_mb: int
    gpus: Count
    vram_total_mb: int
    vram_used_mb: int
    slots: int
    running: int
    """Work items, by the last heartbeats."""


_EVERYONE: Final = frozenset(Role)
_SERVICES: Final = frozenset({Role.SERVICES})
_NOT_FOUND: Final = Refusal(code="not_found", status=404, when="there is no such node")

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
    # Services pass on what came as a request. Between two accounts a subject crosses in one direction.
    sent_by=frozenset({Role.NODE, Role.SERVICES}),
    read_by=_EVERYONE - {Role.NODE},
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
MARKED: Final = Event(
    subject="compute.nodes.marked.v1",
    payload=NodeMarked,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="An operator drained a node, or gave it work again.",
)
REFUSED: Final = Event(
    subject="compute.nodes.refused.v1",
    payload=NodeRefused,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="An announcement that does not count, and why.",
)
REGISTER: Final = Request(
    subject="compute.nodes.register.v1",
    takes=NodeAnnouncement,
    gives=NodeRecord,
    asked_by=frozenset({Role.NODE, Role.SERVICES}),
    service=NODE_REGISTRY,
    http=(Http(method="POST", path="/api/v1/nodes/register"),),
    refuses=(
        Refusal(code="duplicate_node", status=409, when="another agent has that node id, and is alive"),
        Refusal(code="too_large", status=413, when="the announcement is larger than is kept"),
    ),
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
ALIVE: Final = Request(
    subject="compute.nodes.alive.v1",
    takes=NodeHeartbeat,
    gives=NodeAlive,
    asked_by=frozenset({Role.NODE, Role.SERVICES}),
    service=NODE_REGISTRY,
    http=(Http(method="POST", path="/api/v1/nodes/heartbeat"),),
    refuses=(
        Refusal(code="unknown_node", status=404, when="no such node, or no such life of it, was announced"),
        Refusal(code="duplicate_node", status=409, when="another agent has that node id"),
    ),
    example=NodeHeartbeat(node_id="render-01", cpu_percent=12.5),
    about="A heartbeat that is answered; everyone hears it as the event.",
)
QUERY: Final = Request(
    subject="compute.nodes.query.v1",
    takes=NodesQuery,
    gives=NodeList,
    asked_by=_EVERYONE,
    http=(Http(method="POST", path="/api/v1/nodes/query"), Http(method="GET", path="/api/v1/nodes")),
    service=NODE_REGISTRY,
    example=NodesQuery(min_tier=Tier.GPU_PEER, work_type="render", labels={"zone": "a"}, limit=10),
    about="The nodes that match a filter.",
)
LIST: Final = Request(
    subject="compute.nodes.list.v1",
    takes=NodesQuery,
    gives=NodeBriefs,
    asked_by=_EVERYONE,
    http=(Http(method="POST", path="/api/v1/nodes/list"),),
    service=NODE_REGISTRY,
    example=NodesQuery(states=[NodeState.ONLINE], sort=NodeSort.VRAM_FREE, descending=True),
    about="The nodes that match a filter, in a line each.",
)
DRAIN: Final = Request(
    subject="compute.nodes.drain.v1",
    takes=NodeDrain,
    gives=NodeDrained,
    asked_by=_SERVICES,
    http=(Http(method="POST", path="/api/v1/nodes/{node_id}/drain"),),
    service=NODE_REGISTRY,
    refuses=(_NOT_FOUND,),
    example=NodeDrain(node_id="render-01", reason="new power supply"),
    about="No new work for a node; what runs goes on. Holds until undrain, also when the node comes back.",
)
UNDRAIN: Final = Request(
    subject="compute.nodes.undrain.v1",
    takes=NodeUndrain,
    gives=NodeDrained,
    asked_by=_SERVICES,
    http=(Http(method="POST", path="/api/v1/nodes/{node_id}/undrain"),),
    service=NODE_REGISTRY,
    refuses=(_NOT_FOUND,),
    example=NodeUndrain(node_id="render-01"),
    about="Gives a drained node work again.",
)
STATS: Final = Request(
    subject="compute.nodes.stats.v1",
    takes=StatsAsk,
    gives=NodesStats,
    asked_by=_EVERYONE,
    http=(Http(method="GET", path="/api/v1/stats"),),
    service=NODE_REGISTRY,
    example=StatsAsk(),
    about="The mesh in numbers.",
)
GET: Final = Request(
    subject="compute.nodes.get.v1",
    takes=NodeGet,
    gives=NodeView,
    asked_by=_EVERYONE,
    http=(Http(method="GET", path="/api/v1/nodes/{node_id}"),),
    service=NODE_REGISTRY,
    refuses=(_NOT_FOUND,),
    example=NodeGet(node_id="render-01"),
    about="One node.",
)
FORGET: Final = Request(
    subject="compute.nodes.forget.v1",
    takes=NodeForget,
    gives=NodeForgotten,
    asked_by=_SERVICES,
    http=(Http(method="DELETE", path="/api/v1/nodes/{node_id}"),),
    service=NODE_REGISTRY,
    refuses=(
        _NOT_FOUND,
        Refusal(code="still_here", status=409, when="it is not lost, and `force` is not set"),
    ),
    example=NodeForget(node_id="render-01", force=True),
    about="Removes a node that is gone for good: one that is lost, or that never sent heartbeats.",
)
CLEANUP: Final = Request(
    subject="compute.nodes.cleanup.v1",
    takes=NodesCleanup,
    gives=NodesCleaned,
    # Harmless, so clients may: it does now what the registry does after a week, to nodes that have no work any more and
    # that announce themselves anew when they come back. What an operator said of a node, that it is drained, stays.
    asked_by=frozenset({Role.CLIENT, Role.SERVICES}),
    http=(Http(method="POST", path="/api/v1/nodes/cleanup"),),
    service=NODE_REGISTRY,
    example=NodesCleanup(silent_s=3600.0),
    about="Forgets the nodes that are lost, but for those that are drained; at most 1000 at a time.",
)
