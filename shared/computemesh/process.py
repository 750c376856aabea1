"""Child processes that never outlive their parent, and end as a whole.

Every child gets a process group of its own, so that stopping it reaches whatever it started. On Linux the
kernel also signals it when its parent dies, ``kill -9`` included; elsewhere a child that must not be
orphaned watches its standard input for end of file.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path
from typing import Final

EXIT_DEFECT: Final = 70
EXIT_CONFIG: Final = 78
"""As in sysexits.h; the supervisor does not restart a service that is configured wrongly."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def _find_prctl() -> Callable[[int, int], int] | None:
    return ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


_PRCTL: Final = _find_prctl()


def dies_with_parent(sig: signal.Signals) -> Callable[[], None] | None:
    """A ``preexec_fn`` that asks the kernel to send *sig* to the child when its parent dies.

    The function was looked up beforehand, so the forked child only makes system calls. The parent is the
    *thread* that forks: call this from the main thread.
    """
    if _PRCTL is None:
        return None
    prctl, parent, number = _PRCTL, os.getpid(), int(sig)

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # It died between the fork and the line above.
            os.kill(os.getpid(), number)

    return ask


def adopt_orphans() -> None:
    """On Linux, makes this process the parent of all below it whose own parent dies, so that :func:`descendants`
    still finds them; elsewhere nothing."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """The processes below *pid*, in whatever group or session; none where the kernel does not tell (not Linux)."""
    found: list[int] = []
    todo = [pid]
    while todo:
        threads = Path(f"/proc/{todo.pop()}/task")
        with contextlib.suppress(OSError):  # It ended meanwhile.
            for thread in threads.iterdir():
                below = [int(word) for word in (thread / "children").read_text().split()]
                todo += below
                found += below
    return found


def signal_group(pid: int, sig: signal.Signals) -> None:
    """Sends *sig* to the process group led by *pid*; a group that is gone is none of our business."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, sig)


async def end(process: Process, *, grace_s: float) -> int:
    """Terminates a child and its group, kills what is left after *grace_s*, and gives the exit status."""
    if process.returncode is None:
        signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    signal_group(process.pid, signal.SIGKILL)
    return await process.wait()


def exit_text(status: int) -> str:
    """How a process ended, to stand behind its name."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
