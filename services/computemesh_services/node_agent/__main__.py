"""``python -m computemesh_services.node_agent``"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from computemesh.bus import Bus
from computemesh.config import node_of
from computemesh.contracts.services import NODE_AGENT
from computemesh.lifecycle import run
from computemesh.paths import home
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_agent.service import NodeAgent

SECRETS: Final = ("NATS_URL", "COMPUTEMESH_TOKEN", "ORCHESTRATOR_TOKEN")
"""Parts of the names of what is read once, then taken out of the environment: executors and engines inherit it
and have no use for it."""


def main() -> None:
    def make(bus: Bus, config: AgentConfig, _url: Callable[[], str]) -> NodeAgent:
        node_of(config.nats_url, config.node_id)
        for name in [name for name in os.environ if any(part in name for part in SECRETS)]:
            del os.environ[name]
        return NodeAgent(bus, config, home())

    run(NODE_AGENT, AgentConfig, make)


if __name__ == "__main__":
    main()
