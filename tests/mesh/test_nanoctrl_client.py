"""Both clients, on our control plane and on NanoCtrl's own server.

Goal: a program written for NanoCtrl's client goes on with ours as it is, whichever server it meets; and a server that
is away, refuses, or hangs up in the middle costs it what is documented, and no more. Method: the same tests for the
synchronous and the asynchronous client, on each server; then a server of the test that misbehaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from computemesh.ids import new_id
from computemesh.nanoctrl import AsyncNanoCtrlClient, NanoCtrlClient, NanoCtrlError
from computemesh.nanoctrl.calls import Call
from computemesh.testing import running_mesh, until
from tests.bench.nanoctrl import find_peer, running_peer

# pyright: reportPrivateUsage=false

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE: Final[dict[str, Any]] = {
    "role": "prefill",
    "world_size": 8,
    "num_blocks": 15_000,
    "host": "10.0.0.2",
    "port": 6001,
    "peer_addrs": ["10.0.0.2:5000"],
}
EXAMPLE: Final = Path(__file__).parents[2] / "docs/examples/nanoctrl/register.py"
PEER: Final[dict[str, Any]] = {"device": "rxe0", "ib_port": 1, "link_type": "RoCE", "address": "127.0.0.1:5000"}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["computemesh", "nanoctrl"])
async def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """The address of a control plane."""
    folder = tmp_path_factory.mktemp("plane")
    if request.param == "computemesh":
        async with running_mesh(folder, ("control-plane",)) as mesh:
            yield mesh.http("control-plane")
        return
    beside = Path(sys.executable).with_name("nanoctrl")
    program = find_peer(beside if beside.is_file() else None)
    if program is None:
        pytest.skip("NanoCtrl's server, or its Redis, is not installed")
    async with running_peer(program, folder) as (address, _):
        yield address


class Synchronous:
    """The synchronous client, as the tests call both: each call in a thread, as programs have it."""

    def __init__(self, client: NanoCtrlClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found):
            return found

        async def called(*words: Any, **named: Any) -> Any:
            return await asyncio.to_thread(found, *words, **named)

        return called


class Asynchronous:
    """The asynchronous one, of which :meth:`start_heartbeat` is no coroutine."""

    def __init__(self, client: AsyncNanoCtrlClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if name != "start_heartbeat":
            return found

        async def started(*words: Any, **named: Any) -> None:
            found(*words, **named)

        return started


Connect = Callable[..., Any]


@pytest_asyncio.fixture(loop_scope="module", params=["synchronous", "asynchronous"])
async def connect(request: pytest.FixtureRequest) -> AsyncGenerator[Connect]:
    """Makes clients of either kind, which are stopped at the end."""
    made: list[Any] = []

    def make(address: str, scope: str | None = None, **more: Any) -> Any:
        if request.param == "synchronous":
            made.append(Synchronous(NanoCtrlClient(address, scope, **more)))
        else:
            made.append(Asynchronous(AsyncNanoCtrlClient(address, scope, **more)))
        return made[-1]

    yield make
    for client in made:
        await client.stop()


@pytest.fixture
def engine_id() -> str:
    """An engine that no other test has."""
    return new_id("e")


# --- engines -----------------------------------------------------------------------------------------------------


async def test_an_engine_is_registered_found_and_unregistered(server: str, connect: Connect, engine_id: str) -> None:
    """With all that was said of it."""
    client = connect(server)
    assert await client.register(engine_id, ENGINE) is True
    assert client.registered
    found = await client.get_engine_info(engine_id)
    assert {name: found[name] for name in ENGINE} == ENGINE
    assert engine_id in {engine["id"] for engine in await client.list_engines()}
    assert await client.heartbeat() == "ok"
    assert await client.unregister() is True
    assert not client.registered
    assert await client.get_engine_info(engine_id) is None
    assert await client.heartbeat() == "not_found"


async def test_an_address_may_leave_out_the_scheme(server: str, connect: Connect) -> None:
    """And may end with a slash."""
    await connect(server.removeprefix("http://")).check_connection()
    await connect(f"{server}/").check_connection()


async def test_a_scope_has_engines_of_its_own(server: str, connect: Connect, engine_id: str) -> None:
    """Under the same id."""
    one, other, none = connect(server, new_id("s")), connect(server, new_id("s")), connect(server)
    assert await one.register(engine_id, ENGINE)
    assert [engine["id"] for engine in await one.list_engines()] == [engine_id]
    assert await other.list_engines() == []
    assert await other.get_engine_info(engine_id) is None
    assert await none.get_engine_info(engine_id) is None


async def test_what_is_refused_is_logged_and_false(
    server: str, connect: Connect, engine_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line names the field."""
    client = connect(server)
    assert await client.register(engine_id, {**ENGINE, "port": "none"}) is False
    assert not client.registered
    assert "port" in caplog.text or "u32" in caplog.text
    assert await client.register(engine_id, {**ENGINE, "host": object()}) is False


async def test_a_client_without_an_engine_has_nothing_to_keep(server: str, connect: Connect) -> None:
    """Nothing is asked then."""
    client = connect(server)
    assert await client.unregister() is False
    assert await client.heartbeat() == "error"


async def test_the_bus_has_an_address_with_a_scheme(server: str, connect: Connect) -> None:
    """That of the system behind the server."""
    assert (await connect(server).get_redis_url()).startswith(("nats://", "redis://"))


# --- heartbeats --------------------------------------------------------------------------------------------------


async def test_an_engine_that_was_forgotten_is_told_of_and_can_come_back(
    server: str, connect: Connect, engine_id: str
) -> None:
    """By a call from the heartbeats, which go on."""
    client, other = connect(server), NanoCtrlClient(server)
    again = threading.Event()
    calls: list[bool] = []

    async def come_back() -> None:
        await client.register(engine_id, ENGINE)
        again.set()

    def come_back_at_once() -> None:
        client.client.register(engine_id, ENGINE)
        again.set()

    assert await client.register(engine_id, ENGINE)
    back = come_back if isinstance(client, Asynchronous) else come_back_at_once
    await client.start_heartbeat(interval=0.05, on_not_found=back, name="beats")
    await client.start_heartbeat(interval=0.05, on_not_found=lambda: calls.append(True))
    other._operations.engine_id = engine_id
    assert await asyncio.to_thread(other.unregister)
    await until(again.is_set, what="the engine to be registered again")
    assert await client.get_engine_info(engine_id) is not None
    assert calls == [], "a second start_heartbeat does nothing while the first one runs"
    await client.stop()
    await client.stop()
    assert await client.get_engine_info(engine_id) is None


async def test_a_callback_may_stop_its_client_or_fail(
    server: str, connect: Connect, engine_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure is logged, and the heartbeats go on; they end when it stops them."""
    client = connect(server)
    client.client._operations.engine_id = engine_id
    called: list[int] = []

    def at_first_fails() -> Any:
        called.append(len(called))
        if len(called) == 1:
            raise KeyError("of the test")
        return client.client.stop()

    await client.start_heartbeat(interval=0.02, on_not_found=at_first_fails)
    await until(lambda: len(called) == 2, what="a second call")
    await until(lambda: not is_beating(client), what="the heartbeats to end")
    assert called == [0, 1]
    assert "of the test" in caplog.text


async def test_heartbeats_that_were_stopped_can_be_started_again(server: str, connect: Connect, engine_id: str) -> None:
    """Also while the last one of before is under way."""
    client = connect(server)
    for _ in range(3):
        await client.start_heartbeat(interval=30)
        assert is_beating(client)
        await client.stop_heartbeat(timeout=0)
    await until(lambda: not is_beating(client), what="the heartbeats to end")


def is_beating(client: Any) -> bool:
    beating, stop = client.client._beating
    alive: bool = beating.is_alive() if isinstance(beating, threading.Thread) else not beating.done()
    return alive and not (stop.is_set() and not alive)


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
async def test_an_interval_is_above_zero(connect: Connect, interval: float) -> None:
    """Else it would ask without a pause."""
    with pytest.raises(ValueError, match="interval"):
        await connect("127.0.0.1:1").start_heartbeat(interval=interval)


# --- peers -------------------------------------------------------------------------------------------------------


async def test_a_peer_is_registered_kept_seen_and_forgotten(server: str, connect: Connect) -> None:
    """Named by the control plane, from the prefix."""
    client = connect(server, new_id("s"))
    made = await client.register_peer(alias=None, name_prefix="worker", **PEER)
    name = made["name"]
    assert name.startswith("worker-")
    assert made["redis_address"]
    assert [peer["name"] for peer in await client.query_peers()] == [name]
    assert (await client.heartbeat_peer(name))["status"] == "ok"
    assert (await client.set_desired_topology(name, target_peers=["b"], min_bw="1Gbps", symmetric=True)) == {
        "status": "ok"
    }
    assert (await client.cleanup_peer(name))["status"] == "ok"
    assert (await client.heartbeat_peer(name))["status"] == "not_found"
    assert await client.query_peers() == []


async def test_calls_about_peers_raise(server: str, connect: Connect) -> None:
    """With the status and the words of the control plane."""
    client = connect(server)
    with pytest.raises(NanoCtrlError, match=r"/start_peer_agent: 422 .+") as caught:
        await client.register_peer(alias=None, name_prefix="worker", **{**PEER, "ib_port": "one"})
    assert caught.value.status_code == 422


# --- a server that is away, or misbehaves ------------------------------------------------------------------------


async def test_without_a_server_calls_about_engines_give_nothing_and_the_others_raise(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """No traceback, and a reason that people can read."""
    client = connect("127.0.0.1:1")
    assert await client.register("e", ENGINE) is False
    assert await client.heartbeat() == "error"
    assert await client.unregister() is False
    assert await client.get_engine_info("e") is None
    assert await client.list_engines() == []
    assert await client.get_redis_url() is None
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 6
    assert "refused" in caplog.text or "connect" in caplog.text
    with pytest.raises(RuntimeError, match=r"no control plane at http://127\.0\.0\.1:1"):
        await client.check_connection()
    for call in (client.query_peers(), client.heartbeat_peer("a"), client.cleanup_peer("a")):
        with pytest.raises(NanoCtrlError):
            await call


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncGenerator[tuple[str, list[bytes], list[int]]]:
    """A server that gives each request the next of these answers, the last one for ever; ``hang up`` ends the
    connection. Gives its address, the heads of the requests, and the number of connections."""
    heads: list[bytes] = []
    connections: list[int] = []
    left = list(answers)
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections))
        writers.append(writer)
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            heads.append(head)
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
            )
            await reader.readexactly(length)
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer == b"hang up":
                break
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heads, connections
    finally:
        server.close()
        for writer in writers:
            writer.close()


def http(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n%b" % (status, len(body), body)


OK: Final = http(b'{"status":"ok","engines":[],"name":"a"}')


async def test_calls_go_over_one_connection(connect: Connect) -> None:
    """Until the client is stopped; what is asked after that opens another one."""
    async with answering(OK) as (address, heads, connections):
        client = connect(address)
        for _ in range(20):
            await client.list_engines()
        assert (len(heads), len(connections)) == (20, 1)
        await client.stop()
        await client.list_engines()
        assert len(connections) == 2


async def test_a_connection_that_the_server_ended_is_no_error(connect: Connect) -> None:
    """The question is asked once more, over another one; but not one that would do its work twice."""
    async with answering(OK, b"hang up", OK, OK, b"hang up", OK) as (address, heads, connections):
        client = connect(address)
        assert await client.register("e", ENGINE)
        assert await client.heartbeat() == "ok"
        assert (len(heads), len(connections)) == (3, 2)
        assert await client.heartbeat() == "ok"
        with pytest.raises(NanoCtrlError):
            await client.register_peer(alias=None, name_prefix="worker", **PEER)
        assert len(heads) == 5


async def test_a_server_that_hangs_up_each_time_is_asked_twice_and_no_more(connect: Connect) -> None:
    """It would be for ever."""
    async with answering(b"hang up") as (address, heads, _):
        assert await connect(address).list_engines() == []
        assert len(heads) == 2


@pytest.mark.parametrize(
    "answer",
    [
        http(b"oops"),
        http(b"[1]"),
        http(b'"ok"'),
        http(b"[" * 100_000),
        http(b'{"status":"error"}'),
        http(b'{"status":"error","message":"Redis pool: gone"}', b"500 Internal Server Error"),
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
    ],
    ids=["no JSON", "a list", "a text", "deep", "an error", "500", "a redirect", "no HTTP"],
)
async def test_an_answer_that_is_none_is_an_error_as_any_other(
    connect: Connect, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged in one line for engines; raised, where it is unreadable, for peers."""
    async with answering(answer) as (address, _, _):
        client = connect(address)
        assert await client.register("e", ENGINE) is False
        assert await client.list_engines() == []
        assert await client.get_engine_info("e") is None
        assert await client.heartbeat() == "error"
        assert "Traceback" not in caplog.text
        if not answer.startswith(b"HTTP/1.1 200"):
            with pytest.raises(NanoCtrlError):
                await client.check_connection()
        if b'{"status":"error"}' not in answer:
            with pytest.raises(NanoCtrlError):
                await client.query_peers() if answer != http(b"[1]") else await client.heartbeat_peer("a")


async def test_a_server_that_is_silent_is_given_up(connect: Connect) -> None:
    """After the time that the call may take, once."""
    async with answering(b"") as (address, heads, _):
        client = connect(address).client
        call = Call(method="GET", path="", timeout_s=0.2)
        asked = asyncio.to_thread(client._ask, call) if isinstance(client, NanoCtrlClient) else client._ask(call)
        with pytest.raises(NanoCtrlError, match=r"(no answer in 0\.2 s|timed out)"):
            await asked
        assert len(heads) == 1


async def test_the_token_is_shown_and_comes_from_the_environment(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument counts before it; an empty one is none."""
    monkeypatch.setenv("COMPUTEMESH_TOKEN", "of-the-environment")
    async with answering(OK) as (address, heads, _):
        for more in ({}, {"token": "of-the-argument"}, {"token": ""}):
            await connect(address, **more).list_engines()
        assert [b"\r\nAuthorization: Bearer of-the-environment\r\n" in head for head in heads] == [True, False, False]
        assert [b"\r\nAuthorization: Bearer of-the-argument\r\n" in head for head in heads] == [False, True, False]
        assert b"authorization" not in heads[2].lower()


async def test_proxies_of_the_environment_are_not_used(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control plane is in the same network."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with answering(OK) as (address, heads, _):
        assert await connect(address).register("e", ENGINE)
        assert len(heads) == 1


async def test_the_example_of_the_page_says_who_is_there(server: str) -> None:
    """On either server; its engine is gone again when it has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, EXAMPLE, server, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, trouble = await process.communicate()
    assert (said.decode(), trouble.decode()) == ("prefill-0 prefill 10.0.0.2:6001\n", "")
    assert await asyncio.to_thread(NanoCtrlClient(server, "my-session").list_engines) == []


# --- threads and processes ---------------------------------------------------------------------------------------


async def test_threads_share_a_client(server: str) -> None:
    """Each gets the answer to its own question."""
    client = NanoCtrlClient(server, new_id("s"))
    names = [f"engine-{number}" for number in range(8)]
    for name in names:
        assert await asyncio.to_thread(client.register, name, {**ENGINE, "host": name})
    wrong: list[Any] = []

    def ask(name: str) -> None:
        for _ in range(20):
            found = client.get_engine_info(name)
            if found is None or (found["id"], found["host"]) != (name, name):
                wrong.append(found)

    await asyncio.gather(*(asyncio.to_thread(ask, name) for name in names))
    assert wrong == []
    await asyncio.to_thread(client.stop)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
async def test_a_forked_process_asks_over_connections_of_its_own() -> None:
    """Two processes that read from one socket would get each other's answers."""
    program = """
import os, sys
from computemesh.nanoctrl import NanoCtrlClient
client = NanoCtrlClient(sys.argv[1])
client.list_engines()
if (child := os.fork()) == 0:
    client.list_engines()
    os._exit(0)
os.waitpid(child, 0)
client.list_engines()
"""
    async with answering(OK) as (address, heads, connections):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, address)
        assert await process.wait() == 0
        assert (len(heads), len(connections)) == (3, 2)


async def test_a_client_that_is_dropped_leaves_no_connection(connect: Connect) -> None:
    """Nobody has to stop one that registered nothing."""
    async with answering(OK) as (address, _, _):
        client = NanoCtrlClient(address)
        await asyncio.to_thread(client.list_engines)
        before = len(sockets())
        del client
        await until(lambda: len(sockets()) < before, what="the connection to be closed")


def sockets() -> list[Path]:
    found: list[Path] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(descriptor.readlink())
    return [where for where in found if str(where).startswith("socket:")]
