"""``python -m computemesh_services.work_marshaller``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.base import Role
from computemesh.lifecycle import run
from computemesh_services.work_marshaller.config import MarshallerConfig
from computemesh_services.work_marshaller.service import NAME, WorkMarshaller


def main() -> None:
    def make(bus: Bus, config: MarshallerConfig, _url: Callable[[], str]) -> WorkMarshaller:
        return WorkMarshaller(bus, config, bus.where.name)

    run(NAME, "What runs where, until it is done.", Role.SERVICES, MarshallerConfig, make)


if __name__ == "__main__":
    main()
