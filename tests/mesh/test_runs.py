"""The runner with real executor processes: whatever a plug-in does, there is one outcome and nothing left over.

The executors are installed for the child processes as a distribution in a temporary folder on PYTHONPATH.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from computemesh.executors import Task
from computemesh.executors.protocol import Broke, Done, Outcome, ProgressNote, Ready
from computemesh_services.node_agent.runs import KILL_GRACE_S, Runner

WAIT_S = 20.0
"""Bound on every wait for a condition; on a quiet machine they take milliseconds."""

EXECUTORS = """
import os, subprocess, sys, time
from computemesh.executors import ExecutionError, Executor

class Echo(Executor):
    def run(self, task, out_dir, progress):
        progress("half", fraction=0.5)
        (out_dir / "file.txt").write_text("made")
        return {"echo": task.payload, "pid": os.getpid()}

class Flood(Executor):
    def run(self, task, out_dir, progress):
        for number in range(1000):
            progress(f"note {number}", fraction=number / 500)
        return None

class Sleeper(Executor):
    def run(self, task, out_dir, progress):
        child = subprocess.Popen(["sleep", "1000"])
        progress(f"{os.getpid()} {child.pid}")
        time.sleep(1000)

class Stubborn(Executor):
    def run(self, task, out_dir, progress):
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        progress(f"{os.getpid()}")
        while True:
            time.sleep(1000)

class StubbornFamily(Executor):
    def run(self, task, out_dir, progress):
        script = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        script += "os.fork(); open(str(os.getpid()), 'w').close(); time.sleep(1000)"
        subprocess.Popen([sys.executable, "-c", script], cwd=out_dir)
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (out_dir / str(os.getpid())).touch()
        time.sleep(1000)

class Raises(Executor):
    def run(self, task, out_dir, progress):
        raise {"ValueError": ValueError("bad number"), "MemoryError": MemoryError(), "SystemExit": SystemExit(4),
               "ExecutionError": ExecutionError("no such file", code="no_file", fault="work")}[task.payload["what"]]

    def teardown(self):
        print("torn down")

class Exits(Executor):
    def run(self, task, out_dir, progress):
        print("about to leave")
        os._exit(3)

class Killed(Executor):
    def run(self, task, out_dir, progress):
        os.kill(os.getpid(), 9)

class Prints(Executor):
    def prepare(self):
        print('{"kind": "done", "result": "forged while preparing"}')

    def run(self, task, out_dir, progress):
        print('{"kind": "done", "result": "forged"}')
        print("to stderr", file=sys.stderr)
        subprocess.run(["echo", "from a child"])
        return "real"

class Gives(Executor):
    def run(self, task, out_dir, progress):
        deep = 1
        for _ in range(100):
            deep = [deep]
        return {"object": object(), "deep": deep, "large": "x" * 2_000_000, "huge": "x" * 20_000_000,
                "surrogate": "\\udc80"}[task.payload["what"]]

class Forks(Executor):
    def run(self, task, out_dir, progress):
        if (pid := os.fork()) == 0:
            os.setsid()
            time.sleep(1000)
        (out_dir / "fork.pid").write_text(str(pid))
        os._exit(5)

class LeavesChild(Executor):
    def run(self, task, out_dir, progress):
        return subprocess.Popen(["sleep", "1000"]).pid

class Daemon(Executor):
    def run(self, task, out_dir, progress):
        script = "import os, time; os.fork() and os._exit(0); os.setsid(); "
        script += "open('daemon.pid', 'w').write(str(os.getpid())); time.sleep(1000)"
        subprocess.Popen([sys.executable, "-c", script], cwd=out_dir).wait()
        while not (out_dir / "daemon.pid").exists() or not (out_dir / "daemon.pid").read_text():
            time.sleep(0.01)
        progress("started")
        while task.payload["stays"]:
            time.sleep(1)

class Saves(Executor):
    def run(self, task, out_dir, progress):
        self.save_json(out_dir / "extra.json", {"more": [1, 2]})
        if task.payload["fails"]:
            raise ExecutionError("not this time")
        return {"ok": True, "items": [{"index": 0}]}

class Calls(Executor):
    def prepare(self):
        print("called prepare")

    def run(self, task, out_dir, progress):
        print("called run")
        if task.payload["fails"]:
            raise ExecutionError("not this time")

    def teardown(self):
        print("called teardown")

class Unprepared(Executor):
    def prepare(self):
        raise RuntimeError("no GPU here")

    def run(self, task, out_dir, progress):
        return None

    def teardown(self):
        print("torn down")

class NeedsEngine(Executor):
    needs_engine = True

    def run(self, task, out_dir, progress):
        return None
"""

ENTRY_POINTS = """
[computemesh.executors]
echo = mesh_test_executors:Echo
flood = mesh_test_executors:Flood
sleeper = mesh_test_executors:Sleeper
stubborn = mesh_test_executors:Stubborn
stubborn_family = mesh_test_executors:StubbornFamily
raises = mesh_test_executors:Raises
exits = mesh_test_executors:Exits
killed = mesh_test_executors:Killed
prints = mesh_test_executors:Prints
gives = mesh_test_executors:Gives
forks = mesh_test_executors:Forks
leaves_child = mesh_test_executors:LeavesChild
unprepared = mesh_test_executors:Unprepared
calls = mesh_test_executors:Calls
daemon = mesh_test_executors:Daemon
saves = mesh_test_executors:Saves
needs_engine = mesh_test_executors:NeedsEngine
broken = mesh_test_no_such_module:Executor
no_executor = mesh_test_executors:subprocess
"""

PARENT = """
import asyncio, sys
from pathlib import Path
from computemesh.executors import Task
from computemesh_services.node_agent.runs import KILL_GRACE_S, Runner

async def main():
    task = Task(work_id="w", attempt=1, work_type=sys.argv[2], payload={"stays": True})
    runner = Runner()
    await runner.run(task, Path(sys.argv[1]), on_progress=lambda note: print(note.message, flush=True))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the test executors are installed."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "mesh_test_executors.py").write_text(EXECUTORS)
    dist = folder / "mesh_test_executors-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: mesh-test-executors\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text(ENTRY_POINTS)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
async def runner(environment: dict[str, str]) -> AsyncIterator[Runner]:
    """A runner without spares, closed afterwards."""
    runner = Runner(environment=environment, result_bytes_max=1_000_000, line_bytes_max=16_777_216)
    yield runner
    await runner.close()
    await until(lambda: not executors())


def task(work_type: str, **payload: Any) -> Task:
    return Task(work_id="w-1", attempt=1, work_type=work_type, payload=payload, timeout_s=WAIT_S)


def unwatched(note: ProgressNote) -> None:
    pass


async def outcome(runner: Runner, work_type: str, out_dir: Path, **payload: Any) -> Outcome:
    return await runner.run(task(work_type, **payload), out_dir, on_progress=unwatched)


async def failure(runner: Runner, work_type: str, out_dir: Path, **payload: Any) -> Broke:
    result = await outcome(runner, work_type, out_dir, **payload)
    assert isinstance(result, Broke)
    return result


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def executors() -> set[int]:
    """Executor processes that this process started and that still live."""
    return {child.pid for child in psutil.Process().children() if not gone(child.pid) and is_executor(child)}


def is_executor(process: psutil.Process) -> bool:
    try:
        return "computemesh.executors.runner" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_task_gives_its_result_progress_and_files(runner: Runner, tmp_path: Path) -> None:
    """The plain case, in a folder that did not exist."""
    notes: list[ProgressNote] = []
    result = await runner.run(task("echo", a=1), tmp_path / "out", on_progress=notes.append)
    assert isinstance(result, Done)
    assert result.result["echo"] == {"a": 1}
    assert notes == [ProgressNote(message="half", fraction=0.5)]
    assert (tmp_path / "out" / "file.txt").read_text() == "made"
    await until(lambda: gone(result.result["pid"]))


async def test_fast_progress_is_thinned_and_its_last_note_arrives(runner: Runner, tmp_path: Path) -> None:
    """A thousand notes become a few; a fraction above one is brought within bounds."""
    notes: list[ProgressNote] = []
    assert await runner.run(task("flood"), tmp_path, on_progress=notes.append) == Done(result=None)
    assert len(notes) < 20
    assert notes[-1] == ProgressNote(message="note 999", fraction=1.0)


async def test_what_an_executor_prints_lands_in_its_log_and_never_in_the_protocol(
    runner: Runner, tmp_path: Path
) -> None:
    """Not even a printed line that looks like an outcome, before the task or during it."""
    assert await outcome(runner, "prints", tmp_path) == Done(result="real")
    log = (tmp_path / "log.txt").read_text()
    for text in ("forged while preparing", '"forged"', "to stderr", "from a child"):
        assert text in log


@pytest.mark.parametrize(
    ("what", "reason"),
    [("ValueError", "ValueError: bad number"), ("MemoryError", "MemoryError"), ("SystemExit", "SystemExit: 4")],
)
async def test_an_unexpected_exception_is_the_nodes_fault_and_its_traceback_stays_in_the_log(
    runner: Runner, tmp_path: Path, what: str, reason: str
) -> None:
    """The submitter gets one line; teardown still happens."""
    assert await failure(runner, "raises", tmp_path, what=what) == Broke(reason=reason, fault="node")
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log
    assert log.endswith("torn down\n")


async def test_an_execution_error_reaches_the_submitter_as_it_is(runner: Runner, tmp_path: Path) -> None:
    """Reason, code and fault are the executor's own."""
    expected = Broke(reason="no such file", code="no_file", fault="work")
    assert await failure(runner, "raises", tmp_path, what="ExecutionError") == expected


async def test_a_result_of_many_megabytes_is_passed_on_as_the_json_it_is(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The agent's memory holds it once, not as Python objects besides."""
    runner = Runner(environment=environment)
    done = await outcome(runner, "gives", tmp_path, what="huge")
    await runner.close()
    assert isinstance(done, Done)
    assert isinstance(done.result, msgspec.Raw)
    assert bytes(done.result) == msgspec.json.encode("x" * 20_000_000)


async def test_each_attempt_has_a_log_of_its_own_and_log_txt_leads_to_the_latest(
    runner: Runner, tmp_path: Path
) -> None:
    """Whatever stood under that name before."""
    (tmp_path / "log.txt").write_text("of an older version")
    for attempt in (1, 2):
        again = msgspec.structs.replace(task("prints"), attempt=attempt)
        await runner.run(again, tmp_path, on_progress=unwatched)
    for name in ("log-1.txt", "log-2.txt", "log.txt"):
        assert (tmp_path / name).read_text().count("to stderr") == 1
    assert (tmp_path / "log.txt").readlink() == Path("log-2.txt")


@pytest.mark.parametrize(
    ("what", "code", "word"),
    [
        ("object", "bad_result", "not a JSON value"),
        ("surrogate", "bad_result", "not a JSON value"),
        ("deep", "bad_result", "deeper than 64"),
        ("large", "result_too_large", "2,000,02"),
        ("huge", "result_too_large", "more than 16,777,216"),
    ],
)
async def test_a_result_that_cannot_travel_is_the_works_fault(
    runner: Runner, tmp_path: Path, what: str, code: str, word: str
) -> None:
    """Trying again on another node would give the same result."""
    broke = await failure(runner, "gives", tmp_path, what=what)
    assert (broke.code, broke.fault) == (code, "work")
    assert word in broke.reason


async def test_a_process_that_exits_without_an_outcome_is_reported_with_its_last_line(
    runner: Runner, tmp_path: Path
) -> None:
    """The status and the hint are in the reason."""
    broke = await failure(runner, "exits", tmp_path)
    assert (broke.code, broke.fault) == ("executor_died", "node")
    assert "exited with status 3" in broke.reason
    assert "about to leave" in broke.reason


async def test_a_killed_process_is_reported_with_the_signals_name(runner: Runner, tmp_path: Path) -> None:
    """What the kernel's out-of-memory killer does."""
    broke = await failure(runner, "killed", tmp_path)
    assert broke.code == "executor_died"
    assert "SIGKILL" in broke.reason


async def test_a_dead_process_is_noticed_though_a_fork_of_it_keeps_the_pipe(runner: Runner, tmp_path: Path) -> None:
    """The fork even left the process group."""
    assert "exited with status 5" in (await failure(runner, "forks", tmp_path)).reason
    os.kill(int((tmp_path / "fork.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("fails", [False, True])
async def test_prepare_run_and_teardown_are_each_called_once_in_this_order(
    runner: Runner, tmp_path: Path, fails: bool
) -> None:
    """Whatever comes of it."""
    await outcome(runner, "calls", tmp_path, fails=fails)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("called")] == ["called prepare", "called run", "called teardown"]


async def test_a_result_is_a_file_of_its_item_too(runner: Runner, tmp_path: Path) -> None:
    """``responses.json``, beside what the executor left there; a folder of the item that only its owner enters."""
    out_dir = tmp_path / "w-1"
    assert isinstance(await outcome(runner, "saves", out_dir, fails=False), Done)
    assert json.loads((out_dir / "responses.json").read_text()) == {"ok": True, "items": [{"index": 0}]}
    assert json.loads((out_dir / "extra.json").read_text()) == {"more": [1, 2]}
    assert names(out_dir) == {".computemesh", "extra.json", "log-1.txt", "log.txt", "responses.json"}
    assert out_dir.stat().st_mode & 0o777 == 0o700


async def test_the_result_of_an_earlier_attempt_does_not_stay_when_a_later_one_fails(
    runner: Runner, tmp_path: Path
) -> None:
    """Other files do."""
    await outcome(runner, "saves", tmp_path, fails=False)
    await failure(runner, "saves", tmp_path, fails=True)
    assert not (tmp_path / "responses.json").exists()
    assert (tmp_path / "extra.json").exists()


async def test_a_result_that_cannot_be_written_is_given_all_the_same(runner: Runner, tmp_path: Path) -> None:
    """The file is for people; the log says what was wrong with it."""
    (tmp_path / "responses.json").mkdir()
    assert isinstance(await outcome(runner, "saves", tmp_path, fails=False), Done)
    assert "IsADirectoryError" in (tmp_path / "log.txt").read_text()
    assert names(tmp_path) == {".computemesh", "extra.json", "log-1.txt", "log.txt", "responses.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has started")
@pytest.mark.parametrize("stays", [True, False])
async def test_a_daemon_that_left_the_process_group_ends_with_its_run(
    runner: Runner, tmp_path: Path, stays: bool
) -> None:
    """Forked twice, in a session of its own; the run is cancelled, or gives its result."""
    running = asyncio.create_task(outcome(runner, "daemon", tmp_path, stays=stays))
    await until(lambda: running.done() or (tmp_path / "daemon.pid").exists())
    await until(lambda: bool((tmp_path / "daemon.pid").read_text()))
    daemon = int((tmp_path / "daemon.pid").read_text())
    if stays:
        assert not gone(daemon)
        running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await until(lambda: gone(daemon))


async def test_cancelling_kills_the_process_and_what_it_started(runner: Runner, tmp_path: Path) -> None:
    """Both are gone when the cancelled run returns, within little more than a second."""
    notes: list[ProgressNote] = []
    running = asyncio.create_task(runner.run(task("sleeper"), tmp_path, on_progress=notes.append))
    await until(lambda: bool(notes))
    pids = [int(pid) for pid in notes[0].message.split()]
    assert not any(gone(pid) for pid in pids)
    cancelled_at = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: all(gone(pid) for pid in pids))
    assert time.monotonic() - cancelled_at < 1.5


async def test_a_family_that_ignores_sigterm_is_gone_soon_after_the_grace(runner: Runner, tmp_path: Path) -> None:
    """The executor, its child and its grandchild: SIGKILL follows for all of them when the grace is over."""

    def family() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]

    running = asyncio.create_task(outcome(runner, "stubborn_family", tmp_path))
    await until(lambda: len(family()) == 3)
    assert not any(map(gone, family()))
    cancelled_at = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: all(map(gone, family())))
    assert KILL_GRACE_S < time.monotonic() - cancelled_at < 2 * KILL_GRACE_S


async def test_cancelling_twice_does_not_spare_a_process_that_ignores_sigterm(runner: Runner, tmp_path: Path) -> None:
    """SIGKILL follows even when nobody waits for it any more."""
    notes: list[ProgressNote] = []
    running = asyncio.create_task(runner.run(task("stubborn"), tmp_path, on_progress=notes.append))
    await until(lambda: bool(notes))
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: gone(int(notes[0].message)))


async def test_a_run_beyond_its_time_is_ended_and_names_the_limit(runner: Runner, tmp_path: Path) -> None:
    """The limit given to run counts before the task's own."""
    notes: list[ProgressNote] = []
    result = await runner.run(task("sleeper"), tmp_path, on_progress=notes.append, timeout_s=1.499099)
    assert isinstance(result, Broke)
    assert (result.code, result.fault) == ("timeout", "node")
    assert result.reason.startswith("not done after 1.5 s, ")
    await until(lambda: all(gone(int(pid)) for note in notes for pid in note.message.split()))


async def test_what_a_finished_run_leaves_running_is_killed(runner: Runner, tmp_path: Path) -> None:
    """A result does not excuse a left-over process."""
    result = await outcome(runner, "leaves_child", tmp_path)
    assert isinstance(result, Done)
    await until(lambda: gone(result.result))


async def test_killing_the_agent_kills_the_whole_group_of_each_executor(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Nobody is left to clean up after kill -9, so the executor does it itself."""
    arguments = [sys.executable, "-c", PARENT, str(tmp_path), "sleeper"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(parent.stdout.readline)).split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        await until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has started")
async def test_killing_the_agent_kills_what_left_the_group_of_an_executor(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A daemon in a session of its own, which the kernel would have outlive everything."""
    arguments = [sys.executable, "-c", PARENT, str(tmp_path), "daemon"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        assert await asyncio.to_thread(parent.stdout.readline) == "started\n"
        daemon = int((tmp_path / "daemon.pid").read_text())
        assert not gone(daemon)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        await until(lambda: gone(daemon))


async def test_a_failing_prepare_is_reported_and_torn_down(runner: Runner, tmp_path: Path) -> None:
    """The log of the run shows what happened before the task was known."""
    assert (await failure(runner, "unprepared", tmp_path)).reason == "RuntimeError: no GPU here"
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log


@pytest.mark.parametrize(
    ("work_type", "word"),
    [("unheard_of", "there is: "), ("broken", "ModuleNotFoundError"), ("no_executor", "not a subclass")],
)
async def test_a_plugin_that_cannot_be_loaded_breaks_only_its_own_runs(
    runner: Runner, tmp_path: Path, work_type: str, word: str
) -> None:
    """The reason names what is wrong with it; the node lives on."""
    broke = await failure(runner, work_type, tmp_path)
    assert (broke.code, broke.fault) == ("no_executor", "node")
    assert word in broke.reason
    assert isinstance(await outcome(runner, "echo", tmp_path), Done)


async def test_a_probe_tells_what_an_executor_needs(runner: Runner) -> None:
    """The agent learns it without importing the plug-in."""
    assert await runner.probe("needs_engine") == Ready(needs_engine=True)
    assert await runner.probe("echo") == Ready(needs_engine=False)
    assert isinstance(await runner.probe("broken"), Broke)


async def test_a_spare_takes_the_task_and_is_replaced(environment: dict[str, str], tmp_path: Path) -> None:
    """One prepared process waits, before and after."""
    runner = Runner(spare_types=["echo"], environment=environment)
    try:
        assert await runner.probe("echo") == Ready()
        (spare,) = executors()
        result = await outcome(runner, "echo", tmp_path)
        assert isinstance(result, Done)
        assert result.result["pid"] == spare
        await until(lambda: len(executors() - {spare}) == 1)
    finally:
        await runner.close()
    assert not executors()


async def test_a_spare_that_was_killed_is_not_used(environment: dict[str, str], tmp_path: Path) -> None:
    """The task gets a new process instead of a failure."""
    runner = Runner(spare_types=["echo"], environment=environment)
    try:
        await runner.probe("echo")
        (spare,) = executors()
        os.kill(spare, signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(spare))
        assert isinstance(await outcome(runner, "echo", tmp_path), Done)
    finally:
        await runner.close()


async def test_closing_ends_runs_in_progress(environment: dict[str, str], tmp_path: Path) -> None:
    """Their outcome says why, and later runs are refused with the same."""
    runner = Runner(spare_types=["echo"], environment=environment)
    runner.warm()
    notes: list[ProgressNote] = []
    running = asyncio.create_task(runner.run(task("sleeper"), tmp_path, on_progress=notes.append))
    await until(lambda: bool(notes))
    await runner.close()
    result = await running
    assert isinstance(result, Broke)
    assert result.code == "node_stopped"
    assert await outcome(runner, "echo", tmp_path) == result
    await until(lambda: not executors())
