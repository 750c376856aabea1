"""Two peers as programs see them, with a control plane and a peer-agent: they find each other by NATS, and the bytes
go by RDMA, from rxe0 to rxe1 or back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from computemesh.nats_server import NatsServer
from computemesh.peer import PeerAgent, PeerError, start_peer_agent
from computemesh.peer.errors import LINK_LOST, OUT_OF_RANGE
from computemesh.peer.signals import SOCKET_NAME
from computemesh.testing import mesh as testing_mesh
from computemesh.testing import running_mesh
from tests.rdma.agent import PATTERN, SIZE

pytestmark = pytest.mark.rdma

HERE = Path(__file__).parent
SLOW_S = 400.0
"""How long things may take where every instruction is emulated."""


class Program:
    """See `agent.py`."""

    def __init__(self, path: Path, alias: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "agent.py"), str(path), alias],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.answer() == "ready"

    def __call__(self, do: str, **said: Any) -> Any:
        self.begin(do, **said)
        return self.answer()

    def begin(self, do: str, **said: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **said}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        assert not line.startswith('{"error"'), line
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """The socket of a peer-agent."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = running_mesh(tmp_path_factory.mktemp("peers"), ["control-plane", "peer-agent"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(testing_mesh, "WAIT_S", SLOW_S)
        terms = NatsServer.__init__.__kwdefaults__
        assert terms is not None
        patched.setitem(terms, "ready_timeout_s", SLOW_S)
        try:
            mesh = asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result(SLOW_S)
            yield mesh.home.run / SOCKET_NAME
            asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result(SLOW_S)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@pytest.fixture
def a(path: Path) -> Generator[PeerAgent]:
    with start_peer_agent(path, alias="a", device="rxe0") as agent:
        yield agent


def test_two_agents_move_bytes_by_rdma_and_go_on_after_one_was_killed(a: PeerAgent, path: Path) -> None:
    b = Program(path, "b")
    try:
        memory = bytearray(SIZE)
        a.register_memory_region("kv", memory)
        conn = a.connect_to("b", local_device="rxe0", peer_device="rxe1", qp_num=2).wait(SLOW_S)
        assert conn.transport == "rdma"
        assert (conn.local_nic, conn.remote_nic) == ("rxe0", "rxe1")
        assert b("connections", peer="a") == ["rdma"]
        theirs = a.get_resource("b")
        assert theirs is not None
        assert theirs["nics"][0]["name"] == "rxe1"
        assert theirs["nics"][0]["ports"][0]["active_mtu"] == 4096

        assert a.read("b", [("kv", 7, 0, SIZE - 7)]).wait(SLOW_S) == 0
        assert memory[7:] == PATTERN[: SIZE - 7]
        memory[:100] = bytes(reversed(range(100)))
        assert a.write("b", [("kv", 0, 3 << 20, 100)]).wait(SLOW_S) == 0
        assert b("peek", offset=3 << 20, length=100) == bytes(reversed(range(100))).hex()

        b.begin("imm", peer="a")
        assert a.write_with_imm("b", [("kv", 0, 4 << 20, 50)], imm_data=-77).wait(SLOW_S) == 0
        assert b.answer() == -77
        assert b("peek", offset=4 << 20, length=50) == bytes(memory[:50]).hex()

        for length in (20, 100_000):
            b.begin("recv", peer="a", length=length)
            a.send("b", PATTERN[:length]).wait(SLOW_S)
            assert b.answer() == PATTERN[:length].hex()
            into = bytearray(length)
            b.begin("send", peer="a", length=length)
            a.recv("b", into).wait(SLOW_S)
            assert b.answer() is not None
            assert into == PATTERN[:length]

        with pytest.raises(PeerError) as error:
            a.read("b", [("kv", 0, SIZE - 4, 5)]).wait(SLOW_S)
        assert error.value.code == OUT_OF_RANGE

        future = a.read("b", [("kv", 0, 0, SIZE)] * 8)
        b.kill()
        with pytest.raises(PeerError) as error:
            future.wait(60)
        assert error.value.code == LINK_LOST
        assert conn.state == "failed"

        b = Program(path, "b")
        again = a.connect_to("b", local_device="rxe0", peer_device="rxe1").wait(SLOW_S)
        assert again.transport == "rdma"
        memory[:] = bytes(SIZE)
        assert a.read("b", [("kv", 0, 0, 100_000)]).wait(SLOW_S) == 0
        assert memory[:100_000] == PATTERN[:100_000]
    finally:
        b.kill()
