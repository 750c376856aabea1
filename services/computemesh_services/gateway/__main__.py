"""``python -m computemesh_services.gateway``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import GATEWAY
from computemesh.lifecycle import run
from computemesh_services.gateway.config import GatewayConfig
from computemesh_services.gateway.service import Gateway


def main() -> None:
    def make(bus: Bus, config: GatewayConfig, _url: Callable[[], str]) -> Gateway:
        return Gateway(bus, config)

    run(GATEWAY, GatewayConfig, make)


if __name__ == "__main__":
    main()
