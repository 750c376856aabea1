"""``computemesh submit`` and ``work`` against a mesh that does work: results, logs, waiting, and large payloads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from computemesh.bus import Bus, NoResponder, TimedOut
from computemesh.cli import common
from computemesh.contracts import work
from computemesh.contracts.base import Role
from computemesh.contracts.work import Requirements, WorkGet, WorkItem, WorkState
from computemesh.testing import RunningMesh, install_executor, running_mesh
from computemesh.testing.cli import Cli

pytestmark = pytest.mark.asyncio(loop_scope="module")

TALK = """
import hashlib, pathlib, time
from computemesh.executors import ExecutionError, Executor

class Plugin(Executor):
    def run(self, task, out_dir, progress):
        said = task.payload
        print(f"attempt {task.attempt}", flush=True)
        progress("half", fraction=0.5)
        while said.get("until") and not pathlib.Path(said["until"]).exists():
            time.sleep(0.01)
        if task.attempt <= said.get("bad_attempts", 0):
            raise ExecutionError("not yet", fault=said.get("fault", "node"))
        if "text" in said:
            return hashlib.sha256(said["text"].encode()).hexdigest()
        return "r" * said.get("result", 0)
"""

ALL = ("node-registry", "work-marshaller", "resource-detector", "node-agent")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[RunningMesh]:
    """One node, two marshallers."""
    folder: Path = tmp_path_factory.mktemp("work-cli")
    plugin = install_executor(folder / "plugin", "talk", TALK)
    async with running_mesh(
        folder, ALL, copies={"work-marshaller": 2}, environment={**plugin, "COMPUTEMESH_SLOTS": "8"}
    ) as running:
        yield running


class Commands:
    """Commands as a client of the mesh."""

    def __init__(self, mesh: RunningMesh) -> None:
        self._cli = Cli(mesh.home.root.parent / "no-home")
        self._env = {
            "NATS_URL": mesh.url(Role.CLIENT),
            "COMPUTEMESH_NATS_URL_SERVICES": mesh.url(Role.SERVICES),
            "COMPUTEMESH_NATS_URL_OBSERVER": mesh.url(Role.OBSERVER),
        }

    async def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(self._cli.run, *words, stdin=stdin, **self._env)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return self._cli.start(*words, **self._env)

    async def ok(self, *words: str, stdin: str = "") -> str:
        done = await self.run(*words, stdin=stdin)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    async def json(self, *words: str, stdin: str = "") -> Any:
        return json.loads(await self.ok(*words, "--json", stdin=stdin))


@pytest.fixture
def commands(mesh: RunningMesh) -> Commands:
    return Commands(mesh)


async def ran(mesh: RunningMesh, work_id: str, **payload: Any) -> WorkState:
    await mesh.submit(WorkItem(work_id=work_id, work_type="talk", payload=payload))
    return (await mesh.record(work_id)).state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_result_is_printed_or_written_whatever_its_size(
    mesh: RunningMesh, commands: Commands, tmp_path: Path
) -> None:
    for work_id, size in (("small", 3), ("large", 2_000_000)):
        await ran(mesh, work_id, result=size)
        assert json.loads(await commands.ok("work", "result", work_id)) == "r" * size
        await commands.ok("work", "result", work_id, "-o", str(tmp_path / work_id))
        assert json.loads((tmp_path / work_id).read_text()) == "r" * size
    assert "computemesh work result large" in await commands.ok("work", "show", "large")
    assert names(tmp_path) == ["large", "small"]


async def test_where_there_is_no_result_the_exit_status_and_the_error_say_why(
    mesh: RunningMesh, commands: Commands, tmp_path: Path
) -> None:
    assert await ran(mesh, "broken", bad_attempts=1, fault="work") is WorkState.FAILED
    for work_id, status, code in (("broken", 1, "no_result"), ("nobody", 2, "not_found"), ("no/id", 2, "bad_message")):
        done = await commands.run("work", "result", work_id, "-o", str(tmp_path / "out"), "--json")
        assert (done.returncode, json.loads(done.stderr)["code"]) == (status, code)
    assert not names(tmp_path)


async def test_a_log_is_printed_and_followed_through_all_attempts(
    mesh: RunningMesh, commands: Commands, tmp_path: Path
) -> None:
    """What is said beside it goes to standard error."""
    payload = {"bad_attempts": 1, "until": str(tmp_path / "go")}
    await mesh.submit(WorkItem(work_id="followed", work_type="talk", payload=payload))
    following = commands.start("work", "logs", "-f", "followed")
    assert following.stdout is not None
    assert await asyncio.to_thread(following.stdout.readline) == "attempt 1\n"
    (tmp_path / "go").touch()
    printed, told = await asyncio.to_thread(following.communicate, timeout=60)
    assert (following.returncode, printed) == (0, "attempt 2\n"), told
    assert "attempt 2:" in told
    assert await commands.ok("work", "logs", "followed") == "attempt 2\n"
    assert await commands.ok("work", "logs", "followed", "--attempt", "1") == "attempt 1\n"
    part = await commands.json("work", "logs", "followed")
    assert (part["text"], part["complete"]) == ("attempt 2\n", True)
    assert (await commands.run("work", "logs", "nobody")).returncode == 2


async def test_a_payload_too_large_for_a_message_is_submitted_like_any_other(
    mesh: RunningMesh, commands: Commands, tmp_path: Path
) -> None:
    text = "word " * 500_000
    (tmp_path / "item.json").write_text(json.dumps({"work_type": "talk", "payload": {"text": text}}))
    record = await commands.json("submit", str(tmp_path / "item.json"), "--wait")
    assert record["payload"] == {}
    assert record["result"] == hashlib.sha256(text.encode()).hexdigest()


async def test_many_items_are_submitted_and_waited_for_together(mesh: RunningMesh, commands: Commands) -> None:
    """One that fails makes the exit status; the order is that of the file."""
    items = [{"work_id": f"many-{n}", "work_type": "talk", "payload": {"result": n}} for n in range(40)]
    records = await commands.json("submit", "-", "--wait", stdin=json.dumps(items))
    assert [(one["work_id"], one["result"]) for one in records] == [(f"many-{n}", "r" * n) for n in range(40)]
    bad = {"work_type": "talk", "payload": {"bad_attempts": 1, "fault": "work"}}
    done = await commands.run("submit", "-", "--wait", stdin=json.dumps([items[0], bad]))
    assert done.returncode == 1
    assert "failed" in done.stderr


async def test_waiting_ends_with_the_last_item_or_when_told(
    mesh: RunningMesh, commands: Commands, tmp_path: Path
) -> None:
    for number in (1, 2):
        payload = {"until": str(tmp_path / "go")}
        await mesh.submit(WorkItem(work_id=f"awaited-{number}", work_type="talk", payload=payload))
    late = await commands.run("work", "wait", "awaited-1", "awaited-2", "--timeout", "0.5", "--json")
    assert late.returncode == 1, late
    assert json.loads(late.stderr)["code"] == "not_finished", late
    waiting = asyncio.create_task(commands.run("work", "wait", "awaited-1", "awaited-2"))
    (tmp_path / "go").touch()
    done = await waiting
    assert (done.returncode, done.stdout) == (0, "awaited-1 completed\nawaited-2 completed\n")
    failed = await commands.run("work", "wait", "broken")
    assert (failed.returncode, failed.stdout) == (1, "broken failed  not yet\n")


async def test_a_command_that_waits_says_why_and_on_ctrl_c_that_the_item_goes_on(
    mesh: RunningMesh, commands: Commands
) -> None:
    """On a pipe in a line for each reason; also `work result`, which does not wait."""
    item = {"work_id": "unplaced", "work_type": "talk", "requirements": {"node_id": "elsewhere"}}
    why = "waits: the only node can never run it; the nearest is n1: the item is only for elsewhere"
    late = await commands.run("submit", "-", "--wait", "--timeout", "8", "--json", stdin=json.dumps(item))
    notice, error = [json.loads(line) for line in late.stderr.splitlines()]
    assert (late.returncode, notice, error["code"]) == (1, {"notice": f"unplaced {why}"}, "not_finished")
    waiting = commands.start("work", "wait", "unplaced")
    assert waiting.stderr is not None
    assert await asyncio.to_thread(waiting.stderr.readline) == f"unplaced {why}\n"
    waiting.send_signal(signal.SIGINT)
    printed, told = await asyncio.to_thread(waiting.communicate, timeout=60)
    assert (waiting.returncode, printed) == (130, "")
    assert told.strip() == "unplaced goes on; see `computemesh work show unplaced`"
    asked = await commands.run("work", "result", "unplaced")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert f"unplaced is pending: {why}; wait for it with `computemesh work wait unplaced`" in asked.stderr
    await commands.ok("work", "cancel", "unplaced")


async def test_explain_names_each_node_with_a_verdict(mesh: RunningMesh, commands: Commands) -> None:
    requirements = Requirements(node_id="elsewhere")
    await mesh.submit(WorkItem(work_id="choosy", work_type="talk", requirements=requirements))
    text = await commands.ok("work", "explain", "choosy")
    assert "choosy  pending" in text
    assert any(line.startswith("n1") and ("never" in line or "not now" in line) for line in text.splitlines()), text
    assert (await commands.json("work", "explain", "choosy"))["nodes"][0]["node_id"] == "n1"
    await commands.ok("work", "cancel", "choosy")


async def test_the_list_is_what_work_shows_and_narrows(mesh: RunningMesh, commands: Commands) -> None:
    for number in range(3):
        item = WorkItem(work_id=f"anns-{number}", work_type="talk", owner="ann")
        await mesh.submit(item)
        await mesh.record(item.work_id or "")
    found = await commands.json("work", "--owner", "ann", "--limit", "2")
    assert ([item["work_id"] for item in found["items"]], found["count"]) == (["anns-2", "anns-1"], 3)
    assert "anns-0" in await commands.ok("work", "list", "--owner", "ann", "--node", "n1", "--status", "completed")
    assert "No such work items." in await commands.ok("work", "--type", "ppo")


MLOC = """\
apiVersion: mloc/v1
kind: Task
metadata:
  name: say-hello
  owner: ann
spec:
  taskType: talk
  result: 4
  resources:
    replicas: 1
    hardware: {cpu: 1, memory: 64Mi}
"""


async def test_a_task_file_of_mloc_is_an_item(commands: Commands, tmp_path: Path) -> None:
    """What is wrong in one is said with the field and where it stands."""
    (tmp_path / "task.yaml").write_text(MLOC)
    record = await commands.json("submit", str(tmp_path / "task.yaml"), "--wait", "--priority", "7")
    assert (record["state"], record["owner"], record["priority"]) == ("completed", "ann", 7)
    (tmp_path / "wrong.yaml").write_text(MLOC.replace("replicas: 1", "replicas: none"))
    wrong = await commands.run("submit", str(tmp_path / "wrong.yaml"), "--json")
    assert wrong.returncode == 2
    assert json.loads(wrong.stderr)["field"] == "spec.resources.replicas"
    assert "line 10" in json.loads(wrong.stderr)["error"]


async def test_a_node_on_which_work_keeps_failing_is_shown_and_pardoned(mesh: RunningMesh, commands: Commands) -> None:
    assert "Nothing is blacklisted." in await commands.ok("work", "blacklist")
    for number in range(20):
        payload = {"bad_attempts": 1}
        item = WorkItem(work_id=f"unlucky-{number}", work_type="talk", payload=payload, retries_max=0)
        await mesh.submit(item)
        await mesh.record(item.work_id or "")
        if (await commands.json("work", "blacklist"))["entries"]:
            break
    text = await commands.ok("work", "blacklist", "--node", "n1")
    assert "n1" in text
    assert "not yet" in text
    findings = json.loads((await commands.run("doctor", "--json")).stdout)["findings"]
    (listed,) = [finding for finding in findings if finding["about"] == "blacklist"]
    assert "n1 gets no talk" in listed["text"]
    assert listed["todo"] == "computemesh work pardon n1"
    assert "n1 gets talk work again" in await commands.ok("work", "pardon", "n1")
    again = await commands.run("work", "pardon", "n1", "--json")
    assert (again.returncode, json.loads(again.stderr)["code"]) == (2, "not_blacklisted")


async def hears(bus: Bus) -> bool:
    """Whether the server still has somebody for questions about work, if only one that was just killed."""
    try:
        await bus.ask(work.GET, WorkGet(work_id="asked-for"), timeout_s=0.1)
    except NoResponder:
        return False
    except TimedOut:
        pass
    return True


async def test_a_question_waits_for_the_next_marshaller_and_says_so(
    mesh: RunningMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that acted is killed; the other takes over within seconds."""
    await ran(mesh, "asked-for")
    bus = await mesh.bus(Role.CLIENT)
    mesh.kill(await mesh.holder("work-marshaller"))
    while await hears(bus):
        pass
    record = await common.ask(bus, work.GET, WorkGet(work_id="asked-for"), acting=True)
    assert record.state is WorkState.COMPLETED
    assert "no work-marshaller acts at the moment; waiting for one" in capsys.readouterr().err
