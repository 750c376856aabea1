"""What the gateway can be told, under the names of MLOC's orchestrator too."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh import openai
from computemesh.config import Entrance, Seconds, ServiceConfig


class GatewayConfig(ServiceConfig, frozen=True, kw_only=True):
    http_port: Annotated[int, msgspec.Meta(ge=0, le=65_535, extra={"env": ["PORT"]})] = 8000
    """Port of the HTTP edge; 0 = any free one."""
    orchestrator_token: Annotated[str, msgspec.Meta(extra={"env": ["ORCHESTRATOR_TOKEN"]})] = ""
    """Bearer token that callers must show, on loopback too."""
    heartbeat_ttl_sec: Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400, extra={"env": ["HEARTBEAT_TTL_SEC"]})] = (
        120.0
    )
    """Silence after which a worker is called stale."""

    queue_timeout_s: Seconds = 30.0
    """How long a request for inference waits for an engine when all are busy."""
    queue_max: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1000
    """Requests that may wait for one model."""
    suspect_after_s: Seconds = 25.0
    """Silence after which a node's engines get no new requests."""

    def entrance(self) -> Entrance:
        """The mesh's token will do wherever one is needed."""
        return Entrance(
            tokens=tuple(token for token in (self.orchestrator_token, self.token) if token),
            loopback_is_open=not self.orchestrator_token,
            apart=(openai.ROOT,),
            missing="Missing bearer token",
            wrong="Invalid token",
        )
