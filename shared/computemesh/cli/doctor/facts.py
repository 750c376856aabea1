"""What the doctor looked at: plain values, gathered by :mod:`.gather` and judged by :mod:`.checks`.

A part that could not be looked at is None, and :attr:`Facts.unseen` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from computemesh.contracts.nodes import NodeView
from computemesh.contracts.work import Blacklisted, WorkSummary
from computemesh.findings import Finding


@dataclass(frozen=True, kw_only=True)
class File:
    """A file or folder that must be private."""

    path: str
    exists: bool = True
    mode: int = 0o600
    owned: bool = True
    """By the user who asks."""
    readable: bool = True
    problem: str = ""
    """Why it cannot be used, as far as that was tried."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process the supervisor started, as it says and as the system says."""

    name: str
    state: str = "ready"
    pid: int = 0
    restarts: int = 0
    since: float = 0.0
    """Unix seconds of its last change of state."""
    reason: str = ""
    unready: str = ""
    """What keeps it from being ready, as it says itself."""
    http: str = ""
    alive: Literal["running", "stopped", "gone", "unknown"] = "unknown"
    """``stopped`` is halted by a signal, as by SIGSTOP."""
    open_files: int = 0
    open_files_max: int = 0
    """0 = not told."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The supervisor of this home and what it keeps running."""

    running: bool
    unreadable: str = ""
    """Why it cannot be told whether one runs."""
    pid: int = 0
    alive: Literal["running", "stopped", "gone", "unknown"] = "unknown"
    version: str = ""
    started_at: float = 0.0
    embedded: bool = True
    joined: bool = False
    """It is a node of a mesh that runs elsewhere."""
    node_id: str = ""
    processes: Sequence[Process] = ()

    def expects(self, service: str) -> bool:
        """Whether the mesh is meant to have a service. A control plane by itself has no other; what a node that joined
        sees of its mesh runs elsewhere."""
        return self.joined or not self.processes or any(process.name == service for process in self.processes)


@dataclass(frozen=True, kw_only=True)
class Port:
    """A documented port."""

    service: str
    port: int
    holder: str = ""
    """What listens there already; empty when it is free."""


@dataclass(frozen=True, kw_only=True)
class Login:
    """An attempt to connect with the credentials of one role."""

    role: str
    address: str
    """Without credentials."""
    outcome: Literal["ok", "refused", "denied", "silent"]
    """``refused``: nothing listens there. ``denied``: the credentials are wrong. ``silent``: no answer in time."""
    words: str = ""
    took_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Store:
    """JetStream, as far as this account may use it."""

    enabled: bool
    problem: str = ""
    used_bytes: int = 0
    bytes_max: int = -1
    """-1 = not bounded."""
    reserved_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream or bucket, as it is."""

    name: str
    owner: str
    missing: bool = False
    bytes: int = 0
    bytes_max: int = -1
    messages: int = 0
    differs: Sequence[str] = ()
    """Settings that are not as declared."""
    replicas: int = 1
    behind: Sequence[str] = ()
    """Replicas that are offline or not current."""
    leaderless: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A service that answered ``$SRV.PING``."""

    name: str
    instance: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The answer of a service's ``/readyz``."""

    service: str
    url: str
    status: int = 0
    """0 = none."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far another clock is ahead of ours."""

    whose: str
    ahead_s: float
    within_s: float
    """How far the measurement may be off."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What waits and what went wrong."""

    counts: Mapping[str, int]
    """By state."""
    oldest: WorkSummary | None = None
    """The pending item that waits longest."""
    why: str = ""
    """What the marshaller says about it."""
    retrying: WorkSummary | None = None
    dead: WorkSummary | None = None
    """The newest of each."""
    blacklisted: Sequence[Blacklisted] = ()


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A subject that the server denied to somebody, from its log or a service's."""

    who: str
    """The user of the connection, or the service that logged it."""
    verb: str
    """``publish`` or ``subscription``; ``login`` for credentials that were refused."""
    subject: str
    count: int
    last_at: float
    client: str = ""


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """An error that a service logged, over and over perhaps."""

    service: str
    event: str
    reason: str
    count: int
    last_at: float
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Disk:
    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Package:
    """A dependency of ours."""

    name: str
    least: str
    """The oldest version that will do."""
    found: str
    """Empty when it is not installed."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of it, at one time."""

    now: float
    """Unix seconds."""
    version: str
    external: bool = False
    """``NATS_URL`` is set: the mesh that is looked at is the one there."""
    home: File
    secrets: Sequence[File] = ()
    supervision: Supervision
    ports: Sequence[Port] = ()
    logins: Sequence[Login] = ()
    store: Store | None = None
    streams: Sequence[Stream] | None = None
    answers: Sequence[Answer] | None = None
    edges: Sequence[Edge] = ()
    leases: Mapping[str, str] | None = None
    """Holder by service."""
    clocks: Sequence[Clock] = ()
    nodes: Sequence[NodeView] | None = None
    work: Work | None = None
    violations: Sequence[Violation] = ()
    complaints: Sequence[Complaint] = ()
    disk: Disk | None = None
    python: tuple[int, int, int] = (3, 11, 0)
    packages: Sequence[Package] = ()
    open_files_max: int = 0
    machine: Sequence[Finding] = ()
    """What the services' own programs found on this machine: models, engines, drivers."""
    unseen: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why a part is None, by its name."""
