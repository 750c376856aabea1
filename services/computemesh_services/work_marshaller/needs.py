"""What an item asks of a node. Items that ask for the same have one shape: they fit the same nodes. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from computemesh.contracts.work import Requirements, WorkItem, WorkRecord
from computemesh.hardware import Gpu

NO_REQUIREMENTS: Final = WorkItem(work_type="any").requirements
"""What items without requirements share."""

ShapeKey = tuple[str, str, int, bytes, str | None, bool]


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What an attempt takes of its node for as long as it is out."""

    cpus: int = 0
    ram_mb: int = 0
    gpus: int = 0
    vram_mb: int = 0
    """On each of the GPUs; 0 for whole ones."""
    gpu_model: str = ""
    """Part of the GPUs' name, in lower case."""

    def suits(self, gpu: Gpu) -> bool:
        """Whether *gpu* would do, were all of it free."""
        return gpu.vram_total_mb >= self.vram_mb and self.gpu_model in gpu.name.lower()


NOTHING: Final = Ask()


def ask_of(need: Requirements) -> Ask:
    if need is NO_REQUIREMENTS or not (need.cpus or need.ram_mb or need.gpus or need.vram_mb or need.gpu_model):
        return NOTHING
    gpus = max(need.gpus, 1 if need.vram_mb or need.gpu_model else 0)
    return Ask(need.cpus, need.ram_mb, gpus, need.vram_mb, need.gpu_model.lower())


class Shape:
    """What placement looks at in an item."""

    __slots__ = (
        "ask",
        "avoided",
        "by_reference",
        "key",
        "model_name",
        "named",
        "need",
        "owner",
        "replicas",
        "work_type",
    )

    def __init__(self, record: WorkRecord, key: ShapeKey) -> None:
        self.key: Final = key
        self.work_type: Final = record.work_type
        self.model_name: Final = record.model_name
        self.replicas: Final = record.replicas
        self.need: Final = record.requirements
        self.ask: Final = ask_of(self.need)
        self.owner: Final = key[4]
        """Whose items these are, when the owner has had all GPUs it may have: they wait apart."""
        self.by_reference: Final = key[5]
        """The payload is in the object store, which a node without direct delivery need not know of."""
        self.named: Final = _named(self.need)
        """The only nodes that may have it, or None for any."""
        self.avoided: Final = frozenset(self.need.not_node_ids)


def _named(need: Requirements) -> frozenset[str] | None:
    if need.node_id is None:
        return frozenset(need.node_ids) if need.node_ids else None
    if need.node_ids and need.node_id not in need.node_ids:
        return frozenset()
    return frozenset({need.node_id})


def shape_key(record: WorkRecord, owner: str | None = None) -> ShapeKey:
    need = record.requirements
    asked = b"" if need is NO_REQUIREMENTS or need == NO_REQUIREMENTS else msgspec.json.encode(need, order="sorted")
    return record.work_type, record.model_name, record.replicas, asked, owner, record.payload_object is not None


def shape_of(record: WorkRecord) -> Shape:
    """The shape of one item by itself."""
    return Shape(record, shape_key(record, record.owner))
