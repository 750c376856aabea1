"""What the node-registry can be told."""

from __future__ import annotations

from computemesh.config import ConfigError, Seconds, ServiceConfig
from computemesh_services.node_registry.roster import Patience


class RegistryConfig(ServiceConfig, frozen=True, kw_only=True):
    suspect_after_s: Seconds = 25.0
    """A node silent for this long gets no new work."""
    lost_after_s: Seconds = 45.0
    """A node silent for this long is lost: its work is given to others."""
    unmonitored_ttl_s: Seconds = 86_400.0
    """A node that never sent a heartbeat is lost this long after it registered."""
    forget_after_s: Seconds = 604_800.0
    """A lost node is forgotten after this long."""

    def patience(self) -> Patience:
        if self.suspect_after_s >= self.lost_after_s:
            raise ConfigError(
                f"COMPUTEMESH_SUSPECT_AFTER_S={self.suspect_after_s:g} must be below "
                f"COMPUTEMESH_LOST_AFTER_S={self.lost_after_s:g}"
            )
        return Patience(
            suspect_after_s=self.suspect_after_s,
            lost_after_s=self.lost_after_s,
            unmonitored_ttl_s=self.unmonitored_ttl_s,
        )
