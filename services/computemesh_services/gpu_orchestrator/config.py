"""What the gpu-orchestrator can be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from computemesh.config import ConfigError, ServiceConfig
from computemesh.contracts.gpus import TIMEOUT_S_MAX

ANYONE: Final = "*"


class OrchestratorConfig(ServiceConfig, frozen=True, kw_only=True):
    gpu_reservation_timeout: Annotated[
        float, msgspec.Meta(gt=0, le=TIMEOUT_S_MAX, extra={"env": ["GPU_RESERVATION_TIMEOUT"]})
    ] = 300.0
    """Seconds until a reservation ends that is not renewed, unless the request says otherwise."""
    reservation_max_s: Annotated[float, msgspec.Meta(gt=0, le=TIMEOUT_S_MAX)] = TIMEOUT_S_MAX
    """The longest time that may be asked for."""
    gpu_headroom_mb: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 0
    """MiB of each GPU that are never granted."""
    gpu_quotas: str = ""
    """What owners may have on all nodes together, in MiB: `alice=49152,bob=8192,*=98304`. `*` is every owner that
    is not named, each by itself."""

    def quotas(self) -> Quotas:
        """Raises ConfigError when they cannot be read, or a default is longer than what may be asked for."""
        if self.gpu_reservation_timeout > self.reservation_max_s:
            raise ConfigError(
                f"GPU_RESERVATION_TIMEOUT={self.gpu_reservation_timeout:g} must not be above "
                f"COMPUTEMESH_RESERVATION_MAX_S={self.reservation_max_s:g}"
            )
        found: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in self.gpu_quotas.split(","))):
            owner, equals, limit = part.rpartition("=")
            if not equals or not owner.strip() or not limit.strip().isdecimal():
                raise ConfigError(f"COMPUTEMESH_GPU_QUOTAS={self.gpu_quotas!r}: {part!r} is not OWNER=MIB")
            if owner.strip() in found:
                raise ConfigError(f"COMPUTEMESH_GPU_QUOTAS={self.gpu_quotas!r}: {owner.strip()!r} stands twice")
            found[owner.strip()] = int(limit)
        return Quotas(found)


class Quotas:
    """What owners may have."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = limits

    def limit_mb(self, owner: str) -> int | None:
        """MiB on all nodes together; None = as much as there is."""
        return self._limits.get(owner, self._limits.get(ANYONE))
