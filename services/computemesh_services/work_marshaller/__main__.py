"""``python -m computemesh_services.work_marshaller``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import WORK_MARSHALLER
from computemesh.lifecycle import run
from computemesh_services.work_marshaller.config import MarshallerConfig
from computemesh_services.work_marshaller.service import WorkMarshaller


def main() -> None:
    def make(bus: Bus, config: MarshallerConfig, _url: Callable[[], str]) -> WorkMarshaller:
        return WorkMarshaller(bus, config, bus.where.name)

    run(WORK_MARSHALLER, MarshallerConfig, make)


if __name__ == "__main__":
    main()
