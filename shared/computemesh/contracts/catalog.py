"""Every conversation of the mesh, listed: what documents, permissions and tests are generated from."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

from computemesh.contracts import (
    engines,
    gpus,
    infer,
    keys,
    nanoctrl,
    nodes,
    objects,
    openai,
    peers,
    resources,
    rolemesh,
    tasks,
    work,
)
from computemesh.contracts.base import Event, Request, Route, ServiceCard

CONVERSATIONS: Final[tuple[ModuleType, ...]] = (
    nodes,
    resources,
    work,
    gpus,
    objects,
    infer,
    keys,
    engines,
    peers,
)


def events() -> list[Event[Any]]:
    """Every event of every conversation, in the order of declaration."""
    return [value for module in CONVERSATIONS for value in vars(module).values() if isinstance(value, Event)]


def requests() -> list[Request[Any, Any]]:
    """Every request of every conversation, in the order of declaration."""
    return [value for module in CONVERSATIONS for value in vars(module).values() if isinstance(value, Request)]


def routes(service: ServiceCard) -> list[Route]:
    """Every route of a service that is on HTTP alone, in the order of declaration."""
    declared = [value for module in (tasks, rolemesh, nanoctrl) for value in vars(module).values()]
    own = [value for value in declared if isinstance(value, Route) and value.service is service]
    return [*own, *openai.routes_of(service)]


def targeted() -> dict[str, str]:
    """The subjects that are incomplete without an id behind them, each with the name of that id."""
    found: list[Event[Any] | Request[Any, Any]] = [*events(), *requests()]
    whole = {contract.subject for contract in found if not contract.target}
    return {
        contract.subject: contract.target for contract in found if contract.target and contract.subject not in whole
    }


def on_the_bus() -> frozenset[str]:
    """Names of the services that answer requests there; others only ask."""
    return frozenset(request.service.name for request in requests())
