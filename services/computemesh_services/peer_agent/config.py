"""What the peer-agent can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import ConfigError, ServiceConfig
from computemesh.ids import Id
from computemesh.peer.tcp.endpoint import check_host


class PeerAgentConfig(ServiceConfig, frozen=True, kw_only=True):
    node_id: Annotated[Id, msgspec.Meta(extra={"env": ["WORKER_ID"]})]
    """The node this machine is."""
    peer_socket: str = ""
    """Where it listens for processes of this machine; left out, `run/peer-agent.sock` in its home."""
    peer_processes_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    """Processes that are connected at once."""
    peer_transfers_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    """Transfers that were ordered over the bus and run at once."""
    peer_host: str = ""
    """Address of this machine on the network over which peers of others reach the memory of hosted processes."""

    def data_host(self) -> str:
        """That address. Raises ConfigError for one that no peer can be told."""
        try:
            check_host(self.peer_host)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return self.peer_host
