"""What ``python -m computemesh.nanoctrl`` keeps of a control plane that runs in the background, and what it reads from
the environment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from computemesh.cli.common import Failure
from computemesh.paths import Home, write_private

LOOK_S: Final = 0.05

SCHEMES: Final = ("nats", "tls")

LEVELS: Final = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "off": "critical",
}
"""Our log levels by those of NanoCtrl's server."""

_OPEN_TO_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept beside the pid, for people and programs that read NanoCtrl's own."""

    pid: int
    address: str
    cmd: list[str]
    log: str
    started_at: int
    """Unix seconds."""
    health: str = ""
    """Where it is asked whether it is well, if that is not :attr:`address`."""


class Busy(Exception):
    """Another start is under way."""


@dataclass(frozen=True)
class Folder:
    """The runtime folder. Whether something runs is known by the lock of :attr:`home` alone: a pid may be another
    program's by now."""

    path: Path

    @property
    def home(self) -> Home:
        """The mesh of one service that the control plane is."""
        return Home(self.path / "mesh")

    @property
    def log(self) -> Path:
        return self.path / "nanoctrl.log"

    @property
    def _pid(self) -> Path:
        return self.path / "nanoctrl.pid"

    @property
    def _meta(self) -> Path:
        return self.path / "nanoctrl.meta.json"

    def note(self, meta: Meta) -> None:
        write_private(self._pid, f"{meta.pid}\n")
        write_private(self._meta, msgspec.json.format(msgspec.json.encode(meta)).decode() + "\n")

    def noted(self, pid: int) -> Meta | None:
        """What was noted of the process that runs; None for another one."""
        try:
            meta = msgspec.json.decode(self._meta.read_bytes(), type=Meta)
        except (OSError, ValueError):
            return None
        return meta if meta.pid == pid else None

    def forget(self) -> None:
        self._pid.unlink(missing_ok=True)
        self._meta.unlink(missing_ok=True)

    @contextmanager
    def starting(self, within_s: float) -> Generator[None]:
        """One start at a time.

        Raises:
            Busy: another one takes longer than this.
        """
        descriptor = os.open(self.path / "starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline_s = time.monotonic() + within_s
        try:
            while not _locked(descriptor):
                if time.monotonic() > deadline_s:
                    raise Busy
                time.sleep(LOOK_S)
            yield
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def folder(environ: Mapping[str, str] = os.environ) -> Folder:
    """The runtime folder, made when absent: ``NANOCTRL_RUNTIME_DIR``, else ``nanoctrl`` in ``XDG_RUNTIME_DIR``, else
    in the folder for temporary files.

    Raises:
        Failure: it is another user's, or others can write to it: what lies there could be anybody's.
    """
    if named := environ.get("NANOCTRL_RUNTIME_DIR"):
        path = Path(named).expanduser().absolute()
    else:
        path = Path(environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / "nanoctrl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.stat() if named else path.lstat()  # A link that nobody named may be anybody's.
    except OSError as error:
        raise Failure(f"{path}: {(error.strerror or str(error)).lower()}", field="NANOCTRL_RUNTIME_DIR") from None
    wrong = ""
    if not stat.S_ISDIR(found.st_mode):
        wrong = f"{path} is no folder"
    elif found.st_uid != os.getuid():
        wrong = f"{path} belongs to another user"
    elif found.st_mode & _OPEN_TO_OTHERS:
        wrong = f"other users can write to {path}"
    if wrong:
        raise Failure(wrong, hint="NANOCTRL_RUNTIME_DIR names another folder", field="NANOCTRL_RUNTIME_DIR")
    return Folder(path)


def bus_url(told: str, environ: Mapping[str, str] = os.environ) -> str:
    """The NATS server to use, ``NANOCTRL_REDIS_URL`` before what the command line says; empty for one of our own.

    Raises:
        Failure: it is the address of something else. The message has no more of it than its scheme: there
            may be a password in it.
    """
    name, url = "NANOCTRL_REDIS_URL", environ.get("NANOCTRL_REDIS_URL", "")
    if not url:
        name, url = "--nats-url", told
    for server in filter(None, url.split(",")):
        scheme, found, _ = server.strip().partition("://")
        if scheme in ("redis", "rediss", "redis+unix", "unix") and found:
            raise Failure(
                f"{name} is the address of a Redis server, and this control plane keeps what it knows in NATS",
                hint="leave it out for a server of its own, or write nats://host:port",
                field=name,
            )
        try:
            usable = scheme in SCHEMES and bool(urlsplit(server.strip()).hostname)
        except ValueError:
            usable = False
        if not usable:
            raise Failure(f"{name} is no address of a NATS server", hint="write nats://host:port", field=name)
    return url


def log_level(environ: Mapping[str, str] = os.environ) -> str:
    """The log level that ``NANOCTRL_RUST_LOG`` asks for, as a level or in the form ``nanoctrl=debug,tower=warn``, of
    which the part for ``nanoctrl``, or the one without a name, counts; empty where it is not set.

    Raises:
        Failure: it is none.
    """
    text = environ.get("NANOCTRL_RUST_LOG", "").strip()
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        target, _, level = part.strip().rpartition("=")
        found[target] = level.lower()
    wanted = found.get("nanoctrl") or found.get("") or ("info" if found else "")
    if wanted and wanted not in LEVELS:
        known = ", ".join(level for level in LEVELS if level != "warning")
        raise Failure(f"NANOCTRL_RUST_LOG={text!r}: expected one of {known}", field="NANOCTRL_RUST_LOG")
    return LEVELS[wanted] if wanted else ""
