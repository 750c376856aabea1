"""What is kept, where, for how long, and who writes it: every stream, bucket and object store, as one table.

``computemesh.bus.provision`` creates these, updates them when this table changes, and reports drift.
Sizes are limits, not reservations made in advance; with R1 storage a limit above the free disk space is
refused by the server, so they are modest.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec

from computemesh.contracts import engines, gpus, keys, nodes, peer_records, work
from computemesh.contracts.base import MESSAGE_BYTES_MAX, Message
from computemesh.contracts.services import CONTROL_PLANE, GPU_ORCHESTRATOR, NODE_REGISTRY, WORK_MARSHALLER

MIB: Final = 1024 * 1024
DAY_S: Final = 86_400.0

LEDGER_HISTORY: Final = 64
"""Values that are kept of each key of a ledger: as many as NATS KV allows."""

V = TypeVar("V", bound=msgspec.Struct)


class Lease(Message, frozen=True, kw_only=True):
    """Who acts for a service at present. Saves effort; the fence is the CAS on each record."""

    holder: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Stream:
    name: str
    subjects: tuple[str, ...]
    owner: str
    """The service that reads it and may purge it."""
    max_age_s: float
    max_bytes: int
    max_message_bytes: int
    duplicate_window_s: float
    about: str


@dataclass(frozen=True, kw_only=True)
class Bucket(Generic[V]):
    name: str
    value: type[V]
    owner: str
    """The only service that writes it."""
    max_bytes: int
    republish: str = ""
    """Subject prefix under which the server publishes each key once it is stored: one of a single token, or in a
    ledger the first token of each."""
    expiry_markers: bool = False
    """Whether a key that expires leaves a marker, so that watchers learn of it."""
    together: bool = False
    """Whether several keys can be written at once, all or none."""
    ledger: bool = False
    """Whether it is read in the order of what was written, not for what stands now: keys have two tokens and the last
    :data:`LEDGER_HISTORY` values, and the oldest go when it is full."""
    about: str

    @property
    def stream(self) -> str:
        return f"KV_{self.name}"

    def subject(self, key: str) -> str:
        return f"$KV.{self.name}.{key}"


@dataclass(frozen=True, kw_only=True)
class ObjectBucket:
    """An object store, as NATS libraries know it: each object is its parts, and a description once it is complete."""

    name: str
    owner: str
    """The only service that reads and writes it."""
    max_age_s: float
    max_bytes: int
    about: str

    @property
    def stream(self) -> str:
        return f"OBJ_{self.name}"

    @property
    def subjects(self) -> tuple[str, ...]:
        return (f"$O.{self.name}.C.>", f"$O.{self.name}.M.>")

    @property
    def meta_subjects(self) -> str:
        return f"$O.{self.name}.M.*"

    def part_subject(self, object_id: str) -> str:
        return f"$O.{self.name}.C.{object_id}"

    def meta_subject(self, object_id: str) -> str:
        return f"$O.{self.name}.M.{base64.urlsafe_b64encode(object_id.encode()).decode()}"


def base64_digest(digest: bytes) -> str:
    """A digest as NATS object stores write it."""
    return base64.urlsafe_b64encode(digest).decode()


def hex_digest(text: str) -> str:
    """What :func:`base64_digest` wrote, in hexadecimal."""
    return base64.urlsafe_b64decode(text).hex()


WORK_INBOX: Final = Stream(
    name="COMPUTE_WORK",
    subjects=(work.SUBMIT.subject, work.COMPLETED.subject, work.FAILED.subject),
    owner=WORK_MARSHALLER.name,
    max_age_s=7 * DAY_S,
    max_bytes=1024 * MIB,
    max_message_bytes=MESSAGE_BYTES_MAX,
    duplicate_window_s=120.0,
    about="Submissions and reports, in the order they came.",
)
NODES: Final = Bucket(
    name="compute-nodes",
    value=nodes.NodeRecord,
    owner=NODE_REGISTRY.name,
    max_bytes=256 * MIB,
    about="Every node that was ever announced, and whether it is alive.",
)
WORK: Final = Bucket(
    name="compute-work",
    value=work.WorkRecord,
    owner=WORK_MARSHALLER.name,
    max_bytes=2048 * MIB,
    republish=work.STATE.subject,
    about="The truth about every work item, until some time after it finished.",
)
GPUS: Final = Bucket(
    name="compute-gpus",
    value=gpus.GpuLedger,
    owner=GPU_ORCHESTRATOR.name,
    max_bytes=256 * MIB,
    together=True,
    about="What is reserved of every node's GPUs, one record a node.",
)
KEYS: Final = Bucket(
    name="compute-keys",
    value=keys.KeyRecord,
    owner=NODE_REGISTRY.name,
    max_bytes=64 * MIB,
    about="API keys of the gateways: their digests and limits.",
)
ENGINES: Final = Bucket(
    name="compute-engines",
    value=engines.Engine,
    owner=CONTROL_PLANE.name,
    max_bytes=256 * MIB,
    expiry_markers=True,
    about="Engines and other entities by name, until nothing is heard of them.",
)
ENGINE_CHANGES: Final = Bucket(
    name="compute-engine-changes",
    value=engines.EngineChange,
    owner=CONTROL_PLANE.name,
    max_bytes=256 * MIB,
    republish=engines.CHANGED.subject,
    ledger=True,
    about="What changed about engines, in order: its sequences are their revisions.",
)
PEERS: Final = Bucket(
    name="compute-peers",
    value=peer_records.PeerRecord,
    owner=CONTROL_PLANE.name,
    max_bytes=128 * MIB,
    expiry_markers=True,
    about="Peer agents by alias, until nothing is heard of them; and the last number that was given as one.",
)
MEMORY: Final = Bucket(
    name="compute-memory",
    value=peer_records.MemoryRecord,
    owner=CONTROL_PLANE.name,
    max_bytes=128 * MIB,
    about="The memory regions that each peer agent offers.",
)
TOPOLOGY: Final = Bucket(
    name="compute-topology",
    value=peer_records.TopologyRecord,
    owner=CONTROL_PLANE.name,
    max_bytes=64 * MIB,
    about="Whom each peer agent is to be connected to.",
)
LEASES: Final = Bucket(
    name="compute-leases",
    value=Lease,
    owner="whoever holds it",
    max_bytes=1 * MIB,
    expiry_markers=True,
    about="Which replica acts, per service.",
)

OBJECTS: Final = ObjectBucket(
    name="compute-objects",
    owner=WORK_MARSHALLER.name,
    max_age_s=40 * DAY_S,
    max_bytes=2048 * MIB,
    about="Payloads, results and logs that are too large for a message. The oldest go first when it fills up.",
)

STREAMS: Final = (WORK_INBOX,)
BUCKETS: Final = (NODES, WORK, GPUS, KEYS, ENGINES, ENGINE_CHANGES, PEERS, MEMORY, TOPOLOGY, LEASES)
OBJECT_BUCKETS: Final = (OBJECTS,)
