"""What the control plane can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import ServiceConfig
from computemesh.contracts.engines import TTL_S


class ControlPlaneConfig(ServiceConfig, frozen=True, kw_only=True):
    entity_ttl_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = TTL_S
    """An engine or peer of which nothing is heard for this long is gone. Whole seconds, as the server counts."""
    public_nats_address: Annotated[str, msgspec.Meta(max_length=300, extra={"env": ["REDIS_PUBLIC_ADDRESS"]})] = ""
    """`host:port` at which other machines reach the bus, told to those that ask for it."""
