"""``python -m computemesh_services.greeter``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.base import Role
from computemesh.lifecycle import run
from computemesh_services.greeter.config import GreeterConfig
from computemesh_services.greeter.service import NAME, Greeter


def main() -> None:
    def make(bus: Bus, config: GreeterConfig, _url: Callable[[], str]) -> Greeter:
        return Greeter(bus, config)

    run(NAME, "Greets people.", Role.SERVICES, GreeterConfig, make)


if __name__ == "__main__":
    main()
