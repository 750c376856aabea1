"""What the resource-detector can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import Seconds, ServiceConfig
from computemesh.hardware import Tier
from computemesh.ids import Id
from computemesh_services.resource_detector.probes.choice import Name


class GpuConfig(ServiceConfig, frozen=True, kw_only=True):
    """Where the GPU facts come from."""

    gpu_provider: Name = "auto"
    """`auto` takes the first of `nvml`, `rocm` and `metal` that finds a GPU."""
    scripted_hardware: str = ""
    """File with the hardware that the provider `scripted` plays."""


class DetectorConfig(GpuConfig, frozen=True, kw_only=True):
    node_id: Annotated[Id, msgspec.Meta(extra={"env": ["WORKER_ID"]})]
    """The node this machine is."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """As the node-agent's, which heeds no other machine's detector."""
    tier: Tier | None = None
    """The tier to report instead of the one that follows from the GPUs."""
    models: str = ""
    """GGUF files and folders, separated by commas; left out, the embedded model."""
    load_interval_s: Annotated[float, msgspec.Meta(gt=0, le=30)] = 5.0
    """How often the load is read and published; heartbeats leave out what is older than a minute."""
    inventory_interval_s: Seconds = 30.0
    """How often the hardware is looked at for changes."""
    gpu_patience_s: Seconds = 10.0
    """How long a driver may take before the facts that were read last are told instead."""
