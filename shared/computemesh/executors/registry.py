"""Which executors are installed here, found through entry points. Finding one does not import it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from computemesh.executors.base import Executor

GROUP: Final = "computemesh.executors"


class ExecutorUnavailable(Exception):
    """No usable executor of that name; the text says why and what there is."""


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that gives no executor."""

    name: str
    error: str


@dataclass(frozen=True)
class Loaded:
    """What this machine can run, and what it only claims to."""

    executors: dict[str, type[Executor]]
    broken: tuple[BrokenPlugin, ...]


def available() -> dict[str, EntryPoint]:
    """Entry points by work type, sorted. Of two with one name, the first on ``sys.path`` counts."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, entry)
    return dict(sorted(found.items()))


def load(work_type: str) -> type[Executor]:
    """Imports the executor of *work_type*.

    Raises:
        ExecutorUnavailable: there is none, its import fails, or it is not an executor.
    """
    entries = available()
    entry = entries.get(work_type)
    if entry is None:
        raise ExecutorUnavailable(f"no executor '{work_type}' is installed; there is: {', '.join(entries) or 'none'}")
    try:
        found: Any = entry.load()
    except Exception as error:
        text = f"executor '{work_type}' ({entry.value}) cannot be imported: {type(error).__name__}: {error}"
        raise ExecutorUnavailable(text) from error
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ExecutorUnavailable(f"'{work_type}' ({entry.value}) is not a subclass of computemesh.executors.Executor")
    return found


def load_all() -> Loaded:
    """Imports every installed executor into this process. A node agent asks a child process instead."""
    executors: dict[str, type[Executor]] = {}
    broken: list[BrokenPlugin] = []
    for name in available():
        try:
            executors[name] = load(name)
        except ExecutorUnavailable as error:
            broken.append(BrokenPlugin(name, str(error)))
    return Loaded(executors, tuple(broken))
