"""Peers as programs see them: a control plane, a peer-agent, and processes that move bytes and are killed.

Among these tests are the faults that were found in DLSlime 0.1.23 when it was run: each has one that shows that it is
not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from computemesh.peer import PeerAgent, PeerError, start_async_peer_agent, start_peer_agent
from computemesh.peer.errors import ALIAS_TAKEN, CLOSED, LINK_LOST, NO_AGENT, OTHER_MESH, OUT_OF_RANGE, UNAVAILABLE
from computemesh.peer.signals import SOCKET_NAME
from computemesh.testing import RunningMesh, running_mesh
from tests.mesh.agent_process import PATTERN, SIZE

HERE = Path(__file__).parent
WAIT_S = 30.0
TRANSPORTS = pytest.mark.parametrize("transport", ["auto", "tcp"])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningMesh]:
    """A control plane and a peer-agent. Its supervisor has a loop of its own, since most of these tests block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = running_mesh(tmp_path_factory.mktemp("peers"), ["control-plane", "peer-agent"])
    try:
        found = asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result(WAIT_S)
        _loops[found] = loop
        yield found
        asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result(WAIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


_loops: dict[RunningMesh, asyncio.AbstractEventLoop] = {}


class Place:
    """Starts agents in this process and in others, all of one peer-agent and one scope."""

    def __init__(self, path: Path, scope: str) -> None:
        self.path, self.scope = path, scope
        self.agents: list[PeerAgent] = []

    def agent(self, alias: str | None = None) -> PeerAgent:
        agent = start_peer_agent(self.path, alias=alias, scope=self.scope)
        self.agents.append(agent)
        return agent

    @contextmanager
    def process(self, alias: str) -> Generator[Program]:
        program = Program([sys.executable, str(HERE / "agent_process.py"), str(self.path), self.scope, alias])
        try:
            assert program.answer() == "ready"
            yield program
        finally:
            program.kill()


class Program:
    """A peer in a process of its own: see `agent_process.py`."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

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
        answer: Any = json.loads(line)
        assert '"error":' not in line, answer
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture(params=["job-1", ""], ids=["scope", "no-scope"])
def place(mesh: RunningMesh, request: pytest.FixtureRequest) -> Generator[Place]:
    found = Place(mesh.home.run / SOCKET_NAME, request.param)
    yield found
    for agent in found.agents:
        agent.shutdown()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(PeerError) as caught:
        call()
    return caught.value.code


SEED_EXAMPLE = """
import torch
from computemesh.peer import start_peer_agent

scope = "peeragent-api-demo"

initiator = start_peer_agent(nanoctrl_url="{url}", scope=scope)
target = start_peer_agent(nanoctrl_url="{url}", scope=scope)

initiator_conn = initiator.connect_to(target.alias, ib_port=1, qp_num=1)
target_conn = target.connect_to(initiator.alias, ib_port=1, qp_num=1)
initiator_conn.wait()
target_conn.wait()

local = torch.zeros([16], device="cpu", dtype=torch.uint8)
remote = torch.ones([16], device="cpu", dtype=torch.uint8)

initiator.register_memory_region("kv", local.data_ptr(), 0, local.numel())
target.register_memory_region("kv", remote.data_ptr(), 0, remote.numel())

future = initiator.read(target.alias, [("kv", 8, 0, 8)])
future.wait()

print(local.tolist())

initiator.shutdown()
target.shutdown()
"""

TORCH = '''
"""As much of torch as the example needs, where there is none."""
import ctypes

uint8 = "uint8"


class Tensor:
    def __init__(self, shape, value):
        self._data = (ctypes.c_ubyte * shape[0])(*[value] * shape[0])

    def data_ptr(self):
        return ctypes.addressof(self._data)

    def numel(self):
        return len(self._data)

    def tolist(self):
        return list(self._data)


def zeros(shape, device, dtype):
    return Tensor(shape, 0)


def ones(shape, device, dtype):
    return Tensor(shape, 1)
'''


def test_dlslimes_minimal_example_runs_without_a_nic_with_only_import_and_address_changed(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    example = tmp_path / "example.py"
    example.write_text(SEED_EXAMPLE.replace("{url}", mesh.http("control-plane")))
    if importlib.util.find_spec("torch") is None:
        (tmp_path / "torch.py").write_text(TORCH)
    environment = {**os.environ, "COMPUTEMESH_HOME": str(mesh.home.root), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [0] * 8 + [1] * 8


@TRANSPORTS
def test_bytes_of_another_process_are_read_and_written_whether_they_are_shared_or_not(
    place: Place, transport: str
) -> None:
    a = place.agent("a")
    with place.process("b") as b:
        conn = a.connect_to("b", transport=transport).wait(WAIT_S)
        assert conn.transport == ("shm" if transport == "auto" else "tcp")
        shared = a.allocate_memory_region("kv", SIZE)
        own = bytearray(SIZE)
        a.register_memory_region("private", own)
        future = a.read("b", [("kv", 0, 1000, 5000), ("private", 7, 3, 60000)])
        assert future.wait(WAIT_S) == 0
        assert bytes(shared.view[:5000]) == PATTERN[1000:6000]
        assert own[7:60007] == PATTERN[3:60003]
        shared.view[:4] = own[:4] = b"mine"
        assert a.write("b", [("kv", 0, 100, 4), ("private", 0, 200, 4)]).wait(WAIT_S) == 0
        # A write that is done is in the peer's memory, also by TCP.
        assert bytes.fromhex(b("peek", name="kv", offset=100, length=4)) == b"mine"
        assert bytes.fromhex(b("peek", name="private", offset=200, length=4)) == b"mine"


@TRANSPORTS
def test_a_thousand_assignments_in_one_order_are_all_done(place: Place, transport: str) -> None:
    a = place.agent("a")
    with place.process("b"):
        a.connect_to("b", transport=transport).wait(WAIT_S)
        here = a.allocate_memory_region("kv", SIZE)
        block = SIZE // 1000
        a.read("b", [("kv", n * block, (999 - n) * block, block) for n in range(1000)]).wait(WAIT_S)
        for n in range(1000):
            assert bytes(here.view[n * block : (n + 1) * block]) == PATTERN[(999 - n) * block : (1000 - n) * block]


@TRANSPORTS
def test_a_write_may_bring_a_number_which_waits_for_who_asks_for_it(place: Place, transport: str) -> None:
    a = place.agent("a")
    a.allocate_memory_region("kv", SIZE)
    with place.process("b") as b:
        a.connect_to("b", transport=transport).wait(WAIT_S)
        a.write_with_imm("b", ("kv", 0, 0, 16), imm_data=-42).wait(WAIT_S)
        b("connect", peer="a", transport=transport)
        assert b("imm", peer="a") == -42


def test_names_handles_and_records_of_memory_are_there_without_a_nic(place: Place) -> None:
    a = place.agent("a")
    with place.process("b") as b:
        assert a.list_mem_keys("b") == ["kv", "private"]
        info = a.get_mr_info("kv", peer_alias="b")
        assert info is not None
        assert (info["agent_name"], info["mr_name"], info["length"]) == ("b", "kv", SIZE)
        assert info == a.get_mr_info("b", "kv")
        handles = [a.register_memory_region(name, bytearray(SIZE)) for name in ("one", "two", "one")]
        assert len(set(handles)) == 3
        assert min(handles) > 0
        first = a.get_handle("private", "b")
        b("register", name="private")
        a.connect_to("b").wait(WAIT_S)
        assert a.get_handle("private", "b") not in (first, 0, -1)
        assert a.read("b", (handles[2], a.get_handle("private", "b"), 0, 0, 64)).wait(WAIT_S) == 0


def test_who_asks_for_a_taken_alias_is_refused_and_harms_nobody(place: Place) -> None:
    a = place.agent("a")
    with place.process("b"):
        a.allocate_memory_region("kv", SIZE)
        a.connect_to("b").wait(WAIT_S)
        assert code_of(lambda: start_peer_agent(place.path, alias="b", scope=place.scope)) == ALIAS_TAKEN
        gc.collect()
        assert a.list_agents() == ["a", "b"]
        assert a.list_mem_keys("b") == ["kv", "private"]
        assert a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S) == 0


def test_neighbouring_memory_is_never_read(place: Place) -> None:
    a = place.agent("a")
    with place.process("b"):
        a.connect_to("b", transport="tcp").wait(WAIT_S)
        a.allocate_memory_region("kv", 2 * SIZE)
        for offset, length in ((SIZE - 4, 16), (SIZE, 1), (0, SIZE + 1)):
            assert code_of(lambda at=offset, n=length: a.read("b", ("kv", 0, at, n)).wait(WAIT_S)) == OUT_OF_RANGE  # type: ignore[misc]


def test_a_stranger_at_the_listener_is_told_nothing_and_changes_nothing(place: Place) -> None:
    a = place.agent("a")
    with place.process("b") as b:
        conn = a.connect_to("b", transport="tcp").wait(WAIT_S)
        a.allocate_memory_region("kv", SIZE)
        before = b("peek", name="kv", offset=0, length=SIZE)
        address = (conn.peer_endpoint_info or {})["tcp"]["address"]
        for bait in (b"\0" * 4096, os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection((address[0], address[1]), timeout=WAIT_S) as stranger:
                heard = b""
                with contextlib.suppress(OSError):  # It may hang up at any moment.
                    stranger.sendall(bait)
                    stranger.shutdown(socket.SHUT_WR)
                    while piece := stranger.recv(4096):
                        heard += piece
                assert bytes.fromhex(before)[:16] not in heard
        assert b("peek", name="kv", offset=0, length=SIZE) == before
        assert a.read("b", ("kv", 0, 0, SIZE)).wait(WAIT_S) == 0


@TRANSPORTS
@pytest.mark.parametrize("end", ["kill", "shutdown"])
def test_when_a_peer_ends_everything_that_waits_for_it_fails_soon_and_the_connection_says_so(
    place: Place, transport: str, end: str
) -> None:
    a = place.agent("a")
    with place.process("b") as b:
        conn = a.connect_to("b", transport=transport).wait(WAIT_S)
        a.allocate_memory_region("kv", SIZE)
        a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S)
        waiting = [a.imm_recv("b"), a.recv("b", bytearray(64))]
        with pytest.raises(TimeoutError):
            waiting[0].wait(0.05)
        b.kill() if end == "kill" else b("shutdown")
        for future in waiting:
            assert code_of(partial(future.wait, WAIT_S)) == LINK_LOST
        until(lambda: conn.state == "failed")
        assert not conn.is_connected()
        assert code_of(lambda: a.read("b", ("kv", 0, 0, 64))) == LINK_LOST
        until(lambda: a.list_agents() == ["a"])
        assert a.list_mem_keys("b") == []


@TRANSPORTS
def test_a_peer_that_is_killed_and_starts_again_is_read_anew(place: Place, transport: str) -> None:
    a = place.agent("a")
    here = a.allocate_memory_region("kv", SIZE)
    for _ in range(3):
        with place.process("b") as b:
            conn = a.connect_to("b", transport=transport).wait(WAIT_S)
            here.view[:64] = bytes(64)
            a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S)
            assert bytes(here.view[:64]) == PATTERN[:64]
            b.kill()
            until(lambda conn=conn: conn.state == "failed")  # type: ignore[misc]
            until(lambda: a.list_agents() == ["a"])


def test_a_peer_in_another_scope_is_neither_seen_nor_reached(place: Place) -> None:
    a = place.agent("a")
    other = start_peer_agent(place.path, alias="b", scope="another")
    try:
        assert a.list_agents() == ["a"]
        assert a.get_resource("b") is None
        with pytest.raises(PeerError, match="there is no peer 'b'"):
            a.connect_to("b")
    finally:
        other.shutdown()


def test_without_an_alias_one_is_found_and_a_context_ends_the_agent(place: Place) -> None:
    with start_peer_agent(place.path, scope=place.scope, name_prefix="worker") as first:
        with start_peer_agent(place.path, scope=place.scope, name_prefix="worker") as second:
            assert first.alias.startswith("worker-")
            assert first.list_agents() == sorted([first.alias, second.alias])
        until(lambda: first.list_agents() == [first.alias])


def test_an_alias_is_free_again_as_soon_as_its_agent_has_ended(place: Place) -> None:
    for _ in range(5):
        place.agent("again").shutdown()


def test_without_a_peer_agent_it_is_said_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="computemesh up") as caught:
        start_peer_agent(tmp_path / "none.sock")
    assert isinstance(caught.value, PeerError)
    assert caught.value.code == NO_AGENT


def test_a_program_that_was_told_of_another_mesh_hears_so(mesh: RunningMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPUTEMESH_PEER_SOCKET", str(mesh.home.run / SOCKET_NAME))
    with start_peer_agent(mesh.http("control-plane"), scope="told") as agent:
        assert agent.list_agents() == [agent.alias]
        bus = agent.core.welcome.bus
    start_peer_agent(address=bus, scope="told").shutdown()
    start_peer_agent(mesh.http("control-plane").removeprefix("http://"), scope="told").shutdown()
    assert code_of(lambda: start_peer_agent("nats://127.0.0.1:1", scope="told")) == OTHER_MESH
    with pytest.raises(PeerError, match=r"nanoctrl_url: no control plane answers at http://127\.0\.0\.1:1 ") as caught:
        start_peer_agent("http://127.0.0.1:1", scope="told")
    assert caught.value.code == UNAVAILABLE
    assert caught.value.__suppress_context__
    with pytest.raises(PeerError, match=r"nanoctrl_url: no control plane answers at http://127\.0\.0\.1:1 "):
        start_peer_agent("127.0.0.1:1", scope="told")
    with pytest.raises(ValueError, match=r"nanoctrl_url: .* is no address"):
        start_peer_agent("http://[::1", scope="told")
    with pytest.raises(TypeError, match="nanoctrl_url: text is wanted, not int"):
        start_peer_agent(cast(Any, 5), scope="told")
    with pytest.raises(TypeError, match="device: text is wanted, not int"):
        start_peer_agent(device=cast(Any, 5), scope="told")
    with pytest.raises(ValueError, match="name_prefix: it has 65 characters"):
        start_peer_agent(name_prefix="x" * 65, scope="told")
    with start_peer_agent(alias="taken", scope="told"), pytest.raises(PeerError, match=r"^alias: 'taken' is another"):
        start_peer_agent(alias="taken", scope="told")
    with pytest.raises(TypeError, match="names of one argument"):
        start_peer_agent("http://127.0.0.1:1", ctrl_url="http://127.0.0.1:1")


def test_a_child_made_by_fork_is_refused_at_once_and_does_not_disturb_its_parent(place: Place) -> None:
    with start_peer_agent(place.path, alias="a", scope=place.scope) as agent:
        child = os.fork()
        if child == 0:
            code = code_of(lambda: agent.register_memory_region("kv", bytearray(8)))
            os._exit(0 if code == CLOSED else 1)
        waited = time.monotonic() + 5
        ended, status = 0, -1
        while not ended and time.monotonic() < waited:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert status == 0
        assert agent.list_agents() == ["a"]
        assert agent.list_mem_keys() == []


async def test_the_same_is_awaited_in_programs_with_an_event_loop(place: Place) -> None:
    with place.process("b") as b:
        async with await start_async_peer_agent(place.path, alias="a", scope=place.scope) as a:
            assert await a.list_agents() == ["a", "b"]
            conn = await a.connect_to("b", timeout=WAIT_S)
            assert conn.is_connected()
            here = await a.allocate_memory_region("kv", SIZE)
            own = bytearray(SIZE)
            await a.register_memory_region("private", own)
            await asyncio.gather(*(a.read("b", ("kv", n * 64, n * 64, 64)) for n in range(32)))
            assert bytes(here.view[: 32 * 64]) == PATTERN[: 32 * 64]
            future = await a.read("b", ("private", 0, 0, SIZE))
            assert own == PATTERN
            assert future.done()
            await a.write("b", [("kv", 0, 64, 64)])
            number = asyncio.ensure_future(a.imm_recv("b"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(number), 0.05)
            await asyncio.to_thread(b.kill)
            with pytest.raises(PeerError):
                await number
            assert a.stats()["regions"] == 2


# --- while the mesh itself is in trouble ------------------------------------------------------------------------


def test_a_peer_agent_that_is_killed_disturbs_no_connection_and_peers_find_each_other_when_it_is_back(
    mesh: RunningMesh,
) -> None:
    place = Place(mesh.home.run / SOCKET_NAME, "killed-agent")
    a = place.agent("a")
    try:
        with place.process("b") as b, place.process("c"):
            conn = a.connect_to("b").wait(WAIT_S)
            here = a.allocate_memory_region("kv", SIZE)
            a.register_memory_region("private", bytearray(SIZE))
            a.read("b", [("kv", 0, 0, 64), ("private", 0, 0, 64)]).wait(WAIT_S)
            killed = mesh.pid("peer-agent")
            os.kill(killed, signal.SIGKILL)
            here.view[:64] = bytes(64)
            a.read("b", ("private", 0, 0, 64)).wait(WAIT_S)
            until(lambda: mesh.pid("peer-agent") not in (0, killed))
            until(lambda: a.list_agents() == ["a", "b", "c"])
            assert conn.is_connected()
            a.read("b", ("private", 64, 64, 64)).wait(WAIT_S)
            # Whether shared memory went on or its pages ended with the old peer-agent: the bytes are the right ones.
            a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S)
            assert bytes(here.view[:64]) == PATTERN[:64]
            a.connect_to("c").wait(WAIT_S)
            a.read("c", ("kv", 64, 64, 64)).wait(WAIT_S)
            b.kill()
            until(lambda: conn.state == "failed")
    finally:
        a.shutdown()


def test_peers_of_one_machine_connect_and_move_bytes_while_nats_stands_still(mesh: RunningMesh) -> None:
    place = Place(mesh.home.run / SOCKET_NAME, "no-nats")
    a = place.agent("a")
    a.allocate_memory_region("kv", SIZE)
    server = mesh.pid("nats-server")
    try:
        with place.process("b"):
            os.kill(server, signal.SIGSTOP)
            try:
                a.connect_to("b").wait(WAIT_S)
                a.read("b", ("kv", 0, 0, 64)).wait(WAIT_S)
            finally:
                os.kill(server, signal.SIGCONT)
    finally:
        a.shutdown()


def test_peers_of_two_nodes_need_one_address_for_tcp_and_are_told_how_to_give_it(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    url = asyncio.run_coroutine_threadsafe(mesh.invite("n2"), _loops[mesh]).result(WAIT_S)
    home = tmp_path / "n2"
    environment = {
        **os.environ,
        "NATS_URL": url,
        "COMPUTEMESH_NODE_ID": "n2",
        "COMPUTEMESH_HOME": str(home),
        "COMPUTEMESH_STRICT": "true",
    }
    other = subprocess.Popen([sys.executable, "-m", "computemesh_services.peer_agent"], env=environment)
    there = home / "run" / SOCKET_NAME
    try:
        until(there.exists)
        with start_peer_agent(mesh.home.run / SOCKET_NAME, alias="a", scope="nodes") as a:
            with start_peer_agent(there, alias="b", scope="nodes"):
                until(lambda: a.list_agents() == ["a", "b"])
                with pytest.raises(PeerError, match="not on this machine"):
                    a.connect_to("b", transport="shm")
                with pytest.raises(PeerError, match="COMPUTEMESH_PEER_HOST"):
                    a.connect_to("b").wait(WAIT_S)
            for host in ("a", "b"):
                here = "127.0.0.1" if host == "a" else None
                near = start_peer_agent(mesh.home.run / SOCKET_NAME, alias="c", scope="nodes", local_host=here)
                far_host = "127.0.0.1" if host == "b" else None
                far = start_peer_agent(there, alias="d", scope="nodes", local_host=far_host)
                with near, far:
                    far.allocate_memory_region("kv", SIZE).view[:] = PATTERN
                    mine = near.allocate_memory_region("kv", SIZE)
                    assert near.connect_to("d").wait(WAIT_S).transport == "tcp"
                    near.read("d", ("kv", 0, 0, SIZE)).wait(WAIT_S)
                    assert bytes(mine.view) == PATTERN
    finally:
        other.terminate()
        other.wait(WAIT_S)
