"""Every conversation of the mesh, listed: what documents, permissions and tests are generated from."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

from computemesh.contracts import gpus, nodes, objects, resources, work
from computemesh.contracts.base import Event, Request

CONVERSATIONS: Final[tuple[ModuleType, ...]] = (
    nodes,
    resources,
    work,
    gpus,
    objects,
)


def events() -> list[Event[Any]]:
    """Every event of every conversation, in the order of declaration."""
    return [value for module in CONVERSATIONS for value in vars(module).values() if isinstance(value, Event)]


def requests() -> list[Request[Any, Any]]:
    """Every request of every conversation, in the order of declaration."""
    return [value for module in CONVERSATIONS for value in vars(module).values() if isinstance(value, Request)]
