"""NanoCtrl's interface, in both of its generations: paths and bodies as its clients send and expect them.

The first one (`nanoctrl` 0.0.x) has engines: `/register_engine` and so on. The second one (`nanoctrl` 0.1.x, then
`dlslime-ctrl`) has entities of any type: `/register` and so on. Both have peer agents. The handlers are those of
:mod:`computemesh.contracts.engines` and :mod:`computemesh.contracts.peers`; it is on HTTP alone.

What it knows is read here; other fields are ignored, as they are there.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import Http, Message, Refusal, Route
from computemesh.contracts.engines import Count32, EngineRole, Host, Kind, ModelPath, PeerAddresses, Port
from computemesh.contracts.peers import Address, Bandwidth, Bytes, Key32, RegionName
from computemesh.contracts.services import CONTROL_PLANE
from computemesh.ids import EntityId, Scope

AGENT: Final = "agent"
"""The type of an entity that is a peer agent."""
SERVICE: Final = "service"

RUNNING: Final = "NanoCtrl Server Running"
"""What `GET /` begins with, as its clients look for."""


class _Said(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    scope: Scope | None = None


class NanoRefused(Message, frozen=True, kw_only=True):
    """Why it was not done."""

    status: Literal["error"] = "error"
    message: str
    """One sentence for a person."""
    code: str
    """Machine-readable, `snake_case`."""
    field: str = ""
    """The field at fault; empty when no single field is."""


class Status(Message, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"


class Done(Message, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"
    message: str


# --- engines ----------------------------------------------------------------------------------------------------


class RegisterEngine(_Said, frozen=True, kw_only=True):
    engine_id: EntityId
    role: EngineRole
    world_size: Count32
    num_blocks: Count32
    host: Host
    port: Port
    peer_addrs: PeerAddresses = []
    p2p_host: Host = ""
    p2p_port: Port = 0
    max_num_seqs: Count32 = 0
    model_path: ModelPath | None = None


class EngineNamed(_Said, frozen=True, kw_only=True):
    engine_id: EntityId


class EngineInfo(Message, frozen=True, kw_only=True):
    """An engine."""

    id: str
    role: EngineRole
    world_size: int
    num_blocks: int
    host: str
    port: int
    peer_addrs: list[str]
    p2p_host: str
    p2p_port: int
    max_num_seqs: int
    model_path: str | None
    zmq_address: str
    """`tcp://` with its host and port; empty where it told none."""


class EngineFound(Message, frozen=True, kw_only=True):
    status: Literal["ok", "not_found"]
    engine_info: EngineInfo | None


class InScope(_Said, frozen=True, kw_only=True):
    """Names a scope, or none."""


class EngineList(Message, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"
    engines: list[EngineInfo]


class Heartbeat(_Said, frozen=True, kw_only=True):
    """`entity_type` and `entity_id`, or `engine_id`."""

    entity_type: EntityId | None = None
    entity_id: EntityId | None = None
    engine_id: EntityId | None = None


class Heard(Message, frozen=True, kw_only=True):
    """Whether it is known; one that is not should register."""

    status: Literal["ok", "not_found"]
    message: str


# --- entities ---------------------------------------------------------------------------------------------------


class RegisterEntity(_Said, frozen=True, kw_only=True):
    entity_type: EntityId = SERVICE
    entity_id: EntityId
    kind: Annotated[Kind, msgspec.Meta(min_length=1)]
    endpoint: Any = None
    metadata: Any = {}
    resource: Any = None


class EntityNamed(_Said, frozen=True, kw_only=True):
    entity_type: EntityId = SERVICE
    entity_id: EntityId


class ListEntities(_Said, frozen=True, kw_only=True):
    entity_type: EntityId | None = None
    kind: Kind | None = None


class EntityInfo(Message, frozen=True, kw_only=True):
    """An entity of any type."""

    id: str
    entity_id: str
    entity_type: str
    kind: str
    endpoint: Any
    metadata: Any
    resource: Any


class EntityFound(Message, frozen=True, kw_only=True):
    status: Literal["ok", "not_found"]
    entity_info: EntityInfo | None


class EntityList(Message, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"
    entities: list[EntityInfo]


# --- peer agents ------------------------------------------------------------------------------------------------


class StartPeerAgent(_Said, frozen=True, kw_only=True):
    address: Annotated[str, msgspec.Meta(max_length=253)]
    device: Annotated[str, msgspec.Meta(max_length=200)] = ""
    ib_port: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    link_type: Annotated[str, msgspec.Meta(max_length=40)] = ""
    alias: EntityId | None = None
    """Left out, a free one is found."""
    name_prefix: Annotated[EntityId, msgspec.Meta(max_length=64)] = "agent"
    resource: dict[str, Any] | None = None


class PeerAgentStarted(Message, frozen=True, kw_only=True, omit_defaults=True):
    status: Literal["ok"]
    name: str
    redis_address: str
    """Where the bus is, as `nats://host:port`: there is no Redis."""
    resource: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class PeerAgent(Message, frozen=True, kw_only=True):
    """A peer agent."""

    name: str
    device: str
    ib_port: int
    link_type: str
    address: str
    resource: dict[str, Any] | None
    memory_keys: list[str]


class DesiredTopology(_Said, frozen=True, kw_only=True):
    agent: EntityId
    target_peers: Annotated[list[EntityId], msgspec.Meta(max_length=4096)]
    min_bw: Bandwidth | None = None
    symmetric: bool = False


class RegisterMr(_Said, frozen=True, kw_only=True):
    agent_name: EntityId
    mr_name: RegionName
    addr: Address
    length: Bytes
    rkey: Key32
    lkey: Key32 = 0


class GetMrInfo(_Said, frozen=True, kw_only=True):
    src: str = ""
    """Who asks; it makes no difference."""
    dst: EntityId
    mr_name: RegionName


class MrInfo(Message, frozen=True, kw_only=True):
    addr: int
    length: int
    rkey: int
    lkey: int


class MrFound(Message, frozen=True, kw_only=True):
    mr_info: MrInfo | None


class Cleanup(_Said, frozen=True, kw_only=True):
    agent_name: EntityId


class GetRedisAddress(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Asks where the bus is."""


class RedisAddress(Message, frozen=True, kw_only=True):
    status: Literal["ok"] = "ok"
    redis_address: str
    """Where the bus is, as `nats://host:port`: there is no Redis."""


# --- routes -----------------------------------------------------------------------------------------------------

REFUSES: Final = (
    Refusal(code="bad_message", status=400, when="the body is no JSON"),
    Refusal(code="no_token", status=401, when="beyond loopback, the call has no bearer token"),
    Refusal(code="bad_token", status=403, when="the bearer token is not that of this mesh"),
    Refusal(code="bad_origin", status=403, when="a page of another origin calls"),
    Refusal(code="method_not_allowed", status=405, when="it is called by another method"),
    Refusal(code="too_large", status=413, when="the body is larger than 1 MiB, or more than is kept of one record"),
    Refusal(code="bad_content_type", status=415, when="the body is not declared as `application/json`"),
    Refusal(code="bad_host", status=421, when="on loopback, it was called by a name that is not this machine's"),
    Refusal(code="bad_message", status=422, when="a field is missing or does not fit; `field` says which"),
    Refusal(code="internal", status=500, when="the service failed; its log says why"),
    Refusal(code="unavailable", status=503, when="the bus is away"),
    Refusal(code="full", status=503, when="there is no room for what is to be stored"),
)


def _route(
    path: str, takes: type[Message], gives: Any, example: Message, about: str, *more: Refusal, name: str = ""
) -> Route:
    return Route(
        name=name or f"nanoctrl{path.partition('{')[0].replace('/', '_').rstrip('_')}",
        service=CONTROL_PLANE,
        http=Http(method="POST", path=path),
        takes=takes,
        gives=gives,
        refused_as=NanoRefused,
        refuses=(*REFUSES, *more),
        example=example,
        about=about,
    )


_S: Final = "my-session"
_NOT_YOURS: Final = Refusal(code="not_yours", status=409, when="the peer agent is reached through that of its node")
_TAKEN: Final = Refusal(code="alias_taken", status=409, when="another peer agent of the scope has the alias")

REGISTER_ENGINE: Final = _route(
    "/register_engine",
    RegisterEngine,
    Done,
    RegisterEngine(
        engine_id="prefill-0",
        role="prefill",
        world_size=8,
        num_blocks=15_000,
        host="127.0.0.1",
        port=6001,
        peer_addrs=["127.0.0.1:5000"],
        scope=_S,
    ),
    "Makes an engine known, or known anew.",
)
UNREGISTER_ENGINE: Final = _route(
    "/unregister_engine", EngineNamed, Done, EngineNamed(engine_id="prefill-0", scope=_S), "Forgets an engine."
)
HEARTBEAT_ENGINE: Final = _route(
    "/heartbeat_engine",
    Heartbeat,
    Heard,
    Heartbeat(engine_id="prefill-0", scope=_S),
    "Keeps an engine known. Takes the documented body, and the one that clients send.",
)
HEARTBEAT_AGENT: Final = _route(
    "/heartbeat_agent",
    Heartbeat,
    Heard,
    Heartbeat(entity_type="agent", entity_id="agent-1", scope=_S),
    "Keeps a peer agent known.",
)
HEARTBEAT: Final = _route(
    "/heartbeat",
    Heartbeat,
    Heard,
    Heartbeat(entity_type="engine", entity_id="prefill-0", scope=_S),
    "Keeps an engine, a peer agent or another entity known.",
)
GET_ENGINE_INFO: Final = _route(
    "/get_engine_info", EngineNamed, EngineFound, EngineNamed(engine_id="prefill-0", scope=_S), "One engine."
)
LIST_ENGINES: Final = _route("/list_engines", InScope, EngineList, InScope(scope=_S), "The engines of one scope.")
REGISTER: Final = _route(
    "/register",
    RegisterEntity,
    Done,
    RegisterEntity(entity_id="encoder-0", kind="encoder", endpoint={"host": "127.0.0.1", "port": 7001}, scope=_S),
    "Makes an entity known that is neither an engine nor a peer agent, or known anew.",
)
UNREGISTER: Final = _route(
    "/unregister", EntityNamed, Done, EntityNamed(entity_id="encoder-0", scope=_S), "Forgets an entity."
)
GET_ENTITY_INFO: Final = _route(
    "/get_entity_info", EntityNamed, EntityFound, EntityNamed(entity_id="encoder-0", scope=_S), "One entity."
)
LIST_ENTITIES: Final = _route(
    "/list_entities", ListEntities, EntityList, ListEntities(scope=_S), "The entities of one scope, engines included."
)
START_PEER_AGENT: Final = _route(
    "/start_peer_agent",
    StartPeerAgent,
    PeerAgentStarted,
    StartPeerAgent(address="127.0.0.1", device="mlx5_0", link_type="RoCE", scope=_S),
    "Makes a peer agent known, under its alias or one that is found for it.",
    _TAKEN,
)
QUERY: Final = _route("/query", InScope, list[PeerAgent], InScope(scope=_S), "The peer agents of one scope.")
REGISTER_MR: Final = _route(
    "/register_mr",
    RegisterMr,
    Status,
    RegisterMr(agent_name="agent-1", mr_name="kv", addr=140_000_000_000_000, length=1_048_576, rkey=4660, scope=_S),
    "Makes a memory region of a peer agent known.",
    _NOT_YOURS,
)
GET_MR_INFO: Final = _route(
    "/get_mr_info",
    GetMrInfo,
    MrFound,
    GetMrInfo(src="agent-2", dst="agent-1", mr_name="kv", scope=_S),
    "One memory region of a peer agent.",
)
DESIRED_TOPOLOGY: Final = _route(
    "/v1/desired_topology/{agent}",
    DesiredTopology,
    Status,
    DesiredTopology(agent="agent-1", target_peers=["agent-2"], symmetric=True, scope=_S),
    "Says whom a peer agent is to be connected to.",
)
CLEANUP: Final = _route(
    "/cleanup",
    Cleanup,
    Done,
    Cleanup(agent_name="agent-1", scope=_S),
    "Forgets a peer agent, its memory and its topology.",
    _NOT_YOURS,
)
GET_REDIS_ADDRESS: Final = _route(
    "/get_redis_address", GetRedisAddress, RedisAddress, GetRedisAddress(), "Where the bus is."
)
