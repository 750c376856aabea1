"""Whom processes of this node are to be connected to: asked of the control plane, and told when it is news."""

from __future__ import annotations

from computemesh import log
from computemesh.bus import BusError
from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import TopologyGet
from computemesh.peer.signals import Desired
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.node import Node

_log = log.get("desires")


class Desires:
    """Whom processes are to be connected to."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def refresh(self, name: Name) -> None:
        """Tells a process whom it is to be connected to, if that is news."""
        try:
            topology = await self._node.bus.ask(peers.TOPOLOGY_GET, TopologyGet(scope=name.scope, alias=name.alias))
        except BusError as error:
            _log.warning("cannot ask for the topology", alias=name.alias, reason=str(error))
            return
        process, line = self._node.desk.get(name), self._node.lines.get(name)
        if isinstance(topology, Refused) or process is None or line is None:
            return
        news = topology.target_peers if process.topology is None else topology != process.topology
        process.topology = topology
        if news:
            line.tell(Desired(topology=topology))

    def came(self, name: Name) -> None:
        """A peer is there: whoever is to be connected to it can be now."""
        for process in self._node.desk:
            wanted = process.topology
            if process.name.scope == name.scope and wanted is not None and name.alias in wanted.target_peers:
                self._node.lines[process.name].tell(Desired(topology=wanted))
