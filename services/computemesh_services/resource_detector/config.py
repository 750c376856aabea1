"""What the resource-detector can be told."""

from __future__ import annotations

from computemesh.config import Seconds, ServiceConfig
from computemesh.hardware import Tier
from computemesh.ids import Id


class DetectorConfig(ServiceConfig, frozen=True, kw_only=True):
    node_id: Id
    """The node this machine is."""
    tier: Tier | None = None
    """The tier to report instead of the one that follows from the GPUs."""
    load_interval_s: Seconds = 5.0
    """How often the load is read and published."""
    inventory_interval_s: Seconds = 30.0
    """How often the hardware is looked at for changes."""
