"""Keeps the processes of a mesh running on one machine: the embedded NATS server and the services.

Each service is a process of its own, started again with a growing pause when it dies; one that says its
configuration is wrong is not. A service says that it is ready through a pipe it inherits, its log lines
go to a file of its own and to one common stream. When the supervisor dies, ``kill -9`` included, the
kernel tells its children to end (see :mod:`computemesh.process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging.handlers
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec

from computemesh import __version__, log
from computemesh.config import ConfigError, ServiceConfig, load
from computemesh.contracts.base import Role
from computemesh.nats_server import LOOPBACK, NatsServer
from computemesh.paths import Home, private_folder, write_private
from computemesh.process import EXIT_CONFIG, dies_with_parent, end, exit_text

BACKOFF_S_MIN: Final = 0.2
BACKOFF_S_MAX: Final = 10.0
"""Bounds on the pause before a service that died is started again."""

STEADY_S: Final = 30.0
"""A service that lived this long starts its next life with the shortest pause."""

LATE_S: Final = 5.0
"""How long after its time to drain a service is killed."""

STAGES: Final = 3
"""In which services end, one after the other: those of clients, of nodes, and the others."""

LOG_BYTES_MAX: Final = 10 * 1024 * 1024
LOG_FILES: Final = 3

LINE_BYTES_MAX: Final = 1024 * 1024

State = Literal["starting", "ready", "waiting", "failed", "stopped"]

_log = log.get("supervisor")


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """How to run a service."""

    name: str
    module: str
    role: Role
    port: int
    """Of its HTTP edge; 0 = any."""
    url_names: tuple[str, ...] = ()
    """Environment variables under which other programs expect the edge's address."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    copies: int = 1


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A service as the supervisor sees it."""

    name: str
    state: State
    pid: int = 0
    http: str = ""
    restarts: int = 0
    since: float = 0.0
    reason: str = ""
    """Why it failed, or how its last life ended."""
    unready: str = ""
    """What keeps it from being ready, in its own words, when it takes long."""


class MeshStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What runs on this machine; kept in ``run/mesh.json`` for the command line."""

    pid: int
    version: str
    started_at: float
    ready: bool
    embedded: bool
    """Whether the NATS server is ours."""
    stop_s: float = 90.0
    """How long it may take to end."""
    joined: bool = False
    """Whether this is a node of a mesh that runs elsewhere."""
    problem: str = ""
    """What keeps it from its mesh now, when it is known."""
    nats_urls: dict[str, str]
    """By role, with credentials; a node that joined has those of a node only."""
    token: str
    node_id: str
    services: list[ServiceStatus]
    url_names: dict[str, list[str]]

    def expects(self, service: str) -> bool:
        """Whether the mesh is meant to have a service: one of which only a node runs here has all."""
        return self.joined or any(known.name == service for known in self.services)


OnLine = Callable[[str, bytes], None]
"""Takes the name of a service and a line it wrote."""


class Supervised:
    """One service process, kept alive."""

    def __init__(
        self,
        spec: ServiceSpec,
        environment: Mapping[str, str],
        log_file: Path,
        *,
        name: str,
        on_line: OnLine,
        on_change: Callable[[], None],
    ) -> None:
        self.spec: Final = spec
        self.name: Final = name
        self.status = ServiceStatus(name=name, state="starting")
        self.ready = asyncio.Event()
        """Set while the service can serve, and for good when it failed or was stopped."""
        self._environment = dict(environment)
        self._on_line = on_line
        self._on_change = on_change
        self._log_file = log_file
        self._process: Process | None = None
        self._port = ""
        """Of the life before, where any will do: whoever was told of it finds the service there again."""
        self._stopping = asyncio.Event()

    async def keep(self) -> None:
        """Runs the service until :meth:`stop`, in as many lives as it takes."""
        pause_s = BACKOFF_S_MIN
        while not self._stopping.is_set():
            born_s = time.monotonic()
            status = await self._live()
            if self._stopping.is_set():
                break
            if status == EXIT_CONFIG and self._port:
                self._port = ""  # Another program may have it now.
                continue
            if status == EXIT_CONFIG:
                self._set(state="failed", reason=f"wrong configuration; see {self._log_file}")
                self.ready.set()
                return
            if time.monotonic() - born_s > STEADY_S:
                pause_s = BACKOFF_S_MIN
            how = exit_text(status)
            _log.warning("a service died", of=self.name, how=how, again_in_s=round(pause_s, 1))
            self._set(state="waiting", reason=how, pid=0, restarts=self.status.restarts + 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(BACKOFF_S_MAX, pause_s * 2)
        self._set(state="stopped", pid=0)
        self.ready.set()

    async def stop(self) -> None:
        """Tells the service to drain, and kills it when it takes too long."""
        self._stopping.set()
        if self._process is not None:
            await end(self._process, grace_s=drain_timeout_s(self._environment) + LATE_S)

    async def _live(self) -> int:
        read_fd, write_fd = os.pipe()
        environment = {**self._environment, "COMPUTEMESH_READY_FD": str(write_fd)}
        if self._port:
            environment["COMPUTEMESH_HTTP_PORT"] = self._port
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.spec.module,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                limit=LINE_BYTES_MAX,
                env=environment,
                pass_fds=(write_fd,),
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._set(state="starting", pid=process.pid, unready="")
        ready = asyncio.create_task(self._hear_ready(read_fd))
        try:
            await self._copy_log(process)
            return await process.wait()
        finally:
            ready.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ready
            self.ready.clear()

    async def _hear_ready(self, descriptor: int) -> None:
        """Waits for the line that a ready service writes; those before it say why it is not. The pipe closes by itself
        when it dies before."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        try:
            while line := await reader.readline():
                said = msgspec.json.decode(line, type=dict[str, str])
                if reason := said.get("unready"):
                    self._set(unready=reason)
                    continue
                http = said.get("http", "")
                if self._environment["COMPUTEMESH_HTTP_PORT"] == "0":
                    self._port = str(urlsplit(http).port or "")
                self._set(state="ready", http=http, reason="", unready="")
                self.ready.set()
                return
        finally:
            transport.close()

    async def _copy_log(self, process: Process) -> None:
        assert process.stdout is not None
        file = logging.handlers.RotatingFileHandler(self._log_file, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES)
        try:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    continue  # Longer than LINE_BYTES_MAX: dropped, reading goes on behind it.
                if not line:
                    return
                text = line.decode("utf-8", "replace").rstrip("\n")
                file.emit(logging.makeLogRecord({"msg": text}))
                self._on_line(self.name, line)
        finally:
            file.close()

    def _set(self, **changes: object) -> None:
        if "state" in changes:
            changes["since"] = time.time()
        self.status = msgspec.structs.replace(self.status, **changes)
        self._on_change()


def drain_timeout_s(environment: Mapping[str, str]) -> float:
    """How long a service that is told to end may finish what it has; the default where that is set wrongly."""
    try:
        return load(ServiceConfig, environment).drain_timeout_s
    except ConfigError:
        return ServiceConfig().drain_timeout_s


class HomeTaken(Exception):
    """Another supervisor runs on this home; the message says which."""


class Supervisor:
    """What runs on this machine: a whole mesh, or a node of one that runs elsewhere.

    Args:
        token: of the HTTP edges.
        nats_urls: a server to use instead of an embedded one, as each role reaches it; only as nodes do where
            nothing else runs here. An embedded one has the credentials in *home*, with a user for this node.
        nats_host: address the embedded server listens on.
    """

    def __init__(
        self,
        home: Home,
        specs: list[ServiceSpec],
        *,
        token: str,
        node_id: str,
        nats_urls: Mapping[Role, str] | None = None,
        nats_port: int = 0,
        nats_host: str = LOOPBACK,
        on_line: OnLine,
        on_status: Callable[[ServiceStatus], None] = lambda _: None,
    ) -> None:
        self._home = home
        self._specs = specs
        self._token = token
        self._node_id = node_id
        self._nats_urls = dict(nats_urls or {})
        self._problem = ""
        self._on_line = on_line
        self._on_status = on_status
        self._started_at = time.time()
        self._server = None if nats_urls else NatsServer(home.nats, home.credentials, nats_port, host=nats_host)
        self._server_status = ServiceStatus(name="nats-server", state="starting")
        self._services: list[Supervised] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._seen: dict[str, tuple[State, str]] = {}
        self._stopping = False
        self._lock = -1

    @property
    def services(self) -> list[Supervised]:
        return self._services

    @property
    def server(self) -> NatsServer | None:
        """The embedded server, if there is one."""
        return self._server

    def url(self, role: Role) -> str:
        """The bus as *role* reaches it; for the role of nodes, as this node does."""
        if self._server is not None:
            return self._server.url(role, self._node_id if role is Role.NODE else "")
        return self._nats_urls[role]

    async def start(self) -> None:
        """Starts everything and returns when all is ready or failed.

        Raises:
            HomeTaken: it is running already.
            ServerError: the NATS server cannot be started.
        """
        for folder in (self._home.root, self._home.run, self._home.logs, self._home.work):
            private_folder(folder)
        self._take_lock()
        if self._server is not None:
            await self._server.start()
            self._server_changed("ready")
            self._tasks.append(asyncio.create_task(self._keep_server(self._server)))
        for spec in self._specs:
            for copy in range(spec.copies):
                self._add(spec, copy)
        await asyncio.gather(*(service.ready.wait() for service in self._services))

    def _add(self, spec: ServiceSpec, copy: int) -> None:
        name = spec.name if copy == 0 else f"{spec.name}-{copy + 1}"
        service = Supervised(
            spec,
            self._environment(spec, name, 0 if copy else spec.port),
            self._home.logs / f"{name}.log",
            name=name,
            on_line=self._on_line,
            on_change=self._changed,
        )
        self._services.append(service)
        self._tasks.append(asyncio.create_task(service.keep()))

    async def stop(self) -> None:
        """Ends everything: what lets work in, nodes, so that they can hand theirs back, and the bus last."""
        self._stopping = True
        for roles in ((Role.CLIENT,), (Role.NODE,), (Role.SERVICES,)):
            await asyncio.gather(*(service.stop() for service in self._services if service.spec.role in roles))
        if self._server is not None:
            await self._server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._lock >= 0:
            self._status_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    async def failed(self) -> None:
        """Returns when the NATS server cannot be kept running."""
        if self._tasks and self._server is not None:
            await asyncio.wait({self._tasks[0]})
        else:
            await asyncio.Event().wait()

    async def _keep_server(self, server: NatsServer) -> None:
        pause_s = BACKOFF_S_MIN
        while True:
            status = await server.wait()
            if self._stopping:
                return
            restarts = self._server_status.restarts + 1
            _log.warning("the NATS server died", how=exit_text(status))
            self._server_status = msgspec.structs.replace(self._server_status, restarts=restarts)
            self._server_changed("starting")
            try:
                await server.start()
                pause_s = BACKOFF_S_MIN
            except Exception as error:
                _log.error("cannot start the NATS server again", reason=str(error), again_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(BACKOFF_S_MAX, pause_s * 2)
                continue
            self._server_changed("ready")

    def _environment(self, spec: ServiceSpec, name: str, port: int) -> dict[str, str]:
        # A service knows the bus as its own role and no other.
        inherited = {k: v for k, v in os.environ.items() if "NATS_URL" not in k}
        return {
            **inherited,
            "NATS_URL": self.url(spec.role),
            "COMPUTEMESH_HOME": str(self._home.root),
            "COMPUTEMESH_HTTP_PORT": str(port),
            "COMPUTEMESH_INSTANCE": f"{name}-{self._node_id}"[:63],
            "COMPUTEMESH_NODE_ID": self._node_id,
            "COMPUTEMESH_TOKEN": self._token,
            "COMPUTEMESH_LOG_FORMAT": "json",
            "PYTHONUNBUFFERED": "1",
            **spec.environment,
        }

    # --- what is known about it ----------------------------------------------------------------------------------

    def status(self) -> MeshStatus:
        services = [service.status for service in self._services]
        if self._server is not None:
            services.insert(0, self._server_status)
        return MeshStatus(
            stop_s=STAGES * (drain_timeout_s(os.environ) + LATE_S) + LATE_S,
            pid=os.getpid(),
            version=__version__,
            started_at=self._started_at,
            ready=bool(self._services) and all(service.state == "ready" for service in services),
            embedded=self._server is not None,
            joined=self._server is None and Role.SERVICES not in self._nats_urls,
            problem=self._problem,
            nats_urls={role.value: self.url(role) for role in Role if self._server or role in self._nats_urls},
            token=self._token,
            node_id=self._node_id,
            services=services,
            url_names={service.name: list(service.spec.url_names) for service in self._services},
        )

    def tell_problem(self, problem: str) -> None:
        """Keeps, for the command line, what is wrong with the way to the mesh; empty when nothing is."""
        if problem != self._problem:
            self._problem = problem
            self._changed()

    def _server_changed(self, state: State) -> None:
        assert self._server is not None
        self._server_status = msgspec.structs.replace(
            self._server_status,
            state=state,
            pid=self._server.pid if state == "ready" else 0,
            since=time.time(),
        )
        self._changed()

    @property
    def _status_file(self) -> Path:
        return self._home.run / "mesh.json"

    def _changed(self) -> None:
        status = self.status()
        if self._lock >= 0:
            write_private(self._status_file, msgspec.json.encode(status).decode())
        for service in status.services:
            seen = service.state, service.unready
            if self._seen.get(service.name) != seen:
                self._seen[service.name] = seen
                self._on_status(service)

    def _take_lock(self) -> None:
        descriptor = os.open(self._home.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise HomeTaken(f"a mesh is running in {self._home.root} already") from None
        self._lock = descriptor
        self._status_file.unlink(missing_ok=True)  # Who was killed left one, with pids that may be others' by now.


def is_running(home: Home) -> bool:
    """Whether a supervisor runs on this home."""
    try:
        descriptor = os.open(home.run / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_status(home: Home) -> MeshStatus | None:
    """What the running supervisor wrote last; None when none runs."""
    if not is_running(home):
        return None
    try:
        return msgspec.json.decode((home.run / "mesh.json").read_bytes(), type=MeshStatus)
    except (OSError, ValueError):
        return None
