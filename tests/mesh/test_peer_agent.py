"""The peer-agent as a process: what it promises to the processes of its node, and while things around it are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from computemesh.contracts import peers
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.peers import (
    Close,
    Closed,
    Connect,
    Connected,
    MemoryList,
    PeerCalled,
    PeerMemories,
    PeersList,
    PeerUnregister,
    Piece,
    Resolve,
    TopologyPut,
    Transfer,
    TransferBegun,
    Transferred,
)
from computemesh.ids import new_id
from computemesh.peer.agent import start_peer_agent
from computemesh.peer.errors import PeerError
from computemesh.peer.frames import close_fds
from computemesh.peer.signals import (
    FRAME_MAX,
    Accept,
    Accepted,
    Aliases,
    Answer,
    Begun,
    Call,
    Called,
    Desired,
    Done,
    DropRegion,
    Ended,
    GetMemory,
    GetPeer,
    Hello,
    ListPeers,
    Lost,
    MemoryFacts,
    Moves,
    Order,
    PeerFacts,
    PutEpochs,
    PutRegion,
    Question,
    RegionsResolved,
    SetTopology,
    Told,
    TopologyFacts,
    Traffic,
)
from computemesh.peer.socket import AgentSocket
from computemesh.testing import RunningMesh, running_mesh, until
from computemesh_services.peer_agent.calls import ACCEPTS_MAX
from tests.mesh.peer_nodes import another_node

HERE = Path(__file__).parent
WAIT_S = 30.0
CONTENT = b"what is in there"
"""As `attached_process.py` has it."""


class Process:
    """An end of the socket in the test's own process."""

    def __init__(self, path: Path, hello: Hello) -> None:
        self.told: list[Told] = []
        self.closed: list[str] = []
        self.refuses: Refused | None = None
        self.begins = True
        self.silent = threading.Event()
        self.silent.set()
        self.end = AgentSocket(path, hello, on_told=self._on_told, on_closed=self.closed.append)

    def _on_told(self, told: Told) -> Answer | Refused | None:
        self.told.append(told)
        match told:
            case Accept():
                self.silent.wait(WAIT_S)
                return self.refuses or Accepted(body=Connected(link=told.body.link, answers={"tcp": {"port": 1}}))
            case Order() if self.begins:
                return Begun(body=TransferBegun(transfer_id=told.transfer.transfer_id, state="running"))
            case Order():
                return Refused(code="no_region", reason="not any more", status=404)
            case _:
                return None

    @property
    def alias(self) -> str:
        return self.end.welcome.alias

    @property
    def lost(self) -> list[tuple[str, str | None]]:
        return [(told.peer, told.link) for told in self.told if isinstance(told, Lost)]

    @property
    def desired(self) -> list[list[str]]:
        return [told.topology.target_peers for told in self.told if isinstance(told, Desired)]

    async def ask(self, question: Question, *fds: int) -> Answer:
        answer, came = await self.ask_fds(question, *fds)
        assert came == ()
        return answer

    async def ask_fds(self, question: Question, *fds: int) -> tuple[Answer, tuple[int, ...]]:
        return await asyncio.to_thread(self.end.ask, question, fds)

    async def connect(self, peer: str, link: str = "") -> str:
        link = link or new_id("l")
        answer = await self.ask(Call(peer=peer, body=connecting(link)))
        assert isinstance(answer, Called)
        assert isinstance(answer.body, Connected)
        return link

    async def resolve(self, peer: str, link: str, *names: str) -> tuple[Called, tuple[int, ...]]:
        answer, fds = await self.ask_fds(Call(peer=peer, body=Resolve(link=link, names=list(names))))
        assert isinstance(answer, Called)
        return answer, fds


def connecting(link: str) -> Connect:
    return Connect(conn_id="x", link=link, key="0" * 64, offers={"tcp": {}}, wants=["tcp"])


@contextlib.contextmanager
def memory(content: bytes) -> Any:
    fd = os.memfd_create("test")
    os.write(fd, content)
    try:
        yield fd
    finally:
        os.close(fd)


Attach = Callable[..., Any]


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """A control plane and the peer-agent of node n1."""
    async with running_mesh(tmp_path, ["control-plane", "peer-agent"]) as running:
        yield running


@pytest.fixture
async def attach(mesh: RunningMesh) -> AsyncGenerator[Attach]:
    """Makes a process of node n1, or of the node whose socket is named."""
    made: list[Process] = []

    async def attach_one(alias: str | None = None, path: Path | None = None, **said: Any) -> Process:
        where = path or mesh.home.run / "peer-agent.sock"
        made.append(process := await asyncio.to_thread(Process, where, Hello(alias=alias, **said)))
        return process

    yield attach_one
    for process in made:
        process.silent.set()
        await asyncio.to_thread(process.end.close)


def program(*arguments: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], stdout=stdout)


@asynccontextmanager
async def killable(path: Path, alias: str, scope: str = "") -> AsyncGenerator[subprocess.Popen[bytes]]:
    """A process that can be killed; it has a region `kv` that may only be read."""
    process = program(str(HERE / "attached_process.py"), str(path), scope, alias, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)
        process.stdout.close()  # type: ignore[union-attr]


def open_fds(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # Its names are all that can be had.


async def listed(mesh: RunningMesh, scope: str = "") -> dict[str, list[str]]:
    """The peers that a client sees, with the names of their regions."""
    answer = await (await mesh.bus()).ask(peers.LIST, PeersList(scope=scope))
    assert not isinstance(answer, Refused), answer
    return {peer.alias: peer.memory_keys for peer in answer.peers}


async def fetched(mesh: RunningMesh, path: str, service: str = "peer-agent") -> str:
    async with httpx.AsyncClient() as http:
        return (await http.get(mesh.http(service) + path)).text


async def eventually(condition: Callable[[], Any], *, what: str, within_s: float = WAIT_S) -> None:
    """As ``until``, for a condition that has to be asked for."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.02)


# --- processes and their memory -----------------------------------------------------------------------------------


async def test_a_process_is_found_with_its_memory_and_forgotten_when_it_ends(mesh: RunningMesh, attach: Attach) -> None:
    """Whoever asks the control plane sees what was put as soon as the process hears that it is done."""
    a, b = await attach("a", resource={"cpu": 1}, device="mlx5_0"), await attach(name_prefix="worker")
    assert a.end.welcome.node_id == "n1"
    assert a.end.welcome.peer.resource == {"cpu": 1}
    assert "@" not in a.end.welcome.bus
    assert b.alias.startswith("worker-")
    with memory(b"x" * 100) as page:
        await a.ask(PutEpochs(), page)
        await a.ask(PutRegion(name="kv", length=100, epoch=1, tokens={"shm": {"offset": 0}}, fds=1), page)
    await a.ask(PutRegion(name="weights", length=8, epoch=2, address=4096, tokens={"tcp": {}, "rdma": {"rkey": 5}}))
    assert await listed(mesh) == {"a": ["kv", "weights"], b.alias: []}
    kept = await (await mesh.bus()).ask(peers.MEMORY_LIST, MemoryList(alias="a"))
    assert isinstance(kept, PeerMemories)
    assert [(one.name, one.addr, one.rkey, one.transports) for one in kept.memories] == [
        ("kv", 0, 0, ["shm"]),
        ("weights", 4096, 5, ["rdma", "tcp"]),
    ]
    assert await b.ask(ListPeers()) == Aliases(aliases=["a", b.alias])
    found = await b.ask(GetMemory(alias="a"))
    assert isinstance(found, MemoryFacts)
    assert found.memories == kept.memories
    assert await b.ask(GetPeer(alias="nobody")) == PeerFacts(peer=None)
    assert await a.ask(DropRegion(name="kv", epoch=9)) == Done(found=False)
    assert await a.ask(DropRegion(name="kv", epoch=1)) == Done()
    assert await listed(mesh) == {"a": ["weights"], b.alias: []}
    await asyncio.to_thread(a.end.close)

    async def gone() -> bool:
        return "a" not in await listed(mesh)

    await eventually(gone, what="the control plane has forgotten a")


async def test_scopes_are_apart(attach: Attach) -> None:
    """The same alias twice, and neither sees nor reaches the other."""
    one, other = await attach("a", scope="one"), await attach("a", scope="other")
    b = await attach("b", scope="one")
    assert await b.ask(ListPeers()) == Aliases(aliases=["a", "b"])
    assert await other.ask(ListPeers()) == Aliases(aliases=["a"])
    with pytest.raises(PeerError) as raised:
        await other.connect("b")
    assert raised.value.code == "not_found"
    await b.connect("a")
    assert [type(told) for told in one.told] == [Accept]
    assert other.told == []


async def test_an_alias_is_one_process_and_who_asks_for_it_harms_nobody(
    mesh: RunningMesh, attach: Attach, tmp_path: Path
) -> None:
    """On this node and on another; the first goes on as if nothing had been."""
    a = await attach("a")
    async with another_node(mesh, tmp_path) as (far, _):
        for path in (None, far):
            with pytest.raises(PeerError, match="a") as raised:
                await attach("a", path=path)
            assert raised.value.code == "alias_taken"
    assert await a.ask(ListPeers()) == Aliases(aliases=["a"])


async def test_a_process_that_ends_and_begins_again_at_once_gets_its_alias_back(attach: Attach) -> None:
    """Its next life waits until the last one is forgotten."""
    instances: set[str] = set()
    for _ in range(10):
        process = await attach("a")
        instances.add(process.end.welcome.instance)
        await asyncio.to_thread(process.end.close)
    assert len(instances) == 10


@pytest.mark.parametrize(
    ("put", "code", "field"),
    [
        ({"tokens": {"shm": {"offset": 1}}, "fds": 1}, "out_of_range", "tokens.shm"),
        ({"tokens": {"shm": {"offset": -1}}, "fds": 1}, "out_of_range", "tokens.shm"),
        ({"tokens": {"shm": {}}, "fds": 1}, "out_of_range", "tokens.shm"),
        ({"tokens": {"shm": {"offset": 0}}}, "bad_message", "tokens"),
        ({"tokens": {"tcp": {}}, "fds": 1}, "bad_message", "tokens"),
        ({"epoch": 1}, "stale_epoch", "epoch"),
        ({"name": ""}, "bad_message", "name"),
    ],
)
async def test_memory_that_cannot_be_so_is_refused(
    attach: Attach, mesh: RunningMesh, put: dict[str, Any], code: str, field: str
) -> None:
    """By the field at fault; what was there stays, and its descriptor is not kept."""
    a = await attach("a")
    with memory(b"x" * 16) as fd:
        await a.ask(PutEpochs(), fd)
        await a.ask(PutRegion(name="kv", length=1, epoch=2))
        pid = mesh.pid("peer-agent")
        before = open_fds(pid)
        whole: dict[str, Any] = {"name": "kv", "length": 16, "epoch": 3, **put}
        question = PutRegion(**whole)
        with pytest.raises(PeerError, match=f"^{field}: ") as raised:
            await a.ask(question, *[fd] * question.fds)
        assert raised.value.code == code
        assert open_fds(pid) == before
    assert await listed(mesh) == {"a": ["kv"]}


async def test_shared_memory_needs_a_page_of_epochs_first(attach: Attach) -> None:
    """Else nobody could tell that it is gone."""
    a = await attach("a")
    with memory(b"x" * 16) as fd:
        with pytest.raises(PeerError, match="put_epochs"):
            await a.ask(PutRegion(name="kv", length=1, epoch=1, tokens={"shm": {"offset": 0}}, fds=1), fd)
        here, there = socket.socketpair()
        with here, there, pytest.raises(PeerError, match=r"^fds: "):
            await a.ask(PutEpochs(), here.fileno())


# --- connections --------------------------------------------------------------------------------------------------


async def test_processes_of_one_node_share_memory_by_descriptor(mesh: RunningMesh, attach: Attach) -> None:
    """Over a connection that the owner took, and through one that cannot write where the owner does not let it."""
    a, b, c = await attach("a"), await attach("b"), await attach("c")
    with memory(b"page" * 4) as page, memory(b"readable") as readable, memory(b"writable") as writable:
        await a.ask(PutEpochs(), page)
        shm: dict[Any, dict[str, Any]] = {"shm": {"offset": 0, "slot": 1}, "tcp": {"key": 1}}
        await a.ask(PutRegion(name="r", length=8, epoch=1, writable=False, tokens=shm, fds=1), readable)
        await a.ask(PutRegion(name="w", length=8, epoch=2, tokens=shm, fds=1), writable)
        await a.ask(PutRegion(name="private", length=8, epoch=3, tokens={"tcp": {}}))
        link = await b.connect("a")
        (accept,) = a.told
        assert isinstance(accept, Accept)
        assert (accept.peer, accept.node_id, accept.same_host, accept.body) == ("b", "n1", True, connecting(link))
        answer, fds = await b.resolve("a", link, "w", "r", "private", "nothing", "w")
        assert answer.same_host
        assert isinstance(answer.body, RegionsResolved)
        assert [(one.name, one.epoch, one.writable, sorted(one.tokens)) for one in answer.body.regions] == [
            ("w", 2, True, ["shm", "tcp"]),
            ("r", 1, False, ["shm", "tcp"]),
            ("private", 3, True, ["tcp"]),
        ]
        assert answer.body.fds == ["", "w", "r"]
        assert [os.pread(fd, 16, 0) for fd in fds] == [b"page" * 4, b"writable", b"readable"]
        os.pwrite(fds[1], b"W", 0)
        assert os.pread(writable, 8, 0) == b"Writable"
        for fd in (fds[0], fds[2]):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"X", 0)
        close_fds(fds)
        for asker, peer in ((c, "a"), (b, "c")):
            with pytest.raises(PeerError) as raised:
                await asker.resolve(peer, link, "r")
            assert raised.value.code == "no_link"
        assert await a.ask(Call(peer="b", body=Close(link=link, reason="enough"))) == Called(
            body=Closed(found=True), same_host=True
        )
        await until(lambda: b.lost == [("a", link)], what="b hears that the connection has ended")
        with pytest.raises(PeerError) as raised:
            await b.resolve("a", link, "r")
        assert raised.value.code == "no_link"
        assert a.lost == []


async def test_more_shared_regions_than_go_into_an_answer_are_refused_in_words(attach: Attach) -> None:
    """64 descriptors may come with a frame, one of them is the page of epochs."""
    a, b = await attach("a"), await attach("b")
    with memory(b"x" * 64) as fd:
        await a.ask(PutEpochs(), fd)
        for number in range(64):
            put = PutRegion(name=f"r{number}", length=1, epoch=1, tokens={"shm": {"offset": number}}, fds=1)
            await a.ask(put, fd)
    link = await b.connect("a")
    _, fds = await b.resolve("a", link, *[f"r{number}" for number in range(63)])
    assert len(fds) == 64
    close_fds(fds)
    with pytest.raises(PeerError, match=r"^body\.names: 64 regions of shared memory; 63 can be had at once"):
        await b.resolve("a", link, *[f"r{number}" for number in range(64)])


async def test_processes_of_two_nodes_are_connected_through_the_control_plane(
    mesh: RunningMesh, attach: Attach, tmp_path: Path
) -> None:
    """They hear the same as on one node, but get no descriptors."""
    async with another_node(mesh, tmp_path) as (far, _):
        a, b = await attach("a"), await attach("b", path=far)
        with memory(b"page" * 4) as page:
            await a.ask(PutEpochs(), page)
            tokens: dict[Any, dict[str, Any]] = {"shm": {"offset": 0}, "tcp": {"x": 1}}
            await a.ask(PutRegion(name="kv", length=8, epoch=1, tokens=tokens, fds=1), page)
        answer = await b.ask(Call(peer="a", body=connecting("l-1")))
        assert answer == Called(body=Connected(link="l-1", answers={"tcp": {"port": 1}}))
        (accept,) = a.told
        assert isinstance(accept, Accept)
        assert (accept.peer, accept.node_id, accept.same_host) == ("b", "n2", False)
        resolved, fds = await b.resolve("a", "l-1", "kv")
        assert isinstance(resolved.body, RegionsResolved)
        assert fds == ()
        assert (resolved.body.fds, resolved.body.regions[0].tokens, resolved.same_host) == (
            [],
            {"tcp": {"x": 1}},
            False,
        )
        assert (await a.resolve("b", "l-1", "kv"))[0].body == RegionsResolved(regions=[])
        with pytest.raises(PeerError) as raised:
            await b.resolve("a", "l-2", "kv")
        assert raised.value.code == "no_link"
        assert await b.ask(Call(peer="a", body=Close(link="l-1", reason="enough"))) == Called(body=Closed(found=True))
        await until(lambda: a.lost == [("b", "l-1")], what="a hears that the connection has ended")


@pytest.mark.parametrize("near", [True, False], ids=["same node", "other node"])
async def test_a_connection_that_is_not_taken_is_no_connection(
    mesh: RunningMesh, attach: Attach, tmp_path: Path, *, near: bool
) -> None:
    """The reason of the peer comes through, and the link's name may be used again."""
    async with another_node(mesh, tmp_path) as (far, _):
        a, b = await attach("a"), await attach("b", path=None if near else far)
        a.refuses = Refused(code="crossed", reason="I was first", status=409)
        with pytest.raises(PeerError, match="I was first") as raised:
            await b.connect("a", "l-1")
        assert raised.value.code == "crossed"
        a.refuses = None
        await b.connect("a", "l-1")
        with pytest.raises(PeerError, match="l-1 is a connection already"):
            await b.connect("a", "l-1")
        for peer, code in (("nobody", "not_found"), ("b", "no_way")):
            with pytest.raises(PeerError) as raised:
                await b.connect(peer)
            assert raised.value.code == code


async def test_a_connection_that_is_taken_too_late_is_ended(mesh: RunningMesh, attach: Attach, tmp_path: Path) -> None:
    """The peer that asked has given up, so the one that took it is told."""
    async with another_node(mesh, tmp_path) as (far, _):
        a, b = await attach("a"), await attach("b", path=far)
        a.silent.clear()
        with pytest.raises(PeerError) as raised:
            await b.connect("a", "l-1")
        assert raised.value.code == "unavailable"
        a.silent.set()
        await until(lambda: ("b", "l-1") in a.lost, what="a hears that nobody waits any more")


# --- ends ---------------------------------------------------------------------------------------------------------


async def test_when_a_process_is_killed_everybody_knows_within_a_second(
    mesh: RunningMesh, attach: Attach, tmp_path: Path
) -> None:
    """The list, the peers it was connected to on both nodes, and those that have mapped its memory."""
    async with (
        another_node(mesh, tmp_path) as (far, _),
        killable(mesh.home.run / "peer-agent.sock", "victim") as victim,
    ):
        near, remote, stranger = await attach("near"), await attach("remote", path=far), await attach("stranger")
        links = [await near.connect("victim"), await near.connect("victim")]
        remote_link = await remote.connect("victim")
        _, (page, kv) = await near.resolve("victim", links[0], "kv")
        assert os.pread(page, 8, 0) == (7).to_bytes(8, sys.byteorder)
        assert os.pread(kv, 100, 0) == CONTENT
        assert await listed(mesh) == {"victim": ["kv"], "near": [], "remote": [], "stranger": []}
        victim.kill()
        began_s = asyncio.get_running_loop().time()

        async def gone() -> bool:
            return "victim" not in await listed(mesh)

        await eventually(gone, what="the control plane has forgotten the victim", within_s=5.0)
        await until(lambda: len(near.lost) == 2 and len(remote.lost) == 1, what="its peers are told", within_s=5.0)
        assert asyncio.get_running_loop().time() - began_s < 5.0
        assert sorted(near.lost) == sorted(("victim", link) for link in links)
        assert remote.lost == [("victim", remote_link)]
        assert stranger.told == []
        assert os.pread(page, 8, 0) == bytes(8), "what was mapped is stale"
        close_fds([page, kv])


async def test_when_the_peer_agent_is_killed_its_processes_come_back_by_themselves(
    mesh: RunningMesh, attach: Attach
) -> None:
    """As who they were, with their memory; their connections go on, and their ends are told as before."""
    a, b = await attach("a"), await attach("b")
    with memory(b"page" * 4) as page:
        await a.ask(PutEpochs(), page)
        await a.ask(PutRegion(name="kv", length=8, epoch=1, tokens={"shm": {"offset": 0}}, fds=1), page)
        link = await b.connect("a")
        instance, pid = a.end.welcome.instance, mesh.pid("peer-agent")
        mesh.kill("peer-agent")
        await until(lambda: mesh.pid("peer-agent") not in (0, pid), what="it was started again")
        answer = await a.ask(ListPeers())
        assert answer == Aliases(aliases=["a", "b"])
        assert (a.alias, a.end.welcome.instance) == ("a", instance)
        await b.ask(ListPeers())
        _, fds = await b.resolve("a", link, "kv")
        assert len(fds) == 2
        assert os.pread(page, 16, 0) == b"page" * 4, "its memory was not taken for that of a process that ended"
        close_fds(fds)
    assert await listed(mesh) == {"a": ["kv"], "b": []}
    assert a.lost == b.lost == []
    await asyncio.to_thread(a.end.close)
    await until(lambda: b.lost == [("a", link)], what="b hears that a has ended")


async def test_a_process_with_a_thousand_regions_comes_back_with_all_of_them(mesh: RunningMesh, attach: Attach) -> None:
    """It says them all at once when the peer-agent is there again."""
    a, b = await attach("a"), await attach("b")
    with memory(b"x" * 1000) as fd:

        def put_all() -> None:
            a.end.ask(PutEpochs(), [fd])
            for number in range(1000):
                tokens: dict[Any, dict[str, Any]] = {"shm": {"offset": number}}
                a.end.ask(PutRegion(name=f"r{number}", length=1, epoch=1, tokens=tokens, fds=1), [fd])

        await asyncio.to_thread(put_all)
        pid = mesh.pid("peer-agent")
        mesh.kill("peer-agent")
        await until(lambda: mesh.pid("peer-agent") not in (0, pid), what="it was started again")

        async def known() -> bool:
            found = await b.ask(GetPeer(alias="a"))
            assert isinstance(found, PeerFacts)
            return found.peer is not None and len(found.peer.memory_keys) == 1000

        await eventually(known, what="all regions are known again")
        text = await fetched(mesh, "/metrics")
        assert 'code="too_many_requests"' not in text


async def test_while_nats_is_away_processes_of_a_node_still_connect(mesh: RunningMesh, attach: Attach) -> None:
    """What is put meanwhile is known when it is back."""
    a, b = await attach("a"), await attach("b")
    await a.ask(PutRegion(name="before", length=8, epoch=1))
    mesh.kill("nats-server", signal.SIGSTOP)
    with memory(b"page" * 4) as page:
        await a.ask(PutEpochs(), page)
        found = await b.ask(GetPeer(alias="a"))
        assert isinstance(found, PeerFacts)
        assert found.peer is not None
        assert (found.peer.alias, found.peer.node_id, found.peer.memory_keys) == ("a", "n1", ["before"])
        link = await b.connect("a")
        assert (await b.resolve("a", link, "kv"))[1] == ()
    mesh.kill("nats-server", signal.SIGCONT)
    mesh.kill("nats-server")
    await a.ask(PutRegion(name="kv", length=8, epoch=1, tokens={"tcp": {}}))
    (answer, _) = await b.resolve("a", link, "kv")
    assert isinstance(answer.body, RegionsResolved)
    assert [region.name for region in answer.body.regions] == ["kv"]

    async def known() -> bool:
        found = await (await mesh.bus()).ask(peers.LIST, PeersList())
        return not isinstance(found, Refused) and {one.alias: one.memory_keys for one in found.peers} == {
            "a": ["before", "kv"],
            "b": [],
        }

    await until(lambda: mesh.pid("nats-server"), what="the server is back")
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(Exception):
                if await known():
                    break
            await asyncio.sleep(0.1)


async def test_when_the_control_plane_is_killed_nobody_is_lost(mesh: RunningMesh, attach: Attach) -> None:
    """What ends, and what is put, while it is away is told when it is back."""
    a, b = await attach("a"), await attach("b")
    pid = mesh.pid("control-plane")
    mesh.kill("control-plane")
    await a.ask(PutRegion(name="kv", length=8, epoch=1, tokens={"tcp": {}}))
    await asyncio.to_thread(b.end.close)
    await until(lambda: mesh.pid("control-plane") not in (0, pid), what="it was started again")

    async def known() -> bool:
        with contextlib.suppress(Exception):
            return await listed(mesh) == {"a": ["kv"]}
        return False

    await eventually(known, what="the control plane knows what is so now")
    assert await a.ask(ListPeers()) == Aliases(aliases=["a"])


async def test_a_peer_that_the_control_plane_has_lost_is_registered_again_with_its_memory(
    mesh: RunningMesh, attach: Attach
) -> None:
    """As when nothing was heard of it for too long."""
    a = await attach("a")
    await a.ask(PutRegion(name="kv", length=8, epoch=1))
    services = await mesh.bus(Role.SERVICES)
    await services.ask(peers.UNREGISTER, PeerUnregister(alias="a", instance=a.end.welcome.instance))

    async def back() -> bool:
        return await listed(mesh) == {"a": ["kv"]}

    await eventually(back, what="it is known again")
    assert a.closed == []


async def test_a_peer_whose_alias_is_anothers_now_is_told_so(mesh: RunningMesh, attach: Attach) -> None:
    """The control plane had lost it, and somebody else was quicker."""
    a = await attach("a")
    services = await mesh.bus(Role.SERVICES)
    mesh.kill("peer-agent", signal.SIGSTOP)
    await services.ask(peers.UNREGISTER, PeerUnregister(alias="a", instance=a.end.welcome.instance))
    await services.ask(peers.REGISTER, peers.PeerRegister(alias="a", instance="i-other", node_id="n9"))
    mesh.kill("peer-agent", signal.SIGCONT)
    await until(lambda: a.closed, what="the process hears of it")
    assert "alias" in a.closed[0] or "already exists" in a.closed[0]
    assert await listed(mesh) == {"a": []}


async def test_processes_that_come_and_go_leave_no_descriptor_behind(mesh: RunningMesh, attach: Attach) -> None:
    """With memory, connections, and some in the middle of it."""
    pid = mesh.pid("peer-agent")
    stays = await attach("stays")
    before = open_fds(pid)
    for number in range(10):
        process = await attach(f"p{number}")
        with memory(b"page" * 4) as page:
            await process.ask(PutEpochs(), page)
            await process.ask(PutEpochs(), page)
            for epoch in (1, 2):
                put = PutRegion(name="kv", length=8, epoch=epoch, tokens={"shm": {"offset": 0}}, fds=1)
                await process.ask(put, page)
        link = await stays.connect(f"p{number}")
        _, fds = await stays.resolve(f"p{number}", link, "kv")
        close_fds(fds)
        await asyncio.to_thread(process.end.close)
    await until(lambda: open_fds(pid) <= before, what="they are closed")
    health = json.loads(await fetched(mesh, "/healthz"))
    assert (health["peers"], health["regions"], health["links"]) == (1, 0, 0)


async def test_a_process_that_answers_nothing_holds_up_nobody_else(mesh: RunningMesh, attach: Attach) -> None:
    """Few questions wait for it; who asks one more hears so at once, and who asks another process is answered."""
    halted, _ = await attach("halted"), await attach("well")
    halted.silent.clear()
    services = await mesh.bus(Role.SERVICES)

    async def ask(peer: str, number: int) -> str:
        called = PeerCalled(alias="z", node_id="n9", peer=peer, body=connecting(f"l-{peer}-{number}"))
        said = await services.ask(peers.ANSWER, called, target="n1", timeout_s=WAIT_S)
        return said.reason if isinstance(said, Refused) else "taken"

    waiting = [asyncio.create_task(ask("halted", number)) for number in range(200)]
    await until(lambda: any(task.done() for task in waiting), what="more wait for it than may")
    assert await ask("well", 1) == "taken"
    given_up = [task for task in waiting if task.done() and "did not answer within" in task.result()]
    assert len(given_up) < ACCEPTS_MAX / 2, "the well one waited for these"
    said = [await task for task in waiting]
    refused = [one for one in said if f"{ACCEPTS_MAX} connections wait" in one]
    assert len(refused) > 0
    assert len(refused) + len([one for one in said if "did not answer within" in one]) == 200


# --- topology -----------------------------------------------------------------------------------------------------


async def test_a_process_hears_whom_it_is_to_be_connected_to(mesh: RunningMesh, attach: Attach) -> None:
    """At its start, when it changes, when one of them comes, and by its own word."""
    client = await mesh.bus()
    await client.ask(peers.TOPOLOGY_PUT, TopologyPut(alias="a", target_peers=["b"], symmetric=True))
    a = await attach("a")
    await until(lambda: a.desired == [["b"]], what="a hears of it at its start")
    b = await attach("b")
    await until(lambda: b.desired == [["a"]], what="b hears that it is meant as well")
    await until(lambda: a.desired == [["b"], ["b"]], what="a hears that b is there")
    await client.ask(peers.TOPOLOGY_PUT, TopologyPut(alias="a", target_peers=[]))
    await until(lambda: a.desired[-1] == [] and b.desired[-1] == [], what="both hear that it is over")
    answer = await b.ask(SetTopology(target_peers=["a", "z"]))
    assert isinstance(answer, TopologyFacts)
    assert answer.topology.target_peers == ["a", "z"]
    await until(lambda: b.desired[-1] == ["a", "z"], what="b is told what it said")


# --- transfers ----------------------------------------------------------------------------------------------------


def transfer(transfer_id: str, *, offset: int = 0, length: int = 4, **said: Any) -> Transfer:
    whole: dict[str, Any] = {
        "transfer_id": transfer_id,
        "alias": "a",
        "peer": "b",
        "kind": "read",
        "pieces": [Piece(local="kv", local_offset=offset, length=length)],
    }
    whole.update(said)
    return Transfer(**whole)


class Watched:
    """What a client hears of transfers."""

    def __init__(self) -> None:
        self.ended: list[Transferred] = []

    async def start(self, mesh: RunningMesh) -> None:
        async def on_ended(ended: Transferred) -> None:
            self.ended.append(ended)

        bus = await mesh.bus()
        await bus.subscribe(peers.TRANSFERRED, on_ended)
        await bus.flush()

    def of(self, transfer_id: str) -> list[Transferred]:
        return [ended for ended in self.ended if ended.transfer_id == transfer_id]


async def order(mesh: RunningMesh, wanted: Transfer, node_id: str = "n1") -> str:
    """The state of a transfer that was asked for, or the code of the refusal."""
    answer = await (await mesh.bus()).ask(peers.TRANSFER, wanted, target=node_id)
    return answer.state if isinstance(answer, TransferBegun) else answer.code


async def test_a_transfer_is_begun_once_and_its_end_is_told_once(mesh: RunningMesh, attach: Attach) -> None:
    """However often it is asked for, and however often the process says that it has ended."""
    a, watched = await attach("a"), Watched()
    await watched.start(mesh)
    await a.ask(PutRegion(name="kv", length=8, epoch=1))
    assert await order(mesh, transfer("t-1")) == "running"
    assert await order(mesh, transfer("t-1")) == "running"
    assert await order(mesh, transfer("t-1", kind="write")) == "conflict"
    assert [told for told in a.told if isinstance(told, Order)] == [Order(transfer=transfer("t-1"))]
    outcome = Transferred(
        transfer_id="t-1", node_id="zz", alias="zz", peer="b", kind="read", ok=True, bytes=4, transports=["tcp"], at=1.0
    )
    a.end.tell(Ended(outcome=outcome))
    a.end.tell(Ended(outcome=outcome))
    await until(lambda: watched.of("t-1"), what="the end is told")
    assert await order(mesh, transfer("t-1")) == "completed"
    assert [(one.node_id, one.alias, one.ok, one.bytes) for one in watched.of("t-1")] == [("n1", "a", True, 4)]
    text = await fetched(mesh, "/metrics")
    assert 'computemesh_peer_transfers_total{kind="read",outcome="ok"} 1.0' in text
    assert 'computemesh_peer_transfer_bytes_total{transport="tcp"} 4.0' in text


async def test_what_processes_say_makes_no_new_series(mesh: RunningMesh, attach: Attach, tmp_path: Path) -> None:
    """A code of their own counts as another one, in the control plane, too; a transport counts once."""
    a, b, watched = await attach("a"), await attach("b"), Watched()
    await watched.start(mesh)
    a.refuses = Refused(code="my_own", reason="as I like", status=409)
    with pytest.raises(PeerError) as raised:
        await b.connect("a")
    assert raised.value.code == "my_own"
    async with another_node(mesh, tmp_path) as (far, _):
        c = await attach("c", path=far)
        with pytest.raises(PeerError) as raised:
            await c.connect("a")
    assert raised.value.code == "my_own"
    passed_on = await fetched(mesh, "/metrics", "control-plane")
    assert 'computemesh_peer_calls_total{outcome="other"} 1.0' in passed_on
    assert "my_own" not in passed_on
    a.end.report(Traffic(moved={"rdma": Moves(reads=2, bytes_read=8, writes=1, bytes_written=5)}, failed={"mine": 3}))
    a.end.report(Traffic(moved={"rdma": Moves(reads=1, bytes_read=8)}, failed={"link_lost": 1, "my_own": 1}))
    odd: dict[str, Any] = {"node_id": "n1", "alias": "a", "peer": "b", "kind": "read", "at": 1.0}
    a.end.tell(Ended(outcome=Transferred(transfer_id="t-1", ok=False, code="also_my_own", **odd)))
    many: list[Any] = ["tcp", "shm", "tcp", "tcp"]
    a.end.tell(Ended(outcome=Transferred(transfer_id="t-2", ok=True, bytes=4, transports=many, **odd)))
    await until(lambda: watched.of("t-2"), what="the ends are told")
    text = await fetched(mesh, "/metrics")
    assert "my_own" not in text
    assert 'code="mine"' not in text
    assert 'computemesh_peer_orders_total{kind="read",transport="rdma"} 3.0' in text
    assert 'computemesh_peer_order_bytes_total{kind="read",transport="rdma"} 16.0' in text
    assert 'computemesh_peer_orders_total{kind="write",transport="rdma"} 1.0' in text
    assert 'computemesh_peer_order_bytes_total{kind="write",transport="rdma"} 5.0' in text
    assert 'computemesh_peer_failures_total{code="link_lost"} 1.0' in text
    assert 'computemesh_peer_failures_total{code="other"} 4.0' in text
    assert 'computemesh_peer_refusals_total{code="other"} 1.0' in text
    assert 'computemesh_peer_transfers_total{kind="read",outcome="other"} 1.0' in text
    assert 'computemesh_peer_transfer_bytes_total{transport="shm+tcp"} 4.0' in text


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (transfer("t-1", alias="nobody"), "not_found"),
        (transfer("t-1", scope="other"), "not_found"),
        (transfer("t-1", pieces=[Piece(local="none", length=1)]), "no_region"),
        (transfer("t-1", offset=5), "out_of_range"),
        (transfer("t-1", length=2**63 - 1, offset=2**63 - 1), "out_of_range"),
    ],
)
async def test_a_transfer_that_cannot_be_is_refused_before_it_begins(
    mesh: RunningMesh, attach: Attach, wanted: Transfer, code: str
) -> None:
    """Nobody is told to do it, and the id is free."""
    a = await attach("a")
    await a.ask(PutRegion(name="kv", length=8, epoch=1))
    assert await order(mesh, wanted) == code
    assert a.told == []
    assert await order(mesh, transfer("t-1")) == "running"


async def test_a_transfer_that_the_process_does_not_take_may_be_asked_for_again(
    mesh: RunningMesh, attach: Attach
) -> None:
    """Its refusal is the answer."""
    a = await attach("a")
    await a.ask(PutRegion(name="kv", length=8, epoch=1))
    a.begins = False
    assert await order(mesh, transfer("t-1")) == "no_region"
    a.begins = True
    assert await order(mesh, transfer("t-1")) == "running"


async def test_transfers_end_with_their_process_and_when_their_time_is_over(
    mesh: RunningMesh, attach: Attach, tmp_path: Path
) -> None:
    """Each end is told, with the reason; more than the node takes are refused."""
    watched = Watched()
    await watched.start(mesh)
    async with (
        another_node(mesh, tmp_path, COMPUTEMESH_PEER_TRANSFERS_MAX="2") as (far, agent),
        killable(far, "victim") as victim,
    ):
        a = await attach("a", path=far)
        await a.ask(PutRegion(name="kv", length=8, epoch=1))
        assert await order(mesh, transfer("t-late", timeout_s=0.1), "n2") == "running"
        assert await order(mesh, transfer("t-killed", alias="victim"), "n2") == "running"
        assert await order(mesh, transfer("t-many"), "n2") == "too_many_requests"
        victim.kill()
        await until(lambda: watched.of("t-killed"), what="the end of the process is the end of its transfer")
        await until(lambda: watched.of("t-late"), what="a transfer has a time")
        assert [(one.ok, one.code) for one in watched.of("t-killed")] == [(False, "no_peer")]
        assert [(one.ok, one.code) for one in watched.of("t-late")] == [(False, "timed_out")]
        assert await order(mesh, transfer("t-killed", alias="victim"), "n2") == "failed", "though its process is gone"
        assert await order(mesh, transfer("t-drain", timeout_s=60), "n2") == "running"
        a.end.tell(Ended(outcome=watched.of("t-late")[0]))  # It comes too late, and is not told again.
        agent.send_signal(signal.SIGTERM)
        await until(lambda: not far.exists(), what="it takes no further process")
        done = Transferred(transfer_id="t-drain", node_id="n2", alias="a", peer="b", kind="read", ok=True, at=1.0)
        a.end.tell(Ended(outcome=done))
        await until(lambda: watched.of("t-drain"), what="what runs may end while the peer-agent drains")
        assert await asyncio.to_thread(agent.wait, WAIT_S) == 0
    assert sorted((one.transfer_id, one.ok) for one in watched.ended) == [
        ("t-drain", True),
        ("t-killed", False),
        ("t-late", False),
    ]


# --- the socket ---------------------------------------------------------------------------------------------------


class Raw:
    """A program that knows nothing of us but the page about it."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(path))

    def say(self, frame: Any, size: int | None = None) -> None:
        body = frame if isinstance(frame, bytes) else json.dumps(frame).encode()
        self.sock.sendall((len(body) if size is None else size).to_bytes(4, "big") + body)

    def hear(self) -> Any:
        head = self._exactly(4)
        return json.loads(self._exactly(int.from_bytes(head, "big"))) if head else None

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                return b""
            data += piece
        return data


async def test_what_cannot_be_understood_is_refused_and_names_the_field(mesh: RunningMesh) -> None:
    """The connection goes on, unless nothing that follows could be read."""

    def talk() -> None:
        raw = Raw(mesh.home.run / "peer-agent.sock")
        exchanges = [
            ({"id": 1, "ask": {"kind": "list_peers"}}, "ask.kind"),
            ({"id": 2, "ask": {"kind": "hello", "protocol": 9}}, "ask.protocol"),
        ]
        raw.say(exchanges[0][0])
        assert raw.hear()["refused"]["field"] == "ask.kind"
        raw.say(exchanges[1][0])
        assert raw.hear()["refused"]["field"] == "ask.protocol"
        assert raw.hear() is None, "who is not taken is cut off"
        raw = Raw(mesh.home.run / "peer-agent.sock")
        raw.say({"id": 1, "ask": {"kind": "hello", "alias": "raw"}})
        assert raw.hear()["answer"]["alias"] == "raw"
        for question, field in [
            ({"id": 2, "ask": {"kind": "dance"}}, "ask.kind"),
            ({"id": 3, "ask": {"kind": "hello"}}, "ask.kind"),
            ({"id": 4, "ask": {"kind": "put_region", "name": "kv", "length": -1, "epoch": 1}}, "ask.length"),
            ({"id": 5, "ask": {"kind": "put_epochs"}}, "ask.fds"),
            ({"id": 6, "ask": {"kind": "lost", "peer": "b"}}, "ask.kind"),
            ({"id": 7, "ask": {"kind": "call", "peer": "b", "body": {"kind": "sing"}}}, "ask.body.kind"),
            ({"id": 8, "ask": {"kind": "hosted_transfer"}}, "ask.transfer"),
        ]:
            raw.say(question)
            said = raw.hear()
            assert (said["id"], said["refused"]["code"], said["refused"]["field"]) == (
                question["id"],
                "bad_message",
                field,
            )
        raw.say(b"no json")
        assert raw.hear()["refused"]["code"] == "bad_message"
        raw.say({"id": 9, "ask": {"kind": "list_peers"}})
        assert raw.hear()["answer"] == {"kind": "aliases", "aliases": ["raw"]}
        raw.say(b"", size=FRAME_MAX + 1)
        assert "may be sent" in raw.hear()["refused"]["reason"]
        assert raw.hear() is None

    await asyncio.to_thread(talk)

    async def gone() -> bool:
        return await listed(mesh) == {}

    await eventually(gone, what="who was cut off is gone")
    text = await fetched(mesh, "/metrics")
    assert 'computemesh_peer_refusals_total{code="bad_message"}' in text


async def test_only_the_owner_may_enter(mesh: RunningMesh) -> None:
    """By the rights of the folder and of the socket; and by who is at the other end, if these were opened."""
    path = mesh.home.run / "peer-agent.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    if os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    source = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "folder = os.open(os.path.dirname(sys.argv[1]), os.O_PATH)\n"
        "os.setuid(65534)\n"
        "sock.connect(f'/proc/self/fd/{folder}/peer-agent.sock')\n"
        'sock.sendall(b\'\\0\\0\\0\\x1d\' + b\'{"id":1,"ask":{"kind":"hello"}}\')\n'
        "print(sock.recv(1000))\n"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, check=False)

    refused = await asyncio.to_thread(other)
    assert "PermissionError" in refused.stderr
    path.chmod(0o666)
    path.parent.chmod(0o711)
    cut_off = await asyncio.to_thread(other)
    assert cut_off.stdout.strip() == "b''" or "ConnectionResetError" in cut_off.stderr or "BrokenPipe" in cut_off.stderr
    assert any("refused a process of another user" in line for line in mesh.lines)


async def test_a_second_peer_agent_in_the_same_home_says_so(mesh: RunningMesh) -> None:
    """And leaves the first one's socket alone."""
    environment = {
        **os.environ,
        "NATS_URL": mesh.url(Role.NODE),
        "COMPUTEMESH_NODE_ID": "n1",
        "COMPUTEMESH_HOME": str(mesh.home.root),
    }
    command = [sys.executable, "-m", "computemesh_services.peer_agent"]
    second = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert second.returncode != 0
    assert "another peer-agent listens at" in second.stdout
    raw = Raw(mesh.home.run / "peer-agent.sock")
    raw.sock.close()


async def test_what_the_library_moves_shows_in_the_numbers_of_its_node(mesh: RunningMesh) -> None:
    """No byte of it passed the peer-agent, which is told at the end at the latest."""
    path = mesh.home.run / "peer-agent.sock"

    def move() -> None:
        with start_peer_agent(path, alias="a") as a, start_peer_agent(path, alias="b") as b:
            for agent in (a, b):
                agent.allocate_memory_region("kv", 4096)
            a.connect_to("b").wait(WAIT_S)
            a.read("b", ("kv", 0, 0, 4096)).wait(WAIT_S)
            a.write("b", ("kv", 0, 0, 96)).wait(WAIT_S)

    await asyncio.to_thread(move)

    async def shown() -> bool:
        text = await fetched(mesh, "/metrics")
        return all(
            f'computemesh_peer_order_bytes_total{{kind="{kind}",transport="shm"}} {moved}' in text
            for kind, moved in (("read", "4096.0"), ("write", "96.0"))
        )

    await eventually(shown, what="the bytes are counted")
