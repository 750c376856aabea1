"""``/workers`` and ``/admin/cleanup``: the nodes, as MLOC tells of workers."""

from __future__ import annotations

import time

from computemesh.bus import Bus
from computemesh.contracts import nodes, tasks
from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import NodeGet, NodesCleanup, NodesQuery
from computemesh.contracts.tasks import CleanedUp, Cleanup, Worker, WorkerGet, WorkersGet
from computemesh.edge import Extra
from computemesh_services.gateway import views
from computemesh_services.gateway.asking import ask, route


class WorkersDoor:
    """Asks the node-registry.

    Args:
        ttl_s: silence after which a worker is stale.
    """

    def __init__(self, bus: Bus, *, ttl_s: float) -> None:
        self._bus = bus
        self._ttl_s = ttl_s

    def routes(self) -> list[Extra]:
        return [
            route(tasks.WORKERS, WorkersGet, self.on_list),
            route(tasks.WORKER, WorkerGet, self.on_get),
            route(tasks.CLEANUP, Cleanup, self.on_cleanup),
        ]

    async def on_list(self, _: WorkersGet) -> list[Worker] | Refused:
        found: list[Worker] = []
        query = NodesQuery()
        while True:
            page = await ask(self._bus, nodes.QUERY, query)
            if isinstance(page, Refused):
                return page
            now = time.time()
            found += [views.worker(node, now, self._ttl_s) for node in page.nodes]
            if not page.next:
                return found
            query = NodesQuery(after=page.next)

    async def on_get(self, asked: WorkerGet) -> Worker | Refused:
        node = await ask(self._bus, nodes.GET, NodeGet(node_id=asked.worker_id))
        if not isinstance(node, Refused):
            return views.worker(node, time.time(), self._ttl_s)
        if node.code != "not_found":
            return node
        return Refused(code="not_found", field="worker_id", reason="worker not found", status=404)

    async def on_cleanup(self, _: Cleanup) -> CleanedUp | Refused:
        gone = await ask(self._bus, nodes.CLEANUP, NodesCleanup(silent_s=self._ttl_s))
        if isinstance(gone, Refused):
            return gone
        return CleanedUp(ok=True, removed=len(gone.node_ids), worker_ids=list(gone.node_ids))
