"""GPU memory: who may use how much of which GPU, and for how long.

    anyone            --reserve / renew / release-->    gpu-orchestrator
    anyone            --can_fit / states / get / list-->  gpu-orchestrator
    gpu-orchestrator  --reserved / released-->          anyone    a reservation began, or ended and why
    gpu-orchestrator  --pressure-->                     anyone    memory of a node runs short, or no longer does

A reservation lies on one node, takes the same amount of each of its GPUs, and is granted whole or not at all.
It ends when it is released, when it is not renewed in time, and with the life of the node or the work item it
is bound to. Memory is counted in MiB.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec

from computemesh.contracts.base import Event, Http, Message, Refusal, Request, Role
from computemesh.contracts.nodes import Labels, NodeState
from computemesh.contracts.services import GPU_ORCHESTRATOR
from computemesh.hardware import Count, MegaBytes, Platform, Tier
from computemesh.ids import Id

GPUS_MAX: Final = 256
"""GPUs of one reservation: as many as a node may announce."""

TIMEOUT_S_MAX: Final = 86_400.0
"""Bound on the time a reservation may be asked for; a service may be told to grant less."""

RequiredMegaBytes = Annotated[int, msgspec.Meta(ge=1, le=2**40, description="MiB of each GPU.")]
Timeout = Annotated[
    float,
    msgspec.Meta(gt=0, le=TIMEOUT_S_MAX, description="Seconds until it ends, unless renewed; left out, 300."),
]
Pids = Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=2**32)]], msgspec.Meta(max_length=256)]
Indices = Annotated[list[Count], msgspec.Meta(max_length=GPUS_MAX)]
Owner = Annotated[str, msgspec.Meta(max_length=200)]
Capability = Annotated[str, msgspec.Meta(min_length=1, max_length=15)]


class GpuCanFit(Message, frozen=True, kw_only=True):
    """What is needed. Asks whether it could be had now, and why not."""

    required_mb: RequiredMegaBytes
    gpu_count: Annotated[int, msgspec.Meta(ge=1, le=GPUS_MAX)] | None = None
    """How many GPUs; left out, as many as `gpu_indices` names, else 1."""
    gpu_indices: Indices = []
    """Exactly these GPUs of a node; left out, any."""
    node_id: Id | None = None
    """Only this node; left out, any."""
    prefer_nvlink: bool = False
    """Of several GPUs, those that NVLink or Infinity Fabric joins, if there are such."""
    require_nvlink: bool = False
    """Only GPUs that NVLink or Infinity Fabric joins."""
    min_tier: Tier | None = None
    """Only nodes of at least this tier."""
    platform: Platform | None = None
    min_compute_capability: Capability | None = None
    """Only GPUs of at least this, as in `8.9`."""
    min_vram_mb: MegaBytes = 0
    """Only GPUs with at least this much memory in all."""
    gpu_model: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Only GPUs with this in their name, in any case, such as `H100`."""
    labels: Labels = {}
    """Only nodes with all of these labels."""
    owner: Owner = ""
    """For whom, where owners have quotas."""


class GpuReserve(GpuCanFit, frozen=True, kw_only=True):
    """Asks for GPU memory."""

    reservation_id: Id | None = None
    """Makes it safe to ask again: the same terms under the same id are the same reservation."""
    timeout_seconds: Timeout | None = None
    session: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Ends with this life of `node_id`: the session that the node announced."""
    work_id: Id | None = None
    """Ends with this work item."""
    pids: Pids = []
    """Processes on the node whose memory is this reservation's. Those that have its id in their environment, as
    `COMPUTEMESH_RESERVATION_ID`, need not be named."""


class GpuShare(Message, frozen=True, kw_only=True):
    """What a reservation has of one GPU."""

    index: Count
    uuid: str = ""
    mb: MegaBytes


class GpuReservation(Message, frozen=True, kw_only=True):
    """GPU memory that was granted."""

    reservation_id: Id
    node_id: Id
    owner: str = ""
    required_mb: MegaBytes
    """MiB of each GPU."""
    total_mb: MegaBytes
    """MiB in all."""
    gpus: list[GpuShare]
    granted_at: float
    """Unix seconds."""
    expires_at: float
    """Unix seconds at which it ends, unless renewed."""
    timeout_seconds: float
    session: str = ""
    """The life of the node it ends with."""
    work_id: Id | None = None
    """The work item it ends with."""
    pids: list[int] = []


class GpuGrant(GpuReservation, frozen=True, kw_only=True):
    """A reservation as it is kept."""

    node_revision: int = 0
    """Revision of the node's record that the grant was decided by: only a later one tells that the node's life
    has ended."""


class GpuLedger(Message, frozen=True, kw_only=True):
    """All that is granted of one node's GPUs: one record, so that several GPUs are granted by one write."""

    node_id: Id
    grants: list[GpuGrant] = []
    baselines: dict[str, MegaBytes] = {}
    """By GPU, what others used of it when it was last granted: where the driver does not tell whose memory is
    whose, growth since then is the holders' own."""
    changed_at: float = 0.0
    """Unix seconds."""


class LedgerMark(Message, frozen=True, kw_only=True):
    """Beside the records, written together with one: makes writers of different nodes notice each other."""

    node_id: Id
    behind: int
    """How many messages behind this one the record stands that it was written with."""


class GpuRenew(Message, frozen=True, kw_only=True):
    """Asks that a reservation ends later: `timeout_seconds` from now."""

    reservation_id: Id
    timeout_seconds: Timeout | None = None
    """Left out, what it was reserved or last renewed for."""
    pids: Pids | None = None
    """Replaces the processes; left out, they stay."""


class GpuRelease(Message, frozen=True, kw_only=True):
    reservation_id: Id


class GpuGet(Message, frozen=True, kw_only=True):
    reservation_id: Id


class GpuList(Message, frozen=True, kw_only=True):
    owner: Owner | None = None
    node_id: Id | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    after: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Only ids behind this one: `next` of the page before."""


class GpuReservations(Message, frozen=True, kw_only=True):
    """Reservations that stand, by id."""

    reservations: list[GpuReservation]
    count: Count
    """Reservations that match, also those on other pages."""
    next: str = ""
    """`after` of the next page; empty when this is the last."""


class EndReason(StrEnum):
    """Why a reservation ended."""

    RELEASED = "released"
    EXPIRED = "expired"
    OWNER_GONE = "owner_gone"
    """The life of the node it was bound to ended."""
    WORK_ENDED = "work_ended"


class GpuReserved(GpuReservation, frozen=True, kw_only=True):
    """A reservation began."""


class GpuReleased(Message, frozen=True, kw_only=True):
    """A reservation ended."""

    reservation_id: Id
    node_id: Id
    owner: str = ""
    total_mb: MegaBytes
    gpus: list[GpuShare]
    work_id: Id | None = None
    reason: EndReason
    released_at: float
    """Unix seconds."""


class WhyNot(StrEnum):
    """What speaks against a GPU, the nearest to a grant first."""

    RESERVED = "reserved"
    """It would be free without its reservations."""
    USED = "used"
    """Others than holders of reservations use too much of it."""
    QUOTA = "quota"
    """The owner has as much as may be."""
    UNLINKED = "unlinked"
    """NVLink does not join it to enough others that are free."""
    TOO_FEW = "too_few"
    """It would do, but the node has too few like it."""
    NODE_STATE = "node_state"
    """Its node is suspect, lost or drained."""
    ERROR = "error"
    """The driver cannot read it."""
    GONE = "gone"
    """It was announced, and is no longer there."""
    MIG = "mig"
    """It is split into slices, or is one where several GPUs are needed."""
    FILTER = "filter"
    """It, or its node, is not of the kind that is asked for."""
    ABSENT = "absent"
    """The node has no GPU of that index."""
    TOO_SMALL = "too_small"
    """It has less memory in all than is needed."""


class GpuVerdict(Message, frozen=True, kw_only=True):
    """Why one GPU could not be had."""

    node_id: str
    index: Count
    uuid: str = ""
    name: str = ""
    code: WhyNot
    reason: str
    """In words, with the numbers."""
    total_mb: MegaBytes = 0
    reserved_mb: MegaBytes = 0
    external_mb: MegaBytes = 0
    """In use without a reservation."""
    free_mb: MegaBytes = 0
    short_mb: MegaBytes = 0
    """How much is missing."""
    may_change: bool = True
    """False: this GPU can never do, as it is now."""


class GpuFit(Message, frozen=True, kw_only=True):
    """Whether what is needed could be reserved now."""

    can_fit: bool
    required_mb: MegaBytes
    """MiB of each GPU."""
    total_mb: MegaBytes
    """MiB in all."""
    node_id: str = ""
    """Where it would lie."""
    gpus: list[GpuShare] = []
    """What it would have."""
    reason: str = ""
    """Why it does not fit, in a sentence."""
    why_not: list[GpuVerdict] = []
    """The GPUs that come closest, at most 32."""
    counts: dict[str, Count] = {}
    """How many GPUs there are for each reason."""


class GpuStatesQuery(Message, frozen=True, kw_only=True):
    node_id: Id | None = None
    """Only this node, also one without GPUs."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """Nodes on a page; fewer when they would not fit a message."""
    after: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Only nodes behind this one: `next` of the page before."""


class GpuHolder(Message, frozen=True, kw_only=True):
    """A reservation, as a line under a GPU."""

    reservation_id: Id
    owner: str = ""
    mb: MegaBytes
    used_mb: MegaBytes | None = None
    """What its processes use of it; left out where the driver does not tell."""
    expires_at: float


class GpuState(Message, frozen=True, kw_only=True):
    """One GPU: what it has, and who has it."""

    index: Count
    uuid: str = ""
    name: str = ""
    total_mb: MegaBytes = 0
    used_mb: MegaBytes = 0
    """In use, by anyone."""
    reserved_mb: MegaBytes = 0
    external_mb: MegaBytes = 0
    """In use without a reservation, or beyond it."""
    free_mb: MegaBytes = 0
    """What can be reserved: total − reserved − external."""
    over_mb: MegaBytes = 0
    """How much more is reserved and in use than there is: others took memory that was promised."""
    utilization_percent: float | None = None
    compute_capability: str = ""
    mig_parent: str = ""
    mig_profile: str = ""
    unavailable: str = ""
    """Why nothing of it is granted now; empty when it can be."""
    reservations: list[GpuHolder] = []


class RamState(Message, frozen=True, kw_only=True):
    """Memory of the machine, and where it is going."""

    total_mb: MegaBytes = 0
    available_mb: MegaBytes = 0
    slope_mb_per_s: float | None = None
    """Change of what is available; left out until enough was heard."""
    oom_in_s: float | None = None
    """When nothing would be left; left out unless it clearly shrinks."""
    confidence: float = 0.0
    """From 0 to 1: how well one line describes what was heard."""


class GpuNodeState(Message, frozen=True, kw_only=True):
    """A node with its GPUs."""

    node_id: Id
    hostname: str = ""
    state: NodeState
    tier: Tier = Tier.CPU_ONLY
    platform: Platform | None = None
    provider: str = ""
    """`scripted` where the hardware is made up."""
    unavailable: str = ""
    """Why nothing of the node is granted now; empty when it can be."""
    gpus: list[GpuState] = []
    ram: RamState = RamState()
    heard_at: float | None = None
    """Unix seconds at which the use was told; left out when it is that of the announcement."""


class GpuStates(Message, frozen=True, kw_only=True):
    """GPUs of the mesh, by node."""

    nodes: list[GpuNodeState]
    count: Count
    """Nodes that match, also those on other pages."""
    total_mb: MegaBytes = 0
    """Of all GPUs that match, also those on other pages."""
    reserved_mb: MegaBytes = 0
    free_mb: MegaBytes = 0
    next: str = ""
    """`after` of the next page; empty when this is the last."""


class MemoryKind(StrEnum):
    RAM = "ram"
    VRAM = "vram"


class PressureLevel(StrEnum):
    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"
    OVER = "over"
    """More GPU memory is promised and in use than there is: others took what was promised."""


class GpuPressure(Message, frozen=True, kw_only=True):
    """Memory of a node runs short, or no longer does."""

    node_id: Id
    kind: MemoryKind
    level: PressureLevel
    was: PressureLevel
    """The level before."""
    index: Count | None = None
    """Which GPU, for `vram`."""
    uuid: str = ""
    total_mb: MegaBytes
    available_mb: MegaBytes
    over_mb: MegaBytes = 0
    slope_mb_per_s: float | None = None
    oom_in_s: float | None = None
    reason: str
    at: float
    """Unix seconds."""


_EVERYONE: Final = frozenset(Role)
_SERVICES: Final = frozenset({Role.SERVICES})
_ASKERS: Final = frozenset({Role.CLIENT, Role.NODE, Role.SERVICES})

_NOT_FOUND: Final = Refusal(code="not_found", status=404, when="there is no such reservation, or it has ended")
_NO_NODE: Final = Refusal(code="not_found", status=404, when="there is no such node, or no such GPU on it")
_BAD_TERMS: Final = Refusal(code="bad_request", status=400, when="the terms contradict each other")
_TOO_LONG: Final = Refusal(code="bad_timeout", status=400, when="the timeout is longer than this mesh grants")

RESERVE: Final = Request(
    subject="compute.gpus.reserve.v1",
    takes=GpuReserve,
    gives=GpuReservation,
    asked_by=_ASKERS,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="POST", path="/api/v1/gpu/reserve"),),
    refuses=(
        _BAD_TERMS,
        _TOO_LONG,
        _NO_NODE,
        Refusal(code="no_room", status=409, when="it does not fit now, and why not of each GPU that comes close"),
        Refusal(code="impossible", status=422, when="no GPU there is could ever do"),
        Refusal(code="conflict", status=409, when="the id stands for a reservation with other terms"),
        Refusal(code="wrong_session", status=409, when="the node has another session by now"),
        Refusal(code="work_ended", status=409, when="the work item has ended already"),
        Refusal(code="quota_exceeded", status=429, when="the owner would have more than its quota"),
        Refusal(code="busy", status=503, when="others changed the node's reservations each time it was tried"),
    ),
    example=GpuReserve(gpu_indices=[0, 1], required_mb=24576, timeout_seconds=300, reservation_id="g-example"),
    about="Reserves GPU memory, all of it or none.",
)
RENEW: Final = Request(
    subject="compute.gpus.renew.v1",
    takes=GpuRenew,
    gives=GpuReservation,
    asked_by=_ASKERS,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="POST", path="/api/v1/gpu/reservations/{reservation_id}/renew"),),
    refuses=(_NOT_FOUND, _TOO_LONG, Refusal(code="busy", status=503, when="others changed the node each time")),
    example=GpuRenew(reservation_id="g-example", timeout_seconds=600),
    about="Lets a reservation end later.",
)
CAN_FIT: Final = Request(
    subject="compute.gpus.can_fit.v1",
    takes=GpuCanFit,
    gives=GpuFit,
    asked_by=_ASKERS,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="POST", path="/api/v1/gpu/can-fit"),),
    refuses=(_BAD_TERMS, _NO_NODE),
    example=GpuCanFit(required_mb=24576, gpu_count=2, prefer_nvlink=True),
    about="Whether a reservation would be granted now, and why not of each GPU that comes close.",
)
STATES: Final = Request(
    subject="compute.gpus.states.v1",
    takes=GpuStatesQuery,
    gives=GpuStates,
    asked_by=_EVERYONE,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="GET", path="/api/v1/gpu/states"),),
    refuses=(_NO_NODE,),
    example=GpuStatesQuery(limit=20),
    about="Every GPU of the mesh: what is used, reserved and free, and by whom.",
)
GET: Final = Request(
    subject="compute.gpus.get.v1",
    takes=GpuGet,
    gives=GpuReservation,
    asked_by=_EVERYONE,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="GET", path="/api/v1/gpu/reservations/{reservation_id}"),),
    refuses=(_NOT_FOUND,),
    example=GpuGet(reservation_id="g-example"),
    about="One reservation.",
)
LIST: Final = Request(
    subject="compute.gpus.list.v1",
    takes=GpuList,
    gives=GpuReservations,
    asked_by=_EVERYONE,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="GET", path="/api/v1/gpu/reservations"),),
    example=GpuList(owner="alice", limit=20),
    about="The reservations that stand.",
)
RELEASE: Final = Request(
    subject="compute.gpus.release.v1",
    takes=GpuRelease,
    gives=GpuReleased,
    asked_by=_ASKERS,
    service=GPU_ORCHESTRATOR,
    http=(Http(method="DELETE", path="/api/v1/gpu/reservations/{reservation_id}"),),
    refuses=(_NOT_FOUND, Refusal(code="busy", status=503, when="others changed the node each time")),
    example=GpuRelease(reservation_id="g-example"),
    about="Ends a reservation. One that has ended is not found, so asking again does no harm.",
)
RESERVED: Final = Event(
    subject="compute.gpus.reserved.v1",
    payload=GpuReserved,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="A reservation began.",
)
RELEASED: Final = Event(
    subject="compute.gpus.released.v1",
    payload=GpuReleased,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="A reservation ended, and why.",
)
PRESSURE: Final = Event(
    subject="compute.gpus.pressure.v1",
    payload=GpuPressure,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="Memory of a node runs short, or no longer does.",
)
