"""What the parts of the peer-agent have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from computemesh.bus import Bus
from computemesh_services.peer_agent.desk import Desk, Name
from computemesh_services.peer_agent.line import Line


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """This node, as far as its processes are peers."""

    id: str
    bus: Bus
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    """Runs something beside. What it raises is a defect."""
    desk: Desk = field(default_factory=Desk)
    lines: dict[Name, Line] = field(default_factory=dict[Name, Line])
    """Of the processes that are here."""
