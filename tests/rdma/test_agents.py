"""Two peers as programs see them, with a control plane and a peer-agent, in two processes: they find each other over
NATS, and the bytes go by RDMA from one interface to the other."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from computemesh.peer import PeerAgent, PeerConnection, PeerError, start_peer_agent
from computemesh.peer.errors import LINK_LOST, NO_REGION, OUT_OF_RANGE
from computemesh.peer.rdma.notes import SMALL
from computemesh.peer.signals import SOCKET_NAME
from computemesh.testing import mesh as testing_mesh
from computemesh.testing import running_mesh
from tests.mesh import agent_process
from tests.mesh.agent_process import PATTERN, SIZE
from tests.mesh.test_peers import Program, code_of

pytestmark = pytest.mark.rdma

SLOW_S = 300.0
"""How long things may take where every instruction is emulated."""
UNHURRIED = {
    "COMPUTEMESH_HEARTBEAT_INTERVAL_S": "2",
    "COMPUTEMESH_SUSPECT_AFTER_S": "30",
    "COMPUTEMESH_LOST_AFTER_S": "60",
}


async def test_two_agents_move_bytes_by_rdma_are_refused_what_is_not_theirs_and_go_on_after_one_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, since a mesh takes most of a minute to start here."""
    monkeypatch.setattr(testing_mesh, "WAIT_S", SLOW_S)
    async with running_mesh(tmp_path, ["control-plane", "peer-agent"], environment=UNHURRIED) as mesh:
        await asyncio.to_thread(everything, mesh.home.run / SOCKET_NAME)


def everything(path: Path) -> None:
    with start_peer_agent(path, alias="a", device="rxe0") as a:
        memory = bytearray(SIZE)
        a.register_memory_region("kv", memory)
        with program(path) as b:
            facts(a, b)
            reads_and_writes(a, b, memory)
            numbers_and_messages(a, b)
            refusals(a, b, memory)
            death(a, b, memory)
        with program(path) as b:
            memory[:] = bytes(SIZE)
            assert connected(a).transport == "rdma"
            assert a.read("b", ("kv", 0, 0, SIZE)).wait(SLOW_S) == 0
            assert memory == PATTERN


@contextmanager
def program(path: Path) -> Generator[Program]:
    found = Program([sys.executable, agent_process.__file__, str(path), "", "b", "rxe1"])
    try:
        assert found.answer() == "ready"
        yield found
    finally:
        found.kill()


def connected(a: PeerAgent) -> PeerConnection:
    return a.connect_to("b", local_device="rxe0", peer_device="rxe1", qp_num=2).wait(SLOW_S)


def facts(a: PeerAgent, b: Program) -> None:
    conn = connected(a)
    assert (conn.transport, conn.local_nic, conn.remote_nic) == ("rdma", "rxe0", "rxe1")
    assert b("connections", peer="a") == ["rdma"]
    theirs = a.get_resource("b")
    assert theirs is not None
    assert [nic["name"] for nic in theirs["nics"]] == ["rxe1", "rxe0"]
    assert theirs["nics"][0]["ports"][0]["active_mtu"] == 4096
    there = a.get_mr_info("kv", peer_alias="b")
    assert there is not None
    assert "rdma" in there["transports"]


def reads_and_writes(a: PeerAgent, b: Program, memory: bytearray) -> None:
    a.register_memory_region("private", memory)  # of the peer's, `kv` is shared memory and `private` is its own
    for name in ("kv", "private"):
        memory[:] = bytes(SIZE)
        reading = a.read("b", [(name, 7, 0, SIZE - 7), (name, 0, SIZE - 7, 7)])
        assert reading.wait(SLOW_S) == 0
        assert reading.transport == "rdma"
        assert memory == PATTERN[SIZE - 7 :] + PATTERN[: SIZE - 7]
        memory[:100] = bytes(range(100))
        assert a.write("b", (name, 0, 1000, 100)).wait(SLOW_S) == 0
        written = bytes.fromhex(b("peek", name=name, offset=0, length=SIZE))
        assert written == PATTERN[:1000] + bytes(range(100)) + PATTERN[1100:]


def numbers_and_messages(a: PeerAgent, b: Program) -> None:
    b.begin("imm", peer="a")
    assert a.write_with_imm("b", ("kv", 0, 0, 50), imm_data=-77).wait(SLOW_S) == 0
    assert b.answer() == -77
    assert bytes.fromhex(b("peek", name="kv", offset=0, length=50)) == bytes(range(50))
    for length in (20, 5 * SMALL):  # a message that is sent, and one that is fetched
        b.begin("recv", peer="a", length=length)
        a.send("b", PATTERN[:length]).wait(SLOW_S)
        assert bytes.fromhex(b.answer()) == PATTERN[:length]
        into = bytearray(length)
        b.begin("send", peer="a", length=length)
        a.recv("b", into).wait(SLOW_S)
        assert b.answer() == 0
        assert into == PATTERN[:length]


def refusals(a: PeerAgent, b: Program, memory: bytearray) -> None:
    conn = connected(a)
    before = bytes(memory)
    assert code_of(lambda: a.read("b", ("kv", 0, SIZE - 4, 5)).wait(SLOW_S)) == OUT_OF_RANGE
    assert code_of(lambda: a.read("b", ("none", 0, 0, 5)).wait(SLOW_S)) == NO_REGION
    assert conn.is_connected()
    # A program that means ill: it says another key than the one it was told.
    there = conn.remotes["kv"]["rdma"]
    token = dict(there.token)
    token["keys"] = {name: key ^ 0x5500 for name, key in token["keys"].items()}
    conn.remotes["kv"]["rdma"] = dataclasses.replace(there, token=token)
    conn.routes.clear()
    assert code_of(lambda: a.read("b", ("kv", 0, 0, 1000)).wait(SLOW_S)) == LINK_LOST
    until_failed(conn)
    assert memory == before
    again = connected(a)
    assert again is not conn
    assert a.read("b", ("kv", 0, 2000, 1000)).wait(SLOW_S) == 0
    assert memory[:1000] == PATTERN[2000:3000]
    assert b("connections", peer="a") == ["rdma"]


def death(a: PeerAgent, b: Program, memory: bytearray) -> None:
    conn = connected(a)
    memory[:] = bytes(SIZE)
    reading = a.read("b", [("kv", 0, 0, SIZE)] * 4000)
    end = time.monotonic() + SLOW_S
    while not any(memory[:100]):  # until the first bytes have come
        assert time.monotonic() < end
    b.kill()
    began = time.monotonic()
    with pytest.raises(PeerError) as error:
        reading.wait(60)
    assert error.value.code == LINK_LOST
    assert time.monotonic() - began < 30
    until_failed(conn)


def until_failed(conn: PeerConnection) -> None:
    """What was under way hears first that its link is lost, then the connection does."""
    end = time.monotonic() + SLOW_S
    while conn.state != "failed":
        assert time.monotonic() < end, conn.state
        time.sleep(0.01)
