"""Work: from "please do this" to one recorded outcome.

    anyone           --submit-->     COMPUTE_WORK     durable; the PubAck means stored, never lost
    anyone           --request-->    work-marshaller  the same, checked first and answered
    work-marshaller  --deliver-->    one direct node  answered accepted or not
    work-marshaller  --assigned-->   plain nodes      for nodes without direct delivery
    a node           --progress-->   anyone           while it runs
    a node           --completed / failed-->  COMPUTE_WORK   durable: its *report*
    the server       --state-->      anyone           the recorded outcome, published if and only if stored
    work-marshaller  --rejected-->   anyone           a submission or report that could not be used, and why
    work-marshaller  --stop-->       one direct node  an attempt that no longer counts
    work-marshaller  --node_log-->   one direct node  what an attempt has printed so far
    anyone           --get / list / cancel / explain / result / logs-->  work-marshaller
    anyone           --blacklist / pardon-->  work-marshaller

Reports may be stale or doubled; whoever needs the outcome reads ``state``.

    pending --> assigned --> running --> completed
       ^           |            |------> failed      the work's own fault: not tried again
       |           v            |------> dead        tried as often as allowed
       +------- retrying <------+
    and cancelled, from every state that is not final; failed too, when a waiting item can no longer start
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import MESSAGE_BYTES_MAX, Event, Http, Message, Refusal, Request, Role
from computemesh.contracts.gpus import GpuShare
from computemesh.contracts.nodes import Labels, Name
from computemesh.contracts.services import NODE_AGENT, WORK_MARSHALLER
from computemesh.hardware import ByteCount, Count, MegaBytes, Platform, Tier
from computemesh.ids import Id

WORK_TYPES: Final = ("inference", "ppo", "benchmark", "command")
"""Work types that every mesh knows: an item of one waits until some node does such work. Others are known once a
node has announced them."""

PRIORITY_MAX: Final = 9

REPLICAS_MAX: Final = 64
"""Replicas of one item."""

AFTER_MAX: Final = 100
"""Items that one item may wait for."""

INLINE_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 65_536
"""Bound on an item in one message. Above it, its payload goes to the object store before it is submitted."""

LOG_PART_MAX: Final = 256 * 1024
"""Bytes of an attempt's output in one message."""

LOG_WAIT_S_MAX: Final = 4.0

TIMEOUT: Final = "timeout"
"""Code of a failure of which nobody knows whose fault it is: the attempt took longer than it may."""

HANDED_BACK: Final = "handed_back"
"""Code of a failure report that is none: the node ends and gives the item back."""


class WorkState(StrEnum):
    PENDING = "pending"
    ASSIGNED = "assigned"
    RUNNING = "running"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD = "dead"


FINAL: Final = frozenset({WorkState.COMPLETED, WorkState.FAILED, WorkState.CANCELLED, WorkState.DEAD})


NodeIds = Annotated[list[Id], msgspec.Meta(max_length=1000)]

Annotations = Annotated[
    dict[Name, Annotated[str, msgspec.Meta(max_length=MESSAGE_BYTES_MAX)]], msgspec.Meta(max_length=64)
]
"""What is kept with an item for people and programs; nothing in the mesh acts on it."""

TASK_TEXT: Final = "mloc/task"
"""The annotation that holds the text of the task, as YAML or JSON, that an item was made from."""


class ObjectRef(Message, frozen=True, kw_only=True):
    """What is too large for a message, kept in the object store: see ``compute.objects.get.v1``."""

    object_id: Id
    size: ByteCount
    """Bytes."""
    sha256: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """In hexadecimal."""
    skipped: ByteCount = 0
    """Bytes that stood before it and are not kept: of a long log, only the end is."""


class Requirements(Message, frozen=True, kw_only=True, omit_defaults=True):
    """What a node must have for this item. The default asks for nothing."""

    gpus: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    vram_mb: MegaBytes = 0
    """On each of those GPUs (on one GPU, when `gpus` is 0)."""
    ram_mb: MegaBytes = 0
    cpus: Count = 0
    """Logical CPUs."""
    min_tier: Tier | None = None
    labels: Labels = {}
    """Labels the node must carry, with these values."""
    not_labels: Labels = {}
    """Labels the node must not carry with these values."""
    prefer_labels: Labels = {}
    """Of the nodes that fit, rather those with more of these."""
    node_id: Id | None = None
    """Only this node."""
    node_ids: NodeIds = []
    """Only one of these nodes."""
    not_node_ids: NodeIds = []
    """None of these nodes."""
    gpu_model: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Only GPUs with this in their name, in any case, such as `H100`."""
    platform: Platform | None = None
    """Only nodes of this platform."""
    spread: bool = False
    """Of an item with replicas: each on a node of its own."""


class WorkItem(Message, frozen=True, kw_only=True):
    """What a submitter asks for."""

    work_id: Id | None = None
    """Idempotency key: submitting it again gives the item that exists. Left out, one is made."""
    work_type: Name
    """What kind of executor runs it, such as `inference`."""
    model_name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    priority: Annotated[int, msgspec.Meta(ge=0, le=PRIORITY_MAX)] = 5
    """0 to 9; 9 goes first."""
    payload: dict[str, Any] = {}
    """What the executor reads. For `inference`: `prompt`, `prompts` or `messages`, and `max_tokens`, `temperature` …"""
    requirements: Requirements = Requirements()
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)] = 3600.0
    """Longest time one attempt may take once it is assigned."""
    retries_max: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    """Attempts after the first that fails; left out, the mesh's `WORK_RETRY_MAX`."""
    owner: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """For whom. Owners with items of the same priority take turns."""
    labels: Labels = {}
    annotations: Annotations = {}
    """Texts that are kept with the item and given to nobody but those who ask for it."""
    deadline_at: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Unix seconds after which the outcome is of no use: an item that has not ended by then fails, and what runs of
    it is ended."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=REPLICAS_MAX)] = 1
    """Runs that start together, each with the same requirements, or not at all."""
    after: Annotated[list[Id], msgspec.Meta(max_length=AFTER_MAX)] = []
    """Items that must have completed before this one starts. When one of them ends in another way, this one fails."""
    payload_object: ObjectRef | None = None
    """The payload, as a JSON object, when it is too large for a message; `payload` is then empty."""


class WorkError(Message, frozen=True, kw_only=True):
    """Why an attempt failed."""

    reason: str
    code: str = "failed"
    fault: Literal["work", "node", "mesh"] = "node"
    """Whose fault it is. Only the work's own fault ends it at once."""


class Move(Message, frozen=True, kw_only=True):
    """One line of an item's story."""

    at: float
    state: WorkState
    attempt: int = 0
    node_id: str = ""
    reason: str = ""


class Member(Message, frozen=True, kw_only=True):
    """One replica of the present attempt of an item that has several."""

    replica: Annotated[int, msgspec.Meta(ge=0, lt=REPLICAS_MAX)]
    node_id: str
    completed: bool = False
    result: Any = None
    result_object: ObjectRef | None = None
    log_object: ObjectRef | None = None


class WorkRecord(Message, frozen=True, kw_only=True):
    """The truth about one item: the value in ``compute-work`` and the payload of ``state``."""

    work_id: str
    state: WorkState
    work_type: str
    model_name: str = ""
    priority: int = 5
    payload: dict[str, Any] = {}
    requirements: Requirements = Requirements()
    timeout_s: float = 3600.0
    retries_max: int | None = None
    owner: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deadline_at: float | None = None
    replicas: int = 1
    after: list[str] = []
    awaits: list[str] = []
    """Those of them that have not completed yet."""
    payload_object: ObjectRef | None = None

    attempt: int = 0
    """Number of the latest attempt; a report with another one is stale."""
    failures: int = 0
    """Attempts that failed; bounded by `retries_max`."""
    losses: int = 0
    """Attempts that vanished with their node."""
    node_id: str = ""
    """Where the latest attempt runs or ran; of an item with replicas, the first of them."""
    members: list[Member] = []
    """The replicas of the latest attempt, in order, when the item has more than one."""
    plain: bool = False
    """That node has no direct delivery, so its report need not name the attempt."""
    not_before: float = 0.0
    """Unix seconds before which a retry does not start."""
    submitted_at: float = 0.0
    changed_at: float = 0.0
    finished_at: float | None = None
    result: Any = None
    """Of an item with replicas, the list of their results, in order."""
    result_object: ObjectRef | None = None
    """The result, as JSON, when it is too large for a message; `result` is then null."""
    log_object: ObjectRef | None = None
    """What the latest attempt printed, once it has ended."""
    error: WorkError | None = None
    """Why the latest attempt failed; stays beside the result of a later one that did not."""
    story: list[Move] = []
    """The latest moves, oldest first."""
    inbox_seq: int = 0
    """Where the submission stands in COMPUTE_WORK; orders items of one priority."""
    report_seq: int = 0
    """Where the report that was applied last stands there."""
    traceparent: str = ""
    """W3C trace context of the submission; without one, the trace follows from the `work_id`."""


class Assignment(Message, frozen=True, kw_only=True):
    """An item, handed to a node."""

    work_id: Id
    attempt: int
    node_id: str
    work_type: str
    model_name: str = ""
    priority: int = 5
    payload: dict[str, Any] = {}
    payload_object: ObjectRef | None = None
    timeout_s: float = 3600.0
    owner: str = ""
    requirements: Requirements = Requirements()
    """What of the node the attempt may use."""
    replica: int = 0
    """Which replica of the item this is, from 0."""
    replicas: int = 1
    peers: list[str] = []
    """The nodes of all replicas, in order, when there is more than one."""
    reservation_id: str = ""
    """The GPU memory that is reserved for this attempt."""
    gpus: list[GpuShare] = []
    """Its GPUs: the attempt may use no others."""


class Delivery(Message, frozen=True, kw_only=True):
    """A direct node's answer to an assignment."""

    accepted: bool
    reason: str = ""
    session: str = ""
    """The node's present session, as in its heartbeats."""


Replica = Annotated[int, msgspec.Meta(ge=0, lt=REPLICAS_MAX, description="Which replica of the item, from 0.")]


class WorkCompleted(Message, frozen=True, kw_only=True):
    """A node's report: it is done."""

    work_id: Id
    result: Any = None
    result_object: ObjectRef | None = None
    """The result, as JSON, when it is too large for this message."""
    log_object: ObjectRef | None = None
    """What the attempt printed."""
    attempt: int | None = None
    """Which attempt this was. Only plain nodes may leave it out."""
    node_id: str = ""
    replica: Replica = 0


class WorkFailed(Message, frozen=True, kw_only=True):
    """A node's report: it went wrong."""

    work_id: Id
    error: Annotated[str, msgspec.Meta(max_length=65_536)] = "the node gave no reason"
    code: Annotated[str, msgspec.Meta(max_length=63)] = "failed"
    fault: Literal["work", "node", "mesh"] = "node"
    """`work`: it would fail anywhere, do not try again. `mesh`: neither it nor the node is to blame."""
    log_object: ObjectRef | None = None
    """What the attempt printed."""
    attempt: int | None = None
    node_id: str = ""
    replica: Replica = 0


class WorkProgress(Message, frozen=True, kw_only=True):
    work_id: Id
    attempt: int
    node_id: str
    replica: Replica = 0
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """Share that is done, when it can be known."""
    message: str = ""


class WorkRejected(Message, frozen=True, kw_only=True):
    """A captured message that could not be used. Nothing was recorded for it."""

    subject: str
    inbox_seq: int
    work_id: str = ""
    code: str
    reason: str
    field: str = ""
    original: str = ""
    """The first bytes of the message, undecodable ones replaced."""


class WorkGet(Message, frozen=True, kw_only=True):
    work_id: Id


class WorkList(Message, frozen=True, kw_only=True):
    status: WorkState | None = None
    states: Annotated[list[WorkState], msgspec.Meta(max_length=8)] = []
    """One of these; empty = any."""
    owner: Annotated[str, msgspec.Meta(max_length=200)] | None = None
    """Only items for this owner; the empty one stands for items without."""
    work_type: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Only items of this type."""
    node_id: Id | None = None
    """Only items whose latest attempt is or was on this node."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    """At most so many; an answer has fewer when more do not fit a message."""
    after: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """`next` of the answer before, to go on from there."""


class WorkSummary(Message, frozen=True, kw_only=True):
    """A line of a list: the record without payload, result and story."""

    work_id: str
    state: WorkState
    work_type: str
    model_name: str = ""
    priority: int = 5
    owner: str = ""
    attempt: int = 0
    node_id: str = ""
    submitted_at: float = 0.0
    changed_at: float = 0.0
    finished_at: float | None = None
    error: WorkError | None = None


class WorkItems(Message, frozen=True, kw_only=True):
    """The items that match a query."""

    items: list[WorkSummary]
    """The newest first."""
    count: Count
    """Items that match, on all pages."""
    next: str = ""
    """For `after`, to get those that follow; empty when these are the last."""


class WorkCancel(Message, frozen=True, kw_only=True):
    work_id: Id
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class WorkStop(Message, frozen=True, kw_only=True):
    """End this attempt; its outcome no longer counts."""

    work_id: Id
    attempt: int
    replica: Replica = 0
    reason: str = ""


class Stopped(Message, frozen=True, kw_only=True):
    was_running: bool


class NodeVerdict(Message, frozen=True, kw_only=True):
    """Why one node was, or was not, fit for an item."""

    node_id: str
    fits: bool
    may_change: bool = True
    """False: this node can never run it as it is now made."""
    reasons: list[str] = []
    score: float = 0.0


class WorkExplanation(Message, frozen=True, kw_only=True):
    """Why an item is where it is, and what each node is to it."""

    work_id: str
    state: WorkState
    summary: str
    nodes: list[NodeVerdict] = []


class WorkResult(Message, frozen=True, kw_only=True):
    """The result of an item that has completed."""

    work_id: str
    result: Any = None
    result_object: ObjectRef | None = None
    """Where the result is, as JSON, when it is too large for a message. Over HTTP it is put in place of `result`."""
    result_objects: list[ObjectRef | None] = []
    """Of an item with replicas, where the results are that are too large; null for those that stand in `result`."""


class WorkLogsGet(Message, frozen=True, kw_only=True):
    """Asks for what an attempt has printed."""

    work_id: Id
    replica: Replica = 0
    attempt: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Left out, the latest."""
    offset: ByteCount = 0
    """From this byte on."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LOG_PART_MAX)] = LOG_PART_MAX
    """At most so many bytes."""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=LOG_WAIT_S_MAX)] = 0.0
    """How long to wait for more when there is nothing yet beyond `offset`."""


class WorkLogs(Message, frozen=True, kw_only=True):
    """A part of what an attempt has printed."""

    work_id: str
    attempt: int
    replica: int = 0
    node_id: str = ""
    text: str = ""
    """Bytes that are not UTF-8 are replaced."""
    offset: ByteCount = 0
    """Where this part begins; further on than was asked, when what stood there is not kept."""
    next: ByteCount = 0
    """`offset` of the part that follows."""
    complete: bool = False
    """The attempt has ended, and this part reaches to the end."""


class BlacklistGet(Message, frozen=True, kw_only=True):
    """Asks which nodes get no work of some type, as it kept failing there."""

    node_id: Id | None = None


class Blacklisted(Message, frozen=True, kw_only=True):
    """A node that gets no work of one kind for a while."""

    node_id: str
    work_type: str
    model_name: str = ""
    failures: int
    """Items that failed on it in a row."""
    since: float
    """Unix seconds."""
    until: float
    """Unix seconds from which one item is tried on it again; it gets more once that one has gone well."""
    probing: str = ""
    """The item that is tried on it at present."""
    reason: str = ""
    """Why the last attempt failed."""


class Blacklist(Message, frozen=True, kw_only=True):
    entries: list[Blacklisted] = []


class BlacklistPardon(Message, frozen=True, kw_only=True):
    """Asks that a node gets work again at once."""

    node_id: Id
    work_type: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Left out, all types."""


_EVERYONE: Final = frozenset(Role)
_SERVICES: Final = frozenset({Role.SERVICES})
_ASKERS: Final = frozenset({Role.CLIENT, Role.SERVICES})
_NOT_FOUND: Final = Refusal(code="not_found", status=404, when="there is no such item")

SUBMIT: Final = Event(
    subject="compute.work.submit.v1",
    payload=WorkItem,
    sent_by=_ASKERS,
    read_by=frozenset({Role.CLIENT, Role.OBSERVER, Role.SERVICES}),
    captured=True,
    about="Submits work. The server's acknowledgement means stored.",
)
REQUEST: Final = Request(
    subject="compute.work.request.v1",
    takes=WorkItem,
    gives=WorkRecord,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    http=(Http(method="POST", path="/api/v1/work/submit", status=202),),
    refuses=(
        Refusal(code="unknown_work_type", status=400, when="no built-in type, and none that a node has announced"),
        Refusal(code="unknown_dependency", status=400, when="there is no item that `after` names"),
        Refusal(code="too_large", status=413, when="the item, or its payload, is larger than one may be"),
        Refusal(code="no_object", status=400, when="the object with the payload is not there, or not what is said"),
        Refusal(code="queue_full", status=503, when="as many items wait as may"),
        Refusal(code="not_stored", status=503, when="the inbox did not take the item"),
    ),
    example=WorkItem(
        work_id="w-example",
        work_type="inference",
        priority=7,
        payload={"messages": [{"role": "user", "content": "What is a mesh?"}], "max_tokens": 64},
        timeout_s=600.0,
    ),
    about="Checks a work item, submits it, and answers with the item or the refusal.",
)
ASSIGNED: Final = Event(
    subject="compute.work.assigned.v1",
    payload=Assignment,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="Work for nodes without direct delivery; `node_id` says for which.",
)
DELIVER: Final = Request(
    subject="compute.work.assigned.v1",
    target="node_id",
    takes=Assignment,
    gives=Delivery,
    asked_by=_SERVICES,
    service=NODE_AGENT,
    about="Work for one node, answered accepted or not.",
)
STOP: Final = Request(
    subject="compute.work.stop.v1",
    target="node_id",
    takes=WorkStop,
    gives=Stopped,
    asked_by=_SERVICES,
    service=NODE_AGENT,
    about="Ends an attempt and kills its processes.",
)
PROGRESS: Final = Event(
    subject="compute.work.progress.v1",
    payload=WorkProgress,
    sent_by=frozenset({Role.NODE}),
    read_by=_EVERYONE,
    about="How far an attempt is.",
)
COMPLETED: Final = Event(
    subject="compute.work.completed.v1",
    payload=WorkCompleted,
    sent_by=frozenset({Role.NODE}),
    read_by=_EVERYONE,
    captured=True,
    about="A node's report that an item is done, with its result.",
)
FAILED: Final = Event(
    subject="compute.work.failed.v1",
    payload=WorkFailed,
    sent_by=frozenset({Role.NODE}),
    read_by=_EVERYONE,
    captured=True,
    about="A node's report that an attempt failed.",
)
REJECTED: Final = Event(
    subject="compute.work.rejected.v1",
    payload=WorkRejected,
    sent_by=_SERVICES,
    read_by=_EVERYONE,
    about="A captured message could not be used, and why.",
)
STATE: Final = Event(
    subject="compute.work.state.v1",
    target="work_id",
    payload=WorkRecord,
    sent_by=frozenset(),  # The server republishes what the bucket stored; nobody else may.
    read_by=_EVERYONE,
    about="The recorded state of an item, published by the server once it is stored.",
)
GET: Final = Request(
    subject="compute.work.get.v1",
    takes=WorkGet,
    gives=WorkRecord,
    asked_by=_EVERYONE,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/work/{work_id}"),),
    refuses=(_NOT_FOUND,),
    example=WorkGet(work_id="w-example"),
    about="One item.",
)
LIST: Final = Request(
    subject="compute.work.list.v1",
    takes=WorkList,
    gives=WorkItems,
    asked_by=_EVERYONE,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/work"),),
    example=WorkList(status=WorkState.PENDING, limit=20),
    about="Items, newest first, of one state or all.",
)
CANCEL: Final = Request(
    subject="compute.work.cancel.v1",
    takes=WorkCancel,
    gives=WorkRecord,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    http=(Http(method="DELETE", path="/api/v1/work/{work_id}"),),
    refuses=(_NOT_FOUND, Refusal(code="already_final", status=409, when="the item has ended in another way")),
    example=WorkCancel(work_id="w-example", reason="no longer needed"),
    about="Cancels an item and ends what runs of it.",
)
EXPLAIN: Final = Request(
    subject="compute.work.explain.v1",
    takes=WorkGet,
    gives=WorkExplanation,
    asked_by=_EVERYONE,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/work/{work_id}/explain"),),
    refuses=(_NOT_FOUND,),
    example=WorkGet(work_id="w-example"),
    about="Why an item is where it is: each node, and what speaks for or against it.",
)
RESULT: Final = Request(
    subject="compute.work.result.v1",
    takes=WorkGet,
    gives=WorkResult,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/work/{work_id}/result"),),
    refuses=(
        _NOT_FOUND,
        Refusal(code="not_finished", status=409, when="the item has not ended yet"),
        Refusal(code="no_result", status=409, when="the item ended without a result; the reason says why"),
    ),
    example=WorkGet(work_id="w-example"),
    about="The result of an item that has completed.",
)
LOGS: Final = Request(
    subject="compute.work.logs.v1",
    takes=WorkLogsGet,
    gives=WorkLogs,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/work/{work_id}/logs"),),
    refuses=(_NOT_FOUND, Refusal(code="no_log", status=404, when="nothing is kept of what the attempt printed")),
    example=WorkLogsGet(work_id="w-example"),
    about="What an attempt has printed, while it runs and afterwards. With `Accept: text/plain`, as text to its end.",
)
NODE_LOG: Final = Request(
    subject="compute.work.log.v1",
    target="node_id",
    takes=WorkLogsGet,
    gives=WorkLogs,
    asked_by=_SERVICES,
    service=NODE_AGENT,
    about="What an attempt has printed on this node.",
)
BLACKLIST: Final = Request(
    subject="compute.work.blacklist.v1",
    takes=BlacklistGet,
    gives=Blacklist,
    asked_by=_EVERYONE,
    service=WORK_MARSHALLER,
    http=(Http(method="GET", path="/api/v1/blacklist"),),
    example=BlacklistGet(),
    about="Nodes that get no work of some type for a while, as it kept failing there.",
)
PARDON: Final = Request(
    subject="compute.work.pardon.v1",
    takes=BlacklistPardon,
    gives=Blacklist,
    asked_by=_SERVICES,
    service=WORK_MARSHALLER,
    http=(Http(method="DELETE", path="/api/v1/blacklist/{node_id}"),),
    refuses=(Refusal(code="not_blacklisted", status=404, when="the node is not on the list"),),
    example=BlacklistPardon(node_id="gpu-box-1", work_type="inference"),
    about="Takes a node off the list, so that it gets work again at once. Answers with what was on it.",
)
