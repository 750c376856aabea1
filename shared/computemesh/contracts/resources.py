"""Resources: what one machine is made of.

anyone             --get-->      resource-detector of that node    answered Inventory
resource-detector  --changed-->  anyone                            hardware came, went or changed size
resource-detector  --load-->     anyone                            every few seconds
"""

from __future__ import annotations

from typing import Final

from computemesh.contracts.base import Event, Http, Message, Request, Role
from computemesh.contracts.services import RESOURCE_DETECTOR
from computemesh.hardware import Cpu, Gpu, MegaBytes, Memory, Platform, Tier
from computemesh.ids import Id


class Disk(Message, frozen=True, kw_only=True):
    mount: str
    total_mb: MegaBytes
    free_mb: MegaBytes


class Inventory(Message, frozen=True, kw_only=True):
    """The hardware of a node, as its providers report it now."""

    node_id: Id
    hostname: str
    tier: Tier
    platform: Platform
    cpu: Cpu
    memory: Memory
    gpus: list[Gpu] = []
    disks: list[Disk] = []
    provider: str
    """Where the GPU facts come from: `nvml` or `none`."""
    warnings: list[str] = []
    """What a provider could not read, in words."""


class InventoryGet(Message, frozen=True, kw_only=True):
    pass


class Load(Message, frozen=True, kw_only=True):
    node_id: Id
    cpu_percent: float
    memory_available_mb: MegaBytes
    gpus: list[Gpu] = []


_READERS: Final = frozenset(Role)

INVENTORY: Final = Request(
    subject="compute.resources.get.v1",
    target="node_id",
    takes=InventoryGet,
    gives=Inventory,
    asked_by=_READERS,
    service=RESOURCE_DETECTOR,
    http=(Http(method="GET", path="/api/v1/resources"),),
    example=InventoryGet(),
    about="The hardware of one node, read afresh.",
)
CHANGED: Final = Event(
    subject="compute.resources.changed.v1",
    target="node_id",
    payload=Inventory,
    sent_by=frozenset({Role.NODE}),
    read_by=_READERS,
    about="The hardware of a node changed.",
)
LOAD: Final = Event(
    subject="compute.resources.load.v1",
    target="node_id",
    payload=Load,
    sent_by=frozenset({Role.NODE}),
    read_by=_READERS,
    about="How busy a node is.",
)
