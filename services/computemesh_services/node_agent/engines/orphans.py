"""Engines that outlived their agent.

On Linux the kernel ends an engine with the agent that started it, but not what the engine itself has started: a wrapper
around llama-server, for example. So each engine is born with a random mark in its environment, which all below it
inherit, and the mark is kept in a file for as long as the engine runs. A new life of the agent ends every process that
has a mark out of a file whose agent is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

import msgspec
import psutil

from computemesh.paths import private_folder, write_private

MARK: Final = "COMPUTEMESH_ENGINE_MARK"
"""The variable that holds the mark."""

GONE_S: Final = 5.0
"""Bound on the wait until killed processes are gone."""


class _Record(msgspec.Struct):
    device: str
    agent_pid: int
    agent_started_at: float
    """Unix seconds; a process id alone may be another process by now."""


class Marks:
    """The marks of the engines that run now, in files of *folder*."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new(self, device: str) -> str:
        """A mark for an engine that is about to start.

        Raises:
            OSError: it cannot be written down.
        """
        mark = secrets.token_hex(16)
        me = psutil.Process()
        record = _Record(device=device, agent_pid=me.pid, agent_started_at=me.create_time())
        write_private(private_folder(self._folder) / f"{mark}.json", msgspec.json.encode(record).decode())
        return mark

    def drop(self, mark: str) -> None:
        """The engine with this mark has ended; so does what it has started and left. Blocks for a bounded time."""
        for process in psutil.process_iter():
            if _mark_of(process) == mark:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(OSError):
            (self._folder / f"{mark}.json").unlink()

    def reap(self) -> list[str]:
        """Ends what agents that are gone have left running, and gives a line about each process. Blocks for a bounded
        time; never raises."""
        left = {path.stem: path for path in _files(self._folder) if not _agent_lives(path)}
        if not left:
            return []
        found = [(process, mark) for process in psutil.process_iter() if (mark := _mark_of(process)) in left]
        ended: list[str] = []
        for process, _ in found:
            with contextlib.suppress(psutil.Error):
                ended.append(f"process {process.pid} ({process.name()})")
                process.kill()
        _, alive = psutil.wait_procs([process for process, _ in found], timeout=GONE_S)
        still = {mark for process, mark in found if process in alive}
        for mark, path in left.items():
            if mark not in still:
                path.unlink(missing_ok=True)
        return ended


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _agent_lives(path: Path) -> bool:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
        return abs(psutil.Process(record.agent_pid).create_time() - record.agent_started_at) < 1.0
    except (OSError, ValueError, psutil.Error):
        return False


def _mark_of(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return ""
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):  # Somebody else's, or it has ended.
        return ""
