"""Engines and other services by name: who serves what where, for those who route requests and move KV cache.

    an engine        --register / heartbeat / unregister-->  control-plane
    anyone           --get / list / changes-->               control-plane
    control-plane    --changed-->                            anyone        once it is stored

Records live in scopes, which know nothing of each other. A record that gets no heartbeat expires, and that is told like
any other change. Each change has a revision: who lists a scope, and from then on asks for the changes since that
revision, misses none.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import Event, Http, Message, Refusal, Request, Role, in_words
from computemesh.contracts.services import CONTROL_PLANE
from computemesh.ids import EntityId, Scope

ENGINE: Final = "engine"
"""The type of an entity that is an inference engine; the others may be called anything."""

TTL_S: Final = 60
"""An entity of which nothing was heard for so long is gone."""

HEARTBEAT_S: Final = 15.0
"""How often an entity should let itself be heard."""

PAGE_MAX: Final = 1000
RECORD_BYTES_MAX: Final = 64 * 1024
"""What is kept of an entity, as JSON; a larger one is refused."""

EngineRole = Literal["prefill", "decode", "hybrid"]
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Count32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_HOST: Final = in_words(r"^[^\s/]*$(?!\n)", "a host is a name or an address, without blanks and '/'")
Host = Annotated[str, msgspec.Meta(max_length=253, pattern=_HOST)]
PeerAddresses = Annotated[list[Annotated[str, msgspec.Meta(max_length=300)]], msgspec.Meta(max_length=4096)]
ModelPath = Annotated[str, msgspec.Meta(max_length=4096)]
Kind = Annotated[str, msgspec.Meta(max_length=128)]


class Facts(Message, frozen=True, kw_only=True):
    """What an entity says of itself."""

    kind: Kind = ""
    """What sort of service it is; of an engine, its role."""
    role: EngineRole | None = None
    """Of an engine, which must name it."""
    world_size: Count32 = 1
    """GPUs, or processes, that make up the engine."""
    num_blocks: Count32 = 0
    """Blocks of its KV cache."""
    host: Host = ""
    port: Port = 0
    peer_addrs: PeerAddresses = []
    """Where its workers take KV cache."""
    p2p_host: Host = ""
    p2p_port: Port = 0
    max_num_seqs: Count32 = 0
    """Sequences it works on at the same time; 0 = not told."""
    model_path: ModelPath | None = None
    endpoint: Any = None
    """Where it is reached, in whatever form its callers know."""
    metadata: Any = {}
    resource: Any = None


class EngineRegister(Facts, frozen=True, kw_only=True):
    """An entity wants to be found."""

    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId
    """Its name; unique among those of its type in its scope. One that is known already begins a new life."""


class Engine(Facts, frozen=True, kw_only=True):
    """An entity as it is known."""

    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId
    zmq_address: str = ""
    """`tcp://` with its host and port, where it told both."""
    registered_at: float
    """Unix seconds."""
    seen_at: float
    """Unix seconds of its registration or last heartbeat. Those that come within a sixth of its life of one that
    was stored, 10 s, count as one with it."""


class EngineRegistered(Message, frozen=True, kw_only=True):
    engine: Engine
    ttl_s: int
    """It expires this long after its last heartbeat."""


class EngineUnregister(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId


class EngineUnregistered(Message, frozen=True, kw_only=True):
    found: bool
    """False when it was not there any more."""


class EngineHeartbeat(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId


class EngineHeard(Message, frozen=True, kw_only=True):
    found: bool
    """False for one that is not known, or no longer: it should register."""


class EngineGet(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId


class EnginesList(Message, frozen=True, kw_only=True):
    """Asks for what there is in one scope."""

    scope: Scope = ""
    entity_type: EntityId | None = None
    """Only these; left out, all."""
    kind: Kind | None = None
    """Only these; of engines, the role."""
    after: Annotated[str, msgspec.Meta(max_length=300)] = ""
    """`next` of the answer before."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX


class Engines(Message, frozen=True, kw_only=True):
    """Entities of a scope, sorted by type and id."""

    engines: list[Engine]
    count: int
    """All that match, on this page or not."""
    revision: int
    """Whatever changed up to this is reflected; ask for the changes since then."""
    next: str = ""
    """For `after`; empty on the last page. Who reads several pages goes on from the revision of the first."""


class EngineChange(Message, frozen=True, kw_only=True):
    """Something about an entity is not as it was."""

    revision: int
    """Rises with each change of any scope."""
    previous: int
    """No change of this scope lies between this revision and that one. Who knows the scope up to an earlier one has
    missed something, and asks for the changes since."""
    change: Literal["added", "changed", "removed", "expired"]
    """`changed`: it registered again. `expired`: nothing was heard of it for the time it has."""
    scope: Scope = ""
    entity_type: EntityId = ENGINE
    engine_id: EntityId
    engine: Engine | None = None
    """As it then was; null when it is gone."""
    source: int
    """Revision of the record in the store."""
    at: float
    """Unix seconds."""


class ChangesGet(Message, frozen=True, kw_only=True):
    """Asks for what changed in one scope."""

    scope: Scope = ""
    since: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The revision up to which the asker knows."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX


class Changes(Message, frozen=True, kw_only=True):
    """What changed, in order. It may be told again what a list already showed."""

    changes: list[EngineChange]
    revision: int
    """For `since`, the next time."""
    more: bool = False
    """There are more than the answer holds; ask again at once."""
    reset: bool = False
    """Not all that changed since then is known any more: list the scope anew, and go on from there."""


_EVERYONE: Final = frozenset(Role)
_SPEAKERS: Final = frozenset({Role.CLIENT, Role.NODE, Role.SERVICES})

REGISTER: Final = Request(
    subject="compute.engines.register.v1",
    takes=EngineRegister,
    gives=EngineRegistered,
    asked_by=_SPEAKERS,
    service=CONTROL_PLANE,
    http=(Http(method="POST", path="/v1/engines/register"),),
    refuses=(
        Refusal(code="bad_engine", status=400, when="an engine has no role; another entity has no kind"),
        Refusal(code="too_large", status=413, when=f"it says more than {RECORD_BYTES_MAX // 1024} KiB of itself"),
        Refusal(code="full", status=503, when="there is no room for more records"),
    ),
    example=EngineRegister(
        scope="job-123", engine_id="prefill-0", role="prefill", world_size=8, num_blocks=15_000, host="h1", port=6001
    ),
    about="Makes an engine, or any other entity, known, or known anew.",
)
HEARTBEAT: Final = Request(
    subject="compute.engines.heartbeat.v1",
    takes=EngineHeartbeat,
    gives=EngineHeard,
    asked_by=_SPEAKERS,
    service=CONTROL_PLANE,
    http=(Http(method="POST", path="/v1/engines/heartbeat"),),
    refuses=(Refusal(code="full", status=503, when="there is no room to store that it was heard"),),
    example=EngineHeartbeat(scope="job-123", engine_id="prefill-0"),
    about="Keeps an entity known.",
)
GET: Final = Request(
    subject="compute.engines.get.v1",
    takes=EngineGet,
    gives=Engine,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/engines/get"),),
    refuses=(Refusal(code="not_found", status=404, when="there is no such entity in this scope"),),
    example=EngineGet(scope="job-123", engine_id="prefill-0"),
    about="One entity.",
)
LIST: Final = Request(
    subject="compute.engines.list.v1",
    takes=EnginesList,
    gives=Engines,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/engines"),),
    example=EnginesList(scope="job-123", kind="decode"),
    about="The entities of a scope.",
)
CHANGES: Final = Request(
    subject="compute.engines.changes.v1",
    takes=ChangesGet,
    gives=Changes,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/engines/changes"),),
    example=ChangesGet(scope="job-123", since=41),
    about="What changed in a scope since a revision.",
)
UNREGISTER: Final = Request(
    subject="compute.engines.unregister.v1",
    takes=EngineUnregister,
    gives=EngineUnregistered,
    asked_by=_SPEAKERS,
    service=CONTROL_PLANE,
    http=(Http(method="POST", path="/v1/engines/unregister"),),
    example=EngineUnregister(scope="job-123", engine_id="prefill-0"),
    about="Forgets an entity.",
)
CHANGED: Final = Event(
    subject="compute.engines.changed.v1",
    target="scope",
    payload=EngineChange,
    sent_by=frozenset(),  # The server republishes what the ledger stored; nobody else may.
    read_by=_EVERYONE,
    about="An entity came, went, expired or registered anew. The last token stands for the scope: a name of letters, "
    "digits, `_` and `-`, at most 63, for itself, `-` for the empty one.",
)
