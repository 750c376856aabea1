"""The Unix socket of the peer-agent: who may come in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Final

from computemesh import log
from computemesh.config import ConfigError
from computemesh.contracts.base import Refused
from computemesh.paths import private_folder
from computemesh.peer.frames import Outbox
from computemesh.peer.signals import Frame
from computemesh.peer.socket import socket_address
from computemesh_services.peer_agent.line import Line, OnFrames

BACKLOG: Final = 128
PAUSE_S: Final = 0.2
"""Before the next connection is taken when there are no descriptors left."""

_CREDENTIALS: Final = struct.Struct("3i")
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = log.get("door")


class Door:
    """Takes connections of processes of the same user, or of root."""

    def __init__(self, path: Path, lines_max: int, on: OnFrames) -> None:
        self.path: Final = path
        self.lines: Final[set[Line]] = set()
        """Those that are open."""
        self._lines_max = lines_max
        self._on = on
        self._listener: socket.socket | None = None
        self._inode = 0

    def open(self) -> None:
        """Listens from now on.

        Raises:
            ConfigError: another peer-agent listens there, or something else stands in the way.
        """
        folder = private_folder(self.path.parent)
        self._make_room()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(folder / self.path.name) as address:
                listener.bind(address)
            self.path.chmod(0o600)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen at {self.path}: {error.strerror or error}") from None
        listener.setblocking(False)
        self._inode = self.path.stat().st_ino
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def close(self) -> None:
        """Takes no further connection; those there are go on."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _make_room(self) -> None:
        """Removes what a peer-agent that was killed has left."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise ConfigError(f"{self.path} is there already, and is no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                with socket_address(self.path) as address:
                    probe.connect(address)
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                raise ConfigError(f"cannot tell who listens at {self.path}: {error.strerror or error}") from None
        raise ConfigError(f"another peer-agent listens at {self.path}; each needs a COMPUTEMESH_HOME of its own")

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                _log.error("cannot take a connection", reason=error.strerror)
                self._pause()
                return
            uid, pid = _credentials(sock)
            if uid not in (0, os.getuid()):
                _log.warning("refused a process of another user", pid=pid, uid=uid)
                self._on.refused("refused")
                sock.close()
            elif len(self.lines) >= self._lines_max:
                self._on.refused("too_many_requests")
                reason = f"{self._lines_max} processes are connected, and no more are taken"
                _refuse(sock, Refused(code="too_many_requests", reason=reason, status=429, retry="later"))
            else:
                self.lines.add(Line(sock, pid, self._on, self.lines.discard))

    def _pause(self) -> None:
        assert self._listener is not None, "it has just accepted"
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """The user and the process at the other end. Elsewhere than on Linux the folder alone keeps others out."""
    if sys.platform != "linux":
        return os.getuid(), 0
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return uid, pid


def _refuse(sock: socket.socket, refused: Refused) -> None:
    outbox = Outbox()
    outbox.put(Frame(id=1, refused=refused))
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        outbox.flush(sock)
    outbox.close()
    sock.close()
