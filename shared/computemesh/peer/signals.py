"""What a process and its node's peer-agent tell each other, over a Unix socket.

A frame is four bytes, the length of what follows as a big-endian number, and one JSON object: :class:`Frame`. File
descriptors travel with the first byte of the frame that names them (``SCM_RIGHTS``), in the order in which it does.
Either side asks; every frame with a ``body`` that is a question gets one with the same ``id``, which has ``answer``
or ``refused``. What has no answer has ``id`` 0.

The first question of a process is :class:`Hello`. A process that ends, or whose socket closes, takes its peer along:
the peer-agent unregisters it, and tells those that were connected to it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from computemesh.contracts.base import Message, Refused
from computemesh.contracts.nodes import Reason
from computemesh.contracts.peers import (
    Bandwidth,
    Bytes,
    Close,
    Closed,
    Connect,
    Connected,
    Epoch,
    Peer,
    PeerMemory,
    Region,
    RegionName,
    Resolve,
    Topology,
    Transfer,
    TransferBegun,
    Transferred,
    Transport,
)
from computemesh.ids import EntityId, Id, Scope

PROTOCOL: Final = 1
FRAME_MAX: Final = 4 * 1024 * 1024
FDS_MAX: Final = 64
"""In one frame."""
LINKS_MAX: Final = 16_384
"""Connections of one process."""
SOCKET_NAME: Final = "peer-agent.sock"
"""In the `run` folder of a computemesh home, which only its owner may enter."""


# --- a process asks its peer-agent ------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True, tag_field="kind", tag="hello"):
    """I am here, and want to be found."""

    protocol: int = PROTOCOL
    scope: Scope = ""
    alias: EntityId | None = None
    """Left out, the control plane finds one."""
    name_prefix: Annotated[EntityId, msgspec.Meta(max_length=64)] = "agent"
    instance: Id | None = None
    """Of the last welcome, when the peer-agent went away and came back: the alias is still mine."""
    links: Annotated[dict[Id, EntityId], msgspec.Meta(max_length=LINKS_MAX)] = {}
    """My connections that go on from then, and with whom."""
    device: str = ""
    resource: dict[str, Any] = {}
    pid: int = 0
    hosted: bool = False
    """The peer-agent moves the bytes itself, between the regions that the process hands to it as descriptors. So a
    program in any language takes part without a transport of its own."""


class Welcome(Message, frozen=True, kw_only=True, tag_field="kind", tag="welcome"):
    alias: EntityId
    scope: Scope
    instance: Id
    """Shows that a process owns the alias; nobody else may know it."""
    node_id: Id
    bus: str
    """Address of the NATS server, without credentials."""
    peer: Peer


class PutRegion(Message, frozen=True, kw_only=True, tag_field="kind", tag="put_region"):
    """I offer this memory. With a descriptor, if others of this machine may map it."""

    name: RegionName
    length: Bytes
    epoch: Epoch
    address: int = 0
    writable: bool = True
    tokens: dict[Transport, dict[str, Any]] = {}
    """What my transports say of it. For `shm`: `offset`, where it begins in the descriptor's object, and `slot`."""
    fds: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class PutEpochs(Message, frozen=True, kw_only=True, tag_field="kind", tag="put_epochs"):
    """Comes with one descriptor: a page of unsigned 64-bit numbers in the machine's order. A region of shared memory
    has a slot there, which holds its epoch while it is registered, and 0 before and after. When the process ends, the
    peer-agent writes zeros."""

    fds: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1


class DropRegion(Message, frozen=True, kw_only=True, tag_field="kind", tag="drop_region"):
    """I offer this memory no longer."""

    name: RegionName
    epoch: Epoch


class Call(Message, frozen=True, kw_only=True, tag_field="kind", tag="call"):
    """Tell a peer this. The answer is what it says."""

    peer: EntityId
    body: Connect | Resolve | Close


class ListPeers(Message, frozen=True, kw_only=True, tag_field="kind", tag="list_peers"):
    """Which aliases are there in my scope?"""


class GetPeer(Message, frozen=True, kw_only=True, tag_field="kind", tag="get_peer"):
    alias: EntityId


class GetMemory(Message, frozen=True, kw_only=True, tag_field="kind", tag="get_memory"):
    alias: EntityId


class SetTopology(Message, frozen=True, kw_only=True, tag_field="kind", tag="set_topology"):
    target_peers: list[EntityId]
    min_bw: Bandwidth | None = None
    symmetric: bool = False


class HostedTransfer(Message, frozen=True, kw_only=True, tag_field="kind", tag="hosted_transfer"):
    """Move these bytes for me; a hosted process only. The answer comes at the end."""

    transfer: Transfer


Question = (
    Hello | PutRegion | PutEpochs | DropRegion | Call | ListPeers | GetPeer | GetMemory | SetTopology | HostedTransfer
)


# --- and is answered --------------------------------------------------------------------------------------------


class Done(Message, frozen=True, kw_only=True, tag_field="kind", tag="done"):
    found: bool = True


class Aliases(Message, frozen=True, kw_only=True, tag_field="kind", tag="aliases"):
    aliases: list[EntityId]


class PeerFacts(Message, frozen=True, kw_only=True, tag_field="kind", tag="peer_facts"):
    peer: Peer | None


class MemoryFacts(Message, frozen=True, kw_only=True, tag_field="kind", tag="memory_facts"):
    memories: list[PeerMemory]


class TopologyFacts(Message, frozen=True, kw_only=True, tag_field="kind", tag="topology_facts"):
    topology: Topology


class RegionsResolved(Message, frozen=True, kw_only=True, tag_field="kind", tag="regions"):
    """Of regions in shared memory on this machine, the descriptors come along."""

    regions: list[Region]
    fds: list[str] = []
    """Whose they are, in their order; an empty name stands for the peer's page of epochs, which comes first. What a
    peer may only read comes as a descriptor that can only be read."""


class Called(Message, frozen=True, kw_only=True, tag_field="kind", tag="called"):
    """What the peer said."""

    body: Connected | RegionsResolved | Closed
    same_host: bool = False


class HostedTransferred(Message, frozen=True, kw_only=True, tag_field="kind", tag="hosted_transferred"):
    outcome: Transferred


# --- the peer-agent asks a process ------------------------------------------------------------------------------


class Accept(Message, frozen=True, kw_only=True, tag_field="kind", tag="accept"):
    """A peer wants a connection. The answer is :class:`Accepted`, or a refusal."""

    peer: EntityId
    node_id: Id
    same_host: bool
    body: Connect


class Accepted(Message, frozen=True, kw_only=True, tag_field="kind", tag="accepted"):
    body: Connected


class Lost(Message, frozen=True, kw_only=True, tag_field="kind", tag="lost"):
    """A connection has ended, by the word of the peer or because its process did. Without `link`: all with that peer.
    There is no answer."""

    peer: EntityId
    link: Id | None = None
    reason: Reason = ""


class Order(Message, frozen=True, kw_only=True, tag_field="kind", tag="order"):
    """Somebody wants this moved; it is for you. The answer is :class:`Begun`; the end is told by :class:`Ended`."""

    transfer: Transfer


class Begun(Message, frozen=True, kw_only=True, tag_field="kind", tag="begun"):
    body: TransferBegun


class Ended(Message, frozen=True, kw_only=True, tag_field="kind", tag="ended"):
    """From the process to its peer-agent, without an answer: a transfer has ended."""

    outcome: Transferred


class Moves(Message, frozen=True, kw_only=True):
    """Orders of a process that went by one transport, and their bytes."""

    reads: Bytes = 0
    writes: Bytes = 0
    bytes_read: Bytes = 0
    bytes_written: Bytes = 0


class Traffic(Message, frozen=True, kw_only=True, tag_field="kind", tag="traffic"):
    """From the process to its peer-agent, without an answer: what it has ordered since it said so last."""

    moved: dict[Transport, Moves] = {}
    failed: Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], Bytes], msgspec.Meta(max_length=64)] = {}
    """By code: transfers and messages that failed."""


class Desired(Message, frozen=True, kw_only=True, tag_field="kind", tag="desired"):
    """Whom you are to be connected to. Told once after the welcome if there is something, and when it changes. There
    is no answer."""

    topology: Topology


Told = Accept | Lost | Order | Desired
News = Ended | Traffic
Answer = (
    Welcome | Done | Aliases | PeerFacts | MemoryFacts | TopologyFacts | Called | HostedTransferred | Accepted | Begun
)


class Frame(Message, frozen=True, kw_only=True, omit_defaults=True):
    """One thing said. Ids are chosen by who asks, each side for itself; 0 where no answer is wanted."""

    id: int = 0
    ask: Question | Told | News | None = None
    answer: Answer | None = None
    refused: Refused | None = None
