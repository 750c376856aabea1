"""The life of a service process: told to end it finishes what it has, broken it is started again.

Method: ``slow_service.py`` as a process of its own, whose requests stay in hand until the test says so:
a service that answers at once looks the same whether it drains or is cut off. Mutations these tests kill:
closing endpoints instead of draining them, cancelling requests in hand, not answering those that wait
behind the concurrency bound, swallowing a background task's exception, restarting on exit status 78,
treating a lost connection as ready, watchers that do not read again after a reconnect.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import pytest

from computemesh import lifecycle
from computemesh.bus import Bucket, Bus, NoResponder, NotStored, Where
from computemesh.cli.services import SERVICES
from computemesh.config import ServiceConfig
from computemesh.contracts import nodes, storage
from computemesh.contracts.base import AT_ONCE, Refused, Role
from computemesh.contracts.nodes import Discover, NodeGet, NodeList, NodeRecord, NodesQuery, NodeView
from computemesh.nats_server import NatsServer
from computemesh.paths import Home
from computemesh.process import EXIT_CONFIG, EXIT_DEFECT, exit_text
from computemesh.supervisor import ServiceSpec, ServiceStatus, Supervisor
from computemesh.testing import running_server, until

HERE: Final = Path(__file__).parent

BEHIND: Final = 10
"""Requests beyond those an endpoint has in hand at once."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A server of this test's own."""
    async with running_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def connected(server: NatsServer) -> AsyncGenerator[Bus]:
    """A connection in the services role."""
    bus = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="test"))
    await bus.connect(timeout_s=5)
    try:
        yield bus
    finally:
        await bus.close()


class Slow:
    """A slow service as a process, and what it logs."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, object]] = []
        self.http = ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))
            self.http = str(self.lines[-1].get("http", self.http))

    def said(self, event: str) -> bool:
        return any(line["event"] == event for line in self.lines)

    async def exit_status(self) -> int:
        async with asyncio.timeout(20):
            status = await self.process.wait()
            await self._reading
        return status


async def start_slow(url: str, **settings: str) -> Slow:
    """A slow service that begins to live."""
    environment = {**os.environ, "NATS_URL": url, "COMPUTEMESH_LOG_FORMAT": "json", **settings}
    return Slow(
        await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "slow_service.py"), env=environment, stdin=DEVNULL, stdout=PIPE
        )
    )


@asynccontextmanager
async def slow_service(server: NatsServer, **settings: str) -> AsyncGenerator[Slow]:
    """A slow service that has said it is ready."""
    slow = await start_slow(server.url(Role.SERVICES), **settings)
    try:
        await until(lambda: slow.said("ready"), what="the service to be ready")
        yield slow
    finally:
        with contextlib.suppress(ProcessLookupError):
            slow.process.kill()
        await slow.exit_status()


async def get(bus: Bus, node_id: str) -> NodeView | Refused:
    """The answer of the slow service, however long it takes."""
    return await bus.ask(nodes.GET, NodeGet(node_id=node_id), timeout_s=20)


async def in_hand(slow: Slow, count: int) -> None:
    """Waits until that many requests are in the handler."""
    async with httpx.AsyncClient() as http, asyncio.timeout(20):
        while (await http.get(f"{slow.http}/healthz")).json()["in_hand"] != count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("sig", "count"),
    [(signal.SIGTERM, AT_ONCE + BEHIND), (signal.SIGTERM, 3), (signal.SIGINT, 3)],
    ids=["SIGTERM, some wait", "SIGTERM, none waits", "SIGINT"],
)
async def test_a_signal_lets_requests_in_hand_and_those_behind_them_be_answered(
    server: NatsServer, sig: signal.Signals, count: int
) -> None:
    """Also those that wait for a slot. Then the process ends with status 0."""
    async with slow_service(server) as slow, connected(server) as bus:
        asked = [asyncio.create_task(get(bus, f"n{number}")) for number in range(count)]
        await in_hand(slow, min(count, AT_ONCE))
        await bus.flush()
        slow.process.send_signal(sig)
        await until(lambda: slow.said("draining"), what="the service to drain")
        await until_nobody_serves(bus)
        await until_refused(slow.http)
        assert not [task for task in asked if task.done()]
        await bus.publish(nodes.DISCOVER, Discover())
        answers = await asyncio.gather(*asked)
        assert answers == [NodeView(node_id=f"n{number}") for number in range(count)]
        assert await slow.exit_status() == 0
        assert slow.lines[-1]["event"] == "stopped"


async def test_a_signal_lets_http_requests_in_hand_be_answered(server: NatsServer) -> None:
    """While new connections are refused."""
    async with slow_service(server) as slow, connected(server) as bus, httpx.AsyncClient(timeout=20) as http:
        called = [asyncio.create_task(http.get(f"{slow.http}/api/v1/nodes/n{number}")) for number in range(5)]
        await in_hand(slow, 5)
        slow.process.send_signal(signal.SIGTERM)
        await until_refused(slow.http)
        await bus.publish(nodes.DISCOVER, Discover())
        answers = await asyncio.gather(*called)
        assert [answer.status_code for answer in answers] == [200] * 5
        assert [answer.json()["node_id"] for answer in answers] == [f"n{number}" for number in range(5)]
        assert await slow.exit_status() == 0


async def until_nobody_serves(bus: Bus) -> None:
    """Waits until the service takes no new request."""
    async with asyncio.timeout(20):
        while True:
            # One that is taken all the same would wait for the gate: do not wait for it.
            try:
                await bus.ask(nodes.GET, NodeGet(node_id="late"), timeout_s=0.2)
            except NoResponder:
                return
            except Exception as error:
                assert "no answer" in str(error)  # noqa: PT017  # taken in the instant before


async def until_refused(url: str) -> None:
    """Waits until an edge takes no new connection."""
    async with asyncio.timeout(20):
        while True:
            try:
                async with httpx.AsyncClient() as late:
                    await late.get(f"{url}/healthz")
            except httpx.ConnectError:
                return
            except httpx.TransportError:
                pass  # Taken in the last instant, and closed.
            await asyncio.sleep(0.01)


async def test_a_drain_that_takes_too_long_is_given_up_with_status_1(server: NatsServer) -> None:
    """A handler that never ends does not keep the process for ever."""
    async with slow_service(server, COMPUTEMESH_DRAIN_TIMEOUT_S="0.5") as slow, connected(server) as bus:
        asked = asyncio.create_task(get(bus, "n1"))
        await in_hand(slow, 1)
        slow.process.send_signal(signal.SIGTERM)
        assert await slow.exit_status() == 1
        assert slow.said("could not finish in time")
        asked.cancel()


async def test_a_service_that_waits_for_a_server_can_be_told_to_end() -> None:
    """A server that accepts and then says nothing keeps it waiting; SIGTERM ends it with status 0."""
    called = asyncio.Event()

    async def on_connection(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await ended.wait()
        writer.close()

    ended = asyncio.Event()
    async with await asyncio.start_server(on_connection, "127.0.0.1", 0) as mute:
        url = f"nats://127.0.0.1:{mute.sockets[0].getsockname()[1]}"
        slow = await start_slow(url)
        async with asyncio.timeout(20):
            await called.wait()
        slow.process.terminate()
        assert await slow.exit_status() == 0
        assert not slow.said("ready")
        ended.set()


# --- under the supervisor ------------------------------------------------------------------------------------


class Watched:
    """A supervisor and every state it reported."""

    def __init__(self, folder: Path, server: NatsServer, specs: Sequence[ServiceSpec]) -> None:
        self.states: list[ServiceStatus] = []
        self.lines: list[str] = []
        self.supervisor = Supervisor(
            Home(folder / "mesh"),
            list(specs),
            token="",
            node_id="n1",
            nats_urls=dict.fromkeys(Role, server.url(Role.SERVICES)),
            on_line=lambda name, line: self.lines.append(f"{name} {line.decode()}"),
            on_status=self.states.append,
        )

    def states_of(self, name: str) -> list[str]:
        return [status.state for status in self.states if status.name == name]


@asynccontextmanager
async def watched(folder: Path, server: NatsServer, *specs: ServiceSpec) -> AsyncGenerator[Watched]:
    """A supervisor whose services have been started, and are ready or failed."""
    seen = Watched(folder, server, specs)
    try:
        async with asyncio.timeout(30):
            await seen.supervisor.start()
        yield seen
    finally:
        await seen.supervisor.stop()


def slow_spec(**settings: str) -> ServiceSpec:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, **settings}
    return ServiceSpec(name="slow-service", module="slow_service", role=Role.SERVICES, port=0, environment=environment)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"COMPUTEMESH_HTTP_PORT": "seventy"}, "COMPUTEMESH_HTTP_PORT='seventy'"),
        ({"COMPUTEMESH_FAIL": "config"}, "wrong on purpose"),
        ({"COMPUTEMESH_HTTP_HOST": "0.0.0.0", "COMPUTEMESH_TOKEN": ""}, "COMPUTEMESH_TOKEN"),
        ({"COMPUTEMESH_HTTP_HOST": "192.0.2.1"}, "192.0.2.1"),
        ({"NATS_URL": "nats://"}, "nats://"),
        ({"NATS_URL": "nats://127.0.0.1:port"}, "127.0.0.1:port"),
    ],
    ids=[
        "unreadable",
        "refused by the service",
        "open without a token",
        "an address of another machine",
        "no host",
        "no port",
    ],
)
async def test_a_service_that_is_configured_wrongly_is_not_started_again(
    tmp_path: Path, server: NatsServer, settings: dict[str, str], said: str
) -> None:
    """It ends with status 78 after saying which setting is wrong, and stays down."""
    async with watched(tmp_path, server, slow_spec(**settings)) as seen:
        (service,) = seen.supervisor.services
        assert (service.status.state, service.status.restarts) == ("failed", 0)
        assert seen.states_of("slow-service") == ["starting", "failed"]
        assert any(said in line for line in seen.lines), seen.lines
        assert not [line for line in seen.lines if "Traceback" in line]
    assert EXIT_CONFIG == 78


async def test_a_service_whose_background_task_raises_ends_and_is_started_again(
    tmp_path: Path, server: NatsServer
) -> None:
    """With status 70 and the trace in its log; the pause before the next life grows."""
    seen = Watched(tmp_path, server, [slow_spec(COMPUTEMESH_FAIL="task")])
    starting = asyncio.create_task(seen.supervisor.start())
    try:
        await until(lambda: seen.states_of("slow-service").count("waiting") >= 2, what="two lives to end")
    finally:
        starting.cancel()
        await seen.supervisor.stop()
    reasons = {status.reason for status in seen.states if status.state == "waiting"}
    assert reasons == {exit_text(EXIT_DEFECT)}
    assert [status.restarts for status in seen.states if status.state == "waiting"][:2] == [1, 2]
    assert any("broken on purpose" in line and "Traceback" in line for line in seen.lines)


async def test_a_defect_in_an_event_handler_ends_the_process_too(tmp_path: Path, server: NatsServer) -> None:
    """A subscription that goes on with a state that may be wrong would be worse than a restart."""
    async with watched(tmp_path, server, slow_spec(COMPUTEMESH_FAIL="handler")) as seen, connected(server) as bus:
        (service,) = seen.supervisor.services
        assert service.status.state == "ready"
        await bus.publish(nodes.DISCOVER, Discover())
        await until(lambda: service.status.restarts == 1 and service.status.state == "ready", what="the next life")
        assert exit_text(EXIT_DEFECT) in {status.reason for status in seen.states}


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
async def test_a_service_that_anyone_ended_is_started_again(
    tmp_path: Path, server: NatsServer, sig: signal.Signals
) -> None:
    """Killed or asked: unless the supervisor wanted it, it comes back."""
    async with watched(tmp_path, server, slow_spec()) as seen:
        (service,) = seen.supervisor.services
        before, http = service.status.pid, service.status.http
        os.kill(before, sig)
        await until(lambda: service.status.restarts == 1 and service.status.state == "ready", what="the next life")
        assert service.status.pid != before
        assert service.status.http == http, "who was told where it is finds it again"
        how = exit_text(-sig if sig is signal.SIGKILL else 0)
        assert how in {status.reason for status in seen.states}


async def test_a_service_whose_port_was_taken_meanwhile_gets_another_one(tmp_path: Path, server: NatsServer) -> None:
    """If any would do in the first place."""
    async with watched(tmp_path, server, slow_spec()) as seen:
        (service,) = seen.supervisor.services
        before = urlsplit(service.status.http).port
        os.kill(service.status.pid, signal.SIGKILL)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

            def taken() -> bool:
                with contextlib.suppress(OSError):
                    other.bind(("127.0.0.1", before))
                    other.listen()
                    return True
                return False

            await until(taken, what="the port is free")
            await until(lambda: service.status.restarts == 1 and service.status.state == "ready", what="the next life")
            assert urlsplit(service.status.http).port not in (before, None)


async def test_what_cannot_be_set_up_is_tried_ever_more_seldom_and_said_when_the_reason_changes(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is too small for a stream."""
    reasons = ["no space"] * 5 + ["no leader"] + ["no space"]
    pauses: list[float] = []

    async def provision(_: Bus, *, replicas: int) -> None:
        if reasons:
            raise NotStored(f"{reasons.pop(0)}, {replicas}")

    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(lifecycle, "provision", provision)
    monkeypatch.setattr(lifecycle, "PROVISION_S", (0.57, 4.0))  # As nobody else pauses.
    monkeypatch.setattr(asyncio, "sleep", sleep)
    read_fd, write_fd = os.pipe()
    tell = lifecycle._Supervisor(write_fd)
    bus = Bus(Where(url=server.url(Role.SERVICES), role=Role.SERVICES, name="t"))
    try:
        assert await lifecycle._connect(bus, Role.SERVICES, ServiceConfig(), asyncio.Event(), tell)
    finally:
        monkeypatch.undo()
        await bus.close()
        os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        told = [json.loads(line)["unready"] for line in pipe]
    assert told == [f"cannot set up streams and buckets: {why}, 1" for why in ("no space", "no leader", "no space")]
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot set up" in line]
    assert [next(word for word in ("space", "leader") if word in line) for line in said] == ["space", "leader", "space"]
    assert [one for one in pauses if one in (0.57, 1.14, 2.28, 4.0)] == [0.57, 1.14, 2.28, 4.0, 4.0, 4.0, 4.0]


# --- the server goes and comes back ------------------------------------------------------------------------------


async def test_services_are_not_ready_without_the_server_and_see_afterwards_what_changed(
    tmp_path: Path, server: NatsServer
) -> None:
    """The same processes; ready within 5 s, with what was written and removed while they were away."""
    control_plane = [
        ServiceSpec(name=spec.name, module=spec.module, role=spec.role, port=0)
        for spec in SERVICES
        if spec.role is Role.SERVICES
    ]
    async with watched(tmp_path, server, *control_plane) as seen, httpx.AsyncClient() as http:
        services = seen.supervisor.services
        pids = [service.status.pid for service in services]
        async with connected(server) as bus:
            bucket = Bucket(bus, storage.NODES)
            await bucket.create("stays", NodeRecord(node_id="stays"))
            doomed = await bucket.create("goes", NodeRecord(node_id="goes"))
            await bucket.create("vanishes", NodeRecord(node_id="vanishes"))
            await until_nodes(bus, {"stays", "goes", "vanishes"}, within_s=5)
        server.kill()
        await server.wait()
        for service in services:
            await until_ready(http, service.status.http, ready=False, within_s=5)
            ready = (await http.get(f"{service.status.http}/readyz")).json()
            assert ready == {"status": "not ready", "reason": "no connection to NATS"}
            health = await http.get(f"{service.status.http}/healthz")
            assert (health.status_code, health.json()["problem"]) == (503, "no connection to NATS")
        # Stopped, they cannot be faster than the changes they are to miss.
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await server.start()
            async with connected(server) as bus:
                bucket = Bucket(bus, storage.NODES)
                await bucket.create("comes", NodeRecord(node_id="comes"))
                await bucket.purge("goes", last=doomed)
                # Without a marker, as when a key's marker expired before anyone looked.
                without_trace = b'{"filter": "%s"}' % storage.NODES.subject("vanishes").encode()
                await bus.call(f"$JS.API.STREAM.PURGE.{storage.NODES.stream}", without_trace)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        async with connected(server) as bus, asyncio.timeout(5):
            await until_nodes(bus, {"stays", "comes"}, within_s=5)
            for service in services:
                await until_ready(http, service.status.http, ready=True, within_s=5)
        assert [service.status.pid for service in services] == pids


async def until_ready(http: httpx.AsyncClient, url: str, *, ready: bool, within_s: float) -> None:
    """Waits until ``/readyz`` says so."""
    async with asyncio.timeout(within_s):
        while (await http.get(f"{url}/readyz")).status_code != (200 if ready else 503):
            await asyncio.sleep(0.02)


async def until_nodes(bus: Bus, wanted: set[str], *, within_s: float) -> None:
    """Waits until the registry knows exactly these nodes."""
    found: set[str] | Refused | str = ""
    try:
        async with asyncio.timeout(within_s):
            while found != wanted:
                try:
                    answer = await bus.ask(nodes.QUERY, NodesQuery(), timeout_s=0.5)
                    found = {node.node_id for node in answer.nodes} if isinstance(answer, NodeList) else answer
                except NoResponder as error:
                    found = str(error)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"the registry knows {found}, not {wanted}") from None
