"""``python -m computemesh_services.peer_agent``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from computemesh.bus import Bus
from computemesh.config import node_of
from computemesh.contracts.services import PEER_AGENT
from computemesh.lifecycle import run
from computemesh.paths import home
from computemesh.peer.signals import SOCKET_NAME
from computemesh_services.peer_agent.config import PeerAgentConfig
from computemesh_services.peer_agent.service import PeerAgentService


def main() -> None:
    def make(bus: Bus, config: PeerAgentConfig, _url: Callable[[], str]) -> PeerAgentService:
        node_of(config.nats_url, config.node_id)
        path = Path(config.peer_socket).expanduser() if config.peer_socket else home().run / SOCKET_NAME
        return PeerAgentService(bus, config, path)

    run(PEER_AGENT, PeerAgentConfig, make)


if __name__ == "__main__":
    main()
