"""RoleMesh's interface of a node: what the machine has, and whether it can serve. Over HTTP alone.

Its OpenAI routes are in :mod:`computemesh.contracts.openai`. What a node posts to a dispatcher (`/v1/nodes/register`,
`/v1/nodes/heartbeat`) is here as well: in RoleMesh's fields, with those of its successor GenieHive beside them, so that
either understands it.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from computemesh.contracts.base import Http, Message, Refusal, Route
from computemesh.contracts.nodes import EngineState, Names
from computemesh.contracts.openai import BAD_MESSAGE, ENTRY, ApiRefusal
from computemesh.contracts.services import NODE_AGENT
from computemesh.hardware import Count, MegaBytes

HEARTBEAT_S: Final = 5.0
"""How often a dispatcher hears of a node."""

STALE_S: Final = 30.0
"""After so long without a heartbeat, RoleMesh's dispatcher sends a node no requests."""


class InventoryGet(Message, frozen=True, kw_only=True):
    """Asks for the inventory."""


class InventoryDevice(Message, frozen=True, kw_only=True):
    """A device with an inference engine on it, or room for one. What is not known is null."""

    device_id: str
    """Names the device on its node, such as `gpu:0` or `cpu:0`."""
    backend: str
    name: str = ""
    memory_total_mb: MegaBytes | None = None
    """MiB of its own memory; of a CPU, of the machine's."""
    memory_used_mb: MegaBytes | None = None
    memory_free_mb: MegaBytes | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    state: EngineState = EngineState.IDLE
    """Of its engine."""
    model: str = ""
    """In its engine's memory, or about to be; empty for none."""
    slots: Count = 1
    """Requests that its engine works on at the same time."""
    pending: Count = 0
    """Requests it has, those that it works on and those that wait."""
    pending_max: Count = 0
    """Requests it takes; more are refused with status 429."""
    tokens_per_s: float | None = None
    """Put out lately, of all requests together."""
    restarts: Count = 0
    """Of its engine, after crashes."""


class InventoryModel(Message, frozen=True, kw_only=True):
    """A model that is configured here."""

    model_id: str
    roles: Names = []
    loaded_on: list[str] = []
    """Devices that have it in memory."""
    present: bool = True
    """Its file is here; else it is fetched when it is first asked for."""
    size_mb: MegaBytes | None = None
    context_tokens: Count | None = None
    embeddings: bool = False
    """It gives embeddings, not texts."""


class InventoryHost(Message, frozen=True, kw_only=True):
    """The machine. What its resource-detector has not told is null."""

    hostname: str
    cpu_threads: Count | None = None
    cpu_percent: float | None = None
    memory_total_mb: MegaBytes | None = None
    memory_available_mb: MegaBytes | None = None


class NodeInventory(Message, frozen=True, kw_only=True):
    """What a node has, and how busy it is."""

    node_id: str
    session: str
    """One life of the node's agent."""
    version: str
    base_url: str
    """Where this interface is."""
    accepting: bool
    """False while the node ends: it finishes what it has, and takes nothing new."""
    roles: Names = []
    host: InventoryHost
    devices: list[InventoryDevice]
    models: list[InventoryModel]


class Health(Message, frozen=True, kw_only=True):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Ready(Message, frozen=True, kw_only=True):
    """It can serve."""

    status: Literal["ready"] = "ready"


INVENTORY: Final = Route(
    name="get_node_inventory",
    service=NODE_AGENT,
    http=Http(method="GET", path="/v1/node/inventory"),
    takes=InventoryGet,
    gives=NodeInventory,
    refused_as=ApiRefusal,
    refuses=(BAD_MESSAGE, *ENTRY),
    example=InventoryGet(),
    about="The devices and models of this node, and how busy they are.",
)
HEALTH: Final = Route(
    name="get_health",
    service=NODE_AGENT,
    http=Http(method="GET", path="/health"),
    takes=InventoryGet,
    gives=Health,
    example=InventoryGet(),
    about="Whether the process is alive.",
)
READY: Final = Route(
    name="get_ready",
    service=NODE_AGENT,
    http=Http(method="GET", path="/ready"),
    takes=InventoryGet,
    gives=Ready,
    refuses=(Refusal(code="not_ready", status=503, when="no model can be served here; `detail` says why"),),
    example=InventoryGet(),
    about="Whether the node can serve a model.",
)


# --- what a dispatcher is told ----------------------------------------------------------------------------------


class ServiceStatus(Message, frozen=True, kw_only=True):
    """An engine's state, in GenieHive's words."""

    health: Literal["healthy", "unhealthy"]
    load_state: Literal["loaded", "loading", "unloaded"]
    availability: Literal["available", "busy", "unavailable"]
    accept_requests: bool


class ServiceObserved(Message, frozen=True, kw_only=True, omit_defaults=True):
    tokens_per_sec: float | None = None
    queue_depth: Count = 0
    """Requests that wait."""
    in_flight: Count = 0
    """Requests it works on."""
    loaded_model_count: Count = 0
    vram_used_bytes: Count | None = None


class ServiceAsset(Message, frozen=True, kw_only=True):
    asset_id: str
    """A model."""
    loaded: bool


class NodeService(Message, frozen=True, kw_only=True):
    """A kind of requests that a device takes."""

    service_id: str
    host_id: str
    kind: Literal["chat", "embeddings"]
    protocol: str = "openai"
    endpoint: str
    runtime: dict[str, str]
    assets: list[ServiceAsset]
    state: ServiceStatus
    observed: ServiceObserved


class NodeRegister(Message, frozen=True, kw_only=True):
    """`POST /v1/nodes/register`."""

    node_id: str
    base_url: str
    roles: Names
    meta: dict[str, Any]
    """Facts of the machine, its models and devices."""
    session: str
    """One life of the node's agent; a registry of computemesh knows by it what it hears on the bus as well."""
    host_id: str
    """The same as `node_id`; this and what follows is GenieHive's."""
    display_name: str
    address: str
    labels: dict[str, str]
    resources: dict[str, Any]
    services: list[NodeService]


class BeatMetrics(Message, frozen=True, kw_only=True):
    devices: list[InventoryDevice]
    service_count: Count
    healthy_service_count: Count
    cpu_percent: float | None = None
    memory_available_mb: MegaBytes | None = None


class BeatStatus(Message, frozen=True, kw_only=True):
    state: Literal["online"] = "online"
    last_seen: float
    """Unix seconds by the node's clock."""


class NodeBeat(Message, frozen=True, kw_only=True):
    """`POST /v1/nodes/heartbeat`."""

    node_id: str
    session: str
    host_id: str
    status: BeatStatus
    metrics: BeatMetrics
    loaded_models: Names
    services: list[NodeService]
