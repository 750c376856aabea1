"""Memory of other processes, on this machine and others: find it by name, read it, write it.

    from computemesh.peer import start_peer_agent

What programs use is named here; the rest is what it is made of.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from computemesh.peer.agent import PeerAgent, PeerMemoryRegion, start_peer_agent
    from computemesh.peer.aio import AsyncPeerAgent, start_async_peer_agent
    from computemesh.peer.connection import PeerConnection
    from computemesh.peer.errors import PeerError
    from computemesh.peer.futures import ImmFuture, MessageFuture, PeerFuture, TransferFuture
    from computemesh.peer.memory import SharedMemory

__all__ = [
    "AsyncPeerAgent",
    "ImmFuture",
    "MessageFuture",
    "PeerAgent",
    "PeerConnection",
    "PeerError",
    "PeerFuture",
    "PeerMemoryRegion",
    "SharedMemory",
    "TransferFuture",
    "start_async_peer_agent",
    "start_peer_agent",
]

# Looked up when they are first used, so that what needs one module does not load them all.
_HOME = {
    "AsyncPeerAgent": "aio",
    "ImmFuture": "futures",
    "MessageFuture": "futures",
    "PeerAgent": "agent",
    "PeerConnection": "connection",
    "PeerError": "errors",
    "PeerFuture": "futures",
    "PeerMemoryRegion": "agent",
    "SharedMemory": "memory",
    "TransferFuture": "futures",
    "start_async_peer_agent": "aio",
    "start_peer_agent": "agent",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
