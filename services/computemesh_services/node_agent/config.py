"""What the node-agent can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import ConfigError, Seconds, ServiceConfig
from computemesh.ids import Id


class AgentConfig(ServiceConfig, frozen=True, kw_only=True):
    node_id: Id
    """The node this machine is."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Tells this machine from others; left out, it follows from the number that the system has for it."""
    models: str = ""
    """GGUF files and folders to serve, separated by commas; left out, the embedded model."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    """Work items that run at the same time; the engines serve as many requests."""
    work_cpus: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    """Logical CPUs that work items may ask for, all together; left out, all of the machine."""
    work_ram_mb: Annotated[int, msgspec.Meta(ge=0, le=2**40)] | None = None
    """MiB of RAM that work items may ask for, all together; left out, all of the machine."""
    engines_max: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Models in memory at the same time."""
    engine_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """CPU threads of an engine; 0 = chosen from the machine."""
    context_tokens: Annotated[int, msgspec.Meta(ge=256, le=1_048_576)] = 4096
    """Longest prompt and answer together, per request."""
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0
    labels: str = ""
    """Labels of this node, such as `zone=a,disk=nvme`."""
    finish_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 10.0
    """How long running work may go on when the agent is told to end, before it is handed back."""
    work_keep_s: Seconds = 7 * 86_400.0
    """How long the files of an item stay on this machine."""

    def label_map(self) -> dict[str, str]:
        pairs = [part.partition("=") for part in self.labels.split(",") if part.strip()]
        if any(not name.strip() or not equals for name, equals, _ in pairs):
            raise ConfigError(f"COMPUTEMESH_LABELS={self.labels!r}: write name=value, separated by commas")
        return {name.strip(): value.strip() for name, _, value in pairs}
