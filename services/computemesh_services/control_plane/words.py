"""Engines, other entities and peers as NanoCtrl's clients know them. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from computemesh.contracts.engines import ENGINE, Engine
from computemesh.contracts.nanoctrl import AGENT, EngineInfo, EntityInfo, PeerAgent
from computemesh.contracts.peers import Peer

AGENT_KIND: Final = "peer_agent"
"""What sort of entity a peer agent is."""


def info(record: Engine) -> EngineInfo:
    """An engine."""
    assert record.role is not None
    return EngineInfo(
        id=record.engine_id,
        role=record.role,
        world_size=record.world_size,
        num_blocks=record.num_blocks,
        host=record.host,
        port=record.port,
        peer_addrs=record.peer_addrs,
        p2p_host=record.p2p_host,
        p2p_port=record.p2p_port,
        max_num_seqs=record.max_num_seqs,
        model_path=record.model_path,
        zmq_address=record.zmq_address,
    )


def entity(record: Engine) -> EntityInfo:
    """An engine or another entity, as an entity."""
    if record.entity_type == ENGINE:
        endpoint: Any = {"host": record.host, "port": record.port}
        metadata: Any = msgspec.to_builtins(info(record))
    else:
        endpoint, metadata = record.endpoint, record.metadata
    return EntityInfo(
        id=record.engine_id,
        entity_id=record.engine_id,
        entity_type=record.entity_type,
        kind=record.kind,
        endpoint=endpoint,
        metadata=metadata,
        resource=record.resource,
    )


def agent(peer: Peer) -> PeerAgent:
    """A peer."""
    return PeerAgent(
        name=peer.alias,
        device=peer.device,
        ib_port=peer.ib_port,
        link_type=peer.link_type,
        address=peer.address,
        resource=peer.resource or None,
        memory_keys=peer.memory_keys,
    )


def agent_entity(peer: Peer) -> EntityInfo:
    """A peer, as an entity."""
    said = agent(peer)
    return EntityInfo(
        id=peer.alias,
        entity_id=peer.alias,
        entity_type=AGENT,
        kind=AGENT_KIND,
        endpoint={
            "address": said.address,
            "device": said.device,
            "ib_port": said.ib_port,
            "link_type": said.link_type,
        },
        metadata={"memory_keys": said.memory_keys},
        resource=said.resource,
    )
