"""Every service of the mesh: what it is called, as whom it speaks, where it listens."""

from __future__ import annotations

from typing import Final

from computemesh.contracts.base import Role, ServiceCard

NODE_REGISTRY: Final = ServiceCard(
    name="node-registry", about="Who is here, what they can do, who is alive.", role=Role.SERVICES, port=8115
)
WORK_MARSHALLER: Final = ServiceCard(
    name="work-marshaller", about="What runs where, until it is done.", role=Role.SERVICES, port=8118
)
GPU_ORCHESTRATOR: Final = ServiceCard(
    name="gpu-orchestrator", about="Who may use how much memory of which GPU.", role=Role.SERVICES, port=8098
)
GATEWAY: Final = ServiceCard(
    name="gateway", about="The front door: tasks as YAML, and the OpenAI interface.", role=Role.CLIENT, port=8000
)
CONTROL_PLANE: Final = ServiceCard(
    name="control-plane",
    about="Which engines and peer agents there are, what memory they offer, who connects to whom.",
    role=Role.SERVICES,
    port=3000,
)
RESOURCE_DETECTOR: Final = ServiceCard(
    name="resource-detector", about="What this machine is made of.", role=Role.NODE, port=8116
)
NODE_AGENT: Final = ServiceCard(
    name="node-agent", about="Runs engines and work on this machine.", role=Role.NODE, port=8091
)
PEER_AGENT: Final = ServiceCard(
    name="peer-agent", about="Moves memory between processes of this and other machines.", role=Role.NODE, port=8092
)

SERVICES: Final = (
    NODE_REGISTRY,
    WORK_MARSHALLER,
    GPU_ORCHESTRATOR,
    GATEWAY,
    CONTROL_PLANE,
    RESOURCE_DETECTOR,
    NODE_AGENT,
    PEER_AGENT,
)
