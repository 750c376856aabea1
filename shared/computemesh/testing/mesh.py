"""A mesh for one test: a real NATS server, services as processes, and hands to break them with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from computemesh.bus import Bucket, Bus, Where
from computemesh.cli.services import SERVICES
from computemesh.contracts import storage, work
from computemesh.contracts.base import Role
from computemesh.contracts.work import FINAL, WorkGet, WorkItem, WorkRecord, WorkState
from computemesh.nats_server import Credentials, NatsServer, add_node, admit_node
from computemesh.paths import Home
from computemesh.supervisor import ServiceSpec, Supervised, Supervisor
from computemesh.testing.cluster import NatsCluster

WAIT_S: Final = 30.0
"""How long :func:`until` waits for a condition: far longer than it takes, so that only failures wait."""

NODE_ID: Final = "n1"
"""The node that the node agent of a test's mesh is."""

CONTROL_PLANE: Final = ("node-registry", "work-marshaller")

STRICT: Final = {"COMPUTEMESH_STRICT": "true"}
"""Services under test refuse fields that no contract declares; set it to nothing for what production does."""

QUICK: Final = {
    "COMPUTEMESH_HEARTBEAT_INTERVAL_S": "0.3",
    "COMPUTEMESH_SUSPECT_AFTER_S": "2",
    "COMPUTEMESH_LOST_AFTER_S": "4",
    "WORK_RETRY_DELAY": "0.1",
    "COMPUTEMESH_ENGINE_THREADS": "1",
}
"""Settings that make what takes seconds in a real mesh take less."""


async def until(condition: Callable[[], Any], *, what: str, within_s: float = WAIT_S) -> None:
    """Waits for a condition, looking often.

    Raises:
        AssertionError: it did not come true in time; *what* says what was awaited.
    """
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.01)


class RunningMesh:
    """What a test sees of its mesh."""

    def __init__(
        self,
        supervisor: Supervisor,
        home: Home,
        credentials: Credentials,
        lines: list[str],
        cluster: NatsCluster | None = None,
    ) -> None:
        self.supervisor = supervisor
        self.home = home
        self.credentials = credentials
        self.cluster = cluster
        """The NATS servers, when there are several; else the supervisor has the only one."""
        self.lines = lines
        """Every log line of every service, with the service's name in front."""
        self._buses: dict[tuple[Role, str], Bus] = {}
        self._connecting = asyncio.Lock()

    def url(self, role: Role) -> str:
        """The bus as *role* reaches it; for the role of nodes, as the node ``n1`` does."""
        return self.supervisor.url(role)

    async def invite(self, node_id: str) -> str:
        """The bus as another node reaches it, with a user of its own."""
        if self.cluster is not None:
            await self.cluster.admit(node_id)
            return self.cluster.url(Role.NODE, node_id)
        await admit_node(self.home.nats, self.home.credentials, node_id)
        assert self.supervisor.server is not None
        return self.supervisor.server.url(Role.NODE, node_id)

    def http(self, name: str) -> str:
        """The address of a service's HTTP edge."""
        return self.service(name).status.http

    def service(self, name: str) -> Supervised:
        return next(service for service in self.supervisor.services if service.name == name)

    def environment(self, role: Role = Role.CLIENT) -> dict[str, str]:
        """What ``computemesh env --role`` would export, added to this process's environment."""
        return {**os.environ, "NATS_URL": self.url(role), "COMPUTEMESH_HOME": str(self.home.root)}

    async def bus(self, role: Role = Role.CLIENT, node_id: str = "") -> Bus:
        """The connection of the test in a role, or as one node, which is then invited; it ends with the mesh."""
        async with self._connecting:
            if (role, node_id) not in self._buses:
                url = await self.invite(node_id) if node_id else self.url(role)
                bus = Bus(Where(url=url, role=role, name=f"test-{node_id or role}"))
                await bus.connect(timeout_s=5.0)
                self._buses[role, node_id] = bus
        return self._buses[role, node_id]

    def pid(self, name: str) -> int:
        """The process of a service, or of ``nats-server`` (``nats-1`` … in a cluster); 0 while it has none."""
        if name in self._servers:
            server = self._servers[name]
            return server.pid if server is not None and server.running else 0
        return self.service(name).status.pid

    @property
    def _servers(self) -> Mapping[str, NatsServer | None]:
        return self.cluster.servers if self.cluster is not None else {"nats-server": self.supervisor.server}

    async def submit(self, item: WorkItem) -> WorkRecord:
        """Submits an item as a client, once the mesh knows its work type: a node may still be announcing it.

        Raises:
            AssertionError: it is refused for any other reason, or the type stays unknown.
        """
        bus = await self.bus()
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while True:
            answer = await bus.ask(work.REQUEST, item)
            if isinstance(answer, WorkRecord):
                return answer
            assert answer.code == "unknown_work_type", f"{answer.code}: {answer.reason}"
            assert asyncio.get_running_loop().time() < deadline_s, answer.reason
            await asyncio.sleep(0.05)

    async def record(self, work_id: str, states: Collection[WorkState] = FINAL) -> WorkRecord:
        """What is recorded of an item, once it is in one of *states*; left out, once it has ended.

        Raises:
            AssertionError: it does not get there.
        """
        bus = await self.bus()
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while True:
            found = await bus.ask(work.GET, WorkGet(work_id=work_id))
            if isinstance(found, WorkRecord) and found.state in states:
                return found
            assert asyncio.get_running_loop().time() < deadline_s, f"{work_id} is not {', '.join(states)}: {found}"
            await asyncio.sleep(0.02)

    def kill(self, name: str, sig: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a service, or to ``nats-server``, if it lives."""
        if pid := self.pid(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    async def holder(self, service: str) -> str:
        """The replica that holds the lease of *service*, such as ``work-marshaller-2``; empty when none does."""
        bus = await self.bus(Role.SERVICES)
        entry = await Bucket(bus, storage.LEASES).get(service)
        return entry.value.holder.removesuffix(f"-{NODE_ID}") if entry else ""

    async def close(self) -> None:
        """Ends everything, also what a failed test left stopped."""
        for status in self.supervisor.status().services:
            self.kill(status.name, signal.SIGCONT)
        for bus in self._buses.values():
            await bus.close()
        await self.supervisor.stop()


@asynccontextmanager
async def running_mesh(
    folder: Path,
    services: Sequence[str] = CONTROL_PLANE,
    *,
    copies: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    clustered: bool = False,
    agents: Sequence[str] = (),
    nats_host: str = "127.0.0.1",
) -> AsyncGenerator[RunningMesh]:
    """The named services on a server of their own, ready, with all files under *folder*.

    Args:
        clustered: there are three servers, which keep everything three times.
        agents: further nodes that are node agents, in a cluster, by node id; their services are called
            ``node-agent-<node id>``.
        nats_host: the address at which the server listens, if there is only one.
    """
    assert clustered or not agents, "the address of a server of the mesh's own is known too late for them"
    home = Home(folder / "mesh")
    home.root.mkdir(parents=True, exist_ok=True)
    credentials = add_node(home.credentials, NODE_ID)
    for node_id in agents:
        add_node(home.credentials, node_id)
    lines: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(_running_cluster(folder, home)) if clustered else None
        settings = {**STRICT, **QUICK, **({"COMPUTEMESH_REPLICAS": "3"} if clustered else {}), **(environment or {})}
        specs = [
            replace(spec, port=0, environment=settings, copies=(copies or {}).get(spec.name, 1))
            for spec in SERVICES
            if spec.name in services
        ]
        if cluster is not None:
            specs += [_agent(node_id, cluster, settings, folder) for node_id in agents]
        supervisor = Supervisor(
            home,
            specs,
            token=credentials.token,
            node_id=NODE_ID,
            nats_host=nats_host,
            nats_urls=_urls(cluster) if cluster is not None else None,
            on_line=lambda name, line: lines.append(f"{name} {line.decode('utf-8', 'replace').rstrip()}"),
        )
        mesh = RunningMesh(supervisor, home, credentials, lines, cluster)
        stack.push_async_callback(mesh.close)
        async with asyncio.timeout(WAIT_S):
            await supervisor.start()
        failed = [service.name for service in supervisor.services if service.status.state != "ready"]
        assert not failed, f"{failed} did not start:\n" + "\n".join(lines[-20:])
        yield mesh


@asynccontextmanager
async def _running_cluster(folder: Path, home: Home) -> AsyncGenerator[NatsCluster]:
    cluster = NatsCluster(folder, home.credentials)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


def _urls(cluster: NatsCluster) -> dict[Role, str]:
    return {role: cluster.url(role, NODE_ID if role is Role.NODE else "") for role in Role}


def _agent(node_id: str, cluster: NatsCluster, settings: Mapping[str, str], folder: Path) -> ServiceSpec:
    """A node agent on what looks like a machine of its own."""
    own = {
        "NATS_URL": cluster.url(Role.NODE, node_id),
        "COMPUTEMESH_NODE_ID": node_id,
        "COMPUTEMESH_HOME": str(folder / node_id),
        "COMPUTEMESH_INSTANCE": f"node-agent-{node_id}",
    }
    spec = next(spec for spec in SERVICES if spec.name == "node-agent")
    return replace(spec, name=f"node-agent-{node_id}", port=0, environment={**settings, **own})
