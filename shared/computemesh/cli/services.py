"""How the services of a mesh are run: the table behind ``computemesh up``.

Modules are named, not imported: the command line knows the services only as programs to run.
"""

from __future__ import annotations

from typing import Final

from computemesh.contracts.base import ServiceCard
from computemesh.contracts.services import (
    CONTROL_PLANE,
    GATEWAY,
    GPU_ORCHESTRATOR,
    NODE_AGENT,
    NODE_REGISTRY,
    PEER_AGENT,
    RESOURCE_DETECTOR,
    WORK_MARSHALLER,
)
from computemesh.supervisor import ServiceSpec


def _spec(card: ServiceCard, module: str, url_name: str) -> ServiceSpec:
    return ServiceSpec(name=card.name, role=card.role, port=card.port, module=module, url_names=(url_name,))


SERVICES: Final = (
    _spec(NODE_REGISTRY, "computemesh_services.node_registry", "NODE_REGISTRY_URL"),
    _spec(WORK_MARSHALLER, "computemesh_services.work_marshaller", "WORK_MARSHALING_URL"),
    _spec(GPU_ORCHESTRATOR, "computemesh_services.gpu_orchestrator", "GPU_ORCHESTRATOR_URL"),
    _spec(GATEWAY, "computemesh_services.gateway", "GATEWAY_URL"),
    _spec(CONTROL_PLANE, "computemesh_services.control_plane", "CONTROL_PLANE_URL"),
    _spec(RESOURCE_DETECTOR, "computemesh_services.resource_detector", "RESOURCE_DETECTOR_URL"),
    _spec(NODE_AGENT, "computemesh_services.node_agent", "NODE_AGENT_URL"),
    _spec(PEER_AGENT, "computemesh_services.peer_agent", "PEER_AGENT_URL"),
)

CHECKS: Final = ("computemesh_services.node_agent.check", "computemesh_services.resource_detector.check")
"""Programs that print what a service needs of this machine and finds there, for ``computemesh doctor``."""
