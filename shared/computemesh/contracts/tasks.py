"""MLOC's interface: tasks as YAML files, and workers. Over HTTP alone; the gateway makes work items of them.

Where MLOC has a field it is here under its name and in its form, its times as ISO 8601; the others are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec

from computemesh.contracts.base import Http, Message, Refusal, Route
from computemesh.contracts.services import GATEWAY
from computemesh.contracts.work import LOG_PART_MAX, LOG_WAIT_S_MAX, REPLICAS_MAX, WorkLogs, WorkState
from computemesh.hardware import Count
from computemesh.ids import Id

YAML: Final = ("text/yaml", "application/yaml", "application/x-yaml", "text/x-yaml")
"""Media types of a task as YAML."""

LIST_MAX: Final = 1000
TOPIC: Final = "tasks."
"""What a task's type stands behind, in MLOC's name for where it is sent."""


class TaskStatus(StrEnum):
    """Where a task is. Accepted in any case."""

    PENDING = "PENDING"
    """It waits for a node, or to be tried again."""
    DISPATCHED = "DISPATCHED"
    """A node has it."""
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    """By its own fault, or tried as often as allowed."""
    CANCELLED = "CANCELLED"

    @classmethod
    def _missing_(cls, value: object) -> TaskStatus | None:
        upper = value.upper() if isinstance(value, str) else ""
        return cls(upper) if upper != value and upper in cls.__members__ else None


STATUS: Final[Mapping[WorkState, TaskStatus]] = {
    WorkState.PENDING: TaskStatus.PENDING,
    WorkState.RETRYING: TaskStatus.PENDING,
    WorkState.ASSIGNED: TaskStatus.DISPATCHED,
    WorkState.RUNNING: TaskStatus.RUNNING,
    WorkState.COMPLETED: TaskStatus.COMPLETED,
    WorkState.FAILED: TaskStatus.FAILED,
    WorkState.DEAD: TaskStatus.FAILED,
    WorkState.CANCELLED: TaskStatus.CANCELLED,
}
"""The status that each state of a work item is."""


class TaskFile(Message, frozen=True, kw_only=True):
    """A task, or the YAML of one in `yaml`."""

    yaml: str = ""
    apiVersion: str = ""  # noqa: N815
    kind: str = ""
    metadata: dict[str, Any] = {}
    """`name`, and if wanted `id`, `owner`, `labels`, `annotations`."""
    spec: dict[str, Any] = {}
    """`taskType`, `resources`, and what the executor of that type reads."""


class TaskSubmitted(Message, frozen=True, kw_only=True):
    """A task was stored: from now on it ends with one outcome."""

    ok: bool
    task_id: Id
    worker_id: str | None
    """The node that has it; null while none has."""
    topic: str
    """`tasks.` and its type."""
    status: TaskStatus
    reason: str = ""
    """Why it waits, when it does."""


class Task(Message, frozen=True, kw_only=True):
    task_id: Id
    raw_yaml: str | None
    """The text it was submitted as; null for work that came another way, and in short lists."""
    parsed: dict[str, Any] | None
    """What that text says."""
    status: TaskStatus
    assigned_worker: str | None
    """Of a task with replicas, the node of the first."""
    topic: str
    submitted_at: str
    error: str | None
    """Why it failed, or was cancelled."""
    state: WorkState
    """As the work-marshaller calls it."""
    model: str = ""
    owner: str = ""
    attempt: int = 0
    workers: list[str] = []
    """The nodes of all replicas."""
    finished_at: str | None = None
    result_available: bool = False
    reason: str = ""
    """Why it waits, when it does; only where one task is asked for."""


class TaskGet(Message, frozen=True, kw_only=True):
    task_id: Id


class TaskList(Message, frozen=True, kw_only=True):
    status: TaskStatus | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_MAX)] = 100
    after: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """As in the `Link` of the page before."""
    full: bool = True
    """False leaves out `raw_yaml` and `parsed`, and is much faster."""


class TaskCancel(Message, frozen=True, kw_only=True):
    task_id: Id
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class TaskLogs(Message, frozen=True, kw_only=True):
    task_id: Id
    replica: Annotated[int, msgspec.Meta(ge=0, lt=REPLICAS_MAX)] = 0
    attempt: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Left out, the latest."""
    offset: Count = 0
    """From this byte on."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LOG_PART_MAX)] = LOG_PART_MAX
    """At most so many bytes; as plain text, all."""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=LOG_WAIT_S_MAX)] = 0.0
    """How long to wait for more when there is nothing yet."""
    follow: bool = False
    """As plain text: go on until the attempt has ended."""


class WorkerCpu(Message, frozen=True, kw_only=True):
    logical_cores: int | None = None
    model: str = ""


class WorkerMemory(Message, frozen=True, kw_only=True):
    total_bytes: int | None = None


class WorkerGpu(Message, frozen=True, kw_only=True):
    index: int
    name: str
    uuid: str
    memory_total_mb: int = 0


class WorkerGpus(Message, frozen=True, kw_only=True):
    driver_version: str | None = None
    cuda_version: str | None = None
    """Null: nodes do not tell it."""
    gpus: list[WorkerGpu] = []


class WorkerNetwork(Message, frozen=True, kw_only=True):
    hostname: str = ""
    ip: str | None = None
    """Null: nodes are reached over the bus."""


class WorkerHardware(Message, frozen=True, kw_only=True):
    cpu: WorkerCpu
    memory: WorkerMemory
    gpu: WorkerGpus
    network: WorkerNetwork


class WorkerStatus(StrEnum):
    IDLE = "IDLE"
    RUNNING = "RUNNING"
    DRAINING = "DRAINING"
    """It takes nothing new: an operator, or the node itself, said so."""
    UNKNOWN = "UNKNOWN"
    """It is silent."""


class Worker(Message, frozen=True, kw_only=True):
    """A node, as MLOC tells of a worker."""

    worker_id: Id
    status: WorkerStatus
    started_at: str | None
    """When the node first announced itself."""
    pid: int | None = None
    env: dict[str, str] = {}
    """What MLOC's workers tell here in environment variables: `TASK_TOPICS`."""
    hardware: WorkerHardware
    tags: list[str]
    """Its labels: `fast` for `fast=true`, others as `zone=a`."""
    last_seen: str | None
    stale: bool
    """Nothing was heard of it for `HEARTBEAT_TTL_SEC`, or it said that it ends."""
    state: str
    """As the node-registry calls it: `online`, `suspect` or `lost`."""
    models: list[str] = []
    running: int | None = None
    """Work items it runs."""
    slots: int = 0


class WorkersGet(Message, frozen=True, kw_only=True):
    pass


class WorkerGet(Message, frozen=True, kw_only=True):
    worker_id: Id


class Cleanup(Message, frozen=True, kw_only=True):
    pass


class CleanedUp(Message, frozen=True, kw_only=True):
    ok: bool
    removed: int
    worker_ids: list[str]


_NO_TASK: Final = Refusal(code="not_found", status=404, when="there is no such task")
_NO_WORKER: Final = Refusal(code="not_found", status=404, when="there is no such worker")
_ID: Final = "t-example"

SUBMIT: Final = Route(
    name="submit_task",
    service=GATEWAY,
    http=Http(method="POST", path="/api/v1/tasks"),
    takes=TaskFile,
    texts=YAML,
    gives=TaskSubmitted,
    refuses=(
        Refusal(code="bad_yaml", status=400, when="the text is no YAML; `detail` has line and column"),
        Refusal(code="bad_task", status=400, when="a field of the task is wrong or missing; `field` says which"),
        Refusal(code="unknown_work_type", status=400, when="no built-in type, and none that a node has announced"),
        Refusal(code="other_task", status=409, when="the id, or the `Idempotency-Key`, stands for another task"),
        Refusal(code="queue_full", status=503, when="as many items wait as may"),
        Refusal(code="not_stored", status=503, when="the inbox did not take the task"),
    ),
    example=TaskFile(
        apiVersion="mloc/v1",
        kind="InferenceTask",
        metadata={"name": "example", "id": _ID},
        spec={
            "taskType": "inference",
            "resources": {"replicas": 1, "hardware": {"cpu": "1", "memory": "256Mi"}},
            "inference": {"max_tokens": 16, "prompts": ["What is a mesh?", "What is a node?"]},
        },
    ),
    about="Submits a task. The answer waits up to a second for a node; without one the task waits, and `reason` says "
    "for what. With `Prefer: respond-async` it does not wait. `Idempotency-Key` makes repeating it harmless, "
    "as `metadata.id` does; give one of them.",
)
LIST: Final = Route(
    name="list_tasks",
    service=GATEWAY,
    http=Http(method="GET", path="/api/v1/tasks"),
    takes=TaskList,
    gives=list[Task],
    example=TaskList(limit=20),
    about="Tasks, the newest first, and all other work. The header `Link` names the next page, while there is one.",
)
GET: Final = Route(
    name="get_task",
    service=GATEWAY,
    http=Http(method="GET", path="/api/v1/tasks/{task_id}"),
    takes=TaskGet,
    gives=Task,
    refuses=(_NO_TASK,),
    example=TaskGet(task_id=_ID),
    about="One task.",
)
RESULT: Final = Route(
    name="get_task_result",
    service=GATEWAY,
    http=Http(method="GET", path="/api/v1/tasks/{task_id}/result"),
    takes=TaskGet,
    gives=Any,
    refuses=(
        _NO_TASK,
        Refusal(code="not_finished", status=409, when="the task has not ended yet"),
        Refusal(code="no_result", status=409, when="the task ended without a result; `detail` says why"),
    ),
    example=TaskGet(task_id=_ID),
    about="What the executor gave, as in its `responses.json`. Of replicas, their items together.",
)
LOGS: Final = Route(
    name="get_task_logs",
    service=GATEWAY,
    http=Http(method="GET", path="/api/v1/tasks/{task_id}/logs"),
    takes=TaskLogs,
    gives=WorkLogs,
    gives_text=True,
    refuses=(_NO_TASK, Refusal(code="no_log", status=404, when="nothing is kept of what the attempt printed")),
    example=TaskLogs(task_id=_ID),
    about="What an attempt has printed: a part as JSON, or all of it with `Accept: text/plain`.",
)
CANCEL: Final = Route(
    name="cancel_task",
    service=GATEWAY,
    http=Http(method="POST", path="/api/v1/tasks/{task_id}/cancel"),
    takes=TaskCancel,
    gives=Task,
    refuses=(_NO_TASK, Refusal(code="already_final", status=409, when="the task has ended in another way")),
    example=TaskCancel(task_id=_ID, reason="no longer needed"),
    about="Cancels a task and ends what runs of it.",
)
DELETE: Final = Route(
    name="delete_task",
    service=GATEWAY,
    http=Http(method="DELETE", path="/api/v1/tasks/{task_id}"),
    takes=TaskCancel,
    gives=Task,
    refuses=CANCEL.refuses,
    example=TaskCancel(task_id=_ID),
    about="The same as cancel.",
)
WORKERS: Final = Route(
    name="list_workers",
    service=GATEWAY,
    http=Http(method="GET", path="/workers"),
    takes=WorkersGet,
    gives=list[Worker],
    example=WorkersGet(),
    about="All nodes.",
)
WORKER: Final = Route(
    name="get_worker",
    service=GATEWAY,
    http=Http(method="GET", path="/workers/{worker_id}"),
    takes=WorkerGet,
    gives=Worker,
    refuses=(_NO_WORKER,),
    example=WorkerGet(worker_id="gpu-box"),
    about="One node.",
)
CLEANUP: Final = Route(
    name="clean_up_workers",
    service=GATEWAY,
    http=Http(method="POST", path="/admin/cleanup"),
    takes=Cleanup,
    gives=CleanedUp,
    example=Cleanup(),
    about="Forgets the nodes that are lost and stale, but for those that an operator drained.",
)
