"""``python -m computemesh_services.control_plane``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import CONTROL_PLANE
from computemesh.lifecycle import run
from computemesh_services.control_plane.config import ControlPlaneConfig
from computemesh_services.control_plane.service import ControlPlane


def main() -> None:
    def make(bus: Bus, config: ControlPlaneConfig, _url: Callable[[], str]) -> ControlPlane:
        return ControlPlane(bus, config, bus.where.name)

    run(CONTROL_PLANE, ControlPlaneConfig, make)


if __name__ == "__main__":
    main()
