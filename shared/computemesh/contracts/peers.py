"""Peers: processes that let others read and write pieces of their memory, and what the control plane knows of them.

    a process --Unix socket--> its node's peer-agent --register, memory_put, heartbeat--> control-plane
    the same  --call--> control-plane --answer--> the peer's peer-agent --Unix socket--> the peer

The bytes themselves take no part in this: they go from process to process, by RDMA, shared memory or TCP. What goes
over the bus is who is there, and what two processes must tell each other before they can speak directly: the
addresses, and a key that each connection has of its own.

A peer's ``instance`` names one life of a process under an alias. Only its owner and the control plane know it, so who
shows it speaks for the peer; nobody else can drop it, or connect in its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import Event, Http, Message, Refusal, Request, Role, in_words
from computemesh.contracts.nodes import Reason
from computemesh.contracts.services import CONTROL_PLANE, PEER_AGENT
from computemesh.ids import EntityId, Id, Scope

TTL_S: Final = 60
"""A peer of which nothing was heard for so long is gone, and its memory and topology with it."""

HEARTBEAT_S: Final = 15.0
"""How often a peer-agent lets the control plane hear of its peers."""

MEMORY_KEYS_MAX: Final = 4096
PEERS_PAGE_MAX: Final = 1000

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Address = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""In the memory of a process, which is below the half of 64 bits."""
Key32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Counts the registrations of a process: what was registered later under the same name has a higher one."""
_REGION_NAME: Final = in_words(r"^[^\x00-\x1f\x7f]*$(?!\n)", "the name of a region has no control characters")
RegionName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=_REGION_NAME)]
Transport = Literal["rdma", "shm", "tcp"]
Bandwidth = Annotated[str, msgspec.Meta(max_length=40)]
"""As `100Gbps`; how it was written is kept."""


# --- peers ------------------------------------------------------------------------------------------------------


class PeerRegister(Message, frozen=True, kw_only=True):
    """A process wants to be found."""

    scope: Scope = ""
    alias: EntityId | None = None
    """Left out, the control plane finds a free one: `{name_prefix}-{number in hexadecimal}`."""
    name_prefix: Annotated[EntityId, msgspec.Meta(max_length=64)] = "agent"
    instance: Id
    """Chosen by the process, and never the same twice."""
    node_id: Id | None = None
    """Whose peer-agent it is reached through; left out by programs that bring their own way."""
    address: Annotated[str, msgspec.Meta(max_length=253)] = ""
    device: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """The network interface it prefers, as `mlx5_0`."""
    ib_port: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    link_type: Annotated[str, msgspec.Meta(max_length=40)] = ""
    resource: dict[str, Any] = {}
    """The machine's network interfaces and accelerators, in DLSlime's shape."""


class Peer(Message, frozen=True, kw_only=True):
    """A process that can be connected to."""

    scope: Scope = ""
    alias: EntityId
    node_id: Id | None = None
    address: str = ""
    device: str = ""
    ib_port: int = 1
    link_type: str = ""
    resource: dict[str, Any] = {}
    memory_keys: list[str] = []
    """Names of its memory regions, sorted."""
    registered_at: float
    """Unix seconds."""
    seen_at: float
    """Unix seconds of the last heartbeat."""
    revision: int
    """Of its scope, when this was last changed."""


class PeerUnregister(Message, frozen=True, kw_only=True):
    """The process ends, or wants to be found no longer."""

    scope: Scope = ""
    alias: EntityId
    instance: Id


class PeerUnregistered(Message, frozen=True, kw_only=True):
    found: bool
    """False when it was not there any more."""


class PeerBeat(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    alias: EntityId
    instance: Id


class PeerHeartbeat(Message, frozen=True, kw_only=True):
    """Peers that live, all those of a peer-agent at once."""

    peers: Annotated[list[PeerBeat], msgspec.Meta(max_length=1000)]


class PeerHeard(Message, frozen=True, kw_only=True):
    missing: list[PeerBeat] = []
    """Those that are not known, or no longer: to be registered again, with their memory."""


class PeerGet(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    alias: EntityId


class PeersList(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    after: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Begins behind this alias; `next` of the answer before."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PEERS_PAGE_MAX)] = PEERS_PAGE_MAX


class Peers(Message, frozen=True, kw_only=True):
    """Peers of a scope, sorted by alias."""

    peers: list[Peer]
    revision: int
    """Of the scope."""
    next: str = ""
    """For `after`; empty on the last page."""


# --- memory -----------------------------------------------------------------------------------------------------


class MemoryPut(Message, frozen=True, kw_only=True):
    """A peer offers a piece of its memory, or another one under the same name."""

    scope: Scope = ""
    alias: EntityId
    instance: Id
    name: RegionName
    length: Bytes
    epoch: Epoch
    addr: Address = 0
    rkey: Key32 = 0
    """As verbs know it; 0 where it is told to connected peers alone."""
    transports: list[Transport] = []


class PeerMemory(Message, frozen=True, kw_only=True):
    """A piece of memory that a peer offers."""

    scope: Scope = ""
    alias: EntityId
    name: RegionName
    length: Bytes
    epoch: Epoch = 0
    addr: Address = 0
    rkey: Key32 = 0
    lkey: Key32 = 0
    transports: list[Transport] = []


class MemoryStored(Message, frozen=True, kw_only=True):
    revision: int


class MemoryDrop(Message, frozen=True, kw_only=True):
    """A peer offers a piece of memory no longer."""

    scope: Scope = ""
    alias: EntityId
    instance: Id
    name: RegionName
    epoch: Epoch
    """Of what is dropped; what was registered under the name since then stays."""


class MemoryDropped(Message, frozen=True, kw_only=True):
    found: bool


class MemoryGet(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    alias: EntityId
    name: RegionName


class MemoryList(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    alias: EntityId


class PeerMemories(Message, frozen=True, kw_only=True):
    memories: list[PeerMemory]
    """Sorted by name."""


# --- topology ---------------------------------------------------------------------------------------------------


class TopologyPut(Message, frozen=True, kw_only=True):
    """Whom a peer is to be connected to, from now on and again after a failure. It need not be there yet."""

    scope: Scope = ""
    alias: EntityId
    target_peers: Annotated[list[EntityId], msgspec.Meta(max_length=4096)]
    """Itself among them, as in a list of all, is left out."""
    min_bw: Bandwidth | None = None
    symmetric: bool = False
    """Each target is to be connected to this one as well, beside what it is told otherwise."""


class Topology(Message, frozen=True, kw_only=True):
    """Whom a peer is to be connected to."""

    scope: Scope = ""
    alias: EntityId
    target_peers: list[EntityId]
    min_bw: Bandwidth | None = None
    revision: int = 0
    """Of the scope, when this was last changed; 0 while nothing was ever said."""


class TopologyGet(Message, frozen=True, kw_only=True):
    scope: Scope = ""
    alias: EntityId


# --- what two processes tell each other before they can speak directly ------------------------------------------


class Connect(Message, frozen=True, kw_only=True, tag_field="kind", tag="connect"):
    """A process wants a connection."""

    conn_id: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    """As the process names it: `{me}:{nic}:port{n}->{peer}:{nic}:port{n}#qp{q}`."""
    link: Id
    """Names this connection among all that there ever were under `conn_id`."""
    key: Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern="^[0-9a-f]+$")]
    """Of this connection alone, 256 random bits in hexadecimal."""
    offers: dict[Transport, dict[str, Any]]
    """What the process has, by transport: its addresses and numbers."""
    wants: list[Transport]
    """The transports in the order of its wishes."""


class Connected(Message, frozen=True, kw_only=True, tag_field="kind", tag="connected"):
    """The peer takes the connection."""

    link: Id
    answers: dict[Transport, dict[str, Any]]
    """What the peer has to say of each transport that it takes; the others are not to be used."""


class Resolve(Message, frozen=True, kw_only=True, tag_field="kind", tag="resolve"):
    """A process with a connection asks how to reach pieces of the peer's memory."""

    link: Id
    names: Annotated[list[RegionName], msgspec.Meta(min_length=1, max_length=1000)]


class Region(Message, frozen=True, kw_only=True):
    """A piece of a peer's memory, for one connection."""

    name: RegionName
    epoch: Epoch
    length: Bytes
    writable: bool = True
    tokens: dict[Transport, dict[str, Any]]
    """What each transport needs to reach it; one that is not here can't."""


class Resolved(Message, frozen=True, kw_only=True, tag_field="kind", tag="resolved"):
    regions: list[Region]
    """Those there are of the names asked for."""


class Close(Message, frozen=True, kw_only=True, tag_field="kind", tag="close"):
    """A process ends a connection, or its peer-agent saw that the process ended."""

    link: Id
    reason: Reason = ""


class Closed(Message, frozen=True, kw_only=True, tag_field="kind", tag="closed"):
    found: bool


class PeerCall(Message, frozen=True, kw_only=True):
    """What a peer says to another one of its scope."""

    scope: Scope = ""
    alias: EntityId
    """Who says it."""
    instance: Id
    """Shows that it is so."""
    peer: EntityId
    """To whom."""
    body: Connect | Resolve | Close


class PeerCalled(Message, frozen=True, kw_only=True):
    """The same, as the control plane passes it on."""

    scope: Scope = ""
    alias: EntityId
    """Who says it; the control plane has made sure."""
    node_id: Id
    """Where that one is, by the word of the peer-agent that registered it."""
    peer: EntityId
    body: Connect | Resolve | Close


class PeerAnswered(Message, frozen=True, kw_only=True):
    body: Connected | Resolved | Closed


# --- transfers that are ordered over the bus --------------------------------------------------------------------


class Piece(Message, frozen=True, kw_only=True):
    """A range of bytes, here and there."""

    local: RegionName
    """Region of the peer that is told."""
    local_offset: Bytes = 0
    remote: RegionName | None = None
    """Region of the other one; left out, the same name."""
    remote_offset: Bytes = 0
    length: Bytes
    epoch: Epoch | None = None
    """Of the remote region, which must still be this; left out, whichever is there."""
    checksum: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8}$")] | None = None
    """CRC-32 of the bytes in hexadecimal, which they must have; left out, it is not looked at."""


class Transfer(Message, frozen=True, kw_only=True):
    """Tells a peer to read from another one, or to write to it."""

    transfer_id: Id
    """Chosen by the asker. Asked again with the same terms, it is not done again."""
    scope: Scope = ""
    alias: EntityId
    """The peer that is told; it lives on the node of the subject."""
    peer: EntityId
    """The other one. They are connected first, if they are not."""
    kind: Literal["read", "write"]
    pieces: Annotated[list[Piece], msgspec.Meta(min_length=1, max_length=4096)]
    checksums: bool = False
    """Whether the CRC-32 of each piece is to be told at the end."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0


class TransferBegun(Message, frozen=True, kw_only=True):
    transfer_id: Id
    state: Literal["running", "completed", "failed"]
    """Of a transfer that was asked for before, where it stands."""


class Transferred(Message, frozen=True, kw_only=True):
    """A transfer that was ordered over the bus has ended."""

    transfer_id: Id
    node_id: Id
    scope: Scope = ""
    alias: EntityId
    peer: EntityId
    kind: Literal["read", "write"]
    ok: bool
    bytes: Bytes = 0
    """That were moved, all or none of each piece."""
    seconds: float = 0.0
    transports: list[Transport] = []
    """By which the bytes went."""
    epochs: list[Epoch] = []
    """Of the remote region of each piece."""
    checksums: list[str] = []
    """Of each piece, if they were asked for."""
    code: str = ""
    """If it failed: `no_peer`, `no_region`, `out_of_range`, `read_only`, `stale_epoch`, `bad_checksum`, `link_lost`,
    `timed_out` …"""
    reason: Reason = ""
    at: float
    """Unix seconds."""


# --- what is told -----------------------------------------------------------------------------------------------


class PeerChanged(Message, frozen=True, kw_only=True):
    """Something about a peer is not as it was."""

    scope: Scope = ""
    alias: EntityId
    node_id: Id | None = None
    change: Literal["added", "changed", "removed", "expired", "memory", "topology"]
    revision: int
    """Of the scope."""
    at: float
    """Unix seconds."""


_EVERYONE: Final = frozenset(Role)
_SERVICES: Final = frozenset({Role.SERVICES})
_PEERS: Final = frozenset({Role.NODE, Role.SERVICES})
_ASKERS: Final = frozenset({Role.CLIENT, Role.NODE, Role.SERVICES})

_NO_PEER: Final = Refusal(code="not_found", status=404, when="there is no such peer in this scope")
_NOT_YOURS: Final = Refusal(code="not_yours", status=409, when="the alias belongs to another instance")
_NO_PLACE: Final = Refusal(code="full", status=503, when="there is no room for more records")

REGISTER: Final = Request(
    subject="compute.peers.register.v1",
    takes=PeerRegister,
    gives=Peer,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(
        Refusal(code="alias_taken", status=409, when="another instance lives under that alias in this scope"),
        Refusal(code="too_large", status=413, when="its resource is larger than what is kept of a peer"),
        _NO_PLACE,
    ),
    example=PeerRegister(scope="job-123", alias="worker-a", instance="i-1", node_id="node-1"),
    about="Makes a peer known, or known again; its alias is its own until it ends or is not heard of.",
)
UNREGISTER: Final = Request(
    subject="compute.peers.unregister.v1",
    takes=PeerUnregister,
    gives=PeerUnregistered,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(_NOT_YOURS,),
    example=PeerUnregister(scope="job-123", alias="worker-a", instance="i-1"),
    about="Forgets a peer, its memory and its topology.",
)
HEARTBEAT: Final = Request(
    subject="compute.peers.heartbeat.v1",
    takes=PeerHeartbeat,
    gives=PeerHeard,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(_NO_PLACE,),
    example=PeerHeartbeat(peers=[PeerBeat(scope="job-123", alias="worker-a", instance="i-1")]),
    about="Keeps peers known.",
)
GET: Final = Request(
    subject="compute.peers.get.v1",
    takes=PeerGet,
    gives=Peer,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/peers/get"),),
    refuses=(_NO_PEER,),
    example=PeerGet(scope="job-123", alias="worker-a"),
    about="One peer.",
)
LIST: Final = Request(
    subject="compute.peers.list.v1",
    takes=PeersList,
    gives=Peers,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/peers"),),
    example=PeersList(scope="job-123"),
    about="The peers of a scope.",
)
MEMORY_PUT: Final = Request(
    subject="compute.peers.memory_put.v1",
    takes=MemoryPut,
    gives=MemoryStored,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(_NO_PEER, _NOT_YOURS, _NO_PLACE),
    example=MemoryPut(
        scope="job-123", alias="worker-a", instance="i-1", name="kv", length=4096, epoch=1, transports=["shm", "tcp"]
    ),
    about="Makes a piece of a peer's memory known.",
)
MEMORY_DROP: Final = Request(
    subject="compute.peers.memory_drop.v1",
    takes=MemoryDrop,
    gives=MemoryDropped,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(_NOT_YOURS,),
    example=MemoryDrop(scope="job-123", alias="worker-a", instance="i-1", name="kv", epoch=1),
    about="Forgets a piece of a peer's memory.",
)
MEMORY_GET: Final = Request(
    subject="compute.peers.memory_get.v1",
    takes=MemoryGet,
    gives=PeerMemory,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    refuses=(Refusal(code="not_found", status=404, when="there is no such peer, or it offers nothing of that name"),),
    example=MemoryGet(scope="job-123", alias="worker-a", name="kv"),
    about="One piece of a peer's memory.",
)
MEMORY_LIST: Final = Request(
    subject="compute.peers.memory_list.v1",
    takes=MemoryList,
    gives=PeerMemories,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/peers/memory"),),
    refuses=(_NO_PEER,),
    example=MemoryList(scope="job-123", alias="worker-a"),
    about="What memory a peer offers.",
)
TOPOLOGY_PUT: Final = Request(
    subject="compute.peers.topology_put.v1",
    takes=TopologyPut,
    gives=Topology,
    asked_by=_ASKERS,
    service=CONTROL_PLANE,
    refuses=(_NO_PLACE,),
    example=TopologyPut(scope="job-123", alias="worker-a", target_peers=["worker-b"], symmetric=True),
    about="Says whom a peer is to be connected to.",
)
TOPOLOGY_GET: Final = Request(
    subject="compute.peers.topology_get.v1",
    takes=TopologyGet,
    gives=Topology,
    asked_by=_EVERYONE,
    service=CONTROL_PLANE,
    http=(Http(method="GET", path="/v1/peers/topology"),),
    example=TopologyGet(scope="job-123", alias="worker-a"),
    about="Whom a peer is to be connected to.",
)
CALL: Final = Request(
    subject="compute.peers.call.v1",
    takes=PeerCall,
    gives=PeerAnswered,
    asked_by=_PEERS,
    service=CONTROL_PLANE,
    refuses=(
        _NO_PEER,
        _NOT_YOURS,
        Refusal(code="no_way", status=409, when="the peer has no peer-agent, or no transport is common to both"),
        Refusal(code="unavailable", status=503, when="the peer's node does not answer"),
        Refusal(code="crossed", status=409, when="the peer is connecting to the asker already; wait for that"),
        Refusal(code="no_link", status=404, when="the peer has no such connection, or no longer"),
        Refusal(code="refused", status=403, when="the peer does not want the connection"),
    ),
    example=PeerCall(
        scope="job-123",
        alias="worker-a",
        instance="i-1",
        peer="worker-b",
        body=Resolve(link="l-1", names=["kv"]),
    ),
    about="Passes on to a peer what another one of its scope says.",
)
ANSWER: Final = Request(
    subject="compute.peers.answer.v1",
    target="node_id",
    takes=PeerCalled,
    gives=PeerAnswered,
    asked_by=_SERVICES,
    service=PEER_AGENT,
    refuses=CALL.refuses,
    example=PeerCalled(
        scope="job-123", alias="worker-a", node_id="node-1", peer="worker-b", body=Resolve(link="l-1", names=["kv"])
    ),
    about="What a peer says, for a process of this node.",
)
TRANSFER: Final = Request(
    subject="compute.peers.transfer.v1",
    target="node_id",
    takes=Transfer,
    gives=TransferBegun,
    asked_by=frozenset({Role.CLIENT, Role.SERVICES}),
    service=PEER_AGENT,
    refuses=(
        _NO_PEER,
        Refusal(code="no_region", status=404, when="the peer that is told has no such region"),
        Refusal(code="out_of_range", status=400, when="a piece reaches beyond its local region"),
        Refusal(code="conflict", status=409, when="the id stands for a transfer with other terms"),
        Refusal(code="too_many_requests", status=429, when="the node has all the transfers it takes"),
    ),
    example=Transfer(
        transfer_id="t-1",
        scope="job-123",
        alias="worker-a",
        peer="worker-b",
        kind="read",
        pieces=[Piece(local="kv", local_offset=8, remote_offset=0, length=8)],
    ),
    about="Begins a transfer between two peers; its end is told as an event.",
)
TRANSFERRED: Final = Event(
    subject="compute.peers.transferred.v1",
    payload=Transferred,
    sent_by=frozenset({Role.NODE}),
    read_by=frozenset({Role.CLIENT, Role.SERVICES, Role.OBSERVER}),
    about="A transfer that was ordered over the bus has ended.",
)
CHANGED: Final = Event(
    subject="compute.peers.changed.v1",
    payload=PeerChanged,
    sent_by=_SERVICES,
    read_by=_EVERYONE - _SERVICES,
    about="A peer came, went, expired or changed, or its memory or topology did.",
)
