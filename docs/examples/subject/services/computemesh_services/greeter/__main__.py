"""``python -m computemesh_services.greeter``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import GREETER
from computemesh.lifecycle import run
from computemesh_services.greeter.config import GreeterConfig
from computemesh_services.greeter.service import Greeter


def main() -> None:
    def make(bus: Bus, config: GreeterConfig, _url: Callable[[], str]) -> Greeter:
        return Greeter(bus, config)

    run(GREETER, GreeterConfig, make)


if __name__ == "__main__":
    main()
