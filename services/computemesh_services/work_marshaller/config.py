"""What the work-marshaller can be told."""

from __future__ import annotations

from typing import Annotated

import msgspec

from computemesh.config import ServiceConfig
from computemesh.contracts.objects import OBJECT_BYTES_MAX


class MarshallerConfig(ServiceConfig, frozen=True, kw_only=True):
    work_retry_max: Annotated[int, msgspec.Meta(ge=0, le=100, extra={"env": ["WORK_RETRY_MAX"]})] = 3
    """Attempts after the first that fails, unless the item says otherwise."""
    work_retry_delay: Annotated[float, msgspec.Meta(ge=0, le=3600, extra={"env": ["WORK_RETRY_DELAY"]})] = 5.0
    """Seconds before the first retry; doubled for each further one, with jitter."""
    work_blacklist_after: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3
    """Different items that must fail in a row on a node before it gets no more of their kind for a while; 0 = never."""
    work_blacklist_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0
    """Seconds until a blacklisted node is tried again with one item; doubled each time that fails, up to an hour."""
    work_waiting_max: Annotated[int, msgspec.Meta(ge=1)] = 100_000
    """Items that may wait; more are refused."""
    payload_bytes_max: Annotated[int, msgspec.Meta(ge=1024, le=OBJECT_BYTES_MAX)] = 64 * 1024 * 1024
    """Bytes in an item that is submitted over HTTP. What is too large for a message goes to the object store."""
    work_keep_s: Annotated[int, msgspec.Meta(ge=1)] = 7 * 86_400
    """How long a finished item stays."""
