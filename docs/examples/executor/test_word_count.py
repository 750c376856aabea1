"""The executor on a mesh of its own: a real NATS server and every service, each a process."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from word_count import WordCount

from computemesh.contracts import work
from computemesh.contracts.work import WorkCancel, WorkItem, WorkProgress, WorkRecord, WorkState
from computemesh.executors import ExecutionError, Task
from computemesh.testing import RunningMesh, running_mesh, until

SERVICES = ("node-registry", "work-marshaller", "node-agent")


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[RunningMesh]:
    """A mesh whose node found the installed executor by its entry point."""
    async with running_mesh(tmp_path, SERVICES) as running:
        yield running


def item(**payload: object) -> WorkItem:
    return WorkItem(work_type="word-count", payload=payload)


def unwatched(message: str = "", *, fraction: float | None = None) -> None:
    """Progress that nobody looks at."""


def test_run_is_a_function_that_needs_no_mesh(tmp_path: Path) -> None:
    """A result, a file in its folder, and a refusal that names the field."""
    task = Task(work_id="w-1", attempt=1, work_type="word-count", payload={"text": "to be or not to be", "top": 2})
    result = WordCount().run(task, tmp_path, unwatched)
    assert result == {"words": 6, "most": {"to": 2, "be": 2}}
    assert (tmp_path / "words.txt").read_text().split() == ["be", "not", "or", "to"]
    wrong = Task(work_id="w-2", attempt=1, work_type="word-count", payload={"text": 5})
    with pytest.raises(ExecutionError, match=r"^payload\.text: Expected 'str', got 'int'$"):
        WordCount().run(wrong, tmp_path, unwatched)


async def test_an_item_is_completed_with_its_result(mesh: RunningMesh) -> None:
    """Submitted like any work; the record has what ``run`` returned."""
    sent = await mesh.submit(item(text="to be or not to be"))
    done = await mesh.record(sent.work_id)
    assert (done.state, done.node_id) == (WorkState.COMPLETED, "n1")
    assert done.result == {"words": 6, "most": {"to": 2, "be": 2, "or": 1}}


async def test_a_bad_payload_fails_once_and_names_the_field(mesh: RunningMesh) -> None:
    """It is the work's own fault, so it is not tried again."""
    sent = await mesh.submit(item(text="to be", top=0))
    failed = await mesh.record(sent.work_id)
    assert (failed.state, failed.attempt) == (WorkState.FAILED, 1)
    assert failed.error is not None
    assert (failed.error.code, failed.error.fault) == ("bad_payload", "work")
    assert failed.error.reason.startswith("payload.top: ")


async def test_progress_is_heard_while_it_runs_and_cancelling_ends_it(mesh: RunningMesh) -> None:
    """A text that would take ten minutes."""
    bus = await mesh.bus()
    heard: list[WorkProgress] = []

    async def on_progress(note: WorkProgress) -> None:
        heard.append(note)

    await bus.subscribe(work.PROGRESS, on_progress)
    await bus.flush()
    sent = await mesh.submit(item(text="word\n" * 600, pause_s=1))
    await until(lambda: any(note.message == "line 2 of 600" for note in heard), what="the second line")
    cancelled = await bus.ask(work.CANCEL, WorkCancel(work_id=sent.work_id, reason="long enough"))
    assert isinstance(cancelled, WorkRecord)
    assert cancelled.state is WorkState.CANCELLED
    # The node is free again, and the processes of the first item are gone.
    again = await mesh.submit(item(text="one"))
    assert (await mesh.record(again.work_id)).state is WorkState.COMPLETED
