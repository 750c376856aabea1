"""``python -m computemesh_services.resource_detector``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.config import node_of
from computemesh.contracts.services import RESOURCE_DETECTOR
from computemesh.lifecycle import run
from computemesh.machine import machine_id
from computemesh.paths import home
from computemesh_services.resource_detector.config import DetectorConfig
from computemesh_services.resource_detector.probes.choice import choose
from computemesh_services.resource_detector.service import ResourceDetector


def main() -> None:
    def make(bus: Bus, config: DetectorConfig, _url: Callable[[], str]) -> ResourceDetector:
        node_of(config.nats_url, config.node_id)
        provider = choose(config.gpu_provider, hardware=config.scripted_hardware, seed=config.node_id)
        return ResourceDetector(bus, config, provider, config.machine_id or machine_id(home().root))

    run(RESOURCE_DETECTOR, DetectorConfig, make)


if __name__ == "__main__":
    main()
