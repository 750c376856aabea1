"""What becomes of what a process asks when the bus says something else meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from computemesh.bus import Bus, MicroService, TimedOut
from computemesh.contracts import peers
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.peers import (
    Close,
    Closed,
    Connect,
    Connected,
    MemoryPut,
    PeerAnswered,
    PeerCall,
    PeerCalled,
    PeerRegister,
    PeersList,
    Resolve,
    Resolved,
)
from computemesh.peer.errors import PeerError
from computemesh.peer.signals import (
    Accept,
    Accepted,
    Answer,
    Call,
    Called,
    GetPeer,
    Hello,
    Lost,
    PeerFacts,
    PutRegion,
    Told,
)
from computemesh.peer.socket import AgentSocket
from computemesh.tasks import end_all
from computemesh.testing import running_mesh
from computemesh_services.peer_agent import attendance
from computemesh_services.peer_agent.config import PeerAgentConfig
from computemesh_services.peer_agent.service import PeerAgentService

WAIT_S = 20.0
CONNECT = Connect(conn_id="x", link="l-1", key="0" * 64, offers={"tcp": {}}, wants=["tcp"])


class Held(Bus):
    """A connection to the bus on which something else happens before a peer is called."""

    refuses: Refused | None = None
    """What the control plane says of memory, in place of its own answer."""
    before: Any = None
    """Awaited once; what it raises is what becomes of the call."""
    silent = False
    """Registrations are stored, and their answers are lost."""

    async def ask(self, request: Any, question: Any, **options: Any) -> Any:
        if isinstance(question, PeerRegister) and self.silent:
            await super().ask(request, question, **options)
            raise TimedOut("nobody answered")
        if isinstance(question, PeerCall) and isinstance(question.body, Connect) and self.before is not None:
            before, self.before = self.before, None
            await before()
        if isinstance(question, MemoryPut) and self.refuses is not None:
            return self.refuses
        return await super().ask(request, question, **options)


class Node:
    """A peer-agent in the test's own process, on a real bus with a real control plane."""

    def __init__(self, bus: Held, control_plane: Bus, path: Path) -> None:
        self.bus = bus
        self.control_plane = control_plane
        self.told: list[Told] = []
        self._path = path
        self._ends: list[AgentSocket] = []

    async def attach(self, alias: str | None) -> AgentSocket:
        end = await asyncio.to_thread(AgentSocket, self._path, Hello(alias=alias), on_told=self._on_told)
        self._ends.append(end)
        return end

    def _on_told(self, told: Told) -> Answer | None:
        self.told.append(told)
        if isinstance(told, Accept):
            return Accepted(body=Connected(link=told.body.link, answers={"tcp": {"port": 1}}))
        return None

    async def end(self) -> None:
        for end in self._ends:
            await asyncio.to_thread(end.close)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncGenerator[Node]:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(tmp_path, ["control-plane"]))
        where = (await mesh.bus(Role.NODE)).where
        bus = Held(where)
        await bus.connect(timeout_s=WAIT_S)
        stack.push_async_callback(bus.close)
        path = tmp_path / "run" / "peer-agent.sock"
        service = PeerAgentService(bus, PeerAgentConfig(nats_url=where.url, node_id="n1", drain_timeout_s=2.0), path)
        micro = MicroService(bus, name="peer-agent", description="of a test", metadata={})
        background: list[asyncio.Task[None]] = []
        await service.start(lambda work: background.append(asyncio.create_task(work)), micro)
        await micro.start(service.endpoints())
        stack.push_async_callback(end_all, background)
        stack.push_async_callback(service.drain)
        made = Node(bus, await mesh.bus(Role.SERVICES), path)
        stack.push_async_callback(made.end)
        yield made


async def test_who_is_asked_over_the_bus_by_its_own_node_is_to_be_asked_again(node: Node) -> None:
    await node.attach("b")
    called = PeerCalled(alias="a", node_id="n1", peer="b", body=CONNECT)
    refused = await node.control_plane.ask(peers.ANSWER, called, target="n1")
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field, refused.status, refused.retry) == ("unavailable", "peer", 503, "later")
    assert not node.told, "the peer was asked all the same"
    from_afar = PeerCalled(alias="a", node_id="n2", peer="b", body=CONNECT)
    elsewhere = await node.control_plane.ask(peers.ANSWER, from_afar, target="n1")
    assert isinstance(elsewhere, PeerAnswered)
    assert [told.same_host for told in node.told if isinstance(told, Accept)] == [False]


@pytest.mark.parametrize("bus_fails", [False, True])
async def test_a_peer_that_comes_while_it_is_asked_for_is_connected_within_the_node(
    node: Node, bus_fails: bool
) -> None:
    """Also when the bus does not say what became of the question; the connection then stays."""
    a = await node.attach("a")
    came: list[AgentSocket] = []

    async def come() -> None:
        came.append(await node.attach("b"))
        if bus_fails:
            raise TimedOut("nobody answered")

    node.bus.before = come
    answer, _ = await asyncio.to_thread(a.ask, Call(peer="b", body=CONNECT))
    assert came
    assert isinstance(answer, Called)
    assert (answer.body, answer.same_host) == (Connected(link="l-1", answers={"tcp": {"port": 1}}), True)
    accepts = [told for told in node.told if isinstance(told, Accept)]
    assert [(told.peer, told.node_id, told.same_host) for told in accepts] == [("a", "n1", True)]
    # Whatever was said over the bus of this connection has come by now, since this goes the same way.
    await asyncio.sleep(0.3)
    assert not [told for told in node.told if isinstance(told, Lost)]
    closed, _ = await asyncio.to_thread(a.ask, Call(peer="b", body=Close(link="l-1")))
    assert isinstance(closed, Called)
    assert closed.body == Closed(found=True)


async def test_memory_that_the_control_plane_refuses_leaves_what_had_its_name(node: Node) -> None:
    """The process still has the one before, and its peers still reach it."""
    a = await node.attach("a")

    async def lengths() -> list[int]:
        called = PeerCalled(alias="z", node_id="n9", peer="a", body=Resolve(link="l-1", names=["kv", "new"]))
        said = await node.control_plane.ask(peers.ANSWER, called, target="n1")
        assert isinstance(said, PeerAnswered)
        assert isinstance(said.body, Resolved)
        return [region.length for region in said.body.regions]

    connected = PeerCalled(alias="z", node_id="n9", peer="a", body=CONNECT)
    assert isinstance(await node.control_plane.ask(peers.ANSWER, connected, target="n1"), PeerAnswered)
    await asyncio.to_thread(a.ask, PutRegion(name="kv", length=1, epoch=1))
    node.bus.refuses = Refused(code="full", reason="no room", field="name", status=503)
    for name, epoch in (("kv", 2), ("new", 3)):
        with pytest.raises(PeerError, match="no room"):
            await asyncio.to_thread(a.ask, PutRegion(name=name, length=epoch, epoch=epoch))
    assert await lengths() == [1]
    facts, _ = await asyncio.to_thread(a.ask, GetPeer(alias="a"))
    assert isinstance(facts, PeerFacts)
    assert facts.peer is not None
    assert facts.peer.memory_keys == ["kv"]
    node.bus.refuses = None
    await asyncio.to_thread(a.ask, PutRegion(name="kv", length=4, epoch=4))
    assert await lengths() == [4]


@pytest.mark.parametrize("alias", ["a", None])
async def test_a_start_that_was_not_answered_takes_no_alias(
    node: Node, alias: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the control plane answers again the name is free, and nobody is listed who is not there."""
    monkeypatch.setattr(attendance, "REGISTER_S", 1.0)
    node.bus.silent = True
    for _ in range(2):
        with pytest.raises(PeerError) as raised:
            await node.attach(alias)
        assert raised.value.code == "unavailable"
    node.bus.silent = False
    end: AgentSocket | None = None
    deadline_s = asyncio.get_running_loop().time() + WAIT_S
    while end is None:
        try:
            end = await node.attach(alias)
        except PeerError as error:
            if error.code != "unavailable":
                raise
    while True:
        listed = await node.control_plane.ask(peers.LIST, PeersList())
        assert not isinstance(listed, Refused)
        if [peer.alias for peer in listed.peers] == [end.welcome.alias]:
            break
        assert asyncio.get_running_loop().time() < deadline_s, "somebody is listed who is not there"
        await asyncio.sleep(0.05)
