"""``python -m computemesh_services.gpu_orchestrator``"""

from __future__ import annotations

from collections.abc import Callable

from computemesh.bus import Bus
from computemesh.contracts.services import GPU_ORCHESTRATOR
from computemesh.lifecycle import run
from computemesh_services.gpu_orchestrator.config import OrchestratorConfig
from computemesh_services.gpu_orchestrator.service import GpuOrchestrator


def main() -> None:
    def make(bus: Bus, config: OrchestratorConfig, _url: Callable[[], str]) -> GpuOrchestrator:
        return GpuOrchestrator(bus, config, bus.where.name)

    run(GPU_ORCHESTRATOR, OrchestratorConfig, make)


if __name__ == "__main__":
    main()
