"""The interface of an executor."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import msgspec

from computemesh.contracts.base import Message, Refused, convert
from computemesh.contracts.gpus import GpuShare

P = TypeVar("P", bound=Message)


class EngineAddress(Message, frozen=True, kw_only=True):
    """An inference engine on this machine that serves the task's model."""

    base_url: str
    """Such as ``http://127.0.0.1:40001``; OpenAI paths start with ``/v1`` below it."""
    model: str
    """The name to send as ``model``."""


class Task(Message, frozen=True, kw_only=True):
    """One attempt at one work item, as an executor sees it."""

    work_id: str
    attempt: int
    work_type: str
    model_name: str = ""
    payload: dict[str, Any] = {}
    timeout_s: float = 3600.0
    engine: EngineAddress | None = None
    """Set when the executor's class says :attr:`Executor.needs_engine`."""
    traceparent: str = ""
    """W3C trace context of the request; also in the environment, as ``TRACEPARENT``."""
    replica: int = 0
    """Which of the item's replicas this is, from 0."""
    replicas: int = 1
    """How many there are; they started together."""
    peers: list[str] = []
    """The nodes of all replicas, in order, when there is more than one."""
    gpus: list[GpuShare] = []
    """What is reserved for this attempt: it may use no other GPUs, and no more of their memory."""
    environment: dict[str, str] = {}
    """What the process has in its environment from here on, besides what it was born with."""

    def payload_as(self, kind: type[P]) -> P:
        """The payload as a message of *kind*.

        Raises:
            ExecutionError: it is none; the reason names the field, the code is ``bad_payload``.
        """
        parsed = convert(self.payload, kind)
        if isinstance(parsed, Refused):
            field = ".".join(filter(None, ("payload", parsed.field)))
            raise ExecutionError(f"{field}: {parsed.reason}", code="bad_payload")
        return parsed


class ExecutionError(Exception):
    """A failure to show the submitter. Anything else that escapes ``run`` is the node's fault.

    Args:
        fault: ``work`` when it would fail on every node: it is then not tried again.
    """

    def __init__(self, reason: str, *, code: str = "failed", fault: Literal["work", "node"] = "work") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.fault: Literal["work", "node"] = fault


class Progress(Protocol):
    def __call__(self, message: str = "", *, fraction: float | None = None) -> None:
        """Tells whoever watches how far the run is. Cheap: reports that come too fast are thinned out."""


class Executor(ABC):
    """Runs work of one type. A new object, in a new process, for every attempt.

    Called in this order, each once: ``prepare``, ``run``, ``teardown`` (also when one of them raised).
    Cancellation and timeout end the process group: SIGTERM, then SIGKILL 0.7 s later.
    """

    needs_engine: ClassVar[bool] = False
    """Whether the node must have an inference engine serving ``task.model_name`` before a run starts."""

    def prepare(self) -> None:
        """Load what any task needs. Runs ahead of time, before a task is known, so it saves waiting.

        It must not touch a GPU: which one the task may use is only known when ``run`` begins.
        """

    @abstractmethod
    def run(self, task: Task, out_dir: Path, progress: Progress) -> Any:
        """Do the work and give its result, a JSON value. It is also written to ``out_dir/responses.json``.

        Args:
            out_dir: a folder of this item for whatever files the work makes; standard output and error are
                already captured there, each attempt's in a file of its own. ``log.txt`` leads to the latest.

        Raises:
            ExecutionError: with a reason for the submitter.
        """

    def teardown(self) -> None:
        """Free what ``prepare`` and ``run`` took. Must bear being called after either failed."""

    def save_json(self, path: Path, data: Any) -> None:
        """Writes *data* to *path* as JSON, in one step: whoever reads finds all of it, or what was there before.

        Raises:
            TypeError, ValueError: *data* is not a JSON value.
            OSError: it cannot be written.
        """
        save_json(path, msgspec.json.encode(data))


def save_json(path: Path, data: bytes) -> None:
    """Replaces *path* with *data*, which is JSON, set out for people to read."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(msgspec.json.format(data, indent=2) + b"\n")
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
