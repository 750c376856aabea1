"""Work items and nodes as MLOC shows tasks and workers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from computemesh import mloc, yamltext
from computemesh.contracts.nodes import NodeState, NodeView
from computemesh.contracts.tasks import (
    STATUS,
    TOPIC,
    Task,
    TaskStatus,
    TaskSubmitted,
    Worker,
    WorkerCpu,
    WorkerGpu,
    WorkerGpus,
    WorkerHardware,
    WorkerMemory,
    WorkerNetwork,
    WorkerStatus,
)
from computemesh.contracts.work import TASK_TEXT, WorkRecord, WorkState, WorkSummary
from computemesh.yamltext import Document, is_list, is_mapping

USAGE: Final = ("prompt_tokens", "completion_tokens", "total_tokens", "num_requests")
"""What is added up over replicas. They run at the same time, so of `latency_sec` the longest counts."""


def submitted(record: WorkRecord, reason: str) -> TaskSubmitted:
    """The answer to a task that was stored."""
    return TaskSubmitted(
        ok=True,
        task_id=record.work_id,
        worker_id=record.node_id or None,
        topic=TOPIC + record.work_type,
        status=STATUS[record.state],
        reason=reason,
    )


def task(record: WorkRecord, reason: str = "") -> Task:
    """An item as a task."""
    text = record.annotations.get(TASK_TEXT)
    return Task(
        task_id=record.work_id,
        raw_yaml=text,
        parsed=_parsed(text),
        status=STATUS[record.state],
        assigned_worker=record.node_id or None,
        topic=TOPIC + record.work_type,
        submitted_at=iso(record.submitted_at),
        error=why_not(record),
        state=record.state,
        model=record.model_name,
        owner=record.owner,
        attempt=record.attempt,
        workers=[member.node_id for member in record.members] or ([record.node_id] if record.node_id else []),
        finished_at=iso(record.finished_at) if record.finished_at else None,
        result_available=record.state is WorkState.COMPLETED,
        reason=reason,
    )


def line(item: WorkSummary) -> Task:
    """An item as a task, without its text."""
    failed = item.error is not None and STATUS[item.state] is TaskStatus.FAILED
    return Task(
        task_id=item.work_id,
        raw_yaml=None,
        parsed=None,
        status=STATUS[item.state],
        assigned_worker=item.node_id or None,
        topic=TOPIC + item.work_type,
        submitted_at=iso(item.submitted_at),
        error=item.error.reason if item.error and failed else None,
        state=item.state,
        model=item.model_name,
        owner=item.owner,
        attempt=item.attempt,
        workers=[item.node_id] if item.node_id else [],
        finished_at=iso(item.finished_at) if item.finished_at else None,
        result_available=item.state is WorkState.COMPLETED,
    )


def why_not(record: WorkRecord) -> str | None:
    """Why a task that has ended has no result; None for any other."""
    match STATUS[record.state]:
        case TaskStatus.FAILED:
            return record.error.reason if record.error else str(record.state)
        case TaskStatus.CANCELLED:
            told = record.story[-1].reason if record.story else ""
            return f"cancelled: {told}" if told else "cancelled"
        case _:
            return None


def _parsed(text: str | None) -> dict[str, Any] | None:
    """What a task's text says. It was read once already, so it can be read."""
    document = yamltext.read(text) if text else None
    return document.value if isinstance(document, Document) and is_mapping(document.value) else None


def iso(at: float) -> str:
    """Unix seconds as ISO 8601, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


# --- results -----------------------------------------------------------------------------------------------------


def together(results: Sequence[Any]) -> dict[str, Any]:
    """The results of replicas, in order, as one.

    Replicas that shared the prompts tell each item's place among all of them. Replicas that answered the same ones have
    the same places; then all items are numbered anew. Each says which replica it is of.
    """
    if not all(is_mapping(each) and is_list(each.get("items")) for each in results):
        return {"ok": True, "replicas": list(results)}
    items: list[dict[str, Any]] = [
        {**(item if is_mapping(item) else {"output": item}), "replica": replica}
        for replica, each in enumerate(results)
        for item in each["items"]
    ]
    places = [item.get("index") for item in items]
    if all(isinstance(place, int) for place in places) and len(set(places)) == len(places):
        items.sort(key=lambda item: item["index"])
    else:
        items = [{**item, "index": at} for at, item in enumerate(items)]
    found: dict[str, Any] = {"ok": all(each.get("ok", True) for each in results)}
    if models := [each["model"] for each in results if each.get("model")]:
        found["model"] = models[0]
    usages: list[dict[str, Any]] = [usage for each in results if is_mapping(usage := each.get("usage"))]
    return {**found, "items": items, "usage": _sum(usages)}


def _sum(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(_number(usage.get(name)) for usage in usages) for name in USAGE}
    return {**total, "latency_sec": max((_number(usage.get("latency_sec")) for usage in usages), default=0.0)}


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


# --- workers -----------------------------------------------------------------------------------------------------


def worker(node: NodeView, now: float, ttl_s: float) -> Worker:
    """A node as a worker.

    Args:
        ttl_s: silence after which it is stale.
    """
    silent = node.monitored and now - node.last_seen > ttl_s
    return Worker(
        worker_id=node.node_id,
        status=_status(node),
        started_at=iso(node.registered_at) if node.registered_at else None,
        env={"TASK_TOPICS": ",".join(TOPIC + kind for kind in node.work_types)} if node.work_types else {},
        hardware=WorkerHardware(
            cpu=WorkerCpu(logical_cores=node.cpu.threads, model=node.cpu.model) if node.cpu else WorkerCpu(),
            memory=WorkerMemory(total_bytes=node.memory.total_mb * 1024**2) if node.memory else WorkerMemory(),
            gpu=WorkerGpus(
                driver_version=next((gpu.driver for gpu in node.gpus if gpu.driver), None),
                gpus=[
                    WorkerGpu(index=gpu.index, name=gpu.name, uuid=gpu.uuid, memory_total_mb=gpu.vram_total_mb)
                    for gpu in node.gpus
                ],
            ),
            network=WorkerNetwork(hostname=node.hostname),
        ),
        tags=mloc.tags_of(node.labels),
        last_seen=iso(node.last_seen) if node.last_seen else None,
        stale=node.left or silent,
        state=node.state,
        models=node.models,
        running=node.running,
        slots=node.slots,
    )


def _status(node: NodeView) -> WorkerStatus:
    if node.state is not NodeState.ONLINE:
        return WorkerStatus.UNKNOWN
    if node.drained or node.accepting is False:
        return WorkerStatus.DRAINING
    return WorkerStatus.RUNNING if node.running else WorkerStatus.IDLE
