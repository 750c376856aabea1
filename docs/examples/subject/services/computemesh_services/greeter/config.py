"""What the greeter can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import ServiceConfig


class GreeterConfig(ServiceConfig, frozen=True, kw_only=True):
    greetings_max: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000
    """Greetings in one life; then it refuses. Read from `COMPUTEMESH_GREETINGS_MAX`."""
