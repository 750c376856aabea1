"""Which services a mesh consists of, and where they listen: the table behind ``computemesh up``.

Modules are named, not imported: the command line knows the services only as programs to run.
"""

from __future__ import annotations

from typing import Final

from computemesh.contracts.base import Role
from computemesh.supervisor import ServiceSpec

SERVICES: Final = (
    ServiceSpec(
        name="node-registry",
        module="computemesh_services.node_registry",
        role=Role.SERVICES,
        port=8115,
        url_names=("NODE_REGISTRY_URL",),
    ),
    ServiceSpec(
        name="work-marshaller",
        module="computemesh_services.work_marshaller",
        role=Role.SERVICES,
        port=8118,
        url_names=("WORK_MARSHALING_URL",),
    ),
    ServiceSpec(
        name="resource-detector",
        module="computemesh_services.resource_detector",
        role=Role.NODE,
        port=8116,
        url_names=("RESOURCE_DETECTOR_URL",),
    ),
    ServiceSpec(
        name="node-agent",
        module="computemesh_services.node_agent",
        role=Role.NODE,
        port=8091,
        url_names=("NODE_AGENT_URL",),
    ),
)
