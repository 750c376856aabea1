"""What the node agent and an executor's process say to each other: JSON, one message a line.

    process  --Ready-->         agent     loaded and prepared; it costs nothing to keep it waiting
    agent    --Start-->         process   the only line it ever reads
    process  --ProgressNote-->  agent     any number of them
    process  --Done / Broke-->  agent     exactly one, the last; ``Broke`` also in place of ``Ready``

The agent holds the process's standard input open. Its end means that the agent is gone, and the process
then kills its own group.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import Message
from computemesh.executors.base import Task

REASON_CHARS_MAX: Final = 4000
"""Bound on a reason or a progress message; whole tracebacks belong in the log."""

LOG_LINK: Final = "log.txt"
"""Name under which people find the log of the latest attempt."""

Text = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]


class Start(Message, frozen=True, kw_only=True):
    """Run this, once."""

    task: Task
    out_dir: str


class Ready(Message, frozen=True, kw_only=True, tag="ready", tag_field="kind"):
    """``prepare`` has returned."""

    needs_engine: bool = False
    """The class's :attr:`computemesh.executors.Executor.needs_engine`."""


class ProgressNote(Message, frozen=True, kw_only=True, tag="progress", tag_field="kind"):
    """How far the run is."""

    message: Text = ""
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


class Done(Message, frozen=True, kw_only=True, tag="done", tag_field="kind"):
    """The run gave a result."""

    result: Any = None


class Broke(Message, frozen=True, kw_only=True, tag="broke", tag_field="kind"):
    """The run, or what comes before it, went wrong. The traceback is in the log only."""

    reason: Text
    code: Annotated[str, msgspec.Meta(max_length=63)] = "failed"
    fault: Literal["work", "node", "mesh"] = "node"
    """`work`: it would fail on every node. `mesh`: said by the agent only, of what it could not get for the run."""


FromExecutor = Ready | ProgressNote | Done | Broke
Outcome = Done | Broke


def log_name(attempt: int) -> str:
    """The file in its folder that an attempt prints into."""
    return f"log-{attempt}.txt"


def plain_text(text: str) -> str:
    """*text* as it can travel: within :data:`REASON_CHARS_MAX`, lone surrogates replaced."""
    return text[:REASON_CHARS_MAX].encode("utf-8", "replace").decode()
