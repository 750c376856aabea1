"""``python -m computemesh_services.node_registry``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import NODE_REGISTRY
from computemesh.lifecycle import run
from computemesh_services.node_registry.config import RegistryConfig
from computemesh_services.node_registry.service import NodeRegistry


def main() -> None:
    def make(bus: Bus, config: RegistryConfig, _url: Callable[[], str]) -> NodeRegistry:
        return NodeRegistry(bus, config, bus.where.name)

    run(NODE_REGISTRY, RegistryConfig, make)


if __name__ == "__main__":
    main()
