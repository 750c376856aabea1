"""What the control plane keeps of peers: a record each of the peer, of all its memory, and of its topology."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from computemesh.contracts.base import Message
from computemesh.contracts.peers import Address, Bandwidth, Bytes, Epoch, Key32, RegionName, Transport
from computemesh.ids import EntityId, Id, Scope


class PeerRecord(Message, frozen=True, kw_only=True):
    """A peer."""

    scope: Scope = ""
    alias: EntityId
    instance: Id | None = None
    """Who shows it speaks for the peer; None where the peer's program has none, so that anybody may."""
    node_id: Id | None = None
    address: str = ""
    device: str = ""
    ib_port: int = 1
    link_type: str = ""
    resource: dict[str, Any] = {}
    registered_at: float
    seen_at: float
    revision: int
    refused_at: float = 0.0
    """Unix seconds at which somebody else was last refused the alias, who will want to clean up; 0 = nobody."""


class MemoryEntry(Message, frozen=True, kw_only=True):
    """A piece of a peer's memory."""

    length: Bytes
    epoch: Epoch = 0
    addr: Address = 0
    rkey: Key32 = 0
    lkey: Key32 = 0
    transports: list[Transport] = []


class MemoryRecord(Message, frozen=True, kw_only=True):
    """All the memory that a peer offers."""

    scope: Scope = ""
    alias: EntityId
    instance: Id | None = None
    """Whose memory it is. That of an earlier life of the peer does not count."""
    entries: dict[RegionName, MemoryEntry]
    revision: int
    at: float
    """Unix seconds at which this was last changed."""


class TopologyRecord(Message, frozen=True, kw_only=True):
    """Whom a peer is to be connected to, by its own specification."""

    scope: Scope = ""
    alias: EntityId
    target_peers: list[EntityId]
    min_bw: Bandwidth | None = None
    symmetric: bool = False
    revision: int
    at: float
    """Unix seconds at which this was last changed."""


class AliasCounter(Message, frozen=True, kw_only=True):
    """The last number that was given out in a scope."""

    last: Annotated[int, msgspec.Meta(ge=0)]
