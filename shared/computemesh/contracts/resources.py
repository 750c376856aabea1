"""Resources: what one machine is made of.

anyone             --get-->      resource-detector of that node    answered Inventory
resource-detector  --changed-->  anyone                            hardware came, went or changed size
resource-detector  --load-->     anyone                            every few seconds
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from computemesh.contracts.base import Event, Http, Message, Request, Role
from computemesh.contracts.services import RESOURCE_DETECTOR
from computemesh.hardware import Count, Cpu, Gpu, GpuLink, MegaBytes, Memory, Platform, Tier
from computemesh.ids import Id


class Disk(Message, frozen=True, kw_only=True):
    mount: str
    total_mb: MegaBytes
    free_mb: MegaBytes


class Nic(Message, frozen=True, kw_only=True):
    """A network interface with hardware behind it."""

    name: str
    up: bool = False
    speed_mbps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Megabits per second; 0 = not told, as of an interface that is down."""
    pci_bus_id: str = ""
    numa_node: Count | None = None


class RdmaPort(Message, frozen=True, kw_only=True):
    """A port of an adapter that reaches the memory of other machines, by InfiniBand or RoCE."""

    device: str
    """``mlx5_0``"""
    port: Count
    state: str = ""
    """``ACTIVE``, ``DOWN``, ``INIT`` …, as the kernel calls it."""
    rate_gbps: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Gigabits per second; 0 = not told."""
    link_layer: str = ""
    """``InfiniBand`` or ``Ethernet``, which is RoCE."""
    netdev: str = ""
    """Its network interface."""
    pci_bus_id: str = ""
    numa_node: Count | None = None


class EngineFound(Message, frozen=True, kw_only=True):
    """An inference engine that is installed, whether or not it runs."""

    name: str
    """``vllm``, ``xllamacpp``, ``llama-server`` …"""
    version: str = ""


class ModelFound(Message, frozen=True, kw_only=True):
    """A model on the disks of a node, whether or not it is served."""

    name: str
    form: Literal["gguf", "huggingface"]
    """A GGUF file, or a repository in the cache of the Hugging Face Hub."""
    size_mb: MegaBytes = 0


class Inventory(Message, frozen=True, kw_only=True):
    """The hardware of a node, as its providers report it now."""

    node_id: Id
    hostname: str
    tier: Tier
    platform: Platform
    cpu: Cpu
    memory: Memory
    gpus: list[Gpu] = []
    gpu_links: list[GpuLink] = []
    """How the GPUs reach each other; a pair that is left out is not known."""
    disks: list[Disk] = []
    nics: list[Nic] = []
    rdma: list[RdmaPort] = []
    engines: list[EngineFound] = []
    models: list[ModelFound] = []
    provider: str
    """Where the GPU facts come from: `nvml`, `rocm`, `metal` or `none`; `scripted` for hardware that is made up."""
    warnings: list[str] = []
    """What a provider could not read, in words."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """As the announcement's: which machine this is, where two claim one node id."""


class InventoryGet(Message, frozen=True, kw_only=True):
    pass


class Load(Message, frozen=True, kw_only=True):
    node_id: Id
    cpu_percent: float
    memory_available_mb: MegaBytes
    gpus: list[Gpu] = []
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """As the inventory's."""


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
