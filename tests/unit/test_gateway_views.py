"""What MLOC's clients see of items, results and nodes."""

from __future__ import annotations

from typing import Any

import pytest

from computemesh.contracts.nodes import NodeState, NodeView
from computemesh.contracts.tasks import STATUS, TaskStatus, WorkerStatus
from computemesh.contracts.work import FINAL, TASK_TEXT, Member, Move, WorkError, WorkRecord, WorkState, WorkSummary
from computemesh.hardware import Cpu, Gpu, Memory
from computemesh_services.gateway import views
from computemesh_services.work_marshaller.workitem import summary

NOW = 1_800_000_000.0


def record(state: WorkState, **fields: Any) -> WorkRecord:
    return WorkRecord(work_id="w", state=state, work_type="inference", submitted_at=NOW, **fields)


def test_every_state_of_an_item_has_a_status() -> None:
    """Those that MLOC knows are called as it calls them; what failed is FAILED, however often it was tried."""
    assert STATUS.keys() == set(WorkState)
    assert set(STATUS.values()) == set(TaskStatus)
    assert STATUS[WorkState.DEAD] is STATUS[WorkState.FAILED] is TaskStatus.FAILED
    assert STATUS[WorkState.RETRYING] is STATUS[WorkState.PENDING] is TaskStatus.PENDING


def test_a_task_shows_its_text_and_what_it_says() -> None:
    text = "apiVersion: mloc/v1\nspec: {taskType: inference}\n"
    found = views.task(record(WorkState.ASSIGNED, node_id="n", annotations={TASK_TEXT: text}))
    assert (found.raw_yaml, found.parsed) == (text, {"apiVersion": "mloc/v1", "spec": {"taskType": "inference"}})
    assert (found.status, found.assigned_worker, found.topic) == (TaskStatus.DISPATCHED, "n", "tasks.inference")
    assert found.submitted_at == "2027-01-15T08:00:00+00:00"


def test_work_that_was_no_task_has_no_text() -> None:
    found = views.task(record(WorkState.PENDING))
    assert (found.raw_yaml, found.parsed, found.assigned_worker, found.error) == (None, None, None, None)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (WorkState.COMPLETED, None),
        (WorkState.RETRYING, None),
        (WorkState.FAILED, "out of memory"),
        (WorkState.DEAD, "out of memory"),
        (WorkState.CANCELLED, "cancelled: enough"),
    ],
)
def test_the_error_is_that_of_a_task_which_has_ended_without_a_result(state: WorkState, said: str | None) -> None:
    """An attempt that failed before another one went well is no error of the task."""
    story = [Move(at=NOW, state=state, reason="enough")]
    found = views.task(record(state, error=WorkError(reason="out of memory"), story=story))
    assert (found.error, found.result_available) == (said, state is WorkState.COMPLETED)


def test_a_line_of_a_list_says_the_same_in_short() -> None:
    error = WorkError(reason="out of memory")
    for state in WorkState:
        item = record(state, node_id="n", finished_at=NOW + 9 if state in FINAL else None)
        short, full = views.line(summary(item)), views.task(item)
        assert (short.task_id, short.status, short.topic, short.submitted_at, short.workers) == (
            (full.task_id, full.status, full.topic, full.submitted_at, full.workers)
        )
        assert (short.finished_at, short.finished_at is None) == (full.finished_at, state not in FINAL)
    dead = WorkSummary(work_id="w", state=WorkState.DEAD, work_type="inference", error=error)
    assert views.line(dead).error == "out of memory"


def test_a_task_with_replicas_names_all_its_workers() -> None:
    members = [Member(replica=at, node_id=f"n{at}") for at in range(2)]
    found = views.task(record(WorkState.RUNNING, node_id="n0", members=members, replicas=2))
    assert (found.assigned_worker, found.workers) == ("n0", ["n0", "n1"])


def answers(*items: dict[str, Any], **usage: Any) -> dict[str, Any]:
    return {"ok": True, "model": "m", "items": list(items), "usage": usage}


def test_replicas_that_shared_the_prompts_are_put_in_their_order() -> None:
    """Tokens add up; they ran at the same time, so the longest time is that of all."""
    first = answers({"index": 0, "output": "a"}, {"index": 2, "output": "c"}, prompt_tokens=3, latency_sec=2.0)
    second = answers({"index": 1, "output": "b"}, prompt_tokens=4, latency_sec=1.5)
    found = views.together([first, second])
    assert [(item["index"], item["output"], item["replica"]) for item in found["items"]] == [
        (0, "a", 0),
        (1, "b", 1),
        (2, "c", 0),
    ]
    assert (found["ok"], found["model"]) == (True, "m")
    assert (found["usage"]["prompt_tokens"], found["usage"]["latency_sec"]) == (7, 2.0)


def test_replicas_that_answered_the_same_prompts_are_numbered_anew() -> None:
    found = views.together([answers({"index": 0, "output": "a"}), answers({"index": 0, "output": "b"})])
    assert [(item["index"], item["output"], item["replica"]) for item in found["items"]] == [(0, "a", 0), (1, "b", 1)]


@pytest.mark.parametrize("results", [[1, None], [{"items": 3}, {}], [{"ok": False}], [answers(), "x"]])
def test_results_of_another_shape_stand_side_by_side(results: list[Any]) -> None:
    assert views.together(results) == {"ok": True, "replicas": results}


@pytest.mark.parametrize("items", [[None], ["x"], [{"index": "y"}], [{}, {"index": 0}], [[]]])
def test_items_of_any_shape_are_kept(items: list[Any]) -> None:
    found = views.together([{"items": items, "usage": {"prompt_tokens": "many"}}])
    assert [item["index"] for item in found["items"]] == list(range(len(items)))


def node(**fields: Any) -> NodeView:
    return NodeView(node_id="n", registered_at=NOW - 100, last_seen=NOW, monitored=True, **fields)


def test_a_node_is_shown_with_its_hardware_in_units_of_mloc() -> None:
    gpu = Gpu(index=1, name="NVIDIA H100", uuid="GPU-1", vram_total_mb=81_559, driver="570.1")
    found = views.worker(
        node(
            hostname="box",
            cpu=Cpu(model="EPYC", threads=64),
            memory=Memory(total_mb=1024),
            gpus=[gpu],
            labels={"fast": "true", "zone": "a"},
            work_types=["inference", "ppo"],
        ),
        NOW,
        120.0,
    )
    assert (found.hardware.cpu.logical_cores, found.hardware.memory.total_bytes) == (64, 1024**3)
    assert (found.hardware.gpu.driver_version, found.hardware.gpu.gpus[0].name) == ("570.1", "NVIDIA H100")
    assert (found.tags, found.env) == (["fast", "zone=a"], {"TASK_TOPICS": "tasks.inference,tasks.ppo"})
    assert (found.status, found.stale) == (WorkerStatus.IDLE, False)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"running": 1}, WorkerStatus.RUNNING),
        ({"running": 0}, WorkerStatus.IDLE),
        ({"drained": True, "running": 1}, WorkerStatus.DRAINING),
        ({"accepting": False}, WorkerStatus.DRAINING),
        ({"state": NodeState.SUSPECT, "running": 1}, WorkerStatus.UNKNOWN),
        ({"state": NodeState.LOST}, WorkerStatus.UNKNOWN),
    ],
)
def test_a_worker_has_the_status_that_its_node_has(fields: dict[str, Any], status: WorkerStatus) -> None:
    assert views.worker(node(**fields), NOW, 120.0).status is status


def test_a_worker_is_stale_after_the_time_to_live_of_its_heartbeats() -> None:
    """Or when it said that it ends; never, when it sends none."""
    assert not views.worker(node(), NOW + 120, 120.0).stale
    assert views.worker(node(), NOW + 121, 120.0).stale
    assert views.worker(node(left=True), NOW, 120.0).stale
    assert not views.worker(NodeView(node_id="n", last_seen=NOW), NOW + 1000, 120.0).stale
