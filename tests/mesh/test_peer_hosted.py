"""Processes for which the peer-agent moves the bytes, and transfers that are ordered over the bus, with real bytes."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from computemesh.contracts import peers
from computemesh.contracts.base import Refused
from computemesh.contracts.peers import PeersList, Piece, Transfer, TransferBegun, Transferred
from computemesh.peer.agent import PeerAgent, start_peer_agent
from computemesh.peer.errors import PeerError
from computemesh.peer.signals import (
    Aliases,
    Done,
    DropRegion,
    Hello,
    HostedTransfer,
    HostedTransferred,
    ListPeers,
    PutEpochs,
    PutRegion,
)
from computemesh.peer.socket import AgentSocket
from computemesh.testing import RunningMesh, running_mesh, until
from tests.mesh.peer_nodes import another_node

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "peers" / "hosted.py"
WAIT_S = 30.0
SIZE = 1 << 20


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """A control plane and the peer-agent of node n1."""
    async with running_mesh(tmp_path, ["control-plane", "peer-agent"]) as running:
        yield running


def where(mesh: RunningMesh) -> Path:
    return mesh.home.run / "peer-agent.sock"


class Program:
    """A process that moves no bytes itself, with one region `kv`."""

    def __init__(self, path: Path, alias: str, content: bytes, size: int = 0, **put: Any) -> None:
        """
        Args:
            size: of the region, if that is more than its content; zeros follow.
        """
        self.alias = alias
        self.end = AgentSocket(path, Hello(alias=alias, hosted=True), on_told=lambda _: None)
        self.fd = os.memfd_create(alias, os.MFD_ALLOW_SEALING)
        os.write(self.fd, content)
        self.size = size or len(content)
        os.ftruncate(self.fd, self.size)
        self.end.ask(PutRegion(name="kv", length=self.size, epoch=1, fds=1, **put), [self.fd])

    @property
    def content(self) -> bytes:
        with mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ) as memory:
            return memory[:]

    def move(self, peer: str, **said: Any) -> Transferred:
        answer, _ = self.end.ask(HostedTransfer(transfer=transfer(self.alias, peer, self.size, **said)))
        assert isinstance(answer, HostedTransferred)
        return answer.outcome

    def close(self) -> None:
        self.end.close()
        os.close(self.fd)


def transfer(alias: str, peer: str, length: int, **said: Any) -> Transfer:
    whole: dict[str, Any] = {
        "transfer_id": "t-1",
        "alias": alias,
        "peer": peer,
        "kind": "read",
        "pieces": [Piece(local="kv", length=length)],
    }
    whole.update(said)
    return Transfer(**whole)


@asynccontextmanager
async def programs(mesh: RunningMesh, *aliases: str, **put: Any) -> AsyncGenerator[list[Program]]:
    """Hosted processes, each with a megabyte of its own."""
    made: list[Program] = []
    try:
        for number, alias in enumerate(aliases):
            content = bytes([65 + number]) * SIZE
            made.append(await asyncio.to_thread(Program, where(mesh), alias, content, **put))
        yield made
    finally:
        for one in made:
            await asyncio.to_thread(one.close)


@asynccontextmanager
async def library(mesh: RunningMesh, alias: str, scope: str = "") -> AsyncGenerator[PeerAgent]:
    """A process with the library: the test's own."""
    agent = await asyncio.to_thread(start_peer_agent, str(where(mesh)), alias=alias, scope=scope or None)
    try:
        yield agent
    finally:
        await asyncio.to_thread(agent.shutdown)


async def test_a_program_without_our_library_reads_a_peers_memory(mesh: RunningMesh) -> None:
    """The one on the page about peers, word for word."""
    async with library(mesh, "worker-a", "job-123") as agent:
        memory = agent.allocate_memory_region("kv", 4096)
        memory.view[:16] = b"0123456789abcdef"
        environment = {**os.environ, "COMPUTEMESH_PEER_SOCKET": str(where(mesh))}

        def run(peer: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, str(EXAMPLE), peer]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        good = await asyncio.to_thread(run, "worker-a")
        assert (good.stderr, good.stdout) == ("", "True ['shm'] 4096 \nb'0123456789abcdef'\n")
        bad = await asyncio.to_thread(run, "nobody")
        assert bad.stdout.startswith("False [] 0 ")
        assert "nobody" in bad.stdout

        async def alone() -> bool:
            found = await (await mesh.bus()).ask(peers.LIST, PeersList(scope="job-123"))
            return not isinstance(found, Refused) and [one.alias for one in found.peers] == ["worker-a"]

        async with asyncio.timeout(WAIT_S):
            while not await alone():
                await asyncio.sleep(0.02)
        memory.close()


async def test_hosted_processes_read_and_write_each_other_and_are_read_by_others(mesh: RunningMesh) -> None:
    """Bytes are compared, and sums told."""
    async with programs(mesh, "a", "b") as (a, b), library(mesh, "lib") as agent:
        read = await asyncio.to_thread(a.move, "b", checksums=True)
        assert (read.ok, read.transports, read.bytes, read.code) == (True, ["shm"], SIZE, "")
        assert read.checksums == [f"{zlib.crc32(b'B' * SIZE):08x}"]
        assert a.content == b"B" * SIZE
        piece = Piece(local="kv", local_offset=0, remote_offset=100, length=50)
        write = await asyncio.to_thread(b.move, "a", kind="write", pieces=[piece])
        assert (write.ok, write.bytes) == (True, 50)
        mine = bytearray(SIZE)

        def by_library() -> None:
            agent.register_memory_region("kv", mine)
            agent.connect_to("a").wait(WAIT_S)
            agent.read("a", [("kv", 0, 0, SIZE)]).wait(WAIT_S)

        await asyncio.to_thread(by_library)
        assert mine == b"B" * SIZE
        mine[:4] = b"mine"
        back = await asyncio.to_thread(a.move, "lib")
        assert back.ok, "private memory goes by TCP"
        assert a.content == b"mine" + b"B" * (SIZE - 4)


async def test_a_transfer_ordered_over_the_bus_moves_bytes_and_tells_its_end(mesh: RunningMesh) -> None:
    """For a hosted process and for one that moves its bytes itself; with sums that are wrong it fails."""
    ended: dict[str, Transferred] = {}

    async def on_ended(one: Transferred) -> None:
        assert one.transfer_id not in ended
        ended[one.transfer_id] = one

    bus = await mesh.bus()
    await bus.subscribe(peers.TRANSFERRED, on_ended)

    async def order(transfer_id: str, alias: str, peer: str, **said: Any) -> Transferred:
        answer = await bus.ask(peers.TRANSFER, transfer(alias, peer, 16, transfer_id=transfer_id, **said), target="n1")
        assert isinstance(answer, TransferBegun), answer
        await until(lambda: transfer_id in ended, what=f"{transfer_id} ends")
        return ended[transfer_id]

    async with programs(mesh, "a", "b") as (a, _), library(mesh, "lib") as agent:
        mine = bytearray(b"0123456789abcdef")
        await asyncio.to_thread(agent.register_memory_region, "kv", mine)
        assert (await order("t-1", "a", "b")).ok
        assert a.content == b"B" * 16 + b"A" * (SIZE - 16)
        sums = [Piece(local="kv", length=16, checksum=f"{zlib.crc32(mine):08x}")]
        first = await order("t-2", "a", "lib", pieces=sums)
        assert (first.ok, first.alias, first.node_id, first.bytes) == (True, "a", "n1", 16)
        assert a.content[:16] == mine
        assert (await order("t-3", "lib", "b")).ok
        assert mine == b"B" * 16
        wrong = await order("t-4", "a", "lib", pieces=sums)
        assert (wrong.ok, wrong.code) == (False, "bad_checksum")
        stale = await order("t-5", "a", "lib", pieces=[Piece(local="kv", length=16, epoch=1)])
        assert (stale.ok, stale.code) == (False, "stale_epoch")
        nobody = await order("t-6", "a", "nobody")
        assert not nobody.ok
        assert "nobody" in nobody.reason


async def test_memory_of_a_hosted_process_is_what_it_says(mesh: RunningMesh, tmp_path: Path) -> None:
    """Refusals name the field; what a peer may only read it cannot write; what is dropped cannot be reached."""
    async with programs(mesh, "a") as (a,), programs(mesh, "ro", writable=False) as (ro,):

        def refusals() -> None:
            file = (tmp_path / "file").open("wb+")
            file.write(b"x" * 64)
            file.flush()
            cases: list[tuple[PutRegion | PutEpochs, list[int], str]] = [
                (PutRegion(name="x", length=64, epoch=1), [], "fds"),
                (PutRegion(name="x", length=64, epoch=1, fds=1), [file.fileno()], "fds"),
                (PutRegion(name="x", length=SIZE + 1, epoch=1, fds=1), [a.fd], "fds"),
                (PutRegion(name="x", length=1, epoch=1, tokens={"shm": {"offset": -1}}, fds=1), [a.fd], "tokens"),
                (PutEpochs(), [a.fd], "kind"),
            ]
            for question, fds, field in cases:
                with pytest.raises(PeerError, match=f"^{field}[.:]"):
                    a.end.ask(question, fds)
            file.close()
            with pytest.raises(PeerError, match=r"^transfer\.alias: "):
                a.end.ask(HostedTransfer(transfer=transfer("ro", "a", 1)))
            with pytest.raises(PeerError, match=r"^transfer\.pieces\[0\]\.local_offset: "):
                a.move("ro", pieces=[Piece(local="kv", length=SIZE + 1)])
            outcome = a.move("ro", kind="write")
            assert (outcome.ok, outcome.code) == (False, "read_only")
            assert ro.content == b"A" * SIZE
            assert ro.end.ask(DropRegion(name="kv", epoch=9))[0] == Done(found=False)
            assert ro.end.ask(DropRegion(name="kv", epoch=1))[0] == Done()
            outcome = a.move("ro")
            assert not outcome.ok
            assert outcome.code in ("no_region", "stale_epoch")
            a.end.ask(ListPeers())

        await asyncio.to_thread(refusals)


async def test_hosted_processes_come_back_when_the_peer_agent_was_killed(mesh: RunningMesh) -> None:
    """With their memory; its connections are made anew."""
    async with programs(mesh, "a", "b") as (a, b):
        assert (await asyncio.to_thread(a.move, "b")).ok
        pid = mesh.pid("peer-agent")
        mesh.kill("peer-agent")
        await until(lambda: mesh.pid("peer-agent") not in (0, pid), what="it was started again")
        for one in (a, b):
            await asyncio.to_thread(one.end.ask, ListPeers())
        os.pwrite(b.fd, b"fresh", 0)
        again = await asyncio.to_thread(a.move, "b")
        assert (again.ok, again.code, again.reason) == (True, "", "")
        assert a.content[:5] == b"fresh"


async def test_hosted_processes_of_two_nodes_move_bytes_by_tcp(mesh: RunningMesh, tmp_path: Path) -> None:
    """Both ways and from both sides, though only one of the nodes has an address; the bytes are compared."""
    async with another_node(mesh, tmp_path, COMPUTEMESH_PEER_HOST="127.0.0.1") as (far, _):
        a = await asyncio.to_thread(Program, where(mesh), "a", b"A" * SIZE)
        b = await asyncio.to_thread(Program, far, "b", b"B" * SIZE)
        try:
            half = [Piece(local="kv", local_offset=0, remote_offset=SIZE // 2, length=SIZE // 2)]
            read = await asyncio.to_thread(a.move, "b", pieces=half, checksums=True)
            assert (read.ok, read.transports, read.bytes, read.code) == (True, ["tcp"], SIZE // 2, "")
            assert read.checksums == [f"{zlib.crc32(b'B' * (SIZE // 2)):08x}"]
            assert a.content == b"B" * (SIZE // 2) + b"A" * (SIZE // 2)
            assert b.content == b"B" * SIZE
            os.pwrite(a.fd, b"from a", 0)
            write = await asyncio.to_thread(a.move, "b", kind="write")
            assert (write.ok, write.transports, write.bytes) == (True, ["tcp"], SIZE)
            assert b.content == a.content
            os.pwrite(a.fd, b"once more", SIZE - 9)
            back = await asyncio.to_thread(b.move, "a")
            assert (back.ok, back.transports) == (True, ["tcp"])
            assert b.content == a.content
            beyond = await asyncio.to_thread(b.move, "a", pieces=[Piece(local="kv", remote_offset=1, length=SIZE)])
            assert (beyond.ok, beyond.code) == (False, "out_of_range")
        finally:
            for one in (a, b):
                await asyncio.to_thread(one.close)


async def test_a_transfer_fails_in_time_when_the_other_nodes_peer_agent_is_killed_in_the_middle_of_it(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """The hosted peer dies with it. In its next life the same process is reached again, with its memory."""
    size = 128 << 20
    a = await asyncio.to_thread(Program, where(mesh), "a", b"", size)
    async with another_node(mesh, tmp_path, COMPUTEMESH_PEER_HOST="127.0.0.1") as (far, agent):
        b = await asyncio.to_thread(Program, far, "b", b"B" * SIZE, size)
        os.pwrite(b.fd, b"end", size - 3)
        with mmap.mmap(a.fd, size, prot=mmap.PROT_READ) as memory:
            moving = asyncio.create_task(asyncio.to_thread(a.move, "b", timeout_s=60))
            while memory[0] == 0:  # No pause: there is little time between its first byte and its last one.
                await asyncio.sleep(0)
            agent.send_signal(signal.SIGSTOP)
            await until(lambda: b"T" in Path(f"/proc/{agent.pid}/stat").read_bytes().split()[2], what="it is stopped")
            assert memory[size - 3 :] == bytes(3), "it was in the middle"
        assert not moving.done()
        agent.kill()
        async with asyncio.timeout(10):
            outcome = await moving
        assert (outcome.ok, outcome.code) == (False, "link_lost")
    async with another_node(mesh, tmp_path, COMPUTEMESH_PEER_HOST="127.0.0.1"):
        await asyncio.to_thread(b.end.ask, ListPeers())
        again = await asyncio.to_thread(a.move, "b", timeout_s=60)
        assert (again.ok, again.code, again.reason, again.bytes) == (True, "", "", size)
        assert os.pread(a.fd, 3, size - 3) == b"end"
        for one in (a, b):
            await asyncio.to_thread(one.close)


async def test_transfers_that_hang_hold_up_their_own_process_alone(mesh: RunningMesh) -> None:
    """Others come, move bytes and go, however many wait for a peer that answers nothing."""
    async with library(mesh, "lib") as agent:
        agent.allocate_memory_region("kv", SIZE)
        source = (
            "import sys\n"
            "from computemesh.peer import start_peer_agent\n"
            "agent = start_peer_agent(sys.argv[1], alias='halted')\n"
            "agent.allocate_memory_region('kv', 64)\n"
            "print('ready', flush=True)\n"
            "sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", source, str(where(mesh))]
        halted = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert halted.stdout is not None
            assert await halted.stdout.readline() == b"ready\n"
            async with programs(mesh, "many") as (many,):
                halted.send_signal(signal.SIGSTOP)
                pieces = [Piece(local="kv", length=64)]

                def hang(number: int) -> None:
                    many.move("halted", transfer_id=f"t-{number}", pieces=pieces)

                waiting = [threading.Thread(target=hang, args=(number,)) for number in range(100)]
                for thread in waiting:
                    thread.start()
                async with programs(mesh, "a", "b") as (a, b):
                    assert (await asyncio.to_thread(a.move, "b")).ok
                    assert (await asyncio.to_thread(b.move, "lib")).ok
                    await asyncio.to_thread(b.end.close)

                    async def gone() -> bool:
                        return (await asyncio.to_thread(a.end.ask, ListPeers()))[0] == Aliases(
                            aliases=["a", "halted", "lib", "many"]
                        )

                    async with asyncio.timeout(WAIT_S):
                        while not await gone():
                            await asyncio.sleep(0.02)
                assert all(thread.is_alive() for thread in waiting), "nobody waited for these"
                halted.kill()
                for thread in waiting:
                    await asyncio.to_thread(thread.join)
        finally:
            with contextlib.suppress(ProcessLookupError):
                halted.kill()
            await halted.wait()


async def test_hosted_processes_that_come_and_go_leave_nothing_behind(mesh: RunningMesh) -> None:
    """Neither descriptors nor threads of the peer-agent."""
    pid = mesh.pid("peer-agent")

    def kept(what: str) -> int:
        return len(list(Path(f"/proc/{pid}/{what}").iterdir()))

    async def once() -> None:
        async with programs(mesh, "a", "b") as (a, _):
            assert (await asyncio.to_thread(a.move, "b")).ok

    fds = kept("fd")
    for _ in range(5):
        await once()
    await until(lambda: kept("fd") <= fds, what="descriptors are closed")
    threads = kept("task")
    for _ in range(5):
        await once()
    await until(lambda: kept("task") <= threads + 2, what="threads end, but for those that are used again")
