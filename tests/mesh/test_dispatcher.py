"""A node agent that reports to a dispatcher: it is known there, and whatever the dispatcher does harms nothing.

Method: a real agent and the registry of another mesh, and a dispatcher in the hands of the test, on a real socket, that
forgets, refuses, is slow, breaks or is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from aiohttp import web

from computemesh.contracts import nodes
from computemesh.contracts.nodes import NodeGet, NodeState, NodeView
from computemesh.testing import RunningMesh, running_mesh, until

KEY: Final = "a-key-of-nodes"
QUICK: Final = {"COMPUTEMESH_DISPATCHER_INTERVAL_S": "0.1", "COMPUTEMESH_MODELS": "/nowhere"}


class FakeDispatcher:
    """Plays a dispatcher, on a port of its own that it keeps while it is away."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        """What was posted: the last part of the path, and the body."""
        self.keys: set[tuple[str, str]] = set()
        self.answers: list[int] = []
        """Statuses of the next answers."""
        self.forgetful = False
        """It forgets each node at once."""
        self.pause_s = 0.0
        self._runner: web.AppRunner | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def count(self, what: str) -> int:
        return sum(path == what for path, _ in self.heard)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/nodes/{what}", self._on_post)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _on_post(self, request: web.Request) -> web.Response:
        said = await request.json()
        what = request.match_info["what"]
        self.heard.append((what, said))
        self.keys.add((request.headers.get("Authorization", ""), request.headers.get("X-RoleMesh-Node-Key", "")))
        await asyncio.sleep(self.pause_s)
        if self.answers:
            return web.json_response({"detail": "as the test says"}, status=self.answers.pop(0))
        if what == "register":
            self.known.add(said["node_id"])
        elif said["node_id"] not in self.known:
            return web.json_response({"detail": "unknown node"}, status=404)
        if self.forgetful:
            self.known.clear()
        return web.json_response({"status": "ok"})


@pytest.fixture
async def dispatcher() -> AsyncGenerator[FakeDispatcher]:
    playing = FakeDispatcher()
    await playing.start()
    yield playing
    await playing.stop()


@contextlib.asynccontextmanager
async def node(folder: Path, url: str, **settings: str) -> AsyncGenerator[RunningMesh]:
    """A mesh whose node agent reports to *url*."""
    environment = {**QUICK, "COMPUTEMESH_DISPATCHER_BASE_URL": url, **settings}
    async with running_mesh(folder, ("node-registry", "node-agent"), environment=environment) as mesh:
        yield mesh


async def health(mesh: RunningMesh) -> dict[str, Any]:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{mesh.http('node-agent')}/healthz")
    assert answer.status_code == 200, answer.text  # Whatever the dispatcher does is no problem of the node's.
    return dict(answer.json())


async def says(mesh: RunningMesh, text: str) -> None:
    """Waits until the agent's health says something of the dispatcher."""
    async with asyncio.timeout(30):
        while text not in (await health(mesh))["dispatcher"]:
            await asyncio.sleep(0.05)


async def view(mesh: RunningMesh, node_id: str) -> NodeView | None:
    found = await (await mesh.bus()).ask(nodes.GET, NodeGet(node_id=node_id))
    return found if isinstance(found, NodeView) else None


async def test_it_registers_at_the_start_and_tells_how_it_is_from_then_on(
    tmp_path: Path, dispatcher: FakeDispatcher
) -> None:
    """With its key in either header, and the address it was told to advertise."""
    more = {"COMPUTEMESH_DISPATCHER_KEY": KEY, "COMPUTEMESH_ADVERTISE_URL": "https://n1.example/"}
    async with node(tmp_path, f"{dispatcher.url}/", **more) as mesh:
        await until(lambda: dispatcher.count("heartbeat") >= 3, what="three heartbeats")
        await says(mesh, "takes this node")
    (first, registered), (second, beat) = dispatcher.heard[:2]
    assert (first, second, dispatcher.count("register")) == ("register", "heartbeat", 1)
    assert (registered["node_id"], registered["base_url"]) == ("n1", "https://n1.example")
    assert [device["device_id"] for device in beat["metrics"]["devices"]] == ["cpu:0"]
    assert dispatcher.keys == {(f"Bearer {KEY}", KEY)}
    assert not any(KEY in line for line in mesh.lines)


async def test_a_dispatcher_that_forgets_it_is_told_again_at_once(tmp_path: Path, dispatcher: FakeDispatcher) -> None:
    async with node(tmp_path, dispatcher.url, COMPUTEMESH_DISPATCHER_INTERVAL_S="2"):
        await until(lambda: dispatcher.count("heartbeat") >= 1, what="a heartbeat")
        dispatcher.known.clear()
        dispatcher.heard.clear()
        await until(lambda: dispatcher.count("heartbeat") >= 2, what="two heartbeats")
    assert [what for what, _ in dispatcher.heard[:3]] == ["heartbeat", "register", "heartbeat"]


async def test_a_dispatcher_that_forgets_nodes_at_once_is_not_asked_in_a_circle(
    tmp_path: Path, dispatcher: FakeDispatcher
) -> None:
    dispatcher.forgetful = True
    async with node(tmp_path, dispatcher.url) as mesh:
        await says(mesh, "404 for a node that it has just registered")
        heard = [what for what, _ in dispatcher.heard[:5]]
    assert heard[:4] == ["register", "heartbeat", "register", "heartbeat"]


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ([401] * 99, "COMPUTEMESH_DISPATCHER_KEY"),
        ([403] * 99, "COMPUTEMESH_DISPATCHER_KEY"),
        ([500] * 99, "status 500"),
        ([307] * 99, "redirects"),
        ([200, *[503] * 99], "status 503"),
    ],
)
async def test_what_a_dispatcher_refuses_is_told_in_log_and_health_and_tried_again(
    tmp_path: Path, dispatcher: FakeDispatcher, statuses: list[int], said: str
) -> None:
    dispatcher.answers = list(statuses)
    async with node(tmp_path, dispatcher.url) as mesh:
        await says(mesh, said)
        told = [line for line in mesh.lines if "does not take this node" in line]
        assert len(told) == 1
        assert said in told[0]
        dispatcher.answers.clear()
        await says(mesh, "takes this node")


async def test_a_dispatcher_that_is_not_there_or_dies_is_looked_for_without_harm(
    tmp_path: Path, dispatcher: FakeDispatcher
) -> None:
    await dispatcher.stop()
    async with node(tmp_path, dispatcher.url) as mesh:
        await says(mesh, "cannot be reached")
        await dispatcher.start()
        await says(mesh, "takes this node")
        await dispatcher.stop()
        await says(mesh, "cannot be reached")
        found = await view(mesh, "n1")
        assert found is not None
        assert (found.state, found.base_url) == (NodeState.ONLINE, "")
        await dispatcher.start()
        dispatcher.known.clear()
        await says(mesh, "takes this node")


async def test_a_slow_dispatcher_delays_nothing_but_its_own_news(tmp_path: Path, dispatcher: FakeDispatcher) -> None:
    """Heartbeats on the bus go on meanwhile, and the agent ends as fast as ever."""
    dispatcher.pause_s = 15
    async with node(tmp_path, dispatcher.url) as mesh:
        await until(lambda: dispatcher.count("register") == 1, what="the registration")
        seen = [(await view(mesh, "n1")), None]
        assert seen[0] is not None
        async with asyncio.timeout(10):
            while (seen[1] or seen[0]).last_seen <= seen[0].last_seen:
                seen[1] = await view(mesh, "n1")
                await asyncio.sleep(0.05)
        await says(mesh, "does not answer within 10 s")
    assert not any("could not finish in time" in line for line in mesh.lines)


async def test_the_registry_of_another_mesh_knows_the_node_by_what_it_posts(tmp_path: Path) -> None:
    async with (
        running_mesh(tmp_path / "theirs", ("node-registry",)) as theirs,
        node(tmp_path / "ours", theirs.http("node-registry"), COMPUTEMESH_ADVERTISE_URL="http://10.9.8.7:8091") as ours,
    ):
        await says(ours, "takes this node")
        found = await view(theirs, "n1")
        assert found is not None
        assert (found.base_url, found.slots, found.hostname) == ("http://10.9.8.7:8091", 0, "10.9.8.7")
        async with asyncio.timeout(30):
            while not found.monitored:
                found = await view(theirs, "n1")
                assert found is not None
                await asyncio.sleep(0.05)


async def test_what_it_posts_to_its_own_meshs_registry_changes_nothing_there(tmp_path: Path) -> None:
    """The registry's port is known only once it runs, so the test posts what the agent would."""
    async with node(tmp_path, "http://127.0.0.1:9") as mesh:
        bus_view = await view(mesh, "n1")
        async with asyncio.timeout(30):
            while bus_view is None or not bus_view.monitored:
                bus_view = await view(mesh, "n1")
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=mesh.http("node-registry")) as http:
            session = (await health(mesh))["session"]
            for path in ("register", "heartbeat"):
                said = {"node_id": "n1", "base_url": "http://elsewhere:1", "session": session}
                answer = await http.post(f"/v1/nodes/{path}", json=said)
                assert (answer.status_code, answer.json()["ok"]) == (200, True), answer.text
        after = await view(mesh, "n1")
        assert after is not None
        assert (after.base_url, after.slots, after.epoch) == ("", bus_view.slots, bus_view.epoch)
