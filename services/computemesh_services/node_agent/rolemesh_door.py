"""RoleMesh's routes of a node: ``/v1/node/inventory``, ``/health`` and ``/ready``."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from computemesh.contracts.base import Refused
from computemesh.contracts.rolemesh import HEALTH, INVENTORY, READY, Health, InventoryGet, NodeInventory, Ready
from computemesh.edge import Extra, api_error, as_json, declared, problem, read_question


class RoleMeshDoor:
    """Tells what this node has, and whether it can serve.

    Args:
        inventory: what it has now.
        why_not: why it can serve no model; empty when it can.
    """

    def __init__(self, inventory: Callable[[], NodeInventory], why_not: Callable[[], str]) -> None:
        self._inventory = inventory
        self._why_not = why_not

    def routes(self) -> list[Extra]:
        return [
            declared(INVENTORY, self.on_inventory),
            declared(HEALTH, self.on_health),
            declared(READY, self.on_ready),
        ]

    async def on_inventory(self, request: Request) -> Response:
        asked = await read_question(request, InventoryGet)
        return api_error(asked) if isinstance(asked, Refused) else as_json(self._inventory())

    async def on_health(self, request: Request) -> Response:
        asked = await read_question(request, InventoryGet)
        return problem(asked) if isinstance(asked, Refused) else as_json(Health())

    async def on_ready(self, request: Request) -> Response:
        asked = await read_question(request, InventoryGet)
        if isinstance(asked, Refused):
            return problem(asked)
        reason = self._why_not()
        if reason:
            return problem(Refused(code="not_ready", reason=reason, status=503, retry="later"))
        return as_json(Ready())
