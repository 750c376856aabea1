"""Items of type ``command`` with real programs: what they print, how they end, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from computemesh.executors import Task
from computemesh.executors.protocol import Broke, Done, Outcome, ProgressNote
from computemesh.testing import until
from computemesh_services.node_agent.command import TAIL_BYTES
from computemesh_services.node_agent.runs import Runner

SH = "/bin/sh"


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    """A runner as the node agent has it."""
    runner = Runner(spare_types=["command"])
    yield runner
    await runner.close()


async def run(runner: Runner, out_dir: Path, notes: list[ProgressNote] | None = None, **payload: Any) -> Outcome:
    task = Task(work_id="w-1", attempt=2, work_type="command", payload=payload, timeout_s=60)
    return await runner.run(task, out_dir, on_progress=(notes if notes is not None else []).append)


async def result(runner: Runner, out_dir: Path, **payload: Any) -> dict[str, Any]:
    found = await run(runner, out_dir, **payload)
    assert isinstance(found, Done), found
    assert isinstance(found.result, dict)
    return found.result  # pyright: ignore[reportUnknownVariableType,reportUnknownMemberType]


async def failure(runner: Runner, out_dir: Path, **payload: Any) -> Broke:
    found = await run(runner, out_dir, **payload)
    assert isinstance(found, Broke), found
    return found


async def test_a_program_runs_in_the_items_folder_with_arguments_variables_and_input(
    runner: Runner, tmp_path: Path
) -> None:
    """Arguments reach it as they are, without a shell; its output is in the result and in the log."""
    script = 'pwd; echo "$1"; echo "$COLOUR $COMPUTEMESH_WORK_ID $COMPUTEMESH_ATTEMPT"; cat; echo oops >&2; touch made'
    done = await result(
        runner, tmp_path, argv=[SH, "-c", script, "x", "$HOME; *"], env={"COLOUR": "blue"}, stdin="typed\n"
    )
    assert (done["ok"], done["exit_code"]) == (True, 0)
    assert done["output"] == f"{tmp_path}\n$HOME; *\nblue w-1 2\ntyped\noops\n"
    assert done["duration_s"] > 0
    assert (tmp_path / "log.txt").read_text().endswith(done["output"])
    assert (tmp_path / "made").exists()


async def test_a_folder_of_its_own_is_made_below_the_items(runner: Runner, tmp_path: Path) -> None:
    """Nowhere else."""
    assert (await result(runner, tmp_path, argv=["pwd"], cwd="a/b"))["output"] == f"{tmp_path}/a/b\n"
    for cwd in ("/tmp", "..", "a/../../b"):
        broke = await failure(runner, tmp_path, argv=["pwd"], cwd=cwd)
        assert (broke.code, broke.fault) == ("bad_payload", "work")
        assert broke.reason == f"payload.cwd: {cwd!r} is not below the item's folder"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({}, "payload.argv: Object missing required field 'argv'"),
        ({"argv": []}, "payload.argv: "),
        ({"argv": "ls"}, "payload.argv: "),
        ({"argv": ["a\0b"]}, "payload.argv[0]: "),
        ({"argv": ["ls"], "env": {"A=B": "c"}}, "payload.env"),
        ({"argv": ["ls"], "shell": True}, "payload.shell: "),
        ({"argv": ["no-such-program-here"]}, "payload.argv: cannot start 'no-such-program-here': No such file"),
        ({"argv": ["/etc/passwd"]}, "payload.argv: cannot start '/etc/passwd': Permission denied"),
        ({"argv": ["echo", "x" * 10_000_000]}, "payload.argv: cannot start 'echo': Argument list too long"),
    ],
)
async def test_a_program_that_cannot_be_started_is_the_works_fault_and_the_field_is_named(
    runner: Runner, tmp_path: Path, payload: dict[str, Any], reason: str
) -> None:
    """It would not start elsewhere either; and a slip must not cost nodes their good name."""
    broke = await failure(runner, tmp_path, **payload)
    assert broke.reason.startswith(reason)
    assert broke.fault == "work"


async def test_an_exit_status_is_the_works_failure_with_the_last_line(runner: Runner, tmp_path: Path) -> None:
    """It is not tried again."""
    broke = await failure(runner, tmp_path, argv=[SH, "-c", "echo first; echo no such table; echo; exit 3"])
    assert broke == Broke(
        reason=f"{SH} exited with status 3; its last line: no such table", code="exit_status", fault="work"
    )


async def test_a_program_that_is_killed_is_the_nodes_fault(runner: Runner, tmp_path: Path) -> None:
    """As when this machine's memory runs out."""
    broke = await failure(runner, tmp_path, argv=[SH, "-c", "kill -9 $$"])
    assert broke == Broke(reason=f"{SH} was killed by SIGKILL", code="killed", fault="node")


async def test_lines_that_tell_progress_are_passed_on(runner: Runner, tmp_path: Path) -> None:
    """They stay in the output as well; lines that only look alike are output."""
    notes: list[ProgressNote] = []
    script = "echo ::progress 0.25 reading; sleep 0.5; echo ::progress much; echo '::progress 1'"
    done = await run(runner, tmp_path, notes, argv=[SH, "-c", script])
    assert isinstance(done, Done)
    assert notes == [ProgressNote(message="reading", fraction=0.25), ProgressNote(message="", fraction=1.0)]


async def test_a_flood_of_output_is_all_in_the_log_and_its_end_in_the_result(runner: Runner, tmp_path: Path) -> None:
    """Also when it has no line ends, and is no text."""
    script = "import sys; sys.stdout.buffer.write(b'\\xff' * 20_000_000 + b'end')"
    done = await result(runner, tmp_path, argv=[sys.executable, "-c", script])
    assert len(done["output"]) == TAIL_BYTES
    assert done["output"].endswith("\ufffdend")
    assert (tmp_path / "log.txt").stat().st_size == 20_000_003


async def test_what_a_program_leaves_running_does_not_hold_it_up_and_is_ended(runner: Runner, tmp_path: Path) -> None:
    """It holds the output open."""
    script = "sleep 1000 & echo $! > left; echo done"
    async with asyncio.timeout(30):
        assert (await result(runner, tmp_path, argv=[SH, "-c", script]))["output"] == "done\n"
    left = int((tmp_path / "left").read_text())
    await until(lambda: not lives(left), what="the left-over process to end")


async def test_cancelling_gives_the_program_a_moment_to_end_in_good_order(runner: Runner, tmp_path: Path) -> None:
    """It gets SIGTERM; what it writes then is kept."""
    script = "trap 'echo cleaned up; exit 0' TERM; echo $$ > pid; while :; do sleep 0.01; done"
    running = asyncio.create_task(run(runner, tmp_path, argv=[SH, "-c", script]))
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), what="its start")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not lives(int((tmp_path / "pid").read_text()))
    assert "cleaned up" in (tmp_path / "log.txt").read_text()


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
